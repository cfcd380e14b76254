"""A training's checkpoints: LoRAs saved on the way, and a line about each."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..integrations.diffusers_dreambooth.lora_metadata import add_metadata
from ..training.checkpoint_drifts import SAMPLES, Drifts, class_prompt, fixed_noise
from ..training.checkpoints import ENDING, Checkpoints
from ..training.held_out import HeldOut
from ..training.run import AptRun
from .lora_file import save_lora
from .model import denoiser_and_module, encode_texts
from .world import KINDS


@dataclasses.dataclass(frozen=True)
class Saving:
    """What to save: `NAME-step00000100.safetensors` and so on, as sd-scripts calls them, and `NAME.safetensors`.

    Attributes:
        folder, name: where, and how the files begin.
        every: steps between two of them; the last step's is saved in any case.
        kind: the concept's, for the class drift.
        held_out: [pictures, 3, 64, 64], from 0 to 1, of the concept, that are not trained on; None: no held-out gap.
    """

    folder: Path
    name: str
    every: int
    kind: str
    held_out: Tensor | None = None

    def checkpoints(self, pipeline: Any, run: AptRun, held_out: HeldOut | None) -> Checkpoints:
        """Of a run on the pipeline's denoiser; `held_out`: what measures those pictures."""
        config, objective = run.objective.config, run.objective
        # Words of the world alone: others are nothing to its tokenizer.
        others = [kind for kind in KINDS if kind != self.kind][:2]
        neutral = [f"a photo of a {others[0]} at the beach", f"a drawing of a small {others[1]} at night"]
        drifts = Drifts(objective.reference, _Probe(pipeline), class_prompt(self.kind), neutral)
        return Checkpoints(
            self.folder / f"{self.name}{ENDING}",
            drifts if config.drifts else None,
            off="" if config.drifts else "drifts = false",
            held_out=held_out,
            rule=config.stop,
        )

    def due(self, step: int, last: int) -> bool:
        """Whether there is a checkpoint behind this step."""
        return step == last or step % self.every == 0

    def save(self, pipeline: Any, run: AptRun, step: int, last: int) -> None:
        """Measure the LoRA as it is, and save it."""
        assert run.checkpoints is not None
        file = self.folder / (f"{self.name}.safetensors" if step == last else f"{self.name}-step{step:08d}.safetensors")
        line = run.measure_checkpoint()
        save_lora(pipeline, file)
        add_metadata(file, {**run.metadata(), **run.checkpoints.metadata(line)})
        run.checkpoints.saved(line, file)


class _Probe:
    """As `training.checkpoint_drifts.Probe`; the text encoder is never trained."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self._denoiser, self._module = denoiser_and_module(pipeline)
        self._timesteps = (torch.arange(SAMPLES) + 0.5) * 1000 / SAMPLES
        if self._denoiser.bin_of(1) is None:
            self._timesteps = self._timesteps.long()
        shape = (self._module.config.in_channels, self._module.config.sample_size, self._module.config.sample_size)
        # Noise for a picture too: what the LoRA makes of the training's own pictures is no matter of the class.
        clean, noise = fixed_noise(shape), fixed_noise(shape, 1)
        self._noisy = self._denoiser.add_noise(pipeline.training_scheduler, clean, noise, self._timesteps)

    def predict(self, prompts: Sequence[str]) -> Tensor:
        condition = self._denoiser.condition(encode_texts(self._pipeline, list(prompts)))
        return self._denoiser.predict(self._module, self._noisy, self._timesteps, condition)

    def embed(self, texts: Sequence[str]) -> None:
        return None
