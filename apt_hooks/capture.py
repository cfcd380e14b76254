"""Reading queries, keys and hidden states out of a running U-Net, and adding to their gradients there."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .blocks import select_up_blocks
from .contributions import AddGradient, Awaited, Contribution, Gate, Kind, Node, ObservedPass, Place
from .errors import AptError

Source = Literal["self_attention", "cross_attention", "block"]


@dataclasses.dataclass(frozen=True)
class AttentionLayer:
    """A cross-attention layer: its name in the U-Net, its number of heads, and the factor of its scores."""

    name: str
    heads: int
    scale: float


@dataclasses.dataclass
class Features:
    """What one pass left behind, one tensor a place, or what `reduce` made of it.

    Attributes:
        queries, keys: of each cross-attention layer, [batch, queries, heads * channels] and
            [batch, tokens, heads * channels].
        hidden: of each representation place, [batch, positions, channels] or [batch, channels, height, width].
    """

    queries: dict[int, Tensor] = dataclasses.field(default_factory=dict)
    keys: dict[int, Tensor] = dataclasses.field(default_factory=dict)
    hidden: dict[int, Tensor] = dataclasses.field(default_factory=dict)


Observer = Callable[[Kind, int, Tensor], Contribution | None]
"""Told a place and its output without graph, as it is computed; None adds nothing to its gradient."""


class FeatureCapture:
    """Hooks on the up-blocks of a U-Net.

    A pass is read inside `with capture.record() as features:`, and observed inside `with capture.regularize(...)`,
    where what a regularizer adds to the gradient is known as soon as a layer has run, so that neither maps nor keys and
    queries of both models are kept for it. Otherwise the hooks return at once: sampling and validation go unread. The
    attention backend stays the user's: queries and keys are the outputs of `to_q` and `to_k`.

    Gradient checkpointing: a layer that is observed gets a node that adds the gradient, in the first pass where that
    has a graph, and in a recomputation. A gradient that no recomputation has come for is an error at the next pass or
    `verify`. Selective checkpointing (`context_fn`) is not supported: what an observer computes would count as the
    layer's.

    A context manager; `close()` may be called any number of times and leaves the U-Net as it was.

    Args:
        unet: a diffusers U-Net, or one of sd-scripts'.
        blocks: up-blocks by place, 0 the lowest resolution; "auto" as in `select_up_blocks`.
        representation_source: "self_attention" takes the output of each self-attention layer (the paper's overview
            figure), "block" each up-block's hidden state before its upsampler (its supplement: 32x32 and 64x64),
            "cross_attention" the output of each cross-attention.
        attention, representation: which of the two to read at all.

    Raises:
        AptError: nothing to read was found.
    """

    def __init__(
        self,
        unet: nn.Module,
        blocks: Literal["auto"] | Sequence[int] = "auto",
        representation_source: Source = "self_attention",
        *,
        attention: bool = True,
        representation: bool = True,
    ) -> None:
        up_blocks = select_up_blocks(unet, blocks)
        self.blocks: tuple[int, ...] = tuple(block.index for block in up_blocks)
        self.layers: tuple[AttentionLayer, ...] = ()
        self.representation_places: tuple[str, ...] = ()
        self._observe: Callable[[Place, Tensor], Node | None] | None = None
        self._awaited = Awaited()
        self._traceable = True
        self._handles: list[RemovableHandle] = []
        cross = [layer for block in up_blocks for layer in block.cross_attention] if attention else []
        self.layers = tuple(AttentionLayer(name, int(m.heads), float(m.scale)) for name, m in cross)  # type: ignore[arg-type]
        for i, (_, module) in enumerate(cross):
            self._hook(module.to_q, ("queries", i))
            self._hook(module.to_k, ("keys", i))
        if representation:
            if representation_source == "block":
                places = [(block.end, block.upsamples) for block in up_blocks]
            else:
                places = [(layer, False) for block in up_blocks for layer in getattr(block, representation_source)]
            self.representation_places = tuple(name for (name, _), _ in places)
            for i, ((_, module), of_input) in enumerate(places):
                self._hook(module, ("hidden", i), of_input=of_input)

    @contextlib.contextmanager
    def record(self, reduce: Callable[[Kind, Tensor], Tensor] | None = None) -> Iterator[Features]:
        """Read the pass that runs inside.

        Args:
            reduce: applied to each tensor as it comes, so that a frozen pass keeps statistics, not maps.

        Raises:
            AptError: a place was not passed through, the gradient of the pass before got lost, or gradients are wanted
                of a place that is computed without them (reentrant checkpointing).
        """
        features, differentiated = Features(), torch.is_grad_enabled()

        def observe(place: Place, output: Tensor) -> None:
            if differentiated and not torch.is_grad_enabled():
                raise AptError(
                    f"{self._name(place)} runs without a graph (reentrant gradient checkpointing?), so no gradient "
                    "would reach it: use AptObjective or regularize(), or read under torch.no_grad()"
                )
            kind, i = place
            getattr(features, kind)[i] = output if reduce is None else reduce(kind, output)

        with self._observed(observe):
            yield features

    @contextlib.contextmanager
    def regularize(self, observer: Observer) -> Iterator[ObservedPass]:
        """Show `observer` every place of the pass that runs inside; `connect` afterwards.

        Raises:
            AptError: a place was not passed through or more than once, or the gradient of the pass before got lost.
        """
        observed, shown = ObservedPass(), set()

        def observe(place: Place, output: Tensor) -> Node | None:
            if place in shown:
                raise AptError(f"{self._name(place)} ran twice in one pass; call the U-Net once, with the whole batch")
            shown.add(place)
            contribution = observer(*place, output.detach())
            severed = not torch.is_grad_enabled()
            if contribution is None or not (severed or output.requires_grad):
                return None
            node = Node(self._awaited, place, contribution, observed.factors, severed)
            observed.nodes.append(node)
            return node

        with self._observed(observe, traceable=False):
            yield observed

    def connect(
        self, prediction: Tensor, observed: ObservedPass, values: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Make `values`, the observer's scalars, differentiable: their gradient is what the contributions add.

        Take every loss from the prediction and the values that this returns: one node then collects the gradients of
        all values before any enters the network. A loss of the pass's own output goes past it.
        """
        if not observed.nodes or not prediction.requires_grad:
            return prediction, dict(values)
        prediction, *connected = Gate.apply(self._awaited, observed, tuple(values), prediction, *values.values())
        return prediction, dict(zip(values, connected, strict=True))

    def verify(self) -> None:
        """Check that every gradient that waited for a recomputation was fetched by one.

        Raises:
            AptError: some were not, so the regularizers did not reach the LoRA.
        """
        lost = [self._name(place) for place in self._awaited.lost]
        self._awaited.lost.clear()
        if lost:
            raise AptError(
                f"the regularizers' gradient got lost at {len(lost)} places ({', '.join(lost[:3])}, ...): they ran "
                "without a graph and were not recomputed in the backward pass; switch gradient checkpointing to "
                "non-reentrant, or off"
            )

    def close(self) -> None:
        """Take all hooks off and forget what was read; may be called again."""
        while self._handles:
            self._handles.pop().remove()
        self._observe = None
        self._awaited.clear()

    def __enter__(self) -> FeatureCapture:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        try:
            if kind is None:
                self.verify()
        finally:
            self.close()

    @contextlib.contextmanager
    def _observed(self, observe: Callable[[Place, Tensor], Node | None], *, traceable: bool = True) -> Iterator[None]:
        self.verify()
        seen: set[Place] = set()

        def noting(place: Place, output: Tensor) -> Node | None:
            seen.add(place)
            return observe(place, output)

        self._observe, self._traceable = noting, traceable
        try:
            yield
        finally:
            self._observe = None
        self._check_complete(seen)

    def _hook(self, module: Any, place: Place, *, of_input: bool = False) -> None:
        def attend_input(_module: nn.Module, args: tuple[Any, ...]) -> Any:
            node = self._attend(place, args[0]) if args else None
            return None if node is None else (AddGradient.apply(args[0], node), *args[1:])

        def attend(_module: nn.Module, _args: Any, output: Any) -> Any:
            node = self._attend(place, output[0] if isinstance(output, tuple) else output)
            if node is None:
                return None
            if isinstance(output, tuple):
                return (AddGradient.apply(output[0], node), *output[1:])
            return AddGradient.apply(output, node)

        # An upsampler's input, and not the output of the layer before it, which sd-scripts wraps in an object.
        handle = module.register_forward_pre_hook(attend_input) if of_input else module.register_forward_hook(attend)
        self._handles.append(handle)

    def _attend(self, place: Place, tensor: Tensor) -> Node | None:
        """The node to put behind a place, if any."""
        if self._observe is None and not self._awaited:
            return None
        if not self._traceable and torch.compiler.is_compiling():
            return None  # no node would come out of it, and that the place was not observed is found at the end
        if self._observe is not None:
            node = self._observe(place, tensor)
        elif torch._C._current_graph_task_id() == -1:  # a backward pass that failed left them; this is no recomputation
            self._awaited.clear()
            return None
        else:
            node = self._awaited.get(place)
        if node is None or not torch.is_grad_enabled():
            return None
        if not tensor.requires_grad:  # nothing that is trained lies before it
            self._awaited.pop(place, None)
            return None
        return node

    def _check_complete(self, seen: set[Place]) -> None:
        wanted: list[Place] = [(kind, i) for i in range(len(self.layers)) for kind in ("queries", "keys")]
        wanted += [("hidden", i) for i in range(len(self.representation_places))]
        missing = [self._name(place) for place in wanted if place not in seen]
        if missing:
            raise AptError(
                f"the pass did not come through {len(missing)} of {len(wanted)} places "
                f"({', '.join(missing[:3])}): the model was compiled, or its projections were fused or replaced, "
                "after the capture was attached"
            )

    def _name(self, place: Place) -> str:
        kind, i = place
        if kind == "hidden":
            return self.representation_places[i]
        return self.layers[i].name + (".to_q" if kind == "queries" else ".to_k")
