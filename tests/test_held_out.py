"""Which held-out pictures a checkpoint is measured on."""

from __future__ import annotations

import pytest

from apt_hooks.training.held_out import MOST_PICTURES, held_out_batches


@pytest.mark.parametrize(
    ("count", "batch_size", "most", "chosen"),
    [
        (5, 1, None, [0, 1, 2, 3, 4]),
        (16, 1, None, list(range(16))),
        (32, 1, None, list(range(1, 32, 2))),
        (9, 4, None, [1, 3, 5, 7]),
        (9, 4, 3, [1, 4, 7]),
        (9, 4, 20, [1, 3, 5, 7]),
        (7, 40, None, [3]),  # a batch of more pictures than the limit: one of them
        (7, 1, 0, []),
    ],
)
def test_batches_are_chosen_evenly_up_to_both_limits(
    count: int, batch_size: int, most: int | None, chosen: list[int]
) -> None:
    assert MOST_PICTURES == 16
    assert held_out_batches(count, batch_size, most) == chosen
