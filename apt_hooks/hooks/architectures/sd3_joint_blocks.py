"""SD 3 and SD 3.5 as their authors wrote them: `joint_blocks`, without rotary embedding.

Both blocks project on their own, so what is read is the picture's or the text's alone. The second attention of 3.5
medium's first blocks is over the picture alone and is not compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import nn

from ..layout import AttentionPoint, HiddenPoint, Layout, Source, Tap, flat
from .transformer_block_choice import select

NAME = "SD 3"


def is_one(model: nn.Module) -> bool:
    """Whether there are joint blocks."""
    blocks: Any = getattr(model, "joint_blocks", None)
    return bool(blocks) and hasattr(blocks[0], "x_block") and hasattr(blocks[0], "context_block")


def preset(model: nn.Module) -> str:
    """Its preset."""
    return "sd35"


def layout(model: nn.Module, blocks: Literal["auto"] | Sequence[int], source: Source) -> Layout:
    """Blocks by their place in `joint_blocks`."""
    found: Any = model.joint_blocks
    width = found[0].x_block.attn.proj.in_features
    attention, hidden, numbers = [], [], select(len(found), blocks, width)
    for number in numbers:
        block, name = found[number], f"joint_blocks.{number}"
        own, text = block.x_block.attn, block.context_block.attn
        queries = Tap(f"{name}.x_block.attn.ln_q", own.ln_q, read=flat)
        keys = Tap(f"{name}.context_block.attn.ln_k", text.ln_k, read=flat)
        attention.append(AttentionPoint(f"{name}.attn", queries, keys, own.num_heads, own.head_dim**-0.5))
        output = Tap(f"{name}.x_block.attn.proj", own.proj)
        tap = Tap(name, block, select=1) if source == "block" else output  # which gives (text, picture)
        hidden.append(HiddenPoint(tap.name, tap))
    return Layout(attention, hidden, numbers)
