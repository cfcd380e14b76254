"""Switching sd-scripts' LoRA off for the frozen pass, without running it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from apt_hooks.errors import AptError


class LoraSwitch:
    """Puts the base layers' own `forward` back for a while.

    sd-scripts' networks (and LyCORIS) replace `forward` on each base layer by that of a LoRA module, which keeps the
    old one as `org_forward`. With the old one in place no LoRA is computed and no dropout number drawn; a multiplier of
    0 would do both.

    Args:
        modules: the U-Net and the text encoders that may carry LoRA, network applied.
        network: name of the network module, for the error.

    Raises:
        AptError: no layer of `modules` has a replaced `forward`, or the base weights are gone.
    """

    def __init__(self, modules: Iterable[nn.Module], network: str) -> None:
        self._layers: list[tuple[nn.Module, Any, Any]] = []
        for root in modules:
            for layer in root.modules():
                replaced = layer.__dict__.get("forward")
                original = _original(layer, replaced)
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

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Inside, the base layers compute alone."""
        try:
            for layer, _, original in self._layers:
                layer.forward = original
            yield
        finally:
            for layer, replaced, _ in self._layers:
                layer.forward = replaced


def _original(layer: nn.Module, replaced: Any) -> Any:
    """The layer's own forward behind one or more LoRA modules, or None where nothing replaced it."""
    found = None
    owner = getattr(replaced, "__self__", None)
    while owner is not None and owner is not layer and hasattr(owner, "org_forward"):
        found = owner.org_forward
        owner = getattr(found, "__self__", None)
    return found
