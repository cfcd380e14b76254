"""The page's tables: what the runs came to and how they were set, one beside the other."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from apt_hooks.results.read_steplog import RunLog
from apt_hooks.training.steplog import VALUES

from .summary import Summary, fixed, number, share

_Row = tuple[str, list[str]]  # a name, and a cell a run
_NAMES = {
    "loss_tuned": "loss with the LoRA",
    "loss_frozen": "loss of the base model",
    "loss_weight": "factor of the loss",
    "delta_noise": "delta noise",
}
_ABOUT = (
    "preset",
    "augment_space",
    "indicator_units",
    "dropout",
    "trainer",
    "apt_hooks",
    "torch",
    "python",
    "started",
)  # and config, in its own table


def results_table(runs: Sequence[RunLog], found: Sequence[Summary]) -> str:
    """What was measured, a column a run."""
    rows: list[_Row] = [
        ("steps", [f"{int(run.steps[0])} to {int(run.steps[-1])}" for run in runs]),
        ("mean gamma", [fixed(one.mean_gamma) for one in found]),
        (
            "highest gamma of a bin",
            [fixed(float(one.gamma[one.highest()[0]])) if one.highest() else "\u2013" for one in found],
        ),
        ("mean gap (loss of base \u2212 of LoRA)", [number(one.mean_gap) for one in found]),
    ]
    for name in ("delta_noise", *VALUES):
        cells = [number(one.values[name]) for one in found]
        if (
            name != "augmented"
            and any(cell != "\u2013" for cell in cells)
            and (_NAMES.get(name, name), cells) not in rows
        ):
            rows.append((_NAMES.get(name, name), cells))
    rows.append(("images augmented, whole run", [share(one.augmented) for one in found]))
    if any(run.resumptions for run in runs):
        rows.append(("resumed behind step", [", ".join(map(str, run.resumptions)) or "\u2013" for run in runs]))
    rows.append(("last written", [f"{run.written:%Y-%m-%d %H:%M}" for run in runs]))
    return _table(runs, rows, differs=lambda cells: False)


def settings_table(runs: Sequence[RunLog]) -> str:
    """Configuration and versions of runs whose logs have them: what was overridden or differs, the rest folded away."""
    starts: list[dict[str, Any]] = [run.starts[-1] for run in runs]
    configs = [start.get("config", {}) for start in starts]
    overridden = [start.get("overrides", {}) for start in starts]
    first: list[_Row] = []
    rest: list[_Row] = []
    for name in dict.fromkeys(key for config in configs for key in config):
        cells = []
        for config, overrides in zip(configs, overridden, strict=True):
            text = json.dumps(config[name], ensure_ascii=False) if name in config else "\u2013"
            cells.append(f"{text} (own)" if name in overrides else text)
        telling = len(set(cells)) > 1 or any(name in overrides for overrides in overridden)
        (first if telling else rest).append((name, cells))
    about = [
        (name, [_text(start.get(name)) for start in starts])
        for name in _ABOUT
        if any(start.get(name) for start in starts)
    ]
    text = _table(runs, about + first, differs=lambda cells: len(set(cells)) > 1)
    if rest:
        more = _table(runs, rest, differs=lambda _: False)
        text += f"<details><summary>{len(rest)} more keys of [apt]</summary>{more}</details>"
    return text


def _text(value: object) -> str:
    return value if isinstance(value, str) and value else "\u2013" if value in (None, "") else json.dumps(value)


def _table(runs: Sequence[RunLog], rows: Sequence[_Row], *, differs: Callable[[list[str]], bool]) -> str:
    head = "".join(f'<th scope="col">{escape(run.name)}</th>' for run in runs)
    body = "".join(
        f'<tr{" class=differs" if differs(cells) else ""}><th scope="row">{escape(name)}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        + "</tr>"
        for name, cells in rows
    )
    return f'<div class="scroll"><table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
