"""Switching peft's adapters off for the frozen pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from apt_hooks.errors import AptError


@contextlib.contextmanager
def adapters_off(*models: nn.Module) -> Iterator[None]:
    """Inside, the base layers of `models` compute alone; layers whose adapters were off already stay as they are.

    peft makes the adapters' parameters trainable when it switches them on again; `frozen_base` puts that right.

    Raises:
        AptError: the models carry no adapters.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    layers = [
        module
        for model in models
        for module in model.modules()
        if isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper))
    ]
    if not layers:
        names = ", ".join(type(model).__name__ for model in models)
        raise AptError(f"looked for LoRA layers of peft in {names}, found none: call add_adapter before the training")
    layers = [layer for layer in layers if not layer.disable_adapters]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
