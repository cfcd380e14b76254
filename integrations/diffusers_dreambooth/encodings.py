"""What of a script encodes text before the training, and what it encodes with."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from .copies import draws
from .tree import Tree, assigned, called, owner, read

Encoding = tuple[ast.stmt, ast.expr]
"""A statement, and the part of it that encodes text, to be run once more."""

_SIMPLE = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Expr)
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def encoding_names(tree: Tree, loop: ast.AST, text_encoders: set[str], others: set[str]) -> set[str]:
    """Text encoders by all their names: alone, in lists, and inside of functions that are defined where they are.

    Args:
        loop: the training loop.
        text_encoders: those that are prepared.
        others: what else is loaded for the training, such as the U-Net.
    """
    function, suite = tree.function(loop), tree.common_suite([loop])
    # What is loaded and has these methods is a model, and no tokenizer.
    models = {owner(call) for name in ("to", "requires_grad_") for call in tree.calls(function, name)}
    found = set(text_encoders)
    for statement in suite[: tree.index(suite, loop)]:
        value = getattr(statement, "value", None)
        if isinstance(value, ast.Call) and called(value) == "from_pretrained":
            found |= assigned(statement) & models
    for node in _before(tree, function, loop):
        value = getattr(node, "value", None)
        together = isinstance(value, (ast.List, ast.Tuple, ast.Dict, ast.Name))
        if (together or isinstance(node, ast.FunctionDef)) and found & read(node):
            found |= assigned(node) if together else {node.name}  # type: ignore[attr-defined]
    return found - others


def encodings(tree: Tree, loop: ast.AST, names: set[str]) -> list[Encoding]:
    """Calls before the loop of what may encode text: an encoder, a function that has one, or that is given one.

    Whether one does is seen when it runs. Left out is what could not be run again after its statement.
    """
    function = tree.function(loop)
    defined = {node.name for node in ast.walk(tree.root) if isinstance(node, ast.FunctionDef)}
    found: dict[ast.expr, ast.stmt] = {}
    for statement in _before(tree, function, loop):
        if not isinstance(statement, _SIMPLE):
            continue
        for call in (node for node in ast.walk(statement) if isinstance(node, ast.Call)):
            given = read(*call.args, *(keyword.value for keyword in call.keywords))
            known = called(call) in names or (called(call) in defined and names & given)
            if not isinstance(call.func, ast.Name) or not known:
                continue
            within = [n for n in tree.ancestors(call) if isinstance(n, ast.expr)]
            whole = [n for n in within if isinstance(n, _COMPREHENSIONS)]
            part = whole[-1] if whole else call
            inner = any(n in found for n in [part, *within]) or any(isinstance(n, ast.Lambda) for n in within)
            if not inner and not any(map(draws, ast.walk(part))) and not assigned(statement) & read(part):
                found[part] = statement
    return [(statement, part) for part, statement in found.items()]


def _before(tree: Tree, function: ast.AST, loop: ast.AST) -> Iterator[ast.stmt]:
    """The function's own statements up to the loop, of all blocks, in the order of the file."""
    inside = [node for node in ast.walk(function) if isinstance(node, ast.stmt) and node is not function]
    own = [node for node in inside if tree.function(node) is function and node.lineno < loop.lineno]  # type: ignore[attr-defined]
    yield from sorted(own, key=lambda node: node.lineno)
