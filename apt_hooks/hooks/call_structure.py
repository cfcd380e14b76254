"""A denoiser's arguments and what comes out of it, whatever their structure is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def first_tensor(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Of a model's arguments the first that may have a batch."""
    return next((given for given in (*args, *kwargs.values()) if isinstance(given, Tensor) and given.ndim), None)


def batch_axes(tensor: Tensor, batch: int) -> tuple[int, ...]:
    """Which axes may be the batch's: the first, or the second behind layers, as HiDream's text has it."""
    return tuple(axis for axis in range(min(tensor.ndim, 2 if tensor.ndim > 2 else 1)) if tensor.shape[axis] == batch)


def is_samples(given: Any, batch: int) -> bool:
    """Whether it is a list of samples, as Z-Image has it, and not of what has a batch each."""
    if not isinstance(given, list) or len(given) != batch or not all(isinstance(part, Tensor) for part in given):
        return False
    return not all(part.ndim and len(part) == batch for part in given)


def mapped(given: Any, function: Callable[[Any], Any]) -> Any:
    """The same with the function's results for the parts of a dict, list or tuple; anything else as it is."""
    if isinstance(given, dict):
        return type(given)(**{name: function(part) for name, part in given.items()})
    if not isinstance(given, (list, tuple)):
        return given
    parts = [function(part) for part in given]
    return type(given)(*parts) if hasattr(given, "_fields") else type(given)(parts)


def prediction_of(output: Any) -> Tensor:
    """What a denoiser gives; a list of samples all in one."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, list):
        return torch.stack(output)
    return prediction_of(next(iter(output.values())) if isinstance(output, dict) else output[0])
