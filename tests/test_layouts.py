"Checkpoints in both layouts load, and one with a group of weights removed, renamed or doubled is refused by its name."
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from esam3.models.student import EfficientSam3, build_student
from esam3.models.teacher import ASSETS, Sam3, load_teacher

TOY = ASSETS / "toy_teacher"
Weights = Mapping[str, Tensor]
GROUPS = ("tracker_model.memory_attention", "detector_model.geometry_encoder", "tracker_neck.fpn_layers")


def plain(weights: Weights) -> Weights:
    "In facebook/sam3's layout."
    return {n.replace("tracker_model.tracker_model.", "tracker_model."): w for n, w in weights.items()}


def of(weights: Weights, group: str) -> Weights:
    return {n: w for n, w in weights.items() if next(iter(plain({n: w}))).startswith(group)}


def removed(weights: Weights, group: str) -> Weights: return {n: w for n, w in weights.items() if n not in of(weights, group)}


def renamed(weights: Weights, group: str) -> Weights:
    first, second = group.split(".")
    return {n.replace(f"{first}.{second}", f"{first}.{second}_old") if n in of(weights, group) else n: w for n, w in weights.items()}


def doubled(weights: Weights, group: str) -> Weights:
    "Both layouts at once; where there is but one, under a prefix that the library drops."
    again = of(weights, group)
    other = plain(again)
    return {**weights, **(other if other.keys() != again.keys() else {f"sam3_video.{n}": w for n, w in again.items()})}


SAID: Mapping[Callable[[Weights, str], Weights], str] = {removed: "missing", renamed: "unknown", doubled: "there twice"}


def write(folder: Path, weights: Weights, like: Path) -> Path:
    "A checkpoint with other weights."
    shutil.copytree(like, folder, dirs_exist_ok=True)
    (folder / "model.safetensors").unlink()
    save_file({n: w.clone() for n, w in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def equal(a: Sam3, b: Sam3) -> bool:
    theirs = b.state_dict()
    return a.state_dict().keys() == theirs.keys() and all(torch.equal(w, theirs[n]) for n, w in a.state_dict().items())


@pytest.fixture(scope="module")
def weights() -> Weights: return load_file(TOY / "model.safetensors")


@pytest.fixture(scope="module")
def toy() -> Sam3: return load_teacher()


@pytest.fixture(scope="module")
def saved(toy: Sam3, tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A student with a Perceiver, saved."
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("student")
    build_student("es-ev-s", toy, "perceiver").save_pretrained(folder)
    return folder


def test_both_layouts_are_there(weights: Weights) -> None:
    "Otherwise the tests below compare one layout with itself."
    assert any(n.startswith("tracker_model.tracker_model.") for n in weights) and plain(weights).keys() != weights.keys()


def test_plain_layout_loads(toy: Sam3, weights: Weights, tmp_path: Path) -> None:
    assert equal(toy, load_teacher(str(write(tmp_path, plain(weights), TOY))))


def test_checkpoint_in_parts_loads_and_is_checked(toy: Sam3, weights: Weights, tmp_path: Path) -> None:
    "A hub's large checkpoint is several files and an index."
    folder, half = write(tmp_path, {}, TOY), len(weights) // 2
    (folder / "model.safetensors").unlink()
    parts = [dict(list(weights.items())[:half]), dict(list(weights.items())[half:])]
    files = {f"model-0000{k}-of-00002.safetensors": part for k, part in enumerate(parts, 1)}
    for name, part in files.items(): save_file(part, folder / name, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {n: name for name, part in files.items() for n in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert equal(toy, load_teacher(str(folder)))
    name, part = list(files.items())[-1]
    save_file(part | of(weights, GROUPS[1]), folder / name, {"format": "pt"})
    with pytest.raises(ValueError, match=f"{re.escape(GROUPS[1])} there twice"): load_teacher(str(folder))


def test_names_that_older_versions_saved_are_no_fault(toy: Sam3, weights: Weights, tmp_path: Path) -> None:
    more = {"detector_model.text_encoder.text_model.embeddings.position_ids": torch.arange(32)[None]}
    assert equal(toy, load_teacher(str(write(tmp_path, {**plain(weights), **more}, TOY))))


@pytest.mark.parametrize("spoil", SAID)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("layout", [dict, plain])
def test_spoilt_teacher_is_refused(weights: Weights, tmp_path: Path, layout: Callable, group: str, spoil: Callable) -> None:
    bad = write(tmp_path, spoil(layout(weights), group), TOY)
    with pytest.raises(ValueError, match=re.escape(group)) as caught: load_teacher(str(bad))
    assert SAID[spoil] in str(caught.value)


@pytest.mark.parametrize("spoil", SAID)
@pytest.mark.parametrize("group", ["tracker_model.memory_attention", "perceiver.layers", "detector_model.vision_encoder"])
def test_spoilt_student_is_refused(saved: Path, tmp_path: Path, group: str, spoil: Callable) -> None:
    weights = load_file(saved / "model.safetensors")
    assert of(weights, group), f"no {group} among {sorted({'.'.join(n.split('.')[:2]) for n in weights})}"
    with pytest.raises(ValueError, match=re.escape(group)) as caught:
        EfficientSam3.from_pretrained(write(tmp_path, spoil(weights, group), saved))
    assert SAID[spoil] in str(caught.value)


def test_student_with_a_doubled_prefix_beside_is_refused(saved: Path, tmp_path: Path) -> None:
    "The library ignores every unknown name that begins with `tracker_model`."
    weights = load_file(saved / "model.safetensors")
    again = {f"tracker_model.{n}": w for n, w in of(weights, GROUPS[0]).items()}
    with pytest.raises(ValueError, match="tracker_model.tracker_model unknown"):
        EfficientSam3.from_pretrained(write(tmp_path, {**weights, **again}, saved))


def test_saved_student_loads(saved: Path) -> None:
    assert EfficientSam3.from_pretrained(saved).config.memory == "perceiver"
