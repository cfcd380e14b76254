"""Reading queries, keys and hidden states out of a running U-Net, correct under gradient checkpointing."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .blocks import select_up_blocks
from .errors import AptError


@dataclasses.dataclass(frozen=True)
class AttentionLayer:
    """A cross-attention layer: its name in the U-Net, its number of heads, and the factor of its scores."""

    name: str
    heads: int
    scale: float


@dataclasses.dataclass
class Features:
    """What one pass left behind, one tensor a place.

    Attributes:
        queries, keys: of each cross-attention layer, [batch, queries, heads * channels] and
            [batch, tokens, heads * channels].
        hidden: of each representation place, [batch, positions, channels] or [batch, channels, height, width]; or what
            `reduce` made of it.
        severed: places read inside reentrant checkpointing, where what is read has no graph.
    """

    queries: dict[int, Tensor] = dataclasses.field(default_factory=dict)
    keys: dict[int, Tensor] = dataclasses.field(default_factory=dict)
    hidden: dict[int, Tensor] = dataclasses.field(default_factory=dict)
    severed: list[tuple[str, int]] = dataclasses.field(default_factory=list)


class FeatureCapture:
    """Hooks on the up-blocks of a U-Net that read, and change nothing.

    A pass is read inside `with capture.record() as features:`; outside of it the hooks return at once, so sampling,
    validation and the recomputation of gradient checkpointing go unread. The attention backend stays the user's:
    queries and keys are the outputs of `to_q` and `to_k`.

    Gradient checkpointing: what non-reentrant checkpointing reads is part of the graph. Reentrant checkpointing runs
    its first pass without a graph; `connect` then makes the gradient of what was read wait for the recomputation and
    adds it there. A gradient that no recomputation has come for is an error at the next `record` or `verify`.

    A context manager; `close()` may be called any number of times and leaves the U-Net as it was.

    Args:
        unet: a diffusers U-Net, or one of sd-scripts'.
        blocks: up-blocks by place, 0 the lowest resolution; "auto" as in `select_up_blocks`.
        representation_source: "self_attention" takes the output of each self-attention layer (the paper's overview
            figure), "block" each up-block's output (its supplement).
        attention, representation: which of the two to read at all.

    Raises:
        AptError: nothing to read was found.
    """

    def __init__(
        self,
        unet: nn.Module,
        blocks: Literal["auto"] | Sequence[int] = "auto",
        representation_source: Literal["self_attention", "block"] = "self_attention",
        *,
        attention: bool = True,
        representation: bool = True,
    ) -> None:
        up_blocks = select_up_blocks(unet, blocks)
        self.blocks: tuple[int, ...] = tuple(block.index for block in up_blocks)
        self.layers: tuple[AttentionLayer, ...] = ()
        self.representation_places: tuple[str, ...] = ()
        self._recording: Features | None = None
        self._reduce: Callable[[Tensor], Tensor] | None = None
        self._awaited: dict[tuple[str, int], Tensor] = {}
        self._handles: list[RemovableHandle] = []
        cross = [layer for block in up_blocks for layer in block.cross_attention] if attention else []
        self.layers = tuple(AttentionLayer(name, int(m.heads), float(m.scale)) for name, m in cross)  # type: ignore[arg-type]
        for i, (_, module) in enumerate(cross):
            self._hook(module.to_q, "queries", i)
            self._hook(module.to_k, "keys", i)
        if representation:
            own = representation_source == "self_attention"
            places = [p for block in up_blocks for p in (block.self_attention if own else (block.output,))]
            self.representation_places = tuple(name for name, _ in places)
            for i, (_, module) in enumerate(places):
                self._hook(module, "hidden", i)

    @contextlib.contextmanager
    def record(self, reduce: Callable[[Tensor], Tensor] | None = None) -> Iterator[Features]:
        """Read the pass that runs inside.

        Args:
            reduce: applied to each hidden state as it comes, so that a frozen pass keeps statistics, not maps. Not for
                a pass that is differentiated.

        Raises:
            AptError: a place was not passed through, or the gradient of the pass before got lost.
        """
        self.verify()
        self._recording, self._reduce = Features(), reduce
        features = self._recording
        try:
            yield features
        finally:
            self._recording = self._reduce = None
        self._check_complete(features)

    def connect(self, prediction: Tensor, features: Features) -> Tensor:
        """Give `features` a gradient where checkpointing severed them; returns the prediction to take the loss from.

        Call it after a recorded pass that is differentiated, and take every loss from what it returns and from
        `features`: one node then collects all gradients before any of them enters the network, so that they lie ready
        when the network is recomputed.
        """
        if not features.severed or not prediction.requires_grad:
            return prediction
        tensors = [getattr(features, kind)[i] for kind, i in features.severed]
        prediction, *connected = _Gate.apply(self._awaited, features.severed, prediction, *tensors)
        for (kind, i), tensor in zip(features.severed, connected, strict=True):
            getattr(features, kind)[i] = tensor
        return prediction

    def verify(self) -> None:
        """Check that every gradient that waited for a recomputation was fetched by one.

        Raises:
            AptError: some were not, so the regularizers did not reach the LoRA.
        """
        if not self._awaited:
            return
        lost = ", ".join(self._name(kind, i) for kind, i in list(self._awaited)[:3])
        count = len(self._awaited)
        self._awaited.clear()
        raise AptError(
            f"the regularizers' gradient got lost at {count} places ({lost}, ...): they ran without a graph and were "
            "not recomputed in the backward pass; switch gradient checkpointing to non-reentrant, or off"
        )

    def close(self) -> None:
        """Take all hooks off and forget what was read; may be called again."""
        while self._handles:
            self._handles.pop().remove()
        self._recording = self._reduce = None
        self._awaited.clear()

    def __enter__(self) -> FeatureCapture:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        try:
            if kind is None:
                self.verify()
        finally:
            self.close()

    def _hook(self, module: Any, kind: str, i: int) -> None:
        def observe(_module: nn.Module, _args: Any, output: Any) -> Any:
            return self._observe((kind, i), output)

        self._handles.append(module.register_forward_hook(observe))

    def _observe(self, place: tuple[str, int], output: Any) -> Any:
        features = self._recording
        if features is None:
            gradient = self._awaited.pop(place, None) if self._awaited and torch.is_grad_enabled() else None
            if gradient is None:
                return None
            if isinstance(output, tuple):
                return (_AddGradient.apply(output[0], gradient), *output[1:])
            return _AddGradient.apply(output, gradient)
        kind, i = place
        tensor = output[0] if isinstance(output, tuple) else output
        if kind == "hidden" and self._reduce is not None:
            tensor = self._reduce(tensor)
        elif not torch.is_grad_enabled():
            features.severed.append(place)
        getattr(features, kind)[i] = tensor
        return None

    def _check_complete(self, features: Features) -> None:
        wanted = {"queries": len(self.layers), "keys": len(self.layers), "hidden": len(self.representation_places)}
        missing = [self._name(k, i) for k, n in wanted.items() for i in range(n) if i not in getattr(features, k)]
        if missing:
            raise AptError(
                f"the pass did not come through {len(missing)} of {sum(wanted.values())} places "
                f"({', '.join(missing[:3])}): the model was compiled, or its projections were fused or replaced, "
                "after the capture was attached"
            )

    def _name(self, kind: str, i: int) -> str:
        if kind == "hidden":
            return self.representation_places[i]
        return self.layers[i].name + (".to_q" if kind == "queries" else ".to_k")


class _Gate(torch.autograd.Function):
    """Identity; its backward stores the gradients of all but the prediction and lets only that one through."""

    @staticmethod
    def forward(ctx: Any, awaited: dict, places: list, prediction: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.awaited, ctx.places = awaited, places
        ctx.set_materialize_grads(False)
        # A copy of the prediction, which is small: trainers may change it in place, and a view of many refuses that.
        return (prediction.clone(), *(t.view_as(t) for t in tensors))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        for place, gradient in zip(ctx.places, gradients[1:], strict=True):
            if gradient is not None:
                ctx.awaited[place] = gradient
        return (None, None, gradients[0], *(None for _ in ctx.places))


class _AddGradient(torch.autograd.Function):
    """Identity; its backward adds a gradient computed elsewhere."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return upstream + gradient, None
