"""The regularizers of one step: compared layer by layer as the tuned pass runs, gradients ready before it is over."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from .capture import AttentionLayer, Features
from .contributions import Contribution, Factors, Kind
from .errors import AptError
from .losses import full_precision, statistics_loss
from .ops.attention_alignment import sum_and_gradients
from .ops.channel_statistics import mean_and_deviation
from .ops.choice import Impl


def frozen_reduction(regularizer: Literal["separate", "joint"], impl: Impl) -> Callable[[Kind, Tensor], Tensor]:
    """What a frozen pass keeps of each place (`FeatureCapture.record`): where statistics are compared, those alone
    of a hidden state."""

    def reduce(kind: Kind, output: Tensor) -> Tensor:
        return mean_and_deviation(output, impl=impl) if (kind, regularizer) == ("hidden", "separate") else output

    return reduce


class Regularizers:
    """Observes a tuned pass (`FeatureCapture.regularize`) beside what the frozen pass left.

    As soon as a layer has run, its term and its gradient are computed and the frozen model's side of it is let go. What
    stays until the backward pass is a gradient of the size of each layer's queries and of its keys; of the hidden
    states a few numbers a channel, and, without gradient checkpointing, themselves.

    Args:
        frozen: of the frozen pass, by `frozen_reduction`; emptied on the way.
        layers: the cross-attention layers that are compared.
        places: number of representation places.
        regularizer: "separate", attention maps and channel statistics; "joint", the cross-attentions' outputs.
        rows: the samples that count; None: all.
        differentiable: whether to compute gradients.
    """

    def __init__(
        self,
        frozen: Features,
        layers: Sequence[AttentionLayer],
        places: int,
        *,
        regularizer: Literal["separate", "joint"] = "separate",
        rows: Tensor | None = None,
        impl: Impl = "auto",
        differentiable: bool = True,
    ) -> None:
        self._frozen = frozen
        self._layers = layers
        self._places = places
        self._regularizer = regularizer
        self._rows = rows
        self._impl = impl
        self._differentiable = differentiable
        self._waiting: dict[int, dict[Kind, tuple[Tensor, _Scaled]]] = {}
        self._terms: dict[str, list[Tensor]] = {}

    def observe(self, kind: Kind, i: int, output: Tensor) -> Contribution | None:
        """Take in one place; as `FeatureCapture.regularize` calls it."""
        if self._rows is not None:
            self._rows = self._rows.to(output.device, non_blocking=True)
        contribution: Contribution
        if kind == "hidden":
            compare = self._joint if self._regularizer == "joint" else self._statistics
            contribution = compare(i, output)
        else:
            contribution = self._attention(kind, i, output)
        return contribution if self._differentiable else None

    def values(self) -> dict[str, Tensor]:
        """`l_mu` and `l_sigma`, `l_attn`, `l_joint`: means over the samples that count and over the layers."""
        return {name: torch.stack(losses).mean() for name, losses in self._terms.items()}

    def _add(self, name: str, loss: Tensor) -> None:
        self._terms.setdefault(name, []).append(loss)

    def _attention(self, kind: Kind, i: int, output: Tensor) -> _Scaled:
        """Queries and keys come apart; the second of the two settles both."""
        contribution = _Scaled("l_attn", self._rows)
        both = self._waiting.setdefault(i, {})
        both[kind] = output, contribution
        if len(both) < 2:
            return contribution
        del self._waiting[i]
        (q, of_q), (k, of_k) = both["queries"], both["keys"]
        q, k, q_frozen, k_frozen = (
            _chosen(x, self._rows) for x in (q, k, self._frozen.queries.pop(i), self._frozen.keys.pop(i))
        )
        if k.shape[1] != k_frozen.shape[1]:
            raise AptError(
                f"attention alignment needs captions of one token length; the tuned model saw {k.shape[1]} "
                f"tokens, the frozen one {k_frozen.shape[1]}: choose a class_word as long as the identifier"
            )
        layer = self._layers[i]
        total, of_q.gradient, of_k.gradient = sum_and_gradients(
            q,
            k,
            q_frozen,
            k_frozen,
            heads=layer.heads,
            scale=layer.scale,
            gradients=self._differentiable,
            impl=self._impl,
        )
        count = q.shape[0] * layer.heads * q.shape[1]
        of_q.share = of_k.share = 1 / (count * len(self._layers))
        self._add("l_attn", total / count)
        return contribution

    def _statistics(self, i: int, output: Tensor) -> _Statistics:
        statistics = mean_and_deviation(_chosen(output, self._rows), impl=self._impl)
        frozen = _chosen(self._frozen.hidden.pop(i), self._rows, dim=1)
        l_mu, l_sigma = statistics_loss(statistics, frozen)
        self._add("l_mu", l_mu)
        self._add("l_sigma", l_sigma)
        mean, deviation = statistics
        positions = output[0].numel() // mean.shape[1]
        by_mean, by_deviation = (statistics - frozen) * (2 / (mean.numel() * positions * self._places))
        # A channel held at the least deviation (`representation_statistics`) has no gradient.
        by_deviation = torch.where(deviation > 1e-6, by_deviation / deviation, 0.0)
        shape = (-1, 1, mean.shape[1]) if output.ndim == 3 else (-1, mean.shape[1], 1, 1)
        mean, by_mean, by_deviation = (x.reshape(shape) for x in (mean, by_mean, by_deviation))
        return _Statistics(mean, by_mean, by_deviation, self._rows)

    def _joint(self, i: int, output: Tensor) -> _Scaled:
        """Squared distance of the outputs in units of the frozen one's own square: ours (the paper's D.2 leaves it
        open). An output is the values averaged by the map, so it holds both what is looked at and what is made of it.
        """
        output, frozen = _chosen(output, self._rows), _chosen(self._frozen.hidden.pop(i), self._rows)
        if output.shape != frozen.shape:
            raise AptError(f"both models' outputs must have one shape; found {output.shape} and {frozen.shape}")
        size = full_precision(frozen).square().flatten(1).sum(dim=1).clamp_min(1e-6 * frozen[0].numel())
        difference = output - frozen
        self._add("l_joint", (full_precision(difference).square().flatten(1).sum(dim=1) / size).mean())
        share = 2 / (size * len(size) * self._places)
        return _Scaled("l_joint", self._rows, difference, share.reshape(-1, *[1] * (output.ndim - 1)))


@dataclasses.dataclass
class _Scaled:
    """A gradient known but for its factor; `share` is kept apart since its product may be beyond float16."""

    value: str
    rows: Tensor | None
    gradient: Tensor | None = None
    share: float | Tensor = 1.0
    needs_output: bool = False

    def __call__(self, upstream: Tensor, output: Tensor | None, factors: Factors) -> Tensor:
        factor = factors.get(self.value)
        if factor is None:
            return upstream
        assert self.gradient is not None  # the graph has given it back
        return _plus(upstream, full_precision(self.gradient) * (self.share * factor), self.rows)


@dataclasses.dataclass
class _Statistics:
    """The gradient of the statistics, from the hidden state itself and a few numbers a channel."""

    mean: Tensor
    by_mean: Tensor
    by_deviation: Tensor
    rows: Tensor | None
    gradient: Tensor | None = None
    needs_output: bool = True

    def __call__(self, upstream: Tensor, output: Tensor | None, factors: Factors) -> Tensor:
        assert output is not None  # it was asked for
        l_mu, l_sigma = factors.get("l_mu"), factors.get("l_sigma")
        gradient = full_precision(_chosen(output, self.rows)) - self.mean
        gradient = gradient.mul_(self.by_deviation * (0.0 if l_sigma is None else l_sigma))
        gradient += self.by_mean * (0.0 if l_mu is None else l_mu)
        return _plus(upstream, gradient, self.rows)


def _plus(upstream: Tensor, gradient: Tensor, rows: Tensor | None) -> Tensor:
    if rows is None:
        return (full_precision(upstream) + gradient).to(upstream.dtype)
    return upstream.index_add(0, rows, gradient.to(upstream.dtype))


def _chosen(x: Tensor, rows: Tensor | None, dim: int = 0) -> Tensor:
    return x if rows is None else x.index_select(dim, rows)
