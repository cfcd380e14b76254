"""RoPE, the rotary embedding of queries and keys (arXiv 2104.09864), of pairs of channels."""

from __future__ import annotations

import torch
from torch import Tensor


def pairs(angles: Tensor) -> Tensor:
    """[..., channels / 2] as [..., channels], each number for a pair of neighboring channels."""
    return angles.repeat_interleave(2, dim=-1)


def rotate_pairs(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """`x` in float32 with each pair of channels turned by its angle.

    Args:
        x: [..., channels].
        cosines, sines: broadcast to it; both of a pair alike.
    """
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-odd, even], dim=-1).flatten(-2)
    return (x.float() * cosines + turned * sines).to(x.dtype)


def rotate_halves(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """`rotate_pairs` where a pair is a channel of the first half and its like in the second; in `x`'s own precision."""
    first, second = x.chunk(2, dim=-1)
    return x * cosines + torch.cat([-second, first], dim=-1) * sines
