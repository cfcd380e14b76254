"""A pipeline from what a user calls a model."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from apt_hooks.errors import AptError, why_not_imported
from apt_hooks.integrations.library_logging import quiet

from .denoising_steps import MOVABLE, check_pipeline

TINY_WORLD = "tinyworld"


def load_pipeline(model: str) -> Any:
    """A pipeline for SD 1.x, 2.x or SDXL, on the GPU in float16 where there is one, else on the CPU in float32.

    Args:
        model: a folder in diffusers' format, a checkpoint in one file (.safetensors), the name of a model on the
            Hugging Face hub, or "tinyworld", the small one that comes with apt-hooks.

    Raises:
        AptError: a missing package, or a model that cannot be loaded.
    """
    if model == TINY_WORLD:
        from apt_hooks.tinyworld.model import load_pipeline as load_tiny_world

        return load_tiny_world()
    try:
        import diffusers
        import diffusers.utils.logging as logging
        import peft  # noqa: F401
        from safetensors import SafetensorError
    except ImportError as error:
        raise AptError(f'sampling needs diffusers and peft ({error}): pip install "apt-hooks[demo]"') from error
    check_model(model)
    on_gpu = torch.cuda.is_available()
    options = {"torch_dtype": torch.float16 if on_gpu else torch.float32}
    try:
        with quiet(logging), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if Path(model).is_file():
                kind = "StableDiffusionXLPipeline" if _is_sdxl(Path(model)) else "StableDiffusionPipeline"
                pipeline = getattr(diffusers, kind).from_single_file(model, **options)
            else:
                pipeline = diffusers.DiffusionPipeline.from_pretrained(model, **options)
    # Of the hub's errors many are OSErrors; a broken model fails in the ways of whatever reads it.
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        failed_import = isinstance(error, RuntimeError) and "import" in str(error)
        why = why_not_imported(error) if failed_import else " ".join(str(error).split())[:200]
        raise AptError(f"--model {model}: cannot be loaded as a pipeline of diffusers ({why})") from error
    check_pipeline(pipeline)
    return pipeline.to("cuda" if on_gpu else "cpu")


def check_model(model: str) -> None:
    """Raises AptError for what cannot be a model: to be told before the hub is asked, again and again."""
    if model != TINY_WORLD and not Path(model).exists() and not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        raise AptError(
            f"--model {model}: no such folder or file, no name on the hub (as OWNER/NAME), and not {TINY_WORLD}"
        )


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
