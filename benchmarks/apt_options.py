"""Options of APT on the tiny world, one at a time: what each of its values gives and takes.

    python benchmarks/apt_options.py --out DIR [--options lambda_attn,...] [--concepts 0,2,3] [--seeds 0]

Trained as the demo is, with the preset but for the option (`OPTIONS`), and compared on the same concept and seed, in
two tables: to DreamBooth, and to the option's value of the preset, with the same keys beside it, which tells what the
option does; DIR/options.png draws the latter for text and identity. As soon as a run is done, a line of JSON is
appended to DIR/runs.jsonl, as by `tinyworld.py`, and it is not made again.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinyworld import (  # the benchmark beside this one
    REFERENCE,
    Comparison,
    Scores,
    Settings,
    acting,
    add_run_options,
    cell,
    check_at_least_one,
    check_listed,
    differences,
    find,
    make,
    mean_and_error,
    means_of_groups,
    names,
    numbers,
    read_rows,
    tell_failed,
)

from apt_hooks.errors import errors_in_one_line
from apt_hooks.files import write_figure
from apt_hooks.tinyworld.concepts import CONCEPTS
from apt_hooks.tinyworld.personalize import Training, method_config


@dataclasses.dataclass(frozen=True)
class Option:
    """A key of [apt], values of it, the preset's among them, and what else is set with each."""

    key: str
    values: tuple[Any, ...]
    beside: Settings = dataclasses.field(default_factory=dict)

    def overrides(self, value: Any) -> Settings:
        return {**self.beside, self.key: value}

    def told(self) -> str:
        return ", ".join([self.key, *(f"{key} = {value}" for key, value in self.beside.items())])


OFFSET = {"lambda_offset": 3e-5}
OPTIONS = {
    "augment_max_probability": Option("augment_max_probability", (0.0, 0.05, 0.2, 0.4)),
    "augment_border": Option("augment_border", ("learn", "ignore"), {"augment_max_probability": 0.4}),
    "frozen_every": Option("frozen_every", (1, 2, 4)),
    "lambda_joint": Option("lambda_joint", (0.01, 0.1), {"regularizer": "joint"}),
    "lambda_attn": Option("lambda_attn", (0.0, 0.3, 1.0, 3.0)),
    "lambda_dist": Option("lambda_dist", (0.0, 0.03, 0.1)),
    "lambda_offset": Option("lambda_offset", (0.0, 1e-5, 3e-5, 1e-4)),
    "lambda_attn+offset": Option("lambda_attn", (0.0, 0.3, 1.0), OFFSET),
    "lambda_dist+offset": Option("lambda_dist", (0.0, 0.03), OFFSET),
}
COLUMNS = {"frechet": ".0f", "recall": ".3f", "text": ".3f", "identity": ".3f", "black_frames": ".3f"}
DRAWN = ("text", "identity")
Point = tuple[str, Any]  # an option and a value of it
ACROSS = 3  # fields in a row of the picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_options(parser)
    parser.add_argument("--options", type=names, default=list(OPTIONS))
    parser.add_argument("--concepts", type=numbers, default=[0, 2, 3])
    parser.add_argument("--seeds", type=numbers, default=[0])
    parser.add_argument("--repeats", type=int, default=3, help="pictures a prompt")
    args = parser.parse_args()
    with errors_in_one_line():
        check_listed(args, options=OPTIONS, concepts=range(len(CONCEPTS)))
        check_at_least_one(args, "repeats", "workers")
        run(args)


def run(args: argparse.Namespace) -> None:
    """Make the runs that are missing, and print and draw what there is."""
    log, places = args.out / "runs.jsonl", [(concept, seed) for concept in args.concepts for seed in args.seeds]
    plain = _comparison(args, {})
    asked = [(plain, plain.asked([REFERENCE], places))]
    points = [(option, value) for option in args.options for value in OPTIONS[option].values]
    for option, value in points:
        comparison = _comparison(args, OPTIONS[option].overrides(value))
        asked.append((comparison, comparison.asked(["apt"], places)))
    failed = [] if args.table_only else make(log, asked, args.workers)
    rows = read_rows(log)
    reference, *of_points = (scores for _, of in asked for scores in find(rows, of).values())
    found, by_concept = dict(zip(points, of_points, strict=True)), len(args.concepts) > 1
    own = {column: cell(means_of_groups(reference, column, by_concept), style) for column, style in COLUMNS.items()}
    print(f"DreamBooth, {len(reference)} runs: " + ", ".join(f"{column} {told}" for column, told in own.items()))
    over = "concepts" if by_concept else "the seeds of one concept"
    print(f"\nAPT's difference to it, paired; of frechet in percent; mean ± standard error over {over}:\n")
    print("\n".join(_table({point: differences(scores, reference) for point, scores in found.items()}, by_concept)))
    of_option = {}
    for option in args.options:
        key, values = OPTIONS[option].key, OPTIONS[option].values
        base = found[option, next(value for value in values if _as_preset({key: value}))]
        others = [value for value in values if found[option, value] is not base]
        of_option |= {(option, value): differences(found[option, value], base) for value in others}
    print("\nAnd to APT with the preset's value of the option:\n")
    print("\n".join(_table(of_option, by_concept)))
    if any(of_option.values()):
        _draw(args.out / "options.png", of_option, by_concept)
    tell_failed(failed)


def _comparison(args: argparse.Namespace, overrides: Settings) -> Comparison:
    return Comparison(Training(), repeats=args.repeats, overrides=overrides)


def _table(paired: Mapping[Point, Scores], by_concept: bool) -> list[str]:
    lines = ["| option | value | runs | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 3) + "|"]
    for (option, value), scores in paired.items():
        cells = [cell(means_of_groups(scores, column, by_concept), style, "+") for column, style in COLUMNS.items()]
        mark = "> " if _is_preset(option, value) else ""
        lines.append(f"| {OPTIONS[option].told()} | {mark}{value} | {len(scores)} | {' | '.join(cells)} |")
    return lines


def _is_preset(option: str, value: Any) -> bool:
    return _as_preset(OPTIONS[option].overrides(value))


def _as_preset(overrides: Settings) -> bool:
    """Whether they change nothing."""
    return acting(method_config("apt", overrides)) == acting(method_config("apt"))


def _draw(path: Path, paired: Mapping[Point, Scores], by_concept: bool) -> None:
    """A field an option, a curve a score; the value that the others are compared to is at 0."""
    from matplotlib.figure import Figure

    options = list(dict.fromkeys(option for option, _ in paired))
    across = min(len(options), ACROSS)
    rows = math.ceil(len(options) / across)
    figure = Figure(figsize=(3.2 * across, 0.4 + 2.8 * rows), layout="constrained")
    fields = list(figure.subplots(rows, across, sharey=True, squeeze=False).flat)
    for ax, option in itertools.zip_longest(fields, options):
        if option is None:
            ax.axis("off")
            continue
        for column in DRAWN:
            points = [_point(paired.get((option, v)), column, by_concept) for v in OPTIONS[option].values]
            means, errors = zip(*points, strict=True)
            labels = [f"{v}\n(preset)" if _is_preset(option, v) else f"{v}" for v in OPTIONS[option].values]
            ax.errorbar(labels, means, errors, fmt="o-", capsize=3, label=column)
        ax.axhline(0, color="#999999", linewidth=1)
        ax.margins(x=0.15)
        ax.set_title("\n".join(OPTIONS[option].told().split(", ")), fontsize=9)
    for ax in fields[::across]:
        ax.set_ylabel("difference, paired")
    fields[0].legend(fontsize=8)
    write_figure(path, figure)


def _point(scores: Scores | None, column: str, by_concept: bool) -> tuple[float, float]:
    """Mean and error; nan, which is not drawn, of what has not run."""
    if scores is None:
        return 0.0, math.nan  # what the others are compared to
    return mean_and_error(means_of_groups(scores, column, by_concept)) if scores else (math.nan, math.nan)


if __name__ == "__main__":
    main()
