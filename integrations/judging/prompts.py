"""Which prompts an evaluation draws: DreamBooth's own lists, or a file's."""

from __future__ import annotations

import importlib.resources
import re
from pathlib import Path

from apt_hooks.errors import AptError
from apt_hooks.results.comparison.folders import Prompt

SETS = ("object", "live")
"""DreamBooth's lists (arXiv 2208.12242, and its dataset): for things, and for animals."""


def read_prompts(which: str, subject: str, class_word: str) -> list[Prompt]:
    """The prompts as the LoRAs get them, and as base model and judges do, who do not know the identifier.

    Args:
        which: one of `SETS`, or a text file, a prompt a line, with `{}` in the place of the subject (or with the
            subject as it is).
        subject: identifier and class word, as the LoRAs were trained with: "sks dog".
        class_word: what stands in its place for the base model: "dog".

    Raises:
        AptError: no such file, no prompt in it, or one without the subject.
    """
    if not subject.strip() or not class_word.strip():
        raise AptError('--subject and --class-word must be words, as "sks dog" and "dog"; found none')
    found = []
    for number, line in enumerate(_text(which).splitlines(), start=1):
        if not (text := " ".join(line.split())) or text.startswith("#"):
            continue
        template = re.sub(rf"(?<!\w){re.escape(subject)}(?!\w)", "{}", text)
        if "{}" not in template:
            raise AptError(
                f"--prompts {which}: line {number}, {text[:60]!r}, must have {{}} where the subject is to be, "
                f"or {subject!r}"
            )
        found.append(Prompt(template.replace("{}", subject), template.replace("{}", class_word)))
    if not found:
        raise AptError(f"--prompts {which}: has no prompt; write one a line, as: a {{}} in the snow")
    if twice := {prompt.text for prompt in found if found.count(prompt) > 1}:
        raise AptError(f"--prompts {which}: {min(twice)!r} is there twice")
    return found


def _text(which: str) -> str:
    if which in SETS:
        return (importlib.resources.files(__package__) / "prompts" / f"{which}.txt").read_text(encoding="utf-8")
    try:
        return Path(which).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise AptError(
            f"--prompts {which}: is neither one of {', '.join(SETS)} nor a text file that can be read ({error})"
        ) from error
