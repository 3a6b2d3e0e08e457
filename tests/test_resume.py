"A run that is killed continues: its report, metrics and weights are those of a run that was left alone."
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

STEPS = 6
RUN = "import sys, json; from esam3 import stage{0}; stage{0}.run_stage{0}(**json.loads(sys.argv[1]))"


def start(stage: int, **parameters) -> subprocess.Popen:
    "A process that runs a stage on a handful of samples, with a checkpoint every two steps."
    given = json.dumps({"recipe": "tiny", "steps": STEPS, "every": 2, **parameters})
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # two processes run at a time
    return subprocess.Popen([sys.executable, "-c", RUN.format(stage), given], env=one_thread, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


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


@pytest.mark.parametrize("stage", [1, 2])
def test_killed_run_continues(stage, tmp_path, stage1_student):
    more = {"student": str(stage1_student)} if stage == 2 else {}
    folder = {name: tmp_path / name / "tiny" / "es-tv-s" / f"stage{stage}" for name in ("whole", "cut")}
    whole = start(stage, runs=str(tmp_path / "whole"), **more)
    kill_in_training(start(stage, runs=str(tmp_path / "cut"), **more), folder["cut"] / "state" / "last.pt")
    assert not (folder["cut"] / "report.json").exists() and not (folder["cut"] / "student").exists()
    with open(folder["cut"] / "metrics.jsonl", "a") as f: f.write('{"step": 3, "lo')  # half a line, as a kill can leave it
    finish(start(stage, runs=str(tmp_path / "cut"), **more))
    finish(whole)

    reports = {name: json.loads((path / "report.json").read_text()) for name, path in folder.items()}
    timing = {name: report.pop("timing") for name, report in reports.items()}
    assert reports["cut"] == reports["whole"]
    assert 0 < timing["cut"]["steps"] < timing["whole"]["steps"] == STEPS, "the second call went on from a checkpoint"
    for name in ("metrics.jsonl", "student/model.safetensors"):
        assert (folder["cut"] / name).read_bytes() == (folder["whole"] / name).read_bytes(), name
    assert len((folder["whole"] / "metrics.jsonl").read_text().splitlines()) == STEPS
