"The run notebooks under papermill: wrong parameters are refused at once, right ones give a report."
import json
from concurrent.futures import ThreadPoolExecutor

import pytest

REFUSED = {  # case → (notebook, parameters, environment, words that the message must hold)
    "misspelt name": ("20_stage2.ipynb", {"varient": "es-tv-s"}, {}, ["unknown parameter 'varient'", "did you mean 'variant'?"]),
    "unknown variant": ("10_stage1.ipynb", {"variant": "es-xx-s"}, {}, ["unknown variant 'es-xx-s'", "es-tv-s"]),
    "wrong type": ("20_stage2.ipynb", {"steps": "many"}, {}, ["parameter 'steps' must be int", "'many'"]),
    "teacher out of reach": ("20_stage2.ipynb", {"teacher": "facebook/sam3"}, {"HF_HUB_OFFLINE": "1"}, ["cannot load the teacher 'facebook/sam3'", "ask for access", "hf auth login"]),
}


@pytest.fixture(scope="module")
def answers(papermill, tmp_path_factory):
    "Exit code and output of each refused call; two run at a time. `TimeoutExpired` after a minute."
    def answer(case):
        notebook, parameters, environment, _ = REFUSED[case]
        process = papermill(notebook, {**parameters, "runs": tmp_path_factory.mktemp("runs")}, HF_HOME=str(tmp_path_factory.mktemp("hub")), **environment)
        try: return process.communicate(timeout=60)[0], process.returncode
        finally: process.kill()
    with ThreadPoolExecutor(2) as pool: return dict(zip(REFUSED, pool.map(answer, REFUSED)))


@pytest.mark.parametrize("case", REFUSED)
def test_refused_at_once(case, answers):
    printed, code = answers[case]
    assert code != 0, printed
    for words in REFUSED[case][3]: assert words in printed, printed[-2000:]


def test_a_run_from_another_folder(papermill, tmp_path):
    "The main command on a handful of samples: stage 1 is missing and is run first."
    process = papermill("20_stage2.ipynb", {"variant": "es-ev-s", "recipe": "tiny", "runs": tmp_path})
    printed = process.communicate(timeout=300)[0]
    assert process.returncode == 0, printed[-3000:]
    folder = tmp_path / "tiny" / "es-ev-s" / "stage2"
    report = json.loads((folder / "report.json").read_text())
    assert report["stage"] == 2 and report["variant"] == "es-ev-s" and {"copy", "first_box", "pointers_only"} <= set(report["controls"])
    assert set(report["student"]) == set(report["teacher"]) == set(report["before"]) == {"J", "F", "J&F", "absent_acc"}
    assert {p.name for p in folder.iterdir()} >= {"student", "state", "metrics.jsonl", "report.json", "clip.png", "scores.png"}
    assert (tmp_path / "tiny" / "es-ev-s" / "stage1" / "report.json").exists()
