"""Reading queries, keys and hidden states out of a running denoiser, and adding to their gradients there."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import AptError
from .architectures import layout_of
from .gradients import AddGradient, CollectFactors, Contribution, Kind, Node, ObservedPass, Pending, Place, Through
from .layout import AttentionPoint, HiddenPoint, Layout, Source, Tap, Told


@dataclasses.dataclass
class Features:
    """What one pass left behind, one tensor a place, or what `reduce` made of it.

    Attributes:
        queries, keys: of each cross-attention layer, [batch, queries, heads * channels] and
            [batch, tokens, heads * channels].
        hidden: of each hidden state, [batch, positions, channels] or [batch, channels, height, width].
        masks: of those layers that have one, [batch, tokens], bool: which tokens take part.
    """

    queries: dict[int, Tensor] = dataclasses.field(default_factory=dict)
    keys: dict[int, Tensor] = dataclasses.field(default_factory=dict)
    hidden: dict[int, Tensor] = dataclasses.field(default_factory=dict)
    masks: dict[int, Tensor] = dataclasses.field(default_factory=dict)


Observer = Callable[[Kind, int, Tensor, Tensor | None], Contribution | None]
"""Told a place, what is read there, without graph, as it is computed, and of keys their mask, if any; None adds nothing
to its gradient."""


class FeatureCapture:
    """Hooks on the points of a denoiser.

    A pass is read inside `with capture.record() as features:`, and observed inside `with capture.regularize(...)`,
    where what a regularizer adds to the gradient is known as soon as a layer has run, so that neither maps nor keys and
    queries of both models are kept for it. Otherwise the hooks return at once: sampling and validation go unread. The
    attention backend stays the user's: queries and keys are outputs of modules.

    Gradient checkpointing: a layer that is observed gets a node that adds the gradient, in the first pass where that
    has a graph, and in a recomputation. A gradient that no recomputation has come for is an error at the next pass or
    `verify`. Selective checkpointing (`context_fn`) is not supported: what an observer computes would count as the
    layer's.

    A context manager; `close()` may be called any number of times and leaves the model as it was.

    Args:
        model: the denoiser, of a known architecture (`hooks/architectures`) unless a layout is given.
        blocks: their numbers, for U-Nets up-blocks, 0 the lowest resolution; "auto": the architecture's choice.
        representation_source: "self_attention" takes the output of each self-attention layer (the paper's overview
            figure), "block" each block's hidden state, before its upsampler (its supplement: 32x32 and 64x64),
            "cross_attention" the output of each cross-attention.
        attention, representation: which of the two to read at all.
        layout: the points, in place of those of the architecture.

    Raises:
        AptError: nothing to read was found.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Literal["auto"] | Sequence[int] = "auto",
        representation_source: Source = "self_attention",
        *,
        attention: bool = True,
        representation: bool = True,
        layout: Layout | None = None,
    ) -> None:
        self.layout = layout_of(model, blocks, representation_source) if layout is None else layout
        self.layers: tuple[AttentionPoint, ...] = tuple(self.layout.attention) if attention else ()
        self.hidden: tuple[HiddenPoint, ...] = tuple(self.layout.hidden) if representation else ()
        missing = [
            noun
            for noun, asked, found in (
                ("attention layers", attention, self.layers),
                ("hidden states", representation, self.hidden),
            )
            if asked and not found
        ]
        if missing:
            raise AptError(f"the layout has no {' and no '.join(missing)}; do not ask for them, or give their points")
        self._observe: Callable[[Place, Tensor], Node | None] | None = None
        self._awaited = Pending()
        self._traceable = True
        self._handles: list[RemovableHandle] = []
        self._told: dict[Told, Any] = {}
        """What the pass that is being read has told so far."""
        points: tuple[AttentionPoint | HiddenPoint, ...] = (*self.layers, *self.hidden)
        for told in dict.fromkeys(told for point in points for told in point.told):
            self._listen(told)
        for i, point in enumerate(self.layers):
            self._hook(point.queries, ("queries", i))
            self._hook(point.keys, ("keys", i))
        for i, hidden in enumerate(self.hidden):
            self._hook(hidden.tap, ("hidden", i))

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
            told = self._told_to(place)
            read = self._read(place, told, output)
            getattr(features, kind)[i] = read if reduce is None else reduce(kind, read)
            if (mask := self._mask(place, told)) is not None:
                features.masks[i] = mask

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
                raise AptError(f"{self._name(place)} ran twice in one pass; call the model once, with the whole batch")
            shown.add(place)
            told = self._told_to(place)
            with torch.no_grad():  # what was told may have a graph of its own, as FLUX's rotary embedding in sd-scripts
                read = self._read(place, told, output.detach())
            contribution = observer(*place, read, self._mask(place, told))
            without_graph = not torch.is_grad_enabled()
            if contribution is None or not (without_graph or output.requires_grad):
                return None
            if self._tap(place).read is not None:
                contribution = Through(contribution, functools.partial(self._read, place, told), read.shape)
            node = Node(self._awaited, place, contribution, observed.factors, without_graph)
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
        names = tuple(values)
        prediction, *connected = CollectFactors.apply(self._awaited, observed, names, prediction, *values.values())
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
            if self._observe is noting:  # and not that of a later pass, where this one was never ended
                self._observe = None
                self._told.clear()
        self._check_complete(seen)

    def _listen(self, told: Told) -> None:
        def listen(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._observe is not None:
                self._told[told] = told.of_call(args, kwargs)

        self._handles.append(told.module.register_forward_pre_hook(listen, with_kwargs=True))

    def _hook(self, tap: Tap, place: Place) -> None:
        def attend_input(_module: nn.Module, args: tuple[Any, ...]) -> Any:
            node = self._attend(place, args[0]) if args else None
            return None if node is None else (AddGradient.apply(args[0], node), *args[1:])

        def attend(_module: nn.Module, _args: Any, output: Any) -> Any:
            outputs, here = (output, tap.select) if isinstance(output, tuple) else ((output,), 0)
            node = self._attend(place, outputs[here])
            if node is None:
                return None
            added = AddGradient.apply(outputs[here], node)
            return (*outputs[:here], added, *outputs[here + 1 :]) if isinstance(output, tuple) else added

        module = tap.module
        handle = (
            module.register_forward_pre_hook(attend_input) if tap.of_input else module.register_forward_hook(attend)
        )
        self._handles.append(handle)

    def _tap(self, place: Place) -> Tap:
        kind, i = place
        return self.hidden[i].tap if kind == "hidden" else getattr(self.layers[i], kind)

    def _told_to(self, place: Place) -> tuple[Any, ...]:
        kind, i = place
        point: AttentionPoint | HiddenPoint = self.hidden[i] if kind == "hidden" else self.layers[i]
        for told in point.told:
            if told not in self._told:
                raise AptError(
                    f"{self._name(place)} ran without a call of the {type(told.module).__name__} around it, which "
                    "tells how to read it: call the whole model within the pass"
                )
        return tuple(self._told[told] for told in point.told)

    def _read(self, place: Place, told: tuple[Any, ...], tensor: Tensor) -> Tensor:
        read = self._tap(place).read
        return tensor if read is None else read(tensor, told)

    def _mask(self, place: Place, told: tuple[Any, ...]) -> Tensor | None:
        kind, i = place
        mask = self.layers[i].mask if kind == "keys" else None
        return None if mask is None else mask(told)

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
        wanted += [("hidden", i) for i in range(len(self.hidden))]
        missing = [self._name(place) for place in wanted if place not in seen]
        if missing:
            raise AptError(
                f"the pass did not come through {len(missing)} of {len(wanted)} places "
                f"({', '.join(missing[:3])}): the model was compiled, or its projections were fused or replaced, "
                "after the capture was attached"
            )

    def _name(self, place: Place) -> str:
        kind, i = place
        return self.hidden[i].name if kind == "hidden" else self._tap(place).name
