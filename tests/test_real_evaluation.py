"""What reading tolerates scoring tolerates; a score is of the data that are there; none where the truth is not public.

The kinds of `../shared/data/faults` that show in an evaluation, and siblings."""
import json
import shutil
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from esam3.data.batches import load_recipe, open_dataset
from esam3.data.samples import ClipSample, Phrase, RunMasks
from esam3.data.toyfiles import toyworld
from esam3.evaluation import concept_scores, evaluate as module
from esam3.evaluation.concept_scores import image_scores, lending, shown_instance
from esam3.evaluation.evaluate import (
    Task, by_count, cases, evaluate, limits_of, of_clip, of_concept_clip, predict, read_rows, run_scores, score)
from esam3.models.tracker import as_batch
from esam3.evaluation.mask_metrics import davis, ytvos
from esam3.evaluation.predictions import link_sequences, read_clip
from esam3.evaluation.protocols import FrameScores, clip_scores, follow
from esam3.models.concept_video import Followed
from esam3.models.teacher import load_teacher

H, W = 40, 60


@pytest.fixture(scope="module")
def teacher():
    return load_teacher("toy")


@pytest.fixture(scope="module")
def tiny() -> Path:
    return toyworld("tiny")


def shifted(model: Any, sample: ClipSample, names: Sequence[str], seed: int = 0) -> Iterator[dict[str, np.ndarray]]:
    "In a tracker's place: the truth, two pixels to the right."
    for t in range(len(sample.frames)):
        logits = np.where(np.roll(sample.masks[:, t], 2, 2), np.float32(5), np.float32(-5))
        yield dict.fromkeys(names, logits)


@pytest.fixture(autouse=True)
def quick(monkeypatch, teacher):
    "One teacher for all, no latencies, and answers to clips that cost nothing."
    fixed = {"latency": {}, "params": {}, "peak_memory": 1}
    monkeypatch.setattr(module, "costs", lambda *_: fixed)
    monkeypatch.setattr(module, "load_model", lambda name: teacher)
    monkeypatch.setattr(module, "follow", shifted)


# ---- small data

def mask(path: Path, *objects: tuple[int, int, int], size: tuple[int, int] = (H, W), side: int = 12) -> Path:
    "A label map of squares: id, top, left."
    path.parent.mkdir(parents=True, exist_ok=True)
    index = np.zeros(size, np.uint8)
    for k, y, x in objects: index[y:y + side, x:x + side] = k
    Image.fromarray(index).save(path)
    return path


def image(path: Path, seed: int = 0, size: tuple[int, int] = (H, W)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)).save(path)
    return path


def clip(root: Path, name: str, frames: int = 6, ids: Sequence[int] = (1, 2), stem: str = "{:05d}",
         drawn: Callable[[int], bool] = lambda t: True) -> None:
    "A clip in MOSE's layout: squares that move to the right; a mask for the frames that are `drawn`."
    for t in range(frames):
        image(root / "JPEGImages" / name / f"{stem.format(t)}.jpg", t)
        squares = [(k, 2 + 18 * n, 4 + 2 * t) for n, k in enumerate(ids)]
        if drawn(t): mask(root / "Annotations" / name / f"{stem.format(t)}.png", *squares)


def sav(root: Path, name: str, objects: dict[str, int], frames: int = 9) -> None:
    "A clip in SA-V's layout, annotated in every second frame: folder of an object → the value of its pixels."
    for t in range(frames):
        image(root / "JPEGImages_24fps" / name / f"{t:05d}.jpg", t)
        for n, (folder, value) in enumerate(objects.items()):
            if t % 2: continue
            mask(root / "Annotations_6fps" / name / folder / f"{t:05d}.png", (value, 2 + 12 * n, 4 + 2 * t), side=10)


def recipe(place: Path, root: Path, parts: dict[str, Any] | None = None, name: str = "mine") -> str:
    place.mkdir(parents=True, exist_ok=True)
    found = {"root": str(root), "teacher": "toy", "splits": {"held_out": parts or VOS}}
    (place / f"{name}.yaml").write_text(yaml.safe_dump(found))
    return str(place / f"{name}.yaml")


VOS, SAV, DAVIS = ({"clips": {"format": form, "path": "."}} for form in ("vos", "sav_folders", "davis"))


def scored(tmp_path: Path, root: Path, protocols: str = "mask", parts: dict[str, Any] | None = None,
           **more) -> tuple[dict[str, dict], Path]:
    "Protocol → row, and the folder of a run."
    folder, rows = evaluate("toy", recipe(tmp_path, root, parts), protocols, runs=str(tmp_path / "runs"), **more)
    return {r["protocol"]: r for r in rows}, folder


def found_in(folder: Path, key: str) -> Any:
    "A value of the scores of `mask`."
    return json.loads((folder / "clips/mask/scores.json").read_text())[key]


# ---- row 2: truth that is not public

def test_hidden_truth_gives_predictions_and_no_score(tmp_path, real_files, teacher):
    "DAVIS's judo has four masks of sixteen, each of which opens a track."
    rows, folder = scored(tmp_path, real_files / "davis", "mask,box,visible,copy", DAVIS)
    for name, row in rows.items():
        assert row["scores"] == {} and (row["samples"], row["unscored"]) == (1, 1), name
        assert "only the masks that open its tracks are public" in row["reason"], name
    assert "send mask/masks to its benchmark's server" in rows["mask"]["reason"]
    assert len(list((folder / "clips/mask/masks/judo").glob("*.png"))) == 16 and not (folder / "clips/truth").exists()
    found = clip_scores(teacher, open_dataset(recipe(tmp_path, real_files / "davis", DAVIS), "held_out"), ())
    assert found["track"] == {"J": None, "F": None, "J&F": None, "absent_acc": None}


def test_one_clip_with_hidden_truth_among_others(tmp_path):
    "Late tracks and a recipe that says so are siblings; what is scored is scored, and the table says how many are not."
    clip(tmp_path / "data", "a"), clip(tmp_path / "data", "hidden", drawn=lambda t: t == 0)
    mask(tmp_path / "data/Annotations/hidden/00003.png", (1, 2, 10), (2, 20, 10), (3, 2, 40))
    rows, folder = scored(tmp_path, tmp_path / "data", "mask,visible")
    for row in rows.values():
        assert row["samples"] == 2 and row["unscored"] == 1 and "reason" not in row and 0.5 < row["scores"]["J"] < 1
    assert {s.rsplit("_", 1)[0] for s in found_in(folder, "per_object")} == {"a"}
    assert len(list((folder / "clips/mask/masks/hidden").glob("*.png"))) == 6
    first = {"clips": {"format": "vos", "path": ".", "truth": "first"}}
    rows, _ = scored(tmp_path, tmp_path / "data", "mask,visible", first)
    assert all(r["scores"] == {} and r["unscored"] == 2
               for r in rows.values()), "with another `truth` the answers are made anew"


def test_what_nobody_marked_is_not_absent(tmp_path, tiny, teacher):
    "Siblings: phrases of a file without its instances, and a video that has no labels."
    truth = json.loads((tiny / "saco" / "images.json").read_text())
    (tmp_path / "bare.json").write_text(json.dumps({**truth, "annotations": []}))
    parts = {"concept_images": {"format": "saco_images", "annotations": str(tmp_path / "bare.json"), "media": "saco"},
             "clips": {"format": "videos", "path": "clip"}}
    rows, folder = scored(tmp_path, tiny, "phrase,mask,visible", parts, limit=1)
    assert all(r["scores"] == {} and r["samples"] == 1 and r["reason"] for r in rows.values()), rows
    assert json.loads((folder / "concept_images/phrase/truth.json").read_text())["images"], "it was asked"
    assert "no object is marked" in rows["mask"]["reason"]
    found = load_recipe(recipe(tmp_path, tiny, parts))
    wanted = {"concept_images": ("phrase",), "clips": ("visible",)}
    got = run_scores(teacher, found, tmp_path / "kept", wanted, limits_of(found, images=1, clips=1))
    assert got["cgF1"] is got["IL_MCC"] is got["J"] is None and got["samples"] == {"concept_images": 1, "clips": 1}


# ---- row 4: one bad clip costs itself

def test_a_bad_clip_costs_itself(tmp_path):
    "What a file manager leaves, a mask without image, clips too short to be scored, an object that comes too late."
    data = tmp_path / "data"
    for name, frames in {"good": 6, "my dog": 6, "one": 1, "two": 2}.items(): clip(data, name, frames)
    clip(data, "late", ids=())
    for t in (4, 5): mask(data / f"Annotations/late/{t:05d}.png", (1, 2, 2))
    notes = data / "Annotations" / "good"
    for name in ("._00000.png", "Thumbs.png"): (notes / name).write_bytes(b"\0\5\x16\7 no image")
    shutil.copy(notes / "00001.png", notes / "00099.png")
    (data / "Annotations" / ".DS_Store").mkdir()
    rows, folder = scored(tmp_path, data, "mask,visible")
    said = found_in(folder, "why")
    assert [rows["mask"][k] for k in ("samples", "skipped", "unscored")] == [5, 0,
        3] and rows["mask"]["scores"]["J"] > 0.5
    assert [s.split(":")[0] for s in said] == ["late", "one", "two"] and "last two frames" in said[0], said
    assert str(tmp_path) not in "".join(said) and "/tmp" not in "".join(said)
    shutil.rmtree(folder / "clips/mask/masks/good")
    again, _ = scored(tmp_path, data, "mask,visible")
    assert again["mask"]["scores"] == rows["mask"]["scores"], "masks that are gone are made again"
    (folder / "clips/mask/masks/good/00002.png").write_bytes(b"cut short")
    broken, _ = scored(tmp_path, data, "mask")
    assert broken["mask"]["unscored"] == 4 and "00002.png" in found_in(folder, "why")[0], "one bad file costs its clip"


def test_meta_without_a_clip_costs_that_clip(tmp_path):
    for name in ("a", "b"): clip(tmp_path / "data", name)
    meta, parts = tmp_path / "data" / "meta.json", {"clips": {"format": "vos", "path": ".", "meta": "meta.json"}}
    categories = {"1": {"category": "zebra"}, "2": {"category": "quokka"}}
    meta.write_text(json.dumps({"videos": {"a": {"objects": categories}, "b": {"objects": {"1": categories["1"]}}}}))
    rows, folder = scored(tmp_path, tmp_path / "data", "mask", parts)
    assert rows["mask"]["unscored"] == 1 and 0.5 < rows["mask"]["scores"]["G"] < 1
    assert "no category of object 2 of b" in found_in(folder, "why")[0]
    meta.write_text("{")
    rows, folder = scored(tmp_path, tmp_path / "data", "mask", parts)
    assert rows["mask"]["scores"] == {} and rows["mask"]["unscored"] == 2 and "not JSON" in rows["mask"]["reason"]


@pytest.mark.parametrize("fault, parts", [("05_unpadded", VOS), ("07_255", VOS), ("08_void_255", VOS),
                                          ("16_apple_double", VOS), ("09_sav_255", SAV)])
def test_faults_are_scored(fault, parts, tmp_path, real_files, monkeypatch):
    "Whoever scores the folders by `davis` gets the same; of two the toy teacher's own answers."
    if fault in ("05_unpadded", "07_255"): monkeypatch.setattr(module, "follow", follow)
    rows, folder = scored(tmp_path, real_files / "faults" / fault, "mask", parts)
    assert rows["mask"]["scores"]["J"] > (0.97 if module.follow is follow else 0.5)
    assert (rows["mask"]["samples"], rows["mask"]["unscored"]) == (1, 0)
    sides = {"truth": real_files / "faults" / fault / "Annotations", "said": folder / "clips/mask/masks"}
    if parts == SAV:
        sides["truth"] = sides["truth"].with_name("Annotations_6fps")
        for side, place in sides.items(): link_sequences(place, ["sav_000001"], tmp_path / side)
        sides = {side: tmp_path / side for side in sides}
    assert davis(*sides.values())["J&F"] == pytest.approx(rows["mask"]["scores"]["J&F"], abs=1e-9)


# ---- rows 5, 6: raw folders by the same rules

@pytest.mark.parametrize("true, said", [(255, 255), (255, 1), (1, 255), (1, 1)])
def test_one_object_in_black_and_white(true, said, tmp_path):
    for t in range(12):
        mask(tmp_path / f"true/c/{t}.png", (true, 2, 4 + t))
        mask(tmp_path / f"said/c/{t}.png", *([] if t == 9 else [(said, 2, 4 + t)]))
    mask(tmp_path / "true/c/Thumbs.png", (7, 2, 2))
    (tmp_path / "true/c/._0.png").write_bytes(b"Apple")
    (tmp_path / "true/.DS_Store").mkdir()
    found = davis(tmp_path / "true", tmp_path / "said")
    assert found["per_object"].keys() == {"c_1"} and found["J"] == pytest.approx(0.9), "frame 9 is not the last"
    (tmp_path / "meta.json").write_text(json.dumps({"videos": {"c": {"objects": {"1": {"category": "zebra"}}}}}))
    assert ytvos(tmp_path / "true", tmp_path / "said", tmp_path / "meta.json")["J_seen"] == found["J"]


def test_255_beside_other_ids_is_void_in_any_frame(tmp_path):
    "The only id but 255 comes in the last frame but one; and 255 that is predicted is background."
    for t in range(5):
        mask(tmp_path / f"true/c/{t}.png", (255, 2, 4), *([(3, 20, 4)] if t else []))
        mask(tmp_path / f"said/c/{t}.png", (255, 2, 30), (3, 20, 4))
    found = davis(tmp_path / "true", tmp_path / "said")
    assert found["per_object"] == {"c_3": {"J": 1.0, "F": 1.0}}
    for t in range(5): mask(tmp_path / f"said/c/{t}.png", (255, 2, 4), (7, 20, 4))
    with pytest.raises(ValueError, match="object 7"): davis(tmp_path / "true", tmp_path / "said")


def test_predictions_of_another_size(tmp_path):
    "A pixel narrower is resized and said; another shape is an error that names the file."
    for t in range(4):
        for side, width in (("true", 300), ("said", 299)):
            mask(tmp_path / side / f"c/{t}.png", (1, 20, 40), size=(200, width))
    with pytest.warns(UserWarning, match="299×200 → 300×200"): found = davis(tmp_path / "true", tmp_path / "said")
    assert found["J"] > 0.9
    mask(tmp_path / "said/c/1.png", (1, 20, 40), size=(100, 300))
    with pytest.raises(ValueError, match=r"said/c/1.png"): davis(tmp_path / "true", tmp_path / "said")


def test_objects_in_folders(tmp_path):
    "SA-V: numbers over 255, no leading zeros, an object whose masks are empty, a hidden folder, a frame without mask."
    sav(tmp_path / "data", "c", {"7": 1, "300": 255, "011": 11})
    for file in (tmp_path / "data/Annotations_6fps/c/011").iterdir(): mask(file)
    (tmp_path / "data/Annotations_6fps/c/.thumbs").mkdir()
    (tmp_path / "data/Annotations_6fps/c/300/00004.png").unlink()
    rows, folder = scored(tmp_path, tmp_path / "data", "mask,visible", SAV)
    assert rows["mask"]["scores"]["J"] > 0.5 and rows["mask"]["unscored"] == 0
    told, truth = folder / "clips/mask/masks/c", folder / "clips/truth/c"
    assert sorted(p.name for p in told.iterdir()) == ["300", "7"], "as the benchmark calls them"
    assert [len(list((truth / k).iterdir())) for k in ("7", "300")] == [5,
        4], "a frame without a mask file says nothing"
    assert {(c, k) for _, c, k in cases(folder, "clips", "mask")} == {("c", "7"), ("c", "300")}
    assert read_clip(told).keys() == {7, 300}


def test_clips_of_one_name_keep_their_own_masks(tmp_path, tiny):
    "SA-V's tars hold folders; here two of them hold a video of one name, with other masklets."
    for k, name in enumerate(("toy_000000", "toy_000001")):
        for end in (".mp4", "_manual.json"):
            (tmp_path / f"data/sav_{k}").mkdir(parents=True, exist_ok=True)
            shutil.copy(tiny / "clip" / f"{name}{end}", tmp_path / f"data/sav_{k}/same{end}")
    rows, folder = scored(tmp_path, tmp_path / "data", "mask", {"clips": {"format": "sav", "path": "."}})
    assert sorted(p.name for p in (folder / "clips/mask/masks").iterdir()) == ["same.0", "same.1"]
    assert rows["mask"]["scores"]["J"] > 0.5


# ---- row 9: a result is of its data

def test_a_copy_elsewhere_is_the_same_data_and_other_data_are_refused(tmp_path, monkeypatch):
    "By names, sizes and masks, not by paths."
    for name in ("a", "b"): clip(tmp_path / "data", name)
    rows, folder = scored(tmp_path, tmp_path / "data")
    shutil.copytree(tmp_path / "data", tmp_path / "copy")
    monkeypatch.setattr(module, "follow", lambda *_: pytest.fail("asked again"))
    again, _ = scored(tmp_path, tmp_path / "copy")
    assert again["mask"]["scores"] == rows["mask"]["scores"] and len(read_rows(tmp_path / "runs/results.jsonl")) == 1
    monkeypatch.setattr(module, "follow", shifted)
    for name in ("a", "b"): clip(tmp_path / "other", name, ids=(1,))
    with pytest.raises(ValueError, match="other data.*resume=False") as e: scored(tmp_path, tmp_path / "other")
    assert len(str(e.value)) < 400 and "\n" not in str(e.value)
    assert found_in(folder, "per_object").keys() == {"a_1", "a_2", "b_1", "b_2"}, "what was there is not touched"
    new, folder = scored(tmp_path, tmp_path / "other", resume=False)
    assert found_in(folder, "per_object").keys() == {"a_1", "b_1"}
    assert new["mask"]["digest"] != rows["mask"]["digest"]


def test_a_repaired_sample_is_asked_again(tmp_path, monkeypatch, capsys):
    "And nothing else is; the table has a row for either."
    for name in ("a", "b", "c"): clip(tmp_path / "data", name)
    frame = tmp_path / "data/JPEGImages/b/00003.jpg"
    whole = frame.read_bytes()
    frame.write_bytes(whole[:100])
    rows, folder = scored(tmp_path, tmp_path / "data")
    assert (rows["mask"]["samples"], rows["mask"]["skipped"]) == (2, 1) and "00003.jpg" in found_in(folder, "why")[0]
    asked = []
    noted = lambda model, sample, *rest: asked.append(sample.name) or shifted(model, sample, *rest)
    monkeypatch.setattr(module, "follow", noted)
    scored(tmp_path, tmp_path / "data")
    assert not asked, "still broken"
    frame.write_bytes(whole)
    again, folder = scored(tmp_path, tmp_path / "data")
    assert asked == ["b"] and (again["mask"]["samples"], again["mask"]["skipped"]) == (3, 0) and not found_in(folder,
        "why")
    assert "changed" in capsys.readouterr().out and len(read_rows(tmp_path / "runs" / "results.jsonl")) == 2
    mask(tmp_path / "data/Annotations/c/00002.png", (1, 4, 4))
    third, _ = scored(tmp_path, tmp_path / "data")
    assert asked == ["b", "c"] and third["mask"]["scores"] != again["mask"]["scores"], "a mask drawn anew counts"
    assert len(read_rows(tmp_path / "runs" / "results.jsonl")) == 3, "another digest is another row"
    clip(tmp_path / "data", "0 before all")
    fourth, folder = scored(tmp_path, tmp_path / "data")
    assert fourth["mask"]["samples"] == 4 and len(found_in(folder, "per_object")) == 8, "the same data and one more"


def test_a_failure_is_not_kept_at_the_end_of_a_training(tmp_path, teacher):
    "Not even where name and size of the file stay as they are."
    for name in ("a", "b"): clip(tmp_path / "data", name)
    frame = tmp_path / "data/JPEGImages/b/00003.jpg"
    whole = frame.read_bytes()
    frame.write_bytes(bytes(len(whole)))
    found = load_recipe(recipe(tmp_path, tmp_path / "data"))
    run = lambda: run_scores(teacher, found, tmp_path / "kept", {"clips": ("visible", "copy")}, limits_of(found))
    before = run()
    assert before["samples"] == {"clips": 1} and before["skipped"] == {"clips": 1} and 0.5 < before["J"] < 1
    frame.write_bytes(whole)
    after = run()
    assert after["samples"] == {"clips": 2} and after["skipped"] == {"clips": 0}
    assert after["controls"]["copy"]["J"] > 0.5
    assert run() == after


# ---- row 10: pairs by id

def test_a_pair_twice_is_a_pair_twice(tmp_path, tiny, real_files, teacher):
    "The same answers under either id: cgF1 stays as it is. With exemplars, and in the frozen evaluation."
    found = {}
    for name in ("one", "two"):
        file = str(real_files / f"faults/12_pair_twice/{name}.json")
        parts = {"concept_images": {"format": "saco_images", "annotations": file, "media": "saco"}}
        rows, folder = scored(tmp_path / name, tiny, "phrase,exemplar", parts, limit=16)
        reader = open_dataset(recipe(tmp_path / name, tiny, parts), "held_out")
        keys = ("phrase", "cgF1"), ("phrase", "IL_MCC"), ("exemplar", "pmF1")
        found[name] = [rows[p]["scores"][k] for p, k in keys] + [image_scores(teacher, reader, 8)["cgF1"]]
        said = json.loads((folder / "concept_images/phrase/predictions.json").read_text())
        found[f"{name} said"] = len(said)
    assert found["two"] == pytest.approx(found["one"], abs=1e-4) and found["two said"] == 2 * found["one said"]
    lenders = lending(reader)
    own = {p["id"]: name for name, pairs in reader.pairs.items() for p in pairs}
    assert lenders and all(reader.names[i] == own[k] != own[pair] for pair,
                           (i, k) in lenders.items()), "of another image"
    units = concept_scores._units(reader, range(2), as_batch(teacher, [reader.read(k) for k in range(2)]))
    assert len(units) > 4 and all(p.pair == pair["id"] for _, pair, p in units)
    pair, (i, lender) = next(iter(lenders.items()))
    assert len(shown_instance(reader, i, lender).masks) == 1


def test_two_categories_of_one_phrase_in_a_video(tmp_path, tiny, teacher, monkeypatch):
    "The phrase is asked once, and both get its answer."
    truth = json.loads((tiny / "long" / "veval.json").read_text())
    pair = next(p for p in truth["video_np_pairs"] if p["num_masklets"])
    named = {"category_id": 900, "noun_phrase": pair["noun_phrase"].upper()}
    alike = lambda a: all(a[k] == pair[k] for k in ("video_id", "category_id"))
    truth["annotations"] += [a | named | {"id": 900 + k} for k, a in enumerate(truth["annotations"]) if alike(a)]
    truth["video_np_pairs"].append(pair | named | {"id": 900})
    truth["categories"].append({"id": 900, "name": named["noun_phrase"]})
    (tmp_path / "two.json").write_text(json.dumps(truth))
    parts = {"concept_clips": {"format": "saco_video", "annotations": str(tmp_path / "two.json"), "media": "long"}}
    reader = open_dataset(recipe(tmp_path, tiny, parts), "held_out")
    asked = []

    def followed(model: Any, images: np.ndarray, concepts: Sequence[Any]) -> list[Followed]:
        "Every concept is answered by one masklet, of those that ask the same the first."
        asked[:] = [str(c).lower() for c in concepts]
        found = RunMasks.of(np.ones((len(images), 4, 4), bool))
        return [Followed(c, n, 0.9, found, n) for n, c in enumerate(asked) if asked.index(c) == n]

    for place in (module, concept_scores): monkeypatch.setattr(place, "follow_concepts", followed)
    i = next(k for k, v in enumerate(reader.videos) if v["id"] == pair["video_id"])
    task = Task(teacher, reader, "concept_clips", tmp_path / "task", frames=4)
    said = of_concept_clip(task, range(i, i + 1), ["phrase", "exemplar"])
    for name in ("phrase", "exemplar"):
        answered = [a["category_id"] for a in said[name]["predictions"]]
        assert {pair["category_id"], 900} <= {*answered}, name
        assert len(answered) == len({*answered}) == len(said[name]["asked"]), name
    told = [m["category_id"] for m in concept_scores._masklets(teacher, reader, i)]
    assert sorted(told) == sorted(p["category_id"] for p in reader.pairs[pair["video_id"]])


# ---- row 14: nothing to score

@pytest.mark.parametrize("given", [{"limit": -1}, {"instances": -2}, {"frames": -3}])
def test_a_number_below_nothing(given, tmp_path):
    clip(tmp_path / "data", "a")
    name, value = next(iter(given.items()))
    with pytest.raises(ValueError, match=f"{name}={value}.*0 for all"): scored(tmp_path, tmp_path / "data", **given)


def test_nothing_that_can_be_read(tmp_path, teacher):
    "The reasons, not a missing truth.json; and where another kind can be read, that one is scored."
    for k in range(5): (image(tmp_path / f"data/{k}.jpg")).write_bytes(b"no image")
    marks = {"images": [{"id": k, "file_name": f"{k}.jpg", "height": H, "width": W} for k in range(5)],
             "annotations": [{"id": k, "image_id": k, "segmentation": [[1, 1, 9, 1, 9, 9]]} for k in range(5)]}
    (tmp_path / "data/marks.json").write_text(json.dumps(marks))
    images = {"images": {"format": "coco", "annotations": "marks.json", "media": "."}}
    with pytest.raises(ValueError, match=r"none of 5 samples can be read: 0.jpg.*\(and 3 more\)") as e:
        scored(tmp_path, tmp_path / "data", "box", images)
    assert "truth.json" not in str(e.value) and len(str(e.value)) < 500
    assert not (tmp_path / "runs/results.jsonl").exists()
    clip(tmp_path / "data", "a")
    rows, folder = scored(tmp_path, tmp_path / "data", "box,mask", images | VOS)
    assert rows["mask"]["scores"]["J"] > 0.5
    found = load_recipe(recipe(tmp_path, tmp_path / "data", images))
    got = run_scores(teacher, found, tmp_path / "kept", {"images": ("box", "point")}, limits_of(found))
    nothing = {"miou_box": None, "miou_point": None, "by_count": {}}
    assert got == {"samples": {"images": 0}, "skipped": {"images": 5}} | nothing
    for place, kind, name in (("kept", "images", "box"), ("nowhere", "images", "box"), ("nowhere", "clips", "mask")):
        assert list(cases(tmp_path / place, kind, name)) == []


def test_nothing_is_asked_of_images_without_instances(tmp_path, real_files, teacher):
    parts = {"images": {"format": "coco", "annotations": "none.json", "media": "img"}}
    data = real_files / "faults/18_held_out_broken"
    rows, folder = scored(tmp_path, data, "box,point+1", parts)
    for row in rows.values():
        assert (row["scores"], row["samples"], row["reason"]) == ({}, 8, "nothing to score in its samples")
    reader = open_dataset(recipe(tmp_path, data, parts), "held_out")
    assert by_count(Task(teacher, reader, "images", folder / "images"), ["box"]) == {}


# ---- row 15: masks stay run lengths

def peak(call: Callable[[], Any]) -> int:
    "Bytes that a call holds at most."
    tracemalloc.start()
    try: call(); return tracemalloc.get_traced_memory()[1]
    finally: tracemalloc.stop()


def test_no_clip_of_masks_is_drawn_at_once(tmp_path, monkeypatch):
    "Truth, predictions, figures by frame and masklets of phrases, all within a fifth of the dense masks."
    n, t, h, w = 8, 30, 160, 224
    one = np.zeros((h, w), bool); one[4:20, 6:30] = True
    masks = RunMasks(np.array([[RunMasks.of(one[None]).rle(0)] * t] * n, object), (h, w))
    phrases = [Phrase(f"phrase {k}", (k,), pair=k) for k in range(n)]
    sample = ClipSample("c", np.zeros((t, h, w, 3), np.uint8), masks, np.ones((n, t), bool), [*range(n)], [*range(t)],
                        phrases)
    reader = SimpleNamespace(read=lambda *_, **__: sample, digest="x", names=["c"], videos=[{"id": 0}])
    task = Task(None, reader, "clips", tmp_path)
    dense, small = n * t * h * w, np.full((n, h, w), np.float32(-5))
    monkeypatch.setattr(module, "follow", lambda model, sample, names,
                        seed: (dict.fromkeys(names, small) for _ in range(t)))
    used = peak(lambda: of_clip(task, range(1), ["mask", "visible"]))
    assert used < dense / 5, f"{used / dense:.2f} of the dense masks"
    followed = lambda model, images, asked: [Followed(str(c), k, 0.9, masks[k % n], k) for k, c in enumerate(asked)]
    monkeypatch.setattr(module, "follow_concepts", followed)
    used = peak(lambda: of_concept_clip(task, range(1), ["phrase", "exemplar"]))
    assert used < dense / 5, f"{used / dense:.2f} of the dense masks"


def test_following_asks_for_the_masks_of_a_frame(teacher):
    "Whether a track is visible is looked up once, and not in every frame of every track."
    looks = []

    class Counted(ClipSample):
        @property
        def visible(self) -> np.ndarray: looks.append(1); return ClipSample.visible.fget(self)

    one = np.zeros((H, W), bool); one[4:20, 6:30] = True
    masks = RunMasks.of(np.stack([[one] * 4] * 3))
    sample = Counted("c", np.zeros((4, H, W, 3), np.uint8), masks, np.ones((3, 4), bool), [1, 2, 3], [0, 1, 2, 3])
    scores = FrameScores(sample)
    with torch.no_grad():
        for t, said in enumerate(follow(teacher, sample, ["visible"])): scores.add(t, said["visible"])
    assert len(scores.rows()) == 3 and len(looks) == 2


def test_parts_are_whole_after_all_of_this(tmp_path, teacher):
    "A part says of which samples it is, and the score of which data."
    clip(tmp_path / "data", "a")
    reader = open_dataset(recipe(tmp_path, tmp_path / "data"), "held_out")
    task = Task(teacher, reader, "clips", tmp_path / "clips")
    assert predict(task, ["mask"]) == 1 and predict(task, ["mask"]) == 0
    part = json.loads(task.part("mask", range(1)).read_text())
    assert part["data"] == task.data == score(task, "mask")["data"] and len(part["digests"]) == 1 and part["kept"] == []
    ways = [{"path": "x", "truth": "first"}, {"path": "y", "truth": "first"}, {"path": "x", "truth": "all"}]
    data = [Task(teacher, reader, "clips", tmp_path, options=how).data for how in ways]
    assert data[0] == data[1] != data[2], "how they are read counts, and not where they lie"
