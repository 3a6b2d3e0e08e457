"What a survey counts and finds in every format, what it keeps, and what it notices."
import json
import shutil
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from esam3.data.batches import READERS, load_recipe, open_dataset
from esam3.data.recipes import reader_for
from esam3.data.toyfiles import toyworld
from esam3.show import survey as module
from esam3.show.survey import fault, main, sheet, survey

matplotlib.use("agg")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    "A cache folder of its own, with the toy world in it."
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / toyworld("tiny").name).symlink_to(toyworld("tiny"))
    monkeypatch.setenv("ESAM3_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TQDM_DISABLE", "1")
    return tmp_path / "cache"


@pytest.fixture
def opened(monkeypatch) -> list[int]:
    "The samples that are opened, as they are."
    seen, real = [], module.opened_sample
    monkeypatch.setattr(module, "opened_sample", lambda reader, i: seen.append(i) or real(reader, i))
    return seen


@pytest.fixture
def mine(tmp_path) -> dict:
    "A recipe of twenty-four images with phrases, in a folder of one's own."
    shutil.copytree(toyworld("tiny") / "saco", tmp_path / "mine/saco")
    part = {"format": "saco_images", "annotations": "saco/images.json", "media": "saco"}
    return {**load_recipe("tiny"), "name": "mine", "root": str(tmp_path / "mine"),
            "splits": {"train": {"concept_images": part}}}


def image(path: Path, size: tuple[int, int] = (40, 60), value: int = 90, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full(size + ((3,) if mode == "RGB" else ()), value, np.uint8)).save(path)


# ---- every format

def some_data(word: str, at: Path) -> dict:
    "A small data set of a format, and the part of a recipe that reads it. The second of its samples is broken."
    tiny = toyworld("tiny")
    if word in ("davis", "vos"):
        sub = "480p" if word == "davis" else "."
        for clip in "ab":
            for t in range(3):
                image(at / "JPEGImages" / sub / clip / f"{t:05d}.jpg")
                image(at / "Annotations" / sub / clip / f"{t:05d}.png", value=1, mode="L")
        (at / "JPEGImages" / sub / "b/00000.jpg").write_bytes(b"broken")
        (at / "ImageSets/2017").mkdir(parents=True)
        (at / "ImageSets/2017/val.txt").write_text("a\nb\n")
        return {"format": word, "path": "."}
    if word == "sav_folders":
        for clip in "ab":
            for t in range(3): image(at / f"JPEGImages_24fps/{clip}/{t:05d}.jpg")
            image(at / f"Annotations_6fps/{clip}/000/00000.png", value=1, mode="L")
        (at / "JPEGImages_24fps/b/00000.jpg").write_bytes(b"broken")
        return {"format": word, "path": "."}
    if word == "coco":
        for name in "ab": image(at / f"{name}.jpg")
        (at / "b.jpg").write_bytes(b"broken")
        square = {"segmentation": [[5, 5, 25, 5, 25, 25, 5, 25]], "category_id": 1, "iscrowd": 0, "area": 400,
                  "bbox": [5, 5, 20, 20]}
        (at / "c.json").write_text(json.dumps(
            {"images": [{"id": k, "file_name": f"{n}.jpg", "height": 40, "width": 60} for k, n in enumerate("ab", 1)],
                                               "categories": [],
             "annotations": [{"id": k, "image_id": k, **square} for k in (1, 2)]}))
        return {"format": word, "annotations": "c.json", "media": "."}
    if word == "saco_images":
        shutil.copytree(tiny / "saco", at, dirs_exist_ok=True)
        sorted(at.rglob("*.jpg"))[1].write_bytes(b"broken")
        return {"format": word, "annotations": "images.json", "media": "."}
    if word == "saco_video":
        shutil.copytree(tiny / "long", at, dirs_exist_ok=True)
        sorted(at.rglob("*.jpg"))[0].write_bytes(b"broken")
        return {"format": word, "annotations": "veval.json", "media": "."}
    if word == "sa1b":
        for name in "ab":
            image(at / f"{name}.jpg")
            (at / f"{name}.json").write_text(json.dumps({"annotations": []}))
        (at / "b.jpg").write_bytes(b"broken")
        return {"format": word, "path": "."}
    for k in range(2):
        for end in (".mp4", "_manual.json"): shutil.copy(tiny / f"clip/toy_00000{k}{end}", at)
    (at / "toy_000001.mp4").write_bytes(b"broken")
    return {"format": word, "path": "."}


@pytest.mark.parametrize("word, kind", [(word, r.kind) for word, readers in READERS.items() for r in readers])
def test_every_format_is_surveyed(word, kind, tmp_path, capsys):
    "What is there is counted, what is broken is named with its kind, and stops nothing."
    at = tmp_path / "data"
    at.mkdir()
    if (word, kind) == ("folder", "images"):
        image(at / "a.JPG"); (at / "b.png").write_bytes(b"broken"); part = {"format": word, "path": "."}
    else: part = some_data(word, at)
    kind = f"concept_{kind}" if reader_for(word, f"concept_{kind}") else kind
    found = survey({**load_recipe("tiny"), "root": str(at), "splits": {"train": {kind: part}}})
    one, = found.parts
    assert one.count == len(one.rows) and sum(map(len, found.faults.values())) == 1, found
    kinds = {"not a readable image", "not a readable video"}
    assert set(found.faults) <= kinds and str(found) + "\n" == capsys.readouterr().out
    assert one.values("size") or word == "saco_video"
    if kind == "clips": assert one.values("frames")
    if word in ("sav", "videos"): assert "codecs 1 × H.264" in str(found) and "seconds" in str(found)
    if word in ("saco_images", "saco_video"): assert "phrases" in str(found)
    assert ("not annotated" in str(found)) == (word in ("folder", "videos"))


@pytest.mark.parametrize("word", ["davis", "vos", "sav_folders", "videos"])
@pytest.mark.parametrize("what", ["image", "broken", "whole"])
def test_a_late_frame_of_another_size_is_found(word, what, tmp_path):
    "Or one that cannot be read: the heads of all frames are looked at, though one frame is opened."
    at = tmp_path / "data"
    at.mkdir()
    if word == "videos":
        for t in range(40): image(at / f"film/{t:05d}.jpg")
        part, last = {"format": word, "path": "film", "every": 1}, at / "film/00039.jpg"
    else:
        part = some_data(word, at)
        shutil.rmtree(next(p for p in at.rglob("b") if "Images" in str(p)))
        for p in at.rglob("b"): shutil.rmtree(p)
        if word == "davis": (at / "ImageSets/2017/val.txt").write_text("a\n")
        last = sorted(p for p in at.rglob("*.jpg"))[-1]
    if what == "image": image(last, (38, 60))
    if what == "broken": last.write_bytes(b"broken")
    found = survey({**load_recipe("tiny"), "root": str(at), "splits": {"train": {"clips": part}}})
    kind = {"image": ["images of different sizes"], "broken": ["not a readable image"], "whole": []}[what]
    assert [*found.faults] == kind, found.faults


def test_annotations_alone_are_counted(tmp_path):
    part = some_data("coco", tmp_path)
    for f in tmp_path.glob("*.jpg"): f.unlink()
    (tmp_path / "alone.yaml").write_text(f"root: .\nsplits: {{val: {{images: {json.dumps(part)}}}}}\n")
    found = survey(tmp_path / "alone.yaml")
    assert ("val, images: 2 samples (Coco), annotations alone: none of the 2 images" in str(found)
            and "instances 1 of a sample, 2 in all" in str(found))


def test_faults_are_grouped():
    from esam3.data.samples import BadSample
    kind = lambda text: fault(BadSample(text))
    assert kind("a 1.json, annotation 12: mask of 10×20 px on an image of 30×40; x") == kind("b.json, masklet 3: mask "
        "of 1×2 px on an image of 3×40; y") == "mask of n×n px on an image of n×n"
    assert kind("x: images of different sizes, [(1, 2), (3, 4)]; y") == "images of different sizes"
    assert kind("/x/y.mp4: damaged, frame 17 of 90 cannot be decoded (HEVC); z") == ("damaged, frame n of n cannot be "
        "decoded") and kind("") == "BadSample"


# ---- what is kept

def test_a_second_survey_opens_nothing(mine, opened):
    first = survey(mine)
    assert len(opened) == 24
    opened.clear()
    again = survey(mine)
    assert not opened and str(again) == str(first) and "phrases 24 positive, 48 negative" in str(again)


def test_more_is_opened_of_more(mine, opened):
    "And what was opened before is not opened again."
    assert len(survey(mine, opened=5).parts[0].rows) == 5 == len(opened)
    found = survey(mine, opened=12).parts[0]
    assert len(found.rows) == 12 == len(set(opened)) == len(opened) and found.count == 24 == len(found.heads)
    assert "24 samples (SaCoImages), 12 opened" in str(survey(mine, opened=12))


@pytest.mark.parametrize("change", ["same length", "longer", "gone", "annotations"])
def test_a_change_is_noticed(mine, opened, change):
    survey(mine)
    opened.clear()
    file = sorted(Path(mine["root"]).rglob("*.jpg"))[3]
    if change == "same length": file.write_bytes(b"x" * file.stat().st_size)
    if change == "longer": file.write_bytes(file.read_bytes() + b"x")
    if change == "gone": file.unlink()
    if change == "annotations":
        truth = Path(mine["root"]) / "saco/images.json"
        truth.write_text(truth.read_text().replace("24", "24 ", 1))
    found = survey(mine)
    assert len(opened) == 24 and bool(found.faults) == (change in ("same length", "gone"))
    opened.clear()
    survey(mine)
    assert not opened


def test_other_readers_look_again(mine, opened, tmp_path, monkeypatch):
    "What an older version of a reader could not read is no fault for ever."
    survey(mine)
    opened.clear()
    (tmp_path / "new.py").write_text("# another version")
    monkeypatch.setattr(module, "CODE", [*module.CODE[:-1], tmp_path / "new.py"])
    survey(mine)
    assert len(opened) == 24 and len(module.CODE) == 5


def test_a_survey_that_is_killed_goes_on(mine, opened, cache, monkeypatch):
    monkeypatch.setattr(module, "EVERY", 5)
    counted = module.opened_sample

    def kill(reader, i):
        if len(opened) == 13: raise KeyboardInterrupt
        return counted(reader, i)
    monkeypatch.setattr(module, "opened_sample", kill)
    with pytest.raises(KeyboardInterrupt): survey(mine)
    file, = (cache / "surveys").iterdir()
    assert len(json.loads(file.read_text())) == 10
    monkeypatch.setattr(module, "opened_sample", counted)
    opened.clear()
    survey(mine)
    assert len(opened) == 14


def test_nothing_is_half_written(mine, cache, monkeypatch):
    real = Path.write_text
    def cut(self, text, *rest, **options):
        real(self, text[:len(text) // 2], *rest, **options)
        raise KeyboardInterrupt
    monkeypatch.setattr(Path, "write_text", cut)
    with pytest.raises(KeyboardInterrupt): survey(mine)
    assert not list((cache / "surveys").glob("*.json"))
    monkeypatch.setattr(Path, "write_text", real)
    assert not survey(mine).faults


# ---- what is asked

def test_a_folder_a_mixture_and_what_is_not_there(tmp_path, monkeypatch, capsys):
    image(tmp_path / "photos/deep/a.jpg")
    found = survey(tmp_path / "photos")
    assert [(p.kind, p.count) for p in found.parts] == [("images", 1)] and found.name == "photos"
    assert survey(toyworld("tiny") / "clip/toy_000000.mp4").parts[0].rows[0]["codec"] == "H.264"
    (tmp_path / "two.yaml").write_text("extends: tiny\nname: two\n")
    mixed = survey(f"tiny:3+{tmp_path / 'two.yaml'}:1", split="train")
    assert [p.kind for p in mixed.parts][:2] == ["images, 75% tiny", "images, 25% two"]
    monkeypatch.setenv("ESAM3_DATA", str(tmp_path))
    (tmp_path / "half.yaml").write_text("extends: tiny\nsplits: {train: {clips: {path: nowhere}}}")
    assert "train, clips: not there: nothing at" in str(survey(tmp_path / "half.yaml", split="train"))
    with pytest.raises(FileNotFoundError, match="https://"): survey("sav")
    with pytest.raises(ValueError, match="did you mean 'train'"): survey("tiny", "trian")
    with pytest.raises(ValueError, match="did you mean"): survey("tinny")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no image below"): survey(tmp_path / "empty")


def test_the_command(capsys):
    main(["tiny", "held_out", "2"])
    assert "held_out, clips: 6 samples (SaV), 2 opened" in capsys.readouterr().out
    for words in ([], ["-h"], ["tinny"]):
        with pytest.raises(SystemExit): main(words)


# ---- a sheet

@pytest.mark.parametrize("kind", ["images", "clips", "concept_images", "concept_clips"])
def test_a_sheet_shows_instances_and_phrases(kind):
    figure = sheet(open_dataset("tiny", "held_out", kind), count=1)
    first = figure.axes[0]
    assert first.images and first.texts and first.patches and len(figure.axes) == (4 if "clips" in kind else 1)
    assert ("(none)" in first.get_title(loc="left")) == ("concept" in kind)


def test_a_sheet_says_what_cannot_be_read(tmp_path):
    image(tmp_path / "a.jpg", (900, 1200)); (tmp_path / "b.jpg").write_bytes(b"broken")
    reader = READERS["folder"][0](tmp_path)
    figure = sheet(reader)
    assert sorted(bool(ax.texts) for ax in figure.axes) == [False,
                                                            True] and max(im.get_array().shape[1] for ax in figure.axes
                                                                for im in ax.images) <= 400


def test_a_folder_that_is_not_there_is_said_to_be_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"): survey(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="did you mean 'tiny'"): survey("tinny")
