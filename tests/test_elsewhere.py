"The second device of the tests: it computes what the CPU does, and refuses what CUDA would."

import copy
import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from elsewhere import NAME, Elsewhere, elsewhere, reads, uploads
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import box_convert, generalized_box_iou, roi_align

import esam3.core


@pytest.fixture(autouse=True)
def device():
    with elsewhere() as d:
        yield d


def there(*shape: int) -> Tensor:
    "0, 1, 2, … on the device."
    return torch.arange(float(np.prod(shape)), device=torch.device(NAME)).view(*shape)


MIXED = {  # what CUDA refuses
    "number by number": lambda x: x + torch.ones(3),
    "cat": lambda x: torch.cat([x, torch.ones(2, 3)]),
    "stack of numbers": lambda x: torch.stack([x[0, 0], torch.tensor(1.0)]),
    "a number of the device": lambda x: torch.ones(3) * x[0, 0],
    "matrix": lambda x: F.linear(x, torch.ones(3, 3)),
    "convolution": lambda x: F.conv2d(x[None, None], torch.ones(1, 1, 1, 1)),
    "grid": lambda x: F.grid_sample(x[None, None], torch.zeros(1, 1, 1, 2), align_corners=False),
    "gather": lambda x: x.gather(0, torch.zeros(1, 3, dtype=torch.long)),
    "index_select": lambda x: x.index_select(0, torch.tensor([0])),
    "where": lambda x: torch.where(torch.ones(2, 3) > 0, x, x),
    "lerp": lambda x: torch.ones(2, 3).lerp_(x, 0.1),
    "put": lambda x: x.index_put((torch.tensor([0]),), torch.ones(1, 3)),
    "cdist": lambda x: torch.cdist(x, torch.ones(2, 3)),
    "einsum": lambda x: torch.einsum("ij,kj->ik", x, torch.ones(2, 3)),
    "roi_align": lambda x: roi_align(x[None, None], torch.ones(1, 5), 1),
    "mask": lambda x: x.masked_fill(torch.ones(2, 3) > 0, 0.0),
    "embedding": lambda x: F.embedding(torch.tensor([0]), x),
}


@pytest.mark.parametrize("case", MIXED)
def test_mixing_raises(case):
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device.*elsewhere:0 and cpu"):
        MIXED[case](there(2, 3))


@pytest.mark.parametrize(
    "index", [lambda x: x[:, 0] > 1, lambda x: torch.tensor([0], device=x.device)], ids=["mask", "numbers"]
)
def test_indices(index):
    "CPU indices into the device are allowed, those of the device into the CPU are not."
    x, i = there(2, 3), index(there(2, 3))
    assert torch.equal(x[i].cpu(), x.cpu()[i.cpu()]) and torch.equal(x[i.cpu()], x[i])
    x[i.cpu()] = torch.tensor(7.0)
    assert (x[i] == 7).all()
    with pytest.raises(
        RuntimeError, match="indices should be either on cpu or on the same device as the indexed tensor"
    ):
        torch.ones(2, 3)[i]
    with pytest.raises(RuntimeError, match="indices should be either on cpu"):
        torch.ones(2, 3)[i] = 0.0


def test_numbers_of_the_cpu_may_mix():
    x = there(2, 3)
    assert (
        torch.equal((x * torch.tensor(2.0)).cpu(), x.cpu() * 2)
        and torch.equal(torch.where(x > 2, x, torch.tensor(0.0)), x * (x > 2))
        and x.fill_(torch.tensor(3.0)).sum() == 18
    )


def test_leaving_the_device():
    x = there(2)
    for wrong in (lambda: x.numpy(), lambda: np.asarray(x), lambda: np.array([1.0, 2.0]) @ x.numpy()):
        with pytest.raises(TypeError, match="can't convert elsewhere:0 device type tensor to numpy"):
            wrong()
    assert (
        x.numpy(force=True).tolist() == x.tolist() == x.cpu().tolist() == [0, 1]
        and x[1].item() == float(x[1]) == 1
        and bool(x.any())
        and f"{x[1]:.1f}" == "1.0"
    )
    assert (
        x.to("cpu").device.type == "cpu"
        and torch.from_numpy(np.ones(2)).device.type == "cpu"
        and torch.ones(2).copy_(x).device.type == "cpu"
    )
    assert str(x.device) == "elsewhere:0" and "device='elsewhere:0'" in repr(x) and x.device != torch.device("cpu")


FACTORIES = {
    "zeros": lambda d: torch.zeros(3, device=d),
    "full": lambda d: torch.full((3,), 2, device=d),
    "arange": lambda d: torch.arange(3, device=d),
    "tensor": lambda d: torch.tensor([1, 2, 3], device=d),
    "as_tensor": lambda d: torch.as_tensor(np.ones(3), device=d),
    "randperm": lambda d: torch.randperm(3, device=d),
    "linspace": lambda d: torch.linspace(0, 1, 3, device=d),
    "rand": lambda d: torch.rand(3, device=d, generator=torch.Generator(d).manual_seed(1)),
    "randint": lambda d: torch.randint(5, (3,), device=d),
    "eye": lambda d: torch.eye(3, device=d)[0],
    "zeros_like": lambda d: torch.zeros_like(torch.ones(3), device=d),
    "new_zeros": lambda d: torch.ones(1, device=d).new_zeros(3),
    "new_tensor": lambda d: torch.ones(1, device=d).new_tensor([1, 2, 3]),
    "empty": lambda d: torch.empty(3, device=d).fill_(1),
    "rand_like": lambda d: torch.rand_like(torch.ones(3, device=d)),
    "meshgrid": lambda d: torch.meshgrid(*[torch.arange(3, device=d)] * 2, indexing="xy")[0][0],
}


@pytest.mark.parametrize("inference", [False, True], ids=["", "inference mode"])
@pytest.mark.parametrize("name", FACTORIES)
def test_factories(name, inference, device):
    with torch.inference_mode(inference):
        torch.manual_seed(0)
        here = FACTORIES[name](torch.device("cpu"))
        torch.manual_seed(0)
        x = FACTORIES[name](device)
        assert (
            isinstance(x, Elsewhere)
            and x.device == device
            and x.shape == here.shape == (3,)
            and x.dtype == here.dtype
            and torch.equal(x.cpu(), here)
        )


def test_generator_of_another_device_is_refused(device):
    assert torch.Generator(device).device == device and isinstance(torch.Generator(), torch.Generator)
    for wrong in (
        lambda: torch.rand(2, device=device, generator=torch.Generator()),
        lambda: there(2).uniform_(generator=torch.Generator()),
    ):
        with pytest.raises(RuntimeError, match="Expected a 'elsewhere' device type for generator but found 'cpu'"):
            wrong()


def test_shapes_are_not_changed_in_place_unseen(device):
    with pytest.raises(NotImplementedError, match="in place"):
        there(2, 3).t_()
    with pytest.raises(NotImplementedError, match="in place"):
        torch.arange(3.0, out=torch.empty(0, device=device))


class Small(nn.Module):
    "One of every kind of layer."

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.attention, self.layer, self.head = (
            nn.Conv2d(3, 8, 3, bias=False),
            nn.BatchNorm2d(8),
            nn.MultiheadAttention(8, 2, batch_first=True),
            nn.LayerNorm(8),
            nn.Linear(8, 4),
        )
        self.register_buffer("scale", torch.full((8,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        maps = F.interpolate(
            F.relu(self.norm(self.conv(x))).float(), (6, 6), mode="bilinear", antialias=True, align_corners=False
        )
        t = self.layer(maps.flatten(2).mT * self.scale)
        t = checkpoint(self.head, t + self.attention(t, t, t)[0], use_reentrant=False)
        t = F.scaled_dot_product_attention(*[t[:, None]] * 3)[:, 0].float()
        place = torch.linspace(-1, 1, 8, device=x.device).view(1, 2, 2, 2).expand(len(x), -1, -1, -1)
        boxes = box_convert(torch.tensor([[3.0, 3.0, 2.0, 4.0]], device=x.device), "cxcywh", "xyxy")
        parts = [
            t.square(),
            F.grid_sample(maps, place, align_corners=False),
            torch.cdist(t, t),
            roi_align(maps, [boxes] * len(x), 2),
            generalized_box_iou(boxes, boxes + maps.mean()),
        ]
        return sum(p.mean() for p in parts) + F.cross_entropy(t[:, 0], torch.tensor([1, 2], device=x.device))


def train(device: torch.device, fused: bool, steps: int = 3, amp: bool = False) -> dict:
    "A few steps with an average of the weights; the groups are made before the model moves, as the stages do."
    torch.manual_seed(0)
    net, x = Small(), torch.randn(2, 3, 8, 8).to(device)
    optimizer = torch.optim.AdamW(
        [{"params": [*net.parameters()], "lr": 1e-2}], eps=1e-3, fused=fused
    )  # a large eps: no step from rounding alone
    net.to(device)
    assert {id(p) for p in net.parameters()} == {id(p) for p in optimizer.param_groups[0]["params"]}, "the same objects"
    assert all(
        isinstance(p, nn.Parameter) and p.is_leaf and p.requires_grad and p.device == x.device for p in net.parameters()
    )
    average, out = (
        {n: p.detach().clone() for n, p in net.named_parameters()},
        {"net": net, "optimizer": optimizer, "losses": []},
    )
    for _ in range(steps):
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            loss = net(x)
        loss.backward()
        out |= {
            "gradients": {n: p.grad.clone() for n, p in net.named_parameters()},
            "norm": nn.utils.clip_grad_norm_(net.parameters(), 1.0),
        }
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for n, p in net.named_parameters():
            average[n].lerp_(p.detach(), 0.1)
        out["losses"].append(loss.item())
    return out | {"average": average}


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    "Largest difference of tensors by name."
    return max(float((v.cpu() - b[k].cpu()).abs().max()) for k, v in a.items())


@pytest.mark.parametrize("fused", [False, True])
def test_training_is_the_cpus(fused, device):
    one, two = (train(torch.device("cpu"), fused, 1), train(device, fused, 1))
    assert (
        all(g.device == device for g in two["gradients"].values())
        and distance(one["gradients"], two["gradients"]) < 1e-5
    ), "backward"
    assert float(one["norm"]) == pytest.approx(float(two["norm"]), rel=1e-5)
    assert (
        distance(one["net"].state_dict(), two["net"].state_dict()) < 1e-6
        and distance(one["average"], two["average"]) < 1e-6
    ), "a step"
    assert train(device, fused)["losses"] == pytest.approx(train(torch.device("cpu"), fused)["losses"], rel=1e-4)


def test_state_goes_to_disk_and_back(device):
    out = train(device, True)
    file = io.BytesIO()
    torch.save(
        {"net": out["net"].state_dict(), "optimizer": out["optimizer"].state_dict(), "average": out["average"]}, file
    )
    load = lambda place: (file.seek(0), torch.load(file, map_location=place, weights_only=True))[1]
    saved = load("cpu")
    assert {t.device.type for t in saved["average"].values()} == {"cpu"} and {
        t.device for t in load(device)["average"].values()
    } == {device}
    with pytest.raises(RuntimeError, match="Expected all tensors"):
        saved["average"]["head.bias"].lerp_(out["net"].head.bias.detach(), 0.1)  # an average that stayed behind
    other = train(device, True, 1)
    other["net"].load_state_dict(saved["net"])
    other["optimizer"].load_state_dict(saved["optimizer"])
    assert {v.device for state in other["optimizer"].state.values() for v in state.values()} == {device}
    assert distance(other["net"].state_dict(), out["net"].state_dict()) == 0
    copied = copy.deepcopy(other["net"])
    assert (
        isinstance(copied.head.weight, nn.Parameter)
        and copied.head.weight.device == device
        and distance(copied.state_dict(), saved["net"]) == 0
    )
    assert type(other["net"].to("cpu").head.weight) is nn.Parameter


def test_autocast_is_cudas(device):
    x = there(2, 3)
    with torch.autocast(device.type, torch.bfloat16):
        assert (x @ x.T).dtype == F.linear(x, x).dtype == torch.bfloat16 and F.layer_norm(
            x.bfloat16(), (3,)
        ).dtype == x.bfloat16().softmax(1).dtype == x.bfloat16().sum().dtype == torch.float32
        assert (
            roi_align(x.bfloat16()[None, None], torch.tensor([[0.0, 0, 0, 1, 1]], device=device), 1).dtype
            == torch.bfloat16
            and torch.cat([x, x.bfloat16()]).dtype == torch.float32
        )
        with torch.autocast(device.type, enabled=False):
            assert (x @ x.T).dtype == torch.float32
    assert train(device, True, amp=True)["losses"] == pytest.approx(train(device, True)["losses"], rel=0.1)


def test_the_block_ends(device):
    "Picks and patches are those of before; it nests."
    assert esam3.core.pick_device() == device
    with elsewhere():
        pass
    assert esam3.core.pick_device() == device and torch.Generator(device).device == device


READS = {  # what the host has to wait for on CUDA, and what it has not
    "number": (lambda x: x[0, 0].item(), 1), "bool": (lambda x: bool((x > 1).any()), 1),
    "if": (lambda x: 1 if x.sum() else 2, 1),
    "list": (lambda x: x.tolist(), 1), "cpu": (lambda x: x.cpu(), 1), "to": (lambda x: x.to("cpu", torch.float64), 1),
    "copy": (lambda x: torch.empty(2, 3).copy_(x), 1), "numpy": (lambda x: x.numpy(force=True), 1),
    "print": (lambda x: f"{x[0, 0]:.2f}", 1), "mask": (lambda x: x[x > 1], 1),
    "put": (lambda x: x.index_put((x > 1,), x[0, 0]), 1),
    "nonzero": (lambda x: (x > 1).nonzero(), 1), "select": (lambda x: x.masked_select(x > 1), 1),
    "unique": (lambda x: x.unique(), 1), "inverse": (lambda x: x.unique(return_inverse=True), 1),
    "equal": (lambda x: torch.equal(x, x), 1), "counts": (lambda x: x[0].long().bincount(), 1),
    "repeat": (lambda x: x.repeat_interleave(x[:, 0].long() * 0 + 1, 0), 1),
    "index as int": (lambda x: [1, 2, 3][x[0, 1].long()], 1),
    "two": (lambda x: float(x.sum()) + float(x.mean()), 2),
    "computed": (lambda x: (x @ x.mT).softmax(-1).sum(), 0), "where": (lambda x: torch.where(x > 1, x, 0.0), 0),
    "fill": (lambda x: x.masked_fill(x > 1, 0.0), 0), "rows": (lambda x: x[torch.tensor([0, 1], device=x.device)], 0),
    "rows of the host": (lambda x: x[[1, 0]], 0), "list to device": (lambda x: torch.tensor([1.0, 2.0]).to(x.device),
        0),
    "made there": (lambda x: torch.tensor([1.0, 2.0], device=x.device), 0),
    "copied there": (lambda x: x.clone().copy_(torch.ones(2, 3)), 0),
    "known size": (lambda x: x.repeat_interleave(x[:, 0].long() * 0 + 1, 0, output_size=2), 0),
    "every row twice": (lambda x: x.repeat_interleave(2, 0), 0), "type": (lambda x: x.to(torch.float64), 0),
    "len": (lambda x: len(x), 0)}


@pytest.mark.parametrize("case", READS)
def test_host_reads(case):
    call, count = READS[case]
    x = there(2, 3)
    call(x)
    with reads() as found: call(x)
    assert len(found) == count, found
    assert all("test_elsewhere.py" in place for place in found)


def test_host_reads_name_their_place():
    "The innermost line of the project, also in the backward pass."
    class Asks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor: return x * 1
        @staticmethod
        def backward(ctx, g: Tensor) -> Tensor: return g * g.sum().item()
    x = there(2, 3).requires_grad_()
    with reads() as found, reads() as again: Asks.apply(x).sum().backward()
    assert (len(found) == 1
            and "in backward: def backward(ctx, g: Tensor) -> Tensor: return g * g.sum().item()" in found[0]
            and again == found)
    with reads() as found: esam3.core.weights_digest({"x": there(2, 3)})
    assert found and all("core.py" in place and "weights_digest" in place for place in found)


UPLOADS = {  # copies that the host waits for on CUDA, and others
    "to": (lambda x: torch.ones(2).to(x.device), 1), "type": (lambda x: torch.ones(2).to(x.half()), 1),
    "made": (lambda x: torch.tensor([1.0, 2.0], device=x.device), 1),
    "long": (lambda x: torch.tensor([1, 2], device=x.device), 1),
    "new": (lambda x: x.new_tensor([1.0, 2.0]), 1), "module": (lambda x: nn.Linear(2, 2, bias=False).to(x.device), 1),
    "copy": (lambda x: x.clone().copy_(torch.ones(2, 3)), 1),
    "foreach": (lambda x: torch._foreach_copy_([x.clone()], [torch.ones(2, 3)]), 1),
    "rows": (lambda x: x[[1, 0]], 1), "rows of the host": (lambda x: x[torch.tensor([1, 0])], 1),
    "put": (lambda x: x.clone().index_put_((torch.tensor([1]),), x[0]), 1),
    "not waiting": (lambda x: torch.ones(2).to(x.device, non_blocking=True), 0),
    "nor its type": (lambda x: torch.ones(2).to(x.half(), non_blocking=True), 0),
    "nor its copy": (lambda x: x.clone().copy_(torch.ones(2, 3), non_blocking=True), 0), "back": (lambda x: x.cpu(), 0),
    "there already": (lambda x: x.to(x.device), 0), "copied there": (lambda x: x.clone().copy_(x), 0),
    "full": (lambda x: torch.full((2,), 0.5, device=x.device), 0),
    "number": (lambda x: x * torch.tensor(2.0), 0),
    "range": (lambda x: x[torch.arange(2, device=x.device)], 0), "slice": (lambda x: x[1:, 0], 0)}


@pytest.mark.parametrize("case", UPLOADS)
def test_blocking_copies_to_the_device(case):
    call, count = UPLOADS[case]
    x = there(2, 3)
    call(x)
    with uploads() as found: call(x)
    assert len(found) == count, found
    assert all("test_elsewhere.py" in place for place in found)
    with reads() as read: call(x)
    assert len(read) == (case == "back")
