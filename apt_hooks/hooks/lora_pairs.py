"""The pairs of projections that a LoRA is made of, found in peft's layers and in networks of sd-scripts' kind."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from ..errors import AptError
from ..method.l2_sp import LowRank
from .frozen import all_modules


def lora_pairs(modules: Iterable[nn.Module], trained: Iterable[tuple[str, nn.Parameter]]) -> list[LowRank]:
    """The pairs of which one side or both are trained, their parameters themselves.

    By what holds them: `lora_A`, `lora_B` and `scaling`, each by adapter (peft), or `lora_down`, `lora_up` and `scale`
    (sd-scripts, LyCORIS' LoCon), which may be lists of parts. Linear layers and convolutions.

    Args:
        modules: those that hold the LoRA, with all below them.
        trained: (name, parameter) of all that is trained.

    Raises:
        AptError: something is trained that is of no pair, so that how far it changes the model cannot be told from
            pairs; or nothing is trained.
    """
    names = {parameter: name for name, parameter in trained}
    found = (pair for module in all_modules(modules) for pair in _pairs_of(module))
    pairs = [pair for pair in found if pair.down in names or pair.up in names]
    in_pairs = {weight for pair in pairs for weight in (pair.down, pair.up)}
    others = [name for parameter, name in names.items() if parameter not in in_pairs]
    if others or not pairs:
        of = f"{len(others)} of {len(names)} trained parameters are of none" if others else "nothing is trained"
        some = f" ({', '.join(sorted(others)[:3])}{', ...' if len(others) > 3 else ''})" if others else ""
        raise AptError(
            '[apt] lambda_offset or objective = "l2-sp" is for plain LoRAs: looked for pairs of lora_down and lora_up, '
            f"or of peft's lora_A and lora_B, and {of}{some}; train no other kind of network, no DoRA, nothing beside "
            "the LoRA, in a loop of your own give AptObjective the LoRA's modules (also_frozen=), or leave that key out"
        )
    return pairs


def _pairs_of(module: nn.Module) -> Iterator[LowRank]:
    """What the module itself holds, its children left out."""
    parts = module._modules
    scaling = getattr(module, "scaling", None)
    down, up = parts.get("lora_A"), parts.get("lora_B")
    if isinstance(down, nn.ModuleDict) and isinstance(up, nn.ModuleDict) and isinstance(scaling, dict):
        for adapter in down:
            if adapter in up and adapter in scaling:
                yield from _pair(down[adapter], up[adapter], scaling[adapter])
    scale = getattr(module, "scale", None)
    down, up = parts.get("lora_down"), parts.get("lora_up")
    if isinstance(down, nn.ModuleList) and isinstance(up, nn.ModuleList):  # one each for the parts of a fused layer
        for one, other in zip(down, up, strict=True):
            yield from _pair(one, other, scale)
    elif down is not None and up is not None:
        yield from _pair(down, up, scale)


def _pair(down: nn.Module, up: nn.Module, scale: Any) -> Iterator[LowRank]:
    one, other = getattr(down, "weight", None), getattr(up, "weight", None)
    try:
        scale = float(scale)
    except (TypeError, ValueError):  # none, or no number: not what this is about
        return
    # A projection up with a kernel of its own, or in groups, is no product of two matrices.
    if isinstance(one, nn.Parameter) and isinstance(other, nn.Parameter) and other.flatten(1).shape[1] == len(one):
        yield LowRank(one, other, scale)
