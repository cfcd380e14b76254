"""Inserting marked lines into other people's files, and taking them out again to the byte.

Works on bytes: encodings, line endings and comments in any language stay as they are. Only whole lines are inserted and
each ends with `MARK`, so that undoing is dropping them, whatever else was edited in between.
"""

from __future__ import annotations

import ast
import difflib
import importlib.metadata
import io
import json
import re
import tokenize
from collections.abc import Iterable, Sequence

from apt_hooks.errors import AptError

MARK = "# [apt-hooks]"

Places = list[tuple[int, tuple[str, ...]]]
"""Lines to insert, ASCII, without mark and line ending, each group with the number of the line that it goes before."""


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


class Statements:
    """Places beside the statements of a Python file.

    Args:
        content: the file, without inserted lines.
        name: of the file, for errors.
    """

    def __init__(self, content: bytes, name: str) -> None:
        self._lines = content.splitlines()
        self._name = name
        tokens = tokenize.tokenize(io.BytesIO(content).readline)
        comments = [t for t in tokens if t.type == tokenize.COMMENT and not t.line[: t.start[1]].strip()]
        self._comments = {comment.start[0] for comment in comments}

    def before(self, anchor: ast.stmt, *lines: str) -> tuple[int, tuple[str, ...]]:
        """Where lines go that run before a statement, indented as it is; a comment above stays with the statement."""
        at = min([anchor.lineno, *(d.lineno for d in getattr(anchor, "decorator_list", ()))]) - 1
        self._check(anchor)
        while at in self._comments:
            at -= 1
        return at, self._placed(anchor, lines)

    def after(self, anchor: ast.stmt, *lines: str) -> tuple[int, tuple[str, ...]]:
        """Where lines go that run after a statement, indented as it is."""
        self._check(anchor)
        return anchor.end_lineno or anchor.lineno, self._placed(anchor, lines)

    def _placed(self, anchor: ast.stmt, lines: tuple[str, ...]) -> tuple[str, ...]:
        own = self._lines[anchor.lineno - 1]
        indent = own[: len(own) - len(own.lstrip())].decode()
        return tuple(indent + line for line in lines)

    def _check(self, anchor: ast.stmt) -> None:
        first, last = self._lines[anchor.lineno - 1], self._lines[(anchor.end_lineno or anchor.lineno) - 1]
        rest = last[anchor.end_col_offset :].split(b"#")[0].strip()
        if first[: anchor.col_offset].strip() or rest:
            raise AptError(
                f"{self._name}: looked for one statement in line {anchor.lineno}, found "
                f"`{first.decode(errors='replace').strip()}`; put each on a line of its own. Nothing was changed"
            )


def patched_python(content: bytes, places: Iterable[tuple[int, Sequence[str]]], name: str) -> bytes:
    """`insert_lines` into a Python file, in its encoding, once it is known that the result is Python.

    Raises:
        AptError: it is not, or as `insert_lines`.
    """
    encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
    new = insert_lines(content, places, name, encoding.removesuffix("-sig"))
    try:
        ast.parse(new)
    except (SyntaxError, ValueError) as error:
        raise AptError(
            f"{name}: the inserted lines do not fit ({error}); please report it. Nothing was changed"
        ) from error
    return new


def strip(content: bytes) -> bytes:
    """`content` without the marked lines."""
    return b"".join(line for line in content.splitlines(keepends=True) if not _is_marked(line))


def stripped_python(content: bytes, name: str) -> bytes:
    """`strip` of a Python file, once it is known that no piece of an inserted line is left, and what is left is Python.

    Raises:
        AptError: an inserted line has lost its mark; or what is left is no Python, although the file is: a formatter
            has broken inserted lines apart, and the marks are on pieces of them, or a line among them is the user's.
    """
    plain = strip(content)
    if left := [(n, line) for n, line in _unmarked(content) if _OURS.search(line.split(b"#")[0])]:
        (number, line), more = left[0], f" (and {len(left) - 1} more)" if left[1:] else ""
        raise AptError(
            f"{name}: inserted lines were rewritten (by a formatter?): line {number}{more} is of apt-hooks and has "
            f"lost the mark {MARK} at its end: {_shown(line)}; put that back or take the line out, or take the file "
            "from where it came from. Nothing was changed"
        )
    if plain != content and _error(content) is None and (error := _error(plain)) is not None:
        unmarked = _unmarked(content)
        number, line = unmarked[max(0, min(error.lineno or 1, len(unmarked)) - 1)] if unmarked else (1, b"")
        raise AptError(
            f"{name}: inserted lines were rewritten (by a formatter?) and cannot be told from its own: line {number}, "
            f"{_shown(line)}, does not stand without them; undo that, or take the file from where it came from. "
            "Nothing was changed"
        )
    return plain


def is_patched(content: bytes) -> bool:
    """Whether any line is marked."""
    return any(map(_is_marked, content.splitlines()))


def diff(before: bytes, after: bytes, name: str) -> str:
    """A unified diff to read; bytes that are no UTF-8 are shown as question marks."""
    old, new = (content.decode("utf-8", "replace").splitlines() for content in (before, after))
    return "\n".join(difflib.unified_diff(old, new, f"a/{name}", f"b/{name}", lineterm=""))


def install_hint() -> str:
    """The command that brings apt-hooks into an environment, from where this one came from (PEP 610)."""
    origin = importlib.metadata.distribution("apt-hooks").read_text("direct_url.json")
    if origin is None:
        return "pip install apt-hooks"
    found = json.loads(origin)
    vcs = found.get("vcs_info")
    url = f"{vcs['vcs']}+{found['url']}@{vcs['commit_id']}" if vcs else found["url"]
    # It becomes part of an f-string in the trainer's file.
    return f"pip install {url}".translate({ord(c): f"%{ord(c):02X}" for c in "\"'{}\\"})


_OURS = re.compile(
    rb"\bapt_hooks_(?:run|words|prompts|black|again|adapter)\b"
    rb"""|(?:add_argument\(\s*|^\s*)["']--apt_(?:config|preset)["']"""
)
"""What stands in inserted lines, and not in a trainer's own."""


def _unmarked(content: bytes) -> list[tuple[int, bytes]]:
    """The lines that `strip` leaves, with their numbers, from 1."""
    return [(n, line) for n, line in enumerate(content.splitlines(), 1) if not _is_marked(line)]


def _shown(line: bytes) -> str:
    text = line.decode("utf-8", "replace").strip()
    return f"`{text if len(text) <= 60 else f'{text[:57]}...'}`"


def _error(content: bytes) -> SyntaxError | None:
    try:
        ast.parse(content)
    except SyntaxError as error:
        return error
    except ValueError as error:  # a null byte
        return SyntaxError(str(error))
    return None


def _is_marked(line: bytes) -> bool:
    return line.rstrip().endswith(MARK.encode("ascii"))  # an editor may have put spaces behind it
