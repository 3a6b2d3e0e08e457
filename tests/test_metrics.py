"""Scores on files: hand-computed cases, what must and must not change them, and slow or foreign referees that they
agree with to 1e-6."""
import contextlib
import io
import itertools
import json
import math
import shutil
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy import ndimage

from esam3.data.samples import BadSample, rle_runs
from esam3.data.toyfiles import saco_pair, veval_file
from esam3.evaluation.metrics import (
    boundary_accuracy, davis, pcs_image, pcs_video, prompt_miou, region_similarity, ytvos)

SAME = {"abs": 1e-6, "rel": 0}


def write_json(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


def write_maps(folder: Path, maps: np.ndarray) -> None:
    "Label maps [T, H, W] as 00000.png, 00001.png, …"
    folder.mkdir(parents=True)
    for t, m in enumerate(maps): Image.fromarray(m.astype(np.uint8)).save(folder / f"{t:05d}.png")


def rle(mask: np.ndarray) -> dict:
    code = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return code | {"counts": code["counts"].decode()}


def blobs(rng: np.random.Generator, frames: int, h: int, w: int, objects: int) -> np.ndarray:
    "Label maps [T, H, W] of discs that drift, hide each other and leave the image."
    y, x = np.mgrid[:h, :w]
    out = np.zeros((frames, h, w), np.uint8)
    for k in range(1, objects + 1):
        place, drift, radius = rng.uniform((0, 0), (h, w)), rng.uniform(-8, 8, 2), rng.uniform(3, h / 4)
        for t in range(frames): out[t][np.hypot(*(np.stack([y, x]) - (place + t * drift)[:, None, None])) < radius] = k
    return out


# ---- tracks: DAVIS and YouTube-VOS

def plain_outline(mask: np.ndarray) -> np.ndarray:
    """Pixels that differ from the one to the right, below, or right below; the last row looks right only, the last
    column down only."""
    h, w = mask.shape
    out = np.zeros((h, w), bool)
    for y, x in np.argwhere(ndimage.binary_dilation(mask, np.ones((3, 3)))):
        near = {(min(y + 1, h - 1), x), (y, min(x + 1, w - 1)), (min(y + 1, h - 1), min(x + 1, w - 1))}
        out[y, x] = any(mask[p] != mask[y, x] for p in near)
    return out


def plain_davis(gt_dir: Path, pred_dir: Path) -> dict[str, list[float]]:
    """J and F of every object (ids 1 … highest of the first frame), frame by frame, as the DAVIS-2017 evaluator goes
    about it."""
    out = {}
    for sequence in sorted(gt_dir.iterdir()):
        files = sorted(sequence.glob("*.png"))
        read = lambda f: np.where((m := np.array(Image.open(f))) == 255, 0, m)
        for k in range(1, int(read(files[0]).max()) + 1):
            scores = []
            for file in files[1:-1]:
                true, pred = read(file) == k, np.array(Image.open(pred_dir / sequence.name / file.name)) == k
                union, t, p = (true | pred).sum(), plain_outline(true), plain_outline(pred)
                reach = math.ceil(0.008 * np.linalg.norm(true.shape))
                disk = np.hypot(*np.mgrid[-reach:reach + 1, -reach:reach + 1]) <= reach
                if not t.any() or not p.any(): precision, recall = (1, 1) if t.any() == p.any() else (0, 1)
                else:
                    precision, recall = (a[ndimage.binary_dilation(b, disk)].sum() / a.sum() for a,
                                         b in ((p, t), (t, p)))
                f = 2 * precision * recall / (precision + recall) if precision + recall else 0
                scores.append(((true & pred).sum() / union if union else 1, f))
            out[f"{sequence.name}_{k}"] = np.mean(scores, 0).tolist()
    return out


@pytest.mark.parametrize("objects", [1, 3, 11])
def test_davis_agrees_with_the_plain_way(tmp_path, objects):
    rng = np.random.default_rng(objects)
    for name, (h, w) in {"wide": (60, 107), "tall": (90, 40)}.items():
        true = blobs(rng, 5, h, w, objects)
        true[0].flat[:objects] = np.arange(1, objects + 1)  # the first frame has them all
        pred = np.roll(true, rng.integers(-3, 4, 2), (1, 2))
        pred[rng.random(pred.shape) < 0.02] = 0
        pred[2][pred[2] == objects] = 0
        true[:, :, 20:22] = 255
        write_maps(tmp_path / "true" / name, true); write_maps(tmp_path / "pred" / name, pred)
    found, expected = davis(tmp_path / "true", tmp_path / "pred"), plain_davis(tmp_path / "true", tmp_path / "pred")
    assert found["per_object"].keys() == expected.keys() and len(expected) == 2 * objects
    for name, jf in expected.items(): assert list(found["per_object"][name].values()) == pytest.approx(jf, **SAME), name
    j, f = np.mean(list(expected.values()), 0)
    assert [found[k] for k in ("J", "F", "J&F")] == pytest.approx([j, f, (j + f) / 2], **SAME) and 0.1 < j < 0.95


def test_davis_by_hand(tmp_path):
    """Two squares of 10 × 10; of the second, half is found in frame 1 and nothing in frame 2. Frames 0 and 3 do not
    count."""
    true = np.zeros((4, 40, 60)); true[:, 5:15, 5:15], true[:, 20:30, 30:40] = 1, 2
    pred = true.copy(); pred[1, 20:30, 35:40], pred[2, 20:30, 30:40] = 0, 0
    pred[[0, 3]] = 2 - pred[[0, 3]]
    write_maps(tmp_path / "true/a", true); write_maps(tmp_path / "pred/a", pred)
    found = davis(tmp_path / "true", tmp_path / "pred")
    assert found["per_object"]["a_1"] == {"J": 1, "F": 1} and found["per_object"]["a_2"]["J"] == 0.25
    assert found["J"] == 0.625 and found["F"] == pytest.approx((1 + boundary_accuracy(pred[1] == 2, true[1] == 2) / 2)
                                                               / 2)


def test_davis_properties(tmp_path):
    "Perfect is 1; ids may be permuted on both sides, not on one; J falls as masks erode."
    true = blobs(np.random.default_rng(0), 4, 60, 107, 3)
    write_maps(tmp_path / "true/a", true)
    def score(maps):
        shutil.rmtree(tmp_path / "pred", ignore_errors=True)
        write_maps(tmp_path / "pred/a", maps)
        return davis(tmp_path / "true", tmp_path / "pred")
    assert [score(true)[k] for k in ("J", "F", "J&F")] == [1, 1, 1]
    other = np.array([0, 2, 3, 1])
    shifted = np.roll(true, 2, 2)
    before, swapped = score(shifted), score(other[shifted])
    write_maps(tmp_path / "twin/a", other[true])
    after = davis(tmp_path / "twin", tmp_path / "pred")
    assert (swapped["J"] < before["J"] / 2 and after["J"] == pytest.approx(before["J"])
            and after["F"] == pytest.approx(before["F"]))
    cores = [true > 0] + [ndimage.binary_erosion(true > 0, np.ones((1, 3, 3)), iterations=n) for n in (1, 2, 3)]
    worn = [score(np.where(core, true, 0))["J"] for core in cores]
    assert (np.diff(worn) < 0).all()


def test_an_object_counts_from_the_frame_after_its_first(tmp_path):
    """The second object appears in frame 2, is given there, and is scored in frame 3 only; the third appears too late
    to be scored."""
    true = np.zeros((5, 40, 60)); true[:, 5:15, 5:15], true[2:, 20:30, 30:40], true[4:, 0:3] = 1, 9, 4
    pred = true.copy(); pred[1, 20:25, 30:40], pred[2, 20:30, 30:40], pred[3, 20:30, 30:35] = 9, 0, 0
    write_maps(tmp_path / "true/a", true); write_maps(tmp_path / "pred/a", pred)
    found = davis(tmp_path / "true", tmp_path / "pred")
    assert found["per_object"].keys() == {"a_1", "a_9"} and found["per_object"]["a_9"]["J"] == 0.5


def test_davis_says_what_is_amiss(tmp_path):
    true = blobs(np.random.default_rng(0), 4, 60, 107, 2)
    write_maps(tmp_path / "true/a", true); write_maps(tmp_path / "true/b", true); write_maps(tmp_path / "pred/a", true)
    fails = lambda kind, *words: pytest.raises(kind, match=".*".join(words))
    with fails(FileNotFoundError, "pred.b", "no predictions"): davis(tmp_path / "true", tmp_path / "pred")
    write_maps(tmp_path / "pred/b", true); (tmp_path / "pred/b/00002.png").unlink()
    with fails(FileNotFoundError, "00002.png"): davis(tmp_path / "true", tmp_path / "pred")
    Image.fromarray(np.where(true[2] == 2, 5, true[2])).save(tmp_path / "pred/b/00002.png")
    with fails(ValueError, "00002.png", "object 5"): davis(tmp_path / "true", tmp_path / "pred")
    Image.fromarray(true[2]).convert("RGB").save(tmp_path / "pred/b/00002.png")
    with fails(BadSample, "00002.png"): davis(tmp_path / "true", tmp_path / "pred")
    with fails(FileNotFoundError, "SEQUENCE"): davis(tmp_path / "true/a", tmp_path / "pred")
    shutil.rmtree(tmp_path / "true/b")
    (tmp_path / "true/a/00003.png").unlink()
    (tmp_path / "true/a/00002.png").unlink()
    with fails(ValueError, "true.a: 2 masks"): davis(tmp_path / "true", tmp_path / "pred")


def test_real_masks_that_are_a_pixel_narrower(real_files, tmp_path):
    "DAVIS's judo, four sparse masks, one of them 853 px wide: against itself, and against a prediction of 854 px."
    truth = real_files / "davis" / "Annotations" / "480p"
    assert davis(truth, truth)["J&F"] == 1
    shutil.copytree(truth / "judo", tmp_path / "judo")
    wide = tmp_path / "judo" / "00005.png"
    with Image.open(wide) as image: image.resize((854, 480), Image.Resampling.NEAREST).save(tmp_path / "wide.png")
    shutil.move(tmp_path / "wide.png", wide)
    with pytest.warns(UserWarning, match="854×480 → 853×480"): found = davis(truth, tmp_path)
    assert found["J"] == 1 and found["per_object"].keys() == {"judo_1", "judo_2"}


def test_ytvos_by_hand(tmp_path):
    "G is the mean of four halves: one zebra (seen) perfect, one half found; one quokka (unseen) at a quarter."
    true = np.zeros((3, 40, 60)); true[:, 5:15, 5:15], true[:, 20:30, 30:40], true[:, 30:40, 0:20] = 1, 2, 3
    pred = true.copy(); pred[1, 20:30, 35:40], pred[1, 30:40, 5:20] = 0, 0
    write_maps(tmp_path / "true/a", true); write_maps(tmp_path / "pred/a", pred)
    objects = {"1": {"category": "zebra"}, "2": {"category": "person"}, "3": {"category": "quokka"}}
    meta = write_json(tmp_path / "meta.json", {"videos": {"a": {"objects": objects}}})
    found = ytvos(tmp_path / "true", tmp_path / "pred", meta)
    f = [boundary_accuracy(pred[1] == k, true[1] == k) for k in (1, 2, 3)]
    expected = {"J_seen": 0.75, "F_seen": (f[0] + f[1]) / 2, "J_unseen": 0.25, "F_unseen": f[2]}
    assert found == pytest.approx(expected | {"G": np.mean(list(expected.values()))}, **SAME)
    turned = ytvos(tmp_path / "true", tmp_path / "pred", meta, seen=frozenset({"quokka"}))
    assert turned["J_seen"] == 0.25 and turned["G"] == pytest.approx(found["G"])
    del objects["3"]
    write_json(meta, {"videos": {"a": {"objects": objects}}})
    with pytest.raises(ValueError, match="meta.json.*object 3 of a"): ytvos(tmp_path / "true", tmp_path / "pred", meta)


# ---- prompts

def test_prompt_miou_agrees_with_drawn_masks(tmp_path):
    rng = np.random.default_rng(0)
    masks = [blobs(rng, 1, 150, 200, 1)[0] > 0 for _ in range(12)]
    guess = [np.roll(m, rng.integers(-4, 5, 2), (0, 1)) for m in masks]
    plain = lambda m: {"size": [150, 200], "counts": rle_runs(rle(m)["counts"]).tolist()}
    marks = [{"id": k, "image_id": 1, "iscrowd": int(k == 5), "segmentation": (rle if k % 2 else plain)(m)} for k,
             m in enumerate(masks)]
    gt = {"images": [{"id": 1, "height": 150, "width": 200}], "annotations": marks}
    answers = [{"annotation_id": k, "segmentation": rle(m)} for k, m in enumerate(guess) if k != 5][::-1]
    found = prompt_miou(write_json(tmp_path / "gt.json", gt), write_json(tmp_path / "pred.json", answers))
    ious = {k: float(region_similarity(p, t)) for k, (p, t) in enumerate(zip(guess, masks)) if k != 5}
    assert found["mIoU"] == pytest.approx(np.mean(list(ious.values())), **SAME) and found["instances"] == 11
    small = [v for k, v in ious.items() if masks[k].sum() < 32 ** 2]
    assert small and found["mIoU_small"] == pytest.approx(np.mean(small), **SAME)
    write_json(tmp_path / "pred.json", answers[1:])
    with pytest.raises(ValueError, match="1 of 11 instances.*not answered"):
        prompt_miou(tmp_path / "gt.json", tmp_path / "pred.json")


# ---- phrases in images

def saco(path: Path, units: list[np.ndarray], exhaustive: dict[int, int] | None = None) -> Path:
    "SA-Co ground truth of masks [n, H, W] for each unit."
    images, marks = [], []
    for k, masks in enumerate(units):
        image, found = saco_pair(k, f"{k}.jpg", f"phrase {k}", "", masks, len(marks))
        images.append(image | {"is_instance_exhaustive": (exhaustive or {}).get(k, 1)}); marks += found
    return write_json(path, {"images": images, "annotations": marks})


def answers(path: Path, said: list[tuple[int, float, np.ndarray]]) -> Path:
    return write_json(path, [{"image_id": i, "category_id": 1, "score": s, "segmentation": rle(m)} for i, s, m in said])


def plain_counts(preds: list[np.ndarray], truths: list[np.ndarray]) -> list[tuple[int, int, int]]:
    "TP, FP, FN at each τ by trying every assignment of drawn masks."
    iou = np.array([[(p & t).sum() / max((p | t).sum(), 1) for t in truths] for p in preds]).reshape(len(preds),
        len(truths))
    few, many = sorted(iou.shape)
    pairs = lambda order: [(i, j) if len(preds) <= len(truths) else (j, i) for i, j in zip(range(few), order)]
    best = max((pairs(o) for o in itertools.permutations(range(many), few)),
               key=lambda pairs: sum(iou[p] for p in pairs))
    tp = [sum(iou[p] >= tau for p in best) for tau in np.linspace(0.5, 0.95, 10)]
    return [(n, len(preds) - n, len(truths) - n) for n in tp]


def plain_cgf1(units: list[list[tuple[int, int, int]]]) -> dict[str, float]:
    "The formulas of the issue, one number at a time."
    level = Counter((tp + fn > 0, tp + fp > 0) for (tp, fp, fn), *_ in units)
    a, b, c, d = level[True, True], level[False, True], level[True, False], level[False, False]
    mcc = (a * d - b * c) / (math.sqrt((a + b) * (a + c) * (d + b) * (d + c)) + 1e-6)
    f1 = []
    for k in range(10):
        tp, fn = sum(u[k][0] for u in units), sum(u[k][2] for u in units)
        fp = sum(u[k][1] for u in units if u[k][0] + u[k][2] > 0)
        precision, recall = tp / (tp + fp + 1e-4), tp / (tp + fn + 1e-4)
        f1.append(2 * precision * recall / (precision + recall + 1e-4))
    return {"cgF1": np.mean([f * mcc for f in f1]), "IL_MCC": mcc, "pmF1": np.mean(f1)}


def world(rng: np.random.Generator, units: int) -> tuple[list[np.ndarray], list[tuple[int, float, np.ndarray]]]:
    "Instances [n, H, W] of some units, and predictions: shifted, doubled, missing, weak and invented ones."
    truths, said = [], []
    for k in range(units):
        masks = np.array([blobs(rng, 1, 40, 60, 1)[0] > 0 for _ in range(rng.integers(0, 4))]).reshape(-1, 40, 60)
        masks = masks[masks.any((1, 2))]
        truths.append(masks)
        for m in masks:
            for _ in range(rng.integers(0, 3)):
                said.append((k, float(rng.choice([0.2, 0.5, 0.9])), np.roll(m, rng.integers(-2, 3, 2), (0, 1))))
        if rng.random() < 0.3: said.append((k, float(rng.choice([0.2, 0.5, 0.9])), blobs(rng, 1, 40, 60, 1)[0] > 0))
    return truths, said


def test_pcs_image_agrees_with_the_plain_way(tmp_path):
    truths, said = world(np.random.default_rng(0), 40)
    here = lambda k: [m for i, s, m in said if i == k and s >= 0.5]
    expected = plain_cgf1([plain_counts(here(k), list(masks)) for k, masks in enumerate(truths)])
    found = pcs_image(saco(tmp_path / "gt.json", truths), answers(tmp_path / "pred.json", said))
    assert found == pytest.approx(expected, **SAME) and 0.05 < found["cgF1"] < 0.9
    answers(tmp_path / "pred.json", said[::-1])
    assert pcs_image([str(tmp_path / "gt.json")], str(tmp_path / "pred.json")) == pytest.approx(found,
        **SAME), "order does not matter"


def test_best_of_three_annotators(tmp_path):
    rng = np.random.default_rng(1)
    drawn = [world(rng, 30) for _ in range(3)]
    said, missing = drawn[0][1], {3: 0, 8: 0}
    files = [saco(tmp_path / f"{k}.json", truths, missing if k == 1 else {}) for k, (truths, _) in enumerate(drawn)]
    units = []
    for k in set(range(30)) - missing.keys():
        best, chosen = -1, None
        for truths, _ in drawn:
            counts = plain_counts([m for i, s, m in said if i == k and s >= 0.5], list(truths[k]))
            parts = [(tp / (tp + fp + 1e-4), tp / (tp + fn + 1e-4)) for tp, fp, fn in counts]
            f1 = np.mean([2 * p * r / (p + r + 1e-4) for p, r in parts]) if any(counts[0]) else 2
            if f1 > best: best, chosen = f1, counts
        units.append(chosen)
    answers(tmp_path / "pred.json", said)
    found = pcs_image(files, tmp_path / "pred.json")
    assert found == pytest.approx(plain_cgf1(units), **SAME)
    assert found["cgF1"] > pcs_image(files[0], tmp_path / "pred.json")["cgF1"]


def test_pcs_image_by_hand(tmp_path):
    """An instance at IoU .6 (right at 3 of 10 τ), one missed, one invented, one rightly not seen. A score of ½ counts,
    .499 does not."""
    a, b = np.zeros((2, 40, 60), bool); a[:10, :10], b[:10, :6] = True, True
    gt = saco(tmp_path / "gt.json", [a[None], a[None], a[None][:0], a[None][:0]])
    found = pcs_image(gt, answers(tmp_path / "pred.json", [(0, 0.5, b), (1, 0.499, a), (2, 0.9, a)]))
    assert found["IL_MCC"] == pytest.approx((1 * 1 - 1 * 1) / (2 + 1e-6), abs=1e-9) and found["cgF1"] == 0
    f1 = 2 * (1 / 1.0001) * (1 / 2.0001) / (1 / 1.0001 + 1 / 2.0001 + 1e-4)
    assert found["pmF1"] == pytest.approx(0.3 * f1, **SAME)
    perfect = pcs_image(gt, answers(tmp_path / "pred.json", [(0, 0.9, a), (1, 0.9, a)]))
    assert perfect == pytest.approx({"cgF1": 1, "IL_MCC": 1, "pmF1": 1}, abs=2e-4)
    assert pcs_image(gt, answers(tmp_path / "pred.json", [])) == {"cgF1": 0, "IL_MCC": 0, "pmF1": 0}


def test_counts_are_those_of_cocoeval(tmp_path):
    "Where no prediction meets two instances, COCO's greedy matching has no choice either."
    rng, truths, said = np.random.default_rng(2), [], []
    y, x = np.mgrid[:40, :90]
    for k in range(8):
        masks = np.stack([np.hypot(y - 20, x - c) < rng.uniform(6, 11) for c in (15, 45, 75)])[:rng.integers(1, 4)]
        truths.append(masks)
        moved = [np.roll(m, rng.integers(-3, 4, 2), (0, 1)) for m in masks]
        said += [(k, float(s), m) for m, s in zip(moved, rng.uniform(0.5, 1, 3)) if rng.random() < 0.8]
    gt, pred = saco(tmp_path / "gt.json", truths), answers(tmp_path / "pred.json", said)
    record = json.loads(gt.read_text())
    for a in record["annotations"]: a["id"] += 1  # COCOeval takes an id of 0 for "not matched"
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(); truth.dataset = record | {"categories": [{"id": 1, "name": "phrase"}]}
        truth.createIndex()
        judge = COCOeval(truth, truth.loadRes(json.loads(pred.read_text())), "segm")
        judge.params.areaRng = [[0, 1e10]]
        judge.evaluate()
    tp = {e["image_id"]: (e["dtMatches"] > 0).sum(1) for e in judge.evalImgs if e}
    here = Counter(i for i, *_ in said)
    units = [[(n, here[k] - n, len(m) - n) for n in tp.get(k, [0] * 10)] for k, m in enumerate(truths)]
    assert pcs_image(gt, pred) == pytest.approx(plain_cgf1(units), **SAME) and len({int(n[0][0]) for n in units}) > 1


def test_pcs_image_says_what_is_amiss(tmp_path):
    a = np.zeros((40, 60), bool); a[:10, :10] = True
    gt, pred = saco(tmp_path / "gt.json", [a[None], a[None]]), tmp_path / "pred.json"
    def fails(words, content, *more):
        with pytest.raises(ValueError, match=words) as e: pcs_image([gt, *more], write_json(pred, content))
        assert len(str(e.value).splitlines()) == 1
    one = {"image_id": 0, "score": 0.9, "segmentation": rle(a)}
    fails("prediction 0 has no score", [{k: v for k, v in one.items() if k != "score"}])
    fails("prediction 1: size .30, 60", [one, one | {"segmentation": rle(a[:30])}])
    fails("prediction 1 do not add up", [one,
                                         one | {"segmentation": {"size": [40, 60], "counts": rle(a)["counts"][:3]}}])
    fails("prediction 1 has no mask", [one, one | {"segmentation": None}])
    fails("none of its image_ids", [one | {"image_id": 70}])
    fails("not a list", {"annotations": []})
    fails("other.json: lacks images", [one], saco(tmp_path / "other.json", [a[None]]))
    fails("gt.json|other.json: no annotations", [one], write_json(tmp_path / "other.json", {"images": []}))


# ---- phrases in video

def tracks(rng: np.random.Generator, frames: int, objects: int) -> np.ndarray:
    "Masks [N, T, H, W] that overlap and come and go."
    masks = np.array([blobs(rng, frames, 40, 60, 1) > 0 for _ in range(objects)]).reshape(objects, frames, 40, 60)
    masks[rng.random((objects, frames)) < 0.1] = False
    return masks


def whole(record: dict) -> dict:
    "A prediction with the boxes and areas that TrackEval asks for."
    codes = record["segmentations"]
    return record | {"bboxes": [c and coco.toBbox(c).tolist() for c in codes],
                     "areas": [c and float(coco.area(c)) for c in codes]}


def masklet(video: int, phrase: int, score: float, masks: np.ndarray) -> dict:
    codes = [rle(m) if m.any() else None for m in masks]
    return whole({"video_id": video, "category_id": phrase, "score": score, "segmentations": codes})


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> tuple[Path, Path, dict, list]:
    "VEval ground truth and predictions of three clips with crowded, empty and invented phrases; also as drawn masks."
    rng, folder = np.random.default_rng(5), tmp_path_factory.mktemp("veval")
    videos, said = [], []
    for v in range(3):
        masks, frames = tracks(rng, 9 + v, 7), 9 + v
        pairs = [("disc", [0, 1, 2]), ("ball", [3]), ("blob", [3, 4, 5, 6]), ("star", []), ("ring", [])]
        videos.append((f"clip{v}", masks, pairs, [f"clip{v}/{t:05d}.jpg" for t in range(frames)]))
    gt = veval_file(videos)
    number = {c["name"]: c["id"] for c in gt["categories"]}
    truths = {(v, number[p]): masks[members] for v, (_, masks, pairs, _) in enumerate(videos) for p, members in pairs}
    for (v, c), masks in truths.items():
        for m in masks:
            moved = np.stack([np.roll(f, rng.integers(-1, 2, 2), (0, 1)) for f in m])
            cut = rng.integers(0, len(m)) if rng.random() < 0.5 else 0
            for part in (slice(0, cut), slice(cut, None)):
                kept = np.zeros_like(moved); kept[part] = moved[part]
                if kept.any() and rng.random() < 0.9: said.append((v, c, float(rng.choice([0.3, 0.5, 0.7, 0.9])), kept))
        if rng.random() < 0.4: said.append((v, c, 0.8, tracks(rng, masks.shape[1] if len(masks) else 9 + v, 1)[0]))
    assert any(s == 0.5 for *_, s, _ in said) and any(not len(truths[v, c]) for v, c, *_ in said)
    return write_json(folder / "gt.json", gt), write_json(folder / "pred.json",
                                                          [masklet(*row) for row in said]), truths, said


def plain_hota(truths: dict, said: list) -> dict[str, float]:
    "HOTA from drawn masks, a frame and a threshold at a time; the match of a frame by trying all."
    alphas, totals = np.arange(0.05, 0.99, 0.05), np.zeros((19, 4))
    for key, true in truths.items():
        pred = [m for v, c, s, m in said if (v, c) == key and s > 0.5]
        frames, shared = range(true.shape[1]), np.zeros((len(true), len(pred)))
        seen = [[[k for k, m in enumerate(some) if m[t].any()] for some in (true, pred)] for t in frames]
        iou = [{(g, p): (true[g][t] & pred[p][t]).sum() / (true[g][t] | pred[p][t]).sum() for g, p in itertools.product(
            *seen[t])} for t in frames]
        for t in frames:
            for (g, p), s in iou[t].items():
                rivals = sum(v for (a, _), v in iou[t].items() if a == g) + sum(v for (_, b),
                    v in iou[t].items() if b == p) - s
                if rivals > 0: shared[g, p] += s / rivals
        life = [[sum(k in s[side] for s in seen) for k in range(len(some))] for side, some in enumerate((true, pred))]
        together = np.zeros((19, len(true), len(pred)))
        for t in frames:
            gs, ps = seen[t]
            few, many = sorted((gs, ps), key=len)
            gain = {(g, p): shared[g, p] / (life[0][g] + life[1][p] - shared[g, p]) * s for (g, p), s in iou[t].items()}
            pairs = lambda order, few=few, first=few is gs: [(a, b) if first else (b, a) for a, b in zip(few, order)]
            options = [pairs(order) for order in itertools.permutations(many, len(few))]
            match = max(options, key=lambda pairs: sum(gain[pair] for pair in pairs))
            for k, alpha in enumerate(alphas):
                right = [pair for pair in match if iou[t][pair] >= alpha - np.finfo(float).eps]
                for pair in right: together[k][pair] += 1
                totals[k, :3] += len(right), len(gs) - len(right), len(ps) - len(right)
        for k in range(19):
            for g, p in np.argwhere(together[k] > 0):
                n = together[k, g, p]
                totals[k, 3] += n * n / (life[0][g] + life[1][p] - n)
    tp, fn, fp, association = totals.T
    deta, assa = tp / np.maximum(tp + fn + fp, 1), association / np.maximum(tp, 1)
    return {"pHOTA": np.sqrt(deta * assa).mean(), "DetA": deta.mean(), "AssA": assa.mean()}


def test_pcs_video_agrees_with_the_plain_way(clips):
    gt, pred, truths, said = clips
    found = pcs_video(gt, pred)
    units = []
    for key, true in truths.items():
        some = [m for v, c, s, m in said if (v, c) == key and s >= 0.5]
        units.append(plain_counts([m.reshape(-1) for m in some], [m.reshape(-1) for m in true]))
    assert found == pytest.approx(plain_cgf1(units) | plain_hota(truths, said), **SAME)
    assert 0.05 < found["cgF1"] < 0.9 and 0.2 < found["pHOTA"] < 0.95 and found["DetA"] != pytest.approx(found["AssA"],
        abs=0.01)


def trackeval_hota(gt_json: Path, pred_json: Path, folder: Path) -> dict[str, float]:
    "HOTA by TrackEval's YouTube-VIS evaluator, every (video, phrase) a video of its own with one class."
    trackeval = pytest.importorskip("trackeval",
                                    reason="TrackEval, the referee of HOTA, is not installed (pip install trackeval)")
    gt, pred = json.loads(gt_json.read_text()), [p for p in json.loads(pred_json.read_text()) if p["score"] > 0.5]
    plain = lambda masks: [m and {"size": m["size"], "counts": rle_runs(m["counts"]).tolist()} for m in masks]
    videos, number = {v["id"]: v for v in gt["videos"]}, {}
    for m in [*gt["annotations"], *pred]: number.setdefault((m["video_id"], m["category_id"]), len(number) + 1)
    own = lambda m: {**m, "video_id": number[m["video_id"], m["category_id"]], "category_id": 1}
    copy = lambda v, n: videos[v] | {"id": n, "file_names": [f"pair{n}/{f}" for f in videos[v]["file_names"]]}
    remapped = {"videos": [copy(v, n) for (v, _), n in number.items()], "categories": [{"id": 1, "name": "object"}],
                "annotations": [own(a) | {"segmentations": plain(a["segmentations"])} for a in gt["annotations"]]}
    places = folder / "gt" / "youtube_vis_all", folder / "trackers" / "youtube_vis_all" / "one" / "data"
    for place, content in zip(places, (remapped, [own(p) for p in pred])):
        place.mkdir(parents=True)
        write_json(place / "all.json", content)
    outputs = ("PRINT_CONFIG", "PRINT_RESULTS", "OUTPUT_SUMMARY", "OUTPUT_DETAILED", "OUTPUT_EMPTY_CLASSES",
               "PLOT_CURVES", "TIME_PROGRESS")
    quiet, where = dict.fromkeys(outputs, False), {"GT_FOLDER": f"{folder}/gt/",
                                                   "TRACKERS_FOLDER": f"{folder}/trackers/"}
    with contextlib.redirect_stdout(io.StringIO()):
        data = trackeval.datasets.YouTubeVIS({**where, "SPLIT_TO_EVAL": "all", "PRINT_CONFIG": False})
        judge = trackeval.Evaluator({**quiet, "LOG_ON_ERROR": None})
        found = judge.evaluate([data],
                               [trackeval.metrics.HOTA()])[0]["YouTubeVIS"]["one"]["COMBINED_SEQ"]["object"]["HOTA"]
    return {"pHOTA": found["HOTA"].mean(), "DetA": found["DetA"].mean(), "AssA": found["AssA"].mean()}


def test_phota_agrees_with_trackeval(clips, tmp_path):
    gt, pred, *_ = clips
    expected, found = trackeval_hota(gt, pred, tmp_path), pcs_video(gt, pred)
    assert {k: found[k] for k in expected} == pytest.approx(expected, **SAME)


def test_pcs_video_properties(clips, tmp_path):
    "Perfect is 1; ids and order do not matter; quiet predictions do not count, save that they name a unit."
    gt, pred, truths, said = clips
    score = lambda rows: pcs_video(gt, write_json(tmp_path / "pred.json", rows))
    rows, before = [masklet(*row) for row in said], pcs_video(gt, pred)
    perfect = score([masklet(*key, 0.9, m) for key, masks in truths.items() for m in masks])
    assert perfect == pytest.approx(dict.fromkeys(before, 1), abs=2e-4)
    assert score([{"id": k, **row} for k, row in enumerate(rows)][::-1]) == pytest.approx(before, **SAME)
    bare = [{k: row[k] for k in ("video_id", "category_id", "score", "segmentations")} for row in rows]
    assert score(bare) == before
    assert score([r for r in rows if r["score"] >= 0.5]) == before
    invented = score([*rows, rows[0] | {"category_id": 999, "score": 0.9}])
    assert (invented["IL_MCC"] < before["IL_MCC"] and invented["pmF1"] == before["pmF1"]
            and invented["DetA"] < before["DetA"])
    assert score([*rows, rows[0] | {"category_id": 999,
                                    "score": 0.1}])["IL_MCC"] > before["IL_MCC"], "one more unit that is rightly quiet"
    assert score([]) == dict.fromkeys(before, 0)


def test_swapped_objects_by_hand(tmp_path):
    """Two objects that never touch, exchanged after two of four frames: every frame is right, and each match is
    together for 2 of 6 frames."""
    masks = np.zeros((2, 4, 40, 60), bool); masks[0, :, :10, :10], masks[1, :, 20:30, 20:30] = True, True
    swapped = masks.copy(); swapped[:, 2:] = masks[::-1, 2:]
    gt = write_json(tmp_path / "gt.json",
                    veval_file([("a", masks, [("square", [0, 1]), ("star", [])], [f"a/{t}.jpg" for t in range(4)])]))
    number = json.loads(gt.read_text())["annotations"][0]["category_id"]
    found = pcs_video(gt, write_json(tmp_path / "pred.json", [masklet(0, number, 0.51, m) for m in swapped]))
    assert found["DetA"] == 1 and found["AssA"] == pytest.approx(2 / 6) and found["pHOTA"] == pytest.approx((2 / 6)
        ** 0.5)
    assert found["IL_MCC"] == pytest.approx(1,
                                            abs=1e-5) and found["pmF1"] == 0, ("over space and time each masklet has "
                                                "an "
                                                "IoU of 1/3")
    half = pcs_video(gt, write_json(tmp_path / "pred.json", [masklet(0, number, 0.5, m) for m in masks]))
    assert half["pmF1"] == pytest.approx(1,
                                         abs=2e-4) and half["pHOTA"] == 0, ("a score of ½ counts for cgF1 and not for "
                                             "pHOTA")


def test_pcs_video_says_what_is_amiss(clips, tmp_path):
    gt, pred, _, said = clips
    row = masklet(*said[0])
    def fails(words, content, truth=gt):
        with pytest.raises(ValueError, match=words) as e: pcs_video(truth, write_json(tmp_path / "pred.json", content))
        assert len(str(e.value).splitlines()) == 1
    fails("prediction 1: no video 77", [row, row | {"video_id": 77}])
    fails("prediction 0: 8 masks for 9 frames", [row | {"segmentations": row["segmentations"][:8]}])
    fails("prediction 0: size .20, 60", [row | {"score": 0.9, "segmentations": [rle(np.ones((20, 60)))] * 9}])
    cut = {"size": [40, 60], "counts": rle(said[0][3][0] | True)["counts"][:1]}
    fails("prediction 1 do not add up", [row, row | {"score": 0.9, "segmentations": [cut] * 9}])
    fails("prediction 0 has no segmentations", [{"video_id": 0, "category_id": 1, "score": 1}])
    fails("no video_np_pairs", [row], write_json(tmp_path / "gt.json", {"videos": [], "annotations": []}))


# ---- the real VEval sample

def shifted(code: dict | None, by: int) -> dict | None:
    "A compressed mask moved `by` px along its columns, without drawing it; as it is where it has no room."
    runs = code and rle_runs(code["counts"])
    if code is None or len(runs) % 2 == 0 or runs[-1] < by or runs[0] + by < 0: return code
    runs[0] += by; runs[-1] -= by
    return code | {"counts": coco.frPyObjects(
        {"size": code["size"], "counts": runs.tolist()}, *code["size"])["counts"].decode()}


@pytest.fixture(scope="module")
def veval(real_files):
    path = real_files / "sa_co_veval" / "saco_veval_sav_test_sample_gt.json"
    gt = json.loads(path.read_text())
    return path, gt, [{k: a[k] for k in ("video_id", "category_id", "segmentations")} | {"score": 0.9}
                      for a in gt["annotations"]]


def test_real_veval_sample_against_perturbed_copies(veval, tmp_path):
    "33 masklets of 146 frames of 1280 × 720; a figure in about a second, and it moves as it should."
    path, gt, copy = veval
    start = time.perf_counter()
    score = lambda rows: pcs_video(path, write_json(tmp_path / "pred.json", rows))
    perfect = score(copy)
    assert perfect == pytest.approx(dict.fromkeys(perfect, 1), abs=2e-4)
    dropped = score(copy[::2])
    assert dropped["AssA"] == 1 and dropped["DetA"] < 0.75 and dropped["pmF1"] < 0.75
    jittered = [score([row | {"segmentations": [shifted(m, n * 1280) for m in row["segmentations"]]} for row in copy])
                for n in (2, 6)]
    for k in ("cgF1", "pmF1", "pHOTA", "DetA", "AssA"):
        assert perfect[k] > jittered[0][k] + 0.02 > jittered[1][k] + 0.04, k
    assert all(j["IL_MCC"] == perfect["IL_MCC"] for j in jittered)
    chain, = (p["category_id"] for p in gt["video_np_pairs"] if p["num_masklets"] == 0)  # the sample's one negative
    invented = score([*copy, copy[0] | {"category_id": chain}])
    assert invented["pmF1"] == perfect["pmF1"] and invented["IL_MCC"] == 0 == invented["cgF1"]
    assert 0.9 < invented["DetA"] < 1 and invented["AssA"] == 1
    assert time.perf_counter() - start < 30


def test_real_veval_sample_agrees_with_trackeval(veval, tmp_path):
    path, _, copy = veval
    rng, rows = np.random.default_rng(0), []
    for row in copy:
        masks, cut = [shifted(m, int(rng.integers(-3, 4)) * 1280) for m in row["segmentations"]], int(rng.integers(146))
        rows += [whole(row | {"segmentations": part}) for part in (masks[:cut] + [None] * (146 - cut),
            [None] * cut + masks[cut:])]
    expected = trackeval_hota(path, write_json(tmp_path / "pred.json", rows), tmp_path)
    found = pcs_video(path, tmp_path / "pred.json")
    assert {k: found[k] for k in expected} == pytest.approx(expected, **SAME) and 0.2 < found["pHOTA"] < 0.9
