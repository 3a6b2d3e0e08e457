"""A second device on a machine that has none: tensors with real values and another device label.

from elsewhere import elsewhere

    def test_step_follows_the_model():
        with elsewhere() as device:                  # torch.device("elsewhere", 0)
            model = load_teacher("toy").to(device)   # the same Parameter objects: groups made before hold
            batch = batch.to(device)
            ...                                      # a tensor left on the CPU: RuntimeError

What runs on it is computed by the CPU's kernels, with the CPU's values and its generator; only the rules are CUDA's:

- An operation that mixes the two devices raises. Free to mix are `copy_` and `to`; 0-dim CPU tensors as numbers in
element-wise operations; CPU indices into tensors of the device, but not indices of the device into CPU tensors. A CPU
generator is refused. - `numpy()`, `np.asarray` raise `TypeError`; `numpy(force=True)`, `cpu()`, `item()`, `tolist()`,
`bool` copy to the CPU. - `torch.autocast("elsewhere", dtype)` casts what CUDA's autocast casts (bf16 and fp16). -
Inside `elsewhere()`, `pick_device` of every loaded module of esam3 and accelerate's default device are this one;
`torch.Generator(device)` and `torch.load(map_location=device)` work. `torch.save` writes what a CPU tensor would:
loaded without `map_location` it is on the CPU, unlike CUDA.

`with reads() as found:` lists every time that the host reads from the device in the block, each with its place in the
project. On CUDA it waits there for all that was computed before. So it does at a copy to the device that is not
`non_blocking`: `with uploads() as found:` lists these, among them `torch.tensor(…, device=…)`, `new_tensor`, and lists
or CPU tensors as indices.

Not modelled: streams and asynchrony, memory, in-place changes of shape (`resize_`, `unsqueeze_`; they raise), a device
generator in a CPU operation, fp16 in accelerate (it knows its own list of devices). The label is torch's PrivateUse1,
renamed; it is registered when this module is imported and cannot be taken back. Import it at the top of a test module,
before any `backward` of the process: the autograd engine counts devices once."""
import contextlib
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import cache
from weakref import WeakValueDictionary

import accelerate.state
import torch
import torchvision  # noqa: F401  its operations are registered by the import
from torch import Tensor
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "elsewhere"


class Elsewhere(Tensor):
    "A tensor whose `.device` is the label, around the CPU tensor that holds its values."
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor):
        shape = {"size": inner.shape, "strides": inner.stride(), "storage_offset": inner.storage_offset()}
        normal = torch.is_inference_mode_enabled()  # a view of a normal tensor must be a normal tensor, there too
        with torch.inference_mode(False) if normal else contextlib.nullcontext():
            out = Tensor._make_wrapper_subclass(cls, **shape, dtype=inner.dtype, device=DEVICE)
        out.inner = inner
        return out

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return compute(op, args, kwargs or {})

    def numpy(self, *, force: bool = False):
        if not force:
            raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first.")
        return self.detach().cpu().numpy()

    def tolist(self) -> list: return self.detach().cpu().tolist()

    def untyped_storage(self): return self.inner.untyped_storage()  # who shares memory with whom

    def data_ptr(self) -> int: return self.inner.data_ptr()

    def __reduce_ex__(self, protocol: int): return self.inner.__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict):
        out = memo[id(self)] = self.detach().clone().requires_grad_(self.requires_grad)
        out.__dict__ |= {k: v for k, v in self.__dict__.items() if k != "inner"}  # that it is a parameter
        return out

    def __repr__(self, **_) -> str: return f"{self.inner!r}"[:-1] + f", device='{self.device}')"

    def __format__(self, spec: str) -> str: return format(self.detach().cpu(), spec) if self.ndim == 0 else repr(self)


# what may mix devices, and where the CPU's part may be
COPIES = {"copy_", "_to_copy", "_copy_from", "_copy_from_and_resize", "_foreach_copy_"}
INDEXED = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put"}
SCALARS = {"fill_", "fill", "masked_fill", "masked_fill_", "index_fill", "index_fill_", "_fused_adamw_", "_fused_adam_"}


def each(x, change: Callable[[Tensor], object]):
    "Arguments or results with every tensor changed."
    if isinstance(x, Tensor): return change(x)
    return type(x)(each(v, change) for v in x) if type(x) in (list, tuple) else x


def tensors(*given) -> list[Tensor]:
    "All tensors among arguments."
    found: list[Tensor] = []
    each(list(given), found.append)
    return found


@cache
def kind(op) -> tuple[str, bool]:
    "An operation's name without its overload, and whether it takes 0-dim CPU tensors as numbers."
    name = op._schema.name.split("::")[1]
    return name, torch.Tag.pointwise in op.tags or name in SCALARS or name.startswith("_foreach")


@cache
def composite(op) -> bool:
    "Whether an operation is only made of others."
    return torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CompositeImplicitAutograd")


def refuse_mixing(op, args: tuple, kwargs: dict) -> None:
    "CUDA's rule for the devices of an operation's arguments."
    name, numbers = kind(op)
    if name in COPIES: return
    if name in INDEXED:
        if not isinstance(args[0], Elsewhere) and any(isinstance(t, Elsewhere) for t in tensors(args[1])):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        args, numbers = (args[0], *args[2:]), True
    found = tensors(args, list(kwargs.values()))
    here = [t for t in found if not isinstance(t, Elsewhere)]
    if here and len(here) < len(found) and not (numbers and all(t.ndim == 0 for t in here)):
        raise RuntimeError("Expected all tensors to be on the same device, but found at least two devices, "
                           f"{DEVICE} and cpu! ({op})")


def own_generator(kwargs: dict) -> None:
    "CUDA's rule for generators."
    generator = kwargs.get("generator")
    if generator is not None and generator._cdata not in Generator.alive:
        raise RuntimeError(f"Expected a '{NAME}' device type for generator but found 'cpu'")


def compute(op, args: tuple, kwargs: dict):
    "An operation by the CPU's kernel; its answers are on the device, unless it was asked for the CPU."
    if composite(op): return op.decompose(*args, **kwargs)  # in inference mode they come whole
    if op is torch.ops.aten.detach_.default: return args[0]  # autograd's business, done before
    if torch.Tag.inplace_view in op.tags: raise NotImplementedError(f"{op} on {DEVICE}: a shape is changed in place")
    refuse_mixing(op, args, kwargs)
    own_generator(kwargs)
    if READERS and host_reads(op, args, kwargs): note(kind(op)[0], READERS)
    if UPLOADERS and blocking_upload(op, args, kwargs): note(kind(op)[0], UPLOADERS, DOERS)
    known: dict[int, Tensor] = {}  # what an in-place operation returns is what it was given
    def inside(t: Tensor) -> Tensor:
        inner = t.inner if isinstance(t, Elsewhere) else t
        known[id(inner)] = t
        return inner
    stays = kwargs.get("device") is None or torch.device(kwargs["device"]).type == NAME
    if kwargs.get("device") is not None: kwargs = {**kwargs, "device": torch.device("cpu")}
    result = op(*each(args, inside), **{k: each(v, inside) for k, v in kwargs.items()})
    if op._schema.is_mutable and any(t.shape != t.inner.shape for t in known.values() if isinstance(t, Elsewhere)):
        raise NotImplementedError(f"{op} on {DEVICE}: a shape is changed in place")
    return each(result, lambda t: known[id(t)] if id(t) in known else Elsewhere(t) if stays else t)


# what a host cannot do without knowing values of the device: numbers, and shapes that depend on values
ASKING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique", "_unique2", "unique_dim",
          "unique_consecutive",
          "unique_dim_consecutive", "bincount", "repeat_interleave", "is_nonzero"}
READERS: list[list[str]] = []  # lists that `reads` has given out, of the blocks that are open


def host_reads(op, args: tuple, kwargs: dict) -> bool:
    "Whether the host must wait for the device to do an operation that has tensors of it among its arguments."
    name = kind(op)[0]
    if name in COPIES:
        if name == "_to_copy": return kwargs.get("device") is not None and torch.device(kwargs["device"]).type != NAME
        source, target = (args[0], args[1]) if name.startswith("_copy_from") else (args[1], args[0])
        here = lambda x: any(isinstance(t, Elsewhere) for t in tensors(x))
        return here(source) and not here(target)
    if name in INDEXED:
        return any(isinstance(t, Elsewhere) and t.dtype in (torch.bool, torch.uint8) for t in tensors(args[1]))
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None and op._schema.overload_name in ("Tensor", "self_Tensor")
    return name in ASKING


UPLOADERS: list[list[str]] = []  # the same of `uploads`


def blocking_upload(op, args: tuple, kwargs: dict) -> bool:
    "Whether an operation copies from the CPU to the device and the host waits for the copy; CPU indices are copied so."
    here = lambda x: any(isinstance(t, Elsewhere) for t in tensors(x))
    name = kind(op)[0]
    if name in INDEXED: return here(args[0]) and any(not isinstance(t, Elsewhere) for t in tensors(args[1]))
    if name not in COPIES or name == "_to_copy": return False  # `to` from the CPU comes as `copy_`
    source, target = (args[0], args[1]) if name.startswith("_copy_from") else (args[1], args[0])
    waits = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
    return waits and here(target) and any(not isinstance(t, Elsewhere) for t in tensors(source))


PROJECT = ("/esam3/",), ("/tests/",)  # where a place is looked for, one after the other; then anywhere
DOERS = ("/esam3/", "/tests/", "/transformers/"),  # a library that acts by itself is its own place


def note(what: str, readers: list[list[str]], among: tuple[tuple[str, ...], ...] = PROJECT) -> None:
    "Write down what somebody did, with the innermost place in esam3; else in a test, else in a library."
    frames = [f for f in traceback.extract_stack() if f.filename != __file__]
    for inside in (*among, ("",)):
        place = next((f for f in reversed(frames) if any(part in f.filename for part in inside)), None)
        if place: break
    said = f"{what}: {place.filename.rsplit('/', 1)[-1]}:{place.lineno} in {place.name}: {place.line}"
    for reader in readers: reader.append(said)


@contextlib.contextmanager
def reads() -> Iterator[list[str]]:
    "The host reads from the device within the block, in their order: `what: file:line in function: its source`."
    found: list[str] = []
    READERS.append(found)
    try: yield found
    finally: READERS[:] = [r for r in READERS if r is not found]


@contextlib.contextmanager
def uploads() -> Iterator[list[str]]:
    """The blocking copies from the CPU to the device within the block, in their order, as `reads` writes them; what
    transformers copies by itself has its place there."""
    found: list[str] = []
    UPLOADERS.append(found)
    try: yield found
    finally: UPLOADERS[:] = [u for u in UPLOADERS if u is not found]


class Generator(torch.Generator):
    "A generator that is said to be of the device."
    device = property(lambda self: DEVICE)
    alive: WeakValueDictionary[int, torch.Generator] = WeakValueDictionary()  # torch hands on other objects

    def __init__(self): self.alive[self._cdata] = self


# autocast as CUDA's (ATen/autocast_mode.h): cast to the lower precision, to float32, to the widest of the arguments
LOWER = """
_convolution conv1d conv2d conv3d conv_tbc conv_transpose1d conv_transpose2d.input conv_transpose3d.input
convolution prelu addmm addmv addr matmul einsum mm mv linalg_vecdot linear addbmm baddbmm bmm chain_matmul
linalg_multi_dot scaled_dot_product_attention
"""
FLOAT = """
acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan pow.Tensor_Scalar pow.Tensor_Tensor
pow.Scalar softplus layer_norm native_layer_norm rms_norm group_norm cosine_similarity poisson_nll_loss
cosine_embedding_loss nll_loss nll_loss2d hinge_embedding_loss kl_div l1_loss smooth_l1_loss huber_loss mse_loss
margin_ranking_loss multilabel_margin_loss soft_margin_loss triplet_margin_loss multi_margin_loss
binary_cross_entropy_with_logits dist cdist renorm logsumexp upsample_nearest2d _upsample_nearest_exact2d
upsample_bilinear2d _upsample_bilinear2d_aa upsample_bicubic2d _upsample_bicubic2d_aa prod prod.dim_int softmax.int
log_softmax.int cumprod cumsum linalg_vector_norm linalg_matrix_norm sum sum.dim_IntList norm.Scalar
norm.ScalarOpt_dim
"""
WIDEST = "addcdiv addcmul atan2 bilinear cross dot vdot grid_sampler index_put tensordot scatter_add cat stack"
NO_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)


def autocast(op, policy: str) -> Callable:
    "A kernel of autocast: the operation with its floating tensors of the device cast."
    def kernel(*args, **kwargs):
        lower = torch.get_autocast_dtype(NAME)
        ours = lambda t: isinstance(t, Elsewhere) and t.is_floating_point() and t.dtype != torch.float64
        wide = any(ours(t) and t.dtype == torch.float32 for t in tensors(args, list(kwargs.values())))
        target = torch.float32 if policy == "float" or (policy == "widest" and wide) else lower
        cast = lambda t: t.to(target) if ours(t) else t
        with torch._C._ExcludeDispatchKeyGuard(NO_AUTOCAST):
            return op(*each(args, cast), **{k: each(v, cast) for k, v in kwargs.items()})
    return kernel


class Module(_DummyBackendModule):
    "What torch asks of `torch.elsewhere`."
    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]: return [torch.bfloat16, torch.float16]
    @staticmethod
    def device(index: int) -> contextlib.AbstractContextManager: return contextlib.nullcontext()
    @staticmethod
    def get_rng_state(index: int = 0) -> Tensor: return torch.get_rng_state()  # it draws from the CPU's
    @staticmethod
    def set_rng_state(state: Tensor, index: int = 0) -> None: torch.set_rng_state(state)


FACTORIES = """
empty.memory_format empty_strided zeros ones full eye eye.m scalar_tensor arange arange.start arange.start_step
range range.step linspace logspace rand rand.generator randn randn.generator randint randint.generator randint.low
randint.low_generator randperm randperm.generator tril_indices triu_indices hann_window
"""


def overload(name: str):
    "An operation of aten by its full name."
    op, _, which = name.partition(".")
    return getattr(getattr(torch.ops.aten, op), which or "default")


def factory(name: str) -> Callable:
    "A kernel that makes a new tensor of the device."
    def kernel(*args, **kwargs) -> Tensor:
        own_generator(kwargs)
        return Elsewhere(overload(name)(*args, **{**kwargs, "device": torch.device("cpu")}))
    return kernel


def register() -> tuple[torch.library.Library, ...]:
    "Give torch the label, the two factories that all others end in, and autocast. It lasts as long as the answer."
    _setup_privateuseone_for_python_backend(NAME, Module())
    library, every = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")
    every.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for name in FACTORIES.split():
        library.impl(name, factory(name), "PrivateUse1")
    def copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:  # `torch.tensor` comes by here
        if UPLOADERS and blocking_upload(torch.ops.aten._copy_from.default, (source, target, non_blocking), {}):
            note("_copy_from", UPLOADERS, DOERS)
        values = lambda t: t.inner if isinstance(t, Elsewhere) else t
        values(target).copy_(values(source))
        return target
    library.impl("_copy_from", copy_from, "PrivateUse1")
    for policy, names in (("lower", LOWER), ("float", FLOAT), ("widest", WIDEST)):
        for name in names.split(): library.impl(name, autocast(overload(name), policy), "AutocastPrivateUse1")
    vision = torch.library.Library("torchvision", "IMPL")
    def roi_align(maps: Tensor, rois: Tensor, *options) -> Tensor:  # in float32, as torchvision's autocast has it
        with torch._C._ExcludeDispatchKeyGuard(NO_AUTOCAST):
            return torch.ops.torchvision.roi_align(maps.float(), rois.float(), *options).to(maps.dtype)
    vision.impl("roi_align", roi_align, "AutocastPrivateUse1")
    return library, every, vision


REGISTERED = register()
DEVICE = torch.device(NAME, 0)


class _AnyGenerator(type):
    def __instancecheck__(cls, x) -> bool: return isinstance(x, _GENERATOR)

    def __call__(cls, device: torch.device | str = "cpu"):
        return Generator() if torch.device(device).type == NAME else _GENERATOR(device)


_GENERATOR, _LOAD = torch.Generator, torch.load


def _load(f, map_location=None, **options):
    "`torch.load`, onto the device if asked."
    here = isinstance(map_location, str | torch.device) and torch.device(map_location).type == NAME
    if not here: return _LOAD(f, map_location, **options)
    return torch.utils._pytree.tree_map_only(Tensor, lambda t: t.to(DEVICE), _LOAD(f, "cpu", **options))


@contextlib.contextmanager
def elsewhere() -> Iterator[torch.device]:
    """Within the block this machine's accelerator is `torch.device("elsewhere", 0)`, which it yields.

    `pick_device` picks it, accelerate starts on it, modules keep their `Parameter` objects when they move. All is as
    before after the block, but for the modules that were moved."""
    generator, load = torch.Generator, torch.load
    swap = torch.__future__.get_swap_module_params_on_conversion()
    default = accelerate.state.PartialState.default_device
    picks = [m for name, m in [*sys.modules.items()] if name.split(".")[0] == "esam3" and hasattr(m, "pick_device")]
    originals = [m.pick_device for m in picks]
    accelerate.state.AcceleratorState._reset_state(True)
    try:
        torch.__future__.set_swap_module_params_on_conversion(True)
        torch.Generator, torch.load = _AnyGenerator("Generator", (), {}), _load
        accelerate.state.PartialState.default_device = property(lambda self: DEVICE)
        for m in picks: m.pick_device = lambda: DEVICE
        yield DEVICE
    finally:
        for m, pick in zip(picks, originals): m.pick_device = pick
        accelerate.state.PartialState.default_device = default
        torch.Generator, torch.load = generator, load
        torch.__future__.set_swap_module_params_on_conversion(swap)
        accelerate.state.AcceleratorState._reset_state(True)
