"""Lumina 2 in diffusers: `layers` of a joint `attn`, grouped queries, and each sample's picture right behind its own
text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from torch import nn

from ..layout import Layout, Source, Tap, Told, arguments
from . import joint_attention
from .joint_attention import Block, Joint, before
from .joint_sequence import rotary
from .rotary_embedding import pairs

NAME = "Lumina 2 in diffusers"


def is_one(model: nn.Module) -> bool:
    """Whether there are layers, the refiners before them, and one embedder for timestep and caption."""
    return all(hasattr(model, part) for part in ("layers", "noise_refiner", "context_refiner", "time_caption_embed"))


def preset(model: nn.Module) -> str:
    """Its preset."""
    return "lumina2"


def layout(model: nn.Module, blocks: Literal["auto"] | Sequence[int], source: Source) -> Layout:
    """Blocks by their place in `layers`."""
    return joint_attention.layout(list(_blocks(model)), blocks, source, "layers")


def _blocks(model: Any) -> Iterator[Block]:
    patch = int(model.rope_embedder.patch_size)

    def of_model(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, Any]:
        given = arguments(model, args, kwargs)
        height, width = given["hidden_states"].shape[-2:]
        return (height // patch) * (width // patch), given["encoder_attention_mask"].sum(dim=1).long()

    def joint(told: tuple[Any, ...]) -> Joint:
        (image, lengths), turns = told  # turns: [batch, positions, pairs], complex
        text = turns.shape[1] - image
        rotary = pairs(turns.real), pairs(turns.imag)
        return Joint(image, text, starts=lengths, mask=before(lengths, text), rotary=rotary)

    whole = Told(model, of_model)
    for i, layer in enumerate(model.layers):
        name, attention = f"layers.{i}", layer.attn
        yield Block(
            Tap(f"{name}.attn.norm_q", attention.norm_q),
            Tap(f"{name}.attn.norm_k", attention.norm_k),
            int(attention.heads),
            attention.to_q.out_features // int(attention.heads),
            Tap(f"{name}.attn", attention),
            Tap(name, layer),
            (whole, rotary(attention)),
            joint,
            heads_first=False,
        )
