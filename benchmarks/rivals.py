"""Methods at their best on the tiny world: each tuned alike, then compared on concepts it has not seen.

    python benchmarks/rivals.py --out DIR [--tune-only] [--table-only] [--methods ...]

Each method is trained with two learning rates, DCO, L2-SP and APT, which have a strength, with two of these at each, on
concepts 0, 2 and 3 (1 cannot be learned), and judged at half of the steps and at the end: `RATES`, `STRENGTHS`. What is
taken of it, with the step, is what has the highest mean score over these concepts, by that of `pick.py`. So a smaller
learning rate and early stopping, the cheapest of rivals, are in everybody's reach. The parts of APT, and what is added
to it, take APT's. Then each is trained so on concepts 4 to 13, and the tables are those of `tinyworld.py`.

As soon as a run is done, a line of JSON is appended to DIR/runs.jsonl, as that does, and it is not made again.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pick import balanced_score  # the benchmarks beside this one
from tinyworld import (
    REFERENCE,
    Asked,
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
    means_of_groups,
    names,
    numbers,
    read_rows,
    tables,
    tell_failed,
)

from apt_hooks.errors import errors_in_one_line
from apt_hooks.tinyworld.concepts import CONCEPTS, REPORTED
from apt_hooks.tinyworld.methods import METHODS
from apt_hooks.tinyworld.personalize import Training

RATES = (1e-3, 3e-3)
STRENGTHS: dict[str, tuple[str, tuple[float, ...]]] = {
    "dco": ("dco_beta", (20.0, 100.0)),
    "l2-sp": ("lambda_offset", (3e-5, 3e-4)),
    "apt": ("lambda_attn", (0.3, 1.0)),
}
SAME_AS_APT = [name for name in METHODS if name.startswith(("ata", "apt+"))]
TUNED = [name for name in METHODS if name not in SAME_AS_APT]
TUNING = [(concept, 0) for concept in (0, 2, 3)]
STEPS = Training.steps
IDEAL = "ideal"


@dataclasses.dataclass(frozen=True)
class Choice:
    """How a method is trained."""

    learning_rate: float
    steps: int
    keys: tuple[tuple[str, float], ...] = ()

    def told(self) -> str:
        keys = "".join(f", {key} {value:g}" for key, value in self.keys)
        return f"{self.learning_rate:g}{keys}, {self.steps} steps"

    def of(self, method: str) -> Choice:
        """For a method that is trained as another: without the keys that it sets itself."""
        return dataclasses.replace(self, keys=tuple(item for item in self.keys if item[0] not in METHODS[method].keys))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_options(parser)
    parser.add_argument("--methods", type=names, default=list(METHODS))
    parser.add_argument("--concepts", type=numbers, default=list(REPORTED), help="that are reported")
    parser.add_argument("--seeds", type=numbers, default=[0], help="that are reported")
    parser.add_argument("--repeats", type=int, default=3, help="pictures a prompt, of those that are reported")
    parser.add_argument("--tune-only", action="store_true", help="report nothing")
    args = parser.parse_args()
    with errors_in_one_line():
        tuning = {concept for concept, _ in TUNING}
        check_listed(args, methods=METHODS, concepts=[c for c in range(len(CONCEPTS)) if c not in tuning])
        check_at_least_one(args, "repeats", "workers")
        run(args)


def run(args: argparse.Namespace) -> None:
    """Make the runs that are missing, and print the tables."""
    log, failed = args.out / "runs.jsonl", []
    apt = {"apt"} if set(args.methods) & set(SAME_AS_APT) else set()
    tuned = [name for name in TUNED if name in {*args.methods, *apt, REFERENCE}]
    # What differs in nothing but the method is made side by side.
    groups: list[tuple[list[str], Settings, float]] = [([IDEAL], {}, RATES[0])]
    for rate in RATES:
        groups.append(([name for name in tuned if name not in STRENGTHS], {}, rate))
        groups += [([name], {key: value}, rate) for name, key, value in _strengths(tuned)]
    scores: dict[str, dict[Choice, dict[str, float]]] = {name: {} for name in tuned}
    incomplete: set[str] = set()
    ideal: Scores = {}
    wanted = []
    for methods, keys, rate in groups:
        half = [] if methods == [IDEAL] else [STEPS // 2]
        comparison = Comparison(Training(learning_rate=rate), repeats=1, checkpoints=half, overrides=keys)
        wanted.append((comparison, comparison.asked(methods, TUNING)))
    if not args.table_only:
        failed += make(log, wanted, args.workers)
    rows = read_rows(log)
    for (_, keys, rate), (_, asked) in zip(groups, wanted, strict=True):
        for name, found in find(rows, asked).items():
            if len(found) < len(TUNING):
                incomplete |= {name, *(tuned if name == IDEAL else ())}
            elif name == IDEAL:
                ideal = found
            elif ideal:
                for step in (STEPS // 2, STEPS):
                    at = {place: row if step == STEPS else row["curve"][str(step)] for place, row in found.items()}
                    scores[name][Choice(rate, step, tuple(keys.items()))] = _means(at, ideal)
    whole = [name for name in tuned if name not in incomplete]
    chosen = {name: max(scores[name], key=lambda choice: scores[name][choice]["score"]) for name in whole}
    print("\n".join(_tuning_table(scores, chosen)))
    if missing := [name for name in tuned if name in incomplete]:
        print(f"\nNot tuned yet, and not reported: {', '.join(missing)}")
    if not args.tune_only and REFERENCE in chosen:
        failed += report(args, log, chosen)
    tell_failed(failed)


def _strengths(methods: Iterable[str]) -> Iterator[tuple[str, str, float]]:
    """Method, key and value."""
    for name in methods:
        key, values = STRENGTHS.get(name, ("", ()))
        for value in values:
            yield name, key, value


def _means(found: Scores, ideal: Scores) -> dict[str, float]:
    means = {name: statistics.fmean(row[name] for row in found.values()) for name in ("text", "identity", "frechet")}
    return means | {"score": statistics.fmean(balanced_score(row, ideal[place]) for place, row in found.items())}


def _tuning_table(scores: Mapping[str, Mapping[Choice, Any]], chosen: Mapping[str, Choice]) -> list[str]:
    places = ", ".join(str(concept) for concept, _ in TUNING)
    lines = [f"Tuning, means of concepts {places}; > is what is taken:", ""]
    lines += [
        "| method | learning rate, strength, steps | score | text | identity | frechet |",
        "|---|---|---|---|---|---|",
    ]
    for name, of in scores.items():
        for choice, mean in of.items():
            mark = "> " if choice == chosen.get(name) else ""
            cells = f"{mean['score']:.3f} | {mean['text']:.3f} | {mean['identity']:.3f} | {mean['frechet']:.0f}"
            lines.append(f"| {name} | {mark}{choice.told()} | {cells} |")
    return lines


def report(args: argparse.Namespace, log: Path, chosen: Mapping[str, Choice]) -> list[str]:
    """Train each method as it was tuned, on the concepts that are reported, and print the tables; returns failures."""
    places = [(concept, seed) for concept in args.concepts for seed in args.seeds]
    own = {name: chosen.get("apt" if name in SAME_AS_APT else name) for name in METHODS}
    choices = {name: choice.of(name) for name, choice in own.items() if choice and name in {*args.methods, REFERENCE}}
    drawn_by_code = Comparison(Training(), repeats=args.repeats)
    wanted: list[tuple[Comparison, Asked]] = [(drawn_by_code, drawn_by_code.asked([IDEAL], places))]
    for name, choice in choices.items():
        training = Training(steps=choice.steps, learning_rate=choice.learning_rate)
        comparison = Comparison(training, repeats=args.repeats, overrides=dict(choice.keys))
        wanted.append((comparison, comparison.asked([name], places)))
    failed = [] if args.table_only else make(log, wanted, args.workers)
    rows, by_concept = read_rows(log), len(args.concepts) > 1
    found = {name: scores for _, asked in wanted for name, scores in find(rows, asked).items()}
    ideal = found.pop(IDEAL)
    if lacking := [f"{concept}, {seed}" for concept, seed in places if (concept, seed) not in ideal]:
        print(f"\nWithout a score, as `{IDEAL}` has not run there (concept, seed): {'; '.join(lacking)}")
    print("\n".join(["", *_choices_table(choices, found, ideal, by_concept), ""]))
    print("\n".join(tables(found, list(found), by_concept)))
    return failed


def _choices_table(
    choices: Mapping[str, Choice], found: Mapping[str, Scores], ideal: Scores, by_concept: bool
) -> list[str]:
    scores: dict[str, Scores] = {
        name: {place: {"score": balanced_score(row, ideal[place])} for place, row in of.items() if place in ideal}
        for name, of in found.items()
    }
    lines = [f"| method | trained with | runs | score | difference to {REFERENCE} |", "|---|---|---|---|---|"]
    for name, of in scores.items():
        paired = differences(of, scores[REFERENCE], ["score"])
        cells = [cell(means_of_groups(of, "score", by_concept), ".3f")]
        cells.append(cell(means_of_groups(paired, "score", by_concept), ".3f", "+") if name != REFERENCE else "")
        lines.append(f"| {name} | {choices[name].told()} | {len(found[name])} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
