"""What transformers of diffusers have in common that attend to their text in a cross-attention `attn2` of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from ..layout import AttentionPoint, HiddenPoint, Layout, Read, Source, Tap, Told, arguments
from .joint_sequence import taking_part
from .transformer_block_choice import select


def layout(
    model: nn.Module, blocks: Literal["auto"] | Sequence[int], source: Source, mask: str, read: Read | None = None
) -> Layout:
    """The points of blocks by their place in `transformer_blocks`.

    Args:
        mask: the argument of the model that says which tokens are none, [batch, tokens].
        read: what queries and keys behind their norms, or projections where there are none, are read as.
    """
    found: Any = model.transformer_blocks

    def takes_part(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
        return taking_part(arguments(model, args, kwargs), mask)

    told = Told(model, takes_part)
    attention, hidden, numbers = [], [], select(len(found), blocks, found[0].attn2.to_q.out_features)
    for number in numbers:
        name, cross = f"transformer_blocks.{number}", found[number].attn2
        queries, keys = (
            Tap(f"{name}.attn2.{part}", cross.get_submodule(part), read=read)
            for part in (("norm_q", "norm_k") if cross.norm_q is not None else ("to_q", "to_k"))
        )
        scale = (cross.to_q.out_features // cross.heads) ** -0.5
        attention.append(
            AttentionPoint(f"{name}.attn2", queries, keys, cross.heads, scale, lambda told: told[0], (told,))
        )
        part = {"block": "", "self_attention": ".attn1", "cross_attention": ".attn2"}[source]
        tap = Tap(f"{name}{part}", model.get_submodule(f"{name}{part}"))
        hidden.append(HiddenPoint(tap.name, tap))
    return Layout(attention, hidden, numbers)
