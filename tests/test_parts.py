"""A step is the same step whoever works it off: by two processes, or in micro-batches, its losses are those of one
process with the whole batch."""
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from esam3.models.perceiver import SpatialPerceiver
from esam3.training import loop as training
from esam3.training.loop import in_ranks
from esam3.training.stage1 import run_stage1
from esam3.training.stage2 import run_stage2
from esam3.training.stage3 import run_stage3
from logs import rows

FULL = bool(os.environ.get("ESAM3_FULL"))
STEPS = 20 if FULL else 2
RUN = {1: run_stage1, 2: run_stage2, 3: run_stage3}
COMMON = dict(variant="es-ev-s", recipe="tiny", steps=STEPS, batch_size=4, every=100)
OWN = {1: {"eval_images": 1}, 2: {"brief": True, "eval_clips": 1, "eval_frames": 2, "warmup_steps": 2,
                                  "options": {"back": 0.5}},
       3: {"brief": True, "eval_images": 1, "warmup_steps": 0,
           "options": {"clip_every": 1, "alternate": False, "lambda1": 0.0}}}
PARTS = {"both": {"ranks": 2, "micro_batch": 1}} | (
    {"two processes": {"ranks": 2}, "micro-batches": {"micro_batch": 2}} if FULL else {})
# how the instances of a part differ from one another: of the parts by themselves
APART = {"instances", "instance contrast"}


def still(stage_run: Callable[..., Path], live: bool = False, **given) -> Path:
    """A run whose batch norms keep their statistics, and whose Perceiver drops nothing out: what is left to chance is
    of the slots."""
    train_mode = training.train_mode
    def frozen(task: nn.Module, parent: bool = True) -> None:
        train_mode(task, parent)
        for m in task.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm) and not live: m.eval()
            if isinstance(m, SpatialPerceiver):
                for d in m.modules():
                    if isinstance(d, nn.Dropout): d.p = 0.0
    training.train_mode = frozen
    try: return stage_run(**given)
    finally: training.train_mode = train_mode


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    "A stage by one process with the whole batch, from the one before; run when it is first asked for."
    done: dict[int, Path] = {}
    def of(stage: int) -> Path:
        if stage not in done:
            done[stage] = trained(stage, tmp_path_factory.mktemp("whole"), of(stage - 1) if stage > 1 else None)
        return done[stage]
    return of


def trained(stage: int, runs: Path, after: Path | None, ranks: int = 1, **more) -> Path:
    given = COMMON | OWN[stage] | more | ({"student": str(after / "student")} if after else {})
    return in_ranks(still, ranks, stage_run=RUN[stage], runs=str(runs), **given)


def apart(one: Path, other: Path, log: str = "metrics.jsonl") -> dict[tuple[int, str], tuple[float, float]]:
    """Figures that differ: by more than 1e-5 at the first step, later by more than a thousandth of the step's loss.

    (step, name) → both. The gradient's norm is compared in the first two steps alone, and small terms by their part in
    the loss: weights changed by 1e-6 of themselves move the norm by 4 %, and a term that is 2 % of the loss by 0.3 %,
    within 20 steps of stage 2."""
    a, b = rows(one / log), rows(other / log)
    assert len(a) == len(b) and a[0].keys() == b[0].keys()
    told = lambda k, row: (row.keys() - APART - ({"loss", "gradient"} if APART & row.keys() else set())
                           - ({"gradient"} if k > 1 else set()))
    # they are written with 5 digits
    near = lambda k, name, row: 2e-5 + (1e-3 if k else 1e-5) * abs(row[name] if name == "gradient" or not k
                                                                   else row["loss"])
    return {(k, name): (x[name], y[name]) for k, (x, y) in enumerate(zip(a, b)) for name in told(k, x)
            if abs(x[name] - y[name]) > near(k, name, x)}


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("stage", RUN)
def test_losses_are_those_of_the_whole_batch(stage, parts, whole, tmp_path):
    "Over all steps, and what is logged are the sums over all parts."
    one, folder = whole(stage), trained(stage, tmp_path, whole(stage - 1) if stage > 1 else None, **PARTS[parts])
    assert not apart(one, folder) and (stage != 2 or not apart(one, folder, "warmup/metrics.jsonl"))
    settings = json.loads((folder / "report.json").read_text())["settings"]
    assert (settings["ranks"], settings["schedule"]["micro_batch"]) == (PARTS[parts].get("ranks", 1),
        PARTS[parts].get("micro_batch", 0))


def test_maps_of_a_thawed_encoder(whole, tmp_path):
    """At the first step of stage 3's warm-up: from then on a term that contrasts the instances of a part makes the
    weights others."""
    more = {"options": OWN[3]["options"] | {"lambda1": 4.0, "encoder_lr": 1e-4}, "steps": 1, "warmup_steps": 1}
    one, cut = (trained(3, tmp_path / str(micro), whole(2), micro_batch=micro, **more) for micro in (0, 1))
    assert not apart(one, cut, "warmup/metrics.jsonl") and APART < rows(one / "warmup/metrics.jsonl")[0].keys()


def test_live_statistics_are_of_each_part(tmp_path):
    "With them a part is normalised by itself: the gap is small and it is there."
    a, b = (rows(in_ranks(still, 1, stage_run=run_stage1, live=True, runs=str(tmp_path / str(
        m)), micro_batch=m, **COMMON, **OWN[1]) / "metrics.jsonl")[0] for m in (0, 2))
    assert 1e-4 < abs(a["loss"] - b["loss"]) / a["loss"] < 0.3


def test_synchronised_batch_norm_on_cuda():
    "What `fit` makes of a task of several ranks there; it cannot be computed on a CPU."
    norms = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    weight = norms[1].weight
    same = training.convert_sync_batchnorm(norms)
    assert isinstance(same[1], torch.nn.SyncBatchNorm) and same[1].weight is weight and isinstance(same[1],
        nn.modules.batchnorm._BatchNorm)
