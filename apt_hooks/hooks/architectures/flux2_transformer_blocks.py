"""FLUX.2 and FLUX.2 klein in diffusers: double blocks, then single ones whose projections are fused with the MLP's;
text first, rotary embedding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from torch import nn

from ..layout import Layout, Source, Tap
from . import joint_attention
from .joint_attention import Block
from .joint_sequence import lengths, rotary, text_first

NAME = "FLUX.2 in diffusers"


def is_one(model: nn.Module) -> bool:
    """Whether there are double and single blocks that share the modulations of FLUX.2."""
    parts = ("transformer_blocks", "single_transformer_blocks", "double_stream_modulation_img", "context_embedder")
    return all(hasattr(model, part) for part in parts)


def preset(model: nn.Module) -> str:
    """Its preset."""
    return "flux2"


def layout(model: nn.Module, blocks: Literal["auto"] | Sequence[int], source: Source) -> Layout:
    """Blocks counted through, the single ones behind the double ones."""
    return joint_attention.layout(list(_blocks(model)), blocks, source)


def _blocks(model: Any) -> Iterator[Block]:
    def block_of(name: str, block: Any, keys: str, output: Tap) -> Block:
        attention = block.attn
        return Block(
            Tap(f"{name}.attn.norm_q", attention.norm_q),
            Tap(f"{name}.attn.{keys}", attention.get_submodule(keys)),
            attention.heads,
            attention.head_dim,
            output,
            Tap(name, block, select=1),  # text comes first
            (whole, rotary(attention)),
            text_first,
            heads_first=False,
        )

    whole = lengths(model)
    for i, block in enumerate(model.transformer_blocks):
        name = f"transformer_blocks.{i}"
        yield block_of(name, block, "norm_added_k", Tap(f"{name}.attn", block.attn))
    for i, block in enumerate(model.single_transformer_blocks):
        name = f"single_transformer_blocks.{i}"
        # Attention's output, and the MLP's behind it.
        yield block_of(name, block, "norm_k", Tap(f"{name}.attn.to_out", block.attn.to_out, of_input=True))
