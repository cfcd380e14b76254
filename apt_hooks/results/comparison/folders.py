"""Reading what `apt-hooks eval` wrote, and putting several of its folders side by side.

A comparison is fair where the pictures differ in the LoRA alone: base model, prompts, seeds and sampling have to be
equal.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from apt_hooks.errors import AptError
from apt_hooks.images import find_photos

FORMAT = 1
BASE = "base"  # the folder of the base model's pictures, so the name of no LoRA
MANIFEST = "manifest.json"


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt as the LoRAs got it, and without the identifier, as the base model got it."""

    text: str
    plain: str


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A folder of `apt-hooks eval`, by its manifest."""

    folder: Path
    model: str
    prompts: tuple[Prompt, ...]
    seeds: tuple[int, ...]
    sampling: Mapping[str, Any]
    loras: tuple[str, ...]
    references: tuple[Path, ...]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Pictures of the base model and of several methods, of the same prompts and seeds.

    Attributes:
        references: photos of the subject; may be none.
        base: folder of the base model's pictures ("prior").
        methods: folder of each method's pictures, by its name.
    """

    prompts: tuple[Prompt, ...]
    seeds: tuple[int, ...]
    references: tuple[Path, ...]
    base: Path
    methods: Mapping[str, Path]

    def picture(self, method: str | None, prompt: int, seed: int) -> Path:
        """File of a method's picture, None: the base model's, of a prompt (its index) and a seed."""
        return (self.base if method is None else self.methods[method]) / picture_name(prompt, seed)


def picture_name(prompt: int, seed: int) -> str:
    return f"{prompt:03d}-{seed}.png"


def read_comparison(
    folders: Sequence[Path], *, references: Path | None = None, methods: Sequence[str] | None = None
) -> Comparison:
    """Folders of `apt-hooks eval` as one comparison; a method that is in several is told apart by its folder's name.

    Args:
        folders: one or more.
        references: folder of photos of the subject, in place of those that the evaluations name.
        methods: which to keep, in this order; None: all.

    Raises:
        AptError: no folder of `apt-hooks eval`; folders that differ in more than their LoRAs; an unknown method;
            pictures or photos that are missing.
    """
    if not folders:
        raise AptError("compare takes one or more folders that `apt-hooks eval` wrote; found none")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise AptError(f"a folder is named twice: {', '.join(map(str, folders))}")
    evaluations = [read_evaluation(folder) for folder in folders]
    first = evaluations[0]
    for other in evaluations[1:]:
        _check_alike(first, other)
    found = _chosen(_methods(evaluations), methods)
    photos = find_photos(references) if references is not None else _references(evaluations)
    comparison = Comparison(first.prompts, first.seeds, photos, first.folder / BASE, found)
    _check_complete(comparison)
    return comparison


def read_evaluation(folder: Path) -> Evaluation:
    """What a folder's `manifest.json` says.

    Raises:
        AptError: there is none, it is none of `apt-hooks eval`, or one of a newer version.
    """
    path = folder / MANIFEST
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise AptError(
            f"{path}: cannot be read: {error.strerror}; name a folder that `apt-hooks eval` wrote"
        ) from error
    except ValueError as error:
        raise AptError(f"{path}: is no JSON ({error}); name a folder that `apt-hooks eval` wrote") from error
    version = found.get("format") if isinstance(found, dict) else None
    if version != FORMAT:
        raise AptError(f"{path}: must have format {FORMAT}; found {version!r}; was it written by another apt-hooks?")
    try:
        evaluation = Evaluation(
            folder=folder,
            model=_text(found["model"]),
            prompts=tuple(Prompt(_text(pair["prompt"]), _text(pair["plain"])) for pair in found["prompts"]),
            seeds=tuple(sorted(int(seed) for seed in found["seeds"])),
            sampling=dict(found["sampling"]),
            loras=tuple(found["loras"]),
            references=tuple(Path(_text(name)) for name in found["references"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise AptError(f"{path}: is no manifest of `apt-hooks eval` ({type(error).__name__}: {error})") from error
    if not evaluation.prompts or not evaluation.seeds:
        raise AptError(f"{path}: must have prompts and seeds; found {len(evaluation.prompts)} and {evaluation.seeds}")
    for name in evaluation.loras:
        if name in ("", ".", "..", BASE) or "/" in name or "\\" in name:  # it is a folder's name beside the base's
            raise AptError(f"{path}: a LoRA must have a folder's name other than {BASE!r}; found {name!r}")
    return evaluation


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _check_alike(first: Evaluation, other: Evaluation) -> None:
    difference = next(_differences(first, other), None)
    if difference is not None:
        raise AptError(
            f"{other.folder}: {difference} in {first.folder}; pictures are compared at equal model, prompts, seeds and "
            "sampling only: run `apt-hooks eval` anew for one of the two"
        )


def _differences(first: Evaluation, other: Evaluation) -> Iterator[str]:
    """What the other one has, and what the first: `seeds 0, 1, but 0, 1, 2`."""
    if other.model != first.model:
        yield f"model {other.model!r}, but {first.model!r}"
    if len(other.prompts) != len(first.prompts):
        yield f"{len(other.prompts)} prompts, but {len(first.prompts)}"
    for number, (its, firsts) in enumerate(zip(other.prompts, first.prompts, strict=False)):
        if its.text != firsts.text:
            yield f"prompt {number} is {its.text!r}, but {firsts.text!r}"
        if its.plain != firsts.plain:
            yield f"the plain prompt {number} is {its.plain!r}, but {firsts.plain!r}"
    if other.seeds != first.seeds:
        yield f"seeds {_list(other.seeds)}, but {_list(first.seeds)}"
    for key in sorted({*other.sampling, *first.sampling}):
        if other.sampling.get(key) != first.sampling.get(key):
            yield f"sampling with {key} {other.sampling.get(key)}, but {first.sampling.get(key)}"


def _list(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds[:8])) + (f", ... ({len(seeds)})" if len(seeds) > 8 else "")


def _methods(evaluations: Sequence[Evaluation]) -> dict[str, Path]:
    names = [name for evaluation in evaluations for name in evaluation.loras]
    labels = _labels([evaluation.folder for evaluation in evaluations])
    found: dict[str, Path] = {}
    for evaluation, label in zip(evaluations, labels, strict=True):
        for name in evaluation.loras:
            shown = name if names.count(name) == 1 else f"{name} ({label})"
            if shown in found:
                raise AptError(
                    f"{evaluation.folder}: has a LoRA {shown!r}, a name that another one has; rename a folder"
                )
            found[shown] = evaluation.folder / name
    if not found:
        raise AptError(f"{evaluations[0].folder}: has no LoRA to compare; run `apt-hooks eval` with one or more")
    return found


def _labels(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of paths that tell all of them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(part[-length:]) for part in parts]
        if len(set(labels)) == len(labels):
            break
    return labels


def _chosen(found: Mapping[str, Path], methods: Sequence[str] | None) -> Mapping[str, Path]:
    if methods is None:
        return found
    for name in methods:
        if name not in found:
            raise AptError(f"--methods: no method {name!r}; there are {', '.join(found)}")
    if len(set(methods)) < len(methods):
        raise AptError(f"--methods: a method is named twice; found {', '.join(methods)}")
    return {name: found[name] for name in methods}


def _references(evaluations: Sequence[Evaluation]) -> tuple[Path, ...]:
    """Those of all; the same prompts on photos of another subject would be another comparison."""
    first = evaluations[0]
    for other in evaluations[1:]:
        if other.references != first.references:
            raise AptError(
                f"{other.folder}: names other reference photos than {first.folder}; "
                "if it is the same subject, name its photos by --references"
            )
    missing = [path for path in first.references if not path.is_file()]
    if missing:
        raise AptError(
            f"{first.folder}: {len(missing)} of its {len(first.references)} reference photos are gone, "
            f"first {missing[0]}; name the subject's photos by --references"
        )
    return first.references


def _check_complete(comparison: Comparison) -> None:
    names = [picture_name(prompt, seed) for prompt in range(len(comparison.prompts)) for seed in comparison.seeds]
    paths = [folder / name for folder in (comparison.base, *comparison.methods.values()) for name in names]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise AptError(
            f"{len(missing)} of {len(paths)} pictures are missing, first {missing[0]}; run the same `apt-hooks eval` "
            "command again, it goes on where it stopped"
        )
