"""Inserting marked lines into other people's files, and taking them out again to the byte.

Works on bytes: encodings, line endings and comments in any language stay as they are. Only whole lines are inserted and
each ends with `MARK`, so that undoing is dropping them, whatever else was edited in between.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
from collections.abc import Iterable, Sequence

from apt_hooks.errors import AptError

MARK = "# [apt-hooks]"


@dataclasses.dataclass(frozen=True)
class Insertion:
    """Lines to put before or after the one line that is `anchor`.

    Args:
        anchor: the whole line, indentation included, without its line ending; it must stand exactly once.
        lines: the lines to insert, ASCII, without mark and line ending.
        after: behind the anchor rather than before it.
        within: the anchor stands in the block that this line begins (also whole, and standing once), that is before the
            next line that is not indented; None looks in the whole file.
    """

    anchor: str
    lines: tuple[str, ...]
    after: bool = False
    within: str | None = None


def insert(content: bytes, insertions: Iterable[Insertion], name: str) -> bytes:
    """`content` with the lines of all insertions; those of an earlier version of them go first.

    Raises:
        AptError: an anchor does not stand exactly once; the message names file, anchor and what was found.
    """
    content = strip(content)
    lines = content.splitlines(keepends=True)
    places = []
    for insertion in insertions:
        block = range(len(lines)) if insertion.within is None else _block(lines, insertion.within, name)
        at = _only(lines, insertion.anchor, block, name)
        places.append((at + insertion.after, insertion.lines))
    return insert_lines(content, places, name)


def insert_lines(
    content: bytes, places: Iterable[tuple[int, Sequence[str]]], name: str, encoding: str = "utf-8"
) -> bytes:
    """`content` with marked lines, each group before the line of that number, counted from 0; of one number in order.

    Raises:
        AptError: the line before a group ends the file without a newline.
    """
    lines = content.splitlines(keepends=True) or [b""]
    common = lines[0][len(lines[0].rstrip(b"\r\n")) :] or b"\n"
    for at, new in sorted(places, key=lambda place: place[0])[::-1]:
        before = lines[at - 1] if at else common
        ending = before[len(before.rstrip(b"\r\n")) :]
        if not ending:
            raise AptError(
                f"{name}: the line `{before.decode(errors='replace').strip()}` ends the file without a newline; add one"
            )
        lines[at:at] = [f"{line}  {MARK}".encode(encoding) + ending for line in new]
    return b"".join(lines)


def strip(content: bytes) -> bytes:
    """`content` without the marked lines."""
    return b"".join(line for line in content.splitlines(keepends=True) if not _is_marked(line))


def stripped_python(content: bytes, name: str) -> bytes:
    """`strip` of a Python file, once it is known that what is left is Python.

    Raises:
        AptError: it is not, although the file is: a formatter has broken inserted lines apart, and the marks are on
            pieces of them.
    """
    plain = strip(content)
    if plain != content and _is_python(content) and not _is_python(plain):
        raise AptError(
            f"{name}: inserted lines were rewritten (by a formatter?) and cannot be told from its own; undo that, or "
            "take the file from where it came from. Nothing was changed"
        )
    return plain


def is_patched(content: bytes) -> bool:
    """Whether any line is marked."""
    return any(map(_is_marked, content.splitlines()))


def diff(before: bytes, after: bytes, name: str) -> str:
    """A unified diff to read; bytes that are no UTF-8 are shown as question marks."""
    old, new = (content.decode("utf-8", "replace").splitlines() for content in (before, after))
    return "\n".join(difflib.unified_diff(old, new, f"a/{name}", f"b/{name}", lineterm=""))


def _is_python(content: bytes) -> bool:
    try:
        ast.parse(content)
    except (SyntaxError, ValueError):
        return False
    return True


def _is_marked(line: bytes) -> bool:
    return line.rstrip(b"\r\n").endswith(MARK.encode("ascii"))


def _block(lines: list[bytes], header: str, name: str) -> range:
    start = _only(lines, header, range(len(lines)), name) + 1
    end = next((i for i in range(start, len(lines)) if lines[i][:1] not in b" \t\r\n#)"), len(lines))
    return range(start, end)


def _only(lines: list[bytes], anchor: str, where: range, name: str) -> int:
    wanted = anchor.encode("utf-8")
    found = [i for i in where if lines[i].rstrip(b"\r\n") == wanted]
    if len(found) != 1:
        times = f"it stands {len(found)} times" if found else "it is not there"
        raise AptError(f"{name}: looked for the line `{anchor.strip()}` to patch at, {times}; nothing was changed")
    return found[0]
