"""Trainers' options that change what noise is learned, and what that does to the indicator."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence

logger = logging.getLogger("apt_hooks")

OPTIONS = ("noise_offset", "multires_noise_iterations", "ip_noise_gamma", "input_perturbation")
"""As sd-scripts and diffusers' scripts call them; each is off where it is absent, None or 0."""


def tell_noise_options(args: argparse.Namespace, names: Sequence[str] = OPTIONS) -> None:
    """Say which of these are on: a LoRA that learns such noise is ahead of the base model without having overfitted."""
    used = [f"{name} = {value}" for name in names if (value := getattr(args, name, None))]
    if used:
        logger.warning(
            "apt-hooks: %s: over a base model that was not trained with this noise, a LoRA that learns it opens a gap "
            "that is no overfitting, and gamma is higher by that (docs/tinyworld-tuning.md measured it for its model)",
            ", ".join(used),
        )
