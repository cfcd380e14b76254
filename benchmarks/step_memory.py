"""How much memory one training step of LoRA takes, counted without a GPU, and its arithmetic.

    python benchmarks/step_memory.py [--model sdxl,sd21,sd15] [--batch 1,4] [--checkpointing off,nonreentrant,reentrant]
    python benchmarks/step_memory.py --least [--model sdxl]

The steps of `step.py` run on tensors that have sizes and no contents, and every storage that lives is added up; nothing
is computed or allocated. `fused` is counted without its kernels, which allocate nothing themselves. A row each is
appended to --out: the peak, and what of it is above the weights, inputs and LoRA, which were there before; the
floating-point operations of matrix products, convolutions and attention.

As in sd-scripts: U-Net in bfloat16, LoRA in float32, autocast to bfloat16, with CUDA's rules for what stays in float32.
Attention is flash attention, which keeps no map. Not counted: what a kernel allocates for its own use, the allocator's
rounding and fragments, the optimizer's state. PyTorch adds gradients in place where this counts a new tensor.

--least prints what attention alignment and channel statistics cost at the very least, over batch, pixels and tokens.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from step import MACHINE, append_rows, check_rows, machine, mib, print_table
from step_counting import count
from step_least import least
from step_methods import FLOOR, choose_methods, parse_extra
from step_models import CHECKPOINTING, MODELS, UNET, Setting, add_options, check_choice, check_size

from apt_hooks import AptConfig
from apt_hooks.errors import AptError, errors_in_one_line

COLUMNS = ["method", "peak_mib", "above_mib", "peak_to_floor", "above_to_floor", "gflop", "gflop_to_floor"]
COLUMNS += [*Setting._fields, *MACHINE]


def main() -> None:
    with errors_in_one_line():
        run(_arguments())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, several=True)
    parser.set_defaults(model=["sdxl", "sd21", "sd15"], batch=[1, 4], dtype="bfloat16", checkpointing=CHECKPOINTING)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("memory.csv"))
    parser.add_argument("--least", action="store_true", help="count nothing, print what the regularizers need at least")
    parser.add_argument("--smoke", action="store_true", help="one count of a tiny model, to see that it runs")
    args = parser.parse_args()
    if args.smoke:
        args.model, args.px, args.batch, args.checkpointing = ["tiny"], None, [1], ["off"]
    for option, known in {"model": MODELS, "checkpointing": CHECKPOINTING}.items():
        for value in getattr(args, option):
            check_choice(option, value, known)
    for option, multiple in {"px": 64, "batch": 1}.items():
        for value in getattr(args, option) or ():
            check_size(option, value, multiple)
    if args.tokens is not None:
        check_size("tokens", args.tokens)
    if args.least and any(MODELS[model].kind is not UNET for model in args.model):
        raise AptError("--least is written for U-Nets: name those by --model")
    args.extra = {text: parse_extra(text) for text in args.extra}
    if not args.least:
        both = itertools.product(args.model, args.checkpointing)
        args.methods = {one: choose_methods(args.methods, *one, None) for one in both}
        check_rows(args.out, COLUMNS)
    return args


def run(args: argparse.Namespace) -> None:
    """Count every combination of what was asked for, or print the least."""
    places = itertools.product(args.model, args.batch, args.checkpointing)
    if args.least:
        print_least(args)
        return
    for model, batch, checkpointing in places:
        for px in args.px or [MODELS[model].px]:
            tokens = MODELS[model].tokens if args.tokens is None else args.tokens
            setting = Setting(model, px, batch, args.dtype, checkpointing, tokens)
            rows = count_rows(setting, args.methods[model, checkpointing], args.extra)
            append_rows(args.out, COLUMNS, rows)
            print(f"\n{model} {px} px, batch {batch}, {args.dtype}, checkpointing {checkpointing}")
            print_table(rows, COLUMNS[: COLUMNS.index("model")])


def count_rows(setting: Setting, methods: Sequence[str], extras: Mapping[str, AptConfig]) -> list[dict[str, Any]]:
    """A row a method, the floor among them."""
    found = count(setting, methods, extras)
    floor, where, rows = found[FLOOR], setting._asdict() | machine("counted"), []
    for name, own in found.items():
        above, floor_above = own.peak - own.before, floor.peak - floor.before
        figures = {"peak_mib": mib(own.peak), "above_mib": mib(above), "gflop": f"{own.flops / 1e9:.1f}"}
        figures |= {"peak_to_floor": f"{own.peak / floor.peak:.3f}", "above_to_floor": f"{above / floor_above:.3f}"}
        figures["gflop_to_floor"] = f"{own.flops / floor.flops:.4f}"
        rows.append({"method": name, **figures, **where})
    return rows


def print_least(args: argparse.Namespace) -> None:
    """A table a model: batch, pixels and tokens each varied alone, from its usual size."""
    for model in args.model:
        usual = Setting(model, MODELS[model].px, 1, args.dtype, "off", args.tokens or MODELS[model].tokens)
        varied = [usual]
        varied += [usual._replace(batch=batch) for batch in args.batch if batch != usual.batch]
        varied += [usual._replace(px=px) for px in args.px or (512, 768, 1024) if px != usual.px]
        varied += [usual._replace(tokens=times * usual.tokens) for times in (2, 3)]
        rows = []
        for setting in varied:
            row = {"model": model, "batch": setting.batch, "px": setting.px, "tokens": setting.tokens}
            for name, cost in least(setting).items():
                row |= {f"{name}_mib": mib(cost.read_and_written), f"{name}_gflop": f"{cost.flops / 1e9:.2f}"}
            rows.append(row)
        print_table(rows, list(rows[0]))
        print()


if __name__ == "__main__":
    main()
