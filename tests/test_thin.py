"thin-sam3 has SAM3's geometry, and coordinates keep float32 whatever autocast does."
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor
from transformers import Sam3VideoConfig

from esam3.models.student import build_student
from esam3.models.teacher import Bank, Prompts, Sam3, load_teacher
from esam3.models.tracker import track

ONE = torch.zeros(1, dtype=torch.long)
BOX = torch.tensor([[[0.4, 0.5, 0.3, 0.3]]])
POINT = Prompts(ONE, torch.tensor([[[500.0, 400.0]]]), torch.ones(1, 1, dtype=torch.int32))

VIT, TRACKER = "detector_config.vision_config.backbone_config", "tracker_config"
SIZES = (f"{VIT}.image_size", f"{VIT}.patch_size", f"{VIT}.window_size", "detector_config.vision_config.backbone_feature_sizes",
         "detector_config.detr_decoder_config.num_queries", "detector_config.mask_decoder_config.num_upsampling_stages",
         f"{TRACKER}.image_size", f"{TRACKER}.num_maskmem", f"{TRACKER}.memory_attention_num_layers",
         f"{TRACKER}.memory_attention_rope_feat_sizes", f"{TRACKER}.memory_encoder_output_channels",
         f"{TRACKER}.max_object_pointers_in_encoder", f"{TRACKER}.mask_decoder_config.num_multimask_outputs", "low_res_mask_size")


def half() -> AbstractContextManager: return torch.autocast("cpu", torch.bfloat16)


@pytest.fixture(scope="module")
def thin() -> Sam3: return load_teacher("thin-sam3")


@pytest.fixture(scope="module")
def toy() -> Sam3: return load_teacher()


@pytest.fixture(scope="module")
def small(toy: Sam3) -> Tensor:
    "Two images for the toy teacher."
    return torch.randn(2, 3, toy.image_size, toy.image_size, generator=torch.Generator().manual_seed(0))


def test_geometry_is_sam3s(thin: Sam3) -> None:
    real = Sam3VideoConfig()
    for path in SIZES: assert value(thin.config, path) == value(real, path), path
    windows = {layer.window_size for layer in thin.detector_model.vision_encoder.backbone.layers}
    assert windows == {0, 24} and thin.hidden != thin.tracker_model.mem_dim == 64
    assert sum(p.numel() for p in thin.parameters()) < 15e6 and not any(p.requires_grad for p in thin.parameters())


def value(config: object, path: str) -> object:
    for name in path.split("."): config = getattr(config, name)
    return config


def test_modules_are_sam3s(thin: Sam3) -> None:
    with torch.device("meta"): real = Sam3(Sam3VideoConfig())
    assert {type(m) for m in thin.modules()} == {type(m) for m in real.modules()}


def test_same_weights_every_time(thin: Sam3) -> None:
    torch.manual_seed(1)
    state, again = torch.get_rng_state(), load_teacher("thin-sam3").state_dict()
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(w, again[n]) for n, w in thin.state_dict().items())


@pytest.mark.parametrize("who", ["teacher", "student"])
@pytest.mark.parametrize("precision", [nullcontext, half])
def test_five_calls(thin: Sam3, who: str, precision: Callable) -> None:
    torch.manual_seed(0)
    model = thin if who == "teacher" else build_student("es-tv-s", thin)
    assert (model.image_size, model.grid) == {"teacher": (1008, 72), "student": (1024, 64)}[who]
    with torch.no_grad(), precision():
        seen = model.encode(torch.randn(1, 3, model.image_size, model.image_size))
        found = model.detect(seen, model.concepts(["red star"], ONE, BOX, ONE[None] + 1))
        out = track(model, seen, torch.zeros(1, 2, dtype=torch.long), POINT)
    g = model.grid
    assert [m.shape[-1] for m in seen.detector] == [m.shape[-1] for m in seen.tracker] == [4 * g, 2 * g, g]
    assert found.boxes.shape == (1, 200, 4) and found.boxes.dtype == torch.float32
    assert found.masks.shape == (1, 200, 4 * g, 4 * g) and out.masks.shape == (1, 2, 4 * g, 4 * g)
    for t in (*seen.detector, *seen.tracker, found.boxes, found.logits, found.masks, out.masks, out.iou, out.pointers):
        assert t.isfinite().all()
    assert 0 < (out.masks > 0).float().mean() < 1  # a mask, and not the whole image


def places(model: Sam3, pixels: Tensor) -> dict[str, Tensor]:
    "Everything that says where, of two images with prompts of each kind."
    at, image_index, n, side = torch.Generator().manual_seed(1), torch.tensor([0, 1]), 2, model.image_size
    labels = torch.tensor([[1, 0, -10], [2, 3, -10]], dtype=torch.int32)
    prompts = Prompts(image_index, torch.rand(n, 3, 2, generator=at) * side, labels, torch.rand(n, 1, side, side, generator=at))
    boxes = torch.rand(n, 2, 4, generator=at) * 0.3 + 0.3
    with torch.no_grad():
        seen = model.encode(pixels)
        concepts = model.concepts(["red star", None], image_index, boxes, torch.tensor([[1, 0], [1, -10]]))
        found = model.detect(seen, concepts, all_layers=True)
        masks = model.decode(seen, prompts)
        best, _, pointer = masks.best()
        memory = model.remember(seen, image_index, best, masks.object_logits, pointer)
        sparse, dense = model._embed_prompts(prompts)
        _, when = model._pointer_tokens(Bank(pointers=[(1, pointer), (5, pointer)]))
        decoder = model.detector_model.detr_decoder
        anchors = decoder.reference_points.weight.sigmoid()[None]
        bias = decoder._get_rpb_matrix(anchors, (torch.tensor(model.grid), torch.tensor(model.grid)))
        query = decoder.ref_point_head(decoder.position_encoding.encode_boxes(anchors))
        return {"sparse": sparse, "dense": dense, "map": model._position(seen.tracker[2]), "memory": memory.pos,
                "pointers": when, "bias": bias, "query": query, "boxes": found.boxes}


def test_places_are_float32_under_autocast(toy: Sam3, small: Tensor) -> None:
    want = places(toy, small)
    with half(): got = places(toy, small)
    assert [k for k, v in got.items() if v.dtype != torch.float32] == []
    gaps = {k: float((got[k] - want[k]).abs().max()) for k in want}
    assert gaps.pop("boxes") < 1e-2 and max(gaps.values()) <= 1e-6, gaps


def test_exemplars_are_float32_under_autocast(toy: Sam3, small: Tensor) -> None:
    "Of the same maps, so that nothing but the boxes could be rounded."
    with torch.no_grad():
        seen, concepts = toy.encode(small[:1]), toy.concepts(["red star"], ONE, BOX, ONE[None] + 1)
        want = toy._prompt_tokens(seen, concepts)[0][:, -2:]
        with half(): got = toy._prompt_tokens(seen, concepts)[0][:, -2:]
    assert got.dtype == torch.float32 and (got - want).abs().max() <= 1e-6


def test_image_wide_places_reach_the_decoder_exact(toy: Sam3, small: Tensor) -> None:
    found = {}
    keep = lambda _, args, given: found.update(given)
    hook = toy.tracker_model.mask_decoder.register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad(), half(): toy.decode(toy.encode(small[:1]), Prompts(ONE, POINT.points / 10, POINT.labels))
    hook.remove()
    assert torch.equal(found["image_positional_embeddings"], toy.tracker_model.get_image_wide_positional_embeddings())


def test_mask_is_shown_to_memory_exact(toy: Sam3, small: Tensor) -> None:
    shown = []
    hook = toy.tracker_model.memory_encoder.register_forward_pre_hook(lambda _, args: shown.append(args[1]))
    logits = torch.randn(1, 4 * toy.grid, 4 * toy.grid, generator=torch.Generator().manual_seed(2))
    for precision in (nullcontext(), half()):
        with torch.no_grad(), precision:
            toy.remember(toy.encode(small[:1]), ONE, logits, torch.ones(1), torch.zeros(1, toy.hidden))
    hook.remove()
    assert shown[1].dtype == torch.float32 and torch.equal(*shown)


def test_exemplar_moves_the_answer_under_autocast(toy: Sam3, small: Tensor) -> None:
    "RoIAlign has no bf16 on a CPU, so this raised."
    with torch.no_grad(), half():
        seen = toy.encode(small[:1])
        concepts, shown = (toy.detect(seen, toy.concepts(["red star"], ONE, *more)) for more in ((), (BOX, ONE[None] + 1)))
    assert not torch.equal(concepts.logits, shown.logits) and concepts.boxes.dtype == shown.boxes.dtype == torch.float32
