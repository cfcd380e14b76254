"""What the frozen model reads: the class word in place of the identifier, wherever a script encodes its text.

A script may encode its captions in every step, or once, and forget the text encoders. In the first case the class word
is put into the tokens while the base model's pass encodes them; in the second the lines that encode run once more, with
the class word, and what came of that takes the place of what it came to before, when the U-Net is given it.
"""

from __future__ import annotations

import contextlib
import functools
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from apt_hooks.errors import AptError, errors_in_one_line
from apt_hooks.hooks.call_structure import batch_axes, first_tensor, mapped
from apt_hooks.hooks.frozen import frozen_base
from apt_hooks.hooks.frozen_rows import Counted
from apt_hooks.method.deferred_checks import DeferredChecks

from ..class_captions import ClassCaptions, word_tokens

_WAY_OUT = "encode the captions by a function that is given the text encoders, or leave identifier and class_word out"


class ClassTokens:
    """Puts the class word into captions that are tokens already; the rest of a caption stays to the token.

    A tokenizer may read a word that begins a text, or is written otherwise, as other tokens (byte-level BPE does): each
    reading is looked for.

    Args:
        captions: the two words.
        tokenizer: what has made the tokens, of transformers.

    Attributes:
        pads_left: whether padding comes first.
    """

    def __init__(self, captions: ClassCaptions, tokenizer: Any) -> None:
        own, other = captions.identifier, captions.class_word
        self._readings: dict[tuple[int, ...], list[int]] = {}
        for before in ("", "a"):
            for written in (own, own.lower(), own.upper(), own.capitalize()):
                read = tuple(_behind(tokenizer, before, written))
                self._readings.setdefault(read, _behind(tokenizer, before, other))
        self.pads_left = tokenizer.padding_side == "left"
        self._captions = captions
        self._tokenizer = tokenizer
        self._known: dict[tuple[int, ...], tuple[list[int], int]] = {}

    def __call__(self, row: Sequence[int]) -> tuple[list[int], int]:
        """The row with the class word, as long as it was, and by how many tokens the caption in it has grown.

        Raises:
            AptError: the identifier is in the text, and not to be found among its tokens.
        """
        key = tuple(row)
        if key not in self._known:
            self._known[key] = self._replaced(list(row))
        return self._known[key]

    def _replaced(self, row: list[int]) -> tuple[list[int], int]:
        padding = self._tokenizer.pad_token_id
        begin = next((i for i, token in enumerate(row) if token != padding), 0) if self.pads_left else 0
        new: list[int] = []
        at, grown = begin, 0
        while at < len(row):
            word = next((read for read in self._readings if self._is_word(row, at, read)), None)
            if word is not None:
                new += self._readings[word]
                at += len(word)
                grown += len(self._readings[word]) - len(word)
            else:
                new.append(row[at])
                at += 1
        if self.pads_left:
            new = [padding] * (len(row) - len(new)) + new[: len(row)]
        else:  # the last token is padding, or ends a caption that fills the row
            new = new[: len(row)] + [row[-1]] * (len(row) - len(new))
        end = self._tokenizer.eos_token_id
        if end in row and end not in new:
            new[-1] = end
        text = self._tokenizer.decode(new, skip_special_tokens=True)
        if self._captions.occurs_in([text]) and not self._captions.occurs_in([self._captions.class_word]):
            raise AptError(
                f"[apt] identifier {self._captions.identifier!r} stands in {text[:200]!r}, but not as tokens of its "
                f"own ({type(self._tokenizer).__name__}): write it behind a space, or leave identifier and class_word "
                "out"
            )
        return new, grown

    def _is_word(self, row: list[int], at: int, read: tuple[int, ...]) -> bool:
        end = at + len(read)
        if tuple(row[at:end]) != read:
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
        AptError: no tokenizer is found, or none for a text encoder.
    """

    def __init__(self, captions: ClassCaptions, names: dict[str, Any]) -> None:
        models, self.tokenizers = text_models(names)
        if not self.tokenizers:
            raise AptError(
                "[apt] identifier needs the script's tokenizers, looked for among the variables of the function that "
                "trains; found none; load them there, or leave identifier and class_word out"
            )
        # Not to keep alive what the script forgets once it has encoded.
        self._encoders = [weakref.ref(model) for model in models]
        self.captions = captions
        self._tokens = [ClassTokens(captions, read_by(model, self.tokenizers)) for model in models]
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._deferred = DeferredChecks()
        self._ran = self._heard = self._ever_heard = self._lengths_change = False
        self._passes: int | None = 0  # until the identifier was heard, or its absence said
        self._epoch = math.inf
        self._watching = contextlib.ExitStack()
        self._watching.enter_context(self._hooked(replace=False))

    def keep(self, encode: Callable[[], Any]) -> None:
        """Run what has encoded text once more, with the class word, and keep both results."""
        if not self._ran:  # what was called did not encode
            return
        heard, self._ran, self._heard = self._heard, False, False
        with frozen_base(self._alive(), contextlib.nullcontext), encoding_again():
            own = _tensors(encode())
            other = own
            if heard:
                self._lengths_change = False
                with self._hooked(replace=True):
                    other = _tensors(encode())
        if self._lengths_change:
            with errors_in_one_line():
                raise self._unequal(
                    "this script tells its text encoder which tokens are padding: whether the rest of it goes by that "
                    "too is not known"
                )
        self._kept += [(a.detach().clone(), b.detach().clone()) for a, b in zip(own, other, strict=True)]

    def begin(self, batches: float) -> None:
        """The training begins, with so many batches an epoch."""
        self._watching.close()
        self._epoch = batches

    @contextlib.contextmanager
    def read_by(self, unet: nn.Module, counted: Counted) -> Iterator[None]:
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
            samples = first_tensor(args, kwargs)
            counts = None if samples is None else counted(samples)
            known: list[Tensor] = []
            batch = None if samples is None else len(samples)
            new = self._exchanged((args, kwargs), batch, known)
            if not self._ran:
                self._check(known, counts)
            return new

        with contextlib.ExitStack() as stack:
            stack.enter_context(self._hooked(replace=True))
            # Before other hooks: it is told the whole batch.
            stack.callback(unet.register_forward_pre_hook(swap, with_kwargs=True, prepend=True).remove)
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

    def _alive(self) -> dict[nn.Module, ClassTokens]:
        found = zip((encoder() for encoder in self._encoders), self._tokens, strict=True)
        return {model: tokens for model, tokens in found if model is not None}

    @contextlib.contextmanager
    def _hooked(self, *, replace: bool) -> Iterator[None]:
        """Inside, it is noted what the text encoders read; with `replace` they read the class word."""

        running: set[nn.Module] = set()

        def hook(
            tokens: ClassTokens, encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[Any, dict[str, Any]] | None:
            running.add(encoder)
            given = {**dict(zip(("input_ids", "attention_mask"), args, strict=False)), **kwargs}
            new, grown = self._read(tokens, given.get("input_ids"))
            if not replace or new is None:
                return None
            mask = given.get("attention_mask")
            if isinstance(mask, Tensor) and any(grown):
                length = (mask.sum(dim=1) + torch.tensor(grown, device=mask.device))[:, None]
                places = torch.arange(mask.shape[1], device=mask.device)
                taking_part = places >= mask.shape[1] - length if tokens.pads_left else places < length
                self._lengths_change = self._lengths_change or not bool(mask.all())
                mask = taking_part.to(mask.dtype)
            named = {"input_ids": new, "attention_mask": mask}
            return (new, mask, *args[2:])[: len(args)], {k: named.get(k, v) for k, v in kwargs.items()}

        def embed(encoder: nn.Module, tokens: ClassTokens, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any] | None:
            """Ideogram's pipeline runs the layers of its text encoder itself."""
            if encoder in running:
                return None
            new, grown = self._read(tokens, args[0])
            if not replace or new is None:
                return None
            with errors_in_one_line():
                if any(grown):
                    raise self._unequal("this script runs the text encoder layer by layer, with lengths of its own")
            return (new,)

        with contextlib.ExitStack() as stack:
            for encoder, tokens in self._alive().items():
                of_ids = encoder.get_input_embeddings()  # type: ignore[operator]
                handles = (
                    encoder.register_forward_pre_hook(functools.partial(hook, tokens), with_kwargs=True),
                    encoder.register_forward_hook(lambda model, *_: running.discard(model), always_call=True),
                    of_ids.register_forward_pre_hook(functools.partial(embed, encoder, tokens)),
                )
                for handle in handles:
                    stack.callback(handle.remove)
            yield

    def _read(self, tokens: ClassTokens, ids: Any) -> tuple[Tensor | None, Sequence[int]]:
        """Take notice of what is read; the ids with the class word, None without the identifier, and how much longer
        each caption is then."""
        if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point():
            return None, ()
        rows = ids.tolist()
        with errors_in_one_line():  # the script's own line is running
            read, grown = zip(*map(tokens, rows), strict=True)
        heard = list(read) != rows
        if script_encodes():
            self._ran = True
            self._heard, self._ever_heard = self._heard or heard, self._ever_heard or heard
        return (torch.tensor(read, dtype=ids.dtype, device=ids.device), grown) if heard else (None, grown)

    # -- what was encoded before the training ------------------------------------------------------------------------

    def _exchanged(self, given: Any, batch: int | None, known: list[Tensor]) -> Any:
        """`given` with the class word's text for its own; appends to `known` which samples' were found ([batch])."""
        if isinstance(given, Tensor):
            return self._rows_exchanged(given, batch, known)
        if isinstance(given, list) and given and all(isinstance(inner, Tensor) for inner in given):
            samples, found = zip(*map(self._sample_exchanged, given), strict=True)  # one each, as Z-Image has it
            if any(found):
                known.append(torch.tensor(found[:batch], device=given[0].device))
            return list(samples)
        return mapped(given, lambda inner: self._exchanged(inner, batch, known))

    def _sample_exchanged(self, given: Tensor) -> tuple[Tensor, bool]:
        for own, other in self._kept:
            if own.shape == given.shape and torch.equal(own.to(given), given):
                return other.to(given), True
        return given, False

    def _rows_exchanged(self, given: Tensor, batch: int | None, known: list[Tensor]) -> Tensor:
        if not given.is_floating_point():
            return given
        for axis in (0,) if batch is None else batch_axes(given, batch):
            if given.ndim <= axis + 1:
                continue
            rows = given.movedim(axis, 0)
            kept = [[t.movedim(axis, 0) for t in pair] for pair in self._kept if pair[0].ndim == given.ndim]
            kept = [pair for pair in kept if pair[0].shape[1:] == rows.shape[1:]]
            if not kept:
                continue
            new, found = rows, torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
            for own, other in kept:
                if own.shape != other.shape:
                    raise self._unequal(
                        f"this script fills texts up to the longest: {tuple(other.shape)} embeddings would stand in "
                        f"place of {tuple(own.shape)}"
                    )
                for a, b in zip(own.to(rows), other.to(rows), strict=True):
                    same = (rows == a).flatten(1).all(dim=1)
                    new = torch.where(same.view(-1, *[1] * (rows.ndim - 1)), b, new)
                    found |= same
            known.append(found)
            return new.movedim(0, axis)
        return given

    def _check(self, known: list[Tensor], counts: Tensor | None) -> None:
        if not known:
            raise self._unknown_text()
        found = torch.stack(known).all(dim=0)
        unknown = ~found if counts is None else ~found & counts.to(found.device)
        self._deferred.expect(unknown.float(), self._take_unknown)

    def _take_unknown(self, unknown: list[float]) -> None:
        if any(unknown):
            raise self._unknown_text()

    def _unequal(self, why: str) -> AptError:
        return AptError(
            f"[apt] identifier {self.captions.identifier!r} and class_word {self.captions.class_word!r} are of "
            f"different numbers of tokens, and {why}; choose words of equal length"
        )

    def _unknown_text(self) -> AptError:
        return AptError(
            f"the U-Net was given text of which it cannot be told whether it has {self.captions.identifier!r} in it: "
            f"no text encoder ran in the base model's pass, and no line before the training gave this; {_WAY_OUT}"
        )


class _Again:
    runs = False


@contextlib.contextmanager
def encoding_again() -> Iterator[None]:
    """Inside, text encoders run for apt-hooks: nobody takes that for something that the script has encoded."""
    before, _Again.runs = _Again.runs, True
    try:
        yield
    finally:
        _Again.runs = before


def script_encodes() -> bool:
    """Whether a text encoder that runs now does so for the script (`encoding_again`)."""
    return not _Again.runs


def text_models(names: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """Text encoders and tokenizers among the variables of the function that trains, each once."""
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

    values = list(names.values())
    values += [v for value in values if isinstance(value, (list, tuple)) for v in value]
    values += [v for value in values if isinstance(value, dict) for v in value.values()]
    # A model that reads pictures too has its tokenizer in a processor.
    values += [getattr(v, "tokenizer", None) for v in values if isinstance(v, ProcessorMixin)]
    tokenizers = _unique(v for v in values if isinstance(v, PreTrainedTokenizerBase))
    # Within a wrapper too, as peft's or that of several processes.
    inner = [[m for m in v.modules() if isinstance(m, PreTrainedModel)] for v in values if isinstance(v, nn.Module)]
    return [model for model in _unique(found[0] for found in inner if found) if _known_tokens(model)], tokenizers


def _behind(tokenizer: Any, before: str, word: str) -> list[int]:
    """The ids of `word` behind another one, or at the begin of a text."""
    return word_tokens(tokenizer, f"{before} {word}".strip())[len(word_tokens(tokenizer, before)) if before else 0 :]


def _known_tokens(model: Any) -> int:
    """How many tokens a model has embeddings of; 0: it reads no text, as one of pictures."""
    try:
        weight = model.get_input_embeddings().weight
    except (NotImplementedError, AttributeError):
        return 0
    return len(weight) if weight.ndim == 2 else 0


def read_by(encoder: Any, tokenizers: Sequence[Any]) -> Any:
    """The tokenizer of a text encoder: that whose words fill its table of embeddings best."""
    rows = _known_tokens(encoder)
    fitting = [tokenizer for tokenizer in tokenizers if len(tokenizer) <= rows]
    if not fitting:
        raise AptError(
            f"[apt] identifier needs the tokenizer of {type(encoder).__name__}, which has embeddings of {rows} tokens; "
            f"those among the variables of the function that trains know {', '.join(str(len(t)) for t in tokenizers)}; "
            "load it there, or leave identifier and class_word out"
        )
    return max(fitting, key=len)


def _unique(values: Iterable[Any]) -> list[Any]:
    return list({id(value): value for value in values}.values())


def _tensors(result: Any) -> list[Tensor]:
    """What a function that encodes text returned, as far as it can be given to a U-Net: [batch, ...] each."""
    if isinstance(result, Tensor):
        return [result] if result.ndim > 1 and result.is_floating_point() else []
    parts = result.values() if isinstance(result, dict) else result if isinstance(result, (list, tuple)) else ()
    return [tensor for part in parts for tensor in _tensors(part)]
