"""A joint sequence of picture and text, by the arguments that diffusers' transformers have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..layout import Told, arguments
from .joint_attention import Joint


def lengths(model: nn.Module, mask: str | None = None) -> Told:
    """Positions of the picture and of the text, and which tokens take part ([batch, text], None: all).

    Args:
        mask: the argument that says so; None: there is none.
    """

    def of_call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, int, Tensor | None]:
        given = arguments(model, args, kwargs)
        image, text = (given[name].shape[1] for name in ("hidden_states", "encoder_hidden_states"))
        return image, text, taking_part(given, mask)

    return Told(model, of_call)


def taking_part(given: Mapping[str, Any], mask: str | None) -> Tensor | None:
    """The mask of the model's arguments, bool; None where there is none."""
    found: Tensor | None = None if mask is None else given.get(mask)
    return None if found is None else found.bool()


def rotary(attention: nn.Module) -> Told:
    """The rotary embedding that an attention is called with."""
    return Told(attention, lambda _, kwargs: kwargs["image_rotary_emb"])


def text_first(told: tuple[Any, ...]) -> Joint:
    """The joint sequence of `lengths` and `rotary`, of which the latter is (cosines, sines), [positions, channels]."""
    (image, text, mask), (cosines, sines) = told
    return Joint(image, text, mask=mask, rotary=(cosines[None], sines[None]))
