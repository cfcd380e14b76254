"""Writing the lines into a checkout of kohya's sd-scripts that let it take `[apt]`, and taking them out again."""

from __future__ import annotations

import dataclasses
import logging
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

from apt_hooks.errors import AptError
from apt_hooks.files import remove_leftovers, write_atomically

from .. import patching
from ..trainers import Change
from .checkout import SCRIPTS, Checkout

logger = logging.getLogger("apt_hooks")

NAME = "sd-scripts"
SCRIPTS_OF_PRESET: Mapping[str, tuple[str, ...]] = {
    "sd15": ("train_network.py",),
    "sd21": ("train_network.py",),
    "sdxl": ("sdxl_train_network.py",),
    "anima": ("anima_train_network.py",),
    "flux": ("flux_train_network.py",),
    "chroma": ("flux_train_network.py",),
    "sd35": ("sd3_train_network.py",),
    "lumina2": ("lumina_train_network.py",),
    "hunyuan_image": ("hunyuan_image_train_network.py",),
}
OPTIONS: frozenset[str] = frozenset()
TESTED: tuple[str, ...] = ("0.10.0", "0.10.1", "0.10.4", "0.10.6", "0.11.0", "0.11.1")

PATCHED, NOT_PATCHED = "patched", "not patched"
OTHER_LINES = "patched by another version of apt-hooks"
LEFT_OVER = "holds lines of apt-hooks that belong elsewhere since sd-scripts was updated"
CONFLICT = "git could not merge it with the lines of apt-hooks"

Contents = dict[str, bytes]
"""What files hold, by their path in the checkout."""


@dataclasses.dataclass(frozen=True)
class Status:
    """What a folder with sd-scripts holds.

    Attributes:
        folder: where it is.
        version: as its README says, or "unknown". Nothing depends on it: a GUI's copy may carry another one's README.
        state: per file, "patched", "not patched", or in words what is in the way; `patch` mends it.
        refused: per script that trains a network and cannot take `[apt]`, what is in the way.
    """

    folder: Path
    version: str
    state: dict[str, str]
    refused: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def patched(self) -> bool:
        """Whether every file is patched, by this version of apt-hooks."""
        return all(state == PATCHED for state in self.state.values())


def status(folder: Path) -> Status:
    """What is there.

    Raises:
        AptError: the folder holds no sd-scripts, or one that cannot be patched.
    """
    contents, merged = _read(folder)
    checkout = Checkout(folder, {**contents, **merged})
    new = _patched(folder, contents, merged, checkout)
    states = {}
    for name in new:
        state = PATCHED if contents[name] == new[name] else OTHER_LINES
        if name in merged:
            state = CONFLICT
        elif not patching.is_patched(contents[name]):
            state = NOT_PATCHED
        elif not patching.is_patched(new[name]):
            state = LEFT_OVER
        states[name] = state
    return Status(folder, _version(folder), states, checkout.refused)


def patch(folder: Path, *, dry_run: bool = False) -> str:
    """Insert the lines; returns the diff, empty where nothing had to change.

    All files are checked before the first is written. Patching twice equals patching once. What an update of sd-scripts
    left of earlier lines is mended.

    Raises:
        AptError: as `status`; nothing was changed.
    """
    contents, merged = _read(folder)
    checkout = Checkout(folder, {**contents, **merged})
    for reason in checkout.refused.values():
        logger.warning("apt-hooks: left out: %s", reason)
    return _replace(folder, contents, _patched(folder, contents, merged, checkout), dry_run)


def unpatch(folder: Path, *, dry_run: bool = False) -> str:
    """Take the lines out again, in the opposite order; returns the diff.

    The files are then what they were, to the byte.

    Raises:
        AptError: the folder holds no sd-scripts.
    """
    contents, merged = _read(folder)
    plain = {name: patching.stripped_python(merged.get(name, content), name) for name, content in contents.items()}
    return _replace(folder, contents, {name: plain[name] for name in reversed(plain)}, dry_run)


def apply(path: Path, *, dry_run: bool = False) -> Change:
    """`patch`, for the command."""
    diff = patch(path, dry_run=dry_run)
    return Change(path.resolve(), diff, bool(diff))


def patched_copy(folder: Path) -> None:
    """There is none: sd-scripts is patched in its folder."""


def named(found: Status) -> str:
    """The version; GUIs carry copies whose README is of another one."""
    if found.version in TESTED:
        return f"{NAME} {found.version}"
    return f"{NAME}, by its README {found.version} (tested: {', '.join(TESTED)})"


def report(path: Path, found: Status) -> list[str]:
    """A line a file."""
    lines = [f"{named(found)} in {path.resolve()}", *(f"  {name}: {state}" for name, state in found.state.items())]
    lines += [f"  {name}: cannot take [apt]: {reason}" for name, reason in found.refused.items()]
    if not found.patched:
        lines.append(f"`apt-hooks patch {NAME} {path}` inserts the lines, and mends what an update left")
    return lines


def _patched(folder: Path, contents: Contents, merged: Contents, checkout: Checkout) -> Contents:
    """The files as they are to be: those with lines of ours now or then, in the order in which they are written."""
    places = checkout.places(patching.install_hint())
    new = {
        name: patching.patched_python(checkout.source(name).content, at, str(folder / name))
        for name, at in places.items()
    }
    for name, content in contents.items():
        if name not in new and (name in merged or patching.is_patched(content)):
            new[name] = patching.stripped_python(merged.get(name, content), name)
    return new


def _read(folder: Path) -> tuple[Contents, Contents]:
    """The files that may hold inserted lines; and those that git could not merge, without them and merged."""
    # In the order in which they are written: a script is patched only once what it calls is there.
    paths = [*sorted(folder.glob("library/**/*.py")), *sorted(folder.glob("*.py"))]
    try:
        for name in SCRIPTS:
            (folder / name).stat()
        contents = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    except OSError as error:
        found = folder / "sd-scripts"
        place = found if (found / SCRIPTS[0]).exists() else "PATH"
        raise AptError(
            f"{folder.resolve()}: looked for kohya's sd-scripts, that is {' and '.join(SCRIPTS)}; "
            f"{Path(error.filename).name}: {error.strerror}; cd there, or name its folder, as in "
            f"`apt-hooks patch sd-scripts {place}`"
        ) from error
    merged = {}
    for name, content in contents.items():
        if re.search(rb"^<{7} ", content, re.MULTILINE) and re.search(rb"^>{7} ", content, re.MULTILINE):
            merged[name] = _merged(folder, name)
    return contents, merged


def _merged(folder: Path, name: str) -> bytes:
    """A file in which git found a conflict: of two sides that differ in our lines alone from their base, the other.

    `git stash pop` or `git pull --autostash` over a patched checkout leaves such files.

    Raises:
        AptError: somebody else's edits are part of the conflict.
    """
    stages = []
    for stage in (1, 2, 3):  # the base, ours, theirs
        asked = ["git", "-C", str(folder), "show", f":{stage}:./{name}"]
        try:
            stages.append(subprocess.run(asked, capture_output=True, check=True).stdout)
        except (OSError, subprocess.CalledProcessError):
            break
    plain = [patching.strip(stage) for stage in stages]
    if len(plain) == 3 and plain[0] in plain[1:]:
        return plain[2] if plain[1] == plain[0] else plain[1]
    raise AptError(
        f"{folder / name}: git left a conflict in it (lines that begin with <<<<<<<): settle it, or take the file as "
        f"sd-scripts has it (git -C {folder.resolve()} checkout HEAD -- {name}), then patch again. Nothing was changed"
    )


def _version(folder: Path) -> str:
    readme = folder / "README.md"
    named = re.search(rb"Version (\d+\.\d+\.\d+)", readme.read_bytes()) if readme.is_file() else None
    return named.group(1).decode() if named else "unknown"


def _replace(folder: Path, old: Contents, new: Contents, dry_run: bool) -> str:
    changed = [name for name in new if old[name] != new[name]]
    if not dry_run:
        for name in new:
            remove_leftovers(folder / name)
        for i, name in enumerate(changed):
            try:
                write_atomically(folder / name, new[name])
            except AptError as error:
                for written in reversed(changed[:i]):
                    write_atomically(folder / written, old[written])
                raise AptError(f"{error}; nothing was changed") from error
    return "\n".join(patching.diff(old[name], new[name], name) for name in changed)
