"""What a loss is measured in: the error of another target, as the error of epsilon that it comes to."""

from __future__ import annotations

from torch import Tensor

from ..errors import AptError

TARGETS = ("epsilon", "v_prediction", "sample")
"""What a model may predict of `x_t = a x0 + s e`, by diffusers' names: `e`, `v = a e - s x0`, `x0`."""


def check_target(target: str) -> None:
    """Raise AptError where it is not known what an error of this target comes to."""
    if target not in TARGETS:
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
