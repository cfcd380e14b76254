"""Mean and standard deviation a channel, without a whole float32 copy of a hidden state."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..losses import full_precision, representation_statistics
from .choice import Impl, fault, takes_triton

CHUNK = 2**22
"""Numbers that the eager way casts at a time: 16 MiB in float32."""


@torch.no_grad()
def mean_and_deviation(h: Tensor, *, impl: Impl = "auto") -> Tensor:
    """`losses.representation_statistics` without a graph: [2, batch, channels] in float32 (float64 if given that).

    Args:
        h: [batch, positions, channels] or [batch, channels, height, width].
        impl: "eager" casts and merges pieces of the positions; "triton" is a kernel for CUDA that reads `h` once;
            "auto" takes Triton's where it can.

    Raises:
        AptError: another shape; or `impl` is "triton", and it cannot be used.
    """
    if h.ndim in (3, 4) and takes_triton(impl, h.device, functools.partial(_trial, h.dtype, h.ndim)):
        from .channel_statistics_triton import mean_and_deviation as fused

        return fused(h)
    if h.ndim not in (3, 4) or h.numel() <= CHUNK:
        return representation_statistics(h)
    return _eager(h)


@functools.cache
def _trial(dtype: torch.dtype, ndim: int, device: torch.device) -> str | None:
    """Why Triton's kernel cannot do hidden states of this kind on this device; found out by having it do some."""
    from .channel_statistics_triton import mean_and_deviation as fused

    if dtype == torch.float64:
        return "its kernel does no float64"
    shape = (2, 300, 80) if ndim == 3 else (2, 80, 15, 20)
    h = (3 + torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(device, dtype)
    return fault(lambda: fused(h).unbind(), representation_statistics(h).unbind())


def _eager(h: Tensor) -> Tensor:
    first = 1 if h.ndim == 3 else 2
    means, variances, shares = [], [], []
    for piece in h.split(max(1, CHUNK * h.shape[first] // h.numel()), dim=first):
        variance, mean = torch.var_mean(full_precision(piece), dim=1 if h.ndim == 3 else (2, 3), correction=0)
        means.append(mean)
        variances.append(variance)
        shares.append(piece.shape[first] / h.shape[first])
    mean = sum(share * m for share, m in zip(shares, means, strict=True))
    # The variance within the pieces, and that of their means.
    variance = sum(share * (v + (m - mean).square()) for share, v, m in zip(shares, variances, means, strict=True))
    return torch.stack([mean, variance.clamp_min(1e-12).sqrt()])
