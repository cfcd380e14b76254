"""Metadata of a LoRA that is saved already."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from apt_hooks.errors import AptError
from apt_hooks.files import write_atomically


def add_metadata(path: Path, metadata: Mapping[str, str]) -> None:
    """Add keys to the header of a safetensors file; its tensors stay byte for byte.

    diffusers gives no way to hand metadata to a save. The format is 8 bytes of length (little endian), that many bytes
    of JSON, then the tensors, at places counted from there.

    Raises:
        AptError: the file cannot be read or written, or is no safetensors file.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise AptError(f"{path}: cannot be read: {error.strerror}") from error
    start = 8 + int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8:start])
        old = header.pop("__metadata__", {})
        end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
        if start + end != len(content):
            raise ValueError(f"{len(content)} bytes where its header tells of {start + end}")
        text = json.dumps(
            {"__metadata__": {**old, **metadata}, **header}, ensure_ascii=False, separators=(",", ":")
        ).encode()
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        raise AptError(f"{path}: is no safetensors file, or not all of one ({error})") from error
    text += b" " * (-len(text) % 8)  # the tensors begin aligned, as the format wants
    write_atomically(path, len(text).to_bytes(8, "little") + text + content[start:])
