"""Which photos of a folder get captions, and what of them a model is shown."""

from __future__ import annotations

import base64
import contextlib
import io
import re
from pathlib import Path
from typing import Any

from apt_hooks.errors import AptError
from apt_hooks.images import PHOTOS

from .answers import NoCaption, shorten

_JPEG_QUALITY = 90
_REPEATS = re.compile(r"\d+(?:_.*)?")


def find_photos(folder: Path) -> list[Path]:
    """The photos in a folder and in sd-scripts' folders one below, as `10_sks dog/`, in their order.

    These are the ones sd-scripts trains on, whether the folder is its `train_data_dir` or its `image_dir`.

    Raises:
        AptError: no such folder, no photos, or two photos that would share a caption.
    """
    if not folder.is_dir():
        raise AptError(f"{folder}: no such folder; name the one that the photos are in")
    try:
        below = [path for path in sorted(folder.iterdir()) if path.is_dir() and _REPEATS.fullmatch(path.name)]
        photos = [photo for place in (folder, *below) for photo in _photos_in(place)]
    except OSError as error:
        raise AptError(f"{folder}: cannot be read: {error.strerror}") from error
    if not photos:
        raise AptError(
            f"{folder}: no photos there ({', '.join(PHOTOS)}), nor in folders named as sd-scripts wants them, "
            "10_sks dog/ for example; name the folder that holds them"
        )
    owners: dict[Path, Path] = {}
    for photo in photos:
        other = owners.setdefault(caption_file(photo), photo)
        if other != photo:
            raise AptError(f"{other} and {photo.name} would share {caption_file(photo).name}; rename one of them")
    return photos


def unseen_folders(folder: Path) -> list[str]:
    """Names of the folders one below that hold photos which `find_photos` leaves out."""
    found = []
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.name.startswith(".") and not _REPEATS.fullmatch(path.name):
            with contextlib.suppress(OSError):  # what cannot be opened was not meant
                found += [path.name] if _photos_in(path) else []
    return found


def caption_file(photo: Path) -> Path:
    """Where trainers look for a photo's caption."""
    return photo.with_suffix(".txt")


def load_photo(path: Path, max_side: int) -> Any:
    """A photo as a PIL picture: turned as its camera says, RGB, no side longer than `max_side` pixels, no metadata.

    Raises:
        NoCaption: it cannot be read.
        AptError: Pillow is missing.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise AptError(f'photos are read with Pillow ({error}): pip install "apt-hooks[caption]"') from error
    try:
        with Image.open(path) as file:
            # Transparent parts become what is stored there, as in the trainers.
            picture = ImageOps.exif_transpose(file).convert("RGB")
        picture.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    # Broken files fail in the ways of whatever decodes them.
    except Exception as error:
        raise NoCaption(f"cannot be read as a picture ({shorten(str(error), 100)})") from error
    picture.info.clear()  # where it was taken and by whom is nobody's business
    return picture


def jpeg(picture: Any) -> bytes:
    """A picture of `load_photo` as it is sent."""
    content = io.BytesIO()
    picture.save(content, format="JPEG", quality=_JPEG_QUALITY)
    return content.getvalue()


def data_uri(picture: Any) -> str:
    """A picture of `load_photo` as the address of itself."""
    return "data:image/jpeg;base64," + base64.b64encode(jpeg(picture)).decode()


def _photos_in(folder: Path) -> list[Path]:
    """Hidden files are none: some systems put a "._photo.jpg" beside each photo."""
    files = (path for path in folder.iterdir() if path.suffix.lower() in PHOTOS and not path.name.startswith("."))
    return sorted(path for path in files if path.is_file())
