"""The loop where instances go wrong: what a checkpoint holds, what cannot be read, what is not finite; and what trains
while the rest stands still."""
import json
from pathlib import Path

import pytest
import timm.layers
import torch
from torch import nn

from esam3.core import PRECISIONS, Part, pick_precision
from esam3.data.samples import BadSample
from esam3.models.backbones import Encoder
from esam3.models.student import build_student
from esam3.models.teacher import load_teacher
from esam3.schedules import Schedule, Stage2Schedule
from esam3.training.checkpoints import Tally, load_state, save_state
from esam3.training import loop as training
from esam3.training.loop import TRAINS, Made, fit, parameter_groups, train_mode
from esam3.training.stage2 import give_memory, present


class Line(nn.Module):
    "y = 3x."
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(1, 1)

    def forward(self, x): return {"fit": (self.net(x.x if isinstance(x, Batch) else x) - 3).square().mean()}


class Batch:
    "Four samples, of which some were skipped."
    def __init__(self, skipped: int = 0):
        self.x, self.names, self.notes = torch.ones(4, 1), ["a"] * 4, [("skipped",
            f"{k}.jpg: no image") for k in range(skipped)] + [("mended", "b")]


def train(folder: Path, source=lambda part: torch.ones(4, 1), steps: int = 30, task: nn.Module | None = None,
          **more) -> tuple[nn.Module, dict]:
    task = task or Line()
    schedule = Schedule(steps, 4, lr=0.05, **{k: more.pop(k) for k in ("ema", "micro_batch") if k in more})
    return task, fit(task, Made(source), [{"params": list(task.parameters()), "lr": 0.05}], schedule, folder, every=5,
                     **more)


def lines(folder: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


# ---- row 6: a checkpoint is everything

def test_the_loss_scaler_comes_back(tmp_path):
    net, scaler = nn.Linear(1, 1), torch.amp.GradScaler("cpu", init_scale=2.0 ** 5)
    optimizer = torch.optim.AdamW(net.parameters())
    save_state(tmp_path, net, optimizer, None, 3, scaler)
    fresh = torch.amp.GradScaler("cpu", init_scale=2.0 ** 16)
    assert load_state(tmp_path, net, optimizer, fresh)[0] == 3 and fresh.get_scale() == 32


def test_accumulated_micro_batches_are_one_step(tmp_path):
    "Two micro-batches do what one does, also of a task that knows means alone; each is drawn once."
    seen = []
    source = lambda part: seen.append(part) or torch.ones(4, 1)
    once, twice = train(tmp_path / "a", steps=4)[0], train(tmp_path / "b", source, steps=4, micro_batch=2)[0]
    assert seen == [Part(step, k, 2) for step in range(4) for k in (0, 1)] and torch.allclose(once.net.weight,
        twice.net.weight)


@pytest.mark.parametrize("precision", ["bf16", "no"])
def test_an_interrupt_within_autocast_is_forgotten(precision, tmp_path):
    "What it leaves open would keep the weights as they were: the next training is that of a fresh process."
    fresh = train(tmp_path / "a", precision=precision)[0]
    torch.autocast("cpu", torch.bfloat16).__enter__()
    assert torch.equal(train(tmp_path / "b", precision=precision)[0].net.weight, fresh.net.weight)
    assert [line["loss"] for line in lines(tmp_path / "a")] == [line["loss"] for line in lines(tmp_path / "b")]


# ---- row 7: dropout follows its parent, drop path is off

def test_perceivers_dropout_trains_with_it():
    torch.manual_seed(0)
    student = give_memory(build_student("es-ev-s", load_teacher("toy")), "perceiver",
                          Stage2Schedule(global_latents=4, local_latents=4))
    parameter_groups(student, present(TRAINS[2], student), 1e-3)
    train_mode(student)
    drops = [m for m in student.perceiver.modules() if isinstance(m, nn.Dropout)]
    assert drops and all(m.training and m.p == 0.1 for m in drops)
    frozen = [m for n, m in student.named_modules()
              if n.startswith(("detector_model.vision_encoder", "detector_model.text_encoder"))]
    assert frozen and not any(m.training for m in frozen)
    maps = torch.randn(1, 64, 8, 8)
    assert not torch.equal(student.perceiver(maps, maps)[0], student.perceiver(maps, maps)[0]), "it acts"


@pytest.mark.parametrize("backbone", ["tiny_vit_21m_224", "repvit_m2_3", "efficientvit_b2"])
def test_drop_path_is_off(backbone):
    "TinyViT-21M comes with 0.2."
    paths = [m for m in Encoder(backbone, 64, side=128).modules() if isinstance(m, timm.layers.DropPath)]
    assert all(m.drop_prob == 0 for m in paths) and (paths or "tiny_vit" not in backbone)


# ---- row 11: what cannot be read

def test_skipped_samples_are_counted_and_listed(tmp_path):
    account = train(tmp_path, lambda part: Batch(int(part.step == 3)), steps=10)[1]["samples"]
    assert account == {"drawn": 40, "counts": {"mended": 10, "skipped": 1}}
    assert lines(tmp_path, "skipped.jsonl") == [{"step": 3, "rank": 0, "kind": "skipped", "detail": "0.jpg: no image"}]


def test_too_many_unreadable_samples_stop_the_run(tmp_path):
    with pytest.raises(BadSample,
                       match=r"24 of 48 samples could not be read, more than 1% .*skipped.jsonl. The last: 3.jpg"):
        train(tmp_path, lambda part: Batch(4), steps=40, bad=0.01)
    assert len(lines(tmp_path, "skipped.jsonl")) >= Tally.LEAST
    assert train(tmp_path / "fine", lambda part: Batch(4), steps=40, bad=0.6)[1]["steps"] == 40


def test_the_account_goes_on_with_the_run(tmp_path):
    "Cut after step 12 (checkpoint at 10) and continued: drawn and skipped as in one go."
    source = lambda part: Batch(int(part.step % 4 == 0))
    whole = train(tmp_path / "a", source)[1]["samples"]
    train(tmp_path / "b", source, stop=12)
    assert train(tmp_path / "b", source)[1]["samples"] == whole and lines(tmp_path / "b",
        "skipped.jsonl") == lines(tmp_path / "a", "skipped.jsonl")


# ---- row 15: what is not finite

@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_left_out(what, tmp_path):
    "Weights, average and optimiser are as if that step had not been; the log says which."
    class Odd(Line):
        def forward(self, x):
            loss = super().forward(x)["fit"]
            if x.isnan().any():
                loss = torch.tensor(torch.nan) * self.net.weight.sum() if what == "loss" else (self.net.weight.sum()
                    * 0).sqrt() + self.net.weight.sum() * 0
            return {"fit": loss}
    hole = lambda part: torch.full((4, 1), torch.nan) if part.step == 2 else torch.ones(4, 1)
    task = train(tmp_path, hole, steps=5, task=Odd(), ema=0.5)[0]
    logged = lines(tmp_path)
    assert [k for k, row in enumerate(logged) if "not_finite" in row] == [2] and what in logged[2]["not_finite"]
    assert all(p.isfinite().all()
               for p in task.parameters()) and logged[3]["loss"] < logged[1]["loss"], ("the step before it is what it "
                   "goes on from")


def test_ten_in_a_row_end_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match="10 steps in a row"):
        train(tmp_path, lambda part: torch.full((4, 1), torch.inf))
    assert len(lines(tmp_path)) == training.NOT_FINITE and len([*(tmp_path / "inspect").glob("*.safetensors")]) == 1


@pytest.mark.parametrize("scale, left_out", [(1024.0, False), (1.0, True)])
def test_an_overflow_is_the_scalers_business(scale, left_out, tmp_path, monkeypatch):
    """A gradient that is not finite under a loss scale above 1 halves the scale, and is no step that is left out; under
    a scale of 1 it is the loss's own."""
    class Steep(Line):
        def forward(self, x):
            return {"fit": super().forward(x.nan_to_num())["fit"]
                    + ((self.net.weight.sum() * 0).sqrt() if x.isnan().any() else 0)}
    scaler, init = torch.amp.GradScaler("cpu", init_scale=scale), training.Accelerator.__init__
    def scaled(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.scaler, self.native_amp, self.state._mixed_precision = scaler, True, "fp16"
    monkeypatch.setattr(training.Accelerator, "__init__", scaled)
    task = train(tmp_path, lambda part: torch.full((4, 1), torch.nan) if part.step == 1 else torch.ones(4, 1), steps=3,
                 task=Steep())[0]
    assert ["not_finite" in row for row in lines(tmp_path)] == [False, left_out, False] and task.net.weight.isfinite()
    assert scaler.get_scale() == scale / 2, "the overflow was seen"


# ---- row 16: precision

def test_precision_is_said_and_not_guessed_from_the_processor(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert pick_precision(cpu) == "no" and [pick_precision(cpu, p) for p in ("no", "bf16")] == ["no", "bf16"]
    for capability, best in (((9, 0), "bf16"), ((8, 0), "bf16"), ((7, 0), "fp16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, c=capability: c)
        assert pick_precision(cuda) == best and [pick_precision(cuda, p) for p in PRECISIONS] == [*PRECISIONS]
    with pytest.raises(ValueError, match="scales its losses on a GPU only"): pick_precision(cpu, "fp16")
    with pytest.raises(ValueError, match="did you mean 'fp16'"): pick_precision(cpu, "fp61")


# ---- what is seen while it runs

def test_every_line_says_what_its_step_took(tmp_path):
    "And the account sums it up: 4 samples a step."
    account = train(tmp_path, steps=6)[1]
    timing = [row["timing"] for row in lines(tmp_path)]
    assert all(set(t) == {"seconds", "waits", "per_second", "memory_gb", "left"}
               for t in timing) and timing[-1]["left"] == 0 < timing[0]["left"]
    assert account["per_second"] == pytest.approx(24 / account["seconds"]) and sum(t["seconds"]
        for t in timing) <= account["seconds"] + 1e-3


def test_curves_go_to_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    train(tmp_path, steps=7, log_to="tensorboard", stop=6)
    train(tmp_path, steps=7, log_to="tensorboard")  # goes on from step 6
    place = next(p for p in tmp_path.rglob("events.*")).parent
    events = EventAccumulator(str(place)); events.Reload()
    assert ([e.step for e in events.Scalars("loss")] == [*range(7)]
            and events.Scalars("loss")[3].value == pytest.approx(lines(tmp_path)[3]["loss"]))


def test_a_tracker_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="log_to='tensorbord': accelerate knows no such tracker here .*tensorboard"):
        train(tmp_path, log_to="tensorbord")
