"""Where the parts of a checkout of sd-scripts are that APT joins, found by what its code does.

Releases move functions from file to file and leave re-exports behind (0.11 did with most of `train_util`), and GUIs
carry copies whose README is of another version. So nothing is looked up by file or version: from the two scripts, the
calls are followed through the imports to where each function is defined.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

from apt_hooks.errors import AptError

from ..patching import Places, Statements, stripped_python

SCRIPTS = ("train_network.py", "sdxl_train_network.py")
NOISING, SAMPLER, READER = "get_noise_noisy_latents_and_timesteps", "get_timesteps", "read_config_from_file"
FLOW_NOISING = "get_noisy_model_input_and_timesteps"
MASKING = "apply_masked_loss"
METHOD = "get_noise_pred_and_target"
SUPPORTED = "sd-scripts 0.10.0 to 0.11.1 can be patched: update it, or `git checkout 6721028` in it (0.11.1)"

# What the adapter overrides or calls: the parameters it relies on, by name and in this order.
METHODS: dict[str, tuple[str, ...]] = {
    "train": ("self", "args"),
    "get_tokenizers": ("self", "tokenize_strategy"),
    "get_text_encoding_strategy": ("self", "args"),
    "assert_extra_args": ("self", "args", "train_dataset_group", "val_dataset_group"),
    "load_target_model": ("self", "args", "weight_dtype", "accelerator"),
    "load_unet_lazily": ("self", "args", "weight_dtype", "accelerator", "text_encoders"),
    "cache_text_encoder_outputs_if_needed": (
        "self", "args", "accelerator", "unet", "vae", "text_encoders", "dataset", "weight_dtype",
    ),
    "get_sai_model_spec": ("self", "args"),
    "generate_step_logs": ("self", "args"),
    "process_batch": (
        "self", "batch", "text_encoders", "unet", "network", "vae", "noise_scheduler", "vae_dtype", "weight_dtype",
        "accelerator", "args", "text_encoding_strategy", "tokenize_strategy", "is_train", "train_text_encoder",
        "train_unet",
    ),
    "encode_images_to_latents": ("self", "args", "vae", "images"),
    "shift_scale_latents": ("self", "args", "latents"),
    METHOD: ("self", "args", "accelerator", "noise_scheduler", "latents", "batch", "text_encoder_conds"),
    "post_process_loss": ("self", "loss", "args", "timesteps", "noise_scheduler"),
}  # fmt: skip
FUNCTIONS: dict[str, tuple[str, ...]] = {
    SAMPLER: ("min_timestep", "max_timestep", "b_size", "device"),
    NOISING: ("args", "noise_scheduler", "latents"),
    READER: ("args", "parser"),
}
_OF_FLOW_NOISING = ("args", "noise_scheduler", "latents", "noise", "device", "dtype")

_ARGUMENT = '{parser}.add_argument("--apt_config", default=None, help="TOML file with an [apt] section (apt-hooks)")'
_TRAINER = (
    'if {args}.apt_config or hasattr({args}, "apt_section"):',
    "    from {reader} import apt_hooks_adapter",
    "    {trainer} = apt_hooks_adapter().apt_trainer({trainer}, {args})",
)
_ADAPTER = (
    "def apt_hooks_adapter():",
    "    try:",
    "        from apt_hooks.integrations.sd_scripts import adapter",
    "    except ModuleNotFoundError as e:",
    '        raise SystemExit(f"[apt] and --apt_config need apt-hooks, not found here ({{e}}): {install}")',
    "    return adapter",
)
_TAKE_SECTION = (
    'if "apt" in map(str.lower, {config}):',
    "    apt_hooks_adapter().take_section({config}, {parser})",
)


@dataclasses.dataclass(frozen=True)
class Source:
    """A file of the checkout, without inserted lines.

    Attributes:
        name: its path in the checkout, with slashes.
        content, tree: what it is.
    """

    name: str
    content: bytes
    tree: ast.Module

    @property
    def module(self) -> str:
        """The name by which the checkout's own code imports it."""
        return ".".join(PurePosixPath(self.name).with_suffix("").parts).removesuffix(".__init__")

    def functions(self, owner: str | None = None) -> dict[str, ast.FunctionDef]:
        """The functions of the file, or the methods of a class in it, by name."""
        bodies = [self.tree] if owner is None else [c for c in self.classes() if c.name == owner]
        return {node.name: node for body in bodies for node in body.body if isinstance(node, ast.FunctionDef)}

    def classes(self) -> list[ast.ClassDef]:
        """The classes of the file."""
        return [node for node in self.tree.body if isinstance(node, ast.ClassDef)]

    def imports(self) -> dict[str, tuple[str, str | None]]:
        """What each imported name is: a module and None, or a module and what is taken from it."""
        found: dict[str, tuple[str, str | None]] = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    found[alias.asname or alias.name] = (alias.name, None)
            elif isinstance(node, ast.ImportFrom):
                # A package's own file counts as a module in it.
                inside = self.name.removesuffix(".py").split("/")
                package = inside[: -node.level] if node.level else []
                module = ".".join([*package, *([node.module] if node.module else [])])
                for alias in node.names:
                    found[alias.asname or alias.name] = (module, alias.name)
        return found


@dataclasses.dataclass(frozen=True)
class _Main:
    """The block that a script runs, and the names in it."""

    parser: str
    args: str
    trainer: str
    kind: str
    reader: str
    parse: ast.stmt
    train: ast.stmt


class Checkout:
    """A folder that holds sd-scripts, as its code says it works.

    Args:
        folder: where it is.
        contents: of files that are to be taken for something else than what is on the disk, by name.

    Attributes:
        refused: what is in the way of those scripts beside `SCRIPTS` that train a network and cannot take `[apt]`.

    Raises:
        AptError: something that the adapter needs is not there; the message says what was looked for and found.
    """

    def __init__(self, folder: Path, contents: Mapping[str, bytes] | None = None) -> None:
        self.folder = folder
        self.refused: dict[str, str] = {}
        self._contents = contents or {}
        self._sources: dict[str, Source] = {}
        self._mains: dict[str, _Main] = {}
        self._readers: dict[str, tuple[Source, ast.FunctionDef]] = {}
        for name in SCRIPTS:
            self._take(name)
        others = sorted({*(path.name for path in folder.glob("*.py")), *(n for n in self._contents if "/" not in n)})
        for name in others:
            if name not in SCRIPTS and self._trains_a_network(name):
                try:
                    self._take(name)
                except AptError as error:
                    self.refused[name] = str(error)

    @property
    def scripts(self) -> tuple[str, ...]:
        """The scripts that can take `[apt]`."""
        return tuple(self._mains)

    def _take(self, name: str) -> None:
        source = self.source(name)
        main = self._main(source)
        reader = self._function(source, main.reader)
        self._check_trainer(source, main.kind)
        self._mains[name], self._readers[name] = main, reader

    def _trains_a_network(self, name: str) -> bool:
        """Whether a script's trainer is one of those that `train_network.py` begins."""
        content = self._contents.get(name)
        content = (self.folder / name).read_bytes() if content is None else content
        if _MAIN.encode() not in content.replace(b'"', b"'") or b"train_network" not in content:
            return False
        try:
            source = self.source(name)
        except AptError:  # no Python of this version, and none that was looked for
            return False
        return any(
            place.name == SCRIPTS[0] and owner == self._mains[SCRIPTS[0]].kind
            for kind in source.classes()
            for place, owner in self._bases(source, kind.name)
        )

    def places(self, install: str, otherwise: tuple[str, ...] = ()) -> dict[str, Places]:
        """The lines to insert, by file.

        Args:
            install: what the trainer says where apt-hooks is missing.
            otherwise: what the scripts do where APT is not asked for.
        """
        found: dict[str, Places] = {}
        # In this order: a script is patched only once what it calls is there.
        for source, function in self._readers.values():
            if source.name not in found:
                found[source.name] = self._reader_places(source, function, install)
        for name, main in self._mains.items():
            statements = Statements(self.source(name).content, name)
            values = {**vars(main), "reader": self._readers[name][0].module}
            trainer = (*_TRAINER, *(("else:", *(f"    {line}" for line in otherwise)) if otherwise else ()))
            found[name] = [
                statements.before(main.parse, _ARGUMENT.format(**values)),
                statements.before(main.train, *(line.format(**values) for line in trainer)),
            ]
        return found

    def source(self, name: str) -> Source:
        """A file of the checkout.

        Raises:
            AptError: it cannot be read.
        """
        if name not in self._sources:
            self._sources[name] = self._read(name)
        return self._sources[name]

    def _read(self, name: str) -> Source:
        content = self._contents.get(name)
        try:
            content = stripped_python((self.folder / name).read_bytes() if content is None else content, name)
            return Source(name, content, ast.parse(content))
        except OSError as error:
            raise AptError(f"{self.folder / name}: cannot be read: {error.strerror}") from error
        except (SyntaxError, ValueError) as error:
            where = f"line {error.lineno}: {error.msg}" if isinstance(error, SyntaxError) else error
            raise AptError(f"{self.folder / name}: cannot be read as Python: {where}; nothing was changed") from error

    # -- what the code does ------------------------------------------------------------------------------------------

    def _main(self, source: Source) -> _Main:
        """The parts of `if __name__ == "__main__":`, from the call that trains backwards."""
        blocks = [n for n in source.tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == _MAIN]
        if len(blocks) != 1:
            raise self._missing(source, f"one `if {_MAIN}:`", f"{len(blocks)} of them")
        statements = list(_plain(blocks[0].body))
        for train, call in _calls(statements, "train"):
            owner = getattr(call.func, "value", None)
            kinds = [
                ast.unparse(s.value.func)
                for s in statements
                if isinstance(s, ast.Assign) and isinstance(s.value, ast.Call) and _is_name(s.targets[0], owner)
            ]
            readers = list(_calls(statements, READER))
            if len(kinds) != 1 or len(readers) != 1 or not call.args or len(readers[0][1].args) != 2:
                continue
            parser, reader = ast.unparse(readers[0][1].args[1]), ast.unparse(readers[0][1].func)
            parsing = [s for s, c in _calls(statements, "parse_args") if ast.unparse(c.func) == f"{parser}.parse_args"]
            if parsing:
                args, trainer = ast.unparse(call.args[0]), ast.unparse(owner)  # type: ignore[arg-type]
                return _Main(parser, args, trainer, kinds[0], reader, parsing[0], train)
        looked = f"`trainer = ...()`, `args = ...{READER}(args, parser)` and `trainer.train(args)` under `if {_MAIN}:`"
        raise self._missing(source, looked, "; ".join(ast.unparse(s).splitlines()[0] for s in statements))

    def _check_trainer(self, source: Source, kind: str) -> None:
        """That the trainer's methods take what the adapter gives, and that its timesteps can be drawn beforehand."""
        found: dict[str, tuple[Source, ast.FunctionDef]] = {}
        for place, owner in self._bases(*self._home(source, kind)):
            for name, function in place.functions(owner).items():
                found.setdefault(name, (place, function))
                if name in METHODS:
                    self._check_parameters(place, f"{owner}.{name}", function, METHODS[name])
        for name in METHODS:
            if name not in found:
                raise self._missing(source, f"{kind}.{name}()")
        place, method = found[METHOD]
        if "is_train" not in [argument.arg for argument in method.args.args]:
            raise self._missing(place, f"{METHOD}(..., is_train)")
        if [*_calls(method.body, FLOW_NOISING)]:
            home, name = self._home(place, self._called(place, method, FLOW_NOISING))
            flow = home.functions().get(name)
            names = [] if flow is None else [argument.arg for argument in flow.args.args]
            if not {"latents", "noise"} <= set(names) <= set(_OF_FLOW_NOISING):
                raise self._missing(home, f"{name}({', '.join(_OF_FLOW_NOISING)})", f"({', '.join(names)})")
            return
        home, noising = self._function(place, self._called(place, method, NOISING))
        if self._called(home, noising, SAMPLER) != SAMPLER:
            raise self._missing(home, f"{SAMPLER}(...) by its own name in {NOISING}()")
        self._function(home, SAMPLER)

    def _bases(self, source: Source, kind: str) -> Iterator[tuple[Source, str]]:
        """The class and those it inherits from, as far as they are the checkout's."""
        for owner in source.classes():
            if owner.name == kind:
                yield source, kind
                for base in owner.bases:
                    yield from self._bases(*self._home(source, ast.unparse(base)))

    def _called(self, source: Source, function: ast.FunctionDef, name: str) -> str:
        """How `function` calls the one of this name, such as `train_util.get_timesteps`."""
        found = {ast.unparse(call.func) for _, call in _calls(function.body, name)}
        if len(found) != 1:
            raise self._missing(source, f"a call of {name}() in {function.name}()", ", ".join(sorted(found)) or "none")
        return found.pop()

    def _function(self, source: Source, dotted: str) -> tuple[Source, ast.FunctionDef]:
        """The definition behind a name, and the file it is in."""
        home, name = self._home(source, dotted)
        function = home.functions().get(name)
        if function is None:
            raise self._missing(home, f"{name}()")
        self._check_parameters(home, name, function, FUNCTIONS[name])
        return home, function

    def _home(self, source: Source, dotted: str, seen: frozenset[str] = frozenset()) -> tuple[Source, str]:
        """The file that defines what `source` calls by this name, and its name there; followed through the imports."""
        owner, _, name = dotted.rpartition(".")
        defined = {*source.functions(), *(c.name for c in source.classes())}
        if not owner and name in defined:
            return source, name
        key = f"{source.name}:{dotted}"
        if key in seen:  # two files that import it from each other
            return source, name
        module, taken = source.imports().get(owner or name, (None, None))
        # `from library import train_util` takes a module, `from library.args import read_config_from_file` a function.
        if module is not None and owner:
            module = f"{module}.{taken}" if taken else module
        elif taken is not None:
            name = taken
        path = module and module.replace(".", "/")
        file = next((f for f in (f"{path}.py", f"{path}/__init__.py") if path and (self.folder / f).is_file()), None)
        if file is None:
            return source, name
        return self._home(self.source(file), name, seen | {key})

    def _reader_places(self, source: Source, reader: ast.FunctionDef, install: str) -> Places:
        loads = [
            statement
            for statement in ast.walk(reader)
            if isinstance(statement, ast.Assign)
            and ast.unparse(statement.value).startswith(("toml.load", "tomllib.load"))
        ]
        if len(loads) != 1:
            raise self._missing(source, f"one `... = toml.load(...)` in {reader.name}()", f"{len(loads)} of them")
        statements = Statements(source.content, source.name)
        values = {"config": ast.unparse(loads[0].targets[0]), "parser": reader.args.args[1].arg, "install": install}
        return [
            statements.before(reader, *(line.format(**values) for line in _ADAPTER)),
            statements.after(loads[0], *(line.format(**values) for line in _TAKE_SECTION)),
        ]

    # -- what is said ------------------------------------------------------------------------------------------------

    def _check_parameters(self, source: Source, name: str, function: ast.FunctionDef, wanted: tuple[str, ...]) -> None:
        found = tuple(argument.arg for argument in function.args.args)
        if found[: len(wanted)] != wanted:
            raise self._missing(source, f"{name}({', '.join(wanted)})", f"({', '.join(found)})")

    def _missing(self, source: Source, looked_for: str, found: str | None = None) -> AptError:
        said = f"found {found}" if found else "it is not there"
        return AptError(
            f"{self.folder / source.name}: looked for {looked_for}, {said}; {SUPPORTED}. Nothing was changed"
        )


_MAIN = "__name__ == '__main__'"


def _calls(statements: list[ast.stmt], name: str) -> Iterator[tuple[ast.stmt, ast.Call]]:
    """Calls of a function or method of that name, each with the one of the statements that it is in."""
    for statement in statements:
        for node in ast.walk(statement):
            if isinstance(node, ast.Call) and name == (
                getattr(node.func, "attr", None) or getattr(node.func, "id", "")
            ):
                yield statement, node


def _plain(statements: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements, those of both ways of an `if` in its place."""
    for statement in statements:
        if isinstance(statement, ast.If):
            yield from _plain([*statement.body, *statement.orelse])
        else:
            yield statement


def _is_name(target: ast.expr, other: ast.expr | None) -> bool:
    return isinstance(target, ast.Name) and isinstance(other, ast.Name) and target.id == other.id
