"""What the drifts of a checkpoint are measured with: the trainer's own step, on fixed noise and with other prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from apt_hooks.errors import AptError
from apt_hooks.training.checkpoint_drifts import SAMPLES, fixed_noise

from .conditioning import TextEncoders
from .denoiser import prepare_block_swap


class Prompts:
    """Prompts as the trainer's model reads them.

    Args:
        trained: whether text encoders are trained, so that a prompt has to be encoded anew at each checkpoint.
        weighted: whether captions carry weights.
    """

    def __init__(self, *, trained: bool, weighted: bool) -> None:
        self.trained = trained
        self._weighted = weighted
        self._encoded: dict[str, list[Any]] = {}

    def encode(self, encoders: TextEncoders, prompts: Sequence[str]) -> None:
        """Encode for good, where a trainer encodes its captions so and takes the encoders away afterwards."""
        with torch.no_grad():
            for prompt in prompts:
                self._encoded[prompt] = [_row(c) for c in encoders.for_good(prompt, weighted=self._weighted)]

    def __call__(self, encoders: TextEncoders, prompts: Sequence[str]) -> list[Any]:
        """The conditioning of prompts: one or more tensors, [prompts, ...] each."""
        if self.trained:
            return encoders(list(prompts), weighted=self._weighted)
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._encoded:
                if not encoders.models:
                    raise AptError("the text encoders are gone, and the drifts' prompts were not encoded before that")
                self._encoded[prompt] = [_row(c) for c in encoders([prompt], weighted=self._weighted)]
        rows = [self._encoded[prompt] for prompt in prompts]
        parts = list(zip(*rows, strict=True))
        for part in parts:
            if isinstance(part[0], Tensor) and len({other.shape for other in part}) > 1:
                raise AptError("this model's texts are of different lengths once encoded, and are not put together")
        return [torch.cat(part) if isinstance(part[0], Tensor) else part[0] for part in parts]


@dataclasses.dataclass
class TrainerProbe:
    """As `training.checkpoint_drifts.Probe`.

    Noise stands in the pictures' place too: what the LoRA makes of the training's own pictures is no matter of the
    class. What else a batch tells, such as SDXL's sizes, is that of the run's first sample.

    Attributes:
        run: the trainer's `get_noise_pred_and_target`, of latents, batch, conditioning and denoiser.
        denoiser: the trainer's, without what several processes wrap it in.
        batch: the run's first; `text_conds` and `latents` as the trainer had them of it.
        encoders: the trainer's, as they are now.
        prompts: by which they are asked.
        seed: calls its argument with the trainer's timesteps fixed.
        autocast: the trainer's.
    """

    run: Callable[[Tensor, dict[str, Any], list[Any], Any], Any]
    denoiser: Any
    batch: dict[str, Any]
    text_conds: list[Any]
    latents: Tensor
    encoders: TextEncoders
    prompts: Prompts
    at_timesteps: Callable[[slice, Callable[[], Any]], Any]
    autocast: Callable[[], Any]

    def __post_init__(self) -> None:
        self._size = len(self.latents)
        self._of_first = {key: _repeated(value, self._size) for key, value in self.batch.items()}
        self._alike = [(c.dtype, c.device) if isinstance(c, Tensor) else None for c in self.text_conds]
        self._noise = fixed_noise(self.latents.shape[1:]).to(self.latents)
        self.batch, self.text_conds, self.latents = {}, [], self.latents[:0]  # nothing of the run is held on to

    def predict(self, prompts: Sequence[str]) -> Tensor:
        with self.autocast():
            conds = self.prompts(self.encoders, prompts)
        found = []
        # Not more at once than the training has, for which the memory is there.
        for begin in range(0, SAMPLES, self._size):
            rows = slice(begin, min(begin + self._size, SAMPLES))
            count = rows.stop - rows.start
            batch = {key: _first(value, count, self._size) for key, value in self._of_first.items()}
            latents = self._noise[rows]
            own = [
                c[rows].to(alike[1], alike[0]) if isinstance(c, Tensor) and alike is not None else c
                for c, alike in zip(conds, self._alike, strict=False)
            ]
            torch.manual_seed(begin)  # whoever measures gives the streams back
            prediction = self.at_timesteps(rows, lambda: self.run(latents, batch, own, self.denoiser)[0])  # noqa: B023
            found.append(prediction.detach().float().cpu())
            prepare_block_swap(self.denoiser)
        return torch.cat(found)

    def embed(self, texts: Sequence[str]) -> Tensor | None:
        if not self.prompts.trained:
            return None
        with self.autocast():
            conds = self.prompts(self.encoders, texts)
        return torch.cat([c.flatten(1).float() for c in conds if isinstance(c, Tensor) and c.is_floating_point()], 1)


def _row(cond: Any) -> Any:
    return cond.detach().cpu() if isinstance(cond, Tensor) else cond


def _repeated(value: Any, size: int) -> Any:
    """Of a batch's value that has an entry a sample, the first sample's for all."""

    def repeat(of: Any) -> Any:
        if isinstance(of, Tensor):
            return of[:1].detach().clone().expand(size, *of.shape[1:])
        return type(of)([of[0]] * size)

    return _by_sample(value, size, repeat)


def _first(value: Any, count: int, size: int) -> Any:
    """As many samples of it."""
    return _by_sample(value, size, lambda of: of[:count])


def _by_sample(value: Any, size: int, take: Callable[[Any], Any]) -> Any:
    """`take` of what has an entry a sample: a tensor, a list of what is no tensor, or such in a list."""
    if isinstance(value, Tensor):
        return take(value) if value.ndim and len(value) == size else value
    if not isinstance(value, (list, tuple)):
        return value
    if len(value) == size and not isinstance(value[0], Tensor):
        return take(value)
    return type(value)(_by_sample(each, size, take) for each in value)
