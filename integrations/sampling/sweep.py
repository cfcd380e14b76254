"""`apt-hooks blend --sweep`: which checkpoint, or which two, of a training to keep."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from apt_hooks.errors import AptError
from apt_hooks.files import write_atomically
from apt_hooks.images import find_photos, open_picture
from apt_hooks.integrations.embedders import CLIP, Clip

from .dreamblend import DreamBlend
from .loras import Loras

_STEP = re.compile(r"-(?P<epoch>\d{6})$|-step(?P<step>\d+)$|(^|/)checkpoint-(?P<checkpoint>\d+)/|(^|/)(?P<name>\d+)$")


def find_checkpoints(folder: Path) -> dict[str, Path]:
    """LoRA files below a folder by name, from early to late: by the number their trainer gave them; none: the last.

    So kohya's `NAME-000002.safetensors` and `NAME.safetensors`, and those in diffusers' `checkpoint-500`, are in order.

    Raises:
        AptError: fewer than two.
    """
    if not folder.is_dir():
        raise AptError(f"--sweep {folder}: no such folder; name the one that a run has saved its LoRAs in")
    files = [p for p in sorted(folder.rglob("*.safetensors")) if not p.parent.name.endswith("-state")]
    if len(files) < 2:
        raise AptError(f"--sweep {folder}: needs two or more .safetensors, found {len(files)}")
    found = {path: _STEP.search("/".join(path.relative_to(folder).with_suffix("").parts)) for path in files}
    if len({match.lastgroup for match in found.values() if match}) > 1:
        raise AptError(f"--sweep {folder}: has checkpoints by epoch and by step, whose order is not known; part them")
    steps = {path: int(match[match.lastgroup]) if match and match.lastgroup else None for path, match in found.items()}
    ordered = sorted(files, key=lambda path: (steps[path] is None, steps[path] or 0))
    names = ["last" if steps[path] is None else str(steps[path]) for path in ordered]
    if len(set(names)) < len(names):
        names = [str(path.relative_to(folder).with_suffix("")).replace(".", "_") for path in ordered]
    return dict(zip(names, ordered, strict=True))


class ClipJudge:
    """Cosine similarities of pictures to a text, and to reference pictures: DreamBooth's CLIP-T and CLIP-I.

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


def sweep(
    pipeline: Any,
    files: Mapping[str, Path],
    judge: ClipJudge,
    prompt: str,
    plain_prompt: str,
    *,
    seeds: list[int],
    options: dict[str, Any],
    tell: Callable[[str], None] = lambda _: None,
    keep: Callable[[str, Any], None] = lambda _name, _picture: None,
    **guidance: Any,
) -> list[dict[str, Any]]:
    """Each checkpoint, and each pair of an earlier and a later one, with its scores.

    Args:
        files: of `find_checkpoints`.
        judge: scores pictures.
        prompt, plain_prompt: with the identifier, and without it, for the judge.
        tell: is told what is being drawn.
        keep: is given each picture as soon as it is there, with a name for it.
        guidance: of `DreamBlend`.

    Returns:
        `early` (None for a checkpoint alone), `late`, `text`, `subject`.
    """
    steps = list(files)
    pairs = [(None, late) for late in steps] + list(itertools.combinations(steps, 2))
    images: dict[tuple[str | None, str], list[Any]] = {pair: [] for pair in pairs}
    with Loras(pipeline, files) as loras:
        # A seed after another, so that no more than one run's attention is kept.
        for seed, early in itertools.product(seeds, steps):
            tell(f"seed {seed}, {early}")
            # Of the last one no attention is needed.
            own = guidance if early != steps[-1] else {**guidance, "guidance_steps": (0, 0)}
            run = DreamBlend(pipeline, early, early, loras=loras, **own).early(prompt, seed, **options)
            images[None, early] += run.images
            keep(f"{seed}-{early}", run.images[0])
            for late in steps[steps.index(early) + 1 :]:
                tell(f"seed {seed}, {early} + {late}")
                pair = DreamBlend(pipeline, early, late, loras=loras, **guidance)
                images[early, late] += pair.blend(run).images
                keep(f"{seed}-{early}+{late}", images[early, late][-1])
            del run  # before the next one is recorded
    rows = []
    for (early_or_none, late), shown in images.items():
        text, subject = judge.score(shown, plain_prompt)
        rows.append({"early": early_or_none, "late": late, "text": round(text, 4), "subject": round(subject, 4)})
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    write_atomically(path, (json.dumps(rows, indent=1) + "\n").encode())
