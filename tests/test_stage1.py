"""Stage 1 from cached features does what it does live, goes on after a kill, and leaves out the losses that it is told
to."""
import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from elsewhere import elsewhere, reads, uploads
from logs import content
from test_resume import STEPS, finish, kill_in_training, start

from esam3.core import Part, seed_everything
from esam3.data.batches import ImageBatch, collate_images, load_recipe, some_instances
from esam3.data.toyfiles import toyworld
from esam3.models.prompts import refine
from esam3.models.student import EfficientSam3, build_student
from esam3.models.teacher import Sam3, load_teacher
from esam3.schedules import Schedule, Stage1Schedule
from esam3.training import runs, stage1
from esam3.training.loop import TRAINS, fit, parameter_groups
from esam3.training.losses import distill_loss, feature_errors, map_terms, task_terms
from esam3.training.stage1 import (
    CachedSteps, Stage1, image_source, keep_features, prompt_both, prompt_chances, run_stage1, sample_prompts,
    shared_out, stage1_schedule, warp_features)

SIDES = (144, 128)  # the toy's frames, px


@lru_cache
def networks() -> tuple[Sam3, EfficientSam3]:
    "The toy teacher and an untrained student."
    teacher = load_teacher("toy")
    torch.manual_seed(0)
    return teacher, build_student("es-ev-s", teacher)


@pytest.fixture(scope="module")
def batch():
    "Four images, live."
    return image_source(load_recipe("tiny"), Schedule(batch_size=4), SIDES, 42)[Part(0)]


def losses(batch, schedule: Stage1Schedule) -> dict[str, torch.Tensor]:
    "Losses of the untrained student; the chance is the batch's own."
    with torch.no_grad(): return Stage1(*networks(), schedule)(batch)


def by_hand(batch, schedule: Stage1Schedule) -> dict[str, torch.Tensor]:
    "The same, written down once more: eq. 3, eq. 4 and L_task with weights alone, no options."
    teacher, student = networks()
    with torch.no_grad():
        teacher_features, student_features = teacher.encode(batch.teacher_pixels), student.encode(batch.student_pixels)
        out = {"features": schedule.lambda1 * feature_errors((*student_features.detector, *student_features.tracker),
                                                             *warp_features(teacher_features, batch,
                                                                 student_features)).mean()}
        truth = batch.spaces.rasterise(batch.masks, "student", 4 * student.grid)
        valid = batch.spaces.valid("student", truth.shape[-1], batch.image_index)
        chance = prompt_chances(batch, schedule.refinements)
        for rows, prompts in sample_prompts(batch, chance[:, 0]):
            for round in range(schedule.refinements + 1):
                t, s = prompt_both(teacher, student, teacher_features, student_features, batch, prompts)
                terms = {"distill": schedule.lambda2 * distill_loss(s.masks, t.masks, valid[rows], schedule.temperature,
                    schedule.focal).mean()}
                for k, v in task_terms(s.masks, s.iou, s.object_logits, truth[rows], valid[rows],
                                       focal=schedule.focal).items():
                    terms[f"task {k}"] = v
                for k, v in terms.items(): out[k] = out.get(k, 0) + len(rows) / len(truth) * v
                if round < schedule.refinements:
                    prompts = refine(prompts, t.best()[0], s.best()[0], batch.spaces, chance=chance[rows, 1 + round])
    return out


OTHER = Stage1Schedule(lambda1=4.0, lambda2=0.5, refinements=2, temperature=1.0, focal=20.0)


@pytest.mark.parametrize("schedule", [Stage1Schedule(), OTHER, Stage1Schedule(checkpoint=1)],
                         ids=["default", "other weights", "recomputed"])
def test_default_losses_are_the_method_alone(batch, schedule):
    found, expected = losses(batch, schedule), by_hand(batch, schedule)
    assert list(found) == list(expected) == ["features", "distill", "task mask", "task iou", "task score"]
    for k in expected: torch.testing.assert_close(found[k], expected[k], rtol=1e-5, atol=1e-7, msg=k)


def gradients(schedule: Stage1Schedule, batch: ImageBatch, whole: dict
              | None = None) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    "Losses of a step or a part of it, and gradients, with the batch norms at rest."
    teacher, student = networks()
    student.zero_grad()
    terms = Stage1(teacher, student, schedule)(batch, whole)
    sum(terms.values()).backward()
    return {k: v.detach() for k, v in terms.items()}, {n: p.grad.clone() for n,
                                                       p in student.named_parameters() if p.grad is not None}


def nothing(grads: dict[str, torch.Tensor]) -> float:
    "What counts as no difference: some gradients are 0 but for rounding, such as a key's bias."
    return 1e-6 * max(float(g.abs().max()) for g in grads.values())


OPTIONS = {"default": {}, "two rounds": {"refinements": 2, "temperature": 1.0, "focal": 20.0,
                                         "map_weights": (3, 0, 1, 0, 0, 1)},
           "deepest": {"corrective": "deepest", "map_terms": ("attention", "relational"), "lambda2": 0.5}}


def part_of(batch: ImageBatch, recipe: Schedule, part: Part) -> ImageBatch:
    "The images that one part of step 0 draws."
    return image_source(load_recipe("tiny"), recipe, SIDES, 42)[part]


@pytest.mark.parametrize("case", OPTIONS)
def test_parts_add_up_to_the_step(batch, case):
    "A step of four images as one, two and four parts: the same prompts, losses and gradients."
    schedule = Stage1Schedule(batch_size=4, **OPTIONS[case])
    task = Stage1(*networks(), schedule)
    whole, (losses, grads) = task.counts(batch), gradients(schedule, batch)
    assert whole == {"images": 4, "instances": len(batch.image_index)}
    for count in (2, 4):
        parts = [part_of(batch, schedule, Part(0, k, count)) for k in range(count)]
        assert len({len(p.image_index)
                    for p in parts}) > 1, "parts of unequal numbers of instances: a mean of means would be another"
        assert {k: sum(task.counts(p)[k] for p in parts) for k in whole} == whole
        found = [gradients(schedule, p, whole) for p in parts]
        for k, v in losses.items():
            torch.testing.assert_close(sum(f[0][k] for f in found), v, rtol=1e-5, atol=1e-7, msg=k)
        for n, g in grads.items():
            torch.testing.assert_close(sum(f[1][n] for f in found if n in f[1]), g, rtol=1e-3, atol=nothing(grads),
                                       msg=n)


def test_whole_may_lie_on_the_device(batch):
    task = Stage1(*networks(), Stage1Schedule())
    with torch.no_grad():
        said, told = task(batch, task.counts(batch)), task(batch,
                                                           {k: torch.tensor(float(v)) for k,
                                                            v in task.counts(batch).items()})
    for k in said: torch.testing.assert_close(said[k], told[k])


def test_chance_is_the_images_own(batch):
    "An image is asked the same whoever is beside it, and whatever was drawn before; images without seeds are numbered."
    seed_everything(1)
    first, drawn = sample_prompts(batch, prompt_chances(batch)[:, 0]), torch.get_rng_state()
    seed_everything(2)
    again = sample_prompts(batch, prompt_chances(batch)[:, 0])
    for (a, p), (b, q) in zip(first, again, strict=True): assert torch.equal(a, b) and torch.equal(p.points, q.points)
    losses(batch, Stage1Schedule())
    seed_everything(1)
    losses(batch, Stage1Schedule())
    assert torch.equal(torch.get_rng_state(), drawn), "nothing is drawn from the process's generator"
    bare = replace(batch, seeds=[])
    assert torch.equal(prompt_chances(bare, 2), prompt_chances(replace(batch, seeds=[0, 1, 2, 3]), 2))
    assert not torch.equal(prompt_chances(bare), prompt_chances(batch)) and losses(bare,
        Stage1Schedule()).keys() == losses(batch, Stage1Schedule()).keys()


def test_checkpointing_changes_nothing(batch):
    "Losses to the bit, gradients nearly; and a round keeps next to nothing."
    def kept(schedule: Stage1Schedule) -> int:
        "Bytes that the forward pass keeps for the backward pass, the encoder's and parameters apart."
        teacher, student = networks()
        with torch.no_grad():
            student_features, teacher_features = (student.encode(batch.student_pixels),
                                                  teacher.encode(batch.teacher_pixels))
        owned = {t.untyped_storage().data_ptr() for t in (*student.state_dict().values(), *student_features.tracker,
                                                          *student_features.detector)}
        saved: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice
        def pack(t: torch.Tensor) -> torch.Tensor:
            return saved.setdefault(t.untyped_storage().data_ptr(), t.untyped_storage()) and t
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            terms = stage1.prompt_losses(teacher, student, teacher_features, student_features, batch, schedule)
        assert terms
        return sum(storage.nbytes() for at, storage in saved.items() if at not in owned)
    plain, again = Stage1Schedule(refinements=2, checkpoint=0), Stage1Schedule(refinements=2, checkpoint=1)
    (a, ga), (b, gb) = gradients(plain, batch), gradients(again, batch)
    assert a.keys() == b.keys() and all(torch.allclose(a[k], b[k], rtol=1e-6, atol=0)
                                        for k in a) and ga.keys() == gb.keys()
    for n in ga: torch.testing.assert_close(ga[n], gb[n], rtol=1e-3, atol=nothing(ga), msg=n)
    assert kept(again) < 0.1 * kept(plain)


@pytest.mark.parametrize("case", OPTIONS)
def test_no_host_reads(batch, case):
    "Neither forward nor backward waits for the device; with sizes of images, instances and prompts of all kinds."
    teacher, student = load_teacher("toy"), build_student("es-ev-s", networks()[0])
    with elsewhere() as device:
        task = Stage1(teacher.to(device), student.to(device), Stage1Schedule(checkpoint=1, **OPTIONS[case]))
        whole = task.counts(batch)
        with reads() as found, uploads() as copied: sum(task(batch, whole).values()).backward()
        assert not found + copied, "\n".join(found + copied)


def test_unmarked_instances_share_their_image(batch):
    """What the teacher finds does not change what losses are divided by, and the image counts as one whatever is found
    in it: losses keep their size."""
    bare = some_instances(batch, torch.zeros(0, dtype=torch.long))
    task = Stage1(*networks(), Stage1Schedule(), sampled=5)
    assert task.counts(bare) == {"images": 4,
                                 "instances": 4} and task.counts(batch)["instances"] == len(batch.image_index)
    with torch.no_grad():
        few, many = task(bare), task(bare, {"images": 4, "instances": 8})
        found = task.settle(bare, task.look(bare))
        marked = Stage1(task.teacher, task.student, Stage1Schedule())(found)
    assert torch.allclose(few["distill"], 2 * many["distill"])
    assert len({len(m) for m in found.masks}) > 1 and few["distill"] == pytest.approx(float(marked["distill"]),
        rel=0.5), "a mean over images, not over instances"
    weights = shared_out(found.masks, torch.device("cpu"))
    assert torch.allclose(torch.stack([w.sum() for w in weights.split([len(m) for m in found.masks])]), torch.ones(4))


def test_nothing_to_ask_teaches_nothing(batch):
    "And all that is trained has a gradient, as other ranks have one."
    task = Stage1(*networks(), Stage1Schedule(lambda1=0.0))
    parameter_groups(task.student, TRAINS[1], 1e-3)
    task.student.zero_grad()
    terms = task(some_instances(batch, torch.zeros(0, dtype=torch.long)), {"images": 8, "instances": 31})
    sum(terms.values()).backward()
    assert sum(terms.values()) == 0 and all(p.grad is not None and not p.grad.any() for p in task.student.parameters()
                                            if p.requires_grad)


TASK = {"task mask", "task iou", "task score"}
SWITCHES = {  # options → the losses that are left
    "features off": ({"lambda1": 0.0}, {"distill"} | TASK), "masks off": ({"lambda2": 0.0}, {"features"} | TASK),
    "task off": ({"task": 0.0}, {"features", "distill"}),
    "features only": ({"lambda2": 0.0, "task": 0.0}, {"features"}),
    "more": ({"map_terms": ["relational", "contrastive"]}, {"features", "distill", "relational", "contrastive"} | TASK),
}


@pytest.mark.parametrize("case", SWITCHES)
def test_switches_take_losses_away_and_add_them(batch, case):
    options, names = SWITCHES[case]
    found, whole = losses(batch, replace(Stage1Schedule(), **options)), losses(batch, Stage1Schedule())
    assert found.keys() == names
    for k in found.keys() & whole.keys(): assert torch.equal(found[k], whole[k]), f"{k} is what it is with all losses"


def test_weights_and_ways(batch):
    "Every other option changes what it should, and nothing else."
    whole = losses(batch, Stage1Schedule())
    changed = lambda **options: {k for k, v in losses(batch, Stage1Schedule(**options)).items() if not torch.equal(v,
        whole[k])}
    assert changed(temperature=2.0) == {"distill"} and changed(map_weights=(1, 0, 0, 0, 0, 0)) == {"features"}
    assert changed(map_weights=(1 / 6,) * 6) <= {"features"} and torch.allclose(losses(batch,
        Stage1Schedule(map_weights=(1 / 6,) * 6))["features"], whole["features"])
    assert changed(corrective="deepest") == {"distill"} | TASK and changed(lambda_maps=3.0) == set()
    half = losses(batch, Stage1Schedule(task=0.5))
    for k in TASK: assert torch.allclose(half[k], whole[k] / 2)
    teacher, student = networks()
    with torch.no_grad():
        teacher_features, student_features = teacher.encode(batch.teacher_pixels), student.encode(batch.student_pixels)
    attention = map_terms(["attention"], (*student_features.detector, *student_features.tracker),
                          *warp_features(teacher_features, batch, student_features))["attention"]
    found = losses(batch, Stage1Schedule(map_terms=("attention",), lambda_maps=3.0))
    assert torch.equal(found["attention"], 3 * attention)


WRONG = {"lamda1": ({"lamda1": 0.0}, "unknown field of the schedule 'lamda1': did you mean 'lambda1'?"),
         "map term": ({"map_terms": ["relation"]},
                      "unknown feature loss 'relation': did you mean 'relational'?.*attention, contrastive"),
         "corrective": ({"corrective": "deep"}, "did you mean 'deepest'?"),
         "map weights": ({"map_weights": [1, 2]}, "six numbers, one for each map, not 2"),
         "all off": ({"lambda1": 0.0, "lambda2": 0.0, "task": 0.0}, "nothing to learn from")}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options_are_refused(case, tmp_path):
    options, words = WRONG[case]
    with pytest.raises(ValueError, match=words): run_stage1("es-ev-s", "tiny", options=options, runs=str(tmp_path))
    assert not list(tmp_path.iterdir()), "nothing was begun"


def test_unknown_cache_is_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown cache 'int4': .*valid: int8, fp16"):
        run_stage1("es-ev-s", "tiny", cache="int4", runs=str(tmp_path))
    with pytest.raises(ValueError, match="at least 1 replay"):
        run_stage1("es-ev-s", "tiny", cache="int8", replays=0, runs=str(tmp_path))
    assert not list(tmp_path.iterdir()), "nothing was begun"


@pytest.mark.parametrize("given, recipe, used", [("", "tiny", ""), ("", "sa1b", "imagenet"), ("random", "sa1b", ""),
                                                 ("imagenet", "tiny", "imagenet")])
def test_where_the_backbone_starts(given, recipe, used, tmp_path, monkeypatch):
    "The recipe says, unless the call does."
    class Built(Exception): pass
    def build(*_, weights, **__): raise Built(weights)
    monkeypatch.setattr(stage1, "build_student", build)
    monkeypatch.setattr(runs, "open_folder", lambda *_, **__: (tmp_path, {}))  # without the data
    with pytest.raises(Built) as e:
        run_stage1("es-ev-s", recipe, teacher="toy", steps=1, weights=given, runs=str(tmp_path))
    assert e.value.args == (used,)


def live_source(images, kept, seed: int, size: int):
    "What `CachedSteps` draws, seen by the teacher itself."
    class Live(CachedSteps):
        def collated(self, samples, rngs, rng):
            batch, cached = collate_images(samples, *SIDES, self.most, rngs), super().collated(samples, rngs, rng)
            assert all(torch.equal(a, b) for a, b in zip(batch.masks, cached.masks)), "the same replays"
            return batch
    return Live(load_recipe("tiny"), Schedule(batch_size=size), images, kept, SIDES, seed)


@pytest.fixture(scope="module")
def cached_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    "A run's folder, from features that it kept in the other one; with a full-width neck."
    place, kept = tmp_path_factory.mktemp("cached"), tmp_path_factory.mktemp("features")
    with pytest.MonkeyPatch.context() as m:
        m.setattr(stage1, "cache_dir", lambda: kept)
        return run_stage1("es-ev-s", "tiny", cache="fp16", replays=2, widths=[128] * 3, runs=str(place)), kept


def test_cached_run_says_what_it_was(cached_run):
    folder, kept = cached_run
    report = json.loads((folder / "report.json").read_text())
    assert (report["settings"]["cache"], report["settings"]["replays"], report["settings"]["widths"]) == ("fp16", 2,
        [128] * 3)
    assert report["timing"]["cache_written"] > 0 and report["timing"]["cache_waited"] > 0
    assert [p.name[:19] for p in kept.iterdir()] == ["features-tiny-fp16-"]
    assert EfficientSam3.from_pretrained(folder / "student").config.widths == [128] * 3
    with pytest.raises(ValueError, match="cache: 'fp16' there, '' now; replays: 2 there, 0 now"):
        run_stage1("es-ev-s", "tiny", widths=[128] * 3, runs=str(folder.parents[2]))


def test_cached_run_is_a_live_run(cached_run, tmp_path, monkeypatch):
    """The same replays, seen live: nearly the same losses, step by step (mixed precision rounds as a batch falls).
    Features of other images: other losses."""
    folder, kept = cached_run
    monkeypatch.setattr(stage1, "cache_dir", lambda: kept)
    teacher, schedule = load_teacher("toy"), stage1_schedule(load_recipe("tiny"))
    images, cache, _ = keep_features(load_recipe("tiny"), teacher, "fp16", 2)
    torch.manual_seed(42)
    student = build_student("es-ev-s", teacher, widths=[128] * 3)
    source = live_source(images, cache, 42, 4)
    fit(Stage1(teacher, student, schedule), source, parameter_groups(student, TRAINS[1], schedule.lr,
        schedule.inherited), schedule, tmp_path)
    cached, live = ([json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
                    for place in (folder, tmp_path))
    for a, b in zip(cached, live, strict=True):
        assert a["features"] == pytest.approx(b["features"], rel=2e-3) and a["distill"] == pytest.approx(b["distill"],
            rel=0.03) and a["loss"] == pytest.approx(b["loss"], rel=0.03)
    batch = CachedSteps(load_recipe("tiny"), schedule, images, cache, SIDES, 42)[Part(0)]
    right, exchanged, seen = (float(losses(b, schedule)["distill"])
                              for b in (batch, replace(batch, trunk=batch.trunk.pick([1, 2, 3, 0])), source[Part(0)]))
    assert right == pytest.approx(seen, rel=0.02) and exchanged != pytest.approx(seen, rel=0.05)


def test_killed_cached_run_continues(tmp_path, monkeypatch):
    "Each run has a cache folder of its own, with the toy world's images in it."
    run, world = {name: tmp_path / name for name in ("whole", "cut")}, toyworld("tiny")
    def begin(name: str):
        (run[name] / "cache").mkdir(parents=True, exist_ok=True)
        if not (run[name] / "cache" / world.name).exists(): (run[name] / "cache" / world.name).symlink_to(world)
        monkeypatch.setenv("ESAM3_CACHE", str(run[name] / "cache"))
        return start(1, 1, cache="int8", replays=2, runs=str(run[name]))
    folder = {name: place / "tiny" / "es-ev-s" / "stage1" for name, place in run.items()}
    whole = begin("whole")
    kill_in_training(begin("cut"), folder["cut"] / "state" / "last.pt")
    printed = finish(begin("cut"))
    assert "rank 0: 0 of 48 images to write" in printed and "features to write" not in printed, ("what is there is not "
        "written again")
    assert "features to write: 48 images of 0.0172 MB" in finish(whole)
    reports = {name: json.loads((place / "report.json").read_text()) for name, place in folder.items()}
    assert (0 < reports["cut"].pop("timing")["steps"] < STEPS == reports["whole"].pop("timing")["steps"]
            and reports["cut"] == reports["whole"])
    for name in ("metrics.jsonl", "student/model.safetensors"):
        assert content(folder["cut"] / name) == content(folder["whole"] / name), name
