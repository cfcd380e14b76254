"""Where a step adds noise, and the clean latents made once more.

A schedule adds the noise, or it is mixed in, as in flow matching. The augmentation depends on the timestep or the
noise's share, which is drawn after the images are encoded. So it comes last: right before the noise is added, the
statements that have made the clean latents run again, on images that are moved. Nothing that is drawn is drawn twice.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import itertools

from .repeated_statements import StepBlock
from .syntax_tree import (
    Suite,
    Tree,
    assigned,
    called,
    changed,
    first_line,
    needs,
    overwritten,
    owner,
    read,
    without_casts,
)


@dataclasses.dataclass(frozen=True)
class Noising:
    """How noise is added: `schedule.add_noise(clean, noise, timesteps)`, or `(1 - sigma) * clean + sigma * noise`.

    Attributes:
        expressions: the calls, or the sum; in the order of the file.
        clean, noise: names that what they take is made of.
        schedule: its name; None where the noise is mixed in.
        level: the noise's share (source), where it is mixed in.
    """

    expressions: tuple[ast.expr, ...]
    clean: set[str]
    noise: set[str]
    schedule: str | None = None
    level: str | None = None


@dataclasses.dataclass(frozen=True)
class Again:
    """The statements that make the clean latents, to run once more.

    Attributes:
        statements: with a function called of the images and of what they or a cache gave, which moves them.
        refused: why they cannot be repeated; then there are none.
    """

    statements: tuple[ast.stmt, ...] = ()
    refused: str | None = None


def by_schedule(calls: list[ast.Call]) -> Noising:
    """Noise that calls of `add_noise` add."""
    clean, noise = (read(*(a for call in calls for a in call.args[i : i + 1])) for i in range(2))
    return Noising(tuple(calls), clean, noise, schedule=owner(calls[0]))


def find_mixing(loop: ast.AST) -> list[Noising]:
    """All that mixes noise in by shares that add up to one, in the order of the file."""
    statements = [n for n in ast.walk(loop) if isinstance(n, (ast.Assign, ast.AnnAssign)) and n.value is not None]
    drawn = assigned(*(s for s in statements if any(map(_draws_noise, ast.walk(s.value)))))  # type: ignore[arg-type]
    sums = (n for s in statements for n in ast.walk(s) if isinstance(n, ast.BinOp) and isinstance(n.op, ast.Add))
    found = []
    for node in sums:
        for (share, x), (other, y) in itertools.product(_factors(node.left), _factors(node.right)):
            if (x in drawn) != (y in drawn) and (_is_rest(share, other) or _is_rest(other, share)):
                clean, noise, level = (x, y, other) if y in drawn else (y, x, share)
                found.append(Noising((node,), {clean}, {noise}, level=ast.unparse(level)))
    return sorted(found, key=lambda noising: noising.expressions[0].lineno)


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


def again(step: StepBlock, tree: Tree, noising: Noising, encodings: list[ast.Call], level: str, moved: str) -> Again:
    """What is to run again for images that are moved, between the encoding and the noising.

    Args:
        step: the step; its place of the encoding is that of the first.
        encodings: the calls that encode images in it.
        level: timesteps or the noise's share (source).
        moved: source of a function that moves the images, or the latents, if no image was encoded again.
    """
    suite, first = step.suite, step.at_encode
    end = min(tree.index(suite, expression) for expression in noising.expressions)
    encoding = {i: [call for call in encodings if tree.index(suite, call) == i] for i in range(first, len(suite))}
    encoding = {i: calls for i, calls in encoding.items() if calls}
    for own in map(tree.statement, encodings):
        if len(assigned(own)) != 1 or not isinstance(own, (ast.Assign, ast.AnnAssign)) or max(encoding) >= end:
            return Again(refused=f"looked for one name for what `{first_line(own)}` encodes, before the noise is added")
    chosen, names = [], set[str]()
    for i in range(first, end):
        if i in encoding or any(name in names and _asks_values(suite[i], name) for name in read(suite[i])):
            chosen.append(i)
            names = names | assigned(suite[i])
    made = [suite[i] for i in chosen]
    if not noising.clean & assigned(*made):
        return Again(refused=f"`{min(noising.clean)}` is not made of what is encoded")
    if any(statement in made for statement in _makers(suite[first:end], read(ast.parse(level)))):
        return Again(refused=f"`{level}` is made of `{min(assigned(tree.statement(encodings[0])))}`")
    for at in chosen:
        between = [suite[i] for i in range(at + 1, end) if i not in chosen]
        before = assigned(*(suite[i] for i in chosen if i < at))
        again_changed = (changed(suite[at]) - assigned(suite[at])) | (_overwritten(suite[at]) - before)
        lost = (needs([suite[at]]) & (assigned(*between) | changed(*between))) | (again_changed - before)
        if lost:
            return Again(refused=f"`{first_line(suite[at])}` runs once more, and `{min(lost)}` changes")
    statements: list[ast.stmt] = []
    for i in chosen:
        statements += _moving(suite[i], encoding[i], tree, moved) if i in encoding else [suite[i]]
    return Again(tuple(statements))


def _overwritten(statement: ast.stmt) -> set[str]:
    """As `overwritten`, but for what is only put elsewhere, as by `vae = vae.to(device)`."""

    class Without(ast.NodeTransformer):
        def visit_Assign(self, node: ast.Assign) -> ast.AST:
            value = without_casts(node.value)
            same = len(node.targets) == 1 and ast.unparse(node.targets[0]) == ast.unparse(value)
            return ast.Pass() if same else node

    return overwritten([Without().visit(copy.deepcopy(statement))])


def _moving(statement: ast.stmt, encodings: list[ast.Call], tree: Tree, moved: str) -> list[ast.stmt]:
    """The statement, which holds the encodings, with the images moved where they are encoded; or before it, where
    another path takes them as they are. Then what it encoded is, unless images were.

    Of several pictures, such as one to edit beside the target, all are moved alike.
    """
    own = [tree.statement(call) for call in encodings]
    others = read(*(n for n in ast.walk(statement) if isinstance(n, ast.Assign) and n not in own))
    images = {call: without_casts(call.args[0]) for call in encodings}
    taken = {image.id for image in images.values() if isinstance(image, ast.Name)} & others - assigned(statement)
    places = {(c.lineno, c.col_offset) for c, i in images.items() if not (isinstance(i, ast.Name) and i.id in taken)}

    class Insert(ast.NodeTransformer):
        def visit_Call(self, node: ast.Call) -> ast.AST:
            if (node.lineno, node.col_offset) in places and called(node) == "encode":
                node.args[0] = ast.parse(f"{moved}({ast.unparse(node.args[0])})", mode="eval").body
                return node
            return self.generic_visit(node)

    latents = sorted(assigned(*own))
    lines = [f"{name} = {moved}({name}, latents=True)" for name in latents]
    if len(latents) > 1:  # whether a sample has a second picture is known in the run
        lines = [f"if '{name}' in locals():\n    {line}" for name, line in zip(latents, lines, strict=True)]
    before = [f"{name} = {moved}({name})" for name in sorted(taken)]
    return [
        *ast.parse("\n".join(before)).body,
        Insert().visit(copy.deepcopy(statement)),
        *ast.parse("\n".join(lines)).body,
    ]


def _makers(statements: Suite, names: set[str]) -> list[ast.stmt]:
    """The statements that make the names, found backwards."""
    found: list[ast.stmt] = []
    for statement in reversed(statements):
        if names & (assigned(statement) | changed(statement)):
            found.append(statement)
            values = {name for name in read(statement) if _asks_values(statement, name)}
            names = names | values
    return found


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
