"""`esam3`: as a person types it, in a process of its own; statuses, what is written, what is said, and Ctrl-C."""
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from esam3.data.batches import open_dataset
from esam3.data.samples import Video, boxes_of
from esam3.data.toyfiles import write_mp4
from esam3.use.command_line import main

CODE = "import sys; from esam3.use.command_line import main; sys.exit(main())"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A folder with an image, a folder of two images and a broken one, and a video of 8 frames."
    folder = tmp_path_factory.mktemp("files")
    images, clip = open_dataset("tiny", "held_out", "images"), open_dataset("tiny", "held_out", "clips").read(0)
    Image.fromarray(images.read(4).image).save(folder / "a.png")
    (folder / "many").mkdir()
    for n in (4, 5): Image.fromarray(images.read(n).image).save(folder / "many" / f"{n}.png")
    (folder / "many" / "broken.jpg").write_bytes(b"no image")
    write_mp4(folder / "clip.mp4", clip.frames)
    (folder / "box").write_text(",".join(f"{x:.0f}" for x in boxes_of(np.asarray(clip.masks)[:1, 0])[0]))
    return folder


def typed(place: Path, *words: str, given: bytes | None = None) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", CODE, *words], cwd=place, input=given, capture_output=True)


def test_an_image_from_standard_input(place):
    "With the shipped student, which says what it is; COCO's results, an overlay of the same size, a label map."
    run = typed(place, "predict", "-", "--text", "a green star", "--write", "overlay,json,masks", "--out", "piped",
                given=(place / "a.png").read_bytes())
    assert run.returncode == 0 and b"an exercise, not a finding" in run.stderr, run.stderr
    rows = json.loads((place / "piped/predictions.json").read_text())
    assert len(rows) == 2 and {*rows[0]} >= {"image_id", "bbox", "segmentation", "score"}
    with Image.open(place / "piped/stdin.overlay.png") as shown, Image.open(place / "a.png") as image:
        assert shown.size == image.size
    with Image.open(place / "piped/masks/stdin.png") as labels: assert {*np.unique(labels)} == {0, 1, 2}


def test_a_folder_passes_over_what_is_broken(place, capsys):
    "It is said, and the exit status says so."
    assert main(["predict", str(place / "many"), "--text", "a star", "--out", str(place / "of_many")]) == 1
    said = capsys.readouterr()
    assert "broken.jpg" in said.err and "1 could not be read" in said.out
    assert {p.name for p in (place / "of_many").glob("*.png")} == {"4.overlay.png", "5.overlay.png"}


def test_a_video_by_a_box_and_a_phrase(place, capsys):
    "Masklets of all frames, with what was asked for; the overlay has as many frames."
    out = place / "followed"
    words = ["predict", str(place / "clip.mp4"), "--box", (place / "box").read_text(), "--out", str(out)]
    assert main([*words, "--text", "a circle", "--model", "toy", "--write", "overlay,json,masks"]) == 0
    found = json.loads((out / "predictions.json").read_text())
    assert found["videos"][0]["length"] == 8 == len(Video(out / "overlay.mp4")) == len([*(out / "masks").iterdir()])
    of_box = next(a for a in found["annotations"] if a["object_id"] == 1)
    assert sum(code is not None for code in of_box["segmentations"]) >= 4 and len(of_box["bboxes"]) == 8


@pytest.mark.parametrize("words, status, said", [
    (["predict", "nothing.jpg", "--text", "a"], 1, "no such file"),
    (["predict", "a.png"], 1, "--text, --exemplar, --box or --point"),
    (["predict", "a.png", "--text", "a zebra"], 1, "knows no word of it"),
    (["predict", "a.png", "--box", "1,2,3"], 2, "x0,y0,x1,y1"), (["pedict"], 2, "invalid choice"),
    (["predict", "a.png", "--box", "0,0,999,999"], 1, "outside the image"),
    (["predict", "a.png", "--text", "a", "--model", "toi"], 1, "did you mean 'toy'"),
    (["evaluate", "toy", "--recipe", "tini"], 1, "did you mean 'tiny'"), (["--help"], 0, "")])
def test_what_goes_wrong_is_one_line(words, status, said, place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    try: found = main(words)
    except SystemExit as e: found = e.code  # the parser's
    assert found == status and said in capsys.readouterr().err


def test_no_traceback_from_a_broken_pipe_in(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"no image")))
    assert main(["predict", "-", "--text", "a star"]) == 1
    said = capsys.readouterr().err
    assert "pipe a JPEG or PNG in" in said and "Traceback" not in said


def test_ctrl_c_leaves_whole_files(place):
    "Of a long video: the overlay of the frames that were done can be decoded, and the JSON is of as many."
    frames = open_dataset("tiny", "held_out", "clips").read(0).frames
    write_mp4(place / "long.mp4", np.concatenate([frames] * 60))
    words = ["predict", "long.mp4", "--model", "toy", "--box", (place / "box").read_text(), "--out", "stopped",
             "--write", "overlay,json,masks"]
    run = subprocess.Popen([sys.executable, "-c", CODE, *words], cwd=place, stderr=subprocess.PIPE)
    masks, end = place / "stopped/masks", time.monotonic() + 120
    while time.monotonic() < end and len([*masks.glob("*.png")] if masks.is_dir() else []) < 5: time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    assert run.wait(60) == 130 and b"stopped" in run.stderr.read()
    done = len(Video(place / "stopped/overlay.mp4"))
    assert 5 <= done < 480
    assert json.loads((place / "stopped/predictions.json").read_text())["videos"][0]["length"] in (done, done + 1)
    assert not [p for p in (place / "stopped").rglob(".*")], "nothing half-written is left"


def test_the_doctor_and_the_command(capsys):
    "It names what is there and what brings what is not; and the package installs `esam3`."
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "recipe toy" in said and "hf auth login" in said and "0 broken" in said
    assert 'esam3 = "esam3.use.command_line:main"' in Path(__file__, "../../pyproject.toml").resolve().read_text()


def test_evaluate_prints_the_table(tmp_path, capsys):
    words = ["evaluate", "toy-student", "--recipe", "tiny", "--protocols", "box", "--limit", "2"]
    assert main([*words, "--runs", str(tmp_path)]) == 0
    assert "| toy-student | box |" in capsys.readouterr().out and os.listdir(tmp_path)


def test_export_and_predict_without_pytorch(place, capsys):
    "The graphs give the masks of PyTorch; what is no exported folder is said."
    pytest.importorskip("onnxruntime")
    image, out = str(place / "a.png"), str(place / "exported")
    assert main(["export", "toy-student", out, "--concept", "a green star"]) == 0
    for runtime, model in (("torch", "toy-student"), ("onnx", out)):
        words = ["predict", image, "--model", model, "--runtime", runtime, "--out", str(place / runtime)]
        assert main([*words, "--text", "a green star"]) == 0
    found = [json.loads((place / r / "predictions.json").read_text()) for r in ("torch", "onnx")]
    assert len(found[0]) == 2 and [a["bbox"] for a in found[0]] == [a["bbox"] for a in found[1]]
    assert main(["predict", image, "--runtime", "onnx", "--text", "a green star"]) == 1
    assert "esam3 export toy-student FOLDER" in capsys.readouterr().err
