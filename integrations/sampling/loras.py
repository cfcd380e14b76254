"""Several LoRAs on one pipeline, of which one takes part at a time.

They are put there by forward hooks, from what the file says of each module, and not by diffusers' loader and peft:
those take one scale for modules that have scales of their own, each release in another way. Other names than diffusers'
for a transformer's modules, which has one where a trainer may have three, are read by diffusers' own converters.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apt_hooks.errors import AptError
from apt_hooks.integrations.library_logging import quiet
from apt_hooks.integrations.peft import adapter_layers

from .lora_files import Delta, check_file, convert_lora, read_lora
from .lora_names import ModuleNames

LoraFile = str | Path


class Loras:
    """LoRA files of kohya's, diffusers' or peft's format, on a pipeline that has none; `close` leaves it as it was.

    Outside of `active` the pipeline is the base model.

    Raises:
        AptError: a pipeline that has LoRAs; a file that cannot be read, is no LoRA, or is one of another base model; a
            module that does not add what the file says.
    """

    def __init__(self, pipeline: Any, files: Mapping[str, LoraFile]) -> None:
        names = ModuleNames(pipeline)
        models = list(names.models.values())
        if adapter_layers(*models) or _hooks(models):
            raise AptError("the pipeline has LoRAs loaded already: call unload_lora_weights() first")
        self._models = models
        self._handles: list[Any] = []
        self._active: str | None = None
        self._loras: dict[str, list[tuple[nn.Module, _Addition]]] = {}
        for name, path in files.items():
            deltas = _read(Path(path), names, pipeline)
            modules = _modules(Path(path), deltas, names, type(pipeline).__name__)
            self._loras[name] = [(modules[key][1], _Addition(modules[key][1], delta)) for key, delta in deltas.items()]
            with self.active(name):
                self._check(Path(path), deltas, modules)

    @contextlib.contextmanager
    def active(self, name: str | None) -> Iterator[None]:
        """Inside, the LoRA of this name takes part, and no other; None: the base model. May be nested."""
        before = self._active
        self._switch(name)
        try:
            yield
        finally:
            self._switch(before)

    def _switch(self, name: str | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._active = [], None
        if name is None:
            return
        if _hooks(self._models):
            raise AptError(f"the LoRA {name!r} cannot be active while one of another Loras is, on the same pipeline")
        # Before the hooks of those who look at a module's output.
        self._handles = [module.register_forward_hook(hook, prepend=True) for module, hook in self._loras[name]]
        self._active = name

    def close(self) -> None:
        """Take them off; may be called again."""
        self._switch(None)
        self._loras.clear()

    def __enter__(self) -> Loras:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def _check(self, path: Path, deltas: Mapping[str, Delta], modules: Mapping[str, tuple[str, nn.Module]]) -> None:
        """Compare what is on the models with what the file says, every module on a random vector.

        In float32, on the CPU: a model's own precision is not the question.
        """
        hooks = _hooks(self._models)
        generator = torch.Generator().manual_seed(0)
        for key, (place, module) in modules.items():
            on_it = hooks.pop(id(module), ())
            if len(on_it) != 1:
                raise AptError(f"{path}: {key}: expected one LoRA on {place}, found {len(on_it)}; please report this")
            expected, found, size = _on_a_random_vector(module, deltas[key], on_it[0], generator)
            on_it[0].forget()
            if not expected.isfinite().all():
                raise AptError(f"{path}: {key}: holds numbers that are not finite; the training has failed")
            if not (found - expected).norm() <= 1e-3 * expected.norm() + 1e-5 * size:
                raise AptError(
                    f"{path}: {key}: {place} adds something else than up @ down * alpha / rank, of a random vector "
                    f"{found.norm():.4g} where {expected.norm():.4g} is expected; please report this"
                )
        if hooks:
            raise AptError(f"{path}: {len(hooks)} modules have a LoRA on them that the file has none for")


class _Addition:
    """A forward hook that adds a LoRA's delta to the output of a linear layer or a convolution."""

    def __init__(self, module: nn.Module, delta: Delta) -> None:
        self.scale = delta.scale
        kernel = _size(module)[2]
        self._own = [
            delta.down.reshape(*delta.down.shape[:2], *kernel),
            delta.up.reshape(*delta.up.shape[:2], *[1] * len(kernel)),
        ]
        if delta.magnitude is not None:
            weight = _weight(module) + delta.matrix()
            longer = delta.magnitude.float() / weight.norm(dim=1) - 1
            self._own.append(longer.reshape(-1, *[1] * len(kernel)))
        self._cast = self._own

    def forget(self) -> None:
        """What was made for the last input's device and precision."""
        self._cast = self._own

    def __call__(self, module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = args[0]
        if any(tensor.dtype != x.dtype or tensor.device != x.device for tensor in self._cast):
            self._cast = [tensor.to(x) for tensor in self._own]
        down, up, *dora = self._cast
        if isinstance(module, nn.Conv2d):
            added = F.conv2d(module._conv_forward(x, down, None), up)
        else:
            added = F.linear(F.linear(x, down), up)
        added = added * self.scale
        for longer in dora:
            bias = 0 if module.bias is None else module.bias.to(output).reshape(-1, *[1] * (longer.ndim - 1))
            added = added + longer * (output - bias + added)
        return output + added.to(output.dtype)


def _hooks(models: Sequence[nn.Module]) -> dict[int, list[_Addition]]:
    """What LoRAs add on models now, by the id of the module."""
    modules = {id(module): module for model in models for module in model.modules()}
    found = {
        key: [hook for hook in module._forward_hooks.values() if isinstance(hook, _Addition)]
        for key, module in modules.items()
    }
    return {key: own for key, own in found.items() if own}


def _read(path: Path, names: ModuleNames, pipeline: Any) -> dict[str, Delta]:
    """A file's deltas; by diffusers' names for a transformer where the file has others, as sd-scripts has.

    Raises:
        AptError: as `read_lora`; names that diffusers does not know either.
    """
    deltas = read_lora(path)
    if "transformer" not in names.models or not hasattr(pipeline, "lora_state_dict"):
        return deltas
    others = {name: delta for name, delta in deltas.items() if not names.find(name)}
    if not others:
        return deltas
    if any(delta.magnitude is not None for delta in others.values()):
        raise AptError(f"{path}: is a DoRA with other names than diffusers'; such are loaded of U-Nets alone")

    def convert(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        import diffusers.utils.logging as logging

        try:
            with quiet(logging):
                found = type(pipeline).lora_state_dict(tensors)
        # What its converters stumble on is not of one kind.
        except Exception as error:
            why = " ".join(str(error).split())[:200]
            raise AptError(f"{path}: diffusers cannot read it for a {type(pipeline).__name__} ({why})") from error
        return found[0] if isinstance(found, tuple) else found

    return {name: deltas[name] for name in deltas.keys() - others} | convert_lora(path, others, convert)


def _modules(
    path: Path, deltas: Mapping[str, Delta], names: ModuleNames, pipeline: str
) -> dict[str, tuple[str, nn.Module]]:
    """Each delta's module and its place in the pipeline, by the delta's name.

    Raises:
        AptError: one that is not there, is of another size or kind, or is meant twice.
    """
    misfit = f"{path}: does not fit the model, a {pipeline}; is it of another base model?"
    candidates = {key: names.find(key) for key in deltas}
    missing = [key for key, found in candidates.items() if not found]
    if missing:
        raise AptError(f"{misfit} ({len(missing)} of its {len(deltas)} modules are not there, such as {missing[0]})")
    modules: dict[str, tuple[str, nn.Module]] = {}
    keys: dict[int, str] = {}
    for key, delta in deltas.items():
        size = len(delta.up), delta.down.shape[1], tuple(delta.down.shape[2:])
        fitting = [(place, module) for place, module in candidates[key] if _fits(module, size)]
        if len(fitting) > 1:
            places = " or ".join(place for place, _ in fitting)
            raise AptError(f"{path}: {key} may be of {places}; name them in the file as diffusers or kohya do")
        if not fitting:
            place, module = candidates[key][0]
            raise AptError(f"{misfit} ({place} is {_told(_size(module))}, {key} {_told(size)})")
        twin = keys.setdefault(id(fitting[0][1]), key)
        if twin != key:
            raise AptError(f"{path}: {key} and {twin} are of one module, {fitting[0][0]}")
        modules[key] = fitting[0]
    return modules


_Size = tuple[int, int, tuple[int, ...]]


def _size(module: Any) -> _Size:
    """Outputs, inputs and kernel of a linear layer or a convolution."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features, ()
    return module.out_channels, module.in_channels // module.groups, tuple(module.kernel_size)


def _fits(module: nn.Module, size: _Size) -> bool:
    """A kernel of 1x1 and a matrix are the same."""
    own = _size(module)
    return own[:2] == size[:2] and (own[2] or (1, 1)) == (size[2] or (1, 1))


def _told(size: _Size) -> str:
    return f"{size[1]} to {size[0]}" + (f" by {'x'.join(map(str, size[2]))}" if size[2] else "")


def _weight(module: Any) -> Tensor:
    """[out, in * height * width], in float32, on the CPU."""
    out, inputs, kernel = _size(module)
    weight = module.weight.detach().float().cpu().flatten(1)
    if weight.shape != (out, inputs * math.prod(kernel)):
        raise AptError(f"a DoRA needs the base model's weights, and those of a {type(module).__name__} are packed")
    return weight


def _on_a_random_vector(
    module: Any, delta: Delta, addition: _Addition, generator: torch.Generator
) -> tuple[Tensor, Tensor, float]:
    """What is to be added to the product of a weight with a random vector, what the hook adds ([out] each), and how
    large the numbers are of which that is the difference."""
    out, inputs, kernel = _size(module)
    x = torch.randn(inputs, *kernel, generator=generator)
    expected, output = delta.times(x.flatten()).double(), torch.zeros(out, dtype=torch.float64)
    if delta.magnitude is not None:
        weight = _weight(module).double()
        output, plain = weight @ x.flatten().double(), expected
        lengths = (weight + delta.matrix().double()).norm(dim=1)
        expected = delta.magnitude.double() / lengths * (output + plain) - output
        if module.bias is not None:
            output = output + module.bias.detach().double().cpu()
    size = float(output.norm())
    if not kernel:
        return expected, addition(module, (x[None],), output.float()[None])[0].double() - output, size
    # Where in the output of a convolution the kernel lies on the vector alone, which begins there.
    places = [-(-padding // stride) for padding, stride in zip(module.padding, module.stride, strict=True)]
    starts = [i * s - p for i, s, p in zip(places, module.stride, module.padding, strict=True)]
    canvas = F.pad(x, (starts[1], 0, starts[0], 0))[None]
    found = addition(module, (canvas,), output.float()[None, :, None, None])
    return expected, found[0, :, places[0], places[1]].double() - output, size


def named(paths: Sequence[Path], taken: Sequence[str] = ()) -> dict[str, LoraFile]:
    """LoRA files by names that are folders' names too: the file's, and as many folders' as tell them apart.

    Args:
        taken: names that none of them may have.

    Raises:
        AptError: a file that is not there, or is named twice.
    """
    for path in paths:
        check_file(path)
    parts = [path.resolve().with_suffix("").parts for path in paths]
    for i, part in enumerate(parts):
        if part in parts[:i]:
            raise AptError(f"--lora {paths[i]}: is named twice")
    length = 1
    while len({part[-length:] for part in parts}) < len(parts):
        length += 1
    names = ["_".join(part[-length:]).replace(".", "_") for part in parts]
    for i, name in enumerate(names):
        if name in (*names[:i], *taken):
            raise AptError(f"--lora {paths[i]}: {name!r} is the name of another model; rename the file")
    return dict(zip(names, paths, strict=True))
