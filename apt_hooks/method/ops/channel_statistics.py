"""Mean and standard deviation a channel: plain, and without a whole float32 copy of a hidden state."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ...errors import AptError
from .precision import full_precision
from .triton_choice import Impl, fault, takes_triton

CHUNK = 2**22
"""Numbers that the eager way casts at a time: 16 MiB in float32."""


def representation_statistics(h: Tensor, weights: Tensor | None = None) -> Tensor:
    """Channel-wise mean and standard deviation over positions: [2, batch, channels] from either shape of `h`.

    All that the frozen pass has to keep of a hidden state: 2 numbers a channel.

    Args:
        h: [batch, positions, channels] or [batch, channels, height, width].
        weights: [batch, positions, 1] or [batch, 1, height, width], what each position counts; None: all alike.

    Raises:
        AptError: neither 3-D nor 4-D.
    """
    if h.ndim not in (3, 4):
        raise AptError(
            f"h must be [batch, positions, channels] or [batch, channels, height, width]; found {tuple(h.shape)}"
        )
    with torch.autocast(h.device.type, enabled=False):
        positions = 1 if h.ndim == 3 else (2, 3)
        if weights is None:
            variance, mean = torch.var_mean(full_precision(h), dim=positions, correction=0)
        else:
            h, shares = full_precision(h), weights / weights.sum(positions, keepdim=True)
            mean = (shares * h).sum(positions, keepdim=True)
            variance = (shares * (h - mean).square()).sum(positions)
            mean = mean.reshape(variance.shape)
        # The square root has no gradient at 0; a constant channel gets none, not NaN.
        return torch.stack([mean, variance.clamp_min(1e-12).sqrt()])


def mean_and_deviation(h: Tensor, weights: Tensor | None = None, *, impl: Impl = "auto") -> Tensor:
    """`representation_statistics` without a graph: [2, batch, channels] in float32 (float64 if given that).

    Args:
        h: [batch, positions, channels] or [batch, channels, height, width].
        weights: as there; with weights the plain way is taken, whatever `impl` is.
        impl: "eager" casts and merges pieces of the positions; "triton" is a kernel for CUDA that reads `h` once;
            "auto" takes Triton's where it can.

    Raises:
        AptError: another shape; or `impl` is "triton", and it cannot be used.
    """
    if h.ndim not in (3, 4) or weights is not None:  # the plain way also says what is wrong
        return representation_statistics(h.detach(), weights)
    if takes_triton(impl, h.device, functools.partial(_trial, h.dtype, h.ndim)):
        from .channel_statistics_triton import mean_and_deviation as fused

        return fused(h)
    return _eager(h.detach())


@functools.cache
def _trial(dtype: torch.dtype, ndim: int, device: torch.device) -> str | None:
    """Why Triton's kernel cannot do hidden states of this kind on this device; found out by having it do some."""
    from .channel_statistics_triton import mean_and_deviation as fused

    if dtype == torch.float64:
        return "its kernel does no float64"
    shape = (2, 300, 80) if ndim == 3 else (2, 10, 50, 60)  # several splits, the last of them not full
    h = (3 + torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(device, dtype)
    return fault(lambda: fused(h).unbind(), representation_statistics(h).unbind())


def _eager(h: Tensor) -> Tensor:
    first, positions = (1, (1,)) if h.ndim == 3 else (2, (2, 3))
    means, variances, shares = [], [], []
    for piece in h.split(max(1, CHUNK * h.shape[first] // max(1, h.numel())), dim=first):
        # Not `torch.var_mean`, which on a CPU takes ten times as long.
        mean = piece.mean(positions, keepdim=True, dtype=torch.promote_types(h.dtype, torch.float32))
        variances.append((piece - mean).square_().mean(positions))
        means.append(mean.reshape(mean.shape[0], -1))
        shares.append(piece.shape[first] / h.shape[first])
    mean, variance = means[0], variances[0]
    if len(means) > 1:
        mean = _average(shares, means)
        # The variance within the pieces, and that of their means.
        variance = _average(shares, [v + (m - mean).square() for v, m in zip(variances, means, strict=True)])
    return torch.stack([mean, variance.clamp_min(1e-12).sqrt()])


def _average(shares: list[float], values: list[Tensor]) -> Tensor:
    return torch.stack([share * value for share, value in zip(shares, values, strict=True)]).sum(dim=0)


def gradient_of_statistics(
    statistics: Tensor, derivatives: Tensor, of_mean: float | Tensor, of_deviation: float | Tensor
) -> tuple[Tensor, Tensor]:
    """(a, b), such that the gradient of a function of the statistics by the hidden state h is a + b * h.

    Args:
        statistics: [2, ..., channels], mean and deviation of h.
        derivatives: [2, ..., channels], the function's by mean and deviation, over the number of positions.
        of_mean, of_deviation: what these are multiplied by.
    """
    mean, deviation = statistics
    by_mean, by_deviation = derivatives
    # A channel held at the least deviation (`representation_statistics`) has no gradient.
    slope = torch.where(deviation > 1e-6, by_deviation / deviation, 0.0) * of_deviation
    return by_mean * of_mean - slope * mean, slope
