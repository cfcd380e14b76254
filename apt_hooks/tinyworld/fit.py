"""Trainings that go on where they were stopped: checkpoints and data in files that know what they are of."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from ..errors import AptError

CHECKPOINT_EVERY = 200
FALL_FROM = 2000


def fit(
    name: str,
    modules: dict[str, Any],
    steps: int,
    lr: float,
    loss: Callable[[torch.Generator], tuple[Tensor, dict[str, float]]],
    work: Path,
    settings: dict[str, Any],
    *,
    seed: int,
    ema: float | None = None,
    endless: bool = False,
) -> dict[str, Any]:
    """Train `modules` in place to their (averaged) weights; returns what the card tells of it.

    The checkpoint is `work/NAME.pt`. Every step draws from a random stream of its own.

    Args:
        loss: what to differentiate, and what to log, drawn with the generator that it is given.
        settings: what the training depends on beside steps and seed.
        ema: decay of the averaged weights; None takes the last ones.
        endless: the learning rate does not depend on `steps`, so that a checkpoint may go on to any number of them:
            the average stands in for a decay to nothing. Otherwise it falls as a cosine.

    Raises:
        AptError: the checkpoint is of other settings, or of more steps.
    """
    path = work / f"{name}.pt"
    settings = {**({} if endless else {"steps": steps}), "seed": seed, **settings}
    parameters = [p for module in modules.values() for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr, betas=(0.9, 0.99), weight_decay=1e-2)
    average = [p.detach().clone() for p in parameters] if ema else parameters
    record: dict[str, Any] = {"steps": 0, "seconds": 0.0, "losses": []}
    if path.exists():
        saved = _load(path, settings)
        optimizer.load_state_dict(saved["optimizer"])
        record = saved["record"]
        with torch.no_grad():
            for into, values in ((parameters, saved["parameters"]), (average, saved["average"])):
                for p, value in zip(into, values, strict=True):
                    p.copy_(value)
    if record["steps"] > steps:
        raise AptError(f"{path} is of {record['steps']} steps, asked are {steps}: give at least as many")
    recent: list[dict[str, float]] = []
    since = time.monotonic()
    for step in track(range(record["steps"], steps), description=name):
        for group in optimizer.param_groups:
            fall = _root(step) if endless else 0.5 + 0.5 * math.cos(math.pi * step / steps)
            group["lr"] = lr * min(1.0, (step + 1) / 200) * fall + 1e-5
        value, shown = loss(torch.Generator().manual_seed(seed * 1_000_003 + step))
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if ema:
            decay = min(ema, (step + 1) / (step + 20))
            with torch.no_grad():
                torch._foreach_lerp_(average, parameters, 1 - decay)
        recent.append(shown)
        if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == steps:
            means = {key: round(sum(r[key] for r in recent) / len(recent), 5) for key in shown}
            record["steps"], record["seconds"] = step + 1, round(record["seconds"] + time.monotonic() - since, 1)
            record["losses"].append({"step": step + 1, **means})
            recent, since = [], time.monotonic()
            print(name, record["losses"][-1], f"{record['seconds']:.0f} s", flush=True)
            state = {"optimizer": optimizer.state_dict(), "parameters": parameters, "average": average}
            _save({"settings": settings, "record": record, **state}, path)
    if ema:
        with torch.no_grad():
            torch._foreach_copy_(parameters, average)
    return record


def _root(step: int) -> float:
    """Decay of a learning rate without end: 1/sqrt(step) from a step on (Karras et al. 2023, arXiv 2312.02696)."""
    return math.sqrt(FALL_FROM / max(step, FALL_FROM))


def cached(path: Path, settings: dict[str, Any], make: Callable[[], Any]) -> Any:
    """What `make` returns, kept in a file for the next time.

    Raises:
        AptError: the file is of other settings.
    """
    if not path.exists():
        _save({"settings": settings, "data": make()}, path)
    return _load(path, settings)["data"]


def _save(content: dict[str, Any], path: Path) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save(content, temporary)
    temporary.replace(path)


def _load(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    if content["settings"] != settings:
        raise AptError(f"{path} is of {content['settings']}, asked is {settings}: give those, or another --work")
    return content
