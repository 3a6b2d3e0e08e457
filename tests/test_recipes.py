"What recipes say: which files are taken and known by what, which words are refused, and that the shipped ones hold."
import json
import re
import shutil
import tarfile

import numpy as np
import pytest
import yaml

from esam3.data import RECIPES, data_digest, load_recipe, open_dataset
from esam3.readers import Sa1b, SaV, places
from esam3.toyworld import toyworld

SHIPPED = sorted(p.stem for p in RECIPES.glob("*.yaml"))
CLIP = "root: x\nsplits: {train: {clips: {format: sav, path: y}}}\n"
IMAGES = "root: x\nsplits: {train: {images: {format: sa1b, path: y}}}\n"
JUDGED = "root: x\nsplits: {held_out: {images: {format: sa1b, path: y}}}\n"


@pytest.fixture
def written(tmp_path):
    "A function: text → the recipe `mine.yaml` that holds it, loaded."
    def load(text: str) -> dict:
        (tmp_path / "mine.yaml").write_text(text)
        return load_recipe(tmp_path / "mine.yaml")
    return load


# ---- words

@pytest.mark.parametrize("text, key, why", [
    (IMAGES + "sampling: {tracks: 4}", "sampling: tracks", "`train` has no clips or concept_clips"),
    (IMAGES + "sampling: {frames: [4, 8]}", "sampling: frames", "`train` has no clips or concept_clips"),
    (IMAGES + "sampling: {late: keep}", "sampling: late", "`train` has no clips or concept_clips"),
    (CLIP + "sampling: {instances: 4}", "sampling: instances", "`train` has no images or concept_images"),
    (CLIP + "sampling: {phrases: 4}", "sampling: phrases", "`train` has no concept_images or concept_clips"),
    (CLIP + "weights: imagenet", "weights", "`train` has no images"),
    (JUDGED + "weights: imagenet", "weights", "it has no split `train`"),
    (JUDGED + "augment: {flip: 0.5}", "augment", "it has no split `train`"),
    (JUDGED + "sampling: {bad: 0.5}", "sampling: bad", "it has no split `train`"),
    (JUDGED + "schedule: paper", "schedule", "it has no split `train`"),
    (JUDGED + "after: sa1b", "after", "it has no split `train`"),
    (IMAGES + "after: sa1b", "after", "`train` has no clips"),
    (IMAGES + "ranks: 2", "ranks", "`train` has no clips"),
    (IMAGES + "stages: {2: {steps: 3}}", "stages: 2", "`train` has no clips"),
    (IMAGES + "stages: {4: {steps: 3}}", "stages: 4", "the stages are 1, 2 and 3")])
def test_key_that_nothing_reads_is_refused(written, text, key, why):
    with pytest.raises(ValueError, match=r"mine.yaml:\d+: " + re.escape(f"nothing reads `{key}`") + ".*" + re.escape(why)):
        written(text)


@pytest.mark.parametrize("text, said", [
    ("schedule: papre", "unknown schedule 'papre': did you mean 'paper'"), ("sampling: {bad: 1.5}", "`sampling: bad` is a share"),
    ("sampling: {bad: many}", "`sampling: bad` is a share"), ("augment: {hew: 0.1}", "did you mean 'hue'")])
def test_wrong_words_are_refused(written, text, said):
    with pytest.raises(ValueError, match=re.escape(said)): written(CLIP + text)


def test_keys_that_are_read_are_taken(written):
    found = written(CLIP + "sampling: {tracks: 4, bad: 0}\nschedule: proven\naugment: {hue: 0.1}\nafter: sa1b\nstages: {2: {steps: 3}}")
    assert found["schedule"] == "proven" and found["sampling"]["bad"] == 0 and found["sampling"]["frames"] == [4, 8]
    assert written(CLIP)["schedule"] == "paper" and written(CLIP)["sampling"]["bad"] == 0.01


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipe_holds(name):
    "It loads, and colour is jittered wherever a real recipe trains; the toy's colours are what its phrases name."
    recipe = load_recipe(name)
    assert recipe["licence"] and recipe["download"]
    toy = recipe["root"].startswith("toyworld")
    assert recipe["schedule"] == ("proven" if toy else "paper")
    if "train" in recipe["splits"]: assert recipe["augment"] and (recipe["augment"].get("hue", 0) > 0) == (not toy)


# ---- files

@pytest.fixture
def data(tmp_path, monkeypatch):
    "An empty folder of data sets, which shipped recipes look into."
    monkeypatch.setenv("ESAM3_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("ESAM3_CACHE", str(tmp_path / "cache"))
    return tmp_path / "data"


def test_sa1b_takes_all_tars_but_the_held_out_one(data):
    "A thousand tars of one sample each, named as Meta names them."
    (data / "sa1b").mkdir(parents=True)
    for k in range(1000):
        with tarfile.open(data / "sa1b" / f"sa_{k:06d}.tar", "w") as tar: tar.addfile(tarfile.TarInfo(f"sa_{k}.json"))
    train, held = open_dataset("sa1b", "train"), open_dataset("sa1b", "held_out")
    assert [p.name for p in train.sources] == [f"sa_{k:06d}.tar" for k in range(999)] and len(train) == 999
    assert [p.name for p in held.sources] == ["sa_000999.tar"]
    for k in range(2, 1000): (data / "sa1b" / f"sa_{k:06d}.tar").unlink()
    assert len(open_dataset("sa1b", "train").sources) == 2, "what is left out need not be there"
    (data / "sa1b" / "sa_000000.tar").rename(data / "sa1b" / "sa_000999.tar"); (data / "sa1b" / "sa_000001.tar").unlink()
    with pytest.raises(FileNotFoundError, match="(?s)without .*sa_000999.tar.*https://"): open_dataset("sa1b", "train")


@pytest.mark.parametrize("folders", [["000"], ["007", "055"], ["000", "051", "054", "055"]])
def test_sav_takes_the_folders_that_are_there(data, folders):
    tiny = toyworld("tiny") / "clip"
    for f in folders:
        (data / "sav/sav_train" / f"sav_{f}").mkdir(parents=True)
        for end in (".mp4", "_manual.json"):
            shutil.copy(tiny / f"toy_000000{end}", data / "sav/sav_train" / f"sav_{f}" / f"sav_{f}000{end}")
    (data / "sav/sav_train/sav_003.tar").touch()
    train = open_dataset("sav", "train")
    assert [p.parent.name for p in train.paths] == [f"sav_{f}" for f in folders if f != "055"]
    if "055" in folders: assert [p.parent.name for p in open_dataset("sav", "held_out").paths] == ["sav_055"]


def test_folders_inside_a_folder_are_left_out(written, tmp_path):
    "`without` may name what lies deeper than `path`, one place or several."
    for place in ("a", "b/c", "d"):
        (tmp_path / "films" / place).mkdir(parents=True)
        (tmp_path / "films" / place / "film.mp4").touch()
    part = "splits: {train: {clips: {format: videos, path: ., without: %s}}}"
    films = lambda without: [p.parent.name for p in open_dataset(written("root: films\n" + part % without)).paths]
    assert films("b") == ["a", "d"] and films('["b/*", a, none]') == ["d"]
    assert [p.parent.name for p in SaV(tmp_path / "films", without=[tmp_path / "films/a", tmp_path / "films/b"]).paths] == ["d"]
    for k in range(3):
        with tarfile.open(tmp_path / "films" / f"{k}.tar", "w") as tar: tar.addfile(tarfile.TarInfo(f"sa_{k}.json"))
    assert [p.stem for p in Sa1b(tmp_path / "films", without=tmp_path / "films/1.tar").sources] == ["0", "2"]
    with pytest.raises(FileNotFoundError, match="nothing at"): places(tmp_path / "films/a", tmp_path / "films/*")


# ---- what data are known by

@pytest.fixture
def copy(tmp_path):
    "The tiny toy world in another folder, with other times, and the recipe that reads it there."
    shutil.copytree(toyworld("tiny"), tmp_path / "moved", copy_function=shutil.copyfile)
    return tmp_path / "moved", {**load_recipe("tiny"), "root": str(tmp_path / "moved")}


def change_byte(path) -> None:
    "Another last digit, at the same length."
    text = path.read_text()
    at = max(text.rfind(d) for d in "0123456789")
    path.write_text(text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1:])


def test_moved_data_are_the_same(copy):
    assert data_digest(copy[1], "held_out") == data_digest("tiny", "held_out")
    assert all(re.fullmatch("[0-9a-f]{16}", d) for d in data_digest("tiny", "held_out").values())


@pytest.mark.parametrize("kind, change", [
    ("concept_images", lambda at: change_byte(at / "saco/images.json")),
    ("concept_clips", lambda at: change_byte(at / "long/veval.json")),
    ("concept_images", lambda at: next((at / "saco").rglob("*.jpg")).unlink()),
    ("clips", lambda at: (at / "clip/toy_000001_manual.json").write_text("{}")),
    ("clips", lambda at: (at / "clip/toy_000001.mp4").write_bytes(b"")),
    ("clips", lambda at: [(at / f"clip/toy_000005{e}").rename(at / f"clip/toy_000008{e}") for e in (".mp4", "_manual.json")]),
    ("images", lambda at: (at / "images.tar").write_bytes((at / "images.tar").read_bytes()[:60_000]))])
def test_changed_data_are_others(copy, kind, change):
    before = data_digest("tiny", "held_out")
    change(copy[0])
    assert [k for k, d in data_digest(copy[1], "held_out").items() if d != before[k]] == [kind]


def test_loose_pictures_are_known_as_in_their_tar(copy):
    at, recipe = copy
    with tarfile.open(at / "images.tar") as tar: tar.extractall(at / "loose", filter="data")
    folder = next((at / "loose").rglob("*.json")).parent
    loose = {**recipe, "splits": {"train": {"images": {"format": "sa1b", "path": str(folder.relative_to(at))}}}}
    assert data_digest(loose) == {"images": data_digest("tiny")["images"]}
    note = sorted(folder.glob("*.json"))[4]
    note.write_text(note.read_text() + " ")
    assert data_digest(loose) != {"images": data_digest("tiny")["images"]}


def test_several_annotators_count(tmp_path):
    "A set that is judged by several files is another one when any of them is."
    truth = json.loads((toyworld("tiny") / "saco/images.json").read_text())
    for name in "ab": (tmp_path / f"{name}.json").write_text(json.dumps(truth))
    part = {"format": "saco_images", "annotations": ["a.json", "b.json"], "media": str(toyworld("tiny") / "saco")}
    (tmp_path / "gold.yaml").write_text(yaml.safe_dump({"root": ".", "splits": {"held_out": {"concept_images": part}}}))
    before = data_digest(tmp_path / "gold.yaml", "held_out")
    change_byte(tmp_path / "b.json")
    assert before != data_digest(tmp_path / "gold.yaml", "held_out")


def test_davis_is_known_by_its_clips(tmp_path):
    from esam3.readers import Davis
    for part in ("JPEGImages/480p/a", "Annotations/480p/a", "ImageSets/2017"): (tmp_path / "davis" / part).mkdir(parents=True)
    (tmp_path / "davis/ImageSets/2017/val.txt").write_text("a\n")
    for t in range(2): (tmp_path / f"davis/JPEGImages/480p/a/{t:05d}.jpg").write_bytes(np.arange(t + 4, dtype=np.uint8).tobytes())
    shutil.copytree(tmp_path / "davis", tmp_path / "other")
    assert Davis(tmp_path / "davis").digest == Davis(tmp_path / "other").digest
    (tmp_path / "other/Annotations/480p/a/00000.png").touch()
    assert Davis(tmp_path / "davis").digest != Davis(tmp_path / "other").digest
