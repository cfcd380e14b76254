"""A frozen pass of some samples of the batch alone, where nobody asks about the others."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger("apt_hooks")


class FrozenRows:
    """Sends through a model's passes only the rows of its batch that are asked for, whatever its arguments are.

    Which axis of an argument is the batch's is not told by anything but its length. So the first pass is of all rows,
    and is made once more with those that are asked for: if that gives the same, later passes are of these alone, and
    zeros are put for the others in what comes out.

    Attributes:
        rows: those of the present pass, on the CPU; None: it is of all.
    """

    def __init__(self) -> None:
        self.rows: Tensor | None = None
        self._batch = 0
        self._holds: bool | None = None

    @contextlib.contextmanager
    def passes_of(self, model: nn.Module, asked: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
        """Inside, the model's passes are of the rows that are asked for.

        Args:
            asked: of what a batch's first argument is, which rows ([batch], bool; None: all).
        """
        trial: list[Any] = []  # rows, their arguments, and what came of all

        def select(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
            samples = next((given for given in (*args, *kwargs.values()) if isinstance(given, Tensor)), None)
            wanted = None if samples is None or self._holds is False else asked(samples)
            if wanted is None or bool(wanted.all()) or not bool(wanted.any()):
                return None
            rows, self._batch = wanted.nonzero().flatten().cpu(), len(wanted)
            selected = _selected(args, rows, self._batch), _selected(kwargs, rows, self._batch)
            if self._holds is None:
                trial[:] = rows, *selected
                return None
            self.rows = rows
            return selected

        def restore(_module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> Any:
            if trial:
                trial.append(output)
            return None if self.rows is None else self.restored(output)

        with contextlib.ExitStack() as stack:
            stack.callback(setattr, self, "rows", None)
            stack.callback(model.register_forward_pre_hook(select, with_kwargs=True).remove)
            stack.callback(model.register_forward_hook(restore, with_kwargs=True).remove)
            yield
        if trial:
            self._try(model, *trial)

    def restored(self, output: Any, axis: int = 0) -> Any:
        """What a pass of `rows` gave, with zeros for the others; lists are of samples."""
        if self.rows is None:
            return output
        if isinstance(output, Tensor):
            if output.ndim <= axis or output.shape[axis] != len(self.rows):
                return output
            shape = [*output.shape[:axis], self._batch, *output.shape[axis + 1 :]]
            return output.new_zeros(shape).index_copy_(axis, self.rows.to(output.device), output)
        if isinstance(output, list):
            whole = [torch.zeros_like(output[0])] * self._batch
            for row, sample in zip(self.rows.tolist(), output, strict=True):
                whole[row] = sample
            return whole
        if isinstance(output, dict):
            return type(output)(**{name: self.restored(part, axis) for name, part in output.items()})
        return tuple(self.restored(part, axis) for part in output) if isinstance(output, tuple) else output

    def _try(self, model: nn.Module, rows: Tensor, args: Any, kwargs: Any, whole: Any) -> None:
        wanted = _first(_selected(whole, rows, self._batch)).float()
        try:
            found = _first(model(*args, **kwargs))
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
            self._holds, reason = False, f"{type(error).__name__}: {str(error).splitlines()[0]}"
        else:
            off = (found.float() - wanted).norm() / wanted.norm().clamp_min(1e-12)
            # Rounding of another batch size; TF32 has ten bits of fraction.
            limit = max(1e-3, 8 * torch.finfo(found.dtype).eps)
            self._holds, reason = bool(off <= limit), f"predictions differ by {off:.1e} of their size"
        if not self._holds:
            logger.warning("apt-hooks: class images go through the base model's pass as well (%s)", reason)


def _selected(given: Any, rows: Tensor, batch: int) -> Any:
    """The rows of all that has a batch."""
    if isinstance(given, Tensor):
        axes = range(min(given.ndim, 2 if given.ndim > 2 else 1))  # HiDream's text is [layers, batch, ...]
        axis = next((axis for axis in axes if given.shape[axis] == batch), None)
        return given if axis is None else given.index_select(axis, rows.to(given.device))
    if isinstance(given, list) and len(given) >= batch and all(isinstance(part, Tensor) for part in given):
        return [given[row] for row in rows.tolist()]
    if isinstance(given, dict):
        return type(given)(**{name: _selected(part, rows, batch) for name, part in given.items()})
    if isinstance(given, (list, tuple)):
        parts = [_selected(part, rows, batch) for part in given]
        return tuple(parts) if isinstance(given, tuple) else parts
    return given


def _first(output: Any) -> Tensor:
    """The prediction, of a list of samples all in one."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, list):
        return torch.stack(output)
    return _first(next(iter(output.values())) if isinstance(output, dict) else output[0])
