"""Statements of a script once more, for other values."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from typing import Any

from apt_hooks.errors import AptError

from .tree import first_line, read


class AskOther(ast.NodeTransformer):
    """`x.shape`, `x.device`, `len(x)` and their like of some names, asked of another expression."""

    def __init__(self, names: Iterable[str], other: str) -> None:
        self._names = set(names)
        self._other = other

    def of(self, statement: ast.stmt) -> ast.stmt:
        return self.visit(_copy(statement))

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        if node.attr in ("shape", "device", "size", "ndim"):
            node.value = self._swapped(node.value)
        return self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if isinstance(node.func, ast.Name) and node.func.id == "len":
            node.args = [self._swapped(argument) for argument in node.args]
        return self.generic_visit(node)

    def _swapped(self, node: ast.expr) -> ast.expr:
        if isinstance(node, ast.Name) and node.id in self._names:
            return ast.parse(self._other, mode="eval").body
        return node


class Renamed:
    """Statements with every name that they assign renamed, and the reads of it from there on.

    Attributes:
        live: names that may be read under their new name before they are assigned.
    """

    def __init__(self, script: str) -> None:
        self.live: set[str] = set()
        self._script = script
        self._now: set[str] = set()  # assigned on every path that leads here
        self._perhaps: set[str] = set()  # on some

    def statements(self, statements: Iterable[ast.stmt]) -> list[ast.stmt]:
        return [self._statement(_copy(statement)) for statement in statements]

    def forget(self) -> None:
        """What has been renamed so far is perhaps not run."""
        self._perhaps, self._now = self._perhaps | self._now, set()

    def _statement(self, node: Any) -> Any:
        if isinstance(node, ast.If):
            node.test = self._reads(node.test)
            before = set(self._now)
            node.body = self.statements(node.body)
            after_body, self._now = self._now, before
            node.orelse = self.statements(node.orelse)
            self._perhaps |= self._now ^ after_body
            self._now &= after_body
            return node
        if isinstance(node, ast.With):
            for item in node.items:
                item.context_expr = self._reads(item.context_expr)
                if item.optional_vars is not None:
                    self._writes(item.optional_vars)
            node.body = self.statements(node.body)
            return node
        if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
            # Not in place: the tuned pass's own value may be what is read.
            own = ast.Name(node.target.id, ast.Load())
            node = ast.Assign([node.target], ast.BinOp(own, node.op, node.value), lineno=node.lineno)
        if isinstance(node, (ast.Assign, ast.AnnAssign, ast.Expr)):
            if node.value is not None:
                node.value = self._reads(node.value)
            for target in getattr(node, "targets", [getattr(node, "target", None)]):
                if target is not None:
                    self._writes(target)
            return node
        if isinstance(node, (ast.Pass, ast.Raise)):
            return node
        raise AptError(
            f"{self._script}: looked for assignments and `if` between the text encoding and the U-Net's call, which "
            f"the base model has to repeat; found `{first_line(node)}`. Nothing was changed"
        )

    def _name(self, name: str) -> str:
        if name in self._now:
            return f"frozen_{name}"
        if name in self._perhaps:
            self.live.add(name)
            return f"frozen_{name}"
        return name

    def _reads(self, node: ast.expr) -> Any:
        for inner in ast.walk(node):
            if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Load):
                inner.id = self._name(inner.id)
        return node

    def _writes(self, target: ast.expr) -> None:
        for node in ast.walk(target):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):  # the owner of an item that is assigned
                node.id = self._name(node.id)
        for node in ast.walk(target):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                self._now.add(node.id)
                node.id = f"frozen_{node.id}"


def asks_only_its_shape(statement: ast.stmt, name: str) -> bool:
    """Whether nothing else of `name` is read than `AskOther` can ask another one for."""
    return name not in read(AskOther([name], "()").of(statement))


def _copy(statement: ast.stmt) -> Any:
    return ast.parse(ast.unparse(statement)).body[0]
