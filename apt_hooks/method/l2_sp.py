"""How far a LoRA has moved the weights: L2-SP's penalty."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .ops.precision import full_precision


class LowRank(NamedTuple):
    """A change of one weight, `scale * up @ down`.

    Attributes:
        down: [rank, inputs, ...], of a convolution with its kernel.
        up: [outputs, rank, 1, ...].
    """

    down: Tensor
    up: Tensor
    scale: float


def weight_offset(changes: Sequence[LowRank]) -> Tensor:
    """Squared distance of the tuned model's weights from those that it began with.

        sum over the weights of ||scale * up @ down||_F^2 = scale^2 * sum((down down^T) * (up^T up))

    L2-SP (Li et al. 2018, arXiv 1802.01483), which Kim et al. (arXiv 2505.19519, "Preserve and Personalize") derive for
    personalization from a Lipschitz bound on the drift of what is drawn. Of two matrices of rank by rank, so that no
    change is ever formed; those of one shape at once. Computed in float32 (float64 if given that) under any autocast.

    Returns:
        Scalar; gradients reach `down` and `up`.
    """
    shapes: dict[tuple[object, ...], list[LowRank]] = {}
    for change in changes:
        shapes.setdefault((change.down.shape, change.up.shape, change.down.device), []).append(change)
    return torch.stack([_of_one_shape(alike).to(changes[0].down.device) for alike in shapes.values()]).sum()


def _of_one_shape(changes: Sequence[LowRank]) -> Tensor:
    device = changes[0].down.device
    with torch.autocast(device.type, enabled=False):
        down = torch.stack([full_precision(change.down).flatten(1) for change in changes])
        up = torch.stack([full_precision(change.up).flatten(1) for change in changes])
        scales = torch.tensor([change.scale for change in changes], dtype=down.dtype, device=device)
        products = (down @ down.mT) * (up.mT @ up)
        return (scales.square() * products.sum(dim=(1, 2))).sum()


def difference(now: LowRank, start: LowRank) -> LowRank:
    """What has changed between two changes of one weight and one scale, of twice their rank; exactly 0 where nothing.

    up down - up0 down0 = (up - up0) down + up0 (down - down0)
    """
    down = torch.cat([now.down, now.down - start.down])
    return LowRank(down, torch.cat([now.up - start.up, start.up], dim=1), now.scale)
