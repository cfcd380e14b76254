"""The bars and notes of Hugging Face's libraries, which are for whoever calls them and not for whoever calls us."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def quiet(logging: Any) -> Iterator[None]:
    """Inside, a library shows no progress bars, and of its log the errors alone.

    Args:
        logging: its own, as `diffusers.utils.logging` and `transformers.utils.logging`.
    """
    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
