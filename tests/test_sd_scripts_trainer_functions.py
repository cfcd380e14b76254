"""The trainer's own functions, found where its methods look them up: the sampler of timesteps, and the loss's mask."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from apt_hooks.errors import AptError
from apt_hooks.integrations.sd_scripts.trainer_functions import DiffusionNoising, LossMask, noising_of


def library(**more: Any) -> types.ModuleType:
    """A module that defines the sampler and what calls it."""
    module = types.ModuleType("loss")
    exec(
        "def get_timesteps(low, high, size, device):\n    return drawn(low, high, size)\n"
        "def get_noise_noisy_latents_and_timesteps(args):\n    return get_timesteps(args.low, args.high, 2, None)\n",
        module.__dict__,
    )
    module.__dict__.update(drawn=lambda low, high, size: torch.arange(low, low + size), **more)
    return module


def trainer(how: str, **names: Any) -> type:
    """A trainer that makes noisy latents by the call `how`, in a module that has these names."""
    module = types.ModuleType("train_network")
    module.__dict__.update(names)
    exec(
        f"class Trainer:\n    def get_noise_pred_and_target(self, args):\n        return {how}(args)\n",
        module.__dict__,
    )
    made: type = module.Trainer  # type: ignore[attr-defined]
    return made


def reexported(loss: types.ModuleType) -> types.ModuleType:
    """A module that has the functions of another, as `from library.loss import ...` leaves them."""
    module = types.ModuleType("train_util")
    module.__dict__.update({name: value for name, value in vars(loss).items() if name.startswith("get_")})
    return module


def test_a_mask_is_made_by_what_the_trainer_calls_and_where_it_calls_nothing_that_is_told() -> None:
    module = types.ModuleType("train_network")
    module.__dict__.update(apply_masked_loss=lambda loss, batch: loss * batch["alpha_masks"][:, None])
    exec(
        "class Masking:\n    def process_batch(self, loss, batch):\n        return apply_masked_loss(loss, batch)\n"
        "class Plain:\n    def process_batch(self, loss, batch):\n        return loss\n",
        module.__dict__,
    )
    args, target = types.SimpleNamespace(masked_loss=False), torch.randn(2, 4, 8, 8, dtype=torch.float64)
    batch = {"alpha_masks": torch.rand(2, 8, 8)}
    mask = LossMask(module.Masking)(args, batch, target)
    assert mask is not None and mask.dtype == torch.float32
    assert torch.equal(mask, batch["alpha_masks"][:, None].expand(2, 4, 8, 8))
    assert LossMask(module.Masking)(args, {"alpha_masks": None}, target) is None
    assert LossMask(module.Plain)(args, {}, target) is None
    for asked, given in ((args, batch), (types.SimpleNamespace(masked_loss=True), {})):
        with pytest.raises(AptError, match=r"looked for a call of apply_masked_loss\(\)"):
            LossMask(module.Plain)(asked, given, target)


NOISE = "get_noise_noisy_latents_and_timesteps"
CASES: dict[str, Callable[[types.ModuleType], type]] = {
    "of the module that defines it": lambda loss: trainer(f"loss_util.{NOISE}", loss_util=loss),
    "of one that re-exports it": lambda loss: trainer(f"train_util.{NOISE}", train_util=reexported(loss)),
    "by its own name": lambda loss: trainer(NOISE, **{NOISE: vars(loss)[NOISE]}),
    "in the base class": lambda loss: type("Own", (trainer(f"loss_util.{NOISE}", loss_util=loss),), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_drawn_timesteps_are_those_that_the_trainer_gets(case: str) -> None:
    loss = library()
    kind, sampler = CASES[case](loss), vars(loss)["get_timesteps"]
    args = types.SimpleNamespace(min_timestep=5, max_timestep=None, low=100, high=200)
    scheduler = types.SimpleNamespace(config=types.SimpleNamespace(num_train_timesteps=1000))
    scheduler.alphas_cumprod = torch.ones(1000)
    found = noising_of(kind, augments=True)
    assert found.draw(args, scheduler, torch.zeros(2, 1, 4, 4), None).tolist() == [5, 6]
    wanted: Tensor = torch.tensor([1, 2])
    with found.watched(scheduler, wanted):
        assert kind().get_noise_pred_and_target(args) is wanted
    assert vars(loss)["get_timesteps"] is sampler
    assert kind().get_noise_pred_and_target(args).tolist() == [100, 101]


@pytest.mark.parametrize("how", ["loss_util.other", "print"])
def test_a_trainer_that_makes_its_noise_otherwise_is_refused(how: str) -> None:
    kind = trainer(how, loss_util=types.SimpleNamespace(other=print))
    with pytest.raises(AptError, match=r"Trainer\.get_noise_pred_and_target: looked for a call of get_noise_noisy"):
        noising_of(kind, augments=True)
    assert isinstance(noising_of(kind, augments=False), DiffusionNoising)  # nothing is drawn beforehand
