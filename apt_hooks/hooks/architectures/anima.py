"""Anima, and what is built like it (Cosmos-Predict2): `blocks` of a `self_attn` and a `cross_attn`, norms by head.

A true cross-attention, without rotary embedding. Padded tokens are zeroed in the model and take part in its softmax;
they are no words, and are left out of what is compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from ..layout import AttentionPoint, HiddenPoint, Layout, Source, Tap, Told, arguments, flat
from .transformer_block_choice import select

NAME = "Anima"


def is_one(model: nn.Module) -> bool:
    """Whether there are blocks of two attentions that norm their queries."""
    blocks: Any = getattr(model, "blocks", None)
    return (
        isinstance(blocks, nn.ModuleList)
        and bool(blocks)
        and all(hasattr(getattr(blocks[0], part, None), "q_norm") for part in ("self_attn", "cross_attn"))
    )


def preset(model: nn.Module) -> str:
    """Its preset."""
    return "anima"


def layout(model: nn.Module, blocks: Literal["auto"] | Sequence[int], source: Source) -> Layout:
    """Blocks by their place in `blocks`."""
    found: Any = model.blocks

    def mask(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
        given: Tensor | None = arguments(model, args, kwargs).get("target_attention_mask")
        return None if given is None else given.bool()

    told = Told(model, mask)
    first = found[0].cross_attn
    attention, hidden, numbers = [], [], select(len(found), blocks, first.n_heads * first.head_dim)
    for number in numbers:
        block, name = found[number], f"blocks.{number}"
        cross = block.cross_attn
        queries = Tap(f"{name}.cross_attn.q_norm", cross.q_norm, read=flat)
        keys = Tap(f"{name}.cross_attn.k_norm", cross.k_norm, read=flat)
        scale = cross.head_dim**-0.5
        attention.append(
            AttentionPoint(f"{name}.cross_attn", queries, keys, cross.n_heads, scale, lambda told: told[0], (told,))
        )
        if source == "block":  # [batch, frames, height, width, channels]
            tap = Tap(name, block, read=lambda x, _: x.flatten(1, 3))
        else:
            part = {"self_attention": "self_attn", "cross_attention": "cross_attn"}[source]
            tap = Tap(f"{name}.{part}", getattr(block, part))
        hidden.append(HiddenPoint(tap.name, tap))
    return Layout(attention, hidden, numbers)
