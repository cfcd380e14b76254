"""Augmenting a batch on its way through sd-scripts' trainer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from apt_hooks.hooks.frozen import frozen_base
from apt_hooks.method.augmentation import Placement, color_of


def moved(batch: dict[str, Any], placement: Placement, *, images: bool) -> dict[str, Any]:
    """The batch with its masks, and if asked its images, zoomed out and rotated."""
    result = dict(batch)
    if images:
        result["images"] = placement.apply(batch["images"], -1.0)
    # What a zoom-out uncovers belongs to no subject and is not painted in: 0 in a mask, which an image stores as -1.
    for name, nothing in (("alpha_masks", 0.0), ("conditioning_images", -1.0), ("masks", 0.0)):
        if batch.get(name) is not None:
            result[name] = placement.apply(batch[name], nothing, "bhw" if name == "alpha_masks" else "bchw")
    if batch.get("masks") is not None:
        # As the data set makes them (`--train_inpainting`): a mask of zeros and ones, and the image with nothing under
        # it. Where the latents are moved in place of the images, those of the masked images are too, by the trainer's
        # second call of `shift_scale_latents`.
        result["masks"] = (result["masks"] >= 0.5).to(batch["masks"].dtype)
        if images:
            chosen = placement.chosen.to(result["masks"].device)[:, None, None, None]
            masked = result["images"] * (result["masks"] < 0.5)
            result["masked_images"] = torch.where(chosen, masked, batch["masked_images"])
    return result


def black_latent(encode: Callable[[Tensor], Tensor], vae: Any, device: Any) -> tuple[Tensor, int]:
    """What the VAE encodes black to, [channels], before the trainer's scaling, and its pixels a latent's side.

    The mean away from the border, which leaves of a sampled latent nothing of its sampling. The VAE works on `device`,
    where xformers has its kernels, and in float32, since half precision overflows in SDXL's; it then goes back to where
    and what it was. No random stream is moved.

    Args:
        encode: the trainer's own, of images [batch, 3, height, width], to [batch, channels, height, width] or, with one
            frame, [batch, channels, 1, height, width].
    """
    parameter = next(vae.parameters())
    home, dtype = parameter.device, parameter.dtype
    vae.to(device, torch.float32)
    try:
        with frozen_base([vae], contextlib.nullcontext):
            latent = encode(torch.full((1, 3, _BLACK, _BLACK), -1.0, device=device)).float()
    finally:
        vae.to(home, dtype)
    return color_of(latent), _BLACK // latent.shape[-2]


_BLACK = 256
