"""The model that a training began from: the first weights of what is trained, exchanged for a pass."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import AptError

Named = list[tuple[str, Tensor]]
"""Weights by the names of their parameters, in the order in which these were told."""


class StartingWeights:
    """Copies of trained parameters, in whose place they can be put for a while.

    What is exchanged is where a parameter looks for its numbers, not the numbers: no version counts up, and what a
    graph, a checkpoint's recomputation or an optimizer holds on to is as it was afterwards.

    Args:
        trained: (name, parameter) of all that is trained; a parameter may come more than once.
        saved: its weights when the training began, as `named` gives them; None takes those of now.

    Raises:
        AptError: nothing is trained, or `saved` is of something else.
    """

    def __init__(self, trained: Iterable[tuple[str, nn.Parameter]], saved: Sequence[tuple[str, Tensor]] | None = None):
        names: dict[nn.Parameter, str] = {}
        for name, parameter in trained:
            names.setdefault(parameter, name)
        if not names:
            raise AptError(
                '[apt] reference = "start" exchanges what is trained, and nothing is known to be: give AptObjective '
                "trained=lora.named_parameters(), and what has dropout of its own in also_frozen"
            )
        self._names, self._parameters = list(names.values()), list(names)
        if saved is not None:
            self._check(saved)
        self._copies = [p.detach().clone() for p in names] if saved is None else [copy for _, copy in saved]

    def _check(self, saved: Sequence[tuple[str, Tensor]]) -> None:
        own = [(name, tuple(p.shape)) for name, p in zip(self._names, self._parameters, strict=True)]
        other = [(name, tuple(copy.shape)) for name, copy in saved]
        if own != other:
            one, two = next(((a, b) for a, b in zip(own, other, strict=False) if a != b), ("none more", "none more"))
            raise AptError(
                "the saved weights that the training began from are of another LoRA: "
                f"{len(other)} with {two} where this run trains {len(own)} with {one}; resume with the settings of the "
                'LoRA that the state was saved with, or with [apt] reference = "base" and a new indicator'
            )

    def named(self) -> Named:
        """The weights by their names."""
        return list(zip(self._names, self._copies, strict=True))

    @property
    def weights(self) -> list[Tensor]:
        """What the parameters are made of inside of `exchanged`."""
        for i, (parameter, copy) in enumerate(zip(self._parameters, self._copies, strict=True)):
            self._copies[i] = copy.to(parameter.device, parameter.dtype)  # itself, unless the model was moved
        return self._copies

    def by_parameter(self) -> dict[Tensor, Tensor]:
        """The weight that each parameter had."""
        return dict(zip(self._parameters, self.weights, strict=True))

    @contextlib.contextmanager
    def exchanged(self) -> Iterator[None]:
        """Inside, the parameters have the weights that they had at the start."""
        before: list[tuple[nn.Parameter, Tensor]] = []
        try:
            for parameter, copy in zip(self._parameters, self.weights, strict=True):
                before.append((parameter, parameter.data))
                parameter.data = copy
            torch.clear_autocast_cache()  # casts of the trained weights; `frozen_base` clears those made inside
            yield
        finally:
            for parameter, own in before:
                parameter.data = own


def to_bytes(weights: Named) -> bytes:
    """Weights as the content of a file, for `from_file`."""
    content = io.BytesIO()
    torch.save([(name, weight.detach().cpu()) for name, weight in weights], content)
    return content.getvalue()


def from_file(path: Path) -> Named:
    """Read a file of `to_bytes`.

    Raises:
        AptError: it cannot be read, or is none.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        return [(str(name), weight.detach()) for name, weight in found]
    except Exception as error:  # pickle, zip and torch each have their own
        raise AptError(
            f"{path.name} cannot be read as the weights that the training began from "
            f"({[*str(error).splitlines(), type(error).__name__][0]}); resume from another state, or begin a new run "
            "from its LoRA"
        ) from error
