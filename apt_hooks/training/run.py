"""A training run's side of APT, the same for every trainer: start-up line, log, trackers, metadata."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import logging
import platform
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import AptError
from ..method.augmentation import Placement
from ..method.error_units import FLOW, check_target
from .checkpoint_drifts import Drifts
from .checkpoints import Checkpoints
from .held_out import HeldOut
from .objective import AptObjective
from .step import AptStep
from .steplog import VALUES, StepLog

logger = logging.getLogger("apt_hooks")


class AptRun:
    """What a trainer's adapter needs around an `AptObjective`.

    Args:
        objective: the run's objective.
        log_path: the jsonl file, one line an optimizer step; None writes none (ranks other than the first).
        augment_space: "image" or "latent", decided.
        seed, rank: where the augmentation's own random stream starts; the trainer's stream is not touched.
        trainer: its name and version, for the log.
        target: what the model predicts, one of `error_units.TARGETS` or `error_units.FLOW`, unless `indicator_space` is
            "target".

    Raises:
        AptError: `indicator_space` is not "target", and errors of this target cannot be told as errors of epsilon.
    """

    def __init__(
        self,
        objective: AptObjective,
        *,
        log_path: Path | None,
        augment_space: str,
        seed: int = 0,
        rank: int = 0,
        trainer: str = "",
        target: str = "epsilon",
    ) -> None:
        if objective.config.indicator_space != "target":
            check_target(target)
        self.objective = objective
        self.target = target
        self.augment_space = augment_space
        self.step = 0
        self.log = StepLog(log_path, self._about(trainer))
        self.checkpoints: Checkpoints | None = None
        self._checkpoint: dict[str, Any] = {}  # the last one's line, until the trackers have it
        self.resumed = False
        self._begun_at: int | None = None  # the step behind which this process's first one stands
        self._stream = f"{seed}/{rank}"

    @property
    def indicator_units(self) -> str:
        """The target whose errors gamma and gap are made of: "epsilon", or `target`."""
        return self.target if self.objective.config.indicator_space == "target" else "epsilon"

    def start_line(self) -> str:
        """One line that says what is on.

        Raises:
            AptError: the key `stop` is given to a trainer whose adapter does not measure checkpoints.
        """
        if self.objective.config.stop is not None and self.checkpoints is None:
            raise AptError(
                "[apt] stop needs an adapter that measures checkpoints, and this trainer's does not: it would "
                "pass over it; leave it out"
            )
        config, capture = self.objective.config, self.objective.capture
        overrides = ", ".join(f"{key} = {json.dumps(value)}" for key, value in config.overrides().items())
        ignored = ", ".join(f"{key} = {json.dumps(value)}" for key, value in config.ignored.items())
        offset = "weights' offset" if config.measures_offset else ""
        if offset and not config.monitor_only:
            offset += f" (L2-SP) times {config.offset_weight:g}"
        regularizers = offset or "no regularizers"
        if capture is not None:
            blocks = f"{capture.layout.noun} {', '.join(map(str, capture.layout.blocks))}"
            regularizers = (
                f"{blocks}: {len(capture.layers)} cross-attention layers, {len(capture.hidden)} hidden states"
            )
            if config.regularizer == "joint":
                regularizers = f"{blocks}: {len(capture.hidden)} outputs of cross-attention"
            regularizers += f", {offset}" if offset else ""
        parts = [
            f"apt-hooks {version()} {'monitors only' if config.monitor_only else 'is on'}",
            f"preset {config.preset_name}" + (", the model's" if config.preset_is_the_models else "")
            if config.preset_name
            else "no preset",
            f"overrides {overrides}" if overrides else "no overrides",
            regularizers,
            f"augmentation of {self.augment_space}s" if self.objective.augments else "no augmentation",
            *([f'objective "{config.objective}" ignores {ignored}'] if ignored else []),
            *([self.checkpoints.in_words()] if self.checkpoints is not None else []),
            f"log {self.log.path}" if self.log.path else "no log",
        ]
        if self.indicator_units != self.target:
            what = "flow matching" if self.target == FLOW else f"the model predicts {self.target}"
            parts.insert(-1, f"gamma in {self.indicator_units} units ({what})")
        return " | ".join(parts)

    def generator(self) -> torch.Generator:
        """The random stream of the batch to come: the same for a resumed run, and independent of the trainer's."""
        # Hashed: of a longer seed, torch's CPU generator would take the low 32 bits only.
        return torch.Generator().manual_seed(zlib.crc32(f"{self._stream}/{self.objective.steps}".encode()))

    def has_dropout(self, dropout: Mapping[str, float]) -> None:
        """Say that the LoRA is trained with dropout, and have the log say so; to be called before the first step ends.

        Args:
            dropout: probabilities by what they are of, without those of 0.
        """
        if dropout:
            self.log.add_about("dropout", dict(dropout))
            if self.log.path is not None:
                logger.warning(
                    "apt-hooks: the LoRA has dropout (%s): its loss is measured with it, that of the frozen pass "
                    "without, so gap and gamma are smaller; fit indicator_scale to a run with this dropout "
                    "(apt-hooks calibrate)",
                    ", ".join(f"{name} = {p:g}" for name, p in dropout.items()),
                )

    def record(self, step: AptStep, placement: Placement | None = None, *, ends_step: bool = True) -> None:
        """Take in one batch; under gradient accumulation the batches up to `ends_step` make one step."""
        self.log.add(step, 0 if placement is None else int(placement.chosen.sum()))
        if ends_step:
            if self._begun_at is None:
                self._begun_at = self.step
            self.step += 1
            self.log.end_step(self.step)

    def watch_checkpoints(self, checkpoints: Checkpoints) -> None:
        """Have each saved LoRA measured; the adapter then calls `measure_checkpoint` and `Checkpoints.saved`."""
        self.checkpoints, self.log.then = checkpoints, checkpoints.took

    def measure_checkpoint(self) -> dict[str, Any]:
        """The line of the LoRA as it is, for `Checkpoints.saved` and `Checkpoints.metadata`."""
        assert self.checkpoints is not None  # `watch_checkpoints` comes first
        self.log.flush()
        indicator = self.objective.indicator
        self._checkpoint = self.checkpoints.measure(self.step, indicator.gammas.tolist(), indicator.gaps.tolist())
        return self._checkpoint

    def trainer_counts(self, number: int) -> None:
        """What the trainer itself calls the step that was just recorded; the first one's is what counts.

        A trainer that begins with a later step than the first is followed. One that counts from 1 again after a state
        was loaded is not: the log goes on behind the state's step, and says which of the trainer's steps that was.
        """
        if self.step - 1 != self._begun_at:
            return
        self._begun_at = -2  # asked once
        if self.step == 1 and not self.resumed:
            self.step = number
        if number != self.step:
            logger.info(
                "apt-hooks: the trainer calls %d what is step %d of the LoRA and of the log, also in the names of its "
                "files and sample pictures",
                number,
                self.step,
            )
        self.log.trainer_counts(self.step, number - 1)

    def tracker_values(self) -> dict[str, float]:
        """The last step's values as `apt/...` scalars; bins are `apt/gamma/0` and so on.

        Of a checkpoint that was saved since the last call, what was measured is among them, by its line's names.
        """
        line = self.log.latest()
        if line is None:
            return {}
        scalars = {f"apt/{name}": line[name] for name in VALUES if line[name] is not None}
        scalars |= {f"apt/gamma/{b}": gamma for b, gamma in enumerate(line["gamma"])}
        saved, self._checkpoint = self._checkpoint, {}
        held_out = {b: gap for b, gap in enumerate(saved.get(HeldOut.NAME) or []) if gap is not None}
        if held_out:
            scalars[f"apt/{HeldOut.NAME}"] = sum(held_out.values()) / len(held_out)
            scalars |= {f"apt/{HeldOut.NAME}/{b}": gap for b, gap in held_out.items()}
        return scalars | {f"apt/{name}": saved[name] for name in Drifts.NAMES if saved.get(name) is not None}

    def metadata(self) -> dict[str, str]:
        """What a saved LoRA should carry, as text: `ss_apt_version`, `ss_apt_config` and so on."""
        return {
            "ss_apt_version": version(),
            "ss_apt_preset": self.objective.config.preset_name or "",
            "ss_apt_config": json.dumps(self._config()),
            "ss_apt_augment_space": self.augment_space,
            "ss_apt_indicator_units": self.indicator_units,
            "ss_apt_steps": str(self.step),
            "ss_apt_gamma": json.dumps([round(g, 6) for g in self.objective.indicator.gammas.tolist()]),
        }

    def _config(self) -> dict[str, Any]:
        config = dataclasses.asdict(self.objective.config)
        if self.objective.config.measures_offset:
            config["lambda_offset"] = self.objective.config.offset_weight  # also where it was left open
        return {key: value for key, value in config.items() if key != "preset_name" and value is not None}

    def _about(self, trainer: str) -> dict[str, Any]:
        """What the log says of the run as a whole."""
        return {
            "apt_hooks": version(),
            "preset": self.objective.config.preset_name,
            "config": self._config(),
            "overrides": self.objective.config.overrides(),
            "augment_space": self.augment_space,
            "indicator_units": self.indicator_units,
            "trainer": trainer,
            "torch": torch.__version__,
            "python": platform.python_version(),
        }

    def close(self) -> None:
        """Write what is left of the log and take the hooks off."""
        try:
            self.log.flush()
        finally:
            self.objective.close()


def version() -> str:
    """The installed version of apt-hooks."""
    return importlib.metadata.version("apt-hooks")
