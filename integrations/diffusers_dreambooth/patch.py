"""Which lines go where in a DreamBooth-LoRA script, and writing them."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

from apt_hooks.errors import AptError
from apt_hooks.files import remove_leftovers, write_atomically

from .. import patching
from ..patching import Places, Statements
from ..trainers import Change
from .script_anchors import PROMPTS, RUN, Anchors, find

NAME = "diffusers"
_SCRIPT = "train_dreambooth_lora"
SCRIPTS_OF_PRESET: Mapping[str, tuple[str, ...]] = {
    "sd15": (f"{_SCRIPT}.py", f"{_SCRIPT}_sd15_advanced.py", "train_text_to_image_lora.py"),
    "sd21": (f"{_SCRIPT}.py", "train_text_to_image_lora.py"),
    "sdxl": (f"{_SCRIPT}_sdxl.py", f"{_SCRIPT}_sdxl_advanced.py", "train_text_to_image_lora_sdxl.py"),
    "flux": (f"{_SCRIPT}_flux.py", f"{_SCRIPT}_flux_advanced.py", f"{_SCRIPT}_flux_kontext.py"),
    "flux2": tuple(f"{_SCRIPT}_flux2{kind}.py" for kind in ("", "_img2img", "_klein", "_klein_img2img")),
    "sd35": (f"{_SCRIPT}_sd3.py",),
    "sana": (f"{_SCRIPT}_sana.py",),
    "lumina2": (f"{_SCRIPT}_lumina2.py",),
    "hidream": (f"{_SCRIPT}_hidream.py",),
    "qwen_image": (f"{_SCRIPT}_qwen_image.py",),
    "z_image": (f"{_SCRIPT}_z_image.py",),
    "krea2": (f"{_SCRIPT}_krea2.py",),
    "ideogram4": (f"{_SCRIPT}_ideogram4.py",),
}
OPTIONS = frozenset({"output", "in_place", "force"})
TESTED: tuple[str, ...] = ("0.32.0", "0.35.0", "0.38.0", "0.40.0")
"""What the tested scripts ask diffusers for at least: those of the tags v0.32.1, v0.35.2, v0.38.0 and v0.40.0."""

NOT_PATCHED = "not patched"

BLACK = "apt_hooks_black"
WORDS = "apt_hooks_words"
AGAIN = "apt_hooks_again"


@dataclasses.dataclass(frozen=True)
class Status:
    """What a script is.

    Attributes:
        path: where it is.
        version: the diffusers that it asks for at least, or "unknown".
        state: "patched", "not patched", or that it was edited since or patched by another version of apt-hooks.
    """

    path: Path
    version: str
    state: str

    @property
    def patched(self) -> bool:
        """Whether it is patched as this version of apt-hooks does it."""
        return self.state == "patched"


def status(path: Path) -> Status:
    """What the script is.

    Raises:
        AptError: it cannot be read, or is not patched and cannot be.
    """
    content = _read(path)
    named = re.search(rb"""check_min_version\(["'](\d+(?:\.\d+)*)""", content)
    patched = _patched(content, path.name)
    state = NOT_PATCHED
    if patching.is_patched(content):
        state = "patched, and edited since or by another version of apt-hooks; patching it again brings it up to date"
        if patched == content:
            state = "patched"
    return Status(path, named.group(1).decode() if named else "unknown", state)


def beside(path: Path) -> Path:
    """Where a patched copy goes if nothing is said: SCRIPT_apt.py; a script that is patched is brought up to date."""
    patched = path.is_file() and patching.is_patched(path.read_bytes())
    return path if patched else path.parent / f"{path.stem}_apt{path.suffix}"


def patch(path: Path, output: Path, *, dry_run: bool = False, force: bool = False) -> str:
    """Write the script with the lines inserted to `output`, which may be `path`; returns the diff from `path`.

    Patching twice equals patching once. Another `output` is replaced if it is the same script, patched or not, or with
    `force`.

    Raises:
        AptError: an anchor is missing, or `output` is another file that holds something else; nothing was changed.
    """
    content = _read(path)
    new = _patched(content, path.name)
    if not dry_run:
        remove_leftovers(output)
        there = _read(output) if output.exists() else None
        known = there is None or patching.strip(there) == patching.strip(content)
        if output.resolve() != path.resolve() and not known and not force:
            raise AptError(
                f"{output}: is there already, with edits of its own or of an older {path.name}; --force replaces it, "
                "--output names another"
            )
        if there != new:
            write_atomically(output, new)
            output.chmod(path.stat().st_mode & 0o777)
    return patching.diff(content, new, path.name)


def unpatch(path: Path, *, dry_run: bool = False) -> str:
    """Take the lines out again; returns the diff. The script is then what it was, to the byte.

    Raises:
        AptError: the script cannot be read or written.
    """
    content = _read(path)
    new = patching.stripped_python(content, path.name)
    if not dry_run:
        remove_leftovers(path)
        if new != content:
            write_atomically(path, new)
    return patching.diff(content, new, path.name)


def apply(
    path: Path, *, dry_run: bool = False, output: Path | None = None, in_place: bool = False, force: bool = False
) -> Change:
    """`patch`, for the command: to `output`, to the script itself, or beside it.

    Raises:
        AptError: as `patch`; or both `output` and `in_place` are given.
    """
    if output is not None and in_place:
        raise AptError(f"both --output {output} and --in-place are given; keep one")
    target = path if in_place else output or beside(path)
    diff = patch(path, target, dry_run=dry_run, force=force)
    return Change(path if dry_run else target, diff, bool(diff) or target != path)


def patched_copy(path: Path) -> Path | None:
    """The copy that `apply` makes if nothing is said."""
    copy = beside(path)
    return copy if copy != path and copy.is_file() and patching.is_patched(copy.read_bytes()) else None


def named(found: Status) -> str:
    """The version that the script asks for."""
    known = f"for {NAME} {found.version}" if found.version != "unknown" else f"for no stated version of {NAME}"
    return known if found.version in TESTED else f"{known} (tested: {', '.join(TESTED)})"


def report(path: Path, found: Status) -> list[str]:
    """One line, which tells of a patched copy too."""
    copy = patched_copy(path) if found.state == NOT_PATCHED else None
    return [f"{path}, {named(found)}: {found.state}" + (f"; {copy.name} is" if copy else "")]


def _read(path: Path) -> bytes:
    if path.is_dir():
        raise AptError(f"{path}: is a folder; name a training script, such as {_SCRIPT}_sdxl.py")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise AptError(f"{path}: cannot be read: {error.strerror}; name a training script") from error
    if b"\0" in content:
        raise AptError(f"{path}: cannot be read as Python: it has bytes that are 0; name a training script")
    return content


def _patched(content: bytes, name: str) -> bytes:
    plain = patching.stripped_python(content, name)
    found = find(plain, name)
    return patching.patched_python(plain, _places(found, Statements(plain, name)), name)


def _places(found: Anchors, statements: Statements) -> Places:
    """The lines of every anchor, with the number of the line that each group goes before."""
    before, after = statements.before, statements.after
    guard = f"if {RUN} is not None:"
    frozen = found.frozen
    prediction = frozen.prefix + found.prediction
    text = _source(frozen.text)
    if text and not frozen.always:
        text = [f"if {RUN}.encodes_text:", *_indented(text)]
    repeated = [f"{frozen.prefix}{name} = {name}" for name in frozen.live]
    for name in frozen.perhaps:
        repeated += ["try:", f"    {frozen.prefix}{name} = {name}", "except NameError:", "    pass"]
    repeated += [*text, *_source(frozen.call), f"return {prediction}"]
    step = f", step={found.step}" if found.step else ""
    tracked = f"    {found.accelerator}.log({RUN}.tracker_values(){step})"
    mixed = "" if found.noising.schedule else f", {found.clean}, {min(found.noising.noise)}"
    return [
        before(
            found.parse,
            f'{found.parser}.add_argument("--apt_config", default=None, help="TOML file with an [apt] section")',
            f'{found.parser}.add_argument("--apt_preset", default=None, help="preset of apt-hooks, such as sdxl")',
        ),
        *_before_training(found, statements),
        after(found.prepare, *_start(found)),
        *_augmenting(found, statements),
        before(
            found.call,
            guard,
            f"    def {AGAIN}():  # the same by the base model, or of other text",
            *_indented(_indented(repeated)),
            f"    {RUN}.begin_step({AGAIN}, {found.timesteps}, {found.clean})",
            f"if {RUN} is not None and {RUN}.frozen_due():",
            f"    with {RUN}.frozen_pass():",
            f"        {prediction} = {AGAIN}()",
            f"    {RUN}.begin_tuned_pass({prediction})",
        ),
        after(found.predicted, guard, f"    {found.prediction} = {RUN}.end_tuned_pass({found.prediction})"),
        before(
            found.compare,
            f"{guard}  # scales the gradient of each sample",
            f"    {found.prediction} = {RUN}.assess({found.prediction}, {found.target}, {found.timesteps}{mixed})",
        ),
        before(found.backward, guard, f"    {found.loss} = {RUN}.regularized({found.loss})"),
        *([after(found.log, guard, tracked)] if found.log is not None else []),
        *(after(loop.body[-1], f"if {RUN} is not None and {RUN}.stops:", "    break") for loop in found.loops),
        after(found.loops[-1], guard, f"    {RUN}.finish()"),
        after(found.save, guard, f"    {RUN}.add_metadata({found.folder})"),
    ]


def _augmenting(found: Anchors, statements: Statements) -> Places:
    """The lines that make the latents once more, of images that are moved, and what black is in latents of a cache."""
    black = [
        statements.before(statement, f"if {BLACK} is not None:", f"    {BLACK}.keep({vae}, {images})")
        for statement, vae, images in found.caches
    ]
    if not found.again.statements:
        return black
    lines = [
        f"if {RUN} is not None and {RUN}.augments and {RUN}.moves({found.timesteps}, {found.clean}):",
        *_indented(_source(found.again.statements)),
    ]
    return [*black, statements.before(found.noise, *lines)]


def _start(found: Anchors) -> list[str]:
    given = [found.arguments, found.accelerator, found.unet, str(found.noising.schedule)]
    given += [f"prompts={PROMPTS}", *(["textless=True"] if found.textless else [])]
    given += [f"masked={found.factor!r}"] if found.factor else []
    given += [f"unmoved={found.again.refused!a}"] if found.again.refused else []
    given += [f"black={BLACK}"] if found.caches else []
    starting = [f"{RUN} = apt_hooks_adapter.start({', '.join(given)})"]
    if found.words is None:
        starting = [_making_prompts(found), *starting, _making_words(found)]
    starting += [f"if {WORDS} is not None:", f"    {RUN}.read_class_word({WORDS})"]
    imported = found.words is not None or bool(found.caches)
    return [f"{RUN} = None", *_where_asked(found, starting, imported=imported)]


def _before_training(found: Anchors, statements: Statements) -> Places:
    """Where text is encoded before the training: once more, with the class word for the identifier; and where images
    are, what keeps the latents of black."""
    places: Places = []
    if found.before_caches is not None:
        making = [f"{BLACK} = apt_hooks_adapter.BlackLatents()"]
        places.append(
            statements.before(found.before_caches, f"{BLACK} = None", *_where_asked(found, making, imported=False))
        )
    if found.words is not None:
        making = _where_asked(found, [_making_words(found), _making_prompts(found)], imported=False)
        places.append(statements.before(found.words, f"{WORDS} = None", f"{PROMPTS} = None", *making))
        for keeping, encodings in ((WORDS, found.encodings), (PROMPTS, found.asked)):
            for statement, part in encodings:
                again = f"    {keeping}.keep(lambda: {ast.unparse(part)})"
                places.append(statements.after(statement, f"if {keeping} is not None:", again))
    return places


def _making_words(found: Anchors) -> str:
    refused = f", {found.wordless!a}" if found.wordless else ""
    return f"{WORDS} = apt_hooks_adapter.class_words({found.arguments}, locals(){refused})"


def _making_prompts(found: Anchors) -> str:
    return f"{PROMPTS} = apt_hooks_adapter.probe_prompts({found.arguments}, locals())"


def _where_asked(found: Anchors, lines: list[str], *, imported: bool) -> list[str]:
    """Lines that run where one of the arguments is given; `imported`: the adapter is there then."""
    asked = f'if (getattr({found.arguments}, "apt_config", None), getattr({found.arguments}, "apt_preset", None))'
    importing = [
        "try:",
        "    from apt_hooks.integrations.diffusers_dreambooth import adapter as apt_hooks_adapter",
        "except ModuleNotFoundError as e:",
        '    raise SystemExit(f"--apt_config and --apt_preset need apt-hooks, not found here ({e}): '
        f'{patching.install_hint()}")',
    ]
    return [f"{asked} != (None, None):", *_indented([*([] if imported else importing), *lines])]


def _source(statements: tuple[ast.stmt, ...] | list[ast.stmt]) -> list[str]:
    return [line for statement in statements for line in ast.unparse(statement).splitlines()]


def _indented(lines: list[str]) -> list[str]:
    return ["    " + line for line in lines]
