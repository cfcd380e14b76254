"""Commands that draw pictures with LoRAs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from apt_hooks.errors import AptError

from .options import GuidanceScale, Model, Prompt, Seed, Steps

app = typer.Typer()


@app.command(
    epilog="Example: `apt-hooks blend --model sd15/ --early out/lora-000002.safetensors --late out/lora.safetensors "
    '--prompt "sks dog in the snow" --out blend/`'
)
def blend(
    model: Model,
    prompt: Prompt,
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")],
    early: Annotated[Path | None, typer.Option(help="LoRA of an early step: follows the prompt.")] = None,
    late: Annotated[Path | None, typer.Option(help="LoRA of a late step: knows the subject.")] = None,
    sweep: Annotated[
        Path | None, typer.Option(help="In place of both: folder of checkpoints; scores each, and each pair.")
    ] = None,
    references: Annotated[Path | None, typer.Option(help="With --sweep: folder of pictures of the subject.")] = None,
    clip: Annotated[
        str | None, typer.Option(help="With --sweep: the CLIP that scores, a folder or a name; ViT-B/32 if not given.")
    ] = None,
    plain_prompt: Annotated[
        str | None, typer.Option(help="With --sweep: the prompt without the identifier, which CLIP does not know.")
    ] = None,
    seed: Seed = 0,
    count: Annotated[int, typer.Option(min=1, help="Pictures, from as many seeds on.")] = 1,
    steps: Steps = 50,
    guidance_scale: GuidanceScale = 7.5,
    guidance_lr: Annotated[
        float | None, typer.Option(help="How strongly to guide; 0.1 if not given, 0.01 for v-prediction.")
    ] = None,
    guide_from: Annotated[int, typer.Option(min=0, help="First denoising step that is guided.")] = 0,
    guide_to: Annotated[
        int | None, typer.Option(min=0, help="First that is not any more; to the end if not given.")
    ] = None,
    offload: Annotated[bool, typer.Option("--offload", help="Keep the attention in the CPU's memory.")] = False,
) -> None:
    """Draw with a late LoRA, guided by the attention of an early one (DreamBlend), beside what each draws alone."""
    from apt_hooks.integrations.sampling.blend_and_maps import run_blend, run_sweep

    shared: dict[str, Any] = {
        "seed": seed,
        "count": count,
        "options": {"num_inference_steps": steps, "guidance_scale": guidance_scale},
        "say": typer.echo,
        "guidance_lr": guidance_lr,
        "guidance_steps": (guide_from, guide_to),
        "offload": offload,
    }
    if sweep is not None and references is not None and early is late is None:
        run_sweep(model, sweep, references, prompt, out, clip=clip, plain_prompt=plain_prompt, **shared)
    elif early is not None and late is not None and sweep is references is clip is plain_prompt is None:
        run_blend(model, early, late, prompt, out, **shared)
    else:
        raise AptError("blend takes --early and --late, or --sweep and --references")


@app.command(
    epilog='Example: `apt-hooks maps --model sd15/ --lora out/lora.safetensors --prompt "sks dog in the snow"`, '
    "`apt-hooks maps --collapse --lora a.safetensors --lora b.safetensors ...`"
)
def maps(
    model: Model,
    prompt: Prompt,
    lora: Annotated[list[Path] | None, typer.Option(help="A LoRA; may be given again.")] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="PICTURE.png", help="Where to draw; maps.png if not given.")
    ] = None,
    collapse: Annotated[
        bool, typer.Option("--collapse", help="Draw nothing; print for each LoRA how far its attention has gone.")
    ] = False,
    timesteps: Annotated[
        str | None, typer.Option(help="Where to look, from 999 (noise) to 0; 800,500,200 if not given.")
    ] = None,
    seed: Seed = 0,
    steps: Steps = 50,
    guidance_scale: GuidanceScale = 7.5,
) -> None:
    """Draw where each word of a prompt looks, in the base model and with LoRAs."""
    from apt_hooks.integrations.sampling.blend_and_maps import run_collapse, run_maps

    options = {"num_inference_steps": steps, "guidance_scale": guidance_scale}
    if collapse:
        if out is not None or timesteps is not None:
            raise AptError("--collapse draws nothing: leave out --out and --timesteps")
        run_collapse(model, lora or [], prompt, seed=seed, options=options, say=typer.echo)
        return
    if out is not None and out.suffix.lower() != ".png":
        raise AptError(f"--out must name a .png file; found {out}")
    try:
        moments = [int(moment) for moment in (timesteps or "800,500,200").split(",")]
    except ValueError as error:
        raise AptError(f"--timesteps takes whole numbers, separated by commas; found {timesteps!r}") from error
    run_maps(
        model,
        lora or [],
        prompt,
        out or Path("maps.png"),
        seed=seed,
        timesteps=moments,
        options=options,
        say=typer.echo,
    )
