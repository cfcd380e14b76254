"""Krea 2 in diffusers: single-stream `transformer_blocks`, grouped queries, a gate behind the attention; text first,
fused from several layers of its encoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from torch import nn

from ..layout import Layout, Source, Tap
from . import joint_attention
from .joint_attention import Block
from .joint_sequence import lengths, rotary, text_first

NAME = "Krea 2 in diffusers"


def is_one(model: nn.Module) -> bool:
    """Whether there are blocks with a gate in their attention, and a fusion of the text's layers."""
    blocks: Any = getattr(model, "transformer_blocks", None)
    return bool(blocks) and hasattr(model, "text_fusion") and hasattr(getattr(blocks[0], "attn", None), "to_gate")


def preset(model: nn.Module) -> str:
    """Its preset."""
    return "krea2"


def layout(model: nn.Module, blocks: Literal["auto"] | Sequence[int], source: Source) -> Layout:
    """Blocks by their place in `transformer_blocks`."""
    return joint_attention.layout(list(_blocks(model)), blocks, source)


def _blocks(model: Any) -> Iterator[Block]:
    whole = lengths(model, "encoder_attention_mask")
    for i, block in enumerate(model.transformer_blocks):
        name, attention = f"transformer_blocks.{i}", block.attn
        yield Block(
            Tap(f"{name}.attn.norm_q", attention.norm_q),
            Tap(f"{name}.attn.norm_k", attention.norm_k),
            attention.num_heads,
            attention.head_dim,
            Tap(f"{name}.attn", attention),
            Tap(name, block),
            (whole, rotary(attention)),
            text_first,
            heads_first=False,
        )
