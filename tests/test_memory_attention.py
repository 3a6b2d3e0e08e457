"""What memory attention reads, of both models on one clip: equal to the library's own attention, kept and found again,
stopped half-way, and refused in one line."""
import time
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from esam3.data.batches import collate_clips, open_dataset
from esam3.models.student import build_student
from esam3.models.teacher import Sam3, load_teacher
from esam3.models.tracker import first_frame, look
from esam3.show import memory_attention
from esam3.show.memory_attention import Choice, Explorer, Readings, attention_at, caught, fall_of, follow, read_at
from esam3.show.views import Box, Click


@pytest.fixture(scope="module")
def teacher(): return load_teacher("toy")


@pytest.fixture(scope="module")
def student(teacher):
    "An untrained one: it reads at random."
    torch.manual_seed(0)
    return build_student("es-ev-s", teacher, memory="perceiver")


@pytest.fixture(scope="module")
def clips(): return open_dataset("tiny", "held_out", "clips")


@pytest.fixture(scope="module")
def batch(clips, teacher, student):
    return collate_clips([clips.read(0, most=4)], teacher.image_size, student.image_size)


@pytest.fixture(scope="module")
def readings(teacher, student, batch): return Readings(teacher, student, batch)


@pytest.fixture(scope="module")
def two_heads(teacher):
    "A model with two heads and random weights, large enough for its attention not to be even."
    config = deepcopy(teacher.config)
    config.tracker_config.memory_attention_num_attention_heads = 2
    torch.manual_seed(1)
    model = Sam3(config).eval()
    for layer in model.tracker_model.memory_attention.layers:
        for name in ("q_proj", "k_proj"): torch.nn.init.normal_(getattr(layer.cross_attn_image, name).weight, std=0.2)
    return model


# ---- the same attention

@pytest.mark.parametrize("layer", [-1, 0])
def test_at_equals_read_at(readings, batch, layer):
    "One object's one cell, from what was kept, is what tracking up to the frame and reading it whole gives."
    record = readings.at(3, 0, layer=layer)
    for who, model in readings.models.items():
        whole = read_at(model, look(model, batch), batch.frame_index, first_frame(model, batch)[0], 3, layer)
        pixel = whole.pixel(0, *record.cells[who])
        torch.testing.assert_close(record.read[who].weights, pixel.weights, atol=1e-5, rtol=0)
        assert record.read[who].frames == pixel.frames and abs(record.read[who].pointers - pixel.pointers) < 1e-5
        torch.testing.assert_close(record.read[who].over_frames(), pixel.over_frames(), atol=1e-5, rtol=0)


def test_mean_of_heads(two_heads, batch):
    "Heads differ, their mean is what `head=None` gives, and each is what enters the output projection."
    found = follow(two_heads, look(two_heads, batch), batch.frame_index, first_frame(two_heads, batch)[0], 2)
    reader = two_heads.tracker_model.memory_attention.layers[-1].cross_attn_image
    with caught([reader.v_proj]) as (values,), caught([reader.o_proj], given=True) as (entered,), torch.no_grad():
        attention = attention_at(two_heads, found.features, batch.frame_index[:, 1], found.banks[1])
    heads = [attention.weights(head=h) for h in (0, 1)]
    assert (heads[0] - heads[1]).abs().max() > 1e-3
    torch.testing.assert_close((heads[0] + heads[1]) / 2, attention.weights())
    parts = values[0].unflatten(-1, (2, -1)).unbind(2)
    by_head = torch.cat([w @ v for w, v in zip(heads, parts)], -1)
    torch.testing.assert_close(by_head, entered[0][0], atol=1e-4, rtol=1e-4)


def test_summary_is_of_each_head_and_the_mean(two_heads, batch):
    "Kept while tracking, in parts of cells: as from all weights at once."
    found = follow(two_heads, look(two_heads, batch), batch.frame_index, first_frame(two_heads, batch)[0], 2)
    weights = found.attention(1).weights()
    even = torch.special.entr(weights).sum(-1) / np.log(weights.shape[-1])
    torch.testing.assert_close(found.summaries[1][-1, 0, :, -1].flatten(1), even, atol=1e-5, rtol=0)
    tokens, pointers = found.split_weights(1, weights)
    torch.testing.assert_close(found.summaries[1][-1, 1, :, -1].flatten(1), pointers, atol=1e-5, rtol=0)


def test_hooks_hear_their_own_thread_alone():
    "A clip is tracked in the background while another is looked at."
    import threading
    layer = torch.nn.Linear(1, 1)
    with caught([layer]) as (out,):
        other = threading.Thread(target=layer, args=(torch.ones(1),))
        other.start()
        other.join()
        assert out == []
        layer(torch.ones(1))
    assert len(out) == 1 and not layer._forward_hooks


# ---- the fall

@pytest.mark.parametrize("iou, frame", [
    ([1, 0.9, 0.3, 0.8, 0.1], 2),     # the first below one half
    ([0.2, 0.9, 0.8, 0.6, 0.7], 3),   # never below it but where it is prompted: the largest drop
    ([0.9, 0.6, 0.5], 1),             # one half is not below one half; the drop is
    ([0.9, 0.9, 1], None), ([1], None)])
def test_fall_by_hand(iou, frame): assert fall_of(np.array(iou, float)) == frame


def test_iou_is_of_masks_in_source_px(readings):
    "By hand at one frame; the fall is the function of it."
    student, teacher = (readings.logits(who, 2, 0) > 0 for who in ("student", "teacher"))
    union = (student | teacher).sum()
    assert readings.iou[0, 2] == pytest.approx((student & teacher).sum() / union if union else 1)
    assert readings.fall(0) == fall_of(readings.iou[0])


# ---- kept and found again

def test_save_and_load(readings, tmp_path):
    record = readings.at(2, 0, (20.0, 30.0), layer=0, head=0)
    image, choice = record.save(tmp_path / "deep" / "one", 0)
    assert image.read_bytes()[:4] == b"\x89PNG" and choice.name == "one.json"
    c = Choice.load(choice)
    again = readings.at(c.frame, c.instance, (c.x, c.y), c.layer, c.head)
    assert c == record.choice(0)
    torch.testing.assert_close(again.read["teacher"].weights, record.read["teacher"].weights)
    with pytest.raises(ValueError, match="holds no choice"): Choice.load(image)
    with pytest.raises(ValueError, match="holds no choice"): Choice.load(tmp_path / "missing.json")


# ---- the explorer

@pytest.fixture
def explorer(teacher, student, clips):
    "One with its first clip tracked."
    made = Explorer(teacher, student, clips, 4)
    made.track(Choice(0, frame=2))
    made.wait()
    return made


def test_a_click_is_the_call(explorer):
    "The record of the widgets is that of `Readings.at`, and another pixel gives another figure."
    before = explorer.image.value
    explorer.clicked(Click(0, 1, 12.5, 40.5, True))
    assert explorer.image.value not in (b"", before)
    called = explorer.readings.at(2, explorer.controls["instance"].value, (12.5, 40.5))
    assert explorer.record().cells == called.cells
    torch.testing.assert_close(explorer.record().read["student"].weights, called.read["student"].weights)


def test_cancel_leaves_the_last_clip(explorer, monkeypatch):
    "Stopped before the next layer; figures, readings and controls stay."
    before, figure = explorer.readings, explorer.image.value
    def endless(*_, **__):
        while True: explorer.models["student"].encode(torch.zeros(1, 3, 128, 128))
    monkeypatch.setattr(memory_attention, "open_clip", endless)
    explorer.track(Choice(1))
    time.sleep(0.2)
    assert explorer.work.busy and not explorer.controls["cancel"].disabled
    explorer.controls["cancel"].click()
    assert not explorer.work.busy and "cancelled" in explorer.line.value and explorer.controls["cancel"].disabled
    assert explorer.readings is before and explorer.image.value == figure and explorer.record().frame == 2


def tracked(explorer, **controls):
    "What the line says after *track*, with controls set so."
    explorer.put(**{"video": "", "student": "", "prompts": ""} | controls)
    explorer.controls["track"].click()
    explorer.wait()
    return explorer.line.value


def test_what_cannot_be_is_one_line(explorer, tmp_path):
    "And the last figure and the last clip stay."
    before, figure = explorer.readings, explorer.image.value
    (tmp_path / "no.mp4").write_text("no video")
    larger = tmp_path / "larger"
    torch.manual_seed(0)
    build_student("es-ev-s", explorer.models["teacher"], canvas=160).save_pretrained(larger)
    for controls, said in [({"video": str(tmp_path / "none.mp4")}, "nothing at"),
                           ({"video": str(tmp_path / "no.mp4")}, "no.mp4"),
                           ({"student": "runs/none/student"}, "no student in"), ({"student": str(larger)}, "10 × 10"),
                           ({"student": "toy"}, "no student"), ({"prompts": "[{"}, "no JSON"),
                           ({"prompts": '[{"points": [[900, 5]]}]'}, "outside"), ({"prompts": "5"}, "no object")]:
        line = tracked(explorer, **controls)
        assert said in line and "\n" not in line, (controls, line)
        assert explorer.readings is before and explorer.image.value == figure, controls
    explorer.clicked(None)
    assert "outside" in explorer.line.value and explorer.image.value == figure
    explorer.go(0)
    assert "no past" in explorer.line.value and explorer.image.value == figure


def test_an_object_is_chosen_by_a_click(explorer):
    "The one with a mask there; where there is none, a line."
    teacher = explorer.readings.logits("teacher", 2) > 0
    explorer.controls["mouse"].value = "object"
    y, x = np.argwhere(~teacher.any(0) & ~(explorer.readings.logits("student", 2) > 0).any(0))[0]
    explorer.clicked(Click(0, 0, x + 0.5, y + 0.5, True))
    assert "no object at" in explorer.line.value
    n = int(teacher.sum((1, 2)).argmax())
    y, x = np.argwhere(teacher[n])[0]
    explorer.clicked(Click(0, 0, x + 0.5, y + 0.5, True))
    assert teacher[explorer.controls["instance"].value, y, x]
    assert (explorer.controls["x"].value, explorer.controls["y"].value) == (x, y)


def test_a_video_of_ones_own(explorer, clips, tmp_path):
    "A folder of images, turned by EXIF; marked by mouse, tracked, saved and loaded again."
    sample, turned = clips.read(0, most=4), Image.Exif()
    turned[0x0112] = 6
    for k, frame in enumerate(np.repeat(sample.frames, 4, 0)):
        Image.fromarray(np.rot90(frame)).save(tmp_path / f"{k:03}.png", exif=turned)
    assert "mark an object" in tracked(explorer, video=str(tmp_path))
    np.testing.assert_array_equal(explorer.batch.images[1], sample.frames[1])
    explorer.dragged(Box(0, 0, 20.0, 30.0, 60.0, 80.0))
    explorer.clicked(Click(0, 0, 40.0, 50.0, True))
    explorer.clicked(Click(0, 0, 5.0, 5.0, False))
    explorer.controls["track"].click()
    explorer.wait()
    given = [{"box": [20.0, 30.0, 60.0, 80.0], "points": [[40.0, 50.0], [5.0, 5.0]], "labels": [1, 0]}]
    assert explorer.readings.prompts == given and len(explorer.readings) == 1
    explorer.put(place=str(tmp_path / "saved"), frame=3, x=33, y=44)
    explorer.controls["save"].click()
    record = explorer.record()
    assert "mark" not in tracked(explorer) and explorer.clip == 0
    explorer.controls["load"].click()
    explorer.wait()
    assert Path(explorer.clip) == tmp_path and explorer.record().xy == record.xy == (33.5, 44.5)
    torch.testing.assert_close(explorer.record().read["student"].weights, record.read["student"].weights)
