"""The tiny world's denoisers, and all in which they differ: how noise is added, what is learned, how they are called.

`UNET` reads the text by cross-attention and predicts the noise, as Stable Diffusion's does; `TRANSFORMER` attends to
text and picture jointly and predicts the velocity of flow matching, as Stable Diffusion 3's does.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import AptError
from ..method.error_units import flow_error_scale
from ..method.indicator import sigma_bins

LATENT_CHANNELS = 4
LATENT_SIZE = 16
TEXT_WIDTH = 128
MAX_WEIGHT = 30.0
"""Bound of the weight of the U-Net's loss; it acts from timestep 812 on."""


@dataclasses.dataclass(frozen=True)
class Noised:
    """Latents on their way to noise, and what a denoiser learns from them.

    `latents` and the `target` of the prediction are [batch, 4, 16, 16]; `timesteps`, from 0 to 1000, and the `weight`
    of the squared error are [batch].
    """

    latents: Tensor
    timesteps: Tensor
    target: Tensor
    weight: Tensor


class Denoiser(ABC):
    """One of the two kinds; the module itself is a part of a pipeline, by the name of `part`."""

    part: ClassVar[str]
    title: ClassVar[str]
    classes: ClassVar[dict[str, str]]
    """The module's and its scheduler's, in diffusers, by the part's name."""
    remarks: ClassVar[tuple[str, ...]] = ()
    """What its card says of it."""
    sampler: ClassVar[str]
    guidance: ClassVar[float]
    sampling_steps: ClassVar[int]
    training_steps: ClassVar[int]
    learning_rate: ClassVar[float]
    """At its peak."""
    endless: ClassVar[bool]
    """Whether the learning rate knows no last step; see `fit`."""
    zoomed_out_below: ClassVar[int]
    """Timestep below which alone pretraining shows pictures that are zoomed out on black: the model can then denoise
    such a picture, and draws none by itself."""

    settings: ClassVar[dict[str, Any]] = {}
    """What else a checkpoint of its training depends on."""
    lora_targets: ClassVar[tuple[str, ...]]
    """The linear layers of its attention and feed-forward blocks, which a LoRA is put on."""
    preset: ClassVar[str]
    """File of the `[apt]` section that its LoRAs are trained with."""

    @abstractmethod
    def new(self) -> Any:
        """The module with random weights."""

    @abstractmethod
    def new_scheduler(self) -> Any:
        """As it is stored with the weights."""

    def noised(self, scheduler: Any, clean: Tensor, noise: Tensor, early: Tensor, g: torch.Generator) -> Noised:
        """Noise added to latents for pretraining, at timesteps that are drawn here.

        Args:
            scheduler: of `new_scheduler`.
            clean, noise: [batch, 4, 16, 16].
            early: [batch], whose timesteps are to be below `zoomed_out_below`.
        """
        timesteps = self.draw_timesteps(len(clean), g)
        below = (timesteps * self.zoomed_out_below / 1000).to(timesteps.dtype)
        timesteps = torch.where(early, below, timesteps).to(clean.device)
        noisy = self.add_noise(scheduler, clean, noise, timesteps)
        return Noised(noisy, timesteps, self.target(clean, noise), self.weight(scheduler, timesteps))

    @abstractmethod
    def draw_timesteps(self, count: int, g: torch.Generator) -> Tensor:
        """[count], from 0 to 1000, as both pretraining and a LoRA's training draw them."""

    @abstractmethod
    def add_noise(self, scheduler: Any, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The latents at the timesteps, [batch, 4, 16, 16]."""

    @abstractmethod
    def target(self, clean: Tensor, noise: Tensor) -> Tensor:
        """What is to be predicted, [batch, 4, 16, 16]."""

    def weight(self, scheduler: Any, timesteps: Tensor) -> Tensor:
        """Of pretraining's squared errors: [batch]."""
        return torch.ones(len(timesteps), device=timesteps.device)

    def bin_of(self, num_bins: int) -> Callable[[Tensor], Tensor] | None:
        """As `OverfittingIndicator` takes it."""
        return None

    def error_scale(self, timesteps: Tensor) -> Tensor | None:
        """As `AptObjective.step` takes it."""
        return None

    @abstractmethod
    def condition(self, text: Tensor, g: torch.Generator | None = None) -> dict[str, Tensor]:
        """What the module is told of texts, [batch, tokens, TEXT_WIDTH].

        With a generator, as pretraining has it, some of it may be left out at random.
        """

    @abstractmethod
    def predict(self, module: Any, latents: Tensor, timesteps: Tensor, condition: dict[str, Tensor]) -> Tensor:
        """The module's prediction of the target, [batch, 4, 16, 16]."""

    @abstractmethod
    def pipeline(self, parts: dict[str, Any], encode: Callable[[Any, list[str]], Tensor]) -> Any:
        """Diffusers' pipeline of the parts; `encode` makes [texts, tokens, TEXT_WIDTH] of the pipeline and texts."""

    @abstractmethod
    def sampling_scheduler(self, scheduler: Any) -> Any:
        """What samples with the noise schedule of the stored scheduler."""


class UNet(Denoiser):
    part = "unet"
    title = "U-Net"
    classes: ClassVar[dict[str, str]] = {"unet": "UNet2DConditionModel", "scheduler": "DDPMScheduler"}
    sampler = "DPM-Solver++"
    guidance = 4.0
    sampling_steps = 10
    training_steps = 4600
    learning_rate = 1e-3
    endless = False
    zoomed_out_below = 600
    settings: ClassVar[dict[str, Any]] = {"max_weight": MAX_WEIGHT}
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")
    preset = "preset.toml"

    def new(self) -> Any:
        from diffusers import UNet2DConditionModel

        return UNet2DConditionModel(
            sample_size=LATENT_SIZE,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            block_out_channels=(64, 96, 128),
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            norm_num_groups=16,
            cross_attention_dim=TEXT_WIDTH,
            attention_head_dim=(2, 3, 4),
        )

    def new_scheduler(self) -> Any:
        """Stable Diffusion's noise schedule."""
        from diffusers import DDPMScheduler

        return DDPMScheduler(
            num_train_timesteps=1000,
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            clip_sample=False,
            steps_offset=1,
        )

    def draw_timesteps(self, count: int, g: torch.Generator) -> Tensor:
        return torch.randint(1000, (count,), generator=g)

    def add_noise(self, scheduler: Any, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        noisy: Tensor = scheduler.add_noise(clean, noise, timesteps)
        return noisy

    def target(self, clean: Tensor, noise: Tensor) -> Tensor:
        return noise

    def weight(self, scheduler: Any, timesteps: Tensor) -> Tensor:
        # Where a picture's coarse traits are decided, at high noise, the loss of epsilon hardly tells them: weighted as
        # the loss of v is, 1 + 1/SNR (Salimans & Ho 2022, arXiv 2202.00512, section 4), up to a bound.
        weights: Tensor = (1 / scheduler.alphas_cumprod).clamp(max=MAX_WEIGHT).to(timesteps.device)
        return weights[timesteps]

    def condition(self, text: Tensor, g: torch.Generator | None = None) -> dict[str, Tensor]:
        return {"encoder_hidden_states": text}

    def predict(self, module: Any, latents: Tensor, timesteps: Tensor, condition: dict[str, Tensor]) -> Tensor:
        predicted: Tensor = module(latents, timesteps, **condition).sample
        return predicted

    def pipeline(self, parts: dict[str, Any], encode: Callable[[Any, list[str]], Tensor]) -> Any:
        from diffusers import StableDiffusionPipeline

        return StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )

    def sampling_scheduler(self, scheduler: Any) -> Any:
        from diffusers import DPMSolverMultistepScheduler

        return DPMSolverMultistepScheduler.from_config(scheduler.config)


class Transformer(Denoiser):
    part = "transformer"
    title = "transformer"
    classes: ClassVar[dict[str, str]] = {
        "transformer": "SD3Transformer2DModel",
        "scheduler": "FlowMatchEulerDiscreteScheduler",
    }
    remarks = (
        "Attention is joint over text and picture, in patches of 2x2 latents. It predicts the velocity, noise - x, of",
        "x_t = (1 - sigma) x + sigma noise, trained at sigma uniform from 0 to 1. In the place of Stable Diffusion 3's",
        "pooled projections stands the mean of the text encoder's hidden states, left out of half the pictures.",
    )
    sampler = "Euler's method"
    guidance = 4.0
    sampling_steps = 10
    training_steps = 8200
    # After 110 seconds of one core the loss on other pictures was 0.545, with 1e-3 it was 0.582.
    learning_rate = 2e-3
    endless = True
    # As much noise beside the picture as the U-Net's schedule has at its own.
    zoomed_out_below = 700
    lora_targets = (
        *("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"),
        *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff_context.net.0.proj", "ff_context.net.2"),
    )
    preset = "preset_transformer.toml"

    def new(self) -> Any:
        from diffusers import SD3Transformer2DModel

        return SD3Transformer2DModel(
            sample_size=LATENT_SIZE,
            patch_size=2,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            num_layers=8,
            attention_head_dim=32,
            num_attention_heads=4,
            joint_attention_dim=TEXT_WIDTH,
            caption_projection_dim=128,
            pooled_projection_dim=TEXT_WIDTH,
            pos_embed_max_size=LATENT_SIZE // 2,
        )

    def new_scheduler(self) -> Any:
        from diffusers import FlowMatchEulerDiscreteScheduler

        # More of the few steps at high noise. Of 64 captions' attributes the pictures showed 0.962 by 10 steps with it,
        # 0.902 without, 0.960 by 16 without.
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=2.0)

    def draw_timesteps(self, count: int, g: torch.Generator) -> Tensor:
        """Sigma uniform, spread evenly over the batch."""
        return 1000 * ((torch.rand((), generator=g) + torch.arange(count) / count) % 1)

    def add_noise(self, scheduler: Any, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """`x_t = (1 - sigma) x + sigma noise`."""
        return torch.lerp(clean, noise, (timesteps / 1000).view(-1, 1, 1, 1))

    def target(self, clean: Tensor, noise: Tensor) -> Tensor:
        return noise - clean

    def bin_of(self, num_bins: int) -> Callable[[Tensor], Tensor] | None:
        bins = sigma_bins(num_bins)
        return lambda timesteps: bins(timesteps / 1000)

    def error_scale(self, timesteps: Tensor) -> Tensor | None:
        return flow_error_scale("velocity", timesteps / 1000)

    def condition(self, text: Tensor, g: torch.Generator | None = None) -> dict[str, Tensor]:
        """Beside the tokens their mean, where Stable Diffusion 3 takes CLIP's pooled projections.

        Ours: it tells all of the text, which CLIP's does not, and attention would have little left to do. Pretraining
        leaves it out of half the pictures, as Stable Diffusion 3's leaves out each text encoder at times (Esser et al.
        2024, arXiv 2403.03206). What came of it draws as well without the mean (0.975 of what 256 captions ask, both
        times) and by the mean alone at chance.
        """
        pooled = text.mean(1)
        if g is not None:
            pooled = pooled * (torch.rand(len(text), 1, generator=g) < 0.5).to(text)
        return {"encoder_hidden_states": text, "pooled_projections": pooled}

    def predict(self, module: Any, latents: Tensor, timesteps: Tensor, condition: dict[str, Tensor]) -> Tensor:
        # On the CPU the fused attention's backward pass takes a third of a step, with heads as small as these.
        with sdpa_kernel(SDPBackend.MATH):
            predicted: Tensor = module(latents, timestep=timesteps, **condition).sample
        return predicted

    def pipeline(self, parts: dict[str, Any], encode: Callable[[Any, list[str]], Tensor]) -> Any:
        from diffusers import StableDiffusion3Pipeline

        # The pipeline adds the shift, and cannot do without one.
        parts["vae"].register_to_config(shift_factor=0.0)
        others: dict[str, Any] = {f"{part}_{i}": None for part in ("text_encoder", "tokenizer") for i in (2, 3)}
        pipeline: Any = StableDiffusion3Pipeline(**parts, **others)

        def encode_prompt(
            prompt: str | list[str],
            negative_prompt: str | list[str] | None = None,
            num_images_per_prompt: int = 1,
            **others: Any,
        ) -> tuple[Tensor, ...]:
            """As the pipeline's own method, which would take another encoder's hidden states and projections."""
            if ready := [name for name, value in others.items() if name.endswith("_embeds") and value is not None]:
                raise AptError(f"the tiny transformer's pipeline takes prompts as texts; found {', '.join(ready)}")
            prompts = [prompt] if isinstance(prompt, str) else prompt
            negative = negative_prompt if isinstance(negative_prompt, list) else [negative_prompt or ""] * len(prompts)
            told, untold = (self.condition(encode(pipeline, texts)) for texts in (prompts, negative))
            order = (
                (each, name) for name in ("encoder_hidden_states", "pooled_projections") for each in (told, untold)
            )
            return tuple(each[name].repeat_interleave(num_images_per_prompt, dim=0) for each, name in order)

        # On the object, not by a class of its own, which no other program could load a saved pipeline with.
        pipeline.encode_prompt = encode_prompt
        return pipeline

    def sampling_scheduler(self, scheduler: Any) -> Any:
        return scheduler


UNET, TRANSFORMER = UNet(), Transformer()
DENOISERS: dict[str, Denoiser] = {denoiser.part: denoiser for denoiser in (UNET, TRANSFORMER)}
