"""Moving about in a syntax tree of Python: what stands where, and which names a statement reads and assigns."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator

Suite = list[ast.stmt]
"""A block of statements, one after the other."""


class Tree:
    """A syntax tree that can be walked upwards."""

    def __init__(self, root: ast.Module) -> None:
        self.root = root
        self.parents = {child: parent for parent in ast.walk(root) for child in ast.iter_child_nodes(parent)}

    def ancestors(self, node: ast.AST) -> Iterator[ast.AST]:
        while node in self.parents:
            node = self.parents[node]
            yield node

    def statement(self, node: ast.AST) -> ast.stmt:
        return next(n for n in [node, *self.ancestors(node)] if isinstance(n, ast.stmt))

    def function(self, node: ast.AST) -> ast.AST:
        return next(n for n in self.ancestors(node) if isinstance(n, (ast.FunctionDef, ast.Module)))

    def suite(self, statement: ast.stmt) -> Suite:
        return next(suite for suite in _suites(self.parents[statement]) if any(s is statement for s in suite))

    def index(self, suite: Suite, node: ast.AST) -> int:
        chain = {id(n) for n in [node, *self.ancestors(node)]}
        return next(i for i, statement in enumerate(suite) if id(statement) in chain)

    def common_suite(self, nodes: Iterable[ast.AST]) -> Suite:
        """The innermost block of statements that holds all of them."""
        chains = [[n for n in [node, *self.ancestors(node)] if isinstance(n, ast.stmt)][::-1] for node in nodes]
        suite: Suite = self.root.body
        for level in zip(*chains, strict=False):
            suites = [self.suite(statement) for statement in level]
            if any(s is not suites[0] for s in suites):
                break
            suite = suites[0]
        return suite

    def outermost(self, node: ast.AST, function: ast.AST) -> ast.stmt:
        """The statement of the function's own block that `node` is in."""
        inside = [n for n in [node, *self.ancestors(node)] if isinstance(n, ast.stmt)]
        return next(n for n in inside if self.parents[n] is function)

    def calls(self, root: ast.AST, attribute: str) -> list[ast.Call]:
        found = [
            node
            for node in ast.walk(root)
            if isinstance(node, ast.Call) and called(node) == attribute and isinstance(node.func, ast.Attribute)
        ]
        return sorted(found, key=lambda call: call.lineno)


def _suites(node: ast.AST) -> Iterator[Suite]:
    for field in ("body", "orelse", "finalbody"):
        suite = getattr(node, field, None)
        if isinstance(suite, list):
            yield suite
    for handler in getattr(node, "handlers", []):
        yield handler.body


def owner(call: ast.Call) -> str:
    """The source of what a method is called of."""
    return ast.unparse(call.func.value) if isinstance(call.func, ast.Attribute) else ""


def called(call: ast.Call) -> str:
    """The name of the function or method."""
    return call.func.attr if isinstance(call.func, ast.Attribute) else ast.unparse(call.func)


def read(*nodes: ast.AST) -> set[str]:
    """The names that are read, in any order."""
    inner = [n for node in nodes for n in ast.walk(node)]
    names = {n.id for n in inner if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    return names | {n.target.id for n in inner if isinstance(n, ast.AugAssign) and isinstance(n.target, ast.Name)}


def assigned(*nodes: ast.AST) -> set[str]:
    """The names that get a value."""
    return {n.id for node in nodes for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


def changed(*nodes: ast.AST) -> set[str]:
    """The names whose objects are changed in place: an item or attribute is assigned, or a method called for itself."""
    found: set[str] = set()
    for node in (inner for root in nodes for inner in ast.walk(root)):
        owner: ast.AST = node
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            owner = node.value.func
        elif not (isinstance(node, (ast.Subscript, ast.Attribute)) and isinstance(node.ctx, ast.Store)):
            continue
        is_method = isinstance(owner, (ast.Subscript, ast.Attribute))
        while isinstance(owner, (ast.Subscript, ast.Attribute)):
            owner = owner.value
        if is_method and isinstance(owner, ast.Name):
            found.add(owner.id)
    return found


def made_from(statements: Suite, names: set[str]) -> set[str]:
    """`names` and all that is made from them."""
    names = set(names)
    for statement in statements:
        if names & read(statement):
            names |= assigned(statement)
    return names


def without_casts(node: ast.expr) -> ast.expr:
    """`x` of `x.to(...)`, `x.float()` and their like."""
    while isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        if node.func.attr not in ("to", "float", "half", "double", "bfloat16", "type", "contiguous"):
            break
        node = node.func.value
    return node


def first_line(node: ast.AST) -> str:
    return ast.unparse(node).splitlines()[0]


def listed(calls: list[ast.Call]) -> str:
    if not calls:
        return "none"
    return ", ".join(f"`{first_line(call)}` in line {call.lineno}" for call in calls[:4])
