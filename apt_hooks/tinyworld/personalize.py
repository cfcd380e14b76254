"""Trains a LoRA of one concept on the tiny world's model, by APT or by one of the methods it is compared to."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..config import AptConfig
from ..integrations.peft import adapters_off, unload_adapters
from ..method.augmentation import Placement
from ..tomlread import read_toml
from ..training.held_out import HeldOut
from ..training.objective import AptObjective
from ..training.run import AptRun
from .concepts import Concept
from .denoisers import UNET, Denoiser
from .methods import METHODS, Method
from .model import denoiser_and_module, denoiser_of, encode_images, encode_texts
from .preservation import class_caption, class_pictures, output_preservation_loss
from .render import render
from .saving import Saving

MEASUREMENTS = 15
"""How often delta noise is measured during a training."""


@dataclasses.dataclass(frozen=True)
class Training:
    """What all methods share. AdamW without weight decay, its second beta 0.99; the learning rate is constant.

    The LoRA that comes out is the moving average of the weights, of decay `average`: what the last few batches happened
    to be is then no part of it, which makes runs repeatable. A `rank` of None is fine-tuning (`lora`).
    """

    steps: int = 600
    batch: int = 2
    learning_rate: float = 3e-3
    rank: int | None = 8
    average: float = 0.98


@dataclasses.dataclass
class Trained:
    """What a training leaves beside the LoRA, which stays on the denoiser: delta noise at some steps."""

    config: AptConfig
    steps: list[int]
    delta_noise: list[float]


def method_config(
    name: str, overrides: Mapping[str, Any] = MappingProxyType({}), denoiser: Denoiser = UNET
) -> AptConfig:
    """The preset of the tiny world's model, the method's strengths, the overrides, and over all what makes it."""
    preset = read_toml(Path(__file__).with_name(denoiser.preset))["apt"]
    return AptConfig.from_mapping({**preset, **METHODS[name].strengths, **overrides, **METHODS[name].keys})


def reference_pictures(concept: Concept, seed: int = 0, take: str = "") -> Tensor:
    """The pictures that a person would have of a concept: [pictures, 3, 64, 64], from 0 to 1, one background.

    Another `take` is other pictures before the same one.
    """
    return torch.stack(
        [
            render(scene, random.Random(f"{seed}/{take}{i}"), background_rng=random.Random(f"{seed}"))
            for i, scene in enumerate(concept.scenes())
        ]
    )


@contextlib.contextmanager
def lora(pipeline: Any, rank: int | None, seed: int) -> Iterator[None]:
    """Inside, the denoiser carries a new LoRA; afterwards it is the base model again.

    On the linear layers of attention and feed-forward, as sd-scripts puts it. With a rank of None the factor at the
    input is the identity and is not trained: the other is then any change of the layer's weight, from none on, and to
    train it is to fine-tune that layer, whatever its size.
    """
    from peft import LoraConfig

    denoiser, module = denoiser_and_module(pipeline)
    config = LoraConfig(r=rank or 1, lora_alpha=rank or 1, target_modules=list(denoiser.lora_targets))
    if rank is None:
        ends = tuple(f".{target}" for target in denoiser.lora_targets)
        inputs = {name: m.weight.shape[1] for name, m in module.named_modules() if name.endswith(ends)}
        config.rank_pattern, config.alpha_pattern = dict(inputs), dict(inputs)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module.add_adapter(config, "concept")
    if rank is None:
        for name, parameter in module.named_parameters():
            if "lora_A" in name:
                torch.nn.init.eye_(parameter.requires_grad_(False).flatten(1))
    try:
        yield
    finally:
        unload_adapters(pipeline, module)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """How many threads share a sum shows in its last bit, and in 600 steps that becomes another LoRA."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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
    checkpoints: Mapping[int, Callable[[], None]] = MappingProxyType({}),
    saving: Saving | None = None,
) -> Trained:
    """Train the LoRA that is on the pipeline's denoiser, without class images unless the method asks for them.

    Both models read the same captions: the identifier is a word that means nothing to the base model, which DCO's
    way, the class word in its place, comes to as well.

    Args:
        pipeline: one of the tiny world's, with a LoRA on its denoiser (`lora`).
        references: [pictures, 3, 64, 64], from 0 to 1.
        captions: one a picture.
        config: the keys of the method (`method_config`).
        seed: of everything that is drawn; the same for two methods, the same samples, timesteps and noise.
        log_path: apt-hooks' log of every step.
        advance: called after each step.
        method: what is done beside; to be called inside of its `adapter`.
        checkpoints: by the step, what is called with the LoRA that the training would end with there.
        saving: where and how often that LoRA is saved; the key `stop` then ends the training.
    """
    denoiser, module = denoiser_and_module(pipeline)
    parameters = [p for name, p in module.named_parameters() if "lora_" in name and p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, training.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    average = _Average(parameters, training.average)
    samples = _Samples(pipeline, references, captions, training.batch, seed)
    delta_noise = _DeltaNoise(samples)
    bin_of, off = denoiser.bin_of(config.num_bins), functools.partial(adapters_off, module)
    of_class = _ClassTerms(method, samples, captions, off, seed)
    objective = AptObjective(config, module, off, bin_of=bin_of)
    run = AptRun(objective, log_path=log_path, augment_space="image", seed=seed, trainer="tinyworld")
    trained = Trained(config, [], [])
    try:
        if saving is not None:
            held_out = None
            if saving.held_out is not None and config.drifts:
                unseen = _Samples(pipeline, saving.held_out, captions[:1] * len(saving.held_out), training.batch, seed)
                held_out = HeldOut(objective, _Compared(unseen))
            run.watch_checkpoints(saving.checkpoints(pipeline, run, held_out))
        module.train()
        for step in range(1, training.steps + 1):
            rows, timesteps, noise = samples.draw()
            placement = objective.draw_augmentation(timesteps, generator=run.generator())
            clean = samples.latents(rows, placement)
            target = denoiser.target(clean, noise)
            covered = objective.covered(placement, references.shape[-2:])
            passes = objective.passes(covered=covered)
            passes.run(samples.prediction(rows, clean, timesteps, noise))
            apt = passes.step(target, timesteps, error_scale=denoiser.error_scale(timesteps))
            loss = apt.loss((apt.prediction - target).square().mean(dim=(1, 2, 3)))
            (loss + of_class.loss(rows, clean, timesteps, noise)).backward()
            optimizer.step()
            optimizer.zero_grad()
            average.update(step)
            run.record(apt, placement)
            if step % max(1, training.steps // MEASUREMENTS) == 0 or step in (1, training.steps):
                trained.steps.append(step)
                with average.in_place():
                    trained.delta_noise.append(delta_noise.measure())
            saves = saving is not None and saving.due(step, training.steps)
            if step in checkpoints or saves:
                module.eval()
                with average.in_place():
                    if saves:
                        saving.save(pipeline, run, step, training.steps)  # type: ignore[union-attr]
                    if step in checkpoints:
                        checkpoints[step]()
                module.train()
            advance()
            if run.checkpoints is not None and run.checkpoints.stop is not None:
                break
        average.keep()
    finally:
        module.eval()
        run.close()
    return trained


class _Average:
    """The moving average of parameters over the steps; of few steps, that of these alone, not of where they began."""

    def __init__(self, parameters: Sequence[Tensor], decay: float) -> None:
        self._parameters, self._decay = list(parameters), decay
        self._average = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self._decay, step / (step + 10))
        torch._foreach_lerp_(self._average, self._parameters, 1 - decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the parameters are the average."""
        last = [parameter.detach().clone() for parameter in self._parameters]
        self.keep()
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self._parameters, last)

    @torch.no_grad()
    def keep(self) -> None:
        """The parameters are the average from now on."""
        torch._foreach_copy_(self._parameters, self._average)


class _Samples:
    """The training data: which picture, timestep and noise comes next does not depend on the method."""

    def __init__(self, pipeline: Any, references: Tensor, captions: list[str], batch: int, seed: int) -> None:
        self.pipeline, self.batch = pipeline, batch
        self._denoiser, self._module = denoiser_and_module(pipeline)
        self.pictures = references * 2 - 1
        self._condition = self._denoiser.condition(encode_texts(pipeline, captions))
        # The mean of the posterior, not a sample: one source of noise less, and the same for all methods.
        self.clean = encode_images(pipeline, self.pictures)
        self._stream = torch.Generator().manual_seed(seed)

    def told(self, captions: list[str]) -> _Samples:
        """The same pictures with other captions."""
        other = copy.copy(self)
        other._condition = self._denoiser.condition(encode_texts(self.pipeline, captions))
        return other

    def draw(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of the pictures, timesteps, noise: [batch], [batch], [batch, 4, 16, 16]."""
        rows = torch.randint(len(self.clean), (self.batch,), generator=self._stream)
        timesteps = self._denoiser.draw_timesteps(self.batch, self._stream)
        return rows, timesteps, torch.randn(self.batch, *self.clean.shape[1:], generator=self._stream)

    def latents(self, rows: Tensor, placement: Placement | None = None) -> Tensor:
        """Of these pictures, some of them augmented: [batch, 4, 16, 16]."""
        latents = self.clean[rows]
        if placement is None or not placement.chosen.any():
            return latents
        moved = encode_images(self.pipeline, placement.apply(self.pictures[rows], -1.0))
        return torch.where(placement.chosen[:, None, None, None], moved, latents)

    def prediction(self, rows: Tensor, clean: Tensor, timesteps: Tensor, noise: Tensor) -> Callable[[], Tensor]:
        """What runs the denoiser on these samples."""
        noisy = self._denoiser.add_noise(self.pipeline.training_scheduler, clean, noise, timesteps)
        condition = {name: told[rows] for name, told in self._condition.items()}
        return lambda: self._denoiser.predict(self._module, noisy, timesteps, condition)


class _ClassTerms:
    """What a method adds to a step's loss to keep the class as it was."""

    def __init__(
        self, method: Method, samples: _Samples, captions: list[str], off: Callable[[], Any], seed: int
    ) -> None:
        self._method, self._off, self._denoiser = method, off, denoiser_of(samples.pipeline.components)
        self._told_class = self._prior = None
        if method.output_preservation:
            self._told_class = samples.told([class_caption(caption) for caption in captions])
        if method.prior_preservation:
            # A stream of its own, so that the concept's samples are those of the other methods.
            pictures, prompts = class_pictures(samples.pipeline, captions, off, ~seed & 0xFFFFFFFF)
            self._prior = _Samples(samples.pipeline, pictures, prompts, samples.batch, ~seed & 0xFFFFFFFF)

    def loss(self, *batch: Any) -> Tensor | float:
        """Of the step with this batch of the concept, as `_Samples.prediction` takes it."""
        total: Tensor | float = 0.0
        if self._told_class is not None:
            predict = self._told_class.prediction(*batch)
            total = total + self._method.output_preservation * output_preservation_loss(predict, self._off)
        if self._prior is not None:
            rows, timesteps, noise = self._prior.draw()
            clean = self._prior.latents(rows)
            missed = self._prior.prediction(rows, clean, timesteps, noise)() - self._denoiser.target(clean, noise)
            total = total + self._method.prior_preservation * missed.square().mean()
        return total


class _Compared:
    """Both models on pictures, each at fixed timesteps and noise."""

    def __init__(self, samples: _Samples) -> None:
        denoiser, module = denoiser_and_module(samples.pipeline)
        self._timesteps = torch.arange(50, 1000, 100).repeat_interleave(len(samples.clean))
        rows = torch.arange(len(self._timesteps)) % len(samples.clean)
        clean = samples.latents(rows)
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
        self._target, self._scale = denoiser.target(clean, noise), denoiser.error_scale(self._timesteps)
        self._predict = samples.prediction(rows, clean, self._timesteps, noise)
        with torch.no_grad(), adapters_off(module):
            self._frozen = self._predict()

    def __call__(self, held_out: HeldOut) -> None:
        held_out.add(self._predict(), self._frozen, self._target, self._timesteps, error_scale=self._scale)


class _DeltaNoise:
    """Equation 9 of APT as the mean of squares, on the reference pictures at fixed timesteps and noise."""

    def __init__(self, samples: _Samples) -> None:
        timesteps = torch.arange(50, 1000, 100)
        rows = torch.arange(len(timesteps)) % len(samples.clean)
        noise = torch.randn(len(rows), *samples.clean.shape[1:], generator=torch.Generator().manual_seed(0))
        self._predict = samples.prediction(rows, samples.latents(rows), timesteps, noise)
        with torch.no_grad(), adapters_off(denoiser_and_module(samples.pipeline)[1]):
            self._frozen = self._predict()

    @torch.no_grad()
    def measure(self) -> float:
        return (self._predict() - self._frozen).square().mean().item()
