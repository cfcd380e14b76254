"""The frozen pass: the base model's own output, with nothing left behind."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager

import torch
from torch import nn

from ..errors import AptError

AdaptersOff = Callable[[], AbstractContextManager[object]]
"""Makes a context in which the adapters (LoRA) take no part, e.g. peft's `model.disable_adapter`; or, for another
reference than the base model, one in which they are that (`StartingWeights.exchanged`)."""


@contextlib.contextmanager
def frozen_base(modules: Iterable[nn.Module], adapters_off: AdaptersOff) -> Iterator[None]:
    """Inside, `modules` compute as the base model does: adapters off, evaluation mode, no gradients.

    Afterwards everything is as it was: the random streams of Python (from which DyLoRA draws its rank), of the CPU and
    of the modules' devices (but MPS), each module's train or evaluation mode, and each parameter's `requires_grad`
    (peft sets it anew when its adapters come back on).

    Raises:
        AptError: `adapters_off` makes no context.
    """
    modules = all_modules(modules)
    training = [module for module in modules if module.training]
    parameters = [(p, p.requires_grad) for module in modules for p in module._parameters.values() if p is not None]
    used = {p.device for p, _ in parameters}
    devices = sorted((d for d in used if d.type not in ("cpu", "meta", "mps")), key=str)
    stream = random.getstate()
    try:
        _set_training(training, False)
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=[]))
            for kind in {d.type for d in devices}:
                indices = [d.index or 0 for d in devices if d.type == kind]
                stack.enter_context(torch.random.fork_rng(devices=indices, device_type=kind))
            stack.enter_context(torch.no_grad())
            context = adapters_off()
            if not hasattr(context, "__enter__"):
                raise AptError(
                    "adapters_off must make a context in which the adapters take no part; found "
                    f"{type(context).__name__}; for peft: lambda: apt_hooks.integrations.peft.adapters_off(unet)"
                )
            stack.enter_context(context)
            yield
    finally:
        _set_training(training, True)
        random.setstate(stream)
        for parameter, requires_grad in parameters:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)
        # Autocast keeps cast copies of weights; one made here, without a graph, would starve the tuned pass's LoRA.
        torch.clear_autocast_cache()


def all_modules(roots: Iterable[nn.Module]) -> list[nn.Module]:
    """The modules of `roots`, each once.

    `nn.Module.modules()` hands every module up through all levels above it: a quarter of a second for SDXL's U-Net with
    a LoRA, at every step.
    """
    found = dict.fromkeys(roots)
    waiting = list(found)
    while waiting:
        for child in waiting.pop()._modules.values():
            if child is not None and child not in found:
                found[child] = None
                waiting.append(child)
    return list(found)


def _set_training(modules: list[nn.Module], mode: bool) -> None:
    for module in modules:
        # nn.Module's own way looks for parameters among its names first; a scripted module has no other.
        if "training" in vars(module):
            vars(module)["training"] = mode
        else:
            module.training = mode
