"""Golden miniatures: every published format, written as its own repository describes it, is read back equal through the recipes.

What each layout was read from stands in `esam3.data.golden.FORMATS`."""
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from esam3.data.golden import FORMATS, READ_IN, differences, reader_of, unlike, write_gold, write_veval
from esam3.evaluation.metrics import pcs_image, pcs_video
from esam3.evaluation.predictions import as_answers



@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    "An empty folder that recipes take for the data sets."
    monkeypatch.setenv("ESAM3_DATA", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", FORMATS)
def test_read_back_equal(data, name):
    "Names, ids, frames, annotated frames, phrases, negatives and masks exactly; pixels as near as JPEG and H.264 keep them."
    assert unlike(name, data) == []


def test_every_recipe_of_public_data_has_a_golden_file():
    from esam3.data.batches import RECIPES
    own = {"toy", "toy_hour", "tiny", "videos", "folder"}
    assert {f.recipe for f in FORMATS.values()} == {p.stem for p in RECIPES.glob("*.yaml")} - own
    for name, form in FORMATS.items():
        for part in form.source.split("; "): assert name == "saco_veval_videos" or ":" not in part or part.split(":")[0] in READ_IN


def test_every_split_of_the_recipes_is_read(data):
    "And what is kept for a benchmark's server is said to be."
    from esam3.data.batches import load_recipe
    names = {f.recipe for f in FORMATS.values()}
    written = {(f.recipe, *part) for f in FORMATS.values() if not f.changed for part in f.write(data / f.recipe)}
    assert written == {(n, s, kind) for n in names for s, parts in load_recipe(n)["splits"].items() for kind in parts}
    first = {n for n in names for part in load_recipe(n)["splits"]["held_out"].values() if part.get("truth") == "first"}
    assert first == {"mose", "ytvos"}


def test_equal_bytes_twice(tmp_path):
    "A golden file is the same whenever it is written."
    content = lambda root: {str(f.relative_to(root)): f.read_bytes() for f in sorted(root.rglob("*")) if f.is_file()}
    for name in ("sav", "coco", "saco_gold"):
        for part in "ab": FORMATS[name].write(tmp_path / part / name)
    a, b = content(tmp_path / "a"), content(tmp_path / "b")
    assert a.keys() == b.keys() and [n for n in a if a[n] != b[n] and not n.endswith(".mp4")] == []


@pytest.mark.parametrize("change", [lambda s: {"name": "other"}, lambda s: {"ids": s.ids[::-1]}, lambda s: {"annotated": ~s.annotated},
                                    lambda s: {"masks": np.asarray(s.masks)[::-1]}, lambda s: {"frames": s.frames[::-1]}, lambda s: {"public": False},
                                    lambda s: {"frames": s.frames[:, ::-1]}, lambda s: {"phrases": s.phrases[:-1]}, lambda s: {"numbers": s.numbers[1:]}])
def test_a_difference_is_noticed(data, change):
    truth = write_veval(data)["held_out", "concept_clips"][0]
    found = reader_of("saco_veval", data, "held_out", "concept_clips").read(0)
    assert not differences(found, truth) and differences(replace(found, **change(found)), truth)


# ---- SA-Co's rules on files as published

@pytest.fixture
def gold(data) -> tuple[list[Path], dict[str, dict]]:
    "The three annotators' files."
    write_gold(data)
    files = [data / "saco/annotations" / f"gold_metaclip_merged_{who}_release_test.json" for who in "abc"]
    return files, {who: json.loads(f.read_text()) for who, f in zip("abc", files)}


def said(path: Path, marks: list[dict], score: float = 0.9) -> Path:
    path.write_text(json.dumps([{"image_id": m["image_id"], "category_id": 1, "score": score, "segmentation": m["segmentation"]} for m in marks]))
    return path


def test_gold_takes_the_annotator_who_agrees_most(gold, data):
    "Each annotator's own masks score 1, though they disagree; against one of the others alone they do not."
    files, truth = gold
    for who, record in truth.items():
        pred = said(data / "pred.json", [m for m in record["annotations"] if not m["iscrowd"]])
        assert pcs_image(files, pred)["pmF1"] == pytest.approx(1, abs=2e-4), who
    pred = said(data / "pred.json", truth["c"]["annotations"])
    assert pcs_image(files[:1], pred)["IL_MCC"] < 0.6 < pcs_image([files[0], files[2]], pred)["pmF1"]


def test_gold_scores_what_all_three_call_exhaustive(gold, data):
    "Of eight pairs, two are not exhaustive to the first annotator and one to the second: what is said of them does not count."
    files, truth = gold
    pred = [m for m in truth["a"]["annotations"] if not m["iscrowd"]]
    exhaustive = {i["id"] for i in truth["a"]["images"]} - {10000003, 10000007, 10000005}
    kept = [m for m in pred if m["image_id"] in exhaustive]
    nonsense = [{**pred[0], "image_id": i} for i in (10000003, 10000007, 10000005)]
    score = lambda marks: pcs_image(files, said(data / "pred.json", marks))
    assert score(kept) == score(kept + nonsense) and score(kept)["pmF1"] == pytest.approx(1, abs=2e-4)
    assert score(kept[1:]) != score(kept)


def test_reader_asks_pairs_by_their_id(gold, data):
    "The pairs that the first annotator calls exhaustive, which holds all that are scored."
    reader = reader_of("saco_gold", data, "held_out", "concept_images")
    pairs = [p.pair for k in range(2) for p in reader.read(k).phrases]
    assert pairs == [10000000, 10000001, 10000002, 10000004, 10000005, 10000006]


def test_veval_truth_scores_one(data):
    write_veval(data)
    path = data / "saco/annotations/saco_veval_sav_test.json"
    (data / "pred.json").write_text(json.dumps(as_answers(json.loads(path.read_text()))))
    assert pcs_video(path, data / "pred.json") == pytest.approx(dict.fromkeys(("cgF1", "IL_MCC", "pmF1", "pHOTA", "DetA", "AssA"), 1), abs=2e-4)


def test_crowds_in_video_by_hand(data):
    "\"the face\" has two masklets, one of them a crowd: no instance to cgF1, an object to pHOTA."
    write_veval(data)
    path = data / "saco/annotations/saco_veval_sav_test.json"
    gt = json.loads(path.read_text())
    first, second, crowd = gt["annotations"]
    assert first["category_id"] != second["category_id"] == crowd["category_id"]
    path.write_text(json.dumps({**gt, "annotations": [first, second, {**crowd, "iscrowd": 1}]}))
    score = lambda marks: pcs_video(path, said_in_video(data / "pred.json", marks))
    frames = [sum(s is not None for s in a["segmentations"]) for a in gt["annotations"]]
    without, followed = score([first, second]), score([first, second, crowd])
    assert without["cgF1"] == pytest.approx(1, abs=2e-4) and without["DetA"] == pytest.approx(sum(frames[:2]) / sum(frames))
    assert followed["pmF1"] == pytest.approx(2 * 2 / (2 * 2 + 1), abs=1e-4) and followed["DetA"] == followed["AssA"] == 1


def said_in_video(path: Path, marks: list[dict]) -> Path:
    path.write_text(json.dumps([{**{k: m[k] for k in ("video_id", "category_id", "segmentations")}, "score": 0.9} for m in marks]))
    return path


def test_a_crowd_beside_instances_is_left_out_alone(gold, data):
    "A pair that is exhaustive is scored without its crowd marks, so it must be asked."
    files, truth = gold
    marks = [{**m, "iscrowd": int(k == 0)} for k, m in enumerate(truth["a"]["annotations"])]
    files[0].write_text(json.dumps({**truth["a"], "annotations": marks}))
    phrases = reader_of("saco_gold", data, "held_out", "concept_images").read(0).phrases
    assert [p.pair for p in phrases] == [10000000, 10000001, 10000002] and len(phrases[0].instances) == len(truth_of_pair(marks, 10000000))


def truth_of_pair(marks: list[dict], pair: int) -> list[dict]: return [m for m in marks if m["image_id"] == pair and not m["iscrowd"]]
