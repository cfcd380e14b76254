"""The regularizers and DCO's loss as functions of tensors; a training takes them layer by layer (`regularizers`)."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import AptError
from .ops.attention_alignment import AttentionAlignment, attention_map
from .ops.channel_statistics import representation_statistics


def attention_alignment_loss(
    q: Tensor,
    k: Tensor,
    q_frozen: Tensor,
    k_frozen: Tensor,
    *,
    heads: int,
    scale: float | None = None,
    mask: Tensor | None = None,
    impl: Literal["plain", "auto", "eager", "triton"] = "auto",
) -> Tensor:
    """Squared distance between the tuned and the frozen model's cross-attention maps (APT, "Attention Alignment").

        mean over batch, heads, queries of  sum over tokens of (softmax(q k^T * scale) - softmax(q_f k_f^T * scale))^2

    The paper leaves the norm open; this one's size does not depend on resolution, batch or number of heads.
    Computed in float32 (float64 if given that) whatever the inputs' dtype and autocast.

    Args:
        q, q_frozen: [batch, queries, heads * channels].
        k, k_frozen: [batch, tokens, heads * channels].
        heads: number of attention heads.
        scale: factor of the scores; None takes `channels ** -0.5`.
        mask: [batch, tokens], bool, True where a token takes part; None lets all take part.
        impl: "plain" is the equation, its maps kept by autograd; the others compute value and gradient at once, in
            bounded memory (`ops.attention_alignment.sum_and_gradients`), and can be differentiated once.

    Returns:
        Scalar, from 0 to 2; gradients reach `q` and `k`, and not the frozen model's.

    Raises:
        AptError: shapes that do not fit each other or `heads`.
    """
    if q.shape != q_frozen.shape or k.shape != k_frozen.shape or q.ndim != 3 or k.ndim != 3:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, q_frozen, k_frozen))
        raise AptError(f"q and k must be 3-D and have the shapes of q_frozen and k_frozen; found {shapes}")
    if q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2] or heads < 1 or q.shape[2] % heads:
        raise AptError(
            f"q and k must share batch and width, and {heads} heads must divide the width; "
            f"found {tuple(q.shape)} and {tuple(k.shape)}"
        )
    if mask is not None and (mask.dtype != torch.bool or mask.shape != k.shape[:2]):
        raise AptError(f"mask must be bool of shape {tuple(k.shape[:2])}; found {mask.dtype} {tuple(mask.shape)}")
    if scale is None:
        scale = (q.shape[2] // heads) ** -0.5
    if impl != "plain":
        options = {"heads": heads, "scale": scale, "mask": mask, "impl": impl}
        options["differentiated"] = torch.is_grad_enabled()
        total: Tensor = AttentionAlignment.apply(q, k, q_frozen, k_frozen, options)
        return total / (q.shape[0] * heads * q.shape[1])
    with torch.autocast(q.device.type, enabled=False):
        tuned = attention_map(q, k, heads, scale, mask)
        with torch.no_grad():
            frozen = attention_map(q_frozen, k_frozen, heads, scale, mask)
        return (tuned - frozen).square().sum(dim=-1).mean()


def representation_loss(h: Tensor, h_frozen: Tensor) -> tuple[Tensor, Tensor]:
    """Distance between the channel statistics of both models' hidden states (APT, "Representation Stabilization").

        l_mu = mean over batch, channels of (mean(h) - mean(h_frozen))^2,  l_sigma the same of the standard deviations

    Mean and (population) standard deviation are over the spatial positions. The paper sums over channels; the mean is
    ours, so that the size does not depend on width. Computed in float32 (float64 if given that) under any autocast.

    Args:
        h, h_frozen: [batch, positions, channels] or [batch, channels, height, width].

    Returns:
        `(l_mu, l_sigma)`, scalars; gradients reach `h` only.

    Raises:
        AptError: shapes that differ, or neither 3-D nor 4-D.
    """
    if h.shape != h_frozen.shape:
        raise AptError(f"h and h_frozen must have one shape; found {tuple(h.shape)} and {tuple(h_frozen.shape)}")
    with torch.no_grad():
        frozen = representation_statistics(h_frozen)
    l_mu, l_sigma = (representation_statistics(h) - frozen).square().mean(dim=(1, 2))
    return l_mu, l_sigma


def dco_loss(loss_tuned: Tensor, loss_frozen: Tensor, beta: float) -> Tensor:
    """The loss of Direct Consistency Optimization (DCO, arXiv 2402.12004), a baseline.

        -log sigmoid(-beta * (L_tuned - L_frozen))

    Args:
        loss_tuned, loss_frozen: [batch], mean squared error of both models on the same noisy input.
        beta: 1000 to 2000 in the paper; the larger, the sooner a sample that the tuned model does well is let go.

    Returns:
        [batch]; gradients reach `loss_tuned` only.
    """
    return F.softplus(beta * (loss_tuned - loss_frozen.detach()))


def dco_weight(loss_tuned: Tensor, loss_frozen: Tensor, beta: float) -> Tensor:
    """The derivative of `dco_loss` by `loss_tuned`: [batch], `beta * sigmoid(beta * (L_tuned - L_frozen))`.

    A trainer's own loss multiplied by it has DCO's gradient, whatever else the trainer does to its loss.
    """
    return beta * torch.sigmoid(beta * (loss_tuned - loss_frozen)).detach()


@dataclasses.dataclass
class SampleLosses:
    """Mean squares of both models' errors and of their difference, of the samples that count: each [samples].

    `covered` is the share of a sample that its mask covers, None without masks; where it is 0 the others are NaN.
    """

    tuned: Tensor
    frozen: Tensor
    delta_noise: Tensor
    covered: Tensor | None

    @classmethod
    @torch.no_grad()
    def of(
        cls, tuned: Tensor, frozen: Tensor, target: Tensor, mask: Tensor | None, here: slice | Tensor
    ) -> SampleLosses:
        if mask is not None:
            fits = mask.ndim == target.ndim and mask.shape[:1] == target.shape[:1]
            if not fits or any(m not in (1, n) for m, n in zip(mask.shape, target.shape, strict=True)):
                raise AptError(
                    f"the mask must be of the target's shape {tuple(target.shape)}, or have 1 in place of any size but "
                    f"the first; found {tuple(mask.shape)}"
                )
            mask = mask.expand_as(target)[here].float()
        tuned, frozen, target = (x[here].float() for x in (tuned, frozen, target))
        return cls(
            _mean_square(target - tuned, mask),
            _mean_square(target - frozen, mask),
            _mean_square(frozen - tuned, mask),
            None if mask is None else mask.flatten(1).mean(dim=1),
        )

    def means(self) -> dict[str, Tensor]:
        """Their means over the samples that have a loss, by the names in the log; NaN where none has."""
        values = {"loss_tuned": self.tuned, "loss_frozen": self.frozen, "delta_noise": self.delta_noise}
        if self.covered is None:
            return {name: value.mean() for name, value in values.items()}
        seen = self.covered > 0
        return {name: torch.where(seen, value, 0.0).sum() / seen.sum() for name, value in values.items()}

    def whole(self, loss: Tensor) -> Tensor:
        """A loss as a trainer has it that takes the mean over the whole frame, nothing outside the mask."""
        return loss if self.covered is None else torch.where(self.covered > 0, loss * self.covered, 0.0)


def _mean_square(x: Tensor, mask: Tensor | None) -> Tensor:
    squares = x.square().flatten(1)
    if mask is None:
        return squares.mean(dim=1)
    weights = mask.flatten(1)
    return (squares * weights).sum(dim=1) / weights.sum(dim=1)
