"""Whether Triton's kernels can be used here."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Callable
from typing import Literal

import torch

from ..errors import AptError

Impl = Literal["auto", "eager", "triton"]

logger = logging.getLogger("apt_hooks")


def takes_triton(impl: Impl, device: torch.device, unfit: Callable[[], str | None]) -> bool:
    """Whether to run Triton's kernel: with "auto" on CUDA where it can, which is said once where it cannot.

    Args:
        unfit: tells, where Triton is at hand, why its kernel cannot do what is asked; None: it can.

    Raises:
        AptError: `impl` is "triton" and it cannot be used.
    """
    if impl == "eager" or (impl == "auto" and device.type != "cuda"):
        return False
    reason = _broken(device) or unfit()
    if reason is None:
        return True
    if impl == "triton":
        raise AptError(f'attention_impl = "triton" cannot be used here: {reason}; take "auto" or "eager"')
    _say_once(reason)
    return False


@functools.cache
def _broken(device: torch.device) -> str | None:
    """Why no kernel can be built and run on this device; None where one can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":  # the interpreter is for tests
        return f"it needs a CUDA device, the model is on {device.type}"
    try:
        from .attention_alignment_triton import sum_and_gradients

        x = torch.ones(1, 16, 16, device=device)
        sum_and_gradients(x, x, x, x, heads=1, scale=1.0)
    # A missing compiler, an old driver, a card that Triton does not know: each fails in its own way, and none is a
    # reason to stop a training that goes without.
    except Exception as error:
        return f"it cannot be built ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    return None


@functools.cache
def _say_once(reason: str) -> None:
    logger.warning("apt-hooks: the regularizers run without Triton's kernel: %s", reason)
