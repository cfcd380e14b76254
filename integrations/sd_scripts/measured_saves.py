"""Each LoRA that the trainer saves is measured: the drifts of prompts, and the gap on the validation split."""

from __future__ import annotations

import argparse
import contextlib
import functools
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from apt_hooks.config import AptConfig
from apt_hooks.errors import AptError
from apt_hooks.hooks.frozen import frozen_base
from apt_hooks.training.checkpoint_drifts import Drifts, class_prompt
from apt_hooks.training.checkpoints import ENDING, STOPS_ALONE, Checkpoints
from apt_hooks.training.held_out import MOST_PICTURES, HeldOut, held_out_batches
from apt_hooks.training.run import AptRun

from .probe import Prompts, TrainerProbe

HELD_OUT_TIMESTEPS = 10
"""Of each held-out picture; evenly over the trainer's range, or as a transformer's trainer draws them."""

_TOO_EARLY = "a LoRA is saved before the first batch, so nothing was there to measure it with"


class MeasuredSaves:
    """What the trainer's saves are measured with, as it becomes known; from the first batch on a
    `training.checkpoint_drifts.Probe`.

    Attributes:
        prompts: of the drifts; None where these are off.
        unseen: the validation split, a group of data sets; None where there is none.
        probe, compare: what predicts for prompts, and what goes through a batch of the split (at a number of
            `HELD_OUT_TIMESTEPS`) with both models; set at the first batch.
    """

    def __init__(self, config: AptConfig) -> None:
        self._config = config
        self.prompts: Prompts | None = None
        self.unseen: Any = None
        self.probe: TrainerProbe | None = None
        self.compare: Callable[[HeldOut, dict[str, Any], int], None] | None = None
        self._run: AptRun | None = None
        self._network: Any = None

    @property
    def awaits_probe(self) -> bool:
        """Whether drifts are measured, and the first batch has not come yet."""
        return self.prompts is not None and self.probe is None

    def prompts_of_drifts(self, args: argparse.Namespace, trains_text: bool) -> Prompts | None:
        """What encodes the prompts of the drifts; None where these are off."""
        if not self._config.drifts or (trains_text and getattr(args, "cache_text_encoder_outputs", False)):
            self.prompts = None  # of the latter some encoders are trained, and the others gone by then
        elif self.prompts is None:
            self.prompts = Prompts(trained=trains_text, weighted=args.weighted_captions)
        return self.prompts

    def watch(self, run: AptRun, args: argparse.Namespace, accelerator: Any, *, trains_text: bool) -> None:
        """Have the run's checkpoints measured, as far as can be."""
        self._run, config = run, self._config
        prompts = self.prompts_of_drifts(args, trains_text)
        off = "text encoders are trained while outputs of others are cached" if config.drifts else "drifts = false"
        path = Path(args.output_dir or ".") / f"{args.output_name or 'last'}{ENDING}"
        run.watch_checkpoints(
            Checkpoints(
                path if accelerator.is_main_process else None,
                None if prompts is None else Drifts(run.objective.reference, self, class_prompt(config.class_word)),
                off=off,
                held_out=self._held_out(args, accelerator),
                rule=config.stop,
            )
        )
        if config.stop and accelerator.num_processes > 1:
            accelerator.print(f"apt-hooks: {STOPS_ALONE}")

    def _held_out(self, args: argparse.Namespace, accelerator: Any) -> HeldOut | None:
        """What goes through the validation split with both models; None where there is none, or drifts are off."""
        unseen = self.unseen
        if unseen is None or not self._config.drifts:
            return None
        most = getattr(args, "max_validation_steps", None)
        sizes = [getattr(part, "batch_size", 1) for part in getattr(unseen, "datasets", ())]
        chosen = held_out_batches(len(unseen), max(sizes, default=1), most)
        if len(chosen) < len(unseen):
            accelerator.print(
                f"apt-hooks: the held-out gap is of {len(chosen)} of {len(unseen)} batches of the validation split, "
                f"evenly over it: {MOST_PICTURES} pictures at most"
            )

        def compare(held_out: HeldOut) -> None:
            if self.compare is None:
                raise AptError(_TOO_EARLY)
            for index in chosen:
                random.seed(index)
                torch.manual_seed(index)
                batch = send_to_device(unseen[index], accelerator.device)
                for number in range(HELD_OUT_TIMESTEPS):
                    torch.manual_seed(index * HELD_OUT_TIMESTEPS + number)
                    self.compare(held_out, batch, number)

        assert self._run is not None
        return HeldOut(self._run.objective, compare)

    def begin(self, network: Any) -> None:
        """Have the network's own method measure what it saves: the one place that is told the file's name."""
        assert self._run is not None and self._run.checkpoints is not None  # `watch` comes first
        plain, run, checkpoints = network.save_weights, self._run, self._run.checkpoints

        @functools.wraps(plain)
        def save_weights(file: Any, dtype: Any, metadata: dict[str, str] | None, *rest: Any) -> Any:
            with frozen_base([network], contextlib.nullcontext):  # without the LoRA's dropout
                line = run.measure_checkpoint()
            if metadata and "ss_apt_version" in metadata:  # not with `no_metadata`
                metadata = {**metadata, **checkpoints.metadata(line)}
            saved = plain(file, dtype, metadata, *rest)
            checkpoints.saved(line, Path(file))
            return saved

        network.save_weights, self._network = save_weights, network

    def close(self) -> None:
        """Leave the network as it was, and hold on to nothing of the run."""
        if self._network is not None:
            vars(self._network).pop("save_weights", None)
        self._network = self.probe = self.compare = None

    def predict(self, prompts: Sequence[str]) -> Tensor:
        return self._probe.predict(prompts)

    def embed(self, texts: Sequence[str]) -> Tensor | None:
        return self._probe.embed(texts)

    @property
    def _probe(self) -> TrainerProbe:
        if self.probe is None:
            raise AptError(_TOO_EARLY)
        return self.probe
