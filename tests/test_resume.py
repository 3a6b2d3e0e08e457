"""A run that is killed continues: its report, metrics and weights are those of a run that was left alone. What its
checkpoints stand: damage, a full disk, a hostile file, a second process."""
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from esam3.schedules import Schedule
from esam3.training.checkpoints import read_state, save_state
from esam3.training.cluster import hold
from esam3.training import checkpoints, runs
from esam3.training.loop import Made, fit
from esam3.training.stage1 import run_stage1
from logs import chance, content, rows

STEPS = 8
RUN = ("import sys, json; from esam3.training import in_ranks, stage{0}; in_ranks(stage{0}.run_stage{0}, {1}, "
       "**json.loads(sys.argv[1]))")


def start(stage: int, ranks: int, **parameters) -> subprocess.Popen:
    "A process that runs a stage on a handful of samples, with a checkpoint every two steps."
    given = json.dumps({"variant": "es-ev-s", "recipe": "tiny", "steps": STEPS, "every": 2, **parameters})
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # two processes run at a time
    return subprocess.Popen([sys.executable, "-c", RUN.format(stage, ranks), given], env=one_thread,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen) -> str:
    "Wait for a process that must end well; what it printed."
    printed = process.communicate(timeout=300)[0]
    assert process.returncode == 0, printed[-3000:]
    return printed


def kill_in_training(process: subprocess.Popen, checkpoint: Path) -> None:
    "`kill -9` a run as soon as it has written a checkpoint."
    until = time.monotonic() + 240
    while not checkpoint.exists():
        assert process.poll() is None and time.monotonic() < until, process.communicate()[0][-3000:]
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.mark.parametrize("stage, ranks, place", [(1, 1, ""), (1, 2, ""), (2, 1, ""), (2, 1, "warmup")])
def test_killed_run_continues(stage, ranks, place, tmp_path, stage1_student):
    """`place`: the folder whose checkpoint is waited for; stage 2's single-frame warm-up has one of its own. Both
    stages average their weights, stage 2 by its recipe."""
    more = {"student": str(stage1_student)} if stage == 2 else {"options": {"ema": 0.9}}
    folder = {name: tmp_path / name / "tiny" / "es-ev-s" / f"stage{stage}" for name in ("whole", "cut")}
    whole = start(stage, ranks, runs=str(tmp_path / "whole"), **more)
    kill_in_training(start(stage, ranks, runs=str(tmp_path / "cut"), **more),
                     folder["cut"] / place / "state" / "last.pt")
    assert not (folder["cut"] / "report.json").exists() and not (folder["cut"] / "student").exists()
    # half a line, as a kill can leave it
    with open(folder["cut"] / "metrics.jsonl", "a") as f: f.write('{"step": 3, "lo')
    finish(start(stage, ranks, runs=str(tmp_path / "cut"), **more))
    finish(whole)

    reports = {name: json.loads((path / "report.json").read_text()) for name, path in folder.items()}
    timing = {name: report.pop("timing") for name, report in reports.items()}
    assert reports["cut"] == reports["whole"] and reports["whole"]["settings"]["schedule"]["ema"] > 0
    # killed in the single-frame warm-up: all steps after it were still to do
    later = timing["cut"]["steps"] == STEPS if place else 0 < timing["cut"]["steps"] < STEPS
    assert later and timing["whole"]["steps"] == STEPS, "the second call went on from a checkpoint"
    for name in ("metrics.jsonl", "student/model.safetensors", *(["warmup/metrics.jsonl"] if stage == 2 else [])):
        assert content(folder["cut"] / name) == content(folder["whole"] / name), name
    assert len((folder["whole"] / "metrics.jsonl").read_text().splitlines()) == STEPS


class Line(nn.Module):
    def __init__(self, width: int = 3): super().__init__(); self.w = nn.Parameter(torch.ones(width))
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]: return {"square": (x @ self.w).square().mean()}


def trained_line(folder: Path, steps: int = 8, **more) -> torch.Tensor:
    "Weights after some steps of eight, with a checkpoint every two."
    task = Line()
    fit(task, Made(lambda part: chance(part, 4, 3)), [{"params": list(task.parameters()), "lr": 0.1}],
        Schedule(8, lr=0.1, ema=0.5), folder, every=2, stop=steps, **more)
    return task.w.detach()


class Hostile:
    "A pickle that makes a file when it is read."
    def __init__(self, place: Path): self.place = place
    def __reduce__(self): return Path.touch, (self.place,)


def make_hostile(last: Path, form: str) -> None:
    "A pickle, or a checkpoint of torch's, that makes the file `executed` beside it when it is read without care."
    evil = {"step": 1, "task": {}, "optimizer": {}, "more": Hostile(last.with_name("executed"))}
    if form == "torch": torch.save(evil, last)
    else: last.write_bytes(pickle.dumps(evil))
    (torch.load if form == "torch" else lambda f, **_: pickle.loads(f.read_bytes()))(last, weights_only=False)
    assert last.with_name("executed").exists(), "it would do it"
    last.with_name("executed").unlink()


def flip(last: Path) -> None:
    "One bit of one weight is another."
    data, weights = bytearray(last.read_bytes()), torch.load(last, weights_only=True)["task"]["w"]
    data[data.index(weights.numpy().tobytes())] ^= 1
    last.write_bytes(data)


DAMAGE = {"flip": flip, "cut": lambda p: p.write_bytes(p.read_bytes()[:-100]), "empty": lambda p: p.write_bytes(b""),
          "gone": Path.unlink, "nonsense": lambda p: torch.save([1], p),
          "pickle": partial(make_hostile, form="pickle"), "torch": partial(make_hostile, form="torch")}


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_checkpoint_before_takes_over(damage, tmp_path, capsys):
    """One line says so, the log is cut back, nothing in the file is executed, and the weights are those of a run whose
    checkpoint was whole."""
    last = tmp_path / "cut" / "state" / "last.pt"
    trained_line(tmp_path / "cut", 6)
    DAMAGE[damage](last)
    trained_line(tmp_path / "cut", 6)
    assert (last.with_name("damaged.pt").exists(),
            checkpoints._checked(last.with_name("before.pt"))["step"]) == (damage != "gone",
                4), "no damaged one takes its place"
    again, whole = trained_line(tmp_path / "cut"), trained_line(tmp_path / "whole")
    said = [line for line in capsys.readouterr().out.splitlines() if "last.pt" in line]
    assert len(said) == 1 and "going on from the checkpoint before it, step 4" in said[0] and ("missing"
        if damage == "gone" else "damaged") in said[0]
    assert torch.equal(again, whole) and not last.with_name("executed").exists()
    assert rows(tmp_path / "cut" / "metrics.jsonl") == rows(tmp_path / "whole" / "metrics.jsonl")
    assert read_state(tmp_path / "cut")["step"] == 8 and last.with_name("before.pt").exists()


@pytest.mark.parametrize("form", ["pickle", "torch"])
def test_a_hostile_checkpoint_is_refused(form, tmp_path):
    "Where there is no other, the run does not start."
    trained_line(tmp_path, 2)
    make_hostile(tmp_path / "state" / "last.pt", form)
    with pytest.raises(ValueError, match="last.pt is damaged .*remove .*state to start this stage again"):
        trained_line(tmp_path)
    assert not (tmp_path / "state" / "executed").exists()


def test_two_damaged_checkpoints_are_named(tmp_path):
    trained_line(tmp_path, 4)
    for name in ("last.pt", "before.pt"): (tmp_path / "state" / name).write_bytes(b"PK")
    with pytest.raises(ValueError, match="last.pt is damaged .*before.pt is damaged"): trained_line(tmp_path)


@pytest.mark.parametrize("room", [0, 500, 1 << 16])
def test_a_full_disk_leaves_both_checkpoints(room, tmp_path):
    "`room`: bytes that a file may have. The run goes on when there is room again, and half-written files are gone."
    task = Line(1 << 15)
    optimizer = torch.optim.AdamW(task.parameters())
    for step in (1, 2): save_state(tmp_path, task, optimizer, None, step)
    kept = {p.name: p.read_bytes() for p in (tmp_path / "state").iterdir()}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        with pytest.raises(OSError,
                           match="checkpoint of step 3 cannot be written to .*last.pt .File too large.*make room") as e:
            save_state(tmp_path, task, optimizer, None, 3)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert e.value.errno and {p.name: p.read_bytes() for p in (tmp_path / "state").iterdir()} == kept
    save_state(tmp_path, task, optimizer, None, 3)
    assert read_state(tmp_path)["step"] == 3


@pytest.mark.parametrize("renamed", [0, 1])
def test_killed_between_two_names(renamed, tmp_path, monkeypatch):
    """Killed before or after the last checkpoint has become the one before: one is whole, and what was half-written
    goes."""
    trained_line(tmp_path, 4)
    done, rename = [], os.replace
    class Killed(BaseException): pass
    def replace(*names):
        if names[1].parent.name == "state":
            if len(done) == renamed: raise Killed
            done.append(names)
        rename(*names)
    with monkeypatch.context() as m:
        m.setattr(checkpoints.os, "replace", replace)
        m.setattr(shutil, "rmtree", lambda *_, **__: None)  # nobody tidies up after a kill
        with pytest.raises(Killed): trained_line(tmp_path, 6)
    assert list((tmp_path / "state").glob(".last.pt.*"))
    assert torch.equal(trained_line(tmp_path), trained_line(tmp_path / "whole"))
    assert sorted(p.name for p in (tmp_path / "state").iterdir()) == ["before.pt", "last.pt"]


HOLDS = ("import pathlib, sys, time; from esam3.training.cluster import hold; hold(pathlib.Path(sys.argv[1])); "
         "print('held', flush=True); time.sleep(60)")


def test_a_second_process_is_refused(tmp_path, monkeypatch):
    """As long as the first lives, stopped or not, and whether the run is to be begun anew or not; not when it was
    killed."""
    folder = tmp_path / "tiny" / "es-ev-s" / "stage1"
    first = subprocess.Popen([sys.executable, "-c", HOLDS, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout.readline() == "held\n"
        monkeypatch.setattr(runs, "hold", partial(hold, patience=0.2))
        for resume in (True, False):
            with pytest.raises(RuntimeError, match=f"stage1 is in use by process {first.pid} on "):
                run_stage1("es-ev-s", "tiny", runs=str(tmp_path), resume=resume)
        os.kill(first.pid, signal.SIGSTOP)
        with pytest.raises(RuntimeError, match="in use"): hold(folder, patience=0.2)
    finally: first.kill(); first.wait()
    with monkeypatch.context() as m:
        m.setattr(runs, "open_run", lambda *_: exec("raise InterruptedError('opened')"))
        with pytest.raises(InterruptedError): run_stage1("es-ev-s", "tiny", runs=str(tmp_path))
    other = subprocess.run([sys.executable, "-c", HOLDS.replace("time.sleep(60)", ""), str(folder)],
                           capture_output=True, text=True)
    assert other.stdout == "held\n", "a run that has ended, well or badly, lets go of its folder"
