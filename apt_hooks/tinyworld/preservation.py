"""What keeps a class as the base model has it, beside the training on its one member: two losses of baselines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..hooks.frozen import AdaptersOff
from .concepts import IDENTIFIER
from .model import sample

CLASS_PICTURES = 100
"""As many as diffusers' DreamBooth scripts draw if nothing else is asked for."""


def class_caption(caption: str) -> str:
    """A caption without the identifier: of any member of the class."""
    return " ".join(word for word in caption.split() if word != IDENTIFIER)


def class_pictures(
    pipeline: Any, captions: list[str], adapters_off: AdaptersOff, seed: int
) -> tuple[Tensor, list[str]]:
    """What the base model draws of the class, for DreamBooth's prior preservation (Ruiz et al. 2023, arXiv 2208.12242).

    As there the prompts are the captions without the identifier, in turns.

    Returns:
        [`CLASS_PICTURES`, 3, 64, 64], from 0 to 1, and the caption of each.
    """
    prompts = [class_caption(captions[i % len(captions)]) for i in range(CLASS_PICTURES)]
    with adapters_off():
        return sample(pipeline, prompts, seed=seed), prompts


def output_preservation_loss(predict: Callable[[], Tensor], adapters_off: AdaptersOff) -> Tensor:
    """Differential output preservation, as ai-toolkit has it: the mean square by which the LoRA changes a prediction.

    Args:
        predict: runs the denoiser on the noisy latents of the batch, told the class captions.
    """
    with torch.no_grad(), adapters_off():
        wanted = predict()
    return (predict() - wanted).square().mean()
