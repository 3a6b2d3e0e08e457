"A run is watched without being changed, and its panel stays whatever happens to either."
import json
import time
from pathlib import Path

import matplotlib
import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient
from safetensors.torch import load_file

from esam3.data.batches import load_recipe
from esam3.show import live as module
from esam3.show.figures import unreadable
from esam3.show.live import Metrics, live, live_figure, progress
from esam3.training.previews import PIXELS, Previews, answer, held_sample, read_preview

matplotlib.use("agg")


def run_of(place: Path, steps: int = 3) -> Path:
    "A run's folder with so many lines of metrics."
    place.mkdir(parents=True, exist_ok=True)
    (place / "settings.json").write_text(json.dumps({"schedule": {"steps": 9}}))
    timing = {"seconds": 0.1, "waits": 0.02, "per_second": 40.0, "memory_gb": 1.0, "left": 0.6}
    lines = [{"step": k, "lr": 0.01, "loss": 2.0 - k / 9, "features": 1.0, "gradient": 1.0, "timing": timing}
             for k in range(steps)]
    (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return place


# ---- what is written

def test_previews_change_no_digit_of_a_run(stage1_student, tmp_path):
    "A preview after every step, and the same weights and losses as with one at the end."
    from esam3.training.stage1 import run_stage1
    folder = run_stage1("es-ev-s", "tiny", runs=str(tmp_path), every=1)
    losses = lambda f: [{k: v for k, v in json.loads(line).items() if k != "timing"}
                        for line in (f / "metrics.jsonl").read_text().splitlines()]
    before, after = (load_file(f / "student" / "model.safetensors") for f in (stage1_student.parent, folder))
    assert losses(stage1_student.parent) == losses(folder)
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    kept = read_preview(folder)
    assert kept.history[:, 0].tolist() == [1, 2, 3] and kept.step == 3 and kept.phase == ""
    assert kept.student.shape[1:] == kept.teacher.shape[1:] == kept.image.shape[:2]


def test_a_look_leaves_modes_and_generators():
    from esam3.models.teacher import load_teacher
    teacher, held = load_teacher("toy").train(), held_sample(load_recipe("tiny"), 3)
    teacher.tracker_model.eval()
    state = lambda: (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(),
                     [m.training for m in teacher.modules()], [b.clone() for b in teacher.buffers()])
    before = state()
    answer(teacher, held)
    after = state()
    assert before[:3] == after[:3] and all(torch.equal(a, b) for a, b in zip(before[3], after[3]))


def test_a_preview_that_fails_ends_no_run(tmp_path, capsys):
    previews = Previews(1, load_recipe("tiny"), None, tmp_path)
    for step in (1, 2): previews(None, step)
    assert capsys.readouterr().out.count("the run goes on") == 1 and read_preview(tmp_path) is None
    without = Previews(1, {"splits": {"train": {}}}, None, tmp_path)
    without(None, 1)
    assert not without.failed and read_preview(tmp_path) is None


def test_a_run_without_figures_has_nothing_to_watch(tmp_path):
    "A teacher of random weights is not scored, and so not shown."
    from types import SimpleNamespace

    from esam3.training.runs import Run, StageRun
    some = SimpleNamespace(run=Run(), precision="no", reported={}, previews=lambda *_: None)
    assert StageRun.fitting(some, None)["watch"] is None
    some.reported = {"images": ("box",)}
    assert callable(StageRun.fitting(some, None)["watch"])


# ---- what is read

def test_old_damaged_and_empty_folders_are_drawn(stage1_student, tmp_path):
    run = run_of(tmp_path / "toy/es-tv-s/stage1")
    good = (stage1_student.parent / "preview.npz").read_bytes()
    with np.load(stage1_student.parent / "preview.npz") as kept: other = {k: kept[k] for k in PIXELS[1:]}
    for wrong in (b"", b"no archive", good[:200], good[:-50]):
        (run / "preview.npz").write_bytes(wrong)
        assert progress(run).preview is None
    np.savez(run / "preview.npz", **other)  # of another version
    assert progress(run).preview is None
    for name in ("settings.json", "report.json"): (run / name).write_text('{"sche')
    (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text() + '{"step": 3, "lo')
    p = progress(run)
    assert (p.step, p.steps, p.state) == (3, 0, "complete") and not unreadable(live_figure(p))
    assert not unreadable(live_figure(progress(tmp_path / "none")))
    assert progress(stage1_student.parent).preview.step == 3


def test_metrics_follow_a_run_that_goes_on(tmp_path):
    log = Metrics(run_of(tmp_path, 5) / "metrics.jsonl")
    assert len(log.read()) == 5
    (tmp_path / "metrics.jsonl").unlink()
    assert log.read() == []
    run_of(tmp_path, 7)
    assert [line["step"] for line in log.read()] == [*range(7)]


def test_losses_that_are_not_finite_are_drawn(tmp_path):
    run = run_of(tmp_path, 3)
    with open(run / "metrics.jsonl", "a") as f:
        f.write(json.dumps({"step": 3, "lr": 0.1, "loss": "nan", "features": "inf", "not_finite": ["loss"]}) + "\n")
    assert not unreadable(live_figure(progress(run)))


# ---- the panel

@pytest.fixture
def panel(monkeypatch) -> list[str]:
    "The notes of what is shown, in a process that looks like a notebook."
    seen = []
    monkeypatch.setattr(module, "get_ipython", lambda: True)
    monkeypatch.setattr(module.Panel, "show", lambda self, note: seen.append(note))
    return seen


def test_a_fault_of_the_run_is_raised_and_shown(panel, tmp_path):
    with pytest.raises(KeyboardInterrupt), live(run_of(tmp_path), every=0.05): raise KeyboardInterrupt
    assert panel == ["", "ended by KeyboardInterrupt"]


def test_files_that_do_not_change_are_drawn_once(panel, tmp_path):
    with live(run_of(tmp_path), every=0.02):
        time.sleep(0.3)
        assert panel == [""]
        run_of(tmp_path, 4); time.sleep(0.3)
    assert panel == ["", ""]


def test_a_fault_of_the_panel_is_no_fault_of_the_run(monkeypatch, tmp_path):
    tried = []
    monkeypatch.setattr(module, "get_ipython", lambda: True)
    monkeypatch.setattr(module.Panel, "show", lambda self, note: tried.append(1) or 1 / 0)
    with live(run_of(tmp_path), every=0.02): time.sleep(0.1)
    assert len(tried) > 1


def test_only_the_first_rank_shows_it(panel, monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "1")
    with live(run_of(tmp_path), every=0.02): time.sleep(0.05)
    assert panel == []


def test_a_notebook_keeps_the_panel(tmp_path):
    "Drawn again by the thread while the cell runs, and there as PNG after an error."
    run = run_of(tmp_path / "toy/es-tv-s/stage1")
    cells = ["import time\nfrom pathlib import Path\nfrom esam3.show.live import Panel, live",
             f"Panel.close = lambda self, note='': self.over.set()\nwith live({str(run)!r}, every=0.1):\n"
             f"    log = Path({str(run)!r}) / 'metrics.jsonl'\n"
             "    log.write_text(log.read_text() + log.read_text().splitlines()[-1].replace('2', '7', 1) + chr(10))\n"
             "    time.sleep(4)",
             f"with live({str(run)!r}): 1 / 0"]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    NotebookClient(book, timeout=120, kernel_name="python3", allow_errors=True).execute()
    first, second = (c.outputs for c in book.cells[1:])
    assert len(first) == 1 and "step 8 of 9" in first[0].data["text/plain"] and len(first[0].data["image/png"]) > 5000
    assert [o.output_type for o in second] == ["display_data", "error"]
