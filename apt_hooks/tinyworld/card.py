"""The card beside the weights: how they came about, what they draw. `python -m apt_hooks.tinyworld.card FOLDER`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..errors import errors_in_one_line
from ..pictures import draw_grid
from .evaluate import agreement
from .judges import load_judges
from .model import GUIDANCE, SAMPLING_STEPS, WEIGHTS, load_pipeline, sample
from .world import held_out_scenes

CAPTIONS = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=WEIGHTS / "pipeline")
    write_card(parser.parse_args().folder)


def write_card(folder: Path, seed: int = 0) -> None:
    """Judge the pipeline in a folder on held-out captions; writes README.md and samples.png into it."""
    pipeline = load_pipeline(folder)
    scenes = held_out_scenes(CAPTIONS, seed)
    shares = agreement(pipeline, load_judges(), scenes, seed)
    captions = [scene.caption() for scene in scenes[:64]]
    draw_grid(folder / "samples.png", sample(pipeline, captions, seed=seed), columns=8)
    record = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    sizes = {name: sum(p.numel() for p in getattr(pipeline, name).parameters()) for name in _PARTS}
    (folder / "README.md").write_text(_text(record, sizes, shares, captions), encoding="utf-8")


_PARTS = ("vae", "text_encoder", "unet")


def _text(record: dict[str, Any], sizes: dict[str, int], shares: dict[str, float], captions: list[str]) -> str:
    parts = ", ".join(f"{name} {count / 1e6:.2f} M" for name, count in sizes.items())
    lines = [
        "# The tiny world's model",
        "",
        "A text-to-image pipeline of diffusers for 64x64 pictures of a procedural world (`apt_hooks.tinyworld.world`),",
        f"in float16. Parameters: {parts}.",
        "",
        f"Made by `python -m apt_hooks.tinyworld.pretrain` with seed {record['seed']} on {record['device']}, torch "
        f"{record['torch']}; this card by `python -m apt_hooks.tinyworld.card`.",
        "",
        "## Data",
        "",
        *(f"- {line}" for line in record["data"]),
        "",
        "## Training",
        "",
        "| part | steps | batch | minutes | loss at the end |",
        "|---|---|---|---|---|",
        *(_training_row(name, record[name]) for name in ("text_encoder", "autoencoder", "unet", "decoder")),
        "",
        " ".join(["Losses over the steps are in `training.json`.", *record.get("notes", ())]),
        "",
        "## What it draws",
        "",
        f"Share of {CAPTIONS} captions of held-out combinations whose picture shows what was asked, read by the",
        f"attribute classifier; one picture a caption, guidance {GUIDANCE}, {SAMPLING_STEPS} steps of DPM-Solver++:",
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


def _training_row(name: str, stage: dict[str, Any]) -> str:
    last = ", ".join(f"{key} {value}" for key, value in stage["losses"][-1].items() if key != "step")
    return f"| {name} | {stage['steps']} | {stage['batch']} | {stage['seconds'] / 60:.0f} | {last} |"


if __name__ == "__main__":
    with errors_in_one_line():
        main()
