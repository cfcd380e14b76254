"""TOML as sd-scripts will read it, and what is wrong with a file that it will not read."""

from __future__ import annotations

import codecs
import re
from pathlib import Path
from typing import Any

import toml

from .errors import AptError


def read_toml(path: str | Path) -> dict[str, Any]:
    """Parse a TOML file, as sd-scripts will.

    Raises:
        AptError: the file cannot be read, or is not TOML to sd-scripts.
    """
    try:
        return parse_toml(Path(path).read_bytes())
    except OSError as error:
        what = "Is a directory" if Path(path).is_dir() else error.strerror  # which Windows calls "Permission denied"
        raise AptError(f"{path}: cannot be read: {what}; give the path of a TOML file") from error
    except ValueError as error:
        raise AptError(f"{path}: is not valid TOML: {error}") from error


def parse_toml(content: bytes) -> dict[str, Any]:
    """Parse TOML with sd-scripts' own parser, the package `toml`, which takes some things otherwise than TOML's text.

    An array of whole and decimal numbers is refused, an ideographic space is a space. What it would misread in silence
    is refused here: a byte order mark, which becomes part of the first name, and a value that it takes to go on up to
    the end of the file.

    Raises:
        ValueError: it is not TOML, or no text in UTF-8; one line that tells where, what and the way out.
    """
    text = _text(content)
    try:
        values = toml.loads(text)
    except _PARSER_ERRORS as error:
        raise ValueError(_fault(text, error)) from error
    if not _is_closed(text):
        raise ValueError(_fault(text, ValueError(_OPEN)))
    return values


def _text(content: bytes) -> str:
    if content.startswith(codecs.BOM_UTF8):
        raise ValueError(
            "it begins with a byte order mark, which sd-scripts takes for part of the first name; save it as UTF-8 "
            'without one (not as "UTF-8 with BOM")'
        )
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or content[:1] != b"\0" == content[1:2]:
        raise ValueError('it is UTF-16, which editors on Windows call "Unicode"; save it as UTF-8')
    if b"\0" in content:
        raise ValueError("it has bytes that are 0, so it is no text; name the TOML file")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        before = content[content.rfind(b"\n", 0, error.start) + 1 : error.start].decode("utf-8")
        raise ValueError(
            f"line {line}, column {len(before) + 1}: it is not UTF-8 (byte 0x{content[error.start]:02X}, "
            f"{error.reason}); save it as UTF-8"
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")  # as `open` does


def _is_closed(text: str) -> bool:
    """Whether a section that follows would be seen as one."""
    try:
        return _AFTER in toml.loads(f"{text}\n[{_AFTER}]\n")
    except _PARSER_ERRORS:
        return False


_AFTER = "apt-hooks-after-the-end"
_PARSER_ERRORS = (ValueError, IndexError, KeyError, TypeError, AttributeError, RecursionError)
"""What the parser raises, which has no check of its own for some mistakes."""

_VALUE = (
    "this is no value: a text stands in quotes, a decimal number has a point (0.5), true and false are small, "
    "each bracket is closed, and a comment begins with #"
)
_OPEN = "the end of the file is part of a value"
_FAULTS = {
    _OPEN: "sd-scripts' parser takes the end of the file for part of this value: look for an array without its closing "
    "bracket, and for spaces or a comment behind the closing quotes of a text over several lines",
    "in key name|Key name|keyname": "write name = value, [section], or a comment behind #",
    "already exists": "there is such a section or name above: keep one, with the keys of both",
    "Duplicate keys": "there is a line of that name above: keep one of them",
    "escape": "a backslash in \"...\" begins a sign such as \\n: write / in a path, or put it in '...'",
    "[Kk]ey ?group|group name": "a section stands alone on its line, in brackets: [apt]",
    "quotes|Unterminated": "a text ends with the quotes that it begins with: close it",
    "homogeneous": "sd-scripts' parser takes no mixed arrays: write all its numbers alike, as in [1.0, 3.0]",
    "Empty value": "there is no value behind the =: write one, or take the line out",
    "invalid literal|to float|zeroes|digit|booleans|date or number": _VALUE,
}
"""By what is in the parser's words: what they mean, and the way out."""


def _fault(text: str, error: Exception) -> str:
    """Where the parser breaks off, at what, why, and the way out."""
    line, column = _where(text, error)
    found = " ".join(text.split("\n")[line - 1].split())
    found = found if len(found) <= 60 else f"{found[:57]}..."
    said = next((said for pattern, said in _FAULTS.items() if re.search(pattern, str(error))), None)
    if said is None:
        said = f"sd-scripts' parser breaks off here ({type(error).__name__}: {error}): {_VALUE}"
    return f"line {line}, column {column}, `{found}`: {said}"


def _where(text: str, error: Exception) -> tuple[int, int]:
    """Line and column, from 1, of the value, or the name, that the parser breaks off at, or never sees the end of."""
    lines = text.split("\n")
    if isinstance(error, toml.TomlDecodeError) and error.pos < len(text.rstrip()):
        line = error.lineno
        if "in key name" in error.msg:
            return line, error.colno
    else:  # it tells no line, or that it has come to the end: the one behind all that can be read
        whole = (n for n in range(len(lines) - 1, 0, -1) if _is_closed("\n".join(lines[:n])))
        line = next(whole, 0) + 1
    own = lines[line - 1]
    value = own[own.find("=") + 1 :].lstrip()
    return line, len(own) - len(value) + 1
