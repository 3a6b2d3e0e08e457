"""The predictors: what prompts do, what is remembered and for how long, bad input, and models in their fast form.

`ESAM3_FULL=1` also measures a long stream: resident memory, time a frame, and the peak with 64 objects."""
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils._pytree import tree_leaves

from esam3.data.samples import boxes_of
from esam3.data.toyworld import draw_clip, sample_scene
from esam3.evaluation.costs import load_model
from esam3.models.concept_video import Exemplar, follow_concepts
from esam3.models.fast_form import fast_form
from esam3.models.teacher import Prompts, Sam3
from esam3.models.tracker import History, see
from esam3.predictor import ImagePredictor, Tracked, VideoPredictor

full = pytest.mark.skipif(os.environ.get("ESAM3_FULL") != "1", reason="takes long: ESAM3_FULL=1 runs it")


@pytest.fixture(scope="module")
def models() -> dict[str, Sam3]: return {name: load_model(name) for name in ("toy", "toy-student")}


@pytest.fixture(scope="module")
def student(models) -> Sam3: return models["toy-student"]


@pytest.fixture(scope="module")
def teacher(models) -> Sam3: return models["toy"]


@pytest.fixture(scope="module")
def clip() -> tuple[np.ndarray, np.ndarray]:
    "Frames [T, H, W, 3] and tracks [N, T, H, W]."
    rng = np.random.default_rng(8)
    return draw_clip(sample_scene(rng, 24), 24, rng)


@pytest.fixture(scope="module")
def boxes(clip) -> np.ndarray: return boxes_of(clip[1][:, 0])


def followed(video: VideoPredictor, **how) -> dict[tuple[int, int], Tracked]:
    "Objects by id and frame."
    return {(o.id, n): o for n, objects in video.propagate(**how) for o in objects}


def same(a: Tracked, b: Tracked) -> bool:
    "Equal masks, pixel by pixel, and scores up to the last digits of a batched product."
    return np.array_equal(a.mask, b.mask) and abs(a.score - b.score) < 1e-5


# images

def test_an_image_in_any_form_is_the_same_image(student, clip, tmp_path):
    image = clip[0][0]
    Image.fromarray(image).save(tmp_path / "image.png")
    tensor = torch.from_numpy(image).movedim(-1, 0)
    forms = [image, tmp_path / "image.png", str(tmp_path / "image.png"), Image.fromarray(image), tensor, tensor / 255]
    answers = [ImagePredictor(student).set_image(f).predict(points=[50, 50])[2] for f in forms]
    assert all(np.array_equal(a, answers[0]) for a in answers)


def test_each_prompt_of_an_image_changes_the_answer(student, clip, boxes):
    predictor = ImagePredictor(student).set_image(clip[0][0])
    x, y = (boxes[0, :2] + boxes[0, 2:]) / 2
    first = dict(points=[[x, y]], labels=[1], multimask=False)
    before = predictor.predict(**first)[2]
    mask, logits = clip[1][1, 0], predictor.predict(box=boxes[1])[2]
    for change in (dict(points=[[x + 5, y]]), dict(labels=[0]), dict(box=boxes[1]), dict(mask=mask),
                   dict(mask=logits[0])):
        after = predictor.predict(**first | change)[2]
        assert after.shape == before.shape and not np.array_equal(after, before), change
    assert len(predictor.predict(**first | dict(multimask=True))[0]) == 3
    assert not np.array_equal(predictor.predict(mask=mask)[2], predictor.predict(mask=logits[0])[2])


def test_many_objects_and_many_images_in_one_pass(student, clip, boxes):
    frames = [clip[0][0], clip[0][5][:90]]
    both = ImagePredictor(student).set_image(frames)
    for k, frame in enumerate(frames):
        alone = ImagePredictor(student).set_image(frame)
        prompts = [dict(box=boxes[n]) if k == 0 else dict(points=[[40, 40], [9, 9]][n]) for n in (0, 1)]
        together = dict(box=boxes[:2]) if k == 0 else dict(points=[[[40, 40]], [[9, 9]]])
        many, scores, _ = both.predict(**together, image=k)
        one = [alone.predict(**p) for p in prompts]
        assert many.shape[:2] == (2, len(one[0][0])) and many.shape[2:] == frame.shape[:2]
        assert all(np.array_equal(many[n], one[n][0]) for n in (0, 1))
        assert np.allclose(scores, [o[1] for o in one], atol=1e-5)


def test_phrases_in_one_pass_and_alone(teacher, clip):
    words = ["circle", "square", "triangle", "star", "ring", "cross"]
    predictor = ImagePredictor(teacher).set_image([clip[0][0], clip[0][12]])
    together = predictor.predict_text(words)
    alone = [i for k in (0, 1) for w in words for i in predictor.predict_text(w, image=k)]
    assert [(i.image, i.concept) for i in together] == [(i.image, i.concept) for i in alone] and together
    for a, b in zip(together, alone):
        assert np.array_equal(a.mask, b.mask) and abs(a.score - b.score) < 1e-4 and 0 <= a.score <= a.presence <= 1
        assert np.array_equal(a.box, boxes_of(a.mask[None])[0])
    assert len(predictor.predict_text(words, threshold=1.0)) == 0


def test_each_field_of_a_concept_changes_what_is_found(teacher, clip, boxes):
    predictor = ImagePredictor(teacher).set_image(clip[0][0])
    low = dict(threshold=0.0)
    key = lambda found: [round(i.score, 6) for i in found]
    base = key(predictor.predict_text(None, boxes[:1], **low))
    others = [predictor.predict_text("circle", boxes[:1], **low), predictor.predict_text(None, boxes[1:2], **low),
              predictor.predict_text(None, clip[1][1:2, 0], **low),
              predictor.predict_text(None, (boxes[:2], [1, 0]), **low), predictor.predict_text(None, boxes[:2], **low)]
    assert base and all(key(o) != base for o in others)
    # a mask is its box
    assert key(others[2]) == key(others[1])


BAD_IMAGES = {"no path": ("nowhere.png", "nowhere"), "gray": (np.zeros((4, 4), np.uint8), "height, width, 3"),
              "NaN": (np.full((4, 4, 3), np.nan), "NaN"), "too bright": (np.full((4, 4, 3), 7.0), "0…1"),
              "int64": (np.zeros((4, 4, 3), int), "uint8"), "empty": (np.zeros((0, 4, 3), np.uint8), "shape"),
              "none": ([], "empty list"), "number": (3, "no image")}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_a_bad_image_is_named(student, case):
    bad, says = BAD_IMAGES[case]
    with pytest.raises(ValueError, match=says) as e: ImagePredictor(student).set_image(bad)
    assert len(str(e.value)) < 200


BAD_PROMPTS = [(dict(), "no prompt"), (dict(points=[500, 5]), "outside the image of 112 × 128"),
               (dict(points=[5, -1]), "outside"), (dict(box=[0, 0, 200, 50]), "outside"),
               (dict(box=[20, 0, 10, 50]), "no inside"), (dict(points=[1, 2, 3]), "points of shape"),
               (dict(points=[np.nan, 2]), "finite"), (dict(points=[[1, 2]], labels=[1, 1]), "labels"),
               (dict(points=[[1, 2]], labels=[2]), "labels"), (dict(labels=[1]), "without points"),
               (dict(mask=np.ones((8, 8), bool)), "like the image"),
               (dict(mask=np.zeros((128, 112), bool)), "empty mask"),
               (dict(mask=np.full((32, 32), np.nan, np.float32)), "NaN"),
               (dict(points=np.ones((2, 1, 2)), box=np.array([[0, 0, 9, 9]] * 3)), "numbers of objects")]


@pytest.mark.parametrize("prompt, says", BAD_PROMPTS, ids=[s for _, s in BAD_PROMPTS])
def test_a_bad_prompt_is_named(student, clip, prompt, says):
    predictor, video = ImagePredictor(student).set_image(clip[0][0]), VideoPredictor(student).start(clip[0])
    for call in (predictor.predict, video.add):
        with pytest.raises(ValueError, match=says) as e: call(**prompt)
        assert len(str(e.value)) < 200


def test_bad_concepts_are_named(teacher, clip, boxes):
    predictor, video = ImagePredictor(teacher).set_image(clip[0][0]), VideoPredictor(teacher).start(clip[0])
    for words, says in (("a zebra", "knows no word"), ("  ", "no phrase"), (None, "no concept")):
        with pytest.raises(ValueError, match=says): predictor.predict_text(words)
        with pytest.raises(ValueError, match=says): video.add_concept(words)
    for wrong, says in ((dict(phrases=["star", "ring"], exemplars=boxes[:1]), "one phrase"),
                        (dict(exemplars=(boxes[:1], [0])), "at least"), (dict(exemplars=[[0, 0, 900, 9]]), "outside"),
                        (dict(phrases="star", threshold=2), "0…1")):
        with pytest.raises(ValueError, match=says): predictor.predict_text(**wrong)
    with pytest.raises(ValueError, match="of one kind"): video.add_concept(box=boxes[0], mask=clip[1][0, 0])
    with pytest.raises(ValueError, match="set_image first"): ImagePredictor(teacher).predict(points=[3, 3])
    with pytest.raises(ValueError, match="1 set"): predictor.predict(points=[3, 3], image=1)


# videos

@pytest.fixture(scope="module")
def film(clip) -> np.ndarray:
    "The clip's first 14 frames: of an object prompted on frame 6, too, as much is remembered as ever is."
    return clip[0][:14]


@pytest.fixture(scope="module")
def together(student, clip, film) -> dict[tuple[int, int], Tracked]:
    "Three objects, each prompted on a frame of its own."
    video = VideoPredictor(student).start(film)
    for k in range(3): video.add(box=boxes_of(clip[1][:, 3 * k])[k], frame=3 * k)
    return followed(video)


def test_each_object_is_followed_as_if_alone(student, clip, film, together):
    for k in range(3):
        video = VideoPredictor(student).start(film)
        video.add(box=boxes_of(clip[1][:, 3 * k])[k], frame=3 * k)
        alone = followed(video)
        assert len(alone) == len(film) - 3 * k == sum(id == k for id, _ in together)
        assert all(same(o, together[k, n]) for (_, n), o in alone.items())


def test_a_prompted_object_is_followed_as_follower_does(student, film, boxes):
    from esam3.models.teacher import gate
    from esam3.models.tracker import Follower
    from esam3.predictor import given, in_space, see_images
    video, follower = VideoPredictor(student).start(film), Follower(student)
    id = video.add(box=boxes[0])
    for n, objects in video.propagate():
        with torch.no_grad():
            seen = see_images(student, [film[n]])
            prompt = in_space(student, given(film[n].shape[:2], 32, box=boxes[0]), seen.spaces) if not n else None
            out = follower.step(seen.features, prompt)
        expected = seen.spaces.to_source(gate(out.best()[0], out.object_logits), student.space, 0)[0] > 0
        # the encoder's fast form may move a pixel at the border
        assert (expected.numpy() ^ objects[id].mask).sum() <= 2


def test_removing_an_object_leaves_the_others(student, clip, film, together):
    video = VideoPredictor(student).start(iter(film))
    for k in range(3): video.add(box=boxes_of(clip[1][:, 3 * k])[k], frame=3 * k)
    rest = {}
    for n, objects in video.propagate():
        rest |= {(o.id, n): o for o in objects}
        if n == 10: video.remove(1)
    assert (1, 10) in rest and (1, 11) not in rest
    assert all(same(o, together[key]) for key, o in rest.items())
    for call in (lambda: video.remove(1), lambda: video.correct(1, [5, 5])):
        with pytest.raises(ValueError, match="was removed or dropped"): call()
    with pytest.raises(ValueError, match="no object 99"): video.remove(99)


def test_a_stream_is_followed_as_a_list_is(student, clip, film, together, tmp_path):
    for n, frame in enumerate(film): Image.fromarray(frame).save(tmp_path / f"{n}.png")  # 10.png after 9.png
    for source in (iter(film), (Image.fromarray(f) for f in film), tmp_path):
        video = VideoPredictor(student).start(source)
        for k in range(3): video.add(box=boxes_of(clip[1][:, 3 * k])[k], frame=3 * k)
        for n, objects in video.propagate():
            assert all(same(o, together[o.id, n]) for o in objects)
            if n == 12: break
        assert len(objects) == 3


def test_a_video_is_followed_backwards(student, clip, boxes):
    forwards, backwards = VideoPredictor(student).start(clip[0][:10][::-1]), VideoPredictor(student).start(clip[0][:10])
    for video, frame in ((forwards, 2), (backwards, 7)):
        video.add(box=boxes_of(clip[1][:, 7])[0], frame=frame)
    ahead, back = followed(forwards), followed(backwards, reverse=True)
    assert [n for _, n in back] == [*range(7, -1, -1)]
    assert all(same(o, ahead[id, 9 - n]) for (id, n), o in back.items())
    # and then ahead again, anew
    assert min(n for _, n in followed(backwards)) == 7
    with pytest.raises(ValueError, match="no way back"): VideoPredictor(student).start(iter(clip[0])).propagate(True)


@pytest.mark.parametrize("found_by", ["prompt", "concept"])
def test_a_correction_changes_this_frame_and_later_ones(teacher, clip, found_by):
    def run(corrected: bool) -> dict[tuple[int, int], Tracked]:
        video, out = VideoPredictor(teacher).start(iter(clip[0][:9])), {}
        if found_by == "prompt": video.add(box=boxes_of(clip[1][:, 0])[0])
        else:
            for w in WORDS: video.add_concept(w)
        for n, objects in video.propagate():
            if corrected and n == 4:
                id = objects[0].id
                x0, y0, x1, y1 = objects[0].box
                before = objects[0].mask
                after = video.correct(id, [[x0, y0], [x1, y1]], [1, 0])
                assert not np.array_equal(after.mask, before) and video.objects[0] is after
                assert after.concept == objects[0].concept
            out |= {(o.id, n): o for o in video.objects}
        return out
    plain, corrected = run(False), run(True)
    ids = {id for id, _ in plain}
    id = min(ids)
    moved = [n for n in range(9) if (id, n) in plain and not np.array_equal(plain[id, n].mask, corrected[id, n].mask)]
    assert moved and min(moved) == 4 and max(moved) > 4
    if found_by == "prompt": assert ids == {id}


def test_prompts_of_a_video_each_change_its_objects(student, clip, boxes):
    def masks(**prompt) -> np.ndarray:
        video = VideoPredictor(student).start(clip[0][:3])
        video.add(**prompt)
        return np.stack([o.mask for o in followed(video).values()])
    mask = clip[1][0, 0]
    x, y = (boxes[0, :2] + boxes[0, 2:]) / 2
    prompts = (dict(points=[x, y]), dict(box=boxes[0]), dict(mask=mask), dict(mask=mask, points=[x, y]),
               dict(points=[[x, y], boxes[0, :2]], labels=[1, 0]), dict(box=boxes[1]))
    answers = [masks(**p) for p in prompts]
    assert all(not np.array_equal(a, b) for k, a in enumerate(answers) for b in answers[:k])
    assert (answers[2][0] ^ mask).sum() < 0.2 * mask.sum(), "a mask alone is the answer"


def test_exemplars_are_never_ignored(teacher, clip, boxes):
    def found(**concept) -> list[float]:
        video = VideoPredictor(teacher).start(clip[0][:2])
        video.add_concept(**concept)
        with torch.no_grad():
            _ = followed(video)
            tokens, = video._stream.tokens.values()
        return tokens.encoded.flatten().tolist()
    mask, image = clip[1][0, 0], clip[0][12]
    given = [dict(phrase="circle"), dict(phrase="circle", box=boxes[0]), dict(box=boxes[0]), dict(box=boxes[1]),
             dict(box=boxes[:2], labels=[1, 0]), dict(image=image), dict(image=image, box=boxes[0]),
             dict(image=image, mask=clip[1][1, 12])]
    tokens = [found(**g) for g in given]
    assert all(a != b for k, a in enumerate(tokens) for b in tokens[:k])
    assert found(mask=mask) == found(box=boxes_of(mask[None])[0]), "a mask is its box"


WORDS = ["star", "triangle"]  # of the clip


def test_concepts_of_a_stream_are_those_of_a_clip(teacher, clip, boxes):
    frames = clip[0][:10]
    whole = follow_concepts(teacher, frames, [*WORDS, Exemplar(2, boxes_of(clip[1][:1, 2]))])
    video = VideoPredictor(teacher).start(iter(frames))
    for w in WORDS: video.add_concept(w)
    video.add_concept(box=boxes_of(clip[1][:1, 2]), frame=2)
    stream = followed(video)
    ids, never = {id for id, _ in stream}, np.zeros(frames.shape[1:3], bool)
    masks = lambda id: [stream[id, n].mask if (id, n) in stream else never for n in range(10)]
    assert len(whole) >= 2 and len(ids) >= len(whole)
    for f in whole:
        expected = np.stack([f.masks[n] for n in range(10)])
        assert any(np.array_equal(np.stack(masks(id)), expected) for id in ids), f


def test_concepts_come_and_go(teacher, clip):
    video = VideoPredictor(teacher).start(iter(clip[0]))
    numbers, seen = [video.add_concept(w) for w in WORDS], {}
    for n, objects in video.propagate():
        seen[n] = {o.concept_id for o in objects}
        if n == 3: gone = next(c for c in numbers if c in seen[n]); video.remove(gone)
        if n == 8: back = video.add_concept(WORDS[numbers.index(gone)])
    assert gone in seen[3] and not any(gone in seen[n] for n in range(4, 24))
    assert back in seen[9] | seen[10]
    with pytest.raises(ValueError, match="is a concept"): video.correct(back, [3, 3])


# what is forgotten

def held(video: VideoPredictor) -> int:
    "Bytes of all tensors that a video keeps between frames, each storage once; and numbers in lists."
    storages, many, todo, met = {}, 0, [video._targets, video._found, video._concepts, video._stream, video._now], set()
    while todo:
        x = todo.pop()
        if id(x) in met: continue
        met.add(id(x))
        if isinstance(x, Tensor): storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        elif isinstance(x, np.ndarray): many += x.nbytes
        elif isinstance(x, dict): todo += [*x.values()]; many += 8 * len(x)
        elif isinstance(x, list | tuple | set): todo += [*x]; many += 8 * len(x)
        elif dataclasses.is_dataclass(x) or type(x).__module__.startswith(("esam3", "transformers")):
            if not isinstance(x, torch.nn.Module): todo.append(vars(x))
    return sum(storages.values()) + many


def blinking(clip: np.ndarray, count: int, on: int = 6, off: int = 6) -> Iterator[np.ndarray]:
    "Frames to and fro, whose objects are now there, now not."
    ground = np.full_like(clip[0], 90)
    for t in range(count):
        k = t % (2 * len(clip) - 2)
        yield clip[min(k, 2 * len(clip) - 2 - k)] if t % (on + off) < on else ground


def prompted(student: Sam3, clip: tuple, objects: int, **more) -> VideoPredictor:
    "A stream that goes to and fro, with so many prompted objects."
    video = VideoPredictor(student, **more).start(blinking(clip[0], 10**9, off=0))
    found = boxes_of(clip[1][:, 0])
    for n in range(objects): video.add(box=found[n % len(found)] - [0, 0, n // 8, 0])
    return video


@pytest.mark.parametrize("kind", ["objects", "corrected", "blinking"])
def test_a_stream_is_remembered_in_constant_memory(student, teacher, clip, kind):
    short, long = 36, 60  # ends of two stretches, each of whole rounds of what is shown and corrected, once all is full
    if kind == "blinking":
        video = VideoPredictor(teacher, patience=4).start(blinking(clip[0][:4], 10**9))
        for w in WORDS: video.add_concept(w)
    else: video = prompted(student, clip, 2)
    sizes, ids = {}, set()
    for n, objects in video.propagate():
        ids |= {o.id for o in objects}
        if kind == "corrected" and n % 3 == 0: video.correct(objects[0].id, [50, 50])
        sizes[n] = held(video)
        if n + 1 == long: break
    if kind == "blinking": assert len(ids) > 6, "they are found anew"
    early, late = ([sizes[n] for n in range(end - 12, end)] for end in (short, long))
    assert min(late) <= min(early) + 128 and max(late) <= max(early) + 128, (early, late)


def test_a_prompted_object_is_kept_and_a_found_one_is_dropped(student, teacher, clip, boxes):
    assert VideoPredictor(student).patience == 100
    def frames() -> Iterator[np.ndarray]:
        yield from clip[0][:3]
        for _ in range(9): yield np.full_like(clip[0][0], 90)
        yield from clip[0][3:8]
    kept = VideoPredictor(teacher, patience=6).start(frames())
    object = kept.add(box=boxes[0])
    for w in WORDS: kept.add_concept(w)
    by_frame = {n: {o.id: o for o in objects} for n, objects in kept.propagate()}
    found = [{id for id in by_frame[n] if id != object} for n in sorted(by_frame)]
    assert all(object in by_frame[n] for n in by_frame), "prompted: until it is removed"
    assert found[2] and found[4] and not found[11], "found: for `patience` frames"
    assert not found[2] & (found[-1] | found[-2]) and found[-1], "and anew when it returns"
    id = min(found[2])
    with pytest.raises(ValueError, match="removed or dropped"): kept.correct(id, [5, 5])


@full
def test_an_instance_unseen_for_a_hundred_frames_is_dropped(teacher, clip):
    video = VideoPredictor(teacher).start(iter([clip[0][0]] * 2 + [np.full_like(clip[0][0], 90)] * 102))
    for w in WORDS: video.add_concept(w)
    last = {o.id: n for n, objects in video.propagate() for o in objects}
    seen = 1  # the last frame in which they are seen
    assert last and max(last.values()) <= seen + 100 and video.report.frames == 104


def test_conditioning_frames_are_evicted_by_the_rule(student, clip):
    video = prompted(student, clip, 1)
    most = student.tracker_model.config.max_object_pointers_in_encoder
    for n, _ in video.propagate():
        if n and n % 2 == 0: video.correct(0, [50, 50])
        if n == 2 * most + 6: break
    kept = sorted(video._targets[0].history.prompted)
    assert kept == [0, *range(n - 2 * (most - 2), n + 1, 2)]


def test_sixty_four_objects_take_four_times_what_sixteen_take(student, clip):
    def most(objects: int) -> int:
        video = prompted(student, clip, objects)
        for n, _ in video.propagate():
            if n == 3: return held(video)
    one, few, many = most(1), most(16), most(64)
    assert one < few < many <= 4 * few


# bad frames

def test_broken_frames_are_left_out_counted_and_reported(student, clip, boxes):
    frames = [*clip[0][:6]]
    broken = frames.copy()
    broken[2], broken[4] = np.full(frames[0].shape, np.nan), "nowhere.png"
    for source in (broken, iter(broken)):
        video = VideoPredictor(student).start(source)
        video.add(box=boxes[0])
        with pytest.warns(UserWarning, match="frame 2 is left out"): found = followed(video)
        assert sorted(n for _, n in found) == [0, 1, 3, 5] and (video.report.frames, video.report.skipped) == (4, 2)
        assert [n for n, _ in video.report.last] == [2, 4] and "NaN" in str(video.report)


def test_bad_videos_are_named(student, clip, tmp_path):
    start = lambda source: VideoPredictor(student).start(source)
    bad = (([], "no frame"), (tmp_path, "no frame"), (tmp_path / "none.mp4", "no such file"), (7, "no video"))
    for source, says in bad:
        with pytest.raises(ValueError, match=says): start(source)
    with pytest.raises(ValueError, match="no frame of the video"): start(iter([])).add(points=[3, 3])
    with pytest.raises(ValueError, match="no frame of the video"): [*start(iter([])).propagate()]
    with pytest.raises(ValueError, match="resize it"): [*start([clip[0][0], clip[0][1][:60]]).propagate()]
    for call in (lambda v: v.add(points=[3, 3]), lambda v: v.propagate(), lambda v: v.remove(0)):
        with pytest.raises(ValueError, match="call start first"): call(VideoPredictor(student))
    video = start(iter(clip[0][:2]))
    for _ in video.propagate(): pass
    with pytest.raises(ValueError, match="has passed"): video.add(points=[3, 3], frame=0)
    with pytest.raises(ValueError, match="has ended"): video.propagate()
    with pytest.raises(ValueError, match="frame 9"): start(clip[0][:2]).add(points=[3, 3], frame=9)


# fast as loaded

def test_the_fast_form_answers_the_same_and_changes_nothing(models, clip, boxes):
    for name, model in models.items():
        weights, kinds = {n: w.clone() for n, w in model.state_dict().items()}, [type(m) for m in model.modules()]
        pixels = torch.randn(1, 3, model.image_size, model.image_size)
        fast = fast_form(model)
        with torch.no_grad():
            for a, b in zip(tree_leaves(vars(model.encode(pixels))), tree_leaves(vars(fast.encode(pixels)))):
                if a is not None: torch.testing.assert_close(b, a, atol=1e-4, rtol=1e-4)
        ImagePredictor(model).set_image(clip[0][0]).predict_text("circle")
        after = model.state_dict()
        assert [type(m) for m in model.modules()] == kinds and weights.keys() == after.keys(), name
        assert all(torch.equal(w, after[n]) for n, w in weights.items())
    norms = sum(isinstance(m, torch.nn.BatchNorm2d) for m in fast_form(models["toy-student"]).modules())
    assert not norms and fast_form(models["toy"]) is models["toy"]


@pytest.mark.parametrize("variant", ["es-rv-s", "es-tv-s", "es-ev-s"])
def test_every_family_has_a_fast_form(teacher, variant):
    from esam3.models.student import build_student
    torch.manual_seed(1)
    model = build_student(variant, teacher)
    for m in model.detector_model.vision_encoder.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(m.running_mean, -0.2, 0.2); torch.nn.init.uniform_(m.running_var, 0.5, 1.5)
    pixels, fast = torch.randn(1, 3, 128, 128), fast_form(model)
    with torch.no_grad():
        for a, b in zip(model.encode(pixels).detector, fast.encode(pixels).detector):
            torch.testing.assert_close(b, a, atol=1e-4, rtol=1e-4)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in fast.detector_model.vision_encoder.modules())


def test_a_model_can_be_trained_after_it_has_predicted(teacher, clip):
    from esam3.models.student import build_student
    model = build_student("es-ev-s", teacher, "perceiver").train()
    video = VideoPredictor(model).start(clip[0][:3])
    video.add(points=[50, 50]), video.add_concept("circle")
    followed(video)
    assert model.training
    one = torch.zeros(1, dtype=torch.long)
    seen = model.encode(torch.randn(1, 3, 128, 128))
    out, memory = see(model, seen, one, Prompts(one, torch.full((1, 1, 2), 60.0), torch.ones(1, 1, dtype=torch.int32)))
    history = History(model.tracker_model.config)
    history.add(0, memory, prompted=True)
    later = see(model, seen, one, None, history.bank(1))[0]
    found = model.detect(seen, model.concepts(["circle"], one))
    (out.masks.sum() + later.masks.sum() + found.masks.sum()).backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


# compiled

@pytest.fixture(scope="module")
def calls(models) -> dict[str, dict]:
    "Of each model, the four calls of prediction."
    out = {}
    for name, model in models.items():
        pixels, one = torch.randn(1, 3, model.image_size, model.image_size), torch.zeros(1, dtype=torch.long)
        point = Prompts(one, torch.full((1, 1, 2), model.image_size / 2), torch.ones(1, 1, dtype=torch.int32))
        with torch.no_grad():
            seen, history = model.encode(pixels), History(model.tracker_model.config)
            memory = see(model, seen, one, point)[1]
            for t in range(4): history.add(t, memory, prompted=t == 0)
            bank, words = history.bank(4), model.concepts(["circle"], one)
        out[name] = {"encode": (model.encode, (pixels,)), "decode": (model.decode, (seen, point)),
                     "recall": (model.recall, (seen, one, bank)), "detect": (model.detect, (seen, words))}
    return out


def leaves(x) -> list[Tensor]:
    "All tensors of an answer."
    if isinstance(x, Tensor): return [x]
    parts = vars(x).values() if dataclasses.is_dataclass(x) else x if isinstance(x, tuple | list) else ()
    return [t for part in parts for t in leaves(part)]


@pytest.mark.parametrize("name, call", [
    *(("toy-student", c) for c in ("encode", "decode", "recall", "detect")), ("toy", "encode"),
    *(pytest.param("toy", c, marks=full) for c in ("decode", "recall", "detect"))])
def test_calls_compile_whole_and_answer_the_same(calls, name, call):
    torch._dynamo.reset()
    plain, given = calls[name][call]
    with torch.no_grad():
        compiled = torch.compile(lambda: plain(*given), fullgraph=True, backend="eager")()
        for a, b in zip(leaves(plain(*given)), leaves(compiled), strict=True):
            torch.testing.assert_close(b, a, atol=1e-5, rtol=1e-5)


# long streams

LONG = """
import gc, json, resource, sys, time
import numpy as np, torch
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_predictor as t
from esam3.data.samples import boxes_of
from esam3.data.toyworld import draw_clip, sample_scene
from esam3.evaluation.costs import load_model
kind, frames = sys.argv[2], int(sys.argv[3])
rng = np.random.default_rng(8)
clip = draw_clip(sample_scene(rng, 24), 24, rng)
model = load_model("toy" if kind == "blinking" else "toy-student")
page = resource.getpagesize()
rss = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * page
if kind == "blinking":
    video = t.VideoPredictor(model, patience=20).start(t.blinking(clip[0], 10**9, on=30, off=30))
    for w in t.WORDS: video.add_concept(w)
else: video = t.prompted(model, clip, int(kind))
memory, seconds, last = {}, [], time.process_time()
for n, _ in video.propagate():
    now = time.process_time(); seconds.append(now - last); last = now
    if n + 1 in (300, frames): gc.collect(); memory[n + 1] = rss()
    if n + 1 == frames: break
print(json.dumps({"memory": memory, "seconds": seconds, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}))
"""


def measured(root, kind: str, frames: int) -> dict:
    "A stream in a process of its own: resident bytes, CPU seconds of each frame, peak in KiB."
    place = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", LONG, str(root / "tests"), kind, str(frames)], capture_output=True,
                         text=True, env=place)
    assert not run.returncode, run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1])


@full
@pytest.mark.parametrize("kind", ["1", "16", "blinking"])
def test_twelve_hundred_frames_take_what_three_hundred_take(root, kind):
    found = measured(root, kind, 1200)
    assert abs(found["memory"]["1200"] - found["memory"]["300"]) < 20e6, found["memory"]
    tenth = lambda part: float(np.median(part))
    assert tenth(found["seconds"][-120:]) <= 1.2 * tenth(found["seconds"][60:180])


@full
def test_the_peak_of_sixty_four_objects(root):
    none, few, many = (measured(root, k, 20)["peak"] for k in ("1", "16", "64"))
    assert many - none <= 4 * (few - none)
