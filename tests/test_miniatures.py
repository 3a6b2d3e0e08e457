"Every part of every shipped recipe of a real data set opens on its miniature, and one sample of each is what it says."
import json
from collections.abc import Callable
from pathlib import Path

import av
import pytest
from av.video.frame import PictureType

from esam3.data.batches import open_dataset
from esam3.data.miniatures import FRAMES, draw_video, miniatures, real_size, sa1b_sample
from esam3.data.readers import SaCoImages
from esam3.data.samples import ClipSample
from esam3.data.toyfiles import enlarged

Open = Callable[[str, str, str], object]


@pytest.fixture(scope="module")
def there() -> Path: return miniatures()


@pytest.fixture
def opened(there: Path, monkeypatch: pytest.MonkeyPatch) -> Open:
    "`open_dataset` with $ESAM3_DATA set."
    monkeypatch.setenv("ESAM3_DATA", str(there))
    return open_dataset


def movie(path: Path) -> tuple[int, int, int, float, tuple[str, ...], tuple[bool, ...]]:
    "Width, height, frames, rate, types of images in order, and which are key frames."
    with av.open(str(path)) as box:
        stream = box.streams.video[0]
        shown = [(PictureType(f.pict_type).name, bool(f.key_frame)) for f in box.decode(stream)]
        kinds, keys = zip(*shown)
        return stream.width, stream.height, len(shown), float(stream.average_rate), kinds, keys


def test_sa1b(opened: Open) -> None:
    train, held = opened("sa1b", "train", "images"), opened("sa1b", "held_out", "images")
    assert (len(train), len(held)) == (4, 2) and not set(train.names) & set(held.names)
    sample, (image, masks) = train.read(0), sa1b_sample(0)
    assert sample.image.shape == (1500, 2250, 3) and len(sample.masks) == 100
    assert (sample.masks == masks).all() and abs(sample.image.astype(int) - image).mean() < 2
    sizes = {train.read(k).image.shape[:2] for k in range(1, 4)} | {held.read(0).image.shape[:2]}
    assert sizes == {(1500, 2250), (2250, 1500)} and 1 < len(held.read(0).masks) <= 5


def test_sav(opened: Open, there: Path) -> None:
    train, held = opened("sav", "train", "clips"), opened("sav", "held_out", "clips")
    assert (len(train), len(held)) == (3, 1) and not {p.name for p in train.paths} & {p.name for p in held.paths}
    sizes = []
    for k, (path, frames) in enumerate(zip(train.paths, FRAMES)):
        width, height, count, rate, kinds, keys = movie(path.with_suffix(".mp4"))
        record = json.loads(path.with_name(f"{path.name}_manual.json").read_text())
        assert (count, rate, len(record["masklet"]), record["video_frame_count"]) == (frames, 24, frames // 4, frames)
        assert "B" in kinds and sum(keys) == 1  # x264's defaults
        sizes.append((width, height))
    assert set(sizes) == {(1400, 1036), (1036, 1400)}


def test_a_clip_of_sav_is_the_drawing(opened: Open) -> None:
    train = opened("sav", "train", "clips")
    for number, frames, k in ((0, 3, 2), (1, 6, 3)):  # a clip, its annotated frames, and a late one of them
        sample: ClipSample = train.read(number)
        _, images, masks = draw_video("sav", number, 4 * frames)
        size = real_size(images[0], (1036, 1400))
        assert sample.frames.shape == (frames, *size, 3) and sample.numbers == [4 * t for t in range(frames)]
        assert abs(sample.frames[0].astype(int) - enlarged(images[0], size)).mean() < 4
        assert abs(sample.frames[k].astype(int) - enlarged(images[4 * k], size)).mean() < 4
        seen = masks.any((1, 2, 3))
        assert (sample.masks == enlarged(masks, size)[seen]).all()
    assert len(train.read(2, frames=4, start=20).frames) == 4  # decoded from the clip's first frame
    assert len(opened("sav", "held_out", "clips").read(0).frames) == 6


@pytest.mark.parametrize("split, size", [("train", {(720, 1280)}), ("held_out", {(900, 1200)})])
def test_saco_images(opened: Open, split: str, size: set[tuple[int, int]]) -> None:
    part = opened("saco", split, "concept_images")
    assert len(part) == 3
    for k in range(3):
        sample = part.read(k)
        assert {sample.image.shape[:2], sample.image.shape[1::-1]} & size
        positive, *others = sample.phrases
        assert positive.instances and not positive.negative
        assert len(others) == 2 and all(p.negative and not p.instances for p in others)


def test_gold_has_three_annotators_who_differ_a_little(there: Path) -> None:
    files = [there / "saco" / "annotations" / f"gold_metaclip_merged_{a}_release_test.json" for a in "abc"]
    by = [SaCoImages(f, there / "saco" / "metaclip") for f in files]
    for k in range(3):
        a, b, c = (r.read(k).masks.any(0) for r in by)
        for other in (b, c): assert 0.9 < (a & other).sum() / (a | other).sum() < 1
    record = json.loads(files[0].read_text())
    assert len(record["images"]) == 9
    assert all(0 < m["area"] < 1 and max(m["bbox"]) <= 1 for m in record["annotations"])  # parts of the image, not px


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_veval(opened: Open, split: str) -> None:
    part = opened("saco", split, "concept_clips")
    assert len(part) == 2
    samples = [part.read(k) for k in range(2)]
    assert [len(s.frames) for s in samples] == [8, 10]
    assert all(sorted(s.frames.shape[1:3]) == [1036, 1400] and s.masks.shape[1:] == s.frames.shape[:3] for s in samples)
    assert all(any(p.instances for p in s.phrases) and any(p.negative for p in s.phrases) for s in samples)


def test_plain_videos(opened: Open) -> None:
    part = opened("videos", "train", "clips")
    assert len(part) == 2
    sample = part.read(0)
    assert sorted(sample.frames.shape[1:3]) == [480, 848] and len(sample.frames) == 6 and len(sample.masks) == 0


def saco(there: Path) -> tuple[Path, Path]:
    "Silver's annotations and media."
    return there / "saco" / "annotations" / "silver_bdd100k_merged_test.json", there / "saco" / "bdd100k"


def test_more_by_a_parameter_and_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "Two caches hold the same; what is there is not written again."
    few = dict(images=1, clips=0, concepts=1, videos=1)
    folders = []
    for k in range(2):
        monkeypatch.setenv("ESAM3_CACHE", str(tmp_path / str(k)))
        folders.append(miniatures(**few))
    files = [{f.relative_to(d): f.read_bytes() for f in d.rglob("*") if f.is_file()} for d in folders]
    assert files[0] == files[1]
    marked = folders[1] / "sa1b" / "sa_000000.tar"
    marked.write_bytes(b"")
    assert miniatures(**few) == folders[1] and marked.stat().st_size == 0
    assert len(SaCoImages(*saco(miniatures(**few | {"videos": 0, "concepts": 2}))).names) == 2
