"""What every adapter has to hold: checks for the tests of one's own.

    @pytest.mark.parametrize("check", CONTRACT)
    def test_the_adapter_keeps_the_contract(check):
        check(train)

`train` trains one small LoRA from the same start each time (`Train`); a check raises an `AssertionError` that says
which rule is broken. `integrations/adapter_template.py` is an adapter to begin with.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .steplog import VALUES


@dataclasses.dataclass
class Trained:
    """What a run left.

    Attributes:
        weights: the LoRA's, as they were saved.
        log: the lines of its steps, in order; empty without APT.
        models: those that the LoRA is on, after the run.
    """

    weights: Mapping[str, Tensor]
    log: list[dict[str, Any]]
    models: list[nn.Module]


class Train(Protocol):
    """Trains for 4 steps, all random numbers from one seed."""

    def __call__(self, config: Mapping[str, Any] | None, *, stopped: bool = False) -> Trained:
        """Train.

        Args:
            config: the keys of `[apt]`; None trains without apt-hooks.
            stopped: save a state behind step 2, forget everything, and go on from it in a new run.
        """
        ...


OFF: dict[str, Any] = {"loss_weighting": False, "augmentation": False, "lambda_dist": 0.0, "lambda_attn": 0.0}
"""All terms of APT at zero."""


def with_all_terms_off_the_lora_is_the_plain_one(train: Train) -> None:
    """Bit for bit, and so with `objective = "dreambooth"`."""
    plain = train(None)
    for config in (OFF, {"objective": "dreambooth"}):
        _same(plain, train(config), f"with {config} the LoRA is another than the plain trainer's")


def monitor_only_tells_everything_and_changes_nothing(train: Train) -> None:
    """Bit for bit, with a log of all values."""
    monitored = train({"monitor_only": True})
    _same(train(None), monitored, "with monitor_only the LoRA is another than the plain trainer's")
    steps = [line["step"] for line in monitored.log]
    assert steps == [1, 2, 3, 4], f"the log is to have a line for each of 4 steps; found {steps}"
    for name in ("loss_tuned", "loss_frozen", "delta_noise", "l_mu", "l_sigma", "l_attn"):
        assert name in VALUES and monitored.log[-1][name] > 0, f"{name} is to be above 0 in the last step"


def each_term_reaches_the_lora(train: Train) -> None:
    """Each regularizer alone changes it."""
    plain = train(None)
    for name in ("lambda_dist", "lambda_attn"):
        changed = train({**OFF, name: 100.0}).weights
        assert any(not torch.equal(changed[k], plain.weights[k]) for k in changed), f"{name} does not reach the LoRA"


def a_resumed_run_is_the_uninterrupted_one(train: Train) -> None:
    """In weights, bit for bit, and in the log."""
    whole, resumed = train({}), train({}, stopped=True)
    _same(whole, resumed, "a resumed run's LoRA is another than that of a run without a stop")
    assert resumed.log == whole.log, "a resumed run's log is another than that of a run without a stop"


def nothing_is_left_on_the_models(train: Train) -> None:
    """No hook, no replaced method, no mode, no `requires_grad` that a plain run does not leave."""
    plain, found = train(None), train({})
    for i, (before, after) in enumerate(zip(plain.models, found.models, strict=True)):
        assert _traces(after) == _traces(before), f"model {i} is left otherwise than by a plain run"


CONTRACT: tuple[Callable[[Train], None], ...] = (
    with_all_terms_off_the_lora_is_the_plain_one,
    monitor_only_tells_everything_and_changes_nothing,
    each_term_reaches_the_lora,
    a_resumed_run_is_the_uninterrupted_one,
    nothing_is_left_on_the_models,
)


def _same(one: Trained, other: Trained, otherwise: str) -> None:
    assert one.weights and one.weights.keys() == other.weights.keys(), otherwise
    differ = [name for name in one.weights if not torch.equal(one.weights[name], other.weights[name])]
    assert not differ, f"{otherwise}: {len(differ)} of {len(one.weights)} tensors differ, the first is {differ[0]}"


def _traces(model: nn.Module) -> dict[str, Any]:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    traces: dict[str, Any] = {
        name: ([len(getattr(m, hook)) for hook in hooks], "forward" in m.__dict__, m.training)
        for name, m in model.named_modules()
    }
    return traces | {name: p.requires_grad for name, p in model.named_parameters()}
