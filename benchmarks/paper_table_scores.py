"""What came of the runs of `paper_table.py`: Markdown with the paper's numbers, and what all runs would take."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tinyworld import cell

from apt_hooks.integrations.sampling.pipelines import TINY_WORLDS
from apt_hooks.results.comparison.folders import BASE

REFERENCE = "dreambooth"
PAPER = {
    "dreambooth": {"fid": 53.130, "precision": 0.565, "recall": 0.608, "clip_t": 0.661},
    "ata": {"fid": 46.872, "precision": 0.635, "recall": 0.680, "clip_t": 0.664},
    "ata+rs": {"fid": 42.663, "precision": 0.701, "recall": 0.727},
    "apt": {"fid": 41.967, "clip_t": 0.664, "hps_v2": 0.288},
}
"""SDXL, arXiv 2507.02687: what of its table its public pages give."""
ARROWS = {"highest": "↑", "lowest": "↓"}
STYLES = {"fid": ".2f", "kid": ".4f", "frechet": ".2f"}
NOTES = [
    "The paper's CLIP-T is no cosine, so it does not compare with `clip_t`; FID falls with the number of pictures, and",
    "the paper does not say how many it took: compare differences between methods, not the rows with the paper's.",
]

Row = dict[str, Any]


def tables(result: Row) -> list[str]:
    """Markdown: the scores of each method with the paper's below, and their differences to DreamBooth's.

    The runs of one subject are not independent, so standard errors are those of the subjects' means; of one subject
    alone, of its seeds.
    """
    rows, metrics = result["runs"], result["metrics"]
    by = "subject" if len({row["subject"] for row in rows}) > 1 else "seed"
    over = "subjects, each the mean of its seeds" if by == "subject" else "the seeds of one subject"
    head = ["| method | runs | " + " | ".join(f"{name} {ARROWS[of['best']]}" for name, of in metrics.items()) + " |"]
    head += ["|---" * (len(metrics) + 2) + "|"]
    lines = [f"{result['settings']['model']}: mean ± standard error over {over}:", "", *head]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for method in methods:
        lines.append(_line(method, [row for row in rows if row["method"] == method], metrics, by))
        if result["settings"]["model"] not in TINY_WORLDS and (paper := PAPER.get(method)):
            cells = (str(paper.get(name, "")) for name in metrics)
            lines.append(f"| the paper's {method} | | " + " | ".join(cells) + " |")
    lines += ["", f"Difference to {REFERENCE}, paired by subject and seed; errors as above:", "", *head]
    reference = {(row["subject"], row["seed"]): row["scores"] for row in rows if row["method"] == REFERENCE}
    for method in methods:
        if method in (BASE, REFERENCE):
            continue
        pairs = [row for row in rows if row["method"] == method and (row["subject"], row["seed"]) in reference]
        paired = [{**row, "scores": _less(row["scores"], reference[row["subject"], row["seed"]])} for row in pairs]
        lines.append(_line(method, paired, metrics, by, sign="+"))
    return [*lines, "", *NOTES]


def _less(scores: Mapping[str, float], others: Mapping[str, float]) -> dict[str, float]:
    return {name: value - others[name] for name, value in scores.items() if name in others}


def _line(method: str, rows: Sequence[Row], metrics: Iterable[str], by: str, sign: str = "") -> str:
    cells = []
    for metric in metrics:
        groups: dict[Any, list[float]] = {}
        for row in rows:
            if metric in row["scores"]:
                groups.setdefault(row[by], []).append(row["scores"][metric])
        cells.append(cell([statistics.fmean(group) for group in groups.values()], STYLES.get(metric, ".3f"), sign))
    return f"| {method} | {len(rows)} | " + " | ".join(cells) + " |"


def estimate(
    result: Row, *, smoke_steps: int, steps: int, count: int, subjects: int, seeds: int, devices: int
) -> list[str]:
    """What all takes that was asked for, by arithmetic from the short runs of `--smoke`: one picture a prompt."""
    trained = [row for row in result["runs"] if row["method"] != BASE]
    lines, training = [], 0.0
    for row in trained:
        step = row["seconds_a_step"]
        beside = max(0.0, row["seconds"] - step * (smoke_steps - row["resumed_from"]))
        training += (step * steps + beside) * subjects * seeds
        lines.append(f"{row['method']}: {step:.3f} s a step and {beside:.0f} s a run, on {row['device']}")
    (judged,) = result["judged"].values()
    base = judged["pictures"][BASE]
    short = sum(judged["pictures"].values())
    pictures = (base + (short - base) * seeds) * count * subjects
    drawing = judged["seconds"] / short * pictures
    lines.append(f"{judged['seconds'] / short:.2f} s a picture, loading and judging included")
    what = f"{len(trained)} methods x {subjects} subjects x {seeds} seeds, {steps} steps each, and {pictures} pictures"
    hours = (training / 3600, drawing / 3600, (training + drawing) / 3600 / devices)
    return [*lines, "{}: {:.2f} + {:.2f} hours of a device, {:.2f} hours on {}".format(what, *hours, devices)]
