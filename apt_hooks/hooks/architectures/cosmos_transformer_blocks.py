"""Cosmos-Predict2 in diffusers, which Anima is made of: `transformer_blocks` of an `attn1` and a true cross-attention
`attn2`, norms by head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn

from ..layout import Layout, Source
from . import cross_attention

NAME = "Cosmos-Predict2 in diffusers"


def is_one(model: nn.Module) -> bool:
    """Whether there are blocks of two attentions that norm their queries, over a picture in patches with a rotary
    embedding."""
    blocks: Any = getattr(model, "transformer_blocks", None)
    return (
        bool(blocks)
        and all(hasattr(model, part) for part in ("patch_embed", "rope"))
        and all(getattr(getattr(blocks[0], part, None), "norm_q", None) is not None for part in ("attn1", "attn2"))
    )


def preset(model: nn.Module) -> str:
    """Its preset."""
    return "anima"


def layout(model: nn.Module, blocks: Literal["auto"] | Sequence[int], source: Source) -> Layout:
    """Blocks by their place in `transformer_blocks`."""

    def read(x: Tensor, told: tuple[Any, ...]) -> Tensor:
        return x.transpose(1, 2).flatten(2)  # heads are first

    return cross_attention.layout(model, blocks, source, "attention_mask", read)
