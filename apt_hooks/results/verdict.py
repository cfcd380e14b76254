"""Which checkpoint, and why: from what was measured of each while it was trained, without a picture.

The rule is ours. A LoRA gets better at its subject up to the end of a training as a rule, so the last checkpoint is
taken that is not worn out:

- prompts without class and subject still do `LEAST_RESPONSE` of what they do to the base model's predictions
  (`prompt_response`): below that they are ignored;
- their predictions have moved by at most `MOST_DRIFT` of what a prompt does to them (`free_drift`): farther, whatever
  the prompt still does, it is another model;
- where there are pictures that were not trained on, the LoRA is still ahead of the base model on them by `KEPT` of the
  most that it was in this run (`held_out_gap`): behind that it overfits.

The first and the last number were chosen on the tiny world, on concepts other than those on which the rule was then
compared with judges of pictures (docs/checkpoints.md); the second is above all that a run there came to. Of checkpoints
whose files are gone the numbers count, and none is picked while there are others.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence

from .read_checkpoints import Checkpoint
from .too_short import why_too_short

LEAST_RESPONSE = 0.25
MOST_DRIFT = 2.0
KEPT = 0.88


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What to take.

    Attributes:
        picked: the checkpoint, of those that are still there, where any is; None where nothing can be said.
        sentences: why, or why not; two, or one more where the pictures that were not trained on have something to say.
    """

    picked: Checkpoint | None
    sentences: tuple[str, ...]

    def __str__(self) -> str:
        return " ".join(self.sentences)


def verdict(checkpoints: Sequence[Checkpoint], gone: Collection[int] = ()) -> Verdict:
    """Which of a run's checkpoints, by their order of steps.

    Args:
        checkpoints: all that were saved.
        gone: the steps of those whose files are not there any more.
    """
    if not checkpoints:
        return Verdict(None, ("No checkpoint has been saved yet.",))
    last = checkpoints[-1]
    too_short = why_too_short(last.step, last.bins, last.unseen, last.delta_noise)
    if too_short:
        return Verdict(None, (f"Too short to say: {too_short}.", "Train longer, then ask again."))
    if any(math.isnan(one.prompt_response) for one in checkpoints):
        earlier = "" if math.isnan(last.free_drift) else ", which an earlier apt-hooks did not measure"
        missing = f"Cannot tell: not all of these checkpoints have a prompt response{earlier}."
        return Verdict(None, (missing, "Let pictures decide."))
    there = [one for one in checkpoints if one.step not in gone]
    fresh = [one for one in checkpoints if _why_not(one, checkpoints) is None]
    best, picked = _last_or_least_worn(checkpoints, fresh), _last_or_least_worn(there or checkpoints, fresh)
    sentences = [f"Step {picked.step} ({picked.file}): {_why(picked, checkpoints, fresh)}."]
    if picked is not best or not there:
        sentences.append(_gone(best, bool(there)))
    else:
        sentences.append(_behind(picked, checkpoints, fresh))
    held_out = _held_out(checkpoints, gone)
    return Verdict(picked, (*sentences, *([held_out] if held_out else [])))


def _why_not(one: Checkpoint, checkpoints: Sequence[Checkpoint]) -> str | None:
    """Why a checkpoint is not to be taken, in words; None where it may be."""
    if one.prompt_response < LEAST_RESPONSE:
        return f"other prompts do {one.prompt_response:.3g} of what they do to the base model: they are ignored"
    if one.free_drift > MOST_DRIFT:
        return f"other prompts have moved by {one.free_drift:.3g} of what they mean: it is another model"
    if _behind_on_unseen(one, checkpoints):
        return "it is behind what it was on pictures that were not trained on: it overfits"
    return None


def _behind_on_unseen(one: Checkpoint, checkpoints: Sequence[Checkpoint]) -> bool:
    most = max((known.held_out_gap for known in checkpoints if not math.isnan(known.held_out_gap)), default=math.nan)
    return one.held_out_gap < most - (1 - KEPT) * abs(most)  # false where one of them is NaN


def _last_or_least_worn(among: Sequence[Checkpoint], fresh: Sequence[Checkpoint]) -> Checkpoint:
    return next((one for one in reversed(among) if one in fresh), max(among, key=lambda one: one.prompt_response))


def _why(picked: Checkpoint, checkpoints: Sequence[Checkpoint], fresh: Sequence[Checkpoint]) -> str:
    if picked in fresh:
        still = f"other prompts still do {picked.prompt_response:.2f} of what they do to the base model"
        return f"the last that is not worn out: {still}"
    which = "those that are left" if fresh else "all"
    return f"{which} are worn out; this one listens to other prompts most, but {_why_not(picked, checkpoints)}"


def _behind(picked: Checkpoint, checkpoints: Sequence[Checkpoint], fresh: Sequence[Checkpoint]) -> str:
    """What comes behind it."""
    if picked not in fresh:
        return "Save earlier ones, or train at a lower learning rate."
    if picked is checkpoints[-1]:
        return "It is the last: a longer training may give one that is better still."
    following = checkpoints[checkpoints.index(picked) + 1]
    said = f"At step {following.step} {_why_not(following, checkpoints)}."
    if picked is checkpoints[0]:
        said += " It is the first that was saved: save more often, or train at a lower learning rate."
    return said


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
    top = max(reversed(known), key=lambda one: one.held_out_gap)
    last, most = known[-1], f"{top.held_out_gap:.3g}{', gone' if top.step in gone else ''}"
    at = "at the end" if last is checkpoints[-1] else f"at step {last.step}"
    said = "On pictures that were not trained on it "
    if top.held_out_gap <= 0:
        return f"{said}was never ahead of the base model, least behind at step {top.step} ({most})."
    if top is last:
        return f"{said}gets ahead of the base model to the end: no overfitting there."
    since = "it overfits by then" if _behind_on_unseen(last, checkpoints) else "hardly less"
    said += f"was furthest ahead of the base model at step {top.step} ({most}), and {last.held_out_gap:.3g} {at}"
    return f"{said}: {since}."
