"""Cosmos-Predict2 in diffusers, which Anima is made of: `transformer_blocks` of an `attn1` and a true cross-attention
`attn2`, norms by head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from ..layout import AttentionPoint, HiddenPoint, Layout, Source, Tap, Told, arguments
from .block_choice import select

NAME = "Cosmos-Predict2 in diffusers"


def is_one(model: nn.Module) -> bool:
    """Whether there are blocks of two attentions that norm their queries, over a picture in patches."""
    blocks: Any = getattr(model, "transformer_blocks", None)
    return (
        bool(blocks)
        and hasattr(model, "patch_embed")
        and all(getattr(getattr(blocks[0], part, None), "norm_q", None) is not None for part in ("attn1", "attn2"))
    )


def preset(model: nn.Module) -> str:
    """Its preset."""
    return "anima"


def layout(model: nn.Module, blocks: Literal["auto"] | Sequence[int], source: Source) -> Layout:
    """Blocks by their place in `transformer_blocks`."""
    found: Any = model.transformer_blocks

    def mask(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
        given: Tensor | None = arguments(model, args, kwargs).get("attention_mask")
        return None if given is None else given.bool()

    def read(x: Tensor, told: tuple[Any, ...]) -> Tensor:
        return x.transpose(1, 2).flatten(2)  # heads are first

    told = Told(model, mask)
    attention, hidden, numbers = [], [], select(len(found), blocks, found[0].attn2.to_q.out_features)
    for number in numbers:
        block, name = found[number], f"transformer_blocks.{number}"
        cross = block.attn2
        queries = Tap(f"{name}.attn2.norm_q", cross.norm_q, read=read)
        keys = Tap(f"{name}.attn2.norm_k", cross.norm_k, read=read)
        scale = (cross.to_q.out_features // cross.heads) ** -0.5
        attention.append(
            AttentionPoint(f"{name}.attn2", queries, keys, cross.heads, scale, lambda told: told[0], (told,))
        )
        part = {"block": "", "self_attention": ".attn1", "cross_attention": ".attn2"}[source]
        tap = Tap(f"{name}{part}", model.get_submodule(f"{name}{part}"))
        hidden.append(HiddenPoint(tap.name, tap))
    return Layout(attention, hidden, numbers)
