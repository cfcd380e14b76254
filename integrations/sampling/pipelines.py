"""A pipeline from what a user calls a model, and what it is called with."""

from __future__ import annotations

import dataclasses
import inspect
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from apt_hooks.errors import AptError, why_not_imported
from apt_hooks.integrations.library_logging import quiet

from .denoising_steps import MOVABLE, check_pipeline

TINY_WORLDS = {"tinyworld": "unet", "tinyworld-transformer": "transformer"}
"""What the models that come with apt-hooks are called, and their denoisers."""


def load_pipeline(model: str) -> Any:
    """A pipeline of diffusers that draws what a text says, on the GPU where there is one, else on the CPU in float32.

    On the GPU a U-Net is in float16; a transformer in bfloat16, as some of them overflow in float16.

    Args:
        model: a folder in diffusers' format, the name of a model on the Hugging Face hub, one of `TINY_WORLDS`, or, of
            SD 1.x, 2.x and SDXL, a checkpoint in one file (.safetensors).

    Raises:
        AptError: a missing package, or a model that cannot be loaded.
    """
    if model in TINY_WORLDS:
        from apt_hooks.tinyworld.model import PIPELINES
        from apt_hooks.tinyworld.model import load_pipeline as load_tiny_world

        return load_tiny_world(PIPELINES[TINY_WORLDS[model]])
    try:
        import diffusers
        import diffusers.utils.logging as logging
        import peft  # noqa: F401
        from safetensors import SafetensorError
    except ImportError as error:
        raise AptError(f'sampling needs diffusers and peft ({error}): pip install "apt-hooks[demo]"') from error
    check_model(model)
    on_gpu = torch.cuda.is_available()
    precision = {"torch_dtype": torch.float16 if on_gpu else torch.float32}
    try:
        with quiet(logging), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if Path(model).is_file():
                kind = "StableDiffusionXLPipeline" if _is_sdxl(Path(model)) else "StableDiffusionPipeline"
                pipeline = getattr(diffusers, kind).from_single_file(model, **precision)
            else:
                if on_gpu and "unet" not in diffusers.DiffusionPipeline.load_config(model):
                    precision = {"torch_dtype": torch.bfloat16}
                pipeline = diffusers.DiffusionPipeline.from_pretrained(model, **precision)
    # Of the hub's errors many are OSErrors; a broken model fails in the ways of whatever reads it.
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        failed_import = isinstance(error, RuntimeError) and "import" in str(error)
        why = why_not_imported(error) if failed_import else " ".join(str(error).split())[:200]
        raise AptError(f"--model {model}: cannot be loaded as a pipeline of diffusers ({why})") from error
    _check_drawing(pipeline)
    try:
        return pipeline.to("cuda" if on_gpu else "cpu")
    except torch.cuda.OutOfMemoryError as error:
        raise AptError(
            f"--model {model}: does not fit into the GPU's memory, and there is no offloading yet"
        ) from error


_MORE_THAN_TEXT = ("strength", "mask_image", "control_image", "num_frames", "video_length", "audio_length_in_s")


def _check_drawing(pipeline: Any) -> None:
    """Raises AptError unless the pipeline draws pictures by a text alone, as far as its call tells."""
    given = inspect.signature(pipeline.__call__).parameters
    missing = [name for name in ("prompt", "generator", "num_inference_steps") if name not in given]
    more = [name for name in _MORE_THAN_TEXT if name in given]
    more += [
        n for n, p in given.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD and n != "prompt"
    ]
    if missing or more:
        lack = f"takes no {missing[0]}" if missing else f"goes by more than a text ({more[0]})"
        raise AptError(
            f"{type(pipeline).__name__} is not supported, it {lack}: take a pipeline that draws pictures by a text"
        )
    if getattr(pipeline, "transformer", None) is None:
        check_pipeline(pipeline)


def load_unet_pipeline(model: str) -> Any:
    """A pipeline for SD 1.x, 2.x or SDXL, as `load_pipeline` loads it.

    Raises:
        AptError: one of another kind; as `load_pipeline`.
    """
    pipeline = load_pipeline(model)
    check_pipeline(pipeline)
    return pipeline


def check_model(model: str) -> None:
    """Raises AptError for what cannot be a model: to be told before the hub is asked, again and again."""
    if model not in TINY_WORLDS and not Path(model).exists() and not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        own = " or ".join(TINY_WORLDS)
        raise AptError(f"--model {model}: no such folder or file, no name on the hub (as OWNER/NAME), and not {own}")


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How pictures are drawn: denoising steps and the scale of guidance, None where a pipeline knows none.

    Attributes:
        guided_by: the pipeline's own name for that scale.
        negative: a negative prompt, without which the scale would have no effect.
        without: what else the pipeline is not to take its own of, as the scale is in its place.
    """

    steps: int
    guidance_scale: float | None
    guided_by: str = "guidance_scale"
    negative: str | None = None
    without: tuple[str, ...] = ()

    def options(self, pictures: int) -> dict[str, Any]:
        """Of the pipeline's call with as many prompts."""
        options: dict[str, Any] = {"num_inference_steps": self.steps, **dict.fromkeys(self.without)}
        if self.guidance_scale is not None:
            options[self.guided_by] = self.guidance_scale
        if self.negative is not None:
            options["negative_prompt"] = [self.negative] * pictures
        return options


def sampling(model: str, pipeline: Any, steps: int | None, guidance_scale: float | None) -> Sampling:
    """What is given; where it is not, the tiny world's own, 50 steps guided by 7.5 of a U-Net, else the pipeline's.

    Raises:
        AptError: a scale of guidance is given and the pipeline takes none.
    """
    known = {name: p.default for name, p in inspect.signature(pipeline.__call__).parameters.items()}
    scales = [name for name in ("guidance_scale", "true_cfg_scale", "distilled_guidance_scale") if name in known]
    if guidance_scale is not None and not scales:
        raise AptError(f"--guidance-scale {guidance_scale}: {type(pipeline).__name__} takes none; leave it out")
    # Where two are there, one is a distilled model's input, and the other is off by a default of 1.
    on = [name for name in scales if _number(known[name]) > 1]
    guided_by = (*on, *scales, "guidance_scale")[0]
    # A scale for each of so many steps, which a scale of one's own takes the place of.
    without = tuple(n for n in ("guidance_schedule",) if guidance_scale is not None and known.get(n) is not None)
    own: tuple[int, float | None] = known["num_inference_steps"], known.get(guided_by)
    if model in TINY_WORLDS:
        from apt_hooks.tinyworld.denoisers import DENOISERS

        denoiser = DENOISERS[TINY_WORLDS[model]]
        own = denoiser.sampling_steps, denoiser.guidance
    elif "unet" in pipeline.components:
        own = 50, 7.5
    scale = own[1] if guidance_scale is None else guidance_scale
    negative = " " if guided_by == "true_cfg_scale" and _number(scale) > 1 else None  # as its authors take
    return Sampling(own[0] if steps is None else steps, scale, guided_by, negative, without)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else 0.0


def make_movable(pipeline: Any, say: Callable[[str], None]) -> None:
    """Put DDIM in the place of a scheduler that guidance does not work with; SD 1.5's own is one."""
    from diffusers import DDIMScheduler

    name = type(pipeline.scheduler).__name__
    if name not in MOVABLE:
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
        say(f"sampling with DDIM: guidance does not work with the model's {name}")


def _is_sdxl(path: Path) -> bool:
    """By the second text encoder, which SD 1.x and 2.x have not."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return any(key.startswith("conditioner.embedders.1.") for key in file.keys())  # noqa: SIM118
