"""Flow matching in a script's step: where the noise is mixed in, and the clean latents made once more.

The noise level is drawn after the images are encoded, and in scripts of transformers is made from the latents' size. So
the augmentation, which depends on it, comes last: right before the noise is mixed in, the statements that have made the
clean latents run again, on images that are moved. Nothing that is drawn is drawn twice.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import itertools
from collections.abc import Iterator

from .repeated_statements import StepBlock
from .syntax_tree import Suite, Tree, assigned, called, changed, first_line, needs, read, without_casts


@dataclasses.dataclass(frozen=True)
class Mixing:
    """`(1 - sigma) * clean + sigma * noise`, in any order.

    Attributes:
        expression: all of it.
        clean, noise: names.
        level: the noise's share, as source.
    """

    expression: ast.BinOp
    clean: str
    noise: str
    level: str


@dataclasses.dataclass(frozen=True)
class Again:
    """The statements that make the clean latents, to run once more.

    Attributes:
        statements: with `moved` called of the images and of what they or a cache gave, in the places for that.
        refused: why they cannot be repeated; then there are none.
    """

    statements: tuple[ast.stmt, ...] = ()
    refused: str | None = None


def find_mixing(tree: Tree, loop: ast.AST) -> list[Mixing]:
    """All that mixes noise in by shares that add up to one, in the order of the file."""
    statements = [n for n in ast.walk(loop) if isinstance(n, (ast.Assign, ast.AnnAssign)) and n.value is not None]
    drawn = assigned(*(s for s in statements if any(map(_draws_noise, ast.walk(s.value)))))  # type: ignore[arg-type]
    sums = (n for s in statements for n in ast.walk(s) if isinstance(n, ast.BinOp) and isinstance(n.op, ast.Add))
    found = []
    for node in sums:
        for (share, x), (other, y) in itertools.product(_factors(node.left), _factors(node.right)):
            if (x in drawn) != (y in drawn) and (_is_rest(share, other) or _is_rest(other, share)):
                clean, noise, level = (x, y, other) if y in drawn else (y, x, share)
                found.append(Mixing(node, clean, noise, ast.unparse(level)))
    return sorted(found, key=lambda mixing: mixing.expression.lineno)


def _draws_noise(node: ast.AST) -> bool:
    """Whether it is `torch.randn_like(...)` or its like; a VAE's latents are drawn too."""
    return isinstance(node, ast.Call) and called(node).rpartition(".")[2].startswith(("rand", "normal"))


def _factors(product: ast.expr) -> list[tuple[ast.expr, str]]:
    """Share and name, either way round, of a product."""
    if not isinstance(product, ast.BinOp) or not isinstance(product.op, ast.Mult):
        return []
    named = ((product.left, without_casts(product.right)), (product.right, without_casts(product.left)))
    return [(share, of.id) for share, of in named if isinstance(of, ast.Name)]


def _is_rest(share: ast.expr, of: ast.expr) -> bool:
    """Whether it is `1 - of`."""
    rest = isinstance(share, ast.BinOp) and isinstance(share.op, ast.Sub) and isinstance(share.left, ast.Constant)
    return rest and share.left.value == 1 and ast.unparse(share.right) == ast.unparse(of)  # type: ignore[attr-defined]


def again(step: StepBlock, tree: Tree, mixing: Mixing, encodings: list[ast.Call], moved: str) -> Again:
    """What is to run again for images that are moved, between the encoding and the mixing.

    Args:
        step: the step; its place of the encoding is that of the first.
        encodings: the calls that encode images in it.
        moved: source of a function that moves the images, or the latents, if no image was encoded again.
    """
    suite, first = step.suite, step.at_encode
    end = tree.index(suite, mixing.expression)
    images = {ast.unparse(without_casts(call.args[0])) if call.args else "" for call in encodings}
    if len(images) > 1:
        return Again(refused=f"the step encodes several images, {', '.join(sorted(images))}")
    own = tree.statement(encodings[0])
    latents = assigned(own)
    if len(latents) != 1 or not isinstance(own, (ast.Assign, ast.AnnAssign)):
        return Again(refused=f"looked for one name for what `{first_line(own)}` encodes")
    chosen, names = [first], assigned(suite[first])
    for i in range(first + 1, end):
        if any(name in names and _asks_values(suite[i], name) for name in read(suite[i])):
            chosen.append(i)
            names = names | assigned(suite[i])
    made = [suite[i] for i in chosen]
    if not any(mixing.clean in assigned(statement) for statement in made):
        return Again(refused=f"`{mixing.clean}` is not made of what is encoded")
    level = _makers(suite[first:end], read(ast.parse(mixing.level)))
    if any(statement in made for statement in level):
        return Again(refused=f"the noise level is made of `{min(names & read(*level))}`")
    for at in chosen:
        older = changed(suite[at]) | ({t.id for t in _augmented(suite[at])} - _plainly_assigned(suite[at]))
        if older := older - assigned(*(suite[i] for i in chosen if i < at)) - _plainly_assigned(suite[at]):
            return Again(refused=f"`{first_line(suite[at])}` changes `{min(older)}`")
        between = [suite[i] for i in range(at + 1, end) if i not in chosen]
        lost = needs([suite[at]]) & (assigned(*between) | changed(*between)) - assigned(*made)
        if lost:
            return Again(refused=f"`{min(lost)}` changes after `{first_line(suite[at])}`")
    (name,) = latents
    statements = [_moving_images(suite[first], encodings, moved), *_moving(name, moved)]
    return Again((*statements, *(suite[i] for i in chosen[1:])))


def _moving(name: str, moved: str) -> list[ast.stmt]:
    return ast.parse(f"{name} = {moved}({name}, latents=True)").body


def _moving_images(statement: ast.stmt, encodings: list[ast.Call], moved: str) -> ast.stmt:
    """The statement with the images moved in front of every one that encodes them, which may be inside of it."""
    places = {(call.lineno, call.col_offset) for call in encodings}

    class Insert(ast.NodeTransformer):
        def visit_Call(self, node: ast.Call) -> ast.AST:
            if (node.lineno, node.col_offset) in places and node.args:
                node.args[0] = ast.parse(f"{moved}({ast.unparse(node.args[0])})", mode="eval").body
                return node
            return self.generic_visit(node)

    return Insert().visit(copy.deepcopy(statement))  # type: ignore[no-any-return]


def _makers(statements: Suite, names: set[str]) -> list[ast.stmt]:
    """The statements that make the names, found backwards."""
    found: list[ast.stmt] = []
    for statement in reversed(statements):
        if names & (assigned(statement) | changed(statement)):
            found.append(statement)
            values = {name for name in read(statement) if _asks_values(statement, name)}
            names = names | values
    return found


def _augmented(statement: ast.stmt) -> Iterator[ast.Name]:
    for node in ast.walk(statement):
        if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
            yield node.target


def _plainly_assigned(statement: ast.stmt) -> set[str]:
    return assigned(*(node for node in ast.walk(statement) if isinstance(node, (ast.Assign, ast.AnnAssign))))


_OF_SHAPE = frozenset({"shape", "ndim", "dtype", "device", "size", "dim", "numel", "new_zeros", "new_ones", "is_cuda"})


def _asks_values(node: ast.AST, name: str) -> bool:
    """Whether more of the tensor is read than shape, type and device."""
    if isinstance(node, ast.Attribute) and node.attr in _OF_SHAPE and isinstance(node.value, ast.Name):
        return False
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("_like", "len")):
        given = [*node.args, *(keyword.value for keyword in node.keywords)]
        return any(_asks_values(argument, name) for argument in given if not isinstance(argument, ast.Name))
    if isinstance(node, ast.Name):
        return node.id == name and isinstance(node.ctx, ast.Load)
    return any(_asks_values(child, name) for child in ast.iter_child_nodes(node))
