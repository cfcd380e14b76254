"""Whether Triton's kernels can be used here."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor

from ...errors import AptError

Impl = Literal["auto", "eager", "triton"]
Trial = Callable[[torch.device], str | None]

logger = logging.getLogger("apt_hooks")


def takes_triton(impl: Impl, device: torch.device, trial: Trial) -> bool:
    """Whether to run Triton's kernel: with "auto" on CUDA where it can, which is said once where it cannot.

    Args:
        trial: tells why the kernel cannot do what is asked on a device where Triton is at hand, None where it can;
            the same object asked again answers from memory (`functools.cache`).

    Raises:
        AptError: `impl` is "triton" and it cannot be used.
    """
    if impl == "eager" or (impl == "auto" and device.type != "cuda"):
        return False
    reason = unavailable(device) or trial(device)
    if reason is None:
        return True
    if impl == "triton":
        raise AptError(f'attention_impl = "triton" cannot be used here: {reason}; take "auto" or "eager"')
    _say_once(reason)
    return False


def unavailable(device: torch.device) -> str | None:
    """Why Triton runs nothing on this device; None where it does."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":  # the interpreter is for tests
        return f"it needs a CUDA device, the model is on {device.type}"
    return None


def fault(fused: Callable[[], Iterable[Tensor | None]], wanted: Iterable[Tensor | None]) -> str | None:
    """What is wrong with a kernel: that it cannot be built or run, or that it finds other numbers than `wanted`."""
    try:
        found = fused()
    except torch.cuda.OutOfMemoryError:
        raise
    # A missing compiler, an old driver, a card that Triton does not know: each fails in its own way, and none is a
    # reason to stop a training that goes without.
    except Exception as error:
        return f"the kernel cannot be built ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    for one, other in zip(found, wanted, strict=True):
        if one is None or other is None:
            return "the kernel has left something out"
        difference = float((one.double() - other.double()).norm() / other.double().norm())
        if not difference < 0.02:  # bfloat16's rounding is 0.002
            return f"the kernel's numbers are wrong here (relative error {difference:.2g}); please report this"
    return None


@functools.cache
def _say_once(reason: str) -> None:
    logger.warning("apt-hooks: the regularizers run without Triton's kernel: %s", reason)
