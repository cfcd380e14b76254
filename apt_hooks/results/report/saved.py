"""What a run saved: its checkpoints, the one to take, and which of them a picture is nearest to."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

from apt_hooks.results.read_checkpoints import Checkpoint, SavedRun, read_checkpoints
from apt_hooks.results.read_steplog import run_name
from apt_hooks.results.verdict import Verdict, verdict
from apt_hooks.training.checkpoints import ENDING

Moment = tuple[str, int]  # "epoch" or "step", and which


@dataclasses.dataclass(frozen=True)
class Saved:
    """A run's checkpoints, and what `apt-hooks pick` says of them."""

    run: SavedRun
    verdict: Verdict

    def step_of(self, moment: Moment) -> float | None:
        """The training step of a moment; None for an epoch where no LoRA was saved by its epoch.

        Epochs are as long as each other, so that one that was saved tells of all.
        """
        kind, number = moment
        if kind == "step" or not number:  # epoch 0 is before the training
            return number
        by_epoch = re.compile(rf"{re.escape(self.run.name)}-(\d{{6}})\.[^.]+")  # how sd-scripts calls an epoch's LoRA
        known = {int(named[1]): one.step for one in self.run.checkpoints if (named := by_epoch.fullmatch(one.file))}
        if number in known or not known:
            return known.get(number)
        epoch, step = max(known.items())
        return number * step / epoch

    def nearest(self, moment: Moment) -> Checkpoint | None:
        """The checkpoint whose step is nearest to a moment's; None where that is not known, or before the training."""
        step = self.step_of(moment)
        return None if not step else min(self.run.checkpoints, key=lambda one: abs(one.step - step), default=None)

    def near_checkpoints(self, moments: Sequence[Moment]) -> list[Moment]:
        """The moments before the training, and the nearest to each checkpoint; all of them where that is not known."""
        steps = {moment: step for moment in moments if (step := self.step_of(moment)) is not None}
        if len(steps) < len(moments) or not self.run.checkpoints:
            return list(moments)
        near = {min(moments, key=lambda moment: abs(steps[moment] - one.step)) for one in self.run.checkpoints}
        near.add(self.picked_among(moments) or moments[0])
        return [moment for moment in moments if moment in near or not steps[moment]]

    def picked_among(self, moments: Sequence[Moment]) -> Moment | None:
        """The moment that is nearest to the picked checkpoint; None where each is nearer to another one."""
        picked = self.verdict.picked
        if picked is None:
            return None
        near = {
            moment: abs((self.step_of(moment) or 0) - picked.step)
            for moment in moments
            if self.nearest(moment) is picked
        }
        return min(near, key=near.__getitem__, default=None)


def read_saved(log: Path) -> Saved | None:
    """The checkpoints beside a step log; None where a run wrote no lines about them.

    Raises:
        AptError: there are lines, and one is none of a checkpoint.
    """
    path = log.with_name(run_name(log) + ENDING)
    if not path.exists():
        return None
    run = read_checkpoints(path)
    return Saved(run, verdict(run.checkpoints, run.gone()))
