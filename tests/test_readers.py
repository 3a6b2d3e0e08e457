"""Readers and batches on real files (`../shared/data` beside the repository, skipped where it is not) and on broken
ones."""
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from esam3.core import Part
from esam3.data.batches import (
    Steps, augment, collate_clips, collate_images, draw, frame_batch, load_recipe, open_dataset, rng_at,
    turned_hue)
from esam3.data.public_sets import SaVFolders, Vos
from esam3.data.readers import Davis, Sa1b, SaCoImages, SaCoVideo, SaV, TooShort, Videos
from esam3.data.samples import (
    BadSample, ClipSample, ImageSample, Phrase, Reported, RunMasks, Video, boxes_of, decode_rle, read_image,
    rle_area, video_frames)
from esam3.data.toyfiles import toyworld, write_mp4

REAL = Path(__file__).resolve().parents[2] / "shared" / "data"
real = pytest.mark.skipif(not REAL.exists(), reason="needs the sample files in ../shared/data")


@pytest.fixture(scope="module")
def tiny():
    return toyworld("tiny")


def numbered(frames, height, width):
    "Frames whose grey level is their number."
    return np.stack([np.full((height, width, 3), 16 + 2 * t, np.uint8) for t in range(frames)])


@pytest.fixture(scope="module")
def sav(tmp_path_factory):
    "The real annotation pair beside 100 numbered frames that stand in for its video."
    folder = tmp_path_factory.mktemp("sav") / "sav_000"
    shutil.copytree(REAL / "sa_v", folder)
    write_mp4(folder / "sav_000001.mp4", numbered(100, 848, 480))
    return folder.parent


# ---- real files

@real
@pytest.mark.parametrize("by", ["manual", "auto"])
def test_sav_run_lengths_have_the_stated_areas(by):
    record = json.loads((REAL / "sa_v" / f"sav_000001_{by}.json").read_text())
    for n, stated in enumerate(record["masklet_size_abs"]):
        areas = np.array([rle_area(frame[n]) for frame in record["masklet"]])
        assert areas[areas > 0].mean() == pytest.approx(stated, rel=1e-6)
    first = record["masklet"][0][1]
    assert decode_rle(first, (848, 480)).sum() == rle_area(first)


@real
def test_sav_clip_takes_every_fourth_frame(sav):
    reader = SaV(sav)
    clip = reader.read(0, frames=5, start=9)
    assert clip.numbers == [36, 40, 44, 48, 52] and clip.frames.shape == (5, 848, 480, 3)
    grey = (clip.frames.mean((1, 2, 3)) - 16) / 2
    assert np.abs(grey - clip.numbers).max() < 1.5
    record = json.loads((REAL / "sa_v" / "sav_000001_manual.json").read_text())
    for k, mask in zip(clip.ids, clip.masks):
        assert mask.sum((1, 2)).tolist() == [rle_area(record["masklet"][t][k]) for t in range(9, 14)]
    assert clip.notes == [("annotations beyond the video's end", "sav_000001")] and clip.annotated.all()


@real
def test_sav_windows_and_limits(sav):
    manual, auto = SaV(sav), SaV(sav, by="auto")
    assert len(auto.read(0, frames=4, start=0).ids) > 8 >= len(auto.read(0, rng_at(0, 0), frames=4, limit=8).ids)
    starts = {manual.read(0, rng_at(0, k), frames=4, limit=8).numbers[0] for k in range(6)}
    assert len(starts) > 2 and max(starts) <= 84
    assert manual.read(0, rng_at(0, 1), frames=4).numbers == manual.read(0, rng_at(0, 1), frames=4).numbers
    with pytest.raises(BadSample, match="25 annotated frames, 26 asked for"): manual.read(0, frames=26)


@real
def test_sav_without_its_video_says_so():
    reader = SaV(REAL / "sa_v")
    assert len(reader) == 1
    with pytest.raises(BadSample, match=r"sav_000001\.mp4: no such video"): reader.read(0)


@real
def test_davis_sparse_masks():
    clip = Davis(REAL / "davis", split="val").read(0)
    assert clip.frames.shape == (16, 480, 854, 3) and clip.ids == [1, 2, 3, 4]
    assert [np.flatnonzero(row).tolist() for row in clip.annotated] == [[0], [5], [8], [13]]
    assert (clip.visible == clip.annotated).all()
    reported = Reported()
    with pytest.warns(UserWarning, match="853×480 → 854×480"): reported.add(clip.notes)
    assert reported.counts == {"mask resized to its image": 1}


@real
def test_davis_narrow_mask_keeps_its_object():
    clip = Davis(REAL / "davis").read(0)
    raw = np.asarray(Image.open(REAL / "davis/Annotations/480p/judo/00005.png")) == 2
    assert abs(int(clip.masks[1, 5].sum()) - int(raw.sum())) < 0.01 * raw.sum()
    assert np.abs(boxes_of(clip.masks[1, 5][None]) - boxes_of(raw[None])).max() <= 1


@real
def test_davis_objects_that_come_later():
    clip = Davis(REAL / "davis").read(0)
    kept, dropped = (collate_clips([clip], 144, 128, late=late) for late in ("keep", "drop"))
    assert kept.first.tolist() == [0, 5, 8, 13] and kept.late == dropped.late == 3 and len(dropped.clip) == 1
    assert kept.visible.sum() == 4 and torch.isnan(kept.boxes[~kept.visible]).all()
    assert kept.coverage("student", 32).shape == (4, 16, 32, 32)
    assert Davis(REAL / "davis", year=2017).read(0, rng_at(0, 0), frames=3).numbers[0] in (0, 5, 8, 13)


@real
def test_davis_unknown_split_names_those_there():
    with pytest.raises(FileNotFoundError, match="val.txt"): Davis(REAL / "davis", split="train")


@pytest.fixture(scope="module")
def veval(tmp_path_factory):
    "The real ground truth, with black images for frames 20 to 23 of its video."
    media, truth = tmp_path_factory.mktemp("veval"), REAL / "sa_co_veval/saco_veval_sav_test_sample_gt.json"
    for file in json.loads(truth.read_text())["videos"][0]["file_names"][20:24]:
        (media / file).parent.mkdir(exist_ok=True)
        Image.new("RGB", (720, 1280)).save(media / file)
    return SaCoVideo(truth, media)


@real
def test_veval_phrases_and_masklets(veval):
    clip = veval.read(0, frames=4, start=20)
    assert clip.name == "sav_000208" and clip.numbers == [80, 84, 88, 92] and len(clip.phrases) == 8
    named = {p.text: p for p in clip.phrases}
    assert named["thick gold chain"].instances == () and named["thick gold chain"].negative == "easy"
    assert all(bool(p.instances) != bool(p.negative) for p in clip.phrases)
    with pytest.raises(BadSample, match="not a readable image"): veval.read(0, frames=4, start=21)


@real
def test_veval_masks_have_the_stated_boxes_and_areas(veval):
    clip = veval.read(0, frames=4, start=20)
    truth = {m["id"]: m
             for m in json.loads((REAL / "sa_co_veval/saco_veval_sav_test_sample_gt.json").read_text())["annotations"]}
    for number, masks in zip(clip.ids, clip.masks):
        mark = truth[number]
        for t, mask in enumerate(masks):
            if mark["segmentations"][20 + t] is None: assert not mask.any(); continue
            x, y, w, h = mark["bboxes"][20 + t]
            assert mask.sum() == mark["areas"][20 + t] and boxes_of(mask[None])[0].tolist() == [x, y, x + w, y + h]


@real
@pytest.mark.parametrize("name, size", [("bedroom", (200, 540, 960)), ("01_dog", (289, 720, 1280))])
def test_video_frames_are_those_of_another_decoder(name, size):
    import av
    path, wanted = REAL / "video" / f"{name}.mp4", [0, 1, 30, 97]
    frames = video_frames(path, wanted)
    assert len(Video(path)) == size[0] and frames.shape == (4, *size[1:], 3) and frames.dtype == np.uint8
    with av.open(str(path)) as box:
        theirs = {k: f.to_ndarray(format="rgb24") for k, f in zip(range(98), box.decode(video=0)) if k in wanted}
    for k, frame in zip(wanted, frames): assert np.abs(frame.astype(int) - theirs[k]).mean() < 2, k


@real
def test_photographs_become_a_batch():
    from esam3.data.samples import ImageSample
    images = [read_image(p) for p in sorted((REAL / "images").glob("*.jpg"))]
    samples = [ImageSample(str(k), p, np.ones((1, *p.shape[:2]), bool)) for k, p in enumerate(images)]
    batch = collate_images(samples, 1008, 1024)
    assert batch.teacher_pixels.shape == (3, 3, 1008, 1008) and batch.student_pixels.shape == (3, 3, 1024, 1024)
    for k, valid in enumerate(batch.spaces.valid("student", 1024)):
        assert (batch.student_pixels[k][:, ~valid] == 0).all()
    small = augment(samples[0], rng_at(0, 0))
    assert 640 <= min(small.image.shape[:2]) and max(small.image.shape[:2]) <= 1024


# ---- broken files

@pytest.fixture()
def loose(tiny, tmp_path):
    "Six loose SA-1B samples, to be broken."
    with tarfile.open(tiny / "images.tar") as tar:
        for m in tar:
            if m.isfile() and m.name[:9] < "sa_000006":
                (tmp_path / Path(m.name).name).write_bytes(tar.extractfile(m).read())
    return tmp_path


def edit(path, change):
    record = json.loads(path.read_text()); change(record); path.write_text(json.dumps(record))


def test_sa1b_loose_files_read_like_the_tar(tiny, loose):
    a, b = Sa1b(tiny / "images.tar").read(3), Sa1b(loose).read(3)
    assert len(Sa1b(loose)) == 6 and (a.image == b.image).all() and (a.masks == b.masks).all()


def ruin(folder):
    "One kind of damage to each of the first five samples; the sixth stays."
    jpg, note = (lambda k: folder / f"sa_{k:06d}.jpg"), (lambda k: folder / f"sa_{k:06d}.json")
    jpg(0).write_bytes(jpg(0).read_bytes()[:900])
    note(1).write_text("{")
    note(2).unlink()
    edit(note(3), lambda r: r["annotations"][0]["segmentation"].update(size=[7, 7]))
    edit(note(4),
         lambda r: r["annotations"][0]["segmentation"].update(
             counts=r["annotations"][0]["segmentation"]["counts"][:-1]))


def test_sa1b_each_damage_is_named(loose):
    ruin(loose)
    reader = Sa1b(loose)
    said = ["sa_000000.jpg: not a readable image", "sa_000001.json: not a readable annotation",
            "sa_000002.json: missing",
            "sa_000003.json, annotation 0: mask of 7×7", "sa_000004.json, annotation 0: (unreadable|run lengths)"]
    for k, pattern in enumerate(said):
        with pytest.raises(BadSample, match=pattern): reader.read(k)
    assert len(reader.read(5).masks)


def test_damage_is_skipped_counted_and_the_same_each_time(loose):
    ruin(loose)
    reader, reported = Sa1b(loose), Reported()
    steps = Steps(reader, lambda samples, rngs, rng: collate_images(samples, 144, 128, rngs=rngs), seed=1, batch=3)
    with pytest.warns(UserWarning, match="skipped"):
        for k in range(8): reported.add(steps[Part(k)].notes)
    assert reported.counts == {"skipped": 5} and set(steps[Part(0)].names) == {"sa_000005"}
    worker = next(iter(DataLoader(steps, batch_size=None, sampler=[Part(3)], num_workers=1)))
    assert worker.notes == steps[Part(3)].notes and worker.student_pixels.equal(steps[Part(3)].student_pixels)


def test_nothing_readable_is_an_error(loose):
    ruin(loose)
    for ext in ("jpg", "json"): (loose / f"sa_000005.{ext}").unlink()
    with pytest.raises(BadSample, match="20 samples in a row"): draw(Sa1b(loose), 0, 0, batch=1)


def test_sa1b_regions_without_ids_fall_into_components(loose):
    def merge(record):
        union = np.any([decode_rle(a["segmentation"], (
            record["image"]["height"], record["image"]["width"])) for a in record["annotations"]], 0)
        flat = np.r_[False, union.T.ravel()]                     # runs begin outside; counts as plain floats
        runs = np.diff(np.r_[1, np.flatnonzero(flat[1:] != flat[:-1]) + 1, flat.size])
        record["annotations"] = [{"segmentation": {"size": list(union.shape), "counts": runs.astype(float).tolist()}}]
    edit(loose / "sa_000004.json", merge)
    whole, parts = Sa1b(loose).read(4), Sa1b(loose, min_area=20).read(4)
    assert 1 < len(parts.masks) <= len(whole.masks) and (whole.masks.sum(0) <= 1).all()


def test_gzipped_tar_is_refused_with_the_remedy(tiny, tmp_path):
    import gzip
    (tmp_path / "a.tar").write_bytes(gzip.compress((tiny / "images.tar").read_bytes()))
    with pytest.raises(ValueError, match="gunzip"): Sa1b(tmp_path / "a.tar")
    with pytest.raises(FileNotFoundError, match="nothing at"): Sa1b(tmp_path / "sa_*.tar.zst")


def test_cut_tar_yields_what_is_before_the_cut(tiny, tmp_path):
    (tmp_path / "cut.tar").write_bytes((tiny / "images.tar").read_bytes()[:50_000])
    reader = Sa1b(tmp_path / "cut.tar")
    assert [kind for kind, _ in reader.notes] == ["tar ends early"] and len(reader.read(0).masks)
    with pytest.raises(BadSample, match="missing|cut short"): reader.read(len(reader) - 1)


@pytest.mark.parametrize("damage", ["short", "junk", "empty", "gone", "hole"])
def test_broken_videos(tiny, tmp_path, damage):
    source = tiny / "clip" / "toy_000000.mp4"
    shutil.copy(source.with_name("toy_000000_manual.json"), tmp_path)
    data, path = bytearray(source.read_bytes()), tmp_path / "toy_000000.mp4"
    if damage == "hole": data[500:len(data) // 2] = bytes(len(data) // 2 - 500)
    if damage != "gone":
        path.write_bytes({"short": data[:len(data) // 2], "junk": b"hello " * 200, "empty": b"", "hole": data}[damage])
    with pytest.raises(BadSample, match="toy_000000.mp4: (no such|not a readable|damaged)"): SaV(tmp_path).read(0)


def test_broken_sav_annotations(tiny, tmp_path):
    for f in (tiny / "clip").glob("toy_000000*"): shutil.copy(f, tmp_path)
    note = tmp_path / "toy_000000_manual.json"
    for change, pattern in ((lambda r: r.pop("masklet"), "not an SA-V annotation"),
                            (lambda r: r.update(masklet_id=[1]), "rows of other lengths"),
                            (lambda r: r.update(masklet=[[None for _ in row] for row in r["masklet"]]),
                             "no masklet in frames 0–7")):
        shutil.copy(tiny / "clip" / note.name, note); edit(note, change)
        with pytest.raises(BadSample, match=pattern): SaV(tmp_path).read(0)
    note.unlink()
    with pytest.raises(BadSample, match="not a readable annotation"): SaV(tmp_path).read(0)


def test_davis_missing_and_foreign_masks(tmp_path):
    for part in ("JPEGImages/480p/a", "Annotations/480p/a", "ImageSets/2017"): (tmp_path / part).mkdir(parents=True)
    (tmp_path / "ImageSets/2017/val.txt").write_text("a\n")
    Image.new("RGB", (64, 48)).save(tmp_path / "JPEGImages/480p/a/00000.jpg")
    with pytest.raises(BadSample, match="1 images and 0 masks"): Davis(tmp_path).read(0)
    mask = tmp_path / "Annotations/480p/a/00000.png"
    for image, pattern in ((Image.new("P", (48, 64)), "no palette mask"),
                           (Image.new("RGB", (64, 48)), "no palette mask"),
                           (Image.new("P", (64, 48)), "no object in frames")):
        image.save(mask)
        with pytest.raises(BadSample, match=pattern): Davis(tmp_path).read(0)
    mask.write_bytes(b"no png")
    with pytest.raises(BadSample, match="not a readable mask"): Davis(tmp_path).read(0)


def test_davis_dense_masks_mean_absence_and_2016_is_one_object(tmp_path):
    for part in ("JPEGImages/480p/a", "Annotations/480p/a", "ImageSets/2017", "ImageSets/2016"):
        (tmp_path / part).mkdir(parents=True)
    for year in (2016, 2017): (tmp_path / f"ImageSets/{year}/val.txt").write_text("a\n")
    for t, ids in enumerate(((1, 2), (1, 0))):
        Image.new("RGB", (64, 48)).save(tmp_path / f"JPEGImages/480p/a/{t:05d}.jpg")
        index = np.zeros((48, 64), np.uint8); index[:8, :8], index[20:30, 20:30] = ids
        Image.fromarray(index).convert("P").save(tmp_path / f"Annotations/480p/a/{t:05d}.png")
    clip = Davis(tmp_path).read(0)
    assert clip.annotated.all() and clip.visible.tolist() == [[True, True], [True, False]]
    assert Davis(tmp_path, year=2016).read(0).masks.sum((0, 2, 3)).tolist() == [164, 64]


def test_saco_crowds_and_shared_objects(tiny, tmp_path):
    record = json.loads((tiny / "saco/images.json").read_text())
    pair = next(p for p in record["images"] if not p["negative"])
    mine = [a for a in record["annotations"] if a["image_id"] == pair["id"]]
    record["images"] = [pair, {**pair, "id": 91, "text_input": "thing"},
                        {**pair, "id": 92, "text_input": "crowd", "is_instance_exhaustive": 0}]
    record["annotations"] = mine + [{**a, "image_id": k} for a in mine for k in (91, 92)]
    (tmp_path / "a.json").write_text(json.dumps(record))
    sample = SaCoImages(tmp_path / "a.json", tiny / "saco").read(0)
    assert len(sample.masks) == len(mine) and [p.text for p in sample.phrases] == [pair["text_input"], "thing"]
    assert sample.phrases[0].instances == sample.phrases[1].instances and [k for k,
        _ in sample.notes] == ["phrase without instance labels"]


def test_random_run_lengths_never_get_past_the_door():
    rng, passed = np.random.default_rng(0), 0
    for _ in range(3000):
        counts = bytes(rng.integers(40, 120, rng.integers(0, 30)).astype(np.uint8))
        try: assert decode_rle({"size": [40, 50], "counts": counts}, (40, 50)).shape == (40, 50); passed += 1
        except BadSample: pass
    assert passed < 300


# ---- samples without instances, and recipes

def test_images_without_instances_go_through(tiny):
    from esam3.data.samples import ImageSample
    empty = ImageSample("empty", np.zeros((96, 128, 3), np.uint8), np.zeros((0, 96, 128), bool))
    batch = collate_images([augment(empty, rng_at(0, 0), short=(96, 128), crop=128), Sa1b(tiny / "images.tar").read(0)],
                           144, 128)
    assert set(batch.image_index.tolist()) == {1} and len(batch.spaces.rasterise(
        batch.masks, "student", 32)) == len(batch.image_index)


def test_clips_without_tracks_go_through(tiny):
    clip = SaV(tiny / "clip").read(0, frames=4)
    clip.annotated[:] = False
    batch = collate_clips([clip], 144, 128)
    assert len(batch.clip) == 0 and batch.boxes.shape == (0, 4, 4) and batch.coverage("student", 16).shape == (0, 4, 16,
        16)


def test_clips_of_different_lengths_are_refused(tiny):
    reader = SaV(tiny / "clip")
    with pytest.raises(ValueError, match=r"clips of \[4, 5\] frames"):
        collate_clips([reader.read(0, frames=4), reader.read(1, frames=5)], 144, 128)


def test_recipe_without_data_says_what_to_download(monkeypatch, tmp_path):
    monkeypatch.setenv("ESAM3_DATA", str(tmp_path))
    for name in ("sa1b", "sav", "saco", "davis"):
        recipe = load_recipe(name)
        for split, kinds in recipe["splits"].items():
            for kind in kinds:
                with pytest.raises(FileNotFoundError, match="https://"): open_dataset(recipe, split, kind)


# ---- clips of bounded length, and those that are too short

@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    "Ten annotated frames, in which one object is to be seen from frame 6 on, in each layout of clips: reader by name."
    at = tmp_path_factory.mktemp("layouts")
    mask = np.zeros((48, 64), np.uint8); mask[4:24, 10] = 1
    folders = {"davis": ("JPEGImages/480p/a", "Annotations/480p/a"), "vos": ("JPEGImages/a", "Annotations/a"),
               "val": ("JPEGImages_24fps/a", "Annotations_6fps/a/001")}
    for name, (images, masks) in folders.items():
        for place in (images, masks): (at / name / place).mkdir(parents=True)
        for t in range(10): Image.new("RGB", (64, 48)).save(at / name / images / f"{t:05d}.jpg")
        for t in range(6, 10): Image.fromarray(mask).save(at / name / masks / f"{t:05d}.png")
    (at / "davis/ImageSets/2017").mkdir(parents=True); (at / "davis/ImageSets/2017/val.txt").write_text("a\n")
    write_mp4(at / "a.mp4", numbered(40, 48, 64))
    found = [None] * 6 + [{"size": [48, 64], "counts": [48 * 10 + 4, 20, 48 * 64 - 48 * 10 - 24]}] * 4
    (at / "a_manual.json").write_text(json.dumps({"masklet_id": [0], "masklet": [[f] for f in found]}))
    files = {"videos": [{"id": 1, "file_names": [f"a/{4 * t:05d}.jpg" for t in range(10)]}],
             "video_np_pairs": [{"video_id": 1, "category_id": 2, "noun_phrase": "it"}],
             "annotations": [{"id": 5, "video_id": 1, "category_id": 2, "segmentations": found}]}
    (at / "veval.json").write_text(json.dumps(files))
    for f in ("a.mp4", "a_manual.json"): (at / "sav").mkdir(exist_ok=True); shutil.copy(at / f, at / "sav")
    return {"sav": SaV(at / "sav"), "davis": Davis(at / "davis"), "vos": Vos(at / "vos"),
            "sav_folders": SaVFolders(at / "val"),
            "saco_video": SaCoVideo(at / "veval.json", at), "videos": Videos(at / "sav")}


@pytest.mark.parametrize("name", ["sav", "davis", "vos", "sav_folders", "saco_video", "videos"])
def test_at_most_so_many_frames(layouts, name):
    "From the first frame that shows something; a clip that is short enough comes whole."
    reader, step = layouts[name], 4 if name in ("sav", "saco_video", "videos") else 1
    numbers = lambda *given, **more: [n // step for n in reader.read(0, *given, **more).numbers]
    begin = 0 if name == "videos" else 6
    assert numbers(most=3) == [begin, begin + 1, begin
                               + 2] and numbers(most=60) == numbers(most=10) == numbers() == [*range(10)]
    assert numbers(most=6) == ([*range(6)] if name == "videos" else [6, 7, 8, 9]), "what begins late ends early"
    assert numbers(most=2, frames=4)[-1] - numbers(most=2, frames=4)[0] == 3 and numbers(most=3, start=8) == [8, 9]
    assert {len(numbers(rng_at(0, k), most=3)) for k in range(9)} == {3}


@pytest.mark.parametrize("name", ["sav", "davis", "vos", "sav_folders", "saco_video", "videos"])
def test_short_clips_are_no_damage(layouts, name):
    with pytest.raises(TooShort, match="10 annotated frames, 11 asked for"): layouts[name].read(0, frames=11)
    if name not in ("saco_video", "videos"):
        with pytest.raises(TooShort, match="no (masklet|object) in frames 1–3"):
            layouts[name].read(0, frames=3, start=1)


def test_what_was_drawn_is_counted_by_kind(tiny, tmp_path):
    "Of six clips one is damaged and three are shorter than asked for; the batch tells the one kind from the other."
    for f in (tiny / "clip").glob("toy_*"): shutil.copy(f, tmp_path)
    (tmp_path / "toy_000000_manual.json").write_text("{")
    for k in (1, 2, 3): edit(tmp_path / f"toy_{k:06d}_manual.json", lambda r: r.update(masklet=r["masklet"][:3]))
    batches = [collate_clips(draw(SaV(tmp_path), 0, step, batch=3, frames=4), 144, 128) for step in range(8)]
    kinds = {k: {d.split(":")[0] for b in batches for kind, d in b.notes if kind == k}
             for k in ("skipped", "too short")}
    assert kinds == {"skipped": {"toy_000000_manual.json"}, "too short": {f"toy_{k:06d}" for k in (1, 2, 3)}}
    assert all(len(b.names) == 3 and {*b.names} <= {"toy_000004", "toy_000005"} for b in batches)
    with pytest.raises(BadSample, match=r"20 samples in a row .*the last \((skipped|too short)\): toy_\d+"):
        draw(SaV(tmp_path), 0, 0, batch=1, frames=9)


# ---- one augmentation a clip, and what becomes of tracks and phrases

def clip_of(*seen: str, phrases=(), size=(40, 56)) -> ClipSample:
    """A clip whose track k is drawn as a stripe in the frames marked 1 in `seen[k]`, its frames grey noise; `?`: not
    annotated."""
    n, length = len(seen), len(seen[0])
    masks = np.zeros((n, length, *size), bool)
    for k, row in enumerate(seen):
        for t, c in enumerate(row): masks[k, t, 4:30, 6 * k + 2:6 * k + 7] = c == "1"
    frames = np.random.default_rng(0).integers(0, 256, (length, *size, 3), dtype=np.uint8)
    annotated = np.array([[c != "?" for c in row] for row in seen]).reshape(n, length)
    return ClipSample("clip", frames, masks, annotated, [10 + k for k in range(n)], [4 * t for t in range(length)],
                      [*phrases])


SMALL = {"short": (40, 64), "crop": 48}


@pytest.mark.parametrize("step", range(6))
def test_all_frames_of_a_clip_are_changed_alike(step):
    "Size, crop, flip and colour: an image that is repeated stays the same in all frames, and so do its masks."
    clip = clip_of("1111", "1111")
    clip.frames[:] = clip.frames[0]
    new = augment(clip, rng_at(0, step), **SMALL, jitter=0.3, hue=0.3)
    assert (new.frames == new.frames[0]).all() and (new.masks == new.masks[:, :1]).all()
    assert new.frames.shape[:3] == (4, *new.masks.shape[2:])
    assert not np.array_equal(new.frames[0][:40, :40], clip.frames[0][:40, :40])


def test_hue_is_drawn_only_when_asked_for():
    "Without hue: size, crop, flip and the three jitters, drawn in that order. With it colours differ."
    from torchvision.transforms import v2
    sample = ImageSample("a", clip_of("1").frames[0], np.ones((1, 40, 56), bool))
    plain, coloured = augment(sample, rng_at(0, 1), **SMALL), augment(sample, rng_at(0, 1), **SMALL, hue=0.3)
    torch.manual_seed(int(rng_at(0, 1).integers(2**63)))
    image = v2.RandomShortestSize(list(range(40, 65)))(torch.from_numpy(sample.image).movedim(-1, 0))
    h, w = (min(48, n) for n in image.shape[1:])
    wanted = v2.Compose([v2.RandomCrop((h, w)), v2.RandomHorizontalFlip(0.5), v2.ColorJitter(0.1, 0.1, 0.1)])(image)
    assert np.array_equal(plain.image, wanted.movedim(0, -1).numpy())
    assert coloured.image.shape == plain.image.shape and not np.array_equal(coloured.image, plain.image)


def test_tracks_that_leave_take_their_phrases_to_the_negatives():
    "What a crop leaves outside is gone; what stays keeps its id, its annotation and its phrases."
    phrases = [Phrase("left", (0,)), Phrase("both", (0, 7)), Phrase("right", (7,)), Phrase("none", (), "hard")]
    clip = clip_of("11", *["?1"] * 6, "1?", phrases=phrases)
    seen = set()
    for k in range(12):
        new = augment(clip, rng_at(0, k), short=(40, 40), crop=24, hue=0.1)
        place = {i: n for n, i in enumerate(new.ids)}
        seen.add(tuple(i in place for i in (10, 17)))
        assert new.masks.any((1, 2, 3)).all() and new.numbers == clip.numbers
        assert (new.annotated == clip.annotated[[i - 10 for i in new.ids]]).all()
        for old, p in zip(phrases, new.phrases):
            assert [new.ids[n] for n in p.instances] == [10 + i for i in old.instances if 10 + i in place]
            assert p.negative == ("" if p.instances else old.negative or "easy")
    assert len(seen) > 1 and (False, True) in seen


PHRASES = [Phrase("zero", (0,)), Phrase("zero and late", (0, 1)), Phrase("late", (1,)), Phrase("two and three", (2, 3)),
           Phrase("four", (4,)), Phrase("none", (), "hard")]


@pytest.mark.parametrize("step", range(5))
@pytest.mark.parametrize("late, tracks", [("drop", 0), ("drop", 2), ("keep", 3), ("keep", 0), ("drop", 1)])
def test_phrases_of_tracks_that_were_not_chosen_are_left_out(late, tracks, step):
    "They are still in sight: a negative would be a lie, and so would the rest of them."
    clip = clip_of("1111", "0011", "1111", "1010", "1111", phrases=PHRASES)
    batch = collate_clips([clip_of("1111"), clip], 144, 128, tracks=tracks, late=late,
                          rngs=[rng_at(0, step, k) for k in (0, 1)])
    mine = [i - 10 for i, b in zip(batch.ids, batch.clip) if b == 1]
    numbers = dict(enumerate(mine, start=int((batch.clip == 0).sum())))
    assert len(mine) == min(tracks or 9, 5 if late == "keep" else 4) and batch.phrases[0] == []
    said = {p.text: {numbers[n] for n in p.instances} for p in batch.phrases[1]}
    assert said == {p.text: {*p.instances} for p in PHRASES if {*p.instances} <= {*mine}}
    assert [p.negative for p in batch.phrases[1] if not p.instances] == ["hard"]


@pytest.mark.parametrize("step", range(6))
def test_whole_phrases_are_chosen_first(step):
    "Of two phrases with three tracks each, three tracks are one phrase's; three by chance would hardly ever be."
    clip = clip_of(*["11"] * 6, phrases=[Phrase("a", (0, 2, 4)), Phrase("b", (1, 3, 5))])
    batch = collate_clips([clip], 144, 128, tracks=3, rngs=[rng_at(0, step)])
    assert batch.phrases[0] in ([Phrase("a", (0, 1, 2))], [Phrase("b", (0, 1, 2))]) and len(batch.ids) == 3


def test_images_with_phrases_keep_all_instances():
    masks = clip_of(*["1"] * 5).masks[:, 0]
    talking, silent = (ImageSample(str(k), np.zeros((40, 56, 3), np.uint8), masks, ps) for k,
                       ps in enumerate((PHRASES, [])))
    batch = collate_images([silent, talking], 144, 128, max_instances=2, rngs=[rng_at(0, 0, k) for k in (0, 1)])
    assert batch.image_index.tolist() == [0, 0] + [1] * 5
    assert batch.phrases == [[], [p._replace(instances=tuple(i + 2 for i in p.instances)) for p in PHRASES]]


def test_one_frame_of_each_clip():
    "Instances visible there, numbered anew; what is not visible is a negative, what nobody looked at is not spoken of."
    clip = clip_of("1111", "0011", "1111", "1?10", "11?1", phrases=PHRASES)
    batch = collate_clips([clip, clip], 144, 128, tracks=0, late="keep").to("cpu")
    one = frame_batch(batch, [1, 2])
    assert one.image_index.tolist() == [0] * 3 + [1] * 4 and [len(m) for m in one.masks] == [3, 4]
    for b, t, seen in ((0, 1, [0, 2, 4]), (1, 2, [0, 1, 2, 3])):
        assert (one.masks[b].numpy() == clip.masks[seen, t]).all() and (one.images[b] == clip.frames[t]).all()
        assert np.array_equal(one.boxes[one.image_index == b], boxes_of(clip.masks[seen, t]))
        for pixels in ("student_pixels", "teacher_pixels"):
            assert getattr(one, pixels)[b].equal(getattr(batch, pixels)[4 * b + t])
    assert one.spaces.sizes.tolist() == [[40, 56]] * 2 and one.points.shape == (7, 2)
    assert one.points.dtype == one.boxes.dtype == torch.float32
    assert one.phrases[0] == [Phrase("zero", (0,)), Phrase("zero and late", (0,)), Phrase("late", (), "easy"),
                              Phrase("four", (2,)), Phrase("none", (), "hard")]
    assert one.phrases[1] == [Phrase("zero", (3,)), Phrase("zero and late", (3, 4)), Phrase("late", (4,)),
                              Phrase("two and three", (5, 6)), Phrase("none", (), "hard")]
    for wrong in ([0], [0, 4], [-1, 0]):
        with pytest.raises(ValueError, match="2 clips of 4 frames"): frame_batch(batch, wrong)


def test_batches_of_nothing_are_float32(tiny):
    "Images without instances and clips without tracks: the same types and trailing sizes, and their notes are kept."
    image = ImageSample("a", np.zeros((40, 56, 3), np.uint8), np.zeros((0, 40, 56), bool),
                          notes=[("skipped", "x.jpg: gone"), ("skipped", "y.jpg: gone")])
    clip = clip_of("00", phrases=[Phrase("none", (), "easy")])
    clip.notes.append(("too short", "z: 1 frame"))
    images, clips = collate_images([image, image], 144, 128), collate_clips([clip, clip], 144, 128)
    single = frame_batch(clips, [0, 1])
    assert (images.notes == image.notes * 2 and clips.notes == clip.notes * 2
            and len(images.names) == len(clips.names) == 2)
    for b in (images, clips, single):
        assert {x.dtype for x in (b.boxes, b.points, b.teacher_pixels, b.student_pixels)} == {torch.float32}
        assert {m.dtype for m in b.masks} == {torch.bool}
        assert b.boxes.shape in ((0, 4), (0, 2, 4)) and b.points.shape == (0, 2)
    assert clips.visible.shape == (0, 2)
    assert clips.first.dtype == clips.clip.dtype == images.image_index.dtype == torch.int64
    full = collate_images([Sa1b(tiny / "images.tar").read(0)], 144, 128)
    found = full.boxes, full.points, full.student_pixels, full.teacher_pixels
    assert all(values.dtype == torch.float32 for values in found)


def test_videos_without_annotation_are_augmented(tiny):
    sample = augment(Videos(tiny / "clip").read(0, frames=4), rng_at(0, 0), **SMALL, hue=0.02)
    assert sample.masks.shape == (0, *sample.frames.shape[:3]) and sample.ids == [] and sample.annotated.shape == (0, 4)


@real
def test_recipe_opens_real_davis(monkeypatch, tmp_path):
    (tmp_path / "davis").symlink_to(REAL / "davis")
    monkeypatch.setenv("ESAM3_DATA", str(tmp_path))
    assert open_dataset("davis", "held_out").read(0, frames=1).ids == [1]


@pytest.mark.parametrize("text, said", [("splits: {}", "no `root`"),
                                        ("root: x\nsplits: {train: {images: {path: y}}}", "no `format`"),
                                        ("root: [", "not YAML"),
                                        ("- 1", "expected lines"),
                                        ("root: x\nsplits: {train: {images: {format: sa1b, pth: y}}}",
                                         "did you mean 'path'"),
                                        ("root: x\nsplits: {train: {clips: {format: davis}}}", "needs `path`")])
def test_recipe_slips(tmp_path, text, said):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ValueError, match=said): load_recipe(tmp_path / "mine.yaml")


# ---- what an augmentation looks at

@pytest.mark.parametrize("seed", range(6))
def test_masks_are_seen_as_torchvision_moves_them(seed):
    """Run lengths looked at through an augmentation are the masks that `v2` would have resized, cropped and mirrored
    with the same chance."""
    from torchvision import tv_tensors
    from torchvision.transforms import v2
    rng = np.random.default_rng(seed)
    h, w = rng.integers(40, 200, 2)
    masks = np.zeros((5, h, w), bool)
    for n, m in enumerate(masks[:4]):
        y, x = rng.integers(0, h - 8), rng.integers(0, w - 8)
        m[y:y + int(rng.integers(1, h)), x:x + int(rng.integers(1, w))] = rng.random() < 0.9 if n else True
    masks[3] &= rng.random((h, w)) < 0.3
    sample = ImageSample("a", rng.integers(0, 256, (h, w, 3), np.uint8), RunMasks.of(masks))
    ours = augment(sample, rng_at(0, seed), short=(30, 90), crop=64, jitter=0.2)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(rng_at(0, seed).integers(2**63)))
        pair = tv_tensors.Image(torch.from_numpy(sample.image).movedim(-1, 0)), tv_tensors.Mask(torch.from_numpy(
            masks).byte())
        pair = v2.RandomShortestSize(list(range(30, 91)))(*pair)
        size = tuple(min(n, 64) for n in pair[0].shape[-2:])
        image, moved = v2.Compose([v2.RandomCrop(size), v2.RandomHorizontalFlip(0.5), v2.ColorJitter(
            0.2, 0.2, 0.2)])(*pair)
    there = moved.any(2).any(1)
    assert (ours.image == image.movedim(0, -1).numpy()).all()
    assert (np.asarray(ours.masks) == moved[there].bool().numpy()).all() and len(ours.masks) == int(there.sum())
    dense = augment(ImageSample("a", sample.image, masks), rng_at(0, seed), short=(30, 90), crop=64, jitter=0.2)
    assert (dense.masks == np.asarray(ours.masks)).all() and np.array_equal(dense.boxes,
        ours.boxes) and np.array_equal(dense.points, ours.points)


def test_hue_turns_colours_and_keeps_greys():
    "A third of a turn and back; greys and luma stay as they are; small turns are near HSV's."
    from torchvision.transforms import v2
    greys = torch.arange(0, 256, 5, dtype=torch.uint8).expand(3, 4, -1)
    assert (turned_hue(greys, 0.2).int() - greys.int()).abs().max() <= 1
    mild = 90 + (torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 80).byte()
    there = turned_hue(mild, 1 / 3)
    luma = lambda x: (x.float() * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(-3)
    assert there.shape == mild.shape and there.dtype == torch.uint8 and (luma(there) - luma(mild)).abs().max() <= 1.5
    assert (turned_hue(there, -1 / 3).int() - mild.int()).abs().max() <= 3 and (there.int()
        - mild.int()).abs().float().mean() > 10
    assert (turned_hue(mild, 0.02).float() - v2.functional.adjust_hue(mild, 0.02).float()).abs().mean() < 4
