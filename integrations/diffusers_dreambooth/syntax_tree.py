"""Moving about in a syntax tree of Python: what stands where, and which names a statement reads and assigns."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator

from apt_hooks.errors import AptError

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

    def beside(self, node: ast.AST, other: ast.AST) -> ast.stmt:
        """The statement with `node` in it that stands in one block with the one that has `other`."""
        suite = self.common_suite([node, other])
        return suite[self.index(suite, node)]

    def calls(self, root: ast.AST, attribute: str) -> list[ast.Call]:
        """Calls of a method of that name, in the order of the file."""
        found = [n for n in ast.walk(root) if isinstance(n, ast.Call) and owner(n) and called(n) == attribute]
        return sorted(found, key=lambda call: call.lineno)


def _suites(node: ast.AST) -> Iterator[Suite]:
    for field in ("body", "orelse", "finalbody"):
        suite = getattr(node, field, None)
        if isinstance(suite, list):
            yield suite
    for handler in getattr(node, "handlers", []):
        yield handler.body


def owner(call: ast.Call) -> str:
    """The source of what a method is called of; empty for a function."""
    return ast.unparse(call.func.value) if isinstance(call.func, ast.Attribute) else ""


def called(call: ast.Call) -> str:
    """The name of the function or method."""
    return call.func.attr if isinstance(call.func, ast.Attribute) else ast.unparse(call.func)


def read(*nodes: ast.AST) -> set[str]:
    """The names that are read, in any order."""
    return {name for node in nodes for name, kind in _names(node, frozenset()) if kind is ast.Load}


def assigned(*nodes: ast.AST) -> set[str]:
    """The names that get a value."""
    return {name for node in nodes for name, kind in _names(node, frozenset()) if kind is ast.Store}


def deleted(*nodes: ast.AST) -> set[str]:
    """The names that get none any more."""
    return {name for node in nodes for name, kind in _names(node, frozenset()) if kind is ast.Del}


def _names(node: ast.AST, own: frozenset[str]) -> Iterator[tuple[str, type[ast.expr_context]]]:
    """Every name with its context, but those that comprehensions, lambdas and functions have for themselves (`own`)."""
    if isinstance(node, ast.Name):
        if node.id not in own:
            yield node.id, type(node.ctx)
    elif isinstance(node, (ast.ListComp, ast.SetComp, ast.GeneratorExp, ast.DictComp)):
        yield from _names(node.generators[0].iter, own)
        inner = own | {name for g in node.generators for name, _ in _names(g.target, frozenset())}
        parts = [part for g in node.generators for part in [*g.ifs, *([g.iter] if g is not node.generators[0] else [])]]
        for part in [*parts, *([node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt])]:
            yield from _names(part, inner)
    elif isinstance(node, (ast.Lambda, ast.FunctionDef)):
        if isinstance(node, ast.FunctionDef):
            yield node.name, ast.Store
        inner = own | {argument.arg for argument in ast.walk(node.args) if isinstance(argument, ast.arg)}
        body: list[ast.stmt] | list[ast.expr] = node.body if isinstance(node, ast.FunctionDef) else [node.body]
        for inside in body:
            yield from ((name, kind) for name, kind in _names(inside, inner) if kind is ast.Load)
    else:
        if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
            yield node.target.id, ast.Load
        if isinstance(node, ast.ClassDef):
            yield node.name, ast.Store
        for child in ast.iter_child_nodes(node):
            yield from _names(child, own)


def needs(statements: Iterable[ast.stmt]) -> set[str]:
    """The names that the statements read before they have, on every path, assigned them."""
    return _needs(statements, set())[0]


def _needs(statements: Iterable[ast.stmt], have: set[str]) -> tuple[set[str], set[str]]:
    needed: set[str] = set()
    for statement in statements:
        if isinstance(statement, ast.If):
            body, after_body = _needs(statement.body, have)
            orelse, after_orelse = _needs(statement.orelse, have)
            needed |= (read(statement.test) - have) | body | orelse
            have = after_body & after_orelse
        elif isinstance(statement, ast.With):
            needed |= read(*statement.items) - have
            inner, have = _needs(statement.body, have | assigned(*statement.items))
            needed |= inner
        else:
            needed |= read(statement) - have
            if not isinstance(statement, (ast.For, ast.While, ast.Try)):
                have = have | assigned(statement)
    return needed, have


def surely_assigned(statements: Iterable[ast.stmt]) -> set[str]:
    """The names that have a value after the statements, whatever path was taken."""
    return _needs(statements, set())[1]


def changed(*nodes: ast.AST) -> set[str]:
    """The names whose objects are changed in place, as far as that can be seen.

    An item or attribute is assigned or deleted, a method is called for itself, or one that changes its object.
    """
    found: set[str] = set()
    for node in (inner for root in nodes for inner in ast.walk(root)):
        object_: ast.AST | None = None
        if isinstance(node, ast.Call):
            object_ = node.func if called(node) in _CHANGING or called(node).endswith("_") else None
            if called(node) == "next" and node.args:
                object_ = ast.Attribute(node.args[0], "next")
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            object_ = node.value.func if called(node.value) not in _TELLING else None
        elif isinstance(node, (ast.Subscript, ast.Attribute)) and not isinstance(node.ctx, ast.Load):
            object_ = node
        whole = part_of(object_)
        if whole is not object_ and isinstance(whole, ast.Name):
            found.add(whole.id)
    return found


def overwritten(statements: Suite) -> set[str]:
    """The names that a path through the statements reads and then changes, so that it is not the same path again.

    One branch of an `if` may read what another assigns: the same one is taken again.
    """
    found: set[str] = set()
    for i, statement in enumerate(statements):
        later = statements[i + 1 :]
        found |= needs([statement]) & (assigned(*later) | changed(*later))
        made = assigned(statement) | changed(statement)
        if isinstance(statement, ast.If):
            own = (read(statement.test) & made) | overwritten(statement.body) | overwritten(statement.orelse)
        else:
            own = needs([statement]) & made
        found |= own - surely_assigned(statements[:i])
    return found


def part_of(node: ast.AST | None) -> ast.AST | None:
    """`x` of `x.a["b"].c`; of anything else itself."""
    while isinstance(node, (ast.Subscript, ast.Attribute)):
        node = node.value
    return node


_TELLING = ("print", "debug", "info", "warning", "error", "log", "write")
_CHANGING = (
    "append",
    "clear",
    "extend",
    "insert",
    "pop",
    "popitem",
    "popleft",
    "remove",
    "setdefault",
    "sort",
    "update",
)


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


def missing(script: str, wanted: str, found: str) -> AptError:
    """The error of a script that has no such place."""
    return AptError(f"{script}: looked for {wanted}; found {found}. Nothing was changed")


def first_line(node: ast.AST) -> str:
    return ast.unparse(node).splitlines()[0]


def listed(calls: list[ast.Call]) -> str:
    if not calls:
        return "none"
    return ", ".join(f"`{first_line(call)}` in line {call.lineno}" for call in calls[:4])
