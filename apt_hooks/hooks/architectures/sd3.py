"""SD 3 and SD 3.5 in diffusers: joint blocks, picture first, no rotary embedding, norms in 3.5 only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from torch import nn

from ..layout import Layout, Source, Told
from . import joint_attention
from .joint_attention import Block, Lengths

LOOKED_FOR = "transformer_blocks with an attn.add_k_proj behind a pos_embed.proj"


def is_one(model: nn.Module) -> bool:
    """Whether there are joint blocks and no single ones, over a picture that is embedded in patches."""
    blocks: Any = getattr(model, "transformer_blocks", None)
    return (
        bool(blocks)
        and not hasattr(model, "single_transformer_blocks")
        and hasattr(getattr(model, "pos_embed", None), "proj")
        and hasattr(getattr(blocks[0], "attn", None), "add_k_proj")
    )


def layout(model: nn.Module, blocks: Literal["auto"] | Sequence[int], source: Source) -> Layout:
    """Blocks by their place in `transformer_blocks`; "auto" as in `joint_attention`."""
    patch = int(model.pos_embed.patch_size)  # type: ignore[union-attr, arg-type]

    def lengths(args: tuple[Any, ...], kwargs: Any) -> Lengths:
        picture, text = joint_attention.picture_and_text(args, kwargs)
        return Lengths((picture.shape[-2] // patch) * (picture.shape[-1] // patch), text.shape[1])

    return joint_attention.layout(list(_blocks(model)), blocks, source, [Told(model, lengths)], text_first=False)


def _blocks(model: Any) -> Iterator[Block]:
    for i, block in enumerate(model.transformer_blocks):
        queries = "to_q" if block.attn.norm_q is None else "norm_q"
        keys = "add_k_proj" if block.attn.norm_added_k is None else "norm_added_k"
        yield Block(f"transformer_blocks.{i}", block, block.attn, queries, keys)
