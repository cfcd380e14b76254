"""Editing a user's training TOML: one line changes, every other byte stays. And which files are none.

Not by tomlkit (0.15.2, tried in place of `_with_preset`), for what these tests show of it:

- what sd-scripts' parser reads it refuses, as other spaces than ASCII's around "=" and lines that end in CR alone
  (test_tomledit: `..._space_of_any_kind_...`, `..._every_file_that_is_called_good_...`);
- where tables of an array stand before and behind [apt], it writes the later ones before [apt]; into a file of CRLF it
  writes a line that ends in LF (test_cli: `..._sets_it_keeps_all_else_...`);
- it puts a key of its own behind the comment of the next section (test_cli: `..._between_the_next_section_...`).

It would edit `apt = { ... }` and dotted keys too, which are refused here.
"""

from __future__ import annotations

import datetime
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .config import AptConfig
from .errors import AptError
from .files import write_atomically
from .tomlread import parse_toml, read_toml

_HEADER = re.compile(r"\s*\[\s*(?:apt|\"apt\"|'apt')\s*\]\s*(?:#.*)?")
_ANY_HEADER = re.compile(r"\s*\[")
_PRESET = re.compile(r"(\s*(?:preset|\"preset\"|'preset')\s*=\s*)(?:\"[^\"]*\"|'[^']*')(.*)")


def apply_preset(path: Path, name: str) -> str:
    """Make `preset = "NAME"` stand in the file's `[apt]` section, which is added at the end where there is none.

    Other keys of the section stay and override the preset. A line is changed or added as text, and the result is
    parsed and compared before it is written.

    Returns:
        What was done, in words.

    Raises:
        AptError: as `check_section`, but for a missing section; or `apt` has a form that cannot be edited line by line
            (an inline table, dotted keys).
    """
    values = _training_toml(path)
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
    """The `[apt]` section of a training TOML, or of a file for `--apt_config`, as the trainer will read it.

    Raises:
        AptError: as `AptConfig.from_toml`; or the file is one that the trainer does not read `[apt]` from, or has a
            name that it would pass over in silence.
    """
    _training_toml(path)
    return AptConfig.from_toml(path)


def is_for_apt_config(path: Path) -> bool:
    """Whether a file holds `[apt]` alone, as one for `--apt_config` does; a training TOML holds more."""
    return read_toml(path).keys() == {"apt"}


def _training_toml(path: Path) -> dict[str, Any]:
    if path.suffix.lower() == ".json":
        raise AptError(
            f"{path}: is JSON, as kohya_ss saves its settings, and cannot hold an [apt] section: write that to a file "
            f"apt.toml of its own, and give --apt_config apt.toml ({_GUIS})"
        )
    values = read_toml(path)
    if "datasets" in values:
        raise AptError(f"{path}: {_of_datasets(path, values)}")
    if any(_is_of_lora_easy(value) for value in values.values()):
        raise AptError(
            f"{path}: was saved by LoRA_Easy_Training_Scripts ([general_args.args], ...): no trainer reads it, and "
            "that GUI drops [apt]. Write [apt] to a file of its own, and in the GUI, under Extra Args, give the name "
            f"apt_config and as value the file's full path ({_GUIS})"
        )
    for name in values:
        if name != "apt" and name.lower() == "apt":
            raise AptError(
                f"{path}: has a section [{name}], which is not the one that is read; write [apt], in small letters"
            )
    arguments = _arguments(values)
    for name in arguments:
        if not name.isidentifier():
            raise AptError(
                f"{path}: the name {name!r} is none that an argument can have, so the trainer passes over its line in "
                "silence; write letters, digits and _ (and look for invisible characters), or take the line out"
            )
    if "apt_config" in arguments:
        raise AptError(
            f"{path}: has apt_config = {arguments['apt_config']!r}, a file for [apt] alone, beside which the trainer "
            "takes no [apt] here: name that file, or take apt_config out"
        )
    return values


_GUIS = "docs/sd-scripts.md, GUIs"


def _is_of_lora_easy(section: Any) -> bool:
    return isinstance(section, dict) and any(isinstance(section.get(key), dict) for key in ("args", "dataset_args"))


def _arguments(values: dict[str, Any]) -> dict[str, Any]:
    """What the trainer takes for its arguments: it puts all sections together."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if name != "apt":
            found.update(value if isinstance(value, dict) else {name: value})
    return found


def _of_datasets(path: Path, values: dict[str, Any]) -> str:
    """What is wrong with `[apt]` in a file that has `[[datasets]]`."""
    others = [name for name in values if name not in ("general", "datasets", "apt")]
    if others:
        return (
            f"has [[datasets]] beside {others[0]}: sd-scripts reads them only from a file of their own; move [general] "
            'and [[datasets]] to one, say dataset.toml, and write dataset_config = "dataset.toml" here'
        )
    found = "".join(f"; here that is {other}" for other in _name_as_dataset_config(path))
    return (
        "has [[datasets]], so it is a dataset config, in which sd-scripts allows no [apt]: that goes into the training "
        f"TOML, the file for --config_file, which names this one as dataset_config{found}"
    )


def _name_as_dataset_config(path: Path) -> Iterator[Path]:
    """The TOML files beside a dataset config that name it."""
    for other in sorted(path.parent.glob("*.toml")):
        try:
            named = _arguments(read_toml(other)).get("dataset_config")
        except AptError:  # whatever that file is, it names none
            continue
        if re.split(r"[/\\]", str(named))[-1] == path.name:
            yield other


def _with_preset(content: bytes, name: str, *, has_section: bool, has_preset: bool) -> bytes | None:
    """The file's bytes with the preset in place; None where the lines it takes were not found."""
    text = content.decode("utf-8")
    ending = "\r\n" if "\r\n" in text else "\n"
    line = f'preset = "{name}"{ending}'
    lines = io.StringIO(text, newline="").readlines()  # not splitlines, which splits at more than ends of lines
    if lines and not lines[-1].endswith(("\n", "\r")):
        lines[-1] += ending
    if not has_section:
        return "".join([*lines, *([ending] if lines else []), f"[apt]{ending}", line]).encode("utf-8")
    start = next((i for i, own in enumerate(lines) if _HEADER.fullmatch(own.rstrip("\r\n"))), None)
    if start is None:
        return None
    if not has_preset:
        lines.insert(start + 1, line)  # first, where it is seen before what overrides it
        return "".join(lines).encode("utf-8")
    for i in range(start + 1, len(lines)):
        own = lines[i].rstrip("\r\n")
        if _ANY_HEADER.match(own):
            break
        found = _PRESET.fullmatch(own)
        if found:
            lines[i] = f'{found[1]}"{name}"{found[2]}{lines[i][len(own) :]}'
            return "".join(lines).encode("utf-8")
    return None


def _equal(one: Any, other: Any) -> bool:
    """Equality for which nan is nan, and which minds types: 1 is not 1.0."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, datetime.datetime):  # whose time zone shows as an object that is another one each time
        return bool(one == other)
    return repr(one) == repr(other)


def _parsed(content: bytes) -> dict[str, Any] | None:
    try:
        return parse_toml(content)
    except ValueError:
        return None
