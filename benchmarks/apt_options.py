"""Options of APT on the tiny world, one at a time: what each of its values gives and takes.

    python benchmarks/apt_options.py --out DIR [--options lambda_attn,...] [--concepts 0,2,3] [--seeds 0]

Trained as the demo is, with the preset but for the option (`OPTIONS`), and compared to DreamBooth on the same concept
and seed. Prints a table; DIR/options.png draws text and identity over the values of each option. As soon as a run is
done, a line of JSON is appended to DIR/runs.jsonl, as by `tinyworld.py`, and it is not made again.
"""

from __future__ import annotations

import argparse
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
from apt_hooks.tinyworld.denoisers import UNET
from apt_hooks.tinyworld.personalize import Training, method_config

OPTIONS: dict[str, tuple[Settings, tuple[Any, ...]]] = {
    "augment_max_probability": ({}, (0.0, 0.05, 0.2, 0.4)),
    "augment_border": ({"augment_max_probability": 0.4}, ("learn", "ignore")),
    "frozen_every": ({}, (1, 2, 4)),
    "lambda_joint": ({"regularizer": "joint"}, (0.01, 0.1)),
    "lambda_attn": ({}, (0.0, 0.3, 1.0, 3.0)),
    "lambda_dist": ({}, (0.0, 0.03, 0.1)),
}
"""What else is set, and the values."""
COLUMNS = {"frechet": ".0f", "recall": ".3f", "text": ".3f", "identity": ".3f", "black_frames": ".3f"}
DRAWN = ("text", "identity")
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
    points = [(option, value) for option in args.options for value in OPTIONS[option][1]]
    for option, value in points:
        comparison = _comparison(args, {**OPTIONS[option][0], option: value})
        asked.append((comparison, comparison.asked(["apt"], places)))
    failed = [] if args.table_only else make(log, asked, args.workers)
    rows = read_rows(log)
    reference, *found = (scores for _, of in asked for scores in find(rows, of).values())
    paired = {point: differences(scores, reference) for point, scores in zip(points, found, strict=True)}
    print("\n".join(_table(reference, paired)))
    _draw(args.out / "options.png", paired)
    tell_failed(failed)


def _comparison(args: argparse.Namespace, overrides: Settings) -> Comparison:
    return Comparison(Training(), repeats=args.repeats, overrides=overrides)


def _table(reference: Scores, paired: Mapping[tuple[str, Any], Scores]) -> list[str]:
    own = {column: cell(means_of_groups(reference, column), style) for column, style in COLUMNS.items()}
    lines = [f"DreamBooth, {len(reference)} runs: " + ", ".join(f"{column} {told}" for column, told in own.items())]
    lines += ["", "APT's difference to it, paired; of frechet in percent; mean ± standard error over concepts:", ""]
    lines += ["| option | value | runs | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 3) + "|"]
    for (option, value), scores in paired.items():
        cells = [cell(means_of_groups(scores, column), style, "+") for column, style in COLUMNS.items()]
        mark = "> " if _is_preset(option, value) else ""
        lines.append(f"| {_told(option)} | {mark}{value} | {len(scores)} | {' | '.join(cells)} |")
    return lines


def _told(option: str) -> str:
    return ", ".join([option, *(f"{key} = {value}" for key, value in OPTIONS[option][0].items())])


def _is_preset(option: str, value: Any) -> bool:
    preset = method_config("apt", denoiser=UNET)
    return all(getattr(preset, key) == own for key, own in {**OPTIONS[option][0], option: value}.items())


def _draw(path: Path, paired: Mapping[tuple[str, Any], Scores]) -> None:
    """A field an option, a curve a score."""
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
        values = {
            f"{value}\n(preset)" if _is_preset(option, value) else f"{value}": found
            for (of, value), found in paired.items()
            if of == option
        }
        for column in DRAWN:
            measured = {value: means_of_groups(found, column) for value, found in values.items() if found}
            if measured:
                means, errors = zip(*map(mean_and_error, measured.values()), strict=True)
                ax.errorbar(list(measured), means, errors, fmt="o-", capsize=3, label=column)
        ax.axhline(0, color="#999999", linewidth=1)
        ax.margins(x=0.15)
        ax.set_title("\n".join(_told(option).split(", ")), fontsize=9)
    for ax in fields[::across]:
        ax.set_ylabel("APT less DreamBooth")
    fields[0].legend(fontsize=8)
    write_figure(path, figure)


if __name__ == "__main__":
    main()
