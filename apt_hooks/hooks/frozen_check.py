"""Which trained parameters the result of a pass comes from, seen while it runs and whatever their values."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from ..errors import AptError

Trained = Iterable[tuple[str, nn.Parameter]] | None

_PRODUCTS = ("mul", "mul_", "multiply", "__mul__", "__rmul__", "__imul__")
_BY_THE_FIRST_ALONE = ("to", "type_as", "expand_as", "view_as", "reshape_as")
_NOTHING: frozenset[str] = frozenset()


class Reach(TorchFunctionMode):
    """Follows trained parameters through what runs inside of it.

    By storage, so that views and what is changed in place count. What is multiplied by the number 0 (a LoRA's
    multiplier or scaling) takes no part from there on. Compiled modules run as they are written meanwhile.

    Args:
        modules: whose parameters that require a gradient are followed, by their names.
        trained: (name, parameter) of all that is trained, if known; then these alone are followed. None follows every
            parameter with a gradient, also one that is in no module of `modules`.
        exchanged: what the parameters will be made of inside (`StartingWeights`); only what they are made of now is
            followed, and what was made of them before.
    """

    def __init__(self, modules: Iterable[nn.Module], trained: Trained = None, exchanged: Iterable[Tensor] = ()) -> None:
        super().__init__()
        names = {p: name for module in modules for name, p in _named_parameters(module)}
        self._all = trained is None
        followed = [(name, p) for p, name in names.items()] if trained is None else trained
        followed = [(name, p) for name, p in followed if p.requires_grad]
        self._names = {p: frozenset([names.get(p, name)]) for name, p in followed}
        self._found = {storage: own for p, own in self._names.items() if (storage := _storage(p)) is not None}
        self._found |= {storage: _NOTHING for copy in exchanged if (storage := _storage(copy)) is not None}
        self.parameters = [p for _, p in followed]
        self._without_graph = False
        self._stack = contextlib.ExitStack()

    def of(self, tensor: Tensor) -> frozenset[str]:
        """The names of the trained parameters that `tensor` comes from."""
        storage = _storage(tensor)
        if storage is None:
            return _NOTHING
        found = self._found.get(storage)
        if found is None and isinstance(tensor, nn.Parameter):
            if self._all and tensor.requires_grad:
                self._found[storage] = found = frozenset([f"number {len(self._found)}, {tuple(tensor.shape)}"])
        elif not found and tensor.grad_fn is not None and self._without_graph:
            # Made before, of what is trained: a trained text encoder's output, say.
            leaves = [leaf for leaf in _leaves(tensor.grad_fn) if isinstance(leaf, nn.Parameter)]
            if found := _NOTHING.union(*(self._names.get(leaf) or self.of(leaf) for leaf in leaves)):
                self._found[storage] = found
        return found or _NOTHING

    def __enter__(self) -> Any:
        self._without_graph = not torch.is_grad_enabled()
        if hasattr(torch.compiler, "set_stance"):  # torch 2.6
            self._stack.enter_context(torch.compiler.set_stance("force_eager"))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stack.close()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given, name = [*args, *(kwargs or {}).values()], getattr(func, "__name__", "")
        if name in _PRODUCTS and any(isinstance(x, (int, float)) and x == 0 for x in given):
            return result
        if name in _BY_THE_FIRST_ALONE:  # of the other tensor they take shape, dtype or device
            given = given[:1]
        elif name.endswith("_like") or name.startswith("new_"):
            return result
        if found := _NOTHING.union(*(self.of(x) for x in _tensors(given))):
            changed = given[:1] if name == "__setitem__" else [result]
            for storage in map(_storage, _tensors(changed)):
                if storage is not None:
                    self._found[storage] = self._found.get(storage, _NOTHING) | found
        return result


class Watches:
    """When the passes of a run are followed, and what has to come out (see `AptObjective`)."""

    def __init__(self) -> None:
        self._first = True
        self._suspicious = False
        self._exchanged = False
        self._frozen: Reach | None = None
        self._tuned: Reach | None = None
        self._weights: list[tuple[nn.Parameter, int]] = []

    def of_frozen_pass(
        self, modules: Iterable[nn.Module], trained: Trained, exchanged: list[Tensor] | None = None
    ) -> AbstractContextManager[object]:
        """What a frozen pass has to run in; to be made before the adapters are off, or exchanged for `exchanged`."""
        self._frozen = self._tuned = None
        if not (self._first or self._suspicious):
            return contextlib.nullcontext()
        self._exchanged = exchanged is not None
        self._frozen = Reach(modules, trained, exchanged or ())
        return self._frozen

    def of_tuned_pass(self, modules: Iterable[nn.Module], trained: Trained) -> AbstractContextManager[object]:
        """What the tuned pass after it has to run in."""
        if not self._suspicious or self._frozen is None:
            return contextlib.nullcontext()
        self._tuned = Reach(modules, trained)
        return self._tuned

    def judge(self, tuned: Tensor, frozen: Tensor) -> None:
        """Whether the frozen pass was the base model's and the tuned pass was not, as far as they were followed.

        Raises:
            AptError: they were not.
        """
        if self._frozen is None:
            return
        if found := sorted(self._frozen.of(frozen)):
            some = f"{len(found)} in all ({', '.join(found[:3])}{', ...' if len(found) > 3 else ''})"
            if self._exchanged:
                raise AptError(
                    "the frozen pass is not of the model that the training began from: trained parameters take part in "
                    f"it with their weights of now, {some}; tell AptObjective all that is trained (trained=), and let "
                    "the pass itself compute what it reads of trained models, such as a text encoder's output"
                )
            raise AptError(
                f"the frozen pass is not the base model's: trained parameters take part in it, {some}; adapters_off "
                "must leave out the LoRA of every layer and of every model that the pass depends on, nothing beside "
                "the LoRA may be trained, and what is not trained must not require a gradient"
            )
        if self._tuned is not None and not self._tuned.of(tuned):
            raise AptError(
                "delta_noise is exactly 0 though weights have moved: nothing that is trained takes part in the tuned "
                "pass; are the adapters off there, scaled by 0, or on another model than the one that predicts?"
            )
        if self._first:
            self._weights = [(p, p._version) for p in self._frozen.parameters]
        self._first = self._suspicious = False
        self._frozen = self._tuned = None

    def trained_since_the_first(self) -> bool:
        """Whether an optimizer has changed anything since the first frozen pass, or may have where none is known."""
        return not self._weights or any(p._version != version for p, version in self._weights)

    def take_notice(self, delta_noise: list[float]) -> None:
        """Have the next passes followed if the last ones agreed to the last bit."""
        # No error yet: a learning rate that warms up from 0, or an effect below the rounding of bfloat16, does it too.
        self._suspicious = delta_noise == [0.0]


def _named_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    # A compiled or wrapped model's names are the plain one's.
    for name, parameter in module.named_parameters():
        yield name.replace("_orig_mod.", ""), parameter


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values.values() if isinstance(values, Mapping) else values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple, Mapping)):
            yield from _tensors(value)


def _storage(tensor: Tensor) -> StorageWeakRef | None:
    try:
        return StorageWeakRef(tensor.untyped_storage())
    except (NotImplementedError, RuntimeError):  # a layout without storage, such as sparse
        return None


def _leaves(node: Any) -> Iterator[Tensor]:
    """The leaves of a graph."""
    seen, waiting = {node}, [node]
    while waiting:
        node = waiting.pop()
        if hasattr(node, "variable"):
            yield node.variable
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)
