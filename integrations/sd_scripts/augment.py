"""Augmenting a batch on its way through sd-scripts' trainer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from apt_hooks.augmentation import Placement


@contextlib.contextmanager
def timesteps_drawn(timesteps: Tensor) -> Iterator[None]:
    """Inside, the trainer's sampler returns the timesteps that it was already asked for."""
    from library import train_util

    sampler = train_util.get_timesteps
    train_util.get_timesteps = lambda *args, **kwargs: timesteps
    try:
        yield
    finally:
        train_util.get_timesteps = sampler


def draw_timesteps(args: Any, noise_scheduler: Any, batch_size: int, device: Any) -> Tensor:
    """Timesteps of a batch by the trainer's own sampler, in the range of its arguments."""
    from library import train_util

    low = 0 if args.min_timestep is None else args.min_timestep
    high = noise_scheduler.config.num_train_timesteps if args.max_timestep is None else args.max_timestep
    return train_util.get_timesteps(low, high, batch_size, device)


def moved(batch: dict[str, Any], placement: Placement, *, images: bool) -> dict[str, Any]:
    """The batch with its masks, and if asked its images, zoomed out and rotated."""
    result = dict(batch)
    if images:
        result["images"] = placement.apply(batch["images"], -1.0)
    # What a zoom-out uncovers belongs to no subject: 0 in a mask, which a mask image stores as -1.
    for name, nothing in (("alpha_masks", 0.0), ("conditioning_images", -1.0)):
        if batch.get(name) is not None:
            result[name] = placement.apply(batch[name], nothing)
    return result


@torch.no_grad()
def black_latent(vae: Any, device: Any) -> Tensor:
    """What the VAE encodes black to, [channels], before the trainer's scaling: the mean away from the border.

    The VAE works on `device`, where xformers has its kernels, and in float32, since half precision overflows in SDXL's;
    it then goes back to where and what it was.
    """
    parameter = next(vae.parameters())
    home, dtype = parameter.device, parameter.dtype
    vae.to(device, torch.float32)
    try:
        latent = vae.encode(torch.full((1, 3, 256, 256), -1.0, device=device)).latent_dist.mode()
    finally:
        vae.to(home, dtype)
    height, width = latent.shape[-2:]
    return latent[0, :, height // 4 : -(height // 4), width // 4 : -(width // 4)].mean(dim=(1, 2))
