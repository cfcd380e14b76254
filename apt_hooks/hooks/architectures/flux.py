"""FLUX.1 in diffusers: double blocks, then single blocks; text first, rotary embedding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from torch import nn

from ..layout import Layout, Source, Told
from . import joint_attention
from .joint_attention import Block, Lengths

LOOKED_FOR = "transformer_blocks and single_transformer_blocks behind a time_text_embed"


def is_one(model: nn.Module) -> bool:
    """Whether there are double and single blocks, and the embedders of FLUX.1."""
    parts = ("transformer_blocks", "single_transformer_blocks", "time_text_embed", "context_embedder", "pos_embed")
    return all(hasattr(model, part) for part in parts)


def layout(model: nn.Module, blocks: Literal["auto"] | Sequence[int], source: Source) -> Layout:
    """Blocks counted through, the single ones behind the double ones; "auto" as in `joint_attention`."""

    def lengths(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Lengths:
        picture, text = joint_attention.picture_and_text(args, kwargs)
        return Lengths(picture.shape[1], text.shape[1])

    told = Told(model, lengths)
    return joint_attention.layout(list(_blocks(model)), blocks, source, [told], lambda call: call["image_rotary_emb"])


def _blocks(model: Any) -> Iterator[Block]:
    for i, block in enumerate(model.transformer_blocks):
        yield Block(f"transformer_blocks.{i}", block, block.attn, "norm_q", "norm_added_k")
    for i, block in enumerate(model.single_transformer_blocks):
        yield Block(f"single_transformer_blocks.{i}", block, block.attn, "norm_q", "norm_k")
