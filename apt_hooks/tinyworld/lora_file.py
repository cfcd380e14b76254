"""The LoRA on a denoiser, as a file."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from ..files import write_atomically
from .model import denoiser_and_module


def save_lora(pipeline: Any, path: Path) -> None:
    """Write the LoRA that is on the denoiser, for diffusers' `load_lora_weights`.

    Raises:
        AptError: the file cannot be written.
    """
    from peft.utils import get_peft_model_state_dict

    denoiser, module = denoiser_and_module(pipeline)
    layers = get_peft_model_state_dict(module, adapter_name="concept")
    with tempfile.TemporaryDirectory() as folder:
        pipeline.save_lora_weights(folder, **{f"{denoiser.part}_lora_layers": layers}, weight_name=path.name)
        write_atomically(path, Path(folder, path.name).read_bytes())
