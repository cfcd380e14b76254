"""Which lines go where in a checkout of kohya's sd-scripts."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path

from apt_hooks.errors import AptError
from apt_hooks.files import write_atomically

from .. import patching
from ..patching import Insertion

OLDEST = (0, 10, 0)
TESTED: tuple[str, ...] = ("0.10.0", "0.10.1")

_ADAPTER = (
    "def apt_hooks_adapter():",
    "    try:",
    "        from apt_hooks.integrations.sd_scripts import adapter",
    "    except ModuleNotFoundError as e:",
    '        raise SystemExit(f"[apt] and --apt_config need apt-hooks, not found here ({e}): pip install apt-hooks")',
    "    return adapter",
)
_TAKE_SECTION = (
    '    if "apt" in map(str.lower, config_dict):',
    "        apt_hooks_adapter().take_section(config_dict, parser)",
)
_ARGUMENT = (
    '    parser.add_argument("--apt_config", default=None, help="TOML file with an [apt] section (apt-hooks)")',
)
_TRAINER = (
    '    if args.apt_config or hasattr(args, "apt_section"):',
    "        trainer = train_util.apt_hooks_adapter().apt_trainer(trainer, args)",
)
_READ_CONFIG = "def read_config_from_file(args: argparse.Namespace, parser: argparse.ArgumentParser):"
_MAIN = 'if __name__ == "__main__":'


def _script(trainer: str) -> tuple[Insertion, ...]:
    return (
        Insertion("    parser = setup_parser()", _ARGUMENT, after=True, within=_MAIN),
        Insertion(f"    trainer = {trainer}()", _TRAINER, after=True, within=_MAIN),
    )


INSERTIONS: dict[str, tuple[Insertion, ...]] = {
    # In this order: a script is patched only once what it calls is there.
    "library/train_util.py": (
        Insertion(_READ_CONFIG, _ADAPTER),
        Insertion("        config_dict = toml.load(f)", _TAKE_SECTION, after=True, within=_READ_CONFIG),
    ),
    "train_network.py": _script("NetworkTrainer"),
    "sdxl_train_network.py": _script("SdxlNetworkTrainer"),
}

# What the adapter overrides or calls: the parameters it relies on, by name and in this order.
REQUIRED: dict[str, dict[str, tuple[str, ...]]] = {
    "library/train_util.py": {
        "get_timesteps": ("min_timestep", "max_timestep", "b_size", "device"),
        "get_noise_noisy_latents_and_timesteps": ("args", "noise_scheduler", "latents"),
        "read_config_from_file": ("args", "parser"),
    },
    "train_network.py": {
        "NetworkTrainer.train": ("self", "args"),
        "NetworkTrainer.get_tokenizers": ("self", "tokenize_strategy"),
        "NetworkTrainer.assert_extra_args": ("self", "args", "train_dataset_group", "val_dataset_group"),
        "NetworkTrainer.load_target_model": ("self", "args", "weight_dtype", "accelerator"),
        "NetworkTrainer.get_sai_model_spec": ("self", "args"),
        "NetworkTrainer.generate_step_logs": ("self", "args"),
        "NetworkTrainer.process_batch": (
            "self", "batch", "text_encoders", "unet", "network", "vae", "noise_scheduler", "vae_dtype", "weight_dtype",
            "accelerator", "args", "text_encoding_strategy", "tokenize_strategy", "is_train", "train_text_encoder",
            "train_unet",
        ),
        "NetworkTrainer.shift_scale_latents": ("self", "args", "latents"),
        "NetworkTrainer.get_noise_pred_and_target": ("self", "args", "accelerator"),
        "NetworkTrainer.call_unet": (
            "self", "args", "accelerator", "unet", "noisy_latents", "timesteps", "text_conds", "batch", "weight_dtype",
        ),
        "NetworkTrainer.post_process_loss": ("self", "loss", "args", "timesteps", "noise_scheduler"),
    },
    "sdxl_train_network.py": {
        "SdxlNetworkTrainer.load_target_model": ("self", "args", "weight_dtype", "accelerator"),
        "SdxlNetworkTrainer.call_unet": (
            "self", "args", "accelerator", "unet", "noisy_latents", "timesteps", "text_conds", "batch", "weight_dtype",
        ),
    },
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Checkout:
    """A folder that holds sd-scripts.

    Attributes:
        folder: where it is.
        version: as its README says, or "unknown".
        state: per file, "patched", "not patched", or "patched by another version of apt-hooks".
    """

    folder: Path
    version: str
    state: dict[str, str]

    @property
    def patched(self) -> bool:
        """Whether every file is patched, by this version of apt-hooks."""
        return all(state == "patched" for state in self.state.values())


def status(folder: Path) -> Checkout:
    """What is there.

    Raises:
        AptError: the folder holds no sd-scripts, or one that is not supported.
    """
    contents = _read(folder)
    version = _check(folder, contents)
    state = {}
    for name, content in contents.items():
        if not patching.is_patched(content):
            state[name] = "not patched"
        elif patching.insert(content, INSERTIONS[name], name) == content:
            state[name] = "patched"
        else:
            state[name] = "patched by another version of apt-hooks"
    return Checkout(folder, version, state)


def patch(folder: Path, *, dry_run: bool = False) -> str:
    """Insert the lines; returns the diff, empty where nothing had to change.

    All files are checked before the first is written. Patching twice equals patching once.

    Raises:
        AptError: as `status`; nothing was changed.
    """
    contents = _read(folder)
    _check(folder, contents)
    new = {name: patching.insert(content, INSERTIONS[name], name) for name, content in contents.items()}
    return _replace(folder, contents, new, dry_run)


def unpatch(folder: Path, *, dry_run: bool = False) -> str:
    """Take the lines out again, in the opposite order; returns the diff.

    The files are then what they were, to the byte.

    Raises:
        AptError: the folder holds no sd-scripts.
    """
    contents = dict(reversed(_read(folder).items()))
    return _replace(folder, contents, {n: patching.stripped_python(c, n) for n, c in contents.items()}, dry_run)


def _read(folder: Path) -> dict[str, bytes]:
    try:
        return {name: (folder / name).read_bytes() for name in INSERTIONS}
    except OSError as error:
        hint = ""
        if (folder / "sd-scripts" / "train_network.py").exists():
            hint = f"; there is one in {folder / 'sd-scripts'}"
        raise AptError(
            f"{folder}: looked for kohya's sd-scripts, that is {', '.join(INSERTIONS)}; "
            f"{Path(error.filename).name}: {error.strerror}{hint}"
        ) from error


def _check(folder: Path, contents: dict[str, bytes]) -> str:
    """The version, once it is known to be one that the adapter fits."""
    readme = folder / "README.md"
    named = re.search(rb"Version (\d+)\.(\d+)\.(\d+)", readme.read_bytes()) if readme.exists() else None
    version = tuple(int(part) for part in named.groups()) if named else None
    text = ".".join(map(str, version)) if version else "unknown"
    if version is not None and version < OLDEST:
        raise AptError(
            f"{folder}: sd-scripts {text} is not supported, only {' and '.join(TESTED)} are; update sd-scripts"
        )
    for name, required in REQUIRED.items():
        found = _signatures(contents[name], name)
        for function, parameters in required.items():
            if function not in found:
                raise AptError(
                    f"{folder / name}: looked for {function}(), it is not there; sd-scripts {text} is not supported"
                )
            if found[function][: len(parameters)] != parameters:
                raise AptError(
                    f"{folder / name}: looked for {function}({', '.join(parameters)}), found "
                    f"({', '.join(found[function])}); sd-scripts {text} is not supported"
                )
    return text


def _signatures(content: bytes, name: str) -> dict[str, tuple[str, ...]]:
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError) as error:
        raise AptError(f"{name}: cannot be read as Python: {error}") from error
    functions = [("", node) for node in tree.body if isinstance(node, ast.FunctionDef)]
    for owner in tree.body:
        if isinstance(owner, ast.ClassDef):
            functions += [(f"{owner.name}.", node) for node in owner.body if isinstance(node, ast.FunctionDef)]
    return {prefix + node.name: tuple(a.arg for a in node.args.args) for prefix, node in functions}


def _replace(folder: Path, old: dict[str, bytes], new: dict[str, bytes], dry_run: bool) -> str:
    changed = [name for name in old if old[name] != new[name]]
    if not dry_run:
        for i, name in enumerate(changed):
            try:
                write_atomically(folder / name, new[name])
            except AptError as error:
                for written in reversed(changed[:i]):
                    write_atomically(folder / written, old[written])
                raise AptError(f"{error}; nothing was changed") from error
    return "\n".join(patching.diff(old[name], new[name], name) for name in changed)
