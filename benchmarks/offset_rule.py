"""What `apt-hooks calibrate` proposes as `lambda_offset` on the tiny world.

    python benchmarks/offset_rule.py [--models unet,transformer] [--learning-rate 3e-3] [--concepts 4,5,...]

Each concept is learned plainly, with `monitor_only`, as the demo trains. Printed: of the last tenth of the run the
offset of the weights and the gain of the LoRA, what share of that the penalty has by the `lambda_offset` of the
demo's L2-SP, and what the rule makes of it.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import statistics
import tempfile
from pathlib import Path

from rich.console import Console
from rich.progress import track
from tinyworld import check_at_least_one, check_listed, names, numbers  # the benchmark beside this one

from apt_hooks.errors import errors_in_one_line
from apt_hooks.results.calibrate import propose_offset_weight, read_log
from apt_hooks.tinyworld.concepts import CONCEPTS, REPORTED
from apt_hooks.tinyworld.denoisers import DENOISERS
from apt_hooks.tinyworld.methods import METHODS
from apt_hooks.tinyworld.model import PIPELINES, load_pipeline
from apt_hooks.tinyworld.personalize import Training, lora, method_config, one_thread, reference_pictures, train

WEIGHT = METHODS["l2-sp"].strengths["lambda_offset"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=names, default=list(PIPELINES))
    parser.add_argument("--concepts", type=numbers, default=list(REPORTED))
    parser.add_argument("--steps", type=int, default=Training.steps)
    parser.add_argument("--learning-rate", type=float, default=Training.learning_rate)
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    args = parser.parse_args()
    with errors_in_one_line():
        check_listed(args, models=PIPELINES, concepts=range(len(CONCEPTS)))
        check_at_least_one(args, "steps", "workers")
        run(args)


def run(args: argparse.Namespace) -> None:
    training = Training(steps=args.steps, learning_rate=args.learning_rate)
    with concurrent.futures.ProcessPoolExecutor(args.workers) as pool:
        runs = [(model, concept) for model in args.models for concept in args.concepts]
        futures = [pool.submit(learn, *of, training) for of in runs]
        bar = track(futures, console=Console(stderr=True))  # beside a table in a file
        ends = [future.result() for future in bar]
    print(f"| model | concept | offset | gain | share of {WEIGHT:g} | proposed |", "|---" * 6 + "|", sep="\n")
    for (model, concept), (gain, offset) in zip(runs, ends, strict=True):
        print(f"| {model} | {concept} | {_cells(gain, offset)} |")
    for model in args.models:
        of_model = [end for (name, _), end in zip(runs, ends, strict=True) if name == model]
        print(f"| {model} | mean | {_cells(*map(statistics.fmean, zip(*of_model, strict=True)))} |")


@one_thread()
def learn(model: str, concept: int, training: Training) -> tuple[float, float]:
    """Gain and offset at the end of one run."""
    pipeline, learned = load_pipeline(PIPELINES[model]), CONCEPTS[concept]
    config = method_config("dreambooth", {"monitor_only": True}, DENOISERS[model])
    with tempfile.TemporaryDirectory() as folder, lora(pipeline, training.rank, seed=0):
        log = Path(folder) / "plain-apt.jsonl"
        pictures = reference_pictures(learned)
        train(pipeline, pictures, learned.captions(), config, training, seed=0, log_path=log)
        logged = read_log(log)
    return logged.gain, logged.offset


def _cells(gain: float, offset: float) -> str:
    proposed = propose_offset_weight(gain, offset)
    return f"{offset:.0f} | {gain:.3f} | {WEIGHT * offset / gain:.2f} | {proposed or float('nan'):.1e}"


if __name__ == "__main__":
    main()
