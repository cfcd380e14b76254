"""What a loss is measured in: the error of another target, as the error of epsilon that it comes to."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import AptError

TARGETS = ("epsilon", "v_prediction", "sample")
"""What a model may predict of `x_t = a x0 + s e`, by diffusers' names: `e`, `v = a e - s x0`, `x0`."""

FLOW = "flow"
"""Flow matching, `x_t = (1 - sigma) x0 + sigma e`; what is compared there is told by `flow_target`."""


def check_target(target: str) -> None:
    """Raise AptError where it is not known what an error of this target comes to."""
    if target not in (*TARGETS, FLOW):
        raise AptError(
            f"the model predicts {target!r}, and what an error of it comes to in epsilon is known of "
            f'{", ".join(TARGETS)} only; set [apt] indicator_space = "target" to measure it as it is'
        )


def epsilon_error_scale(target: str, alphas_cumprod: Tensor, timesteps: Tensor) -> Tensor | None:
    """By what a sample's error has to be multiplied to be the error of epsilon at the same `x_t`; None where it is.

    At a given `x_t = a x0 + s e` with `a^2 + s^2 = 1`, `e = a v + s x_t` and `e = (x_t - a x0) / s`: the factors are
    `a` and `a / s`, and a squared error has their squares. With a terminal SNR of zero the last timestep of `v` has 0.

    Args:
        target: one of `TARGETS`.
        alphas_cumprod: [T], `a^2` of the schedule that the noise is added by.
        timesteps: [batch], whole numbers below T.

    Returns:
        [batch], on the timesteps' device, or None.

    Raises:
        AptError: another target.
    """
    check_target(target)
    if target == "epsilon":
        return None
    kept = alphas_cumprod.to(timesteps.device)[timesteps]
    return kept.sqrt() if target == "v_prediction" else (kept / (1 - kept)).sqrt()


def per_sample(sigmas: Tensor) -> Tensor:
    """[batch], float32, of sigmas, one a sample, that have the samples' dimensions: [batch, 1, ...] or [batch]."""
    return sigmas.detach().reshape(len(sigmas), -1)[:, 0].float()


def flow_target(target: Tensor, x0: Tensor, noise: Tensor) -> str | None:
    """What a loss of flow matching compares: "velocity", `e - x0` or its negative, "sample", `x0`, or "epsilon", `e`.

    Args:
        target: [batch, ...], of the loss.
        x0, noise: of the same shape, what the noisy samples were made of.

    Returns:
        The name, or None where it is none of these.
    """
    if target.shape != x0.shape:
        return None
    target, x0, noise = target.float(), x0.float(), noise.float()
    known = (("velocity", noise - x0), ("velocity", x0 - noise), ("sample", x0), ("epsilon", noise))
    size = target.square().mean()
    for name, other in known:
        if (target - other).square().mean() <= 1e-4 * size:  # rounding to half precision is 1e-5 at most
            return name
    return None


def flow_error_scale(compared: str, sigmas: Tensor) -> Tensor:
    """As `epsilon_error_scale`, for flow matching: ours, the paper has none of it.

    At a given `x_t = (1 - sigma) x0 + sigma e`, `e = x_t + (1 - sigma) v` with `v = e - x0`, and
    `e = (x_t - (1 - sigma) x0) / sigma`.

    Args:
        compared: as `flow_target` says.
        sigmas: [batch], from 0 to 1. A sample's are taken for 0.02 at least: below, where it is `x_t - sigma v`, the
            rounding of half precision is more than what the model did wrong.
    """
    if compared == "epsilon":
        return torch.ones_like(sigmas)
    kept = 1 - sigmas
    return kept if compared == "velocity" else kept / sigmas.clamp_min(0.02)


class FlowLoss:
    """What a training's loss of flow matching compares, and what its errors come to; looked at once, in a first batch.

    Where it is not yet known, `error_scale` reads the tensors' numbers, and so waits for their device.
    """

    def __init__(self) -> None:
        self._compared: str | None = None

    def error_scale(self, target: Tensor, x0: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
        """`flow_error_scale` of what `flow_target` finds.

        Raises:
            AptError: it is nothing of which that is known.
        """
        if self._compared is None:
            self._compared = flow_target(target, x0, noise)
        if self._compared is None:
            raise AptError(
                "the trainer's loss compares neither velocity, image nor noise, so what an error of it comes to in "
                'epsilon is not known; set [apt] indicator_space = "target" to measure it as it is'
            )
        return flow_error_scale(self._compared, sigmas)
