"""The sbatch files, run as the shell scripts they are, with a stand-in for Slurm: asked to stop by a signal, a run
writes a checkpoint, its job is queued again, and it ends with the weights of a run that was left alone.
`ESAM3_FULL=1` has two ranks too."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from esam3.core import Part, declared_in
from esam3.schedules import Schedule
from esam3.training.cluster import Stopped
from esam3.training.loop import Made, fit, in_ranks
from logs import chance, content

STEPS = 6
full = pytest.mark.skipif(os.environ.get("ESAM3_FULL") != "1", reason="takes long: ESAM3_FULL=1 runs it")
SRUN = '#!/usr/bin/env bash\nwhile [[ $1 == --* ]]; do shift; done\nexport SLURM_NODEID=0\nexec "$@"\n'
SCONTROL = '#!/usr/bin/env bash\nif [ "$1" = show ]; then echo localhost; else echo "$@" >> "$ASKED"; fi\n'


@pytest.fixture
def cluster(root: Path, tmp_path: Path):
    """A function that starts an sbatch file as Slurm would, in a folder that shows the checkout: (file, words, number
    of ranks) → process."""
    for name in ("nbs", "slurm"): (tmp_path / name).symlink_to(root / name)
    programs, started = tmp_path / "bin", []
    programs.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "activate": ""}.items():
        (programs / name).write_text(text); (programs / name).chmod(0o755)
    path = os.pathsep.join([str(programs), os.path.dirname(sys.executable), os.environ["PATH"]])
    told = {**os.environ, "PATH": path, "PYTHONPATH": str(root), "ESAM3_VENV": str(tmp_path),
            "ASKED": str(tmp_path / "asked"), "OMP_NUM_THREADS": "1",
            "SLURM_JOB_ID": "77", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "localhost"}
    def start(file: str, *words: object, ranks: int = 1, **more: str) -> subprocess.Popen:
        log = open(tmp_path / f"log-{len(started)}.txt", "w+")
        started.append((subprocess.Popen(["bash", f"slurm/{file}", *map(
            str, words)], cwd=tmp_path, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                                         env=told | {"SLURM_GPUS_ON_NODE": str(ranks)} | more), log))
        return started[-1][0]
    yield start
    for process, log in started:
        if process.poll() is None: os.killpg(process.pid, signal.SIGKILL); process.wait()
        log.close()


def printed(place: Path) -> str: return "\n".join(p.read_text()[-9000:] for p in sorted(place.glob("log-*.txt")))


def wait_for(path: Path, process: subprocess.Popen, place: Path) -> None:
    until = time.monotonic() + 200
    while not path.exists():
        assert process.poll() is None and time.monotonic() < until, printed(place)
        time.sleep(0.02)


PLAIN = "import json, sys; from esam3.training.stage1 import run_stage1; run_stage1(**json.loads(sys.argv[1]))"


@pytest.mark.parametrize("file, ranks, as_job", [
    ("stage.sbatch", 1, False), *(pytest.param(f, k, True, marks=full) for f in ("stage.sbatch", "nodes.sbatch")
                                  for k in (1, 2))])
def test_signalled_job_is_queued_again_and_goes_on(cluster, tmp_path, file, ranks, as_job):
    """The notebook knows no checkpoint before step 50: the one it goes on from was made for the signal.

    `as_job`: the whole run and the second part are jobs too; without, plain processes, which are quicker."""
    given = {"variant": "es-ev-s", "recipe": "tiny", "steps": STEPS, "eval_images": 1, "eval_instances": 1}
    def job(place: str, number: str = "77") -> subprocess.Popen:
        words = [w for k, v in {**given, "runs": tmp_path / place}.items() for w in ("-p", k, v)]
        return cluster(file, 1, *words, ranks=ranks, SLURM_JOB_ID=number)
    def plain(place: str, _: str = "") -> subprocess.Popen:
        one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen([sys.executable, "-c", PLAIN, json.dumps({**given, "runs": str(tmp_path / place)})],
                                env=one_thread)
    run = job if as_job else plain
    folder = {name: tmp_path / name / "tiny" / "es-ev-s" / "stage1" for name in ("whole", "cut")}
    cut, whole = job("cut"), run("whole", "78")
    wait_for(folder["cut"] / "metrics.jsonl", cut, tmp_path)  # it trains
    cut.send_signal(signal.SIGUSR1)
    assert cut.wait(120) == 1 and (tmp_path / "asked").read_text() == "requeue 77\n", printed(tmp_path)
    assert "Stopped: stopped as asked" in printed(tmp_path) and "queued again" in printed(tmp_path)
    done = torch.load(folder["cut"] / "state" / "last.pt", weights_only=True)["step"]
    assert 0 < done < STEPS and not (folder["cut"] / "student").exists() and not list((tmp_path
        / "runs").glob(".stop-*"))

    again = run("cut")
    assert again.wait(300) == 0 and whole.wait(300) == 0, printed(tmp_path)
    assert (tmp_path / "asked").read_text() == "requeue 77\n", "once"
    for name in ("metrics.jsonl", "student/model.safetensors"):
        assert content(folder["cut"] / name) == content(folder["whole"] / name), name
    reports = [json.loads((f / "report.json").read_text()) for f in folder.values()]
    assert [r.pop("timing")["steps"] for r in reports] == [STEPS, STEPS - done] and reports[0] == reports[1]


def test_a_failure_is_not_queued_again(cluster, tmp_path):
    "A command that fails by itself, one that is cancelled, one that ends well in time, and one that does not listen."
    again = lambda command, **more: cluster("again.sbatch", command, **more)
    (tmp_path / "slurm").unlink(); shutil.copytree(Path(__file__).parents[1] / "slurm", tmp_path / "slurm")
    (tmp_path / "slurm" / "again.sbatch").write_text('source slurm/again.sh\nagain srun bash -c "$1"\n')
    def status(command: str, sign: signal.Signals | None = None, **more: str) -> int:
        process = again(f": > begun; {command}", **more)
        wait_for(tmp_path / "begun", process, tmp_path)
        (tmp_path / "begun").unlink()
        if sign: process.send_signal(sign)
        return process.wait(20)
    listens = 'until [ -e "$ESAM3_STOP" ]; do sleep 0.1; done; exit '
    assert status("exit 3") == 3
    assert status(listens + "1", signal.SIGTERM) == 1
    assert status(listens + "0", signal.SIGUSR1) == 0
    assert not (tmp_path / "asked").exists()
    assert status("sleep 5", signal.SIGUSR1, ESAM3_GRACE="1") > 128
    assert (tmp_path / "asked").read_text() == "requeue 77\n"


def test_cache_array_writes_what_stage_1_reads(cluster, tmp_path, monkeypatch, capsys):
    "Two jobs of an array, two files of records; then nothing is left to write."
    from esam3.training import stage1
    from esam3.data.batches import load_recipe
    from esam3.models.teacher import load_teacher
    monkeypatch.setenv("ESAM3_CACHE", str(tmp_path / "cache"))
    words = [w for k, v in {"recipe": "tiny", "cache": "fp16", "replays": 1, "workers": 0}.items() for w in ("-p", k,
        v)]
    part = cluster("cache.sbatch", *words, SLURM_ARRAY_TASK_ID="0", SLURM_ARRAY_TASK_COUNT="1",
                   ESAM3_CACHE=str(tmp_path / "cache"))
    assert part.wait(120) == 0, printed(tmp_path)
    teacher = load_teacher("toy")
    images, kept, _ = stage1.keep_features(load_recipe("tiny"), teacher, "fp16", 1)
    assert "features to write" not in capsys.readouterr().out and len(images) and all(map(kept.holds, range(len(
        images))))


FILES = sorted((Path(__file__).parents[1] / "slurm").glob("*.sbatch"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_sbatch_files_say_what_exists(path, root):
    """Their shell is right; the notebooks, parameters and files that they and their comments name are there; two lines
    are to be edited."""
    text, lines = path.read_text(), path.read_text().splitlines()
    assert subprocess.run(["bash", "-n", path], capture_output=True).returncode == 0
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    options = " ".join(line.removeprefix("#SBATCH ") for line in lines[:first] if line.startswith("#SBATCH "))
    assert "#SBATCH" not in "".join(lines[first:]) and lines[first].startswith("source "), ("Slurm reads no options "
        "after the first command")
    assert all(word in options for word in ("--requeue", "--open-mode=append", "--account=ACCOUNT"))
    assert re.search(r"--signal=B:USR1@\d+", options)
    for name in re.findall(r"slurm/[\w.]+", text): assert (root / name).exists(), name
    for stage in "123": assert (root / "nbs" / f"{stage}0_stage{stage}.ipynb").exists()
    cells = json.loads((root / "nbs" / "10_stage1.ipynb").read_text())["cells"]
    declared = declared_in("".join(next(c for c in cells if "parameters" in c["metadata"].get("tags", []))["source"]))
    named = re.findall(r"-p (\w+) ", text)
    assert named and set(named) <= declared.keys()
    if path.name == "cache.sbatch":
        sys.path.insert(0, str(root / "slurm"))
        from cache import DECLARED
        assert DECLARED.keys() <= declared.keys()


class Line(nn.Module):
    def __init__(self): super().__init__(); self.w = nn.Parameter(torch.ones(3))
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]: return {"square": (x @ self.w).square().mean()}


def stopped_at(folder: str) -> str:
    "Rank 1 alone puts the file there, at step 3; what `fit` says, and the weights."
    task = Line()
    def batch(part: Part) -> torch.Tensor:
        if part[:2] == (3, 1): Path(os.environ["ESAM3_STOP"]).touch()
        return chance(part, 4, 3)
    os.environ["ESAM3_STOP"] = f"{folder}/stop"
    try:
        fit(task, Made(batch), [{"params": list(task.parameters()), "lr": 0.1}], Schedule(9, lr=0.1), folder, every=100)
    except Stopped as e: return str(e)
    return "not stopped"


def test_all_ranks_stop_after_one_step(tmp_path):
    said = in_ranks(stopped_at, 2, folder=str(tmp_path))
    step = torch.load(tmp_path / "state" / "last.pt", weights_only=True)["step"]
    assert step in (4,
                    5) and said.startswith(f"stopped as asked: {step} of 9 steps"), ("the file may come just after the "
                        "first rank has looked")
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == step
