"""The tiny world's own judges, for its model: CLIP knows nothing of its pictures."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from apt_hooks.errors import AptError
from apt_hooks.images import open_picture, to_tensor
from apt_hooks.tinyworld.evaluate import ASKED, as_decoded, scores_of
from apt_hooks.tinyworld.judge_networks import load_judges
from apt_hooks.tinyworld.model import load_pipeline
from apt_hooks.tinyworld.world import BACKGROUNDS, KINDS, PLACES, SECONDS, SIZES, STYLES, Scene, Subject

from .fidelity_judge import AGAINST, check_number
from .judge import Drawn, Metric, Score


class TinyWorldJudge:
    """Text and identity score, Fréchet distance, precision and recall, as in `apt-hooks demo`.

    Args:
        prompts: without the identifier.
        references: photos of the subject.
        pictures: of each model, as many as there will be.

    Raises:
        AptError: a prompt that is no caption of the tiny world; too few pictures.
    """

    def __init__(self, prompts: Sequence[str], references: Sequence[Path], pictures: int) -> None:
        check_number(pictures)
        self._judges = load_judges()
        self._scenes = _scenes(prompts)
        self._references = as_decoded(load_pipeline(), _read(references))
        own = "the tiny world's"
        self.metrics = (
            Metric("text", "highest", f"{own} classifier", f"mean share of {', '.join(ASKED)} as asked"),
            Metric("identity", "highest", f"{own} identity encoder", f"mean cosine to {len(references)} photos' mean"),
            Metric("frechet", "lowest", f"{own} classifier", AGAINST),
            Metric("precision", "highest", f"{own} classifier", f"{AGAINST}; 3 nearest neighbors"),
            Metric("recall", "highest", f"{own} classifier", f"{AGAINST}; 3 nearest neighbors"),
        )

    def score(self, drawn: Drawn) -> dict[str, Score]:
        scenes = [self._scenes[plain] for plain in drawn.plain]
        base = self._judges.features(_read(drawn.base))
        of_each, of_all = scores_of(self._judges, _read(drawn.files), scenes, self._references, base)
        means = {name: Score.mean(values.tolist(), drawn.each) for name, values in of_each.items()}
        return means | {name: Score(value, len(drawn.files)) for name, value in of_all.items()}


def _scenes(prompts: Sequence[str]) -> dict[str, Scene]:
    seconds: tuple[str | None, ...] = (None, *SECONDS)
    known = {}
    for kind, size, place, background, style, second in itertools.product(
        KINDS, SIZES, PLACES, BACKGROUNDS, STYLES, seconds
    ):
        scene = Scene(Subject(kind, "red"), size, place, background, style, second)
        known[scene.caption(color=False)] = scene
    for prompt in prompts:
        if prompt not in known:
            raise AptError(f"--prompts: {prompt!r} is no caption of the tiny world, such as {next(iter(known))!r}")
    return {prompt: known[prompt] for prompt in prompts}


def _read(files: Sequence[Path]) -> Tensor:
    """[files, 3, 64, 64], from 0 to 1."""
    return torch.stack([to_tensor(open_picture(path).resize((64, 64))) for path in files]).float() / 255
