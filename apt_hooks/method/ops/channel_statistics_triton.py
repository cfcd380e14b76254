"""Mean and standard deviation of each channel in Triton, from one pass over a hidden state in its own dtype."""

# mypy: allow-untyped-defs
# (Triton reads a kernel's annotations itself.)

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2048
"""Numbers of a tile: 16 for each of a program's 128 threads."""

CHANNELS_SIDE_BY_SIDE = 64
"""Channels of a tile where neighbours in memory are channels: 128 bytes of a 16-bit dtype."""

MOST_SPLITS = 64
FEWEST_STEPS = 4
"""Programs that share the positions of a channel at most, and the tiles that each goes through at least."""

SMALLEST_VARIANCE = tl.constexpr(1e-12)  # that of `losses.representation_statistics`


def mean_and_deviation(h: Tensor) -> Tensor:
    """`losses.representation_statistics` without a graph, and without a float32 copy of `h`.

        mean = sum(h) / positions,  deviation = sqrt(max(sum((h - mean)^2) / positions, 1e-12))

    By Welford's updates, whose parts are merged as by Chan et al.: stable where the mean is large beside the deviation,
    and bitwise the same from run to run.

    Args:
        h: [batch, positions, channels], or [batch, channels, height, width], contiguous or in channels_last (any other
            strides of it cost a copy, in its own dtype); float32, bfloat16 or float16.

    Returns:
        [2, batch, channels] in float32: means, and population standard deviations.
    """
    h = h.detach()
    rows = h if h.ndim == 3 else h.flatten(2).transpose(1, 2)
    batch, positions, channels = rows.shape
    block_c = min(CHANNELS_SIDE_BY_SIDE, triton.next_power_of_2(channels)) if rows.stride(2) == 1 else 4
    block_p = TILE // block_c
    tiles = triton.cdiv(positions, block_p)
    steps = max(FEWEST_STEPS, triton.cdiv(tiles, MOST_SPLITS))
    splits = triton.cdiv(tiles, steps)
    partial = torch.empty((2, splits, batch, channels), dtype=torch.float32, device=h.device)
    statistics = torch.empty((2, batch, channels), dtype=torch.float32, device=h.device)
    _launch(
        _partial_statistics,
        (splits, triton.cdiv(channels, block_c), batch),
        *(rows, partial, positions, channels, steps, *rows.stride()),
        BLOCK_P=block_p,
        BLOCK_C=block_c,
        num_warps=4,
        enable_fp_fusion=False,  # either would do, but Triton 3.9 warns of its own choice
    )
    _launch(
        _merged_statistics,
        (triton.cdiv(channels, 32), batch),
        *(rows, partial, statistics, positions, channels, splits, steps * block_p, *rows.stride()),
        BLOCK_S=triton.next_power_of_2(splits),
        BLOCK_C=32,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return statistics


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """The one place where this module starts a kernel; the first argument's device is where it runs."""
    with torch.cuda.device(arguments[0].device) if arguments[0].is_cuda else contextlib.nullcontext():
        kernel[grid](*arguments, **constants)


# Both kernels see h less a number near its channel's mean: rounding is then of the size of the deviation, not of the
# mean, and a channel that is constant comes out exactly so.


@triton.jit
def _origin(at, positions, position_stride, inside):
    """The median of the first, a middle and the last position: one that lies far from the others is not taken."""
    last = at + (positions - tl.full([1], 1, tl.int64)) * position_stride
    middle = at + (positions - tl.full([1], 1, tl.int64)) // 2 * position_stride
    x = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(middle, mask=inside, other=0.0).to(tl.float32)
    z = tl.load(last, mask=inside, other=0.0).to(tl.float32)
    return tl.maximum(tl.minimum(x, y), tl.minimum(tl.maximum(x, y), z))


@triton.jit
def _partial_statistics(
    h,
    partial,
    positions,
    channels,
    steps,
    batch_stride,
    position_stride,
    channel_stride,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Mean and sum of squared distances from it over `steps` tiles of positions, for BLOCK_C channels of one sample."""
    split = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    sample = tl.program_id(2)
    h += sample.to(tl.int64) * batch_stride
    columns = h + channel.to(tl.int64) * channel_stride
    origin = _origin(columns, positions, position_stride, channel < channels)

    count = tl.zeros([BLOCK_P], tl.float32)
    mean = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for step in range(steps):
        position = (split * steps + step) * BLOCK_P + tl.arange(0, BLOCK_P)
        there = position < positions
        inside = there[:, None] & (channel < channels)[None, :]
        at = columns[None, :] + position.to(tl.int64)[:, None] * position_stride
        x = tl.load(at, mask=inside, other=0.0).to(tl.float32) - origin[None, :]
        change = tl.where(inside, x - mean, 0.0)
        mean += change * (1.0 / (step + 1))
        squares += change * tl.where(inside, x - mean, 0.0)
        count += there.to(tl.float32)

    mean, squares = _merge(count, mean, squares)
    rows = (split.to(tl.int64) * tl.num_programs(2) + sample) * channels
    all_rows = tl.num_programs(0).to(tl.int64) * tl.num_programs(2) * channels
    tl.store(partial + rows + channel, mean, mask=channel < channels)
    tl.store(partial + all_rows + rows + channel, squares, mask=channel < channels)


@triton.jit
def _merged_statistics(
    h,
    partial,
    statistics,
    positions,
    channels,
    splits,
    positions_each,
    batch_stride,
    position_stride,
    channel_stride,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    sample = tl.program_id(1)
    batch = tl.num_programs(1)
    split = tl.arange(0, BLOCK_S)
    inside = (split < splits)[:, None] & (channel < channels)[None, :]
    at = partial + (split[:, None] * batch + sample).to(tl.int64) * channels + channel[None, :]
    mean = tl.load(at, mask=inside, other=0.0)
    squares = tl.load(at + batch.to(tl.int64) * splits * channels, mask=inside, other=0.0)
    count = tl.minimum(tl.maximum(positions - split * positions_each, 0), positions_each).to(tl.float32)
    mean, squares = _merge(count, mean, squares)

    first = h + sample.to(tl.int64) * batch_stride + channel.to(tl.int64) * channel_stride
    origin = _origin(first, positions, position_stride, channel < channels)
    deviation = tl.sqrt_rn(tl.maximum(squares / positions, SMALLEST_VARIANCE))
    out = statistics + sample.to(tl.int64) * channels + channel
    tl.store(out, origin + mean, mask=channel < channels)
    tl.store(out + batch.to(tl.int64) * channels, deviation, mask=channel < channels)


@triton.jit
def _merge(count, mean, squares):
    """Along the first axis: those of all from each one's count, mean and sum of squared distances from its mean."""
    total = tl.sum(count, axis=0)
    merged = tl.sum(count[:, None] * mean, axis=0) / total
    distance = mean - merged[None, :]
    return merged, tl.sum(squares, axis=0) + tl.sum(count[:, None] * distance * distance, axis=0)
