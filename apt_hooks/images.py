"""Opening pictures and photos, with Pillow."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apt_hooks.errors import AptError

PHOTOS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def find_photos(folder: Path) -> tuple[Path, ...]:
    """The photos of a folder, by name.

    Raises:
        AptError: no folder, or no photo in it.
    """
    if not folder.is_dir():
        what = (
            "is no folder; name the one that it is in"
            if folder.exists()
            else "no such folder; name the one with the pictures"
        )
        raise AptError(f"--references {folder}: {what}")
    files = tuple(p for p in sorted(folder.glob("*")) if p.suffix.lower() in PHOTOS)
    if not files:
        raise AptError(f"--references {folder}: no pictures there ({', '.join(PHOTOS)})")
    return files


def open_picture(path: Path) -> Any:
    """A picture as Pillow's RGB image, upright.

    Raises:
        AptError: Pillow is missing; the file cannot be read, or is no picture.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise AptError(f'pictures need Pillow ({error}): pip install "apt-hooks[report]"') from error
    try:
        with Image.open(path) as file:
            return ImageOps.exif_transpose(file).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # by the kind of damage
        raise AptError(f"{path}: cannot be read as a picture ({' '.join(str(error).split())[:150]})") from error


def to_tensor(picture: Any) -> Tensor:
    """An RGB image of Pillow as [3, height, width], uint8."""
    values = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return values.view(picture.height, picture.width, 3).permute(2, 0, 1)


def bare_picture(path: Path) -> tuple[bytes, str]:
    """A picture's pixels alone, and their format: no file's metadata, which may name a model, a place or a person.

    A JPEG, as some hundreds have to fit into a page, or a PNG where both sides have at most 256 pixels; larger ones are
    made smaller, to 1024.

    Raises:
        AptError: as `open_picture`.
    """
    picture = open_picture(path)
    picture.thumbnail((1024, 1024))
    picture.info.clear()
    kind = "png" if max(picture.size) <= 256 else "jpeg"
    content = io.BytesIO()
    picture.save(content, format=kind, **({} if kind == "png" else {"quality": 92}))
    return content.getvalue(), kind
