"""SD 3 and SD 3.5 in diffusers: joint blocks, picture first, no rotary embedding, norms in 3.5 only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from torch import nn

from ..layout import Layout, Source, Tap, Told, arguments
from . import joint_attention
from .joint_attention import Block, Joint

NAME = "SD 3 in diffusers"


def is_one(model: nn.Module) -> bool:
    """Whether there are joint blocks and no single ones, over a picture that is embedded in patches."""
    blocks: Any = getattr(model, "transformer_blocks", None)
    return (
        bool(blocks)
        and not hasattr(model, "single_transformer_blocks")
        and hasattr(getattr(model, "pos_embed", None), "proj")
        and hasattr(getattr(blocks[0], "attn", None), "add_k_proj")
    )


def preset(model: nn.Module) -> str:
    """Its preset."""
    return "sd35"


def layout(model: nn.Module, blocks: Literal["auto"] | Sequence[int], source: Source) -> Layout:
    """Blocks by their place in `transformer_blocks`."""
    return joint_attention.layout(list(_blocks(model)), blocks, source)


def _blocks(model: Any) -> Iterator[Block]:
    patch = int(model.pos_embed.patch_size)

    def lengths(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Joint:
        given = arguments(model, args, kwargs)
        height, width = given["hidden_states"].shape[-2:]
        return Joint((height // patch) * (width // patch), given["encoder_hidden_states"].shape[1], text_first=False)

    told = Told(model, lengths)
    for i, block in enumerate(model.transformer_blocks):
        own, attention = f"transformer_blocks.{i}", block.attn
        queries = "to_q" if attention.norm_q is None else "norm_q"
        keys = "add_k_proj" if attention.norm_added_k is None else "norm_added_k"
        yield Block(
            Tap(f"{own}.attn.{queries}", attention.get_submodule(queries)),
            Tap(f"{own}.attn.{keys}", attention.get_submodule(keys)),
            int(attention.heads),
            attention.to_q.out_features // int(attention.heads),
            Tap(f"{own}.attn", attention),
            Tap(own, block, select=1),  # the text comes first
            (told,),
            lambda told: told[0],
        )
