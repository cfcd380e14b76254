"""Switching sd-scripts' LoRA off for the frozen pass, without running it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from apt_hooks.errors import AptError
from apt_hooks.hooks.lora_dropout import largest_dropout


class LoraSwitch:
    """Puts the base layers' own `forward` back for a while.

    sd-scripts' networks (and LyCORIS) replace `forward` on each base layer by that of a LoRA module, which keeps the
    old one as `org_forward`. With the old one in place no LoRA is computed and no dropout number drawn; a multiplier of
    0 would do both.

    Args:
        modules: the U-Net and the text encoders that may carry LoRA, network applied.
        network: name of the network module, for the error.
        trained: the network itself, each of whose LoRA modules has to be found on a layer of `modules`.

    Raises:
        AptError: no layer of `modules` has a replaced `forward`, the base weights are gone, or a LoRA module of
            `trained` was not found.
    """

    def __init__(self, modules: Iterable[nn.Module], network: str, trained: nn.Module | None = None) -> None:
        self._layers: list[tuple[nn.Module, Any, Any]] = []
        found: set[Any] = set()
        for root in modules:
            for layer in root.modules():
                replaced = layer.__dict__.get("forward")
                original, loras = _original(layer, replaced)
                found.update(loras)
                if original is None:
                    continue
                if isinstance(layer, (nn.Linear, nn.Conv2d)) and not hasattr(layer, "weight"):
                    raise AptError(
                        f"network_module {network}: it took the base layers' weights away (LyCORIS algo=full does), "
                        "so the base model cannot be had; use another algo"
                    )
                self._layers.append((layer, replaced, original))
        if not self._layers:
            raise AptError(
                f"network_module {network}: looked for layers whose forward was replaced by a LoRA that keeps "
                "org_forward, found none, so the base model cannot be had; use networks.lora or a LyCORIS network"
            )
        missed = [name for name, lora in _applied(trained) if lora not in found]
        if missed:
            raise AptError(
                f"network_module {network}: {len(missed)} LoRA modules are in no layer's forward, where they would be "
                f"switched off for the base model ({', '.join(missed[:3])}{', ...' if len(missed) > 3 else ''}): "
                "something else has replaced or wrapped the layers' forward after the network was applied; leave it out"
            )

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Inside, the base layers compute alone.

        Raises:
            AptError: a layer's `forward` was replaced once more since the switch was made.
        """
        for layer, replaced, _ in self._layers:
            if layer.__dict__.get("forward") is not replaced:
                raise AptError(
                    f"the forward of a {type(layer).__name__} with LoRA was replaced after the first step, so its LoRA "
                    "cannot be switched off for the base model; replace it before the training, or not at all"
                )
        try:
            for layer, _, original in self._layers:
                layer.forward = original
            yield
        finally:
            for layer, replaced, _ in self._layers:
                layer.forward = replaced


def dropout(network: nn.Module) -> dict[str, float]:
    """`largest_dropout` of the LoRA modules of a network.

    The kinds are called as in sd-scripts (`rank_dropout`, `module_dropout`; `dropout` is its `network_dropout`).
    LyCORIS keeps the same attributes, some of them as modules.
    """
    loras = [module for module in network.modules() if hasattr(module, "org_forward")]
    names = {kind: f"network_{kind}" if kind == "dropout" else kind for kind in _DROPOUTS}
    return largest_dropout((names[kind], getattr(lora, kind, None)) for lora in loras for kind in _DROPOUTS)


_DROPOUTS = ("dropout", "rank_dropout", "module_dropout")


def _original(layer: nn.Module, replaced: Any) -> tuple[Any, list[Any]]:
    """The layer's own forward behind one or more LoRA modules, or None where nothing replaced it; and those modules."""
    found, loras = None, []
    current = replaced
    while current is not None:
        owner = getattr(current, "__self__", None)
        if owner is None:  # a function around the method, such as torch._dynamo.disable makes
            current = getattr(current, "__wrapped__", None)
        elif owner is not layer and hasattr(owner, "org_forward"):
            loras.append(owner)
            found = current = owner.org_forward
        else:
            break
    return found, loras


def _applied(network: nn.Module | None) -> list[tuple[str, nn.Module]]:
    """(name, module) of each LoRA module that has taken a layer's forward and is trained."""
    return [
        (getattr(module, "lora_name", name), module)
        for name, module in ([] if network is None else network.named_modules())
        if hasattr(module, "org_forward") and any(p.requires_grad for p in module.parameters())
    ]
