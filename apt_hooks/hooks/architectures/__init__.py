"""The known architectures, a short file each; a new one is added to `ALL`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import nn

from ...errors import AptError
from ..layout import Architecture, Layout, Source
from . import (
    anima,
    cosmos_transformer_blocks,
    flux2_transformer_blocks,
    flux_double_blocks,
    flux_transformer_blocks,
    hidream_stream_blocks,
    hunyuan_image,
    ideogram4_layers,
    krea2_transformer_blocks,
    lumina2,
    lumina2_transformer_layers,
    qwen_image_transformer_blocks,
    sana_transformer_blocks,
    sd3_joint_blocks,
    sd3_transformer_blocks,
    unet_sdxl_output_blocks,
    unet_up_blocks,
    z_image_layers,
)

ALL: tuple[Architecture, ...] = (
    unet_up_blocks,
    unet_sdxl_output_blocks,
    flux_transformer_blocks,
    sd3_transformer_blocks,
    flux2_transformer_blocks,
    qwen_image_transformer_blocks,
    z_image_layers,
    sana_transformer_blocks,
    lumina2_transformer_layers,
    hidream_stream_blocks,
    krea2_transformer_blocks,
    ideogram4_layers,
    cosmos_transformer_blocks,
    anima,
    flux_double_blocks,
    sd3_joint_blocks,
    lumina2,
    hunyuan_image,
)
"""The first whose `is_one` says so is taken."""


def architecture_of(model: nn.Module) -> Architecture | None:
    """The one that a model is of, if it is known."""
    return next((architecture for architecture in ALL if architecture.is_one(model)), None)


def layout_of(
    model: nn.Module, blocks: Literal["auto"] | Sequence[int] = "auto", source: Source = "self_attention"
) -> Layout:
    """The layout of a model of a known architecture.

    Args:
        blocks: their numbers, counted as the architecture's module says; "auto": its choice.
        source: which hidden states.

    Raises:
        AptError: the model is of none, or has not what was asked for.
    """
    architecture = architecture_of(model)
    if architecture is not None:
        return architecture.layout(model, blocks, source)
    children = ", ".join(name for name, _ in model.named_children()) or "no child modules"
    raise AptError(
        f"looked for the parts of a known denoiser in {type(model).__name__}, found {children}; known are "
        f"{', '.join(a.NAME for a in ALL)}: pass the U-Net or the transformer itself, or a layout of your own, or set "
        "lambda_dist and lambda_attn (lambda_joint) to 0, which need no hooks"
    )


def preset_of(model: nn.Module) -> str | None:
    """The preset that is for a model; None where that is not known."""
    architecture = architecture_of(model)
    return None if architecture is None else architecture.preset(model)
