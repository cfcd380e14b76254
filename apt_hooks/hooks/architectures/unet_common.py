"""The up-blocks of a U-Net and their attention layers, found by what the modules have, and the points in them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from torch import nn

from ...errors import AptError
from ..layout import AttentionPoint, HiddenPoint, Layout, Source, Tap

TEXT_WIDTHS = {"sd15": 768, "sd21": 1024, "sdxl": 2048}
"""What tells the models of the presets apart: the width of the text that their U-Nets read."""

Place = tuple[str, nn.Module]


@dataclasses.dataclass(frozen=True)
class UpBlock:
    """One resolution level of the decoder.

    Attributes:
        index: its place, 0 being the lowest resolution; the same number in every layout of one network.
        cross_attention: (name, layer) of each cross-attention, in the order they run.
        self_attention: (name, layer) of each self-attention, in the order they run.
        end: (name, module) whose output is the level's hidden state, or whose input it is where that is an upsampler.
        upsamples: whether `end` is an upsampler, the first module of the level that is at the next one's resolution.
    """

    index: int
    cross_attention: tuple[Place, ...]
    self_attention: tuple[Place, ...]
    end: Place
    upsamples: bool


def layout(
    unet: nn.Module, found: Sequence[UpBlock], blocks: Literal["auto"] | Sequence[int], source: Source
) -> Layout:
    """The points of the up-blocks that are chosen (`select`)."""
    chosen = select(unet, found, blocks)
    attention = [
        AttentionPoint(name, Tap(f"{name}.to_q", m.to_q), Tap(f"{name}.to_k", m.to_k), int(m.heads), float(m.scale))  # type: ignore[arg-type]
        for block in chosen
        for name, m in block.cross_attention
    ]
    if source == "block":
        # An upsampler's input, and not the output of the layer before it, which sd-scripts wraps in an object.
        taps = [Tap(*block.end, of_input=block.upsamples) for block in chosen]
    else:
        taps = [Tap(*layer) for block in chosen for layer in getattr(block, source)]
    hidden = [HiddenPoint(tap.name, tap) for tap in taps]
    return Layout(attention, hidden, tuple(block.index for block in chosen), "up-blocks")


def select(unet: nn.Module, found: Sequence[UpBlock], blocks: Literal["auto"] | Sequence[int]) -> tuple[UpBlock, ...]:
    """The up-blocks to observe.

    "auto" takes the last two levels that have cross-attention: at the resolutions the models are made for these are
    the paper's 32x32 and 64x64, in SDXL (blocks 0 and 1) and in SD 1.x/2.x (blocks 2 and 3) alike.

    Raises:
        AptError: no cross-attention, a number that is no block's, or a block without attention.
    """
    with_attention = [block for block in found if block.cross_attention and block.self_attention]
    listed = ", ".join(str(block.index) for block in with_attention)
    if not with_attention:
        raise AptError(
            "looked for self- and cross-attention layers (modules with to_q and to_k) in the up-blocks of "
            f"{type(unet).__name__}, found {len(found)} up-blocks without any"
        )
    if blocks == "auto":
        return tuple(with_attention[-2:])
    if not blocks:
        raise AptError(f"blocks: none given; those that have attention layers are {listed}")
    chosen = []
    for index in blocks:
        match = [block for block in with_attention if block.index == index]
        if not match:
            raise AptError(
                f"blocks: up-block {index} has no attention layers here; those that have are {listed}. "
                'Is the preset that of another model? blocks = "auto" takes the last two'
            )
        chosen += match
    return tuple(chosen)


def preset(unet: nn.Module) -> str | None:
    """The preset of the models whose U-Nets read text of this one's width."""
    layers = (
        layer for path, layer in unet.named_modules() if _is_attention(layer) and _is_cross_attention(path, layer)
    )
    width = next((layer.to_k.in_features for layer in layers), None)
    return next((preset for preset, own in TEXT_WIDTHS.items() if own == width), None)


def up_block(index: int, parts: Sequence[Place], end: Place, upsamples: bool) -> UpBlock:
    """One level of its parts.

    Raises:
        AptError: attention layers that have fused projections, or normalise what they project.
    """
    cross: list[Place] = []
    own: list[Place] = []
    for prefix, part in parts:
        for name, module in part.named_modules(prefix=prefix):
            if not _is_attention(module):
                continue
            # diffusers leaves `fused_projections` set after unfusing; what runs is decided by the processor.
            if type(getattr(module, "processor", None)).__name__.startswith("Fused"):
                raise AptError(f"{name} has fused projections, which hide q and k: call unfuse_qkv_projections() first")
            if getattr(module, "norm_q", None) is not None:
                raise AptError(f"{name} normalises q and k after their projections, which is not supported")
            (cross if _is_cross_attention(name, module) else own).append((name, module))
    return UpBlock(index, tuple(cross), tuple(own), end, upsamples)


def _is_attention(module: nn.Module) -> bool:
    return hasattr(module, "to_q") and hasattr(module, "to_k")


def _is_cross_attention(name: str, module: nn.Module) -> bool:
    if hasattr(module, "is_cross_attention"):
        return bool(module.is_cross_attention)
    # The width of the text differs from the layer's own, except by chance; then the layer's name decides.
    own, other = (getattr(module, p).in_features for p in ("to_q", "to_k"))
    return own != other or name.rsplit(".", 1)[-1] == "attn2"
