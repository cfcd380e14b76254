"""Which checkpoint, and why: from what was measured of each while it was trained, without a picture.

The rule is ours. Between its first and its last checkpoint a LoRA gets ahead of the base model on its own pictures
(`gap`), and moves what other prompts give (the drifts). Both as shares of what they come to in all,

    benefit(k) = share(gap)_k - mean over the drifts of share(drift)_k,   share(x)_k = (x_k - x_1) / (max x - x_1)

and the checkpoint with the largest benefit is picked: behind it, drift grows faster than what is learned, the knee of
the one against the other. No threshold of gamma or of a drift is in it, whose sizes differ between models and subjects.
Compared with judges of pictures it is no better than chance (docs/checkpoints.md), and is told with that.

Of checkpoints whose files are gone the numbers count, and none is picked while there are others.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence

from .read_checkpoints import Checkpoint
from .too_short import why_too_short

FEWEST = 4
"""Checkpoints: of fewer, a knee is what the first and the last leave between them."""

CLEAR = 0.05
"""By how much the benefit is to be above the next one's: gaps of one LoRA, taken twice, differ by about as much."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What to take.

    Attributes:
        picked: the checkpoint, of those that are still there, where any is; None where nothing can be said.
        sentences: why, or why not; two, or one more where the pictures that were not trained on have something to say.
        sure: whether another is clearly worse by the same rule.
        benefits: of each checkpoint, NaN where there is none.
    """

    picked: Checkpoint | None
    sentences: tuple[str, ...]
    sure: bool
    benefits: tuple[float, ...]

    def __str__(self) -> str:
        return " ".join(self.sentences)


def verdict(checkpoints: Sequence[Checkpoint], gone: Collection[int] = ()) -> Verdict:
    """Which of a run's checkpoints, by their order of steps.

    Args:
        checkpoints: all that were saved.
        gone: the steps of those whose files are not there any more.
    """
    nothing = (math.nan,) * len(checkpoints)
    if not checkpoints:
        return Verdict(None, ("No checkpoint has been saved yet.",), False, nothing)
    last = checkpoints[-1]
    too_short = why_too_short(last.step, last.bins, last.unseen, last.delta_noise)
    if too_short:
        return Verdict(None, (f"Too short to say: {too_short}.", "Train longer, then ask again."), False, nothing)
    if len(checkpoints) < FEWEST:
        count = f"{len(checkpoints)} checkpoint{'s' if len(checkpoints) > 1 else ''}"
        return Verdict(
            None,
            (
                f"Cannot tell from {count}: the rule looks for the one behind which drift outgrows learning.",
                f"Save {FEWEST} or more in a run, or let pictures decide.",
            ),
            False,
            nothing,
        )
    names = [name for name in last.drifts if all(name in one.drifts for one in checkpoints)]
    if not names or any(math.isnan(one.gap) for one in checkpoints):
        missing = "drifts" if not names else "gaps"
        return Verdict(
            None,
            (f"Cannot tell: not all of these checkpoints have {missing}.", "Let pictures decide."),
            False,
            nothing,
        )
    learned = _shares([one.gap for one in checkpoints])
    drifted = [_shares([one.drifts[name] for one in checkpoints]) for name in names]
    if learned is None:
        return Verdict(
            None,
            (
                "Cannot tell: behind the first checkpoint the LoRA got no further ahead of the base model.",
                "Save the first one earlier, or let pictures decide.",
            ),
            False,
            nothing,
        )
    costs = [sum(each) / len(each) for each in zip(*(d for d in drifted if d is not None), strict=True)]
    costs = costs or [0.0] * len(checkpoints)  # nothing has moved
    benefits = tuple(gain - cost for gain, cost in zip(learned, costs, strict=True))
    there = [k for k, one in enumerate(checkpoints) if one.step not in gone]
    ever, best = (
        max(among, key=lambda k: benefits[k]) for among in (range(len(benefits)), there or range(len(benefits)))
    )
    far = [benefit for k, benefit in enumerate(benefits) if abs(k - best) > 1 and (k in there or not there)]
    sure = benefits[best] - max(far, default=-math.inf) > CLEAR
    picked = checkpoints[best]
    sentences = [
        f"Step {picked.step} ({picked.file}): from the first checkpoint on it has {learned[best]:.0%} of what was "
        f"learned, at {costs[best]:.0%} of the drift of other prompts.",
        _beside(checkpoints, benefits, best, sure, there)
        if best == ever and there
        else _gone(checkpoints[ever], bool(there)),
    ]
    held_out = _held_out(checkpoints, gone)
    return Verdict(picked, (*sentences, *([held_out] if held_out else [])), sure, benefits)


def _shares(values: Sequence[float]) -> list[float] | None:
    """From the first value, 0, to the largest, 1; None where there is no larger one."""
    first, most = values[0], max(values)
    return [(value - first) / (most - first) for value in values] if most > first else None


def _beside(
    checkpoints: Sequence[Checkpoint], benefits: Sequence[float], best: int, sure: bool, there: Sequence[int]
) -> str:
    if sure and best == len(checkpoints) - 1:
        return "Before it less is learned, and it is the last: a longer training may give one that is better still."
    if sure:
        return "Before it less is learned, and behind it drift grows faster than what is learned."
    close = [checkpoints[k].step for k in there if benefits[best] - benefits[k] <= CLEAR]
    steps = ", ".join(str(step) for step in close if step != checkpoints[best].step)
    return f"It cannot be told from step{'s' if ',' in steps else ''} {steps} by these numbers: look at their pictures."


def _gone(best: Checkpoint, others: bool) -> str:
    """That the best one cannot be taken."""
    why = "the trainer deletes older ones (save_last_n_steps, checkpoints_total_limit)"
    if others:
        return f"Step {best.step} ({best.file}) was better, but is gone: {why}. This is the best of those still there."
    return f"Its file is gone, as all of this run are: {why}, or they were moved away from their lines."


def _held_out(checkpoints: Sequence[Checkpoint], gone: Collection[int]) -> str:
    """What the pictures say that were not trained on."""
    known = [one for one in checkpoints if not math.isnan(one.held_out_gap)]
    if len(known) < 2:
        return ""
    top = max(known, key=lambda one: one.held_out_gap)
    last = known[-1]
    if top is last:
        return "On pictures that were not trained on it gets ahead of the base model to the end: no overfitting there."
    return (
        f"On pictures that were not trained on it was furthest ahead of the base model at step {top.step} "
        f"({top.held_out_gap:.3g}{', gone' if top.step in gone else ''}), and {last.held_out_gap:.3g} at the end: from "
        "there on it overfits."
    )
