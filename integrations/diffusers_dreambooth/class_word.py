"""What the frozen model reads: the class word in place of the identifier, wherever a script encodes its text.

A script may encode its captions in every step, or once, and forget the text encoders. In the first case the class word
is put into the tokens while the base model's pass encodes them; in the second the lines that encode run once more, with
the class word, and what came of that takes the place of what it came to before, when the U-Net is given it.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from apt_hooks.errors import AptError
from apt_hooks.hooks.frozen import frozen_base
from apt_hooks.method.deferred import Deferred

from ..class_captions import ClassCaptions, word_tokens

_WAY_OUT = "encode the captions by a function that is given the text encoders, or leave identifier and class_word out"


class ClassTokens:
    """Puts the class word into captions that are tokens already; the rest of a caption stays to the token.

    Args:
        captions: the two words.
        tokenizers: the script's, of transformers.

    Raises:
        AptError: there are none, or they read the words differently.
    """

    def __init__(self, captions: ClassCaptions, tokenizers: Sequence[Any]) -> None:
        if not tokenizers:
            raise AptError(
                "[apt] identifier needs the script's tokenizers, looked for among the variables of the function that "
                "trains; found none; load them there, or leave identifier and class_word out"
            )
        words = (captions.identifier, captions.class_word)
        read = {tuple(tuple(word_tokens(tokenizer, word)) for word in words) for tokenizer in tokenizers}
        if len(read) > 1:
            raise AptError(
                f"the script's tokenizers give {words[0]!r} and {words[1]!r} tokens that differ; this is not "
                "supported: leave identifier and class_word out"
            )
        ((own, other),) = read
        self._own, self._other = list(own), list(other)
        self._captions = captions
        self._tokenizer = tokenizers[0]
        self._known: dict[tuple[int, ...], tuple[list[int], int]] = {}

    def __call__(self, row: Sequence[int]) -> tuple[list[int], int]:
        """The row with the class word, as long as it was, and by how many tokens the caption in it has grown."""
        key = tuple(row)
        if key not in self._known:
            self._known[key] = self._replaced(list(row))
        return self._known[key]

    def _replaced(self, row: list[int]) -> tuple[list[int], int]:
        new: list[int] = []
        at = grown = 0
        while at < len(row):
            if self._is_word(row, at):
                new += self._other
                at += len(self._own)
                grown += len(self._other) - len(self._own)
            else:
                new.append(row[at])
                at += 1
        # The last token is padding, or ends a caption that fills the row.
        new = new[: len(row)] + [row[-1]] * (len(row) - len(new))
        end = self._tokenizer.eos_token_id
        if end in row and end not in new:
            new[-1] = end
        return new, grown

    def _is_word(self, row: list[int], at: int) -> bool:
        end = at + len(self._own)
        if row[at:end] != self._own:
            return False
        # A tokenizer may take one word apart: "x" and "sks" of "xsks".
        sides = (row[max(at - 1, 0) : end], row[at : end + 1])
        return all(self._captions.occurs_in([self._tokenizer.decode(s, skip_special_tokens=True)]) for s in sides)


class ClassWords:
    """The class word in what the base model is given; made before the script encodes any text.

    Args:
        captions: the two words.
        names: the variables of the function that trains, among them tokenizers and text encoders.

    Attributes:
        captions, tokenizers: the two words, and what reads them.

    Raises:
        AptError: as `ClassTokens`.
    """

    def __init__(self, captions: ClassCaptions, names: dict[str, Any]) -> None:
        from transformers import PreTrainedModel, PreTrainedTokenizerBase

        values = list(names.values())
        values += [v for value in values if isinstance(value, (list, tuple)) for v in value]
        self.tokenizers = _unique(v for v in values if isinstance(v, PreTrainedTokenizerBase))
        # Within a wrapper too, as peft's or that of several processes.
        inner = [[m for m in v.modules() if isinstance(m, PreTrainedModel)] for v in values if isinstance(v, nn.Module)]
        models = _unique(found[0] for found in inner if found)
        # Not to keep alive what the script forgets once it has encoded.
        self._encoders = [weakref.ref(model) for model in models]
        self.captions = captions
        self._tokens = ClassTokens(captions, self.tokenizers)
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._deferred = Deferred()
        self._ran = self._heard = self._ever_heard = False
        self._passes: int | None = 0  # until the identifier was heard, or its absence said
        self._epoch = math.inf
        self._watching = contextlib.ExitStack()
        self._watching.enter_context(self._hooked(replace=False))

    def keep(self, encode: Callable[[], Any]) -> None:
        """Run what has encoded text once more, with the class word, and keep both results."""
        if not self._ran:  # what was called did not encode
            return
        heard, self._ran, self._heard = self._heard, False, False
        with frozen_base(self._alive(), contextlib.nullcontext):
            own = _tensors(encode())
            other = own
            if heard:
                with self._hooked(replace=True):
                    other = _tensors(encode())
        self._ran = self._heard = False
        self._kept += [(a.detach().clone(), b.detach().clone()) for a, b in zip(own, other, strict=True)]

    def begin(self, batches: float) -> None:
        """The training begins, with so many batches an epoch."""
        self._watching.close()
        self._epoch = batches

    @contextlib.contextmanager
    def read_by(self, unet: nn.Module, counted: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
        """Inside, text encoders and `unet` are given the class word.

        Args:
            unet: the U-Net.
            counted: tells of a batch which samples count ([batch], None: all); a class image's text may be anything.

        Raises:
            AptError: the U-Net is given text of which it is not known what it is.
        """
        self._deferred.look()
        self._ran = False

        def swap(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            samples = next((given for given in (*args, *kwargs.values()) if isinstance(given, Tensor)), None)
            counts = None if samples is None else counted(samples)
            known: list[Tensor] = []
            new = _mapped((args, kwargs), lambda given: self._swapped(given, known))
            if not self._ran:
                self._check(known, counts)
            return new

        with contextlib.ExitStack() as stack:
            stack.enter_context(self._hooked(replace=True))
            stack.callback(unet.register_forward_pre_hook(swap, with_kwargs=True).remove)
            yield
        if self._passes is not None:
            self._passes += 1
            # What is encoded once is the same in every pass.
            self._take_notice(epoch_over=self._passes >= self._epoch or not self._ran)

    def close(self) -> None:
        """What the device has not told yet."""
        self._watching.close()
        self._deferred.look(wait=True)
        if self._passes:
            self._take_notice(epoch_over=True)

    def _take_notice(self, *, epoch_over: bool) -> None:
        if not self._ever_heard and epoch_over:
            self.captions.warn_of_absence()
        if self._ever_heard or epoch_over:
            self._passes = None

    # -- tokens ------------------------------------------------------------------------------------------------------

    def _alive(self) -> list[nn.Module]:
        return [model for model in (encoder() for encoder in self._encoders) if model is not None]

    @contextlib.contextmanager
    def _hooked(self, *, replace: bool) -> Iterator[None]:
        """Inside, it is noted what the text encoders read; with `replace` they read the class word."""

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
            given = {**dict(zip(("input_ids", "attention_mask"), args, strict=False)), **kwargs}
            ids = given.get("input_ids")
            if not isinstance(ids, Tensor) or ids.ndim != 2:
                return None
            rows = ids.tolist()
            read, grown = zip(*map(self._tokens, rows), strict=True)
            heard = list(read) != rows
            self._ran = True
            self._heard, self._ever_heard = self._heard or heard, self._ever_heard or heard
            if not replace or not heard:
                return None
            new = torch.tensor(read, dtype=ids.dtype, device=ids.device)
            mask = given.get("attention_mask")
            if isinstance(mask, Tensor) and any(grown):
                length = mask.sum(dim=1) + torch.tensor(grown, device=mask.device)
                mask = (torch.arange(mask.shape[1], device=mask.device) < length[:, None]).to(mask.dtype)
            named = {"input_ids": new, "attention_mask": mask}
            return (new, mask, *args[2:])[: len(args)], {k: named.get(k, v) for k, v in kwargs.items()}

        with contextlib.ExitStack() as stack:
            for encoder in self._alive():
                stack.callback(encoder.register_forward_pre_hook(hook, with_kwargs=True).remove)
            yield

    # -- what was encoded before the training ------------------------------------------------------------------------

    def _swapped(self, given: Tensor, known: list[Tensor]) -> Tensor:
        """`given`, its rows as they are with the class word; appends to `known` which were found ([batch])."""
        kept = [pair for pair in self._kept if pair[0].shape[1:] == given.shape[1:]]
        if not kept or not given.is_floating_point():
            return given
        new, found = given, torch.zeros(len(given), dtype=torch.bool, device=given.device)
        for own, other in kept:
            for a, b in zip(own.to(given), other.to(given), strict=True):
                same = (given == a).flatten(1).all(dim=1)
                new = torch.where(same.view(-1, *[1] * (given.ndim - 1)), b, new)
                found |= same
        known.append(found)
        return new

    def _check(self, known: list[Tensor], counts: Tensor | None) -> None:
        if not known:
            raise self._unknown_text()
        found = torch.stack(known).all(dim=0)
        unknown = ~found if counts is None else ~found & counts.to(found.device)
        self._deferred.expect(unknown.float(), self._take_unknown)

    def _take_unknown(self, unknown: list[float]) -> None:
        if any(unknown):
            raise self._unknown_text()

    def _unknown_text(self) -> AptError:
        return AptError(
            f"the U-Net was given text of which it cannot be told whether it has {self.captions.identifier!r} in it: "
            f"no text encoder ran in the base model's pass, and no line before the training gave this; {_WAY_OUT}"
        )


def _unique(values: Iterable[Any]) -> list[Any]:
    return list({id(value): value for value in values}.values())


def _tensors(result: Any) -> list[Tensor]:
    """What a function that encodes text returned, as far as it can be given to a U-Net: [batch, ...] each."""
    found: list[Tensor] = []
    _mapped(result, found.append)
    return [tensor for tensor in found if tensor.ndim > 1 and tensor.is_floating_point()]


def _mapped(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """`value` with the function's result for every tensor in it."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: _mapped(inner, function) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        mapped = [_mapped(inner, function) for inner in value]
        return tuple(mapped) if isinstance(value, tuple) else mapped
    return value
