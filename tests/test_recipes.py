"What recipes say: which files are taken and known by what, which words are refused, and that the shipped ones hold."
import json
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import yaml

from esam3.data.batches import DEFAULTS, READERS, RECIPES, SAMPLING, data_digest, load_recipe, open_dataset
from esam3.data.readers import Sa1b, SaV, Videos, places
from esam3.data.recipes import KEYS
from esam3.data.toyfiles import toyworld

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
    with pytest.raises(ValueError, match=r"mine.yaml:\d+: " + re.escape(f"nothing reads `{key}`") + ".*"
                       + re.escape(why)):
        written(text)


@pytest.mark.parametrize("text, said", [
    ("schedule: papre", "unknown schedule 'papre': did you mean 'paper'"),
    ("sampling: {bad: 1.5}", "`sampling: bad` is a share"),
    ("sampling: {bad: many}", "`sampling: bad` is a share"), ("augment: {hew: 0.1}", "did you mean 'hue'")])
def test_wrong_words_are_refused(written, text, said):
    with pytest.raises(ValueError, match=re.escape(said)): written(CLIP + text)


def test_keys_that_are_read_are_taken(written):
    found = written(CLIP
                    + "sampling: {tracks: 4, bad: 0}\nschedule: proven\naugment: {hue: 0.1}\nafter: sa1b\nstages: {2: "
                      "{steps: 3}}")
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


# ---- slips, each by file, line and key

BASE = """name: mine
root: x
splits:
  train:
    images: {format: sa1b, path: y}
    clips:
      format: sav
      path: y
sampling:
  instances: 16
  frames: [4, 8]
augment:
  short: [96, 128]
  flip: 0.5
stages:
  1: {steps: 3}
  2:
    steps: 3
"""
SLIPS = [  # old line, new line, where, what is said
    ("  frames: [4, 8]", "  frames: 8", 11, "`sampling: frames` is [least, most] annotated frames of a clip, not 8"),
    ("  frames: [4, 8]", "  frames: [8, 4]", 11, "`sampling: frames` is [least, most]"),
    ("  frames: [4, 8]", "  frames: [4, 8.0]", 11, "`sampling: frames` is [least, most]"),
    ("  instances: 16", "  instances: many", 10, "`sampling: instances` is a number, 0 for all, not 'many'"),
    ("  instances: 16", "  instances: true", 10, "not True"),
    ("  instances: 16", "  instances:", 10, "`sampling: instances` is empty"),
    ("  instances: 16", "  instences: 16", 10,
     "`sampling` has an unknown sampling key 'instences': did you mean 'instances'?"),
    ("  instances: 16", "  late: on", 10, "put a word in quotes"),
    ("  flip: 0.5", "  flip: 1.5", 14, "`augment: flip` is a share, 0 … 1, not 1.5"),
    ("  flip: 0.5", "  flip: '0.5'", 14, "not '0.5'"),
    ("  flip: 0.5", "  flip: .nan", 14, "not nan"),
    ("  flip: 0.5", "  jitter: .inf", 14, "`augment: jitter` is a number from 0 on, not inf"),
    ("  1: {steps: 3}", "  '1': {steps: 3}", 16,
     "nothing reads `stages: 1`: the stages are 1, 2 and 3, without quotes"),
    ("  flip: 0.5", "  hue: 1e-2", 14, "write 1.0e-3, not 1e-3"),
    ("  flip: 0.5", "  short: [64, 64]", 14, "`short` stands here and in line 13"),
    ("root: x", "root: x\nroot: y", 3, "`root` stands here and in line 2"),
    ("root: x", "root: 7", 2, "`root` is text, and not empty, not 7"),
    ("root: x", "root: x\nweights: imagnet", 3, "did you mean 'imagenet'"),
    ("root: x", "root: x\nranks: 0", 3, "`ranks` is a whole number from 1 on, not 0"),
    ("root: x", "root: x\nevaluation: {images: -1}", 3, "`evaluation: images` is a number of samples"),
    ("root: x", "root: x\nschedule: [paper]", 3, "`schedule` is one of paper, proven, not ['paper']"),
    ("root: x", "root: x\nsplit: {}", 3, "unknown recipe key 'split': did you mean 'splits'?"),
    ("root: x", "root: x\n  about: y", 3, "not YAML"),
    ("root: x", "root: &x [*x]", 2, "an anchor inside itself"),
    ("root: x", "root: !!python/name:os.system x", 2, "not YAML"),
    ("name: mine", "name: a/b", 1, "`name` is a name that a folder can have"),
    ("name: mine", "name: 2017", 1, "`name` is a name that a folder can have, not 2017"),
    ("  1: {steps: 3}", "  1: {stps: 3}", 16, "unknown field of the schedule 'stps': did you mean 'steps'?"),
    ("  1: {steps: 3}", "  1: {global_latents: 3}", 16, "'global_latents' is a setting of stage 2"),
    ("  1: {steps: 3}", "  1: {steps: 3.5}", 16, "`stages: 1: steps` is a whole number"),
    ("  1: {steps: 3}", "  1: {map_weights: [1, x]}", 16, "`stages: 1: map_weights` is a list"),
    ("  1: {steps: 3}", "  1: [steps]", 16, "`stages: 1` expected lines"),
    ("    steps: 3", "    augment: 1", 18, "`stages: 2: augment` is true or false, not 1"),
    ("      format: sav", "      format: sa1b", 7,
     "`splits: train: clips` has no clips: format sa1b is read as images"),
    ("      format: sav", "      format: sva", 7, "unknown format 'sva': did you mean 'sav'?"),
    ("      path: y", "      pth: y", 8, "unknown key 'pth': did you mean 'path'?"),
    ("      path: y", "      path: [y, 3]", 8,
     "`splits: train: clips: path` is a path or pattern, or a list of them, not ['y', 3]"),
    ("      path: y", "      path: []", 8, "is a path or pattern"),
    ("      path: y", "      path: y\n      by: machine", 9,
     "`splits: train: clips: by` has an unknown annotator 'machine'"),
    ("      path: y", "      by: auto", 6, "format sav needs `path`"),
    ("    images: {format: sa1b, path: y}", "    images: sa1b", 5, "`splits: train: images` has no `format`"),
    ("    images: {format: sa1b, path: y}", "    image: {format: sa1b, path: y}", 5, "did you mean 'images'?"),
    ("    images: {format: sa1b, path: y}", "    concept_images: {format: sa1b, path: y}", 5,
     "has no concept_images: format sa1b is read as images"),
    ("    images: {format: sa1b, path: y}", "    images: {format: mixture, parts: [{format: sa1b, path: y, share: 1}]}",
     5, "a list of two parts or more"),
    ("    images: {format: sa1b, path: y}",
     "    images: {format: mixture, parts: [{format: sa1b, path: y, share: 1}, {format: sa1b, path: y}]}", 5,
     "part 2` lacks a key"),
    ("    images: {format: sa1b, path: y}",
     "    images: {format: mixture, parts: [{format: sa1b, path: y, share: 1}, {format: sa1b, path: y, share: 0}]}", 5,
     "`splits: train: images: part 2: share` is a positive number, not 0"),
    ("    images: {format: sa1b, path: y}",
     "    images: {format: mixture, parts: [{format: sa1b, path: y, share: 1}, {recipe: davs, share: 1}]}", 5,
     "did you mean 'davis'"),
    ("    images: {format: sa1b, path: y}",
     "    images: {format: mixture, parts: [{format: sa1b, path: y, share: 1}, {recipe: davis, share: 1}]}", 5,
     "recipe davis trains on clips"),
    ("    images: {format: sa1b, path: y}",
     "    images: {format: mixture, parts: [{format: sa1b, path: y, share: 1}, {recipe: mine.yaml, share: 1}]}", 5,
     "goes in a circle: mine → mine"),
    ("  train:", "  train: &t\n    concept_clips: {format: saco_video, annotations: a, media: [b]}", 5,
     "`splits: train: concept_clips: media` is text"),
    ("  train:", "  held_out: {images: {format: mixture, parts: []}}\n  train:", 4,
     "held-out data are scored set by set"),
    ("  train:", "  held_out: {}\n  train:", 4, "`splits: held_out` expected lines `kind of data: …`"),
    ("  train:", "  val: &v {images: &i {format: sa1b, path: ''}}\n  other: *v\n  train:", 4,
     "path` is a path or pattern, or a list of them, not ''"),
    ("sampling:", "sampling: []\nother:", 9, "expected lines `sampling key: …`, got []"),
    ("sampling:", "sampling: {<<: {tracks: 4, late: kep}, tracks: 8}\nother:", 9, "did you mean 'keep'?")]


@pytest.mark.parametrize("old, new, line, said", SLIPS, ids=[f"{k}-{new.strip()[:40]}" for k,
                                                             (_, new, _, _) in enumerate(SLIPS)])
def test_slips_are_named_by_file_line_and_key(written, old, new, line, said):
    written(BASE)
    assert f"{old}\n" in BASE
    with pytest.raises(ValueError, match=re.escape(said)) as e: written(BASE.replace(f"{old}\n", f"{new}\n", 1))
    assert str(e.value).startswith(f"mine.yaml:{line}: "), e.value


@pytest.mark.parametrize("text, said",
                         [("splits: []\nroot: x", "mine.yaml:1: `splits` expected lines `split: …`, got []"),
                          ("root: x\nsplits:", "mine.yaml:2: `splits` expected lines"),
                                        ("", "mine.yaml:1: expected lines"), ("root: x", "mine.yaml:1: no `splits`"),
                          ("root: '\x01'", "mine.yaml: not YAML"), ("a: 1\n---\nb: 2", "mine.yaml:2: not YAML")])
def test_what_is_no_recipe(written, text, said):
    with pytest.raises(ValueError, match=re.escape(said)): written(text)


@pytest.mark.parametrize("old, new", [("clip", "max_norm"), ("warmup", "linear_warmup"),
                                      ("lesson_steps", "warmup_steps"), ("lesson_lr", "warmup_lr")])
def test_old_keys_are_refused_with_the_new_name(written, old, new):
    text = BASE.replace("    steps: 3\n", f"    steps: 3\n    {old}: 1\n")
    with pytest.raises(ValueError, match=re.escape(f"mine.yaml:19: `stages: 2`: '{old}' is called '{new}' now")):
        written(text)


def test_bytes_are_no_recipe(tmp_path):
    (tmp_path / "mine.yaml").write_bytes(b"about: \xff\xfe")
    with pytest.raises(ValueError, match="mine.yaml: not a text in UTF-8"): load_recipe(tmp_path / "mine.yaml")
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(ValueError, match="unknown recipe"): load_recipe(tmp_path / "folder.yaml")


def test_every_key_of_every_reader_has_a_rule():
    "A value of the wrong kind in any of them is a slip of the recipe, not an error of the reader."
    import inspect
    for readers in READERS.values():
        for reader in readers: assert set(inspect.signature(reader).parameters) <= set(KEYS), reader.__name__


# ---- one recipe from another

TOY = {"licence": "Apache-2.0, made by this project", "teacher": "toy", "weights": "", "after": "",
       "schedule": "proven",
       "download": "Nothing. It is written to the cache folder (~/.cache/esam3, or $ESAM3_CACHE) the first time it is "
                   "asked for.",
       "sampling": {"instances": 16, "tracks": 8, "phrases": 0, "frames": [4, 8], "late": "drop", "bad": 0.01},
       "augment": {"short": [96, 128], "crop": 128, "flip": 0.5, "jitter": 0.1},
       "evaluation": {"images": 0, "instances": 0, "clips": 0, "frames": 0}}
PARTS = {"images": {"format": "sa1b", "path": "images.tar"}, "clips": {"format": "sav", "path": "clip"},
         "concept_images": {"format": "saco_images", "annotations": "saco/images.json", "media": "saco"}}
LONG = {"concept_clips": {"format": "saco_video", "annotations": "long/veval.json", "media": "long"}}
FROZEN = {  # what the recipes said when each still said all of it
    "toy_hour": TOY | {
        "name": "toy_hour",
        "about": "The toy world with an hour's patience; longer stages 1 and 2 than in toy, the same images and clips.",
        "root": "toyworld", "ranks": 2,
        "splits": {"train": PARTS, "held_out": PARTS | LONG},
        "stages": {1: {"steps": 1600, "batch_size": 8, "lr": 0.002, "inherited": 0.1, "linear_warmup": 0.05,
                       "max_norm": 5.0, "lambda1": 4.0},
                   2: {"steps": 960, "batch_size": 4, "augment": False, "back": 0.5, "lr": 0.0003,
                       "linear_warmup": 0.05, "ema": 0.99, "lambda2": 0.5, "warmup_steps": 960,
                       "global_latents": 4, "local_latents": 16},
                   3: {"steps": 480, "batch_size": 8, "augment": False, "clip_every": 2, "back": 0.5, "lr": 0.0002,
                       "linear_warmup": 0.05, "ema": 0.98, "lambda1": 4.0, "lambda2": 0.5,
                       "thaw": ["detr", "tracking"], "encoder_lr": 0.0005, "warmup_steps": 950, "warmup_lr": 0.001}}},
    "tiny": TOY | {
        "name": "tiny",
        "about": "A handful of samples of the toy world, for tests. Colour × shape × pattern in images and clips, "
                 "written by 01k_toyfiles in the formats of the real data sets.",
        "root": "toyworld/tiny", "ranks": 1, "splits": {"train": PARTS, "held_out": PARTS | LONG},
        "stages": {1: {"steps": 3, "batch_size": 4, "lr": 0.001, "inherited": 0.1, "linear_warmup": 0.05,
                       "max_norm": 5.0},
                   2: {"steps": 3, "batch_size": 2, "augment": False, "back": 0.0, "lr": 0.0005, "linear_warmup": 0.05,
                       "max_norm": 5.0, "ema": 0.98, "lambda2": 0.5, "warmup_steps": 3,
                       "global_latents": 4, "local_latents": 4},
                   3: {"steps": 3, "batch_size": 4, "augment": False, "back": 0.0, "lr": 0.0001, "linear_warmup": 0.05,
                       "ema": 0.98, "lambda1": 4.0, "thaw": ["detr", "tracking"],
                       "encoder_lr": 0.0001, "warmup_steps": 2, "warmup_lr": 0.001}}}}


@pytest.mark.parametrize("name", FROZEN)
def test_inheriting_changes_no_recipe(name):
    assert load_recipe(name) == FROZEN[name]
    own = yaml.safe_load((RECIPES / "toy_hour.yaml").read_text())
    assert own["extends"] == "toy" and own.keys() == {"extends", "name", "about", "splits",
                                                      "stages"} and own["splits"] == {
                                                          "tiny": None}, "it repeats nothing"


def test_a_chain_of_recipes(tmp_path):
    """Mappings are merged key by key, lists and words replaced, null takes away; a name is a recipe's own; paths count
    from the file that says them."""
    for name in ("a", "b", "c"): (tmp_path / name).mkdir()
    (tmp_path / "a/base.yaml").write_text("name: base\nroot: data\nteacher: toy\nsplits: {train: {clips: {format: sav, "
                                          "path: x, by: auto}}}\nsampling: {tracks: 3, frames: [1, 2]}\naugment: "
                                          "{flip: 0.5, crop: 9}\n")
    (tmp_path / "b/middle.yaml").write_text("extends: ../a/base.yaml\nsampling: {frames: [5, 6]}\naugment: {flip: "
                                            "null, hue: 0.1}\n")
    (tmp_path / "c/top.yaml").write_text(f"extends: {tmp_path / 'b/middle.yaml'}\nteacher: null\nsplits: {{train: "
                                         f"{{clips: {{by: manual}}, images: {{format: coco, annotations: j, media: m, "
                                         f"root: here}}}}}}\n")
    found = load_recipe(tmp_path / "c/top.yaml")
    assert (found["name"] == "top" and Path(found["root"]).resolve() == tmp_path / "a/data"
            and found["teacher"] == DEFAULTS["teacher"])
    assert found["sampling"] == {**SAMPLING, "tracks": 3, "frames": [5, 6]} and found["augment"] == {"crop": 9,
        "hue": 0.1}
    assert found["splits"]["train"] == {"clips": {"format": "sav", "path": "x", "by": "manual"},
                                        "images": {"format": "coco", "annotations": "j", "media": "m",
                                                   "root": str(tmp_path / "c/here")}}


def test_another_format_inherits_no_keys(written, tmp_path):
    (tmp_path / "base.yaml").write_text("root: x\nsplits: {train: {clips: {format: sav, path: x, by: auto}}}")
    assert (
        written("extends: base.yaml\nsplits: {train: {clips: {format: videos, path: y}}}")["splits"]["train"][
            "clips"] == {"format": "videos", "path": "y"})


@pytest.mark.parametrize("text, said", [
    ("extends: mine.yaml", "mine.yaml:1: `extends` goes in a circle: mine → mine"),
    ("root: x\nextends: other.yaml", "other.yaml:1: `extends` goes in a circle: mine → other → mine"),
    ("extends: tyo", "mine.yaml:1: `extends` is an unknown recipe 'tyo': did you mean 'toy'?"),
    ("extends: [toy]", "mine.yaml:1: `extends` is the name of a recipe"),
    ("extends: toy\nsampling: {trakcs: 1}", "mine.yaml:2: `sampling` has an unknown sampling key"),
    ("extends: toy\nlicence: null\nabuot: null", "mine.yaml:3: unknown recipe key 'abuot'"),
    ("extends: bad.yaml", "bad.yaml:2: `ranks` is a whole number"),
    ("extends: sav\nsplits: {train: null}",
     "nothing reads `after`, since it has no split `train`; take it away with `after: null`")])
def test_wrong_inheritance(written, tmp_path, text, said):
    (tmp_path / "other.yaml").write_text("extends: mine.yaml\nroot: y")
    (tmp_path / "bad.yaml").write_text("root: x\nranks: two\nsplits: {train: {clips: {format: sav, path: x}}}")
    with pytest.raises(ValueError, match=re.escape(said)): written(text)


# ---- any folder

def test_a_folder_is_images_or_clips(tmp_path, data):
    "By the place at which it stands; each leaves out what the other reads."
    (data / "folder/deep").mkdir(parents=True)
    shutil.copy(toyworld("tiny") / "clip/toy_000000.mp4", data / "folder/deep")
    for name in ("a.JPG", "b.JPG", "c.JPG", ".trash/3.jpg", "__MACOSX/4.jpg", "deep/.5.jpg"):
        (data / "folder" / name).parent.mkdir(exist_ok=True)
        shutil.copy(next((toyworld("tiny") / "saco").rglob("*.jpg")), data / "folder" / name)
    images, clips = open_dataset("folder", "train", "images"), open_dataset("folder", "train", "clips")
    assert images.names == ["a.JPG", "b.JPG",
                            "c.JPG"] and not images.labelled and images.read(0).masks.shape[0] == 0 and isinstance(
                                clips, Videos)
    assert any("toy_000000.mp4" in detail for _, detail in images.notes) and clips.names == ["toy_000000"]
    before = data_digest("folder")
    (data / "folder/3.jpg").write_bytes(b"x")
    assert data_digest("folder")["images"] != before["images"]
    assert images.digest == before["images"] and open_dataset("folder", "train", "images").names[0] == "3.jpg"


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
    (data / "sa1b" / "sa_000000.tar").rename(data / "sa1b" / "sa_000999.tar")
    (data / "sa1b" / "sa_000001.tar").unlink()
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
        (tmp_path / "videos" / place).mkdir(parents=True)
        (tmp_path / "videos" / place / "video.mp4").touch()
    part = "splits: {train: {clips: {format: videos, path: ., without: %s}}}"
    videos = lambda without: [p.parent.name for p in open_dataset(written("root: videos\n" + part % without)).paths]
    assert videos("b") == ["a", "d"] and videos('["b/*", a, none]') == ["d"]
    assert ([p.parent.name for p in SaV(
        tmp_path / "videos", without=[tmp_path / "videos/a", tmp_path / "videos/b"]).paths] == ["d"])
    for k in range(3):
        with tarfile.open(tmp_path / "videos" / f"{k}.tar", "w") as tar: tar.addfile(tarfile.TarInfo(f"sa_{k}.json"))
    assert [p.stem for p in Sa1b(tmp_path / "videos", without=tmp_path / "videos/1.tar").sources] == ["0", "2"]
    with pytest.raises(FileNotFoundError, match="nothing at"): places(tmp_path / "videos/a", tmp_path / "videos/*")


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
    ("clips", lambda at: [(at / f"clip/toy_000005{e}").rename(at / f"clip/toy_000008{e}")
                          for e in (".mp4", "_manual.json")]),
    ("images", lambda at: (at / "images.tar").write_bytes((at / "images.tar").read_bytes()[:60_000]))])
def test_changed_data_are_others(copy, kind, change):
    before = data_digest("tiny", "held_out")
    change(copy[0])
    assert [k for k, d in data_digest(copy[1], "held_out").items() if d != before[k]] == [kind]


def test_loose_images_are_known_as_in_their_tar(copy):
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
    from esam3.data.readers import Davis
    for part in ("JPEGImages/480p/a", "Annotations/480p/a", "ImageSets/2017"):
        (tmp_path / "davis" / part).mkdir(parents=True)
    (tmp_path / "davis/ImageSets/2017/val.txt").write_text("a\n")
    for t in range(2):
        (tmp_path / f"davis/JPEGImages/480p/a/{t:05d}.jpg").write_bytes(np.arange(t + 4, dtype=np.uint8).tobytes())
    shutil.copytree(tmp_path / "davis", tmp_path / "other")
    assert Davis(tmp_path / "davis").digest == Davis(tmp_path / "other").digest
    (tmp_path / "other/Annotations/480p/a/00000.png").touch()
    assert Davis(tmp_path / "davis").digest != Davis(tmp_path / "other").digest
