"""What people have on disk is read right, or refused clearly: names, sizes, turns, bits, ids, what is public. The kinds
of `../shared/data/faults`, and siblings."""
import json
import random
import shutil
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from esam3.data.batches import collate_clips, load_recipe, open_dataset
from esam3.data.public_sets import Coco, SaVFolders, Vos, clip_stems
from esam3.data.readers import NO_MEDIA, Davis, Sa1b, SaCoImages, SaCoVideo, SaV, Videos
from esam3.data.samples import BadSample, RunMasks, read_image
from esam3.data.toyfiles import toyworld, write_mp4

H, W = 24, 36


@pytest.fixture(scope="module")
def tiny() -> Path:
    return toyworld("tiny")


@pytest.fixture
def faults(real_files: Path) -> Path:
    return real_files / "faults"


# ---- small inputs

def photo(path: Path, size: tuple[int, int] = (H, W), turn: int = 1) -> Path:
    "An image whose top left corner is bright, stored with EXIF's `turn`."
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((*size, 3), 60, np.uint8)
    pixels[:size[0] // 3, :size[1] // 3] = 220
    exif = Image.Exif()
    exif[0x0112] = turn
    Image.fromarray(pixels).save(path, exif=exif, **({"quality": 95} if path.suffix.lower() in (".jpg", ".jpeg")
                                                     else {}))
    return path


def mask(path: Path, *objects: tuple[int, tuple[slice, slice]], size: tuple[int, int] = (H, W),
         dtype: Any = np.uint8) -> Path:
    "A label map with an id in each of some windows."
    path.parent.mkdir(parents=True, exist_ok=True)
    index = np.zeros(size, dtype)
    for k, window in objects: index[window] = k
    Image.fromarray(index).save(path)
    return path


A, B, C = np.s_[2:8, 3:10], np.s_[10:20, 20:30], np.s_[15:22, 4:9]  # windows that do not touch


def clip(root: Path, *frames: list, name: str = "c", ext: str = "jpg", pad: int = 5) -> Path:
    "A clip in MOSE's layout: for each frame its objects, or None where it has no mask."
    for t, objects in enumerate(frames):
        photo(root / "JPEGImages" / name / f"{t:0{pad}d}.{ext}")
        if objects is not None: mask(root / "Annotations" / name / f"{t:0{pad}d}.png", *objects)
    (root / "Annotations" / name).mkdir(parents=True, exist_ok=True)
    return root


def sav_clip(root: Path, objects: dict[str, list[int]], frames: int = 9, name: str = "sav_1") -> Path:
    "A clip in SA-V's layout of folders: for each object its ids in every fourth frame."
    for t in range(frames): photo(root / "JPEGImages_24fps" / name / f"{t:05d}.jpg")
    for folder, ids in objects.items():
        for t, k in zip(range(0, frames, 4), ids):
            mask(root / "Annotations_6fps" / name / folder / f"{t:05d}.png", (k, A))
    return root


def coco_file(path: Path, images: list[dict], annotations: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "x"}]}))
    return path


def box_polygon(window: tuple[slice, slice]) -> list[list[float]]:
    y, x = window
    return [[x.start, y.start, x.stop, y.start, x.stop, y.stop, x.start, y.stop]]


def filled(window: tuple[slice, slice], size: tuple[int, int] = (H, W)) -> np.ndarray:
    out = np.zeros(size, bool)
    out[window] = True
    return out


def rle(m: np.ndarray) -> dict:
    code = coco.encode(np.asfortranarray(m, np.uint8))
    return {"size": list(code["size"]), "counts": code["counts"].decode()}


# ---- 3: annotation and image in different frames

def test_turned_images_annotated_as_stored(faults):
    turned, plain = (Coco(faults / "04_coco_turned" / f"{name}.json", faults / "04_coco_turned")
                     for name in ("exif", "plain"))
    for i in range(len(plain)):
        ours, theirs = turned.read(i), plain.read(i)
        assert (ours.masks == theirs.masks).all() and np.abs(ours.image.astype(int) - theirs.image).mean() < 6
        assert any("as stored" in kind for kind, _ in ours.notes) and not theirs.notes


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("form", ["polygon", "rle"])
def test_the_size_of_the_annotation_decides_a_turn(tmp_path, turn, form):
    "An image stored with each of EXIF's eight turns, annotated as it is stored, as it is shown, and at half the size."
    photo(tmp_path / "a.jpg", turn=turn)
    shown, stored = read_image(tmp_path / "a.jpg"), read_image(tmp_path / "a.jpg", size=(H, W))
    assert shown.shape[:2] == ((W, H) if turn > 4 else (H, W)) and stored.shape[:2] == (H, W)
    for image in (shown, stored) if turn > 4 else (shown,):
        size = image.shape[:2]
        bright = image.mean(2) > 140
        y, x = np.flatnonzero(bright.any(1)), np.flatnonzero(bright.any(0))
        corner = np.s_[int(y[0]):int(y[-1]) + 1, int(x[0]):int(x[-1]) + 1]
        segmentation = box_polygon(corner) if form == "polygon" else rle(bright)
        path = coco_file(tmp_path / "a.json", [{"id": 1, "file_name": "a.jpg", "height": size[0], "width": size[1]}],
                         [{"id": 1, "image_id": 1, "segmentation": segmentation}])
        sample = Coco(path, tmp_path).read(0)
        assert sample.image.shape == image.shape and (sample.masks[0] == bright).mean() > 0.97
        kinds = " ".join(kind for kind, _ in sample.notes)
        assert ("as stored" in kinds) == (turn > 4 and image is stored) and ("no size says" in kinds) == (1 < turn < 5)
    if form == "polygon":
        half = coco_file(tmp_path / "b.json",
                         [{"id": 1, "file_name": "a.jpg", "height": size[0] // 2, "width": size[1] // 2}],
                         [{"id": 1, "image_id": 1, "segmentation": [[v / 2 for v in box_polygon(corner)[0]]]}])
        sample = Coco(half, tmp_path).read(0)
        assert (sample.masks[0] == bright).mean() > 0.95 and any("resized" in kind for kind, _ in sample.notes)


def test_annotation_of_another_image_is_refused(tmp_path):
    photo(tmp_path / "a.jpg")
    for segmentation in (box_polygon(A), rle(filled(A, (40, 40)))):
        path = coco_file(tmp_path / "a.json", [{"id": 1, "file_name": "a.jpg", "height": 40, "width": 40}],
                         [{"id": 1, "image_id": 1, "segmentation": segmentation}])
        with pytest.raises(BadSample, match="at 40×40 px, an image of 24×36"): Coco(path, tmp_path).read(0)
    # would be drawn before it is looked at
    huge = [{"id": 1, "file_name": "a.jpg", "height": H * 10 ** 6, "width": W * 10 ** 6}]
    with pytest.raises(BadSample, match="do not belong together"):
        Coco(coco_file(tmp_path / "b.json", huge, [{"id": 1, "image_id": 1, "segmentation": box_polygon(A)}]),
             tmp_path).read(0)


def test_turned_frames_and_images_of_every_layout(tmp_path):
    """Stored upright with a turn in EXIF, and annotated as stored: SA-1B, DAVIS, SA-V's folders, SA-Co's images and
    frames."""
    def check(sample: Any) -> None:
        pixels = sample.image if hasattr(sample, "image") else sample.frames[0]
        assert pixels.shape == (H, W, 3) and pixels[2, 3].mean() > 180, "as stored"
        assert sample.masks.shape[-2:] == (H, W) and any("as stored" in kind for kind, _ in sample.notes)
    photo(tmp_path / "sa1b/sa_1.jpg", turn=6)
    (tmp_path / "sa1b/sa_1.json").write_text(json.dumps(
        {"image": {"height": H, "width": W}, "annotations": [{"id": 1, "segmentation": rle(filled(A))}]}))
    check(Sa1b(tmp_path / "sa1b").read(0))
    clip(tmp_path / "vos", [(1, A)], [(1, A)])
    sav_clip(tmp_path / "sav", {"000": [1, 1, 1]})
    for file in (*tmp_path.glob("vos/JPEGImages/c/*"), *tmp_path.glob("sav/JPEGImages_24fps/sav_1/*")):
        photo(file, turn=8)
    check(Vos(tmp_path / "vos").read(0))
    check(SaVFolders(tmp_path / "sav").read(0))
    (tmp_path / "saco.json").write_text(json.dumps(
        {"images": [{"id": 1, "file_name": "sa1b/sa_1.jpg", "text_input": "corner", "height": H, "width": W}],
                                                    "annotations": [{"image_id": 1, "segmentation": rle(filled(A))}]}))
    check(SaCoImages(tmp_path / "saco.json", tmp_path).read(0))
    video = {"id": 1, "height": H, "width": W, "file_names": ["vos/JPEGImages/c/00000.jpg",
                                                              "vos/JPEGImages/c/00001.jpg"]}
    (tmp_path / "veval.json").write_text(json.dumps(
        {"videos": [video], "video_np_pairs": [{"video_id": 1, "category_id": 5, "noun_phrase": "corner"}],
                                                     "annotations": [{"video_id": 1, "category_id": 5,
                                                         "segmentations": [rle(filled(A)), None]}]}))
    check(SaCoVideo(tmp_path / "veval.json", tmp_path).read(0))


# ---- 12: bits

@pytest.mark.parametrize("name, values, top", [
    ("grey16.png", np.uint16, 65535), ("grey16.tif", np.uint16, 65535), ("float.tif", np.float32, 1.0),
    ("grey8.bmp", np.uint8, 255)])
def test_images_of_any_depth(tmp_path, name, values, top):
    ramp = np.linspace(0, 1, W)[None].repeat(H, 0)
    Image.fromarray((ramp * top).astype(values)).save(tmp_path / name)
    seen = read_image(tmp_path / name)
    assert seen.dtype == np.uint8 and np.abs(seen - 255 * ramp[..., None]).max() <= 1


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
def test_images_of_any_mode(tmp_path, mode):
    name = tmp_path / ("a.tif" if mode in ("CMYK", "YCbCr") else "a.png")
    Image.new("RGB", (W, H), (255, 255, 255)).convert(mode).save(name)
    assert (read_image(name) >= 254).all() and read_image(name).shape == (H, W, 3)


@pytest.mark.parametrize("values", [np.full((H, W), 200.0, np.float32), np.full((H, W), -0.1, np.float32),
                                    np.full((H, W), np.nan, np.float32), np.full((H, W), 70000, np.int32)])
def test_numbers_without_a_white_are_refused(tmp_path, values):
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(BadSample, match=r"a\.tif: not a readable image \((floats beyond|32 bits)"):
        read_image(tmp_path / "a.tif")


def test_deep_images_of_the_faults(faults):
    deep = [read_image(f) for f in sorted((faults / "14_pictures").glob("*.*")) if f.suffix in (".png", ".tif")]
    assert len(deep) == 2 and all(d.min() == 0 and d.max() >= 254 and 100 < d.mean() < 200 for d in deep)


# ---- 6: names

def test_frames_in_natural_order(faults):
    reader = Vos(faults / "05_unpadded")
    assert clip_stems(reader, 0, reader.read(0)) == [str(k) for k in range(12)]


@pytest.mark.parametrize("names", [["frame1", "frame2", "frame10"], ["a_9", "a_10", "a_100"], ["1", "2", "10"]])
@pytest.mark.parametrize("suffix", [".jpg", ".JPG", ".jpeg", ".png", ".webp"])
def test_every_reader_of_folders_counts_as_people_do(tmp_path, names, suffix):
    for t, name in enumerate(names):
        for place in ("vos/JPEGImages/c", "sav/JPEGImages_24fps/c", "plain/c"):
            photo(tmp_path / place / f"{name}{suffix}")
        mask(tmp_path / f"vos/Annotations/c/{name}.png", (1, (slice(t, t + 4), slice(0, 5))))
        mask(tmp_path / f"sav/Annotations_6fps/c/000/{name}.png", (1, (slice(t, t + 4), slice(0, 5))))
    for reader in (Vos(tmp_path / "vos"), SaVFolders(tmp_path / "sav")):
        sample = reader.read(0)
        assert clip_stems(reader, 0, sample) == names and sample.masks.any(3).argmax(2).tolist() == [[0, 1, 2]]
    plain = Videos(tmp_path / "plain", every=1)
    assert [f.stem for f in plain._images(plain.paths[0])] == names and len(plain.read(0).frames) == 3


def test_masks_padded_otherwise_than_images(tmp_path):
    for t in range(11):
        photo(tmp_path / f"JPEGImages/c/{t}.jpg")
        mask(tmp_path / f"Annotations/c/{t:05d}.png", (1, (slice(t, t + 4), slice(0, 5))))
    assert Vos(tmp_path).read(0).masks.any(3).argmax(2).tolist() == [list(range(11))]
    photo(tmp_path / "JPEGImages/c/07.jpg")
    with pytest.raises(BadSample, match="two images of one frame"): Vos(tmp_path).read(0)


def test_lists_are_read_by_lines(faults, tmp_path):
    assert (spaced := Davis(faults / "17_names_with_spaces", year=2017)).names == ["my dog"] and len(spaced.read(
        0).frames) == 6
    (tmp_path / "ImageSets/2017").mkdir(parents=True)
    (tmp_path / "ImageSets/2017/val.txt").write_bytes("\ufeffchien d'été\r\n\r\n  a b  \n".encode())
    assert Davis(tmp_path).names == ["chien d'été", "a b"]


# ---- 4: more files than belong there

def test_what_is_not_a_mask_is_left_out(faults, tmp_path):
    root = Path(shutil.copytree(faults / "16_apple_double", tmp_path / "d"))
    sample = Vos(root).read(0)
    assert not sample.notes and len(sample.frames) == 12 and sample.annotated.all()
    for name in ("Thumbs.png", ".hidden.png", "99999.png", "readme.txt"):
        shutil.copy(root / "Annotations/c/00000.png", root / "Annotations/c" / name)
    for name in ("._00000.jpg", "Thumbs.JPG", "desktop.ini"): (root / "JPEGImages/c" / name).write_bytes(b"x")
    for name in (".DS_Store", ".git"): (root / "Annotations" / name).mkdir()
    reader = Vos(root)
    again = reader.read(0)
    assert len(reader) == 1 and (again.masks == sample.masks).all() and again.notes == [(
        "mask without image left out", "c/99999.png")]


# ---- 5: 255

def test_255_of_the_faults(faults):
    alone = Vos(faults / "07_255").read(0)
    assert alone.ids == [1] and alone.masks.any() and alone.public
    void = Vos(faults / "08_void_255").read(0)
    assert void.ids == [1]
    objects = SaVFolders(faults / "09_sav_255").read(0)
    assert objects.ids == [0, 1] and objects.visible.any(1).all()


def test_255_is_decided_over_the_whole_clip(tmp_path):
    "Windows that show 255 alone, of clips whose other frames show another id, and of clips that do not."
    mixed, single = clip(tmp_path / "a", [(255, A)], [(255, A)], [(255, A), (7, B)], [(7, B)]), clip(tmp_path / "b",
        [(255, A)], [], [(255, B)])
    assert Vos(mixed).read(0).ids == [7] and Vos(single).read(0).ids == [1]
    with pytest.raises(BadSample, match="no object in frames 0–1"): Vos(mixed).read(0, frames=2, start=0)
    assert (Vos(single).read(0, frames=1, start=2).masks[0, 0] == filled(B)).all()
    both = SaVFolders(sav_clip(tmp_path / "c", {"000": [255, 255, 255], "001": [255, 1, 1]})).read(0)
    assert both.masks.any((2, 3))[:, ::4].tolist() == [[True] * 3, [False, True, True]]
    (tmp_path / "b/ImageSets/2016").mkdir(parents=True)
    (tmp_path / "b/ImageSets/2016/val.txt").write_text("c")
    shutil.move(tmp_path / "b/JPEGImages/c", tmp_path / "b/JPEGImages/480p/c")
    shutil.move(tmp_path / "b/Annotations/c", tmp_path / "b/Annotations/480p/c")
    assert Davis(tmp_path / "b", year=2016).read(0).ids == [1]


# ---- 2: what is public

def test_real_judo_is_not_public(real_files):
    sample = Davis(real_files / "davis").read(0)
    assert not sample.public and (sample.annotated == sample.masks.any((2, 3))).all()


@pytest.mark.parametrize("frames, public, annotated", [
    ([[(1, A), (2, B)], None, None, None], False, [[1, 0, 0, 0]] * 2),                                # MOSE valid
    # YouTube-VOS valid
    ([[(1, A)], None, [(2, B)], None], False, [[1, 0, 0, 0], [0, 0, 1, 0]]),
    # the same, with the old object drawn again
    ([[(1, A)], None, [(1, A), (2, B)], None], False, [[1, 0, 1, 0], [0, 0, 1, 0]]),
    # sparse, and 2 has gone
    ([[(1, A), (2, B)], None, [(1, A)], None], True, [[1, 0, 1, 0]] * 2),
    # every frame has a mask
    ([[(1, A)], [(2, B)], [(3, C)]], True, [[1, 1, 1]] * 3),
    # an empty mask between
    ([[(1, A)], None, [], None, [(2, B)], None], True, [[1, 0, 1, 0, 1, 0]] * 2)])
def test_not_annotated_is_not_absent(tmp_path, frames, public, annotated):
    sample = Vos(clip(tmp_path, *frames)).read(0)
    assert sample.public == public and sample.annotated.astype(int).tolist() == annotated
    window = Vos(tmp_path).read(0, frames=2, start=0)
    assert window.public == public, "decided over the whole clip"
    first, everything = Vos(tmp_path, truth="first").read(0), Vos(tmp_path, truth="all").read(0)
    assert not first.public and (first.annotated == first.masks.any((2, 3))).all()
    assert everything.public and (everything.annotated.any(0) == [f is not None for f in frames]).all()


def test_recipes_say_what_is_public(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("root: .\nsplits: {held_out: {clips: {format: vos, path: ., truth: first}}}")
    clip(tmp_path, [(1, A)], [(1, A)])
    assert not open_dataset(load_recipe(recipe), "held_out").read(0).public
    with pytest.raises(ValueError, match="first"): Vos(tmp_path, truth="frist")


# ---- 7: BadSample or nothing

def test_sizes_within_a_clip(faults, tmp_path):
    with pytest.raises(BadSample, match="different sizes"): SaVFolders(faults / "10_sav_sizes").read(0)
    clip(tmp_path, [(1, A)], [(1, A)])
    photo(tmp_path / "JPEGImages/c/00001.jpg", (H - 2, W))
    with pytest.raises(BadSample, match="different sizes"): Vos(tmp_path).read(0)


@pytest.mark.parametrize("folder, said", [("dog", "number"), ("1", "one object in two folders")])
def test_strange_folders_of_objects(tmp_path, folder, said):
    sav_clip(tmp_path, {"001": [1, 1, 1], folder: [1, 1, 1]})
    (tmp_path / "Annotations_6fps/sav_1/.thumbnails").mkdir(); (tmp_path / "Annotations_6fps/sav_1/empty").mkdir()
    with pytest.raises(BadSample, match=said): SaVFolders(tmp_path).read(0)
    shutil.rmtree(tmp_path / "Annotations_6fps/sav_1" / folder)
    assert SaVFolders(tmp_path).read(0).ids == [1]


def test_ids_beyond_a_palette(tmp_path):
    clip(tmp_path / "a", [(1, A)], [(1, A)])
    mask(tmp_path / "a/Annotations/c/00001.png", (300, A), dtype=np.uint16)
    with pytest.raises(BadSample, match="values up to 300"): Vos(tmp_path / "a").read(0)
    mask(tmp_path / "a/Annotations/c/00001.png", (12, A), dtype=np.uint16)
    assert Vos(tmp_path / "a").read(0).ids == [1, 12], "sixteen bits, small ids"
    assert SaVFolders(sav_clip(tmp_path / "b", {"300": [1, 1, 1]})).read(0).ids == [300]
    Image.fromarray(np.zeros((H, W, 3), np.uint8)).save(tmp_path / "a/Annotations/c/00001.png")
    with pytest.raises(BadSample, match="no palette mask"): Vos(tmp_path / "a").read(0)


JUNK = (None, "", "x", [], {}, -1, 1e30, [[]], True)


def _mutated(value: Any, rng: random.Random) -> Any:
    "A JSON value with one entry in it changed or gone."
    if rng.random() < 0.15 or not isinstance(value, list | dict) or not value: return rng.choice(JUNK)
    copy = dict(value) if isinstance(value, dict) else list(value)
    key = rng.choice(list(copy)) if isinstance(copy, dict) else rng.randrange(len(copy))
    if rng.random() < 0.2: copy.pop(key)
    else: copy[key] = _mutated(copy[key], rng)
    return copy


@pytest.mark.parametrize("name", ["sa1b", "sav", "coco", "saco", "veval"])
def test_strange_annotations_cost_one_sample(tiny, tmp_path, name):
    "Eighty annotation files with one entry changed each: opened or refused, read or a BadSample."
    rng, opened = random.Random(0), {"good": 0, "bad": 0, "refused": 0}
    if name == "sa1b":
        with tarfile.open(tiny / "images.tar") as tar:
            [tar.extract(f"sa_000001.{e}", tmp_path, filter="data") for e in ("jpg", "json")]
    for source in {"sav": ["clip/toy_000000.mp4"], "veval": ["long/toy_000000.mp4"]}.get(name, ()):
        shutil.copy(tiny / source, tmp_path)
    photo(tmp_path / "a.jpg"); photo(tmp_path / "b.jpg")
    source = {"sa1b": tmp_path / "sa_000001.json", "sav": tiny / "clip/toy_000000_manual.json",
              "saco": tiny / "saco/images.json", "veval": tiny / "long/veval.json"}.get(name)
    plain = json.loads(source.read_text()) if source else {
        "images": [{"id": k, "file_name": f, "height": H, "width": W} for k, f in ((1, "a.jpg"), (2, "b.jpg"))],
        "annotations": [{"id": k, "image_id": 1 + k % 2, "iscrowd": 0, "segmentation": s} for k,
                        s in enumerate([box_polygon(A), rle(filled(B)), box_polygon(C), [[1, 2, 3, 4]]])]}
    if name in ("saco", "veval"):  # few enough entries that a change meets one that is read
        keep = {"saco": ("images", "annotations"), "veval": ("video_np_pairs", "annotations")}[name]
        first = plain["images"][0]["file_name"] if name == "saco" else None
        if first: plain["images"] = [p for p in plain["images"] if p["file_name"] == first]
        plain = {k: v for k, v in plain.items() if k in (*keep, "videos")}
        if first:
            plain["annotations"] = [a for a in plain["annotations"]
                                    if a["image_id"] in {p["id"] for p in plain["images"]}]
    file = tmp_path / {"sa1b": "sa_000001.json", "sav": "toy_000000_manual.json"}.get(name, "annotations.json")
    make: dict[str, Callable] = {"sa1b": lambda: Sa1b(tmp_path), "sav": lambda: SaV(tmp_path),
                                 "coco": lambda: Coco(file, tmp_path),
                                 "saco": lambda: SaCoImages(file, tiny / "saco"),
                                 "veval": lambda: SaCoVideo(file, tmp_path)}
    clips = {"frames": 2, "start": 1} if name in ("sav", "veval") else {}
    for _ in range(80):
        file.write_text(json.dumps(_mutated(plain, rng)))
        try: reader = make[name]()
        except (ValueError, FileNotFoundError): opened["refused"] += 1; continue
        for i in range(len(reader)):
            try: reader.read(i, **clips); opened["good"] += 1
            except BadSample: opened["bad"] += 1
    assert opened["good"] and opened["bad"] + opened["refused"] > 10, opened


def test_what_nobody_thought_of_is_a_bad_sample(tmp_path):
    photo(tmp_path / "c/0.jpg")
    for segmentations in ([True], [3.5], [{"counts": 5, "size": "x"}], [["a"]]):
        (tmp_path / "v.json").write_text(json.dumps({"videos": [{"id": 1, "file_names": ["c/0.jpg"]}],
                                                     "video_np_pairs": [{"video_id": 1, "category_id": 5,
                                                         "noun_phrase": "a"}],
                                                     "annotations": [{"video_id": 1, "category_id": 5,
                                                         "segmentations": segmentations}]}))
        with pytest.raises(BadSample, match="^c[:,]"): SaCoVideo(tmp_path / "v.json", tmp_path).read(0)
    with pytest.raises(BadSample):
        Coco(coco_file(tmp_path / "a.json", [{"id": 1, "file_name": "c/0.jpg"}],
                       [{"id": 1, "image_id": 1, "segmentation": [[1, 2, 3, 4], 3.5]}]), tmp_path).read(0)


def test_no_sample_is_an_index_error(tmp_path):
    reader = Vos(clip(tmp_path, [(1, A)], [(1, A)]))
    with pytest.raises(IndexError): reader.read(1)
    with pytest.raises(BadSample, match="no 2 frames from 5"): reader.read(0, frames=2, start=5)


# ---- 10: pairs

def test_pairs_carry_their_ids(real_files, tiny):
    for name in ("one", "two"):
        reader = SaCoImages(real_files / f"faults/12_pair_twice/{name}.json", tiny / "saco")
        for i in range(len(reader)):
            pairs = [p.pair for p in reader.read(i).phrases]
            assert pairs == [p["id"] for p in reader.pairs[reader.names[i]]] and len({*pairs}) == len(pairs)


def test_two_categories_of_one_phrase(tmp_path):
    video = {"id": 1, "file_names": ["c/0.jpg", "c/1.jpg"]}
    for k in range(2): photo(tmp_path / f"c/{k}.jpg")
    pair = lambda c, text: {"video_id": 1, "category_id": c, "noun_phrase": text}
    (tmp_path / "v.json").write_text(json.dumps({"videos": [video], "video_np_pairs": [pair(5, "dog"), pair(
        9, "dog"), pair(5, "dog"), pair(6, " ")],
                                                 "annotations": [{"video_id": 1, "category_id": 9,
                                                     "segmentations": [rle(filled(A)), None]}]}))
    reader = SaCoVideo(tmp_path / "v.json", tmp_path)
    assert [(p.text, p.pair, p.instances) for p in reader.read(0).phrases] == [("dog", 5, ()), ("dog", 9, (0,))]
    assert sorted(kind for kind, _ in reader.notes) == ["empty phrase left out", "phrase given twice"]


# ---- 11: names of SA-1B, empty sets

def test_sa1b_names_of_the_faults(faults):
    place = faults / "13_sa1b_names"
    assert Sa1b(place / "nonascii").read(0).name == "Hündchen 1" and len(Sa1b(place / "nonascii").read(0).masks)
    assert Sa1b(place / "nested").read(0).name == "sa_000000/sa_1" and len(Sa1b(place / "upper").read(0).masks)


def test_equal_names_in_several_folders(tmp_path):
    for k, place in enumerate(("a", "a/b", "c")):
        photo(tmp_path / "loose" / place / "sa_1.jpg", (H + k, W))
        (tmp_path / "loose" / place
         / "sa_1.json").write_text(json.dumps({"annotations": [{"id": 1, "segmentation": rle(filled(A, (H + k, W)))}]}))
    (tmp_path / "loose/a/._sa_1.jpg").write_bytes(b"x")
    with tarfile.open(tmp_path / "all.tar", "w") as tar: tar.add(tmp_path / "loose", "./データ")
    for reader in (Sa1b(tmp_path / "loose"), Sa1b(tmp_path / "all.tar")):
        assert len(reader) == 3 and sorted(reader.read(i).image.shape[0] for i in range(3)) == [H, H + 1, H + 2]
    assert len(Sa1b(tmp_path / "loose", without=tmp_path / "loose/a")) == 1


@pytest.mark.parametrize("make", [
    lambda at: Sa1b(at), lambda at: SaV(at), lambda at: Davis(at), lambda at: Vos(at), lambda at: SaVFolders(at),
    lambda at: Videos(at)],
    ids=["sa1b", "sav", "davis", "vos", "sav_folders", "videos"])
def test_empty_data_sets_are_refused(tmp_path, make):
    for folder in ("JPEGImages", "Annotations", "JPEGImages_24fps", "Annotations_6fps", "ImageSets/2017"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "ImageSets/2017/val.txt").write_text("\n")
    with pytest.raises(FileNotFoundError): make(tmp_path)


@pytest.mark.parametrize("make", [Coco, SaCoImages, SaCoVideo])
def test_empty_annotations_are_refused(tmp_path, make):
    (tmp_path / "empty.json").write_text(json.dumps({k: [] for k in (
        "images", "annotations", "videos", "video_np_pairs")}))
    with pytest.raises(FileNotFoundError, match=r"empty\.json: no (image|video) in it"):
        make(tmp_path / "empty.json", tmp_path)


def test_annotations_without_media_are_refused_by_a_recipe(real_files, tmp_path):
    assert [kind for kind, _ in Coco(real_files / "lvis/lvis_val_100.json", tmp_path).notes] == [NO_MEDIA]
    (tmp_path / "mine.yaml").write_text(f"root: .\ndownload: ask somebody\nsplits: {{held_out: {{images: {{format: "
                                        f"coco, annotations: {real_files}/lvis/lvis_val_100.json, media: .}}}}}}")
    with pytest.raises(FileNotFoundError, match="(?s)none of the 100 images.*ask somebody"):
        open_dataset(load_recipe(tmp_path / "mine.yaml"), "held_out")


# ---- 15: long clips stay small

def test_masks_of_a_long_clip_stay_run_lengths(tmp_path):
    "Twelve masklets of 24 frames: 53 MB as masks."
    h, w, length, count = 360, 512, 24, 12
    for k in range(length): photo(tmp_path / f"c/{k:05d}.jpg", (h, w))
    tracks = [[rle(filled(np.s_[10 + n:40 + n, 10 + t:60 + t], (h, w))) for t in range(length)] for n in range(count)]
    (tmp_path / "v.json").write_text(json.dumps({"videos": [{"id": 1, "file_names": [f"c/{k:05d}.jpg" for k in range(
        length)]}],
                                                 "video_np_pairs": [{"video_id": 1, "category_id": 1,
                                                     "noun_phrase": "box"}],
                                                 "annotations": [{"id": n, "video_id": 1, "category_id": 1,
                                                     "segmentations": t} for n, t in enumerate(tracks)]}))
    reader = SaCoVideo(tmp_path / "v.json", tmp_path)
    tracemalloc.start()
    sample = reader.read(0)
    assert sample.visible.all() and all((sample.masks[:, t].sum((1, 2)) == 1500).all() for t in range(length))
    peak = tracemalloc.get_traced_memory()[1] - sample.frames.nbytes * 2  # while stacked
    tracemalloc.stop()
    assert type(sample.masks) is RunMasks and peak < 0.25 * count * length * h * w, f"{peak / 1e6:.0f} MB"
    batch = collate_clips([reader.read(0, frames=2)], 144, 128, tracks=3)
    assert batch.masks[0].shape == (3, 2, h, w) and batch.masks[0].sum((2, 3)).eq(1500).all()


# ---- 16: suffixes, and what is left out

def test_folders_of_videos(tmp_path):
    frames = np.stack([np.full((32, 48, 3), 30 + 20 * t, np.uint8) for t in range(8)])
    write_mp4(tmp_path / "a.mp4", frames)
    for name in ("B.MP4", "c.m4v", "d.mov"): shutil.copy(tmp_path / "a.mp4", tmp_path / name)
    Image.fromarray(frames[0]).save(tmp_path / "e.GIF", save_all=True,
                                    append_images=[Image.fromarray(f) for f in frames[1:]], duration=100)
    for k in (1, 2, 10): photo(tmp_path / f"stills/{k}.JPEG")
    photo(tmp_path / "cover.jpg"); photo(tmp_path / "._a.jpg"); photo(tmp_path / ".trash/old/3.jpg")
    for name in ("notes.txt", "Thumbs.db"): (tmp_path / name).write_text("x")
    reader = Videos(tmp_path, every=1)
    assert reader.names == ["B", "a", "c", "d", "e", "stills"] and [len(reader.read(i).frames)
        for i in range(6)] == [8] * 5 + [3]
    grey = reader.read(4).frames.mean((1, 2, 3))
    assert np.abs(grey - frames.mean((1, 2, 3))).max() < 3, "of the GIF"
    left = {Path(file).name: kind for kind, file in reader.notes}
    assert left == {"cover.jpg": "image beside videos left out", "notes.txt": "neither video nor image, left out",
                    "Thumbs.db": "neither video nor image, left out"}


@pytest.mark.parametrize("suffix, codec", [(".avi", "mpeg4"), (".mkv", "h264"), (".mkv", "mpeg4"), (".webm", "vp9"),
                                           (".mpg", "mpeg1video")])
def test_containers_of_every_kind(tmp_path, suffix, codec):
    import av
    try:
        with av.open(str(tmp_path / f"a{suffix.upper()}"), "w") as box:
            stream = box.add_stream(codec, rate=25, width=64, height=48, pix_fmt="yuv420p")
            for t in range(10):
                for packet in stream.encode(av.VideoFrame.from_ndarray(np.full((48, 64, 3), 20 + 20 * t, np.uint8))):
                    box.mux(packet)
            for packet in stream.encode(None): box.mux(packet)
    except (ValueError, av.FFmpegError, KeyError) as e: pytest.skip(f"no encoder here: {e}")
    grey = Videos(tmp_path, every=1).read(0).frames.mean((1, 2, 3))
    assert len(grey) == 10 and np.abs(grey - (20 + 20 * np.arange(10))).max() < 6


def test_sav_with_other_suffixes(tiny, tmp_path):
    shutil.copy(tiny / "clip/toy_000000.mp4", tmp_path / "toy_000000.MP4")
    shutil.copy(tiny / "clip/toy_000000_manual.json", tmp_path)
    (tmp_path / "._toy_000000.MP4").write_bytes(b"x")
    ours, theirs = SaV(tmp_path).read(0), SaV(tiny / "clip").read(0)
    assert len(SaV(tmp_path)) == 1 and (ours.frames == theirs.frames).all() and (ours.masks == theirs.masks).all()


# ---- 17: COCO's traps

def test_polygons_without_an_inside(tmp_path):
    photo(tmp_path / "a.jpg")
    marks = [[[3, 3, 9, 9]], box_polygon(A), [[1, 1, 5, 5], *box_polygon(B)], [[2.0, 2, 8, 2, 8]], box_polygon(C)[0],
             [[float("nan")] * 6], [[1e30, 0, 5, 5, 0, -1e30]]]
    path = coco_file(tmp_path / "a.json", [{"id": 1, "file_name": "a.jpg", "height": H, "width": W}],
                     [{"id": 10 + k, "image_id": 1, "segmentation": s} for k, s in enumerate(marks)])
    sample = Coco(path, tmp_path).read(0)
    assert sample.ids == [11, 12, 14] and (sample.masks == np.stack([filled(w) for w in (A, B, C)])).all()
    assert sum(kind.startswith("polygon") for kind, _ in sample.notes) == 5


def test_one_bad_annotation_costs_itself(tmp_path):
    photo(tmp_path / "a.jpg")
    image = [{"id": 1, "file_name": "a.jpg", "height": H, "width": W}]
    bad = [{"id": 1, "image_id": 1, "segmentation": rle(filled(A, (9, 40)))},
           {"id": 2, "image_id": 1, "segmentation": {"size": [H, W], "counts": "\u20ac"}},
           {"id": 3, "image_id": 1, "segmentation": "x"}]
    sample = Coco(coco_file(tmp_path / "a.json", image, [*bad, {"id": 4, "image_id": 1, "segmentation": rle(filled(
        B))}]), tmp_path).read(0)
    assert sample.ids == [4] and sum(kind == "annotation left out" for kind, _ in sample.notes) == 3
    with pytest.raises(BadSample): Coco(coco_file(tmp_path / "b.json", image, bad), tmp_path).read(0)


@pytest.mark.parametrize("ids", [[None, None], [7, 7], ["a", "b"]])
def test_annotations_without_ids_of_their_own(tmp_path, ids):
    photo(tmp_path / "a.jpg")
    marks = [{"image_id": 1, "segmentation": box_polygon(w)} | ({} if k is None else {"id": k}) for k,
             w in zip(ids, (A, B))]
    reader = Coco(coco_file(tmp_path / "a.json", [{"id": 1, "file_name": "a.jpg"}], marks), tmp_path)
    assert reader.read(0).ids == [1, 2] and "numbered by place" in reader.notes[0][0]


def test_other_kinds_of_annotation_are_refused_by_name(real_files, tmp_path):
    place = real_files / "coco_panoptic"
    with pytest.raises(ValueError, match=r"panoptic_examples\.json: panoptic annotations; take the file of instances"):
        Coco(place / "panoptic_examples.json", place)
    assert len(Coco(place / "panoptic_coco_detection_format.json", place / "input_images").read(0).masks)
    photo(tmp_path / "val2017/1.jpg")
    image = {"id": 1, "file_name": "COCO_val2014_1.jpg", "coco_url": "http://images.cocodataset.org/val2017/1.jpg",
             "height": H, "width": W}
    sample = Coco(coco_file(tmp_path / "lvis05.json", [image], [{"id": 1, "image_id": 1, "segmentation": box_polygon(
        A)}]), tmp_path).read(0)
    assert sample.name == "val2017/1.jpg" and len(sample.masks) == 1, ("LVIS v0.5 names its images otherwise than they "
                                                                       "lie")
