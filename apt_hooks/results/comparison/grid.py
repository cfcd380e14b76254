"""`apt-hooks compare`: reference, base model and each method side by side, as one picture."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from apt_hooks.errors import AptError
from apt_hooks.files import make_folder, write_figure
from apt_hooks.images import open_picture

from .folders import Comparison, read_comparison

DPI = 130  # of `write_figure`
LARGEST_SIDE = 320  # of a picture in the grid, in pixels
SMALL_SIDE = 160  # smaller ones than this are enlarged to it
LARGEST_AREA = 8_000_000  # of all pictures of the grid, in pixels: a file that can be sent around
GAP, LABEL, LINE = 8, 270, 26  # in pixels: between pictures, the prompts' column, a line of text


def run_grid(
    folders: Sequence[Path],
    out: Path,
    *,
    references: Path | None,
    rows: int,
    methods: Sequence[str] | None = None,
    say: Callable[[str], None],
) -> Path:
    """Draw a row a prompt: the reference photo, the base model's picture, each method's picture.

    Where there are more prompts than rows, they are evenly spread over the list. Each row shows one seed, the next
    row the next one, so that no method is shown at its best.

    Args:
        folders, references, methods: as for `read_comparison`.
        out: a .png file, or a folder for `grid.png`.
        rows: at most so many.
        say: takes each line of text for the user.

    Returns:
        The file written.

    Raises:
        AptError: as `read_comparison`; a picture that cannot be read; matplotlib is missing; `out` cannot be written.
    """
    if rows < 1:
        raise AptError(f"--rows must be at least 1; found {rows}")
    comparison = read_comparison(folders, references=references, methods=methods)
    is_file = out.suffix.lower() == ".png"
    path = out if is_file else out / "grid.png"
    make_folder(path.parent)
    shown = choose_rows(len(comparison.prompts), comparison.seeds, rows)
    _draw(path, comparison, shown)
    say(f"{len(shown)} of {len(comparison.prompts)} prompts, {', '.join(comparison.methods)} beside the base: {path}")
    return path


def choose_rows(prompts: int, seeds: Sequence[int], rows: int) -> list[tuple[int, int]]:
    """(prompt's index, seed) of each row: prompts evenly spread, from the first to the last, seeds in turn."""
    count = min(rows, prompts)
    chosen = [round(row * (prompts - 1) / max(1, count - 1)) for row in range(count)]
    return [(prompt, seeds[row % len(seeds)]) for row, prompt in enumerate(chosen)]


def box_of(size: tuple[int, int], pictures: int) -> tuple[int, int]:
    """Width and height in the grid of pictures of this size, when it holds so many."""
    longest, area = max(size), size[0] * size[1]
    scale = min(LARGEST_SIDE / longest, max(1.0, SMALL_SIDE / longest), math.sqrt(LARGEST_AREA / pictures / area))
    return round(size[0] * scale), round(size[1] * scale)


def _draw(path: Path, comparison: Comparison, rows: Sequence[tuple[int, int]]) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise AptError(f'the picture needs matplotlib ({error}): pip install "apt-hooks[report]"') from error
    headings, table = _table(comparison, rows)
    box = box_of(open_picture(table[0][-1]).size, len(rows) * len(headings))
    above = 20 + LINE * max(heading.count("\n") + 1 for heading in _headings(headings, box[0]))
    width = LABEL + len(headings) * (box[0] + GAP)
    height = above + len(rows) * (box[1] + GAP)
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    for column, heading in enumerate(_headings(headings, box[0])):
        x = LABEL + column * (box[0] + GAP) + box[0] / 2
        figure.text(x / width, 1 - (above - 8) / height, heading, ha="center", va="bottom", fontsize=11)
    for row, ((prompt, seed), files) in enumerate(zip(rows, table, strict=True)):
        top = above + row * (box[1] + GAP)
        label = f"{_fit(comparison.prompts[prompt].text, box[1] // LINE - 1)}\nseed {seed}"
        middle = 1 - (top + box[1] / 2) / height
        figure.text((LABEL - 14) / width, middle, label, ha="right", va="center", fontsize=9.5, linespacing=1.3)
        for column, file in enumerate(files):
            _paste(figure, file, box, LABEL + column * (box[0] + GAP), height - top - box[1])
    write_figure(path, figure)


def _table(comparison: Comparison, rows: Sequence[tuple[int, int]]) -> tuple[list[str], list[list[Path]]]:
    """Headings, and the files of each row; without photos there is no column of them."""
    photos = comparison.references
    headings = [*(["reference"] if photos else []), "base (prior)", *comparison.methods]
    table = []
    for row, (prompt, seed) in enumerate(rows):
        drawn = [comparison.picture(method, prompt, seed) for method in (None, *comparison.methods)]
        table.append([photos[row % len(photos)], *drawn] if photos else drawn)
    return headings, table


def _headings(names: Sequence[str], width: int) -> list[str]:
    return [textwrap.fill(name, max(8, width // 11)) for name in names]


def _fit(text: str, lines: int) -> str:
    """The text in lines of the prompts' column, at most so many."""
    return "\n".join(textwrap.wrap(text, 27, max_lines=max(1, lines), placeholder=" ..."))


def _paste(figure: Any, file: Path, box: tuple[int, int], x: int, y: int) -> None:
    """Draw a picture into its box, pixel for pixel: made smaller or larger before, not by the figure."""
    from numpy import asarray
    from PIL import Image, ImageOps

    picture = ImageOps.contain(open_picture(file), box, Image.Resampling.LANCZOS)
    figure.figimage(asarray(picture), x + (box[0] - picture.width) // 2, y + (box[1] - picture.height) // 2)
