"""Scores of pictures by CLIP, as DreamBooth's paper has them: CLIP-T for the prompt, CLIP-I for the subject."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apt_hooks.images import find_photos, open_picture
from apt_hooks.integrations.embedders import CLIP, Clip


class ClipJudge:
    """Cosine similarities of pictures to a text, and to reference pictures.

    Args:
        references: folder of pictures of the subject.
        model: folder or name on the hub of a CLIP.

    Raises:
        AptError: no pictures there; a model that cannot be loaded.
    """

    def __init__(self, references: Path, model: str = CLIP) -> None:
        photos = find_photos(references)
        self._clip = Clip(model)
        self._references = self._clip.images([open_picture(path) for path in photos])

    def score(self, pictures: Sequence[Any], prompt: str) -> tuple[float, float]:
        """(text score, subject score) of PIL pictures: means of cosine similarities, the second over all pairs.

        Args:
            prompt: what the pictures should show, the identifier left out: CLIP does not know it.
        """
        images, text = self._clip.images(pictures), self._clip.texts([prompt])
        return (images @ text.T).mean().item(), (images @ self._references.T).mean().item()
