"""Draws what a step costs beside its floor, from the rows of the step benchmarks: bars of time and of memory.

    python benchmarks/step_picture.py OUT.png [--times benchmarks/results.csv] [--memory benchmarks/memory.csv]

Of rows with the same setting the last one counts. Time is drawn for every setting that was timed, memory for SDXL.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

from apt_hooks.errors import AptError, errors_in_one_line

METHODS = {
    "floor": ("floor: plain step and frozen forward", "#9aa5b1"),
    "eager": ("APT, PyTorch", "#2b7bba"),
    "fused": ("APT, Triton", "#1b9e77"),
    "obvious": ("APT, the obvious way", "#d95f02"),
}
CHECKPOINTING = {"off": "no", "nonreentrant": "non-reentrant", "reentrant": "reentrant"}

Bars = dict[str, dict[str, float]]  # of each setting's title, a method's ratio to the floor


def main() -> None:
    with errors_in_one_line():
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("out", type=Path)
        parser.add_argument("--times", type=Path, default=Path(__file__).with_name("results.csv"))
        parser.add_argument("--memory", type=Path, default=Path(__file__).with_name("memory.csv"))
        args = parser.parse_args()
        times = bars(read(args.times), "to_floor", device=True)
        draw(args.out, times, bars([row for row in read(args.memory) if row["model"] == "sdxl"], "peak_to_floor"))


def read(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except OSError as error:
        raise AptError(f"{path}: cannot be read: {error.strerror}; run the benchmark that writes it") from error


def bars(rows: list[dict[str, str]], column: str, *, device: bool = False) -> Bars:
    """The ratios of the methods that are drawn, by setting."""
    found: Bars = {}
    for row in rows:
        if row["method"] in METHODS and row[column]:
            title = f"{row['model']} {row['px']} px, batch {row['batch']}\n"
            title += f"{CHECKPOINTING[row['checkpointing']]} checkpointing"
            title += f"\n{row['device']}" if device else ""
            found.setdefault(title, {})[row["method"]] = float(row[column])
    return found


def draw(path: Path, times: Bars, memory: Bars) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    widths = [max(1, len(times)), max(1, len(memory))]
    figure, axes = plt.subplots(1, 2, figsize=(4 + 1.9 * sum(widths), 5.2), width_ratios=widths, sharey=True)
    titles = ("Time of a training step", "Peak memory of a training step, SDXL, bfloat16")
    for ax, title, settings in zip(axes, titles, (times, memory), strict=True):
        _bars(ax, settings)
        ax.set_title(title)
    axes[0].set_ylabel("as a multiple of the floor's")
    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for _, color in METHODS.values()]
    figure.legend(handles, [label for label, _ in METHODS.values()], loc="lower center", ncols=4, frameon=False)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _bars(ax: Any, settings: Bars) -> None:
    for place, ratios in enumerate(settings.values()):
        drawn = [name for name in METHODS if name in ratios]
        for i, name in enumerate(drawn):
            x = place + 0.8 * ((i + 0.5) / len(drawn) - 0.5)
            ax.bar(x, ratios[name], 0.76 / len(drawn), color=METHODS[name][1])
            ax.annotate(f"{ratios[name]:.2f}", (x, ratios[name]), ha="center", va="bottom", fontsize=8)
    ax.set_xticks(range(len(settings)), list(settings), fontsize=8)
    ax.axhline(1.0, color="#555555", linewidth=0.8)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


if __name__ == "__main__":
    main()
