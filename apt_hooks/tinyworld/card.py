"""The card beside the weights: how they came about, what they draw. `python -m apt_hooks.tinyworld.card FOLDER`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..errors import errors_in_one_line
from ..results.pictures import draw_grid
from .datasets import held_out_scenes
from .denoisers import DENOISERS, Denoiser
from .evaluate import agreement
from .judge_networks import load_judges
from .model import PIPELINES, denoiser_of, load_pipeline, sample

CAPTIONS = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=PIPELINES["unet"])
    write_card(parser.parse_args().folder)


def write_card(folder: Path, seed: int = 0) -> None:
    """Judge the pipeline in a folder on held-out captions; writes README.md and samples.png into it."""
    pipeline = load_pipeline(folder)
    scenes = held_out_scenes(CAPTIONS, seed)
    shares = agreement(pipeline, load_judges(), scenes, seed)
    captions = [scene.caption() for scene in scenes[:64]]
    draw_grid(folder / "samples.png", sample(pipeline, captions, seed=seed), columns=8)
    record = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    denoiser = denoiser_of(pipeline.components)
    parts = [_size(pipeline, folder, part) for part in ("vae", "text_encoder", denoiser.part)]
    (folder / "README.md").write_text(_text(record, denoiser, parts, shares, captions), encoding="utf-8")


def _size(pipeline: Any, folder: Path, part: str) -> str:
    count = sum(p.numel() for p in getattr(pipeline, part).parameters())
    return f"{part} {count / 1e6:.2f} M" + ("" if (folder / part).exists() else " (that of the U-Net's pipeline)")


def _text(
    record: dict[str, Any], denoiser: Denoiser, parts: list[str], shares: dict[str, float], captions: list[str]
) -> str:
    steps = f"{denoiser.sampling_steps} steps of {denoiser.sampler}"
    lines = [
        "# The tiny world's model",
        "",
        "A text-to-image pipeline of diffusers for 64x64 pictures of a procedural world (`apt_hooks.tinyworld.world`),",
        f"in float16. Parameters: {', '.join(parts)}.",
        *denoiser.remarks,
        "",
        f"Made by `python -m apt_hooks.tinyworld.pretrain{record.get('options', '')}` with seed {record['seed']} on "
        f"{record['device']}, torch {record['torch']}; this card by `python -m apt_hooks.tinyworld.card`.",
        "",
        "## Data",
        "",
        *(f"- {line}" for line in record["data"]),
        "",
        "## Training",
        "",
        "| part | steps | batch | minutes | loss at the end |",
        "|---|---|---|---|---|",
        *(_training_row(name, record[name]) for name in _STAGES if name in record),
        "",
        " ".join(["Losses over the steps are in `training.json`.", *record.get("notes", ())]),
        "",
        "## What it draws",
        "",
        f"Share of {CAPTIONS} captions of held-out combinations whose picture shows what was asked, read by the",
        f"attribute classifier; one picture a caption, guidance {denoiser.guidance}, {steps}:",
        "",
        "| " + " | ".join(shares) + " |",
        "|---" * len(shares) + "|",
        "| " + " | ".join(f"{share:.3f}" for share in shares.values()) + " |",
        "",
        "The first 64 of them, row by row:",
        "",
        "![64 samples](samples.png)",
        "",
        *(f"{i // 8 + 1}.{i % 8 + 1} {caption}  " for i, caption in enumerate(captions)),
        "",
    ]
    return "\n".join(lines)


_STAGES = ("text_encoder", "autoencoder", *DENOISERS, "decoder")


def _training_row(name: str, stage: dict[str, Any]) -> str:
    last = ", ".join(f"{key} {value}" for key, value in stage["losses"][-1].items() if key != "step")
    return f"| {name} | {stage['steps']} | {stage['batch']} | {stage['seconds'] / 60:.0f} | {last} |"


if __name__ == "__main__":
    with errors_in_one_line():
        main()
