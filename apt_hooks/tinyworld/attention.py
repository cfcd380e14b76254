"""Where the words of a prompt look: cross-attention of the tiny world's model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..hooks.attention_maps import token_maps
from ..hooks.capture import FeatureCapture
from .model import denoiser_and_module, encode_images, encode_texts


@torch.no_grad()
def attention_of_words(pipeline: Any, prompt: str, picture: Tensor) -> Tensor:
    """Where a picture, noised to timestep 500, attends to text in the observed blocks: a map a word, [words, 16, 16].

    Mean over heads and layers, lower resolutions scaled up.
    """
    denoiser, module = denoiser_and_module(pipeline)
    latents = encode_images(pipeline, picture[None] * 2 - 1)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    moment = torch.tensor([500])
    noisy = denoiser.add_noise(pipeline.training_scheduler, latents, noise, moment)
    condition = denoiser.condition(encode_texts(pipeline, [prompt]))
    with FeatureCapture(module, representation=False) as capture:
        with capture.record() as features:
            denoiser.predict(module, noisy, moment, condition)
        maps = token_maps(capture.layers, features, (latents.shape[2], latents.shape[3]))[0]
    return maps[1 : len(prompt.split()) + 1]  # the first token is the start of the text
