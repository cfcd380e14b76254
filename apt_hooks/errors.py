"""The one exception type for what a user can put right, and how a program ends with it."""

from __future__ import annotations

import contextlib
import difflib
import sys
from collections.abc import Callable, Iterable, Iterator


class AptError(Exception):
    """Bad input or an unsupported set-up; the message is one line that names the thing, the rule and the way out."""


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of a sentence about a word that is not known: which known one may be meant."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f'; did you mean "{close[0]}"?' if close else "."


def why_not_imported(error: BaseException) -> str:
    """The root of a failed import, in one line: libraries that import lazily say that of the outermost module."""
    while (below := error.__cause__ or error.__context__) is not None:
        error = below
    text = " ".join(str(error).split())
    if "torchvision" in text and not isinstance(error, ModuleNotFoundError):
        text += "; torchvision does not fit the torch that is installed: install the one made for it, or uninstall it"
    return text


@contextlib.contextmanager
def errors_in_one_line() -> Iterator[None]:
    """An `AptError` inside ends the program with its message, not with a traceback."""
    try:
        yield
    except AptError as error:
        sys.exit(f"apt-hooks: error: {error}")


STOPPED = 130
"""The exit code of a program that Ctrl-C has ended, as shells have it."""


@contextlib.contextmanager
def told_when_stopped(kept: Callable[[], str]) -> Iterator[None]:
    """Ctrl-C inside ends the program with one line: what is kept, and how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"apt-hooks: stopped; {kept()}", file=sys.stderr)
        sys.exit(STOPPED)
