"""`apt-hooks pick --judge`: a run's checkpoints by the scores that `apt-hooks eval` gives each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from apt_hooks.errors import AptError
from apt_hooks.integrations.sampling.pipelines import TINY_WORLDS
from apt_hooks.results.comparison.folders import BASE
from apt_hooks.results.pareto_front import front
from apt_hooks.results.pictures import draw_curves
from apt_hooks.results.read_checkpoints import SavedRun

from .evaluation import METRICS, run_eval

SUBJECT_AND_PROMPT = {True: ("identity", "text"), False: ("dino", "clip_t")}
"""What `eval` calls them: with the tiny world's model, and with any other."""


def judge_run(
    run: SavedRun, model: str, references: Path, prompts: str, out: Path, *, say: Callable[[str], None], **options: Any
) -> list[str]:
    """Draw the same prompts from the same noise with each checkpoint that is still there, and judge them.

    Writes into `out` what `run_eval` does, and `curves.png`: both scores over the steps, and against each other.

    Args:
        run: its checkpoints' files lie beside its lines.
        model, references, prompts, say, options: as for `run_eval`.

    Returns:
        Lines of text: each checkpoint's scores, and which of them are on the front of subject against prompt. None of a
        process that is not the first.

    Raises:
        AptError: fewer than two checkpoints are there; as `run_eval`.
    """
    files = {one.step: run.path.parent / one.file for one in run.checkpoints}
    files = {step: file for step, file in files.items() if file.exists()}
    if len(files) < 2:
        raise AptError(
            f"{run.path}: --judge needs two checkpoints or more; {len(files)} of {len(run.checkpoints)} are there"
        )
    own = model in TINY_WORLDS
    metrics = METRICS if own else ("clip", "dino")
    scores = run_eval(model, list(files.values()), references, prompts, out, metrics=metrics, say=say, **options)
    if not scores:
        return []
    axes = SUBJECT_AND_PROMPT[own]
    of_steps = dict(zip(files, (scores[name] for name in scores if name != BASE), strict=True))
    curve = {step: {axis: (of[axis].value, of[axis].error or 0.0) for axis in axes} for step, of in of_steps.items()}
    beaten = front({step: (of[axes[0]][0], of[axes[1]][0]) for step, of in curve.items()})
    steps = [step for step, by in beaten.items() if by is None]
    draw_curves(out / "curves.png", {run.name: curve}, axes, front=steps)
    lines = [f"{'step':>8}  {axes[0]:>15}  {axes[1]:>15}"]
    for step, of in curve.items():
        cells = "  ".join(f"{value:.3f} ± {error:.3f}".rjust(15) for value, error in of.values())
        lines.append(f"{step:8}  {cells}  {'' if beaten[step] is None else f'step {beaten[step]} is better'}".rstrip())
    said = f"On the front of subject ({axes[0]}) against prompt ({axes[1]}): step{'s' if len(steps) > 1 else ''} "
    return [*lines, said + f"{', '.join(map(str, steps))}; drawn in {out / 'curves.png'}"]
