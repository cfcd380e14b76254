"""The command that says which checkpoint of a run to take."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from apt_hooks.results.read_checkpoints import Checkpoint, SavedRun
from apt_hooks.results.verdict import Verdict

app = typer.Typer()

_COLUMNS = {
    "gamma": ".2f",
    "gap": ".3g",
    "delta_noise": ".3g",
    "class_drift": ".2f",
    "free_drift": ".2f",
    "text_drift": ".2f",
    "held_out_gap": ".3g",
}


@app.command(epilog="Example: `apt-hooks pick out/`")
def pick(
    run: Annotated[
        Path,
        typer.Argument(metavar="RUN_DIR", help="Folder that a run has saved LoRAs in, or its NAME-checkpoints.jsonl."),
    ],
) -> None:
    """Say which of a run's checkpoints to take, and why, by what was measured of each while it was trained.

    All of them in a table: gamma, gap and delta noise on the pictures that are trained on, and how far other prompts
    have moved. It says so where that does not tell.
    """
    from apt_hooks.results.read_checkpoints import find_runs
    from apt_hooks.results.verdict import verdict

    for number, found in enumerate(find_runs(run)):
        if number:
            typer.echo("")
        for line in _lines(found, verdict(found.checkpoints)):
            typer.echo(line)


def _lines(run: SavedRun, found: Verdict) -> list[str]:
    """The table and the verdict."""
    columns = [name for name in _COLUMNS if not all(math.isnan(getattr(one, name)) for one in run.checkpoints)]
    rows = [["", "step", *(name.replace("_", " ") for name in columns), "file"]]
    for one in run.checkpoints:
        cells = [_cell(one, name) for name in columns]
        gone = "" if run.path.with_name(one.file).exists() else " (gone)"
        rows.append([">" if one is found.picked else "", str(one.step), *cells, f"{one.file}{gone}"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = ["  ".join(cell.rjust(width) for cell, width in zip(row[:-1], widths, strict=False)) for row in rows]
    said = [f"{run.name}: {run.path}"]
    said += [f"{line}  {row[-1]}" for line, row in zip(table, rows, strict=True)]
    if run.about.get("off"):
        said.append(f"no drifts: {run.about['off']}")
    elif run.checkpoints and run.about.get("class") is None:
        said.append("no class drift: give identifier and class_word")
    return [*said, *found.sentences]


def _cell(checkpoint: Checkpoint, name: str) -> str:
    value = getattr(checkpoint, name)
    return "-" if math.isnan(value) else format(value, _COLUMNS[name])
