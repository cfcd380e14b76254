"""Captions as the frozen model reads them: the class word in place of the identifier."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Sequence

from apt_hooks.errors import AptError

logger = logging.getLogger("apt_hooks")


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

    def warn_of_absence(self) -> None:
        """Say that no caption has the identifier."""
        logger.warning("apt-hooks: identifier %r is in none of the captions", self.identifier)

    def check_lengths(self, tokenizers: Sequence[Callable[..., object]]) -> None:
        """Attention maps are compared token by token, so both words must take as many tokens.

        Raises:
            AptError: they do not.
        """
        for tokenizer in tokenizers:
            both = (self.identifier, self.class_word)
            # Behind a space, as within a caption: some tokenizers tell a word that begins a text apart.
            own, other = (len(word_tokens(tokenizer, f"a {word}")) - len(word_tokens(tokenizer, "a")) for word in both)
            if own != other:
                raise AptError(
                    f"[apt] identifier {self.identifier!r} is {own} tokens, class_word {self.class_word!r} is {other} "
                    f"({type(tokenizer).__name__}): "
                    "attention alignment compares token by token; choose words of equal length, or set lambda_attn = 0"
                )


def word_tokens(tokenizer: Callable[..., object], word: str) -> list[int]:
    """The ids of `word`, without those that begin and end a text."""
    return list(tokenizer(word, add_special_tokens=False).input_ids)  # type: ignore[attr-defined]
