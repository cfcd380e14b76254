"""Counting what a training step holds in memory, and its arithmetic, on tensors without contents."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import traceback
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from step_methods import CONFIGS, Method, make_methods
from step_models import Setting, Training, make_denoiser
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from apt_hooks import AptConfig
from apt_hooks.errors import AptError

aten = torch.ops.aten
FLASH = aten._scaled_dot_product_flash_attention_for_cpu.default
FLASH_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward.default

# What a step has of the operations that autocast computes in float32 on CUDA, and not on a CPU (ATen/autocast_mode.h).
FLOAT32_UNDER_CUDA = ["layer_norm", "group_norm", "upsample_nearest2d", "softmax.int", "sum", "sum.dim_IntList"]
FLOAT32_UNDER_CUDA += ["exp", "log", "pow.Tensor_Scalar", "rsqrt", "reciprocal"]


class LiveStorages(TorchDispatchMode):
    """Adds up the bytes of all storages from when an operation returns them until they are freed.

    Attributes:
        live, peak: bytes now, and the most at any time.
        flops: of matrix products, convolutions and attention, by `torch.utils.flop_counter`.
        read: where a number was read from a tensor, for which a GPU would be waited for. Tensors without contents
            answer 0.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = self.flops = 0
        self.read: list[str] = []
        self._alive: set[int] = set()
        for tensor in known:
            self.add(tensor)

    def add(self, tensor: Tensor) -> None:
        """Count the storage of a tensor, once."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        self._alive.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._freed, key, size).atexit = False

    def _freed(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.live -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # most calls are this one, and the usual way is slow
        if func is aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            self.read.append(_place())
            return 0.0 if args[0].dtype.is_floating_point else 0
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, (tuple, list)) else (output,):
            if isinstance(tensor, Tensor):
                self.add(tensor)
        self.flops += _flops(func, args, kwargs or {}, output)
        return output


def _flops(func: Any, args: Any, kwargs: Any, output: Any) -> int:
    if func is FLASH:
        return sdpa_flop_count(*(x.shape for x in args[:3]))
    if func is FLASH_BACKWARD:
        return sdpa_backward_flop_count(*(x.shape for x in args[:4]))
    formula = flop_registry.get(func._overloadpacket)
    return formula(*args, **kwargs, out_val=output) if formula else 0


def _place() -> str:
    """File and function of the caller that is not PyTorch's."""
    for frame in reversed(traceback.extract_stack()):
        if "/torch/" not in frame.filename and frame.filename != __file__:
            return f"{Path(frame.filename).name}:{frame.lineno} in {frame.name}: {frame.line}"
    return "unknown"


@contextlib.contextmanager
def cuda_autocast_rules() -> Iterator[None]:
    """Inside, autocast on a CPU leaves in float32 what CUDA's does, such as the output of every normalization."""

    def in_float32(name: str) -> Callable[..., Any]:
        packet, _, overload = name.partition(".")
        func = getattr(getattr(aten, packet), overload or "default")
        own = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)

        def run(*args: Any, **kwargs: Any) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(own):
                low = (torch.bfloat16, torch.float16)
                cast = [x.float() if isinstance(x, Tensor) and x.dtype in low else x for x in args]
                return func(*cast, **kwargs)

        return run

    with torch.library._scoped_library("aten", "IMPL") as library:
        for name in FLOAT32_UNDER_CUDA:
            library.impl(name, in_float32(name), "AutocastCPU")
        yield


@contextlib.contextmanager
def kernels_left_out(counter: LiveStorages) -> Iterator[None]:
    """Inside, Triton's kernels count as usable and do nothing but add their matrix products to the count.

    Raises:
        AptError: Triton is not installed, so the code around its kernels cannot be run.
    """

    def alignment(_kernel: Any, _grid: Any, q: Tensor, k: Tensor, *_others: Any, **constants: Any) -> None:
        products = 4 if constants["GRADIENTS"] else 2  # both models' scores, the gradients by q and by k
        counter.flops += products * 2 * q.numel() * k.shape[1]

    def nothing(*_arguments: Any, **_constants: Any) -> None:
        pass

    if importlib.util.find_spec("triton") is None:
        raise AptError("fused cannot be counted here: the package triton is not installed; name others by --methods")
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch("apt_hooks.method.ops.triton_choice.unavailable", lambda device: None))
        for module in ("attention_alignment", "channel_statistics"):
            stack.enter_context(mock.patch(f"apt_hooks.method.ops.{module}._trial", lambda *_: None))
        stack.enter_context(mock.patch("apt_hooks.method.ops.attention_alignment_triton._launch", alignment))
        stack.enter_context(mock.patch("apt_hooks.method.ops.channel_statistics_triton._launch", nothing))
        yield


class Count(NamedTuple):
    """Of one step: bytes alive before it, the most during it and after it; operations; where numbers were read."""

    before: int
    peak: int
    after: int
    flops: float
    read: tuple[str, ...]


def count_step(method: Method, training: Training, *, kernels: bool = False) -> Count:
    """One step of a method, or the steps of its period; `kernels`: it calls Triton's."""
    inputs = tree_leaves([training.noisy, training.target, training.timesteps, training.inputs])
    counter = LiveStorages([*training.unet.parameters(), *inputs])
    before = counter.live
    with kernels_left_out(counter) if kernels else contextlib.nullcontext(), method.prepared(), _collecting_nothing():
        with counter:
            for _ in range(method.period):
                training.drop_gradients()
                method.step()
        training.drop_gradients()
        return Count(before, counter.peak, counter.live, counter.flops / method.period, tuple(counter.read))


@contextlib.contextmanager
def _collecting_nothing() -> Iterator[None]:
    """Without garbage collection, whose time is not the same in two runs: what is part of a cycle stays alive."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def without_contents(setting: Setting) -> Iterator[Any]:
    """The U-Net with weights that have no contents; inside, all tensors are made so."""
    unet = make_denoiser(setting, "meta")
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in unet.modules():
            for name, parameter in module.named_parameters(recurse=False):
                own = torch.empty_like(parameter, device="cpu")
                module.register_parameter(name, nn.Parameter(own, requires_grad=parameter.requires_grad))
        yield unet


def count(setting: Setting, methods: Sequence[str], extras: Mapping[str, AptConfig]) -> dict[str, Count]:
    """Each method's step, counted on its own."""
    with cuda_autocast_rules(), without_contents(setting) as unet:
        training = Training.make(unet, setting)
        return count_methods(training, methods, extras)


def count_methods(training: Training, methods: Sequence[str], extras: Mapping[str, AptConfig]) -> dict[str, Count]:
    """As `count`, with a U-Net and a batch that are there, of either kind."""
    found = {}
    for name in [*methods, *extras]:
        own = {name: extras[name]} if name in extras else {}
        kernels = (own[name].attention_impl if own else CONFIGS.get(name, {}).get("attention_impl")) == "triton"
        method = make_methods([] if own else [name], own, training)[name]
        found[name] = count_step(method, training, kernels=kernels)
    return found
