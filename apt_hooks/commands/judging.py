"""Commands that judge runs: their logs, their pictures, by numbers and by people."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from apt_hooks.errors import AptError

from .options import AnyModel, OwnGuidanceScale, OwnSteps, Seed, tell_left_out

app = typer.Typer()


@app.command(
    "eval",
    epilog="Example: `apt-hooks eval --model sd15/ --lora dreambooth.safetensors --lora apt.safetensors "
    '--references photos/ --prompts live --subject "sks dog" --class-word dog --out eval/`',
)
def evaluate(
    model: AnyModel,
    lora: Annotated[list[Path], typer.Option(help="A LoRA; may be given again.")],
    references: Annotated[Path, typer.Option(help="Folder of photos of the subject.")],
    prompts: Annotated[
        str,
        typer.Option(help="DreamBooth's list `object` or `live`, or a file, a prompt a line with {} for the subject."),
    ],
    subject: Annotated[str, typer.Option(help="What the LoRAs call it: `sks dog`.")],
    class_word: Annotated[str, typer.Option(help="What the base model and the judges call it: `dog`.")],
    out: Annotated[Path, typer.Option(help="Folder for pictures and numbers; goes on where it stopped.")],
    seed: Seed = 0,
    count: Annotated[int, typer.Option(min=1, help="Pictures of each prompt, from as many seeds on.")] = 4,
    batch: Annotated[int, typer.Option(min=1, help="Pictures at once.")] = 1,
    steps: OwnSteps = None,
    guidance_scale: OwnGuidanceScale = None,
    metrics: Annotated[
        str, typer.Option(help="Which of clip, dino, hps, fidelity (FID, KID, precision, recall), vendi.")
    ] = "clip,dino,hps,fidelity,vendi",
    clip: Annotated[str | None, typer.Option(help="CLIP model, a folder or a name; ViT-B/32 if not given.")] = None,
    dino: Annotated[str | None, typer.Option(help="DINOv2 model; base if not given.")] = None,
    hps: Annotated[str | None, typer.Option(help="HPSv2 as a CLIP model of transformers.")] = None,
    inception: Annotated[Path | None, typer.Option(help="Weights for FID and KID; downloaded if not given.")] = None,
    vgg: Annotated[Path | None, typer.Option(help="Weights for precision and recall; downloaded if not given.")] = None,
) -> None:
    """Draw prompts by a base model and with LoRAs, and judge what each has learned and lost.

    Several GPUs: `accelerate launch -m apt_hooks eval ...`.
    """
    from apt_hooks.integrations.judging.evaluation import Models, run_eval

    given = {"clip": clip, "dino": dino, "hps": hps, "inception": inception, "vgg": vgg}
    run_eval(
        model,
        lora,
        references,
        prompts,
        out,
        subject=subject,
        class_word=class_word,
        seed=seed,
        count=count,
        batch=batch,
        steps=steps,
        guidance_scale=guidance_scale,
        metrics=[name.strip() for name in metrics.split(",") if name.strip()],
        models=Models(**{name: value for name, value in given.items() if value is not None}),  # type: ignore[arg-type]
        say=typer.echo,
    )


@app.command(epilog="Example: `apt-hooks report out/ other/lora-apt.jsonl plain-logs/ --out report.html`")
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...",
            help="Logs, RUN-apt.jsonl, or folders that hold some; of TensorBoard's files too, for runs without APT.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="PAGE.html", help="Where to write the page.")] = Path("report.html"),
) -> None:
    """Show runs on one page: which checkpoint and why, sample pictures, indicator, losses. Also while they go on.

    What cannot be read is left out and named on stderr, and the exit code is then 1, as that of `cat` would be.
    """
    from apt_hooks.results.report.page import run_report

    tell_left_out(run_report(runs, out, say=typer.echo))


@app.command(epilog="Example: `apt-hooks watch out/`")
def watch(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A log, RUN-apt.jsonl, or a folder: its newest.")],
    once: Annotated[bool, typer.Option("--once", help="Show what there is, and end.")] = False,
) -> None:
    """Show a run in the terminal while it goes on: gamma a bin, losses, speed. Ctrl-C ends it."""
    from apt_hooks.results.report.watch import run_watch

    run_watch(run, once=once)


@app.command(
    epilog="Examples: `apt-hooks compare eval/ --out grid.png`, `apt-hooks compare eval/ --page rate.html`, "
    "`apt-hooks compare eval/ --result votes-ann.jsonl --result votes-bob.jsonl`"
)
def compare(
    folders: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="What `eval` wrote; several of equal settings.")
    ],
    out: Annotated[Path | None, typer.Option(metavar="PICTURE.png", help="The grid; compare.png if not given.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="Prompts in the grid, at most.")] = 8,
    page: Annotated[
        Path | None,
        typer.Option(metavar="PAGE.html", help="In place of a grid: a page to send to raters, names hidden."),
    ] = None,
    result: Annotated[
        list[Path] | None,
        typer.Option(metavar="VOTES.jsonl", help="In place of both: what a rater saved; may be given again."),
    ] = None,
    references: Annotated[
        Path | None, typer.Option(help="Folder of photos of the subject; those that `eval` took if not given.")
    ] = None,
    methods: Annotated[
        str | None, typer.Option(help="With --page, --result: two to six LoRAs, separated by commas; all if not given.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="With --page: of the orders that raters see.")] = 0,
) -> None:
    """Put pictures of several LoRAs side by side, in a grid or on a page for people to vote on, names hidden."""
    from apt_hooks.results.comparison.grid import run_grid
    from apt_hooks.results.comparison.rating import write_page
    from apt_hooks.results.comparison.result import run_votes

    if sum(given not in (None, []) for given in (out, page, result)) > 1:
        raise AptError("--out draws a grid, --page writes a page, --result counts votes: name one of them")
    names = None if methods is None else [name.strip() for name in methods.split(",") if name.strip()]
    if result:
        run_votes(folders, result, references=references, methods=names, say=typer.echo)
    elif page is not None:
        if page.suffix.lower() not in (".html", ".htm"):
            raise AptError(f"--page must name a .html file; found {page}")
        write_page(folders, page, references=references, methods=names, seed=seed, say=typer.echo)
    elif names is not None:
        raise AptError("--methods goes with --page and --result")
    else:
        picture = out or Path("compare.png")
        if picture.suffix.lower() != ".png":
            raise AptError(f"--out must name a .png file; found {picture}")
        run_grid(folders, picture, references=references, rows=rows, say=typer.echo)
