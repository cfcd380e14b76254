"""Functions of the trainer that APT calls or answers for, found where the trainer's own methods look them up."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

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
