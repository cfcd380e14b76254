"""Editing a user's training TOML without losing a comment or the order of anything."""

from __future__ import annotations

import codecs
from pathlib import Path

import tomlkit

from .config import AptConfig, read_toml
from .errors import AptError
from .files import write_atomically


def apply_preset(path: Path, name: str) -> str:
    """Make `preset = "NAME"` stand in the file's `[apt]` section, which is added at the end where there is none.

    Other keys of the section stay and override the preset. The result is checked before it is written.

    Returns:
        What was done, in words.

    Raises:
        AptError: the file is missing, not TOML, or would not be valid with this preset.
    """
    values = read_toml(path)
    AptConfig.preset(name)
    raw = path.read_bytes()
    content = raw.decode("utf-8-sig")
    bom = codecs.BOM_UTF8 if raw.startswith(codecs.BOM_UTF8) else b""
    ending = "\r\n" if "\r\n" in content else "\n"
    section = values.get("apt")
    if section is None:
        # Text, not a document: a section at the end touches nothing before it.
        gap = "" if not content else ending if content.endswith("\n") else ending * 2
        changed, done = f'{content}{gap}[apt]{ending}preset = "{name}"{ending}', f"added [apt] with preset {name}"
    elif not isinstance(section, dict):
        raise AptError(f"{path}: apt must be a section [apt]; found apt = {section!r}")
    else:
        AptConfig.from_mapping({**section, "preset": name})
        if section.get("preset") == name:
            return f"[apt] has preset {name} already"
        document = tomlkit.parse(content)
        value = tomlkit.item(name)
        value.trivia.trail = ending  # tomlkit ends a new line with \n in any file
        document["apt"]["preset"] = value
        had = section.get("preset")
        changed = tomlkit.dumps(document)
        done = f"[apt] preset is now {name}" + (f" (was {had})" if had else "")
    write_atomically(path, bom + changed.encode())
    return done


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
