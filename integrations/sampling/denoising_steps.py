"""A pipeline's denoising steps from within: the latents before each, and the pass with the prompt alone."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from apt_hooks.errors import AptError
from apt_hooks.hooks.attention_guidance import RunDenoiser

Before = Callable[[int, Tensor, RunDenoiser], Tensor | None]
Around = Callable[[int, int], contextlib.AbstractContextManager[Any]]


@contextlib.contextmanager
def denoising_steps(pipeline: Any, *, before: Before | None = None, around: Around | None = None) -> Iterator[None]:
    """Inside, one call of the pipeline may be looked at and changed; outside nothing is left of it.

    Args:
        pipeline: of diffusers, for SD 1.x, 2.x or SDXL.
        before: told the step's number from 0, the latents as the U-Net gets them ([batch, channels, height, width],
            scaled by the scheduler), and a function that runs the U-Net on such latents with the prompt alone; what it
            returns takes their place for the rest of the step, scaled back for the scheduler.
        around: told the step's number and the batch; makes a context for the pipeline's own pass of the U-Net, whose
            last samples, as many as the batch, are those with the prompt.

    Raises:
        AptError: not such a pipeline; inputs that only image prompts have.
    """
    check_pipeline(pipeline)
    steps = _Steps(pipeline, before, around)
    scheduler, unet = pipeline.scheduler, pipeline.unet

    # Pipelines ask for its parameters, which is why it passes for the scheduler's own.
    @functools.wraps(steps.step)
    def step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        return steps.step(model_output, timestep, steps.take_changed(sample), *args, **kwargs)

    own = vars(scheduler)
    before_it = {name: own[name] for name in ("scale_model_input", "step") if name in own}
    handles = [
        unet.register_forward_pre_hook(steps.enter, with_kwargs=True),
        unet.register_forward_hook(steps.leave, always_call=True),
    ]
    # On the object, before its class's methods: schedulers have no hooks.
    own.update(scale_model_input=steps.scaled, step=step)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name in ("scale_model_input", "step"):
            own.pop(name)
        own.update(before_it)
        steps.leave(None, (), None)


def check_pipeline(pipeline: Any) -> None:
    """Raises AptError unless the pipeline denoises by a U-Net with text alone, as SD 1.x, 2.x and SDXL do."""
    name = type(pipeline).__name__
    parts = ("unet", "scheduler", "tokenizer", "text_encoder", "vae")
    missing = [part for part in parts if getattr(pipeline, part, None) is None]
    lack = f"it has no {missing[0]}" if missing else ""
    if not lack and not hasattr(pipeline.unet, "up_blocks"):
        lack = "its U-Net has no up-blocks"
    elif not lack and pipeline.unet.config.in_channels != pipeline.vae.config.latent_channels:
        lack = "its U-Net takes more than latents"
    elif not lack and (hasattr(pipeline, "controlnet") or "PAG" in name):
        lack = "it gives its U-Net more than a text"
    if lack:
        raise AptError(f"{name} is not supported, {lack}: take a plain pipeline for SD 1.x, 2.x or SDXL")


MOVABLE = (
    "DDIMScheduler",
    "DDPMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
)
"""Schedulers whose step begins at the latents it is given. Others begin at some that they remember (PNDM, Heun, UniPC),
where a change of latents is lost in part."""


class _Steps:
    """The state of one call."""

    def __init__(self, pipeline: Any, before: Before | None, around: Around | None) -> None:
        self.pipeline, self.before, self.around = pipeline, before, around
        self.scale, self.step = pipeline.scheduler.scale_model_input, pipeline.scheduler.step
        self.number = -1
        self.latents: Tensor | None = None  # as they were given to be scaled
        self.changed: Tensor | None = None
        self.passing = contextlib.ExitStack()
        self.inside = False

    def scaled(self, sample: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.latents = sample
        return self.scale(sample, *args, **kwargs)

    def take_changed(self, sample: Tensor) -> Tensor:
        changed, self.changed = self.changed, None
        return sample if changed is None else changed

    def enter(self, unet: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        if self.inside or self.latents is None:
            return None
        self.number += 1
        latents, self.latents = self.latents, None
        batch = len(latents) // (2 if self.pipeline.do_classifier_free_guidance else 1)
        if self.before is not None:
            timestep = args[1] if len(args) > 1 else kwargs["timestep"]
            own = {name: _last(name, value, batch) for name, value in kwargs.items() if name not in _FIRST}

            def predict(x: Tensor) -> Any:
                return unet(x, timestep, **own)

            inputs, changed = args[0][-batch:], None
            self.inside = True
            try:
                changed = self.before(self.number, inputs, predict)
            finally:
                self.inside = False
            if changed is not None:
                # Scaling is by a factor; by the difference, what is not changed stays so bit for bit.
                factor = self.scale(torch.ones_like(latents[:1, :1, :1, :1]), timestep)
                self.changed = latents[-batch:] + ((changed - inputs) / factor).to(latents.dtype)
        if self.around is not None:
            self.passing.enter_context(self.around(self.number, batch))
        if self.changed is None:
            return None
        again = self.scale(torch.cat([self.changed] * (len(latents) // batch)), timestep).to(args[0].dtype)
        return (again, *args[1:]), kwargs

    def leave(self, _unet: Any, _args: tuple, output: Any) -> None:
        if self.inside:
            return
        if output is None:  # the pass failed: what it came through is not to be judged
            error = RuntimeError("the pass failed")
            self.passing.__exit__(type(error), error, None)
        else:
            self.passing.close()


_FIRST = ("sample", "timestep")


def _last(name: str, value: Any, batch: int) -> Any:
    """An input of the U-Net for the samples with the prompt alone; those without come before them."""
    if isinstance(value, dict):
        return {key: _last(key, part, batch) for key, part in value.items()}
    if name in ("image_embeds", "image_hidden_states", "ip_adapter_masks"):
        raise AptError(
            f"the pipeline gives its U-Net {name}: image prompts (IP-Adapter) are not supported; unload them"
        )
    return value[-batch:] if isinstance(value, Tensor) and value.ndim > 0 else value
