"""Upstream's checkpoints: every name of its nine students has its place, a whole one becomes the same model, and what
is not whole, or no checkpoint, is refused and leaves nothing behind."""
import json
import lzma
import re
from pathlib import Path

import pytest
import torch

from esam3.core import VARIANTS
from esam3.evaluation.costs import load_model
from esam3.evaluation.upstream import (
    UpstreamStudent, as_upstream, body_of, convert, plan, read_pt, renamed, thirds, unfused, upstream_config)
from esam3.models.teacher import load_teacher

# names and shapes of the state dicts of upstream's own `build_efficientsam3_video_model`, all nine students
LISTED = json.loads(lzma.decompress((Path(__file__).parent / "upstream_names.json.xz").read_bytes()))
LAYER = "detector.transformer.encoder.layers.0.linear1.weight"
ATTENTION = "detector.transformer.decoder.layers.1.self_attn.in_proj_weight"
POINT = "tracker.sam_prompt_encoder.point_embeddings.2.weight"
FUSED = "detector.backbone.language_backbone.encoder.transformer.resblocks.1.attn.in_proj_weight"


@pytest.fixture(scope="module")
def toy(): return load_teacher("toy")


@pytest.fixture(scope="module")
def student(toy) -> UpstreamStudent:
    "es-ev-s with the toy teacher's decoders and a random backbone."
    torch.manual_seed(0)
    model = UpstreamStudent(upstream_config("es-ev-s", toy.config))
    model.load_state_dict(toy.state_dict(), strict=False)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def theirs(student) -> dict[str, torch.Tensor]:
    return as_upstream(student, [*LISTED["inherited"], *LISTED["es-ev-s"]])


def saved(tmp_path, held) -> Path:
    torch.save(held, tmp_path / "student.pt")
    return tmp_path / "student.pt"


@pytest.mark.parametrize("variant", ["es-rv-m", "es-tv-l", "es-ev-l"])
def test_every_name_of_upstream_has_its_place(variant):
    "And every place its tensor, of its shape, at SAM3's own size."
    with torch.device("meta"):
        model = UpstreamStudent(upstream_config(variant))
        state = {n: torch.empty(shape, dtype=torch.long if "num_batches" in n else torch.float32)
                 for n, shape in (LISTED["inherited"] | LISTED[variant]).items()}
    made = plan(unfused(state), model)
    assert str(made) == "" and made.taken.keys() == model.state_dict().keys() and len(made.unused) == 6
    assert len(LISTED["inherited"]) == 1045 and {*LISTED} == {"inherited", *VARIANTS}


@torch.no_grad()
def test_a_whole_checkpoint_is_the_same_model(tmp_path, toy, student, theirs):
    "Tensor by tensor and answer by answer; and `load_model`, which evaluation calls, knows the folder."
    made = convert(saved(tmp_path, {"model": theirs, "epoch": 3}), "es-ev-s", tmp_path / "out", toy.config,
                   toy.tokenizer)
    again = load_model(str(tmp_path / "out"))
    assert type(again) is UpstreamStudent and not again.training and again.space == "teacher"
    ours = student.state_dict()
    assert made.taken.keys() == ours.keys()
    assert all(torch.equal(t, ours[n]) for n, t in again.state_dict().items())
    pixels = torch.rand(1, 3, toy.image_size, toy.image_size) * 2 - 1
    at = torch.zeros(1, dtype=torch.long)
    answers = [m.detect(m.encode(pixels), toy.concepts(["a red disk"], at)).masks for m in (student, again)]
    assert torch.equal(*answers) and again.concepts(["a red disk"], at).input_ids.shape[1] > 2


WRAPS = {"plain": lambda s: s, "in a training loop's": lambda s: {"state_dict": s, "epoch": 3, "optimizer": {}},
         "in parallel": lambda s: {"model": {f"module.{k}": v for k, v in s.items()}},
         "of images alone": lambda s: {k.removeprefix("detector."): v for k, v in s.items()},
         "of images with a tracker": lambda s: {re.sub("^tracker", "inst_interactive_predictor.model", k): v
                                                for k, v in s.items()},
         "of their first stage": lambda s: {k.replace("trunk.model.", "trunk.model.student_trunk."): v
                                            for k, v in s.items()}}


@pytest.mark.parametrize("wrap", WRAPS)
def test_what_wraps_a_model_is_taken_off(wrap, tmp_path, theirs):
    some = {k: v for k, v in theirs.items() if v.numel() < 300}
    read = read_pt(saved(tmp_path, WRAPS[wrap](some)))
    assert read.keys() == some.keys() and all(torch.equal(t, some[n]) for n, t in read.items())


def test_what_shapes_do_not_tell_apart(student):
    "The order of the detector's layer norms and attentions, and of stages, written down once more."
    decoder, trunk = "detector.transformer.decoder.layers.0.", "detector.backbone.vision_backbone.trunk.model."
    pairs = {f"{decoder}norm1.bias": "vision_cross_attn_layer_norm.bias", f"{decoder}norm2.bias":
             "self_attn_layer_norm.bias", f"{decoder}catext_norm.bias": "text_cross_attn_layer_norm.bias",
             f"{decoder}norm3.bias": "mlp_layer_norm.bias", f"{decoder}cross_attn.q_proj.bias":
             "vision_cross_attn.q_proj.bias", f"{decoder}ca_text.q_proj.bias": "text_cross_attn.q_proj.bias"}
    inner = f"{trunk}backbone.model.stages.1.op_list.0.x"
    names = renamed([*pairs, inner], student.detector_model.vision_encoder.backbone.body)
    assert {k: names[k] for k in pairs} == {k: f"detector_model.detr_decoder.layers.0.{v}" for k, v in pairs.items()}
    assert names[inner].endswith("backbone.body.stages.1.blocks.0.x")


def test_what_is_fused_is_cut_in_order(student, theirs):
    "Queries, keys and values of one matrix; four rows of one table; CLIP's projection the other way round."
    ours, apart = student.state_dict(), unfused(theirs)
    q, k, v = theirs[FUSED].chunk(3)
    layer = "detector_model.text_encoder.text_model.encoder.layers.1.self_attn"
    assert all(torch.equal(ours[f"{layer}.{n}_proj.weight"], t) for n, t in zip("qkv", (q, k, v)))
    assert FUSED in theirs and FUSED not in apart and {*thirds(FUSED)} <= {*apart}
    points = torch.cat([theirs[f"tracker.sam_prompt_encoder.point_embeddings.{k}.weight"] for k in range(4)])
    assert torch.equal(ours["tracker_model.prompt_encoder.point_embed.weight"], points)
    turned = theirs["detector.backbone.language_backbone.encoder.text_projection"]
    assert torch.equal(ours["detector_model.text_encoder.text_projection.weight"], turned.T)


def test_what_is_there_whole_and_in_parts_is_refused(theirs):
    with pytest.raises(ValueError, match="1 weights are there twice"):
        unfused(theirs | {thirds(FUSED)[1]: torch.ones(1)})


WRONG = {
    "a tensor too many": (lambda s: s | {"detector.extra.weight": torch.ones(1)},
                          "1 have no place here: detector.extra.weight (1, first detector.extra.weight)"),
    "a layer too many": (lambda s: s | {LAYER.replace(".0.", ".9."): s[LAYER]}, "1 have no place here: "),
    "one too few": (lambda s: {k: v for k, v in s.items() if k != LAYER},
                    "1 are missing: detector_model.detr_encoder.layers (1, first"),
    "three too few": (lambda s: {k: v for k, v in s.items() if k != ATTENTION}, "3 are missing: detector_model.detr_d"),
    "another shape": (lambda s: s | {LAYER: s[LAYER][:-1]}, "1 do not fit: detector.transformer.encoder (1, first"),
    "other numbers": (lambda s: s | {LAYER: s[LAYER].long()}, "1 do not fit: "),
    "a number for a matrix": (lambda s: s | {ATTENTION: torch.ones(())}, "3 do not fit: "),
    "one place claimed twice": (lambda s: s | {LAYER.replace("linear1", "mlp.fc1"): s[LAYER]}, "2 do not fit: "),
    "three rows of four": (lambda s: {k: v for k, v in s.items() if k != POINT}, "3 have no place here: tracker.sam_p"),
    "rows of another shape": (lambda s: s | {POINT: s[POINT][:, 1:]}, "4 have no place here: tracker.sam_prompt_enc"),
    "no tracker": (lambda s: {k: v for k, v in s.items() if k.startswith("detector.")}, "are missing: tracker_model."),
    "another text encoder": (lambda s: {k.replace("language_backbone.encoder", "language_backbone.student"): v
                                        for k, v in s.items()}, "have no place here: detector.backbone.language_b")}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_not_whole_is_listed(wrong, student, theirs):
    change, said = WRONG[wrong]
    assert str(plan(unfused(theirs), student)) == "" and said in str(plan(unfused(change(theirs)), student))


def test_what_is_not_whole_is_refused(tmp_path, toy, theirs):
    "Another variant: its names, its places, and shapes of the head; nothing is written."
    with pytest.raises(ValueError, match="is no whole es-rv-s") as e:
        convert(saved(tmp_path, theirs), "es-rv-s", tmp_path / "out", toy.config)
    header, *faults = str(e.value).splitlines()
    assert ["have no place here" in faults[0], "are missing" in faults[1], "do not fit" in faults[2]] == [True] * 3
    assert [p.name for p in tmp_path.iterdir()] == ["student.pt"], "nothing is left behind"
    with pytest.raises(ValueError, match="unknown variant"): upstream_config("es-xx-s", toy.config)


class Hostile:
    "Writes a file when it is unpickled."
    def __init__(self, trace: Path): self.trace = trace
    def __reduce__(self): return Path.touch, (self.trace,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_hostile_pickle_runs_nothing(zipped, tmp_path):
    path = tmp_path / "hostile.pt"
    torch.save({"model": {"a": torch.ones(1)}, "more": Hostile(tmp_path / "ran")}, path,
               _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"hostile\.pt: it wants to call \S+, and only tensors are read$"):
        read_pt(path)
    assert not (tmp_path / "ran").exists()


BROKEN = {"short": (lambda whole: whole[:len(whole) // 2], "cut short"), "empty": (lambda _: b"", "cut short"),
          "text": (lambda _: b"no pickle", "no file of tensors"),
          "zip": (lambda _: b"PK\x05\x06" + bytes(18), "cut short")}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_file_is_one_line(broken, tmp_path, theirs):
    change, said = BROKEN[broken]
    path = saved(tmp_path, {LAYER: theirs[LAYER]})
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=said) as e: read_pt(path)
    assert "\n" not in str(e.value) and str(path) in str(e.value)


@pytest.mark.parametrize("held, said", [([1, 2], "no weights by name"), ({}, "no weights by name"),
                                        ({"model": {"a": 3}}, "no named tensors, as 'a'"),
                                        ({"module.a": torch.ones(1), "detector.a": torch.ones(1)}, "there twice")])
def test_what_holds_no_weights_is_one_line(held, said, tmp_path):
    with pytest.raises(ValueError, match=said) as e: read_pt(saved(tmp_path, held))
    assert "\n" not in str(e.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.pt"): read_pt(tmp_path / "nothing.pt")


def test_linear_attention_divides_as_upstream_does():
    assert {m.eps for m in body_of("efficientvit_b0").modules() if type(m).__name__ == "LiteMLA"} == {1e-15}
