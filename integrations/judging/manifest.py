"""`manifest.json`: what the pictures of a folder are of, so that no others are mixed with them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from apt_hooks.errors import AptError
from apt_hooks.files import write_atomically
from apt_hooks.results.comparison.folders import BASE, FORMAT, MANIFEST, Prompt
from apt_hooks.training.run import version

Manifest = dict[str, Any]


def new_manifest(
    model: str,
    files: Mapping[str, str | Path],
    digests: Mapping[str, str],
    photos: Sequence[Path],
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    sampling: Mapping[str, Any],
) -> Manifest:
    """As it is to be written; `digests` tell a LoRA's file from that of another training of the same name."""
    return {
        "format": FORMAT,
        "apt_hooks": version(),
        "model": str(Path(model).resolve()) if Path(model).exists() else model,
        "loras": {name: str(Path(path).resolve()) for name, path in files.items()},
        "digests": dict(digests),
        "references": [str(photo.resolve()) for photo in photos],
        "prompts": [{"prompt": prompt.text, "plain": prompt.plain} for prompt in prompts],
        "seeds": list(seeds),
        "sampling": dict(sampling),
    }


def digest(path: Path) -> str:
    """Of a file's content.

    Raises:
        AptError: it cannot be read.
    """
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise AptError(f"{path}: cannot be read: {error.strerror or error}") from error


def read_before(out: Path) -> Manifest | None:
    """The manifest that a folder has already.

    Raises:
        AptError: it is none.
    """
    path = out / MANIFEST
    try:
        found = json.loads(path.read_bytes())
        return {key: found[key] for key in ("model", "loras", "digests", "prompts", "seeds", "sampling")}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AptError(f"{path}: is no manifest of an evaluation ({error!r}); choose another --out") from error


def check_same(out: Path, before: Manifest | None, wanted: Manifest) -> None:
    """Refuse a folder with pictures of other settings; of the sampling, what is not known yet is not compared.

    Raises:
        AptError: other settings, another file of a LoRA, or pictures of unknown settings.
    """
    if before is None:
        for name in (BASE, *wanted["loras"]):
            if any((out / name).glob("*.png")):
                raise AptError(
                    f"--out {out}: {name}/ has pictures already, and no {MANIFEST} says how they were drawn; choose "
                    "another folder"
                )
        return
    pairs = {key: (before[key], wanted[key]) for key in ("model", "prompts", "seeds")}
    pairs |= {key: (before["sampling"].get(key), value) for key, value in wanted["sampling"].items()}
    for key, (there, here) in pairs.items():
        if there != here:
            what = f"{key} {_short(there)}, here {_short(here)}" if key != "prompts" else "other prompts"
            raise AptError(f"--out {out}: holds pictures of {what}; choose another folder, or remove this one")
    for name, own in wanted["digests"].items():
        if before["digests"].get(name, own) != own and any((out / name).glob("*.png")):
            raise AptError(
                f"--out {out}: holds pictures of another {name} than {wanted['loras'][name]} is now; "
                f"remove {out / name}, or choose another folder"
            )


def write_manifest(out: Path, before: Manifest | None, wanted: Manifest) -> None:
    """With what was there before: its LoRAs, and of its sampling what `wanted` does not know; completes `wanted`."""
    before = before or {"loras": {}, "digests": {}, "sampling": {}}
    wanted["sampling"] = {**before["sampling"], **wanted["sampling"]}
    merged = {key: {**before[key], **wanted[key]} for key in ("loras", "digests")}
    write_atomically(out / MANIFEST, (json.dumps({**wanted, **merged}, indent=1) + "\n").encode())


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
