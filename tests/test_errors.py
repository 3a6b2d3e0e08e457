"What can be wrong on disk ends in one or two lines that name it."
import json

import pytest
import torch

from esam3.training.stage1 import run_stage1
from esam3.training.stage2 import run_stage2

RUN = {"variant": "es-ev-s", "recipe": "tiny", "steps": 3}


@pytest.fixture
def damaged(tmp_path):
    "The folder of a stage-1 run whose checkpoint is cut in half, after the error that says so."
    state = tmp_path / "tiny" / "es-ev-s" / "stage1" / "state" / "last.pt"
    state.parent.mkdir(parents=True)
    torch.save({"step": 2, "task": {"w": torch.zeros(1000)}}, state)
    state.write_bytes(state.read_bytes()[:2000])
    with pytest.raises(ValueError) as e: run_stage1(**RUN, runs=str(tmp_path))
    return tmp_path, state, str(e.value)


def test_cut_checkpoint_is_named(damaged):
    _, state, message = damaged
    assert str(state) in message and "damaged" in message and len(message.splitlines()) <= 2


def test_other_settings_are_named(damaged):
    runs, _, _ = damaged
    with pytest.raises(ValueError) as e: run_stage1(**RUN | {"steps": 5}, runs=str(runs))
    message = str(e.value)
    assert "steps" in message and "3 there, 5 now" in message and "resume=False" in message
    assert len(message) < 500 and "sampling" not in message, "only what differs is named"


def test_starting_anew_takes_the_damaged_run_away(damaged):
    runs, state, _ = damaged
    folder = run_stage1(**RUN, runs=str(runs), resume=False)
    assert json.loads((folder / "report.json").read_text())["timing"]["steps"] == 3 and torch.load(state)["step"] == 3


def test_missing_student_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.*stage 1"): run_stage2(**RUN, student=str(tmp_path / "nowhere"), runs=str(tmp_path))


def test_real_data_without_stage_1(tmp_path):
    "Only the toy world's missing stage 1 is run first; for real data the command is printed."
    with pytest.raises(FileNotFoundError, match="papermill nbs/10_stage1.ipynb .*-p variant es-rv-m -p recipe sa1b"):
        run_stage2("es-rv-m", "sav", teacher="toy", steps=3, runs=str(tmp_path))


def test_weights_of_another_model(tmp_path, stage1_student):
    "A student's folder whose configuration names another variant does not load half."
    from esam3.models.student import EfficientSam3
    folder = tmp_path / "student"
    folder.mkdir()
    for f in stage1_student.iterdir(): (folder / f.name).symlink_to(f)
    (folder / "config.json").unlink()
    config = json.loads((stage1_student / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"variant": "es-tv-s"}))
    with pytest.raises((ValueError, RuntimeError), match="es-tv-s|mismatch"): EfficientSam3.from_pretrained(folder)
