"""Passes of some rows of a batch alone."""

from __future__ import annotations

import collections
import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from apt_hooks.hooks.frozen_rows import FrozenRows


class Denoiser(nn.Module):
    """Takes what denoisers take, row by row; keeps how many rows it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def forward(self, noisy: Tensor, time: Any, *, layers: Tensor, texts: list[Tensor], more: dict[str, Tensor]) -> Any:
        self.seen.append(len(noisy))
        text = torch.stack([text.sum() for text in texts])
        of_text = layers.sum(dim=(0, 2)) + text + more["pooled"].sum(dim=1) + time
        return (noisy * more["scale"] + of_text[:, None, None, None],)


def given(batch: int, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    g = torch.Generator().manual_seed(seed)
    more = {"pooled": normal(batch, 3), "scale": normal(1, 3, 1, 1)}
    texts = [normal(5 + i, 2) for i in range(batch)]
    return (normal(batch, 3, 4, 4), normal(batch)), {"layers": normal(7, batch, 3), "texts": texts, "more": more}


def first_half(samples: Tensor) -> Tensor:
    return torch.arange(len(samples)) < len(samples) // 2


@pytest.mark.parametrize("batch", [2, 4])
def test_later_passes_are_of_the_rows_that_are_asked_for(batch: int, caplog: pytest.LogCaptureFixture) -> None:
    model, rows = Denoiser(), FrozenRows()
    for i in range(3):
        args, kwargs = given(batch, i)
        (wanted,) = model(*args, **kwargs)
        model.seen.clear()
        with rows.passes_of(model, first_half):
            (found,) = model(*args, **kwargs)
            assert (rows.rows is None) == (i == 0)
        assert model.seen == ([batch, batch // 2] if i == 0 else [batch // 2])
        assert found.shape == wanted.shape
        torch.testing.assert_close(found[: batch // 2], wanted[: batch // 2])
        assert i == 0 or not found[batch // 2 :].any()
    assert rows.rows is None and not model._forward_hooks and not model._forward_pre_hooks and not caplog.records


def test_any_rows_may_be_asked_for_and_none_or_all_change_nothing() -> None:
    model, rows = Denoiser(), FrozenRows()
    args, kwargs = given(4)
    for asked, count in (([True, False, True, False], 4), ([False, False, False, True], 1), ([True] * 4, 4)):
        model.seen.clear()
        with rows.passes_of(model, lambda _, asked=asked: torch.tensor(asked)):
            (found,) = model(*args, **kwargs)
        assert model.seen[0] == count
        torch.testing.assert_close(found[torch.tensor(asked)], model(*args, **kwargs)[0][torch.tensor(asked)])
    with rows.passes_of(model, lambda _: None):
        assert torch.equal(model(*args, **kwargs)[0], model(*args, **kwargs)[0])


@pytest.mark.parametrize("kind", ["wrong", "error", "packed", "dataclass"])
def test_a_model_whose_rows_depend_on_each_other_gets_all_of_them(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    class Mixing(Denoiser):
        def forward(self, noisy: Tensor) -> Any:  # type: ignore[override]
            self.seen.append(len(noisy))
            if kind == "error" and len(noisy) < 4:
                raise ValueError("four\nand no less")
            if kind == "packed":
                return noisy.flatten(0, 1)
            return SimpleNamespace(sample=noisy) if kind == "dataclass" else noisy + noisy.mean()

    model, rows, noisy = Mixing(), FrozenRows(), given(4)[0][0]
    with caplog.at_level(logging.WARNING, "apt_hooks"):
        for _ in range(2):
            with rows.passes_of(model, first_half):
                found = model(noisy)
                assert rows.rows is None and getattr(found, "sample", found).numel() == noisy.numel()
    assert model.seen == [4, 2, 4]
    (told,) = [record.getMessage() for record in caplog.records]
    assert told.startswith("apt-hooks: class images go through the base model's pass as well (")
    wanted = {"wrong": "predictions differ by", "error": "ValueError: four)", "packed": "came out for", "dataclass": ""}
    assert wanted[kind] in told


def test_each_kind_of_batch_is_tried() -> None:
    model, rows = Denoiser(), FrozenRows()
    for batch, seen in ((4, [4, 2]), (4, [2]), (2, [2, 1]), (2, [1]), (4, [2])):
        args, kwargs = given(batch)
        model.seen.clear()
        with rows.passes_of(model, first_half):
            model(*args, **kwargs)
        assert model.seen == seen


def test_a_coincidence_that_comes_later_is_tried_too(caplog: pytest.LogCaptureFixture) -> None:
    class Tabled(nn.Module):
        def forward(self, noisy: Tensor, table: Tensor, residuals: list[Tensor]) -> Tensor:
            return noisy * table.square().sum() + sum(residuals)

    def call(batch: int) -> Tensor:
        noisy = given(batch)[0][0]
        table, residuals = torch.ones(4, 3), [noisy, 2 * noisy, noisy, noisy]  # four, of four or of six samples
        with rows.passes_of(model, first_half):
            found: Tensor = model(noisy, table, residuals)
        torch.testing.assert_close(found[: batch // 2], (noisy * 12 + 5 * noisy)[: batch // 2])
        return found

    model, rows = Tabled(), FrozenRows()
    call(6)
    assert not call(6)[3:].any() and not caplog.records
    assert call(4)[2:].all() and call(4)[2:].all(), "a table of four rows is no batch"
    assert len(caplog.records) == 1
    assert not call(6)[3:].any()


def test_named_tuples_stay_what_they_are() -> None:
    Output = collections.namedtuple("Output", ["sample", "more"])

    class Named(nn.Module):
        def forward(self, given: Any) -> Any:
            return Output(given.sample * 2, given.more)

    model, rows, noisy = Named(), FrozenRows(), given(4)[0][0]
    rows.passes_of(model, first_half)
    for _ in range(2):
        with rows.passes_of(model, lambda _: torch.tensor([True, True, False, False])):
            found = model(given=Output(noisy, 7))
    assert isinstance(found, Output) and found.more == 7


def test_what_is_read_in_the_pass_and_lists_of_samples_have_zeros_for_the_others() -> None:
    class Listing(nn.Module):
        def forward(self, pictures: list[Tensor], time: Tensor) -> Any:
            return {"sample": [2 * picture for picture in pictures]}

    model, rows = Listing(), FrozenRows()
    pictures = list(given(4)[0][0])
    for _ in range(2):
        with rows.passes_of(model, first_half):
            found = model(pictures, torch.zeros(4))["sample"]
            statistics = rows.restored(torch.ones(2, 2 if rows.rows is not None else 4, 3), axis=1)
    assert len(found) == 4 and torch.equal(found[1], 2 * pictures[1]) and not found[2].any()
    assert statistics[:, :, 0].tolist() == [[1, 1, 0, 0]] * 2
