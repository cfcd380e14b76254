"""What the votes come to: each method's share by criterion, with a 95 % interval."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from apt_hooks.errors import AptError

from .folders import read_comparison
from .intervals import share_interval
from .rating_plan import QUESTIONS
from .votes import Vote, last_votes, read_votes

TIE = "cannot tell"


@dataclasses.dataclass(frozen=True)
class Share:
    """A share of votes from 0 to 1, and the ends of its 95 % interval (`intervals` says which)."""

    share: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Result:
    """Answers to one question.

    Attributes:
        criterion: which.
        shares: by method; of all answers, so that with `ties` they add up to the whole.
        ties: answers "cannot tell", a share.
        votes, raters, prompts, items: how many; an item is a prompt and a seed.
    """

    criterion: str
    shares: Mapping[str, Share]
    ties: Share
    votes: int
    raters: int
    prompts: int
    items: int


def count_votes(votes: Sequence[Vote]) -> list[Result]:
    """The result of each criterion that has votes, in the order of the questions.

    Args:
        votes: of one plan; of several by a rater to the same question the last counts.
    """
    counted = last_votes(votes)
    asked = [question.criterion for question in QUESTIONS]
    criteria = [*asked, *sorted({vote.criterion for vote in counted} - {*asked})]
    results = []
    for criterion in criteria:
        of_it = [vote for vote in counted if vote.criterion == criterion]
        if of_it:
            results.append(_count(criterion, of_it))
    return results


def _count(criterion: str, votes: Sequence[Vote]) -> Result:
    raters, prompts = [vote.rater for vote in votes], [vote.prompt for vote in votes]

    def share(method: str | None) -> Share:
        chosen = [vote.chosen == method for vote in votes]
        return Share(sum(chosen) / len(chosen), *share_interval(chosen, raters, prompts))

    methods = sorted({method for vote in votes for method in vote.shown})
    items = {(vote.prompt, vote.seed) for vote in votes}
    return Result(
        criterion=criterion,
        shares={method: share(method) for method in methods},
        ties=share(None),
        votes=len(votes),
        raters=len({*raters}),
        prompts=len({*prompts}),
        items=len(items),
    )


def table(results: Sequence[Result]) -> list[str]:
    """Lines of text: a row a method, a column a criterion; below, what the intervals hold for."""
    methods = sorted({method for result in results for method in result.shares})
    rows = [["", *(result.criterion for result in results)]]
    for method in methods:
        rows.append([method, *(_text(result.shares.get(method)) for result in results)])
    rows.append([TIE, *(_text(result.ties) for result in results)])
    for what in ("votes", "raters", "prompts", "items"):
        rows.append([what, *(str(getattr(result, what)) for result in results)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.append("share of all answers (its 95 % interval, for further raters and prompts)")
    fewest = min(result.raters for result in results)
    if fewest == 1:
        lines.append("note: one rater tells nothing about others; the intervals are for this rater on further prompts")
    elif fewest < 5:
        lines.append(f"note: {fewest} raters are few to speak for others; intervals of five or more can be trusted")
    return lines


def _text(share: Share | None) -> str:
    return "-" if share is None else f"{share.share:.1%} ({share.low:.0%} to {share.high:.0%})"


def run_votes(
    folders: Sequence[Path],
    files: Sequence[Path],
    *,
    references: Path | None = None,
    methods: Sequence[str] | None = None,
    say: Callable[[str], None],
) -> list[Result]:
    """Print what votes come to.

    Args:
        folders, references, methods: as for the page (`write_page`).
        files: what raters have saved.
        say: takes each line of text for the user.

    Returns:
        A result a criterion.

    Raises:
        AptError: as `read_comparison` and `read_votes`; no vote in any file; scipy is missing.
    """
    if len({file.resolve() for file in files}) < len(files):
        raise AptError(f"--result: a file is named twice; found {', '.join(map(str, files))}")
    read = read_votes(files, read_comparison(folders, references=references, methods=methods))
    for file in [file for file, votes in read.items() if not votes]:
        say(f"note: {file} has no vote")
    results = count_votes([vote for votes in read.values() for vote in votes])
    if not results:
        raise AptError("--result: no vote in any of the files; raters give some on the page that --page writes")
    for rater in sorted({vote.rater for votes in read.values() for vote in votes}):
        of_one = [str(file) for file, votes in read.items() if any(vote.rater == rater for vote in votes)]
        if len(of_one) > 1:
            say(
                f"note: {rater!r} is the rater of {' and '.join(of_one)}: of two answers to a question the later one "
                "counts; if these are two people, change the name in one of the files"
            )
    for line in table(results):
        say(line)
    return results
