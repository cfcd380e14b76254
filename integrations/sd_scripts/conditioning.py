"""Text conditioning of the frozen model: the class word for the identifier, and no LoRA in the text encoders."""

from __future__ import annotations

import dataclasses
import inspect
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from apt_hooks.errors import AptError

from ..class_captions import ClassCaptions


@dataclasses.dataclass(frozen=True)
class TextEncoders:
    """The trainer's text encoders and its strategies for running them."""

    models: Any
    encoding: Any
    tokenizing: Any

    def __call__(self, captions: list[str], *, weighted: bool) -> list[Any]:
        """The conditioning of `captions`: one or more tensors, [batch, ...] each."""
        if weighted:
            ids, weights = self.tokenizing.tokenize_with_weights(captions)
            return list(self.encoding.encode_tokens_with_weights(self.tokenizing, self.models, ids, weights))
        return self.of_tokens(self.tokenizing.tokenize(captions))

    def of_tokens(self, ids: Any, **options: Any) -> list[Any]:
        """The conditioning of captions that are tokens already."""
        return list(self.encoding.encode_tokens(self.tokenizing, self.models, list(ids), **options))

    def for_good(self, caption: str, *, weighted: bool) -> list[Any]:
        """As the trainer's cache encodes a caption: with the strategy's own masks, and nothing dropped.

        SD 3's `encode_tokens` takes neither from the strategy.
        """
        taken = inspect.signature(self.encoding.encode_tokens).parameters
        masks = [name for name in taken if name.startswith("apply_") and hasattr(self.encoding, name)]
        options = {name: getattr(self.encoding, name) for name in masks}
        if "enable_dropout" in taken:
            options["enable_dropout"] = False
        if weighted or not options:
            return self([caption], weighted=weighted)
        return self.of_tokens(self.tokenizing.tokenize([caption]), **options)


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
        self._encoded: dict[str, list[Any]] = {}

    def __call__(
        self, encoders: TextEncoders, batch: dict[str, Any], instances: Tensor, text_conds: list[Any]
    ) -> list[Any]:
        """The conditioning in place of `text_conds`, on the same device and of the same dtype.

        Raises:
            AptError: captions are encoded for good, and one with the class word was not.
        """
        changed: dict[int, str] = {}
        if self._captions is not None:
            for i, (caption, own) in enumerate(zip(batch["captions"], instances.tolist(), strict=True)):
                if own and self._captions(caption) != caption:
                    changed[i] = self._captions(caption)
        if not changed and not self._lora:
            return text_conds
        if batch.get("text_encoder_outputs_list") is None:
            return _in_place(text_conds, self._encode_again(encoders, batch, changed))
        # What is cached is of the training captions, and of the encoders that are not trained.
        frozen = [cond.detach().clone() if isinstance(cond, Tensor) else cond for cond in text_conds]
        encoded = self._encode_again(encoders, batch, changed) if self._lora else []
        frozen = _in_place(frozen, encoded)
        fresh = {i for i, cond in enumerate(encoded) if isinstance(cond, Tensor)}
        for row, caption in changed.items():
            for i, (cond, new) in enumerate(zip(frozen, self._of_class_caption(encoders, caption), strict=False)):
                if i in fresh or not isinstance(cond, Tensor):
                    continue
                if new is None:
                    raise _not_encoded(caption)
                if isinstance(new, Tensor):
                    cond[row] = new[0].to(cond)
        return frozen

    def prepare(self, encoders: TextEncoders, dataset: Any) -> None:
        """Encode the captions of a group of data sets as the frozen model reads them, while its encoders are at hand.

        They are looked up later by what a batch says, which is the caption as it is where all encoders' outputs are
        cached, and with its subset's prefix and suffix where some are; what is encoded for good is the one without.
        """
        if self._captions is None:
            return
        stream = random.getstate()
        try:
            for part in getattr(dataset, "datasets", [dataset]):
                for key, info in part.image_data.items():
                    own = self._captions(info.caption)
                    if own == info.caption:
                        continue
                    said = self._captions(part.process_caption(part.image_to_subset[key], info.caption))
                    self._encoded.setdefault(said, self._of_class_caption(encoders, own))
        finally:
            random.setstate(stream)

    def _encode_again(self, encoders: TextEncoders, batch: dict[str, Any], changed: dict[int, str]) -> list[Any]:
        if not changed and not self._weighted:
            return encoders.of_tokens(batch["input_ids_list"])
        captions = [changed.get(i, caption) for i, caption in enumerate(batch["captions"])]
        return encoders(captions, weighted=self._weighted)

    def _of_class_caption(self, encoders: TextEncoders, caption: str) -> list[Any]:
        if caption not in self._encoded:
            if not encoders.models:
                raise _not_encoded(caption)
            with torch.no_grad():
                encoded = encoders.for_good(caption, weighted=self._weighted)
            self._encoded[caption] = [cond.cpu() if isinstance(cond, Tensor) else cond for cond in encoded]
        return self._encoded[caption]


class WithClassCaptions:
    """A group of data sets that has the frozen model's captions encoded where its own are encoded for good.

    Args:
        dataset: the trainer's own, to which everything else is handed through.
        prepare: called with the text encoders behind that.
    """

    def __init__(self, dataset: Any, prepare: Callable[[Any], None]) -> None:
        self._dataset = dataset
        self._prepare = prepare

    def new_cache_text_encoder_outputs(self, models: Any, accelerator: Any) -> None:
        """As the data sets' own, which the trainer calls with the text encoders on their device."""
        self._dataset.new_cache_text_encoder_outputs(models, accelerator)
        self._prepare(models)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dataset, name)


def _not_encoded(caption: str) -> AptError:
    return AptError(
        f"the frozen model's caption {caption!r} was not encoded when the others were, and the text encoders are "
        "gone by now: leave cache_text_encoder_outputs out, or identifier and class_word"
    )


def _in_place(text_conds: list[Any], encoded: list[Any]) -> list[Any]:
    """The conditioning with what was encoded anew; None is what the trainer has of no encoder."""
    both = list(zip(encoded, text_conds, strict=False))
    new = [c.to(like) if isinstance(c, Tensor) and isinstance(like, Tensor) else like for c, like in both]
    return [*new, *text_conds[len(new) :]]
