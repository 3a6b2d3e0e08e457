"""Several data sets in one training: shares of the steps, epochs of each part, images among clips, and images that
nobody has annotated."""
import itertools
import json
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from esam3.core import Part, Spaces, seed_everything
from esam3.data.batches import augment, collate_clips, collate_images, data_digest, draw, load_recipe, open_dataset
from esam3.data.mixtures import Mixture, Stills, turn
from esam3.data.samples import ClipSample
from esam3.models.student import EfficientSam3, build_student
from esam3.models.teacher import Sam3, load_teacher
from esam3.schedules import Schedule, Stage1Schedule, Stage2Schedule, Stage3Schedule
from esam3.training import tracks
from esam3.training.loop import TRAINS, parameter_groups, train_mode
from esam3.training.runs import digests
from esam3.training.stage1 import check_cache, image_source, run_stage1
from esam3.training.stage2 import SingleFrameWarmup, Stage2, clip_source, give_memory, there_and_back

SIDES = (144, 128)  # the toy's frames, px
TINY = Stage2Schedule(steps=4, batch_size=2, global_latents=4, local_latents=4, lambda2=0.5)
MIXED = ("extends: tiny\nsplits: {train: {clips: {format: mixture, parts: [{share: %s, format: sav, path: clip}, "
         "{share: 3, recipe: tiny, kind: images}]}}}\n")


class Numbers:
    "A data set of so many clips, each of which is its number."
    kind, notes = "clips", []

    def __init__(self, count: int): self.names = [str(k) for k in range(count)]
    def __len__(self) -> int: return len(self.names)
    def read(self, i, rng=None, frames=0, limit=0, start=None, most=0):
        assert 0 <= i < len(self)
        return ClipSample(self.names[i], np.zeros((frames or 1, 2, 2, 3), np.uint8),
                          np.zeros((0, frames or 1, 2, 2), bool), np.zeros((0, frames or 1), bool), [], [])


@pytest.fixture
def mixed(tmp_path) -> dict:
    "Clips of the tiny toy world with its images among them, 7 : 3."
    (tmp_path / "mixed.yaml").write_text(MIXED % 7)
    return load_recipe(tmp_path / "mixed.yaml")


# ---- shares and epochs

SHARES = [(0.9, 0.1), (0.5, 0.5), (1, 2, 3, 4), (0.97, 0.02, 0.01), (1e6, 1)]


@pytest.mark.parametrize("shares, seed", [*itertools.product(SHARES, (0, 42))])
def test_shares_hold_over_a_thousand_steps(shares, seed):
    "To one percent of all steps from any step on, and each part's own steps are counted without a gap."
    normal = [s / sum(shares) for s in shares]
    told = [turn(seed, step, normal) for step in range(2000)]
    for first in (0, 311, 1000):
        for part, share in enumerate(normal):
            assert abs(sum(p == part for p, _ in told[first:first + 1000]) / 1000 - share) < 0.01
    for part in range(len(shares)): assert (own := [k for p, k in told if p == part]) == list(range(len(own)))


@pytest.mark.parametrize("world", [1, 2])
def test_a_step_is_of_one_part_and_each_part_is_read_once_an_epoch(world):
    mixture = Mixture({"a": Numbers(12), "b": Numbers(30)}, (0.3, 0.7))
    offset, read = {"a": 0, "b": 12}, {"a": [], "b": []}
    for step in range(40):
        first, length, _ = mixture.part_at(5, step)
        part = "a" if (first, length) == (0, 12) else "b"
        for rank in range(world):  # a rank's part of the slots
            names = [s.name for s in draw(mixture, 5, step, 3 * world, Part(step, rank, world).slots(3 * world))]
            assert all(int(n) < length for n in names)
            read[part] += names
    for part, count in (("a", 12), ("b", 30)):
        assert sorted(read[part][:count], key=int) == [str(k) for k in range(count)], "an epoch holds each once"
    assert offset["b"] == mixture.starts[1]


def test_the_same_step_is_the_same_batch():
    "Whatever was drawn before, so that a run goes on where it stopped; another seed mixes in another order."
    make = lambda: Mixture({"a": Numbers(12), "b": Numbers(30), "c": Mixture({"d": Numbers(5), "e": Numbers(
        7)}, (1, 1))}, (3, 5, 2))
    names = lambda mixture, seed, steps: [[s.name for s in draw(mixture, seed, k, batch=4, frames=(1, 3))]
                                          for k in steps]
    whole = names(make(), 1, range(30))
    assert names(make(), 1, range(20, 30)) == whole[20:]
    order = lambda seed: [make().part_at(seed, k)[0] for k in range(30)]
    assert order(1) == order(1) != order(2)


def test_a_bad_sample_is_replaced_from_its_own_part():
    from esam3.data.samples import BadSample

    class Spoilt(Numbers):
        def read(self, i, *rest, **options):
            if i % 2: raise BadSample(f"{i} is spoilt")
            return super().read(i, *rest, **options)
    mixture = Mixture({"a": Numbers(50), "b": Spoilt(4)}, (1, 1))
    for step in range(20):
        part = mixture.part_at(0, step)[0]
        samples = draw(mixture, 0, step, batch=4)
        if part: assert all(int(s.name) in (0, 2) for s in samples) and any(s.notes for s in samples)


# ---- what a mixture is

def test_a_mixture_is_known_by_parts_and_shares(mixed, tmp_path):
    (tmp_path / "other.yaml").write_text(MIXED % 6)
    (tmp_path / "same.yaml").write_text((MIXED % 14).replace("share: 3", "share: 6"))
    told = [data_digest(tmp_path / f"{name}.yaml")["clips"] for name in ("mixed", "other", "same")]
    assert told[0] == told[2] != told[1] != data_digest("tiny")["clips"]
    assert digests(mixed, {"train": ["clips"]})["train"]["clips"] == told[0], "a run's settings hold it"
    reader = open_dataset(mixed, "train", "clips")
    assert len(reader) == len(reader.names) == len(set(reader.names)) == sum(map(len, reader.readers))


def test_recipes_are_mixed_by_name(tmp_path, monkeypatch):
    "In any place where a recipe is named; the first one gives all but the training data."
    both, toy = load_recipe("tiny:3+toy_hour:1"), load_recipe("tiny")
    assert both["name"] == "tiny-0.75+toy_hour-0.25" and load_recipe(both["name"])["name"] == both["name"]
    assert {k: v for k, v in both.items() if k not in ("name", "splits")} == {k: v for k,
        v in toy.items() if k not in ("name", "splits")}
    assert (both["splits"]["held_out"] == toy["splits"]["held_out"]
            and set(both["splits"]["train"]) == set(toy["splits"]["train"]))
    (tmp_path / "far+away.yaml").write_text("extends: tiny\nname: far\n")
    assert load_recipe(tmp_path / "far+away.yaml")["name"] == "far", "a file that is there is no mixture"
    (tmp_path / "far.yaml").write_text("extends: tiny\nname: far\n")
    monkeypatch.chdir(tmp_path)
    assert load_recipe("far.yaml:1+tiny:1")["name"] == "far-0.5+tiny-0.5"
    parts = {k: open_dataset(load_recipe("tiny:1+far.yaml:1"), "train", k)
             for k in ("images", "clips", "concept_images")}
    assert all(isinstance(r, Mixture) and len(r.readers) == 2 for r in parts.values())
    from esam3.training.concepts import vocabulary
    assert vocabulary(parts["concept_images"]) == vocabulary(parts["concept_images"].readers[0])


def test_a_part_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("ESAM3_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="(?s)part 2 of the mixture, davis: .*https://davischallenge"):
        open_dataset("tiny:0.9+davis:0.1", "train", "clips")
    (tmp_path / "gone.yaml").write_text("extends: tiny\nsplits: {train: {images: {format: mixture, parts: [{share: 1, "
                                        "format: sa1b, path: images.tar}, {share: 1, format: coco, annotations: "
                                        "no.json, media: m}]}}}")
    with pytest.raises(FileNotFoundError, match="part 2 of the mixture, coco: .*no.json"):
        open_dataset(tmp_path / "gone.yaml", "train", "images")


def test_images_of_two_formats_are_mixed(tmp_path):
    "SA-1B's with COCO's, and with a folder of images."
    sample = open_dataset("tiny", "train", "images").read(0)
    Image.fromarray(sample.image).save(tmp_path / "one.png")
    h, w = sample.image.shape[:2]
    (tmp_path / "coco.json").write_text(json.dumps({"images": [{"id": 1, "file_name": "one.png", "height": h,
                                                                "width": w}],
                                                    "categories": [{"id": 1, "name": "thing"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "iscrowd": 0, "area": 400, "bbox": [5, 5, 20, 20],
                         "segmentation": [[5, 5, 25, 5, 25, 25, 5, 25]]}]}))
    (tmp_path / "both.yaml").write_text("extends: tiny\nsplits: {train: {images: {format: mixture, parts: [{share: 1, "
                                        "format: sa1b, path: images.tar}, "
        f"{{share: 1, format: coco, annotations: coco.json, media: ., root: {tmp_path}}}, {{share: 1, format: folder, "
        f"path: one.png, root: .}}]}}}}}}")
    reader = open_dataset(tmp_path / "both.yaml", "train", "images")
    assert [len(r) for r in reader.readers] == [24, 1, 1] and not reader.labelled
    counts = {name: set() for name in ("sa1b", "coco", "folder")}
    for step in range(12):
        batch = collate_images(draw(reader, 0, step, batch=2), *SIDES)
        name = {0: "sa1b", 24: "coco", 25: "folder"}[reader.part_at(0, step)[0]]
        counts[name].add(len(batch.image_index) // 2)
    assert counts["coco"] == {1} and counts["folder"] == {0} and min(counts["sa1b"]) > 0


def test_no_cache_of_a_mixture():
    with pytest.raises(ValueError, match="mixes several"): check_cache("int8", 2, {"format": "mixture"})


# ---- an image as a clip

@lru_cache
def networks() -> tuple[Sam3, EfficientSam3]:
    "The toy teacher and an untrained student with dense memory."
    teacher = load_teacher("toy")
    torch.manual_seed(0)
    return teacher, build_student("es-ev-s", teacher)


def task_of(sampled: int = 0) -> Stage2:
    teacher, dense = networks()
    torch.manual_seed(1)
    student = give_memory(dense, "perceiver", TINY)
    parameter_groups(student, TRAINS[2], 1e-3)
    task = Stage2(teacher, student, TINY, sampled)
    train_mode(task)
    return task


def test_images_come_as_batches_of_clips_of_one_frame(mixed):
    "All of a batch, whatever its clips were to be; augmented as they are; and played back they stay one frame."
    source, reader = clip_source(mixed, Stage2Schedule(batch_size=2, back=1.0), SIDES, 42), open_dataset(mixed, "train",
        "clips")
    lengths = [source[Part(step)].frame_index.shape[1] for step in range(10)]
    still = [reader.part_at(42, step)[0] > 0 for step in range(10)]
    assert [n == 1 for n in lengths] == still and 2 <= sum(still) <= 4 and all(n == 1 or n >= 7 for n in lengths)
    sample = Stills(open_dataset("tiny", "train", "images")).read(2, frames=8)
    assert len(there_and_back(sample).frames) == 1 and augment(sample, np.random.default_rng(0),
                                                               **mixed["augment"]).frames.shape[0] == 1


@pytest.mark.parametrize("labelled", [True, False])
def test_stage_2_learns_from_an_image(labelled):
    """One frame, asked by box or point, never by a mask: losses are finite, the decoder learns, and the memory is left
    alone."""
    reader, task = Stills(open_dataset("tiny", "train", "images")), task_of(0 if labelled else 4)
    samples = [reader.read(i) for i in (3, 5)]
    if not labelled:
        samples = [ClipSample(s.name, s.frames, s.masks[:0], s.annotated[:0], [], s.numbers) for s in samples]
    batch = collate_clips(samples, *SIDES)
    for seed in range(3):
        seed_everything(seed)
        terms = task(batch)
        assert terms and all(v.isfinite()
                             for v in terms.values()) and ("task mask" in terms) == labelled and terms["distill"] > 0
    sum(terms.values()).backward()
    grads = {n: p.grad for n, p in task.student.named_parameters() if p.requires_grad and p.grad is not None}
    assert any(g.abs().max() > 0 for n, g in grads.items() if "mask_decoder" in n) and all(g.isfinite().all()
        for g in grads.values())
    assert not any(g.abs().max() > 0 for n, g in grads.items() if n.startswith("perceiver"))
    warmup = SingleFrameWarmup(task, networks()[1])(batch)
    assert all(v == 0 for v in warmup.values()), "an image has no memory to read"


# ---- a folder of images

@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    "Toy images as somebody might have them, where the recipe `folder` looks for them."
    monkeypatch.setenv("ESAM3_DATA", str(tmp_path / "data"))
    place = tmp_path / "data/folder/holiday"
    place.mkdir(parents=True)
    reader = open_dataset("tiny", "train", "images")
    for k in range(5): Image.fromarray(reader.read(k).image).save(place / f"IMG {k}.JPG")
    return place


def test_stage_1_from_a_folder_of_images(folder, tmp_path):
    "Two steps with the toy teacher, which finds the instances; no held-out data, no scores."
    (tmp_path / "mine.yaml").write_text("extends: folder\nteacher: toy\nweights: null\nsplits: {train: {clips: "
                                        "null}}\nsampling: {tracks: null, frames: null}\naugment: {short: [96, 128], "
                                        "crop: 128}\n")
    done = run_stage1("es-ev-s", str(tmp_path / "mine.yaml"), steps=2, batch_size=2, runs=str(tmp_path / "runs"),
                      every=1)
    rows = [json.loads(line) for line in (done / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows][-1] >= 1 and all(np.isfinite(v) for r in rows for v in r.values()
                                                      if isinstance(v, float))
    assert all(r["distill"] > 0 and r["task mask"] > 0 for r in rows), "there were instances"
    assert (done / "student/config.json").exists()


def test_stage_3_of_a_folder_is_refused(folder):
    from esam3.training.concepts import QuerySampling
    from esam3.training.stage3 import MixedSteps, run_stage3
    said = "folder: stage 3 learns from concept_images or concept_clips, and its training split holds images, clips"
    with pytest.raises(ValueError, match=said):
        MixedSteps(load_recipe("folder"), Stage3Schedule(batch_size=4), SIDES, 0, QuerySampling())
    # before it asks for a student of stage 2
    with pytest.raises(ValueError, match=said): run_stage3("es-ev-s", "folder", steps=1, batch_size=2)


def test_images_without_an_instance_teach_features(folder, monkeypatch):
    "An image in which the teacher sees nothing, or nothing of a pixel's size, costs no step."
    for f in folder.iterdir(): Image.fromarray(np.full((96, 128, 3), 127, np.uint8)).save(f)
    recipe = load_recipe("folder")
    batch = image_source({**recipe, "augment": {}}, Schedule(batch_size=2), SIDES, 0)[Part(0)]
    assert len(batch.image_index) == 0
    from esam3.training.stage1 import Stage1
    terms = Stage1(*networks(), Stage1Schedule(lambda2=0.5), sampled=4)(batch)
    assert all(v.isfinite() for v in terms.values()) and terms["features"] > 0
    bare = collate_images([Stills(open_dataset("folder", "train", "images")).reader.read(0)], *SIDES)
    monkeypatch.setattr(tracks, "choose_masks", lambda masks, *rest: torch.tensor([0, 1]))
    monkeypatch.setattr(Spaces, "to_source", lambda self, maps,
                        *rest: torch.stack([torch.full((96, 128), -1.0), torch.ones(96, 128)]))
    teacher = networks()[0]
    with torch.no_grad(): found = tracks.propose(teacher, teacher.encode(bare.teacher_pixels), bare, 4)
    assert [len(m) for m in found] == [1]


def test_stage_3_takes_images_among_its_clips(tmp_path):
    "And with their phrases."
    from esam3.training.concepts import QuerySampling
    from esam3.training.stage3 import MixedSteps
    (tmp_path / "talk.yaml").write_text("extends: tiny\nsplits: {train: {clips: null, concept_images: null, "
                                        "concept_clips: {format: mixture, parts: ["
        "{share: 1, format: saco_video, annotations: long/veval.json, media: long}, {share: 1, recipe: tiny, kind: "
        "images}]}}}\nstages: {2: null}\n")
    source = MixedSteps(load_recipe(tmp_path / "talk.yaml"), Stage3Schedule(batch_size=8, clip_every=1), SIDES, 0,
                        QuerySampling())
    batches = [source[Part(step)] for step in range(4)]
    assert {b.clips.frame_index.shape[1] == 1 for b in batches} == {True,
        False} and all(b.clip_frames.phrases and len(b.clip_queries.image_index) for b in batches)


@pytest.mark.parametrize("part, count", [("{format: videos, path: clip}", 8), ("{format: sav, path: clip}", 0)])
def test_stage_3_finds_tracks_where_nobody_has_marked_any(tmp_path, monkeypatch, part, count):
    from esam3.training import stage3
    (tmp_path / "plain.yaml").write_text(f"extends: tiny\nsplits: {{train: {{clips: {part}}}}}\n")
    tasks, recipe, (teacher, student) = [], load_recipe(tmp_path / "plain.yaml"), networks()
    monkeypatch.setattr(stage3, "fit", lambda task, *rest, **options: tasks.append(task) or {})
    schedule = stage3.stage3_schedule(recipe, options={"warmup_steps": 0, "encoder_lr": 0.0})
    stage3.train_stage3(student, teacher, recipe, schedule, stage3.QuerySampling(), tmp_path, 0)
    assert tasks[0].tracking.sampled == count
