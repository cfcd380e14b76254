"""Options that several commands have, and what they say of what they leave out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

Model = Annotated[
    str, typer.Option(help="Folder in diffusers' format, one-file checkpoint, name on the hub, or `tinyworld`.")
]
AnyModel = Annotated[
    str,
    typer.Option(
        help="Folder in diffusers' format, name on the hub, one-file checkpoint of SD or SDXL, `tinyworld` or "
        "`tinyworld-transformer`."
    ),
]
Prompt = Annotated[str, typer.Option(help="With the identifier that the LoRAs were trained with.")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the noise.")]
Steps = Annotated[int, typer.Option(min=1, help="Denoising steps.")]
GuidanceScale = Annotated[float, typer.Option(help="Classifier-free guidance.")]
OwnSteps = Annotated[
    int | None, typer.Option(min=1, help="Denoising steps; if not given 50 of SD and SDXL, else the pipeline's own.")
]
OwnGuidanceScale = Annotated[
    float | None,
    typer.Option(help="Classifier-free guidance; if not given 7.5 of SD and SDXL, else the pipeline's own."),
]


def tell_left_out(lines: Sequence[str]) -> None:
    """Say on stderr what could not be read beside what was shown, and end with exit code 1 if there is any."""
    for line in lines:
        typer.echo(f"apt-hooks: left out: {line}", err=True)
    if lines:
        raise typer.Exit(1)
