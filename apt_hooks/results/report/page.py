"""`apt-hooks report`: one page, complete in itself, that shows what trainings with APT came to."""

from __future__ import annotations

import datetime
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any, TypeVar

from apt_hooks.errors import AptError
from apt_hooks.files import write_atomically
from apt_hooks.results.read_events import TrainerLog, find_events, has_events_alone, read_events
from apt_hooks.results.read_steplog import ENDING, RunLog, find_logs, read_run
from apt_hooks.training.run import version

from . import figures
from .figures import Plot
from .markup import key, note
from .samples import read_samples
from .saved import Saved, read_saved
from .summary import fixed, how_trained, in_words, number, summarize
from .tables import results_table, settings_table
from .which_checkpoint import which_checkpoint

_Read = TypeVar("_Read")
_TERMS = {
    "loss_weight": ("Factor of the loss", "1: as without APT; near 0: what the LoRA is overfitted to hardly counts."),
    "augmented": ("Augmented images", "Share of the images that were zoomed out and rotated."),
    "l_mu": ("l_mu", "Distance of the hidden states' means from the base model's."),
    "l_sigma": ("l_sigma", "Distance of the hidden states' deviations from the base model's."),
    "l_attn": ("l_attn", "Distance of the attention maps from the base model's."),
    "l_joint": ("l_joint", "Distance of the cross-attentions' outputs from the base model's."),
    "l_offset": ("l_offset", "Squared distance of the weights from the base model's (L2-SP)."),
}


def run_report(places: Sequence[Path], out: Path, *, say: Callable[[str], None]) -> list[str]:
    """Write the page for some runs, side by side.

    Args:
        places: step logs, and folders in and below which all `*-apt.jsonl` are taken. Of event files of TensorBoard, in
            the same places or others, the losses are shown too: so runs without APT stand beside those with it.
        out: the page, an .html file.
        say: takes the one line of text for the user.

    Returns:
        What could not be read, a line each: a place without a log, or a broken log or checkpoints' file beside others,
        which are shown without it. The page says so too.

    Raises:
        AptError: nothing could be read, plotly is missing (or Pillow, where there are sample pictures, or tensorboard,
            where a place has nothing but event files), or the page cannot be written.
    """
    if out.suffix.lower() not in (".html", ".htm"):
        raise AptError(f"--out must name an .html file; found {out}")
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise AptError(f'the report needs plotly ({error}): pip install "apt-hooks[report]"') from error
    bare = [place for place in places if has_events_alone(place)]
    if bare and len(bare) == len(places):
        raise AptError(
            f"{', '.join(map(str, bare))}: has event files of TensorBoard, and no *{ENDING}; name a run with APT too, "
            "beside which their losses are shown"
        )
    left_out: list[str] = []

    def tried(read: Callable[..., _Read], *given: Any) -> _Read | None:
        try:
            return read(*given)
        except AptError as error:
            left_out.append(str(error))
            return None

    with_logs = [place for place in places if place not in bare]
    if len(with_logs) > 1:
        with_logs = [place for place in with_logs if tried(find_logs, [place])]
    logs = find_logs(with_logs) if with_logs or not places else {}
    trainers, notes = [], []
    try:
        trainers = read_events(find_events([place for place in places if place in bare or place in with_logs]))
    except AptError as error:  # tensorboard is missing
        if bare:
            raise
        notes.append(f"Left out: {error}.")
    runs, empty = [], []
    for name, path in logs.items():
        known = len(left_out)
        run = tried(read_run, path, name)
        if run is not None:
            runs.append(run)
        elif len(left_out) == known:
            empty.append(str(path))
    if not runs:
        raise AptError("; ".join(left_out + [f"{path}: no step yet; a run writes a line a step" for path in empty]))
    saved = [tried(read_saved, run.path) for run in runs]
    notes += [*(f"Left out: {line}." for line in left_out), *(f"{path}: no step yet, left out." for path in empty)]
    page = _Page(runs, saved, trainers)
    write_atomically(out, page.html(notes, get_plotlyjs()).encode(errors="replace"))
    steps = sum(run.total for run in runs)
    counts = f"{len(runs)} {'run' if len(runs) == 1 else 'runs'}, {steps} {'step' if steps == 1 else 'steps'}"
    others = f", losses of {page.others} other{'s' if page.others > 1 else ''}" if page.others else ""
    begun = f"; no step yet in {', '.join(empty)}" if empty else ""
    say(f"{out}: {counts}{others}{begun}")
    return left_out


class _Page:
    """What fills the gaps of page.html; `plots` collects what its script is to draw, by the ids of their places."""

    def __init__(self, runs: list[RunLog], saved: list[Saved | None], trainers: Sequence[TrainerLog]) -> None:
        self.runs, self.saved = runs, saved
        self.found = [summarize(run) for run in runs]
        self.trainers = list(_named_and_colored(runs, trainers))
        logged = [int(steps.max()) for *_, log in self.trainers for steps, _ in log.scalars.values()]
        self.last_step = max(1, *(one.last for one in self.found), *logged)
        self.others = len({run for run, *_ in self.trainers} - {f"run-{i}" for i in range(len(runs))})
        self.points = figures.points_for(len(runs))
        self.plots: dict[str, Plot] = {}

    def html(self, notes: Sequence[str], plotly: str) -> str:
        """The whole page; `notes` say what was left out."""
        names = [run.name for run in self.runs[:4]] + ["\u2026"] * (len(self.runs) > 4)
        delta_noise = figures.value_plot("delta_noise", self.runs, self.last_step, self.points, "delta noise")
        parts = {
            "title": escape(f"Training with APT: {', '.join(names)}"),
            "style": _part("page.css"),
            "made": f"Made by apt-hooks {escape(version())} at {datetime.datetime.now():%Y-%m-%d %H:%M}.",
            "notes": "".join(map(note, notes)),
            "checkpoints": self._checkpoints(),
            "cards": "".join(self._card(i) for i in range(len(self.runs))),
            "comparison": self._comparison(),
            "results": results_table(self.runs, self.found),
            "gamma_keys": "".join(_gamma_key(bins) for bins in sorted({run.gammas.shape[1] for run in self.runs})),
            "gamma_panels": self._gamma_panels(),
            "delta_key": self._run_key("delta-noise"),
            "delta_panel": self._figure("delta", "", "", delta_noise),
            "loss_key": _loss_key(),
            "loss_panels": self._loss_panels(),
            "trainer_losses": self._trainer_losses(),
            "terms_key": self._run_key("terms"),
            "terms_panels": self._term_panels(),
            "settings": self._settings(),
        }
        # Last, when all of them are known. The "<" of a name must not end the script.
        plots = json.dumps(self.plots, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
        return Template(_part("page.html")).substitute(parts, plots=plots, plotly=plotly, script=_part("page.js"))

    def _card(self, i: int) -> str:
        run, found = self.runs[i], self.found[i]
        how = how_trained(run) or "its configuration is not in the log"
        when = f"up to step {found.last}, written {run.written:%H:%M} on {run.written:%Y-%m-%d}"
        return (
            f'<div class="card" style="--run: {figures.run_color(i)}"><h3>{escape(run.name)}</h3>'
            f'<p class="soft">{escape(how)}; {when}</p><p>{escape(" ".join(in_words(run, found)))}</p>'
            f'<p class="soft">{self._how_read(run)}<br><code>{escape(str(run.path))}</code></p></div>'
        )

    def _how_read(self, run: RunLog) -> str:
        # `every` is a power of two: the 2nd, 32nd and 8192nd, but the 4th and 512th.
        ending = "nd" if run.every % 10 == 2 and run.every % 100 != 12 else "th"
        part = f"every {run.every}{ending} of" if run.every > 1 else "all"
        each = -(-len(run.steps) // self.points)
        means = f"; a point of a curve is the mean of {each} of these" if each > 1 else ""
        return f"Shown: {part} {run.total} steps{means}."

    def _comparison(self) -> str:
        """Which run ended lowest and highest; nothing for a single one."""
        said = []
        for what, values, text in (
            ("mean gamma", [one.mean_gamma for one in self.found], fixed),
            ("delta noise", [one.values["delta_noise"] for one in self.found], number),
        ):
            named = sorted((v, run.name) for v, run in zip(values, self.runs, strict=True) if v == v)  # not NaN
            if len(named) > 1:
                (low, lowest), (high, highest) = named[0], named[-1]
                said.append(f"{what} ended lowest in {lowest} ({text(low)}), highest in {highest} ({text(high)})")
        if not said:
            return ""
        scales = {str(run.config.get("indicator_scale")) for run in self.runs if run.starts}
        other = " Their indicator_scale is not the same: compare gaps, not gammas." if len(scales) > 1 else ""
        ends = " They ended at different steps." if len({one.last for one in self.found}) > 1 else ""
        return f"<p>Of these runs, {escape('; '.join(said))}.{ends}{other}</p>"

    def _checkpoints(self) -> str:
        samples = [read_samples(run.path, run.starts, saved) for run, saved in zip(self.runs, self.saved, strict=True)]
        none = "None of these runs has pictures in a folder sample beside its log, as sd-scripts saves them."
        return "".join(
            which_checkpoint(i, run, saved, pictures, self.last_step, self._figure)
            for i, (run, saved, pictures) in enumerate(zip(self.runs, self.saved, samples, strict=True))
        ) + ("" if any(samples) else note(none))

    def _gamma_panels(self) -> str:
        return "".join(
            self._figure(f"gamma-{i}", run.name, how_trained(run), figures.gamma_plot(run, self.last_step, self.points))
            for i, run in enumerate(self.runs)
        )

    def _loss_panels(self) -> str:
        span = figures.loss_span(self.runs)
        return "".join(
            self._figure(f"loss-{i}", run.name, "", figures.loss_plot(run, self.last_step, span, self.points))
            for i, run in enumerate(self.runs)
        )

    def _trainer_losses(self) -> str:
        """What the trainers logged, a plot a scalar; nothing where they logged nothing that was found."""
        if not self.trainers:
            return ""
        tags = sorted({tag for *_, log in self.trainers for tag in log.scalars}, key=lambda tag: (tag.count("/"), tag))
        panels = ""
        for i, tag in enumerate(tags):
            having = [trainer for trainer in self.trainers if tag in trainer[-1].scalars]
            panels += self._figure(
                f"trainer-{i}", tag, "", figures.trainer_plot(tag, having, self.last_step, self.points)
            )
        logged = {trainer[0] for trainer in self.trainers}
        silent = [run.name for i, run in enumerate(self.runs) if f"run-{i}" not in logged]
        missing = note(f"No event files of {', '.join(silent)} were found: name its logging_dir too.") if silent else ""
        legend = key("trainer-losses", "runs", list(dict.fromkeys(trainer[:3] for trainer in self.trainers)))
        return Template(_part("trainer_losses.html")).substitute(missing=missing, key=legend, panels=panels)

    def _term_panels(self) -> str:
        return "".join(
            self._figure(name, *_TERMS[name], figures.value_plot(name, self.runs, self.last_step, self.points, name))
            for name in _TERMS
            if any(bool((~run.values[name].isnan()).any()) for run in self.runs)
        )

    def _settings(self) -> str:
        silent, told = ([run for run in self.runs if bool(run.starts) is known] for known in (False, True))
        unknown = note(f"The config is not in the log: {', '.join(run.name for run in silent)}.") if silent else ""
        if not told:
            return unknown
        shading = " Shaded: not the same in all runs." if len(told) > 1 else ""
        return f"{unknown}<p>(own): given beside the preset, or not the default.{shading}</p>{settings_table(told)}"

    def _figure(self, name: str, title: str, subtitle: str, plot: Plot) -> str:
        self.plots[f"plot-{name}"] = plot
        small = f'<span class="soft">{escape(subtitle)}</span>' if subtitle else ""
        caption = f"<figcaption><h3>{escape(title)}</h3>{small}</figcaption>" if title else ""
        return f'<figure>{caption}<div class="chart" id="plot-{name}"></div></figure>'

    def _run_key(self, within: str) -> str:
        return key(within, "runs", [(f"run-{i}", figures.run_color(i), run.name) for i, run in enumerate(self.runs)])


def _gamma_key(bins: int) -> str:
    ranges = figures.bin_ranges(bins)
    lines = [(f"gamma-{bins}-{i}", figures.bin_color(i, len(ranges)), name) for i, name in enumerate(ranges)]
    folded = f", means of neighbours among the {bins} bins" if len(ranges) < bins else ""
    return key("gamma", f"timesteps{folded}", [*lines, (f"gamma-{bins}-mean", figures.MEAN_COLOR, "mean of the bins")])


def _loss_key() -> str:
    lines = [("loss_tuned", figures.TUNED_COLOR, "with the LoRA"), ("loss_frozen", figures.FROZEN_COLOR, "base model")]
    return key("losses", "loss", lines)


def _named_and_colored(
    runs: Sequence[RunLog], trainers: Sequence[TrainerLog]
) -> Iterator[tuple[str, str, str, TrainerLog]]:
    """A trainer's logs with the key, color and name of the step log's run, where they are of one of these."""
    names, others = [run.name for run in runs], itertools.count(len(runs))
    for log in trainers:
        found = [log.agreement(run) for run in runs]
        place = max(range(len(runs)), key=lambda i: found[i][0])
        share, ahead = found[place]
        name = names[place]
        if share <= 0.5:  # of a run that was resumed from an earlier step some are not in its log any more
            place, ahead = next(others), 0
            name = f"{log.name} (TensorBoard)" if log.name in names else log.name
        yield f"run-{place}", figures.run_color(place), name, log.later(ahead)


def _part(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
