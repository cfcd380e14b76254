"""Editing a user's training TOML: one line changes, every other byte stays."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from .config import AptConfig, parse_toml, read_toml
from .errors import AptError
from .files import write_atomically

_HEADER = re.compile(rb"^(?:\xef\xbb\xbf)?[ \t]*\[[ \t]*(?:apt|\"apt\"|'apt')[ \t]*\][ \t]*(?:#.*)?$")
_ANY_HEADER = re.compile(rb"^[ \t]*\[")
_PRESET = re.compile(rb"^([ \t]*(?:preset|\"preset\"|'preset')[ \t]*=[ \t]*)(?:\"[^\"]*\"|'[^']*')(.*)$")


def apply_preset(path: Path, name: str) -> str:
    """Make `preset = "NAME"` stand in the file's `[apt]` section, which is added at the end where there is none.

    Other keys of the section stay and override the preset. A line is changed or added as text: a TOML writer moved
    comments and line endings elsewhere. The result is parsed and compared before it is written.

    Returns:
        What was done, in words.

    Raises:
        AptError: the file is missing, not TOML, would not be valid with this preset, or has `apt` in a form that cannot
            be edited line by line (an inline table, dotted keys).
    """
    values = read_toml(path)
    section = values.get("apt", {})
    if not isinstance(section, dict):
        raise AptError(f"{path}: apt must be a section [apt]; found apt = {section!r}")
    AptConfig.from_mapping({**section, "preset": name})
    had = section.get("preset")
    if had == name:
        return f"[apt] has preset {name} already"
    new = _with_preset(path.read_bytes(), name, has_section="apt" in values, has_preset=had is not None)
    if new is None or not _equal(_parsed(new), {**values, "apt": {**section, "preset": name}}):
        raise AptError(f'{path}: cannot be edited line by line; write preset = "{name}" under a line [apt] yourself')
    write_atomically(path, new)
    if "apt" not in values:
        return f"added [apt] with preset {name}"
    return f"[apt] preset is now {name}" + (f" (was {had})" if had else "")


def check_section(path: Path) -> AptConfig:
    """The `[apt]` section of a training TOML, checked as the trainer will read it.

    Raises:
        AptError: as `AptConfig.from_toml`; or an array mixes whole and decimal numbers, which is TOML but which
            sd-scripts' parser (the package `toml`) refuses.
    """
    config = AptConfig.from_toml(path)
    for key, value in read_toml(path)["apt"].items():
        if isinstance(value, list) and len({type(v) for v in value}) > 1:
            raise AptError(
                f"{path}: [apt] {key} = {value!r} mixes whole and decimal numbers, which sd-scripts cannot read: "
                f"write {[float(v) for v in value]!r}"
            )
    return config


def _with_preset(content: bytes, name: str, *, has_section: bool, has_preset: bool) -> bytes | None:
    """The file's bytes with the preset in place; None where the lines it takes were not found."""
    ending = b"\r\n" if b"\r\n" in content else b"\n"
    line = f'preset = "{name}"'.encode() + ending
    lines = content.splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        lines[-1] += ending
    if not has_section:
        return b"".join([*lines, *([ending] if lines else []), b"[apt]" + ending, line])
    start = next((i for i, text in enumerate(lines) if _HEADER.match(text.rstrip(b"\r\n"))), None)
    if start is None:
        return None
    if not has_preset:
        lines.insert(start + 1, line)  # first, where it is seen before what overrides it
        return b"".join(lines)
    for i in range(start + 1, len(lines)):
        text = lines[i].rstrip(b"\r\n")
        if _ANY_HEADER.match(text):
            break
        found = _PRESET.match(text)
        if found:
            lines[i] = found[1] + f'"{name}"'.encode() + found[2] + lines[i][len(text) :]
            return b"".join(lines)
    return None


def _equal(one: Any, other: Any) -> bool:
    """Equality for which nan is nan, and which minds types: 1 is not 1.0."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    return repr(one) == repr(other)


def _parsed(content: bytes) -> dict[str, Any] | None:
    try:
        return parse_toml(content)
    except ValueError:
        return None
