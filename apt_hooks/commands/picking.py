"""The command that says which checkpoint of a run to take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from apt_hooks.results.checkpoint_table import checkpoint_table, what_is_missing
from apt_hooks.results.read_checkpoints import SavedRun
from apt_hooks.results.verdict import Verdict

app = typer.Typer()


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
    names, cells = checkpoint_table(run)
    marks = [">" if one is found.picked else "" for one in run.checkpoints]
    rows = [["", *names], *([mark, *row] for mark, row in zip(marks, cells, strict=True))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = ["  ".join(cell.rjust(width) for cell, width in zip(row[:-1], widths, strict=False)) for row in rows]
    missing = what_is_missing(run)
    return [
        f"{run.name}: {run.path}",
        *(f"{line}  {row[-1]}" for line, row in zip(table, rows, strict=True)),
        *([missing] if missing else []),
        *found.sentences,
    ]
