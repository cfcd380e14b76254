"""Ideogram 4 in diffusers: single-stream `layers` over one packed sequence whose tokens say what they are; padding
first, then text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from torch import nn

from ...errors import AptError
from ..layout import Layout, Source, Tap, Told, arguments
from . import joint_attention
from .joint_attention import Block, Joint
from .joint_sequence import rotary
from .rotary_embedding import rotate_halves

NAME = "Ideogram 4 in diffusers"

_IMAGE, _TEXT = 2, 3
"""What `indicator` says of a token."""


def is_one(model: nn.Module) -> bool:
    """Whether there are layers, and embedders of the text and of what a token is."""
    return all(hasattr(model, part) for part in ("layers", "llm_cond_proj", "embed_image_indicator"))


def preset(model: nn.Module) -> str:
    """Its preset."""
    return "ideogram4"


def layout(model: nn.Module, blocks: Literal["auto"] | Sequence[int], source: Source) -> Layout:
    """Blocks by their place in `layers`."""
    return joint_attention.layout(list(_blocks(model)), blocks, source, "layers")


def _blocks(model: Any) -> Iterator[Block]:
    def of_model(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, Any]:
        indicator = arguments(model, args, kwargs)["indicator"]
        picture = indicator == _IMAGE
        image = int(picture[0].sum())
        text = indicator.shape[1] - image
        if not image or picture[:, :text].any() or not picture[:, text:].all():
            raise AptError("a packed sequence has to end with its picture, of one size in a batch")
        return image, indicator[:, :text] == _TEXT

    def joint(told: tuple[Any, ...]) -> Joint:
        (image, mask), (cosines, sines) = told
        return Joint(image, mask.shape[1], mask=mask, rotary=(cosines, sines), rotate=rotate_halves)

    whole = Told(model, of_model)
    for i, layer in enumerate(model.layers):
        name, attention = f"layers.{i}", layer.attention
        yield Block(
            Tap(f"{name}.attention.norm_q", attention.norm_q),
            Tap(f"{name}.attention.norm_k", attention.norm_k),
            attention.num_heads,
            attention.head_dim,
            Tap(f"{name}.attention", attention),
            Tap(name, layer),
            (whole, rotary(attention)),
            joint,
            heads_first=False,
        )
