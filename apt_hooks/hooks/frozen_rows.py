"""A frozen pass of some samples of the batch alone, where nobody asks about the others."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .call_structure import batch_axes, first_tensor, is_samples, mapped, prediction_of

logger = logging.getLogger("apt_hooks")

Counted = Callable[[Tensor], Tensor | None]
"""Of a model's first argument, which samples count ([batch], bool; None: all)."""


@dataclasses.dataclass
class _Trial:
    """A pass of all rows, to be made once more with those that count.

    Attributes:
        kind: what the selection depends on.
        rows: those that count.
        call: the arguments of these.
        output: of all.
    """

    kind: Any
    rows: Tensor
    call: tuple[Any, Any]
    autocast: tuple[str, bool, torch.dtype]
    output: Any = None


class FrozenRows:
    """Sends through a model's passes only the rows of its batch that count, whatever its arguments are.

    Which axis of an argument is the batch's is not told by anything but its length. So the first pass, and each later
    one in which other axes have that length, is of all rows, and is made once more with those that count: if that gives
    the same, passes are of these alone from then on, and zeros are put for the others in what comes out.

    Attributes:
        rows: those of the present pass, on the CPU; None: it is of all.
    """

    def __init__(self) -> None:
        self.rows: Tensor | None = None
        self._batch = 0
        self._holds: dict[Any, bool] = {}

    @contextlib.contextmanager
    def passes_of(self, model: nn.Module, counted: Counted) -> Iterator[None]:
        """Inside, the model's passes are of the rows that count."""
        trials: list[_Trial] = []

        def select(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
            self.rows = None
            samples = first_tensor(args, kwargs)
            wanted = None if samples is None else counted(samples)
            if samples is None or wanted is None or bool(wanted.all()) or not bool(wanted.any()):
                return None
            rows, batch = wanted.nonzero().flatten().cpu(), len(wanted)
            kind = batch, _kind(args, batch), _kind(kwargs, batch)
            holds = self._holds.get(kind)
            if holds is False:
                return None
            call = _selected(args, rows, batch), _selected(kwargs, rows, batch)
            self._batch = batch
            if holds is None:
                device = samples.device.type
                autocast = device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
                trials[:] = [_Trial(kind, rows, call, autocast)]
                return None
            self.rows = rows
            return call

        def restore(_module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> Any:
            if self.rows is not None:
                return self.restored(output)
            if trials and trials[0].output is None:
                trials[0].output = output
            return None

        with contextlib.ExitStack() as stack:
            stack.callback(setattr, self, "rows", None)
            stack.callback(model.register_forward_pre_hook(select, with_kwargs=True).remove)
            stack.callback(model.register_forward_hook(restore, with_kwargs=True).remove)
            yield
        for trial in trials:
            self._try(model, trial)

    def restored(self, output: Any, axis: int = 0) -> Any:
        """What a pass of `rows` gave, with zeros for the others; lists are of samples."""
        if self.rows is None:
            return output
        if isinstance(output, Tensor):
            if output.ndim <= axis or output.shape[axis] != len(self.rows):
                return output
            shape = [*output.shape[:axis], self._batch, *output.shape[axis + 1 :]]
            return output.new_zeros(shape).index_copy_(axis, self.rows.to(output.device), output)
        if isinstance(output, list) and len(output) == len(self.rows):
            whole = [torch.zeros_like(output[0])] * self._batch
            for row, sample in zip(self.rows.tolist(), output, strict=True):
                whole[row] = sample
            return whole
        return mapped(output, lambda part: self.restored(part, axis))

    def _try(self, model: nn.Module, trial: _Trial) -> None:
        device, enabled, dtype = trial.autocast
        reason = ""
        try:
            with torch.autocast(device, dtype, enabled=enabled):
                found = prediction_of(model(*trial.call[0], **trial.call[1]))
            wanted = prediction_of(_selected(trial.output, trial.rows, self._batch))
            if found.shape != wanted.shape:
                raise ValueError(f"{tuple(found.shape)} came out for {tuple(wanted.shape)}")
            off = float((found.float() - wanted.float()).norm() / wanted.float().norm().clamp_min(1e-12))
            # Rounding of another batch size; TF32 has ten bits of fraction.
            if not off <= max(1e-3, 2 * torch.finfo(found.dtype).eps):
                reason = f"predictions differ by {off:.1e} of their size"
        except Exception as error:  # whatever a model makes of arguments that were put together wrongly
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        self._holds[trial.kind] = not reason
        if reason:
            logger.warning("apt-hooks: class images go through the base model's pass as well (%s)", reason)


def _kind(given: Any, batch: int) -> Any:
    """What the selection depends on: which axes may be the batch's."""
    if isinstance(given, Tensor):
        return given.ndim, batch_axes(given, batch)
    if isinstance(given, Mapping):
        return tuple((name, _kind(part, batch)) for name, part in given.items())
    if is_samples(given, batch):
        return "samples"
    return tuple(_kind(part, batch) for part in given) if isinstance(given, (list, tuple)) else None


def _selected(given: Any, rows: Tensor, batch: int) -> Any:
    """The rows of all that has a batch."""
    if isinstance(given, Tensor):
        axes = batch_axes(given, batch)
        return given.index_select(axes[0], rows.to(given.device)) if axes else given
    if is_samples(given, batch):
        return [given[row] for row in rows.tolist()]
    return mapped(given, lambda part: _selected(part, rows, batch))
