"""How far the tuned model is ahead of the reference on pictures that are not trained on, by timestep bin."""

from __future__ import annotations

from torch import Tensor

from ..method.indicator import OverfittingIndicator
from ..method.losses import SampleLosses
from .objective import AptObjective


class HeldOut:
    """The indicator's gap, of held-out pictures, as means over one pass through them.

        held_out_gap_b = mean[L_frozen] - mean[L_tuned]   of the samples in bin b

    Where gamma is high and this falls, what is learned is of the training pictures alone: overfitting by definition.

    Args:
        objective: the run's; units and bins are those of its indicator, which is not touched.
    """

    NAME = "held_out_gap"

    def __init__(self, objective: AptObjective) -> None:
        self._means = objective.indicator.like(ema_alpha=1.0)
        self._as_it_is = objective.config.indicator_space == "target"

    def add(
        self,
        tuned: Tensor,
        frozen: Tensor,
        target: Tensor,
        timesteps: Tensor,
        *,
        error_scale: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> None:
        """Take in a batch of the pass.

        Args:
            tuned, frozen, target: [batch, ...], both models' predictions of the same noisy input.
            timesteps, error_scale, mask: as `AptObjective.step` takes them.
        """
        losses = SampleLosses.of(tuned, frozen, target, mask, slice(None))
        scale = 1.0 if error_scale is None or self._as_it_is else error_scale.square()
        self._means.add(timesteps, scale * losses.tuned, scale * losses.frozen)

    def end_pass(self) -> None:
        """What was added since the last call is a pass; a bin that it had no sample in keeps an earlier one's."""
        self._means.end_step()

    def gaps(self) -> list[float | None]:
        """By bin; None for one that no sample was in."""
        return [None if gap != gap else float(f"{gap:.5g}") for gap in self._means.gaps.tolist()]
