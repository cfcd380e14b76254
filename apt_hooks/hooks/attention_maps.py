"""Where words look: cross-attention maps from what a pass of a U-Net left behind, and how alike they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..method.ops.attention_alignment import attention_map
from .capture import Features
from .layout import AttentionPoint


@torch.no_grad()
def token_maps(layers: Sequence[AttentionPoint], features: Features, size: tuple[int, int]) -> Tensor:
    """What share of each position's attention each token gets: mean over heads and layers, brought to one size.

    Args:
        layers, features: of one `FeatureCapture` and one pass.
        size: height and width of the latents; layers have fewer positions in the same proportion.

    Returns:
        [batch, tokens, height, width], a sum of 1 over the tokens.
    """
    total = torch.zeros(())
    for i, layer in enumerate(layers):
        weights = _map(layer, features, i).mean(dim=1)
        height = round((weights.shape[1] * size[0] / size[1]) ** 0.5)
        maps = weights.transpose(1, 2).unflatten(2, (height, -1))
        maps = F.interpolate(maps, size=size, mode="bilinear")
        total = total + maps
    return total / len(layers)


@torch.no_grad()
def attention_shift(layers: Sequence[AttentionPoint], features: Features, base: Features) -> Tensor:
    """The share of a model's attention that lies elsewhere than the base model's, for the same latents and prompt.

        mean over layers, heads, positions of  1/2 sum over tokens of |A - A_base|

    Our measure of the attention collapse that DreamBlend (arXiv 2411.19390) tells of without one: 0 where the LoRA
    looks as the base does, 1 where no position attends to any token that it did.

    Returns:
        [batch], from 0 to 1.
    """
    shares = []
    for i, layer in enumerate(layers):
        difference = _map(layer, features, i) - _map(layer, base, i)
        shares.append(difference.abs().sum(dim=-1).mean(dim=(1, 2)) / 2)
    return torch.stack(shares).mean(dim=0)


def _map(layer: AttentionPoint, features: Features, i: int) -> Tensor:
    return attention_map(features.queries[i], features.keys[i], layer.heads, layer.scale, features.masks.get(i))
