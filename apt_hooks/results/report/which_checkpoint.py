"""The page's first section: which checkpoint of each run, by what was measured of it, and by its pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path

from apt_hooks.results.checkpoint_table import checkpoint_table, what_is_missing
from apt_hooks.results.read_steplog import RunLog, run_name
from apt_hooks.training.checkpoints import ENDING

from . import figures
from .figures import Plot
from .markup import key, note
from .samples import Samples
from .saved import Moment, Saved
from .summary import fixed

_PLOTS = {
    "gap": ("What was learned", "Gap: how far ahead of the base model on pictures."),
    "response": (
        "What prompts still do",
        "Response: how much of what other prompts do to the base model they still do; 0: they are ignored.",
    ),
    "drift": ("What has moved", "Drift: how far other prompts have moved; 1: as far as a prompt moves a picture."),
}
_Figure = Callable[[str, str, str, Plot], str]  # of id, title, subtitle and plot


def which_checkpoint(
    number: int, run: RunLog, saved: Saved | None, samples: Samples | None, last_step: int, figure: _Figure
) -> str:
    """A run's verdict, its checkpoints' plots and table, and its pictures; `figure` puts a plot on the page."""
    parts = [f'<h3 style="--run: {figures.run_color(number)}">{escape(run.name)}</h3>']
    if saved is None:
        lines = run_name(run.path) + ENDING
        broken = run.path.with_name(lines).exists()
        said = f"beside its log there is no {lines}, a line of which tells of each saved LoRA"
        parts.append(note(f"No verdict: {f'{lines} cannot be read, as said at the top' if broken else said}."))
    else:
        parts += [_verdict(saved), _plots(number, saved, last_step, figure), _table(saved)]
    if samples:
        parts.append(_strip(run, saved, samples))
    return f'<article class="run" id="{_id(number)}">{"".join(parts)}</article>'


def _id(number: int) -> str:
    return f"checkpoint-{number}"


def _verdict(saved: Saved) -> str:
    missing = what_is_missing(saved.run)
    kind = "" if saved.verdict.picked else " unsure"
    said = f'<p class="verdict{kind}">{escape(str(saved.verdict))}</p>'
    return said + (note(f"{missing[0].upper()}{missing[1:]}.") if missing else "")


def _plots(number: int, saved: Saved, last_step: int, figure: _Figure) -> str:
    if len(saved.run.checkpoints) < 2:
        return ""
    plots = figures.checkpoint_plots(saved.run.checkpoints, saved.verdict.picked, last_step)
    shown = "".join(figure(f"{name}-{number}", *_PLOTS[name], plot) for name, plot in plots.items())
    legends = [
        key(_id(number), what, [(f"checkpoint-{name}", color, of) for name, (of, color) in lines.items()])
        for what, of_them in (
            ("gap on", figures.GAPS),
            ("response to", figures.RESPONSES),
            ("drift of", figures.DRIFTS),
        )
        if (lines := _drawn(of_them, saved)) and list(lines) != ["gap"]
    ]
    return f'<div class="panels small">{shown}</div>{"".join(legends)}'


def _drawn(lines: Mapping[str, tuple[str, str]], saved: Saved) -> dict[str, tuple[str, str]]:
    """Those of which anything was measured."""
    checkpoints = saved.run.checkpoints
    return {name: of for name, of in lines.items() if any(math.isfinite(getattr(one, name)) for one in checkpoints)}


def _table(saved: Saved) -> str:
    names, rows = checkpoint_table(saved.run)
    if not rows:
        return ""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    body = "".join(
        f"<tr{' class=picked' if one is saved.verdict.picked else ''}>"
        + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        + "</tr>"
        for one, cells in zip(saved.run.checkpoints, rows, strict=True)
    )
    table = f'<div class="scroll numbers"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    return (
        f"<details><summary>{len(rows)} checkpoint{'s' if len(rows) > 1 else ''} in numbers</summary>{table}</details>"
    )


def _strip(run: RunLog, saved: Saved | None, samples: Samples) -> str:
    """The pictures, a row a prompt and a column a moment."""
    picked = saved.picked_among(samples.moments) if saved else None
    mark = {moment: " class=picked" if moment == picked else "" for moment in samples.moments}
    head = "".join(
        f'<th scope="col"{mark[moment]}>{_moment(run, saved, moment, moment == picked)}</th>'
        for moment in samples.moments
    )
    rows = []
    for prompt, text in samples.prompts.items():
        cells = []
        for moment in samples.moments:
            uri = samples.pictures.get((moment, prompt))
            alt = escape(f"{run.name}, {moment[0]} {moment[1]}, prompt {prompt:02d}")
            picture = f'<img src="{uri}" alt="{alt}">' if uri else "\u2013"
            cells.append(f"<td{mark[moment]}>{picture}</td>")
        title = f"<strong>{prompt:02d}</strong> {escape(text)}" if text else f"<strong>{prompt:02d}</strong>"
        across = f'<th scope="rowgroup" colspan="{len(samples.moments)}"><span>{title}</span></th>'
        rows.append(f"<tbody><tr>{across}</tr><tr>{''.join(cells)}</tr></tbody>")
    notes = list(samples.notes)
    if not all(samples.prompts.values()):
        notes.append(
            "A row without its prompt, which the log does not know: by the number in the pictures' names, from 00."
        )
    table = f"<table><thead><tr>{head}</tr></thead>{''.join(rows)}</table>"
    return f'{"".join(map(note, notes))}<div class="scroll samples">{table}</div>'


def _moment(run: RunLog, saved: Saved | None, moment: Moment, picked: bool) -> str:
    """A column's head: when its pictures were drawn, the checkpoint nearest to that, and mean gamma at that step."""
    kind, count = moment
    said = ["before training" if not count else f"{kind} {count}"]
    nearest = saved.nearest(moment) if saved else None
    if nearest is not None:
        step = saved.step_of(moment) if saved else None
        said.append(
            f"<code>{'' if step == nearest.step else 'near '}{escape(str(Path(nearest.file).with_suffix('')))}</code>"
        )
    if kind == "step" and int(run.steps[0]) <= count <= int(run.steps[-1]):
        line = int((run.steps - count).abs().argmin())
        said.append(f"gamma {fixed(float(run.gammas[line][run.seen[line]].mean()))}")
    return ("<i>picked</i>" if picked else "") + "<br>".join(said)
