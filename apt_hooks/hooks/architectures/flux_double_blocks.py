"""FLUX.1 as its authors wrote it, and Chroma, which is made of it: `double_blocks`, then `single_blocks`.

Projections of queries, keys and values are fused; `norm` gives queries and keys, heads first. FLUX.1 has the text
first; Chroma has it last, and cut to the longest caption of the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from torch import nn

from ..layout import Layout, Source, Tap, Told, arguments
from . import joint_attention
from .joint_attention import Block, Joint, before
from .rotary_embedding import pairs

NAME = "FLUX.1 and Chroma"


def is_one(model: nn.Module) -> bool:
    """Whether there are double blocks with fused projections, and single ones."""
    blocks: Any = getattr(model, "double_blocks", None)
    return bool(blocks) and hasattr(getattr(blocks[0], "img_attn", None), "norm") and hasattr(model, "single_blocks")


def preset(model: nn.Module) -> str:
    """Its preset: Chroma has modulations of a network of their own."""
    return "chroma" if hasattr(model, "distilled_guidance_layer") else "flux"


def layout(model: nn.Module, blocks: Literal["auto"] | Sequence[int], source: Source) -> Layout:
    """Blocks counted through, the single ones behind the double ones."""
    return joint_attention.layout(list(_blocks(model)), blocks, source)


def _blocks(model: Any) -> Iterator[Block]:
    text_first = preset(model) == "flux"

    def of_model(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, Any]:
        given = arguments(model, args, kwargs)
        return given["img"].shape[1], given.get("txt_attention_mask") if text_first else None

    def of_block(block: nn.Module) -> Told:
        def told(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
            given = arguments(block, args, kwargs)
            return given["pe"].detach(), given.get("txt_seq_len")

        return Told(block, told)

    def joint(told: tuple[Any, ...]) -> Joint:
        (image, mask), (turns, lengths) = told  # turns: [batch, 1, positions, pairs, 2, 2], matrices
        text = turns.shape[2] - image
        if lengths is not None:
            mask = before(lengths, text)
        rotary = pairs(turns[:, 0, :, :, 0, 0]), pairs(turns[:, 0, :, :, 1, 0])
        return Joint(image, text, text_first, mask=None if mask is None else mask.bool(), rotary=rotary)

    whole = Told(model, of_model)
    for i, block in enumerate(model.double_blocks):
        own, heads, channels = f"double_blocks.{i}", block.num_heads, block.img_attn.proj.in_features // block.num_heads
        yield Block(
            Tap(f"{own}.img_attn.norm", block.img_attn.norm, select=0),
            Tap(f"{own}.txt_attn.norm", block.txt_attn.norm, select=1),
            heads,
            channels,
            Tap(f"{own}.img_attn.proj", block.img_attn.proj),
            Tap(own, block),
            (whole, of_block(block)),
            joint,
            heads_first=True,
        )
    for i, block in enumerate(model.single_blocks):
        own = f"single_blocks.{i}"
        yield Block(
            Tap(f"{own}.norm", block.norm, select=0),
            Tap(f"{own}.norm", block.norm, select=1),
            block.num_heads,
            block.hidden_dim // block.num_heads,
            Tap(f"{own}.linear2", block.linear2, of_input=True),  # attention's output, and the MLP's behind it
            Tap(own, block),
            (whole, of_block(block)),
            joint,
            heads_first=True,
        )
