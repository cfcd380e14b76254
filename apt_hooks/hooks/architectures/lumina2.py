"""Lumina 2: `layers` of a joint `attention`, grouped queries, fused projections, and each sample's picture right behind
its own text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from torch import nn

from ..layout import Layout, Source, Tap, Told, arguments
from . import joint_attention
from .joint_attention import Block, Joint, before
from .rotary_embedding import pairs

NAME = "Lumina 2"


def is_one(model: nn.Module) -> bool:
    """Whether there are joint layers with fused projections, and the two refiners before them."""
    layers: Any = getattr(model, "layers", None)
    return (
        bool(layers)
        and all(hasattr(model, part) for part in ("context_refiner", "noise_refiner", "cap_embedder"))
        and hasattr(getattr(layers[0], "attention", None), "qkv")
    )


def preset(model: nn.Module) -> str:
    """Its preset."""
    return "lumina2"


def layout(model: nn.Module, blocks: Literal["auto"] | Sequence[int], source: Source) -> Layout:
    """Blocks by their place in `layers`."""
    return joint_attention.layout(list(_blocks(model)), blocks, source, "layers")


def _blocks(model: Any) -> Iterator[Block]:
    def of_model(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, Any]:
        given = arguments(model, args, kwargs)
        height, width = given["x"].shape[-2:]
        return (height // model.patch_size) * (width // model.patch_size), given["cap_mask"].sum(dim=1)

    def of_attention(attention: nn.Module) -> Told:
        return Told(attention, lambda args, kwargs: arguments(attention, args, kwargs)["freqs_cis"])

    def joint(told: tuple[Any, ...]) -> Joint:
        (image, lengths), turns = told  # turns: [batch, positions, pairs], complex
        text = turns.shape[1] - image
        rotary = pairs(turns.real), pairs(turns.imag)
        return Joint(image, text, starts=lengths.long(), mask=before(lengths, text), rotary=rotary)

    whole = Told(model, of_model)
    for i, layer in enumerate(model.layers):
        attention, name = layer.attention, f"layers.{i}"
        yield Block(
            Tap(f"{name}.attention.q_norm", attention.q_norm),
            Tap(f"{name}.attention.k_norm", attention.k_norm),
            attention.n_local_heads,
            attention.head_dim,
            Tap(f"{name}.attention", attention),
            Tap(name, layer),
            (whole, of_attention(attention)),
            joint,
            heads_first=False,
        )
