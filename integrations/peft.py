"""peft's adapters: switched off for the frozen pass, and what of a model they are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from apt_hooks.errors import AptError
from apt_hooks.hooks.frozen import all_modules
from apt_hooks.hooks.lora_dropout import largest_dropout


@contextlib.contextmanager
def adapters_off(*models: nn.Module) -> Iterator[None]:
    """Inside, the base layers of `models` compute alone; layers whose adapters were off already stay as they are.

    By the flag that peft's layers look at when they compute, and not by peft's own switch, which goes through all their
    parameters and makes those trainable that were not.

    Raises:
        AptError: the models carry no adapters.
    """
    layers = adapter_layers(*models)
    if not layers:
        names = ", ".join(type(model).__name__ for model in models)
        raise AptError(f"looked for LoRA layers of peft in {names}, found none: call add_adapter before the training")
    layers = [layer for layer in layers if not layer.disable_adapters]
    try:
        for layer in layers:
            object.__setattr__(layer, "_disable_adapters", True)
        yield
    finally:
        for layer in layers:
            object.__setattr__(layer, "_disable_adapters", False)


def unload_adapters(pipeline: Any, *models: nn.Module) -> None:
    """Take all LoRAs off a diffusers pipeline, of which `models` are parts; they can take the next one then."""
    pipeline.unload_lora_weights()
    for model in models:
        # Left behind by some releases of diffusers, which then refuse the next LoRA.
        vars(model).pop("_hf_peft_config_loaded", None)


def check_active(*models: nn.Module) -> None:
    """Check that every active adapter is one that is trained.

    Raises:
        AptError: one is not.
    """
    for layer in adapter_layers(*models):
        for adapter in getattr(layer, "active_adapters", ()):
            tensors = [p for name, p in layer.named_parameters() if f".{adapter}." in f".{name}."]
            if tensors and not any(p.requires_grad for p in tensors):
                raise AptError(
                    f"the adapter {adapter!r} is active but not trained, and would be missing from the base model; "
                    "merge it into the weights (fuse_lora) before add_adapter, or unload it"
                )


def dropout(*models: nn.Module) -> dict[str, float]:
    """`largest_dropout` of the active adapters of `models`, by the attribute that keeps it: `lora_dropout`, for LoHa
    `module_dropout` and so on."""

    def found() -> Iterator[tuple[str, Any]]:
        for layer in adapter_layers(*models):
            active = set(getattr(layer, "active_adapters", ()))
            for kind, held in [*layer.named_children(), *vars(layer).items()]:
                if kind.endswith("dropout") and hasattr(held, "items"):
                    yield from ((kind, p) for adapter, p in held.items() if adapter in active)

    return largest_dropout(found())


def adapter_layers(*models: nn.Module) -> list[Any]:
    """All layers of `models` that have adapters, switched on or off."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    kinds = (BaseTunerLayer, ModulesToSaveWrapper)
    return [module for module in all_modules(models) if isinstance(module, kinds)]
