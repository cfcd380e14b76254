"""Trainers' options that change what noise is learned, and what that does to the indicator."""

from __future__ import annotations

import argparse
import logging

logger = logging.getLogger("apt_hooks")

OPTIONS = ("noise_offset", "multires_noise_iterations", "ip_noise_gamma", "input_perturbation")
"""As sd-scripts and diffusers' scripts call them; each is off where it is absent, None or 0."""


def tell_noise_options(args: argparse.Namespace) -> None:
    """Say which are on: a LoRA that learns such noise is ahead of the base model without having overfitted."""
    used = [f"{name} = {value}" for name in OPTIONS if (value := getattr(args, name, None))]
    if used:
        logger.warning(
            "apt-hooks: %s: the base model does not know this noise, and a LoRA that learns it opens a gap that is no "
            "overfitting: gamma is higher by that (measured in docs/tinyworld.md)",
            ", ".join(used),
        )
