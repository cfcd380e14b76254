"""Augmenting a batch on its way through sd-scripts' trainer."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from apt_hooks.augmentation import Placement
from apt_hooks.errors import AptError

from .checkout import MASKING, NOISING, SAMPLER


class TimestepSampler:
    """The trainer's own sampler of timesteps, called beforehand, and its answer given again when the trainer asks.

    It is taken and replaced where the trainer looks it up: in the globals of the function that makes noisy latents,
    which is found from the trainer's method. Another module may re-export both; replaced there, it would do nothing.

    Args:
        trainer: its class, whose `get_noise_pred_and_target`, or that of a class below, makes noisy latents.

    Raises:
        AptError: no such function is called, or it calls no such sampler.
    """

    def __init__(self, trainer: type) -> None:
        method = "get_noise_pred_and_target"
        noising = _called_by(trainer, method, NOISING)
        self._globals: dict[str, Any] = {} if noising is None else noising.__globals__
        if SAMPLER not in self._globals:
            raise AptError(
                f"{trainer.__name__}.{method}: looked for a call of {NOISING}(), which calls {SAMPLER}(), to augment "
                "by timestep; it is not there. Set [apt] augmentation = false"
            )

    def draw(self, args: Any, noise_scheduler: Any, batch_size: int, device: Any) -> Tensor:
        """Timesteps of a batch, in the range of the trainer's arguments."""
        low = 0 if args.min_timestep is None else args.min_timestep
        high = noise_scheduler.config.num_train_timesteps if args.max_timestep is None else args.max_timestep
        timesteps: Tensor = self._globals[SAMPLER](low, high, batch_size, device)
        return timesteps

    @contextlib.contextmanager
    def drawn(self, timesteps: Tensor) -> Iterator[None]:
        """Inside, the trainer's sampler returns the timesteps that it was already asked for."""
        sampler = self._globals[SAMPLER]
        self._globals[SAMPLER] = lambda *args, **kwargs: timesteps
        try:
            yield
        finally:
            self._globals[SAMPLER] = sampler


class LossMask:
    """The mask that the trainer's loss is multiplied by, as the trainer itself makes it.

    Args:
        trainer: its class, whose `process_batch`, or that of a class below, masks the loss.
    """

    def __init__(self, trainer: type) -> None:
        self._apply = _called_by(trainer, "process_batch", MASKING)

    def __call__(self, args: Any, batch: dict[str, Any], target: Tensor) -> Tensor | None:
        """The factor of each element of a loss of `target`'s shape; None where the trainer masks nothing.

        Raises:
            AptError: the trainer was told to mask, and what does it was not found.
        """
        if not getattr(args, "masked_loss", False) and batch.get("alpha_masks") is None:
            return None
        if self._apply is None:
            raise AptError(
                f"the loss is masked, and process_batch was looked for a call of {MASKING}(), by which the indicator "
                "is masked alike; it is not there. Leave masked_loss and alpha_mask out"
            )
        mask: Tensor = self._apply(torch.ones_like(target, dtype=torch.float32), batch)
        return mask


def _called_by(trainer: type, method: str, name: str) -> Any:
    """What a trainer's method, or that of a class below, calls by this name; None where none calls such."""
    own = [inspect.unwrap(vars(kind)[method]) for kind in trainer.__mro__ if method in vars(kind)]
    return next((found for function in own if (found := _reached(function, name)) is not None), None)


def _reached(function: Any, name: str) -> Any:
    """What `function` calls by this name, of its own globals or of a module there; None where it calls no such."""
    code, names = function.__code__, function.__globals__
    if name not in code.co_names:
        return None
    owners = (names.get(other) for other in code.co_names)
    return next((getattr(owner, name) for owner in owners if hasattr(owner, name)), names.get(name))


def moved(batch: dict[str, Any], placement: Placement, *, images: bool) -> dict[str, Any]:
    """The batch with its masks, and if asked its images, zoomed out and rotated."""
    result = dict(batch)
    if images:
        result["images"] = placement.apply(batch["images"], -1.0)
    # What a zoom-out uncovers belongs to no subject and is not painted in: 0 in a mask, which an image stores as -1.
    for name, nothing in (("alpha_masks", 0.0), ("conditioning_images", -1.0), ("masks", 0.0)):
        if batch.get(name) is not None:
            mask = batch[name] if batch[name].ndim == 4 else batch[name][:, None]  # alpha masks have no channel
            moved_mask = placement.apply(mask, nothing)
            if moved_mask is not mask:
                result[name] = moved_mask.view(batch[name].shape)
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
