"""`kill -9` at random moments: what is there afterwards is whole, and given again the same command ends as if nothing
had been.

Three stages, the feature cache, and the indexes of videos, tars and surveys. In a plain run seven kills; `ESAM3_FULL=1`
has fifty-three, and writes a line for each to `runs/kills.jsonl`. A process that has loaded everything forks those that
are killed, so that kills fall on the work and not on imports."""
import json
import multiprocessing
import os
import random
import shutil
import time
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from esam3.data import readers, samples
from esam3.data.batches import load_recipe, open_dataset
from esam3.data.toyfiles import toyworld
from esam3.models.teacher import load_teacher
from esam3.show import survey
from esam3.training.checkpoints import read_state
from esam3.training.feature_cache import FeatureCache, Replays, cache_settings, write_cache
from logs import content

FULL = os.environ.get("ESAM3_FULL") == "1"
full = pytest.mark.skipif(not FULL, reason="takes long: ESAM3_FULL=1 runs it")
LOADED = ["esam3.training.stage1", "esam3.training.stage2", "esam3.training.stage3", "esam3.show.survey"]


@pytest.fixture(scope="module")
def begin():
    "A function that begins a call in a process of its own, in silence."
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *LOADED])
    def start(call: Callable, **given) -> multiprocessing.Process:
        process = context.Process(target=_silently, args=(call, given))
        process.start()
        return process
    ended(start(int))  # the first one waits for the imports
    return start


def _silently(call: Callable, given: dict) -> None:
    void = os.open(os.devnull, os.O_WRONLY)
    os.dup2(void, 1)
    torch.set_num_threads(1)
    call(**given)


def ended(process: multiprocessing.Process) -> float:
    "Seconds that a process takes, which must end well."
    start = time.monotonic()
    process.join(300)
    assert process.exitcode == 0, f"exit status {process.exitcode}"
    return time.monotonic() - start


def whole(folder: Path) -> int:
    """How many files of a folder were read. Fails where one with a name of its own is half-written; a log's last line
    may be."""
    count = 0
    for path in sorted(p for p in folder.rglob("*") if p.is_file()
                       and not any(part.startswith(".") for part in p.relative_to(folder).parts)):
        if path.suffix == ".json": json.loads(path.read_text())
        elif path.suffix == ".jsonl": [json.loads(line) for line in path.read_text().split("\n")[:-1]]
        elif path.suffix == ".pt":
            with zipfile.ZipFile(path) as z: assert z.testzip() is None
            torch.load(path, weights_only=True)
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt") as f: assert len(list(f.keys()))
        elif path.suffix == ".npz":
            with np.load(path) as f: assert all(f[k] is not None for k in f.files)
        else: continue
        count += 1
    return count


def note(what: str, after: float, **more: object) -> None:
    "A line for each kill, where all are made."
    print(f"{what}: killed after {after:.2f} s", more)
    if not FULL: return
    log = Path(__file__).parents[1] / "runs" / "kills.jsonl"
    log.parent.mkdir(exist_ok=True)
    with open(log, "a") as f: f.write(json.dumps({"what": what, "after": round(after, 2), **more}) + "\n")


def kill(process: multiprocessing.Process, after: float, file: Path | None = None) -> bool:
    """Kill a process after some seconds, counted from when it writes a file where one is given; False where it has
    ended before, well."""
    time_of = lambda: file.stat().st_mtime_ns if file.exists() else 0
    before = file and time_of()
    while file and process.exitcode is None and time_of() in (before, 0): time.sleep(0.001)
    process.join(after)
    if process.exitcode is None:
        process.kill(); process.join()
        return True
    assert process.exitcode == 0, f"exit status {process.exitcode}"
    return False


# ---- the three stages

FEW = {"eval_images": 1, "eval_instances": 1}
STAGES = {1: {"steps": 6, "options": {"ema": 0.9}, **FEW}, 2: {"steps": 5, "eval_clips": 1, "eval_frames": 2,
                                                               "options": {"warmup_steps": 3}},
          3: {"steps": 4, "batch_size": 4, "options": {"warmup_steps": 2}, "brief": True, **FEW}}


def run(stage: int, **given) -> None:
    "A stage on a handful of samples, with a checkpoint at every step."
    module = __import__(f"esam3.training.stage{stage}", fromlist=["run"])
    getattr(module, f"run_stage{stage}")(variant="es-ev-s", recipe="tiny", every=1, **STAGES[stage], **given)


def reached(folder: Path) -> str:
    "How far a run has come."
    if (folder / "student").exists(): return "evaluation"
    for name, part in ((folder, "step"), (folder / "warmup", "warmup")):
        if (state := read_state(name, main=False)): return f"{part} {state['step']}"
    return "begun" if folder.exists() else "nothing"


@pytest.fixture(scope="module")
def perceiver(tmp_path_factory) -> Path:
    "A student with a Perceiver, untrained."
    from esam3.training.stage2 import give_memory
    from esam3.models.student import build_student
    from esam3.schedules import Stage2Schedule
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("perceiver") / "student"
    give_memory(build_student("es-ev-s", load_teacher("toy")), "perceiver",
                Stage2Schedule(global_latents=4, local_latents=4)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("stage, kills", [(1, 10 if FULL else 2), pytest.param(2, 10, marks=full),
                                          pytest.param(3, 10, marks=full)])
def test_a_stage_killed_anywhere(stage, kills, begin, tmp_path, request):
    """Again and again, at a random moment of a whole run or of the first few checkpoints in turn; one run takes as many
    kills as it gets before it ends."""
    student = {} if stage == 1 else {"student": str(request.getfixturevalue(
        {2: "stage1_student", 3: "perceiver"}[stage]))}
    place = lambda name: tmp_path / name / "tiny" / "es-ev-s" / f"stage{stage}"
    begin_run = lambda name: begin(run, stage=stage, runs=str(tmp_path / name), **student)
    length = ended(begin_run("whole"))
    expected, chance, done, number = told(place("whole")), random.Random(stage), 0, 0
    while done < kills:
        number += 1
        folder, over = place(f"cut {number}"), False
        while not over and done < kills:
            after, file = (chance.uniform(0.0, 0.1) * length,
                           folder / "state" / "last.pt") if done % 2 else (chance.uniform(0.02, 1.0) * length, None)
            over = not kill(begin_run(f"cut {number}"), after, file)
            whole(folder)
            if not over: done += 1; note(f"stage {stage}", after, run=number, reached=reached(folder))
        if not over: ended(begin_run(f"cut {number}"))
        assert told(folder) == expected, f"run {number}"
        assert not list((folder / "state").glob(".*")) and not list(folder.glob(
            ".*.jsonl.*")), "nothing half-written stays"


def told(folder: Path) -> dict[str, object]:
    "What a run leaves behind, but for times."
    report = {k: v for k, v in json.loads((folder / "report.json").read_text()).items() if k != "timing"}
    files = [p for p in ("metrics.jsonl", "warmup/metrics.jsonl", "student/model.safetensors", "student/config.json")
             if (folder / p).exists()]
    return {"report": report, "state": {k: v for k, v in read_state(folder).items() if k in ("step", "more")},
            **{p: content(folder / p) for p in files}}


# ---- the feature cache

def write_features(folder: str, replays: int) -> None:
    "Many small files of features of the tiny toy world."
    images = Replays(open_dataset(load_recipe("tiny"), "train", "images"), 0, replays, load_recipe("tiny")["augment"])
    write_cache(folder, load_teacher("toy"), images, "int8", batch=2, records=16)


def test_a_feature_cache_killed_anywhere(begin, tmp_path):
    """After each kill a record says that it is complete, or it is not read; in the end all bytes are those of a cache
    that was written at once."""
    replays, kills = (12, 8) if FULL else (4, 2)
    length = ended(begin(write_features, folder=str(tmp_path / "whole"), replays=replays))
    images = Replays(open_dataset(load_recipe("tiny"), "train", "images"), 0, replays, load_recipe("tiny")["augment"])
    settings = cache_settings(load_teacher("toy"), images, "int8", 16) | {"precision": "no"}
    chance, done, number = random.Random(4), 0, 0
    while done < kills:
        number += 1
        folder, over = tmp_path / f"cut {number}", False
        while not over and done < kills:
            after, file = (chance.uniform(0.0, 0.6) * length,
                           folder / "000000.trunk") if done % 2 == 0 else (chance.uniform(0.1, 0.9) * length, None)
            over = not kill(begin(write_features, folder=str(folder), replays=replays), after, file)
            kept = FeatureCache(folder, settings)
            there = [i for i in range(len(images)) if kept.holds(i)]
            for i in there: kept.read([i])  # checks the checksum
            if not over:
                done += 1; note("feature cache", after, run=number, reached=f"{len(there)} of {len(images)} records")
        if not over: ended(begin(write_features, folder=str(folder), replays=replays))
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == {p.name: p.read_bytes()
            for p in (tmp_path / "whole").iterdir()}


# ---- the indexes

def tar(data: Path) -> dict: return {k: v.tolist() for k, v in readers.tar_index(data / "images.tar").items()}
def videos(data: Path) -> list:
    return [json.loads(json.dumps(asdict(samples.video_index(p)))) for p in sorted((data / "clip").glob("*.mp4"))]
def surveyed(data: Path) -> str:
    return str(survey.survey({**load_recipe("tiny"), "root": str(data), "splits": {"train": {"images": load_recipe(
        "tiny")["splits"]["train"]["images"]}}}))


INDEXES = {"tars": tar, "videos": videos, "surveys": surveyed}


def index_for_ever(kind: str, data: str) -> None:
    "Make an index, forget it, make it again. A survey is kept after each sample."
    survey.EVERY = 1
    while True:
        INDEXES[kind](Path(data))
        for p in (samples.cache_dir() / kind).iterdir(): shutil.rmtree(p) if p.is_dir() else p.unlink()


@pytest.mark.parametrize("kind", INDEXES)
def test_an_index_killed_anywhere(kind, begin, tmp_path, monkeypatch):
    "What is kept is whole; what an index says afterwards is what it says where nothing was killed."
    data, kills, chance = toyworld("tiny"), 5 if FULL else 1, random.Random(kind)
    monkeypatch.setenv("ESAM3_CACHE", str(tmp_path / "whole"))
    monkeypatch.setenv("TQDM_DISABLE", "1")
    expected = INDEXES[kind](data)
    for k in range(kills):
        monkeypatch.setenv("ESAM3_CACHE", str(tmp_path / str(k)))
        after = chance.uniform(0.5, 1.5)
        assert kill(begin(partial(_with_cache, str(tmp_path / str(k))), kind=kind, data=str(data)), after)
        place = tmp_path / str(k) / kind
        count = whole(place)
        note(f"index: {kind}", after, reached=f"{count} whole, {len(list(place.glob('.*')))} half-written files")
        assert INDEXES[kind](data) == expected


def _with_cache(cache: str, **given) -> None:
    "The fork server has the environment of its own beginning."
    os.environ |= {"ESAM3_CACHE": cache, "TQDM_DISABLE": "1"}
    index_for_ever(**given)
