"""HunyuanImage 2.1: `double_blocks` with a fused `img_attn_qkv`, then single ones; picture first, text not turned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from torch import nn

from ..layout import Layout, Source, Tap, Told, arguments
from . import joint_attention
from .joint_attention import Block, Joint, before

NAME = "HunyuanImage 2.1"


def is_one(model: nn.Module) -> bool:
    """Whether there are double blocks with fused projections of their own, and single ones."""
    blocks: Any = getattr(model, "double_blocks", None)
    return bool(blocks) and hasattr(blocks[0], "img_attn_qkv") and hasattr(model, "single_blocks")


def preset(model: nn.Module) -> str:
    """Its preset."""
    return "hunyuan_image"


def layout(model: nn.Module, blocks: Literal["auto"] | Sequence[int], source: Source) -> Layout:
    """Blocks counted through, the single ones behind the double ones."""
    return joint_attention.layout(list(_blocks(model)), blocks, source)


def _blocks(model: Any) -> Iterator[Block]:
    def of_block(block: nn.Module) -> Told:
        def told(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
            given = arguments(block, args, kwargs)
            return given["attn_params"], given["freqs_cis"]

        return Told(block, told)

    def joint(told: tuple[Any, ...]) -> Joint:
        ((of_batch, turns),) = told  # turns: cosines and sines, [positions, channels]
        image, text = of_batch.img_len, of_batch.max_seqlen - of_batch.img_len
        mask = before(of_batch.seqlens - image, text)
        return Joint(image, text, text_first=False, mask=mask, rotary=(turns[0][None], turns[1][None]))

    def block_of(name: str, block: Any, prefix: str, attention: Tap) -> Block:
        text = prefix.replace("img", "txt")
        queries, keys = f"{prefix}q_norm", f"{text}k_norm"
        return Block(
            Tap(f"{name}.{queries}", getattr(block, queries)),
            Tap(f"{name}.{keys}", getattr(block, keys)),
            block.heads_num,
            model.hidden_size // block.heads_num,
            attention,
            Tap(name, block),
            (of_block(block),),
            joint,
            heads_first=False,
        )

    for i, block in enumerate(model.double_blocks):
        name = f"double_blocks.{i}"
        yield block_of(name, block, "img_attn_", Tap(f"{name}.img_attn_proj", block.img_attn_proj))
    for i, block in enumerate(model.single_blocks):
        name = f"single_blocks.{i}"
        # Attention's output, and the MLP's behind it.
        yield block_of(name, block, "", Tap(f"{name}.linear2", block.linear2, of_input=True))
