"What must hold of prompts whatever the masks, the images and the seed."
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Generator, Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from esam3.core import Spaces
from esam3.data.batches import collate_images
from esam3.data.samples import ImageSample, components
from esam3.models.prompts import (
    CORNERS, NEGATIVE, PADDING, POSITIVE, append, chances, corrective_points, deepest, draw_cell,
    initial_prompts, mask_errors, refine, to_space)
from esam3.models.teacher import Prompts

SIDES = ((144, 128), (1008, 1024))  # teacher's and student's squares: the toy's and the real ones


def blobs(g: Generator, n: int, size: int) -> Tensor:
    "[n, size, size] smooth random logits, some all ground, some all object."
    return F.interpolate(torch.randn(1, n, 5, 5, generator=g), (size, size), mode="bicubic")[0] + torch.linspace(-2.5,
        2.5, n).view(n, 1, 1)


def scene(seed: int) -> tuple[Generator, Spaces, Prompts, Tensor, Tensor]:
    "Images of any shape, a box for each of 12 objects in them, and what teacher and student say of these."
    g = Generator().manual_seed(seed)
    sizes = torch.randint(1, (40, 400, 3000)[seed % 3], (5, 2), generator=g)
    spaces, image_index = Spaces(sizes, *SIDES[seed % 2]), torch.randint(0, 5, (12,), generator=g)
    corners = torch.rand(12, 2, 2, generator=g) * spaces.extent("student")[image_index][:, None]
    prompts = Prompts(image_index, corners.sort(1).values, torch.tensor([CORNERS] * 12, dtype=torch.int32),
                      multimask=False)
    return g, spaces, prompts, *blobs(g, 24, (32, 64)[seed % 2])[torch.randperm(24, generator=g)].chunk(2)


def drawn(seed: int, n: int) -> Tensor:
    "[n] one random number an instance, of one image."
    return chances([seed], [n], 1)[:, 0]


def cell_of(points: Tensor, side: int, size: int) -> tuple[Tensor, Tensor]:
    "Row and column of the cells that hold points [N, 2]."
    x, y = (points * size / side).long().T
    return y, x


@pytest.mark.parametrize("how", ["uniform", "deepest"])
@pytest.mark.parametrize("seed", range(60))
def test_corrective_points(seed, how):
    g, spaces, prompts, teacher, student = scene(seed)
    size, side, rows = teacher.shape[-1], spaces.student, torch.arange(12)
    least = (0, 10, 400)[seed // 3 % 3]
    answered = refine(prompts, teacher, student, spaces, how, least, chance=drawn(seed, 12))
    points, labels = answered.points[:, -1], answered.labels[:, -1]
    valid = spaces.valid("student", size, prompts.image_index)
    missed, surplus = (teacher > 0) & (student <= 0) & valid, (teacher <= 0) & (student > 0) & valid
    at = rows, *cell_of(points, side, size)
    assert missed[at][labels == POSITIVE].all(), "positive points fall in false negatives"
    assert surplus[at][labels == NEGATIVE].all(), "negative points fall in false positives"
    enough = (missed | surplus).sum((1, 2)) >= max(1, least * size**2 / 256**2)
    assert torch.equal(labels != PADDING, enough) and (points[~enough] == 0).all(), "too little disagreement, no point"
    extent = spaces.extent("student")[prompts.image_index]
    assert ((points > 0) & (points < extent))[enough].all(), "in the image, not in the padding"
    for space in ("source", "teacher"):
        there = to_space(answered, spaces, "student", space).points[:, -1]
        assert ((there > 0) & (there < spaces.extent(space)[prompts.image_index]))[enough].all()
    again = refine(prompts, teacher, student, spaces, how, least, chance=drawn(seed, 12))
    assert torch.equal(again.points, answered.points) and torch.equal(again.labels,
        answered.labels), "same seed, same points"
    assert torch.equal(answered.points[:, :-1], prompts.points) and torch.equal(answered.labels[:, :-1], prompts.labels)


def test_chance_is_an_images_own():
    "Whoever shares its batch, and however many instances are left of it; even, and never 1."
    seeds, counts = [5, 9, 5, 2], [3, 0, 4, 2]
    whole = chances(seeds, counts, 3)
    assert whole.shape == (9, 3) and whole.dtype == torch.float32 and whole.device.type == "cpu"
    parts = [chances(seeds[k:k + 1], counts[k:k + 1], 3) for k in range(4)]
    assert torch.equal(torch.cat(parts), whole) and torch.equal(whole[:3], whole[3:6]) and not torch.equal(whole[:2],
        whole[7:])
    many = chances(range(200), [50] * 200, 2)
    assert 0 <= many.min() and many.max() < 1 and (many.mean(0) - 0.5).abs().max() < 0.01
    with pytest.raises(ValueError): chances([1, 2], [1], 1)


@pytest.mark.parametrize("count", [1, 3, 257, 82943, 82944])
def test_the_largest_chance_gives_the_last_cell(count):
    "The float32 next below 1, times any count, stays below it; each cell has its share of chances."
    region = torch.zeros(1, 288, 288, dtype=torch.bool)
    region.view(-1)[-count:] = True
    at = lambda u: draw_cell(region, torch.tensor([u])).item() - 288**2 + count
    assert at(1 - 2**-24) == count - 1 and at(0.0) == 0 and at(0.5) == count // 2


def test_another_seed_other_points():
    _, frames, prompts, teacher, student = scene(7)
    corrected = lambda seed: refine(prompts, teacher, student, frames, chance=drawn(seed, 12)).points[:, -1]
    assert not torch.equal(corrected(0), corrected(1))


@pytest.mark.parametrize("size, least", [(256, 10), (128, 3), (512, 40), (32, 1)])
def test_ten_pixels_of_a_256_mask_make_a_point(size, least):
    "The bound is an area: on other grids it is as large a part of the image."
    few = torch.zeros(2, size, size, dtype=torch.bool)
    few[0].view(-1)[:least - 1] = few[1].view(-1)[:least] = True
    _, labels = corrective_points(few, few & False, 1024, chance=torch.rand(2))
    assert labels.tolist() == [PADDING, POSITIVE]


def test_uniform_points_are_even_over_both_errors():
    missed, surplus = torch.zeros(2, 1, 8, 8, dtype=torch.bool)
    missed[0, 1:3, 2:4], surplus[0, 6, :] = True, True       # 4 and 8 cells
    points, labels = corrective_points(missed.expand(6000, -1, -1), surplus.expand(6000, -1, -1), 80, min_pixels=0,
                                       chance=drawn(0, 6000))
    y, x = cell_of(points, 80, 8)
    share = (8 * y + x).bincount(minlength=64) / 6000
    assert ((share > 0).view(8, 8) == (missed | surplus)[0]).all() and (share[share > 0] - 1 / 12).abs().max() < 0.015
    assert abs((labels == POSITIVE).float().mean() - 4 / 12) < 0.025


@pytest.mark.parametrize("seed", range(10))
def test_deepest_is_the_distance_transform(seed):
    "Against scipy's chessboard distance, the border counting as outside."
    regions = blobs(Generator().manual_seed(seed), 12, (17, 32)[seed % 2]).view(6, 2, *[(17, 32)[seed % 2]] * 2) > 0
    depth = np.array([[ndimage.distance_transform_cdt(np.pad(
        r.numpy(), 1), "chessboard")[1:-1, 1:-1] for r in pair] for pair in regions])
    most = depth.max((1, 2, 3), keepdims=True)
    assert (deepest(regions).numpy() == ((depth == most) & (most > 0))).all()


def test_an_empty_region_gives_the_first_cell():
    assert draw_cell(torch.zeros(3, 5, 5, dtype=torch.bool), torch.rand(3)).tolist() == [0, 0,
        0] and draw_cell(torch.zeros(0, 5, 5, dtype=torch.bool), torch.rand(0)).shape == (0,)


@pytest.mark.parametrize("rounds", [0, 1, 2, 5])
def test_any_number_of_refinements(rounds):
    "M = 0 leaves the prompt as it is; each round adds one point, and from the second on one mask is asked for."
    g, frames, prompts, teacher, student = scene(4)
    first = answered = replace(prompts, multimask=True)
    for _ in range(rounds):
        answered = refine(answered, teacher, student, frames, chance=torch.rand(12, generator=g))
        student = torch.where(torch.rand(student.shape, generator=g) < 0.5, teacher, student)
    assert answered.points.shape == (12, 2 + rounds, 2) and answered.labels.shape == (12,
        2 + rounds) and answered.multimask == (rounds == 0)
    assert torch.equal(answered.points[:, :2], first.points)
    assert first.points.shape == (12, 2, 2), "the first prompts are not changed in place"


class Calls(TorchDispatchMode):
    "Counts the operations that reach the device."
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("how", ["uniform", "deepest"])
def test_no_loop_over_masks(how):
    "As many operations for 200 masks as for two, in the first prompts and in the corrective points."
    def operations(n: int) -> int:
        a, b = blobs(Generator().manual_seed(0), 2 * n, 32).chunk(2)
        boxes, image_index = torch.rand(n, 4), torch.zeros(n, dtype=torch.long)
        prompts = Prompts(image_index, boxes.view(n, 2, 2), torch.tensor([CORNERS] * n, dtype=torch.int32))
        valid = Spaces(torch.tensor([[96, 128]]), 144, 128).valid("student", 32, image_index)
        with Calls() as calls:
            initial_prompts(boxes, boxes[:, :2], image_index, torch.rand(n), p_box=1)
            append(prompts, *corrective_points(*mask_errors(a, b, valid), 128, how, chance=torch.rand(n)))
        return calls.count
    assert operations(2) == operations(200) < 300


def mask_scene(seed: int) -> ImageSample:
    "An image with 40 instances in it, from a region without instances by its connected components."
    rng = np.random.default_rng(seed)
    region = np.zeros((100, 160), bool)
    for y in range(5):
        for x in range(8):
            region[20 * y + 2:20 * y + rng.integers(4, 19), 20 * x + 2:20 * x + rng.integers(4, 19)] = True
    masks = components(region)
    return ImageSample(f"{seed}", np.zeros((100, 160, 3), np.uint8), masks)


def test_at_most_16_instances_of_an_image():
    samples = [mask_scene(0), mask_scene(1)]
    assert [len(s.masks) for s in samples] == [40, 40]
    pick = lambda seed: collate_images(samples, 144, 128, rngs=[np.random.default_rng((seed, k))
                                                                for k in range(len(samples))])
    assert pick(0).image_index.bincount().tolist() == [16, 16]
    assert torch.equal(pick(0).boxes, pick(0).boxes) and not torch.equal(pick(0).boxes,
        pick(1).boxes), "drawn by the seed"
    assert len(collate_images(samples, 144, 128, max_instances=0).image_index) == 80


@pytest.mark.parametrize("seed", range(10))
def test_first_prompts_lie_on_their_instances(seed):
    "The centre point is inside its mask, and as deep as any; boxes are tight; in every frame both stay on the image."
    sample = mask_scene(seed)
    batch = collate_images([sample], *SIDES[seed % 2], rngs=[np.random.default_rng(seed)])
    masks, (x, y) = batch.masks[0].numpy(), batch.points.long().numpy().T
    depth = np.array([ndimage.distance_transform_edt(np.pad(m, 1))[1:-1, 1:-1] for m in masks])
    assert (depth[np.arange(16), y, x] == depth.max((1, 2))).all() and masks[np.arange(16), y, x].all()
    for space in ("source", "teacher", "student"):
        boxes, points = batch.spaces.boxes(batch.boxes, batch.image_index, "source",
                                           space), batch.spaces.points(batch.points, batch.image_index, "source", space)
        answered = initial_prompts(boxes, points, batch.image_index, drawn(seed, 16))
        assert sorted(torch.cat([rows for rows, _ in answered]).tolist()) == list(range(16)), "one prompt an instance"
        for rows, p in answered:
            assert ((p.points >= 0) & (p.points <= batch.spaces.extent(space)[0]
                                       + 1e-3)).all() and p.multimask == (p.labels.shape[1] == 1)
            tight = boxes[rows].view(-1, 2, 2) if p.labels.shape[1] == 2 else points[rows][:, None]
            assert torch.equal(p.points, tight) and (p.labels == torch.tensor(CORNERS if p.labels.shape[1] == 2
                else [POSITIVE])).all()
        again = initial_prompts(boxes, points, batch.image_index, drawn(seed, 16))
        assert all(torch.equal(a[0], b[0]) for a, b in zip(answered, again)), "same seed, same coins"


def test_every_instance_has_its_own_coin():
    "Over 400 seeds each of four instances is asked by box half of the time, and any two of them independently."
    boxes, image_index = torch.rand(4, 4), torch.zeros(4, dtype=torch.long)
    table = torch.zeros(400, 4)
    for seed in range(400):
        for rows, p in initial_prompts(boxes, boxes[:, :2], image_index, drawn(seed, 4)):
            table[seed, rows] = float(p.labels.shape[1] == 2)
    assert (table.mean(0) - 0.5).abs().max() < 0.1
    assert (table.T.corrcoef() - torch.eye(4)).abs().max() < 0.2
