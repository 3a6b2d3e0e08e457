"""What users of small models complain of: thresholds, false accepts, small instances, wordings, and objects that are
first prompted on different frames. That a report's figures are those of the saved student is tested in test_runs.py
(`test_the_reports_figures_are_those_of_the_evaluation`, and a fresh process that loads it)."""
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import esam3.evaluation.concept_scores as concept_scores
from esam3.data.batches import load_recipe, open_dataset
from esam3.data.samples import ClipSample, ImageSample, Phrase
from esam3.evaluation.concept_scores import (
    COCO_AREAS, Answered, accept_rates, best_threshold, cgf1_at, image_scores, matched_scores, matches_of,
    query_answers, recall_by_area, rewordings, score_pairs, score_spread, top_scores)
from esam3.evaluation.costs import load_model
from esam3.evaluation.protocols import follow
from esam3.models.teacher import NO_OBJECT
from esam3.models.tracker import as_batch, look

KEPT = Path(__file__).parents[1] / "nbs" / "results" / "complaints.json"


@pytest.fixture(scope="module")
def models(): return {name: load_model(name) for name in ("toy", "toy-student")}


@pytest.fixture(scope="module")
def reader(): return open_dataset(load_recipe("tiny"), "held_out", "concept_images")


def answered(scores: list[float], iou: list[list[float]], areas: tuple[float, ...] = ()) -> Answered:
    return Answered("star", 1.0, np.array(scores), np.reshape(iou, (len(scores), len(areas))), np.array(areas))


FAINT = [answered([0.4, 0.1], [[0.92], [0.0]], (0.1,)), answered([0.3], [[1.0]], (0.1,)), answered([0.2], [[]])]


@pytest.mark.parametrize("name", ["toy", "toy-student"])
def test_answers_score_what_files_score(name, models, reader):
    "At ½ the kept answers give the benchmark's figures, which are read from files."
    found, by_files = query_answers(models[name], reader, 8), image_scores(models[name], reader, 8)
    assert cgf1_at(found) == pytest.approx(by_files, abs=1e-6) and 0 < by_files["cgF1"] < 1
    assert len(found) == 24 and all((np.diff(f.scores) <= 0).all() for f in found)
    presence, right = score_pairs(models[name], reader, 8)["presence"]
    assert right.sum() == 8 == sum(len(f.areas) > 0 for f in found) and presence.tolist() == [f.presence for f in found]


def test_faint_scores_are_right_at_a_lower_threshold():
    "A student that knows all, but is never sure: nothing at ½, everything at ¼, and at 0.15 one that is wrong."
    assert cgf1_at(FAINT)["cgF1"] == 0 and cgf1_at(FAINT, 0.25)["cgF1"] == pytest.approx(0.95, abs=1e-3)
    assert cgf1_at(FAINT, 0.15)["IL_MCC"] < 1 and best_threshold(FAINT) == (0.2, cgf1_at(FAINT, 0.25)["cgF1"])
    scores, covered = matched_scores(FAINT)
    assert scores.tolist() == [0.4, 0.3] and covered == 1.0


def test_each_instance_is_matched_once():
    "Two candidates on one instance: one is its match; a candidate that covers less than half is none."
    twice = answered([0.9, 0.8, 0.7], [[0.6, 0.0], [0.7, 0.0], [0.0, 0.4]], (0.1, 0.2))
    assert [x.tolist() for x in matches_of(twice)] == [[1], [0]]
    assert matched_scores([twice])[1] == 0.5 and [x.tolist() for x in matches_of(twice, 0.85)] == [[0], [0]]


def test_recall_is_by_area():
    "As a fraction of the image: of what is exactly as large as a bound, it is said that it is above."
    small, large = COCO_AREAS
    found = [answered([0.9, 0.4], [[1.0, 0, 0], [0, 1.0, 0]], (small / 2, small, 2 * large))]
    assert recall_by_area(found) == [(1.0, 1), (0.0, 1), (0.0, 1)]
    assert recall_by_area(found, threshold=0.3) == [(1.0, 1), (1.0, 1), (0.0, 1)]
    (none, n), *_ = recall_by_area(found, (small / 4,))
    assert np.isnan(none) and n == 0


@pytest.mark.parametrize("name", ["toy", "toy-student"])
def test_the_best_candidates_score(name, models, reader):
    "With the presence factor and without, whatever phrases are beside it."
    model, sample = models[name], reader.read(0)
    with torch.no_grad():
        texts = [p.text for p in sample.phrases]
        found = model.detect(look(model, as_batch(model, [sample])), model.concepts(texts, torch.zeros(3, dtype=int)))
    expected = np.stack([found.scores().amax(1), found.logits.sigmoid().amax(1)], 1)
    np.testing.assert_allclose(top_scores(model, sample), expected, atol=1e-5)
    np.testing.assert_allclose(top_scores(model, sample, 2), expected, atol=1e-4)
    assert top_scores(model, replace(sample, phrases=[])).shape == (0, 2)


def test_false_accepts_are_counted_by_kind(monkeypatch):
    scores = np.array([[0.9, 0.9], [0.6, 0.7], [0.2, 0.8], [0.1, 0.3], [0.4, 0.8]])
    monkeypatch.setattr(concept_scores, "top_scores", lambda *_: scores)
    phrases = [Phrase("a", (0,)), Phrase("b", (), "shape"), Phrase("c", (), "shape"), Phrase("d", ()),
               Phrase("e", (0,))]
    sample = ImageSample("x", np.zeros((8, 8, 3), np.uint8), np.ones((1, 8, 8), bool), phrases)
    assert accept_rates(None, [sample]) == {"there": 0.5, "absent": pytest.approx(1 / 3), "no_presence_there": 1.0,
                                            "no_presence_absent": pytest.approx(2 / 3), "absent_shape": 0.5,
                                            "absent_easy": 0.0}
    assert accept_rates(None, [sample], 0.15)["absent"] == pytest.approx(2 / 3)
    assert np.isnan(accept_rates(None, [])["there"])


@pytest.mark.parametrize(("text", "others"), [
    ("red star", ["star red", "red stars", "RED STAR", "red star."]), ("cross", ["crosses", "CROSS", "cross."])])
def test_other_words_for_the_same(text, others): assert [*rewordings(text).values()] == others


@pytest.mark.parametrize("name", ["toy", "toy-student"])
def test_capitals_change_nothing(name, models, reader):
    "Phrases are read in lower case; a word in the plural is one that these models have not learnt."
    spread = score_spread(models[name], [reader.read(k) for k in range(4)])
    assert spread["case"] == 0 and spread["plural"] > 0.01 and {*spread} <= {"order", "plural", "case", "stop"}


def begun(sample: ClipSample, first: dict[int, int]) -> ClipSample:
    "Some tracks of a clip, each unseen before a frame of its own."
    masks = np.asarray(sample.masks)[[*first]].copy()
    for mask, t in zip(masks, first.values()): mask[:t] = False
    return replace(sample, masks=masks, annotated=sample.annotated[[*first]], ids=[sample.ids[n] for n in first])


@pytest.mark.parametrize("name", ["toy", "toy-student"])
def test_objects_begin_on_different_frames(name, models):
    "Each is followed as it is alone: none waits for another, and none forgets since another has begun."
    sample = open_dataset(load_recipe("tiny"), "held_out", "clips").read(0, frames=6)
    run = lambda first: np.stack([found["mask"] for found in follow(models[name], begun(sample, first), ["mask"])], 1)
    begin = {1: 0, 2: 2, 3: 3}
    together = run(begin)
    assert np.asarray(sample.masks)[[*begin]].any((2, 3)).all(), "these are seen all the time"
    for logits, (n, t) in zip(together, begin.items()):
        assert (logits[:t] == NO_OBJECT).all() and (logits[t:] != NO_OBJECT).any()
        np.testing.assert_allclose(logits, run({n: t})[0], atol=2e-3)
    assert np.abs(run({2: 0})[0, 3:] - together[1, 3:]).max() > 0.1, "begun elsewhere, it is followed otherwise"


@pytest.mark.skipif(not KEPT.exists(), reason="nothing is kept beside an installed package")
def test_the_kept_table_closes_the_loop():
    "The figures kept say where they are from; and the report's cgF1 is what the saved student scores in a new process."
    kept = json.loads(KEPT.read_text())
    assert kept["world"] == "toy world" and all(kept[k] for k in ("machine", "date", "command", "images"))
    for who, scores in kept["scores"].items():
        told = scores.get("cgF1 in the report of stage 3")
        assert told is None or scores["cgF1 at ½"] == pytest.approx(told, abs=1e-6), who
        assert scores["best cgF1"] == pytest.approx(max(scores["cgF1 by threshold"]))
    assert kept["scores"]["student"]["cgF1 in the report of stage 3"]
