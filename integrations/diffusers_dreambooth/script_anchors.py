"""Where the parts of a DreamBooth-LoRA script are, found by what they do rather than by name or line.

Users copy these scripts and edit them, so nothing is looked up by the name of a local variable. The one thing taken as
given is the order of a training step: images are encoded, noise is added (by a schedule's `add_noise`, or mixed in, as
flow matching does), the denoiser predicts, a loss is taken of prediction and target, and the accelerator runs it
backward.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator
from typing import Any

from apt_hooks.errors import AptError

from .noising import Again, Noising, again, by_schedule, find_mixing
from .repeated_statements import FrozenCopy, StepBlock, draws, frozen_copy, makers_of
from .syntax_tree import Tree, assigned, called, first_line, listed, missing, owner, read, without_casts

RUN = "apt_hooks_run"
"""The name of the run in the script."""
PROMPTS = "apt_hooks_prompts"
"""There, of what encodes prompts of apt-hooks' own."""
PRIOR = "with_prior_preservation"
_PARSING = ("parse_args", "parse_known_args")
_SIMPLE = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Expr)
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)

Encoding = tuple[ast.stmt, ast.expr]
"""A statement, and the part of it that encodes text, to be run once more."""


@dataclasses.dataclass(frozen=True)
class Anchors:
    """The anchors: statements to insert lines at, and the names that those lines use.

    Attributes:
        parser, parse: name of the argument parser, and the statement that parses with it.
        arguments, accelerator, unet: names (or expressions) in the training function.
        prepare: after it, the accelerator has wrapped the denoiser, and the schedule is made.
        noising, noise: how noise is added, and the first statement that does.
        timesteps: the timesteps' name, or the noise's share (source).
        clean: what the noise is added to (source).
        again: what makes the clean latents of images that are moved.
        caches: before the loop, each statement that encodes images, with VAE and images (source).
        before_caches: the statement that holds the first of these.
        call, prediction: the statement that calls the denoiser, and the name of what its loss is taken of.
        predicted: the statement after which that is complete.
        frozen: the same asked of the base model.
        words: the statement before which the text encoders are loaded and have encoded nothing; None: all of it is
            encoded in the step.
        encodings: what may encode text before the training.
        asked: the same, where a prompt may take the text's place.
        textless: whether a step encodes no text.
        wordless: why the base model cannot be given other text than the one in training.
        target, compare: name of the target, and the first statement that does anything with it or with the prediction.
        factor: the first statement that takes something else of the batch, such as a mask, into the loss (its source).
        loss, backward: name of the loss, and the statement that differentiates it.
        log, step: the statement that logs to the trackers, if there is one, and the source of its step.
        loops: those of the training, the outermost last.
        save, folder: after it, the LoRA is saved, in this folder (source).
    """

    parser: str
    parse: ast.stmt
    arguments: str
    accelerator: str
    unet: str
    prepare: ast.stmt
    noising: Noising
    noise: ast.stmt
    timesteps: str
    clean: str
    again: Again
    caches: list[tuple[ast.stmt, str, str]]
    before_caches: ast.stmt | None
    call: ast.stmt
    prediction: str
    predicted: ast.stmt
    frozen: FrozenCopy
    words: ast.stmt | None
    encodings: list[Encoding]
    asked: list[Encoding]
    textless: bool
    wordless: str | None
    target: str
    compare: ast.stmt
    factor: str | None
    loss: str
    backward: ast.stmt
    log: ast.stmt | None
    step: str | None
    loops: list[ast.For | ast.While]
    save: ast.stmt
    folder: str


def find(content: bytes, name: str) -> Anchors:
    """Find the anchors.

    Args:
        content: of the script, without inserted lines.
        name: of the script, for errors.

    Raises:
        AptError: it is no Python, trains no LoRA, or an anchor is missing; the message names the anchor and what was
            found instead.
    """
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError) as error:
        where = f"line {error.lineno}: {error.msg}" if isinstance(error, SyntaxError) else error
        raise AptError(f"{name}: cannot be read as Python: {where}") from error
    return _Finder(tree, name).find()


class _Finder:
    """The statements of a step that the others are found from, and then all."""

    def __init__(self, tree: ast.Module, name: str) -> None:
        self.tree = Tree(tree)
        self.name = name
        self.defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        self.backward = self._backward()
        self._check_lora(tree)
        self.accelerator = owner(self.backward)
        self.loops = [node for node in self.tree.ancestors(self.backward) if isinstance(node, (ast.For, ast.While))]
        self.function = self.tree.function(self.backward)
        self.noising = self._noising()
        self.prepare, self.prepared = self._prepare()
        self.calls, self.prediction = self._unet_calls()
        self.unet = called(self.calls[0])
        self.encodings = self._encodings()
        self.encoding = self.encodings[0]
        # The block of statements that a step is, from the images to the denoiser.
        self.suite = self.tree.common_suite([*self.encodings, *self.noising.expressions, *self.calls])
        self.at_encode = self.tree.index(self.suite, self.encoding)
        self.at_call = self.tree.index(self.suite, self.calls[-1])
        if any(self.tree.index(self.suite, call) != self.at_call for call in self.calls):
            raise self._missing("one call of the U-Net a step, or one in each branch of an `if`", listed(self.calls))

    def find(self) -> Anchors:
        for call in ("save_state", "load_state"):
            if not self.tree.calls(self.function, call):
                raise self._missing(f"the checkpoints, a call of {self.accelerator}.{call}(...)", "none")
        noise, mixed = self.noising.noise, self.noising.schedule is None
        if mixed:
            self.prediction = self._loss_taken_of()
        target, at_compare = self._comparison(noise)
        made: list[int] = []
        if mixed:
            made = makers_of(self.prediction, self.suite, self.at_call + 1, at_compare)
        self._check_prior()
        step = StepBlock(self.name, self.suite, self.at_encode, self.at_call)
        timesteps = self.noising.level or self._timesteps()
        caches = self._caches()
        log, log_step = self._log()
        save, folder = self._save()
        parser, parse = self._parser()
        names = self._encoding_names()
        encoded = self._text_encodings(names)
        frozen, wordless = self._frozen(step, names, made)
        return Anchors(
            parser=parser,
            parse=parse,
            arguments=self._arguments(),
            accelerator=self.accelerator,
            unet=self.unet,
            prepare=self.prepare,
            noising=self.noising,
            noise=self.suite[min(self._noising_places())],
            timesteps=timesteps,
            clean=self._clean(),
            again=self._again(step, timesteps),
            caches=caches,
            before_caches=self.tree.beside(caches[0][0], self.loops[-1]) if caches else None,
            call=self.suite[self.at_call],
            prediction=self.prediction,
            predicted=self.suite[max([self.at_call, *made])],
            frozen=dataclasses.replace(
                frozen,
                text=tuple(self._reading(statement, names, f"{RUN}.reading") for statement in frozen.text),
                call=tuple(self._reading(statement, names, f"{RUN}.reading") for statement in frozen.call),
            ),
            words=self.tree.beside(encoded[0][0], self.loops[-1]) if encoded else None,
            encodings=encoded,
            asked=[(statement, self._reading(part, names, f"{PROMPTS}.reading")) for statement, part in encoded],
            textless=not names & read(*frozen.text, *frozen.call),
            wordless=wordless,
            target=target,
            compare=self.suite[at_compare],
            factor=self._factor(at_compare, {target, *read(*self.encoding.args, ast.parse(timesteps)), *noise}),
            loss=ast.unparse(self.backward.args[0]),
            backward=self.tree.statement(self.backward),
            log=log,
            step=log_step,
            loops=self.loops,
            save=save,
            folder=folder,
        )

    def _again(self, step: StepBlock, timesteps: str) -> Again:
        self._check_encoding()
        at_noise = min(self._noising_places())
        if self.noising.schedule is not None and not any(timesteps in assigned(s) for s in self.suite[:at_noise]):
            raise self._missing(f"the draw of `{timesteps}` before the noise is added", "none beside it")
        return again(step, self.tree, self.noising, self.encodings, timesteps, f"{RUN}.moved")

    def _noising_places(self) -> set[int]:
        return {self.tree.index(self.suite, expression) for expression in self.noising.expressions}

    def _clean(self) -> str:
        first = self.noising.expressions[0]
        return ast.unparse(first.args[0]) if isinstance(first, ast.Call) and first.args else min(self.noising.clean)

    # -- one anchor each ---------------------------------------------------------------------------------------------

    def _backward(self) -> ast.Call:
        wanted = "the backward pass, `accelerator.backward(loss)` in a training loop"
        found = [
            call
            for call in self.tree.calls(self.tree.root, "backward")
            if any(isinstance(node, (ast.For, ast.While)) for node in self.tree.ancestors(call))
        ]
        if len(found) != 1:
            raise self._missing(wanted, listed(found))
        if len(found[0].args) != 1 or not isinstance(found[0].args[0], ast.Name):
            raise self._missing(wanted + ", the loss a variable", listed(found))
        return found[0]

    def _parser(self) -> tuple[str, ast.stmt]:
        """The name of the parser with the most arguments, and the statement to add others before."""
        found = [c for name in _PARSING for c in self.tree.calls(self.tree.root, name) if owner(c).isidentifier()]
        if not found:
            raise self._missing("the argument parser, `parser.parse_args()`", "none")
        found.sort(key=lambda call: call.lineno)
        arguments = [owner(call) for call in self.tree.calls(self.tree.root, "add_argument")]
        most = max(reversed(found), key=lambda call: arguments.count(owner(call)))
        first = next(call for call in found if owner(call) == owner(most))
        function: Any = self.tree.function(first)
        making = [n for n in ast.walk(function) if isinstance(n, ast.Assign) and owner(first) in assigned(n)]
        return owner(first), self.tree.beside(first, making[0] if making else function.body[0])

    def _arguments(self) -> str:
        """What the arguments are called in the training function: that of which most of the parser's are asked.

        Where the parser's arguments cannot be read, it is what is parsed in the function, its parameter that is asked
        most, or what is parsed outside.
        """
        function = self.function
        given = [argument for call in self.tree.calls(self.tree.root, "add_argument") for argument in call.args]
        names = {str(a.value).lstrip("-").replace("-", "_") for a in given if isinstance(a, ast.Constant)}
        inner = [node for node in ast.walk(function) if isinstance(node, ast.Attribute)]
        asked = [ast.unparse(node.value) for node in inner if node.attr in names]
        own = function.args.args if isinstance(function, ast.FunctionDef) else []
        parameters = [a.arg for a in own if a.arg != "self"]
        found = asked or self._parsed(function)
        if not found and parameters:
            found = [name for name in map(ast.unparse, (n.value for n in inner)) if name in parameters] or parameters
        found = found or self._parsed(self.tree.root)
        if not found:
            raise self._missing("the parser's arguments in the training function, as in `args.output_dir`", "none")
        return max(sorted(set(found)), key=found.count)

    def _parsed(self, function: ast.AST) -> list[str]:
        """Names that are assigned in a function from what parses."""
        functions = [node for node in ast.walk(self.tree.root) if isinstance(node, ast.FunctionDef)]
        parsing = {f.name for f in functions if any(self.tree.calls(f, name) for name in _PARSING)} | set(_PARSING)
        found = []
        for node in ast.walk(function):
            own = isinstance(node, (ast.Assign, ast.AnnAssign)) and self.tree.function(node) is function
            if own and isinstance(node.value, ast.Call) and called(node.value) in parsing:  # type: ignore[attr-defined]
                found += sorted(assigned(node))
        return found

    def _prepare(self) -> tuple[ast.stmt, set[str]]:
        calls = self.tree.calls(self.function, "prepare")
        statements = [self.tree.statement(call) for call in calls if owner(call) == self.accelerator]
        statements = [s for s in statements if isinstance(s, ast.Assign) and self._before_the_loop(s)]
        if not statements:
            raise self._missing(f"the models, assigned from `{self.accelerator}.prepare(...)`", listed(calls))
        schedule = self.noising.schedule or ""
        making = [n for n in ast.walk(self.function) if isinstance(n, ast.Assign) and schedule in assigned(n)]
        making = [n for n in making if self.tree.function(n) is self.function]
        if any(not self._before_the_loop(n) for n in making):
            raise self._missing(f"the schedule `{schedule}` before the training loop", "it made in the loop")
        last = max([*statements, *making], key=lambda statement: statement.lineno)
        for call in self.tree.calls(self.function, "load_state"):
            if call.lineno < last.lineno:
                wanted = f"the models{f' and `{schedule}`' if schedule else ''} made before a checkpoint is loaded"
                raise self._missing(wanted, listed([call]))
        return self.tree.beside(last, self.loops[-1]), assigned(*statements)

    def _before_the_loop(self, statement: ast.stmt) -> bool:
        own = self.tree.function(statement) is self.function
        return own and statement.lineno < self.loops[-1].lineno

    def _noising(self) -> Noising:
        """Where noise is added: the schedule's calls, or one sum by which it is mixed in."""
        found = [c for c in self.tree.calls(self.loops[0], "add_noise") if c.lineno < self.backward.lineno]
        if found:
            return by_schedule(found)
        mixed = [m for m in find_mixing(self.loops[0]) if m.expressions[0].lineno < self.backward.lineno]
        if len(mixed) != 1:
            raise self._missing(
                "the noising, a call of .add_noise(...) or one `(1 - sigmas) * latents + sigmas * noise`, the noise "
                "drawn in the training loop",
                ", ".join(f"`{ast.unparse(m.expressions[0])}`" for m in mixed) or "none",
            )
        return mixed[0]

    def _unet_calls(self) -> tuple[list[ast.Call], str]:
        wanted = "the call of the U-Net, `x = model(noisy, timesteps, ...)[0]` or `.sample`, of a prepared model"
        inner = sorted(
            (n for n in ast.walk(self.loops[0]) if isinstance(n, (ast.Assign, ast.Call))), key=lambda n: n.lineno
        )
        noisy = assigned(*map(self.tree.statement, self.noising.expressions))
        for node in inner:
            if isinstance(node, ast.Assign) and noisy & read(node.value):
                noisy |= assigned(node)
        calls = [n for n in inner if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
        calls = [call for call in calls if called(call) in self.prepared and call.lineno < self.backward.lineno]
        of_noisy = [call for call in calls if noisy & read(*call.args, *(k.value for k in call.keywords))]
        if len({called(call) for call in of_noisy}) != 1:
            raise self._missing(wanted, listed(calls))
        names: set[str] = set()
        for call in of_noisy:
            statement, value = self.tree.statement(call), self.tree.parents[call]
            plain = isinstance(statement, ast.Assign) and statement.value is value
            if not plain or not isinstance(value, (ast.Subscript, ast.Attribute)):
                raise self._missing(wanted, listed([call]))
            names |= assigned(statement)
        if len(names) != 1:
            raise self._missing("one name for the U-Net's prediction", ", ".join(sorted(names)))
        return of_noisy, names.pop()

    def _loss_taken_of(self) -> str:
        """What is made of the prediction, such as what is unpacked of it, and compared."""
        made = dict.fromkeys([self.prediction])
        for statement in self.suite[self.at_call + 1 :]:
            if made.keys() & read(statement):
                made.update(dict.fromkeys(sorted(assigned(statement))))
        return next((name for name in made if self._compared_to(name)), self.prediction)

    def _losses(self) -> list[ast.Call]:
        """Calls behind the denoiser's of what is called a loss."""
        calls = [n for s in self.suite[self.at_call + 1 :] for n in ast.walk(s) if isinstance(n, ast.Call)]
        return [call for call in calls if "loss" in ast.unparse(call.func)]

    def _compared_to(self, prediction: str) -> set[str]:
        """The names that it is compared to, by a loss or a difference."""
        rest = self.suite[self.at_call + 1 :]
        operations = [n for s in rest for n in ast.walk(s) if isinstance(n, ast.BinOp) and isinstance(n.op, ast.Sub)]
        pairs = [[*call.args, *(k.value for k in call.keywords)][:2] for call in self._losses()]
        others: set[str] = set()
        for pair in pairs + [[operation.left, operation.right] for operation in operations]:
            names = {side.id for side in map(without_casts, pair) if isinstance(side, ast.Name)}
            if prediction in names:
                others |= names - {prediction}
        return others

    def _comparison(self, noise: set[str]) -> tuple[str, int]:
        """The name of the target, and the place of the first statement that takes it or the prediction in, once it is
        made.

        Of several things that the prediction is compared to, the target is the one that is made from the noise itself
        (`noise`: its names), or is its velocity.
        """
        suite, prediction = self.suite, self.prediction
        wanted = f"the loss of `{prediction}`, such as `mse_loss({prediction}, target)`"
        others = self._compared_to(prediction)
        if not others:
            raise self._missing(wanted, listed(self._losses()))
        if len(others) > 1:
            noised = assigned(*(s for s in suite if any(e in ast.walk(s) for e in self.noising.expressions)))
            made = [s for s in suite if read(s) & noise or any(_is_velocity(n) for n in ast.walk(s))]
            likely = (others & (assigned(*made) | noise)) - noised
            if len(likely) != 1:
                shown = ", ".join(f"`{name}`" for name in sorted(others))
                raise self._missing(f"one target that `{prediction}` is compared to", shown)
            others = likely
        target = others.pop()
        if not any(target in assigned(s) and prediction not in read(s) for s in suite):
            raise self._missing(f"the assignment of the target `{target}` beside the U-Net's call", "none")
        made_of_itself = False
        for i in range(self.at_call + 1, len(suite)):
            own = {target, prediction} & read(suite[i])
            if not own or any(target in assigned(s) and not {target, prediction} & read(s) for s in suite[i:]):
                continue
            if target in assigned(suite[i]) and prediction not in own:
                made_of_itself = True
            elif made_of_itself and prediction in assigned(suite[i]):
                wanted = f"masks in the loss, not in `{prediction}` and `{target}`, whose difference is measured before"
                raise self._missing(wanted, f"`{first_line(suite[i])}`")
            else:
                return target, i
        raise self._missing(wanted, "none after the target is made")

    def _factor(self, at_compare: int, others: set[str]) -> str | None:
        """What the batch holds beside the images and the text, where the loss is made of it.

        Args:
            at_compare: place of the first statement of the loss.
            others: names that are made of the batch too, and are in every loss.
        """
        loop = self.loops[0]
        if not isinstance(loop, ast.For):
            return None
        others = others | assigned(self.suite[self.at_encode]) | assigned(self.suite[self.at_call])
        batch = assigned(loop.target)
        before = [n for s in self.suite[:at_compare] for n in ast.walk(s) if isinstance(n, (ast.Assign, ast.AugAssign))]
        for assignment in before:
            if batch & read(assignment):
                batch = batch | (assigned(assignment) - others)
        end = self.tree.index(self.suite, self.backward)
        loss = ast.unparse(self.backward.args[0])
        for statement in (self.suite[i] for i in makers_of(loss, self.suite, at_compare, end)):
            if batch & read(statement):
                parts = [n for n in ast.walk(statement) if isinstance(n, (ast.Assign, ast.AugAssign))]
                return first_line(next((part for part in parts if batch & read(part)), statement))
        return None

    def _check_prior(self) -> None:
        """The class half of a batch is told by the scripts' own argument, which a user may have renamed."""
        chunks = self.tree.calls(self.function, "chunk")
        halved = [c for c in chunks if self.prediction in read(c.func, *c.args[:1]) and _along_the_batch(c)]
        asked = {n.attr for n in ast.walk(self.function) if isinstance(n, ast.Attribute)}
        if halved and PRIOR not in asked:
            raise self._missing(
                f"the argument `{PRIOR}`, which tells that half of a batch are class images", listed(halved)
            )

    def _timesteps(self) -> str:
        found = []
        for call in self.calls:
            given = call.args[1:2] + [k.value for k in call.keywords if k.arg in ("timestep", "timesteps")]
            found.append(ast.unparse(given[0]) if given else "")
        if len(set(found)) != 1 or not found[0].isidentifier():
            shown = ", ".join(f"`{text}`" for text in found if text) or listed(self.calls)
            raise self._missing("the timesteps, a variable given to the U-Net", shown)
        return found[0]

    def _encodings(self) -> list[ast.Call]:
        """Calls of the VAE in the loop; one, but where noise is mixed in, whose images are moved by other lines."""
        wanted = "encoding of the images, `vae.encode(images).latent_dist` in the training loop"
        found = [call for call in encoding_calls(self.loops[0]) if call.lineno < self.backward.lineno]
        if not found or (len(found) > 1 and self.noising.schedule is not None):
            # Another picture, such as a masked one, would have to be moved alike.
            raise self._missing(f"{'one' if found else 'the'} {wanted}", listed(found))
        return found

    def _caches(self) -> list[tuple[ast.stmt, str, str]]:
        """What encodes images before the training."""
        calls = [call for call in encoding_calls(self.function) if call.args and call.lineno < self.loops[-1].lineno]
        own = [call for call in calls if self.tree.function(call) is self.function]
        return [(self.tree.statement(call), owner(call), ast.unparse(call.args[0])) for call in own]

    def _check_encoding(self) -> None:
        for encoding in self.encodings:
            if not encoding.args:
                raise self._missing("the images, as what the VAE encodes", listed([encoding]))
            between = [n for n in self.tree.ancestors(encoding) if isinstance(n, (ast.For, ast.While))]
            if between[0] is not self.loops[0]:
                raise self._missing("the encoding of the images in one call", "it in a loop of its own")

    def _text_encoders(self) -> set[str]:
        """The names that were prepared, but for U-Net and VAE and what is stepped, counted or looped over."""
        others = {owner(call) for name in ("step", "zero_grad") for call in self.tree.calls(self.function, name)}
        for node in ast.walk(self.function):
            counted = node.iter if isinstance(node, ast.For) else node
            if isinstance(counted, ast.Call) and (counted is not node or called(counted) == "len"):
                others |= {argument.id for argument in counted.args if isinstance(argument, ast.Name)}
            elif counted is not node and isinstance(counted, ast.Name):
                others.add(counted.id)
        return self.prepared - others - {self.unet, owner(self.encoding)}

    def _encoding_names(self) -> set[str]:
        """Text encoders by all their names: alone, in lists, and in functions that are defined where they are."""
        tree, function = self.tree, self.function
        # What is loaded and has these methods is a model, and no tokenizer.
        models = {owner(call) for name in ("to", "requires_grad_") for call in tree.calls(function, name)}
        pictures = [n.value for n in ast.walk(function) if isinstance(n, ast.Attribute) and n.attr == "images"]
        models -= {
            called(value) for value in pictures if isinstance(value, ast.Call)
        }  # a pipeline for those of a class
        found = self._text_encoders()
        for statement in self._before_the_loops():
            value = getattr(statement, "value", None)
            if isinstance(value, ast.Call) and called(value) == "from_pretrained":
                found |= assigned(statement) & models
        for node in self._before_the_loops():
            value = getattr(node, "value", None)
            together = isinstance(value, (ast.List, ast.Tuple, ast.Dict, ast.Name))
            if (together or isinstance(node, ast.FunctionDef)) and found & read(node):
                found |= assigned(node) if together else {node.name}  # type: ignore[attr-defined]
        return found - {self.unet, owner(self.encoding), self.noising.schedule or ""}

    def _text_encodings(self, names: set[str]) -> list[Encoding]:
        """Calls before the loop of what may encode text: an encoder, a function that has one, or that is given one.

        Whether one does is seen when it runs. Left out is what could not be run again after its statement.
        """
        found: dict[ast.expr, ast.stmt] = {}
        for statement in self._before_the_loops():
            if not isinstance(statement, _SIMPLE):
                continue
            for call in (node for node in ast.walk(statement) if isinstance(node, ast.Call)):
                given = read(*call.args, *(keyword.value for keyword in call.keywords))
                known = called(call) in names or (called(call) in self.defined and names & given)
                if not isinstance(call.func, ast.Name) or not known:
                    continue
                within = [n for n in self.tree.ancestors(call) if isinstance(n, ast.expr)]
                whole = [n for n in within if isinstance(n, _COMPREHENSIONS)]
                part = whole[-1] if whole else call
                inner = any(n in found for n in [part, *within]) or any(isinstance(n, ast.Lambda) for n in within)
                if not inner and not any(map(draws, ast.walk(part))) and not assigned(statement) & read(part):
                    found[part] = statement
        return [(statement, part) for part, statement in found.items()]

    def _reading(self, part: Any, names: set[str], by: str) -> Any:
        """The same with each function of the script that encodes text, such as `encode(...)`, as `by(encode)(...)`."""
        tree = ast.parse(ast.unparse(part))
        for call in [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]:
            given = read(*call.args, *(keyword.value for keyword in call.keywords))
            if called(call) in self.defined and {called(call), *given} & names:
                call.func = ast.parse(f"{by}({called(call)})", mode="eval").body
        (statement,) = tree.body
        return statement.value if isinstance(part, ast.expr) and isinstance(statement, ast.Expr) else statement

    def _before_the_loops(self) -> Iterator[ast.stmt]:
        """The training function's own statements up to the loop, of all blocks, in the order of the file."""
        inside = [node for node in ast.walk(self.function) if isinstance(node, ast.stmt) and node is not self.function]
        yield from sorted(filter(self._before_the_loop, inside), key=lambda node: node.lineno)

    def _frozen(self, step: StepBlock, names: set[str], made: list[int]) -> tuple[FrozenCopy, str | None]:
        """The base model's pass, and why it cannot have other text, if so: then only trained encoders run again.

        Args:
            made: places of the statements that make of the prediction what the loss is taken of.
        """
        noising = self._noising_places()
        try:
            return frozen_copy(step, names, noising, made), None
        except AptError as error:
            reason = str(error).removesuffix(". Nothing was changed")
            return frozen_copy(step, self._text_encoders(), noising, made), reason

    def _log(self) -> tuple[ast.stmt | None, str | None]:
        found = [call for call in self.tree.calls(self.loops[0], "log") if owner(call) == self.accelerator]
        if not found:
            return None, None  # a script without trackers; APT's own log needs none
        call = found[-1]
        steps = [keyword.value for keyword in call.keywords if keyword.arg == "step"] + call.args[1:2]
        return self.tree.statement(call), ast.unparse(steps[0]) if steps else None

    def _save(self) -> tuple[ast.stmt, str]:
        found = [
            c for c in self.tree.calls(self.function, "save_lora_weights") if self.tree.function(c) is self.function
        ]
        folders = [k.value for call in found for k in call.keywords if k.arg == "save_directory"]
        folders = folders or [argument for call in found for argument in call.args[:1]]
        if not folders:
            wanted = "the saving of the LoRA, `.save_lora_weights(save_directory=...)` after training"
            raise self._missing(wanted, listed(found))
        suite = self.tree.suite(self.tree.statement(found[-1]))
        # A copy in another format is written next to it, and is to carry the metadata too.
        names = ("save_lora_weights", "save_file")
        saving = [s for s in suite if any(isinstance(n, ast.Call) and called(n) in names for n in ast.walk(s))]
        return saving[-1], ast.unparse(folders[-1])

    def _check_lora(self, tree: ast.Module) -> None:
        named = {getattr(node, "attr", None) or getattr(node, "id", None) for node in ast.walk(tree)}
        if not named & {"LoraConfig", "add_adapter", "save_lora_weights"}:
            raise AptError(
                f"{self.name}: trains no LoRA of diffusers (looked for `LoraConfig`, `add_adapter`, "
                "`save_lora_weights`), and what APT compares with is the model with its LoRA off: take a `..._lora...` "
                "script. Nothing was changed"
            )

    def _missing(self, wanted: str, found: str) -> AptError:
        return missing(self.name, wanted, found)


def encoding_calls(root: ast.AST) -> list[ast.Call]:
    """`vae.encode(images)` of `vae.encode(images).latent_dist` and, of an autoencoder without one, `.latent`."""
    results = (n for n in ast.walk(root) if isinstance(n, ast.Attribute) and n.attr in ("latent_dist", "latent"))
    found = [node.value for node in results if isinstance(node.value, ast.Call)]
    return sorted((call for call in found if called(call) == "encode"), key=lambda call: call.lineno)


def _along_the_batch(chunk: ast.Call) -> bool:
    """Whether a call of `torch.chunk` or of a tensor's own may take the batch apart, and not its channels."""
    given = [keyword.value for keyword in chunk.keywords if keyword.arg == "dim"]
    given += chunk.args[2 if owner(chunk) == "torch" else 1 :]
    try:
        return not given or ast.literal_eval(given[0]) in (0, -4)
    except ValueError:  # a variable
        return True


def _is_velocity(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and called(node) == "get_velocity"
