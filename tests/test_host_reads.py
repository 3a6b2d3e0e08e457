"How often a training waits for the device, to read or to copy, counted by a device-labelled tensor."
import pytest

from elsewhere import elsewhere, reads, uploads
from esam3.data.batches import load_recipe
from esam3.models.student import build_student
from esam3.models.teacher import load_teacher
from esam3.schedules import schedule_for
from esam3.training.concepts import QuerySampling
from esam3.training.loop import TRAINS, fit, parameter_groups
from esam3.training.stage1 import Stage1, image_source
from esam3.training.stage2 import Stage2, clip_source, give_memory
from esam3.training.stage3 import MixedSteps, Stage3, stage3_groups, stage3_schedule

SIDES, RECIPE = (144, 128), load_recipe("tiny")
COMMON = {"batch_size": 2, "augment": True}  # images come never again, as on real data: nothing is kept


def stage1(steps: int) -> tuple:
    s = schedule_for(1, RECIPE, steps=steps, batch_size=2)
    teacher, student = load_teacher("toy"), build_student("es-ev-s", load_teacher("toy"))
    return s, image_source(RECIPE, s, SIDES, 7), lambda: (Stage1(teacher, student, s),
                                                          parameter_groups(student, TRAINS[1], 1e-4)), (teacher,
                                                              student)


def stage2(steps: int) -> tuple:
    s = schedule_for(2, RECIPE, {"back": 0.5}, steps=steps, **COMMON)
    teacher = load_teacher("toy")
    student = give_memory(build_student("es-ev-s", teacher), "perceiver", s)
    return s, clip_source(RECIPE, s, SIDES, 7), lambda: (Stage2(teacher, student, s),
                                                         parameter_groups(student, TRAINS[2], 1e-4)), (teacher, student)


def stage3(steps: int) -> tuple:
    recipe = {**RECIPE, "splits": {**RECIPE["splits"],
                                   "train": {**RECIPE["splits"]["train"],
                                             "concept_clips": RECIPE["splits"]["held_out"]["concept_clips"]}}}
    s = stage3_schedule(recipe, 1e-4, options={"clip_every": 1, "alternate": False, "back": 0.5}, steps=steps, **COMMON)
    teacher = load_teacher("toy")
    student = give_memory(build_student("es-ev-s", teacher), "perceiver", schedule_for(2, RECIPE))
    return s, MixedSteps(recipe, s, SIDES, 7, QuerySampling(4), teacher), lambda: (Stage3(teacher, student, s),
        stage3_groups(student, s)), (teacher, student)


def waited(make, steps: int, folder) -> tuple[list[str], list[str]]:
    "The host reads of a training of so many steps, its checkpoint among them, and its blocking copies to the device."
    schedule, source, begin, models = make(steps)
    for m in models: m.to("elsewhere")
    task, groups = begin()
    with reads() as found, uploads() as copied: fit(task, source, groups, schedule, folder, every=1000, workers=0)
    return found, copied


@pytest.mark.parametrize("make, most", [(stage1, 3), (stage2, 3), (stage3, 6)])
def test_steps_hardly_wait_for_the_device(make, most, tmp_path):
    "More steps in a run, more reads: so many for each. The host waits for no copy, but those of the library's models."
    with elsewhere():
        runs = {n: waited(make, n, tmp_path / str(n)) for n in (1, 3)}
    each = (len(runs[3][0]) - len(runs[1][0])) / 2
    print("host reads a step:", each)
    assert 1 <= each <= most, runs[3][0]
    ours = [place for _, copied in runs.values() for place in copied if ": modeling_" not in place]
    assert not ours, ours
