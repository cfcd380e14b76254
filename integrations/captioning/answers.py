"""From what a model answers to a caption."""

from __future__ import annotations

import math
import re

from apt_hooks.errors import AptError

CLIP_TOKENS = 75
"""What CLIP reads of a caption: its 77, less the begin and the end."""

TOKENS_A_WORD = 1.3  # of CLIP, for words with the commas between them: 1.2 to 1.4 in captions as ours


class NoCaption(AptError):
    """A photo gets no caption; others may."""


class BadAnswer(NoCaption):
    """A model's answer is no caption; another try may bring one."""


def caption_of(answer: str, subject: str) -> str:
    """A model's answer as a caption: one line that has the subject's words, as `with_subject` puts them there.

    Reasoning, an introduction ("Caption:", "Sure, here is ...:"), Markdown and quotation marks around it all go.

    Raises:
        BadAnswer: nothing is left, or the answer is an excuse.
    """
    # Of templates that open it themselves, the closing tag is all there is; what is not closed was cut off.
    text = re.sub(rf"^.*</{_REASONING}>", "", answer, flags=re.DOTALL | re.IGNORECASE)
    text = re.sub(rf"<{_REASONING}>.*", "", text, flags=re.DOTALL | re.IGNORECASE)
    text = re.sub(r"</?(?:answer|caption)>|^\s*```\w*\n|```|\*\*", "", text, flags=re.IGNORECASE)
    # The first part that has words: before it may stand an introduction, and behind it a farewell.
    parts = (_bare(part) for part in re.split(r"\n\s*\n", text))
    text = next((part for part in parts if any(character.isalnum() for character in part)), "")
    if not text:
        left = shorten(answer, 60)
        raise BadAnswer(f"no caption is in the model's answer: {left}" if left else "the model's answer is empty")
    if _EXCUSE.match(text.replace("\u2019", "'")):
        raise BadAnswer(f"the model refuses: {shorten(text)}")
    return with_subject(text, subject)


def with_subject(caption: str, subject: str) -> str:
    """The caption with the subject's words in it, as they are written in `subject`.

    The rule: where they stand as whole words, in any case and with any spaces, they stay there; otherwise
    "a photo of SUBJECT, " is put before the caption. Nothing else in it is touched.
    """
    words = r"\s+".join(re.escape(word) for word in subject.split())
    caption, found = re.subn(rf"(?<!\w){words}(?!\w)", lambda _: subject, caption, flags=re.IGNORECASE)
    if found:
        return caption
    return f"a photo of {subject}, {_ARTICLE.sub(lambda article: article[0].lower(), caption)}"


def estimated_tokens(caption: str) -> int:
    """How many tokens CLIP would make of a caption, by its words: an estimate, good to a tenth or so."""
    return math.ceil(TOKENS_A_WORD * len(caption.split()))


def one_line(text: str) -> str:
    """A text with one space for each run of white space, and without what cannot be shown or encoded."""
    return " ".join("".join(c for c in text if c.isprintable() or c.isspace()).split())


def shorten(text: str, length: int = 200) -> str:
    """`one_line`, cut to a length."""
    text = one_line(text)
    return text if len(text) <= length else text[: length - 3].rstrip() + "..."


_REASONING = r"(?:think|thinking|thought|reasoning)"
_INTRODUCTION = re.compile(
    r"^(?:(?:sure|sure thing|certainly|of course|okay|ok|yes)[!,.:]|here(?:'s|\u2019s| is)\b[^:]{0,80}:(?!\d)|"
    r"(?:(?:the|this|my|image|photo|training|final|short) ){0,4}(?:caption|description|answer)"
    r"(?: for [^:]{0,60}| is)?:)",
    re.IGNORECASE,
)
_EXCUSE = re.compile(
    r"(?:i'm (?:very |so )?sorry|i am sorry|sorry,|i apologi[sz]e|i (?:can't|cannot|can not|won't|must decline)|"
    r"i(?:'m| am) (?:unable|not able)|i (?:don't|do not)|as an ai\b|unfortunately,? i\b|"
    r"please (?:upload|provide|share))",
    re.IGNORECASE,
)
_ARTICLE = re.compile(r"^(?:A|An|The)(?= )")
_QUOTES = {'"': '"', "'": "'", "“": "”", "\u2018": "\u2019", "«": "»", "„": "“", "`": "`"}


def _bare(text: str) -> str:
    """In one line, without introductions, Markdown and quotation marks around it."""
    text, before = one_line(text), None
    while text != before:
        before = text
        text = _unquoted(_INTRODUCTION.sub("", text.lstrip("#>*- ")).strip())
    return text


def _unquoted(text: str) -> str:
    """Without the quotation marks around all of it; those around parts of it stay."""
    if len(text) > 1 and _QUOTES.get(text[0]) == text[-1]:
        inner = text[1:-1]
        # An apostrophe in the text is no end of a quotation that began with one.
        pairs = re.sub(r"(?<=\w)['\u2019](?=\w)", "", inner)
        if text[0] not in pairs and text[-1] not in pairs:
            return inner.strip()
    return text
