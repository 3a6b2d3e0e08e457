"""Batches made ahead by worker processes: the same ones whoever makes them, and an error that names its file."""
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from esam3.core import Part
from esam3.data.batches import load_recipe
from esam3.data.readers import Sa1b
from esam3.data.samples import BadSample
from esam3.schedules import Schedule, Stage2Schedule, Stage3Schedule
from esam3.training.checkpoints import tensors_in
from esam3.training.concepts import QuerySampling
from esam3.training.loop import Clock, Made, Parts, loader, pick_workers
from esam3.training.stage1 import image_source, run_stage1
from esam3.training.stage2 import clip_source
from esam3.training.stage3 import MixedSteps
from logs import rows

SIDES, RECIPE = (144, 128), load_recipe("tiny")
SOURCES = {
    "stage 1": lambda: image_source(RECIPE, Schedule(batch_size=4), SIDES, 7),
    "stage 2": lambda: clip_source(RECIPE, Stage2Schedule(batch_size=2, augment=True, back=0.5), SIDES, 7),
    "stage 3": lambda: MixedSteps(RECIPE, Stage3Schedule(batch_size=8, clip_every=2, alternate=False), SIDES, 7,
                                  QuerySampling(2))}


def content(batch: object) -> tuple:
    return batch.names, batch.notes, {k: t.clone() for k, t in tensors_in(batch).items()}


def same(a: tuple, b: tuple) -> bool:
    return a[:2] == b[:2] and a[2].keys() == b[2].keys() and all(torch.equal(t, b[2][k]) or t.isnan().any()
        and torch.allclose(t, b[2][k], 0, 0, equal_nan=True) for k, t in a[2].items())


@pytest.mark.parametrize("stage", SOURCES)
@pytest.mark.parametrize("rank, ranks", [(0, 1), (1, 2)])
def test_any_number_of_workers_makes_the_same_batches(stage, rank, ranks):
    source = SOURCES[stage]()
    parts = Parts(range(6), rank, ranks)
    here = [content(source[p]) for p in parts]
    torch.manual_seed(1)
    for workers in (0, 1, 4):
        ahead = [content(b) for b in loader(source, parts, workers)]
        assert len(ahead) == 6 and all(map(same, here, ahead))
    late = [content(b) for b in loader(source, Parts(range(4, 6), rank, ranks), 2)]
    assert all(map(same, here[4:], late)), "from where a cut run goes on"
    assert not same(here[0], here[1])


@pytest.mark.parametrize("stage", SOURCES)
def test_a_step_is_the_same_step_in_any_number_of_parts(stage):
    "Pixels, instances, masks and seeds of the parts of 2 ranks × 2 micro-batches are those of the whole, in its order."
    source, joined = SOURCES[stage](), lambda batches, name: [x for b in batches for x in getattr(b, name)]
    for step in range(3):
        whole, parts = source[Part(step)], [source[Part(step, k, 4)] for k in range(4)]
        for kind in ("images", "clips", "clip_frames") if stage == "stage 3" else ("",):
            one, many = ([b for x in bs if (b := getattr(x, kind) if kind else x) is not None]
                         for bs in ([whole], parts))
            assert bool(one) == bool(many)
            for name in ("names", "seeds", "notes", "ids" if kind == "clips" else "names"):
                assert joined(one, name) == joined(many, name)
            for name in ("teacher_bytes", "student_bytes", "boxes", "points"):
                assert torch.equal(*(torch.cat([getattr(b, name) for b in bs] or [torch.zeros(
                    0)]).nan_to_num(-1) for bs in (one, many))), name
            assert all(map(torch.equal, joined(one, "masks"), joined(many, "masks"))) and len({b.seed for b in (
                *one, *many)}) <= 1
        if stage == "stage 3":
            for queries in ("queries", "clip_queries"):
                some = [getattr(x, queries) for x in (whole, *parts)]
                assert (some[0] and some[0].phrases) == (some[0] and [p for q in some[1:] if q for p in q.phrases])


@pytest.mark.parametrize("stage", SOURCES)
def test_what_is_pinned(stage, monkeypatch):
    "Every tensor that goes to the device."
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self.numel()) or self.clone())
    batch = SOURCES[stage]()[Part(0)]
    again = batch.pin_memory()
    assert same(content(batch), content(again))
    inside = [b for b in (batch.images, batch.clips, batch.clip_frames) if b] if stage == "stage 3" else [batch]
    assert sum(pinned) == sum(t.numel() for b in inside for k, t in tensors_in(b).items() if not k.startswith("spaces"))


def test_chance_is_not_touched():
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    for workers in (1, 0): list(loader(Made(lambda part: part.step), Parts(range(3)), workers))
    assert torch.equal(torch.rand(3), wanted)


def test_an_error_names_its_file(tmp_path):
    for name in ("a.jpg", "a.json"): (tmp_path / name).write_bytes(b"<html>")
    reader = Sa1b(tmp_path)
    with pytest.raises(BadSample, match=r"a\.json: not a readable annotation"):
        list(loader(Made(lambda part: reader.read(0)), Parts(range(2)), 1))


@pytest.mark.filterwarnings("ignore")
def test_a_dead_worker_ends_the_run():
    def die(part: Part) -> int:
        if part.step == 2: os.kill(os.getpid(), signal.SIGKILL)
        return part.step
    with pytest.raises(RuntimeError, match="worker .*(killed|exited)"): list(loader(Made(die), Parts(range(5)), 1))


def test_a_run_with_workers_is_the_run_without(tmp_path):
    weights = {}
    for workers in (0, 2):
        folder = run_stage1("es-ev-s", "tiny", steps=3, runs=str(tmp_path / str(workers)), workers=workers,
                            eval_images=1)
        weights[workers] = (folder / "student/model.safetensors").read_bytes(), rows(folder / "metrics.jsonl")
        shutil.rmtree(folder)
    assert weights[0] == weights[2]


def test_how_many_workers(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(48))
    assert [pick_workers(cpu), pick_workers(cpu, 3), pick_workers(cuda), pick_workers(cuda, 0)] == [0, 3, 8, 0]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert pick_workers(cuda) == 6


def test_waiting_is_measured():
    import time
    def slow(part: Part) -> int: time.sleep(0.05); return part.step
    clock = Clock(4, 10)
    assert list(clock.waiting(iter(loader(Made(slow), Parts(range(4)))))) == [0, 1, 2,
        3] and 0.2 <= clock.waited and clock.share > 0.8
    told = clock.step()
    assert 0.2 <= told["seconds"] < 2 and told["waits"] > 0.8 and told["per_second"] == pytest.approx(10
        / told["seconds"], rel=1e-3)
    assert told["left"] == pytest.approx(3 * told["seconds"], rel=1e-3) and told["memory_gb"] > 0.1


def test_a_cache_written_by_workers_is_the_cache(tmp_path, monkeypatch, capsys):
    "The same records, and a plan that counts decoding too."
    from esam3.training.stage1 import decode_rate, keep_features, together_rate
    from esam3.models.teacher import load_teacher
    teacher, contents = load_teacher("toy"), {}
    for workers in (0, 2):
        monkeypatch.setenv("ESAM3_CACHE", str(tmp_path / str(workers)))
        images, kept, _ = keep_features(RECIPE, teacher, "int8", 1, workers=workers)
        contents[workers] = [f.read_bytes() for f in sorted(Path(kept.folder).glob("*.trunk"))]
    assert contents[0] == contents[2] and contents[0] and "features to write: 24 images" in capsys.readouterr().out
    assert decode_rate(images, 144, 4) > 2 * decode_rate(images, 144, 0) and together_rate(6.0, 3.0,
        0) == 2 and together_rate(6.0, 3.0, 4) == 3
