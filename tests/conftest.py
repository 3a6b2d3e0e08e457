"What several tests share: where instances are, and a stage-1 student to start from."
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    "The root of the checkout."
    return ROOT


@pytest.fixture(scope="session")
def real_files() -> Path:
    "Public sample files that do not belong to the project; tests that want them are skipped where they are not there."
    folder = ROOT.parent / "shared" / "data"
    if not folder.exists(): pytest.skip("no ../shared/data beside the checkout: real sample files are not here")
    return folder


@pytest.fixture(scope="session")
def stage1_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A student of stage 1 after three steps on a handful of samples."
    from esam3.training.stage1 import run_stage1
    return run_stage1("es-ev-s", "tiny", runs=str(tmp_path_factory.mktemp("runs"))) / "student"


@pytest.fixture(scope="session")
def papermill(tmp_path_factory: pytest.TempPathFactory):
    "A function that starts papermill on a run notebook, in a folder that is not the checkout: (notebook, parameters, environment) → process."
    def start(notebook: str, parameters: dict[str, object], **environment: str) -> subprocess.Popen:
        place = tmp_path_factory.mktemp("elsewhere")
        given = [word for name, value in parameters.items() for word in ("-p", name, str(value))]
        command = [sys.executable, "-m", "papermill", "--cwd", str(place), "--no-progress-bar", str(ROOT / "nbs" / notebook), str(place / "out.ipynb"), *given]
        return subprocess.Popen(command, cwd=place, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return start
