"""Whether `apt-hooks pick` takes the checkpoint that judges of pictures would take, on the tiny world.

    python benchmarks/pick.py --out DIR [--concepts 4,5,6,7] [--learning-rates 1e-3,3e-3,9e-3] [--table-only]

A run is DreamBooth, which overfits, of one concept, seed and learning rate, 600 steps with a checkpoint every 75:
eight, judged by 24 prompts of one picture each, the same prompts and noise for all. The rates are the demo's, a third
of it and three times it: too slow, moderate and too fast, as nobody knows beforehand. As soon as a run is done, a line
of JSON is appended to DIR/judged.jsonl, and `apt-hooks pick DIR/CONCEPT-SEED-RATE` reads what was measured without
pictures. The rule is asked when the table is made, so another rule needs no other run; tune it on concepts 0 to 3,
report it on 4 and above.

Decided before any run. A checkpoint's score is the harmonic mean of the text and the identity score, each as its share
of what `ideal` has (the same scenes drawn by code), identity below 0 as 0:

    score = 2 T I / (T + I),   T = mean text / ideal text,   I = mean identity / ideal identity

Harmonic, as a LoRA is for both: the base model has all of the prompt and none of the subject, a collapsed one the
subject and no prompt, and neither shall be made good by the other. "Best by judges" is the highest score of the run.
Its standard error is the jackknife's over the prompts, and a choice hits where its score is at most that error below
the best one (the one-standard-error rule of Breiman et al. 1984, Classification and Regression Trees, section 3.4.3).
No choice is a miss.

Beside `pick`: the same rule `without` pictures that are not trained on. Rivals: `last`, the end of the training;
`middle`, half of it; `random`, what a blind choice comes to; `held out`, the largest held-out gap. `short of the best`
is the mean difference of scores over the runs with a choice: unlike hits, it is not easier to meet where the judges are
noisy. The error of the difference to the best one is smaller, as prompts and noise are the same. Below that table
another: Spearman's rank correlation within a run, mean and standard error over the runs, of what is measured of a
checkpoint with its text, its identity and its score; and that with the text of all runs' checkpoints together, which
tells whether one bound can serve all.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tinyworld import (  # the benchmark beside this one
    add_run_options,
    append_line,
    check_at_least_one,
    check_listed,
    failures,
    numbers,
    read_rows,
    tell_failed,
)

from apt_hooks.errors import AptError, errors_in_one_line
from apt_hooks.results.read_checkpoints import Checkpoint, read_checkpoints
from apt_hooks.results.verdict import verdict
from apt_hooks.tinyworld.concepts import CONCEPTS
from apt_hooks.tinyworld.evaluate import ASKED, Examination, Judgement
from apt_hooks.tinyworld.experiment import Setting
from apt_hooks.tinyworld.judge_networks import identity_score, text_score
from apt_hooks.tinyworld.methods import METHODS
from apt_hooks.tinyworld.personalize import Training, lora, method_config, reference_pictures, train
from apt_hooks.tinyworld.saving import Saving
from apt_hooks.training.checkpoints import ENDING

METHOD = "dreambooth"
CHECKPOINTS = 8
MEASURES: dict[str, Callable[[Checkpoint], float]] = {
    "step": lambda one: one.step,
    "gap": lambda one: one.gap,
    "class drift": lambda one: one.class_drift,
    "trigger-free drift": lambda one: one.free_drift,
    "prompt response": lambda one: one.prompt_response,
    "delta noise": lambda one: one.delta_noise,
    "held-out gap": lambda one: one.held_out_gap,
}
RULES = ("pick", "without", "last", "middle", "random", "held out")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_options(parser, workers=1)
    parser.add_argument("--concepts", type=numbers, default=[4, 5, 6, 7])
    parser.add_argument("--seeds", type=numbers, default=[0])
    parser.add_argument("--learning-rates", type=_rates, default=[1e-3, 3e-3, 9e-3])
    parser.add_argument("--steps", type=int, default=Training.steps)
    parser.add_argument("--scenes", type=int, default=24, help="prompts, of one picture each")
    parser.add_argument("--smoke", action="store_true", help="one small run, to see that it works")
    args = parser.parse_args()
    if args.smoke:
        args.concepts, args.seeds, args.learning_rates = [4], [0], [3e-3]
        args.steps, args.scenes = CHECKPOINTS, 5
    with errors_in_one_line():
        run(args)


def run(args: argparse.Namespace) -> None:
    """Make the runs that are missing, and print the table."""
    if args.steps < CHECKPOINTS or args.steps % CHECKPOINTS:
        raise AptError(f"--steps must be a multiple of {CHECKPOINTS}, the checkpoints; found {args.steps}")
    check_listed(args, concepts=range(len(CONCEPTS)))
    check_at_least_one(args, "scenes", "workers")
    log, failed = args.out / "judged.jsonl", []
    asked = [
        {"concept": concept, "seed": seed, "learning_rate": rate, "steps": args.steps, "scenes": args.scenes}
        for concept in args.concepts
        for seed in args.seeds
        for rate in args.learning_rates
    ]
    if not args.table_only:
        args.out.mkdir(parents=True, exist_ok=True)
        missing = [one for one in asked if _find(log, one) is None]
        with concurrent.futures.ProcessPoolExecutor(args.workers) as pool:
            futures = {
                pool.submit(train_and_judge, args.out, log, one): folder_of(args.out, one).name for one in missing
            }
            failed = failures(futures)
    rows = [row for one in asked if (row := _find(log, one)) is not None]
    print("\n".join([*table(args.out, rows), "", *ranks(args.out, rows)]))
    tell_failed(failed)


def _rates(text: str) -> list[float]:
    return list(dict.fromkeys(float(rate) for rate in text.split(",")))


def _find(log: Path, asked: Mapping[str, Any]) -> dict[str, Any] | None:
    return next((row for row in read_rows(log) if asked.items() <= row.items()), None)


def folder_of(out: Path, run: Mapping[str, Any]) -> Path:
    return out / f"{run['concept']}-{run['seed']}-{run['learning_rate']:g}"


def train_and_judge(out: Path, log: Path, asked: dict[str, Any]) -> None:
    """One run, in a process of its own."""
    torch.set_num_threads(1)
    start = time.monotonic()
    training = Training(steps=asked["steps"], learning_rate=asked["learning_rate"])
    setting = Setting(asked["concept"], asked["seed"], training=training, scenes=asked["scenes"], repeats=1)
    examination, concept = setting.examination(), CONCEPTS[setting.concept]
    judged: dict[str, dict[str, list[float]]] = {"ideal": _scores(examination, examination.ideal())}

    def judge(step: int) -> None:
        judged[str(step)] = _scores(examination, examination.judge())

    every = training.steps // CHECKPOINTS
    held_out = reference_pictures(concept, take="held out ")
    with lora(examination.pipeline, training.rank, setting.seed):
        train(
            examination.pipeline,
            examination.references,
            concept.captions(),
            method_config(METHOD),
            training,
            seed=setting.seed,
            log_path=folder_of(out, asked) / f"{METHOD}-apt.jsonl",
            method=METHODS[METHOD],
            checkpoints={step: lambda step=step: judge(step) for step in range(every, training.steps + 1, every)},
            saving=Saving(folder_of(out, asked), METHOD, every, concept.subject.kind, held_out),
        )
    append_line(log, json.dumps({**asked, "judged": judged, "seconds": round(time.monotonic() - start, 1)}))


def _scores(examination: Examination, judgement: Judgement) -> dict[str, list[float]]:
    """Of each picture."""
    judges, pictures = examination.judges, judgement.pictures
    return {
        "text": text_score(judges.classifier, pictures, examination.scenes, ASKED).tolist(),
        "identity": identity_score(judges.identity, pictures, examination.drawn_references).tolist(),
    }


def balanced_score(judged: Mapping[str, float], ideal: Mapping[str, float]) -> float:
    """The harmonic mean of mean text and mean identity as shares of the ideal's, an identity below 0 as 0."""
    text, identity = (max(0.0, judged[name] / ideal[name]) for name in ("text", "identity"))
    return 2 * text * identity / (text + identity) if text + identity else 0.0


class Score:
    """Of a checkpoint, as the head of this file decides on it, and what it is with each picture left out.

    Args:
        judged, ideal: by the judge, of each picture.
    """

    def __init__(self, judged: Mapping[str, Sequence[float]], ideal: Mapping[str, Sequence[float]]) -> None:
        best = {name: statistics.fmean(ideal[name]) for name in ("text", "identity")}

        def mean(rows: Sequence[int]) -> float:
            means = {name: statistics.fmean(judged[name][row] for row in rows) for name in best}
            return balanced_score(means, best)

        rows = range(len(judged["text"]))
        self.value = mean(rows)
        self.left_out = [mean([row for row in rows if row != k]) for k in rows]
        self.error = _jackknife(self.left_out)

    def short_of(self, best: Score) -> tuple[float, float]:
        """How much below the best it is, and the standard error of that, of the same prompts."""
        differences = [b - own for b, own in zip(best.left_out, self.left_out, strict=True)]
        return best.value - self.value, _jackknife(differences)


def _jackknife(left_out: Sequence[float]) -> float:
    return statistics.pstdev(left_out) * math.sqrt(len(left_out) - 1)


def choices(checkpoints: Sequence[Checkpoint]) -> dict[str, int | None]:
    """The step that each rule takes, None where it takes none; `random` is no choice."""
    steps = [one.step for one in checkpoints]
    unheld = [dataclasses.replace(one, held_out_gap=math.nan) for one in checkpoints]
    picked, without = verdict(checkpoints).picked, verdict(unheld).picked
    return {
        "pick": None if picked is None else picked.step,
        "without": None if without is None else without.step,
        "last": steps[-1],
        "middle": min(steps, key=lambda step: abs(step - steps[-1] / 2)),
        "held out": max(checkpoints, key=lambda one: one.held_out_gap).step,
    }


def table(out: Path, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Markdown: what each rule takes in each run, and how often that is as good as the best."""
    columns = ["concept", "seed", "learning rate", "best", "score", *RULES]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    hits: dict[str, list[float]] = {name: [] for name in RULES}
    paired: dict[str, list[float]] = {name: [] for name in RULES}
    short: dict[str, list[float]] = {name: [] for name in RULES}
    for row in rows:
        scores = _scores_by_step(row)
        at = max(scores, key=lambda step: scores[step].value)
        best = scores[at]
        below = {step: own.short_of(best) for step, own in scores.items()}
        chosen = choices(_checkpoints(out, row))
        cells = []
        for name in RULES:
            steps = list(scores) if name == "random" else [chosen[name]]
            taken = [below[step] for step in steps if step is not None]
            good = [difference <= best.error for difference, _ in taken]
            hits[name].append(sum(good) / len(steps))
            paired[name].append(sum(difference <= error for difference, error in taken) / len(steps))
            short[name] += [statistics.fmean(difference for difference, _ in taken)] if taken else []
            told = f"{sum(good)} of {len(good)}" if name == "random" else f"{steps[0]}{'' if all(good) else ' (no)'}"
            cells.append(told if taken else "none")
        run = f"{row['concept']} | {row['seed']} | {row['learning_rate']:g}"
        lines.append(f"| {run} | {at} | {best.value:.3f} ± {best.error:.3f} | {' | '.join(cells)} |")
    counts = {"within the standard error": hits, "within that of the difference": paired}
    for title, of in counts.items():
        lines.append(f"| {title} | | | | | {' | '.join(f'{sum(of[name]):.3g} of {len(rows)}' for name in RULES)} |")
    means = [f"{statistics.fmean(short[name]):.3f}" if short[name] else "-" for name in RULES]
    return [*lines, f"| short of the best | | | | | {' | '.join(means)} |"]


def _ranked(values: Sequence[float]) -> list[float]:
    """Places from the smallest on, of equal ones their mean."""
    return [sum((other < value) + (other == value) / 2 for other in values) for value in values]


def ranks(out: Path, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Markdown: how what is measured of checkpoints ranks them, beside how judges do; runs without a measure are left
    out of its row."""
    found: dict[str, dict[str, list[float]]] = {name: {} for name in MEASURES}
    together: dict[str, list[tuple[float, float]]] = {name: [] for name in MEASURES}
    for row in rows:
        checkpoints, scores = _checkpoints(out, row), _scores_by_step(row)
        of_steps = [row["judged"][str(one.step)] for one in checkpoints]
        judged = {axis: [statistics.fmean(of[axis]) for of in of_steps] for axis in ("text", "identity")}
        judged["score"] = [scores[one.step].value for one in checkpoints]
        for name, measure in MEASURES.items():
            measured = [measure(one) for one in checkpoints]
            if any(map(math.isnan, measured)):
                continue
            together[name] += zip(measured, judged["text"], strict=True)
            for axis, values in judged.items():
                correlations = found[name].setdefault(axis, [])
                if min(measured) < max(measured) and min(values) < max(values):  # else there is no rank
                    correlations.append(statistics.correlation(_ranked(measured), _ranked(values)))
    lines = ["| rank correlation with | text | identity | score | text, all runs |", "|---|---|---|---|---|"]
    for name, of in found.items():
        error = {axis: statistics.stdev(v) / math.sqrt(len(v)) if len(v) > 1 else math.nan for axis, v in of.items()}
        cells = [f"{statistics.fmean(v):+.2f} ± {error[axis]:.2f}" if v else "-" for axis, v in of.items()]
        all_runs = [_ranked(values) for values in zip(*together[name], strict=True)]
        ranked = bool(all_runs) and all(len(set(values)) > 1 for values in all_runs)
        cells.append(f"{statistics.correlation(*all_runs):+.2f}" if ranked else "-")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _checkpoints(out: Path, row: Mapping[str, Any]) -> Sequence[Checkpoint]:
    return read_checkpoints(folder_of(out, row) / f"{METHOD}{ENDING}").checkpoints


def _scores_by_step(row: Mapping[str, Any]) -> dict[int, Score]:
    ideal = row["judged"]["ideal"]
    return {int(step): Score(of, ideal) for step, of in row["judged"].items() if step != "ideal"}


if __name__ == "__main__":
    main()
