"""How much dropout a LoRA has, from what its layers keep of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def largest_dropout(found: Iterable[tuple[str, Any]]) -> dict[str, float]:
    """The largest probability of each kind, without those of 0.

    Args:
        found: (kind, probability or `nn.Dropout`) of each layer; anything else is none.
    """
    largest: dict[str, float] = {}
    for kind, held in found:
        p = getattr(held, "p", held)
        if isinstance(p, (int, float)) and p > 0:
            largest[kind] = max(float(p), largest.get(kind, 0.0))
    return largest
