"""Readers and batches on real files (`../shared/data` beside the repository, skipped where it is not) and on broken ones."""
import json
import shutil
import tarfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from esam3.data import Steps, augment, collate_clips, collate_images, draw, load_recipe, open_dataset, rng_at
from esam3.readers import Davis, Sa1b, SaCoImages, SaCoVideo, SaV
from esam3.samples import BadSample, Reported, Video, boxes_of, decode_rle, read_picture, rle_area, video_frames
from esam3.toyworld import toyworld, write_mp4

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
    assert reported.counts == {"mask resized to its picture": 1}


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
    "The real ground truth, with black pictures for frames 20 to 23 of its video."
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
    with pytest.raises(BadSample, match="not a readable picture"): veval.read(0, frames=4, start=21)


@real
def test_veval_masks_have_the_stated_boxes_and_areas(veval):
    clip = veval.read(0, frames=4, start=20)
    truth = {m["id"]: m for m in json.loads((REAL / "sa_co_veval/saco_veval_sav_test_sample_gt.json").read_text())["annotations"]}
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
    with av.open(str(path)) as box: theirs = {k: f.to_ndarray(format="rgb24") for k, f in zip(range(98), box.decode(video=0)) if k in wanted}
    for k, frame in zip(wanted, frames): assert np.abs(frame.astype(int) - theirs[k]).mean() < 2, k


@real
def test_photographs_become_a_batch():
    from esam3.samples import ImageSample
    pictures = [read_picture(p) for p in sorted((REAL / "images").glob("*.jpg"))]
    samples = [ImageSample(str(k), p, np.ones((1, *p.shape[:2]), bool)) for k, p in enumerate(pictures)]
    batch = collate_images(samples, 1008, 1024)
    assert batch.teacher_pixels.shape == (3, 3, 1008, 1008) and batch.student_pixels.shape == (3, 3, 1024, 1024)
    for k, valid in enumerate(batch.frames.valid("student", 1024)): assert (batch.student_pixels[k][:, ~valid] == 0).all()
    small = augment(samples[0], rng_at(0, 0))
    assert 640 <= min(small.image.shape[:2]) and max(small.image.shape[:2]) <= 1024


# ---- broken files

@pytest.fixture()
def loose(tiny, tmp_path):
    "Six loose SA-1B samples, to be broken."
    with tarfile.open(tiny / "images.tar") as tar:
        for m in tar:
            if m.isfile() and m.name[:9] < "sa_000006": (tmp_path / Path(m.name).name).write_bytes(tar.extractfile(m).read())
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
    edit(note(4), lambda r: r["annotations"][0]["segmentation"].update(counts=r["annotations"][0]["segmentation"]["counts"][:-1]))


def test_sa1b_each_damage_is_named(loose):
    ruin(loose)
    reader = Sa1b(loose)
    said = ["sa_000000.jpg: not a readable picture", "sa_000001.json: not a readable annotation", "sa_000002.json: missing",
            "sa_000003.json, annotation 0: mask of 7×7", "sa_000004.json, annotation 0: (unreadable|run lengths)"]
    for k, pattern in enumerate(said):
        with pytest.raises(BadSample, match=pattern): reader.read(k)
    assert len(reader.read(5).masks)


def test_damage_is_skipped_counted_and_the_same_each_time(loose):
    ruin(loose)
    reader, reported = Sa1b(loose), Reported()
    steps = Steps(reader, partial(collate_images, teacher=144, student=128), seed=1, batch=3)
    with pytest.warns(UserWarning, match="skipped"):
        for k in range(8): reported.add(steps[k].notes)
    assert reported.counts == {"skipped": 5} and set(steps[0].names) == {"sa_000005"}
    worker = next(iter(DataLoader(steps, batch_size=None, sampler=[3], num_workers=1)))
    assert worker.notes == steps[3].notes and worker.student_pixels.equal(steps[3].student_pixels)


def test_nothing_readable_is_an_error(loose):
    ruin(loose)
    for ext in ("jpg", "json"): (loose / f"sa_000005.{ext}").unlink()
    with pytest.raises(BadSample, match="20 samples in a row"): draw(Sa1b(loose), 0, 0, batch=1)


def test_sa1b_regions_without_ids_fall_into_components(loose):
    def merge(record):
        union = np.any([decode_rle(a["segmentation"], (record["image"]["height"], record["image"]["width"])) for a in record["annotations"]], 0)
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
    if damage != "gone": path.write_bytes({"short": data[:len(data) // 2], "junk": b"hello " * 200, "empty": b"", "hole": data}[damage])
    with pytest.raises(BadSample, match="toy_000000.mp4: (no such|not a readable|damaged)"): SaV(tmp_path).read(0)


def test_broken_sav_annotations(tiny, tmp_path):
    for f in (tiny / "clip").glob("toy_000000*"): shutil.copy(f, tmp_path)
    note = tmp_path / "toy_000000_manual.json"
    for change, pattern in ((lambda r: r.pop("masklet"), "not an SA-V annotation"), (lambda r: r.update(masklet_id=[1]), "rows of other lengths"),
                            (lambda r: r.update(masklet=[[None for _ in row] for row in r["masklet"]]), "no masklet in frames 0–7")):
        shutil.copy(tiny / "clip" / note.name, note); edit(note, change)
        with pytest.raises(BadSample, match=pattern): SaV(tmp_path).read(0)
    note.unlink()
    with pytest.raises(BadSample, match="not a readable annotation"): SaV(tmp_path).read(0)


def test_davis_missing_and_foreign_masks(tmp_path):
    for part in ("JPEGImages/480p/a", "Annotations/480p/a", "ImageSets/2017"): (tmp_path / part).mkdir(parents=True)
    (tmp_path / "ImageSets/2017/val.txt").write_text("a\n")
    Image.new("RGB", (64, 48)).save(tmp_path / "JPEGImages/480p/a/00000.jpg")
    with pytest.raises(BadSample, match="1 pictures and 0 masks"): Davis(tmp_path).read(0)
    mask = tmp_path / "Annotations/480p/a/00000.png"
    for picture, pattern in ((Image.new("P", (48, 64)), "no palette mask"), (Image.new("RGB", (64, 48)), "no palette mask"), (Image.new("P", (64, 48)), "no object in frames")):
        picture.save(mask)
        with pytest.raises(BadSample, match=pattern): Davis(tmp_path).read(0)
    mask.write_bytes(b"no png")
    with pytest.raises(BadSample, match="not a readable mask"): Davis(tmp_path).read(0)


def test_davis_dense_masks_mean_absence_and_2016_is_one_object(tmp_path):
    for part in ("JPEGImages/480p/a", "Annotations/480p/a", "ImageSets/2017", "ImageSets/2016"): (tmp_path / part).mkdir(parents=True)
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
    record["images"] = [pair, {**pair, "id": 91, "text_input": "thing"}, {**pair, "id": 92, "text_input": "crowd", "is_instance_exhaustive": 0}]
    record["annotations"] = mine + [{**a, "image_id": k} for a in mine for k in (91, 92)]
    (tmp_path / "a.json").write_text(json.dumps(record))
    sample = SaCoImages(tmp_path / "a.json", tiny / "saco").read(0)
    assert len(sample.masks) == len(mine) and [p.text for p in sample.phrases] == [pair["text_input"], "thing"]
    assert sample.phrases[0].instances == sample.phrases[1].instances and [k for k, _ in sample.notes] == ["phrase without instance labels"]


def test_random_run_lengths_never_get_past_the_door():
    rng, passed = np.random.default_rng(0), 0
    for _ in range(3000):
        counts = bytes(rng.integers(40, 120, rng.integers(0, 30)).astype(np.uint8))
        try: assert decode_rle({"size": [40, 50], "counts": counts}, (40, 50)).shape == (40, 50); passed += 1
        except BadSample: pass
    assert passed < 300


# ---- samples without instances, and recipes

def test_pictures_without_instances_go_through(tiny):
    from esam3.samples import ImageSample
    empty = ImageSample("empty", np.zeros((96, 128, 3), np.uint8), np.zeros((0, 96, 128), bool))
    batch = collate_images([augment(empty, rng_at(0, 0), short=(96, 128), crop=128), Sa1b(tiny / "images.tar").read(0)], 144, 128)
    assert set(batch.image.tolist()) == {1} and len(batch.frames.rasterise(batch.masks, "student", 32)) == len(batch.image)


def test_clips_without_tracks_go_through(tiny):
    clip = SaV(tiny / "clip").read(0, frames=4)
    clip.annotated[:] = False
    batch = collate_clips([clip], 144, 128)
    assert len(batch.clip) == 0 and batch.boxes.shape == (0, 4, 4) and batch.coverage("student", 16).shape == (0, 4, 16, 16)


def test_clips_of_different_lengths_are_refused(tiny):
    reader = SaV(tiny / "clip")
    with pytest.raises(ValueError, match=r"clips of \[4, 5\] frames"): collate_clips([reader.read(0, frames=4), reader.read(1, frames=5)], 144, 128)


def test_recipe_without_data_says_what_to_download(monkeypatch, tmp_path):
    monkeypatch.setenv("ESAM3_DATA", str(tmp_path))
    for name in ("sa1b", "sav", "saco", "davis"):
        recipe = load_recipe(name)
        for split, kinds in recipe["splits"].items():
            for kind in kinds:
                with pytest.raises(FileNotFoundError, match="https://"): open_dataset(recipe, split, kind)


@real
def test_recipe_opens_real_davis(monkeypatch, tmp_path):
    (tmp_path / "davis").symlink_to(REAL / "davis")
    monkeypatch.setenv("ESAM3_DATA", str(tmp_path))
    assert open_dataset("davis", "held_out").read(0, frames=1).ids == [1]


@pytest.mark.parametrize("text, said", [("splits: {}", "no `root`"), ("root: x\nsplits: {train: {images: {path: y}}}", "no `format`"), ("root: [", "not YAML"),
                                        ("- 1", "expected lines"), ("root: x\nsplits: {train: {images: {format: sa1b, pth: y}}}", "did you mean 'path'"),
                                        ("root: x\nsplits: {train: {clips: {format: davis}}}", "needs `path`")])
def test_recipe_slips(tmp_path, text, said):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ValueError, match=said): load_recipe(tmp_path / "mine.yaml")
