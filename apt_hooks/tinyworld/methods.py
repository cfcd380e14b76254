"""The methods that are compared on the tiny world: plain training, APT's rivals, APT, and its sums with them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from .timestep_lora import timestep_lora


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to train a LoRA.

    Attributes:
        title: for people.
        keys: those of `[apt]` in which it differs from the tiny world's preset.
        strengths: further ones, which may be overridden.
        prior_preservation: weight of the loss on as many class pictures, drawn by the base model (`class_pictures`).
        output_preservation: weight of `output_preservation_loss`.
        masks_rank: whether the LoRA is a T-LoRA (`timestep_lora`), which no file says; it is drawn with inside of
            `adapter` alone.
        orthogonal: whether that begins as an Ortho-LoRA.
    """

    title: str
    keys: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    strengths: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    prior_preservation: float = 0.0
    output_preservation: float = 0.0
    masks_rank: bool = False
    orthogonal: bool = False

    @property
    def beside(self) -> dict[str, Any]:
        """What it does beside APT, by the names of the attributes."""
        beside = [field for field in dataclasses.fields(self) if field.name not in ("title", "keys", "strengths")]
        return {field.name: value for field in beside if (value := getattr(self, field.name)) != field.default}

    def adapter(self, denoiser: nn.Module, seed: int) -> AbstractContextManager[None]:
        """Inside, the LoRA on the denoiser is the method's; to train and to draw in."""
        if self.masks_rank:
            return timestep_lora(denoiser, orthogonal=self.orthogonal, seed=seed)
        return contextlib.nullcontext()


_PLAIN = {"objective": "dreambooth"}
_OFFSET = {"lambda_offset": 3e-5}  # of L2-SP alone the better of this and 3e-4 (docs/rivals.md)

METHODS: dict[str, Method] = {
    "dreambooth": Method("DreamBooth", _PLAIN),
    "dco": Method("DCO", {"objective": "dco"}),
    "l2-sp": Method("L2-SP", {"objective": "l2-sp"}, _OFFSET),
    "prior": Method("prior preservation", _PLAIN, prior_preservation=1.0),
    "dop": Method("output preserv.", _PLAIN, output_preservation=1.0),
    "t-lora": Method("T-LoRA, no Ortho", _PLAIN, masks_rank=True),
    "t-lora+ortho": Method("T-LoRA", _PLAIN, masks_rank=True, orthogonal=True),
    "ata": Method("APT, weights only", {"lambda_dist": 0.0, "lambda_attn": 0.0}),
    "ata+rs": Method("APT, no alignment", {"lambda_attn": 0.0}),
    "apt": Method("APT"),
    "apt+prior": Method("APT + prior", prior_preservation=1.0),
    "apt+dop": Method("APT + output pres.", output_preservation=1.0),
    "apt+l2-sp": Method("APT + L2-SP", strengths=_OFFSET),
    "apt+t-lora": Method("APT + T-LoRA mask", masks_rank=True),
}
"""By name: plain training, the rivals, from adaptive training to all of APT, and what is added to that."""
