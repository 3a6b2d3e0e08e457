"""The run notebooks under papermill, from another folder: wrong parameters are refused at once, right ones give a
report."""
import json
from concurrent.futures import ThreadPoolExecutor

import pytest

GIVEN = {  # case → (notebook, parameters, environment, words that the message must hold; none: it runs)
    "right words": ("20_stage2.ipynb", {"variant": "es-ev-s", "recipe": "tiny"}, {}, []),
    "misspelt name": ("20_stage2.ipynb", {"varient": "es-tv-s"}, {},
                      ["unknown parameter 'varient'", "did you mean 'variant'?"]),
    "unknown variant": ("10_stage1.ipynb", {"variant": "es-xx-s"}, {}, ["unknown variant 'es-xx-s'", "es-tv-s"]),
    "wrong type": ("20_stage2.ipynb", {"steps": "many"}, {},
                   ["parameter 'steps' must be int (for instance 0)", "'many'"]),
    "teacher out of reach": ("20_stage2.ipynb", {"teacher": "facebook/sam3"}, {"HF_HUB_OFFLINE": "1"},
                             ["cannot load the teacher 'facebook/sam3'", "ask for access", "hf auth login"]),
}
REFUSED = [case for case, (*_, words) in GIVEN.items() if words]


@pytest.fixture(scope="module")
def answers(papermill, tmp_path_factory):
    """Case → what was printed, the exit code, the folder of runs. Two at a time; `TimeoutExpired` when a refusal takes
    more than a minute."""
    def answer(case):
        notebook, parameters, environment, words = GIVEN[case]
        runs = tmp_path_factory.mktemp("runs")
        process = papermill(notebook, {**parameters, "runs": runs}, OMP_NUM_THREADS="1", HF_HOME=str(runs / "hub"),
                            **environment)
        try: return process.communicate(timeout=60 if words else 300)[0], process.returncode, runs
        finally: process.kill()
    with ThreadPoolExecutor(2) as pool: return dict(zip(GIVEN, pool.map(answer, GIVEN)))


@pytest.mark.parametrize("case", REFUSED)
def test_refused_at_once(case, answers):
    printed, code, runs = answers[case]
    assert code != 0, printed
    for words in GIVEN[case][-1]: assert words in printed, printed[-2000:]
    assert not list(runs.rglob("settings.json")), "nothing was begun"


def test_the_main_command(answers):
    "On a handful of samples; stage 1 is missing and is run first."
    printed, code, runs = answers["right words"]
    assert code == 0, printed[-3000:]
    folder = runs / "tiny" / "es-ev-s" / "stage2"
    report = json.loads((folder / "report.json").read_text())
    assert report["stage"] == 2 and report["variant"] == "es-ev-s" and {"copy", "first_box",
        "pointers_only"} <= set(report["controls"])
    assert set(report["student"]) == set(report["teacher"]) == set(report["before"]) == {"J", "F", "J&F", "absent_acc"}
    assert {p.name for p in folder.iterdir()} >= {"student", "state", "metrics.jsonl", "report.json", "clip.png",
                                                  "scores.png"}
    assert (folder.parent / "stage1" / "report.json").exists()
