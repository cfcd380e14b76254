"""`apt-hooks calibrate`: `indicator_scale` and `lambda_offset` that fit the model, from what a run has logged.

The size of the loss gap depends on the model, so the scale S of `gamma = 1 - exp(-S * gap)` has to as well (the paper
took 1000 for SDXL, 100 for SD 2.1). The rule, which is ours: a run should end as overfitted as the paper's did. Its
SDXL curves end (step 2000) at gamma 0.965, 0.98, 0.83 and 0.39 in the bins from 0, 300, 600 and 900, and the upper
quartile of these is 0.97. With `gap` each bin's mean over the last tenth of the run, and of these the upper quartile,

    1 - exp(-S * gap) = 0.97,  so  S = -log(0.03) / gap

A quartile: one noisy bin can hardly move it, nor, with a gap below 0, leave the equation without a solution, as it
would with a mean of gammas. The upper one: gamma is there for the bins that overfit most; which these are depends on
what the model predicts, so no bins are named. The scale holds for runs of about that length. Where APT acts, the gaps
grow more slowly than in a run with `monitor_only`; the log of such a run can be read in its turn.

A weight of L2-SP's penalty has to fit as well: `l_offset` is a sum over all layers, and grows with learning rate and
steps. The rule, ours too: over the last tenth of a run with `monitor_only`, as a penalty that acts makes it smaller,

    lambda_offset * l_offset = 0.2 * (loss of base - loss of LoRA)

That is what 3e-5 comes to on the tiny world's two models, on which it was good (docs/rivals.md, "How strongly").
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..errors import AptError
from ..files import write_figure
from ..method.indicator import gamma_of_gap
from .read_steplog import ENDING, find_logs, read_run
from .too_short import why_too_short

QUANTILE = 0.75
GAMMA_AT_END = 0.97  # that quantile of the paper's four published bins: 0.969, read off a plot
OFFSET_SHARE = 0.2  # of 3e-5 on the tiny world; docs/rivals.md has the runs
MOST_ERROR = 1 / 3  # standard error of the gain, as a share of it, up to which a weight is proposed


@dataclasses.dataclass(frozen=True)
class LoggedIndicator:
    """What a step log tells about the indicator.

    Attributes:
        steps: [steps], the optimizer steps' numbers.
        gammas: [steps, bins], as the steps used them, under the run's own scale.
        gaps: [steps, bins], `OverfittingIndicator.gaps` at these steps; NaN for a bin not seen yet.
        delta_noise: mean of the last tenth; NaN where the log has none.
        gains: loss of the base model less that of the LoRA, of the last tenth's steps that have both.
        offset: squared distance of the weights (`l_offset`), mean of the last tenth; NaN where it was not measured.
        watched: whether all of the run was with `monitor_only`, so that nothing has acted on the offset; None where an
            older log does not say.
        total: how many steps the log has, of which these are an evenly chosen part.
        compared: and how many of them ran the base model (`frozen_every`), of a very long log about how many.
        configured_scale: `indicator_scale` at the last start; None in older logs.
        dropout: probabilities of the LoRA's dropout by what they are of, at the end of the run; empty in older logs.
    """

    steps: Tensor
    gammas: Tensor
    gaps: Tensor
    delta_noise: float = math.nan
    gains: Sequence[float] = ()
    offset: float = math.nan
    watched: bool | None = None
    total: int = 0
    compared: int = 0
    dropout: Mapping[str, float] = dataclasses.field(default_factory=dict)
    configured_scale: float | None = None

    @property
    def gain(self) -> float:
        """Mean of the gains; NaN of none."""
        return statistics.fmean(self.gains) if self.gains else math.nan

    @property
    def gain_error(self) -> float:
        """Its standard error; NaN of fewer than two."""
        return statistics.stdev(self.gains) / len(self.gains) ** 0.5 if len(self.gains) > 1 else math.nan

    @property
    def scale(self) -> float | None:
        """S of the run, at its end where it changed on resuming, from gammas and gaps; where every gamma is 0 or near
        to 1, that of its configuration, which an older log does not tell: None."""
        telling = (self.gammas > 0) & (self.gammas < 0.9) & (self.gaps > 0)  # nearer to 1 too few digits are left
        scales = -torch.log1p(-self.gammas[telling]) / self.gaps[telling]
        return float(f"{float(scales[-1]):.6g}") if len(scales) else self.configured_scale


def read_log(path: Path, scale: float | None = None) -> LoggedIndicator:
    """Read a step log, as `StepLog` writes it; of a very long one an evenly chosen part (`read_run`).

    Args:
        path: the jsonl file.
        scale: S of the run, for a log without gaps: they then come from gamma and are 0 where gamma is 0.

    Raises:
        AptError: as `read_run`; a log without a step; a log without gaps and no scale, or a log with gaps and one.
    """
    if scale is not None and not 0 < scale < math.inf:
        raise AptError(f"--scale must be a number above 0; found {scale}")
    run = read_run(path)
    if run is None:
        raise AptError(f"{path}: has no line yet; a run writes one a step")
    without = run.seen.all(dim=1) & run.gaps.isnan().all(dim=1)  # as an older apt-hooks wrote them
    if scale is not None and not without.any():
        raise AptError(f"{path}: holds its gaps, so that the run's scale is known; leave --scale {scale:g} out")
    if scale is None and without.any():
        raise AptError(
            f"{path}: step {int(run.steps[without][0])} has no gap, as an older apt-hooks wrote it; to get it from "
            "gamma, give the run's indicator_scale as --scale"
        )
    from_gamma = -torch.log1p(-run.gammas) / (scale or 1.0)
    dropout = run.about.get("dropout", {})
    gaps = torch.where(without[:, None], from_gamma, run.gaps)
    noise = run.values["delta_noise"]
    share = float((~noise.isnan()).double().mean()) or 1.0  # an older log has none
    compared = round(share * run.total)
    gains = _last_tenth(run.values["loss_frozen"] - run.values["loss_tuned"])
    configured = run.config.get("indicator_scale")
    monitored = [bool(start.get("config", {}).get("monitor_only")) for start in run.starts]
    return LoggedIndicator(
        run.steps,
        run.gammas,
        gaps,
        delta_noise=float(_last_tenth(noise).nanmean()),
        gains=gains[~gains.isnan()].tolist(),
        offset=float(_last_tenth(run.values["l_offset"]).nanmean()),
        watched=all(monitored) if monitored else None,
        total=run.total,
        compared=compared,
        dropout=dropout,
        configured_scale=float(configured) if isinstance(configured, (int, float)) else None,
    )


def gaps_at_end(gaps: Tensor) -> Tensor:
    """Mean gap of each bin over the last tenth of a run: [bins] from [steps, bins]; NaN for a bin not seen there."""
    return _last_tenth(gaps).nanmean(dim=0)


def propose_scale(gaps: Tensor) -> float:
    """The `indicator_scale` under which the run would have ended as the paper's did (the rule above).

    Args:
        gaps: [steps, bins], NaN for a bin not seen yet.

    Returns:
        S, exact: not rounded.

    Raises:
        AptError: no bin was seen, the LoRA is not ahead of the base model, or gaps are infinite (gamma was 1).
    """
    at_end = gaps_at_end(gaps)
    if at_end.isnan().all():
        raise AptError("no bin of timesteps was seen before its last step; log a longer run")
    gap = float(at_end.nanquantile(QUANTILE))
    if not math.isfinite(gap):
        raise AptError("gamma is 1 to all digits at the end, which hides the gaps; log a run anew, with this apt-hooks")
    if gap <= 0:
        raise AptError(
            "the LoRA is not ahead of the base model at the end of the run, it has learned nothing yet "
            f"(upper quartile of the bins' gaps: {gap:.2g}); train longer, or with a higher learning rate"
        )
    return -math.log1p(-GAMMA_AT_END) / gap


def propose_offset_weight(gain: float, offset: float) -> float | None:
    """The `lambda_offset` under which the penalty would have ended at `OFFSET_SHARE` of the gain.

    Args:
        gain, offset: as in `LoggedIndicator`.

    Returns:
        Exact; None where the log does not tell: no offset, or no gain.
    """
    return OFFSET_SHARE * gain / offset if gain > 0 and offset > 0 else None


def calibrate(log: Path, picture: Path | None, *, scale: float | None, say: Callable[[str], None]) -> float:
    """Propose an `indicator_scale` for a logged run, and draw its gammas under both scales; of a run that was only
    watched a `lambda_offset` too.

    Args:
        log: the run's step log, or a folder that has no other.
        picture: a PNG file; None puts it beside the log, as `...-calibrate.png`.
        scale: as for `read_log`.
        say: takes each line of text for the user.

    Returns:
        The proposed scale, of two digits.

    Raises:
        AptError: as `read_log` and `propose_scale`; a folder with none or several logs; a run that is too short; the
            picture cannot be written.
    """
    if log.is_dir():
        logs = list(find_logs([log]).values())
        if len(logs) > 1:
            raise AptError(
                f"{log}: has {len(logs)} *{ENDING}, a scale is of one run; name one of {', '.join(map(str, logs))}"
            )
        (log,) = logs
    run = read_log(log, scale)
    picture = picture or log.with_name(f"{log.stem}-calibrate.png")
    if picture.suffix.lower() != ".png":
        raise AptError(f"--out must name a .png file; found {picture}")
    unseen = int(run.gaps.isnan().all(dim=0).sum())
    too_short = why_too_short(run.total, run.gaps.shape[1], unseen, run.delta_noise, run.compared)
    if too_short:
        raise AptError(f"{log}: too short to fit a scale to: {too_short}; log a run as long as the training is to be")
    try:
        proposed = float(f"{propose_scale(run.gaps):.2g}")
    except AptError as error:
        raise AptError(f"{log}: {error}") from error
    at_end = gaps_at_end(run.gaps)
    bins, last = run.gaps.shape[1], _last_tenth(run.steps)
    quartile, median = (float(at_end.nanquantile(q)) for q in (QUANTILE, 0.5))
    say(f"{log}: steps {int(run.steps[0])} to {int(run.steps[-1])}, {bins} bins, indicator_scale = {_text(run.scale)}")
    say(
        f"gap (loss of base - loss of LoRA), mean of steps {int(last[0])} to {int(last[-1])}: "
        f"largest bin {float(at_end[~at_end.isnan()].max()):.3g}, upper quartile {quartile:.3g}, median {median:.3g}"
    )
    say(f"rule: the upper quartile of the bins ends at gamma {GAMMA_AT_END}, as in the paper's SDXL run (step 2000)")
    say(f"write into [apt]: indicator_scale = {_text(proposed)}")
    if run.dropout:
        kinds = ", ".join(f"{kind} = {p:g}" for kind, p in run.dropout.items())
        say(
            f"note: the run's LoRA had dropout ({kinds}), which makes gaps smaller; what is proposed here holds for "
            "that dropout"
        )
    if not 10 <= proposed <= 10000:
        say("note: that is far from the paper's 100 to 1000; is the run as long as the training is to be?")
    if run.watched is not None:
        say(_offset_weight_in_words(run))
    try:
        _draw(run, proposed, picture)
    except ImportError as error:  # the advice has been given
        say(f'no picture, which needs matplotlib ({error}): pip install "apt-hooks[demo]"')
    else:
        say(f"gamma per bin, as it was and under the proposed scale: {picture}")
    return proposed


def _offset_weight_in_words(run: LoggedIndicator) -> str:
    """What follows for `lambda_offset`, or why nothing does."""
    gain, error, steps = run.gain, run.gain_error, len(run.gains)
    told = f"loss_frozen - loss_tuned {gain:.2g} ± {error:.1g} in {steps} steps of the last tenth"
    why = ""
    if not run.watched:
        why = "not all of the run was with monitor_only, without which the offset may have been held"
    elif not run.offset > 0:
        why = "the log has no l_offset above 0, as that of an older apt-hooks or of no plain LoRA (DoRA, LoHa, LoKr)"
    elif not error <= MOST_ERROR * abs(gain):
        why = f"{told} is too uncertain; log more steps, or the base model in more of them (frozen_every)"
    elif not gain > 0:
        why = f"the LoRA is not ahead of the base model ({told})"
    weight = propose_offset_weight(gain, run.offset)
    if why or weight is None:
        return f"no lambda_offset is proposed: {why}"
    return (
        f'to hold the weights, with objective = "l2-sp" or beside APT: lambda_offset = {float(f"{weight:.2g}"):g} at '
        f"most; rule: {OFFSET_SHARE:g} of {told}, over l_offset {run.offset:.3g}"
    )


def _last_tenth(rows: Tensor) -> Tensor:
    return rows[-math.ceil(len(rows) / 10) :]


def _text(scale: float | None) -> str:
    return "unknown" if scale is None else f"{scale:.15g}"


def _draw(run: LoggedIndicator, proposed: float, picture: Path) -> None:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm
    from matplotlib.figure import Figure

    steps, bins, last = run.steps.numpy(), run.gaps.shape[1], _last_tenth(run.steps)
    colors = colormaps["viridis"].resampled(bins)
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, gammas, scale, when in (
        (panels[0], run.gammas, run.scale, "as it was"),
        (panels[1], gamma_of_gap(run.gaps, proposed), proposed, "as proposed"),
    ):
        gammas = gammas.where(~run.gaps.isnan(), math.nan)  # a bin's line begins where it is first seen
        for b in range(bins):
            axes.plot(steps, gammas[:, b].numpy(), color=colors(b), linewidth=1.1)
        quartile = gammas.nanquantile(QUANTILE, dim=1).numpy()
        axes.plot(steps, quartile, color="black", linewidth=2, label="upper quartile of the bins")
        axes.axhline(
            GAMMA_AT_END,
            color="crimson",
            linestyle="--",
            linewidth=1.2,
            label=f"where the paper's ended, {GAMMA_AT_END}",
        )
        axes.axvspan(int(last[0]), int(last[-1]), color="0.92", zorder=0, label="last tenth of the run")
        axes.set(xlabel="step", ylim=(-0.02, 1.02), title=f"{when}: indicator_scale = {_text(scale)}")
        axes.grid(alpha=0.25)
        axes.margins(x=0.02)
    panels[0].set_ylabel("gamma")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    key = ScalarMappable(BoundaryNorm([b - 0.5 for b in range(bins + 1)], bins), colors)
    bar = figure.colorbar(key, ax=panels, ticks=range(0, bins, math.ceil(bins / 10)), pad=0.02)
    bar.set_label("bin of timesteps, low to high noise")
    write_figure(picture, figure)
