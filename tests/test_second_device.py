"The three stages on a second device: what stays on the CPU raises or is seen, and the figures are the CPU's."
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from elsewhere import DEVICE, elsewhere
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import esam3.evaluation.evaluate
import esam3.training.loop
from esam3.schedules import Schedule
from esam3.training import stage2, stage3
from esam3.training.loop import Made, fit
from esam3.training.stage1 import run_stage1
from esam3.training.stage2 import run_stage2
from esam3.training.stage3 import run_stage3
from logs import chance, content, rows

RUN = {1: run_stage1, 2: run_stage2, 3: run_stage3}
IMAGES, CLIPS = {"eval_images": 2, "eval_instances": 2}, {"eval_clips": 1, "eval_frames": 2, "warmup_steps": 1}
SMALL: dict[str, Any] = {
    "variant": "es-ev-s", "recipe": "tiny", "precision": "no", "steps": 2, "every": 1,
    "sampling": "tracks: 2, frames: [4, 4], instances: 2, phrases: 2",
    "options": {"ema": 0.9, "linear_warmup": 1000.0},  # steps so small that rounding does not grow from one to the next
}
OWN = {1: {"batch_size": 2, **IMAGES}, 2: {"batch_size": 1, **CLIPS}, 3: {"batch_size": 2, **IMAGES, **CLIPS}}
FIGURES = ("teacher", "before", "student", "controls", "teacher_controls")


class Seen:
    "Where the models of a run were when they were scored, and what training kept when a checkpoint was written."

    def __init__(self, patch: pytest.MonkeyPatch):
        self.scored: list[set[torch.device]] = []
        self.kept: list[dict[str, set[torch.device]]] = []
        predict, save = esam3.evaluation.evaluate.predict, esam3.training.loop.save_state
        def scored(task, *args, **options):
            self.scored.append(places([*task.model.state_dict().values()]))
            return predict(task, *args, **options)
        def saved(folder, task, optimizer, average, *args):
            states = optimizer.state_dict()["state"].values()
            kept = {"task": [*task.parameters(), *task.buffers()], "average": [*(average or {}).values()],
                    "optimizer": [state[k] for state in states for k in ("exp_avg", "exp_avg_sq")]}
            self.kept.append({k: places(tensors) for k, tensors in kept.items()})
            return save(folder, task, optimizer, average, *args)
        patch.setattr(esam3.evaluation.evaluate, "predict", scored)
        patch.setattr(esam3.training.loop, "save_state", saved)


def places(tensors: list[Tensor]) -> set[torch.device]:
    "The devices of some tensors."
    return {t.device for t in tensors}


def fresh(patch: pytest.MonkeyPatch, folder: Path) -> None:
    "As in a new process and with an empty cache: a teacher's scores are asked for, and no encoder's maps are known."
    patch.setattr(esam3.evaluation.evaluate, "cache_dir", lambda: folder / "cache")
    for module in (stage2, stage3): patch.setattr(module, "KEPT_MAPS", {})


def run(stage: int, runs: Path, after: Path | None = None, **more) -> Path:
    "A stage from the student of another run's folder; it ends with a student and a report."
    given = SMALL | OWN[stage] | more | ({"student": str(after / "student")} if after else {})
    folder = RUN[stage](**given, runs=str(runs))
    assert (folder / "student" / "model.safetensors").exists() and (folder / "report.json").exists()
    return folder


def metrics(folder: Path) -> list[dict[str, float]]:
    "The lines of a run: of its single-frame warm-up, where it has one, and its own."
    files = [f for f in (folder / "warmup" / "metrics.jsonl", folder / "metrics.jsonl") if f.exists()]
    return [row for f in files for row in rows(f)]


def flat(value: object, name: str = "") -> dict[str, object]:
    "A nested report's values by dotted name."
    if not isinstance(value, dict): return {name: value}
    return {k: v for key, inside in value.items() for k, v in flat(inside, f"{name}.{key}").items()}


def figures(folder: Path) -> dict[str, object]:
    "The scores in a report; those that could not be given are left out."
    report = json.loads((folder / "report.json").read_text())
    return {k: v for k, v in flat({k: report[k] for k in FIGURES if k in report}).items() if v is not None}


@pytest.fixture(scope="module")
def there(tmp_path_factory) -> Callable[[int], tuple[Path, Seen]]:
    "A stage on the device, run when it is first asked for, from the one before: its folder, and what was seen."
    runs = tmp_path_factory.mktemp("there")
    @cache
    def done(stage: int) -> tuple[Path, Seen]:
        after = done(stage - 1)[0] if stage > 1 else None
        with elsewhere(), pytest.MonkeyPatch.context() as patch:
            fresh(patch, runs)
            seen = Seen(patch)
            return run(stage, runs, after), seen
    return done


@pytest.fixture
def before(there, stage) -> Path | None:
    "The folder of the stage before a test's `stage`."
    return there(stage - 1)[0] if stage > 1 else None


@pytest.mark.parametrize("stage, scored, kept, averages", [(1, 2, 2, 2), (2, 3, 3, 3), (3, 3 * 4, 3, 2)])
def test_models_are_scored_and_trained_on_the_device(stage, scored, kept, averages, there):
    """Teacher, student before and student after, in stage 3 on four kinds of data; weights, optimiser and average at
    every checkpoint, where the feature warm-up has no average."""
    seen = there(stage)[1]
    assert len(seen.scored) == scored and all(devices == {DEVICE} for devices in seen.scored), seen.scored
    assert len(seen.kept) == kept and sum(bool(k["average"]) for k in seen.kept) == averages
    for k in seen.kept: assert k["task"] == k["optimizer"] == {DEVICE} and k["average"] <= {DEVICE}, k


@pytest.mark.parametrize("stage", RUN)
def test_losses_and_figures_are_the_cpus(stage, before, there, tmp_path, monkeypatch):
    "With the same student to start from, and the kernel of attention that the device has."
    fresh(monkeypatch, tmp_path)
    with sdpa_kernel(SDPBackend.MATH): folder = run(stage, tmp_path, before)
    ours, theirs = metrics(there(stage)[0]), metrics(folder)
    assert len(ours) == len(theirs) == (2 if stage == 1 else 3)
    for a, b in zip(ours, theirs): assert a == pytest.approx(b, rel=1e-5, abs=2e-5)  # they are written with 5 digits
    scores = figures(folder)
    assert len(scores) > 15 and figures(there(stage)[0]) == pytest.approx(scores, rel=1e-5, nan_ok=True)


class Cut(Exception):
    "A run ends here."


def cut_after(patch: pytest.MonkeyPatch, place: str, step: int) -> None:
    "End a run when it has written the checkpoint of a step: of `stageN`, or of its `warm-up`."
    save = esam3.training.loop.save_state
    def then_cut(folder, task, optimizer, average, done, *rest):
        save(folder, task, optimizer, average, done, *rest)
        if (folder.name, done) == (place, step): raise Cut
    patch.setattr(esam3.training.loop, "save_state", then_cut)


@pytest.mark.parametrize("stage, cuts", [(1, ["stage1"]), (2, ["warmup", "stage2"]), (3, ["stage3"])])
def test_cut_run_continues_on_the_device(stage, cuts, before, there, tmp_path):
    "Metrics, weights and scores are byte by byte those of the run that was left alone."
    whole, brief = there(stage)[0], {"brief": True} if stage > 1 else {}
    with elsewhere(), pytest.MonkeyPatch.context() as outer:
        seen = Seen(outer)
        for place in cuts:
            with pytest.MonkeyPatch.context() as patch, pytest.raises(Cut):
                fresh(patch, tmp_path); cut_after(patch, place, 1)
                run(stage, tmp_path, before, **brief)
        fresh(outer, tmp_path)
        folder = run(stage, tmp_path, before, **brief)
    assert json.loads((folder / "report.json").read_text())["timing"]["steps"] == 1, "the second step alone"
    assert len(seen.kept) == len(metrics(folder)) and all(kept["average"] <= {DEVICE} for kept in seen.kept)
    for name in ("metrics.jsonl", "student/model.safetensors", *(["warmup/metrics.jsonl"] if stage > 1 else [])):
        assert content(folder / name) == content(whole / name), name
    scores, all_scores = figures(folder), figures(whole)
    assert scores == pytest.approx({k: all_scores[k] for k in scores}, rel=0, abs=0, nan_ok=True)


class Line(nn.Linear):
    "A task of 3 numbers."

    def forward(self, batch: Tensor) -> dict[str, Tensor]: return {"square": super().forward(batch).square().mean()}


def test_average_left_on_the_cpu_raises(tmp_path):
    "A checkpoint's average is on the task's device, or the next step fails: that is how the tests above would know."
    def train(name: str, stop: int = 0) -> Line:
        torch.manual_seed(0)
        task = Line(2, 1).to(DEVICE)
        groups = [{"name": "line", "params": [*task.parameters()], "lr": 0.1, "weight_decay": 0.0}]
        schedule = Schedule(steps=3, batch_size=1, lr=0.1, ema=0.9)
        fit(task, Made(lambda part: chance(part, 4, 2).to(DEVICE)), groups, schedule, tmp_path / name, 0, every=1,
            stop=stop)
        return task
    load = esam3.training.loop.load_state
    def left_behind(*args):
        step, average, more = load(*args)
        return step, average and {n: t.cpu() for n, t in average.items()}, more
    with elsewhere():
        whole = train("whole")
        train("cut", stop=1)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="to be on the same device"):
            patch.setattr(esam3.training.loop, "load_state", left_behind)
            train("cut")
        assert torch.equal(train("cut").weight, whole.weight)


def test_half_precision(there, tmp_path, monkeypatch):
    "Stage 3, whose losses hold those of the other two, under bf16."
    fresh(monkeypatch, tmp_path)
    with elsewhere(): folder = run(3, tmp_path, there(2)[0], precision="bf16", steps=1, brief=True)
    assert json.loads((folder / "report.json").read_text())["settings"]["precision"] == "bf16"
    for a, b in zip(metrics(folder), metrics(there(3)[0])[:2], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.1) and a["loss"] != b["loss"]
