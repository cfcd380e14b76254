"""The base model's pass: statements of a training step that run twice, and these statements again.

They are found backwards from the end, by which statement makes what another reads. Where running statements again could
change what the script does, or is not the same, the script is refused.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Any

from apt_hooks.errors import AptError

from .syntax_tree import (
    Suite,
    assigned,
    changed,
    deleted,
    first_line,
    missing,
    needs,
    overwritten,
    part_of,
    read,
    surely_assigned,
)

_RANDOM = re.compile(r"\b(rand|normal|uniform|bernoulli|binomial|multinomial|choice|shuffle|sample)|drop|random")
"""Names of functions that draw random numbers."""


@dataclasses.dataclass(frozen=True)
class StepBlock:
    """The block of statements that a training step is, with the place of the images' encoding and the U-Net's call."""

    script: str
    suite: Suite
    at_encode: int
    at_call: int

    def makers(self, names: set[str], before: int, first: int = 0) -> set[int]:
        """The statements from `first` up to `before` that assign any of the names, or change it in place."""
        return {i for i in range(first, before) if names & (assigned(self.suite[i]) | changed(self.suite[i]))}


@dataclasses.dataclass(frozen=True)
class FrozenCopy:
    """Statements that ask the base model what the script asks the one in training.

    Attributes:
        text, always: those that encode the text, and whether they are needed even if no text encoder is trained.
        call: the call of the U-Net, and what makes of its prediction what the loss is taken of.
        prefix: put before every name that they assign, so that the tuned pass finds its own values.
        live, perhaps: names of which the copies begin with the tuned pass's value; those that may have none.
    """

    text: tuple[ast.stmt, ...]
    always: bool
    call: tuple[ast.stmt, ...]
    prefix: str
    live: tuple[str, ...]
    perhaps: tuple[str, ...]


def frozen_copy(step: StepBlock, text_encoders: set[str], noising: set[int], made: Sequence[int] = ()) -> FrozenCopy:
    """The call of the U-Net once more, and the statements before it that it needs and that run a text encoder.

    Args:
        made: places of statements behind it that go on with its prediction, and are repeated as well.
    """
    suite, at_call = step.suite, step.at_call
    copied = _copied(step, text_encoders)
    before = [suite[i] for i in sorted(copied - {at_call})]
    taken = any(name.startswith("frozen_") for name in read(*suite) | assigned(*suite))
    renamer = Renamed(step.script, "apt_frozen_" if taken else "frozen_")
    text = renamer.statements(before)
    always = bool(changed(suite[at_call]) & assigned(*before))
    if not always:
        renamer.forget()
    call = renamer.statements([suite[at_call], *(suite[i] for i in made)])
    _check_frozen(step, copied, text_encoders, noising)
    _check_made(step, made)
    sure = surely_assigned(suite[:at_call])
    live, perhaps = sorted(renamer.live & sure), sorted(renamer.live - sure)
    return FrozenCopy(tuple(text), always, tuple(call), renamer.prefix, tuple(live), tuple(perhaps))


def _copied(step: StepBlock, text_encoders: set[str]) -> set[int]:
    suite = step.suite
    needed: set[int] = set()
    pending = {step.at_call}
    while pending:
        i = pending.pop()
        needed.add(i)
        pending |= step.makers(read(suite[i]), i) - needed
    copied, texts = {step.at_call}, set[str]()
    for i in sorted(needed):
        made = assigned(suite[i]) | changed(suite[i])
        if (text_encoders | texts) & read(suite[i]) or texts & made:
            copied.add(i)
            texts |= made
    # What a copy changes in place has to be a copy too.
    while missing := {j for i in copied for j in step.makers(changed(suite[i]), i)} - copied:
        copied |= missing
    return copied


def _check_frozen(step: StepBlock, copied: set[int], text_encoders: set[str], noising: set[int]) -> None:
    """The copies run where the call stands: what they read has to be then what it was, what they change their own."""
    suite = step.suite
    wanted = "text that is encoded from what does not change up to the U-Net's call"
    for i in range(step.at_call):
        if i not in copied and not isinstance(suite[i], ast.Expr) and text_encoders & read(suite[i]):
            raise missing(step.script, "text encoders that encode for the U-Net's call", f"`{first_line(suite[i])}`")
    for i in sorted(copied):
        own = assigned(*(suite[j] for j in copied if j < i))
        later = suite[i + 1 : step.at_call]
        gone = assigned(*later) | changed(*later) | deleted(*later)
        moved = needs([suite[i]]) & gone - own | overwritten([suite[i]]) - own
        if moved:
            raise missing(step.script, wanted, f"`{first_line(suite[i])}`, whose `{min(moved)}` changes")
        foreign = (changed(suite[i]) & needs([suite[i]])) - own
        if foreign:
            raise missing(step.script, wanted, f"`{first_line(suite[i])}`, which changes `{min(foreign)}`")
        if i in {step.at_encode, *noising}:
            raise missing(step.script, wanted, "it in one block with the encoding or noising of the images")
        for name in changed(suite[i]):
            made = [suite[j] for j in copied if name in assigned(suite[j])]
            second = [s for s in made if isinstance(part_of(getattr(s, "value", None)), ast.Name)]
            rest = [s for j, s in enumerate(suite[: step.at_call]) if j not in copied]
            second += [s for s in rest if name in read(s) and assigned(s) | changed(s)]
            if second:
                raise missing(step.script, wanted, f"`{first_line(second[0])}`, a second name for what is changed")


def makers_of(name: str, suite: Suite, first: int, end: int) -> list[int]:
    """Places of the statements from `first` up to `end` that make a name, or change it, found backwards."""
    found, names = [], {name}
    for i in reversed(range(first, end)):
        if names & (assigned(suite[i]) | changed(suite[i])):
            found.append(i)
            names = names | read(suite[i])
    return found[::-1]


def _check_made(step: StepBlock, made: Sequence[int]) -> None:
    """What goes on with the base model's prediction runs before the tuned pass: it may need nothing made after that."""
    suite, at_call = step.suite, step.at_call
    behind = [suite[i] for i in range(at_call + 1, max(made, default=at_call)) if i not in made]
    own = assigned(suite[at_call])
    for i in made:
        wanted = f"a loss of what `{first_line(suite[at_call])}` gives alone"
        late = needs([suite[i]]) & assigned(*(s for s in behind)) - own
        foreign = changed(suite[i]) - own
        if late or foreign:
            raise missing(step.script, wanted, f"`{first_line(suite[i])}`, with `{min(late or foreign)}`")
        own = own | assigned(suite[i])


# -- the copies --------------------------------------------------------------------------------------------------------


class Renamed:
    """Statements with every name that they assign renamed, and the reads of it from there on.

    Args:
        prefix: put before each name.

    Attributes:
        live: names that may be read under their new name before they are assigned.
    """

    def __init__(self, script: str, prefix: str) -> None:
        self.live: set[str] = set()
        self.prefix = prefix
        self._script = script
        self._now: set[str] = set()  # assigned on every path that leads here
        self._perhaps: set[str] = set()  # on some

    def statements(self, statements: Iterable[ast.stmt]) -> list[ast.stmt]:
        return [self._statement(copy(statement)) for statement in statements]

    def forget(self) -> None:
        """What has been renamed so far is perhaps not run."""
        self._perhaps, self._now = self._perhaps | self._now, set()

    def _statement(self, node: Any) -> Any:
        if isinstance(node, ast.If):
            self._reads(node.test)
            before = set(self._now)
            node.body = self.statements(node.body)
            after_body, self._now = self._now, before
            node.orelse = self.statements(node.orelse)
            self._perhaps |= self._now ^ after_body
            self._now &= after_body
        elif isinstance(node, ast.With):
            for item in node.items:
                self._reads(item.context_expr)
                if item.optional_vars is not None:
                    self._writes(item.optional_vars)
            node.body = self.statements(node.body)
        elif isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
            # Not in place: the tuned pass's own value may be what is read.
            own = ast.Name(node.target.id, ast.Load())
            node = self._statement(ast.Assign([node.target], ast.BinOp(own, node.op, node.value), lineno=node.lineno))
        elif isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Expr)):
            if node.value is not None:
                self._reads(node.value)
            for target in getattr(node, "targets", [getattr(node, "target", None)]):
                if target is not None:
                    self._writes(target)
        elif isinstance(node, ast.Delete):
            # The script's own variables stay.
            kept = [t for t in node.targets if not isinstance(t, ast.Name) or t.id in self._now]
            for target in kept:
                if isinstance(target, ast.Name):
                    target.id = self._name(target.id)
                else:
                    self._reads(target)
            node = ast.Delete(kept) if kept else ast.Pass()
        elif not isinstance(node, (ast.Pass, ast.Raise)):
            raise self._refused("assignments and `if`", node)
        return node

    def _reads(self, node: ast.expr) -> None:
        own: set[str] = set()
        for inner in ast.walk(node):
            if isinstance(inner, ast.NamedExpr):
                raise self._refused("assignments and `if`", node)
            if isinstance(inner, ast.comprehension):
                own |= assigned(inner.target)
            if isinstance(inner, ast.Lambda):
                own |= {argument.arg for argument in ast.walk(inner.args) if isinstance(argument, ast.arg)}
            if draws(inner):
                raise self._refused("nothing drawn at random", node)
        if own & (self._now | self._perhaps):
            raise self._refused(f"no second `{min(own & (self._now | self._perhaps))}`", node)
        for inner in ast.walk(node):
            if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Load):
                inner.id = self._name(inner.id)

    def _writes(self, target: ast.expr) -> None:
        for node in ast.walk(target):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):  # the owner of an item that is assigned
                node.id = self._name(node.id)
        for node in ast.walk(target):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                self._now.add(node.id)
                node.id = self.prefix + node.id

    def _name(self, name: str) -> str:
        if name not in self._now | self._perhaps:
            return name
        if name not in self._now:
            self.live.add(name)
        return self.prefix + name

    def _refused(self, wanted: str, found: ast.AST) -> AptError:
        wanted += " between the text encoding and the U-Net's call, which the base model has to repeat"
        return missing(self._script, wanted, f"`{first_line(found)}`")


def draws(node: ast.AST) -> bool:
    """Whether it is a call of what draws random numbers."""
    return isinstance(node, ast.Call) and bool(_RANDOM.search(ast.unparse(node.func)))


def copy(statement: ast.stmt) -> Any:
    return ast.parse(ast.unparse(statement)).body[0]
