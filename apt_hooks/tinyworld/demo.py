"""`apt-hooks demo`: a concept of the tiny world, personalized with and without APT, in pictures and numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import AptError, why_not_imported
from ..files import make_folder, write_atomically
from .concepts import CONCEPTS, IDENTIFIER
from .personalize import METHODS, Training, reference_pictures

if TYPE_CHECKING:
    from .evaluate import Examination
    from .experiment import Result

ROWS = 5
"""Prompts in `comparison.png`."""

_PICTURES = _COMPARISON, _INDICATOR, _DELTA_NOISE, _ATTENTION = (
    "comparison.png",
    "indicator.png",
    "delta_noise.png",
    "attention.png",
)
_FILLERS = {"a", "of", "in", "on", "at", "the", "with"}

NAMES = {
    "base": "base model",
    **{name: method.title for name, method in METHODS.items()},
}


def run_demo(
    out: Path,
    *,
    concept: int,
    seed: int,
    methods: Sequence[str],
    training: Training,
    scenes: int = 24,
    repeats: int = 3,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Personalize the tiny world's model by each method, and show the difference.

    Writes into `out`: `metrics.json`, `comparison.png`, `indicator.png`, `delta_noise.png`, `attention.png`, of each
    method the LoRA and apt-hooks' log, and for `apt-hooks eval` the pictures trained on and the prompts.

    Args:
        out: folder, made where it is missing.
        concept: number of a concept.
        seed: of everything; the same seed gives the same LoRAs on machines of a kind, however many their cores.
        methods: "base" and those of `METHODS`, in the order of the columns.
        training: what all methods share.
        scenes, repeats: prompts that are judged, and pictures of each.
        say: takes each line of text for the user.

    Returns:
        What `metrics.json` holds.

    Raises:
        AptError: no such concept or method, a missing package, or a folder that cannot be written to.
    """
    _check(concept, methods)
    try:
        import diffusers  # noqa: F401
        import matplotlib.figure  # noqa: F401
        import peft  # noqa: F401
        from rich.progress import Progress
    # A library beneath that does not fit is a RuntimeError.
    except (ImportError, RuntimeError) as error:
        raise AptError(
            f'the demo needs diffusers, peft and matplotlib ({why_not_imported(error)}): pip install "apt-hooks[demo]"'
        ) from error
    make_folder(out)
    from .evaluate import Examination
    from .experiment import run_method
    from .judge_networks import load_judges
    from .model import load_pipeline

    pipeline, judges = load_pipeline(), load_judges()
    references, captions = reference_pictures(CONCEPTS[concept]), CONCEPTS[concept].captions()
    say(f'concept {concept}: {len(references)} pictures of "{captions[0]}"; {training.steps} steps a method')
    results: dict[str, Result] = {}
    with Progress() as progress:
        task = progress.add_task("base model", total=_SAMPLING + sum(_cost(name, training) for name in methods))
        examination = Examination(
            pipeline, judges, CONCEPTS[concept], references, scenes=scenes, repeats=repeats, seed=seed
        )
        progress.advance(task, _SAMPLING)
        for name in methods:
            progress.update(task, description=NAMES[name])
            results[name] = run_method(
                name,
                examination,
                captions,
                training,
                seed=seed,
                out=out,
                advance=lambda: progress.advance(task),
            )
            progress.advance(task, _SAMPLING)
    scores = {name: result.metrics() for name, result in results.items()}
    metrics = {
        "concept": concept,
        "seed": seed,
        "steps": training.steps,
        "samples": len(examination.scenes),
        "methods": scores,
        "spread": {
            name: {of: round(x, 5) for of, x in result.judgement.spread.items()} for name, result in results.items()
        },
    }
    write_atomically(out / "metrics.json", (json.dumps(metrics, indent=1) + "\n").encode())
    drawn = _draw(out, examination, results)
    for line in table(scores):
        say(line)
    _write_task(out, examination)
    say(f"in {out}: {', '.join(drawn)}, metrics.json, of each method its LoRA and log; references/ and prompts.txt")
    return metrics


def table(methods: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Lines of text: a method a row."""
    lines = [" " * 22 + "".join(f"{column:>12}" for column in next(iter(methods.values())))]
    for name, scores in methods.items():
        lines.append(f"{NAMES[name]:22}" + "".join(f"{score:12.3f}" for score in scores.values()))
    return lines


_SAMPLING = 40
"""What the pictures of one method take, in training steps; for the progress bar."""


def _cost(name: str, training: Training) -> int:
    return _SAMPLING + (0 if name == "base" else training.steps)


def _draw(out: Path, examination: Examination, results: Mapping[str, Result]) -> list[str]:
    """Draw what there is to see, and take away pictures of an earlier run that there is nothing for; names them."""
    from ..results import pictures

    trained = {name: result.trained for name, result in results.items() if result.trained}
    for name in _PICTURES:
        (out / name).unlink(missing_ok=True)
    rows = [i * examination.repeats for i in range(min(ROWS, len(examination.scenes) // examination.repeats))]
    shown = {name: result.judgement.pictures[rows] for name, result in results.items()}
    prompts = [examination.prompts()[row] for row in rows]
    pictures.draw_comparison(out / _COMPARISON, prompts, examination.references, _titled(shown))
    if trained:
        curves = {NAMES[name]: (run.steps, run.delta_noise) for name, run in trained.items()}
        pictures.draw_delta_noise(out / _DELTA_NOISE, curves)
        most = [name for name in METHODS if name in trained][-1]  # of APT: METHODS goes from none of it to all
        pictures.draw_indicator(out / _INDICATOR, out / f"{most}-apt.jsonl", NAMES[most])
        seen = {name: results[name] for name in ("base", "dreambooth", most) if name in results}
    else:
        seen = dict(results)
    words = examination.prompts()[0].split()
    telling = [i for i, word in enumerate(words) if word not in _FILLERS]
    pictures.draw_attention(
        out / _ATTENTION,
        [words[i] for i in telling],
        _titled({name: result.judgement.pictures[0] for name, result in seen.items()}),
        _titled({name: result.attention[telling] for name, result in seen.items()}),
    )
    return [name for name in _PICTURES if (out / name).exists()]


def _write_task(out: Path, examination: Examination) -> None:
    """What the LoRAs were trained on and asked for, as `apt-hooks eval` takes it."""
    from ..results import pictures

    make_folder(out / "references")
    for i, picture in enumerate(examination.references):
        pictures.draw_grid(out / "references" / f"{i}.png", picture[None], 1)
    subject = f"{IDENTIFIER} {examination.scenes[0].subject.kind}"
    prompts = dict.fromkeys(prompt.replace(subject, "{}") for prompt in examination.prompts())
    write_atomically(out / "prompts.txt", "".join(f"{prompt}\n" for prompt in prompts).encode())


def _titled(by_method: Mapping[str, Any]) -> dict[str, Any]:
    return {NAMES[name]: value for name, value in by_method.items()}


def _check(concept: int, methods: Sequence[str]) -> None:
    if not 0 <= concept < len(CONCEPTS):
        raise AptError(f"--concept must be from 0 to {len(CONCEPTS) - 1}; found {concept}")
    known = ("base", *METHODS)
    for name in methods:
        if name not in known:
            raise AptError(f"--methods takes {', '.join(known)}, separated by commas; found {name!r}")
    if len(set(methods)) != len(methods) or not methods:
        raise AptError(f"--methods must name each method once; found {','.join(methods)!r}")
