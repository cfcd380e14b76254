"""How far LoRAs' attention has gone from their base model's, on the way of the base model's own pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from apt_hooks.hooks.attention_guidance import RunDenoiser
from apt_hooks.hooks.attention_maps import attention_shift
from apt_hooks.hooks.capture import FeatureCapture, Features

from .denoising_steps import check_pipeline, denoising_steps
from .loras import LoraFile, Loras


def attention_collapse(
    pipeline: Any,
    files: Mapping[str, LoraFile],
    call: Callable[[], object],
) -> dict[str, float]:
    """`attention_shift` of each LoRA: mean over denoising steps and pictures.

    All of them, and the base model, see the same latents: those that the base model's sampling comes by.

    Args:
        pipeline: of diffusers, without LoRAs.
        files: by name.
        call: calls the pipeline; with prompts that hold the identifier.
    """
    check_pipeline(pipeline)
    shifts: dict[str, list[Tensor]] = {name: [] for name in files}
    with Loras(pipeline, files) as loras, FeatureCapture(pipeline.unet, representation=False) as capture:

        def read(name: str | None, inputs: Tensor, predict: RunDenoiser) -> Features:
            with loras.active(name), torch.no_grad(), capture.record() as features:
                predict(inputs)
            return features

        def before(step: int, inputs: Tensor, predict: RunDenoiser) -> None:
            base = read(None, inputs, predict)
            for name, found in shifts.items():
                found.append(attention_shift(capture.layers, read(name, inputs, predict), base).mean().cpu())

        with loras.active(None), denoising_steps(pipeline, before=before):
            call()
    return {name: float(torch.stack(found).mean()) for name, found in shifts.items()}
