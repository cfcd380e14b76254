"""The trainer's denoiser between both passes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch


class FirstCall:
    """A denoiser that says when it has been called for the first time; all else of it is handed through.

    Args:
        model: the denoiser.
        then: called behind its first call.
        later_without_graph: compute later calls, which make targets, without a graph. FLUX.1's and Lumina 2's
            differential output preservation asks for that and takes it back within, and such a call's recomputation
            under gradient checkpointing cannot be told from the first one's.
    """

    def __init__(self, model: Any, then: Callable[[], None], *, later_without_graph: bool) -> None:
        self._model = model
        self._then: Callable[[], None] | None = then
        self._later_without_graph = later_without_graph

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        then, self._then = self._then, None
        if then is not None:
            result = self._model(*args, **kwargs)
            then()
            return result
        with torch.no_grad() if self._later_without_graph else contextlib.nullcontext():
            return self._model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def prepare_block_swap(denoiser: Any) -> None:
    """Bring swapped blocks (`blocks_to_swap`) back to where a forward pass begins: nothing went backwards through the
    frozen pass, which would have done it."""
    prepare = getattr(denoiser, "prepare_block_swap_before_forward", None)
    if prepare is not None:
        prepare()
