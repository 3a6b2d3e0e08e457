"""Peers: an adapter's answers are those of the peer's own processor and propagation on the same weights; what cannot be
a peer is refused."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import (
    EdgeTamConfig, EdgeTamModel, Sam2Config, Sam2ImageProcessor, Sam2Model, Sam2Processor, Sam2VideoProcessor,
    Sam2VideoVideoProcessor, Sam3ImageProcessor, SamImageProcessor, SamProcessor)

from esam3.data.batches import open_dataset
from esam3.data.samples import ImageSample
from esam3.evaluation.costs import measure
from esam3.evaluation.evaluate import evaluate
from esam3.evaluation.heldout import opening
from esam3.evaluation.peers import PeerFollower, load_peer
from esam3.evaluation.protocols import follow
from esam3.models.tracker import as_batch, look

SQUARE = {"height": 128, "width": 128}
VIDEO = ("random-sam2", "random-edgetam")


@pytest.fixture(scope="module")
def samples() -> list[ImageSample]:
    reader = open_dataset("tiny", "held_out", "images")
    return [reader.read(i) for i in range(4)]


@pytest.fixture(scope="module")
def clip():
    return open_dataset("tiny", "held_out", "clips").read(0)


def image_model(net: torch.nn.Module) -> torch.nn.Module:
    "The library's image model with the weights of one for video."
    make, config = (Sam2Model, Sam2Config) if net.config.model_type == "sam2_video" else (EdgeTamModel, EdgeTamConfig)
    parts = {k: getattr(net.config, k) for k in ("vision_config", "prompt_encoder_config", "mask_decoder_config")}
    image = make(config(**{k: v if k == "vision_config" else v.to_dict() for k, v in parts.items()})).eval()
    assert not image.load_state_dict(net.state_dict(), strict=False).missing_keys
    return image


def prompts_of(sample: ImageSample, start: str) -> dict:
    if start == "box": return {"input_boxes": [sample.boxes.tolist()]}
    return {"input_points": [[[xy] for xy in sample.points.tolist()]], "input_labels": [[[1]] * len(sample.points)]}


def near(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    "To 1e-4 of logits that are not all nothing."
    assert ours.shape == theirs.shape and theirs.abs().max() > 1e-3
    return bool((ours - theirs).abs().max() < 1e-4)


@pytest.mark.parametrize("start", ["box", "point"])
@pytest.mark.parametrize("name", ["random-sam", *VIDEO])
@torch.no_grad()
def test_images_as_the_peers_own_processor(name, start, samples):
    "Resizing, prompts and decoding; of the video models by the library's own image call."
    peer = load_peer(name)
    batch = as_batch(peer, samples)
    ours = peer.decode(look(peer, batch), opening(peer, batch, start))
    sam1 = SamImageProcessor(size={"longest_edge": 128}, pad_size=SQUARE)
    processor = SamProcessor(sam1) if name == "random-sam" else Sam2Processor(Sam2ImageProcessor(size=SQUARE))
    net = peer.net if name == "random-sam" else image_model(peer.net)
    for b, sample in enumerate(samples):
        given = processor(sample.image, **prompts_of(sample, start), return_tensors="pt")
        given = {k: v.float() if v.is_floating_point() else v for k, v in given.items() if "sizes" not in k}
        theirs, rows = net(**given, multimask_output=start == "point"), batch.image_index == b
        assert near(ours.masks[rows], theirs.pred_masks[0]) and near(ours.iou[rows], theirs.iou_scores[0])
        if name != "random-sam": assert near(ours.object_logits[rows], theirs.object_score_logits.view(-1))


def own_way(peer, clip, start: str) -> list[torch.Tensor]:
    "A clip by the peer's processor, session and propagation: logits [N, 1, 32, 32] of each frame."
    processor = Sam2VideoProcessor(Sam2ImageProcessor(size=SQUARE), Sam2VideoVideoProcessor(size=SQUARE))
    session = PeerFollower(peer, 1).session.__class__
    video = processor.video_processor(videos=[clip.frames], return_tensors="pt")
    h, w = clip.frames[0].shape[:2]
    session = session(video=video.pixel_values_videos[0], video_height=h, video_width=w, dtype=torch.float32)
    first = ImageSample(clip.name, clip.frames[0], clip.masks[:, 0])
    ids = [*range(len(first.masks))]
    masks = {"input_masks": [*torch.from_numpy(np.asarray(first.masks))]}
    given = masks if start == "mask" else prompts_of(first, start)
    processor.add_inputs_to_inference_session(session, 0, ids, **given)
    peer.net(session, frame_idx=0)
    return [out.pred_masks for out in peer.net.propagate_in_video_iterator(session)]


@pytest.mark.parametrize("start", ["box", "point", "mask"])
@pytest.mark.parametrize("name", VIDEO)
@torch.no_grad()
def test_clips_as_the_peers_own_propagation(name, start, clip):
    "From the first frame's prompts to the last frame, all objects of the clip."
    peer, kept = load_peer(name), clip.visible[:, 0]
    whole = replace(clip, masks=np.asarray(clip.masks)[kept], annotated=clip.annotated[kept],
                    ids=[i for i, k in zip(clip.ids, kept) if k], phrases=[])
    theirs = own_way(peer, whole, start)
    follower = PeerFollower(peer, len(whole.frames))
    for t, image in enumerate(whole.frames):
        first = as_batch(peer, [ImageSample(whole.name, image, whole.masks[:, 0])])
        ours = follower.step(look(peer, first), opening(peer, first, start) if not t else None)
        assert near(ours.masks, theirs[t]), t


@torch.no_grad()
def test_phrases_as_the_peers_own_processor(samples):
    peer = load_peer("random-lite-text")
    phrases, rows = ["a red disk", "a large blue ring"], torch.tensor([0, 2])
    batch = as_batch(peer, samples)
    ours = peer.detect(look(peer, batch), peer.concepts(phrases, rows))
    processor = Sam3ImageProcessor(size={"height": peer.image_size, "width": peer.image_size})
    for n, (phrase, b) in enumerate(zip(phrases, rows.tolist())):
        pixels = processor(samples[b].image, return_tensors="pt").pixel_values
        words = peer.tokenizer([phrase], padding="max_length", max_length=32, return_tensors="pt")
        theirs = peer.net(pixel_values=pixels, input_ids=words.input_ids, attention_mask=words.attention_mask)
        assert near(ours.masks[n], theirs.pred_masks[0]) and near(ours.logits[n], theirs.pred_logits[0])


def test_a_peer_goes_through_the_evaluation(tmp_path, capsys, monkeypatch):
    "All that it can answer, with costs; the rest is left out and said, or refused where it was named."
    monkeypatch.setattr("esam3.evaluation.evaluate.costs", measure)  # a process of its own takes ten seconds
    found = {name: evaluate(name, "tiny", runs=str(tmp_path), limit=1, repeats=1)[1]
             for name in ("random-sam", "random-edgetam", "random-lite-text")}
    kinds = {name: {r["kind"] for r in rows} for name, rows in found.items()}
    assert kinds == {"random-sam": {"images"}, "random-edgetam": {"images", "clips"},
                     "random-lite-text": {"concept_images"}}
    assert "random-sam answers images; clips, concept_clips, concept_images are left out" in capsys.readouterr().out
    assert all(r["scores"] and r["params"]["total"] and r["gflops"] for rows in found.values() for r in rows)
    assert {*found["random-edgetam"][0]["gflops"]} == {"box", "video frame"}
    for name, protocol in (("random-sam2", "phrase"), ("random-sam", "mask"), ("random-sam2", "copy")):
        with pytest.raises(ValueError, match="answers images"):
            evaluate(name, "tiny", protocol, runs=str(tmp_path), limit=1)


@torch.no_grad()
def test_objects_that_begin_later(clip):
    "Each group of objects has its own session, which knows the frames of the clip."
    late = replace(clip, masks=np.asarray(clip.masks) * (np.arange(8) > 2)[:, None, None])
    answers = [found["box"] for found in follow(load_peer("random-sam2"), late, ["box"])]
    assert all((a <= -1024).all() for a in answers[:3]) and (answers[3] > -1024).any()


@pytest.mark.parametrize("name, why", [("dhkim2810/MobileSAM", "TinyViT"), ("yunyangx/efficient-track-anything", None),
                                       ("nobody/EfficientTAM-s", "plain ViT")])
def test_relatives_are_refused_by_name(name, why):
    from esam3.evaluation.peers import refusal
    assert (why in refusal(name)) if why else refusal(name) == ""
