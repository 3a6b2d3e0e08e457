"""SAM3's real geometry, real formats and real sizes on a CPU: every shipped recipe is opened by the source that its
stage uses, and the stages run from them.

The teacher is `thin-sam3` (1008 px, 288² masks, random), the data are `miniatures`: nothing is learned here, everything
is shaped as it will be."""
import json
import shutil
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from esam3.core import Part, declared_in
from esam3.data.batches import RECIPES, load_recipe, open_dataset, with_sampling
from esam3.data.miniatures import miniatures
from esam3.evaluation.predictions import instances, write_labels, write_objects
from esam3.schedules import Schedule, Stage2Schedule, Stage3Schedule
from esam3.training.concepts import ConceptQueries, QuerySampling
from esam3.training.stage1 import image_source
from esam3.training.stage2 import clip_source
from esam3.training.stage3 import MixedSteps, run_feature_warmup, stage3_schedule

SIDES = (1008, 1024)
SMALL = "instances: 4, tracks: 2, phrases: 2, frames: [4, 4]"
FEW = "instances: 2, tracks: 1, phrases: 2, frames: [3, 3]"  # of what is trained on: minutes count
# of the held-out clip, which has eight frames, previews show the second frame, so that no more are followed
CHAIN = """
import json, sys
from dataclasses import replace
from esam3.training import previews
from esam3.training.stage1 import run_stage1
from esam3.training.stage2 import run_stage2
from esam3.training.stage3 import run_stage3
previews.WATCHED[2] = ("clips", lambda sample: replace(previews.track_in_clip(sample), frame=1))
for stage, given in json.loads(sys.argv[1]):
    print({1: run_stage1, 2: run_stage2, 3: run_stage3}[stage](**given), flush=True)
"""


@pytest.fixture(scope="session")
def data() -> Path:
    "Where the miniatures of SA-1B, SA-V, SA-Co and plain videos lie; $ESAM3_DATA of this module."
    return miniatures()


@pytest.fixture(autouse=True)
def there(data, monkeypatch): monkeypatch.setenv("ESAM3_DATA", str(data))


# ---- the stages, from the shipped recipes, by parameters that the notebooks have

def runs_of(schedule: str, place: Path) -> list[tuple[int, dict]]:
    "Stage and parameters of four runs, each on from the one before."
    common = {"variant": "es-ev-s", "teacher": "thin-sam3", "steps": 2, "batch_size": 1, "schedule": schedule,
              "sampling": FEW, "runs": str(place)}
    warmup = {"warmup_steps": 1} if schedule == "proven" else {}  # the paper has none
    clips = {"eval_clips": 1, "eval_frames": 2, **warmup}
    return [(1, {**common, "recipe": "sa1b", "weights": "random", "eval_images": 1, "eval_instances": 2}),
            (2, {**common, "recipe": "sav", **clips}),
            (2, {**common, "recipe": "videos", "student": str(place / "sa1b" / "es-ev-s" / "stage1" / "student"),
                 **warmup}),
            (3, {**common, "recipe": "saco", "each": 2, "eval_images": 1, **clips})]


@pytest.fixture(scope="module")
def chains(data, tmp_path_factory) -> dict[str, Path]:
    "schedule → the folder of its runs; both at once, a thread each."
    places, started = {s: tmp_path_factory.mktemp(s) for s in ("paper", "proven")}, {}
    for schedule, place in places.items():
        given = json.dumps(runs_of(schedule, place))
        started[schedule] = subprocess.Popen([sys.executable, "-c", CHAIN, given],
                                             env={**os.environ, "OMP_NUM_THREADS": "1", "ESAM3_DATA": str(data)},
                                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for process in started.values():
        printed = process.communicate(timeout=900)[0]
        assert process.returncode == 0, printed[-4000:]
    return places


ENDS = [(s, stage, r) for s in ("paper", "proven") for stage,
        r in ((1, "sa1b"), (2, "sav"), (2, "videos"), (3, "saco"))]


@pytest.mark.parametrize("schedule, stage, recipe", ENDS, ids=[f"{r}-{s}" for s, _, r in ENDS])
def test_a_stage_ends_with_a_student_and_a_report(chains, schedule, stage, recipe):
    folder = chains[schedule] / recipe / "es-ev-s" / f"stage{stage}"
    report, lines = json.loads((folder / "report.json").read_text()), [json.loads(line)
        for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert (folder / "student"
            / "model.safetensors").exists() and report["settings"]["precision"] == "no" and report["params"][
                "teacher"] < 15e6
    assert len(lines) == 2 and all(np.isfinite(line["loss"]) and np.isfinite(line["gradient"]) for line in lines)
    assert report["settings"]["schedule"]["focal"] == {"paper": 1.0, "proven": 20.0}[schedule]
    assert report["data"]["held_out"] == {1: {"images": 1}, 2: {"clips": 1} if recipe == "sav" else {},
                                          3: {"concept_images": 1, "concept_clips": 1}}[stage]
    assert bool(report["student"]) == (folder / "preview.npz").exists() == (recipe != "videos")
    assert (folder / "warmup").exists() == (stage > 1 and schedule == "proven")


def test_stage3_learns_from_images_and_from_clips_with_phrases(chains):
    "The paper's steps have one or the other; the proven ones both."
    words = {s: [{k.split()[0] for k in json.loads(line)} for line in (
        p / "saco" / "es-ev-s" / "stage3" / "metrics.jsonl").read_text().splitlines()] for s, p in chains.items()}
    clips, images = {"clip", "frame"}, {"task", "prompt"}
    assert (clips & words["paper"][0] and not images & words["paper"][0] and images & words["paper"][1]
            and not clips & words["paper"][1])
    assert all(images & w and clips & w for w in words["proven"])


def test_only_parameters_that_users_have():
    notebooks = {stage: json.loads((RECIPES.parent / "nbs" / f"{stage}0_stage{stage}.ipynb").read_text())
                 for stage in (1, 2, 3)}
    cells = {s: next("".join(c["source"]) for c in nb["cells"] if "parameters" in c["metadata"].get("tags", [])) for s,
             nb in notebooks.items()}
    for stage, given in runs_of("paper", Path("x")): assert given.keys() <= declared_in(cells[stage]).keys()


# ---- every recipe, with the source of its stage

def public_layouts(root: Path) -> None:
    "Two toy clips and two images in the layouts of the public sets, under the names that the recipes expect."
    clips, images = open_dataset("tiny", "held_out", "clips"), open_dataset("tiny", "held_out", "images")
    frames, masks = {"davis": ("JPEGImages/480p", "Annotations/480p")}, {}
    for name, splits in (("davis", [""]), ("mose", ["train", "valid"]), ("lvos", ["train", "valid"]),
                         ("ytvos", ["train", "valid"]), ("sav", ["sav_val", "sav_test"])):
        for split in splits:
            for sample in (clips.read(0), clips.read(1)):
                photos, labels = frames.get(name, ("JPEGImages_24fps",
                                                   "Annotations_6fps") if name == "sav"
                                            else ("JPEGImages", "Annotations"))
                ids = [k + 1 for k in range(len(sample.masks))]
                masks.setdefault(root / name / split, {})[sample.name] = ids
                for t, image in enumerate(sample.frames):
                    place = root / name / split / photos / sample.name
                    place.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(image).save(place / f"{t:05d}.jpg")
                    (write_objects if name == "sav" else write_labels)(root / name / split / labels / sample.name,
                        f"{t:05d}", sample.masks[:, t] - 0.5, ids)
    for place, found in masks.items():
        if place.parent.name == "ytvos":
            (place / "meta.json").write_text(json.dumps({"videos": {v: {"objects": {str(
                k): {"category": "toy", "frames": ["00000"]} for k in ids}} for v, ids in found.items()}}))
        if place.name == "davis":
            for split in ("train", "val"):
                (place / "ImageSets" / "2017").mkdir(parents=True, exist_ok=True)
                (place / "ImageSets" / "2017" / f"{split}.txt").write_text("\n".join(found))
    truth = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "object"}]}
    (root / "coco" / "val2017").mkdir(parents=True); (root / "coco" / "annotations").mkdir()
    for i in range(2):
        sample = images.read(i)
        Image.fromarray(sample.image).save(root / "coco" / "val2017" / f"{i:012d}.jpg")
        some = instances(i, [100 * i + n for n in range(len(sample.masks))], f"{i:012d}.jpg", sample.masks)
        for k, v in some.items(): truth[k] += v
    (root / "coco" / "annotations" / "instances_val2017.json").write_text(json.dumps(truth))
    for image in truth["images"]: image["coco_url"] = f"x/val2017/{image.pop('file_name')}"  # LVIS names no files
    (root / "coco" / "annotations" / "lvis_v1_val.json").write_text(json.dumps(truth))


@pytest.fixture(scope="module")
def everything(data, tmp_path_factory) -> Path:
    "The miniatures, and beside them the other public sets in small."
    root = tmp_path_factory.mktemp("data")
    public_layouts(root)
    for name in ("sa1b", "saco", "videos"): (root / name).symlink_to(data / name)
    (root / "sav" / "sav_train").symlink_to(data / "sav" / "sav_train")
    shutil.copytree(root / "coco" / "val2017", root / "folder" / "photos")
    shutil.copytree(data / "videos", root / "folder" / "films")
    return root


@pytest.mark.parametrize("name", sorted(p.stem for p in RECIPES.glob("*.yaml")))
def test_every_recipe_is_opened_by_the_source_of_its_stage(everything, name, monkeypatch):
    "Training splits give a batch by the sources of all stages that have data there; every other split is read."
    monkeypatch.setenv("ESAM3_DATA", str(everything))
    recipe = with_sampling(load_recipe(name), SMALL)
    if recipe["root"] == "toyworld": recipe["root"] = "toyworld/tiny"  # the same files, fewer
    sides, train, opened = (SIDES if recipe["teacher"] != "toy" else (144, 128)), recipe["splits"].get("train",
        {}), set()
    if "images" in train: opened.add(len(image_source(recipe, Schedule(batch_size=1), sides, 0)[Part(0)].names))
    for kind in ("clips", "concept_clips"):
        if kind in train:
            opened.add(len(clip_source(recipe, Stage2Schedule(batch_size=1), sides, 0, kind)[Part(0)].names))
    if {"concept_images", "concept_clips"} & {*train}:
        batches = [MixedSteps(recipe, Stage3Schedule(batch_size=1, clip_every=1, alternate=a), sides, 0, QuerySampling(
            2))[Part(0)] for a in (True, False)]
        assert all(b.clips for b in batches) and batches[0].images is None and batches[1].images is not None
    for split, parts in recipe["splits"].items():
        if split != "train":
            for kind in parts: assert open_dataset(recipe, split, kind).read(0)
    assert opened <= {1} and (train or "held_out" in recipe["splits"])


# ---- row 1: what stage 3 reads

def without(recipe: dict, *kinds: str) -> dict:
    return {**recipe, "splits": {**recipe["splits"],
                                 "train": {k: v for k, v in recipe["splits"]["train"].items() if k not in kinds}}}


def test_stage3_takes_what_a_recipe_has():
    saco, plain = with_sampling(load_recipe("saco"), SMALL), Stage3Schedule(batch_size=1, clip_every=1)
    still = MixedSteps(saco, Stage3Schedule(batch_size=1, clip_every=0), SIDES, 0, QuerySampling(2))[Part(0)]
    assert still.images and still.clips is None and isinstance(still.queries, ConceptQueries)
    moving = MixedSteps(without(saco, "concept_images"), plain, SIDES, 0, QuerySampling(2))[Part(1)]
    assert (moving.images is None and moving.clip_frames and {*moving.clip_queries.phrases} - {None}
            and moving.clip_queries.image_index.max() < len(moving.clips.names))
    both = {**saco, "splits": {**saco["splits"],
                               "train": {**saco["splits"]["train"],
                                         "clips": {"format": "videos", "path": "../videos"}}}}
    source = MixedSteps(both, plain, SIDES, 0, QuerySampling(2))
    assert [source[Part(k)].clip_frames is None for k in range(2)] == [False,
        True], "clips with phrases and plain ones by turns"
    with pytest.raises(ValueError,
                       match="learns from concept_images or concept_clips, and its training split holds clips"):
        MixedSteps(without(both, "concept_images", "concept_clips"), plain, SIDES, 0, QuerySampling(2))


def test_the_feature_warmup_takes_concept_images(monkeypatch):
    "saco has no plain images."
    from esam3.training import stage3
    seen = {}
    monkeypatch.setattr(stage3, "fit", lambda task, source, groups, own, *_,
                        **__: seen.setdefault("batch", source[Part(0)]))
    monkeypatch.setattr(stage3, "parameter_groups", lambda *_: [])
    monkeypatch.setattr(stage3, "FeatureWarmup", lambda task: task)
    task = type("Task", (), {"schedule": stage3_schedule(load_recipe("saco"), schedule="proven", steps=1, batch_size=1),
                             "student": None})()
    run_feature_warmup(task, with_sampling(load_recipe("saco"), SMALL), SIDES, Path("x"), 0)
    assert len(seen["batch"].names) == 2 and not any(seen["batch"].phrases) and len(seen["batch"].image_index) >= 1


# ---- row 12: one augmentation a clip, in the stages

@pytest.mark.parametrize("kind, name", [("clips", "sav"), ("concept_clips", "saco")])
def test_clips_are_augmented_as_the_recipe_says(kind, name):
    recipe = with_sampling(load_recipe(name), SMALL)
    batches = {a: clip_source(recipe, Stage2Schedule(batch_size=1, augment=a), SIDES, 3, kind)[Part(0)]
               for a in (True, False)}
    sizes = {open_dataset(recipe, "train", kind).read(i, most=4).frames.shape[1:3] for i in range(2)}
    assert {i.shape[:2] for i in batches[False].images} <= sizes, "as they are"
    changed = [np.abs(i.astype(int).mean() - j.astype(int).mean()) for i,
               j in zip(batches[True].images, batches[False].images)]
    assert {max(i.shape[:2]) <= 1024 for i in batches[True].images} == {True} and len({i.shape
        for i in batches[True].images}) == 1 and max(changed) > 0


def test_an_archive_out_of_a_thousand_is_held_out(tmp_path, monkeypatch):
    "sa_000900 … sa_000998 used to be left out."
    monkeypatch.setenv("ESAM3_DATA", str(tmp_path)); (tmp_path / "sa1b").mkdir()
    for k in (0, 899, 900, 989, 990, 998, 999):
        with tarfile.open(tmp_path / "sa1b" / f"sa_{k:06d}.tar", "w") as tar:
            tar.addfile(tarfile.TarInfo(f"sa_{k}.jpg"))
    assert [len(open_dataset("sa1b", split)) for split in ("train", "held_out")] == [6, 1]
