"""What a LoRA does to prompts that it was not trained for, measured at each checkpoint on the same noise."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..method.drift import embedding_drift, prediction_drift, prompt_response
from .reference_model import Reference

SAMPLES = 8
"""Noisy latents of a probe. With the class, the neutral prompts and no text, a checkpoint is three times so many passes
of one sample each, the first one twice that. A training step with APT takes about four such passes a sample, so that a
checkpoint costs as much as the training on six samples: below 2 % where 300 samples or more lie between two."""

NEUTRAL = (
    "a photo of a street in the rain",
    "an oil painting of mountains behind a lake",
    "a bowl of fruit on a wooden table",
)
"""Prompts without class and subject, for the trigger-free drift and the prompt response; of a class that one of them
has, it is no such."""

WORDS = ("rain", "street", "mountain", "lake", "bowl", "fruit", "table", "painting")
"""Unrelated words, for the text encoders' drift."""


def class_prompt(word: str | None) -> str | None:
    """The prompt for the class alone; None without a class word."""
    return None if word is None else f"a photo of a {word}"


def asked_prompts(word: str | None) -> list[str]:
    """All that a probe is asked for, for those who encode it beforehand: no text, `NEUTRAL`, and that of the class."""
    own = class_prompt(word)
    return ["", *NEUTRAL, *([] if own is None else [own])]


class Probe(Protocol):
    """What an adapter fills. Both are called with the model as it is to be measured, in evaluation mode, without
    gradients, and with the random streams kept."""

    def predict(self, prompts: Sequence[str]) -> Tensor:
        """The denoiser's prediction for `SAMPLES` prompts, [samples, ...]: of the same noisy latents, and at the same
        timesteps, every time."""
        ...

    def embed(self, texts: Sequence[str]) -> Tensor | None:
        """The text encoders' output for texts, [texts, ...], padded alike; None where none is trained."""
        ...


class Drifts:
    """Measures drifts from the reference, and how much of a prompt still gets through.

    Args:
        reference: the run's.
        probe: the adapter's.
        class_prompt: such as "a photo of a dog"; None: there is no class drift.
        neutral: prompts without class and subject.
        words: for the text encoders.
    """

    NAMES = ("class_drift", "free_drift", "prompt_response", "text_drift")

    def __init__(
        self,
        reference: Reference,
        probe: Probe,
        class_prompt: str | None,
        neutral: Sequence[str] = NEUTRAL,
        words: Sequence[str] = WORDS,
    ) -> None:
        self.class_prompt, self.neutral, self.words = class_prompt, tuple(neutral), tuple(words)
        asked = {"free_drift": [self.neutral[i % len(self.neutral)] for i in range(SAMPLES)]}
        if class_prompt is not None:
            asked["class_drift"] = [class_prompt] * SAMPLES
        self._asked = asked
        self._reference, self._probe = reference, probe
        self._frozen: dict[str, Tensor] = {}
        self._without_text = self._frozen_words = torch.empty(0)

    def measure(self) -> dict[str, float | None]:
        """By `NAMES`; None for one that is not measured. Nothing of the run changes, its random streams neither."""
        drifts: dict[str, float | None] = dict.fromkeys(self.NAMES)
        with random_streams_kept():
            if not self._frozen:  # once a run: it does not change
                with self._reference.apart(frozen=True):
                    self._without_text = self._of([""] * SAMPLES)
                    self._frozen = {name: self._of(prompts) for name, prompts in self._asked.items()}
                    if (words := self._probe.embed(self.words)) is not None:
                        self._frozen_words = _kept(words)
            with self._reference.apart(frozen=False):
                tuned = {name: self._of(prompts) for name, prompts in self._asked.items()}
                for name, moved in tuned.items():
                    drifts[name] = prediction_drift(moved, self._frozen[name], self._without_text)
                drifts["prompt_response"] = prompt_response(
                    tuned["free_drift"], self._of([""] * SAMPLES), self._frozen["free_drift"], self._without_text
                )
                if len(self._frozen_words) and (words := self._probe.embed(self.words)) is not None:
                    drifts["text_drift"] = embedding_drift(_kept(words), self._frozen_words)
        return drifts

    def _of(self, prompts: Sequence[str]) -> Tensor:
        return _kept(self._probe.predict(prompts))


def fixed_noise(shape: Sequence[int], number: int = 0) -> Tensor:
    """[SAMPLES, *shape], the same on every machine, whatever was drawn before; other noise by another number."""
    stream = torch.Generator().manual_seed(1 + number)
    return torch.randn(SAMPLES, *shape, generator=stream)


@contextlib.contextmanager
def random_streams_kept() -> Iterator[None]:
    """Inside, random numbers may be drawn; afterwards every stream is as it was: Python's, numpy's, torch's on the CPU
    and on all CUDA devices."""
    numpy: Any = sys.modules.get("numpy")
    own, own_numpy = random.getstate(), None if numpy is None else numpy.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(own)
            if numpy is not None:
                numpy.random.set_state(own_numpy)


def _kept(tensor: Tensor) -> Tensor:
    return tensor.detach().float().cpu()
