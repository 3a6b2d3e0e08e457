"Every loss against numbers worked out by hand or the slow way; padding and teacher stay out of all of them."
import itertools
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from esam3.models.teacher import Detections
from esam3.training.concepts import Targets, concept_losses, soft_focal
from esam3.training.losses import (
    MAP_LOSSES, attention_loss, contrastive_loss, dice_loss, distill_loss, feature_errors, feature_loss,
    focal_factor, focal_loss, image_errors, iou_head_loss, least_orders, map_terms, mask_iou, mask_loss,
    match_masks, pick_cells, relational_loss, score_loss, soft_target, task_terms)

sigmoid = lambda x: 1 / (1 + math.exp(-x))
softplus = lambda x: math.log1p(math.exp(-abs(x))) + max(x, 0)


def slow_mask_loss(logits: np.ndarray, target: np.ndarray, valid: np.ndarray) -> float:
    "Dice + 20 focal of one mask, cell by cell in plain Python."
    cells = [(sigmoid(x), t, softplus(x) - x * t) for x, t, v in zip(logits.ravel().tolist(), target.ravel().tolist(),
        valid.ravel()) if v]
    dice = sum(abs(p - t) for p, t, _ in cells) / (sum(p + t for p, t, _ in cells) + 1)
    focal = sum((0.25 * t + 0.75 * (1 - t)) * (p - t) ** 2 * ce for p, t, ce in cells) / len(cells)
    return dice + 20 * focal


@pytest.mark.parametrize("seed", range(5))
def test_mask_loss_cell_by_cell(seed):
    g = torch.Generator().manual_seed(seed)
    logits, target = torch.randn(3, 5, 7, generator=g) * 3, torch.rand(3, 5, 7, generator=g)
    valid = torch.rand(3, 5, 7, generator=g) > 0.3
    slow = [slow_mask_loss(*(x.numpy() for x in m)) for m in zip(logits, target, valid)]
    torch.testing.assert_close(mask_loss(logits, target, valid), torch.tensor(slow), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mask_loss(logits, target, valid),
                               dice_loss(logits, target, valid) + 20 * focal_loss(logits, target, valid))


def test_mask_terms_by_hand():
    "Two cells of probability ¾ and ¼, targets 1 and ½: distances ¼ and ¼ over 2½ + 1; focal terms by the definition."
    logits, target = torch.tensor([[math.log(3), -math.log(3)]]), torch.tensor([[1.0, 0.5]])
    assert math.isclose(dice_loss(logits, target), 0.5 / 3.5, rel_tol=1e-5)
    entropy = -0.5 * math.log(0.25) - 0.5 * math.log(0.75)
    by_hand = (0.25 * (1 / 16) * -math.log(0.75) + 0.5 * (1 / 16) * entropy) / 2
    assert math.isclose(focal_loss(logits, target), by_hand, rel_tol=1e-5)


@pytest.mark.parametrize("masks", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("padded", [False, True])
def test_matching_is_the_best_of_all_permutations(masks, padded):
    g = torch.Generator().manual_seed(masks)
    student, target = torch.randn(6, masks, 6, 5, generator=g) * 2, torch.rand(6, masks, 6, 5, generator=g)
    valid = torch.arange(5).expand(6, 6, 5) < torch.tensor([1, 2, 3, 4, 5, 5])[:, None, None] if padded else None
    found = match_masks(student, target, valid)
    orders = list(itertools.permutations(range(masks)))
    for n in range(6):
        v = np.ones((6, 5), bool) if valid is None else valid[n].numpy()
        cost = [[slow_mask_loss(student[n, s].numpy(), target[n, t].numpy(), v) for s in range(masks)]
                for t in range(masks)]
        least = min(orders, key=lambda order: sum(cost[t][s] for t, s in enumerate(order)))
        assert found[n].tolist() == list(least)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_least_orders_are_scipys(size):
    "Random costs have no ties; where costs are tied the totals are the same."
    g = torch.Generator().manual_seed(size)
    cost = torch.rand(500, size, size, generator=g)
    assert torch.equal(least_orders(cost), torch.tensor(np.array([linear_sum_assignment(c)[1] for c in cost.numpy()])))
    tied = cost.mul(3).round()
    totals = [sum(c[range(size), linear_sum_assignment(c)[1]]) for c in tied.numpy()]
    assert tied.gather(2, least_orders(tied)[..., None]).sum((1, 2)).tolist() == totals
    assert least_orders(cost[:0]).shape == (0, size)


def test_matching_looks_past_the_padding():
    "In the padding the wrong mask fits better; on the image the right one does."
    target = torch.tensor([[[1.0, 0, 1]], [[0.0, 1, 0]]])[None]
    student = 20 * torch.tensor([[[-1.0, 1, 1]], [[1.0, -1, -1]]])[None]
    valid = torch.tensor([[[True, True, False]]])
    assert match_masks(student, target, valid).tolist() == [[1, 0]]
    assert distill_loss(student, 40 * (target - 0.5), valid) < 1e-5


def test_each_pair_is_paid_for_once():
    "The set's loss is the mean over matched pairs, and at a temperature both sides are divided by it."
    teacher = torch.tensor([[[4.0, -4]], [[-4.0, 4]]])[None]
    student = torch.tensor([[[-1.0, 3]], [[2.0, -2]]])[None]
    for temperature in (1.0, 2.0):
        pairs = [(student[0, 1], teacher[0, 0]), (student[0, 0], teacher[0, 1])]
        by_hand = sum(slow_mask_loss((s / temperature).numpy(), (t / temperature).sigmoid().numpy(), np.ones((
            1, 2), bool)) for s, t in pairs) / 2
        assert math.isclose(distill_loss(student, teacher, temperature=temperature), by_hand, rel_tol=1e-5)
    hard = sum(slow_mask_loss(s.numpy(), (t > 0).float().numpy(), np.ones((1, 2), bool)) for s, t in pairs) / 2
    assert math.isclose(distill_loss(student, teacher, temperature=0), hard, rel_tol=1e-5)


def test_feature_errors_by_hand():
    "Two channels: variances 1 and 4 around their means, mean 2½; errors 1 and 0, mean ½."
    teacher = torch.tensor([[[[0.0, 2]], [[1.0, 5]]]])
    student = teacher + torch.tensor([1.0, 0]).view(1, 2, 1, 1)
    assert feature_errors([student, teacher], [teacher, teacher]).tolist() == pytest.approx([0.2, 0])
    assert feature_loss([student, teacher], [teacher, teacher]).item() == pytest.approx(0.1)
    assert feature_loss([student, teacher], [teacher, teacher], weights=[3, 1]).item() == pytest.approx(0.6)
    with pytest.raises(ValueError, match="map 1"): feature_errors([student, student[:, :1]], [teacher, teacher])


def test_an_images_error_is_its_own():
    "Images of different scales and paddings, alone or together; parts add up to the whole."
    g = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(3, 4, 6, 6, generator=g) * torch.tensor([1.0, 100, 0.01]).view(3, 1, 1, 1)
                        for _ in range(2))
    valid = torch.arange(6).expand(3, 6, 6) < torch.tensor([6, 3, 1]).view(3, 1, 1)
    together = image_errors([student, teacher], [teacher, teacher], [valid, valid])
    for b, cells in enumerate(valid):
        s, t = (m[b][:, cells].double() for m in (student, teacher))
        assert together[0, b].item() == pytest.approx((((s - t) ** 2).mean() / ((t - t.mean(
            1, keepdim=True)) ** 2).mean()).item(), rel=1e-4)
    assert together[1].tolist() == [0, 0, 0]
    loss = lambda rows, whole=None: feature_loss([student[rows], teacher[rows]], [teacher[rows], student[rows]],
                                                 [valid[rows], valid[rows]], (3, 1), whole)
    whole = loss(slice(None))
    assert sum(loss(slice(k, k + 1), 3) for k in range(3)).item() == pytest.approx(whole.item(), rel=1e-5)
    assert loss(slice(None), torch.tensor(6.0)).item() == pytest.approx(whole.item() / 2,
        rel=1e-5) and loss(slice(0, 0), 3) == 0 == loss(slice(0, 0))
    attention = lambda rows, whole=None: map_terms(["attention"], [student[rows]], [teacher[rows]], [valid[rows]],
                                                   whole)["attention"]
    assert sum(attention(slice(k, k + 1), 3) for k in range(3)).item() == pytest.approx(attention(slice(None)).item(),
        rel=1e-5)


def slow_relations(x: np.ndarray) -> tuple[np.ndarray, list[float]]:
    "Distances of all ordered pairs over their mean, and cosines of all ordered triples, of points [K, C]."
    k = len(x)
    far = np.array([np.linalg.norm(x[i] - x[j]) for i in range(k) for j in range(k) if i != j])
    cosines = [(x[i] - x[j]) @ (x[m] - x[j]) / np.linalg.norm(x[i] - x[j]) / np.linalg.norm(x[m] - x[j]) for j, i,
               m in itertools.permutations(range(k), 3)]
    return far / far.mean(), cosines


def test_relations_point_by_point():
    g = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 3, 2, 3, generator=g), torch.randn(2, 5, 2, 3, generator=g)
    valid = torch.tensor([[[True] * 3] * 2, [[True, True, False]] * 2])
    huber = lambda a, b: np.mean([d * d / 2 if d < 1 else d - 0.5 for d in np.abs(np.subtract(a, b))])
    for n, v in enumerate(valid):
        (ds, cs), (dt, ct) = (slow_relations(m[n][:, v].T.double().numpy()) for m in (student, teacher))
        got = relational_loss(student, teacher, valid)[n].item(), relational_loss(student, teacher, valid, distance=2,
            angle=0)[n].item()
        assert got == pytest.approx((huber(ds, dt) + 2 * huber(cs, ct), 2 * huber(ds, dt)), rel=1e-4)


def test_relations_of_a_flat_map_keep_a_finite_gradient():
    for flat in (torch.zeros(1, 4, 3, 3), torch.ones(1, 4, 3, 3), torch.tensor([0.0, 0, 1]).expand(1, 4, 3, 3)):
        flat = flat.clone().requires_grad_()
        relational_loss(flat, torch.randn(1, 4, 3, 3)).sum().backward()
        assert flat.grad.isfinite().all()


def test_attention_by_hand():
    """Student: squares (1 + 3)/2 = 2 and (2 + 2)/2 = 2, so √½ twice; teacher: 3 and 4 of 5. Squared distance 2 − 2 · (3
    + 4)/(5√2)."""
    student = torch.tensor([[[[1.0, 2**0.5]], [[3**0.5, 2**0.5]]]])
    teacher = torch.tensor([3.0, 4.0]).sqrt().view(1, 1, 1, 2)
    assert attention_loss(student, teacher).item() == pytest.approx(2 - 2 * 7 / (5 * 2**0.5), rel=1e-5)


def test_contrast_candidate_by_candidate():
    "Two images, the second with one valid cell: three candidates in all for each of the three cells."
    g = torch.Generator().manual_seed(3)
    student, teacher = (torch.randn(2, 4, 1, 2, generator=g) for _ in range(2))
    valid = torch.tensor([[[True, True]], [[False, True]]])
    s, t = ([m[0, :, 0, 0], m[0, :, 0, 1], m[1, :, 0, 1]] for m in (student, teacher))
    cosine = lambda a, b: (a @ b / a.norm() / b.norm()).item()
    costs = [-cosine(s[i], t[i]) / 0.5 + math.log(sum(math.exp(cosine(s[i], x) / 0.5) for x in t)) for i in range(3)]
    assert contrastive_loss(student, teacher, valid, temperature=0.5).tolist() == pytest.approx([(costs[0] + costs[1])
        / 2, costs[2]], rel=1e-4)


def test_picked_cells_are_valid_different_and_even():
    valid = torch.rand(2000, 4, 4, generator=torch.Generator().manual_seed(0)) > 0.5
    valid[0] = False
    cells, ok = pick_cells(torch.zeros(2000, 1, 4, 4), valid, 5, range(2000))
    assert valid.flatten(1).gather(1, cells)[ok].all() and (ok.sum(1) == valid.sum((1, 2)).clamp(max=5)).all()
    assert all(len(set(row.tolist())) == 5 for row in cells)
    share = cells[ok].bincount(minlength=16) / ok.sum()
    assert (share - 1 / 16).abs().max() < 0.01
    again, _ = pick_cells(torch.zeros(2000, 1, 4, 4), valid, 5, range(2000))
    assert torch.equal(again, cells)
    some, _ = pick_cells(torch.zeros(3, 1, 4, 4), valid[[5, 7, 1]], 5, [5, 7, 1])
    assert torch.equal(some, cells[[5, 7, 1]]), "by their own seeds, whoever is beside them"


def test_iou_and_scores_by_hand():
    masks = torch.tensor([[[[1.0, 1, -1, 9]], [[-1.0, -1, -1, 9]]]])
    target, valid = torch.tensor([[[1.0, 0.6, 0.7, 0]]]), torch.tensor([[[True, True, True, False]]])
    assert mask_iou(masks, target[:, None], valid[:, None]).tolist()[0] == pytest.approx([2 / 3, 0])
    assert iou_head_loss(torch.tensor([[0.5, 0.25]]), masks, target, valid).item() == pytest.approx((1 / 6 + 1 / 4) / 2,
        rel=1e-5)
    assert score_loss(torch.tensor([2.0, -1.0]), torch.tensor([1.0, 0.3])).tolist() == pytest.approx([softplus(-2),
        softplus(-1) + 0.3])


def test_task_teaches_the_best_mask_and_every_iou():
    g = torch.Generator().manual_seed(0)
    masks, target, iou = torch.randn(4, 3, 6, 6, generator=g), torch.rand(4, 6, 6, generator=g).round(), torch.rand(4,
        3, generator=g)
    scores, here = torch.tensor([1.0, -2, 0.5, 3]), torch.tensor([True, True, False, True])
    terms = task_terms(masks, iou, scores, target, present=here)
    whole = np.ones((6, 6), bool)
    best = [min(slow_mask_loss(m.numpy(), t.numpy(), whole) for m in ms) for ms, t, h in zip(masks, target, here) if h]
    real = [[((m > 0) & (t > 0)).sum() / ((m > 0) | (t > 0)).sum() for m in ms] for ms, t,
            h in zip(masks, target, here) if h]
    assert terms["mask"].item() == pytest.approx(np.mean(best), rel=1e-4)
    assert terms["iou"].item() == pytest.approx(np.abs(iou[here].numpy() - np.array(real)).mean(), rel=1e-4)
    assert terms["score"].item() == pytest.approx(np.mean([softplus(-1.0), softplus(2.0), softplus(0.5), softplus(
        -3.0)]), rel=1e-4)


def test_task_terms_of_parts_add_up():
    """Objects that are not known teach nothing, whatever is said of them; those that are absent their score; None: all
    are known and there."""
    g = torch.Generator().manual_seed(0)
    masks, target, iou, scores = torch.randn(6, 3, 6, 6, generator=g), torch.rand(6, 6, 6, generator=g), torch.rand(6,
        3, generator=g), torch.randn(6, generator=g)
    known, there = torch.tensor([1, 1, 0, 1, 1, 0]).bool(), torch.tensor([1, 0, 0, 1, 1, 0]).bool()
    told = lambda rows, **more: task_terms(masks[rows], iou[rows], scores[rows], target[rows], present=there[rows],
                                           known=known[rows], **more)
    whole = {"there": 3, "known": 4}
    all_, alone = told(slice(None)), task_terms(masks[known], iou[known], scores[known], target[known],
                                                present=there[known])
    for k in all_: torch.testing.assert_close(all_[k], alone[k])
    for counts in (whole, {k: torch.tensor(float(v)) for k, v in whole.items()}):
        parts = [told(rows, whole=counts) for rows in (slice(0, 2), slice(2, 3), slice(3, 6))]
        for k in all_: torch.testing.assert_close(sum(p[k] for p in parts), all_[k])
    assert all(v == 0 for v in told(slice(2, 3),
                                    whole={"there": 0, "known": 0}).values()), "of nothing there is nothing"
    masks[2], iou[2], scores[2] = 50, 0, 50
    assert all(torch.equal(told(slice(None))[k], all_[k]) for k in all_)
    plain = task_terms(masks, iou, scores, target)
    for k, v in task_terms(masks, iou, scores, target, whole={"there": 6, "known": 6}).items():
        torch.testing.assert_close(v, plain[k])


MAPS = {"features": lambda s, t, v: feature_errors([s], [t], [v])[0], "attention": attention_loss,
        **{name: loss for name, loss in MAP_LOSSES.items() if name != "attention"}}
MASKS = {"dice": lambda s, t, v: dice_loss(s, soft_target(t), v[:, None]), "focal": lambda s, t,
         v: focal_loss(s, soft_target(t), v[:, None]),
         "set": distill_loss,
         "task": lambda s, t, v: task_terms(s, s.mean((2, 3)) * 0 + 0.5, torch.zeros(2), soft_target(t)[:, 0],
                                            v)["mask"]}


@pytest.mark.parametrize("name", [*MAPS, *MASKS])
def test_padding_and_teacher_stay_out(name):
    """Junk in the padding changes no value and gets no gradient; the teacher gets none anywhere; the student's image
    does."""
    loss, g = {**MAPS, **MASKS}[name], torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(2, 3, 6, 6, generator=g) for _ in range(2))
    valid = (torch.arange(6) < 4).expand(2, 6, 6).clone()
    valid[1, 5:] = False
    junk = lambda x, by: torch.where(valid[:, None], x, by)
    def run(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        s, t = s.clone().requires_grad_(), t.clone().requires_grad_()
        value = loss(s, t, valid).sum()
        value.backward()
        assert t.grad is None, "no gradient into the teacher"
        return value.detach(), s.grad
    value, grad = run(student, teacher)
    other, _ = run(junk(student, torch.tensor(1e3)), junk(teacher, torch.tensor(-1e3)))
    torch.testing.assert_close(value, other)
    assert (grad.abs() * ~valid[:, None]).max() == 0 and (grad.abs().amax(1)[valid] > 0).float().mean() > 0.9


@pytest.mark.parametrize("name", ["relational", "attention", "contrastive"])
def test_map_losses_fall_with_the_distance_to_the_teacher(name):
    g = torch.Generator().manual_seed(2)
    teacher, noise = torch.randn(4, 16, 8, 8, generator=g), torch.randn(4, 16, 8, 8, generator=g)
    costs = [MAP_LOSSES[name](F.normalize(teacher + k * noise, dim=(1, 2, 3)), teacher).mean().item()
             for k in (0, 0.5, 2)]
    assert costs[0] < costs[1] < costs[2]


@pytest.mark.parametrize("name", [*MAPS, *MASKS])
def test_float32_under_amp(name):
    "Mixed precision is the networks' affair; the losses compute as without it."
    loss, g = {**MAPS, **MASKS}[name], torch.Generator().manual_seed(4)
    student, teacher = (torch.randn(2, 3, 6, 6, generator=g) for _ in range(2))
    valid = torch.ones(2, 6, 6, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16): mixed = loss(student, teacher, valid)
    assert mixed.dtype == torch.float32 and torch.equal(mixed, loss(student, teacher, valid))


@dataclass
class Case:
    "What losses are given, for N prompts of three masks: a model's answers, the teacher's and the truth."
    masks: Tensor    # [N, 3, h, w] logits
    iou: Tensor      # [N, 3]
    score: Tensor    # [N] logits
    teacher: Tensor  # [N, 3, h, w] logits
    target: Tensor   # [N, 3, h, w] in 0…1
    valid: Tensor    # [N, h, w] bool

    def to(self, dtype: torch.dtype) -> "Case":
        return Case(*(x if x.dtype == torch.bool else x.to(dtype) for x in vars(self).values()))


def terms_of(c: Case, there: float) -> dict[str, Tensor]:
    "`concept_losses` of N concepts with three candidates and three targets; `there` 0: nothing is to be found."
    w, goal = c.iou, torch.tensor([0.03, 0.1, 0.61, 0.77]).bfloat16().to(c.target)
    boxes = torch.stack([w * 0, w * 0, w, w / 2], -1)
    found = Detections(boxes[None], c.masks.amax((2, 3))[None], c.score[None], c.masks[None],
                       c.masks.amax(1, keepdim=True))
    scores = c.target.new_full((len(w), 3), there)
    return concept_losses(found, Targets(goal.expand(len(w), 3, 4), c.target, scores, scores[:, 0], c.target.amax(1)),
                          c.valid)


LOSSES = {  # name → f(case) → a tensor, or a dictionary of them
    "dice": lambda c: dice_loss(c.masks, c.target, c.valid[:, None]),
    "mask": lambda c: mask_loss(c.masks, c.target, c.valid[:, None]),
    **{f"focal {g}": lambda c, g=g: focal_loss(c.masks, c.target, c.valid[:, None], gamma=g) for g in (0, 0.5, 1, 2)},
    **{f"soft focal {g}": lambda c, g=g: soft_focal(c.masks, c.target, gamma=g) for g in (0, 0.5, 1, 2)},
    **{f"distill at {k}": lambda c, k=k: distill_loss(c.masks, c.teacher, c.valid, k) for k in (0, 1, 3)},
    "features": lambda c: feature_loss([c.masks, c.masks], [c.target, c.teacher], [c.valid, c.valid]),
    "task": lambda c: task_terms(c.masks, c.iou, c.score, c.target[:, 0], c.valid),
    "absent": lambda c: task_terms(c.masks, c.iou, c.score, c.target[:, 0], c.valid, c.valid.flatten(1).any(1) & False),
    "iou": lambda c: iou_head_loss(c.iou, c.masks, c.target[:, 0], c.valid),
    "score": lambda c: score_loss(c.score, c.target.amax((1, 2, 3))),
    "concepts": lambda c: terms_of(c, 1.0), "no concepts": lambda c: terms_of(c, 0.0),
    **{name: lambda c, name=name: map_terms([name], [c.masks], [c.teacher], [c.valid]) for name in MAP_LOSSES}}
CASES = ["any", "empty masks", "full masks", "100", "-100", "sure and right", "sure and wrong", "right", "constant",
         "no valid cell", "empty batch"]


def case(word: str) -> Case:
    "The inputs of one kind of trouble."
    g = torch.Generator().manual_seed(0)
    x, s = (3 * torch.randn(2, 3, 8, 8, generator=g) for _ in range(2))
    t, v = torch.rand(2, 3, 8, 8, generator=g), torch.rand(2, 8, 8, generator=g) > 0.2
    if word == "empty masks": t, s = 0 * t, 0 * s - 100
    if word == "full masks": t, s = 0 * t + 1, 0 * s + 100
    if word in ("100", "-100"): x, t = 0 * x + float(word), t.round()
    if word.startswith("sure"): x = s = 200 * (t := t.round()) - 100
    if word == "sure and wrong": s = -x
    if word == "right": s, t = x, x.sigmoid()
    if word == "constant": x, s, t = 0 * x, 0 * s, 0 * t + 0.5
    if word == "no valid cell": v = v & False
    some = slice(0, 0 if word == "empty batch" else 2)
    return Case(*(y[some] for y in (x, x.mean((2, 3)).sigmoid(), x.mean((1, 2, 3)), s, t, v)))


def values(name: str, c: Case, mixed: bool = False) -> list[Tensor]:
    "What a loss says, with the same chance each time."
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed): said = LOSSES[name](c)
    return list(said.values()) if isinstance(said, dict) else [said]


def slopes(said: list[Tensor], c: Case) -> list[Tensor]:
    "Gradients of all that a model answers; those that a loss does not read are left out."
    given = torch.autograd.grad(sum(y.sum() for y in said), (c.masks, c.iou, c.score), allow_unused=True)
    return [x for x in given if x is not None]


@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("word", CASES)
@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients_are_finite(name, word, mixed):
    "In float32, and in bfloat16 under autocast, whatever a model says and whatever there is to learn from."
    c = case(word).to(torch.bfloat16 if mixed else torch.float32)
    for x in (c.masks, c.iou, c.score): x.requires_grad_()
    said = values(name, c, mixed)
    assert all(y.dtype == torch.float32 and y.isfinite().all() for y in said), said
    grads = slopes(said, c)
    assert grads and all(x.isfinite().all() for x in grads)


@pytest.mark.parametrize("word", ["any", "sure and right"])
@pytest.mark.parametrize("name", LOSSES)
def test_autocast_changes_no_loss(name, word):
    """Values and gradients of float32 inputs are the same to the bit; values of bfloat16 inputs are those of the same
    numbers in float32."""
    c = case(word)
    for x in (c.masks, c.iou, c.score): x.requires_grad_()
    plain, mixed = values(name, c), values(name, c, mixed=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, mixed, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(slopes(plain, c), slopes(mixed, c), strict=True))
    half = case(word).to(torch.bfloat16)
    wide = values(name, half.to(torch.float32))
    for mixed in (True, False):
        assert all(torch.equal(a, b) for a, b in zip(values(name, half, mixed), wide, strict=True))


@pytest.mark.parametrize("gamma", [0, 0.5, 0.9, 1, 1.5, 2])
def test_focal_factor(gamma):
    "The power of the distance: to the bit from gamma 1 on, below it but for the last millionth. Gamma 0: no factor."
    d = torch.cat([torch.zeros(1), torch.logspace(-6, 0, 50)[1:]])
    got = focal_factor(d, gamma)
    torch.testing.assert_close(got[1:], d[1:] ** gamma, rtol=0 if gamma >= 1 else 1e-6, atol=0)
    assert got[0] == (gamma == 0)


@pytest.mark.parametrize("name", ["distill at 1", "concepts"])
def test_a_broken_network_shows_in_the_loss(name):
    "Matching survives masks that are not numbers, so that the loss can say so."
    c = case("any")
    c.masks[0, 1] = math.nan
    assert torch.cat([y.flatten() for y in values(name, c)]).isnan().any()


def test_many_prompts_in_half_precision():
    "Sums over prompts are taken in float32: 514 prompts are more than bfloat16 can count."
    c = case("any").to(torch.bfloat16)
    many = lambda c: task_terms(*(x.repeat(257, *[1] * (
        x.ndim - 1)) for x in (c.masks, c.iou, c.score, c.target[:, 0])))
    half, full = many(c), many(c.to(torch.float32))
    assert all(torch.equal(half[k], full[k]) for k in full)
