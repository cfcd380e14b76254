"""`apt-hooks blend --sweep`: which checkpoint, or which two, of a training to keep."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from apt_hooks.errors import AptError
from apt_hooks.files import write_atomically

from .dreamblend import DreamBlend
from .judges import ClipJudge
from .loras import LoraFile, Loras


def find_checkpoints(folder: Path) -> dict[str, Path]:
    """LoRA files below a folder by name, from early to late: by the last number in their paths; without one, the last.

    So kohya's `NAME-000002.safetensors` and `NAME.safetensors`, and those in diffusers' `checkpoint-500`, are in order.

    Raises:
        AptError: fewer than two.
    """
    files = sorted(folder.rglob("*.safetensors"))
    numbers = {path: re.findall(r"\d+", str(path.relative_to(folder).with_suffix(""))) for path in files}
    ordered = sorted(files, key=lambda path: (not numbers[path], int(numbers[path][-1]) if numbers[path] else 0))
    if len(ordered) < 2:
        raise AptError(f"--sweep {folder}: needs two or more .safetensors, found {len(ordered)}")
    names = [str(int(numbers[path][-1])) if numbers[path] else "last" for path in ordered]
    if len(set(names)) < len(names):
        names = [str(path.relative_to(folder).with_suffix("")).replace(".", "_") for path in ordered]
    return dict(zip(names, ordered, strict=True))


def sweep(
    pipeline: Any,
    folder: Path,
    judge: ClipJudge,
    prompt: str,
    plain_prompt: str,
    *,
    seeds: list[int],
    options: dict[str, Any],
    tell: Callable[[str], None] = lambda _: None,
    **guidance: Any,
) -> list[dict[str, Any]]:
    """Each checkpoint, and each pair of an earlier and a later one, with its scores.

    Args:
        judge: scores pictures.
        prompt, plain_prompt: with the identifier, and without it, for the judge.
        tell: is told what is being drawn.
        guidance: of `DreamBlend`.

    Returns:
        `early` (None for a checkpoint alone), `late`, `text`, `subject`.
    """
    files = find_checkpoints(folder)
    loaded: dict[str, LoraFile] = {f"checkpoint_{name}": path for name, path in files.items()}
    names, steps = dict(zip(files, loaded, strict=True)), list(files)
    pairs = [(None, late) for late in steps] + list(itertools.combinations(steps, 2))
    images: dict[tuple[str | None, str], list[Any]] = {pair: [] for pair in pairs}
    with Loras(pipeline, loaded) as loras:
        # A seed after another, so that no more than one run's attention is kept.
        for seed, early in itertools.product(seeds, steps):
            tell(f"seed {seed}, {early}")
            run = DreamBlend(pipeline, names[early], names[early], loras=loras, **guidance).early(
                prompt, seed, **options
            )
            images[None, early] += run.images
            for late in steps[steps.index(early) + 1 :]:
                tell(f"seed {seed}, {early} + {late}")
                pair = DreamBlend(pipeline, names[early], names[late], loras=loras, **guidance)
                images[early, late] += pair.blend(run).images
    rows = []
    for (early_or_none, late), shown in images.items():
        text, subject = judge.score(shown, plain_prompt)
        rows.append({"early": early_or_none, "late": late, "text": round(text, 4), "subject": round(subject, 4)})
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    write_atomically(path, (json.dumps(rows, indent=1) + "\n").encode())
