"""A rank that raises, freezes or is killed ends the job within seconds; without `together` the others wait.

A plain run has one rank that raises, one that freezes and a good end; `ESAM3_FULL=1` has all cases."""
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

LIMIT = 4.0  # seconds of silence after which a rank is dead
full = pytest.mark.skipif(os.environ.get("ESAM3_FULL") != "1", reason="takes long: ESAM3_FULL=1 runs it")
JOB = '''
import contextlib, os, time
from pathlib import Path
import torch.distributed as dist
from esam3.training.cluster import Stopped, together

def run(place: Path, does: str) -> None:
    rank = dist.get_rank()
    (place / f"{{rank}}.tmp").write_text(str(os.getpid())); (place / f"{{rank}}.tmp").rename(place / f"{{rank}}.pid")
    if does == "stop": time.sleep(2 * rank); raise Stopped(f"{{rank}} as asked")
    elif does == "end": time.sleep({limit} * 1.5 * rank)  # rank 0 has finished long before
    elif rank == 1 and does != "sleep": raise ValueError("bad.jpg")
    elif does == "barrier": dist.barrier(dist.new_group([0, 1], use_local_synchronization=True))
    else: time.sleep(600)

guarded = {guarded}
if not guarded: dist.init_process_group("gloo")
try:
    with together(limit={limit}) if guarded else contextlib.nullcontext(): run(Path({place!r}), {does!r})
except ValueError: time.sleep(600)  # the process stays: a kernel does, and cleaning up can hang
'''


class Job:
    "Two ranks under torchrun, and what they print."

    def __init__(self, place: Path, does: str, guarded: bool = True, notebook: bool = False):
        self.place, source = place, JOB.format(limit=LIMIT, guarded=guarded, place=str(place), does=does)
        (place / "job.py").write_text(source)
        what = self.papermill(source) if notebook else [str(place / "job.py")]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *what]
        self.log = open(place / "log.txt", "w")
        self.process = subprocess.Popen(command, stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True,
                                        env={**os.environ, "OMP_NUM_THREADS": "1"})

    def papermill(self, source: str) -> list[str]:
        "The job as a notebook, and the command for it."
        python = {"name": "python3", "display_name": "Python 3", "language": "python"}
        book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)], metadata={"kernelspec": python})
        nbformat.write(book, self.place / "job.ipynb")
        program = shutil.which("papermill", path=os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"])
        books = [str(self.place / name) for name in ("job.ipynb", "out_${local_rank}.ipynb")]
        return ["--no-python", program, "--no-progress-bar", *books]

    def pid(self, rank: int) -> int:
        "A rank's process, once it is in the block."
        until, file = time.monotonic() + 120, self.place / f"{rank}.pid"
        while not file.exists():
            assert self.process.poll() is None and time.monotonic() < until, self.printed()
            time.sleep(0.05)
        return int(file.read_text())

    def ended(self, seconds: float) -> int | None:
        "Exit status, or None if it goes on after so many seconds."
        try: return self.process.wait(seconds)
        except subprocess.TimeoutExpired: return None

    def printed(self) -> str: return (self.place / "log.txt").read_text()

    def close(self) -> None:
        "End what is left: torchrun, and the ranks, which have sessions of their own."
        for pid in [self.process.pid, *(int(f.read_text()) for f in self.place.glob("*.pid"))]:
            try: os.kill(pid, signal.SIGKILL)
            except ProcessLookupError: pass
        self.process.wait(); self.log.close()


@pytest.fixture
def job(tmp_path: Path):
    "Starts a job that has ended when the test has."
    jobs: list[Job] = []
    def start(*args, **options) -> Job:
        jobs.append(Job(tmp_path, *args, **options))
        jobs[-1].pid(0); jobs[-1].pid(1)
        return jobs[-1]
    yield start
    for j in jobs: j.close()


@pytest.mark.parametrize("does", ["raise", pytest.param("barrier", marks=full)])
def test_error_of_one_rank_ends_all(job, does):
    "Rank 0 sleeps, or waits in a collective."
    run = job(does)
    assert run.ended(LIMIT + 10) not in (0, None), run.printed()
    assert re.search(r"^rank 1: ValueError: bad.jpg\n    .*File .*job.py", run.printed(), re.S | re.M), run.printed()


@full
def test_without_it_an_error_is_waited_for(job):
    assert job("barrier", guarded=False).ended(2 * LIMIT) is None


def alive(pid: int) -> bool:
    "Whether a process is there, and not only waited for."
    try: return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError): return False


def freeze(run: Job, rank: int) -> None:
    time.sleep(2)  # it has beaten
    os.kill(run.pid(rank), signal.SIGSTOP)


@pytest.mark.parametrize("rank, notebook", [
    (1, False), pytest.param(0, False, marks=full), pytest.param(1, True, marks=full)])
def test_frozen_rank_ends_all(job, rank, notebook):
    "In a notebook the kernel is frozen, and papermill waits for it."
    run = job("sleep", notebook=notebook)
    freeze(run, rank)
    assert run.ended(LIMIT + 10) not in (0, None), run.printed()
    if notebook: assert "Kernel died" in run.printed()
    assert f"rank {rank}: no sign of life for 4 s" in run.printed()
    until = time.monotonic() + 5
    while alive(run.pid(rank)) and time.monotonic() < until: time.sleep(0.1)
    assert not alive(run.pid(rank)), "it was woken, and has ended too"


@full
def test_without_it_a_frozen_rank_is_waited_for(job):
    run = job("sleep", guarded=False)
    freeze(run, 1)
    assert run.ended(2 * LIMIT) is None


@full
@pytest.mark.parametrize("rank", [0, 1])
def test_killed_rank_ends_all(job, rank):
    run = job("sleep")
    os.kill(run.pid(rank), signal.SIGKILL)
    assert run.ended(LIMIT + 10) not in (0, None), run.printed()


def test_good_end_is_silent(job):
    "Also when one rank has finished long before the other."
    run = job("end")
    assert run.ended(60) == 0 and run.printed() == "", run.printed()


def test_ranks_that_are_asked_to_stop_all_say_so(job):
    "None ends another: a notebook of each would keep what it says. The job fails, so that its script knows."
    run = job("stop")
    assert run.ended(60) not in (0, None), run.printed()
    said = run.printed()
    assert "Stopped: 0 as asked" in said and "Stopped: 1 as asked" in said and not re.search(r"^rank \d: ", said, re.M), said
