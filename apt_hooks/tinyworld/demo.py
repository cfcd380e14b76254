"""`apt-hooks demo`: a concept of the tiny world, personalized with and without APT, in pictures and numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import AptError, told_when_stopped, why_not_imported
from ..files import make_folder, write_atomically
from .concepts import CONCEPTS, IDENTIFIER
from .methods import METHODS
from .personalize import Training

if TYPE_CHECKING:
    from .evaluate import Examination
    from .experiment import Result

_PICTURES = _COMPARISON, _INDICATOR, _DELTA_NOISE, _ATTENTION = (
    "comparison.png",
    "indicator.png",
    "delta_noise.png",
    "attention.png",
)
_FILLERS = {"a", "of", "in", "on", "at", "the", "with"}

NAMES = {
    "ideal": "drawn by code",
    "base": "base model",
    **{name: method.title for name, method in METHODS.items()},
}
BETTER = {
    "frechet": "lower",
    "precision": "higher",
    "recall": "higher",
    "text": "higher",
    "identity": "higher",
    "black_frames": "lower",
    "delta_noise": "lower",
}
"""Columns of the table, and which direction is better."""


def run_demo(
    out: Path,
    *,
    concept: int,
    seed: int,
    methods: Sequence[str],
    training: Training,
    model: str = "unet",
    scenes: int = 24,
    repeats: int = 3,
    workers: int | None = None,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Personalize one of the tiny world's models by each method, and show the difference.

    Writes into `out`: `metrics.json`, `comparison.png`, `indicator.png`, `delta_noise.png`, `attention.png`, of each
    method the LoRA and apt-hooks' log, and for `apt-hooks eval` the pictures trained on and the prompts.

    Args:
        out: folder, made where it is missing.
        concept, seed, training, model, scenes, repeats: as in `experiment.Setting`.
        methods: "ideal", "base" and those of `METHODS`, in the order of the columns.
        workers: processes; None takes one a core.
        say: takes each line of text for the user.

    Returns:
        What `metrics.json` holds.

    Raises:
        AptError: no such concept, model or method, a missing package, or a folder that cannot be written to.
    """
    _check(concept, model, methods)
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
    from .experiment import Setting, run_methods

    setting = Setting(concept, seed, model, training, scenes, repeats)
    captions = CONCEPTS[concept].captions()
    say(f'concept {concept}: {len(captions)} pictures of "{captions[0]}"; {training.steps} steps a method')
    found: dict[str, Result] = {}
    trainings = sum(name in METHODS for name in methods)

    def kept() -> str:
        done = ", ".join(name for name in methods if name in found) or "none"
        return f"done: {done} of {len(methods)} methods, whose files are in {out}; the same command starts over"

    with told_when_stopped(kept), Progress() as progress:
        task = progress.add_task(
            f"{trainings} trainings", total=_SAMPLING * (1 + len(methods)) + trainings * training.steps
        )
        examination = setting.examination()
        progress.advance(task, _SAMPLING)
        ran = run_methods(
            methods, examination, setting, out=out, workers=workers, advance=lambda: progress.advance(task)
        )
        for name, result in ran:
            found[name] = result
            progress.advance(task, _SAMPLING)
    results = {name: found[name] for name in methods}
    scores = {name: result.metrics() for name, result in results.items()}
    metrics = {
        "model": model,
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
    """Lines of text: a method a row, and below which direction is better."""
    columns = list(next(iter(methods.values())))
    lines = [" " * 20 + "".join(f"{column:>13}" for column in columns)]
    for name, scores in methods.items():
        lines.append(f"{NAMES[name]:20}" + "".join(f"{scores[column]:13.3f}" for column in columns))
    return [*lines, f"{'better:':20}" + "".join(f"{BETTER[column]:>13}" for column in columns)]


_SAMPLING = 40
"""What the pictures of one method take, in training steps; for the progress bar."""


def shown_rows(examination: Examination) -> list[int]:
    """A prompt of each background, its first photo if there is one: what `comparison.png` shows, whatever came out."""
    scenes = examination.scenes
    first: dict[str, int] = {}
    for row in sorted(range(len(scenes)), key=lambda row: scenes[row].style != "photo"):
        first.setdefault(scenes[row].background, row)
    return sorted(first.values())


def _draw(out: Path, examination: Examination, results: Mapping[str, Result]) -> list[str]:
    """Draw what there is to see, and take away pictures of an earlier run that there is nothing for; names them."""
    from ..results import pictures

    trained = {name: result.trained for name, result in results.items() if result.trained}
    for name in _PICTURES:
        (out / name).unlink(missing_ok=True)
    rows = shown_rows(examination)
    shown = {name: result.judgement.pictures[rows] for name, result in results.items()}
    prompts = [examination.prompts()[row] for row in rows]
    pictures.draw_comparison(out / _COMPARISON, prompts, examination.references, _titled(shown))
    if trained:
        curves = {NAMES[name]: (run.steps, run.delta_noise) for name, run in trained.items()}
        pictures.draw_delta_noise(out / _DELTA_NOISE, curves)
        most = next(name for name in ("apt", *reversed(METHODS)) if name in trained)
        pictures.draw_indicator(out / _INDICATOR, out / f"{most}-apt.jsonl", NAMES[most])
        seen = {name: results[name] for name in ("base", "dreambooth", most) if name in results}
    else:
        seen = {name: result for name, result in results.items() if result.attention is not None}
    words = examination.prompts()[0].split()
    telling = [i for i, word in enumerate(words) if word not in _FILLERS]
    maps = {name: result.attention[telling] for name, result in seen.items() if result.attention is not None}
    if maps:
        pictures.draw_attention(
            out / _ATTENTION,
            [words[i] for i in telling],
            _titled({name: results[name].judgement.pictures[0] for name in maps}),
            _titled(maps),
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


def _check(concept: int, model: str, methods: Sequence[str]) -> None:
    from .experiment import UNTRAINED
    from .model import PIPELINES

    if not 0 <= concept < len(CONCEPTS):
        raise AptError(f"--concept must be from 0 to {len(CONCEPTS) - 1}; found {concept}")
    if model not in PIPELINES:
        raise AptError(f"--model takes {', '.join(PIPELINES)}; found {model!r}")
    known = (*UNTRAINED, *METHODS)
    for name in methods:
        if name not in known:
            raise AptError(f"--methods takes {', '.join(known)}, separated by commas; found {name!r}")
    if len(set(methods)) != len(methods) or not methods:
        raise AptError(f"--methods must name each method once; found {','.join(methods)!r}")
