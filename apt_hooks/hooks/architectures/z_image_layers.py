"""Z-Image in diffusers: single-stream `layers`, picture first; lists of pictures and captions, each filled up with
tokens of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from ...errors import AptError
from ..layout import Layout, Source, Tap, Told, arguments
from . import joint_attention
from .joint_attention import Block, Joint, before
from .rotary_embedding import pairs

NAME = "Z-Image in diffusers"


def is_one(model: nn.Module) -> bool:
    """Whether there are layers, the refiners before them, and an embedder for each size of patches."""
    return all(hasattr(model, part) for part in ("layers", "noise_refiner", "context_refiner", "all_x_embedder"))


def preset(model: nn.Module) -> str:
    """Its preset."""
    return "z_image"


def layout(model: nn.Module, blocks: Literal["auto"] | Sequence[int], source: Source) -> Layout:
    """Blocks by their place in `layers`."""
    return joint_attention.layout(list(_blocks(model)), blocks, source, "layers")


def _blocks(model: Any) -> Iterator[Block]:
    def of_model(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, Any]:
        given = arguments(model, args, kwargs)
        pictures, captions = given["x"], given["cap_feats"]
        if isinstance(pictures[0], list):
            raise AptError("Z-Image was given reference pictures (omni mode); only single pictures are known here")
        sizes = {tuple(picture.shape[-3:]) for picture in pictures}
        if len(sizes) > 1:
            raise AptError(f"pictures of one batch have to be of one size; found latents of {sorted(sizes)}")
        ((frames, height, width),) = sizes
        patch, of_frames = given.get("patch_size", 2), given.get("f_patch_size", 1)  # as `forward` has it
        # Captions beyond the pictures take no part; diffusers' own script gives such from its second step on.
        lengths = torch.tensor([len(caption) for caption in captions[: len(pictures)]], device=captions[0].device)
        return (frames // of_frames) * (height // patch) * (width // patch), lengths

    def joint(told: tuple[Any, ...]) -> Joint:
        (image, lengths), filled, turns = told  # turns: [batch, positions, pairs], complex
        text = turns.shape[1] - filled
        return Joint(
            image,
            text,
            text_first=False,
            mask=before(lengths, text),
            rotary=(pairs(turns.real), pairs(turns.imag)),
            padding=filled - image,
        )

    whole, refiner = Told(model, of_model), model.noise_refiner[0]
    # The picture with what fills it up, to a multiple of 32, is what the refiner is given.
    filled = Told(refiner, lambda args, kwargs: arguments(refiner, args, kwargs)["x"].shape[1])
    for i, layer in enumerate(model.layers):
        name, attention = f"layers.{i}", layer.attention
        yield Block(
            Tap(f"{name}.attention.norm_q", attention.norm_q),
            Tap(f"{name}.attention.norm_k", attention.norm_k),
            int(attention.heads),
            attention.to_q.out_features // int(attention.heads),
            Tap(f"{name}.attention", attention),
            Tap(name, layer),
            (whole, filled, Told(attention, lambda _, kwargs: kwargs["freqs_cis"])),
            joint,
            heads_first=False,
        )
