"""Text conditioning of the frozen model: the class word for the identifier, and no LoRA in the text encoders."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from ..class_captions import ClassCaptions


@dataclasses.dataclass(frozen=True)
class TextEncoders:
    """The trainer's text encoders and its strategies for running them."""

    models: Any
    encoding: Any
    tokenizing: Any

    def __call__(self, captions: list[str], *, weighted: bool) -> list[Tensor]:
        """The conditioning of `captions`: one or more tensors, [batch, ...] each."""
        if weighted:
            ids, weights = self.tokenizing.tokenize_with_weights(captions)
            return list(self.encoding.encode_tokens_with_weights(self.tokenizing, self.models, ids, weights))
        return self.of_tokens(self.tokenizing.tokenize(captions))

    def of_tokens(self, ids: Any) -> list[Tensor]:
        """The conditioning of captions that are tokens already."""
        return list(self.encoding.encode_tokens(self.tokenizing, self.models, list(ids)))


class FrozenConditioning:
    """What the frozen model reads; to be called inside the frozen pass, where no LoRA takes part.

    Args:
        captions: replaces the identifier; None where there is none.
        lora: whether the text encoders carry LoRA.
        weighted: whether captions carry weights, as `(word:1.2)`.
    """

    def __init__(self, captions: ClassCaptions | None, *, lora: bool, weighted: bool) -> None:
        self._captions = captions
        self._lora = lora
        self._weighted = weighted
        self._encoded: dict[str, list[Tensor]] = {}

    def __call__(
        self, encoders: TextEncoders, batch: dict[str, Any], counted: Tensor, text_conds: list[Tensor]
    ) -> list[Tensor]:
        """The conditioning in place of `text_conds`, on the same device and of the same dtype."""
        changed: dict[int, str] = {}
        if self._captions is not None:
            for i, (caption, own) in enumerate(zip(batch["captions"], counted.tolist(), strict=True)):
                if own and self._captions(caption) != caption:
                    changed[i] = self._captions(caption)
        if not changed and not self._lora:
            return text_conds
        if batch.get("text_encoder_outputs_list") is not None:
            return self._cached(encoders, changed, text_conds)
        if changed or self._weighted:
            captions = [changed.get(i, caption) for i, caption in enumerate(batch["captions"])]
            encoded = encoders(captions, weighted=self._weighted)
        else:
            encoded = encoders.of_tokens(batch["input_ids_list"])
        return [cond.to(like) for cond, like in zip(encoded, text_conds, strict=True)]

    def _cached(self, encoders: TextEncoders, changed: dict[int, str], text_conds: list[Tensor]) -> list[Tensor]:
        """Cached outputs are those of the training captions; those with another word are encoded, once each."""
        frozen = [cond.detach().clone() for cond in text_conds]
        for i, caption in changed.items():
            if caption not in self._encoded:
                self._encoded[caption] = [cond.cpu() for cond in encoders([caption], weighted=self._weighted)]
            for cond, new in zip(frozen, self._encoded[caption], strict=True):
                cond[i] = new[0].to(cond)
        return frozen
