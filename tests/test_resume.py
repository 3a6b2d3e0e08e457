"A run that is killed continues: its report, metrics and weights are those of a run that was left alone."
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

STEPS = 8
RUN = "import sys, json; from esam3 import stage{0}, training; training.in_ranks(stage{0}.run_stage{0}, {1}, **json.loads(sys.argv[1]))"


def start(stage: int, ranks: int, **parameters) -> subprocess.Popen:
    "A process that runs a stage on a handful of samples, with a checkpoint every two steps."
    given = json.dumps({"variant": "es-ev-s", "recipe": "tiny", "steps": STEPS, "every": 2, **parameters})
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # two processes run at a time
    return subprocess.Popen([sys.executable, "-c", RUN.format(stage, ranks), given], env=one_thread, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


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


@pytest.mark.parametrize("stage, ranks, place", [(1, 1, ""), (1, 2, ""), (2, 1, ""), (2, 1, "lesson")])
def test_killed_run_continues(stage, ranks, place, tmp_path, stage1_student):
    "`place`: the folder whose checkpoint is waited for; stage 2's first lesson has one of its own. Both stages average their weights, stage 2 by its recipe."
    more = {"student": str(stage1_student)} if stage == 2 else {"options": {"ema": 0.9}}
    folder = {name: tmp_path / name / "tiny" / "es-ev-s" / f"stage{stage}" for name in ("whole", "cut")}
    whole = start(stage, ranks, runs=str(tmp_path / "whole"), **more)
    kill_in_training(start(stage, ranks, runs=str(tmp_path / "cut"), **more), folder["cut"] / place / "state" / "last.pt")
    assert not (folder["cut"] / "report.json").exists() and not (folder["cut"] / "student").exists()
    with open(folder["cut"] / "metrics.jsonl", "a") as f: f.write('{"step": 3, "lo')  # half a line, as a kill can leave it
    finish(start(stage, ranks, runs=str(tmp_path / "cut"), **more))
    finish(whole)

    reports = {name: json.loads((path / "report.json").read_text()) for name, path in folder.items()}
    timing = {name: report.pop("timing") for name, report in reports.items()}
    assert reports["cut"] == reports["whole"] and reports["whole"]["settings"]["schedule"]["ema"] > 0
    later = timing["cut"]["steps"] == STEPS if place else 0 < timing["cut"]["steps"] < STEPS  # killed in the first lesson: all steps after it were still to do
    assert later and timing["whole"]["steps"] == STEPS, "the second call went on from a checkpoint"
    for name in ("metrics.jsonl", "student/model.safetensors", *(["lesson/metrics.jsonl"] if stage == 2 else [])):
        assert (folder["cut"] / name).read_bytes() == (folder["whole"] / name).read_bytes(), name
    assert len((folder["whole"] / "metrics.jsonl").read_text().splitlines()) == STEPS
