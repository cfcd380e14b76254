"""Qwen-Image in diffusers: double blocks alone; text first, a rotary embedding for each of the two."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import nn

from ..layout import Layout, Source, Tap
from . import joint_attention
from .joint_attention import Block, Joint
from .joint_sequence import lengths, rotary
from .rotary_embedding import pairs

NAME = "Qwen-Image in diffusers"


def is_one(model: nn.Module) -> bool:
    """Whether there are double blocks that modulate picture and text, under the embedders of Qwen-Image."""
    blocks: Any = getattr(model, "transformer_blocks", None)
    return (
        bool(blocks)
        and all(hasattr(model, part) for part in ("img_in", "txt_in", "txt_norm"))
        and all(hasattr(blocks[0], part) for part in ("img_mod", "txt_mod"))
        and hasattr(getattr(blocks[0], "attn", None), "add_k_proj")
    )


def preset(model: nn.Module) -> str:
    """Its preset."""
    return "qwen_image"


def layout(model: nn.Module, blocks: Literal["auto"] | Sequence[int], source: Source) -> Layout:
    """Blocks by their place in `transformer_blocks`."""
    return joint_attention.layout(list(_blocks(model)), blocks, source)


def _blocks(model: Any) -> Iterator[Block]:
    def joint(told: tuple[Any, ...]) -> Joint:
        (image, text, mask), (of_image, of_text) = told  # of each: [positions, pairs], complex
        turns = torch.cat([of_text, of_image])[None]
        return Joint(image, text, mask=mask, rotary=(pairs(turns.real), pairs(turns.imag)))

    whole = lengths(model, "encoder_hidden_states_mask")
    for i, block in enumerate(model.transformer_blocks):
        own, attention = f"transformer_blocks.{i}", block.attn
        yield Block(
            Tap(f"{own}.attn.norm_q", attention.norm_q),
            Tap(f"{own}.attn.norm_added_k", attention.norm_added_k),
            int(attention.heads),
            attention.to_q.out_features // int(attention.heads),
            Tap(f"{own}.attn", attention),
            Tap(own, block, select=1),  # text comes first
            (whole, rotary(attention)),
            joint,
            heads_first=False,
        )
