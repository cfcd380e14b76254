"""What pictures are judged by: how well they follow the prompt, how much of the subject they show, how they vary."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from apt_hooks.errors import AptError
from apt_hooks.images import open_picture
from apt_hooks.integrations.embedders import Clip, Dino


@dataclasses.dataclass(frozen=True)
class Metric:
    """A column of the table.

    Attributes:
        name: as in `metrics.json`.
        best: "highest" or "lowest".
        model: that judges: its name or file.
        settings: what else the number depends on, in words.
    """

    name: str
    best: str
    model: str
    settings: str


@dataclasses.dataclass(frozen=True)
class Score:
    """A number, the number of things it is a mean over or of, and its standard error where it is a mean."""

    value: float
    n: int
    error: float | None = None

    @classmethod
    def mean(cls, values: Sequence[float]) -> Score:
        error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
        return cls(statistics.fmean(values), len(values), error)


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Pictures of one model, and what they are to be compared with.

    Attributes:
        files: the pictures, the same number of each prompt, prompt by prompt.
        plain: of each picture the prompt without the identifier.
        base: the base model's pictures of the same prompts and seeds; empty for the base model itself.
    """

    files: Sequence[Path]
    plain: Sequence[str]
    base: Sequence[Path]


class Judge(Protocol):
    """Something that has columns, and a score for each of them."""

    @property
    def metrics(self) -> tuple[Metric, ...]: ...

    def score(self, drawn: Drawn) -> dict[str, Score]:
        """By the metrics' names; one that does not apply is left out."""
        ...


class TextJudge:
    """Mean cosine of a picture's and its plain prompt's embeddings: CLIP-T, or with HPSv2's weights its score."""

    def __init__(self, name: str, model: Clip) -> None:
        settings = "mean over pictures of the cosine with the prompt without the identifier"
        self.metrics = (Metric(name, "highest", model.name, settings),)
        self._model = model

    def score(self, drawn: Drawn) -> dict[str, Score]:
        images = embeddings(self._model.images, drawn.files)
        different = list(dict.fromkeys(drawn.plain))
        texts = dict(zip(different, self._model.texts(different), strict=True))
        cosines = (images * torch.stack([texts[plain] for plain in drawn.plain])).sum(dim=1)
        return {self.metrics[0].name: Score.mean(cosines.tolist())}


class SubjectJudge:
    """Mean cosine of a picture's and the reference photos' embeddings (DreamBooth's DINO score, by DINOv2)."""

    def __init__(self, model: Dino, references: Sequence[Path]) -> None:
        settings = f"mean over pictures of the mean cosine with {len(references)} reference photos"
        self.metrics = (Metric("dino", "highest", model.name, settings),)
        self._model = model
        self._references = embeddings(model.images, references)

    def score(self, drawn: Drawn) -> dict[str, Score]:
        cosines = embeddings(self._model.images, drawn.files) @ self._references.T
        return {"dino": Score.mean(cosines.mean(dim=1).tolist())}


class VarietyJudge:
    """Vendi score of a prompt's pictures, from 1, all alike, to their number, none like another; mean over prompts.

    Source: Friedman and Dieng 2023, arXiv 2210.02410, by the package of its authors.

    Raises:
        AptError: the package is missing.
    """

    def __init__(self, images: Callable[[Sequence[Any]], Tensor], model: str, seeds: int) -> None:
        try:
            from vendi_score import vendi
        except ImportError as error:
            raise AptError(f'the Vendi score needs vendi-score ({error}): pip install "apt-hooks[eval]"') from error
        settings = f"mean over prompts of the Vendi score of its {seeds} pictures (1 to {seeds}), cosine kernel"
        self.metrics = (Metric("vendi", "highest", model, settings),) if seeds > 1 else ()
        self._images, self._seeds, self._score = images, seeds, vendi.score_X

    def score(self, drawn: Drawn) -> dict[str, Score]:
        if self._seeds < 2:
            return {}
        of_prompts = embeddings(self._images, drawn.files).double().split(self._seeds)
        return {"vendi": Score.mean([float(self._score(rows.numpy())) for rows in of_prompts])}


def embeddings(images: Callable[[Sequence[Any]], Tensor], files: Sequence[Path]) -> Tensor:
    """Of pictures in files, a few in memory at a time: [files, channels].

    Raises:
        AptError: a file that is no picture.
    """
    parts = [images([open_picture(path) for path in files[i : i + 16]]) for i in range(0, len(files), 16)]
    return torch.cat(parts)


def score_all(judges: Sequence[Judge], drawn: Mapping[str, Drawn], tell: Callable[[str], None]) -> dict[str, Any]:
    """Scores by model and metric.

    Args:
        tell: is told what is being judged.
    """
    scores: dict[str, dict[str, Score]] = {name: {} for name in drawn}
    for judge in judges:
        for name, shown in drawn.items():
            tell(f"{name}: {', '.join(metric.name for metric in judge.metrics)}")
            scores[name] |= judge.score(shown)
    return scores
