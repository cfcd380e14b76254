"""Numbers that are looked at once their device has come to them, so that it is not waited for."""

from __future__ import annotations

import collections
from collections.abc import Callable

import torch
from torch import Tensor


class DeferredChecks:
    """Checks of numbers that a device still has to compute."""

    def __init__(self) -> None:
        self._waiting: collections.deque[tuple[Tensor, torch.cuda.Event | None, Callable[[list[float]], None]]]
        self._waiting = collections.deque()

    def expect(self, numbers: Tensor, check: Callable[[list[float]], None]) -> None:
        """Have `check` called with `numbers` ([n]): at once where they are on the CPU, else by a later `look`."""
        device = numbers.device
        if device.type == "cpu":
            check(numbers.tolist())
        elif device.type == "cuda":
            copy = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            with torch.cuda.device(device):
                copy.copy_(numbers, non_blocking=True)
                event = torch.cuda.Event()
                event.record()
            self._waiting.append((copy, event, check))
        elif device.type != "meta":
            self._waiting.append((numbers, None, check))

    def look(self, *, wait: bool = False) -> None:
        """Call the checks whose numbers are there; with `wait` all. What a check raises comes from here.

        Devices other than CUDA's are asked for numbers when the next ones are expected already.
        """
        while self._waiting:
            numbers, event, check = self._waiting[0]
            there = len(self._waiting) > 1 if event is None else event.query()
            if not (wait or there):
                return
            self._waiting.popleft()
            if event is not None:
                event.synchronize()
            check(numbers.tolist())
