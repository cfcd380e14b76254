"""The page's plots, as plotly's JSON has them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

import torch
from torch import Tensor

from apt_hooks.results.read_steplog import RunLog

from .curves import downsample, fold_bins, smooth, timesteps_of

MOST_LINES = 20  # of gamma; more bins are drawn as means of neighbours
MEAN_COLOR = "#1b1f24"
TUNED_COLOR, FROZEN_COLOR = "#0072b2", "#8a5a00"
_RUN_COLORS = ("#0072b2", "#d55e00", "#00805e", "#b3478f", "#6a51a3", "#7a6400", "#1b1f24", "#2a9fd6")
_BIN_COLORS = ("#0d0887", "#7e03a8", "#cc4778", "#f0804e", "#e6a817")  # from low to high noise, dark enough on white
_GRID = "#e6e8eb"
_SMOOTHED_OVER = 20  # the bold lines are means of a twentieth of the run

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


def loss_plot(run: RunLog, last_step: int, top: float, points: int) -> Plot:
    """Losses of the LoRA and of the base model; `top` ends the axis, see `loss_top`."""
    traces = []
    for name, color, title in (
        ("loss_frozen", FROZEN_COLOR, "base model"),
        ("loss_tuned", TUNED_COLOR, "with the LoRA"),
    ):
        traces += _noisy(run, run.values[name], title, name, color, points)
    layout = _layout(last_step, "mean squared error", [("#555b63", run.resumptions)])
    layout["yaxis"]["range"] = [0, top]
    return {"data": traces, "layout": layout}


def loss_top(runs: Sequence[RunLog]) -> float:
    """Where the axis of losses ends, the same for all runs."""
    return _top([run.values[name] for run in runs for name in ("loss_tuned", "loss_frozen")])


def value_plot(name: str, runs: Sequence[RunLog], last_step: int, points: int, label: str) -> Plot:
    """One of the log's values over the steps, all runs in one plot; shares go from 0 to 1."""
    traces = []
    for i, run in enumerate(runs):
        traces += _noisy(
            run, run.values[name], escape(shortened(run.name), quote=False), f"run-{i}", run_color(i), points
        )
    layout = _layout(last_step, label, [(run_color(i), run.resumptions) for i, run in enumerate(runs)])
    layout["yaxis"]["range"] = [0, _top([run.values[name] for run in runs])]
    return {"data": traces, "layout": layout}


def shortened(name: str) -> str:
    """A name that fits beside others: its middle gives way."""
    return name if len(name) <= 32 else f"{name[:15]}\u2026{name[-15:]}"


def _noisy(run: RunLog, values: Tensor, name: str, key: str, color: str, points: int) -> list[dict[str, Any]]:
    """A value that jumps from step to step: pale as it is, or from its lowest to its highest, and bold its mean."""
    logged = ~values.isnan()
    curve = downsample(run.steps[logged], values[logged][:, None], points)
    window = math.ceil(len(curve.steps) / _SMOOTHED_OVER)
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
            window = math.ceil(len(found) / _SMOOTHED_OVER)
            tops += [float(found.quantile(0.98)), float(smooth(found[:, None], window).max())]
    return 1.08 * max(tops)


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
        "shapes": [_resumption(step, color) for color, steps in resumed for step in steps],
    }


def _resumption(step: int, color: str) -> dict[str, Any]:
    line = {"color": color, "width": 1, "dash": "dash"}
    return {"type": "line", "xref": "x", "yref": "paper", "x0": step, "x1": step, "y0": 0, "y1": 1, "line": line}
