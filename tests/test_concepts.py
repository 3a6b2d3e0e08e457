"""Concepts: the index of confusable phrases, queries for nobody, targets and matching in float32 whatever autocast
does, and losses of parts."""
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import box_convert, generalized_box_iou, generalized_box_iou_loss

import esam3.training.concepts
from esam3.data.batches import collate_images, load_recipe, open_dataset
from esam3.data.samples import Phrase
from esam3.data.toyworld import COLORS, PATTERNS, SHAPES
from esam3.models.teacher import Detections, load_teacher
from esam3.training.concepts import (
    COST, WEIGHTS, ConceptQueries, Confusables, PhraseEmbeddings, QuerySampling, Targets, concept_losses,
    concepts_of, content_words, head_noun, match, match_all, match_cost, query_counts, sample_queries, soft_focal,
    taught_targets, true_targets, vocabulary, worth_imitating)
from esam3.training.losses import mask_loss


@pytest.fixture(scope="module")
def teacher(): return load_teacher("toy")


@pytest.fixture(scope="module")
def student(teacher):
    from esam3.models.student import build_student
    torch.manual_seed(0)
    return build_student("es-ev-s", teacher).eval()


@pytest.fixture(scope="module")
def reader(): return open_dataset(load_recipe("tiny"), "train", "concept_images")


@pytest.fixture(scope="module")
def batch(reader, teacher):
    return collate_images([reader.read(i) for i in range(4)], teacher.image_size, 128, max_instances=0)


def chance(batch, seed: int = 0) -> list[np.random.Generator]:
    "A generator for each image of a batch: the same for all."
    return [np.random.default_rng(seed)] * len(batch.phrases)


def one_word_apart(phrase: str, words: list[str]) -> list[str]:
    "The slow way: phrases as long as this one that differ from it in exactly one word."
    own = phrase.split()
    return [p for p in words if len(w := p.split()) == len(own) and sum(a != b for a, b in zip(w, own)) == 1]


TOY = sorted({*(f"{c} {s}" for c in COLORS for s in SHAPES), *(
    f"{p} {c} {s}" for p in PATTERNS for c in COLORS for s in SHAPES),
              *SHAPES, *(f"{c} thing" for c in COLORS)})


@pytest.mark.parametrize("model", ["toy", None])
def test_the_toy_world_is_asked_as_ever(model, teacher):
    "Its whole vocabulary, in the same order: a seed draws the same queries as from the slow search."
    index = Confusables(TOY, teacher if model else None)
    assert all(list(index(p)) == one_word_apart(p, TOY) for p in TOY)
    slow = lambda phrase: one_word_apart(phrase.lower(), TOY)
    batch = SimpleNamespace(phrases=[[Phrase("Red star", (
        0,), ""), Phrase("ring", (), "hard-shape"), Phrase("blue thing", (), "easy")]] * 8,
                            boxes=torch.tensor([[0.0, 0, 9, 9]]), image_index=torch.tensor([0]))
    a, b = (sample_queries(batch, chance(batch, 3), QuerySampling(each=20), kin) for kin in (index, slow))
    assert a.phrases == b.phrases and a.kinds == b.kinds and torch.equal(a.boxes,
        b.boxes) and a.kinds.count("proposed") > 3


@pytest.mark.parametrize(("phrase", "head"), [("a curtain", "curtain"), ("The white shower curtains", "curtain"),
                                              ("woman in a red dress", "woman"),
                                              ("a person's hair", "hair"), ("a red and white barrier", "barrier"),
                                              ("the lower body of the person", "body"),
                                              ("the glass", "glass"), ("people wearing hats", "people"),
                                              ("a small, white machine", "machine"), ("", "")])
def test_head_nouns(phrase, head): assert head_noun(content_words(phrase)) == head


NOUNS = ("curtain", "chair", "cup", "dog", "window", "rope", "star", "jacket", "bird", "wheel", "lamp", "plate")


def large_vocabulary(count: int = 51155) -> tuple[str, ...]:
    "So many different phrases like SA-Co's."
    rng = random.Random(0)
    word = lambda: "".join(rng.choice("bdfgklmnprt") + rng.choice("aeiou") for _ in range(rng.randint(1, 3)))
    adjectives, nouns, out = [word() for _ in range(400)], [*NOUNS, *(word() for _ in range(2000))], set()
    while len(out) < count:
        noun = rng.choice(nouns)
        form = rng.random()
        one, two = rng.sample(adjectives, 2)
        out.add(f"a {noun}" if form < 0.1 else f"{one} {noun}" if form < 0.5 else f"a {one} {two} {noun}" if form < 0.8
                else
                f"{noun} on the {one} {rng.choice(nouns)}")
    return tuple(sorted(out))


def test_a_large_vocabulary_is_not_gone_through(monkeypatch):
    "51,155 phrases: few answers to a phrase, and a batch of 128 queries in a fraction of a second."
    words = large_vocabulary()
    index = Confusables(words)
    kin = index("a curtain")
    assert 4 <= len(kin) <= 16 and all("curtain" in p for p in kin) and not {*map(content_words, kin)} & {("curtain",)}
    pick = random.Random(1)
    phrases = [[Phrase(pick.choice(words), (0,) if k < 3 else (), "" if k < 3 else "hard-other") for k in range(6)]
               for _ in range(32)]
    batch = SimpleNamespace(phrases=phrases, boxes=torch.tensor([[0.0, 0, 9, 9]]), image_index=torch.tensor([0]))
    looked = []
    monkeypatch.setattr(esam3.training.concepts, "content_words",
                        lambda phrase: (looked.append(phrase), content_words(phrase))[1])
    start = time.perf_counter()
    queries = sample_queries(batch, chance(batch, 0), QuerySampling(), index)
    assert time.perf_counter() - start < 1 and len(looked) < 10000 and queries.kinds.count("proposed") > 5
    assert {p for p, k in zip(queries.phrases, queries.kinds) if k == "proposed"} <= {*words}


def nearest_first(table: torch.Tensor, words: list[str]) -> SimpleNamespace:
    "A model whose text encoder has one token a word, with these embeddings."
    number = {w: i for i, w in enumerate(words)}
    tokenizer = lambda phrases, **_: {"input_ids": [[number[w] for w in p.split() if w in number] for p in phrases]}
    encoder = SimpleNamespace(get_input_embeddings=lambda: torch.nn.Embedding.from_pretrained(table))
    return SimpleNamespace(tokenizer=tokenizer, detector_model=SimpleNamespace(text_encoder=encoder))


def test_the_nearest_of_many_are_taken():
    """Of 40 instances that a lone noun could be exchanged for, those with the next angles; where nothing is akin, the
    nearest of all."""
    words = [f"w{i:02d}x" for i in range(40)]
    angle = torch.arange(40) / 40
    model = nearest_first(torch.stack([angle.cos(), angle.sin()], 1), words)
    index = Confusables(words, model, k=4)
    assert index("w20x") == ("w18x", "w19x", "w21x", "w22x") and index("w00x") == ("w01x", "w02x", "w03x", "w04x")
    assert Confusables(words, k=4)("w20x") == (), "without a model a mask that 39 phrases fit is no kinship"
    long = Confusables([*words, "w30x of w33x"], model, k=4)
    assert long("w30x of w33x") == ("w29x", "w31x", "w32x", "w34x"), "nor what it is anyway, nor a word of it"


def test_no_phrase_is_proposed_that_is_labelled():
    "Not even in other words."
    index = Confusables(("blue curtain", "red curtain", "the red curtains", "green curtain"))
    labelled = [Phrase("a blue curtain", (0,), ""), Phrase("red curtains", (), "hard-other")]
    batch = SimpleNamespace(phrases=[labelled], boxes=torch.tensor([[0.0, 0, 9, 9]]), image_index=torch.tensor([0]))
    queries = sample_queries(batch, chance(batch, 0), QuerySampling(each=200, proposed=1.0), index)
    assert {p for p, k in zip(queries.phrases, queries.kinds) if k == "proposed"} == {"green curtain"}


def test_vocabulary_of_videos():
    assert vocabulary(SimpleNamespace(pairs={0: [{"noun_phrase": "The Dog"}],
                                             1: [{"noun_phrase": "a cat"}, {"noun_phrase": "the dog"}]})) == ("a cat",
                                                 "the dog")
    assert vocabulary(SimpleNamespace(pairs={"x.jpg": [{"text_input": "Star"}]})) == ("star",)


def test_no_questions_at_all(batch, teacher):
    """A rank whose images have no phrases: every tensor has its shape and type, and everything up to the losses goes
    through."""
    some = sample_queries(batch, chance(batch, 0), QuerySampling())
    none = sample_queries(replace(batch, phrases=[[]] * 4), chance(batch, 0), QuerySampling())
    assert none.phrases == none.kinds == none.members == []
    for k in ("image_index", "known", "boxes", "labels"):
        a, b = getattr(some, k), getattr(none, k)
        assert a.dtype == b.dtype and b.shape == (0, *a.shape[1:])
    embeddings = PhraseEmbeddings(teacher)
    tokens, counted = embeddings([])
    assert tokens.shape[::2] == (0,
                                 embeddings(["red star"])[0].shape[
                                     2]) and counted.dtype == torch.bool and counted.shape == tokens.shape[:2]
    queries = concepts_of(teacher, embeddings, none, batch.spaces)
    assert len(queries.image_index) == len(queries.encoded) == len(queries.attention_mask) == 0
    truth, valid = true_targets(none, batch, "student", 32), batch.spaces.valid("student", 32, none.image_index)
    assert truth.masks.shape[0] == truth.boxes.shape[0] == 0 and truth.masks.shape[2:] == (32,
        32) and truth.union.shape == (0, 32, 32)
    shape = lambda *size: torch.zeros(2, 0, *size, requires_grad=True)
    found = Detections(shape(5, 4), shape(5), shape(), shape(5, 32, 32), torch.zeros(0, 1, 32, 32, requires_grad=True),
                       torch.zeros(0, 8, 4, 4))
    last = Detections(found.boxes[-1], found.logits[-1], found.presence[-1], found.masks[-1], found.semantic,
                      found.read)
    taught = taught_targets(last, none.image_index, batch.spaces, "student", "student", 32)
    assert match(found, truth).shape == match(found, taught).shape == (0, 4)
    good = worth_imitating(taught, truth, none.known).float()
    for goal in (truth, taught):
        losses = concept_losses(found, goal, valid, weight=good)
        assert all(v == 0 for v in losses.values())
        sum(losses.values()).backward()


@pytest.mark.parametrize("surer", [0, 1])
def test_sure_masks_are_told_apart(surer):
    """Of two candidates that differ only in how sure they are of a mask the surer one is taken; bfloat16 has 1 for both
    probabilities."""
    logits = torch.tensor([9.0 + 0.125 * (k == surer) for k in range(2)]).bfloat16().view(1, 1, 2, 1, 1).expand(1, 1, 2,
        4, 4)
    found = Detections(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2), torch.zeros(1, 1), logits, logits[0, :, :1])
    goal = Targets(torch.zeros(1, 1, 4), torch.ones(1, 1, 4, 4), torch.ones(1, 1), torch.ones(1), torch.ones(1, 4, 4))
    assert match(found, goal).tolist() == [[0, 0, surer, 0]]


def some_answers(n: int, dtype: torch.dtype) -> Detections:
    "Answers of two layers to n concepts, six candidates each."
    g = torch.Generator().manual_seed(0)
    rand = lambda *size: torch.randn(*size, generator=g).to(dtype)
    corner = torch.rand(2, n, 6, 2, generator=g) / 2
    boxes = torch.cat([corner, corner + 0.1 + 0.4 * torch.rand(2, n, 6, 2, generator=g)], -1).to(dtype)
    return Detections(boxes, rand(2, n, 6), rand(2, n), 3 * rand(2, n, 6, 32, 32), rand(n, 1, 32, 32))


def last_layer(found: Detections) -> Detections:
    return Detections(found.boxes[-1], found.logits[-1], found.presence[-1], found.masks[-1], found.semantic)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_targets_and_matching_in_float32(dtype, batch):
    """What a step of stage 3 computes is under autocast the same as without, to the bit, and from bfloat16 answers the
    same as from the same numbers in float32."""
    queries = sample_queries(batch, chance(batch, 0), QuerySampling(easy=0.0, hard=0.2))
    found, valid = some_answers(len(queries.image_index), dtype), batch.spaces.valid("student", 32, queries.image_index)
    frames = replace(batch.spaces, teacher=99)  # a side whose multiples bfloat16 rounds
    teacher_features = Detections(*(x.float() for x in vars(found).values() if x is not None))
    def all_of(found: Detections) -> list[torch.Tensor]:
        truth = true_targets(queries, batch, "student", 32)
        taught = taught_targets(last_layer(found), queries.image_index, frames, "teacher", "student", 32)
        said = [x for goal in (truth, taught) for x in (*vars(goal).values(), match(found, goal),
                                                        *concept_losses(found, goal, valid).values())]
        return [*said, match_cost(found.logits[0, 0], found.boxes[0, 0], found.masks[0, 0], found.boxes[1, 0],
                                  found.masks[1, 0])]
    plain = all_of(teacher_features)
    with torch.autocast("cpu", torch.bfloat16): mixed = all_of(found)
    for a, b in zip(plain, mixed, strict=True): assert b.dtype in (torch.float32, torch.long) and torch.equal(a, b)


def test_matching_boxes_without_an_area():
    "Two boxes of width 0 have no IoU; that costs as much as boxes that do not meet, and matching goes on."
    flat, mask = torch.tensor([[0.5, 0.25, 0.5, 0.75]]), torch.zeros(1, 4, 4)
    cost = match_cost(torch.ones(1), flat, mask, flat, mask)
    assert cost.isfinite().all() and cost.item() == pytest.approx(-2 + 2)


def random_targets(n: int, most: int) -> Targets:
    "Targets for n concepts, some of which have none; scores of 0 at the end of a row or amid it."
    g = torch.Generator().manual_seed(1)
    corner = torch.rand(n, most, 2, generator=g) / 2
    boxes = torch.cat([corner, corner + 0.1 + 0.4 * torch.rand(n, most, 2, generator=g)], -1)
    scores = torch.rand(n, most, generator=g) * (torch.rand(n, most, generator=g) > 0.4)
    scores[0] = 0
    masks = torch.rand(n, most, 32, 32, generator=g) * (scores > 0)[..., None, None]
    return Targets(boxes, masks, scores, scores.any(1).float() * 0.9, masks.amax(1))


def plain_match(found: Detections, goal: Targets) -> list[tuple[int, int, int, int]]:
    "Concept by concept, layer by layer, with torchvision's GIoU: layer, concept, query, target."
    half, rows = lambda m: F.avg_pool2d(m[:, None], 2).flatten(1), []
    centre = lambda boxes: box_convert(boxes, "xyxy", "cxcywh")
    for n, layer in np.ndindex(*goal.presence.shape, len(found.logits)):
        real = (goal.scores[n] > 0).nonzero()[:, 0]
        a, b, boxes = half(found.masks[layer, n].sigmoid()), half(goal.masks[n, real]), found.boxes[layer, n]
        dice = 1 - (2 * a @ b.T + 1) / (a.sum(1)[:, None] + b.sum(1) + 1)
        l1 = (centre(boxes)[:, None] - centre(goal.boxes[n, real])).abs().sum(-1)
        cost = (COST["l1"] * l1 + COST["mask"] * dice - COST["giou"] * generalized_box_iou(boxes, goal.boxes[n, real])
                - COST["class"] * found.logits[layer, n].sigmoid()[:, None])
        rows += [(layer, n, int(q), int(real[k])) for q, k in zip(*linear_sum_assignment(cost))]
    return rows


def plain_losses(found: Detections, goal: Targets, valid: Tensor) -> dict[str, Tensor]:
    "The losses one target after the other, over what there is here."
    layers, n = found.presence.shape
    sums = dict.fromkeys(("l1", "giou", "mask"), torch.zeros(()))
    wanted = torch.zeros_like(found.logits)
    for layer, c, q, k in plain_match(found, goal):
        a, b, sure = found.boxes[layer, c, q], goal.boxes[c, k], goal.scores[c, k]
        wanted[layer, c, q] = sure
        each = {"l1": (box_convert(a, "xyxy", "cxcywh") - box_convert(b, "xyxy", "cxcywh")).abs().sum(),
                "giou": generalized_box_iou_loss(a[None], b[None])[0],
                "mask": mask_loss(found.masks[layer, c, q], goal.masks[c, k], valid[c])}
        sums = {name: v + sure * each[name] for name, v in sums.items()}
    there = goal.presence.expand(layers, n)
    score, targets = (soft_focal(found.logits, wanted) * there[..., None]).sum(), goal.scores.sum().clamp(min=1)
    return {"presence": F.binary_cross_entropy_with_logits(found.presence, there),
            "union": 2 * mask_loss(found.semantic[:, 0], goal.union, valid).mean(),
            **{name: WEIGHTS[name] * v / (layers * targets) for name, v in {**sums, "score": score}.items()}}


def rows_of(found: Detections, goal: Targets, rows: Tensor) -> tuple[Detections, Targets]:
    "Some of the concepts alone."
    layered = [None if x is None else x[:, rows] for x in (found.boxes, found.logits, found.presence, found.masks)]
    undrawn = {} if found.queries is None else {"queries": found.queries[:, rows], "pixels": found.pixels[rows]}
    return Detections(*layered, found.semantic[rows], **undrawn), Targets(*(x[rows] for x in vars(goal).values()))


def undrawn(n: int) -> tuple[Detections, Detections]:
    "Answers whose masks are not drawn, of leaves with gradients; and the same answers with their masks."
    few = some_answers(n, torch.float32)
    g = torch.Generator().manual_seed(2)
    queries, pixels = torch.randn(2, n, 6, 8, generator=g), torch.randn(n, 8, 32, 32, generator=g)
    leaves = [x.requires_grad_() for x in (few.boxes, few.logits, few.presence, few.semantic, queries, pixels)]
    few = Detections(*leaves[:3], None, leaves[3], queries=queries, pixels=pixels)
    return few, replace(few, masks=torch.einsum("lnqc,nchw->lnqhw", queries, pixels), queries=None, pixels=None)


def leaves_of(found: Detections) -> list[Tensor]:
    return [found.boxes, found.logits, found.presence, found.semantic, found.queries, found.pixels]


def test_matching_is_what_it_is_one_by_one():
    found, goal = some_answers(5, torch.float32), random_targets(5, 4)
    assert sorted(map(tuple, match(found, goal).tolist())) == sorted(plain_match(found, goal)) != []
    flipped, weight = replace(goal, scores=goal.scores.flip(0)), torch.tensor([1.0, 1, 0, 1, 1])
    one, other = match_all(found, [goal, flipped], [None, weight])
    assert torch.equal(one, match(found, goal)) and 2 not in other[:, 1] and len(other) > 0
    assert (one[:, 1].diff() >= 0).all(), "concepts ascend"


def test_losses_are_what_they_are_one_by_one():
    found, goal = some_answers(5, torch.float32), random_targets(5, 4)
    valid = torch.ones(5, 32, 32, dtype=torch.bool)
    valid[1, 20:] = False
    got, plain = concept_losses(found, goal, valid), plain_losses(found, goal, valid)
    assert got.keys() == plain.keys() == WEIGHTS.keys()
    for k, v in plain.items(): torch.testing.assert_close(got[k], v, rtol=1e-5, atol=1e-6)
    keep = torch.tensor([True, False, True, True, False])  # a row of weight 0 might as well not be there
    got = concept_losses(found, goal, valid, weight=keep.float())
    plain = plain_losses(*rows_of(found, goal, keep), valid[keep])
    for k, v in plain.items(): torch.testing.assert_close(got[k], v, rtol=1e-5, atol=1e-6)


def test_losses_of_parts_add_up():
    "Five concepts as one part, and as two; what they are divided by comes from outside."
    found, goal, valid = undrawn(5)[0], random_targets(5, 4), torch.ones(5, 32, 32, dtype=torch.bool)
    whole, weight = {"concepts": 4.0, "targets": torch.tensor(9.0)}, torch.tensor([1.0, 1, 0, 1, 1])
    part = lambda rows: concept_losses(*rows_of(found, goal, rows), valid[rows], weight=weight[rows], whole=whole)
    step, parts = part(torch.arange(5)), [part(torch.arange(2)), part(torch.arange(2, 5))]
    for k, v in step.items(): torch.testing.assert_close(sum(p[k] for p in parts), v, rtol=1e-5, atol=1e-6)
    assert all(v > 0 for v in step.values())


def bytes_kept(call: Callable[[], Mapping[str, Tensor]]) -> tuple[Mapping[str, Tensor], int]:
    "What a call returns, and the bytes of all that it keeps for the backward pass."
    kept = {}
    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x): said = call()
    return said, sum(s.nbytes() for s in kept.values())


def test_masks_that_are_not_drawn_cost_nothing():
    "Losses and gradients are those of drawn masks. Computed again they are those too, and of masks nothing is kept."
    def learned(drawn: bool, recompute: bool = False) -> tuple[Mapping[str, Tensor], list[Tensor], int]:
        few, whole = undrawn(5)
        goal, valid = random_targets(5, 4), torch.ones(5, 32, 32, dtype=torch.bool)
        found, matched = whole if drawn else few, match(whole, goal)
        losses, kept = bytes_kept(lambda: concept_losses(found, goal, valid, matched=matched, recompute=recompute))
        sum(losses.values()).backward()
        return losses, [x.grad for x in leaves_of(few)], kept
    (whole, g_whole, _), (few, g_few, kept) = learned(True), learned(False)
    again, g_again, little = learned(False, True)
    for k, v in whole.items(): torch.testing.assert_close(few[k], v, rtol=1e-6, atol=1e-6)
    for a, b in zip(g_few, g_whole): torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(few[k], v) for k, v in again.items())
    assert all(torch.equal(a, b) for a, b in zip(g_again, g_few))
    assert little < 2 * 32 * 32 * 4 < kept / 20, "not as much as two masks"


def part_of(queries: ConceptQueries, batch, images: range) -> ConceptQueries:
    "The queries about some images, which become a batch of their own."
    rows = [i for i, b in enumerate(queries.image_index.tolist()) if b in images]
    first = int((batch.image_index < images.start).sum())
    some = {k: [getattr(queries, k)[i] for i in rows] for k in ("phrases", "kinds")}
    members = [tuple(m - first for m in queries.members[i]) for i in rows]
    return ConceptQueries(queries.image_index[rows] - images.start, some["phrases"], some["kinds"], members,
                          queries.known[rows],
                     queries.boxes[rows], queries.labels[rows])


def test_parts_of_a_step_add_up(reader, teacher, student):
    """Four images and their queries, in one part and in two of 1 and 3: truth, teacher's answers, read-out, maps.
    Recomputed it is the same."""
    from esam3.training.stage3 import concept_terms, map_losses
    from esam3.schedules import Stage3Schedule
    s, embeddings = Stage3Schedule(temperature=1.0, checkpoint=0), PhraseEmbeddings(teacher)
    sides = teacher.image_size, student.image_size
    collated = lambda some: collate_images([reader.read(i) for i in some], *sides, max_instances=0)
    batch = collated(range(4))
    queries = sample_queries(batch, chance(batch, 0), QuerySampling(), Confusables(vocabulary(reader), teacher))
    assert 0 < queries.known.sum() < len(queries.known)
    whole = query_counts(queries) | {"images": 4.0}
    def terms(images: range, s: Stage3Schedule = s) -> dict[str, Tensor]:
        own = collated(images)
        with torch.no_grad(): teacher_features = teacher.encode(own.teacher_pixels)
        student_features = student.encode(own.student_pixels)
        # instances are compared part by part
        maps = {"features": map_losses(teacher_features, student_features, own, s, whole)["features"]}
        some = part_of(queries, batch, images)
        return maps | concept_terms(teacher, student, teacher_features, student_features, own, some, embeddings, s,
                                    whole)
    step, again = terms(range(4)), terms(range(4), replace(s, checkpoint=1))
    parts = [terms(range(1)), terms(range(1, 4))]
    assert {"features", "distill read", "task mask", "distill mask"} <= step.keys() == again.keys()
    for k, v in step.items():
        torch.testing.assert_close(sum(p[k] for p in parts), v, rtol=1e-5, atol=1e-6, msg=lambda m, k=k: f"{k}: {m}")
        torch.testing.assert_close(again[k], v, rtol=1e-6, atol=1e-6)
    weights = [p for n, p in student.named_parameters() if n.startswith("detector_model.mask_decoder.mask_embedder")]
    one, other = (torch.autograd.grad(sum(t.values()), weights) for t in (step, again))
    for a, b in zip(one, other): torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        seen = teacher.encode(batch.teacher_pixels), student.encode(batch.student_pixels)
        alone = concept_terms(teacher, student, *seen, batch, queries, embeddings, s)
    for k, v in alone.items(): torch.testing.assert_close(v, step[k], rtol=1e-5, atol=1e-6)


class Looks(TorchDispatchMode):
    "Notes what looks at values of a tensor, for which a GPU is waited for; a transfer of a whole tensor is none."
    LOOKS = "_local_scalar_dense", "nonzero", "masked_select", "_unique2", "is_nonzero"

    def __init__(self):
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.overloadpacket.__name__
        chosen = args[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else ()
        picked = any(i is not None and i.dtype == torch.bool for i in chosen)
        if picked or name in self.LOOKS: self.seen.append(name)
        return op(*args, **(kwargs or {}))


def test_nobody_looks(batch, reader, teacher, student):
    "Queries are asked, matched and judged without a look at values on the way; the library's own call does look."
    from esam3.training.stage3 import concept_terms
    from esam3.schedules import Stage3Schedule
    queries = sample_queries(batch, chance(batch), QuerySampling(exemplar=1.0),
                             Confusables(vocabulary(reader), teacher))
    whole, embeddings, s = query_counts(queries), PhraseEmbeddings(teacher), Stage3Schedule(temperature=1.0)
    embeddings(queries.phrases)  # a phrase is encoded once
    assert (queries.labels == 1).any() and (queries.labels[:, 0] == -10).any()
    with torch.no_grad():
        teacher_features, student_features = teacher.encode(batch.teacher_pixels), student.encode(batch.student_pixels)
        with Looks() as ours:
            terms = concept_terms(teacher, student, teacher_features, student_features, batch, queries, embeddings, s,
                                  whole)
        words = teacher.concepts(["red star"], torch.zeros(1, dtype=torch.long))
        pixels = batch.teacher_pixels[:1]
        with Looks() as theirs: teacher.detector_model(pixels, None, words.input_ids, words.attention_mask)
    assert terms["task mask"] > 0 and terms["distill mask"] > 0 and ours.seen == [] and len(theirs.seen) > 4
