"""Which blocks of a transformer are observed: there are no resolutions to choose by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from ...errors import AptError

_BUDGET = 96 * 2**20
_POSITIONS = 64 * 64 + 512


def select(count: int, blocks: Literal["auto"] | Sequence[int], width: int) -> tuple[int, ...]:
    """The numbers of the blocks to observe.

    "auto" takes some of the second half of the depth, evenly, and as many as keep about what SDXL's two up-blocks do:
    96 MiB a sample at 1024 px in half precision for the gradients of queries and keys, of SDXL 112, with which Anima's
    peak stays within 1.02 of that of the frozen pass alone (docs/performance.md). All of this is ours, as the paper has
    no transformer.

    Args:
        count: of all blocks.
        width: channels of all heads together.

    Raises:
        AptError: one is no block's, or none is given.
    """
    if blocks == "auto":
        first = count // 2
        taken = min(count - first, max(1, round(_BUDGET / (2 * _POSITIONS * width))))
        return tuple(first + (count - first) * i // taken for i in range(taken))
    if not blocks or not all(0 <= number < count for number in blocks):
        raise AptError(f"blocks: they are numbered from 0 to {count - 1} here; found {list(blocks)}")
    return tuple(blocks)
