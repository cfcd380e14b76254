"""Judges by embeddings: how well pictures follow the prompt, how much of the subject they show, how they vary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apt_hooks.errors import AptError
from apt_hooks.images import open_picture
from apt_hooks.integrations.embedders import Clip

from .judge import Drawn, Metric, Score

_BATCH = 64  # pictures in memory at once


class TextJudge:
    """Mean cosine of a picture's and its plain prompt's embeddings: CLIP-T, or with HPSv2's weights its score."""

    def __init__(self, name: str, model: Clip) -> None:
        settings = "mean over pictures of the cosine with the prompt without the identifier"
        self.metrics = (Metric(name, "highest", model.name, settings),)
        self._model, self._pictures = model, Embedder(model.name, model.images)

    def score(self, drawn: Drawn) -> dict[str, Score]:
        images = self._pictures.of(drawn.files)
        different = list(dict.fromkeys(drawn.plain))
        texts = dict(zip(different, self._model.texts(different), strict=True))
        cosines = (images * torch.stack([texts[plain] for plain in drawn.plain])).sum(dim=1)
        return {self.metrics[0].name: Score.mean(cosines.tolist(), drawn.each)}


class SubjectJudge:
    """Mean cosine of a picture's and the reference photos' embeddings (DreamBooth's DINO score, by DINOv2)."""

    def __init__(self, model: Embedder, references: Sequence[Path]) -> None:
        settings = f"mean over pictures of the mean cosine with {len(references)} reference photos"
        self.metrics = (Metric("dino", "highest", model.name, settings),)
        self._model = model
        self._references = model.of(references)

    def score(self, drawn: Drawn) -> dict[str, Score]:
        cosines = (self._model.of(drawn.files) @ self._references.T).mean(dim=1)
        return {"dino": Score.mean(cosines.tolist(), drawn.each)}


class VarietyJudge:
    """Vendi score of a prompt's pictures, from 1, all alike, to their number, none like another; mean over prompts.

    Source: Friedman and Dieng 2023, arXiv 2210.02410, by the package of its authors.

    Args:
        seeds: pictures of a prompt, two or more.

    Raises:
        AptError: the package is missing.
    """

    def __init__(self, model: Embedder, seeds: int) -> None:
        try:
            from vendi_score import vendi
        except ImportError as error:
            raise AptError(f'the Vendi score needs vendi-score ({error}): pip install "apt-hooks[eval]"') from error
        settings = f"mean over prompts of the Vendi score of its {seeds} pictures (1 to {seeds}), cosine kernel"
        self.metrics = (Metric("vendi", "highest", model.name, settings),)
        self._model, self._score = model, vendi.score_X

    def score(self, drawn: Drawn) -> dict[str, Score]:
        of_prompts = self._model.of(drawn.files).double().split(drawn.each)
        return {"vendi": Score.mean([float(self._score(rows.numpy())) for rows in of_prompts])}


class Embedder:
    """Embeds pictures in files, each once.

    Args:
        name: of the model.
        images: unit vectors [pictures, channels] of PIL pictures.
    """

    def __init__(self, name: str, images: Callable[[Sequence[Any]], Tensor]) -> None:
        self.name, self._images = name, images
        self._known: dict[Path, Tensor] = {}

    def of(self, files: Sequence[Path]) -> Tensor:
        """[files, channels]; a few pictures in memory at a time.

        Raises:
            AptError: a file that is no picture.
        """
        new = [path for path in dict.fromkeys(files) if path not in self._known]
        for start in range(0, len(new), _BATCH):
            batch = new[start : start + _BATCH]
            self._known |= zip(batch, self._images([open_picture(path) for path in batch]), strict=True)
        return torch.stack([self._known[path] for path in files])
