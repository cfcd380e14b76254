"""What a training step of each method takes on the tiny world: its passes, and its time as a multiple of DreamBooth's.

    python benchmarks/step_rivals.py [--methods dreambooth,apt,...] [--steps 600]

All methods are trained as `rivals.py` trains them, without any frozen pass that is for the log alone, each in a thread
of its own, and after a step of one comes a step of another, so that whatever else the machine does falls on all. The
passes are counted at the denoiser. The times are those of blocks of steps, the ratios those of the same block, mean and
standard error; steps in which the benchmark itself measures something are left out. No pictures are drawn, but for the
class pictures of prior preservation, which are no part of a step.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import dataclasses
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from step import machine, print_table  # the benchmarks beside this one
from tinyworld import REFERENCE, cell, check_at_least_one, check_listed, names

from apt_hooks.errors import AptError, errors_in_one_line
from apt_hooks.tinyworld.concepts import CONCEPTS, REPORTED
from apt_hooks.tinyworld.methods import METHODS
from apt_hooks.tinyworld.model import denoiser_and_module, load_pipeline
from apt_hooks.tinyworld.personalize import (
    MEASUREMENTS,
    Training,
    lora,
    method_config,
    one_thread,
    reference_pictures,
    train,
)

FROZEN_FOR_THE_LOG = ("dreambooth", "l2-sp")
"""Objectives whose loss takes nothing from the frozen pass."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", type=names, default=list(METHODS))
    parser.add_argument("--steps", type=int, default=Training.steps)
    parser.add_argument("--block", type=int, default=20, help="steps whose times are added up")
    args = parser.parse_args()
    with errors_in_one_line():
        check_listed(args, methods=METHODS)
        check_at_least_one(args, "block")
        if args.steps < 2 * MEASUREMENTS:
            raise AptError(
                f"--steps must be at least {2 * MEASUREMENTS}, so that not all are measured; found {args.steps}"
            )
        timed = measure(list(dict.fromkeys([REFERENCE, *args.methods])), args.steps)
        print_table(summarize(timed, args.block), ["method", "passes", "ms", "ratio", "blocks"])
        with one_thread():
            print(", ".join(f"{name} {value}" for name, value in machine(torch.device("cpu")).items() if value))


@dataclasses.dataclass
class Step:
    """Of one training: seconds, and passes of the denoiser with gradients and without."""

    seconds: float = 0.0
    with_gradients: int = 0
    without: int = 0


class Turns:
    """Lets threads run in turn, one at a time, each until it gives its turn away; every round in another order, so that
    none always runs behind the same other."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names, self._round, self._over = list(names), list[str](), False
        self._changed, self._random = threading.Condition(), random.Random(0)
        with self._changed:
            self._next()

    def _next(self) -> None:
        """The last of the round is the one whose turn it is."""
        if not self._round:
            self._round = self._random.sample(self._names, len(self._names))
        self._changed.notify_all()

    @contextlib.contextmanager
    def taking_part(self, name: str) -> Iterator[Callable[[], None]]:
        """Inside, this thread has its turns; what is yielded gives one away, and comes back with the next."""

        def wait() -> None:
            self._changed.wait_for(lambda: self._over or self._round[-1] == name)
            if self._over:
                raise concurrent.futures.CancelledError

        def give_away() -> None:
            with self._changed:
                self._round.pop()
                self._next()
                wait()

        with self._changed:
            wait()
        try:
            yield give_away
        finally:
            with self._changed:
                self._names.remove(name)
                if name in self._round:
                    self._round.remove(name)
                self._next()

    def end(self) -> None:
        """No thread has another turn."""
        with self._changed:
            self._over = True
            self._changed.notify_all()


def measure(methods: Sequence[str], steps: int) -> dict[str, list[Step]]:
    """Train all of them, step by step in turn; of each the steps in which nothing was measured beside."""
    turns = Turns(methods)
    with concurrent.futures.ThreadPoolExecutor(len(methods)) as pool:
        futures = {name: pool.submit(train_in_turn, name, steps, turns) for name in methods}
        try:
            for done in concurrent.futures.as_completed(futures.values()):
                done.result()
        except BaseException:
            turns.end()
            raise
    return {name: future.result() for name, future in futures.items()}


@one_thread()
def train_in_turn(name: str, steps: int, turns: Turns) -> list[Step]:
    """One method's training of `steps`, in a thread."""
    timed: list[Step] = []
    with turns.taking_part(name) as give_away:
        pipeline, concept, method = load_pipeline(), CONCEPTS[REPORTED[0]], METHODS[name]
        _, module = denoiser_and_module(pipeline)
        config = method_config(name)
        if config.objective in FROZEN_FOR_THE_LOG:
            config = dataclasses.replace(config, frozen_every=steps)  # in the first alone
        current, start = Step(), 0.0

        def count(*_: object) -> None:
            if torch.is_grad_enabled():
                current.with_gradients += 1
            else:
                current.without += 1

        def advance() -> None:
            nonlocal current, start
            current.seconds = time.perf_counter() - start
            timed.append(current)
            give_away()
            current, start = Step(), time.perf_counter()

        with lora(pipeline, Training.rank, seed=0), method.adapter(module, seed=0):
            counting = module.register_forward_pre_hook(count)
            try:
                trained = train(
                    pipeline,
                    reference_pictures(concept),
                    concept.captions(),
                    config,
                    Training(steps=steps),
                    seed=0,
                    advance=advance,
                    method=method,
                )
            finally:
                counting.remove()
    beside = set(trained.steps)  # the first one's among them, which holds the set-up
    return [step for number, step in enumerate(timed, 1) if number not in beside]


def summarize(timed: dict[str, list[Step]], block: int) -> list[dict[str, str]]:
    """A row for each method: passes of a step, median time of a block's step, the blocks' mean ratio and its error."""
    blocks = {name: _means_of_blocks([step.seconds for step in steps], block) for name, steps in timed.items()}
    rows = []
    for name, steps in timed.items():
        ratios = [own / other for own, other in zip(blocks[name], blocks[REFERENCE], strict=True)]
        milliseconds = f"{1000 * statistics.median(blocks[name]):.0f}"
        told = {"ms": milliseconds, "ratio": cell(ratios, ".2f"), "blocks": str(len(ratios))}
        rows.append({"method": name, "passes": _passes(steps), **told})
    return rows


def _passes(steps: Sequence[Step]) -> str:
    """With gradients + without, of most steps."""
    found = collections.Counter((step.with_gradients, step.without) for step in steps)
    return " + ".join(map(str, found.most_common(1)[0][0]))


def _means_of_blocks(values: Sequence[float], block: int) -> list[float]:
    """Of so many after one another; what is left over belongs to the last."""
    starts = range(0, max(1, len(values) - block + 1), block)
    return [statistics.fmean(values[at : at + block if at != starts[-1] else None]) for at in starts]


if __name__ == "__main__":
    main()
