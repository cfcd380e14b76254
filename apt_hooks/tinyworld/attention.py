"""Where the words of a prompt look: cross-attention of the tiny world's model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..hooks.attention_maps import token_maps
from ..hooks.capture import FeatureCapture
from .model import encode_images, encode_texts


@torch.no_grad()
def attention_of_words(pipeline: Any, prompt: str, picture: Tensor) -> Tensor:
    """The up-blocks' cross-attention of a picture, noised to timestep 500: a map a word, [words, 16, 16].

    Mean over heads and layers, lower resolutions scaled up.
    """
    latents = encode_images(pipeline, picture[None] * 2 - 1)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    moment = torch.tensor([500])
    noisy = pipeline.training_scheduler.add_noise(latents, noise, moment)
    with FeatureCapture(pipeline.unet, representation=False) as capture:
        with capture.record() as features:
            pipeline.unet(noisy, moment, encode_texts(pipeline, [prompt]))
        maps = token_maps(capture.layers, features, (latents.shape[2], latents.shape[3]))[0]
    return maps[1 : len(prompt.split()) + 1]  # the first token is the start of the text
