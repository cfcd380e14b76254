"""What the regularizers cost in a training step at the very least, from the shapes of the layers they compare."""

from __future__ import annotations

import functools
from typing import NamedTuple

from step_models import DTYPES, Setting, make_denoiser

from apt_hooks.hooks.architectures import unet_up_blocks
from apt_hooks.hooks.architectures.unet_common import select


class Least(NamedTuple):
    """What something costs at least, in a training step."""

    read_and_written: int
    flops: int


def least_alignment(batch: int, queries: int, tokens: int, width: int, size: int) -> Least:
    """Attention alignment of one layer: each input read once, each gradient written once, no map ever stored.

        bytes = size * batch * width * (3 * queries + 3 * tokens)         q, k of both models, and two gradients
        FLOPs = 8 * batch * queries * tokens * width                      four matrix products: q k^T of both models,
                                                                          and the gradients by q and by k

    Args:
        queries, tokens: positions of the feature map, tokens of the caption.
        width: heads * channels of a head.
        size: bytes of a number.
    """
    return Least(size * batch * width * 3 * (queries + tokens), 8 * batch * queries * tokens * width)


def least_statistics(batch: int, positions: int, width: int, size: int) -> Least:
    """Channel statistics of one layer: both models' hidden states read once, and once more for the gradient.

        bytes = size * batch * width * 4 * positions                      frozen; tuned; tuned again, its gradient
        FLOPs = 8 * batch * width * positions                             sum and sum of squares (3 operations) of
                                                                          both, and 2 for the gradient

    Args:
        positions: of the feature map.
        width: channels.
        size: bytes of a number.
    """
    return Least(size * batch * width * 4 * positions, 8 * batch * width * positions)


def least(setting: Setting) -> dict[str, Least]:
    """Both regularizers over all layers that are compared by default."""
    size, found = DTYPES[setting.dtype].itemsize, {}
    for name, layers in _compared_layers(setting.model).items():
        costs = []
        for shrunk, width in layers:
            positions = (setting.px // 8 // shrunk) ** 2
            if name == "alignment":
                costs.append(least_alignment(setting.batch, positions, setting.tokens, width, size))
            else:
                costs.append(least_statistics(setting.batch, positions, width, size))
        found[name] = Least(*(sum(column) for column in zip(*costs, strict=True)))
    return found


@functools.cache
def _compared_layers(model: str) -> dict[str, list[tuple[int, int]]]:
    """For either regularizer by how much each layer's feature map is smaller than the latents, and its width."""
    unet = make_denoiser(Setting(model, 64, 1, "float32", "off", 77), "meta")
    blocks, last = select(unet, unet_up_blocks.find(unet), "auto"), len(unet.config.block_out_channels) - 1
    return {
        "alignment": [(2 ** (last - b.index), int(m.inner_dim)) for b in blocks for _, m in b.cross_attention],  # type: ignore[arg-type]
        "statistics": [(2 ** (last - b.index), int(m.inner_dim)) for b in blocks for _, m in b.self_attention],  # type: ignore[arg-type]
    }
