"""Trains a LoRA of one concept on the tiny world's model, by APT or by one of the methods it is compared to."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..config import AptConfig, read_toml
from ..files import write_atomically
from ..integrations.peft import adapters_off, unload_adapters
from ..method.augmentation import Placement
from ..training.objective import AptObjective
from ..training.run import AptRun
from .concepts import Concept
from .methods import METHODS, Method
from .model import encode_images, encode_texts
from .preservation import class_caption, class_pictures, output_preservation_loss
from .render import render

MEASUREMENTS = 15
"""How often delta noise is measured during a training."""


@dataclasses.dataclass(frozen=True)
class Training:
    """What all methods share. AdamW without weight decay; the learning rate is constant."""

    steps: int = 300
    batch: int = 2
    learning_rate: float = 5e-3
    rank: int = 8


@dataclasses.dataclass
class Trained:
    """What a training leaves beside the LoRA, which stays on the U-Net: delta noise at some steps."""

    config: AptConfig
    steps: list[int]
    delta_noise: list[float]


def method_config(name: str, overrides: Mapping[str, Any] = MappingProxyType({})) -> AptConfig:
    """The tiny world's preset, the overrides, and over both what makes the method."""
    preset = read_toml(Path(__file__).with_name("preset.toml"))["apt"]
    return AptConfig.from_mapping({**preset, **overrides, **METHODS[name].keys})


def reference_pictures(concept: Concept, seed: int = 0) -> Tensor:
    """The pictures that a person would have of a concept: [pictures, 3, 64, 64], from 0 to 1, one background."""
    return torch.stack(
        [
            render(scene, random.Random(f"{seed}/{i}"), background_rng=random.Random(f"{seed}"))
            for i, scene in enumerate(concept.scenes())
        ]
    )


@contextlib.contextmanager
def lora(pipeline: Any, rank: int, seed: int) -> Iterator[None]:
    """Inside, the U-Net carries a new LoRA on its attention projections; afterwards it is the base model again."""
    from peft import LoraConfig

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline.unet.add_adapter(
            LoraConfig(r=rank, lora_alpha=rank, target_modules=["to_q", "to_k", "to_v", "to_out.0"]), "concept"
        )
    try:
        yield
    finally:
        unload_adapters(pipeline, pipeline.unet)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """How many threads share a sum shows in its last bit, and in 300 steps that becomes another LoRA."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@_one_thread()
def train(
    pipeline: Any,
    references: Tensor,
    captions: list[str],
    config: AptConfig,
    training: Training,
    *,
    seed: int,
    log_path: Path | None = None,
    advance: Callable[[], None] = lambda: None,
    method: Method = METHODS["apt"],
) -> Trained:
    """Train the LoRA that is on `pipeline.unet`, as the paper does, without class images if the method asks for none.

    Both models read the same captions: the identifier is a word that means nothing to the base model, which DCO's
    way, the class word in its place, comes to as well.

    Args:
        pipeline: the tiny world's, with a LoRA on its U-Net (`lora`).
        references: [pictures, 3, 64, 64], from 0 to 1.
        captions: one a picture.
        config: the keys of the method (`method_config`).
        seed: of everything that is drawn; the same for two methods, the same samples, timesteps and noise.
        log_path: apt-hooks' log of every step.
        advance: called after each step.
        method: what is done beside; to be called inside of its `adapter`.
    """
    unet = pipeline.unet
    parameters = [parameter for name, parameter in unet.named_parameters() if "lora_" in name]
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, training.learning_rate, weight_decay=0.0)
    samples = _Samples(pipeline, references, captions, training.batch, seed)
    delta_noise = _DeltaNoise(samples)
    off = functools.partial(adapters_off, unet)
    beside = _Beside(method, samples, captions, off, seed)
    objective = AptObjective(config, unet, off)
    run = AptRun(objective, log_path=log_path, augment_space="image", seed=seed, trainer="tinyworld")
    trained = Trained(config, [], [])
    unet.train()
    try:
        for step in range(1, training.steps + 1):
            rows, timesteps, noise = samples.draw()
            placement = objective.draw_augmentation(timesteps, generator=run.generator())
            predict = samples.prediction(rows, timesteps, noise, placement)
            covered = objective.covered(placement, references.shape[-2:])
            passes = objective.passes(covered=covered)
            passes.run(predict)
            apt = passes.step(noise, timesteps)
            loss = apt.loss((apt.prediction - noise).square().mean(dim=(1, 2, 3)))
            (loss + beside.loss(rows, timesteps, noise, placement)).backward()
            optimizer.step()
            optimizer.zero_grad()
            run.record(apt, placement)
            if step % max(1, training.steps // MEASUREMENTS) == 0 or step in (1, training.steps):
                trained.steps.append(step)
                trained.delta_noise.append(delta_noise.measure())
            advance()
    finally:
        unet.eval()
        run.close()
    return trained


class _Samples:
    """The training data: which picture, timestep and noise comes next does not depend on the method."""

    def __init__(self, pipeline: Any, references: Tensor, captions: list[str], batch: int, seed: int) -> None:
        self.pipeline, self.batch = pipeline, batch
        self.pictures, self.texts = references * 2 - 1, encode_texts(pipeline, captions)
        # The mean of the posterior, not a sample: one source of noise less, and the same for all methods.
        self.clean = encode_images(pipeline, self.pictures)
        self._stream = torch.Generator().manual_seed(seed)

    def told(self, captions: list[str]) -> _Samples:
        """The same pictures with other captions."""
        other = copy.copy(self)
        other.texts = encode_texts(self.pipeline, captions)
        return other

    def draw(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of the pictures, timesteps, noise: [batch], [batch], [batch, 4, 16, 16]."""
        rows = torch.randint(len(self.clean), (self.batch,), generator=self._stream)
        timesteps = torch.randint(1000, (self.batch,), generator=self._stream)
        return rows, timesteps, torch.randn(self.batch, *self.clean.shape[1:], generator=self._stream)

    def prediction(
        self, rows: Tensor, timesteps: Tensor, noise: Tensor, placement: Placement | None = None
    ) -> Callable[[], Tensor]:
        """What runs the U-Net on these samples, some of them augmented."""
        latents = self.clean[rows]
        if placement is not None and placement.chosen.any():
            moved = encode_images(self.pipeline, placement.apply(self.pictures[rows], -1.0))
            latents = torch.where(placement.chosen[:, None, None, None], moved, latents)
        noisy = self.pipeline.training_scheduler.add_noise(latents, noise, timesteps)
        return lambda: self.pipeline.unet(noisy, timesteps, self.texts[rows]).sample


class _Beside:
    """What a method adds to a step's loss: terms of the class, that need batches of their own."""

    def __init__(
        self, method: Method, samples: _Samples, captions: list[str], off: Callable[[], Any], seed: int
    ) -> None:
        self._method, self._off = method, off
        self._told_class = self._prior = None
        if method.output_preservation:
            self._told_class = samples.told([class_caption(caption) for caption in captions])
        if method.prior_preservation:
            # A stream of its own, so that the concept's samples are those of the other methods.
            pictures, prompts = class_pictures(samples.pipeline, captions, off, seed)
            self._prior = _Samples(samples.pipeline, pictures, prompts, samples.batch, ~seed & 0xFFFFFFFF)

    def loss(self, *batch: Any) -> Tensor | float:
        """Of the step with this batch of the concept, as `_Samples.prediction` takes it."""
        total: Tensor | float = 0.0
        if self._told_class is not None:
            predict = self._told_class.prediction(*batch)
            total = total + self._method.output_preservation * output_preservation_loss(predict, self._off)
        if self._prior is not None:
            rows, timesteps, noise = self._prior.draw()
            prediction = self._prior.prediction(rows, timesteps, noise)()
            total = total + self._method.prior_preservation * (prediction - noise).square().mean()
        return total


class _DeltaNoise:
    """Equation 9 of APT as the mean of squares, on the reference pictures at fixed timesteps and noise."""

    def __init__(self, samples: _Samples) -> None:
        timesteps = torch.arange(50, 1000, 100)
        rows = torch.arange(len(timesteps)) % len(samples.clean)
        noise = torch.randn(len(rows), *samples.clean.shape[1:], generator=torch.Generator().manual_seed(0))
        self._predict = samples.prediction(rows, timesteps, noise)
        with torch.no_grad(), adapters_off(samples.pipeline.unet):
            self._frozen = self._predict()

    @torch.no_grad()
    def measure(self) -> float:
        return (self._predict() - self._frozen).square().mean().item()


def save_lora(pipeline: Any, path: Path) -> None:
    """Write the LoRA that is on the U-Net, for diffusers' `load_lora_weights`.

    Raises:
        AptError: the file cannot be written.
    """
    from peft.utils import get_peft_model_state_dict

    layers = get_peft_model_state_dict(pipeline.unet, adapter_name="concept")
    with tempfile.TemporaryDirectory() as folder:
        pipeline.save_lora_weights(folder, unet_lora_layers=layers, weight_name=path.name)
        write_atomically(path, Path(folder, path.name).read_bytes())
