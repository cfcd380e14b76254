"""Runs of which nothing can be said yet."""

from __future__ import annotations

STEPS_PER_BIN = 5
"""With so many steps of one sample a bin, one of ten bins has not been seen in one run of twenty; before that gamma
and gap are what a few pictures happened to give."""

MOST_BINS = 20
"""More are counted as so many: nobody has gamma by the timestep for the sake of every single one."""

LITTLE_NOISE = 3e-4
"""Delta noise of a LoRA that has hardly learned. On the tiny world it is four times so much at step 3 of 600, and at
step 100 a hundred times; DreamBooth on SDXL has 0.01 at step 1000 (arXiv 2507.02687, figure)."""


def why_too_short(steps: int, bins: int, unseen: int, delta_noise: float, compared: int | None = None) -> str:
    """What a run lacks for anything to be said of it, as the end of a sentence; empty where it lacks nothing.

    Args:
        steps: how many it had.
        bins, unseen: of timesteps, and how many of them were not seen.
        delta_noise: of its last steps; NaN where it is not known.
        compared: in how many of the steps the base model ran (`frozen_every`), where that is known; None: in all.
    """
    said, told = [], f"{steps} steps"
    if compared is not None and compared < steps:
        told += f", the base model in {compared} of them (frozen_every)"
    if delta_noise < LITTLE_NOISE:
        said.append(f"the LoRA has hardly moved the model (delta noise {delta_noise:.1e})")
    if (steps if compared is None else compared) < STEPS_PER_BIN * min(bins, MOST_BINS):
        never = f"{unseen} of {bins} bins of timesteps were never seen"
        said.append(never if unseen else f"there are {bins} bins of timesteps to be seen")
    return f"{told}, and {' and '.join(said)}" if said else ""
