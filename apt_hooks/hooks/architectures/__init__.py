"""The known architectures, a short file each; a new one is added to `ALL`."""

from __future__ import annotations

from ..layout import Architecture
from . import flux, sd3, unet_output_blocks, unet_up_blocks

ALL: tuple[Architecture, ...] = (unet_up_blocks, unet_output_blocks, flux, sd3)
"""The first whose `is_one` says so is taken."""
