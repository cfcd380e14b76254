"""T-LoRA (Soboleva et al. 2025, arXiv 2507.05964): a LoRA of fewer ranks the more noise there is.

For the tiny world alone, and no `objective` of `[apt]`: which ranks take part depends on the timestep in sampling too,
and what draws with LoRA files knows nothing of it. It would add the ranks that were trained at low noise alone at all
timesteps.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AptError
from ..hooks.frozen import all_modules


def active_rank(timesteps: Tensor, rank: int, least: int, num_train_timesteps: int = 1000) -> Tensor:
    """How many ranks take part: floor((rank - least) (T - t) / T) + least, at t = 0 all and at t = T `least`.

    Args:
        timesteps: [batch], from 0 to T, whole or not.

    Returns:
        [batch], whole numbers.
    """
    # The product first, which is exact: (T - t) / T may round a whole rank down.
    left = (rank - least) * (num_train_timesteps - timesteps.double())
    return (left / num_train_timesteps).floor().long() + least


@contextlib.contextmanager
def timestep_lora(
    module: nn.Module,
    *,
    least: int | None = None,
    orthogonal: bool = False,
    num_train_timesteps: int = 1000,
    seed: int = 0,
) -> Iterator[None]:
    """Inside, the LoRA on a denoiser is a T-LoRA, for training and for sampling alike; afterwards it is as it was.

    What the projections down give is masked by each sample's timestep, which is read from the denoiser's call: the
    first ranks stay. The authors' code takes a batch's first timestep for all of it; by sample is the same at their
    batch of one.

    Args:
        module: a denoiser of diffusers with a LoRA of peft's.
        least: ranks at t = T; None takes half of the rank, as the paper does for SDXL.
        orthogonal: also make the LoRA an Ortho-LoRA, to be trained from here on. Each is
            `up diag(s) down - up0 diag(s0) down0`, which begins at zero, of the last singular values and vectors of a
            random matrix, so that no two ranks say the same. What is on the denoiser is taken over, and of no use
            afterwards: the singular values `s`, `lora_singular_values`, leave with the context.
        seed: of the random matrices.

    Raises:
        AptError: there is no LoRA, or, with `orthogonal`, its rank is above what a layer has.
    """
    layers: list[Any] = [m for m in all_modules([module]) if isinstance(m._modules.get("lora_A"), nn.ModuleDict)]
    if not layers:
        raise AptError(f"looked for LoRA layers of peft in {type(module).__name__}, found none: put a LoRA on it first")
    masks = _Masks(least, num_train_timesteps)
    stream = torch.Generator().manual_seed(seed)
    with contextlib.ExitStack() as stack:
        signature = inspect.signature(module.forward)

        def read(_: nn.Module, args: Any, kwargs: Any) -> None:
            masks.begin(signature.bind_partial(*args, **kwargs).arguments["timestep"])

        stack.callback(module.register_forward_pre_hook(read, with_kwargs=True).remove)
        for layer in layers:
            for adapter, down in layer.lora_A.items():
                if orthogonal:
                    _make_orthogonal(down, layer.lora_B[adapter], masks, stream, stack)
                else:
                    stack.callback(down.register_forward_hook(lambda m, args, h: h * masks.of(h, m)).remove)
        yield


class _Masks:
    """Of one call of the denoiser: which ranks take part."""

    def __init__(self, least: int | None, num_train_timesteps: int) -> None:
        self._least, self._total = least, num_train_timesteps
        self._timesteps = torch.zeros(1)
        self._known: dict[int, Tensor] = {}

    def begin(self, timesteps: Any) -> None:
        self._timesteps, self._known = torch.as_tensor(timesteps).detach().reshape(-1), {}

    def of(self, low: Tensor, down: nn.Module) -> Tensor:
        """Ones and zeros that broadcast to what `down` gave, [batch, ..., rank] or [batch, rank, height, width]."""
        rank = len(down.weight)  # type: ignore[arg-type]
        if rank not in self._known:
            least = rank // 2 if self._least is None else min(self._least, rank)
            taking_part = active_rank(self._timesteps, rank, least, self._total)
            ranks = torch.arange(rank, device=taking_part.device)
            self._known[rank] = ranks < taking_part[:, None]
        mask = self._known[rank].to(low.device, low.dtype)
        between = [1] * (low.ndim - 2)
        return mask.reshape(-1, rank, *between) if isinstance(down, nn.Conv2d) else mask.reshape(-1, *between, rank)


def _make_orthogonal(
    down: nn.Module, up: nn.Module, masks: _Masks, stream: torch.Generator, stack: contextlib.ExitStack
) -> None:
    """Fill both projections, and have them compute `up diag(s) mask down - up0 diag(s0) mask down0`."""
    first, last = down.weight, up.weight
    assert isinstance(first, nn.Parameter) and isinstance(last, nn.Parameter)
    rank, outputs, inputs = len(first), len(last), first[0].numel()
    if rank > min(outputs, inputs):
        raise AptError(f"an orthogonal LoRA of rank {rank} needs layers as wide; found one of {inputs} to {outputs}")
    u, s, v = torch.linalg.svd(torch.randn(outputs, inputs, generator=stream) / rank, full_matrices=False)
    with torch.no_grad():
        first.copy_(v[-rank:].reshape(first.shape))
        last.copy_(u[:, -rank:].reshape(last.shape))
    shape = (-1, 1, 1) if isinstance(down, nn.Conv2d) else (-1,)
    values = nn.Parameter(s[-rank:].to(first))
    base_down, base_up = (copy.deepcopy(part).requires_grad_(False) for part in (down, up))
    base_values = values.detach().clone().reshape(shape)
    down.register_parameter("lora_singular_values", values)
    stack.callback(delattr, down, "lora_singular_values")
    held: list[Tensor] = []

    def scaled(module: nn.Module, args: tuple[Tensor], low: Tensor) -> Tensor:
        mask = masks.of(low, module)
        held[:] = [base_down(args[0]) * base_values * mask]
        return low * values.reshape(shape) * mask

    stack.callback(down.register_forward_hook(scaled).remove)
    stack.callback(up.register_forward_hook(lambda m, args, output: output - base_up(held.pop())).remove)
