"""What one step of APT adds to a trainer's loss."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ..errors import AptError


@dataclasses.dataclass
class AptStep:
    """What one step adds to a training loss.

    Attributes:
        prediction: the tuned model's output, without gradient where an augmentation's border is ignored; take the
            trainer's loss from this tensor.
        weight: [batch], the factor of each sample's loss: `1 - gamma` of a sample that counts, else 1; with the
            objective "dco" `dco_weight`.
        regularizer: scalar, `lambda_dist * (l_mu + l_sigma) + lambda_attn * l_attn` or `lambda_joint * l_joint`, and
            `lambda_offset * l_offset`, to be added to the mean loss. Terms that compare the models are multiplied by
            `frozen_every`, as they are 0 in the batches between.
        gammas: [num_bins], as this step used them, that is before its own update.
        gaps: [num_bins], the indicator's gaps behind `gammas`; NaN for a bin never seen.
        instances: number of samples that APT acts on.
        values: scalars averaged over those samples, not differentiable: `loss_tuned`, `loss_frozen`, `loss_weight`,
            `delta_noise` (equation 9, as the mean of squares) and of `l_mu`, `l_sigma`, `l_attn`, `l_joint`, `l_offset`
            those that are on; in a step without frozen pass `loss_weight` and `l_offset` alone.
    """

    prediction: Tensor
    weight: Tensor
    regularizer: Tensor
    gammas: Tensor
    gaps: Tensor
    instances: int
    values: dict[str, Tensor]

    def loss(self, per_sample: Tensor) -> Tensor:
        """The loss to differentiate: `mean(weight * per_sample) + regularizer`, `per_sample`: [batch].

        Raises:
            AptError: another shape; a loss that is a mean already cannot be weighed by sample.
        """
        if per_sample.shape != self.weight.shape:
            raise AptError(
                f"the loss must be one number a sample, {tuple(self.weight.shape)}; found {tuple(per_sample.shape)}: "
                'take reduction="none" and the mean over all dimensions but the first'
            )
        return (per_sample * self.weight.to(per_sample.dtype)).mean() + self.regularizer

    def weigh(self, x: Tensor, *, regularize: bool = False) -> Tensor:
        """`x`, of its own value to the bit, with each sample's gradient multiplied by its weight; for adapters.

        A prediction, for a loop whose loss is a mean already: every loss that is a sum over the samples gets the
        gradient of the weighted one. Or a loss for each sample, for a loop that shows the mean that it differentiates:
        weighed, that would fall as gamma rises, however well a LoRA does.

        Args:
            x: [batch, ...].
            regularize: give the regularizer its gradient as well, as if it were added to the mean of `x`, [batch].
        """
        factor = self.weight.reshape(-1, *[1] * (x.ndim - 1))
        return _Gradient.apply(x, factor, self.regularizer if regularize else None)


def scale_gradient(x: Tensor, factor: Tensor) -> Tensor:
    """`x`, whose gradient is multiplied by `factor`, of a shape that broadcasts to its own."""
    return _Gradient.apply(x, factor, None)


class _Gradient(torch.autograd.Function):
    """Identity; its backward is that of `x * factor`, and of a scalar term that is added to each element's share."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor, term: Tensor | None) -> Tensor:
        ctx.factor, ctx.term = factor, None if term is None else (term.device, term.dtype)
        return x.clone()  # which a script may change in place; a view would refuse

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, Tensor | None]:
        of_term = None if ctx.term is None else gradient.sum().to(*ctx.term)
        return (gradient * ctx.factor.to(gradient.device)).to(gradient.dtype), None, of_term
