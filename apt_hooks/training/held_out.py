"""How far the tuned model is ahead of the reference on pictures that are not trained on, by timestep bin."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..method.losses import SampleLosses
from .checkpoint_drifts import random_streams_kept
from .objective import AptObjective
from .passes import rows_of

MOST_PICTURES = 16
"""That a checkpoint is measured on: a picture costs as much as training on five samples or more."""


def held_out_batches(count: int, batch_size: int, most: int | None = None) -> list[int]:
    """Which of a validation split's batches are compared, the same at every checkpoint: evenly over all, from 0.

    Args:
        count: how many there are.
        batch_size: pictures in each, so that they come to `MOST_PICTURES` or fewer; a single batch may have more.
        most: a limit of the user's.
    """
    kept = min(count, max(1, MOST_PICTURES // batch_size), *([] if most is None else [most]))
    return [(2 * i + 1) * count // (2 * kept) for i in range(kept)]


class HeldOut:
    """The indicator's gap, of held-out pictures, each time as means over one pass through all of them.

        held_out_gap_b = mean[L_frozen] - mean[L_tuned]   of the samples in bin b

    Where gamma is high and this falls, what is learned is of the training pictures alone: overfitting by definition.

    Args:
        objective: the run's; units and bins are those of its indicator, which is not touched.
        compare: the adapter's. Calls `add` of what it is given for each batch of held-out pictures, with the same noise
            and timesteps every time. It is called without gradients and with the random streams kept.
    """

    NAME = "held_out_gap"

    def __init__(self, objective: AptObjective, compare: Callable[[HeldOut], None]) -> None:
        self._means = objective.indicator.like(ema_alpha=1.0)
        self._as_it_is = objective.config.indicator_space == "target"
        self._compare = compare

    def add(
        self,
        tuned: Tensor,
        frozen: Tensor,
        target: Tensor,
        timesteps: Tensor,
        *,
        instances: Tensor | None = None,
        error_scale: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> None:
        """Take in a batch.

        Args:
            tuned, frozen, target: [batch, ...], both models' predictions of the same noisy input.
            timesteps, instances, error_scale, mask: as `AptObjective.step` takes them.
        """
        rows = rows_of(instances, timesteps.device)
        here = slice(None) if rows is None else rows
        losses = SampleLosses.of(tuned, frozen, target, mask, here)
        scale = 1.0 if error_scale is None or self._as_it_is else error_scale[here].square()
        self._means.add(timesteps[here], scale * losses.tuned, scale * losses.frozen)

    def measure(self) -> list[float | None]:
        """By bin, None for one that no sample was in; to be called where the model is as it is to be measured."""
        with torch.no_grad(), random_streams_kept():
            self._compare(self)
        self._means.end_step(of_all_ranks=False)
        return [None if gap != gap else float(f"{gap:.5g}") for gap in self._means.gaps.tolist()]
