"""Methods compared on the tiny world: DreamBooth, its rivals, APT and its parts (`apt_hooks.tinyworld.methods`).

    python benchmarks/tinyworld.py --out DIR [--concepts 4,5,...] [--seeds 0,1,2] [--methods ...] [--set KEY=VALUE ...]

Every method has the same steps, learning rate, samples, timesteps and noise. As soon as a run is done, a line of JSON
is appended to DIR/runs.jsonl: its settings, its scores and the machine. A run that is there with the same settings, on
any machine, is not made again. Then the tables of what was asked for: each method, its difference to DreamBooth, or to
what `--less` names, in how many pairs all that is asked of APT holds, and how many pairs half of a difference would
take. With `--checkpoints` the first two of each earlier step too, and the scores over the steps in DIR/curves.png.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import concurrent.futures.process
import contextlib
import dataclasses
import hashlib
import json
import math
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from rich.progress import track

from apt_hooks.config import OF_OBJECTIVES, AptConfig
from apt_hooks.errors import AptError, errors_in_one_line
from apt_hooks.results.pictures import draw_curves
from apt_hooks.tinyworld.concepts import CONCEPTS, REPORTED
from apt_hooks.tinyworld.demo import NAMES
from apt_hooks.tinyworld.denoisers import DENOISERS
from apt_hooks.tinyworld.evaluate import METRICS
from apt_hooks.tinyworld.experiment import UNTRAINED, Setting, run_method
from apt_hooks.tinyworld.methods import METHODS
from apt_hooks.tinyworld.model import PIPELINES
from apt_hooks.tinyworld.personalize import Training, method_config

REFERENCE = "dreambooth"
CLOSE = 0.05
COLUMNS = {**dict.fromkeys(METRICS, ".3f"), "frechet": ".2f", "delta_noise": ".4f"}

Settings = dict[str, Any]
Place = tuple[int, int]  # concept and seed
Scores = dict[Place, dict[str, Any]]  # of one method
Asked = Mapping[str, Mapping[Place, Settings]]  # by method


def main() -> None:
    with errors_in_one_line():
        run(_arguments())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_options(parser)
    parser.add_argument("--concepts", type=numbers, default=list(REPORTED))
    parser.add_argument("--seeds", type=numbers, default=[0, 1, 2])
    parser.add_argument("--methods", type=names, default=["base", *METHODS])
    parser.add_argument("--model", choices=PIPELINES, default="unet")
    parser.add_argument("--steps", type=int, default=Training.steps)
    parser.add_argument("--learning-rate", type=float, default=Training.learning_rate)
    parser.add_argument("--rank", type=int, default=Training.rank)
    parser.add_argument("--checkpoints", type=numbers, default=[], help="earlier steps that are judged as well")
    parser.add_argument("--less", choices=METHODS, default=REFERENCE, help="what the others are compared to")
    parser.add_argument("--scenes", type=int, default=24, help="prompts that are judged")
    parser.add_argument("--repeats", type=int, default=8, help="pictures a prompt")
    parser.add_argument("--set", type=_override, action="append", default=[], metavar="KEY=VALUE", help="in [apt]")
    parser.add_argument("--smoke", action="store_true", help="one small run of two methods, to see that it works")
    args = parser.parse_args()
    if args.smoke:
        args.concepts, args.seeds, args.methods = [4], [0], ["base", "apt"]
        args.steps, args.scenes, args.repeats = 2, 5, 1
    check_listed(args, concepts=range(len(CONCEPTS)), methods=(*UNTRAINED, *METHODS))
    for step in args.checkpoints:
        if not 1 <= step < args.steps:
            raise AptError(f"--checkpoints must be from 1 to below --steps, here {args.steps}; found {step}")
    check_at_least_one(args, "steps", "rank", "scenes", "repeats", "workers")
    return args


def add_run_options(parser: argparse.ArgumentParser, workers: int = 2) -> None:
    """What every benchmark has that makes runs which are missing in a folder."""
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=workers, help="processes, one thread each")
    parser.add_argument("--table-only", action="store_true", help="train nothing")


def check_listed(args: argparse.Namespace, **known: Iterable[Any]) -> None:
    """Raises AptError for an item of an option that is none of those it may have."""
    for option, items in known.items():
        for item in getattr(args, option):
            if item not in items:
                raise AptError(f"--{option} takes {', '.join(map(str, items))}, separated by commas; found {item!r}")


def check_at_least_one(args: argparse.Namespace, *options: str) -> None:
    """Raises AptError for a number below 1."""
    for option in options:
        if getattr(args, option) < 1:
            raise AptError(f"--{option} must be at least 1; found {getattr(args, option)}")


def tell_failed(failed: Sequence[str]) -> None:
    """Raises AptError where runs have failed, after the tables of the others."""
    if failed:
        raise AptError(f"failed, and made again by the same command: {'; '.join(failed)}")


def names(text: str) -> list[str]:
    return list(dict.fromkeys(text.split(",")))


def numbers(text: str) -> list[int]:
    return list(dict.fromkeys(int(number) for number in text.split(",")))


def _override(text: str) -> tuple[str, Any]:
    key, _, value = text.partition("=")
    try:
        return key, json.loads(value)
    except ValueError as error:
        raise AptError(f"--set takes KEY=VALUE, the value in JSON; found {text!r}") from error


def run(args: argparse.Namespace) -> None:
    """Make the runs that are missing, and print the tables."""
    training = Training(steps=args.steps, learning_rate=args.learning_rate, rank=args.rank)
    comparison = Comparison(training, args.model, args.scenes, args.repeats, args.checkpoints, dict(args.set))
    places = [(concept, seed) for concept in args.concepts for seed in args.seeds]
    log, failed = args.out / "runs.jsonl", []
    if not args.table_only:
        failed = make(log, [(comparison, comparison.asked(args.methods, places))], args.workers)
    found = find(read_rows(log), comparison.asked((*args.methods, args.less), places))
    by_concept = len(args.concepts) > 1
    print("\n".join(tables(found, args.methods, by_concept, args.less)))
    for step in args.checkpoints:
        earlier = {
            name: {place: row["curve"][str(step)] for place, row in scores.items() if row.get("curve")}
            for name, scores in found.items()
        }
        print(
            "\n".join(["", f"After {step} steps:", *_two_tables(earlier, args.methods, by_concept, args.less, METRICS)])
        )
    if args.checkpoints:
        _draw_curves(args.out / "curves.png", {name: found[name] for name in args.methods}, by_concept)
    tell_failed(failed)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What the runs of one table have in common; `overrides` are of keys in [apt], `checkpoints` are judged as well."""

    training: Training
    model: str = "unet"
    scenes: int = 24
    repeats: int = 8
    checkpoints: Sequence[int] = ()
    overrides: Settings = dataclasses.field(default_factory=dict)

    def asked(self, methods: Iterable[str], places: Sequence[Place]) -> Asked:
        """The settings of each method's runs, by concept and seed, as its row will have them."""
        denoiser = DENOISERS[self.model]
        (stored,) = (PIPELINES[self.model] / denoiser.part).glob("*.safetensors")
        weights = hashlib.sha256(stored.read_bytes()).hexdigest()[:8]
        shared = {"model": self.model, "weights": weights, **dataclasses.asdict(self.training)}
        shared |= {"scenes": self.scenes, "repeats": self.repeats, "checkpoints": list(self.checkpoints)}
        shared |= {"guidance": denoiser.guidance, "sampling_steps": denoiser.sampling_steps}
        asked = {}
        for name in methods:
            own: Settings = {"method": name, **shared, "apt": {}}
            if name not in UNTRAINED:
                # As the method will have it, so that a change of the preset is one too.
                own["apt"] = acting(method_config(name, self.overrides, denoiser))
                # Where it does anything: rows of those that do not are found as they are.
                own |= {"beside": does} if (does := METHODS[name].beside) else {}
            asked[name] = {(c, s): {"concept": c, "seed": s, **own} for c, s in places}
        return asked


def acting(config: AptConfig) -> Settings:
    """The keys of a configuration without those of other objectives, as JSON has them: it knows no tuples."""
    keys = json.loads(json.dumps(dataclasses.asdict(config)))
    del keys["lambda_offset"]  # which may be left open
    own = {key: value for key, value in keys.items() if config.objective in OF_OBJECTIVES.get(key, (config.objective,))}
    return {**own, "offset_weight": config.offset_weight}


def _as_acting(apt: Settings) -> Settings:
    """Of a row, also of an older one: that has `lambda_offset`, which did nothing but for L2-SP."""
    alone = apt.get("lambda_offset", 0.0) if apt.get("objective") == "l2-sp" else 0.0
    return {"offset_weight": alone, **apt}


def make(log: Path, wanted: Iterable[tuple[Comparison, Asked]], workers: int) -> list[str]:
    """Make the runs that have no row in the log yet, in this order; returns which failed, and why."""
    log.parent.mkdir(parents=True, exist_ok=True)
    if log.exists() and not log.read_bytes().endswith(b"\n"):
        append_line(log, "")  # ends a line that was cut off
    rows, planned = read_rows(log), []
    with concurrent.futures.ProcessPoolExecutor(workers) as pool:
        futures: dict[concurrent.futures.Future[None], str] = {}
        for comparison, asked in wanted:
            done, groups = find(rows, asked), {}
            for name, places in asked.items():
                for place, settings in places.items():
                    # What two comparisons have in common is made once.
                    if place not in done[name] and settings not in planned:
                        planned.append(settings)
                        groups.setdefault(place, []).append(settings)
            differs = {"learning_rate": comparison.training.learning_rate, **comparison.overrides}
            told = ", ".join(f"{key} {value}" for key, value in differs.items())
            for (concept, seed), group in groups.items():
                methods = ", ".join(settings["method"] for settings in group)
                label = f"concept {concept}, seed {seed}, {methods} ({told})"
                futures[pool.submit(run_group, log, group, comparison)] = label
        return failures(futures)


def failures(futures: Mapping[concurrent.futures.Future[Any], str]) -> list[str]:
    """Waits for all, with a bar; returns what is said of those that failed, each with its label."""
    failed, killed = [], 0
    for future in track(concurrent.futures.as_completed(futures), total=len(futures)):
        error = future.exception()
        if isinstance(error, concurrent.futures.process.BrokenProcessPool):
            killed += 1  # of all that was not done when one process ended, the same is said
        elif error:
            failed.append(f"{futures[future]}: {error!r}")
    if killed:
        failed.append(f"{killed} of {len(futures)} not done, as a process was killed (is there too little memory?)")
    return failed


def run_group(log: Path, group: list[Settings], comparison: Comparison) -> None:
    """The runs of one concept and seed, in a process of its own."""
    from step import commit, device_name  # the benchmark beside this one

    torch.set_num_threads(1)
    first = group[0]
    machine = {"torch": torch.__version__, "diffusers": diffusers.__version__}
    machine |= {"device": device_name(torch.device("cpu")), "commit": commit()}
    asked = {key: first[key] for key in ("concept", "seed", "model", "scenes", "repeats")}
    setting = Setting(training=comparison.training, **asked)
    examination = setting.examination()
    for settings in group:
        start = time.monotonic()
        result = run_method(
            settings["method"],
            examination,
            setting,
            overrides=comparison.overrides,
            checkpoints=comparison.checkpoints,
        )
        seconds = round(time.monotonic() - start, 1)
        curve = {"curve": {step: judged.scores for step, judged in result.checkpoints.items()}}
        row = {**settings, "set": comparison.overrides, **result.metrics(), **curve, **machine, "seconds": seconds}
        append_line(log, json.dumps(row))


def append_line(log: Path, line: str) -> None:
    with log.open("a", encoding="utf-8") as file:
        file.write(line + "\n")  # at once, so that the lines of two processes do not mix


def read_rows(log: Path) -> list[dict[str, Any]]:
    """What the file holds; a line that was cut off, as by the end of a killed run, is none."""
    rows = []
    for line in log.read_text(encoding="utf-8").splitlines() if log.exists() else ():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def find(rows: list[dict[str, Any]], asked: Asked) -> dict[str, Scores]:
    """The rows that have the asked settings, by method; whatever else is in the file, or in a row."""

    def fits(wanted: Settings, row: Settings) -> bool:
        apt = row.get("apt", {})
        return {**wanted, "apt": apt}.items() <= row.items() and wanted["apt"].items() <= _as_acting(apt).items()

    return {
        name: {place: row for place, wanted in places.items() for row in rows if fits(wanted, row)}
        for name, places in asked.items()
    }


def tables(found: Mapping[str, Scores], methods: list[str], by_concept: bool, less: str = REFERENCE) -> list[str]:
    """Markdown: the scores of each method, their differences to those of `less`, and how sure these are.

    The runs of one concept are not independent, so standard errors are those of the concepts' means; of one concept
    alone, of its runs.
    """
    paired = {name: differences(found[name], found[less]) for name in methods if name != less}
    lines = _two_tables(found, methods, by_concept, less, COLUMNS)
    lines += ["", f"Pairs in which a method is better than {less}; identity: at most {CLOSE} lower:", ""]
    lines += _wins(paired)
    lines += [
        "",
        "Pairs that it would take to see half of that difference (at two standard errors of single pairs):",
        "",
    ]
    return lines + _needed(paired)


def _two_tables(
    found: Mapping[str, Scores], methods: list[str], by_concept: bool, less: str, columns: Iterable[str]
) -> list[str]:
    over = "concepts, each the mean of its seeds" if by_concept else "the seeds of one concept"
    paired = {name: differences(found[name], found[less], columns) for name in methods if name != less}
    lines = [f"Mean ± standard error over {over}:", ""]
    lines += _table({name: found[name] for name in methods}, by_concept, columns)
    lines += ["", f"Difference to {less}, paired by concept and seed, of frechet in percent; errors as above:", ""]
    return lines + _table(paired, by_concept, columns, sign="+")


ASKED = {
    "frechet": lambda difference: difference < 0,
    "recall": lambda difference: difference > 0,
    "text": lambda difference: difference > 0,
    "identity": lambda difference: difference >= -CLOSE,
}
"""What is asked of APT in every pair."""


def _wins(paired: Mapping[str, Scores]) -> list[str]:
    lines = ["| method | pairs | " + " | ".join((*ASKED, "all of these")) + " |", "|---" * (len(ASKED) + 3) + "|"]
    for name, scores in paired.items():
        better = [[asked(row[column]) for column, asked in ASKED.items()] for row in scores.values()]
        counts = [sum(each) for each in zip(*better, strict=True)] or [0] * len(ASKED)
        cells = [*counts, sum(all(row) for row in better)]
        lines.append(f"| {name} | {len(scores)} | " + " | ".join(map(str, cells)) + " |")
    return lines


def _needed(paired: Mapping[str, Scores]) -> list[str]:
    lines = ["| method | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, scores in paired.items():
        lines.append(
            f"| {name} | " + " | ".join(_pairs_needed([r[c] for r in scores.values()]) for c in COLUMNS) + " |"
        )
    return lines


def _pairs_needed(differences: list[float]) -> str:
    """So many that two standard errors, `2 sd / sqrt(n)`, are half of the mean."""
    if len(differences) < 2 or not (mean := statistics.fmean(differences)):
        return "-"
    return str(max(2, math.ceil((4 * statistics.stdev(differences) / mean) ** 2)))


def _draw_curves(path: Path, found: Mapping[str, Scores], by_concept: bool) -> None:
    """Text and identity of each checkpoint: against the step, and against each other; errors as in the tables."""
    curves = {}
    for name, scores in found.items():
        judged = {place: {**row["curve"], str(row["steps"]): row} for place, row in scores.items() if row.get("curve")}
        if judged:
            steps = sorted(map(int, set.intersection(*map(set, judged.values()))))
            of_steps = {step: {place: row[str(step)] for place, row in judged.items()} for step in steps}
            curves[NAMES[name]] = {
                step: {key: mean_and_error(means_of_groups(of, key, by_concept)) for key in ("text", "identity")}
                for step, of in of_steps.items()
            }
    draw_curves(path, curves)


def means_of_groups(scores: Scores, column: str, by_concept: bool = True) -> list[float]:
    """Of each concept, or of each seed where there is one concept: what errors are the spread of."""
    groups: dict[int, list[float]] = {}
    for (concept, seed), row in scores.items():
        groups.setdefault(concept if by_concept else seed, []).append(row[column])
    return [statistics.fmean(values) for values in groups.values()]


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """The mean and its standard error, which one value does not tell: nan."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def differences(scores: Scores, reference: Scores, columns: Iterable[str] = COLUMNS) -> Scores:
    """Of each pair; that of frechet in percent."""
    paired: Scores = {}
    for place in scores.keys() & reference.keys():
        one, other = scores[place], reference[place]
        paired[place] = {name: one[name] - other[name] for name in columns}
        if "frechet" in paired[place]:
            paired[place]["frechet"] *= 100 / other["frechet"]
    return paired


def _table(methods: Mapping[str, Scores], by_concept: bool, columns: Iterable[str], sign: str = "") -> list[str]:
    columns = list(columns)
    lines = ["| method | runs | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for name, scores in methods.items():
        cells = [cell(means_of_groups(scores, column, by_concept), COLUMNS[column], sign) for column in columns]
        lines.append(f"| {name} | {len(scores)} | " + " | ".join(cells) + " |")
    return lines


def cell(values: list[float], style: str, sign: str = "") -> str:
    """Mean ± standard error; of one value itself, of none a dash."""
    if len(values) < 2:
        return format(values[0], sign + style) if values else "-"
    mean, error = mean_and_error(values)
    return f"{mean:{sign}{style}} ± {error:{style}}"


if __name__ == "__main__":
    main()
