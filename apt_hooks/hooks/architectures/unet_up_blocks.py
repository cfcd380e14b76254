"""U-Nets with `up_blocks`, modules that are called: diffusers', and sd-scripts' of SD 1.x and 2.x."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import nn

from ..layout import Layout, Source
from . import unet_common

NAME = "the U-Nets of SD 1.x and 2.x and of diffusers"


def is_one(model: nn.Module) -> bool:
    """Whether there are `up_blocks`."""
    return hasattr(model, "up_blocks")


def preset(model: nn.Module) -> str | None:
    """By the width of the text that it reads (`unet_common.TEXT_WIDTHS`)."""
    return unet_common.preset(model)


def layout(model: nn.Module, blocks: Literal["auto"] | Sequence[int], source: Source) -> Layout:
    """Blocks by their place in `up_blocks`; "auto", and the errors: `unet_common.select`."""
    return unet_common.layout(model, find(model), blocks, source)


def find(model: nn.Module) -> tuple[unet_common.UpBlock, ...]:
    """All up-blocks."""
    blocks: Any = model.up_blocks
    return tuple(_up_block(i, block) for i, block in enumerate(blocks))


def _up_block(index: int, block: nn.Module) -> unet_common.UpBlock:
    name, upsamplers = f"up_blocks.{index}", list(getattr(block, "upsamplers", None) or ())
    end = (f"{name}.upsamplers.0", upsamplers[0]) if upsamplers else (name, block)
    return unet_common.up_block(index, [(name, block)], end, bool(upsamplers))
