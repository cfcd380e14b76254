"""`apt-hooks report`: one page, complete in itself, that shows what trainings with APT came to."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template

from apt_hooks.errors import AptError
from apt_hooks.files import write_atomically
from apt_hooks.results.read_steplog import RunLog, find_logs, read_run
from apt_hooks.training.run import version

from . import figures
from .figures import Plot
from .samples import Samples, read_samples
from .summary import fixed, how_trained, in_words, number, summarize
from .tables import results_table, settings_table

_TERMS = {
    "loss_weight": ("Factor of the loss", "1: as without APT; near 0: what the LoRA is overfitted to hardly counts."),
    "augmented": ("Augmented images", "Share of the images that were zoomed out and rotated."),
    "l_mu": ("l_mu", "Distance of the hidden states' means from the base model's."),
    "l_sigma": ("l_sigma", "Distance of the hidden states' deviations from the base model's."),
    "l_attn": ("l_attn", "Distance of the attention maps from the base model's."),
    "l_joint": ("l_joint", "Distance of the cross-attentions' outputs from the base model's."),
    "l_offset": ("l_offset", "Squared distance of the weights from the base model's (L2-SP)."),
}


def run_report(places: Sequence[Path], out: Path, *, say: Callable[[str], None]) -> None:
    """Write the page for some runs, side by side.

    Args:
        places: step logs, and folders in and below which all `*-apt.jsonl` are taken.
        out: the page, an .html file.
        say: takes the one line of text for the user.

    Raises:
        AptError: no log there, a log that is broken, plotly is missing (or Pillow, where there are sample pictures),
            or the page cannot be written.
    """
    if out.suffix.lower() not in (".html", ".htm"):
        raise AptError(f"--out must name an .html file; found {out}")
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise AptError(f'the report needs plotly ({error}): pip install "apt-hooks[report]"') from error
    logs = find_logs(places)
    read = {name: read_run(path, name) for name, path in logs.items()}
    runs = [run for run in read.values() if run is not None]
    empty = [str(logs[name]) for name, run in read.items() if run is None]
    if not runs:
        raise AptError(f"{', '.join(empty)}: no step yet; a run writes a line a step")
    page = _Page(runs, [read_samples(run.path, run.starts) for run in runs])
    write_atomically(out, page.html(empty, get_plotlyjs()).encode(errors="replace"))
    steps = sum(run.total for run in runs)
    counts = f"{len(runs)} {'run' if len(runs) == 1 else 'runs'}, {steps} {'step' if steps == 1 else 'steps'}"
    left_out = f"; no step yet in {', '.join(empty)}" if empty else ""
    say(f"{out}: {counts}{left_out}")


class _Page:
    """What fills the gaps of page.html; `plots` collects what its script is to draw, by the ids of their places."""

    def __init__(self, runs: list[RunLog], samples: list[Samples | None]) -> None:
        self.runs, self.samples = runs, samples
        self.found = [summarize(run) for run in runs]
        self.last_step = max(1, *(one.last for one in self.found))
        self.points = figures.points_for(len(runs))
        self.plots: dict[str, Plot] = {}

    def html(self, empty: Sequence[str], plotly: str) -> str:
        """The whole page; `empty` names logs that have no step yet."""
        names = [run.name for run in self.runs[:4]] + ["\u2026"] * (len(self.runs) > 4)
        delta_noise = figures.value_plot("delta_noise", self.runs, self.last_step, self.points, "delta noise")
        parts = {
            "title": escape(f"Training with APT: {', '.join(names)}"),
            "style": _part("page.css"),
            "made": f"Made by apt-hooks {escape(version())} at {datetime.datetime.now():%Y-%m-%d %H:%M}.",
            "notes": "".join(_note(f"{path}: no step yet, left out.") for path in empty),
            "cards": "".join(self._card(i) for i in range(len(self.runs))),
            "comparison": self._comparison(),
            "results": results_table(self.runs, self.found),
            "gamma_keys": "".join(_gamma_key(bins) for bins in sorted({run.gammas.shape[1] for run in self.runs})),
            "gamma_panels": self._gamma_panels(),
            "delta_key": self._run_key("delta-noise"),
            "delta_panel": self._figure("delta", "", "", delta_noise),
            "samples": self._sample_grids(),
            "loss_key": _loss_key(),
            "loss_panels": self._loss_panels(),
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
        scales = {str(run.starts[-1].get("config", {}).get("indicator_scale")) for run in self.runs if run.starts}
        other = " Their indicator_scale is not the same: compare gaps, not gammas." if len(scales) > 1 else ""
        ends = " They ended at different steps." if len({one.last for one in self.found}) > 1 else ""
        return f"<p>Of these runs, {escape('; '.join(said))}.{ends}{other}</p>"

    def _gamma_panels(self) -> str:
        return "".join(
            self._figure(f"gamma-{i}", run.name, how_trained(run), figures.gamma_plot(run, self.last_step, self.points))
            for i, run in enumerate(self.runs)
        )

    def _loss_panels(self) -> str:
        top = figures.loss_top(self.runs)
        return "".join(
            self._figure(f"loss-{i}", run.name, "", figures.loss_plot(run, self.last_step, top, self.points))
            for i, run in enumerate(self.runs)
        )

    def _term_panels(self) -> str:
        return "".join(
            self._figure(name, *_TERMS[name], figures.value_plot(name, self.runs, self.last_step, self.points, name))
            for name in _TERMS
            if any(bool((~run.values[name].isnan()).any()) for run in self.runs)
        )

    def _sample_grids(self) -> str:
        grids = [_grid(run, found) for run, found in zip(self.runs, self.samples, strict=True) if found]
        if not grids:
            return _note("None of these runs has pictures in a folder sample beside its log, as sd-scripts saves them.")
        return (
            "<p>Rows are the prompts, by the number in the pictures' names (00 is the first). "
            "Gamma, where it is given, is the mean of the bins at that step.</p>" + "".join(grids)
        )

    def _settings(self) -> str:
        silent, told = ([run for run in self.runs if bool(run.starts) is known] for known in (False, True))
        note = _note(f"The config is not in the log: {', '.join(run.name for run in silent)}.") if silent else ""
        if not told:
            return note
        shading = " Shaded: not the same in all runs." if len(told) > 1 else ""
        return f"{note}<p>(own): given beside the preset, or not the default.{shading}</p>{settings_table(told)}"

    def _figure(self, name: str, title: str, subtitle: str, plot: Plot) -> str:
        self.plots[f"plot-{name}"] = plot
        small = f'<span class="soft">{escape(subtitle)}</span>' if subtitle else ""
        caption = f"<figcaption><h3>{escape(title)}</h3>{small}</figcaption>" if title else ""
        return f'<figure>{caption}<div class="chart" id="plot-{name}"></div></figure>'

    def _run_key(self, within: str) -> str:
        return _key(within, "runs", [(f"run-{i}", figures.run_color(i), run.name) for i, run in enumerate(self.runs)])


def _gamma_key(bins: int) -> str:
    ranges = figures.bin_ranges(bins)
    lines = [(f"gamma-{bins}-{i}", figures.bin_color(i, len(ranges)), name) for i, name in enumerate(ranges)]
    folded = f", means of neighbours among the {bins} bins" if len(ranges) < bins else ""
    return _key("gamma", f"timesteps{folded}", [*lines, (f"gamma-{bins}-mean", figures.MEAN_COLOR, "mean of the bins")])


def _loss_key() -> str:
    lines = [("loss_tuned", figures.TUNED_COLOR, "with the LoRA"), ("loss_frozen", figures.FROZEN_COLOR, "base model")]
    return _key("losses", "loss", lines)


def _key(within: str, what: str, lines: Sequence[tuple[str, str, str]]) -> str:
    """A legend: buttons that hide lines in the section `within`. `lines`: the legendgroup, color and name of each."""
    buttons = "".join(
        f'<button type="button" data-line="{group}" data-within="{within}" aria-pressed="true">'
        f'<i style="background: {color}"></i><span>{escape(name)}</span></button>'
        for group, color, name in lines
    )
    return f'<div class="key"><span class="soft">{escape(what)}:</span>{buttons}</div>'


def _grid(run: RunLog, found: Samples) -> str:
    head = "".join(f'<th scope="col">{kind} {count}{_gamma_at(run, kind, count)}</th>' for kind, count in found.moments)
    rows = []
    for prompt in found.prompts:
        cells = []
        for moment in found.moments:
            uri = found.pictures.get((moment, prompt))
            alt = escape(f"{run.name}, {moment[0]} {moment[1]}, prompt {prompt:02d}")
            cells.append(f'<td><img src="{uri}" alt="{alt}"></td>' if uri else "<td>\u2013</td>")
        rows.append(f'<tr><th scope="row">{prompt:02d}</th>{"".join(cells)}</tr>')
    notes = "".join(map(_note, found.notes))
    table = f'<div class="scroll samples"><table><tr><td></td>{head}</tr>{"".join(rows)}</table></div>'
    return f"<h3>{escape(run.name)}</h3>{notes}{table}"


def _gamma_at(run: RunLog, kind: str, count: int) -> str:
    """Mean gamma when a picture was drawn; of an epoch the log does not know the step."""
    if kind != "step" or not int(run.steps[0]) <= count <= int(run.steps[-1]):
        return ""
    line = int((run.steps - count).abs().argmin())
    return f"<br>gamma {fixed(float(run.gammas[line][run.seen[line]].mean()))}"


def _note(text: str) -> str:
    return f'<p class="soft note">{escape(text)}</p>'


def _part(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
