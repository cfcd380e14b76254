"""Running a script of sd-scripts with the lines of `patch` put in while Python loads its files; nothing is written."""

from __future__ import annotations

import ast
import builtins
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from apt_hooks.errors import AptError

from .. import patching
from .checkout import SCRIPTS, Checkout

_WITHOUT_APT = ("from {reader} import apt_hooks_adapter", "apt_hooks_adapter().without_section({args})")


def launch(script: Path, arguments: Sequence[str]) -> None:
    """Run a script as `python SCRIPT ARGUMENTS` would, but able to take `[apt]` and `--apt_config`.

    The files of the checkout, patched or not, get the lines that `patch` would insert; one more says where neither
    `[apt]` nor `--apt_config` is given. To be called in a process of its own: it takes over `__main__`, `sys.argv` and
    the first entry of `sys.path`, as running a script does.

    Raises:
        AptError: no such script, none that can take `[apt]`, or a checkout that cannot be patched.
    """
    script = script.resolve()
    if not script.is_file():
        raise AptError(f"{script}: no such file; name a script of sd-scripts, such as {SCRIPTS[0]}")
    if not (script.parent / SCRIPTS[0]).is_file():
        raise AptError(f"{script}: only {SCRIPTS[0]} and scripts beside it can take [apt]; name one of these")
    checkout = Checkout(script.parent)
    if script.name not in checkout.scripts:
        raise AptError(
            checkout.refused.get(script.name)
            or f"{script}: only {', '.join(checkout.scripts)} can take [apt]; run this one without "
            "`-m apt_hooks.launch`"
        )
    sources = loaded_sources(checkout)
    sys.meta_path.insert(0, _Finder({path: text for path, text in sources.items() if path != script}))
    # What `python SCRIPT` makes of these.
    sys.argv = [str(script), *arguments]
    if sys.path and sys.path[0] in ("", str(Path.cwd())) and not getattr(sys.flags, "safe_path", False):
        del sys.path[0]
    sys.path.insert(0, str(script.parent))
    main = types.ModuleType("__main__")
    main.__dict__.update(__file__=str(script), __builtins__=builtins, __cached__=None)
    sys.modules["__main__"] = main
    exec(_compiled(sources[script], script), main.__dict__)


def loaded_sources(checkout: Checkout) -> dict[Path, bytes]:
    """The files of a checkout that get lines, as Python is to see them."""
    folder = checkout.folder
    places = checkout.places(patching.install_hint(), otherwise=_WITHOUT_APT)
    return {
        folder / name: patching.patched_python(checkout.source(name).content, at, str(folder / name))
        for name, at in places.items()
    }


def _compiled(content: bytes, path: Path) -> types.CodeType:
    """The code of a file, with the line numbers of what is on the disk, which tracebacks show."""
    numbers, plain = [0], 0
    for line in content.splitlines():
        plain += not patching.is_patched(line)
        numbers.append(max(plain, 1))
    tree = ast.parse(content, str(path))
    for node in ast.walk(tree):
        if "lineno" in node._attributes:
            positioned: Any = node
            positioned.lineno, positioned.end_lineno = numbers[positioned.lineno], numbers[positioned.end_lineno]
    code: types.CodeType = compile(tree, str(path), "exec", dont_inherit=True)
    return code


class _Finder(importlib.abc.MetaPathFinder):
    """Finds what Python's own finder does, and gives some files other contents."""

    def __init__(self, sources: Mapping[Path, bytes]) -> None:
        self._sources = sources
        self._names = {path.name for path in sources}

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.origin is None or Path(spec.origin).name not in self._names:
            return None
        content = self._sources.get(Path(spec.origin).resolve())
        if content is None:
            return None
        spec.loader = _Loader(name, spec.origin, content)
        return spec


class _Loader(importlib.machinery.SourceFileLoader):
    def __init__(self, name: str, path: str, content: bytes) -> None:
        super().__init__(name, path)
        self._content = content

    def get_code(self, fullname: str) -> types.CodeType:
        # Neither from a cache of the plain file nor into one.
        return _compiled(self._content, Path(self.path))
