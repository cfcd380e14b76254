"""Each LoRA that a script saves is measured, has a line about it, and carries it in its metadata."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from apt_hooks.errors import errors_in_one_line
from apt_hooks.training.checkpoint_drifts import Drifts, class_prompt
from apt_hooks.training.checkpoints import ENDING, STOPPED, STOPS_ALONE, Checkpoints
from apt_hooks.training.run import AptRun

from .lora_metadata import add_metadata
from .probe import StepProbe
from .probe_prompts import ProbePrompts

logger = logging.getLogger("apt_hooks")

WEIGHTS = "pytorch_lora_weights"
"""The name under which diffusers saves a LoRA."""


class MeasuredSaves:
    """Watches a run's `checkpoint-N` folders and the LoRA that is saved behind its loop.

    Args:
        run: the run.
        args: the script's.
        accelerator: the script's; it tells of each checkpoint.
        denoiser: what the LoRA is on.
        schedule: what adds the noise; None: it is mixed in.
        prompts: what encodes prompts, for the drifts; None: nothing does.
        trains_text: whether text encoders are trained.
        textless: a step encodes no text.
    """

    def __init__(
        self,
        run: AptRun,
        args: argparse.Namespace,
        accelerator: Any,
        denoiser: nn.Module,
        schedule: Any,
        prompts: ProbePrompts | None,
        *,
        trains_text: bool,
        textless: bool,
    ) -> None:
        self._run, self._accelerator = run, accelerator
        self._line: dict[str, Any] | None = None  # the last checkpoint's
        self._sees_saves = False
        config, off, drifts = run.objective.config, "", None
        self._probe: StepProbe | None = None
        if prompts is not None:
            prompts.begin()
        if not config.drifts or prompts is None:
            off = "drifts = false" if not config.drifts else "the script was patched without them; patch it again"
        elif prompts.refused:
            off = prompts.refused
        elif textless and not prompts.encoded:
            off = "the script has no lines that encode text, so that other prompts are not to be had"
        else:
            self._probe = StepProbe(denoiser, schedule, prompts, trained=trains_text, wrapped=accelerator._models)
            drifts = Drifts(run.objective.reference, self._probe, class_prompt(config.class_word))
        path = Path(args.output_dir or ".") / f"{WEIGHTS}{ENDING}"
        self._checkpoints = Checkpoints(
            path if accelerator.is_main_process else None, drifts, off=off, rule=config.stop
        )
        run.watch_checkpoints(self._checkpoints)
        if config.stop and accelerator.num_processes > 1:
            accelerator.print(f"apt-hooks: {STOPS_ALONE}")

    @property
    def stops(self) -> bool:
        """Whether the training is to end here, by the key `stop`."""
        return self._accelerator.num_processes == 1 and self._checkpoints.stop is not None

    def begin_step(self, again: Callable[[], Any], timesteps: Tensor, latents: Tensor) -> None:
        """As `DreamBoothRun.begin_step`."""
        if self._probe is not None:
            self._probe.begin_step(again, timesteps, latents)

    def count_from(self, folder: str | Path) -> None:
        """The run goes on from this folder: scripts take their step from its name, and so does the log where it holds
        no state of APT's."""
        number = Path(folder).name.rpartition("checkpoint-")[2]
        if not self._run.step and number.isdecimal():
            self._run.step = int(number)
            self._checkpoints.resumed(self._run.step)

    def see(self) -> None:
        """From here on checkpoints are measured.

        Not before the loop: behind the script's own hook, which has saved the LoRA by then, wherever it registers that.
        """
        if not self._sees_saves:
            self._accelerator.register_save_state_pre_hook(lambda models, weights, folder: self._save(folder))
            self._sees_saves = True

    def add_metadata(self, folder: str | Path) -> None:
        """Write what is known of the run into the metadata of the LoRAs in a folder, and the last one's line."""
        if not self._accelerator.is_main_process:
            return
        best = f"{WEIGHTS}-best.safetensors"  # an earlier one, with a line of its own
        paths = sorted(path for path in Path(folder).glob(f"{WEIGHTS}*.safetensors") if path.name != best)
        line = {} if self._line is None else self._checkpoints.metadata(self._line)
        for path in paths:
            add_metadata(path, {**self._run.metadata(), **line})
        if not paths:
            logger.warning(
                "apt-hooks: no %s*.safetensors in %s yet, so no metadata in it, and no line about it",
                WEIGHTS,
                folder,
            )
        own = Path(folder) / f"{WEIGHTS}.safetensors"
        if self._line is not None and own in paths:
            self._checkpoints.saved(self._line, own)

    def finish(self) -> None:
        """The loop is over: measure the LoRA that is saved behind it."""
        self._measure()
        if self.stops:
            logger.info(STOPPED, self._checkpoints.stop)

    def close(self) -> None:
        """Take the probe's hook off; may be called again."""
        if self._probe is not None:
            self._probe.close()

    def _measure(self) -> None:
        """The line of the LoRA as it is, once a step."""
        if self._line is None or self._line["step"] != self._run.step:
            self._line = self._run.measure_checkpoint()

    def _save(self, folder: str | Path) -> None:
        with errors_in_one_line():
            if (Path(folder) / f"{WEIGHTS}.safetensors").exists():
                self._measure()
            self.add_metadata(folder)
