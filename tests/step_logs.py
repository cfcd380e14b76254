"""Step logs for tests that read them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

START = {
    "apt_hooks": "0.1.0",
    "preset": "sdxl",
    "config": {"objective": "apt", "num_bins": 3, "indicator_scale": 1000.0, "lambda_attn": 0.5},
    "overrides": {"lambda_attn": 0.5},
    "augment_space": "image",
    "indicator_units": "epsilon",
    "trainer": "sd-scripts 0.10.1",
    "torch": "2.13.0",
    "python": "3.11.7",
    "started": "2026-11-22T23:00:00+00:00",
}


def start(resumed_from: int | None = None, **changes: Any) -> dict[str, Any]:
    """The line before a run's first step, or before the first after it was resumed."""
    return {"run": {**START, **changes, **({"resumed_from": resumed_from} if resumed_from else {})}}


def step(number: int, gammas: Sequence[float] = (0.9, 0.5, 0.1), **changes: Any) -> dict[str, Any]:
    """A step's line; values differ from step to step."""
    wave = 0.02 * (1 + math.sin(number))
    values = {"loss_tuned": 0.05 + wave, "loss_frozen": 0.06 + wave, "loss_weight": 0.5, "augmented": float(number % 2)}
    terms = {"l_mu": 0.001, "l_sigma": 0.002, "l_attn": 0.003, "l_joint": None, "delta_noise": 0.0001 * number}
    gaps = [gamma / 100 for gamma in gammas]
    return {"step": number, "gamma": list(gammas), "gap": gaps, **values, **terms, **changes}


def checkpoint(number: int, gap: float, drift: float, **changes: Any) -> dict[str, Any]:
    """The line of a saved LoRA."""
    measured = {"delta_noise": 0.02, "class_drift": drift, "free_drift": drift / 2, "prompt_response": 1 - drift / 3}
    return {
        "step": number,
        "file": f"lora-step{number:08d}.safetensors",
        "gamma": [0.5, 0.7],
        "gap": [gap, gap],
        **measured,
        "text_drift": None,
        **changes,
    }


def write(path: Path, lines: Sequence[dict[str, Any]], end: str = "") -> Path:
    """The lines as a file, and `end` behind them, such as the piece of a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + end)
    return path
