"""A batch of sd-scripts on its way through the augmentation: what is moved with the images, and the sampler."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from apt_hooks.augmentation import Placement
from apt_hooks.errors import AptError
from apt_hooks.integrations.sd_scripts.augment import LossMask, TimestepSampler, moved

SECOND = Placement(
    scales=torch.tensor([1.0, 3.0]), angles=torch.tensor([0.0, 10.0]), chosen=torch.tensor([False, True])
)


def inpainting_batch() -> dict[str, Any]:
    """As `--train_inpainting` gives it: masks of zeros and ones, 1 where is to be painted, and nothing there."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 48, 48, generator=generator) * 2 - 1
    masks = torch.zeros(2, 1, 48, 48)
    masks[:, :, 8:30, 12:40] = 1
    return {"images": images, "masks": masks, "masked_images": images * (masks < 0.5)}


def test_the_masks_of_inpainting_move_with_their_images() -> None:
    batch = inpainting_batch()
    result = moved(batch, SECOND, images=True)
    assert result["masks"].unique().tolist() == [0.0, 1.0]
    assert torch.equal(result["masked_images"], result["images"] * (result["masks"] < 0.5))
    assert 0.05 < result["masks"][1].sum() / batch["masks"][1].sum() < 0.2  # a ninth of the area
    # What a zoom-out uncovers is black, and not to be painted.
    corner = (1, slice(None), slice(0, 4), slice(0, 4))
    assert (result["masks"][corner] == 0).all() and (result["masked_images"][corner] == -1).all()
    for name in batch:
        assert torch.equal(result[name][0], batch[name][0]) and not torch.equal(result[name][1], batch[name][1])


def test_in_latent_space_the_masks_move_and_the_masked_images_are_left_to_their_latents() -> None:
    batch = inpainting_batch()
    result = moved(batch, SECOND, images=False)
    assert result["images"] is batch["images"] and result["masked_images"] is batch["masked_images"]
    assert torch.equal(result["masks"], moved(batch, SECOND, images=True)["masks"])


def test_a_batch_without_masks_has_none_afterwards() -> None:
    batch = {"images": torch.zeros(2, 3, 8, 8), "masks": None, "masked_images": None, "alpha_masks": None}
    assert all(value is None for name, value in moved(batch, SECOND, images=True).items() if name != "images")


# -- the sampler -------------------------------------------------------------------------------------------------------


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
    found = TimestepSampler(kind)
    assert found.draw(args, scheduler, 2, None).tolist() == [5, 6]
    wanted: Tensor = torch.tensor([1, 2])
    with found.drawn(wanted):
        assert kind().get_noise_pred_and_target(args) is wanted
    assert vars(loss)["get_timesteps"] is sampler
    assert kind().get_noise_pred_and_target(args).tolist() == [100, 101]


@pytest.mark.parametrize("how", ["loss_util.other", "print"])
def test_a_trainer_that_makes_its_noise_otherwise_is_refused(how: str) -> None:
    kind = trainer(how, loss_util=types.SimpleNamespace(other=print))
    with pytest.raises(AptError, match=r"Trainer\.get_noise_pred_and_target: looked for a call of get_noise_noisy"):
        TimestepSampler(kind)
