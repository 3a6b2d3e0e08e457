"""A run from outside: what it saves and when, what it accepts, what it reports; and that the saved student is the one
that was trained."""
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

from esam3.data.batches import RECIPES, load_recipe, open_dataset
from esam3.data.readers import SaV
from esam3.data.toyfiles import toyworld
from esam3.evaluation import evaluate
from esam3.evaluation.evaluate import limits_of, run_scores
from esam3.evaluation.protocols import clip_scores
from esam3.models import backbones
from esam3.models.student import EfficientSam3
from esam3.models.teacher import load_teacher
from esam3.training import stage1, stage2
from esam3.training.runs import digests
from esam3.training.stage1 import run_stage1
from esam3.training.stage2 import run_stage2

FEW = {"eval_images": 4, "eval_instances": 2}
FEW_CLIPS = {"eval_clips": 1, "eval_frames": 4, "warmup_steps": 0}


def report(folder: Path) -> dict: return json.loads((folder / "report.json").read_text())


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> Path:
    "A stage-1 run of a few steps."
    return run_stage1("es-ev-s", "tiny", runs=str(tmp_path_factory.mktemp("first")), **FEW)


@pytest.fixture(scope="module")
def second(first, tmp_path_factory) -> Path:
    "Stage 2 after it."
    return run_stage2("es-ev-s", "tiny", student=str(first / "student"), runs=str(tmp_path_factory.mktemp("second")),
                      **FEW_CLIPS)


# ---- row 5: the student first; an evaluation that is bounded, resumable, and can be made up

def test_a_crash_in_the_evaluation_leaves_the_student(tmp_path, monkeypatch):
    """The next stage takes it; the same command makes the evaluation up without a step of training, and skips what was
    scored before the crash."""
    broken, whole = tmp_path / "broken", evaluate.score
    def crash(task, name, limit=0):
        if task.model.space == "student" and name == "point+1": raise RuntimeError("the machine went away")
        return whole(task, name, limit)
    monkeypatch.setattr(evaluate, "score", crash)
    with pytest.raises(RuntimeError, match="the machine went away"):
        run_stage1("es-ev-s", "tiny", runs=str(broken), **FEW)
    folder = broken / "tiny" / "es-ev-s" / "stage1"
    assert (folder / "student" / "model.safetensors").exists() and not (folder / "report.json").exists()
    monkeypatch.setattr(evaluate, "score", whole)
    after = run_stage2("es-ev-s", "tiny", runs=str(broken), steps=1, **FEW_CLIPS)
    assert report(after)["stage"] == 2 and not (folder
                                                / "report.json").exists(), ("stage 2 asks for a student, not for its "
                                                    "figures")
    monkeypatch.setattr(stage1, "fit", lambda *_, **__: pytest.fail("it trained again"))
    answered, asked = [], evaluate.PREDICT["images"]
    monkeypatch.setitem(evaluate.PREDICT, "images", lambda *a: answered.append(a) or asked(*a))
    made_up = report(run_stage1("es-ev-s", "tiny", runs=str(broken), **FEW))
    assert made_up["timing"]["steps"] == 3 and not answered, "predictions that were there are not made again"
    monkeypatch.undo()
    left_alone = report(run_stage1("es-ev-s", "tiny", runs=str(tmp_path / "whole"), **FEW))
    assert {k: v for k, v in made_up.items() if k != "timing"} == {k: v for k, v in left_alone.items() if k != "timing"}


def test_an_evaluation_is_bounded(first, second):
    "By parameters, by the recipe, and on real data by itself."
    assert report(first)["data"]["held_out"] == {"images": 4} and report(first)["evaluation"]["instances"] == 2
    assert set(report(first)["student"]["by_count"]) == {"1", "2"}, "at most two of an image"
    assert report(second)["data"]["held_out"] == {"clips": 1}
    usual = limits_of(load_recipe("sa1b"))
    assert (usual.images, usual.instances, usual.clips, usual.frames) == (500, 16, 50, 60)
    assert limits_of(load_recipe("toy")) == limits_of(load_recipe("toy"),
                                                      images=0) and limits_of(
                                                          load_recipe("toy")).clips == 0, ("the frozen evaluation is "
                                                              "whole")
    assert limits_of(load_recipe("sa1b"), images=7).images == 7


# ---- row 3: clips of any length, one by one, in a bounded memory

def test_clips_of_different_lengths_are_scored(tmp_path, monkeypatch):
    "SA-V's clips have 12, 14, 16 frames; no two here are of one length."
    from esam3.data.miniatures import miniatures
    reader = SaV(miniatures() / "sav" / "sav_train" / "sav_000")
    assert len({len(reader.read(i).frames) for i in range(3)}) == 3
    teacher = load_teacher("toy")
    told = clip_scores(teacher, reader, (), count=2)["track"]
    assert 0 <= told["J"] <= 1
    recipe = {"name": "x", "splits": {"held_out": {"clips": {"format": "sav", "path": "."}}},
              "root": str(miniatures() / "sav" / "sav_train" / "sav_000")}
    lengths, follow = [], evaluate.follow
    monkeypatch.setattr(evaluate, "follow", lambda model, sample,
                        *rest: lengths.append(len(sample.frames)) or follow(model, sample, *rest))
    found = run_scores(teacher, {**load_recipe("tiny"), **recipe}, tmp_path, {"clips": ("visible",)},
                       limits_of(recipe, clips=3, frames=5))
    assert sorted(lengths) == [3, 5, 5], "whole where they are shorter"
    assert found["samples"] == {"clips": 3} and found["skipped"] == {"clips": 0}


def test_long_clips_do_not_fill_the_memory():
    "What the tracker keeps of a clip stops growing."
    from esam3.evaluation.heldout import opening
    from esam3.models.tracker import as_batch
    from esam3.data.samples import ImageSample
    from esam3.models.tracker import Follower
    model, clip = load_teacher("toy"), open_dataset("tiny", "held_out", "clips").read(0)
    follower, kept = Follower(model), []
    with torch.no_grad():
        for t in range(24):
            batch = as_batch(model, [ImageSample("x", clip.frames[t % 8], clip.masks[:1, 0])])
            follower.step(model.encode(batch.teacher_pixels), None if t else opening(model, batch, "mask"))
            kept.append(len(follower.history.tracked) + len(follower.history.prompted))
    assert max(kept) == kept[-1] == kept[16]


# ---- row 10: what a backbone started from

def test_imagenet_weights_are_had_or_refused(tmp_path, monkeypatch):
    def offline(*_, **__): raise ConnectionError
    monkeypatch.setattr(backbones, "get_session", offline)
    monkeypatch.setattr(backbones, "try_to_load_from_cache", offline)
    with pytest.raises(OSError, match="no ImageNet weights for efficientvit_b0 .* -p weights random"):
        run_stage1("es-ev-s", "tiny", weights="imagenet", runs=str(tmp_path))
    assert not list(tmp_path.rglob("student"))


def test_a_report_says_what_was_loaded(first, second):
    told = report(first)["started_from"]
    assert told.startswith("random, ") and report(second)["started_from"] == told, "the student carries it"


# ---- row 11, in a run: unreadable samples

def test_unreadable_data_end_the_run(tmp_path):
    "Half of the images are no images: nothing is trained on without a word."
    data = tmp_path / "data"
    shutil.copytree(toyworld("tiny"), data)
    tar = (data / "images.tar").read_bytes()
    (data / "images.tar").write_bytes(tar.replace(b"\xff\xd8\xff\xe0", b"\x00\x00\x00\x00", tar.count(
        b"\xff\xd8\xff\xe0") // 2))
    recipe = yaml.safe_load((RECIPES / "tiny.yaml").read_text()) | {"name": "half", "root": str(data)}
    del recipe["splits"]["held_out"]
    (tmp_path / "half.yaml").write_text(yaml.safe_dump(recipe))
    from esam3.data.samples import BadSample
    with pytest.raises(BadSample, match="samples could not be read, more than 1%"):
        run_stage1("es-ev-s", str(tmp_path / "half.yaml"), steps=40, runs=str(tmp_path / "runs"))
    folder = run_stage1("es-ev-s", str(tmp_path / "half.yaml"), steps=3, runs=str(tmp_path / "more"),
                        sampling="bad: 0.9")
    listed = [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]
    assert report(folder)["data"]["samples"]["counts"]["skipped"] == len(listed) > 0 and ".jpg" in listed[0]["detail"]


# ---- row 13: data that moved

def test_a_moved_data_folder_is_the_same_run(tmp_path):
    "Other annotations are another; the message says what differs."
    recipe = yaml.safe_load((RECIPES / "tiny.yaml").read_text())
    del recipe["splits"]["held_out"]
    for name in ("a", "b"):
        shutil.copytree(toyworld("tiny"), tmp_path / name)
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe | {"name": "mine", "root": str(tmp_path / name)}))
    folder = run_stage1("es-ev-s", str(tmp_path / "a.yaml"), steps=1, runs=str(tmp_path / "runs"))
    shutil.rmtree(tmp_path / "a")
    assert run_stage1("es-ev-s", str(tmp_path / "b.yaml"), steps=1,
                      runs=str(tmp_path / "runs")) == folder, "found again elsewhere"
    assert str(tmp_path) not in (folder / "settings.json").read_text()
    tar = tmp_path / "b" / "images.tar"
    tar.rename(tmp_path / "whole.tar")
    import tarfile
    with tarfile.open(tmp_path / "whole.tar") as old, tarfile.open(tar, "w") as new:
        for m in old.getmembers()[2:]: new.addfile(m, old.extractfile(m))
    with pytest.raises(ValueError, match="data.train.images: '.*' there, '.*' now"):
        run_stage1("es-ev-s", str(tmp_path / "b.yaml"), steps=1, runs=str(tmp_path / "runs"))


def test_a_run_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    "A batch that ranks do not divide."
    from esam3.training import runs

    class Six: num_processes, process_index, is_main_process = 6, 0, True
    monkeypatch.setattr(runs, "ranks", Six)
    with pytest.raises(ValueError, match="64 samples a step do not divide among 6 ranks: take 60 or 66"):
        run_stage1("es-ev-s", "tiny", batch_size=64, runs=str(tmp_path))
    assert not list(tmp_path.iterdir()) and digests({"splits": {}}, {"train": ["images"]}) == {"train": {}}


# ---- §4: what leaves a stage

LOADED = """
import sys, torch
torch.set_num_threads(1)
from safetensors.torch import save_file
from esam3.data.batches import open_dataset
from esam3.evaluation.heldout import opening
from esam3.models.tracker import as_batch, look
from esam3.models.student import EfficientSam3
model = EfficientSam3.from_pretrained(sys.argv[1]).eval()
batch = as_batch(model, [open_dataset("tiny", "held_out", "images").read(0)])
with torch.no_grad():
    seen = look(model, batch)
    out = model.decode(seen, opening(model, batch, "box"))
    memory = model.remember(seen, batch.image_index, out.masks[:, 0], out.object_logits, out.pointers[:, 0])
found = {"coarse": seen.tracker[2], "masks": out.masks, "tokens": memory.tokens}
save_file({k: t.contiguous() for k, t in found.items()}, sys.argv[2])
"""


@pytest.mark.parametrize("stage", [1, 2])
def test_a_fresh_process_gives_the_same_answers(stage, first, second, tmp_path):
    "Bit for bit, and as the weights at the end of training do: the average, where there is one."
    folder = {1: first, 2: second}[stage]
    fresh = subprocess.Popen([sys.executable, "-c", LOADED, str(folder / "student"), str(tmp_path / "fresh")])
    threads, argv = torch.get_num_threads(), sys.argv
    try:
        sys.argv = ["", str(folder / "student"), str(tmp_path / "here")]
        exec(LOADED, {})
    finally: torch.set_num_threads(threads); sys.argv = argv
    assert fresh.wait(timeout=240) == 0
    said = [load_file(tmp_path / name) for name in ("fresh", "here")]
    assert said[0].keys() == said[1].keys() and all(torch.equal(said[0][k], said[1][k]) for k in said[0])
    last = torch.load(folder / "state" / "last.pt", weights_only=True)
    saved, trained = load_file(folder / "student" / "model.safetensors"), last["average"] or last["task"]
    named = {k.removeprefix("student."): v for k, v in trained.items() if k.startswith("student.")}
    doubled = {k.replace("tracker_model.tracker_model.", "tracker_model."): v for k, v in saved.items()}
    found = {k: doubled[k] for k in named if k in doubled}
    assert len(found) > 50 and all(torch.equal(found[k], named[k].to(found[k].dtype)) for k in found)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_student_is_as_large_as_its_parameters(stage, first, second):
    place = {1: first, 2: second}[stage] / "student"
    size, parameters = (place / "model.safetensors").stat().st_size, sum(4 * p.numel()
        for p in EfficientSam3.from_pretrained(place).parameters())
    assert size <= 1.01 * parameters
    with safe_open(place / "model.safetensors", "pt") as f: assert len({*f.keys()}) == len([*f.keys()])


def test_stage2_leaves_the_encoder_as_it_was(first, second):
    "Weights and batch statistics, text and detector too: equal to the last bit; what is trained moved."
    before, after = (load_file(p / "student" / "model.safetensors") for p in (first, second))
    moved = {k for k in before.keys() & after.keys() if not torch.equal(before[k], after[k])}
    assert not [k for k in moved if k.startswith("detector_model.")] and any("mask_decoder" in k for k in moved)
    assert any("running_mean" in k for k in before) and before.keys() <= after.keys()


@pytest.mark.parametrize("stage", [1, 2])
def test_the_reports_figures_are_those_of_the_evaluation(stage, first, second, tmp_path, monkeypatch):
    "The same protocol, samples and seed by 40_evaluate on the saved student: equal."
    monkeypatch.setattr(evaluate, "costs", lambda *_: {})
    folder = {1: first, 2: second}[stage]
    own, bounds = report(folder)["student"], {1: {"limit": 4, "instances": 2}, 2: {"limit": 1, "frames": 4}}[stage]
    rows = evaluate.evaluate(str(folder / "student"), "tiny", {1: "box, point, point+1", 2: "visible, copy"}[stage],
                             runs=str(tmp_path), **bounds)[1]
    told = {r["protocol"]: r["scores"] for r in rows if r["kind"] == {1: "images", 2: "clips"}[stage]}
    if stage == 1:
        assert [told[p]["mIoU"] for p in ("box", "point", "point+1")] == [own[k]
            for k in ("miou_box", "miou_point", "miou_point_refined")]
    else:
        assert {k: told["visible"].get(k) for k in ("J", "F", "J&F", "absent_acc")} == own
        assert report(folder)["controls"]["copy"]["J"] == told["copy"]["J"]


def test_whole_clips_are_not_cut_for_a_benchmark(tmp_path):
    with pytest.raises(ValueError, match="frames=4 cuts clips, and mask is scored by files of whole clips"):
        evaluate.evaluate("toy", "tiny", "mask", frames=4, runs=str(tmp_path))


# ---- half precision, in all stages

@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_runs_and_is_said(stage, first, second, tmp_path):
    from esam3.training.stage3 import run_stage3
    given = {"variant": "es-ev-s", "recipe": "tiny", "precision": "bf16", "steps": 2, "runs": str(tmp_path)}
    folder = {1: lambda: run_stage1(**given, **FEW), 2: lambda: run_stage2(student=str(first / "student"), **given,
        **FEW_CLIPS),
              3: lambda: run_stage3(student=str(second / "student"), **given, **FEW,
                                    **FEW_CLIPS | {"warmup_steps": 1})}[stage]()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert report(folder)["settings"]["precision"] == "bf16" and len(lines) == 2 and not any("not_finite" in line
        for line in lines)
    kept = torch.load(folder / "state" / "last.pt", weights_only=True)["task"]
    assert {t.dtype for t in kept.values() if t.is_floating_point()} == {torch.float32}, "weights stay what they are"
    if stage == 1:
        with pytest.raises(ValueError, match="precision: 'bf16' there, 'no' now"):
            run_stage1(**given | {"precision": "no"}, **FEW)


@pytest.mark.parametrize("call, given, words", [
    (run_stage2, {"memry": "dense"}, "unknown parameter 'memry': did you mean 'memory'"),
    (run_stage2, {"batch_sise": 2}, "did you mean 'batch_size'"),
    (run_stage1, {"student": "somewhere"}, "'student' is a parameter of stages 2 and 3, not of 1"),
    (run_stage1, {"variant": "es-ev-x"}, "did you mean 'es-ev-s'")])
def test_a_misspelt_parameter_is_refused(call, given, words, tmp_path):
    "It would train as if it had not been given."
    with pytest.raises(ValueError, match=words): call(**{"recipe": "tiny", "runs": str(tmp_path)} | given)
    assert not list(tmp_path.iterdir())


def test_stages_are_told_what_is_theirs(tmp_path):
    "A setting of another stage, and a word that is none, in a call."
    for run, options, words in ((run_stage1, {"encoder_lr": 1.0}, "setting of stage 3"),
                                (run_stage1, {"read_decay": "linear"}, "setting of stage 2"),
                                (run_stage2, {"thaw": ("detr",)}, "setting of stage 3")):
        with pytest.raises(ValueError, match=words): run("es-ev-s", "tiny", options=options, runs=str(tmp_path))
    assert not list(tmp_path.iterdir()) and stage2.WARMUP_BATCHES > 0
