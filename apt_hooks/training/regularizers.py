"""The regularizers of one step: compared layer by layer as the tuned pass runs, gradients ready before it is over."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from ..errors import AptError
from ..hooks.capture import AttentionPoint, Features
from ..hooks.frozen_rows import FrozenRows
from ..hooks.gradients import Contribution, Factors, Kind
from ..method.augmentation import covered_at
from ..method.ops.attention_alignment import sum_and_gradients
from ..method.ops.channel_statistics import gradient_of_statistics, mean_and_deviation
from ..method.ops.precision import full_precision
from ..method.ops.triton_choice import Impl


def frozen_reduction(
    regularizer: Literal["separate", "joint"],
    impl: Impl,
    weights: Weights | None = None,
    rows: FrozenRows | None = None,
) -> Callable[[Kind, Tensor], Tensor]:
    """What a frozen pass, of these rows, keeps of each place (`FeatureCapture.record`): where statistics are compared,
    those alone of a hidden state, by its positions' weights."""
    rows = rows or FrozenRows()  # of all

    def reduce(kind: Kind, output: Tensor) -> Tensor:
        if (kind, regularizer) != ("hidden", "separate"):
            return rows.restored(output)
        found = mean_and_deviation(output, None if weights is None else weights.of(output, rows.rows), impl=impl)
        return rows.restored(found, axis=1)

    return reduce


class Weights:
    """What the positions of a batch's hidden states count, made once a shape for both passes.

    Args:
        covered: [batch, 1, height, width], what of each picture the channel statistics are of.
    """

    def __init__(self, covered: Tensor) -> None:
        self._covered = covered
        self._known: dict[torch.Size, Tensor] = {}

    def of(self, output: Tensor, rows: Tensor | None = None) -> Tensor:
        """As `covered_at` its shape, on its device; it is of these rows, None: of all."""
        if output.shape not in self._known:
            weights = covered_at(self._covered if rows is None else self._covered[rows], output.shape)
            self._known[output.shape] = weights.to(output.device, non_blocking=True)
        return self._known[output.shape]


class Regularizers:
    """Observes a tuned pass (`FeatureCapture.regularize`) beside what the frozen pass left.

    As soon as a layer has run, its attention maps are compared, gradients with them, and the frozen model's side is let
    go. What stays until the backward pass is a gradient of the size of each layer's queries and of its keys; of the
    hidden states a few numbers a channel, compared at the end, and, without gradient checkpointing, themselves.

    Args:
        frozen: of the frozen pass, by `frozen_reduction`; emptied on the way.
        layers: the cross-attention layers that are compared.
        places: number of representation places.
        regularizer: "separate", attention maps and channel statistics; "joint", the cross-attentions' outputs.
        rows: the samples that count; None: all.
        weights: of the positions that the channel statistics are over, as in the frozen pass; None: all alike.
        differentiable: whether to compute gradients.
    """

    def __init__(
        self,
        frozen: Features,
        layers: Sequence[AttentionPoint],
        places: int,
        *,
        regularizer: Literal["separate", "joint"] = "separate",
        rows: Tensor | None = None,
        weights: Weights | None = None,
        impl: Impl = "auto",
        differentiable: bool = True,
    ) -> None:
        self._frozen = frozen
        self._layers = layers
        self._places = places
        self._regularizer = regularizer
        self._rows = rows
        self._weights = weights
        self._impl = impl
        self._differentiable = differentiable
        self._waiting: dict[int, dict[Kind, tuple[Tensor, _Scaled]]] = {}
        self._terms: dict[str, list[Tensor]] = {}
        self._statistics: dict[torch.Size, _Statistics] = {}

    def observe(self, kind: Kind, i: int, output: Tensor, mask: Tensor | None = None) -> Contribution | None:
        """Take in one place; as `FeatureCapture.regularize` calls it."""
        if self._rows is not None:
            self._rows = self._rows.to(output.device, non_blocking=True)
        contribution: Contribution
        if kind == "hidden":
            compare = self._joint if self._regularizer == "joint" else self._representation
            contribution = compare(i, output)
        else:
            contribution = self._attention(kind, i, output, mask)
        return contribution if self._differentiable else None

    def values(self) -> dict[str, Tensor]:
        """`l_mu` and `l_sigma`, `l_attn`, `l_joint`: means over the samples that count and over the layers."""
        found = {name: torch.stack(losses).mean() for name, losses in self._terms.items()}
        if self._statistics:
            found["l_mu"], found["l_sigma"] = torch.stack([s.losses() for s in self._statistics.values()]).sum(dim=0)
        return found

    def _add(self, name: str, loss: Tensor) -> None:
        self._terms.setdefault(name, []).append(loss)

    def _attention(self, kind: Kind, i: int, output: Tensor, mask: Tensor | None) -> _Scaled:
        """Queries and keys come apart; the second of the two settles both.

        A token takes part that does in both models' captions.
        """
        if mask is not None:
            self._frozen.masks[i] = mask & self._frozen.masks.get(i, mask)
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
        layer, mask = self._layers[i], self._frozen.masks.pop(i, None)
        total, of_q.gradient, of_k.gradient = sum_and_gradients(
            q,
            k,
            q_frozen,
            k_frozen,
            heads=layer.heads,
            scale=layer.scale,
            mask=None if mask is None else _chosen(mask, self._rows),
            gradients=self._differentiable,
            impl=self._impl,
        )
        count = q.shape[0] * layer.heads * q.shape[1]
        of_q.share = of_k.share = 1 / (count * len(self._layers))
        self._add("l_attn", total / count)
        return contribution

    def _representation(self, i: int, output: Tensor) -> _OfStatistics:
        if output.shape not in self._statistics:
            weights = None if self._weights is None else _chosen(self._weights.of(output), self._rows)
            self._statistics[output.shape] = _Statistics(output.shape, self._places, self._rows, weights)
        statistics, frozen = self._statistics[output.shape], self._frozen.hidden.pop(i)
        tuned = mean_and_deviation(_chosen(output, self._rows), statistics.weights, impl=self._impl)
        if frozen.shape[1:] != (len(output), tuned.shape[2]):
            raise AptError(
                "the hidden states of both models must have one shape; found statistics of "
                f"{(len(output), tuned.shape[2])} and {tuple(frozen.shape[1:])} samples and channels"
            )
        statistics.tuned.append(tuned)
        statistics.frozen.append(frozen)
        return _OfStatistics(statistics, len(statistics.tuned) - 1)

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
        # A dimension more than none makes the products those of full precision.
        return _plus(upstream, self.gradient, full_precision(factor).reshape(1) * self.share, self.rows)


class _Statistics:
    """The channel statistics of all places whose hidden states have one shape, compared at once: a call costs more
    than the arithmetic here.

    Attributes:
        tuned: [2, samples that count, channels] a place, means and deviations.
        frozen: [2, batch, channels] a place.
        rows: the samples that count; None: all.
        weights: of the positions of these samples (`representation_statistics`); None: all alike.
    """

    def __init__(self, shape: torch.Size, places: int, rows: Tensor | None, weights: Tensor | None) -> None:
        self.tuned: list[Tensor] = []
        self.frozen: list[Tensor] = []
        self.rows = rows
        self.weights = weights
        self._shape = shape
        self._all_places = places
        self._gradients: tuple[Tensor | None, Tensor | None, Sequence[tuple[Tensor, Tensor]]] | None = None

    @functools.cached_property
    def _difference(self) -> Tensor:
        """[places, 2, samples that count, channels]."""
        return torch.stack(self.tuned) - _chosen(torch.stack(self.frozen), self.rows, dim=2)

    def losses(self) -> Tensor:
        """[2]: this shape's share of `l_mu` and of `l_sigma`."""
        return self._difference.square().mean(dim=(0, 2, 3)) * (len(self.tuned) / self._all_places)

    def gradient(self, number: int, l_mu: Tensor | None, l_sigma: Tensor | None) -> tuple[Tensor, Tensor]:
        """(a, b) such that the gradient of a place's hidden state h is a + b * h; by the derivatives of the loss.

        With weights that is each position's for a weight that is the mean of all.
        """
        known = self._gradients
        if known is None or known[0] is not l_mu or known[1] is not l_sigma:
            known = self._gradients = l_mu, l_sigma, self._all_gradients(l_mu, l_sigma)
        return known[2][number]

    def _all_gradients(self, l_mu: Tensor | None, l_sigma: Tensor | None) -> Sequence[tuple[Tensor, Tensor]]:
        statistics = torch.stack(self.tuned, dim=1)
        _, places, samples, _ = statistics.shape
        numbers = self._shape.numel() // self._shape[0] * samples
        derivatives = (self._difference * (2 / (numbers * self._all_places))).transpose(0, 1)
        factors = (0.0 if factor is None else factor for factor in (l_mu, l_sigma))
        offset, slope = gradient_of_statistics(statistics, derivatives, *factors)
        sizes = (places, samples, 1, -1) if len(self._shape) == 3 else (*offset.shape, 1, 1)
        return list(zip(offset.reshape(sizes), slope.reshape(sizes), strict=True))


@dataclasses.dataclass
class _OfStatistics:
    """The gradient of one place's statistics."""

    statistics: _Statistics
    number: int
    gradient: Tensor | None = None
    needs_output: bool = True

    def __call__(self, upstream: Tensor, output: Tensor | None, factors: Factors) -> Tensor:
        assert output is not None  # it was asked for
        offset, slope = self.statistics.gradient(self.number, factors.get("l_mu"), factors.get("l_sigma"))
        rows, weights, output = self.statistics.rows, self.statistics.weights, _chosen(output, self.statistics.rows)
        if weights is None:
            return _plus(upstream, output, slope, rows, offset)
        relative = weights / weights.mean(dim=1 if output.ndim == 3 else (2, 3), keepdim=True)
        return _plus(upstream, torch.addcmul(offset, output, slope), relative, rows)


def _plus(upstream: Tensor, x: Tensor, factor: Tensor, rows: Tensor | None, offset: Tensor | None = None) -> Tensor:
    """`upstream + offset + x * factor`, of the rows alone, in the factor's precision; in `upstream`'s dtype."""
    if rows is not None:
        return upstream.index_copy(0, rows, _plus(upstream.index_select(0, rows), x, factor, None, offset))
    start = upstream if offset is None else upstream + offset
    return torch.addcmul(start, x, factor).to(upstream.dtype)


def _chosen(x: Tensor, rows: Tensor | None, dim: int = 0) -> Tensor:
    return x if rows is None else x.index_select(dim, rows)
