"""A batch of sd-scripts on its way through the augmentation: what is moved with the images."""

from __future__ import annotations

from typing import Any

import torch

from apt_hooks.integrations.sd_scripts.augment import moved
from apt_hooks.method.augmentation import Placement

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
