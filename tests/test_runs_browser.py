"Every run is in the table, whatever state it is in; what cannot be compared says why in a line."
import json
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
import pytest

from esam3.core import write_json
from esam3.show.figures import unreadable
from esam3.show.runs import (
    Runs, RunsBrowser, as_html, cells, compare, differing, labels, main_scores, read_run, runs_table)

matplotlib.use("agg")


def run_of(root: Path, name: str, score: float | None = 0.5, recipe: str = "tiny", steps: int = 4, **settings) -> Path:
    "A run's folder; without a score it has no report."
    folder, (_, variant, stage) = root / name, name.split("/")[-3:]
    write_json(folder / "settings.json", {"stage": int(stage[-1]), "variant": variant, "recipe": {"name": recipe},
                                          "seed": 42, "schedule": {"steps": 9, "lr": 0.1}} | settings)
    lines = [{"step": k, "lr": 0.1, "loss": 1.0, "features": 0.5} for k in range(steps)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if score is not None:
        timing = {"seconds": 30.0, "evaluation": 30.0, "warmup": 60.0, "date": "2026-11-27"}
        write_json(folder / "report.json", {"student": {"miou_box": score}, "timing": timing})
    return folder


def row(root: Path, name: str) -> object:
    return next(r for r in runs_table(root) if r.run == name)


def words(browser: RunsBrowser) -> str:
    "The browser's line, which is one."
    assert "\n" not in browser.words.value and "Traceback" not in browser.words.value
    return browser.words.value


# ---- states

def test_every_state_is_told(tmp_path):
    states = {"complete": run_of(tmp_path, "tiny/a/stage1"), "cut at step 4": run_of(tmp_path, "tiny/b/stage1", None)}
    states["trained, not scored"] = run_of(tmp_path, "tiny/c/stage1", None)
    write_json(states["trained, not scored"] / "student/config.json", {})
    states["cut at step 2 of its warm-up"] = warm = run_of(tmp_path, "tiny/d/stage2", None, steps=0)
    (warm / "warmup").mkdir()
    (warm / "warmup/metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n{"ste')
    states["damaged: report.json is no JSON"] = run_of(tmp_path, "tiny/e/stage1")
    (states["damaged: report.json is no JSON"] / "report.json").write_bytes(b'{"student": {"mi')
    states["damaged: settings.json holds no mapping"] = run_of(tmp_path, "x/y/tiny/f/stage1")
    (states["damaged: settings.json holds no mapping"] / "settings.json").write_text("[]")
    found = {r.folder: r for r in runs_table(tmp_path)}
    assert {f: r.state for f, r in found.items()} == {f: s for s, f in states.items()}
    assert found[states["complete"]].minutes == 2.0 and found[states["complete"]].steps == 9
    assert "x/y/tiny/f/stage1" in as_html([*found.values()])


@pytest.mark.parametrize("content", ["{}", "[]", "null", '{"student": 3, "timing": 4}', '{"timing": {"seconds": "x"}}',
                                     '{"student": {"miou_box": "high"}}', "\0"])
def test_no_report_breaks_the_table(tmp_path, content):
    run_of(tmp_path, "tiny/a/stage1")
    bad = run_of(tmp_path, "tiny/b/stage1")
    (bad / "report.json").write_text(content)
    (bad / "settings.json").write_text('{"schedule": {"steps": "nine"}, "recipe": {}}')
    rows = runs_table(tmp_path)
    assert len(rows) == 2 and as_html(rows.sorted_by("miou_box").matching("tiny")) and cells(rows)
    for key in ("steps", "minutes", "state", "date"): rows.sorted_by(key, True)


def test_a_run_of_another_process_is_running(tmp_path):
    folder = run_of(tmp_path, "tiny/a/stage1", None)
    code = ("import sys; from pathlib import Path; from esam3.training.cluster import hold; hold(Path(sys.argv[1])); "
            "print('held', flush=True); sys.stdin.read()")
    other = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"held\n"
        assert read_run(folder, tmp_path).state == "running, step 4"
    finally: other.communicate(b"")
    assert read_run(folder, tmp_path).state == "cut at step 4"


def test_what_is_inside_of_a_run_is_no_run(tmp_path):
    folder = run_of(tmp_path, "tiny/a/stage1")
    for inside in ("evaluation/student/images/box", "warmup", ".old/tiny/b/stage1"):
        write_json(folder / inside / "settings.json", {})
    write_json(tmp_path / ".hidden/tiny/c/stage1/settings.json", {})
    assert [r.run for r in runs_table(tmp_path)] == ["tiny/a/stage1"]


def test_hundreds_of_runs_are_read_at_once(tmp_path):
    for k in range(300): run_of(tmp_path, f"ablation/{k}/tiny/a/stage1", k / 300, seed=k)
    begun = time.perf_counter()
    browser = RunsBrowser(tmp_path)
    assert time.perf_counter() - begun < 5 and len(browser.visible) == 300


# ---- the table

def test_order_filter_and_settings(tmp_path):
    for name, score, seed in (("a", 0.3, 1), ("b", None, 2), ("c", 0.9, 3)):
        run_of(tmp_path, f"tiny/{name}/stage1", score, seed=seed, data={"train": name})
    run_of(tmp_path, "tiny/a/stage2", 0.1, memory="dense")
    rows = runs_table(tmp_path)
    assert [r.variant for r in rows.matching("stage1").sorted_by("miou_box")] == ["a", "c", "b"]
    assert [r.variant for r in rows.matching("stage1").sorted_by("miou_box", True)] == ["c", "a", "b"]
    assert [r.run for r in rows.matching("SEED=2 tiny")] == ["tiny/b/stage1"] and rows.matching("no such word") == []
    assert differing(rows)["tiny/c/stage1"] == "seed 3" and differing(rows)["tiny/a/stage2"] == ""
    assert main_scores(rows.sorted_by("miou_box", True)[0]) == "miou_box 90.0"
    with pytest.raises(ValueError, match="did you mean 'miou_box'"): rows.sorted_by("miou_bix")


def test_labels_tell_runs_apart(tmp_path):
    for name in ("ab/1/tiny/a/stage1", "ab/2/tiny/a/stage1", "tiny/a/stage1", "tiny/a/stage2"): run_of(tmp_path, name)
    one, two, own, later = runs_table(tmp_path)
    assert labels([one, two]) == ["1", "2"] and labels([own, later]) == ["stage1", "stage2"]
    assert len({*labels([one, two, own, later])}) == 4 and labels([own]) == ["tiny/a/stage1"]


def test_curves_have_a_line_for_each_run(tmp_path):
    for name in ("a", "b"): run_of(tmp_path, f"tiny/{name}/stage1", None)
    rows = runs_table(tmp_path)
    fig = rows.curves()
    assert [len(ax.lines) for ax in fig.axes] == [2, 2] and not unreadable(fig)
    assert len(rows.curves(["loss"]).axes) == 1
    with pytest.raises(ValueError, match="no losses"): Runs().curves()
    (run_of(tmp_path, "tiny/c/stage1", None) / "metrics.jsonl").unlink()
    assert [len(ax.lines) for ax in runs_table(tmp_path).curves().axes] == [2, 2]
    for k in range(6): run_of(tmp_path, f"tiny/d{k}/stage1", None)
    with pytest.raises(ValueError, match="at most 6"): runs_table(tmp_path).curves()
    with pytest.raises(ValueError, match="no losses"): rows.curves(["none"])


# ---- two students

@pytest.fixture(scope="module")
def both(stage1_student, tmp_path_factory) -> Runs:
    "The student of three steps, and another of one step."
    import shutil

    from esam3.training.stage1 import run_stage1
    root = tmp_path_factory.mktemp("two")
    shutil.copytree(stage1_student.parent, root / "three/tiny/es-ev-s/stage1", ignore=shutil.ignore_patterns("state"))
    run_stage1("es-ev-s", "tiny", runs=str(root / "one"), steps=1, eval_images=1, eval_instances=1)
    return runs_table(root)


def test_two_students_side_by_side(both, tmp_path, monkeypatch):
    from esam3.data.toyfiles import toyworld
    (tmp_path / toyworld("tiny").name).symlink_to(toyworld("tiny"))
    monkeypatch.setenv("ESAM3_CACHE", str(tmp_path))
    c = compare(*both, count=4)
    gaps = [abs(d.a - d.b) for d in c.differences]
    assert gaps == sorted(gaps, reverse=True) and gaps[0] > 0 and len(gaps) >= 4
    fig = c.figure(2)
    assert len(fig.axes) == 6 and not unreadable(fig) and f"IoU {c.differences[0].a:.2f}" in fig.axes[1].get_title()
    kept = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("parts/*.json")}
    assert len(kept) >= 2 and compare(*both, count=4).differences == c.differences
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("parts/*.json")} == kept, "answers are kept"
    assert not list(both[0].folder.rglob("comparisons")), "a run's folder stays as it is"


def test_what_cannot_be_compared_says_why(both, tmp_path):
    with pytest.raises(ValueError, match="choose two runs"): compare(both[0], both[0])
    run_of(tmp_path, "tiny/a/stage1", None)
    cut = row(tmp_path, "tiny/a/stage1")
    with pytest.raises(ValueError, match="has no student .cut at step 4"): compare(both[0], cut)
    student = run_of(tmp_path, "toy/b/stage1", recipe="toy") / "student"
    student.mkdir()
    (student / "model.safetensors").write_bytes(b"nothing")
    other = row(tmp_path, "toy/b/stage1")
    with pytest.raises(ValueError, match="different recipes, tiny and toy"): compare(both[0], other)
    write_json(tmp_path / "toy/b/stage1/settings.json", {"recipe": {"name": "tiny"}})
    broken = row(tmp_path, "toy/b/stage1")
    with pytest.raises(ValueError, match="its student cannot be read") as e: compare(both[0], broken)
    assert "\n" not in str(e.value)


# ---- the widget

def test_no_runs_are_said_to_be_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="10_stage1"): runs_table(tmp_path / "none")
    assert "papermill" in words(RunsBrowser(tmp_path / "none")) and "papermill" in words(RunsBrowser(tmp_path))


def test_the_widget_does_what_the_functions_do(tmp_path):
    for name, score in (("a", 0.3), ("b", 0.9), ("c", 0.6)): run_of(tmp_path, f"tiny/{name}/stage1", score)
    browser = RunsBrowser(tmp_path)
    browser.sort.value, browser.down.value = "miou_box", True
    assert [*browser.choice.options] == [r.run for r in runs_table(tmp_path).sorted_by("miou_box", True)]
    browser.choice.value = ["tiny/a/stage1", "tiny/b/stage1"]
    assert bytes(browser.curves.value).startswith(b"\x89PNG") and browser.curves.layout.display != "none"
    last = bytes(browser.curves.value)
    browser.pick.value = "tiny/c; seed=42 /b/; nothing"
    assert set(browser.choice.value) == {"tiny/b/stage1", "tiny/c/stage1"} and bytes(browser.curves.value) != last
    browser.choice.value = ["tiny/a/stage1", "tiny/b/stage1"]
    last = bytes(browser.curves.value)
    browser.sort.value = "miou_bix"
    assert "did you mean" in words(browser) and len(browser.visible) == 3
    browser.sort.value = "miou_box"
    browser.go.click()
    assert "has no student" in words(browser) and not browser.go.disabled
    browser.text.value = "tiny/c"
    assert [*browser.choice.options] == ["tiny/c/stage1"] and bytes(browser.curves.value) == last
    browser.go.click()
    assert "0 runs are chosen" in words(browser)
    run_of(tmp_path, "tiny/d/stage1", 0.1)
    browser.text.value = ""
    browser.again.click()
    assert len(browser.choice.options) == 4 and browser.sort.value == "miou_box"
