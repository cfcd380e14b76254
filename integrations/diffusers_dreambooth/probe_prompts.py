"""Prompts of apt-hooks' own, encoded by the script's own lines: what the drifts of a checkpoint are measured with.

A script encodes its text before the training, or in every step. Either way its lines run once more while a prompt is
asked for, which takes the caption's place in one of two ways: where a function of the script is given text, it is given
the prompt (so that whatever frames a caption, as a chat template does, frames it too); where a text encoder is given
tokens that were made before, it is given the prompt's.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from apt_hooks.errors import AptError
from apt_hooks.hooks.frozen import frozen_base
from apt_hooks.training.checkpoint_drifts import NEUTRAL, random_streams_kept

from ..class_captions import word_tokens
from .class_word import encoding_again, read_by, script_encodes, text_models

logger = logging.getLogger("apt_hooks")

Parts = list[Tensor | None]
"""What an encoding came to, piece by piece, on the CPU; None where a piece is none."""

_KEPT, _KEPT_BYTES = 32, 2**28
"""Of so many encodings the script's own are kept, while they are not larger together than that, to be looked for in
what the denoiser is given."""


class ProbePrompts:
    """Encodes prompts as the script does; made before it encodes any text.

    Args:
        names: the variables of the function that trains, among them tokenizers and text encoders.
        prompts: those that will be asked for.

    Attributes:
        own: encodings of the script's own texts, until `forget_own`.
        encoded: of each prompt, where the script encodes before the training: what its lines came to.
        ran: whether a text encoder has run since `asking` began.
        refused: why no prompt can be encoded; empty where nothing is known against it.
    """

    def __init__(self, names: dict[str, Any], prompts: Sequence[str]) -> None:
        models, tokenizers = text_models(names)
        self._tokenizers = tokenizers
        self.own: list[Parts] = []
        self.encoded: dict[str, Parts] = {}
        self.ran = False
        self.refused = ""
        self._prompts = list(prompts)
        self._prompt: str | None = None
        self._said = False  # a function was given the prompt
        self._framed: set[int] = set()  # text encoders that were given it by that, by their places
        self._learning: list[list[int]] = []  # the tokens that they read then, of any tokenizer
        self._kept = 0
        # Not to keep alive what the script forgets once it has encoded.
        self._encoders: list[tuple[weakref.ref[Any], Any]] = []
        try:
            self._encoders = (
                [(weakref.ref(model), read_by(model, tokenizers)) for model in models] if tokenizers else []
            )
        except AptError:
            self.refused = "a text encoder's tokenizer is not among the variables of the function that trains"
        if not self._encoders and not self.refused:
            self.refused = "no text encoder with its tokenizer is among the variables of the function that trains"
        self._encoded = False  # by the script, since the last `keep`
        self._watching = contextlib.ExitStack()
        for model in self._alive():
            # Ideogram's pipeline runs the layers of its text encoder itself.
            for module in (model, model.get_input_embeddings()):  # type: ignore[operator]
                self._watching.callback(module.register_forward_pre_hook(self._notice).remove)

    @property
    def is_asked(self) -> bool:
        """Whether it is within `asking`."""
        return self._prompt is not None

    def keep(self, encode: Callable[[], Any]) -> None:
        """Run what has encoded text once more, with each of the prompts, and keep what they come to.

        A training is worth more than what is measured of it: whatever goes wrong is the reason that nothing is.
        """
        encoded, self._encoded = self._encoded, False
        if self.refused or self._kept == _KEPT or not encoded or sum(map(_size, self.own)) > _KEPT_BYTES:
            return
        try:
            with random_streams_kept(), frozen_base(self._alive(), contextlib.nullcontext), encoding_again():
                if self._kept:
                    own, self._kept = _parts(encode()), self._kept + 1
                    if not any(_equal(own, other) for other in self.own):
                        self.own.append(own)
                    return
                with self.learning():
                    encode()
                if not self.ran:  # what was called did not encode
                    return
                for prompt in self._prompts:
                    with self.asking(prompt):
                        self.encoded[prompt] = _parts(encode())
                self.own.append(_parts(encode()))
                self._kept = 1
        except Exception as error:  # of the script's own lines, asked for what they were not written for
            self.refused = f"the script's lines cannot encode other prompts: {in_a_line(error)}"
            self.encoded.clear()

    def begin(self) -> None:
        """The training begins."""
        self._watching.close()

    def _notice(self, *_: Any) -> None:
        self._encoded = self._encoded or script_encodes()

    def forget_own(self) -> None:
        """The script's own texts were found in what the denoiser is given, or never will be."""
        self.own = []

    def reading(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, which is given the prompt in place of a text, or of each of several, while one is asked for."""
        if self._prompt is None:
            return function

        @functools.wraps(function)
        def read(*args: Any, **kwargs: Any) -> Any:
            texts = [given for given in (*args, *kwargs.values()) if _is_text(given)]
            if len(texts) > 1:
                name = getattr(function, "__name__", "a function")
                raise AptError(f"{name}(...) is given several texts, and which is the caption is not known")
            self._said = self._said or bool(texts)
            return function(*map(self._put, args), **{name: self._put(given) for name, given in kwargs.items()})

        return read

    @contextlib.contextmanager
    def asking(self, prompt: str) -> Iterator[None]:
        """Inside, the script's lines read this prompt, in the way that was seen in `learning`."""
        self.ran = self._said = False
        self._prompt = prompt
        try:
            with contextlib.ExitStack() as stack:
                for place, (encoder, tokenizer) in enumerate(self._encoders):
                    if (model := encoder()) is not None:
                        hook = functools.partial(self._read, place, tokenizer)
                        stack.callback(model.register_forward_pre_hook(hook, with_kwargs=True).remove)
                        # Ideogram's pipeline runs the layers of its text encoder itself.
                        words = model.get_input_embeddings()
                        stack.callback(words.register_forward_pre_hook(lambda *_: setattr(self, "ran", True)).remove)
                yield
        finally:
            self._prompt = None

    @contextlib.contextmanager
    def learning(self) -> Iterator[None]:
        """Inside, it is seen which text encoders read a prompt that the script's functions are given.

        They may read something else too, such as a negative prompt, which is left as it is.
        """
        self._framed.clear()
        # Without the ends, which what stands around them may change.
        self._learning = [word_tokens(tokenizer, NEUTRAL[0])[1:-1] for tokenizer in self._tokenizers]
        try:
            with self.asking(NEUTRAL[0]):
                yield
        finally:
            self._learning = []

    def _put(self, given: Any) -> Any:
        if not _is_text(given):
            return given
        return self._prompt if isinstance(given, str) else type(given)([self._prompt] * len(given))

    def _alive(self) -> list[nn.Module]:
        found = (encoder() for encoder, _ in self._encoders)
        return [model for model in found if model is not None]

    def _read(
        self, place: int, tokenizer: Any, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, Any] | None:
        """A text encoder's arguments with the prompt's tokens, where it is not given them already."""
        given = {**dict(zip(("input_ids", "attention_mask"), args, strict=False)), **kwargs}
        ids, mask, prompt = given.get("input_ids"), given.get("attention_mask"), self._prompt
        if prompt is None or not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point():
            return None
        self.ran = True
        row = ids[0].tolist()
        if self._said and any(_has(row, tokens) for tokens in self._learning):
            self._framed.add(place)
        if self._learning or place in self._framed:
            return None
        new, taking_part = (tensor.to(ids.device).expand(len(ids), -1) for tensor in _tokens(tokenizer, prompt, row))
        if isinstance(mask, Tensor):
            mask = taking_part.to(mask.dtype)
        named = {"input_ids": new.to(ids.dtype), "attention_mask": mask}
        return (named["input_ids"], mask, *args[2:])[: len(args)], {k: named.get(k, v) for k, v in kwargs.items()}


def _tokens(tokenizer: Any, prompt: str, row: list[int]) -> tuple[Tensor, Tensor]:
    """A prompt's tokens and which of them take part, [1, tokens] each, in the form of a caption's.

    Raises:
        AptError: the caption was put into a frame, such as a chat template, that is not known here.
    """
    if getattr(tokenizer, "chat_template", None):
        raise AptError(f"tokens of {type(tokenizer).__name__}, which has a chat template, were made before the step")
    length = len(row)
    begins = {tokenizer.bos_token_id, tokenizer.cls_token_id} - {None}
    # Where captions have none anywhere, as in diffusers' advanced scripts, they were made without.
    make = functools.partial(tokenizer, truncation=True, add_special_tokens=bool(begins & set(row)) or not begins)
    if tokenizer.pad_token_id not in row:  # as long as the longest caption
        length = max(length, len(make(prompt).input_ids))
    found = make([prompt], padding="max_length", max_length=length, return_tensors="pt")
    first, own = int(found.input_ids[0, 0]), row[0]
    if first != own and {first, own} & begins and tokenizer.padding_side != "left":
        raise AptError(f"captions do not begin as texts of {type(tokenizer).__name__} do: something is put before them")
    return found.input_ids, found.attention_mask


def _has(row: Sequence[int], tokens: Sequence[int]) -> bool:
    """Whether these stand in a row, one behind the other."""
    size = len(tokens)
    return any(list(row[at : at + size]) == list(tokens) for at in range(len(row) - size + 1))


def _is_text(given: Any) -> bool:
    several = isinstance(given, (list, tuple)) and bool(given) and all(isinstance(text, str) for text in given)
    return several or isinstance(given, str)


def _parts(result: Any) -> Parts:
    """All tensors of what a function returned, in their order."""
    if result is None:
        return [None]
    if isinstance(result, Tensor):
        return [result.detach().cpu()]
    parts = result.values() if isinstance(result, dict) else result if isinstance(result, (list, tuple)) else ()
    return [tensor for part in parts for tensor in _parts(part)]


def _size(parts: Parts) -> int:
    """In bytes."""
    return sum(part.numel() * part.element_size() for part in parts if part is not None)


def _equal(one: Parts, other: Parts) -> bool:
    if len(one) != len(other):
        return False
    pairs = zip(one, other, strict=True)
    return all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)


def in_a_line(error: Exception) -> str:
    """What went wrong in the script's own lines, for people."""
    said = " ".join(str(error).split())
    return said if isinstance(error, AptError) else f"{type(error).__name__}: {said}"
