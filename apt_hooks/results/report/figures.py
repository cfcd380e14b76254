"""The page's plots, as plotly's JSON has them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

import torch
from torch import Tensor

from apt_hooks.results.read_checkpoints import Checkpoint
from apt_hooks.results.read_events import TrainerLog
from apt_hooks.results.read_steplog import RunLog

from .curves import downsample, fold_bins, smooth, timesteps_of

MOST_LINES = 20  # of gamma; more bins are drawn as means of neighbours
MEAN_COLOR = "#1b1f24"
TUNED_COLOR, FROZEN_COLOR = "#0072b2", "#8a5a00"
_RUN_COLORS = ("#0072b2", "#d55e00", "#00805e", "#b3478f", "#6a51a3", "#7a6400", "#1b1f24", "#2a9fd6")
_BIN_COLORS = ("#0d0887", "#7e03a8", "#cc4778", "#f0804e", "#e6a817")  # from low to high noise, dark enough on white
PICKED_COLOR = "#0b5cad"
DRIFTS = {  # of a checkpoint: what it is of, and its line's color
    "class_drift": ("the class alone", "#b3478f"),
    "free_drift": ("neither class nor subject", "#00805e"),
    "text_drift": ("unrelated words, by the text encoders", "#7a6400"),
}
RESPONSES = {  # the same, of what still has a say
    "prompt_response": ("neither class nor subject", "#00805e"),
}
GAPS = {  # the same, of what it is ahead on
    "gap": ("its own pictures", TUNED_COLOR),
    "held_out_gap": ("pictures that were not trained on", "#d55e00"),
}
_GRID = "#e6e8eb"
_SMOOTHED_OVER = 20  # the bold lines are means of a twentieth of the run
_FEW = 40  # points that are shown as such, beside the line through them

Plot = dict[str, Any]


def points_for(runs: int) -> int:
    """How many points a curve may have, so that a page of many runs stays small."""
    return max(300, min(1500, 4000 // runs))


def run_color(number: int) -> str:
    """The color of a run, by its place among the runs."""
    return _RUN_COLORS[number % len(_RUN_COLORS)]


def bin_color(number: int, count: int) -> str:
    """The color of a line of gamma, by its place from low to high noise."""
    place = number / max(1, count - 1) * (len(_BIN_COLORS) - 1)
    left = min(int(place), len(_BIN_COLORS) - 2)
    ends = [[int(color[i : i + 2], 16) for i in (1, 3, 5)] for color in _BIN_COLORS[left : left + 2]]
    mixed = (round(a + (b - a) * (place - left)) for a, b in zip(*ends, strict=True))
    return "#" + "".join(f"{part:02x}" for part in mixed)


def bin_ranges(bins: int) -> list[str]:
    """The timesteps of each line of gamma, as text, for a run of so many bins."""
    return timesteps_of(fold_bins(torch.zeros(1, bins), MOST_LINES)[1], bins)


def gamma_plot(run: RunLog, last_step: int, points: int) -> Plot:
    """Gamma over the steps, a line a bin from where it was first seen, and their mean."""
    gammas = run.gammas.masked_fill(~run.seen, math.nan)
    folded, groups = fold_bins(gammas, MOST_LINES)
    curves = downsample(run.steps, torch.cat([folded, gammas.nanmean(1, keepdim=True)], dim=1), points)
    traces = []
    for i, name in enumerate([*timesteps_of(groups, gammas.shape[1]), "mean of the bins"]):
        mean = i == len(groups)
        line = (
            {"color": MEAN_COLOR, "width": 2.5, "dash": "dot"}
            if mean
            else {"color": bin_color(i, len(groups)), "width": 1.6}
        )
        key = f"gamma-{gammas.shape[1]}-{'mean' if mean else i}"
        what = name if mean else f"timesteps {name}"
        traces.append(_line(curves.steps, curves.mean[:, i], name, key, line, f"{what}<br>step %{{x}}: %{{y:.3f}}"))
    layout = _layout(last_step, "gamma", [("#555b63", run.resumptions)])
    layout["yaxis"] |= {"range": [-0.02, 1.02], "fixedrange": True, "dtick": 0.25}
    return {"data": traces, "layout": layout}


def checkpoint_plots(checkpoints: Sequence[Checkpoint], picked: Checkpoint | None, last_step: int) -> dict[str, Plot]:
    """What was learned, what other prompts still do, and how far they have moved, from checkpoint to checkpoint.

    A line marks the picked one.

    Returns:
        `gap`, `response`, and `drift` with those that were measured; none of them without a line.
    """
    plots: dict[str, Plot] = {}
    for label, lines in (("gap", GAPS), ("response", RESPONSES), ("drift", DRIFTS)):
        traces = []
        for name, (title, color) in lines.items():
            known = [(one.step, getattr(one, name)) for one in checkpoints if math.isfinite(getattr(one, name))]
            if known:
                x, y = torch.tensor(known, dtype=torch.float64).unbind(1)
                hover = f"{title}<br>checkpoint of step %{{x}}: %{{y:.3g}}"
                traces.append(_line(x.long(), y, title, f"checkpoint-{name}", {"color": color, "width": 2}, hover))
                traces[-1] |= {"mode": "lines+markers", "marker": {"size": 7}, "cliponaxis": False}
        if not traces:
            continue
        layout = _layout(last_step, label, [])
        layout["yaxis"]["rangemode"] = "tozero"
        if picked is not None:
            layout["shapes"] = [_vertical(picked.step, PICKED_COLOR, "solid")]
            layout["annotations"] = [_label(picked.step, "picked", PICKED_COLOR)]
            layout["margin"]["t"] = 42  # below the buttons that a mouse brings
        plots[label] = {"data": traces, "layout": layout}
    return plots


def trainer_plot(tag: str, runs: Sequence[tuple[str, str, str, TrainerLog]], last_step: int, points: int) -> Plot:
    """A scalar that trainers logged, of all runs that have it: each with its key, color, name and log.

    The axis is about the bold lines, as for `loss_plot`.
    """
    traces: list[dict[str, Any]] = []
    for key, color, name, log in runs:
        steps, values = log.scalars[tag]
        name = escape(shortened(name), quote=False)
        traces += _noisy(steps, values, name, key, color, points)
        if len(steps) <= _FEW:
            traces[-1] |= {"mode": "lines+markers", "cliponaxis": False}
    layout = _layout(last_step, "loss", [])
    layout["yaxis"]["range"] = _span([log.scalars[tag][1] for *_, log in runs])
    return {"data": traces, "layout": layout}


def loss_plot(run: RunLog, last_step: int, span: list[float], points: int) -> Plot:
    """Losses of the LoRA and of the base model; `span` is the axis, see `loss_span`."""
    traces = []
    for name, color, title in (
        ("loss_frozen", FROZEN_COLOR, "base model"),
        ("loss_tuned", TUNED_COLOR, "with the LoRA"),
    ):
        traces += _noisy(run.steps, run.values[name], title, name, color, points)
    layout = _layout(last_step, "mean squared error", [("#555b63", run.resumptions)])
    layout["yaxis"]["range"] = span
    return {"data": traces, "layout": layout}


def loss_span(runs: Sequence[RunLog]) -> list[float]:
    """The axis of losses, the same for all runs: about their bold lines, whose distance is what counts."""
    return _span([run.values[name] for run in runs for name in ("loss_tuned", "loss_frozen")])


def value_plot(name: str, runs: Sequence[RunLog], last_step: int, points: int, label: str) -> Plot:
    """One of the log's values over the steps, all runs in one plot; shares go from 0 to 1."""
    traces = []
    for i, run in enumerate(runs):
        traces += _noisy(
            run.steps, run.values[name], escape(shortened(run.name), quote=False), f"run-{i}", run_color(i), points
        )
    layout = _layout(last_step, label, [(run_color(i), run.resumptions) for i, run in enumerate(runs)])
    layout["yaxis"]["range"] = [0, _top([run.values[name] for run in runs])]
    return {"data": traces, "layout": layout}


def shortened(name: str) -> str:
    """A name that fits beside others: its middle gives way."""
    return name if len(name) <= 32 else f"{name[:15]}\u2026{name[-15:]}"


def _noisy(steps: Tensor, values: Tensor, name: str, key: str, color: str, points: int) -> list[dict[str, Any]]:
    """A value that jumps from step to step: pale as it is, or from its lowest to its highest, and bold its mean."""
    logged = ~values.isnan()
    curve = downsample(steps[logged], values[logged][:, None], points)
    window = _window(len(curve.steps))
    traces = []
    if curve.each > 1:
        around = torch.cat([curve.steps, curve.steps.flip(0)])
        traces.append(
            _line(around, torch.cat([curve.high[:, 0], curve.low[:, 0].flip(0)]), name, key, {"width": 0}, "")
        )
        traces[0] |= {"fill": "toself", "fillcolor": color, "opacity": 0.18}
    elif window > 1:
        traces.append(_line(curve.steps, curve.mean[:, 0], name, key, {"color": color, "width": 1}, ""))
        traces[0] |= {"opacity": 0.28}
    hover = f"{name}<br>step %{{x}}: %{{y:.4g}}"
    return [
        *traces,
        _line(curve.steps, smooth(curve.mean, window)[:, 0], name, key, {"color": color, "width": 2.2}, hover),
    ]


def _top(columns: Sequence[Tensor]) -> float:
    """The end of an axis from 0: what 98 % of the steps stay below, and every smoothed line."""
    tops = [1e-12]
    for column in columns:
        found = column[~column.isnan()]
        if len(found):
            tops += [float(found.quantile(0.98)), float(smooth(found[:, None], _window(len(found))).max())]
    return 1.08 * max(tops)


def _span(columns: Sequence[Tensor]) -> list[float]:
    """An axis about the smoothed lines, with a little air; single steps may lie outside."""
    lines = [smooth(column[~column.isnan()][:, None], _window(int((~column.isnan()).sum()))) for column in columns]
    known = torch.cat([line.flatten() for line in lines if len(line)] or [torch.zeros(1, dtype=torch.float64)])
    low, high = float(known.min()), float(known.max())
    air = 0.15 * (high - low) or 0.1 * abs(high) or 1e-12
    return [low - air, high + air]


def _window(steps: int) -> int:
    """Over so many of a run's steps a bold line's points are means."""
    return math.ceil(steps / _SMOOTHED_OVER)


def _line(x: Tensor, y: Tensor, name: str, key: str, line: dict[str, Any], hover: str) -> dict[str, Any]:
    there = ~y.isnan()
    return {
        "type": "scatter",
        "mode": "lines",
        "x": x[there].tolist(),
        "y": [float(f"{value:.4g}") for value in y[there].tolist()],
        "name": name,
        "legendgroup": key,
        "line": line,
        **({"hovertemplate": f"{hover}<extra></extra>"} if hover else {"hoverinfo": "skip"}),
    }


def _layout(last_step: int, label: str, resumed: Sequence[tuple[str, Sequence[int]]]) -> dict[str, Any]:
    axis = {"gridcolor": _GRID, "linecolor": "#9aa1a9", "zeroline": False, "automargin": True}
    return {
        "xaxis": {**axis, "title": {"text": "training step"}, "range": [0, last_step], "nticks": 6},
        "yaxis": {**axis, "title": {"text": label}},
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": "#1b1f24"},
        "margin": {"l": 56, "r": 14, "t": 10, "b": 44},
        "paper_bgcolor": "#ffffff",
        "plot_bgcolor": "#ffffff",
        "showlegend": False,
        "hovermode": "closest",
        "shapes": [_vertical(step, color, "dash") for color, steps in resumed for step in steps],
    }


def _label(step: int, text: str, color: str) -> dict[str, Any]:
    """Above the plot, at a step."""
    place = {"xref": "x", "yref": "paper", "x": step, "y": 1, "yanchor": "bottom", "showarrow": False}
    return {**place, "text": text, "font": {"color": color}}


def _vertical(step: int, color: str, dash: str) -> dict[str, Any]:
    line = {"color": color, "width": 1 if dash == "dash" else 1.5, "dash": dash}
    return {"type": "line", "xref": "x", "yref": "paper", "x0": step, "x1": step, "y0": 0, "y1": 1, "line": line}
