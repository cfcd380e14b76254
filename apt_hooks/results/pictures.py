"""What runs show: the methods side by side, the indicator, delta noise, and where the model looks."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import write_atomically, write_figure
from .calibrate import read_log


def draw_comparison(path: Path, prompts: Sequence[str], references: Tensor, columns: Mapping[str, Tensor]) -> None:
    """The pictures trained on above; below rows of prompts, columns of each method's picture of the prompt.

    Args:
        prompts: as a user would write them.
        references: [pictures, 3, height, width], from 0 to 1.
        columns: by title, [prompts, 3, height, width].
    """
    from matplotlib.figure import Figure

    size = (2.6 + 1.5 * max(len(columns), 4), 2.0 + 1.5 * (len(prompts) + 1))
    figure = Figure(figsize=size, layout="constrained")
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=(1.75, 0.25 + 1.5 * len(prompts)))[:, 0]
    above.suptitle("Trained on these photos", fontsize=11)
    for ax, picture in zip(above.subplots(1, len(references), squeeze=False)[0], references, strict=True):
        _show(ax, picture)
    _draw_cells(below, prompts, columns)
    write_figure(path, figure)


def draw_table(path: Path, title: str, rows: Sequence[str], columns: Mapping[str, Sequence[Tensor] | Tensor]) -> None:
    """Pictures, [3, height, width] each, a row for each of `rows`; `columns` by title."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.6 + 1.5 * len(columns), 1.2 + 1.5 * len(rows)), layout="constrained")
    figure.suptitle(title, fontsize=10, wrap=True)
    _draw_cells(figure, rows, columns)
    write_figure(path, figure)


def _draw_cells(figure: Any, rows: Sequence[str], columns: Mapping[str, Sequence[Tensor] | Tensor]) -> None:
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    for row, name in enumerate(rows):
        for column, (heading, pictures) in enumerate(columns.items()):
            ax = axes[row][column]
            _show(ax, pictures[row])
            if row == 0:
                ax.set_title(heading, fontsize=11)
        axes[row][0].set_ylabel(textwrap.fill(name, 22), rotation=0, ha="right", va="center", fontsize=9, labelpad=8)


def draw_grid(path: Path, pictures: Tensor, columns: int) -> None:
    """Pictures, [n, 3, height, width], row by row; n is a multiple of `columns`."""
    from matplotlib.image import imsave

    rows = [torch.cat(list(row), dim=2) for row in pictures.split(columns)]
    content = io.BytesIO()
    imsave(content, torch.cat(rows, dim=1).permute(1, 2, 0).numpy(), format="png")
    write_atomically(path, content.getvalue())


def draw_indicator(path: Path, log: Path, method: str) -> None:
    """Gamma of each bin over the steps of a log of apt-hooks."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    run = read_log(log)
    steps, bins = run.steps.numpy(), run.gammas.shape[1]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for b in range(bins):
        color = colormaps["viridis"](b / max(1, bins - 1))
        axes.plot(steps, run.gammas[:, b].numpy(), color=color, label=f"{b * 1000 // bins}")
    axes.set(xlabel="training step", ylabel="gamma (0: as good as the base, 1: overfitted)", ylim=(-0.02, 1.02))
    axes.set_title(f"Overfitting indicator of {method}, per range of timesteps")
    axes.legend(
        title="timesteps from\n(low to high noise)", fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5)
    )
    write_figure(path, figure)


def draw_delta_noise(path: Path, curves: Mapping[str, tuple[Sequence[int], Sequence[float]]]) -> None:
    """Delta noise over the steps, a curve a method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for title, (steps, values) in curves.items():
        axes.plot(steps, values, label=title, linewidth=2)
    axes.set(xlabel="training step", ylabel="delta noise (mean squared difference)", ylim=(0, None))
    axes.set_title("How far the predictions have moved from the base model's")
    axes.legend()
    write_figure(path, figure)


def draw_attention(
    path: Path, words: Sequence[str], pictures: Mapping[str, Tensor], maps: Mapping[str, Tensor]
) -> None:
    """Where each word of the prompt looks: a row a method, its picture first.

    Args:
        words: the prompt's.
        pictures: by title, [3, height, width].
        maps: by title, [words, height, width]; of one word, all methods share one scale.
    """
    from matplotlib.figure import Figure

    highest = torch.stack(list(maps.values())).amax(dim=(0, 2, 3))
    figure = Figure(figsize=(1.6 + 1.15 * (len(words) + 1), 1.1 + 1.25 * len(maps)), layout="constrained")
    figure.suptitle(
        "Where each word of the prompt acts on the picture (brighter: more)",
        fontsize=10,
    )
    axes = figure.subplots(len(maps), len(words) + 1, squeeze=False)
    for row, (title, of_words) in enumerate(maps.items()):
        _show(axes[row][0], pictures[title])
        axes[row][0].set_ylabel(title, rotation=0, ha="right", va="center", fontsize=11, labelpad=8)
        for column, word in enumerate(words):
            ax = axes[row][column + 1]
            ax.imshow(of_words[column].numpy(), cmap="magma", vmin=0, vmax=highest[column].item())
            ax.set(xticks=[], yticks=[])
            if row == 0:
                ax.set_title(word, fontsize=11)
    write_figure(path, figure)


def draw_plane(
    path: Path,
    singles: Mapping[str, tuple[float, float]],
    together: Mapping[str, Mapping[tuple[str, str], tuple[float, float]]],
    axes: tuple[str, str] = ("subject score", "text score"),
) -> None:
    """DreamBlend's plane of both scores: a line of single checkpoints, and each pair at an arrow from its late one.

    Args:
        singles: (subject, text) by name, from early to late.
        together: the same by how two checkpoints were brought together, and by the names of the early and the late one.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 5.2), layout="constrained")
    ax = figure.subplots()
    ax.plot(*zip(*singles.values(), strict=True), "o-", color="#9aa5b1", label="single checkpoints")
    for name, xy in singles.items():
        ax.annotate(name, xy, textcoords="offset points", xytext=(6, -12), fontsize=9, color="#555555")
    for i, (way, pairs) in enumerate(together.items()):
        color, marker = f"C{1 + i % 9}", "Ds^vPX"[i % 6]
        for (early, late), xy in pairs.items():
            ax.annotate("", xy, singles[late], arrowprops={"arrowstyle": "->", "color": color, "alpha": 0.5})
            ax.plot(*xy, marker, color=color, zorder=3)
            ax.annotate(f"{early} + {late}", xy, textcoords="offset points", xytext=(6, 6), fontsize=9, color=color)
        if pairs:
            ax.plot([], [], marker, color=color, label=f"{way}: early + late")
    ax.set(xlabel=axes[0], ylabel=axes[1])
    ax.legend(loc="best")
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    write_figure(path, figure)


def draw_curves(
    path: Path,
    curves: Mapping[str, Mapping[int, Mapping[str, tuple[float, float]]]],
    axes: tuple[str, str] = ("identity", "text"),
    *,
    front: Sequence[int] = (),
) -> None:
    """Two scores of every checkpoint: against each other, and each against the step.

    Args:
        curves: by title, step and score its mean and standard error.
        axes: the scores.
        front: steps to be marked, that no other is better than by both.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    plane, *over_steps = figure.subplots(1, 3)
    for title, steps in curves.items():
        at = [(of[axes[0]][0], of[axes[1]][0]) for of in steps.values()]
        (line,) = plane.plot(*zip(*at, strict=True), "o-", label=title)
        color = line.get_color()
        for step, xy in zip(steps, at, strict=True):
            plane.annotate(str(step), xy, textcoords="offset points", xytext=(4, 4), fontsize=7, color="#555555")
        best = sorted(xy for step, xy in zip(steps, at, strict=True) if step in front)
        if best:
            plane.plot(*zip(*best, strict=True), "o--", color="#222222", markerfacecolor=color, label="front")
        for ax, score in zip(over_steps, axes, strict=True):
            means, errors = zip(*(of[score] for of in steps.values()), strict=True)
            ax.plot(list(steps), means, "o-", color=color)
            bounds = [[m + sign * e for m, e in zip(means, errors, strict=True)] for sign in (-1, 1)]
            ax.fill_between(list(steps), *bounds, color=color, alpha=0.2, linewidth=0)
    plane.set(xlabel=axes[0], ylabel=axes[1], title="numbers: training steps")
    if curves:
        plane.legend()
    for ax, score in zip(over_steps, axes, strict=True):
        ax.set(xlabel="training step", ylabel=score, title=f"{score} (shaded: standard error)")
    write_figure(path, figure)


def _show(ax: Any, picture: Tensor) -> None:
    ax.imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest")
    ax.set(xticks=[], yticks=[])
    for side in ax.spines.values():
        side.set_visible(False)
