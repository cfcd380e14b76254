"""What the trainer's sample pictures are of, whose names have the prompts' numbers alone."""

from __future__ import annotations

import sys

_READER, _PLACES = "load_prompts", ("library.sampling", "library.train_util")  # since 0.11, and before


def sample_prompts(path: str | None) -> list[str]:
    """The prompts of pictures 00, 01 and so on, as the trainer reads its file of them; empty where it cannot."""
    reader = next((found for name in _PLACES if (found := getattr(sys.modules.get(name), _READER, None))), None)
    if not path or reader is None:
        return []
    try:
        return [str(prompt.get("prompt", "")) for prompt in reader(path)]
    except (OSError, ValueError, LookupError, TypeError, AssertionError):  # the trainer says it, once it draws
        return []
