"Every call works in the model's type: bf16, fp16 and fp32, for a teacher and for students with each kind of memory."
import re
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from esam3.data.batches import load_recipe, open_dataset
from esam3.data.samples import ImageSample, boxes_of
from esam3.evaluation.heldout import opening, prompt_scores
from esam3.evaluation.protocols import answer_images, follow
from esam3.models.concept_video import Exemplar, follow_concepts
from esam3.models.perceiver import AveragePooling
from esam3.models.student import EfficientSam3, build_student
from esam3.models.teacher import HALF, PLACES, Bank, Features, Prompts, Sam3, gate, load_teacher
from esam3.models.tracker import Follower, as_batch, look
from esam3.training.concepts import PhraseEmbeddings

ONE = torch.zeros(1, dtype=torch.long)
STUDENTS = ("dense", "perceiver", "pooling")


@cache
def model(who: str, dtype: torch.dtype) -> Sam3:
    "The toy teacher, or an untrained student of it, in a type."
    if dtype != torch.float32: return deepcopy(model(who, torch.float32)).to(dtype)
    if who == "teacher": return load_teacher()
    torch.manual_seed(0)
    student = build_student("es-ev-s", model("teacher", dtype), who)
    student.new_det_thresh = student.score_threshold_detection = 0.0  # it is sure of nothing
    return student


@cache
def data() -> SimpleNamespace:
    "Two images, the first three frames of a clip, and three of a clip with phrases, of the toy world."
    recipe = load_recipe("tiny")
    images, clips, concepts = (open_dataset(recipe, "held_out", kind) for kind in ("images", "clips", "concept_clips"))
    clip, named = clips.read(0, start=0, most=3), concepts.read(0, start=0, most=3)
    there = next(p for p in named.phrases if p.instances)
    shown = Exemplar(1, boxes_of(named.masks[there.instances[0], 1][None]))
    return SimpleNamespace(reader=images, images=[images.read(0), images.read(1)], clip=clip, frames=named.frames,
                           concepts=[*(p.text for p in named.phrases if p.instances), shown, "a white disk"])


@cache
def images(who: str) -> SimpleNamespace:
    "Two images for a model, and prompts of each kind for their instances."
    m = model(who, torch.float32)
    batch = as_batch(m, data().images)
    prompts = {start: opening(m, batch, start) for start in ("box", "point", "mask")}
    centre = lambda xyxy: torch.cat([(xyxy[:, :2] + xyxy[:, 2:]) / 2, xyxy[:, 2:] - xyxy[:, :2]], 1) / m.image_size
    return SimpleNamespace(batch=batch, prompts=prompts, boxes=centre(prompts["box"].points.flatten(1))[:, None])


@cache
@torch.no_grad()
def features(who: str, dtype: torch.dtype) -> Features: return look(model(who, dtype), images(who).batch)


def encode(who: str, dtype: torch.dtype) -> dict[str, Tensor]:
    seen = features(who, dtype)
    assert {m.dtype for m in (*seen.detector, *seen.tracker)} == {dtype}, "maps are in the model's type"
    return {f"map {k}": m for k, m in enumerate((*seen.detector, *seen.tracker))}


def detections(who: str, dtype: torch.dtype, *shown: Tensor) -> dict[str, Tensor]:
    m, image_index, seen = model(who, dtype), images(who).batch.image_index, features(who, dtype)
    phrases = [None if shown else "red star"] * len(image_index)
    found = m.detect(seen, m.concepts(phrases, image_index, *shown))
    sure = found.scores() > 0.4
    assert found.logits.dtype == found.presence.dtype == torch.float32
    return {"scores": found.scores(), "boxes": found.boxes, "masks": found.masks[sure] > 0}


def detect_phrases(who: str, dtype: torch.dtype) -> dict[str, Tensor]: return detections(who, dtype)


def detect_exemplars(who: str, dtype: torch.dtype) -> dict[str, Tensor]:
    boxes = images(who).boxes
    return detections(who, dtype, boxes, torch.ones(len(boxes), 1, dtype=torch.long))


def decode(start: str) -> Callable[[str, torch.dtype], dict[str, Tensor]]:
    def answer(who: str, dtype: torch.dtype) -> dict[str, Tensor]:
        out = model(who, dtype).decode(features(who, dtype), images(who).prompts[start])
        return {"scores": out.iou, "chances": out.object_logits.sigmoid(), "masks": out.best()[0] > 0}
    return answer


def memory(who: str, dtype: torch.dtype) -> dict[str, Tensor]:
    "What is remembered of the masks of boxes, and what is recalled of it."
    m, seen, prompts = model(who, dtype), features(who, dtype), images(who).prompts["box"]
    out = model(who, torch.float32).decode(features(who, torch.float32), prompts)  # the same for all types
    mask, _, pointer = out.best()
    kept = m.remember(seen, prompts.image_index, gate(mask, out.object_logits), out.object_logits, pointer)
    assert kept.pos.dtype == torch.float32
    recalled = m.recall(seen, prompts.image_index, Bank([(0, kept)], [(1, pointer)]))
    assert recalled.dtype == dtype
    return {"map tokens": kept.tokens, "map places": kept.pos, "map recalled": recalled}


def tracker(who: str, dtype: torch.dtype) -> dict[str, Tensor]:
    "A first mask, followed through three frames."
    m, clip = model(who, dtype), data().clip
    frames = [as_batch(m, [ImageSample("", image, clip.masks[:, 0])]) for image in clip.frames]
    follower, prompts = Follower(m), opening(m, frames[0], "mask")
    out = [follower.step(look(m, one), None if k else prompts) for k, one in enumerate(frames)]
    masks, logits = torch.stack([o.best()[0] for o in out]), torch.stack([o.object_logits for o in out])
    return {"masks": masks > 0, "chances": logits.sigmoid()}


def clips(who: str, dtype: torch.dtype) -> dict[str, Tensor]:
    "`protocols.follow`, with clicks, and without maps in its memory."
    names = ("point+2", "pointers_only")
    out = [frame for frame in follow(model(who, dtype), data().clip, names)]
    assert all(frame[n].dtype == np.float32 for frame in out for n in names)
    return {"masks": torch.tensor(np.stack([frame[n] for frame in out for n in names]) > 0)}


def prompted_images(who: str, dtype: torch.dtype) -> dict[str, Tensor]:
    out = answer_images(model(who, dtype), data().images, ("box", "point+2"))
    return {f"masks {k}": torch.tensor(np.concatenate([masks[k] for masks in out.values()])) for k in range(2)}


def prompt_miou(who: str, dtype: torch.dtype) -> dict[str, Tensor]:
    found = prompt_scores(model(who, dtype), data().reader, 2)
    return {"scores": torch.tensor([v for k, v in found.items() if k != "by_count"])}


@cache
def eager(who: str, dtype: torch.dtype) -> Sam3:
    "A model that sees a concept wherever it is not sure, and gives objects a new prompted frame every other frame."
    m = deepcopy(model(who, dtype))
    m.recondition_every_nth_frame, m.high_conf_thresh, m.high_iou_thresh = 2, 0.0, 0.0
    m.new_det_thresh = min(m.new_det_thresh, 0.5)
    if who == "teacher": return m
    one = lambda f: replace(f, masks=f.masks[:, :1] + 2, boxes=f.boxes[:, :1], logits=f.logits[:, :1])
    m.detect = lambda *asked: one(type(m).detect(m, *asked))
    return m


def concepts(who: str, dtype: torch.dtype) -> dict[str, Tensor]:
    "Phrases and an exemplar through a clip."
    m = eager(who, dtype)
    found = follow_concepts(m, data().frames, data().concepts)
    assert found and who != "teacher" or {type(data().concepts[f.query]) for f in found} == {str, Exemplar}
    masks = torch.tensor(np.stack([np.asarray(f.masks) for f in found]))
    return {"scores": torch.tensor([f.score for f in found]), "masks": masks}


CALLS = {f.__name__: f for f in (encode, detect_phrases, detect_exemplars, memory, tracker, clips, prompted_images,
                                 prompt_miou, concepts)}
CALLS |= {f"decode {start}": decode(start) for start in ("box", "point", "mask")}


def iou(a: Tensor, b: Tensor) -> Tensor:
    "Of masks [..., H, W] where one of the two is not empty."
    both, one = (a & b).sum((-2, -1)), (a | b).sum((-2, -1))
    return (both / one)[one > 0]


# Of maps the relative distance, of masks 1 - mean IoU and of the worst, of the others the largest difference. A click
# goes where a
# mask is most wrong, so that after one more even fp16 may answer otherwise.
TOLERANCE = {torch.float16: {"map": 0.005, "masks": (0.05, 0.15), "scores": 0.03, "chances": 0.005, "boxes": 0.002},
             torch.bfloat16: {"map": 0.03, "masks": (0.1, 0.2), "scores": 0.05, "chances": 0.05, "boxes": 0.01}}


def distance(kind: str, got: Tensor, want: Tensor) -> tuple[float, ...]:
    "How far a result is from that of a float32 model; the same shape is asked for."
    assert got.shape == want.shape
    if kind == "masks":
        missed = 1 - iou(got, want)
        return (missed.mean().item(), missed.max().item()) if len(missed) else (0.0, 0.0)
    far = (got.float() - want).abs()
    return (far.norm().item() / want.norm().item(),) if kind == "map" else (far.max().item(),)


CASES = [("teacher", name, dtype) for name in CALLS for dtype in HALF]
CASES += [("perceiver", name, torch.bfloat16) for name in CALLS]
CASES += [(who, name, dtype) for who, dtype in (("dense", torch.bfloat16), ("pooling", torch.float16))
          for name in ("memory", "tracker")]


@pytest.mark.parametrize(("who", "name", "dtype"), CASES, ids=str)
@torch.no_grad()
def test_call(who: str, name: str, dtype: torch.dtype) -> None:
    "It runs, says nearly what a float32 model says, and leaves the weights as they are."
    want, got = (CALLS[name](who, t) for t in (torch.float32, dtype))
    assert got.keys() == want.keys()
    for field, value in want.items():
        kind = field.split()[0]
        if kind in ("scores", "boxes", "chances"): assert got[field].dtype == torch.float32, field
        assert got[field].isfinite().all()
        allowed = np.atleast_1d(TOLERANCE[dtype][kind])
        far = np.array(distance(kind, got[field], value))
        assert (far <= allowed).all(), (field, far)
    assert {p.dtype for p in model(who, dtype).parameters()} == {dtype}


@pytest.mark.parametrize(("who", "inner", "outer"), [("teacher", a, b) for a in HALF for b in HALF]
                         + [("pooling", *HALF)], ids=str)
@torch.no_grad()
def test_autocast_over_a_half_model(who: str, inner: torch.dtype, outer: torch.dtype) -> None:
    m, prompts = model(who, inner), images(who).prompts["box"]
    wanted = [CALLS[name](who, torch.float32) for name in ("decode box", "detect_exemplars")]
    if (who, inner, outer) == ("teacher", torch.bfloat16, torch.bfloat16):  # as an evaluation may ask
        with torch.autocast("cpu", outer): got = clips(who, inner)
        assert iou(got["masks"], clips(who, torch.float32)["masks"]).mean() > 0.9
    with torch.autocast("cpu", outer):
        seen = look(m, images(who).batch)
        out = m.decode(seen, prompts)
        kept = m.remember(seen, prompts.image_index, gate(out.best()[0], out.object_logits), out.object_logits,
                          out.best()[2])
        again = m.decode(seen, replace(prompts, points=prompts.points[:, :0], labels=prompts.labels[:, :0]),
                         m.recall(seen, prompts.image_index, Bank([(0, kept)], [(1, kept.pointer)])))
        shown = images(who).boxes, torch.ones(len(prompts.image_index), 1)
        found = m.detect(seen, m.concepts([None] * len(prompts.image_index), prompts.image_index, *shown))
    assert iou(out.best()[0] > 0, wanted[0]["masks"]).mean() > 0.9
    assert (found.boxes - wanted[1]["boxes"]).abs().max() < 0.01
    assert found.boxes.dtype == kept.pos.dtype == torch.float32
    assert again.masks.isfinite().all() and again.iou.dtype == torch.float32


def places(m: Sam3, seen: Features) -> dict[str, Tensor]:
    "What says where, of prompts and memories."
    at, n = torch.Generator().manual_seed(1), 2
    labels = torch.tensor([[1, 0, -10], [2, 3, -10]], dtype=torch.int32)
    prompts = Prompts(torch.zeros(n, dtype=torch.long), torch.rand(n, 3, 2, generator=at) * m.image_size, labels)
    sparse, dense = m._embed_prompts(prompts)
    _, when = m._pointer_tokens(Bank(pointers=[(k, torch.zeros(n, m.hidden, dtype=m.dtype)) for k in (1, 5)]))
    decoder = m.detector_model.detr_decoder
    anchors = torch.rand(1, 4, 4, generator=at)
    bias = decoder._get_rpb_matrix(anchors, (torch.tensor(m.grid), torch.tensor(m.grid)))
    query = decoder.ref_point_head(decoder.position_encoding.encode_boxes(anchors))
    moved = decoder.box_head(torch.rand(1, 4, m.hidden, generator=at))
    wide = m.tracker_model.get_image_wide_positional_embeddings()
    tokens, _ = m._prompt_tokens(seen, m.concepts([None], ONE, torch.tensor([[[0.4, 0.5, 0.3, 0.3]]]), ONE[None] + 1))
    return {"points": sparse, "no mask": dense, "pointers": when, "bias": bias, "query": query, "moved": moved,
            "map": m._position(seen.tracker[2]), "image": wide, "cells": m.memory_xy(), "exemplar": tokens[:, -2:]}


@pytest.mark.parametrize("dtype", HALF, ids=str)
@torch.no_grad()
def test_places_are_computed_in_float32(dtype: torch.dtype) -> None:
    "Of the rounded weights, but nothing else is rounded: not the coordinates, not the frequencies, not what comes out."
    half, seen = model("perceiver", dtype), features("perceiver", dtype).pick(ONE)
    wide = deepcopy(half).float()
    want = places(wide, Features(*(tuple(m.float() for m in maps) for maps in (seen.detector, seen.tracker))))
    for name, got in places(half, seen).items():
        assert got.dtype == torch.float32 and (got.nan_to_num() - want[name].nan_to_num()).abs().max() <= 1e-6, name


@torch.no_grad()
def test_anchors_are_not_rounded() -> None:
    "Learned in bf16, but their boxes are float32 from the first layer on."
    m = model("teacher", torch.bfloat16)
    asked, seen = [], features("teacher", torch.bfloat16)
    decoder = m.detector_model.detr_decoder
    hook = decoder.ref_point_head.register_forward_pre_hook(lambda _, given: asked.append(given[0]))
    m.detect(seen, m.concepts(["red star"], ONE))
    hook.remove()
    want = decoder.position_encoding.encode_boxes(decoder.reference_points.weight.float().sigmoid()[None])
    assert {a.dtype for a in asked} == {torch.float32} and torch.equal(asked[0], want)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_tables_of_places_survive_conversions(dtype: torch.dtype) -> None:
    tables = lambda m: {n: b for n, b in m.named_buffers() if re.search(PLACES, n)}
    exact, half = tables(model("teacher", torch.float32)), model("teacher", dtype)
    for m in (half, deepcopy(half).float(), deepcopy(half).to(torch.float64).to(dtype)):
        assert exact.keys() == tables(m).keys() and all(torch.equal(b, exact[n]) for n, b in tables(m).items())


def test_model_without_weights_is_converted() -> None:
    with torch.device("meta"): empty = Sam3(model("teacher", torch.float32).config).to(torch.bfloat16)
    assert empty.to_empty(device="cpu").dtype == torch.bfloat16


@pytest.mark.parametrize("who", ["teacher", "perceiver", "pooling"])
@torch.no_grad()
def test_attention_is_of_one_type(who: str, monkeypatch: pytest.MonkeyPatch) -> None:
    "Kernels of other devices take queries, keys, values and biases of one type only, and a CPU's takes what it gets."
    seen, attend = [], F.scaled_dot_product_attention
    def watched(*given, **named) -> Tensor:
        seen.append({t.dtype for t in (*given, *named.values()) if isinstance(t, Tensor)} - {torch.bool})
        return attend(*given, **named)
    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    for name in ("detect_phrases", "detect_exemplars", "memory", "decode point"): CALLS[name](who, torch.bfloat16)
    assert {len(types) for types in seen} == {1} and seen.count({torch.bfloat16}) > 20
    assert {torch.float32} in seen, "exemplars are read in float32"


def test_pixels_of_another_type() -> None:
    for who in ("teacher", "perceiver"):
        m = model(who, torch.float32)
        pixels = torch.rand(1, 3, m.image_size, m.image_size)
        for dtype in (*HALF, torch.float64):
            with torch.no_grad(): assert m.encode(pixels.to(dtype)).tracker[2].dtype == torch.float32


def test_gradients_reach_every_weight() -> None:
    "Also those that are read as float32."
    m, boxes = deepcopy(model("perceiver", torch.bfloat16)).requires_grad_(True), images("perceiver").boxes[:1]
    prompts = images("perceiver").prompts["point"]
    seen = features("perceiver", torch.bfloat16)
    out = m.decode(seen, prompts)
    kept = m.remember(seen, prompts.image_index, out.best()[0], out.object_logits, out.best()[2])
    again = m.decode(seen, prompts, m.recall(seen, prompts.image_index, Bank([(0, kept)], [(1, kept.pointer)])))
    found = m.detect(seen, m.concepts(["red star"], ONE, boxes, ONE[None] + 1))
    sum(t.float().square().mean() for t in (again.masks, found.boxes, found.masks)).backward()
    grads = {n: p.grad for n, p in m.named_parameters() if p.grad is not None}
    assert {g.dtype for g in grads.values()} == {torch.bfloat16}
    reached = {n for n, g in grads.items() if g.abs().sum() > 0}
    for name in ("detr_decoder.reference_points", "geometry_encoder.boxes_direct_project", "prompt_encoder.point_embed",
                 "detr_decoder.box_head.layer1", "temporal_positional_encoding_projection", "perceiver.layer_norm",
                 "text_projection"):
        assert any(name in n for n in reached), name


@torch.no_grad()
def test_saved_as_it_is(tmp_path: Path) -> None:
    "As `transformers` has it: a file keeps the model's type and is loaded in it, unless `dtype` says otherwise."
    half = model("perceiver", torch.bfloat16)
    half.save_pretrained(tmp_path)
    exact = {n: b for n, b in half.named_buffers() if re.search(PLACES, n)}
    for want, asked in ((torch.bfloat16, {}), (torch.float32, {"dtype": torch.float32})):
        m = EfficientSam3.from_pretrained(tmp_path, **asked)
        assert {p.dtype for p in m.parameters()} == {want}, asked
        assert all(torch.equal(b, exact[n]) for n, b in m.named_buffers() if re.search(PLACES, n)), asked
        assert all(torch.equal(p, q.to(want)) for p, q in zip(m.parameters(), half.parameters())), asked
        prompts = images("perceiver").prompts["box"]
        assert m.decode(features("perceiver", want), prompts).masks.dtype == want


@torch.no_grad()
def test_pooled_places_are_not_rounded() -> None:
    "Windows of a grid of 3 × 3 hold four, six or nine cells: a third is no bf16 number."
    pool, at = AveragePooling((3, 3)), torch.Generator().manual_seed(0)
    x, pos = torch.rand(1, 64, 8, 8, generator=at), torch.rand(1, 64, 8, 8, generator=at)
    assert torch.equal(pool(x.bfloat16(), pos)[1], pool(x, pos)[1]) and pool(x.bfloat16(),
        pos)[0].dtype == torch.bfloat16


def test_phrase_book_of_a_half_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "Its tokens are its own, and float32 on disk and in hand."
    monkeypatch.setattr("esam3.training.concepts.cache_dir", lambda: tmp_path)
    embedders = [PhraseEmbeddings(model("teacher", dtype)) for dtype in (torch.float32, torch.bfloat16)]
    (want, _), (got, _) = (embed(["red star", None]) for embed in embedders)
    assert embedders[0].folder != embedders[1].folder and got.dtype == torch.float32
    assert 0 < (got - want).norm() / want.norm() < 0.02


@torch.no_grad()
def test_real_geometry_in_bf16() -> None:
    "SAM3's sizes, three frames of one image: what is tracked is what was pointed at."
    m = load_teacher("thin-sam3").to(torch.bfloat16)
    pixels = torch.randn(1, 3, m.image_size, m.image_size, generator=torch.Generator().manual_seed(0))
    seen, follower = m.encode(pixels), Follower(m)
    prompts = Prompts(ONE, torch.tensor([[[500.0, 400.0]]]), torch.ones(1, 1, dtype=torch.int32))
    out = [follower.step(seen, None if k else prompts) for k in range(3)]
    assert {(o.best()[0].shape, o.masks.dtype) for o in out} == {((1, 288, 288), torch.bfloat16)}
    assert all(o.masks.isfinite().all() for o in out)
    wide = m.float().decode(Features((), tuple(t.float() for t in seen.tracker)), prompts)
    assert iou(out[0].best()[0] > 0, wide.best()[0] > 0).mean() > 0.9
