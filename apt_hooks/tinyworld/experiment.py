"""Methods on one concept: each trains a LoRA, draws the prompts with it, and is judged by what it draws."""

from __future__ import annotations

import concurrent.futures
import concurrent.futures.process
import contextlib
import dataclasses
import functools
import multiprocessing
import os
import pickle
import queue
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..errors import AptError
from .attention import attention_of_words
from .concepts import CONCEPTS, IDENTIFIER
from .evaluate import Examination, Judgement
from .judge_networks import load_judges
from .methods import METHODS
from .model import PIPELINES, denoiser_and_module, load_pipeline
from .personalize import Trained, Training, lora, method_config, one_thread, reference_pictures, train
from .saving import Saving

SAVE_EVERY = 200
"""Steps between two LoRAs that are saved on the way."""

UNTRAINED = ("ideal", "base")
"""What methods are to be seen beside: the scenes drawn by code, and the model as it was pretrained."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all methods of a comparison share.

    Args:
        concept: its number.
        seed: of everything; the same seed gives the same LoRAs on machines of a kind, however many their cores.
        model: one of `PIPELINES`.
        training: steps, learning rate and so on.
        scenes, repeats: prompts that are judged, and pictures of each.
    """

    concept: int
    seed: int = 0
    model: str = "unet"
    training: Training = dataclasses.field(default_factory=Training)
    scenes: int = 24
    repeats: int = 3

    @one_thread()
    def examination(self, base: Tensor | None = None) -> Examination:
        """With a pipeline of its own; `base` is another one's, whose making takes as long as a method's pictures."""
        concept = CONCEPTS[self.concept]
        return Examination(
            load_pipeline(PIPELINES[self.model]),
            load_judges(),
            concept,
            reference_pictures(concept),
            scenes=self.scenes,
            repeats=self.repeats,
            seed=self.seed,
            base=base,
        )


@dataclasses.dataclass
class Result:
    """One method's pictures and scores; `trained` is None for what needs no training, `attention` for "ideal".

    `checkpoints` has what earlier steps of the training were judged by.
    """

    judgement: Judgement
    trained: Trained | None
    attention: Tensor | None
    checkpoints: dict[int, Judgement] = dataclasses.field(default_factory=dict)

    def metrics(self) -> dict[str, float]:
        """What `metrics.json` holds of it."""
        delta_noise = self.trained.delta_noise[-1] if self.trained else 0.0
        return {
            **{name: round(x, 5) for name, x in self.judgement.scores.items()},
            "delta_noise": round(delta_noise, 7),
        }


@one_thread()
def run_method(
    name: str,
    examination: Examination,
    setting: Setting,
    *,
    out: Path | None = None,
    overrides: Mapping[str, Any] = MappingProxyType({}),
    advance: Callable[[], None] = lambda: None,
    checkpoints: Sequence[int] = (),
) -> Result:
    """Train by one method, let it draw the prompts, and judge that; the pipeline is then the base model again.

    Also at the steps of `checkpoints`. `examination` is of the setting. Where there is a folder `out`, LoRAs are saved
    in it on the way, and a line about each.
    """
    pipeline, training, seed = examination.pipeline, setting.training, setting.seed
    judged: dict[int, Judgement] = {}

    def examine(identifier: str | None, trained: Trained | None) -> Result:
        judgement = examination.judge(identifier)
        # The base model reads the identifier too, so that all methods' maps are of the same words.
        maps = attention_of_words(pipeline, examination.prompts()[0], judgement.pictures[0])
        return Result(judgement, trained, maps, judged)

    def judge(step: int) -> None:
        judged[step] = examination.judge()

    if name == "ideal":
        return Result(examination.ideal(), None, None)
    if name == "base":
        return examine(None, None)
    method = METHODS[name]
    denoiser, module = denoiser_and_module(pipeline)
    config = method_config(name, overrides, denoiser)
    saving = None
    if out and not method.masks_rank:  # no LoRA file says that ranks are masked
        saving = Saving(out, name, SAVE_EVERY, examination.concept.subject.kind)
    with lora(pipeline, training.rank, seed), method.adapter(module, seed):
        log = out / f"{name}-apt.jsonl" if out else None
        captions = examination.concept.captions()
        trained = train(
            pipeline,
            examination.references,
            captions,
            config,
            training,
            seed=seed,
            log_path=log,
            advance=advance,
            method=method,
            checkpoints={step: functools.partial(judge, step) for step in checkpoints},
            saving=saving,
        )
        return examine(IDENTIFIER, trained)


def run_methods(
    names: Sequence[str],
    examination: Examination,
    setting: Setting,
    *,
    out: Path,
    workers: int | None = None,
    advance: Callable[[], None] = lambda: None,
) -> Iterator[tuple[str, Result]]:
    """`run_method` of each, side by side in processes of one thread each; as they come.

    Args:
        names: of `METHODS` and `UNTRAINED`.
        examination: of the setting.
        workers: processes; None takes one a core, and one runs them here.
        advance: called after each step of any training.

    Raises:
        AptError: a process was ended from outside, as for want of memory.
    """
    workers = min(workers or _cores(), len(names))
    if workers == 1:
        for name in names:
            yield name, run_method(name, examination, setting, out=out, advance=advance)
        return
    # Not forked: a process cannot use the threads that its parent's torch has started.
    context = multiprocessing.get_context("spawn")
    steps, before = context.Queue(), multiprocessing.active_children()
    with concurrent.futures.ProcessPoolExecutor(
        workers, context, initializer=_begin, initargs=(setting, examination.base.numpy(), steps)
    ) as pool:
        order = sorted(names, key=lambda name: name in UNTRAINED)  # trainings first, which take longest
        with _left_alone_by_ctrl_c():
            waiting = {pool.submit(_run_in_worker, name, out): name for name in order}
        try:
            while waiting:
                done, _ = concurrent.futures.wait(waiting, 0.2, concurrent.futures.FIRST_COMPLETED)
                for _ in _drained(steps):
                    advance()
                for future in done:
                    yield waiting.pop(future), pickle.loads(future.result())
        except BaseException as error:
            # The pool would wait for what is being trained.
            for process in multiprocessing.active_children():
                if process not in before:
                    process.terminate()
            if isinstance(error, concurrent.futures.process.BrokenProcessPool):
                raise AptError(
                    "a training was ended from outside, perhaps for want of memory; `--workers 1` takes least"
                ) from error
            raise


def _cores() -> int:
    """Those that this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def _left_alone_by_ctrl_c() -> Iterator[None]:
    """Processes that are started inside ignore it, and with it the traceback each would print: this one ends them."""
    if threading.current_thread() is not threading.main_thread():
        yield  # where signals cannot be set
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _drained(steps: Any) -> Iterator[None]:
    while True:
        try:
            yield steps.get_nowait()
        except queue.Empty:
            return


_worker: tuple[Examination, Setting, Any]


def _begin(setting: Setting, base: Any, steps: Any) -> None:
    global _worker
    torch.set_num_threads(1)
    steps.cancel_join_thread()  # steps that nobody counts any more do not keep the process
    _worker = setting.examination(torch.from_numpy(base)), setting, steps


def _run_in_worker(name: str, out: Path) -> bytes:
    """The result, pickled here: the pool would put its tensors into shared memory, of which containers have little."""
    examination, setting, steps = _worker
    return pickle.dumps(run_method(name, examination, setting, out=out, advance=lambda: steps.put(None)))
