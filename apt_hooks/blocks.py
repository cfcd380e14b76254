"""Where the up-blocks of a U-Net and their attention layers are, found by what the modules have."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from torch import nn

from .errors import AptError

TEXT_WIDTHS = {"sd15": 768, "sd21": 1024, "sdxl": 2048}
"""What tells the models of the presets apart: the width of the text that their U-Nets read."""

_Place = tuple[str, nn.Module]
_Level = tuple[list[_Place], _Place, bool]  # its parts, the module that ends it, and whether that is an upsampler


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
    cross_attention: tuple[_Place, ...]
    self_attention: tuple[_Place, ...]
    end: _Place
    upsamples: bool


def find_up_blocks(unet: nn.Module) -> tuple[UpBlock, ...]:
    """All up-blocks of a U-Net.

    Two layouts are known: `up_blocks`, a list of modules that are called (diffusers, and sd-scripts' SD 1.x/2.x
    U-Net), and `output_blocks`, a flat list of lists that are never called themselves (Stability's layout, as in
    sd-scripts' SDXL U-Net), in which an upsampler ends a level.

    Raises:
        AptError: the model has neither, or its attention layers have fused projections.
    """
    if hasattr(unet, "up_blocks"):
        blocks: Any = unet.up_blocks
        levels = [_called_level(f"up_blocks.{i}", block) for i, block in enumerate(blocks)]
    elif hasattr(unet, "output_blocks"):
        levels = _stability_levels(unet.output_blocks)
    else:
        children = ", ".join(name for name, _ in unet.named_children()) or "no child modules"
        raise AptError(
            f"looked for up_blocks or output_blocks in {type(unet).__name__}, found {children}: "
            "pass the U-Net itself, or set lambda_dist and lambda_attn (lambda_joint) to 0, which need no hooks"
        )
    return tuple(_up_block(index, *level) for index, level in enumerate(levels))


def select_up_blocks(unet: nn.Module, blocks: Literal["auto"] | Sequence[int]) -> tuple[UpBlock, ...]:
    """The up-blocks to observe.

    "auto" takes the last two levels that have cross-attention: at the resolutions the models are made for these are
    the paper's 32x32 and 64x64, in SDXL (blocks 0 and 1) and in SD 1.x/2.x (blocks 2 and 3) alike.

    Raises:
        AptError: no cross-attention, a number that is no block's, or a block without attention.
    """
    found = find_up_blocks(unet)
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


def check_preset(name: str | None, unet: nn.Module) -> None:
    """Check that a preset is not that of another model, whose scale would make gamma wrong by a factor.

    A U-Net of none of the presets' text widths goes with each of them.

    Raises:
        AptError: the U-Net reads text of the width of another preset's model.
    """
    layers = (
        layer for path, layer in unet.named_modules() if _is_attention(layer) and _is_cross_attention(path, layer)
    )
    width = next((layer.to_k.in_features for layer in layers), None)
    fitting = [preset for preset, own in TEXT_WIDTHS.items() if own == width]
    if name is not None and fitting and name not in fitting:
        raise AptError(
            f'[apt] preset = "{name}" is for another model: this U-Net reads text of width {width}, as those of preset '
            f'"{fitting[0]}" do; name that one'
        )


def _called_level(name: str, block: nn.Module) -> _Level:
    upsamplers = list(getattr(block, "upsamplers", None) or ())
    end = (f"{name}.upsamplers.0", upsamplers[0]) if upsamplers else (name, block)
    return [(name, block)], end, bool(upsamplers)


def _stability_levels(lists: Any) -> list[_Level]:
    levels: list[_Level] = []
    parts: list[_Place] = []
    for i, modules in enumerate(lists):
        parts.append((f"output_blocks.{i}", modules))
        last_name, last = list(modules.named_children())[-1]
        upsamples = type(last).__name__.startswith("Upsample")
        if upsamples or i == len(lists) - 1:
            levels.append((parts, (f"output_blocks.{i}.{last_name}", last), upsamples))
            parts = []
    return levels


def _up_block(index: int, parts: list[_Place], end: _Place, upsamples: bool) -> UpBlock:
    cross: list[_Place] = []
    own: list[_Place] = []
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
