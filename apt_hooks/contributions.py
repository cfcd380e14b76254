"""Gradients that are added inside of a network, where a layer's output is, rather than carried there by a graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

Kind = Literal["queries", "keys", "hidden"]
Place = tuple[Kind, int]


class Contribution(Protocol):
    """What a regularizer adds to the gradient of one place.

    Attributes:
        needs_output: whether the place's output is wanted in the backward pass; under gradient checkpointing it is
            computed again then, and not kept.
    """

    needs_output: bool

    def __call__(self, upstream: Tensor, output: Tensor | None, factors: Mapping[str, Tensor | None]) -> Tensor:
        """`upstream`, the gradient of the place's output, with the regularizer's added; of its shape and dtype.

        `factors` has the derivative of the loss by each value that went through `FeatureCapture.connect`; None: 0.
        """
        ...


@dataclasses.dataclass
class Regularized:
    """A pass whose places were observed; for `FeatureCapture.connect`."""

    nodes: list[Node] = dataclasses.field(default_factory=list)
    factors: dict[str, Tensor | None] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Node:
    """One place of one pass. It is awaited from the gate's backward to its own, so that a recomputation, which comes
    in between, finds it: reentrant checkpointing differentiates the recomputed graph, and non-reentrant checkpointing
    wants as much saved in it as in the first pass."""

    awaited: dict[Place, Node]
    place: Place
    contribution: Contribution
    factors: dict[str, Tensor | None]
    severed: bool


class Gate(torch.autograd.Function):
    """Identity; its backward keeps the gradients of the values and lets only the prediction's through."""

    @staticmethod
    def forward(
        ctx: Any, awaited: dict, regularized: Regularized, names: tuple, prediction: Tensor, *values: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.awaited, ctx.regularized, ctx.names = awaited, regularized, names
        ctx.shape, ctx.options = prediction.shape, {"dtype": prediction.dtype, "device": prediction.device}
        ctx.set_materialize_grads(False)
        # Copies, which are small: trainers may change a prediction in place, and a view of many refuses that.
        return (prediction.clone(), *(value.clone() for value in values))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        upstream, *factors = gradients
        ctx.regularized.factors.update(zip(ctx.names, factors, strict=True))
        if any(factor is not None for factor in factors):
            ctx.awaited.update({node.place: node for node in ctx.regularized.nodes})
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
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        node = ctx.node
        (output,) = ctx.saved_tensors or (None,)
        node.awaited.pop(node.place, None)
        if all(factor is None for factor in node.factors.values()):
            return upstream, None
        return node.contribution(upstream, output, node.factors), None
