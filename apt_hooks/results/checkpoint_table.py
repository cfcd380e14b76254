"""A run's checkpoints in numbers, a row each, as `apt-hooks pick` prints them and the report shows them."""

from __future__ import annotations

import math

from .read_checkpoints import SavedRun

_NUMBERS = {
    "gamma": ".2f",
    "gap": ".3g",
    "delta_noise": ".3g",
    "class_drift": ".2f",
    "free_drift": ".2f",
    "prompt_response": ".2f",
    "text_drift": ".2f",
    "held_out_gap": ".3g",
}


def checkpoint_table(run: SavedRun) -> tuple[list[str], list[list[str]]]:
    """The columns' names and the rows' cells: step, what was measured of any of them, and file."""
    columns = [name for name in _NUMBERS if not all(math.isnan(getattr(one, name)) for one in run.checkpoints)]
    rows, lost = [], run.gone()
    for one in run.checkpoints:
        values = [(getattr(one, name), _NUMBERS[name]) for name in columns]
        cells = ["-" if math.isnan(value) else format(value, digits) for value, digits in values]
        rows.append([str(one.step), *cells, f"{one.file}{' (gone)' if one.step in lost else ''}"])
    return ["step", *(name.replace("_", " ") for name in columns), "file"], rows


def what_is_missing(run: SavedRun) -> str:
    """Why drifts were not measured, or not all of them; empty where they were."""
    if run.about.get("off"):
        return f"no drifts: {run.about['off']}"
    if run.checkpoints and run.about.get("class") is None:
        return "no class drift: give identifier and class_word"
    return ""
