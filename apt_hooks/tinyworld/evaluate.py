"""Scores a personalized model: pictures of prompts that move the concept elsewhere, judged against the base model's."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import AptError
from .concepts import IDENTIFIER, Concept
from .judge_networks import Judges, identity_score, text_score
from .metrics import black_frames, frechet_distance, precision_recall
from .model import decode_latents, encode_images, sample
from .render import render
from .world import BACKGROUNDS, PLACES, SECONDS, SIZES, STYLES, Scene, random_scene

METRICS = ("frechet", "precision", "recall", "text", "identity", "black_frames")
ASKED = ("kind", "size", "place", "background", "style", "second")
"""What the prompts ask for; the concept's own color is left to it."""


MOST_SCENES = len(SIZES) * len(PLACES) * (len(BACKGROUNDS) - 1) * len(STYLES) * (len(SECONDS) + 1)
"""How many scenes of one subject there are before other backgrounds than its references'."""


@dataclasses.dataclass
class Judgement:
    """Pictures and what the judges say of them.

    `scores` by the names of `METRICS`; `spread` has the standard deviation over the pictures of those scores that are
    a mean over them.
    """

    pictures: Tensor
    scores: dict[str, float]
    spread: dict[str, float]


class Examination:
    """The prompts of one concept, and the base model's pictures of them with the class word alone.

    Args:
        pipeline: the tiny world's, without a LoRA.
        concept, references: whom the LoRA is of, and its pictures, [pictures, 3, 64, 64].
        scenes: how many prompts, none of them before the references' background.
        repeats: pictures a prompt.
        seed: of the prompts and of the noise; the base model's pictures take another noise than those judged.
        base: features of the base model's pictures, `base` of another examination of these arguments; None draws them.

    Raises:
        AptError: more scenes than there are.
    """

    def __init__(
        self,
        pipeline: Any,
        judges: Judges,
        concept: Concept,
        references: Tensor,
        *,
        scenes: int = 24,
        repeats: int = 4,
        seed: int = 0,
        base: Tensor | None = None,
    ) -> None:
        self.pipeline, self.judges, self.concept, self.references = pipeline, judges, concept, references
        self.repeats = repeats
        if not 1 <= scenes <= MOST_SCENES:
            raise AptError(f"scenes must be from 1 to {MOST_SCENES}, as many prompts as there are; found {scenes}")
        self.scenes = [s for s in _elsewhere(concept, scenes, seed) for _ in range(repeats)]
        self._seed = seed
        self.drawn_references = as_decoded(pipeline, references)
        self.base = judges.features(sample(pipeline, self.prompts(None), seed=2 * seed)) if base is None else base

    def prompts(self, identifier: str | None = IDENTIFIER) -> list[str]:
        """A prompt a picture; without an identifier they ask for any member of the class."""
        return [scene.caption(rare_word=identifier, color=False) for scene in self.scenes]

    def judge(self, identifier: str | None = IDENTIFIER) -> Judgement:
        """Let the pipeline as it is now draw the prompts, and score what it draws."""
        return self.score(sample(self.pipeline, self.prompts(identifier), seed=2 * self._seed + 1))

    def ideal(self) -> Judgement:
        """What was asked, drawn by code, as the autoencoder shows it: what no model's scores can be much above."""
        rng = random.Random(self._seed)
        drawn = torch.stack([render(scene, rng) for scene in self.scenes])
        return self.score(as_decoded(self.pipeline, drawn))

    def score(self, pictures: Tensor) -> Judgement:
        """Score pictures of the prompts, one of each: [pictures, 3, 64, 64], from 0 to 1."""
        of_each, of_all = scores_of(self.judges, pictures, self.scenes, self.drawn_references, self.base)
        scores = of_all | {name: values.mean().item() for name, values in of_each.items()}
        scores["black_frames"] = black_frames(pictures).mean().item()
        return Judgement(pictures, scores, {name: values.std(correction=0).item() for name, values in of_each.items()})


def as_decoded(pipeline: Any, pictures: Tensor) -> Tensor:
    """Pictures as the autoencoder shows them: nothing that the model draws can be sharper, or truer in color."""
    return decode_latents(pipeline, encode_images(pipeline, pictures * 2 - 1))


def scores_of(
    judges: Judges, pictures: Tensor, scenes: Sequence[Scene], references: Tensor, base: Tensor
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Scores of each picture, [pictures], and those of all of them against the base model's features."""
    features = judges.features(pictures)
    precision, recall = precision_recall(base, features)
    of_each = {
        "text": text_score(judges.classifier, pictures, scenes, ASKED),
        "identity": identity_score(judges.identity, pictures, references),
    }
    return of_each, {"frechet": frechet_distance(base, features), "precision": precision, "recall": recall}


def _elsewhere(concept: Concept, count: int, seed: int) -> list[Scene]:
    rng = random.Random(seed)
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = random_scene(rng, concept.subject)
        if scene.background != concept.background and scene not in scenes:
            scenes.append(scene)
    return scenes


def agreement(pipeline: Any, judges: Judges, scenes: Sequence[Scene], seed: int) -> dict[str, float]:
    """The base model's share of pictures that show what the caption asks, by attribute, and `mean` over them."""
    pictures = sample(pipeline, [scene.caption() for scene in scenes], seed=seed)
    asked = (*ASKED, "color")
    shares = {name: text_score(judges.classifier, pictures, scenes, (name,)).mean().item() for name in asked}
    return {**shares, "mean": sum(shares.values()) / len(shares)}
