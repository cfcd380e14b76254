"""One method on one concept: train a LoRA, let it draw the prompts, judge what it draws."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from .attention import attention_of_words
from .concepts import IDENTIFIER
from .evaluate import Examination, Judgement
from .methods import METHODS
from .model import denoiser_of
from .personalize import Trained, Training, lora, method_config, save_lora, train


@dataclasses.dataclass
class Result:
    """One method's pictures and scores; `trained` is None for the base model."""

    judgement: Judgement
    trained: Trained | None
    attention: Tensor

    def metrics(self) -> dict[str, float]:
        """What `metrics.json` holds of it."""
        delta_noise = self.trained.delta_noise[-1] if self.trained else 0.0
        return {
            **{name: round(x, 5) for name, x in self.judgement.scores.items()},
            "delta_noise": round(delta_noise, 7),
        }


def run_method(
    name: str,
    examination: Examination,
    captions: list[str],
    training: Training,
    *,
    seed: int,
    out: Path | None = None,
    overrides: Mapping[str, Any] = MappingProxyType({}),
    advance: Callable[[], None] = lambda: None,
) -> Result:
    """Train by one method, let it draw the prompts, and judge that; the pipeline is then the base model again."""
    pipeline = examination.pipeline

    def examine(identifier: str | None, trained: Trained | None) -> Result:
        judgement = examination.judge(identifier)
        # The base model reads the identifier too, so that all methods' maps are of the same words.
        maps = attention_of_words(pipeline, examination.prompts()[0], judgement.pictures[0])
        return Result(judgement, trained, maps)

    if name == "base":
        return examine(None, None)
    config, method = method_config(name, overrides), METHODS[name]
    denoiser = getattr(pipeline, denoiser_of(pipeline.components).part)
    with lora(pipeline, training.rank, seed), method.adapter(denoiser, seed):
        log = out / f"{name}-apt.jsonl" if out else None
        trained = train(
            pipeline,
            examination.references,
            captions,
            config,
            training,
            seed=seed,
            log_path=log,
            advance=advance,
            method=method,
        )
        if out and not method.masks_rank:  # no LoRA file says that ranks are masked
            save_lora(pipeline, out / f"{name}.safetensors")
        return examine(IDENTIFIER, trained)
