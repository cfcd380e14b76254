"""The one exception type for what a user can put right, and how a program ends with it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator


class AptError(Exception):
    """Bad input or an unsupported set-up; the message is one line that names the thing, the rule and the way out."""


@contextlib.contextmanager
def errors_in_one_line() -> Iterator[None]:
    """An `AptError` inside ends the program with its message, not with a traceback."""
    try:
        yield
    except AptError as error:
        sys.exit(f"apt-hooks: error: {error}")
