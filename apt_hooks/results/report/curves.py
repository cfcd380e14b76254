"""Curves of few points from many steps, and of few lines from many bins."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Downsampled(NamedTuple):
    """Points of a curve, each from `each` steps that follow each other; NaN where none of these has a value."""

    steps: Tensor  # [points], the mean number
    mean: Tensor  # [points, columns]; so are
    low: Tensor
    high: Tensor
    each: int


def downsample(steps: Tensor, values: Tensor, points: int) -> Downsampled:
    """Means, and lowest and highest values, of at most `points` pieces of a run.

    Args:
        steps: [lines].
        values: [lines, columns], NaN for none.
        points: at least 1; up to so many lines stay as they are.
    """
    each = math.ceil(len(steps) / points)
    if each <= 1:
        return Downsampled(steps, values, values, values, 1)
    missing = -len(steps) % each
    filled = torch.cat([values, values.new_full((missing, values.shape[1]), math.nan)]).view(-1, each, values.shape[1])
    numbers = torch.cat([steps.double(), steps.new_full((missing,), math.nan, dtype=torch.float64)]).view(-1, each)
    none = filled.isnan()
    low = filled.masked_fill(none, math.inf).amin(1).masked_fill(none.all(1), math.nan)
    high = filled.masked_fill(none, -math.inf).amax(1).masked_fill(none.all(1), math.nan)
    return Downsampled(numbers.nanmean(1).round().long(), filled.nanmean(1), low, high, each)


def smooth(values: Tensor, window: int) -> Tensor:
    """Means over `window` points around each: [points, columns]; at the ends over those that there are."""
    none = values.isnan()
    start = values.new_zeros(1, values.shape[1])
    sums = torch.cat([start, values.masked_fill(none, 0.0).cumsum(0)])
    counts = torch.cat([start, (~none).double().cumsum(0)])
    places, half = torch.arange(len(values)), window // 2
    left, right = (places - half).clamp(min=0), (places + window - half).clamp(max=len(values))
    return (sums[right] - sums[left]) / (counts[right] - counts[left])  # 0 / 0: NaN, where none has a value


def fold_bins(values: Tensor, most: int) -> tuple[Tensor, list[tuple[int, int]]]:
    """Bins that lie beside each other in at most `most` means: [lines, groups] from [lines, bins], NaN for none.

    Returns:
        The means, and each group's first and last bin, counted from 0.
    """
    bins = values.shape[1]
    each = math.ceil(bins / most)
    groups = [(first, min(first + each, bins) - 1) for first in range(0, bins, each)]
    if each == 1:
        return values, groups
    return torch.stack([values[:, first : last + 1].nanmean(1) for first, last in groups], dim=1), groups


def timesteps_of(groups: list[tuple[int, int]], bins: int) -> list[str]:
    """The range of timesteps of each group of bins, as text, out of the 1000 that the supported models have."""
    starts = [-(-1000 * b // bins) for b in range(bins + 1)]
    return [f"{starts[first]}-{starts[last + 1] - 1}" for first, last in groups]
