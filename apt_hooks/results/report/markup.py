"""Pieces of HTML that several parts of the page are made of."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape


def note(text: str) -> str:
    """A line of what is missing or was left out."""
    return f'<p class="soft note">{escape(text)}</p>'


def key(within: str, what: str, lines: Sequence[tuple[str, str, str]]) -> str:
    """A legend: buttons that hide lines in the section `within`. `lines`: the legendgroup, color and name of each."""
    buttons = "".join(
        f'<button type="button" data-line="{group}" data-within="{within}" aria-pressed="true">'
        f'<i style="background: {color}"></i><span>{escape(name)}</span></button>'
        for group, color, name in lines
    )
    return f'<div class="key"><span class="soft">{escape(what)}:</span>{buttons}</div>'
