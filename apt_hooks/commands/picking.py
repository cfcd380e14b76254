"""The command that says which checkpoint of a run to take."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from apt_hooks.errors import AptError
from apt_hooks.results.checkpoint_table import checkpoint_table, what_is_missing
from apt_hooks.results.read_checkpoints import SavedRun
from apt_hooks.results.verdict import Verdict

from .options import OwnGuidanceScale, OwnSteps, Seed, tell_left_out

app = typer.Typer()


@app.command(
    epilog="Examples: `apt-hooks pick out/`, `apt-hooks pick out/ --judge --model sdxl/ --references photos/ "
    '--prompts live --subject "sks dog" --class-word dog`'
)
def pick(
    context: typer.Context,
    run: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="A folder that a run has saved LoRAs in, or its RUN-checkpoints.jsonl."),
    ],
    judge: Annotated[
        bool, typer.Option("--judge", help="Draw with each checkpoint too, and judge it; needs the five options below.")
    ] = False,
    model: Annotated[str | None, typer.Option(help="As for `eval`: the base model.")] = None,
    references: Annotated[Path | None, typer.Option(help="Folder of photos of the subject.")] = None,
    prompts: Annotated[str | None, typer.Option(help="As for `eval`: `object`, `live`, or a file.")] = None,
    subject: Annotated[str | None, typer.Option(help="What the LoRAs call it: `sks dog`.")] = None,
    class_word: Annotated[str | None, typer.Option(help="What the base model calls it: `dog`.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="For pictures and scores; NAME-judged beside the LoRAs if not given.")
    ] = None,
    seed: Seed = 0,
    count: Annotated[int, typer.Option(min=1, help="Pictures of each prompt, from as many seeds on.")] = 4,
    batch: Annotated[int, typer.Option(min=1, help="Pictures at once.")] = 1,
    steps: OwnSteps = None,
    guidance_scale: OwnGuidanceScale = None,
    clip: Annotated[str | None, typer.Option(help="CLIP model for the prompt; ViT-B/32 if not given.")] = None,
    dino: Annotated[str | None, typer.Option(help="DINOv2 model for the subject; base if not given.")] = None,
) -> None:
    """Say which of a run's checkpoints to take, and why, by what was measured of each while it was trained.

    All of them in a table: gamma, gap and delta noise on the pictures that are trained on, how far other prompts have
    moved, and how much they still do. It says so where that does not tell. With --judge also by pictures: `eval`'s
    scores of each checkpoint, and which of them no other beats by both subject and prompt. Of several runs in a folder
    one that cannot be read is left out and named on stderr, and the exit code is then 1.
    """
    from apt_hooks.results.read_checkpoints import find_runs
    from apt_hooks.results.verdict import verdict

    task = {"model": model, "references": references, "prompts": prompts, "subject": subject, "class_word": class_word}
    sources = {name: context.get_parameter_source(name) for name in context.params if name not in ("run", "judge")}
    given = [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
    missing = [name for name, value in task.items() if value is None]
    if judge and missing:
        raise AptError(f"--judge draws with the checkpoints, and needs {_options(missing)} too")
    if given and not judge:
        raise AptError(f"{_options(given)}: only with --judge")
    left_out: list[str] = []
    runs = find_runs(run, left_out)
    if judge and len(runs) > 1:
        names = ", ".join(str(found.path) for found in runs)
        raise AptError(f"--judge takes one run; {run} has {len(runs)}, name one of {names}")
    for number, found in enumerate(runs):
        if number:
            typer.echo("")
        said = verdict(found.checkpoints, found.gone())
        for line in _lines(found, said):
            typer.echo(line)
        if said.picked is not None and not judge:
            typer.echo(
                "By these numbers alone, which are no match for pictures: look at those, or draw them with --judge."
            )
    if judge:
        from apt_hooks.integrations.judging.evaluation import Models
        from apt_hooks.integrations.judging.judged_run import judge_run

        (found,) = runs
        models = {name: value for name, value in {"clip": clip, "dino": dino}.items() if value is not None}
        drawing = {"seed": seed, "count": count, "batch": batch, "steps": steps, "guidance_scale": guidance_scale}
        task["out"] = out or found.path.with_name(f"{found.name}-judged")
        typer.echo("")
        for line in judge_run(found, models=Models(**models), say=typer.echo, **task, **drawing):  # type: ignore[arg-type]
            typer.echo(line)
    tell_left_out(left_out)


def _options(names: Sequence[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)


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
