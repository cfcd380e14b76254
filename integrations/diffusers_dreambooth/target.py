"""What the prediction is compared to, and where that first happens."""

from __future__ import annotations

import ast

from .repeats import Step
from .tree import assigned, called, first_line, listed, missing, read, without_casts


def comparison(step: Step, prediction: str, noise: set[str], noising: list[ast.Call]) -> tuple[str, int]:
    """The name of the target, and the place of the first statement that takes it or the prediction in, once it is made.

    Args:
        step, prediction: the step and the name of what the U-Net returns.
        noise, noising: names of the noise, and the calls that add it; of several things that the prediction is
            compared to, the target is the one that is made from the noise itself, or is its velocity.

    Raises:
        AptError: there is no such comparison, or it cannot be told which.
    """
    suite = step.suite
    wanted = f"the loss of `{prediction}`, such as `mse_loss({prediction}, target)`"
    rest = suite[step.at_call + 1 :]
    losses = [n for s in rest for n in ast.walk(s) if isinstance(n, ast.Call) and "loss" in ast.unparse(n.func)]
    operations = [n for s in rest for n in ast.walk(s) if isinstance(n, ast.BinOp) and isinstance(n.op, ast.Sub)]
    pairs = [[*call.args, *(k.value for k in call.keywords)][:2] for call in losses]
    others: set[str] = set()
    for pair in pairs + [[operation.left, operation.right] for operation in operations]:
        names = {side.id for side in map(without_casts, pair) if isinstance(side, ast.Name)}
        if prediction in names:
            others |= names - {prediction}
    if not others:
        raise missing(step.script, wanted, listed(losses))
    if len(others) > 1:
        noised = assigned(*(s for s in suite if any(call in ast.walk(s) for call in noising)))
        made = [s for s in suite if read(s) & noise or any(_is_velocity(n) for n in ast.walk(s))]
        likely = (others & (assigned(*made) | noise)) - noised
        if len(likely) != 1:
            shown = ", ".join(f"`{name}`" for name in sorted(others))
            raise missing(step.script, f"one target that `{prediction}` is compared to", shown)
        others = likely
    target = others.pop()
    if not any(target in assigned(s) and prediction not in read(s) for s in suite):
        raise missing(step.script, f"the assignment of the target `{target}` beside the U-Net's call", "none")
    made_of_itself = False
    for i in range(step.at_call + 1, len(suite)):
        own = {target, prediction} & read(suite[i])
        if not own or any(target in assigned(s) and not {target, prediction} & read(s) for s in suite[i:]):
            continue
        if target in assigned(suite[i]) and prediction not in own:
            made_of_itself = True
        elif made_of_itself and prediction in assigned(suite[i]):
            wanted = f"masks in the loss, not in `{prediction}` and `{target}`, whose difference is measured before"
            raise missing(step.script, wanted, f"`{first_line(suite[i])}`")
        else:
            return target, i
    raise missing(step.script, wanted, "none after the target is made")


def _is_velocity(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and called(node) == "get_velocity"
