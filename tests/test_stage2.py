"""Stage 2 with every kind of memory, its weights and switches, tracks that hide, end or begin late, and video that
nobody has annotated."""
import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from elsewhere import elsewhere, reads, uploads

from esam3.core import seed_everything
from esam3.data.batches import ClipBatch, collate_clips, load_recipe, open_dataset
from esam3.data.readers import Videos
from esam3.data.samples import ClipSample
from esam3.data.toyfiles import toyworld
from esam3.models.perceiver import SpatialPerceiver, windows
from esam3.models.student import EfficientSam3, build_student
from esam3.models.teacher import Bank, Features, Sam3, load_teacher
from esam3.models.tracker import first_frame, look, see, track
from esam3.schedules import Stage2Schedule
from esam3.training import stage2, track_losses as module
from esam3.training.loop import TRAINS, parameter_groups, train_mode
from esam3.training.stage2 import Stage2, give_memory, run_stage2, stage2_schedule
from esam3.training.track_losses import SingleFrameWarmup, read_weight, track_losses
from esam3.training.tracks import propose, with_tracks

SIDES = (144, 128)  # the toy's frames, px
TINY = Stage2Schedule(steps=10, batch_size=2, global_latents=4, local_latents=4, lambda2=0.5)


@lru_cache
def networks() -> tuple[Sam3, EfficientSam3]:
    "The toy teacher and an untrained student with dense memory."
    teacher = load_teacher("toy")
    torch.manual_seed(0)
    return teacher, build_student("es-ev-s", teacher)


def task_of(memory: str = "perceiver", schedule: Stage2Schedule = TINY, sampled: int = 0) -> Stage2:
    "The task with a new student, always the same one, ready to be trained."
    teacher, dense = networks()
    torch.manual_seed(1)
    student = give_memory(dense, memory, schedule)
    parameter_groups(student, stage2.present(TRAINS[2], student), 1e-3)
    task = Stage2(teacher, student, schedule, sampled)
    train_mode(task)
    return task


def losses(task: torch.nn.Module, batch: ClipBatch) -> dict[str, torch.Tensor]:
    "Losses, always with the same chance."
    seed_everything(3)
    return task(batch)


@pytest.fixture(scope="module")
def batch() -> ClipBatch:
    "Two annotated clips of four frames."
    reader = open_dataset("tiny", "train", "clips")
    return collate_clips([reader.read(i, frames=4, start=0) for i in range(2)], *SIDES)


@pytest.fixture(scope="module")
def plain() -> ClipBatch:
    "Two clips without annotation."
    reader = Videos(toyworld("tiny") / "clip")
    return collate_clips([reader.read(i, frames=4, start=0) for i in range(2)], *SIDES)


KINDS = {"both": ("perceiver", (4, 4), 8), "global only": ("perceiver", (8, 0), 8),
         "local only": ("perceiver", (0, 8), 8), "pooling": ("pooling", (4, 4), 8),
         "K = 32": ("perceiver", (16, 16), 32), "dense": ("dense", (4, 4), 64)}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_memory_learn(batch, kind):
    "Each has as many tokens as it should, gives losses, and trains what there is to train."
    memory, (g, l), tokens = KINDS[kind]
    task = task_of(memory, replace(TINY, global_latents=g, local_latents=l))
    assert task.student.memory_xy().shape == (tokens, 2) and int(task.student.memory_xy().isnan().any(1).sum()) == (g
        if memory == "perceiver" else 0)
    sum(losses(task, batch).values()).backward()
    grads = {n: p.grad for n, p in task.student.named_parameters() if p.requires_grad}
    assert any(n.startswith("perceiver.") for n in grads) == (memory == "perceiver")
    assert all(g is None or g.isfinite().all() for g in grads.values())
    reader = task.student.tracker_model.memory_attention.layers[0].cross_attn_image.k_proj.weight.grad
    assert reader.abs().max() > 0 and all(g.abs().max() > 0 for n, g in grads.items() if n.endswith("latents.latents"))


@pytest.mark.parametrize("depth, heads, grid, size", [(1, 1, (2, 2), (8, 8)), (2, 2, (2, 4), (9, 9)),
                                                      (3, 4, (1, 8), (7, 5)), (2, 1, (4, 4), (12, 9)),
                                                      (1, 2, (2, 2), (1, 3))])
def test_perceiver_on_any_map(depth, heads, grid, size):
    """Shapes for any depth, heads, grid and size; and what a window's latent says is what it would say of its window
    alone, padding or not."""
    torch.manual_seed(0)
    count, (h, w) = grid[0] * grid[1], size
    x, pos = torch.randn(2, 64, h, w), torch.randn(1, 64, h, w)
    both = SpatialPerceiver(64, 3, count, depth, heads, grid=grid).eval()
    latents, at = both(x, pos)
    assert latents.shape == at.shape == (2, 3 + count, 64) and latents.isfinite().all() and len(both.layers) == depth
    alone = SpatialPerceiver(64, 0, count, depth, heads, grid=grid, communicate=False, local_pos=True).eval()
    cells, valid, _ = windows(h, w, grid)
    for k in (0, count - 1):
        ys, xs = (cells[k][valid[k]] // w).unique(), (cells[k][valid[k]] % w).unique()
        one = SpatialPerceiver(64, 0, 1, depth, heads, communicate=False, local_pos=True).eval()
        one.load_state_dict({**alone.state_dict(), "local_latents.latents": alone.local_latents.latents[k:k + 1]})
        assert torch.allclose(alone(x, pos)[0][:, k], one(x[..., ys, :][..., xs], pos[..., ys, :][..., xs])[0][:, 0],
                              atol=1e-5)


def test_defaults_are_the_method_alone(batch):
    "A task without options is the rollout, the teacher and the losses, written down once more."
    task, s = task_of(), TINY
    found = losses(task, batch)
    seed_everything(3)  # of the Perceiver's dropout
    drawn = torch.multinomial(torch.tensor(list(stage2.KINDS.values())), 1,
                              generator=torch.Generator().manual_seed(batch.seed))
    kind = list(stage2.KINDS)[int(drawn)]
    assert kind == task.kind(batch)
    ours = track(task.student, task.student_features(batch), batch.frame_index,
                 stage2.first_prompts(task.student, batch, kind))
    frames = range(int(kind == "mask"), 4)
    expected = track_losses(ours.sets, batch, frames, batch.coverage("student", 32), task.teach(batch, kind), s, 1.0)
    assert list(found) == list(expected) and all(torch.equal(found[k], expected[k]) for k in expected)


def test_read_out_counts_as_told_and_fades(batch):
    whole, twice, never, fading = (losses(task_of(schedule=replace(TINY, **o)), batch)
                                   for o in ({}, {"lambda_read": 2.0}, {"lambda_read": 0.0}, {"read_decay": "linear"}))
    assert torch.allclose(twice["distill read"], 2 * whole["distill read"]) and torch.equal(fading["distill read"],
        whole["distill read"]), "at step 0 it is whole"
    assert never.keys() == whole.keys() - {"distill read"} and all(torch.equal(never[k], whole[k])
        for k in never), "nothing else changes"
    task = task_of(schedule=replace(TINY, read_decay="cosine"))
    seen = []
    for task.step in (0, 5, 9): seen.append(losses(task, batch).get("distill read"))
    assert seen[0] > seen[1] > 0 and seen[2] is None, "gone at the last step"
    assert [round(read_weight(replace(TINY, lambda_read=2.0, read_decay="linear"), k), 3) for k in (0, 9, 30)] == [2.0,
        0.0, 0.0]


def test_warmup_without_read_out(batch):
    whole, never = (losses(SingleFrameWarmup(task_of(schedule=replace(TINY, lambda_read=w)), networks()[1]), batch)
                    for w in (1.0, 0.0))
    assert never.keys() == whole.keys() - {"read-out", "distill read"} and all(torch.equal(never[k],
        whole[k]) for k in never)


def gradients(batch: ClipBatch, **options) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    "Loss and gradients of one step in training mode, dropout included."
    task = task_of(schedule=replace(TINY, **options))
    loss = sum(losses(task, batch).values())
    loss.backward()
    return loss, {n: p.grad for n, p in task.student.named_parameters() if p.grad is not None}


def test_checkpointing_changes_nothing(batch):
    (loss, grads), (again, same) = gradients(batch), gradients(batch, checkpoint=1)
    assert torch.allclose(loss, again, rtol=1e-6, atol=0) and grads.keys() == same.keys()
    for n in grads:
        assert torch.allclose(grads[n], same[n], rtol=1e-3, atol=1e-5 * float(grads[n].abs().max()) + 1e-8), n


def test_gradients_end_at_the_truncation(batch):
    "The last frame's masks reach a memory only as far back as the last cut."
    task = task_of()
    seen = task.student_features(batch)
    def reached(**options) -> list[bool]:
        leaf = Features((), tuple(m.clone().requires_grad_() for m in seen.tracker))
        track(task.student.eval(), leaf, batch.frame_index, first_frame(task.student, batch)[0],
              **options).masks[:, -1].square().mean().backward()
        return [bool(leaf.tracker[2].grad[t].abs().max() > 0) for t in range(4)]
    assert reached() == [True] * 4 and reached(detach_every=2) == [False, False, True, True] and reached(detach_every=3,
        checkpoint=True) == [False, False, False, True]
    whole, cut = gradients(batch)[1], gradients(batch, detach_every=1)[1]
    remembering = lambda grads: {n for n in grads if n.startswith(("perceiver.", "tracker_model.memory_encoder."))}
    assert remembering(whole) and not remembering(cut), "cut at every frame, what writes memories learns nothing"


def test_hidden_and_ended_tracks_teach_their_absence_only(batch):
    """An instance that is hidden on frame 2 and gone from frame 3 on: masks there do not matter, and its score is to be
    low."""
    task = task_of()
    gone = replace(batch, masks=[m.clone() for m in batch.masks], visible=batch.visible.clone())
    gone.masks[0][0, 2:], gone.visible[0, 2:] = False, False
    seen, prompts = task.student_features(gone), first_frame(task.student, gone)[0]
    with torch.no_grad(): ours = track(task.student.eval(), seen, gone.frame_index, prompts)
    one = lambda t, logits: module.frame_losses(replace(ours.sets[t], masks=logits), t, gone,
                                                gone.coverage("student", 32), None, 0.0)
    assert task.counts(gone)["there"] == int(gone.visible[:, task.frames(gone)[0]:].sum())
    for t in (2, 3):
        noise = ours.sets[t].masks.clone(); noise[0] = torch.randn_like(noise[0])
        assert torch.equal(one(t, noise)["task mask"], one(t, ours.sets[t].masks)["task mask"])
    noise = ours.sets[1].masks.clone(); noise[0] = torch.randn_like(noise[0])
    assert not torch.equal(one(1, noise)["task mask"], one(1,
                                                           ours.sets[1].masks)["task mask"]), ("it counts while it is "
                                                               "there")
    scored = [float(module.frame_losses(replace(ours.sets[2],
                                                object_logits=torch.full_like(ours.sets[2].object_logits, s)), 2, gone,
                                        gone.coverage("student", 32), None, 0.0)["task score"]) for s in (-9.0, 9.0)]
    absent = float((~gone.visible[:, 2]).float().mean())
    assert absent > 0 and scored == pytest.approx([9 * (1 - absent), 9 * absent],
                                                  abs=0.01), ("the score is to be low where a track is absent, high "
                                                              "elsewhere")
    masks, scores = module.to_remember(None, gone, 32)
    assert scores[0].tolist() == [10, 10, -10, -10] and masks[0, 2].max() < 0


def samples(some: range) -> list[ClipSample]:
    "Annotated clips of four frames; the first track of the second one hides before frame 2."
    reader = open_dataset("tiny", "train", "clips")
    read = [reader.read(i, frames=4, start=0) for i in some]
    for k, sample in enumerate(read[1:2], 1):
        masks = np.array(sample.masks)
        masks[0, :2] = False
        read[k] = replace(sample, masks=masks)
    return read


def with_seed(clips: list[ClipSample], seed: int, **options) -> ClipBatch:
    "Clips of the step with a seed."
    return replace(collate_clips(clips, *SIDES, **options), seed=seed)


def of_kind(kind: str) -> int:
    "A seed of steps that ask with this kind of prompt."
    return next(s for s in range(100) if stage2.draw_kind(4, torch.Generator().manual_seed(s)) == kind)


def all_terms(task: torch.nn.Module, batch: ClipBatch, whole: dict
              | None = None) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    "Losses and gradients, dropout at rest."
    student = getattr(task, "stage", task).student.eval()
    student.zero_grad()
    terms = task(batch, whole)
    sum(terms.values()).backward()
    return {k: v.detach() for k, v in terms.items()}, {n: p.grad.clone() for n,
                                                       p in student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("late", ["drop", "keep"])
@pytest.mark.parametrize("kind", [*stage2.KINDS, "warmup"])
def test_parts_add_up_to_the_step(kind, late):
    """Three clips with different numbers of tracks as one batch, or in two parts: the same kind of prompt, the same
    losses and gradients."""
    stage = task_of(schedule=replace(TINY, temperature=1.0, focal=20.0))
    task = SingleFrameWarmup(stage, networks()[1]) if kind == "warmup" else stage
    clips, seed = samples(range(3)), of_kind("box" if kind == "warmup" else kind)
    clips[1] = replace(clips[1], annotated=clips[1].annotated & (np.arange(4) < 3),
                       masks=clips[1].masks & (np.arange(4) < 3)[:, None, None])
    batch = with_seed(clips, seed, late=late)
    assert batch.first.any() == (late == "keep")
    parts = [with_seed(some, seed, late=late) for some in (clips[:2], clips[2:])]
    whole = task.counts(batch)
    assert whole.keys() == {"there", "known", "pairs"} and whole["there"] < whole["known"] < whole["pairs"]
    assert {k: sum(task.counts(p)[k] for p in parts) for k in whole} == whole and len({len(p.first)
        for p in parts}) == 2
    (terms, grads), found = all_terms(task, batch), [all_terms(task, p, whole) for p in parts]
    assert terms["distill"] > 0 and ("read-out" in terms) == (kind == "warmup")
    for k, v in terms.items(): torch.testing.assert_close(sum(f[0][k] for f in found), v, rtol=1e-5, atol=1e-7, msg=k)
    top = max(float(g.abs().max()) for g in grads.values())
    for n, g in grads.items():
        torch.testing.assert_close(sum(f[1][n] for f in found), g, rtol=1e-3, atol=1e-6 * top, msg=n)


def test_counts_are_those_of_the_settled_batch():
    "Late tracks are counted in their own time, and what the data alone say is what the losses meet."
    for seed in (of_kind("mask"), of_kind("point")):
        batch = with_seed(samples(range(4)), seed, late="keep")
        task = task_of()
        counted, own = task.counts(batch), task.settle(batch)
        assert batch.first.any() and not own.first.any()
        assert counted == module.pair_counts(own,
                                        task.frames(batch)) and counted["pairs"] == len(own.first) * len(
                                            task.frames(batch))


def test_found_tracks_share_their_clip(plain):
    task = task_of(sampled=3)
    counts = task.counts(plain)
    assert counts == {"there": 0, "known": 0, "pairs": 2 * len(task.frames(plain))}
    once, half = losses(task, plain), (seed_everything(3), task(plain, {k: 2 * v for k, v in counts.items()}))[1]
    assert all(torch.allclose(v, 2 * half[k]) for k, v in once.items())


def test_a_teacher_that_is_wrong_teaches_less(batch):
    "What it is not trusted in lowers the sum; the count stays."
    task = task_of()
    with torch.no_grad():
        ours = track(task.student.eval(), task.student_features(batch), batch.frame_index,
                     first_frame(task.student, batch)[0])
    teacher_tracks = task.teach(batch, "mask")
    terms = lambda right: track_losses(ours.sets, batch, range(1, 4), None, replace(teacher_tracks, right=right), TINY,
                                       1.0)
    first, rest = teacher_tracks.right.clone(), teacher_tracks.right.clone()
    first[1:], rest[:1] = False, False
    whole, parts = terms(teacher_tracks.right), (terms(first), terms(rest))
    assert teacher_tracks.right.any() and whole.keys() == {"distill", "distill score", "distill read"}
    for k in whole: torch.testing.assert_close(parts[0][k] + parts[1][k], whole[k])


def test_kind_and_frames_are_the_steps(batch):
    "The seed of the step alone decides; kinds have their shares, and a clip of one frame is never asked by its mask."
    warmup = SingleFrameWarmup(task_of(), networks()[1])
    seeds = range(400)
    kinds = [stage2.draw_kind(4, torch.Generator().manual_seed(s)) for s in seeds]
    assert kinds == [stage2.draw_kind(4, torch.Generator().manual_seed(s)) for s in seeds]
    assert all(abs(kinds.count(k) / 400 - share) < 0.08 for k, share in stage2.KINDS.items())
    assert "mask" not in [stage2.draw_kind(1, torch.Generator().manual_seed(s)) for s in range(50)]
    drawn = {s: warmup.frames(replace(batch, seed=s)) for s in range(20)}
    assert all(sorted(f) == [1, 2, 3] for f in drawn.values()) and len({*map(tuple, drawn.values())}) > 1
    warmup.most = 1
    assert {warmup.frames(replace(batch, seed=s))[0] for s in range(20)} == {1, 2, 3}


def test_memory_is_forced_once(batch, monkeypatch):
    "Without augmentation by the names of clips, frames and tracks; with it, or without numbers, by what is seen."
    force_memory, made = module.force_memory, []
    monkeypatch.setattr(module, "force_memory", lambda *given: made.append(given) or force_memory(*given))
    mirrored = replace(batch, images=[np.flip(i, 1) for i in batch.images])
    for augment, times in ((False, 1), (True, 2)):
        warmup = SingleFrameWarmup(task_of(schedule=replace(TINY, augment=augment)), networks()[1])
        made.clear()
        for some in (batch, replace(batch, seed=5), mirrored): losses(warmup, some)
        assert len(made) == times
        losses(warmup, collate_clips(samples(range(2)), *SIDES, tracks=1))
        assert len(made) == times + 1, "other tracks of the same clips"


@pytest.mark.parametrize("kind", [*stage2.KINDS, "warmup"])
def test_no_host_reads(kind):
    "Neither forward nor backward waits for the device, late tracks included; a warm-up's book is made once."
    teacher, dense = load_teacher("toy"), build_student("es-ev-s", networks()[0])
    student = give_memory(dense, "perceiver", TINY)
    batch = with_seed(samples(range(2)), of_kind("box" if kind == "warmup" else kind), late="keep")
    assert batch.first.any()
    with elsewhere() as device:
        stage = Stage2(teacher.to(device), student.to(device).train(), replace(TINY, checkpoint=1, detach_every=2))
        task = SingleFrameWarmup(stage, dense.to(device)) if kind == "warmup" else stage
        whole = task.counts(batch)
        if kind == "warmup": task(batch, whole)
        with reads() as found, uploads() as copied: sum(task(batch, whole).values()).backward()
        assert not found + copied, "\n".join(found + copied)


def test_checkpointing_keeps_little(batch):
    "Under recomputation a frame keeps its answer and what the losses compare it with."
    def kept(**options) -> int:
        task, saved = task_of(schedule=replace(TINY, **options)), {}
        losses(task, batch)
        owned = {t.untyped_storage().data_ptr() for t in (*task.student.state_dict().values(),
                                                          *(m for v in (task.student_features.kept.items
                                                              if task.student_features.kept else {}).values()
                                                            for m in v))}
        def pack(t: torch.Tensor) -> torch.Tensor:
            return saved.setdefault(t.untyped_storage().data_ptr(), t.untyped_storage()) and t
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t): terms = losses(task, batch)
        assert terms
        return sum(storage.nbytes() for at, storage in saved.items() if at not in owned)
    assert kept(checkpoint=1) < 0.02 * kept()


@pytest.mark.parametrize("who", ["teacher", "student"])
def test_reading_begins_once_an_image(batch, who):
    "Begun for all images, for the features' few images, or for each object: the same maps; and each image's only once."
    model = networks()[0] if who == "teacher" else task_of().student.eval()
    with torch.no_grad():
        seen = look(model, batch)
        first, image_index = first_frame(model, batch)[0], batch.frame_index[:, 1]
        _, memory = see(model, seen, batch.frame_index[:, 0], first)
        bank = Bank([(0, memory)], [(1, memory.pointer)])
        begun, images = model.begin_reading(seen), image_index.unique()
        assert len(images) < len(image_index) < len(batch.images) and begun.started.shape[:2] == (len(batch.images),
            model.grid**2)
        each, all_ = model.recall(seen, image_index, bank), model.recall(begun, image_index, bank)
        few = model.recall(seen.pick(images), torch.searchsorted(images, image_index), bank)
    for other in (each, few): torch.testing.assert_close(other, all_, rtol=1e-5, atol=1e-5)
    assert model.begin_reading(begun) is begun and torch.equal(begun.pick(image_index).started,
                                                               begun.started[image_index])


def test_late_tracks_are_trained_in_their_own_time():
    reader = open_dataset("tiny", "train", "clips")
    samples = [reader.read(i) for i in range(4)]
    back = next((s, t) for s in samples for n in range(len(s.masks)) for t in range(1, 5) if not s.visible[n, t]
                and s.visible[n, t:].any())
    sample, t = back
    part = replace(sample, frames=sample.frames[t:], numbers=sample.numbers[t:], masks=sample.masks[:, t:],
                   annotated=sample.annotated[:, t:])
    late = collate_clips([part], *SIDES, late="keep")
    task = task_of()
    own = task.settle(late)
    assert late.first.any() and own.visible[:, 0].all() and not own.first.any()
    assert all(v.isfinite() for v in losses(task, late).values())
    dropped = collate_clips([part], *SIDES)
    assert len(dropped.first) == len(late.first) - late.late


def test_batch_without_tracks_teaches_nothing(batch):
    task = task_of()
    empty = with_tracks(batch, [m[:0, 0] for m in batch.masks])
    for warmup in (task, SingleFrameWarmup(task, networks()[1])):
        loss = sum(losses(warmup, empty).values())
        loss.backward()
        assert loss == 0


def test_teacher_finds_tracks_where_nobody_has(plain):
    task = task_of(sampled=3)
    settled = task.settle(plain)
    counts = [len(m) for m in settled.masks]
    assert all(1 <= n <= 3 for n in counts) and len(settled.first) == sum(counts) and not settled.annotated.any()
    terms = losses(task, plain)
    assert {"distill", "distill score", "distill read"} == set(terms) and all(v.isfinite() for v in terms.values())
    assert all(torch.equal(a, b) for a, b in zip(settled.masks,
                                                 task.settle(plain).masks)), "the same image, the same tracks"
    assert {"read-out", "distill", "distill score",
            "distill read"} == set(losses(SingleFrameWarmup(task, networks()[1]), plain))
    teacher = networks()[0]
    lone = with_tracks(plain, propose(teacher, look(teacher, plain), plain, 1))
    assert lone.frame_index[:, 0].tolist() == [0, 4] and torch.equal(lone.points.isnan(),
        torch.zeros(2, 2, dtype=torch.bool))


def test_plain_video_is_trained_on(tmp_path, stage1_student):
    "A recipe of nothing but mp4s: toy clips, whose annotation lies beside them and is not read."
    (tmp_path / "films.yaml").write_text(f"""root: {toyworld("tiny")}
teacher: toy
splits: {{train: {{clips: {{format: videos, path: clip}}}}}}
sampling: {{tracks: 2}}
stages: {{2: {{steps: 2, batch_size: 2, lr: 1.0e-3, warmup_steps: 2, global_latents: 4, local_latents: 4}}}}
""")
    folder = run_stage2("es-ev-s", str(tmp_path / "films.yaml"), student=str(stage1_student), runs=str(tmp_path),
                        options={"read_decay": "linear", "detach_every": 3, "checkpoint": True})
    report, lines = json.loads((folder / "report.json").read_text()), [json.loads(line)
        for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert report["student"] == report["teacher"] == {} and report["settings"]["schedule"]["detach_every"] == 3
    assert "distill read" in lines[0] and "distill read" not in lines[1] and not any(k.startswith("task")
        for line in lines for k in line)
    assert EfficientSam3.from_pretrained(folder / "student").config.memory == "perceiver"


def test_real_video_without_annotation(real_files):
    "Two videos of people and dogs. What a toy teacher sees there is of no use; that both trackers follow it, is."
    reader = Videos(real_files / "video")
    assert len(reader) >= 2
    videos = collate_clips([reader.read(i, np.random.default_rng(0), frames=4) for i in range(2)], *SIDES)
    task = task_of(sampled=2)
    terms = losses(task, videos)
    sum(terms.values()).backward()
    assert set(terms) == {"distill", "distill score", "distill read"} and all(v.isfinite() for v in terms.values())
    assert task.student.perceiver.global_latents.latents.grad.abs().max() > 0 and all(1 <= len(m) <= 2
        for m in task.settle(videos).masks)


WRONG = {"decay": ({"options": {"read_decay": "linaer"}}, "did you mean 'linear'"),
         "field": ({"options": {"lamda_read": 0.0}}, "did you mean 'lambda_read'"),
         "memory": ({"memory": "poling"}, "did you mean 'pooling'")}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options_are_refused(case, tmp_path):
    given, words = WRONG[case]
    with pytest.raises(ValueError, match=words): run_stage2("es-ev-s", "tiny", runs=str(tmp_path), **given)
    assert not list(tmp_path.iterdir()), "nothing was begun"


def test_unlabelled_needs_the_teacher(tmp_path):
    with pytest.raises(ValueError, match="lambda2 must not be 0"):
        task_of(schedule=replace(TINY, lambda2=0.0), sampled=2)
    (tmp_path / "odd.yaml").write_text("root: toyworld/tiny\nsplits: {train: {clips: {format: videos, path: "
                                       "clip}}}\nsampling: {late: kept}")
    with pytest.raises(ValueError, match="did you mean 'keep'"): load_recipe(tmp_path / "odd.yaml")
    assert stage2_schedule(load_recipe("tiny"), {"lambda_read": 0.0}, distill=False).lambda2 == 0


def test_videos_are_refused_in_a_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="no video and no folder of images"): Videos(Path(tmp_path))
