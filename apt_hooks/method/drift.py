"""What a LoRA has done to a prompt's prediction, as numbers that mean the same on every model: how far it has moved it,
and how much of what the prompt says is still in it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import AptError


def prediction_drift(tuned: Tensor, frozen: Tensor, without_text: Tensor) -> float:
    """How far the LoRA has moved the predictions of a prompt, in units of what the prompt itself does to them.

        sqrt( median over samples of  |tuned - frozen|^2 / |frozen - without_text|^2 )

    At 1 the LoRA moves a prediction as far as the prompt does. Ours. A ratio taken sample by sample, since it then does
    not depend on what the model predicts: an error of v, x0 or velocity is one of epsilon times a number of the
    sample's timestep (`error_units`), which is above and below the line. Nor does it depend on the size of the latents,
    or on how much of the noise can be told at all. The (lower) median, since at low noise a prompt hardly matters, and
    a few ratios are huge.

    Args:
        tuned, frozen: [samples, ...], of the same noisy latents, timesteps and prompt.
        without_text: of the same shape, what the frozen model predicts for the empty prompt.

    Raises:
        AptError: the shapes differ.
    """
    if not tuned.shape == frozen.shape == without_text.shape:
        shapes = [tuple(x.shape) for x in (tuned, frozen, without_text)]
        raise AptError(f"tuned, frozen and without_text must have one shape; found {shapes}")
    tuned, frozen, without_text = (x.flatten(1).double() for x in (tuned, frozen, without_text))
    moved = (tuned - frozen).square().sum(dim=1)
    said = (frozen - without_text).square().sum(dim=1)
    # Where the model does not listen to its text at all, whatever moved it moved it endlessly far.
    ratio = torch.where(moved == 0, 0.0, moved / said)
    return float(ratio.median().sqrt())


def prompt_response(tuned: Tensor, tuned_without_text: Tensor, frozen: Tensor, frozen_without_text: Tensor) -> float:
    """How much of what a prompt does to the base model's predictions it still does with the LoRA: 1 all, 0 nothing.

        median over samples of  <d, d_frozen> / |d_frozen|^2,   d = tuned - tuned_without_text, d_frozen alike

    Ours. The difference that a prompt makes is what classifier-free guidance goes along, so this is how far guidance
    still goes in the prompt's direction. What the LoRA does to predictions with and without text alike, as learning a
    subject does, is no matter here: that is what it has over `prediction_drift`, and why it alone does not tell of a
    model that is broken. Sample by sample, and the (lower) median, for the reasons given there.

    Args:
        tuned, frozen: [samples, ...], of the same noisy latents, timesteps and prompt.
        tuned_without_text, frozen_without_text: of the same shape, what both predict for the empty prompt.

    Returns:
        Of the samples in which the frozen model listens to its text at all; NaN where it does in none.

    Raises:
        AptError: the shapes differ.
    """
    given = tuned, tuned_without_text, frozen, frozen_without_text
    if len({x.shape for x in given}) > 1:
        raise AptError(f"all four predictions must have one shape; found {[tuple(x.shape) for x in given]}")
    tuned, tuned_without_text, frozen, frozen_without_text = (x.flatten(1).double() for x in given)
    said, asked = tuned - tuned_without_text, frozen - frozen_without_text
    return float(((said * asked).sum(dim=1) / asked.square().sum(dim=1)).nanmedian())


def embedding_drift(tuned: Tensor, frozen: Tensor) -> float:
    """How far the embeddings of unrelated texts have moved, in units of how far these lie from each other.

        sqrt( mean over texts of |tuned - frozen|^2  /  mean over texts of |frozen - mean over texts of frozen|^2 )

    Args:
        tuned, frozen: [texts, ...]; two texts or more, padded alike.

    Raises:
        AptError: the shapes differ, or it is a single text.
    """
    if tuned.shape != frozen.shape or len(frozen) < 2:
        raise AptError(
            f"tuned and frozen must have one shape [texts, ...] of two or more; found {tuple(tuned.shape)} and "
            f"{tuple(frozen.shape)}"
        )
    tuned, frozen = tuned.flatten(1).double(), frozen.flatten(1).double()
    moved, apart = (tuned - frozen).square().sum(), (frozen - frozen.mean(dim=0)).square().sum()
    return float(torch.where(moved == 0, 0.0, moved / apart).sqrt())
