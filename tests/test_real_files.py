"Teacher and student side by side on real files. A toy teacher knows nothing of them: what is tested is that every mask comes out finite and at the size of its image."
import numpy as np
import pytest
import torch

from esam3.data.batches import ClipBatch, collate_clips
from esam3.data.readers import Davis
from esam3.data.samples import ClipSample, Video
from esam3.models.student import build_student
from esam3.models.teacher import NO_OBJECT, load_teacher
from esam3.show.views import clip_strip
from esam3.training.stage2 import compare


@pytest.fixture(scope="module")
def models():
    "The toy teacher and an untrained student of it."
    teacher = load_teacher("toy")
    torch.manual_seed(0)
    return {"teacher": teacher, "student": build_student("es-ev-s", teacher, memory="perceiver")}


def compared(models, sample: ClipSample, kind: str, path) -> tuple[ClipBatch, dict[str, torch.Tensor]]:
    "Both trackers' logits [N, T, H, W] at the source's size, with an image of the first track written to `path`."
    batch = collate_clips([sample], models["teacher"].image_size, models["student"].image_size, late="keep")
    found = compare(models["teacher"], models["student"], batch, kind)
    length = len(sample.frames)
    masks = {who: torch.stack([batch.spaces.to_source(found[who][:, t], who, t) for t in range(length)], 1) for who in models}
    for who, of in masks.items():
        assert of.shape == (len(batch.ids), *sample.frames.shape[:3]) and of.isfinite().all(), who
    shown = {"truth": sample.masks[0], **{who: of[0].numpy() for who, of in masks.items()}}
    clip_strip(sample.frames, shown, {name: name for name in shown}).savefig(path)
    assert path.stat().st_size > 10_000
    return batch, masks


def test_a_box_in_a_home_video(models, real_files, tmp_path):
    "Six frames of a 960 × 540 video; a box around one child is given in the first."
    frames = Video(real_files / "video" / "bedroom.mp4").frames(range(0, 60, 10))
    masks = np.zeros((1, *frames.shape[:3]), bool)
    masks[0, 0, 120:430, 580:760] = True
    known = np.array([[True] + [False] * 5])
    batch, found = compared(models, ClipSample("bedroom", frames, masks, known, [1], list(range(0, 60, 10))), "box", tmp_path / "bedroom.png")
    assert batch.boxes[0, 0].tolist() == [580, 120, 760, 430] and frames.shape == (6, 540, 960, 3)


def test_sparse_masks_of_a_davis_clip(models, real_files, tmp_path):
    "Eight frames; object 2 appears in frame 5 with a mask that is a pixel narrower than its image, and is prompted there."
    sample = Davis(real_files / "davis").read(0, frames=8)
    assert sample.frames.shape == (8, 480, 854, 3) and sample.ids == [1, 2]
    assert any("853" in what for _, what in sample.notes), sample.notes
    batch, found = compared(models, sample, "mask", tmp_path / "judo.png")
    assert batch.first.tolist() == [0, 5]
    iou = lambda a, b: (a & b).sum() / (a | b).sum()
    for who, of in found.items():
        assert torch.allclose(of[1, :5], torch.tensor(NO_OBJECT)) and (of[1, 5] > NO_OBJECT + 1).any(), "nothing is said of a track before it begins"
        cells = batch.coverage(who, 4 * models[who].grid)[1, 5] - 0.5
        held = batch.spaces.to_source(cells[None], who, 5)[0] > 0  # what of the mask the model's cells can hold
        assert iou(of[1, 5] > 0, held) > 0.9 and iou(of[1, 5] > 0, torch.from_numpy(sample.masks[1, 5])) > 0.5, "the given mask is kept on its frame"
