"""A ballot with its votes and the ids of its pictures: all that a rater's page may ask for and say.

Raters are blind: pictures have ids drawn anew at each start, and nothing that is given away names a method. Which
method a vote is for is known here only.
"""

from __future__ import annotations

import datetime
import secrets
from collections.abc import Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any

from apt_hooks.errors import AptError

from .ballot import QUESTIONS, Ballot, Shown
from .votes import Vote, VoteFile

LONGEST_NAME = 40  # of a rater


class Refused(Exception):
    """A request that is answered with an error: its status, and one line that says why."""

    def __init__(self, status: HTTPStatus, why: str) -> None:
        super().__init__(why)
        self.status = status


class Booth:
    """Gives raters their forms and takes their votes; `close` it.

    Args:
        votes: the file of votes, which may have some of the same comparison.

    Attributes:
        pictures: file of each picture that may be shown, by its id.

    Raises:
        AptError: as `VoteFile`; the file has votes of another comparison.
    """

    def __init__(self, ballot: Ballot, votes: Path) -> None:
        self.ballot = ballot
        self._numbers = {item: number for number, item in enumerate(ballot.items)}
        self.file = VoteFile(votes)
        try:
            self._check(self.file.votes)
        except AptError:
            self.close()
            raise
        comparison = ballot.comparison
        self._photos = [secrets.token_urlsafe(12) for _ in comparison.references]
        self._ids: dict[tuple[int, int, str | None], str] = {
            (item.prompt, item.seed, method): secrets.token_urlsafe(12)
            for item in ballot.items
            for method in (None, *ballot.methods)
        }
        self.pictures = dict(zip(self._photos, comparison.references, strict=True))
        for (prompt, seed, method), name in self._ids.items():
            self.pictures[name] = comparison.picture(method, prompt, seed)

    def _check(self, votes: Sequence[Vote]) -> None:
        prompts, seeds = self.ballot.comparison.prompts, self.ballot.comparison.seeds
        for vote in votes:
            known = 0 <= vote.prompt < len(prompts) and vote.text == prompts[vote.prompt].plain and vote.seed in seeds
            if not known or {*vote.shown} != {*self.ballot.methods}:
                raise AptError(
                    f"{self.file.path}: has votes of another comparison, on {', '.join(sorted(vote.shown))} for "
                    f"{vote.text!r}, seed {vote.seed}; name another file by --votes"
                )

    def form(self, rater: str) -> dict[str, Any]:
        """All that a rater's page shows, and what this rater has answered."""
        answers = self.file.answers(rater)
        items = []
        for shown in self.ballot.order(rater):
            item = shown.item
            of_it = {
                question.criterion: self._id(shown, answers[key].chosen)
                for question in QUESTIONS
                if (key := (item.prompt, item.seed, question.criterion)) in answers
            }
            items.append(
                {
                    "item": self._numbers[item],
                    "prompt": self.ballot.comparison.prompts[item.prompt].plain,
                    "reference": self._photos[self.ballot.reference(item)],
                    "prior": self._ids[item.prompt, item.seed, None],
                    "candidates": [self._id(shown, method) for method in shown.candidates],
                    "answers": of_it,
                }
            )
        questions = [{"criterion": q.criterion, "text": q.text, "hint": q.hint} for q in QUESTIONS]
        return {"questions": questions, "items": items}

    def vote(self, posted: object) -> None:
        """Record what a page has posted: `rater`, `item`, `criterion`, and as `choice` a picture's id or None.

        Raises:
            Refused: something of it is not known here.
            AptError: it cannot be written.
        """
        if not isinstance(posted, dict) or {*posted} != {"rater", "item", "criterion", "choice"}:
            raise Refused(HTTPStatus.BAD_REQUEST, "a vote has rater, item, criterion and choice")
        rater, item, criterion, choice = (posted[key] for key in ("rater", "item", "criterion", "choice"))
        rater = checked_rater(rater)
        if type(item) is not int or not 0 <= item < len(self.ballot.items):
            raise Refused(HTTPStatus.BAD_REQUEST, "no such item")
        if criterion not in [question.criterion for question in QUESTIONS]:
            raise Refused(HTTPStatus.BAD_REQUEST, "no such criterion")
        found = self.ballot.items[item]
        shown = next(shown for shown in self.ballot.order(rater) if shown.item == found)
        methods = {self._id(shown, method): method for method in (None, *shown.candidates)}
        if choice not in [*methods]:
            raise Refused(HTTPStatus.CONFLICT, "no such picture on that page; load the page again")
        self.file.add(
            Vote(
                rater=rater,
                prompt=found.prompt,
                text=self.ballot.comparison.prompts[found.prompt].plain,
                seed=found.seed,
                criterion=criterion,
                shown=shown.candidates,
                chosen=methods[choice],
                time=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            )
        )

    def _id(self, shown: Shown, method: str | None) -> str | None:
        """Of a candidate's picture; None, which is an answer, has none."""
        return None if method is None else self._ids[shown.item.prompt, shown.item.seed, method]

    def close(self) -> None:
        """May be called again."""
        self.file.close()

    def __enter__(self) -> Booth:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


def checked_rater(rater: object) -> str:
    """A rater's name, spaces put right.

    Raises:
        Refused: it is no name.
    """
    name = " ".join(rater.split()) if isinstance(rater, str) else ""
    if not name or len(name) > LONGEST_NAME or not name.isprintable():
        raise Refused(HTTPStatus.BAD_REQUEST, f"a rater's name has 1 to {LONGEST_NAME} printable characters")
    return name
