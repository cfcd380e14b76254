"""A pipeline's denoising steps from within: the latents before each, and the pass with the prompt alone."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from apt_hooks.errors import AptError

Predict = Callable[[Tensor], Any]
Before = Callable[[int, Tensor, Predict], Tensor | None]
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
    handles = [
        unet.register_forward_pre_hook(steps.enter, with_kwargs=True),
        unet.register_forward_hook(steps.leave, always_call=True),
    ]

    # Pipelines ask for its parameters, which is why it passes for the scheduler's own.
    @functools.wraps(steps.step)
    def step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        return steps.step(model_output, timestep, steps.take_changed(sample), *args, **kwargs)

    # On the object, before its class's methods: schedulers have no hooks.
    scheduler.scale_model_input, scheduler.step = steps.scaled, step
    try:
        yield
    finally:
        del scheduler.scale_model_input, scheduler.step
        for handle in handles:
            handle.remove()
        steps.passing.close()


def check_pipeline(pipeline: Any) -> None:
    """Raises AptError unless the pipeline denoises by a U-Net with text, as SD 1.x, 2.x and SDXL do."""
    parts = ("unet", "scheduler", "tokenizer", "text_encoder", "vae")
    missing = [part for part in parts if not hasattr(pipeline, part)]
    if missing or not hasattr(pipeline.unet, "up_blocks"):
        lack = missing[0] if missing else "U-Net with up-blocks"
        raise AptError(
            f"{type(pipeline).__name__} is not supported, it has no {lack}: take a pipeline for SD 1.x, 2.x or SDXL"
        )


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

    def leave(self, _unet: Any, _args: tuple, _output: Any) -> None:
        if not self.inside:
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
