"""What the step benchmarks compare: ways to make one training step of the same batch."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from step_models import MODELS, UNET, Training
from torch import Tensor

from apt_hooks import AptConfig, AptObjective
from apt_hooks.errors import AptError
from apt_hooks.hooks.architectures import layout_of
from apt_hooks.hooks.frozen import frozen_base
from apt_hooks.method.indicator import OverfittingIndicator
from apt_hooks.tomlread import parse_toml

FLOOR = "floor"
METHODS = {
    "plain": "the trainer's own step",
    "idle": "plain, with APT's hooks in place and not used",
    FLOOR: "plain, and the frozen model's forward pass, below which no APT can go",
    "eager": "APT by this library, in PyTorch",
    "fused": "APT by this library, with its Triton kernels",
    "obvious": "APT as one would write it: attention maps and hidden states of both models kept",
    "dco": "DCO by this library",
    "compiled": "eager, with torch.compile for the frozen pass",
}
"""Names and what they are."""

ON_REQUEST = ("compiled",)  # takes minutes to begin

CONFIGS = {
    "eager": {"attention_impl": "eager"},
    "fused": {"attention_impl": "triton"},
    "dco": {"objective": "dco"},
}


@dataclasses.dataclass
class Method:
    """A way to make one step.

    Attributes:
        step: forward and backward pass; leaves gradients.
        period: steps after which the cost repeats (`frozen_every`); what is reported is their mean.
        prepared: makes a context around the steps, in which what the method changes of the U-Net is in place.
    """

    step: Callable[[], None]
    period: int = 1
    prepared: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext


def parse_extra(text: str) -> AptConfig:
    """`frozen_every=2 blocks=[1]`, keys of `[apt]` as TOML without spaces in them, as a configuration.

    Raises:
        AptError: it is not that, or a key or value is not allowed.
    """
    try:
        values = parse_toml("\n".join(text.split()).encode())
    except ValueError as error:
        raise AptError(f"--extra takes 'KEY=VALUE ...', values as in TOML; found {text!r}: {error}") from error
    config = AptConfig.from_mapping(values)
    if not values or not config.enabled or config.objective == "dreambooth":
        raise AptError(f"--extra must leave something to do in a step; found {text!r}")
    return config


def choose_methods(
    names: Sequence[str] | None, model: str, checkpointing: str, device: torch.device | None
) -> list[str]:
    """The methods that were named, or all; the floor is always among them. What is left out is printed.

    Args:
        model: what is trained.
        device: where they run; None: they are counted only.

    Raises:
        AptError: a method that was named is none, or cannot be run.
    """
    for name in names or ():
        if name not in METHODS:
            raise AptError(f"--methods takes {', '.join(METHODS)}, separated by commas; found {name!r}")
    chosen = []
    for name in METHODS:
        reason = _why_not(name, model, checkpointing, device)
        if names is None and name in ON_REQUEST:
            continue
        if names is None and reason:
            print(f"{name} is left out: {reason}")
        elif names is None or name in names or name == FLOOR:
            if reason:
                raise AptError(f"{name} cannot be run here: {reason}; name other --methods")
            chosen.append(name)
    return chosen


def _why_not(name: str, model: str, checkpointing: str, device: torch.device | None) -> str | None:
    if name == "obvious" and MODELS[model].kind is not UNET:
        return "it is written for U-Nets"
    if name == "obvious" and checkpointing == "reentrant":
        return "what it keeps has no graph under reentrant checkpointing"
    if name == "compiled" and device is None:
        return "what a compiler makes of it is not counted"
    if name == "fused" and device is not None and device.type != "cuda":
        return "Triton's kernels need a CUDA device"
    if name == "fused" and importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    return None


def make_methods(names: Iterable[str], extras: dict[str, AptConfig], training: Training) -> dict[str, Method]:
    """The methods by name; those of `extras` by the text that gave them."""
    own = {"plain": Method(_plain(training)), FLOOR: Method(_floor(training))}
    others = {"idle": Idle(training), "compiled": Compiled(training), "obvious": Obvious(training)}
    for name, kept in others.items():
        own[name] = Method(kept.step, prepared=kept.prepared)
    for name, config in {**{name: AptConfig(**keys) for name, keys in CONFIGS.items()}, **extras}.items():
        library = Library(training, config)
        own[name] = Method(library.step, config.frozen_every, library.prepared)
    return {name: own[name] for name in (*names, *extras)}


def _plain(training: Training) -> Callable[[], None]:
    def step() -> None:
        training.per_sample_loss(training.predict()).mean().backward()

    return step


def _floor(training: Training) -> Callable[[], None]:
    def step() -> None:
        with frozen_base([training.unet], training.adapters_off):
            training.predict()
        training.per_sample_loss(training.predict()).mean().backward()

    return step


class Library:
    """A step of this library's."""

    def __init__(self, training: Training, config: AptConfig) -> None:
        self.training, self.config = training, config
        self.objective: AptObjective | None = None
        self.predict_frozen: Callable[[], Tensor] | None = None

    @contextlib.contextmanager
    def prepared(self) -> Iterator[None]:
        """Inside, the hooks are in place."""
        with AptObjective(self.config, self.training.unet, self.training.adapters_off) as self.objective:
            yield

    def step(self) -> None:
        training, objective = self.training, self.objective
        assert objective is not None, "a step is made inside of prepared()"
        found = objective.step(
            training.predict, training.target, training.timesteps, predict_frozen=self.predict_frozen
        )
        found.loss(training.per_sample_loss(found.prediction)).backward()
        objective.verify()


class Idle(Library):
    """A plain step between the hooks."""

    def __init__(self, training: Training) -> None:
        super().__init__(training, AptConfig())

    def step(self) -> None:
        _plain(self.training)()


class Compiled(Library):
    """A step whose frozen pass is compiled, once for all rounds, with the hooks in place."""

    def __init__(self, training: Training) -> None:
        super().__init__(training, AptConfig(attention_impl="eager"))

    @contextlib.contextmanager
    def prepared(self) -> Iterator[None]:
        if self.objective is None:
            self.objective = AptObjective(self.config, self.training.unet, self.training.adapters_off)
            compiled = torch.compile(self.training.unet)
            self.predict_frozen = lambda: self.training.predict(compiled)
        yield


class Obvious:
    """APT by the formulas: attention maps and hidden states are kept, all terms are part of one graph.

    The loss is the library's, with the defaults of `AptConfig`. Cross-attention of the up-blocks that are compared
    makes its maps once and mixes the values by them, instead of a fused attention that has none.
    """

    def __init__(self, training: Training) -> None:
        self.training, self.config = training, AptConfig()
        self.indicator = OverfittingIndicator()
        self.kept: dict[str, list[Tensor]] | None = None
        self.processors: dict[str, Any] = {}
        if not hasattr(training.unet, "up_blocks"):
            return
        layout = layout_of(training.unet)
        self.processors.update({f"{point.name}.processor": self._cross_attention for point in layout.attention})
        self.processors.update({f"{point.name}.processor": self._self_attention for point in layout.hidden})

    @contextlib.contextmanager
    def prepared(self) -> Iterator[None]:
        """Inside, the U-Net's attention runs through the processors that keep what they compute."""
        unet: Any = self.training.unet
        before = dict(unet.attn_processors)
        unet.set_attn_processor({**before, **{name: _Processor(run) for name, run in self.processors.items()}})
        try:
            yield
        finally:
            unet.set_attn_processor(before)

    def step(self) -> None:
        self.loss().backward()

    def loss(self) -> Tensor:
        training, config = self.training, self.config
        with frozen_base([training.unet], training.adapters_off):
            frozen, kept_frozen = self._pass()
        tuned, kept = self._pass()
        loss_tuned, loss_frozen = training.per_sample_loss(tuned), training.per_sample_loss(frozen)
        weight = 1 - self.indicator.gamma(training.timesteps)
        self.indicator.update(training.timesteps, loss_tuned, loss_frozen)
        alignment, representation = [], []
        for a, b in zip(kept["maps"], kept_frozen["maps"], strict=True):
            alignment.append((a.float() - b.float()).square().sum(dim=-1).mean())
        for a, b in zip(kept["hidden"], kept_frozen["hidden"], strict=True):
            l_mu = (a.float().mean(dim=1) - b.float().mean(dim=1)).square().mean()
            l_sigma = (a.float().std(dim=1, correction=0) - b.float().std(dim=1, correction=0)).square().mean()
            representation.append(l_mu + l_sigma)
        l_dist, l_attn = torch.stack(representation).mean(), torch.stack(alignment).mean()
        return (weight * loss_tuned).mean() + config.lambda_dist * l_dist + config.lambda_attn * l_attn

    def _pass(self) -> tuple[Tensor, dict[str, list[Tensor]]]:
        self.kept = kept = {"maps": [], "hidden": []}
        prediction = self.training.predict()
        self.kept = None  # what checkpointing computes again later is not kept twice
        return prediction, kept

    def _cross_attention(self, attn: Any, x: Tensor, text: Tensor) -> Tensor:
        q, k, v = (attn.head_to_batch_dim(y) for y in (attn.to_q(x), attn.to_k(text), attn.to_v(text)))
        maps = attn.get_attention_scores(q, k)
        if self.kept is not None:
            self.kept["maps"].append(maps)
        return attn.to_out[1](attn.to_out[0](attn.batch_to_head_dim(maps @ v)))

    def _self_attention(self, attn: Any, x: Tensor, _text: None) -> Tensor:
        from diffusers.models.attention_processor import AttnProcessor2_0

        output = AttnProcessor2_0()(attn, x)
        if self.kept is not None:
            self.kept["hidden"].append(output)
        return output


class _Processor:
    """Of one attention layer, in the form that diffusers calls."""

    def __init__(self, run: Callable[[Any, Tensor, Any], Tensor]) -> None:
        self.run = run

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, attention_mask: Any = None
    ) -> Tensor:
        return self.run(attn, hidden_states, encoder_hidden_states)
