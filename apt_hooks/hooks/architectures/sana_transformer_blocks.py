"""Sana in diffusers: `transformer_blocks` of a linear self-attention `attn1` and a true cross-attention `attn2`; norms
are over all heads, or there are none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import nn

from ..layout import Layout, Source
from . import cross_attention

NAME = "Sana in diffusers"


def is_one(model: nn.Module) -> bool:
    """Whether there are blocks of two attentions, over a picture in patches and a caption, projected and normed."""
    blocks: Any = getattr(model, "transformer_blocks", None)
    return (
        bool(blocks)
        and all(hasattr(model, part) for part in ("patch_embed", "caption_projection", "caption_norm"))
        and all(hasattr(blocks[0], part) for part in ("attn1", "attn2"))
    )


def preset(model: nn.Module) -> str:
    """Its preset."""
    return "sana"


def layout(model: nn.Module, blocks: Literal["auto"] | Sequence[int], source: Source) -> Layout:
    """Blocks by their place in `transformer_blocks`."""
    return cross_attention.layout(model, blocks, source, "encoder_attention_mask")
