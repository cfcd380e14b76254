"""What a run came to, in numbers and in plain words: what was measured, and no verdict."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from apt_hooks.config import OF_OBJECTIVES
from apt_hooks.results.read_steplog import RunLog

from .curves import timesteps_of

NAMED_BINS = 3  # so many of the highest are named


@dataclasses.dataclass(frozen=True)
class Summary:
    """Means over the last tenth of a run, as `apt-hooks calibrate` takes it.

    Attributes:
        first, last: the steps where this tenth begins and ends.
        gamma, gap: [bins], NaN for a bin that was not seen.
        values: by the names in `VALUES`; NaN where there were none.
        augmented: mean share of augmented images over the whole run.
        broken: the step from which on a bin that had been seen has no gap any more; None: there is none.
    """

    first: int
    last: int
    gamma: Tensor
    gap: Tensor
    values: dict[str, float]
    augmented: float
    broken: int | None

    @property
    def mean_gamma(self) -> float:
        return float(self.gamma.nanmean())

    @property
    def mean_gap(self) -> float:
        return float(self.gap.nanmean())

    def highest(self) -> list[int]:
        """The bins that were seen, from the highest gamma to the lowest."""
        seen = [b for b, gamma in enumerate(self.gamma.tolist()) if not math.isnan(gamma)]
        return sorted(seen, key=lambda b: -float(self.gamma[b]))


def summarize(run: RunLog) -> Summary:
    """The numbers of a run."""
    lines = math.ceil(len(run.steps) / 10)
    places = torch.arange(len(run.steps))[:, None].expand_as(run.seen)
    last_seen = places.masked_fill(~run.seen, -1).amax(0)  # [bins], the line; -1: none
    lost = last_seen[(last_seen >= 0) & (last_seen < len(run.steps) - 1)]
    return Summary(
        first=int(run.steps[-lines]),
        last=int(run.steps[-1]),
        gamma=run.gammas.masked_fill(~run.seen, math.nan)[-lines:].nanmean(0),
        gap=run.gaps[-lines:].nanmean(0),
        values={name: float(column[-lines:].nanmean()) for name, column in run.values.items()},
        augmented=float(run.values["augmented"].nanmean()),
        broken=int(run.steps[int(lost.min()) + 1]) if len(lost) else None,
    )


def in_words(run: RunLog, found: Summary) -> list[str]:
    """Sentences that say whether a run overfitted, as far as its log tells."""
    return [*_of_gamma(run, found), *_of_difference(found), *_of_apt(run, found), *_of_breaks(run, found)]


def how_trained(run: RunLog) -> str:
    """Preset and method of a run in a few words; empty where its log does not say."""
    if not run.starts:
        return ""
    config = run.config
    preset, objective = run.about.get("preset"), config.get("objective", "apt")
    parts = [f"preset {preset}" if preset else "no preset"]
    if objective != "apt":
        parts.append(f"objective {objective}")
    if (offset := _offset_weight(run)) is not None:
        parts.append(f"lambda_offset {number(offset)}")
    if config.get("monitor_only"):
        parts.append("monitor_only")
    return ", ".join(parts)


def _offset_weight(run: RunLog) -> float | None:
    """The weight of L2-SP's penalty, alone or beside APT's terms; None where it had no part: an older log has the key
    all the same, but no `l_offset`, and one that was only watched has that without a weight."""
    config = run.config
    if config.get("objective", "apt") not in OF_OBJECTIVES["lambda_offset"] or bool(
        run.values["l_offset"].isnan().all()
    ):
        return None
    weight: float | None = config.get("lambda_offset")
    return weight or None


def number(value: float) -> str:
    """A number to three digits, as people read it; a dash for NaN."""
    if math.isnan(value):
        return "\u2013"
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.2e}"
    return f"{value:.3g}"


def share(value: float) -> str:
    """A share as a percentage; a dash for NaN."""
    return "\u2013" if math.isnan(value) else f"{100 * value:.0f} %"


def fixed(value: float) -> str:
    """A number from 0 to 1, such as gamma, with two digits; a dash for NaN."""
    return "\u2013" if math.isnan(value) else f"{value:.2f}"


def _of_gamma(run: RunLog, found: Summary) -> list[str]:
    when = f"steps {found.first} to {found.last}" if found.first < found.last else f"step {found.last}"
    order, bins = found.highest(), len(found.gamma)
    if not order:
        return [f"In the last tenth of the run ({when}) no bin of timesteps had been seen, so there is no gamma."]
    ranges = timesteps_of([(b, b) for b in range(bins)], bins)
    named = [f"{ranges[b]} ({fixed(float(found.gamma[b]))})" for b in order]
    text = f"In the last tenth of the run ({when}) gamma was {fixed(found.mean_gamma)} on average"
    if bins == 1:
        return [f"{text}, in one bin for all timesteps."]
    text += f" over the {len(order)} of {bins} bins seen" if len(order) < bins else f" over the {bins} bins"
    if len(order) <= NAMED_BINS:
        return [f"{text}: {', '.join(named)} by timesteps."]
    return [f"{text}; highest at timesteps {', '.join(named[:NAMED_BINS])}, lowest at {named[-1]}."]


def _of_difference(found: Summary) -> list[str]:
    if math.isnan(found.values["delta_noise"]):
        return []
    text = f"There, delta noise was {number(found.values['delta_noise'])}"
    if found.values["delta_noise"] == 0:
        return [f"{text}: the LoRA has learned nothing, or is not off for the base model."]
    return [f"{text}."]


def _of_apt(run: RunLog, found: Summary) -> list[str]:
    config = run.config
    if config.get("monitor_only"):
        return ["APT only watched (monitor_only): it changed nothing."]
    if config.get("objective") == "dreambooth":
        return ["Plain training (objective dreambooth): APT measured and changed nothing."]
    if config.get("objective") == "l2-sp":
        return ["Plain training with a penalty on the weights' offset (objective l2-sp)."]
    weight, augmented, parts = found.values["loss_weight"], found.augmented, []
    offset = _offset_weight(run)
    held = [] if offset is None else [f"The weights were held to the base model's (lambda_offset {number(offset)})."]
    if weight == 1 and not augmented > 0:
        return ["Neither was the loss turned down there, nor were any images augmented.", *held]
    if not math.isnan(weight):
        dco = config.get("objective") == "dco"
        parts.append(
            f"DCO's factor was {number(weight)} there" if dco else f"the loss was multiplied by {fixed(weight)} there"
        )
    if not math.isnan(augmented):
        parts.append(f"{share(augmented)} of all images were augmented")
    text = " and ".join(parts)
    return ([f"{text[0].upper()}{text[1:]}."] if text else []) + held


def _of_breaks(run: RunLog, found: Summary) -> list[str]:
    said = []
    if found.broken is not None:
        said.append(
            f"From step {found.broken} on a bin that had been seen has no gap: a loss was not a finite number, "
            "and gamma, logged as 0 there, is left out here."
        )
    if run.resumptions:
        said.append(f"Resumed behind step {', '.join(map(str, run.resumptions))}.")
    return said
