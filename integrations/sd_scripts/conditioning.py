"""Text conditioning of the frozen model: the class word for the identifier, and no LoRA in the text encoders."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor

from apt_hooks.errors import AptError


class ClassCaptions:
    """Replaces whole words only, in any case, as CLIP reads them: "sks" in "a SKS dog", not in "asks".

    Args:
        identifier: the learned word or words, as they stand in the captions.
        class_word: what the frozen model reads instead.
    """

    def __init__(self, identifier: str, class_word: str) -> None:
        self.identifier = identifier
        self.class_word = class_word
        self._pattern = re.compile(rf"(?<!\w){re.escape(identifier)}(?!\w)", re.IGNORECASE)

    def __call__(self, caption: str) -> str:
        """The caption for the frozen model."""
        return self._pattern.sub(lambda _: self.class_word, caption)

    def occurs_in(self, captions: Iterable[str]) -> bool:
        """Whether any caption has the identifier."""
        return any(self._pattern.search(caption) for caption in captions)

    def check_lengths(self, tokenizers: Sequence[Callable[..., object]]) -> None:
        """Attention maps are compared token by token, so both words must take as many tokens.

        Raises:
            AptError: they do not.
        """
        for tokenizer in tokenizers:
            own, other = (_length(tokenizer, word) for word in (self.identifier, self.class_word))
            if own != other:
                raise AptError(
                    f"[apt] identifier {self.identifier!r} is {own} tokens, class_word {self.class_word!r} is {other}: "
                    "attention alignment compares token by token; choose words of equal length, or set lambda_attn = 0"
                )


def _length(tokenizer: Callable[..., object], word: str) -> int:
    return len(tokenizer(word, add_special_tokens=False).input_ids)  # type: ignore[attr-defined]


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
