"""The table of the paper's recipe is held against the code: what it says is what runs, and where the two differ there
is a reason."""
from dataclasses import fields, replace

import pytest

from esam3.data.batches import RECIPES, SCHEDULES as NAMES, load_recipe
from esam3.schedules import (
    PAPER, PROVEN, RECIPE, SCHEDULES, STAGES, STAGES_OF, Schedule, Stage2Schedule, Stage3Schedule, schedule_for)

ROWS = [(row, stage) for row in RECIPE for stage in row.stages]


@pytest.mark.parametrize("row, stage", ROWS, ids=[f"{r.what[:30]}-{s}" for r, s in ROWS])
def test_paper_is_the_papers(row, stage):
    "What the paper gives is what `paper` does, a range holds it; what it does not give has a reason."
    assert row.why
    if row.what not in STAGES_OF: return  # built in: what is said of it has tests of its own
    assert stage in STAGES_OF[row.what]
    ours = getattr(PAPER[stage], row.what)
    if isinstance(row.paper, tuple) and len(row.paper) == 2: assert row.paper[0] <= ours <= row.paper[1]
    elif row.paper is not None: assert ours == row.paper


def test_every_difference_is_in_the_table():
    "A field in which the schedules differ, from one another or from their class's default, has a row."
    rows = {(row.what, stage) for row, stage in ROWS}
    for stage, kind in STAGES.items():
        for f in fields(kind):
            paper, proven, plain = (getattr(s, f.name) for s in (PAPER[stage], PROVEN[stage], kind()))
            if not paper == proven == plain:
                assert (f.name, stage) in rows, f"{f.name} of stage {stage}: paper {paper}, proven {proven}"


def test_optimisation_is_every_stages_and_nothing_else():
    "What `fit` reads is all that a plain `Schedule` has; terms of stages are in their classes."
    shared = {f.name for f in fields(Schedule)}
    assert shared == {"steps", "batch_size", "micro_batch", "lr", "linear_warmup", "max_norm", "ema", "betas", "floor",
                      "inherited", "checkpoint"}
    assert all(STAGES_OF[name] == (1, 2, 3) for name in shared)
    for stage, kind in STAGES.items():
        assert type(PAPER[stage]) is type(PROVEN[stage]) is kind
        assert {f.name for f in fields(kind)} == {name for name, stages in STAGES_OF.items() if stage in stages}


def test_what_stage_3_needs_of_stage_2_and_nobody_sets():
    from esam3.training.stage2 import read_weight
    assert "read_decay" not in {f.name for f in fields(Stage3Schedule)}
    for step in (0, 9): assert read_weight(Stage3Schedule(10, lambda_read=2.0), step) == 2.0
    assert read_weight(Stage2Schedule(10, lambda_read=2.0, read_decay="linear"), 9) == 0.0


def test_steps_of_an_aid_are_bounded():
    """No warm-up is as long as an epoch of SA-1B or SA-V: it has a number of steps, and stage 2's goes round a bounded
    number of batches."""
    from esam3.training.stage2 import WARMUP_BATCHES
    assert all(PAPER[s].warmup_steps == 0 and PROVEN[s].warmup_steps <= 1000 for s in (2, 3))
    assert WARMUP_BATCHES <= 1000


def test_recipes_name_their_schedule():
    shipped = {p.stem: load_recipe(p.stem)["schedule"] for p in RECIPES.glob("*.yaml")}
    assert set(NAMES) == set(SCHEDULES) and {k for k, v in shipped.items() if v == "proven"} == {"toy", "toy_hour",
        "tiny"}


FOREIGN = [(k, s) for k, stages in STAGES_OF.items() for s in (1, 2, 3) if s not in stages]


@pytest.mark.parametrize("name, stage", FOREIGN, ids=[f"{k}-{s}" for k, s in FOREIGN])
def test_settings_of_other_stages_are_refused(name, stage):
    "In a recipe and in a call, also where they are 0."
    with pytest.raises(ValueError, match=f"'{name}' is a setting of stage"):
        schedule_for(stage, {"name": "x", "stages": {stage: {"steps": 1, name: 0}}})
    with pytest.raises(ValueError, match=f"'{name}' is a setting of stage"):
        schedule_for(stage, {"name": "x"}, {name: 0}, steps=1)
    with pytest.raises(TypeError, match=name): STAGES[stage](**{name: 0})


def test_whose_word_counts():
    "A call, the recipe's `stages`, the schedule that is asked for, the recipe's: in this order."
    recipe = {"name": "x", "schedule": "proven", "stages": {1: {"steps": 5, "max_norm": 7.0}}}
    assert schedule_for(1, recipe) == replace(PROVEN[1], steps=5, max_norm=7.0)
    assert schedule_for(1, recipe, schedule="paper") == replace(PAPER[1], steps=5, max_norm=7.0)
    assert schedule_for(1, recipe, {"max_norm": 0.0}, schedule="paper", lr=1.0) == replace(PAPER[1], steps=5,
        max_norm=0.0, lr=1.0)
    with pytest.raises(ValueError, match="did you mean 'paper'"): schedule_for(1, recipe, schedule="papr")


@pytest.mark.parametrize("ranks, micro, fits", [(1, 64, True), (1, 0, True), (8, 1, True), (6, 0, False),
                                                (4, 3, False)])
def test_batches_divide_or_are_refused(ranks, micro, fits):
    "64 on 6 ranks used to be 60."
    s = Schedule(batch_size=64, micro_batch=micro)
    if fits: assert s.micro_batches(ranks) * ranks * (micro or 64 // ranks) == 64
    else:
        with pytest.raises(ValueError, match="64 samples a step do not divide among"): s.micro_batches(ranks)
