"""U-Nets with `output_blocks`, a flat list of lists that are never called: Stability's, and sd-scripts' of SDXL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import nn

from ..layout import Layout, Source
from . import unet_common

NAME = "SDXL's U-Net"


def is_one(model: nn.Module) -> bool:
    """Whether there are `output_blocks`."""
    return hasattr(model, "output_blocks")


def preset(model: nn.Module) -> str | None:
    """By the width of the text that it reads (`unet_common.TEXT_WIDTHS`)."""
    return unet_common.preset(model)


def layout(model: nn.Module, blocks: Literal["auto"] | Sequence[int], source: Source) -> Layout:
    """Blocks by resolution, 0 the lowest: an upsampler ends each; "auto", and the errors: `unet_common.select`."""
    return unet_common.layout(model, find(model), blocks, source)


def find(model: nn.Module) -> tuple[unet_common.UpBlock, ...]:
    """All up-blocks."""
    found: list[unet_common.UpBlock] = []
    lists: Any = model.output_blocks
    parts: list[unet_common.Place] = []
    for i, modules in enumerate(lists):
        parts.append((f"output_blocks.{i}", modules))
        last_name, last = list(modules.named_children())[-1]
        upsamples = type(last).__name__.startswith("Upsample")
        if upsamples or i == len(lists) - 1:
            found.append(unet_common.up_block(len(found), parts, (f"output_blocks.{i}.{last_name}", last), upsamples))
            parts = []
    return tuple(found)
