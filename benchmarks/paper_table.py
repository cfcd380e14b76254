"""The table of the APT paper on a real model: DreamBooth, adaptive training, + stabilization, + alignment (APT).

    python benchmarks/paper_table.py --model stabilityai/stable-diffusion-xl-base-1.0 \
        --script train_dreambooth_lora_sdxl.py --data dreambooth/dataset --out DIR [--smoke] [--subjects dog,can] ...

Each method trains a LoRA of each subject and seed by diffusers' own script, patched; then `apt-hooks eval` scores all
LoRAs of a subject, from the same prompts and noise. There is one process a GPU. The same command goes on where it was
stopped, takes further methods, subjects and seeds in, and makes no run twice. `docs/paper-table.md` says what it needs.

    DIR/SUBJECT/METHOD-SEED/  a run: its [apt], the script's output and checkpoints, the LoRA, run.json
    DIR/SUBJECT/eval/         pictures and scores
    DIR/table.json            settings, versions, devices, and each run's scores and seconds
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import json
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import toml
from paper_table_scores import PAPER, Row, estimate, tables
from processes import Execute, Processes, devices
from step import commit, version
from tinyworld import check_at_least_one, check_listed, names, numbers, tell_failed

from apt_hooks.config import AptConfig
from apt_hooks.errors import AptError, errors_in_one_line
from apt_hooks.files import make_folder, write_atomically
from apt_hooks.integrations.diffusers_dreambooth import patch
from apt_hooks.integrations.diffusers_dreambooth.adapter import WEIGHTS
from apt_hooks.integrations.judging.manifest import digest
from apt_hooks.integrations.sampling.pipelines import TINY_WORLDS, check_model
from apt_hooks.results.comparison.folders import BASE
from apt_hooks.results.read_steplog import read_run
from apt_hooks.tinyworld.methods import METHODS
from apt_hooks.tinyworld.model import PIPELINES
from apt_hooks.tomlread import read_toml

# What a script trains by [apt] alone, and with strengths that are not of the tiny world: APT's is for --apt to give.
CHOICES = [name for name, method in METHODS.items() if not method.beside and (method.keys or name == "apt")]
LIVE = ("cat", "dog")  # classes that DreamBooth's prompts for animals are for; all others are objects
SMOKE_STEPS = 50
PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "apt-hooks", "torch-fidelity")
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]
EVAL = [sys.executable, "-m", "apt_hooks", "eval"]
JUDGED = "judged.json"  # in a subject's `eval`, as soon as its scores are there


def main() -> None:
    with errors_in_one_line():
        run(_arguments())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", help="folder in diffusers' format, name on the hub, or tinyworld, its U-Net")
    parser.add_argument("--script", type=Path, help="a DreamBooth-LoRA script of diffusers for that model")
    parser.add_argument("--data", type=Path, help="DreamBooth's dataset: SUBJECT/*.jpg and prompts_and_classes.txt")
    parser.add_argument("--methods", type=names, default=list(PAPER), help=f"of {', '.join(CHOICES)}")
    parser.add_argument("--subjects", type=names, help="folders of --data; all if not given")
    parser.add_argument("--seeds", type=numbers, default=[0])
    # The paper names no learning rate, rank and steps; these are DCO's (arXiv 2402.12004), which it builds on.
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--mixed-precision", help="bf16 on a GPU, no on the CPU if not given")
    parser.add_argument("--apt", type=Path, help="TOML with an [apt] that all methods begin with")
    parser.add_argument("--identifier", default="sks")
    parser.add_argument("--instance-prompt", default="a photo of a {}", help="{} is identifier and class word")
    parser.add_argument("--script-options", default="", help="more for the script: --script-options='--resolution 768'")
    parser.add_argument("--prompts", help="as for `apt-hooks eval`; DreamBooth's list by the class if not given")
    parser.add_argument("--count", type=int, default=4, help="pictures a prompt")
    parser.add_argument("--eval-options", default="", help="more for `apt-hooks eval`: --eval-options='--batch 4'")
    parser.add_argument("--table-only", action="store_true", help="print the table of DIR/table.json again")
    parser.add_argument("--smoke", action="store_true", help="short runs of one subject, and what all would take")
    args = parser.parse_args()
    for option in () if args.table_only else ("model", "script", "data"):
        if getattr(args, option) is None:
            raise AptError(f"--{option} is needed, but for --table-only")
    check_listed(args, methods=CHOICES)
    check_at_least_one(args, "steps", "rank", "count")
    return args


# What there is to do.


@dataclasses.dataclass(frozen=True)
class Subject:
    """A subject of the dataset: its photos, its class word, and which prompts are drawn of it."""

    name: str
    photos: Path
    class_word: str
    prompts: str


@dataclasses.dataclass(frozen=True)
class Run:
    """A training; its LoRA is there under its own name as soon as it is finished, which is what `eval` calls it."""

    out: Path
    subject: Subject
    method: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}-{self.seed}"

    @property
    def folder(self) -> Path:
        return self.out / self.subject.name / self.name

    @property
    def lora(self) -> Path:
        return self.folder / f"{self.name}.safetensors"


def read_subjects(data: Path, chosen: Sequence[str] | None, prompts: str | None) -> list[Subject]:
    """The chosen subjects of the dataset, or all that have a folder.

    Raises:
        AptError: no list of classes; a chosen subject that is not in it, or has no folder; none at all.
    """
    listed = data / "prompts_and_classes.txt"
    try:
        found = re.findall(r"^(\w+),(\w[\w ]*)$", listed.read_text(encoding="utf-8"), re.MULTILINE)
    except OSError as error:
        raise AptError(f"--data {data}: has no {listed.name} that can be read ({error.strerror})") from error
    classes = {name: word for name, word in found if (data / name).is_dir()}
    for name in chosen or ():
        if name not in classes:
            raise AptError(f"--subjects: {name!r} has no folder in {data}, or no class in {listed.name}")
    if not classes:
        raise AptError(f"--data {data}: none of the subjects of {listed.name} has a folder there")
    return [
        Subject(name, data / name, classes[name], prompts or ("live" if classes[name] in LIVE else "object"))
        for name in chosen or classes
    ]


def run(args: argparse.Namespace) -> None:
    """Make the runs and the scores that are missing, and print the table."""
    if args.table_only:
        print("\n".join(tables(read_json(args.out / "table.json"))))
        return
    check_model(args.model)
    if TINY_WORLDS.get(args.model) == "transformer":
        raise AptError(
            f"--model {args.model}: reads texts in a way of its own, which no script of diffusers trains; "
            "benchmarks/tinyworld.py --model transformer makes the table of that model"
        )
    subjects = read_subjects(args.data, args.subjects, args.prompts)
    keys = read_toml(args.apt).get("apt") if args.apt else {}
    if not isinstance(keys, dict):
        raise AptError(f"--apt {args.apt}: has no section [apt]")
    for method in args.methods:
        AptConfig.from_mapping({**keys, **METHODS[method].keys})
    names = devices()
    asked = {"steps": args.steps, "count": args.count, "subjects": len(subjects), "seeds": len(args.seeds)}
    if args.smoke:
        args.out, args.steps, args.count = args.out / "smoke", SMOKE_STEPS, 1
        args.seeds, subjects = args.seeds[:1], subjects[:1]
    settings = prepare(args, keys, on_cpu="" in names)
    out = args.out.resolve()
    runs = [Run(out, s, method, seed) for s in subjects for seed in args.seeds for method in args.methods]
    processes = Processes(names)
    failed = processes.work({f"{r.subject.name}/{r.name}": functools.partial(train, r, settings) for r in runs})
    options = ["--count", str(args.count), *shlex.split(args.eval_options)]
    judged = {}
    for subject in subjects:
        if loras := [r for r in runs if r.subject == subject and r.lora.exists()]:
            judged[f"{subject.name}/eval"] = functools.partial(evaluate, loras, settings, options)
    failed += processes.work(judged)
    result = collect(settings, options, runs)
    write_json(args.out / "table.json", result)
    print("\n".join(tables(result)))
    tell_failed(failed)
    if args.smoke:
        print("\n".join(["", *estimate(result, **asked, smoke_steps=SMOKE_STEPS, devices=len(names))]))


def prepare(args: argparse.Namespace, keys: Mapping[str, Any], on_cpu: bool) -> Row:
    """Write what all runs share into `--out`: the settings, the patched script, accelerate's set-up.

    Raises:
        AptError: the folder has runs of other settings; the script cannot be read or patched.
    """
    make_folder(args.out)
    shared = ("model", "steps", "learning_rate", "rank", "mixed_precision", "identifier", "instance_prompt")
    settings = {name: getattr(args, name) for name in (*shared, "script_options")}
    settings["mixed_precision"] = args.mixed_precision or ("no" if on_cpu else "bf16")
    settings |= {"script": f"{args.script.stem}_apt.py", "script_sha256": digest(args.script)[:8], "apt": dict(keys)}
    stored = args.out / "settings.json"
    before = read_json(stored) if stored.exists() else settings
    for key, value in settings.items():
        if before.get(key) != value:
            there, here = json.dumps(before.get(key)), json.dumps(value)
            raise AptError(f"--out {args.out}: has runs of other settings, {key} {there}, here {here}; choose another")
    patch.patch(args.script, args.out / settings["script"], force=True)
    # In place of the user's own, which may ask for several processes.
    launch = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "NO", "num_processes": 1, "use_cpu": on_cpu}
    write_json(args.out / "accelerate.json", {**launch, "mixed_precision": settings["mixed_precision"]})
    write_json(stored, settings)
    return settings


def train(run: Run, settings: Row, execute: Execute) -> None:
    """Train a LoRA, from the run's last checkpoint where it has one; leaves it under its name, and `run.json`."""
    if run.lora.exists():
        return
    make_folder(run.folder)
    config, log = run.folder / "apt.toml", run.folder / f"{WEIGHTS}-apt.jsonl"
    config.write_text(toml.dumps({"apt": {**settings["apt"], **METHODS[run.method].keys}}), encoding="utf-8")
    subject = f"{settings['identifier']} {run.subject.class_word}"
    model, steps = settings["model"], settings["steps"]
    options = {
        "pretrained_model_name_or_path": PIPELINES[TINY_WORLDS[model]] if model in TINY_WORLDS else model,
        "instance_data_dir": run.subject.photos,
        "instance_prompt": settings["instance_prompt"].replace("{}", subject),
        "output_dir": run.folder,
        "seed": run.seed,
        "train_batch_size": 1,
        "max_train_steps": steps,
        "learning_rate": settings["learning_rate"],
        "rank": settings["rank"],
        "mixed_precision": settings["mixed_precision"],
        # At a quarter, half, three quarters, and never at the end, behind which some scripts take one step more.
        "checkpointing_steps": steps // 4 + 1,
        "checkpoints_total_limit": 2,  # the one before is deleted before the next is saved
        "resume_from_checkpoint": "latest",
        "apt_config": config,
    }
    command = [*LAUNCH, "--quiet", "--config_file", str(run.out / "accelerate.json"), str(run.out / settings["script"])]
    command += [f"--{name}={value}" for name, value in options.items()] + shlex.split(settings["script_options"])
    resumed_from = max((int(p.name.rpartition("-")[2]) for p in run.folder.glob("checkpoint-*")), default=0)
    try:
        cost = execute(command, run.folder / "output.txt")
    except AptError as error:
        way_out = f"; if checkpoint-{resumed_from} is broken, remove it" if resumed_from else ""
        raise AptError(f"{error}{way_out}") from error
    about = {"resumed_from": resumed_from, "seconds_a_step": seconds_a_step(log), **cost, **environment()}
    write_json(run.folder / "run.json", about)
    # Its scores, if the folder has any, are of another LoRA.
    (run.out / run.subject.name / "eval" / JUDGED).unlink(missing_ok=True)
    (run.folder / f"{WEIGHTS}.safetensors").replace(run.lora)
    for checkpoint in run.folder.glob("checkpoint-*"):  # as large as three LoRAs each
        shutil.rmtree(checkpoint)


def seconds_a_step(log: Path) -> float | None:
    """By the step log: from the end of the first step since the start or the resumption, to that of the last."""
    run = read_run(log)
    if run is None or not (started := run.starts[-1].get("started")):
        return None
    steps = run.total - run.starts[-1].get("resumed_from", 0) - 1
    seconds = run.written.timestamp() - datetime.datetime.fromisoformat(started).timestamp()
    return round(seconds / steps, 4) if steps > 0 else None


def evaluate(runs: Sequence[Run], settings: Row, options: Sequence[str], execute: Execute) -> None:
    """Score the LoRAs of one subject by `apt-hooks eval`, in one folder."""
    out, subject = runs[0].out / runs[0].subject.name / "eval", runs[0].subject
    if all(judgement(r, options) for r in runs):
        return
    make_folder(out)
    command = [*EVAL, "--model", settings["model"], "--out", str(out)]
    command += ["--references", str(subject.photos), "--prompts", subject.prompts, "--class-word", subject.class_word]
    command += ["--subject", f"{settings['identifier']} {subject.class_word}", *options]
    command += [part for r in runs for part in ("--lora", str(r.lora))]
    cost = execute(command, out / "output.txt")
    pictures = {name: len([*(out / name).glob("*.png")]) for name in (BASE, *(r.name for r in runs))}
    asked = {"options": options, "prompts": subject.prompts}
    write_json(out / JUDGED, {**asked, "pictures": pictures, **cost, **environment()})


def judgement(run: Run, options: Sequence[str]) -> Row | None:
    """What is known of the evaluation that has a run's scores; None where there is none with these options."""
    stored = run.out / run.subject.name / "eval" / JUDGED
    known = read_json(stored) if stored.exists() else {"pictures": ()}
    asked = {"options": options, "prompts": run.subject.prompts}
    return known if run.name in known["pictures"] and asked.items() <= known.items() else None


# What came of it.


def collect(settings: Row, options: Sequence[str], runs: Sequence[Run]) -> Row:
    """What `table.json` holds: of each run its scores, of each subject the base model's and what judging cost."""
    rows: list[Row] = []
    metrics: Row = {}
    judged: Row = {}
    for run in runs:
        folder, subject = run.out / run.subject.name / "eval", run.subject.name
        if (about := judgement(run, options)) is None:
            continue
        found = read_json(folder / "metrics.json")
        scores = {name: {m: score["value"] for m, score in of.items()} for name, of in found["scores"].items()}
        if subject not in judged:
            rows.append({"subject": subject, "method": BASE, "seed": 0, "scores": scores[BASE]})
            metrics |= found["metrics"]
            judged[subject] = {**about, "sampling": found["sampling"]}
        row = {"subject": subject, "method": run.method, "seed": run.seed, "scores": scores[run.name]}
        rows.append({**row, **read_json(run.folder / "run.json")})
    return {"settings": settings, "metrics": metrics, "judged": judged, "runs": rows}


@functools.cache
def environment() -> Row:
    """Versions and commit."""
    return {"versions": {package: version(package) for package in PACKAGES}, "commit": commit()}


def read_json(path: Path) -> Row:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise AptError(f"{path}: cannot be read ({error})") from error


def write_json(path: Path, content: Row) -> None:
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit("stopped; the same command goes on where it was"))
    main()
