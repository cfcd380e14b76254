"""What one training step of LoRA costs: plain, with the frozen model's pass (the floor of APT), and APT in many ways.

    python benchmarks/step.py --model sdxl --batch 1 --dtype bfloat16 --device cuda --rounds 30 \
        --extra frozen_every=2 --extra 'lambda_attn=0 blocks=[1]'

A step is a forward and a backward pass of a U-Net with the model's published configuration, random weights and LoRA of
rank 16 (`step_models.py`); no optimizer. In every round each method (`step_methods.py`) is timed once, and the next
round begins with another of them. A row each is appended to --out: median, 20th and 80th percentile of the times in
ms, and of their ratios to the floor's of the same round; on a GPU the peak memory, in all and above what was there
before the step. `step_memory.py` counts the memory of the same steps without a GPU.
"""

from __future__ import annotations

import argparse
import csv
import gc
import importlib.metadata
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from step_methods import FLOOR, Method, choose_methods, make_methods, parse_extra
from step_models import CHECKPOINTING, MODELS, Setting, Training, add_options, check_choice, check_size, make_denoiser

from apt_hooks.errors import AptError, errors_in_one_line

WARM_UP = 2  # rounds that are not reported: kernels are chosen and built, memory is taken from the driver
MACHINE = ["device", "threads", "torch", "diffusers", "triton", "commit"]
COLUMNS = ["method", "ms", "ms_p20", "ms_p80", "to_floor", "to_floor_p20", "to_floor_p80"]
COLUMNS += ["peak_mib", "peak_above_mib", "peak_to_floor", *Setting._fields, "rounds", *MACHINE]

Row = dict[str, Any]


def main() -> None:
    with errors_in_one_line():
        run(_arguments())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, several=False)
    parser.set_defaults(model="reduced", batch=1, dtype="float32", checkpointing="off")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results.csv"))
    parser.add_argument("--smoke", action="store_true", help="one round of a tiny model, to see that it runs")
    args = parser.parse_args()
    if args.smoke:
        args.model, args.px, args.rounds = "tiny", None, 1
    check_choice("model", args.model, MODELS)
    check_choice("checkpointing", args.checkpointing, CHECKPOINTING)
    args.px = MODELS[args.model].px if args.px is None else args.px
    args.tokens = MODELS[args.model].tokens if args.tokens is None else args.tokens
    check_size("px", args.px, multiple=64)
    for option in ("batch", "tokens", "rounds"):
        check_size(option, getattr(args, option))
    args.device = find_device(args.device)
    args.methods = choose_methods(args.methods, args.model, args.checkpointing, args.device)
    args.extra = {text: parse_extra(text) for text in args.extra}
    check_rows(args.out, COLUMNS)
    return args


def run(args: argparse.Namespace) -> None:
    """Time the methods, append a row for each, and print them."""
    setting = Setting(**{name: getattr(args, name) for name in Setting._fields})
    training = Training.make(make_denoiser(setting, args.device), setting)
    methods = make_methods(args.methods, args.extra, training)
    measured = measure(methods, args.rounds, args.device, training.drop_gradients)
    where = {**setting._asdict(), "rounds": args.rounds, **machine(args.device)}
    rows = [{"method": name, **figures, **where} for name, figures in summarize(measured).items()]
    append_rows(args.out, COLUMNS, rows)
    print_table(rows, COLUMNS[: COLUMNS.index("model")])


class Timing(NamedTuple):
    """Of a method in one round: seconds of a step; on a GPU the peak memory, and that above what was there before."""

    seconds: float
    peak: int
    above: int


def measure(
    methods: Mapping[str, Method], rounds: int, device: torch.device, drop_gradients: Callable[[], None]
) -> dict[str, list[Timing]]:
    """Run all methods in every round, each round beginning with another; the first rounds are left out.

    A method that does not fit into the memory has no timings.
    """
    measured: dict[str, list[Timing]] = {name: [] for name in methods}
    fitting = list(methods)
    for number in range(-min(WARM_UP, rounds), rounds):
        turn = number % len(fitting)
        for name in [*fitting[turn:], *fitting[:turn]]:
            try:
                timing = _timed(methods[name], device, drop_gradients)
            except torch.cuda.OutOfMemoryError:
                timing = None
            drop_gradients()
            if timing is None:
                if name == FLOOR:
                    raise AptError(f"{device} has not the memory for the floor: take a smaller --batch or --px")
                fitting.remove(name)
                measured[name].clear()
                gc.collect()
                torch.cuda.empty_cache()
            elif number >= 0:
                measured[name].append(timing)
    return measured


def _timed(method: Method, device: torch.device, drop_gradients: Callable[[], None]) -> Timing:
    cuda, before, peak = device.type == "cuda", 0, 0
    with method.prepared():
        if cuda:
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
        start = time.perf_counter()
        for number in range(method.period):
            if number:
                drop_gradients()
            method.step()
        if cuda:
            torch.cuda.synchronize(device)
            peak = torch.cuda.max_memory_allocated(device)
        return Timing((time.perf_counter() - start) / method.period, peak, peak - before)


def summarize(measured: Mapping[str, Sequence[Timing]]) -> dict[str, Row]:
    """The figures of a row for each method; ratios are of times of the same round."""
    floor = measured[FLOOR]
    floor_peak = max(timing.peak for timing in floor)
    found: dict[str, Row] = {}
    for name, own in measured.items():
        if not own:
            found[name] = {"ms": "out of memory"}
            continue
        ratios = [a.seconds / b.seconds for a, b in zip(own, floor, strict=True)]
        found[name] = {f"ms{at}": f"{1000 * x:.1f}" for at, x in percentiles([t.seconds for t in own]).items()}
        found[name] |= {f"to_floor{at}": f"{x:.4f}" for at, x in percentiles(ratios).items()}
        if floor_peak:
            peak = max(timing.peak for timing in own)
            found[name] |= {"peak_mib": mib(peak), "peak_above_mib": mib(max(timing.above for timing in own))}
            found[name]["peak_to_floor"] = f"{peak / floor_peak:.3f}"
    return found


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """The median, and the values at the 20th and the 80th percentile, by the names that columns have for them."""
    ordered, last = sorted(values), len(values) - 1
    return {"": statistics.median(ordered), "_p20": ordered[round(0.2 * last)], "_p80": ordered[round(0.8 * last)]}


def mib(count: float) -> str:
    return f"{count / 2**20:.1f}"


def find_device(name: str) -> torch.device:
    """Raises AptError where there is no such device."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        why = (str(error).splitlines() or ["unknown"])[0]
        raise AptError(f"--device {name} cannot be used here: {why}") from error
    return device


def machine(device: torch.device | str) -> Row:
    """What a row says of where it was made; a `device` that is text is taken as it is."""
    name = device if isinstance(device, str) else device_name(device)
    versions = {"torch": torch.__version__, "diffusers": version("diffusers"), "triton": version("triton")}
    return {"device": name, "threads": torch.get_num_threads(), **versions, "commit": commit()}


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {torch.get_num_threads()} threads"


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def commit() -> str:
    """That of the checkout, with a + where its code is not as committed; the version where there is no checkout."""

    def git(*arguments: str) -> str:
        folder = Path(__file__).parents[1]
        return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout

    try:
        code = ("*.py", "*.toml", "*.safetensors")
        changed = git("status", "--porcelain", "--untracked-files=all", "--", *code)
        return git("rev-parse", "--short", "HEAD").strip() + "+" * bool(changed)
    except (OSError, subprocess.CalledProcessError):
        return version("apt-hooks")


def check_rows(path: Path, columns: Sequence[str]) -> None:
    """Raises AptError where rows of these columns cannot be appended."""
    try:
        with path.open("a+", newline="", encoding="utf-8") as file:
            file.seek(0)
            found = next(csv.reader(file), None)
    except OSError as error:
        raise AptError(f"--out {path}: cannot be written: {error.strerror}") from error
    if found is not None and found != list(columns):
        raise AptError(f"--out {path} has other columns than this benchmark's: name another file, or move it away")


def append_rows(path: Path, columns: Sequence[str], rows: Iterable[Row]) -> None:
    """Append rows to a CSV file; a new one gets its header."""
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        if file.tell() == 0:
            writer.writeheader()
        writer.writerows(rows)


def print_table(rows: Sequence[Row], columns: Sequence[str]) -> None:
    """The columns that are not empty, aligned."""
    columns = [name for name in columns if any(row.get(name, "") != "" for row in rows)]
    cells = [columns, *([str(row.get(name, "")) for name in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        padded = [f"{cell:>{width}}" for cell, width in zip(line[1:], widths[1:], strict=True)]
        print("  ".join([f"{line[0]:{widths[0]}}", *padded]))


if __name__ == "__main__":
    main()
