"""What an evaluation leaves: `metrics.json`, `metrics.csv`, and a table."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from apt_hooks.files import write_atomically

from .judge import Metric, Score

Scores = Mapping[str, Mapping[str, Score]]
"""By model and metric."""


def write_results(out: Path, metrics: Sequence[Metric], scores: Scores, about: Mapping[str, Any]) -> None:
    """`metrics.json` (`about`, each metric's model and settings, scores) and the same scores as `metrics.csv`."""
    described = {metric.name: dataclasses.asdict(metric) for metric in metrics}
    content = {
        **about,
        "metrics": {name: {key: v for key, v in of.items() if key != "name"} for name, of in described.items()},
        "scores": {
            name: {metric: dataclasses.asdict(score) for metric, score in of.items()} for name, of in scores.items()
        },
    }
    write_atomically(out / "metrics.json", (json.dumps(content, indent=1) + "\n").encode())
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["name", "metric", "value", "standard_error", "n", "best", "model", "settings"])
    for name, of in scores.items():
        for metric, score in of.items():
            column = described[metric]
            error = "" if score.error is None else score.error
            writer.writerow(
                [name, metric, score.value, error, score.n, column["best"], column["model"], column["settings"]]
            )
    write_atomically(out / "metrics.csv", text.getvalue().encode())


def table(metrics: Sequence[Metric], scores: Scores) -> list[str]:
    """Lines of text: a model a row, a metric a column, and below what each metric is."""
    first = max(len(name) for name in scores)
    columns = {metric: _column(metric.name, scores) for metric in metrics}
    width = {metric: max(map(len, (metric.name, *cells))) for metric, cells in columns.items()}
    lines = ["  ".join(["".ljust(first), *(metric.name.rjust(width[metric]) for metric in metrics)])]
    for row, name in enumerate(scores):
        lines.append("  ".join([name.ljust(first), *(columns[m][row].rjust(width[m]) for m in metrics)]))
    names = max(len(metric.name) for metric in metrics)
    for metric in metrics:
        n = next(iter(scores.values()))[metric.name].n
        lines.append(f"{metric.name.ljust(names)}  {metric.best} is best; n {n}; {metric.model}; {metric.settings}")
    return lines


def _column(metric: str, scores: Scores) -> list[str]:
    cells = []
    for of in scores.values():
        score = of[metric]
        value = f"{score.value:.3f}" if abs(score.value) < 100 else f"{score.value:.1f}"
        cells.append(value if score.error is None else f"{value} ± {score.error:.3f}")
    return cells
