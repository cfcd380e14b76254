"""FLUX.1 in diffusers: double blocks, then single blocks; text first, rotary embedding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from torch import nn

from ..layout import Layout, Source, Tap
from . import joint_attention
from .joint_attention import Block
from .joint_sequence import lengths, rotary, text_first

NAME = "FLUX.1 in diffusers"


def is_one(model: nn.Module) -> bool:
    """Whether there are double and single blocks, and the embedders of FLUX.1."""
    parts = ("transformer_blocks", "single_transformer_blocks", "time_text_embed", "context_embedder", "pos_embed")
    return all(hasattr(model, part) for part in parts)


def preset(model: nn.Module) -> str:
    """Its preset."""
    return "flux"


def layout(model: nn.Module, blocks: Literal["auto"] | Sequence[int], source: Source) -> Layout:
    """Blocks counted through, the single ones behind the double ones."""
    return joint_attention.layout(list(_blocks(model)), blocks, source)


def _blocks(model: Any) -> Iterator[Block]:
    of_model = lengths(model)
    for name, added in (("transformer_blocks", "norm_added_k"), ("single_transformer_blocks", "norm_k")):
        for i, block in enumerate(getattr(model, name)):
            own, attention = f"{name}.{i}", block.attn
            yield Block(
                Tap(f"{own}.attn.norm_q", attention.norm_q),
                Tap(f"{own}.attn.{added}", attention.get_submodule(added)),
                int(attention.heads),
                attention.to_q.out_features // int(attention.heads),
                Tap(f"{own}.attn", attention),
                Tap(own, block, select=1),  # text comes first
                (of_model, rotary(attention)),
                text_first,
            )
