"""Statements of a script once more, for other values; what cannot be repeated safely is refused."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from typing import Any

from apt_hooks.errors import AptError

from .tree import assigned, called, first_line, missing, read

_RANDOM = re.compile(r"\b(rand|normal|uniform|bernoulli|binomial|multinomial|choice|shuffle|sample)|drop|random")
"""Names of functions that draw random numbers."""


class AskOther(ast.NodeTransformer):
    """Batch size and device of some names, asked of another expression: `x.shape[0]`, `len(x)`, `x.device` and so on.

    Attributes:
        unlike: names that were unpacked from a shape behind the batch size; the other's are not the same.
    """

    def __init__(self, names: Iterable[str], other: str) -> None:
        self.unlike: set[str] = set()
        self._names = set(names)
        self._other = other

    def of(self, statement: ast.stmt) -> ast.stmt:
        return self.visit(copy(statement))

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        target, value = node.targets[0], node.value
        shape = value.func if isinstance(value, ast.Call) and not value.args else value
        of_shape = isinstance(shape, ast.Attribute) and shape.attr in ("shape", "size") and self._knows(shape.value)
        if of_shape and isinstance(target, ast.Tuple):
            self.unlike |= assigned(*target.elts[1:])
            shape.value = self._asked()  # type: ignore[attr-defined]
        return self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        of_shape = (
            isinstance(node.value, ast.Attribute) and node.value.attr == "shape" and self._knows(node.value.value)
        )
        if of_shape and ast.unparse(node.slice) in ("0", ":1"):
            node.value.value = self._asked()  # type: ignore[attr-defined]
        return self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        if node.attr == "device" and self._knows(node.value):
            node.value = self._asked()
        return self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        given = [ast.unparse(argument) for argument in node.args]
        if called(node) == "len" and len(given) == 1 and self._knows(node.args[0]):
            node.args = [self._asked()]
        of_size = isinstance(node.func, ast.Attribute) and called(node) == "size" and given == ["0"]
        if of_size and self._knows(node.func.value):  # type: ignore[attr-defined]
            node.func.value = self._asked()  # type: ignore[attr-defined]
        return self.generic_visit(node)

    def _knows(self, node: ast.AST) -> bool:
        return isinstance(node, ast.Name) and node.id in self._names

    def _asked(self) -> ast.expr:
        return ast.parse(self._other, mode="eval").body


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
            for target in node.targets:
                self._reads(target)
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


def asks_only_batch_size_and_device(statement: ast.stmt, name: str) -> bool:
    """Whether nothing else of `name` is read than `AskOther` can ask another one for."""
    return name not in read(AskOther([name], "()").of(statement))


def copy(statement: ast.stmt) -> Any:
    return ast.parse(ast.unparse(statement)).body[0]
