"""An exported student: what it answers without PyTorch is what it answers with it, and what is wrong is said."""
import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from esam3.data.toyworld import draw_clip, sample_scene  # noqa: E402
from esam3.evaluation.costs import load_model  # noqa: E402
from esam3.models.export import export  # noqa: E402
from esam3.models.predictor import ImagePredictor, VideoPredictor  # noqa: E402
from esam3.models.quantise import quantise  # noqa: E402
from esam3 import runtime  # noqa: E402
from esam3.runtime import Exported  # noqa: E402

WORDS = ["red circle", "square"]
REFUSED = ("torch", "torchvision", "transformers", "timm", "scipy", "fastcore")
ALONE = f"""
import importlib.abc, sys
import numpy as np

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split('.')[0] in {REFUSED}: raise ImportError(name + ' is refused')

sys.meta_path.insert(0, Refuse())
from esam3.runtime import VideoPredictor
given = np.load(sys.argv[2])
video = VideoPredictor(sys.argv[1]).start(given['clip'])
video.add(box=given['box']); video.add(mask=given['mask']); video.add(points=given['point'])
video.add_concept('square'); video.add_concept(box=given['box'], frame=0)
found = [(n, o.id, o.mask, o.score) for n, objects in video.propagate() for o in objects]
np.savez(sys.argv[3], keys=[f[:2] for f in found], masks=[f[2] for f in found],
         scores=[f[3] for f in found])
"""


@pytest.fixture(scope="module")
def net(): return load_model("toy-student")


@pytest.fixture(scope="module")
def folder(net, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("export") / "student"
    logging.disable(logging.DEBUG)  # pytest would keep every line of the tracing
    export(net, out, WORDS, objects=8, at_once=2)
    logging.disable(logging.NOTSET)
    return out


@pytest.fixture(scope="module")
def clip() -> tuple[np.ndarray, np.ndarray]:
    "Eight frames, and the masks of their instances."
    return draw_clip(sample_scene(np.random.default_rng(5), 8, twins=True), 8, np.random.default_rng(5))


def box_of(mask: np.ndarray) -> list[int]:
    ys, xs = np.nonzero(mask)
    return [int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1]


def test_a_video_without_torch_is_that_with_torch(net, folder, clip, tmp_path):
    "Identities in every frame, and all masks; in a process that cannot import PyTorch."
    images, truth = clip
    box, mask, point = box_of(truth[0, 0]), truth[1, 0], np.argwhere(truth[0, 0])[40:41, ::-1]
    np.savez(tmp_path / "given.npz", clip=images, box=box, mask=mask, point=point)
    subprocess.run([sys.executable, "-c", ALONE, folder, tmp_path / "given.npz", tmp_path / "out.npz"], check=True,
                   cwd=Path(__file__).resolve().parent.parent)
    found = np.load(tmp_path / "out.npz")
    ours = {(n, k): m for (n, k), m in zip(found["keys"].tolist(), found["masks"])}
    video = VideoPredictor(net).start(images)
    video.add(box=box), video.add(mask=mask), video.add(points=point)
    video.add_concept("square"), video.add_concept(box=box, frame=0)
    objects = {(n, o.id): o for n, objects in video.propagate() for o in objects}
    theirs = {k: o.mask for k, o in objects.items()}
    assert ours.keys() == theirs.keys() and len({k for _, k in ours}) > 4
    logit = lambda p: np.log(np.clip(p, 1e-6, None)) - np.log(np.clip(1 - np.asarray(p), 1e-6, None))
    assert np.abs(logit(found["scores"]) - logit([o.score for o in objects.values()])).max() <= 1e-3
    a, b = (np.array([m[k] for k in theirs]) for m in (ours, theirs))
    assert (a & b).sum() / (a | b).sum() >= 0.999
    assert all((ours[k] & m).sum() / max((ours[k] | m).sum(), 1) >= 0.99 for k, m in theirs.items() if m.any())


def test_the_refusal_works():
    "The process above would notice an import."
    code = ALONE.split("from esam3.runtime")[0] + "import torch"
    assert "torch is refused" in subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr


@pytest.mark.parametrize("kind", ["point", "box", "mask", "both"])
def test_logits_are_the_students(net, folder, clip, kind):
    image, mask = clip[0][0], clip[1][0, 0]
    ys, xs = np.nonzero(mask)
    given = {"point": {"points": [[xs[9], ys[9]]]}, "box": {"box": box_of(mask)}, "mask": {"mask": mask},
             "both": {"box": box_of(mask), "points": [[xs[0], ys[0]]], "labels": [0]}}[kind]
    (m, s, low), (m0, s0, low0) = (p.set_image(image).predict(**given)
                                   for p in (runtime.ImagePredictor(folder), ImagePredictor(net)))
    assert np.abs(low - low0).max() <= 1e-3 and np.abs(s - s0).max() <= 1e-3 and (m != m0).sum() <= 1


def test_graphs_are_plain(folder):
    "No operator of our own, no complex number, one opset; shapes are inferred; shared weights are there once."
    said = json.loads((folder / "model.json").read_text())
    for name in said["graphs"]:
        onnx.checker.check_model(folder / f"{name}.onnx", full_check=True)
        proto = onnx.load(folder / f"{name}.onnx", load_external_data=False)
        assert {n.domain for n in proto.graph.node} <= {"", "ai.onnx"}
        assert {o.version for o in proto.opset_import if not o.domain} == {said["opset"]}
        complex_ = {onnx.TensorProto.COMPLEX64, onnx.TensorProto.COMPLEX128}
        assert not complex_ & {v.type.tensor_type.elem_type for v in proto.graph.value_info}
    read = sum(int(e.value) for name in said["graphs"]
               for t in onnx.load(folder / f"{name}.onnx", load_external_data=False).graph.initializer
               for e in t.external_data if e.key == "length")
    assert (folder / "weights.bin").stat().st_size < 0.95 * read
    assert "SAM License" in said["licence"]


def copied(folder: Path, place: Path) -> Path:
    return Path(shutil.copytree(folder, place / "copy"))


def test_a_folder_that_is_broken_is_refused(folder, tmp_path):
    copy = copied(folder, tmp_path)
    file = copy / "detect.onnx"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="detect.onnx has 1000 of"): Exported(copy)
    said = json.loads((copy / "model.json").read_text())
    (copy / "model.json").write_text(json.dumps(said | {"files": {}}))
    with pytest.raises(ValueError, match="detect.onnx cannot be opened"): Exported(copy).session("detect")
    (copy / "model.json").write_text(json.dumps(said | {"format": 99}))
    with pytest.raises(ValueError, match="is of format 99"): Exported(copy)
    with pytest.raises(ValueError, match="holds no exported student"): Exported(tmp_path)


def test_prompts_that_it_cannot_answer_are_refused(folder, clip):
    images, truth = clip
    image = runtime.ImagePredictor(folder)
    with pytest.raises(ValueError, match="call set_image first"): image.predict(box=[1, 2, 3, 4])
    image.set_image(images[0])
    with pytest.raises(ValueError, match="9 objects at once, exported for 8"): image.predict(box=[[1, 2, 9, 9]] * 9)
    with pytest.raises(ValueError, match="'zebra' is not in the concept bank; it holds: red circle, square"):
        image.predict_text("zebra")
    video = runtime.VideoPredictor(folder).start([images[0], images[1][:50]])
    with pytest.raises(ValueError, match="is not in the concept bank"): video.add_concept("zebra")
    for _ in range(8): video.add(box=[1, 2, 30, 40])
    with pytest.raises(ValueError, match="9 objects at once, exported for 8"): video.add(box=[1, 2, 30, 40])
    for _ in range(2): video.add_concept("square")
    with pytest.raises(ValueError, match="3 concepts at once, exported for 2"): video.add_concept("red circle")
    with pytest.raises(ValueError, match="frame 1 is of 112 × 50 px, those before of 112 × 128"): [*video.propagate()]


def test_fewer_bits_are_fewer_bytes(folder, clip, tmp_path):
    "Weights in 8 bits: a third of the bytes, and a box still gives its mask."
    quantise(folder, tmp_path / "w8", dict.fromkeys(json.loads((folder / "model.json").read_text())["graphs"], "w8"))
    assert (tmp_path / "w8" / "weights.bin").stat().st_size < 0.33 * (folder / "weights.bin").stat().st_size
    box = box_of(clip[1][0, 0])
    a, b = (runtime.ImagePredictor(f).set_image(clip[0][0]).predict(box=box)[0][0] for f in (folder, tmp_path / "w8"))
    assert (a & b).sum() / (a | b).sum() > 0.9
    with pytest.raises(ValueError, match="int8 needs ranges of detect"):
        quantise(folder, tmp_path / "x", {"detect": "int8"})


def test_a_teacher_is_not_exported(tmp_path):
    with pytest.raises(ValueError, match="a teacher is not exported"): export(load_model("toy"), tmp_path / "t")
