"""DreamBlend on the tiny world: does a blend keep the prompt of an early checkpoint and the subject of a late one?

    python benchmarks/dreamblend.py --out DIR [--concepts 4,5,6,7] [--seeds 0,1,2] [--late 150,300,600] ...

For each concept and seed a LoRA is trained, its checkpoints are kept in DIR, and each of them is judged alone and, as
the late one, together with the early one in three ways: blended, and by two that cost nothing: interpolated weights,
and the early one for the first denoising steps, then the late one. Step 0 is the base model: weights between that and a
checkpoint are the checkpoint at a lower strength. The attention shift of each (`apt-hooks maps
--collapse`) is measured. As soon as something is measured, a line of JSON is appended to DIR/runs.jsonl, and it is not
measured again. Then means and paired differences are printed, and the means drawn in the plane of text and identity
score.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import statistics
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tinyworld import (  # the benchmark beside this one
    Scores,
    acting,
    add_run_options,
    append_line,
    cell,
    check_at_least_one,
    check_listed,
    differences,
    failures,
    means_of_groups,
    numbers,
    read_rows,
    tell_failed,
)

from apt_hooks.errors import AptError, errors_in_one_line
from apt_hooks.integrations.sampling.collapse import attention_collapse
from apt_hooks.integrations.sampling.denoising_steps import denoising_steps
from apt_hooks.integrations.sampling.dreamblend import DreamBlend
from apt_hooks.integrations.sampling.loras import Loras
from apt_hooks.results.pareto_front import front
from apt_hooks.results.pictures import draw_plane
from apt_hooks.tinyworld.concepts import CONCEPTS
from apt_hooks.tinyworld.denoisers import UNET
from apt_hooks.tinyworld.evaluate import Examination
from apt_hooks.tinyworld.judge_networks import load_judges
from apt_hooks.tinyworld.lora_file import save_lora
from apt_hooks.tinyworld.methods import METHODS
from apt_hooks.tinyworld.model import load_pipeline
from apt_hooks.tinyworld.personalize import Training, lora, method_config, reference_pictures, train

OPTIONS = {"num_inference_steps": UNET.sampling_steps, "guidance_scale": UNET.guidance, "output_type": "pt"}

BLEND = "blend"
DIFFERING = ("text", "identity")

Row = dict[str, Any]
Point = tuple[int | None, int, str]
"""The early checkpoint's step, or None, the late one's, and how they are brought together."""


def main() -> None:
    with errors_in_one_line():
        run(_arguments())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_options(parser)
    parser.add_argument("--concepts", type=numbers, default=[4, 5, 6, 7])
    parser.add_argument("--seeds", type=numbers, default=[0, 1, 2])
    parser.add_argument("--method", default="dreambooth", help="one that differs in keys of [apt] alone")
    parser.add_argument("--checkpoints", type=numbers, default=[5, 10, 20, 40, 80, 150, 300, 600])
    parser.add_argument("--learning-rate", type=float, default=Training.learning_rate)
    parser.add_argument("--fine-tune", action="store_true", help="the layers' weights themselves, in place of a LoRA")
    parser.add_argument("--early", type=int, default=10)
    parser.add_argument("--late", type=numbers, default=[150, 300, 600])
    parser.add_argument("--guidance-lr", type=float, default=1.0)
    parser.add_argument("--interpolate", type=shares, default=[0.5], help="shares of the late one's weights")
    parser.add_argument("--switch-at", type=numbers, default=[3], help="denoising steps, of 10, before the late one")
    parser.add_argument("--scenes", type=int, default=24, help="prompts, a picture each")
    parser.add_argument("--smoke", action="store_true", help="one small run, to see that it works")
    args = parser.parse_args()
    if args.smoke:
        args.concepts, args.seeds, args.checkpoints, args.early, args.late, args.scenes = [4], [0], [1, 2], 1, [2], 5
    check_listed(args, concepts=range(len(CONCEPTS)), late=args.checkpoints)
    check_at_least_one(args, "scenes", "workers")
    by_keys = [name for name, method in METHODS.items() if not method.beside]
    if args.early not in args.checkpoints or args.method not in by_keys:
        raise AptError(f"--early is one of --checkpoints, --method of {', '.join(by_keys)}")
    return args


def shares(text: str) -> list[float]:
    return list(dict.fromkeys(float(number) for number in text.split(",")))


def run(args: argparse.Namespace) -> None:
    """Measure what is missing, and show the means."""
    places = [(concept, seed) for concept in args.concepts for seed in args.seeds]
    failed = []
    if not args.table_only:
        args.out.mkdir(parents=True, exist_ok=True)
        with concurrent.futures.ProcessPoolExecutor(args.workers) as pool:
            failed = failures({pool.submit(measure, args, *one): "concept {}, seed {}".format(*one) for one in places})
    asked = [wanted for concept, seed in places for wanted in settings(args, concept, seed)]
    rows = [row for row in read_rows(args.out / "runs.jsonl") if any(w.items() <= row.items() for w in asked)]
    points = by_point(rows)
    print_table(points)
    if points:
        print_differences(points)
        draw(args.out / "dreamblend.png", points)
    tell_failed(failed)


def settings(args: argparse.Namespace, concept: int, seed: int) -> list[Row]:
    """What is to be measured of one training: each checkpoint alone, and the blends."""
    shared = {"concept": concept, "seed": seed, "method": args.method, "scenes": args.scenes, "training": made_by(args)}
    alone = [{**shared, "early": None, "late": step} for step in args.checkpoints]
    both = [{**shared, "early": args.early, "late": step} for step in args.late if step != args.early]
    ways: list[Row] = [{"guidance_lr": args.guidance_lr}]
    ways += [{"interpolate": share} for share in args.interpolate] + [{"switch_at": step} for step in args.switch_at]
    weaker = [
        {**shared, "early": 0, "late": step, "interpolate": share} for step in args.late for share in args.interpolate
    ]
    return alone + weaker + [{**pair, **way} for pair in both for way in ways]


def training_of(args: argparse.Namespace) -> Training:
    rank = None if args.fine_tune else Training.rank
    return Training(steps=max(args.checkpoints), learning_rate=args.learning_rate, rank=rank)


def made_by(args: argparse.Namespace) -> str:
    """What the LoRAs depend on beside concept, seed and method, short: their files and rows are of no other setting."""
    about = [dataclasses.asdict(training_of(args)), acting(method_config(args.method))]
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:8]


def way_of(row: Row) -> str:
    """How the two checkpoints of a row are brought together."""
    if "interpolate" in row:
        return f"weights, {row['interpolate']:g} of the late"
    return f"late from step {row['switch_at']}" if "switch_at" in row else BLEND


def measure(args: argparse.Namespace, concept: int, seed: int) -> None:
    """All of one concept and seed, in a process of its own."""
    from step import commit  # the benchmark beside this one

    torch.set_num_threads(1)
    log = args.out / "runs.jsonl"
    done = read_rows(log)
    missing = [wanted for wanted in settings(args, concept, seed) if not any(wanted.items() <= r.items() for r in done)]
    if not missing:
        return
    pipeline, references = load_pipeline(), reference_pictures(CONCEPTS[concept])
    files = checkpoints(args, pipeline, concept, seed)
    examination = Examination(
        pipeline, load_judges(), CONCEPTS[concept], references, scenes=args.scenes, repeats=1, seed=seed
    )
    prompts, seeds = examination.prompts(), [1000 * seed + i for i in range(args.scenes)]
    generators = [torch.Generator() for _ in seeds]

    def draw() -> torch.Tensor:
        for generator, own in zip(generators, seeds, strict=True):
            generator.manual_seed(own)
        images: torch.Tensor = pipeline(prompts, generator=generators, **OPTIONS).images
        return images

    alone = {str(w["late"]): files[w["late"]] for w in missing if w["early"] is None}
    shifts = attention_collapse(pipeline, alone, draw) if alone else {}
    for wanted in missing:
        late = wanted["late"]
        early = late if wanted["early"] is None else wanted["early"]
        if "interpolate" in wanted:
            with tempfile.TemporaryDirectory() as folder:
                mixed = interpolated(files.get(early), files[late], wanted["interpolate"], Path(folder))
                with Loras(pipeline, {"mixed": mixed}) as loras, loras.active("mixed"):
                    pictures = draw()
        elif "switch_at" in wanted:
            with Loras(pipeline, {"early": files[early], "late": files[late]}) as loras:
                first = range(wanted["switch_at"])
                around = lambda step, _batch: loras.active("early" if step in first else "late")  # noqa: E731, B023
                with denoising_steps(pipeline, around=around):
                    pictures = draw()
        else:
            with DreamBlend(pipeline, files[early], files[late], guidance_lr=args.guidance_lr) as blend:
                recording = blend.early(prompts, seeds, **OPTIONS)
                pictures = recording.images if wanted["early"] is None else blend.blend(recording).images
        row = {**wanted, **examination.score(pictures.clamp(0, 1)).scores, "commit": commit()}
        if wanted["early"] is None:
            row["attention_shift"] = shifts[str(late)]
        append_line(log, json.dumps(row))


def checkpoints(args: argparse.Namespace, pipeline: Any, concept: int, seed: int) -> dict[int, Path]:
    """The LoRAs of one training, made where one is missing."""
    folder = args.out / f"{args.method}-{concept}-{seed}-{made_by(args)}"
    files = {step: folder / f"{step}.safetensors" for step in args.checkpoints}
    if all(path.exists() for path in files.values()):
        return files
    folder.mkdir(exist_ok=True)
    training = training_of(args)
    config, references = method_config(args.method), reference_pictures(CONCEPTS[concept])
    keep = {step: functools.partial(save_lora, pipeline, path) for step, path in files.items()}
    with lora(pipeline, training.rank, seed):
        train(pipeline, references, CONCEPTS[concept].captions(), config, training, seed=seed, checkpoints=keep)
    return files


def interpolated(early: Path | None, late: Path, share: float, folder: Path) -> Path:
    """A LoRA whose changes of weights are `(1 - share)` times the early one's, None: none, and `share` times the late
    one's."""
    other = load_file(late)
    one = {key: tensor[:0] if ".lora_A" in key else tensor[:, :0] for key, tensor in other.items()}
    if early is not None:
        one = load_file(early)
    mixed = {}
    for key in one:
        if ".lora_A" in key:
            mixed[key] = torch.cat([one[key], other[key]])
        else:
            mixed[key] = torch.cat([(1 - share) * one[key], share * other[key]], dim=1)
    save_file(mixed, folder / "mixed.safetensors")
    return folder / "mixed.safetensors"


def by_point(rows: Iterable[Row]) -> dict[Point, Scores]:
    """The scores of each concept and seed, those of single checkpoints first."""
    found: dict[Point, Scores] = {}
    for row in rows:
        found.setdefault((row["early"], row["late"], way_of(row)), {})[row["concept"], row["seed"]] = row
    return dict(sorted(found.items(), key=lambda item: (item[0][0] is not None, item[0][2], item[0][1])))


def print_table(points: Mapping[Point, Scores]) -> None:
    """Means of the concepts, each that of its seeds: runs of one concept are not independent."""
    columns = {"text": ".3f", "identity": ".3f", "frechet": ".0f", "attention_shift": ".3f"}
    print("| checkpoint | " + " | ".join(columns) + " |\n" + "|---" * (len(columns) + 1) + "|")
    for point, scores in points.items():
        cells = [
            cell(means_of_groups(scores, name), style) if all(name in row for row in scores.values()) else ""
            for name, style in columns.items()
        ]
        print(f"| {told(point)} | " + " | ".join(cells) + " |")


def print_differences(points: Mapping[Point, Scores]) -> None:
    """Each late checkpoint less each before it; what two make, less the late one alone and less the one whose mean text
    is nearest, of the single checkpoints' front; a blend less all of that front, and less what the late one makes by
    the ways that cost nothing."""
    singles = [point for point in points if point[0] is None]
    two = [point for point in points if point[0] is not None]
    lates = [one for one in singles if one[1] in {late for _, late, _ in two}]
    pairs = [(late, earlier) for late in lates for earlier in singles if earlier[1] < late[1]]
    at = {point: _plane(scores) for point, scores in points.items()}
    ahead = [point for point, better in front({one: at[one] for one in singles}).items() if better is None]
    for point in two:
        late, others = point[1], []
        beside = [min(ahead, key=lambda one: abs(at[one][1] - at[point][1]))] if ahead else []
        if point[2] == BLEND:
            beside, others = ahead, [one for one in two if one[1] == late and one[2] != BLEND]
        alone = [one for one in singles if one[1] == late or one in beside]
        pairs += [(point, one) for one in alone + others]
    print("\nPaired by concept and seed:\n\n| checkpoint | less | runs | text | identity |\n|---|---|---|---|---|")
    for point, other in pairs:
        paired = differences(points[point], points[other], DIFFERING)
        cells = [cell(means_of_groups(paired, name), ".3f", "+") for name in DIFFERING]
        print(f"| {told(point)} | {told(other)} | {len(paired)} | " + " | ".join(cells) + " |")


def _plane(scores: Scores) -> tuple[float, float]:
    """Mean identity and text, as `draw_plane` has them."""
    identity, text = (statistics.fmean(means_of_groups(scores, name)) for name in ("identity", "text"))
    return identity, text


def told(point: Point) -> str:
    early, late, way = point
    return str(late) if early is None else f"{early} + {late}, {way}"


def draw(path: Path, points: Mapping[Point, Scores]) -> None:
    at = {point: _plane(scores) for point, scores in points.items()}
    singles = {str(late): xy for (early, late, _), xy in at.items() if early is None}
    blends: dict[str, dict[tuple[str, str], tuple[float, float]]] = {}
    for (early, late, way), xy in at.items():
        if early is not None:
            blends.setdefault(way, {})[str(early), str(late)] = xy
    draw_plane(path, singles, blends, ("subject: identity score", "prompt: text score"))


if __name__ == "__main__":
    main()
