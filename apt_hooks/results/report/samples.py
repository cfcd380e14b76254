"""Pictures that sd-scripts drew during a training, found beside the log and made small enough for a page."""

from __future__ import annotations

import base64
import dataclasses
import datetime
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from apt_hooks.errors import AptError
from apt_hooks.results.read_steplog import run_name, steps_ahead

from .saved import Moment, Saved

MOST_MOMENTS, MOST_PROMPTS = 8, 4
SIDE = 256  # pixels, of what is shown
DEFAULT_NAME = "last"  # a run that was given no name is called so, but not in its pictures' names

_Any = TypeVar("_Any")


@dataclasses.dataclass(frozen=True)
class Samples:
    """The pictures of a run.

    Attributes:
        moments: the columns, such as ("epoch", 2), from early to late.
        prompts: the rows: the prompts' numbers, and the prompts themselves, empty where the log does not know them.
        pictures: data: URIs by moment and prompt; some may be missing.
        notes: what was left out, and why.
    """

    moments: list[Moment]
    prompts: dict[int, str]
    pictures: dict[tuple[Moment, int], str]
    notes: list[str]


def read_samples(log: Path, starts: Sequence[dict[str, Any]] = (), saved: Saved | None = None) -> Samples | None:
    """The sample pictures of a log's run, evenly chosen where there are many; None where it has none.

    Args:
        log: the step log, beside which they are looked for.
        starts: what it says of its run, `RunLog.starts`: by them steps are the log's, also where the trainer that drew
            the pictures counted from 1 again. Without, they are the trainer's. The last one's `sample_prompts` are
            the prompts.
        saved: the run's checkpoints; the pictures of the picked one are among those that are chosen.

    Raises:
        AptError: there are some, and Pillow is missing.
    """
    files, notes = _find(log, starts)
    if not files:
        return None
    try:
        from PIL import Image
    except ImportError as error:
        raise AptError(f'sample pictures need Pillow ({error}): pip install "apt-hooks[report]"') from error
    moments, prompts = sorted({moment for moment, _ in files}), sorted({prompt for _, prompt in files})
    chosen, rows = _chosen(moments, saved), _evenly(prompts, MOST_PROMPTS)
    if len(chosen) < len(moments):
        how = "those of checkpoints, " if saved else ""
        notes.append(f"{len(chosen)} of {len(moments)} moments are shown, {how}evenly chosen.")
    if len(rows) < len(prompts):
        notes.append(f"{len(rows)} of {len(prompts)} prompts are shown, evenly chosen.")
    pictures = {}
    for place in [(moment, prompt) for moment in chosen for prompt in rows]:
        if place in files:
            try:
                pictures[place] = _small(files[place])
            # What Pillow raises at broken pictures, by their kind.
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                notes.append(f"{files[place].name} is left out, it cannot be read ({error}).")
    texts = starts[-1].get("sample_prompts") or [] if starts else []
    known = {row: str(texts[row]) if row < len(texts) else "" for row in rows}
    return Samples(chosen, known, pictures, notes)


def _find(log: Path, starts: Sequence[dict[str, Any]]) -> tuple[dict[tuple[Moment, int], Path], list[str]]:
    """Pictures by moment and prompt; of several the newest, and none that an earlier run of that name left behind."""
    name = run_name(log)
    prefix = f"(?:{re.escape(name)}_)" + ("?" if name == DEFAULT_NAME else "")
    pattern = re.compile(
        rf"{prefix}(?P<epoch>e?)(?P<number>\d{{6,}})_(?P<prompt>\d{{2,}})_(?P<time>\d{{14}})(_-?\d+)?\.png"
    )
    found: dict[tuple[Moment, int], tuple[str, Path]] = {}
    begun = _begun(starts)
    newest: dict[tuple[str, int], str] = {}
    kept, older = {}, 0
    for path in sorted((log.parent / "sample").glob("*.png")):
        if match := pattern.fullmatch(path.name):
            moment = ("epoch" if match["epoch"] else "step", int(match["number"]))
            if begun:
                starts_before = [start for time, start in begun if time <= match["time"]]
                if not starts_before:
                    older += 1
                    continue
                moment = _in_the_log(moment, starts_before[-1])
            place = (moment, int(match["prompt"]))
            found[place] = max(found.get(place, ("", path)), (match["time"], path))
    for (moment, prompt), (time, path) in sorted(found.items()):
        kind = (moment[0], prompt)
        if time < newest.get(kind, ""):
            older += 1  # later in training, but drawn before: the run was begun anew since
            continue
        newest[kind] = time
        kept[moment, prompt] = path
    notes = (
        [f"Left out, since an earlier run of that name drew them, by the times in their names: {older}."]
        if older
        else []
    )
    return kept, notes


def _begun(starts: Sequence[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """The starts, and when each was, as pictures' names have it; none where one does not say, as in older logs."""
    try:
        times = [datetime.datetime.fromisoformat(start["loaded"]) for start in starts]
    except (KeyError, TypeError, ValueError):
        return []
    return [(time.strftime("%Y%m%d%H%M%S"), start) for time, start in zip(times, starts, strict=True)]


def _in_the_log(moment: Moment, start: dict[str, Any]) -> Moment:
    """A moment as the log counts it, of a picture drawn by a run that began so."""
    kind, number = moment
    if kind == "step":
        return kind, number + steps_ahead(start)
    # Of "epoch 0", before the first step, a resumed run's is what the state had come to.
    step = start.get("resumed_from", 0)
    return ("step", step) if step and not number else moment


def _chosen(moments: Sequence[Moment], saved: Saved | None) -> list[Moment]:
    """At most `MOST_MOMENTS`; of many those of checkpoints, and the picked one's in any case."""
    if saved is None or len(moments) <= MOST_MOMENTS:
        return _evenly(moments, MOST_MOMENTS)
    of_checkpoints, picked = saved.near_checkpoints(moments), saved.picked_among(moments)
    chosen = _evenly(of_checkpoints, MOST_MOMENTS)
    if picked is not None and picked not in chosen:  # so it is one within, and has a neighbour that gives way
        place = of_checkpoints.index(picked)
        near = min(range(1, len(chosen) - 1), key=lambda i: abs(of_checkpoints.index(chosen[i]) - place))
        chosen[near] = picked
    return chosen


def _evenly(items: Sequence[_Any], most: int) -> list[_Any]:
    """At most so many, evenly spaced, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _small(path: Path) -> str:
    from PIL import Image

    with Image.open(path) as picture:
        picture.load()
        small = picture.convert("RGB")
    small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    small.save(content, format="JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()
