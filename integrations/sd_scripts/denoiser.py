"""The trainer's denoiser between both passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class FirstCall:
    """A denoiser that says when it has been called for the first time; all else of it is handed through.

    Args:
        model: the denoiser.
        then: called behind its first call.
    """

    def __init__(self, model: Any, then: Callable[[], None]) -> None:
        self._model = model
        self._then: Callable[[], None] | None = then

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self._model(*args, **kwargs)
        then, self._then = self._then, None
        if then is not None:
            then()
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def prepare_block_swap(denoiser: Any) -> None:
    """Bring swapped blocks (`blocks_to_swap`) back to where a forward pass begins: nothing went backwards through the
    frozen pass, which would have done it."""
    prepare = getattr(denoiser, "prepare_block_swap_before_forward", None)
    if prepare is not None:
        prepare()
