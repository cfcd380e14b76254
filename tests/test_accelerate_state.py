"""The state of a run beside accelerate's own, by an accelerator that only notes what it is told."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from apt_hooks import AptConfig, AptObjective
from apt_hooks.integrations.accelerate_state import attach
from apt_hooks.training.resume import STATE_FILE
from apt_hooks.training.run import AptRun


class FakeAccelerator:
    """Calls its hooks as accelerate's `save_state` and `load_state` do."""

    def __init__(self, is_main_process: bool = True) -> None:
        self.is_main_process = is_main_process
        self.printed: list[str] = []
        self.save_hooks: list[Callable[..., None]] = []
        self.load_hooks: list[Callable[..., None]] = []

    def print(self, *texts: object) -> None:
        self.printed.append(" ".join(map(str, texts)))

    def register_save_state_pre_hook(self, hook: Callable[..., None]) -> None:
        self.save_hooks.append(hook)

    def register_load_state_pre_hook(self, hook: Callable[..., None]) -> None:
        self.load_hooks.append(hook)

    def save_state(self, folder: Path) -> None:
        for hook in self.save_hooks:
            hook([], [], str(folder))

    def load_state(self, folder: Path) -> None:
        for hook in self.load_hooks:
            hook([], str(folder))


def attached(is_main_process: bool = True, **config: object) -> tuple[AptRun, FakeAccelerator]:
    """A run around a model without attention, its regularizers off."""
    objective = AptObjective(AptConfig(lambda_dist=0, lambda_attn=0, **config), torch.nn.Linear(1, 1), torch.no_grad)
    run, accelerator = AptRun(objective, log_path=None, augment_space="image"), FakeAccelerator(is_main_process)
    attach(run, accelerator)
    return run, accelerator


def advance(run: AptRun, steps: int = 3) -> None:
    """Some steps taken, and bins 0 and 5 seen."""
    run.objective.indicator.update(torch.tensor([5, 505]), torch.tensor([0.1, 0.2]), torch.tensor([0.1004, 0.2005]))
    run.step = steps


def test_attaching_prints_the_start_line_once_and_adds_one_hook_each() -> None:
    run, accelerator = attached(num_bins=5)
    assert accelerator.printed == [run.start_line()]
    assert "num_bins = 5" in accelerator.printed[0]
    assert (len(accelerator.save_hooks), len(accelerator.load_hooks)) == (1, 1)


def test_the_start_line_is_printed_by_the_accelerator_which_knows_the_main_process() -> None:
    run, accelerator = attached(is_main_process=False)
    assert accelerator.printed == [run.start_line()]


def test_the_state_goes_with_the_accelerators_and_comes_back_with_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, accelerator = attached()
    advance(first)
    accelerator.save_state(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [STATE_FILE] == ["apt-hooks.json"]
    assert json.loads((tmp_path / STATE_FILE).read_text())["step"] == 3
    second, accelerator = attached()
    with caplog.at_level(logging.INFO, "apt_hooks"):
        accelerator.load_state(tmp_path)
    assert second.step == 3
    assert torch.equal(second.objective.indicator.gammas, first.objective.indicator.gammas)
    assert float(second.objective.indicator.gammas[0]) > 0
    assert caplog.messages == ["apt-hooks: the indicator goes on from step 3"]


def test_the_state_is_that_of_the_moment_of_saving(tmp_path: Path) -> None:
    run, accelerator = attached()
    for step in (1, 2):
        folder = tmp_path / str(step)
        folder.mkdir()
        advance(run, step)
        accelerator.save_state(folder)
    assert [json.loads((tmp_path / s / STATE_FILE).read_text())["step"] for s in "12"] == [1, 2]


def test_only_the_main_process_saves_and_that_is_asked_at_each_save(tmp_path: Path) -> None:
    run, accelerator = attached(is_main_process=False)
    advance(run)
    accelerator.save_state(tmp_path)
    assert list(tmp_path.iterdir()) == []
    accelerator.is_main_process = True
    accelerator.save_state(tmp_path)
    assert (tmp_path / STATE_FILE).exists()


def test_every_process_loads(tmp_path: Path) -> None:
    first, accelerator = attached()
    advance(first)
    accelerator.save_state(tmp_path)
    other, accelerator = attached(is_main_process=False)
    accelerator.load_state(tmp_path)
    assert other.step == 3


def test_a_folder_saved_without_apt_is_warned_about_and_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, accelerator = attached()
    advance(run)
    gammas = run.objective.indicator.gammas
    with caplog.at_level(logging.INFO, "apt_hooks"):
        accelerator.load_state(tmp_path)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"{tmp_path} has no {STATE_FILE}" in record.getMessage()
    assert run.step == 3
    assert torch.equal(run.objective.indicator.gammas, gammas)


def test_a_broken_state_file_is_an_error_and_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / STATE_FILE).write_text("{}")
    run, accelerator = attached()
    advance(run)
    with pytest.raises(
        SystemExit, match=f"^apt-hooks: error: .*{STATE_FILE}.*; delete it to start the indicator anew$"
    ):
        accelerator.load_state(tmp_path)
    assert run.step == 3
