"""Gradients that are added inside of a network, where a layer's output is, rather than carried there by a graph.

    forward    layer --> AddGradient --> ... --> CollectFactors --> prediction, values (l_mu, l_attn, ...) --> loss
                 |  the observer compares the output at once: the gradient of a value by it is known up to a factor
                 v
              Contribution, kept by its Node

    backward   loss --> CollectFactors: the factor of each value arrives, that is the loss's derivative by it;
                 |      `Pending` has the nodes from here on
                 v
               a checkpointed block is computed again; its hooks find the nodes in `Pending` and put AddGradient there
                 |
                 v
               AddGradient: the gradient from above + factor * contribution --> layer

Rests on private parts of autograd: `_execution_engine.queue_callback` ends the awaiting with the backward pass, and
`_current_graph_task_id` tells a recomputation from a pass after a backward pass that failed. Without the nodes a value
has no path to the layer; one that no recomputation came by is an error at the next pass (`FeatureCapture.verify`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Kind = Literal["queries", "keys", "hidden"]
Place = tuple[Kind, int]
Factors = Mapping[str, Tensor | None]
"""The derivative of the loss by each value that went through `FeatureCapture.connect`; None: 0."""


class Contribution(Protocol):
    """What a regularizer adds to the gradient of one place.

    Attributes:
        gradient: a tensor that waits for the backward pass; it is taken over by the graph, which frees it afterwards.
        needs_output: whether the place's output is wanted in the backward pass; under gradient checkpointing it is
            computed again then, and not kept.
    """

    gradient: Tensor | None

    @property
    def needs_output(self) -> bool: ...

    def __call__(self, upstream: Tensor, output: Tensor | None, factors: Factors) -> Tensor:
        """`upstream`, the gradient of the place's output, with the regularizer's added; of its shape and dtype."""
        ...


@dataclasses.dataclass
class ObservedPass:
    """A pass whose places were observed; for `FeatureCapture.connect`."""

    nodes: list[Node] = dataclasses.field(default_factory=list)
    factors: dict[str, Tensor | None] = dataclasses.field(default_factory=dict)


class Pending(dict[Place, "Node"]):
    """The nodes of the backward pass that is under way: from the gate's backward to their own.

    A recomputation comes in between and finds them here: reentrant checkpointing differentiates the recomputed graph,
    and non-reentrant checkpointing wants as much saved in it as in the first pass.

    Attributes:
        lost: places without a graph that no recomputation of a backward pass came by.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lost: list[Place] = []

    def begin(self, nodes: list[Node]) -> None:
        """To be called inside of a backward pass; at its end nothing is awaited any more."""
        self._end()
        self.update({node.place: node for node in nodes})
        torch.autograd.Variable._execution_engine.queue_callback(self._end)

    def _end(self) -> None:
        asked = [node for node in self.values() if any(factor is not None for factor in node.factors.values())]
        self.lost += [node.place for node in asked if node.without_graph]
        self.clear()


@dataclasses.dataclass
class Node:
    """One place of one pass; `without_graph` where it was computed without a graph."""

    awaited: Pending
    place: Place
    contribution: Contribution
    factors: dict[str, Tensor | None]
    without_graph: bool


class CollectFactors(torch.autograd.Function):
    """Identity; its backward keeps the gradients of the values and lets only the prediction's through."""

    @staticmethod
    def forward(
        ctx: Any, awaited: Pending, observed: ObservedPass, names: tuple, prediction: Tensor, *values: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.awaited, ctx.observed, ctx.names = awaited, observed, names
        ctx.shape, ctx.options = prediction.shape, {"dtype": prediction.dtype, "device": prediction.device}
        ctx.set_materialize_grads(False)
        # Saved, so that they are freed by the backward pass and not only when the loss is forgotten.
        ctx.save_for_backward(*(node.contribution.gradient for node in observed.nodes))
        for node in observed.nodes:
            node.contribution.gradient = None
        # Copies, which are small: trainers may change a prediction in place, and a view of many refuses that.
        return (prediction.clone(), *(value.clone() for value in values))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        upstream, *factors = gradients
        ctx.observed.factors.update(zip(ctx.names, factors, strict=True))
        for node, gradient in zip(ctx.observed.nodes, ctx.saved_tensors, strict=True):
            node.contribution.gradient = gradient
        ctx.awaited.begin(ctx.observed.nodes)
        if upstream is None:  # a loss of the values alone; the network has to be gone through all the same
            upstream = torch.zeros(ctx.shape, **ctx.options)
        return (None, None, None, upstream, *(None for _ in ctx.names))


class AddGradient(torch.autograd.Function):
    """Identity; its backward adds a contribution."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, node: Node) -> Tensor:
        ctx.node = node
        if node.contribution.needs_output:
            ctx.save_for_backward(output)
        return output.detach()  # and no view, which could not be changed in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        node = ctx.node
        (output,) = ctx.saved_tensors or (None,)
        node.awaited.pop(node.place, None)
        if all(factor is None for factor in node.factors.values()):
            return upstream, None
        added = node.contribution(upstream, output, node.factors)
        node.contribution.gradient = None
        return added, None


@dataclasses.dataclass
class Through:
    """A contribution to what is read of a tensor, as one to the tensor itself.

    Attributes:
        contribution: to what `read` makes of it, of `shape`.
        read: linear, so that its gradient needs no value.
    """

    contribution: Contribution
    read: Callable[[Tensor], Tensor]
    shape: torch.Size

    @property
    def gradient(self) -> Tensor | None:
        return self.contribution.gradient

    @gradient.setter
    def gradient(self, gradient: Tensor | None) -> None:
        self.contribution.gradient = gradient

    @property
    def needs_output(self) -> bool:
        return self.contribution.needs_output

    def __call__(self, upstream: Tensor, output: Tensor | None, factors: Factors) -> Tensor:
        with torch.enable_grad():
            x = upstream.new_zeros(()).expand(upstream.shape) if output is None else output
            x = x.detach().requires_grad_()
            read = self.read(x)
        # In full precision, so that a small gradient is not rounded before it is added.
        nothing = torch.zeros(self.shape, dtype=torch.promote_types(read.dtype, torch.float32), device=read.device)
        added = self.contribution(nothing, read.detach(), factors)
        (of_x,) = torch.autograd.grad(read, x, added.to(read.dtype))
        return upstream + of_x
