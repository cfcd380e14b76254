"""HiDream in diffusers: double, then single stream blocks, picture first; the text is T5's tokens, those of Llama's
last layer, and those of the Llama layer that belongs to the block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from torch import nn

from ..layout import Layout, Source, Tap, Told, arguments
from . import joint_attention
from .joint_attention import Block, Joint
from .joint_sequence import rotary

NAME = "HiDream in diffusers"


def is_one(model: nn.Module) -> bool:
    """Whether there are double and single stream blocks, and a projection of captions for each."""
    return all(hasattr(model, part) for part in ("double_stream_blocks", "single_stream_blocks", "caption_projection"))


def preset(model: nn.Module) -> str:
    """Its preset."""
    return "hidream"


def layout(model: nn.Module, blocks: Literal["auto"] | Sequence[int], source: Source) -> Layout:
    """Blocks counted through, the single ones behind the double ones."""
    return joint_attention.layout(list(_blocks(model)), blocks, source)


def _blocks(model: Any) -> Iterator[Block]:
    embedder = model.x_embedder

    def of_model(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
        latents = arguments(model, args, kwargs)["hidden_states"]
        if latents.ndim == 3:  # in patches already
            return None
        height, width = latents.shape[-2:]
        return (height // embedder.patch_size) * (width // embedder.patch_size)

    def joint(told: tuple[Any, ...]) -> Joint:
        image, filled, turns = told  # turns: rotations, [batch, positions, 1, pairs, 2, 2]
        image = filled if image is None else image
        cosines, sines = (turns[:, :, 0, :, row, 0].repeat_interleave(2, dim=-1) for row in (0, 1))
        text = turns.shape[1] - filled
        return Joint(image, text, text_first=False, rotary=(cosines, sines), padding=filled - image)

    whole = Told(model, of_model)
    # Pictures that are not square are filled up to the largest number of patches.
    filled = Told(embedder, lambda args, _: args[0].shape[1])
    for stream, keys in (("double_stream_blocks", "k_rms_norm_t"), ("single_stream_blocks", "k_rms_norm")):
        for i, block in enumerate(getattr(model, stream)):
            name, attention = f"{stream}.{i}", block.block.attn1
            yield Block(
                Tap(f"{name}.block.attn1.q_rms_norm", attention.q_rms_norm),
                Tap(f"{name}.block.attn1.{keys}", attention.get_submodule(keys)),
                attention.heads,
                attention.inner_dim // attention.heads,
                Tap(f"{name}.block.attn1", attention),
                Tap(name, block),
                (whole, filled, rotary(attention)),
                joint,
            )
