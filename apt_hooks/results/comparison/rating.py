"""The page for raters: one file with its pictures, to open here or to send around.

It keeps answers in the browser, and a button saves them as a file, which `votes` reads. What it holds and says names no
method (`rating_plan`), and its policy lets it fetch nothing.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from apt_hooks.files import make_folder, write_atomically
from apt_hooks.images import bare_picture

from .folders import read_comparison
from .rating_plan import QUESTIONS, RatingPlan, picture_ids

ORDERS = 64
"""Orders that a page has; a rater's name says which is taken."""


def write_page(
    folders: Sequence[Path],
    out: Path,
    *,
    references: Path | None,
    methods: Sequence[str] | None,
    seed: int,
    say: Callable[[str], None],
) -> None:
    """Write the page.

    Args:
        folders, references, methods: as for `read_comparison`.
        out: the page; an older one is replaced. Of the same pictures it becomes the same page, so votes stay valid.
        seed: of the orders in which raters see items and methods.
        say: takes each line of text for the user.

    Raises:
        AptError: as `read_comparison` and `RatingPlan`; a picture that cannot be read; `out` cannot be written.
    """
    plan = RatingPlan(read_comparison(folders, references=references, methods=methods), seed)
    pages, count = len(plan.items), len(plan.methods)
    say(f"{pages} pages of {count} methods: reading {pages * (count + 1)} pictures")
    data = json.dumps(page_data(plan), separators=(",", ":")).replace("<", "\\u003c")
    content = Template(_part("rater.html")).substitute(style=_part("rater.css"), data=data, script=_part("rater.js"))
    make_folder(out.parent)
    write_atomically(out, content.encode())
    say(f"{out}: {len(content) / 1e6:.1f} MB; open it in a browser, or send it to raters")
    say("each rater saves a file votes-NAME.jsonl, and `apt-hooks compare DIR... --result FILE` says what they come to")


def page_data(plan: RatingPlan) -> dict[str, Any]:
    """All that the page knows: pictures by id, and orders as indices of items and of their candidates."""
    comparison = plan.comparison
    ids = picture_ids(comparison)
    candidates = [sorted(ids[item.prompt, item.seed, method] for method in plan.methods) for item in plan.items]
    items = [
        {
            "prompt": comparison.prompts[item.prompt].plain,
            "reference": plan.reference(item),
            "prior": ids[item.prompt, item.seed, None],
            "candidates": own,
        }
        for item, own in zip(plan.items, candidates, strict=True)
    ]
    numbers = {item: number for number, item in enumerate(plan.items)}
    orders: list[list[Any]] = []
    for order in range(ORDERS):
        orders.append([])
        for shown in plan.order(str(order)):
            number = numbers[shown.item]
            own = [ids[shown.item.prompt, shown.item.seed, method] for method in shown.candidates]
            orders[-1].append([number, [candidates[number].index(name) for name in own]])
    return {
        "id": hashlib.blake2b("".join(sorted(ids.values())).encode(), digest_size=9).hexdigest(),
        "questions": [dataclasses.asdict(question) for question in QUESTIONS],
        "items": items,
        "orders": orders,
        "photos": [_uri(path) for path in comparison.references],
        "pictures": {name: _uri(comparison.picture(method, *where)) for (*where, method), name in ids.items()},
    }


def _uri(path: Path) -> str:
    content, kind = bare_picture(path)
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _part(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
