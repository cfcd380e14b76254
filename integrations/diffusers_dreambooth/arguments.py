"""The argument parser of a script, and what its arguments are called where it trains."""

from __future__ import annotations

import ast
from typing import Any

from .tree import Tree, assigned, called, missing, owner

_PARSING = ("parse_args", "parse_known_args")


def find_parser(tree: Tree, script: str) -> tuple[str, ast.stmt]:
    """The name of the parser with the most arguments, and the statement to add others before.

    Raises:
        AptError: nothing is parsed.
    """
    found = [c for name in _PARSING for c in tree.calls(tree.root, name) if owner(c).isidentifier()]
    if not found:
        raise missing(script, "the argument parser, `parser.parse_args()`", "none")
    found.sort(key=lambda call: call.lineno)
    arguments = [owner(call) for call in tree.calls(tree.root, "add_argument")]
    most = max(reversed(found), key=lambda call: arguments.count(owner(call)))
    first = next(call for call in found if owner(call) == owner(most))
    function: Any = tree.function(first)
    making = [n for n in ast.walk(function) if isinstance(n, ast.Assign) and owner(first) in assigned(n)]
    return owner(first), tree.beside(first, making[0] if making else function.body[0])


def find_arguments(tree: Tree, function: ast.AST, script: str) -> str:
    """What the arguments are called in the training function: that of which most of the parser's are asked.

    Where the parser's arguments cannot be read, it is what is parsed in the function, its parameter that is asked most,
    or what is parsed outside.

    Raises:
        AptError: none of these.
    """
    given = [argument for call in tree.calls(tree.root, "add_argument") for argument in call.args]
    names = {str(a.value).lstrip("-").replace("-", "_") for a in given if isinstance(a, ast.Constant)}
    inner = [node for node in ast.walk(function) if isinstance(node, ast.Attribute)]
    asked = [ast.unparse(node.value) for node in inner if node.attr in names]
    parameters = [a.arg for a in function.args.args if a.arg != "self"] if isinstance(function, ast.FunctionDef) else []
    candidates = asked or _parsed(tree, function)
    if not candidates and parameters:
        candidates = [name for name in map(ast.unparse, (n.value for n in inner)) if name in parameters] or parameters
    candidates = candidates or _parsed(tree, tree.root)
    if not candidates:
        raise missing(script, "the parser's arguments in the training function, as in `args.output_dir`", "none")
    return max(sorted(set(candidates)), key=candidates.count)


def _parsed(tree: Tree, function: ast.AST) -> list[str]:
    """Names that are assigned in a function from what parses."""
    functions = [node for node in ast.walk(tree.root) if isinstance(node, ast.FunctionDef)]
    parsing = {f.name for f in functions if any(tree.calls(f, name) for name in _PARSING)} | set(_PARSING)
    found = []
    for node in ast.walk(function):
        own = isinstance(node, (ast.Assign, ast.AnnAssign)) and tree.function(node) is function
        if own and isinstance(node.value, ast.Call) and called(node.value) in parsing:  # type: ignore[attr-defined]
            found += sorted(assigned(node))
    return found
