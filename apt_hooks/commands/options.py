"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[
    str, typer.Option(help="Folder in diffusers' format, one-file checkpoint, name on the hub, or `tinyworld`.")
]
Prompt = Annotated[str, typer.Option(help="With the identifier that the LoRAs were trained with.")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the noise.")]
Steps = Annotated[int, typer.Option(min=1, help="Denoising steps.")]
GuidanceScale = Annotated[float, typer.Option(help="Classifier-free guidance.")]
