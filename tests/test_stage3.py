"Stage 3: its report, a run that is killed and continues, and concepts in video that are the library's."
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from esam3.core import Part
from logs import content

STEPS = 4
RUN = "import sys, json; from esam3.training.stage3 import run_stage3; run_stage3(**json.loads(sys.argv[1]))"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    "The tiny recipe without a held-out split: what is tested here is training, and an evaluation costs more than that."
    from esam3.data.batches import RECIPES
    text = (RECIPES / "tiny.yaml").read_text()
    start, end = text.index("  held_out:"), text.index("sampling:")
    path = tmp_path_factory.mktemp("recipe") / "unjudged.yaml"
    path.write_text(text[:start] + text[end:])
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    "A student with a Perceiver, untrained, saved."
    from esam3.training.stage2 import give_memory
    from esam3.models.student import build_student
    from esam3.models.teacher import load_teacher
    from esam3.schedules import Stage2Schedule
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base") / "student"
    give_memory(build_student("es-ev-s", load_teacher("toy")), "perceiver",
                Stage2Schedule(global_latents=4, local_latents=4)).save_pretrained(folder)
    return folder


def start(recipe: Path, base: Path, runs: Path, **more) -> subprocess.Popen:
    "A process that runs stage 3 with a checkpoint at every step."
    given = json.dumps({"variant": "es-ev-s", "recipe": str(recipe), "student": str(base), "runs": str(
        runs), "steps": STEPS, "every": 1, **more})
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", RUN, given], env=one_thread, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen) -> str:
    "Wait for a process that must end well; what it printed."
    printed = process.communicate(timeout=300)[0]
    assert process.returncode == 0, printed[-3000:]
    return printed


def test_killed_run_continues(recipe, base, tmp_path):
    folder = {name: tmp_path / name / "tiny" / "es-ev-s" / "stage3" for name in ("whole", "cut")}
    whole, cut = (start(recipe, base, tmp_path / name) for name in ("whole", "cut"))
    checkpoint, until = folder["cut"] / "state" / "last.pt", time.monotonic() + 240
    while not checkpoint.exists():
        assert cut.poll() is None and time.monotonic() < until, cut.communicate()[0][-3000:]
        time.sleep(0.01)
    os.kill(cut.pid, signal.SIGKILL)
    cut.communicate()
    assert not (folder["cut"] / "report.json").exists() and not (folder["cut"] / "student").exists()
    finish(start(recipe, base, tmp_path / "cut")); finish(whole)

    reports = {name: json.loads((path / "report.json").read_text()) for name, path in folder.items()}
    timing = {name: report.pop("timing") for name, report in reports.items()}
    assert reports["cut"] == reports["whole"] and 0 < timing["cut"]["steps"] < STEPS == timing["whole"]["steps"], (
        "the second call went on from a checkpoint")
    for name in ("metrics.jsonl", "warmup/metrics.jsonl", "student/model.safetensors"):
        assert content(folder["cut"] / name) == content(folder["whole"] / name), name
    assert set(reports["whole"]) >= {"stage", "variant", "recipe", "settings", "fingerprint", "params", "data",
                                     "teacher", "before", "student", "controls"}
    lines = [json.loads(line) for line in (folder["whole"] / "metrics.jsonl").read_text().splitlines()]
    assert {"task presence", "task score", "task mask", "distill read", "features", "prompt distill",
            "prompt task mask", "clip task mask"} <= set(lines[0]) and all(np.isfinite(r["loss"]) for r in lines)


def test_frozen_encoder_stays(recipe, base, tmp_path):
    "With encoder_lr=0 neither weights nor batch statistics of the encoder move, and what is trained does."
    finish(start(recipe, base, tmp_path, encoder_lr=0.0, steps=2))
    from safetensors.torch import load_file
    old, new = (load_file(p / "model.safetensors") for p in (base,
                                                             tmp_path / "tiny" / "es-ev-s" / "stage3" / "student"))
    moved = {k for k in new if not torch.equal(old[k], new[k])}
    assert not any(k.startswith(("detector_model.vision_encoder", "detector_model.text_")) for k in moved)
    assert {"detector_model.mask_decoder", "detector_model.dot_product_scoring",
            "tracker_model.mask_decoder"} <= {".".join(k.split(".")[:2]) for k in moved}


def test_prompt_terms_are_weighed(recipe, base):
    """Stage 1's prompt terms on the images: twice the weight, twice the loss; without them the other terms stay as they
    are. Their gradients reach the encoder and the mask decoder, and no memory."""
    from dataclasses import replace

    from esam3.training.concepts import QuerySampling
    from esam3.core import seed_everything
    from esam3.data.batches import load_recipe
    from esam3.training.stage3 import MixedSteps, Stage3, stage3_groups, stage3_schedule
    from esam3.models.student import EfficientSam3
    from esam3.models.teacher import load_teacher
    teacher, student = load_teacher("toy"), EfficientSam3.from_pretrained(base).eval()
    schedule = stage3_schedule(load_recipe(recipe), options={"clip_every": 0})
    batch = MixedSteps(load_recipe(recipe), schedule, (teacher.image_size, student.image_size), 0,
                       QuerySampling())[Part(0)]
    stage3_groups(student, schedule)
    def terms(weight: float) -> dict[str, torch.Tensor]:
        seed_everything(0)
        return Stage3(teacher, student, replace(schedule, lambda_prompts=weight))(batch)
    none, once, twice = (terms(w) for w in (0.0, 1.0, 2.0))
    prompts = {k for k in once if k.startswith("prompt ")}
    assert prompts >= {"prompt distill", "prompt task mask"} and none.keys() == once.keys() - prompts
    for k in none: torch.testing.assert_close(none[k], once[k])
    for k in prompts: torch.testing.assert_close(2 * once[k], twice[k])
    sum(once[k] for k in prompts).backward()
    reached = {".".join(n.split(".")[:2]) for n, p in student.named_parameters() if p.grad is not None
               and p.grad.abs().sum() > 0}
    assert {"detector_model.vision_encoder",
            "tracker_model.mask_decoder"} <= reached and not any(n.startswith("perceiver") for n in reached)


def test_missing_stage2_prints_the_command(tmp_path):
    from esam3.training.runs import earlier_student
    from esam3.training.stage2 import run_stage2
    with pytest.raises(FileNotFoundError, match=r"papermill nbs/20_stage2.ipynb .* -p variant es-tv-s -p recipe sav"):
        earlier_student(2, run_stage2, "es-tv-s", {"name": "sav", "after": "", "root": "/data/sav"}, "", str(tmp_path))


def test_scores_have_the_keys_of_the_report(tmp_path):
    "On a handful of images; the teacher finds what is there."
    from esam3.data.batches import load_recipe
    from esam3.evaluation.evaluate import limits_of, run_scores
    from esam3.training.runs import WANTED
    from esam3.models.teacher import load_teacher
    recipe = load_recipe("tiny")
    got = run_scores(load_teacher("toy"), recipe, tmp_path, {"concept_images": WANTED[3]["concept_images"]},
                     limits_of(recipe, images=8))
    assert set(got) == {"cgF1", "IL_MCC", "pmF1", "exemplar_pmF1", "samples",
                        "skipped"} and got["cgF1"] > 0.4 and got["samples"] == {"concept_images": 8}


def test_a_late_twin_and_a_removed_object_are_the_librarys():
    """Our session and the library's on the same weights: same identities and masks where objects begin at different
    times."""
    from transformers import Sam3VideoModel
    from transformers.models.sam3_video.modeling_sam3_video import Sam3VideoInferenceSession

    from esam3.models.concept_video import ConceptSession, post_processing
    from esam3.data.batches import load_recipe, open_dataset, teacher_pixels
    from esam3.models.teacher import ASSETS, load_strictly, load_teacher
    ours, theirs = load_teacher("toy"), load_strictly(Sam3VideoModel, ASSETS / "toy_teacher")
    clip = open_dataset(load_recipe("tiny"), "held_out", "concept_clips").read(0)
    phrase = next(p.text for p in clip.phrases if p.instances)
    left = clip.frames[:5].copy()
    left[:2, :, left.shape[2] // 2:] = 90  # half of the first two frames is hidden
    session = Sam3VideoInferenceSession(teacher_pixels(left, ours.image_size), *left[0].shape[:2], dtype=torch.float32)
    words = ours.concepts([phrase], torch.zeros(1, dtype=torch.long))
    k = session.add_prompt(phrase)
    session.prompt_input_ids[k], session.prompt_attention_masks[k] = words.input_ids, words.attention_mask
    with torch.no_grad(), post_processing(False):
        pairs = list(zip(theirs.propagate_in_video_iterator(session), ours.propagate_in_video_iterator(ConceptSession(
            ours, left, [phrase]))))
    assert any(a.object_ids for a, _ in pairs)
    for a, b in pairs:
        assert a.object_ids == b.object_ids and a.obj_id_to_mask.keys() == b.obj_id_to_mask.keys()
        for k, m in a.obj_id_to_mask.items(): assert (m.sigmoid() - b.obj_id_to_mask[k].sigmoid()).abs().max() < 1e-3
