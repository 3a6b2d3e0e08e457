"Two processes train one student, each on its share of the data; the first one writes. Started by torchrun, or by the notebook itself."
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from esam3.models.student import EfficientSam3
from esam3.training.loop import in_ranks
from esam3.training.stage1 import run_stage1
from logs import rows


@pytest.fixture(scope="module")
def by_torchrun(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    "The run's folder of the README's command with two ranks, on a handful of samples."
    place = tmp_path_factory.mktemp("torchrun")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python",
               shutil.which("papermill", path=os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]), "--no-progress-bar",
               str(root / "nbs" / "10_stage1.ipynb"), str(place / "out_${local_rank}.ipynb"), "-p", "variant", "es-ev-s", "-p", "recipe", "tiny", "-p", "runs", str(place)]
    threads = str(max(1, torch.get_num_threads() // 2))  # as `in_ranks` gives them
    done = subprocess.run(command, cwd=place, env={**os.environ, "OMP_NUM_THREADS": threads}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300, start_new_session=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert {p.name for p in place.glob("out_*.ipynb")} == {"out_0.ipynb", "out_1.ipynb"}
    return place / "tiny" / "es-ev-s" / "stage1"


def report(folder: Path) -> dict:
    "A report without what may differ between two runs."
    return {k: v for k, v in json.loads((folder / "report.json").read_text()).items() if k != "timing"}


def test_torchrun_with_papermill(by_torchrun: Path):
    steps = report(by_torchrun)["settings"]["schedule"]["steps"]
    assert report(by_torchrun)["settings"]["ranks"] == 2
    assert [json.loads(line)["step"] for line in (by_torchrun / "metrics.jsonl").read_text().splitlines()] == list(range(steps)), "one rank logs"
    assert EfficientSam3.from_pretrained(by_torchrun / "student").config.variant == "es-ev-s"


def test_ranks_of_a_notebook_do_what_torchrun_does(by_torchrun: Path, tmp_path: Path):
    folder = in_ranks(run_stage1, 2, variant="es-ev-s", recipe="tiny", runs=str(tmp_path))
    assert report(folder) == report(by_torchrun)
    assert rows(folder / "metrics.jsonl") == rows(by_torchrun / "metrics.jsonl")
    assert (folder / "student" / "model.safetensors").read_bytes() == (by_torchrun / "student" / "model.safetensors").read_bytes()


def test_another_number_of_ranks_is_another_run(by_torchrun: Path):
    with pytest.raises(ValueError, match="ranks: 2 there, 1 now"): run_stage1("es-ev-s", "tiny", runs=str(by_torchrun.parents[2]))
