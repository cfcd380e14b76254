"""Where a denoiser is hooked, as data: all that `FeatureCapture` knows of an architecture.

    Layout -- attention: AttentionPoint -- queries, keys: Tap -- module, select, read
           |                            -- heads, scale, mask
           |                            -- told: Told -- module, of_call
           -- hidden: HiddenPoint -- tap: Tap, told: Told

A `Tap` is a tensor that passes a module. What is compared is what `read` makes of it: the image's part of a joint
sequence, keys turned by their rotary embedding. What that needs of the pass, such as the embedding, the caption's
length or its mask, is `Told` by the call of a module around it.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

from torch import Tensor, nn

Source = Literal["self_attention", "cross_attention", "block"]
"""Which hidden states: each self-attention's output (the paper's overview figure), each block's, before an upsampler
(its supplement), or each cross-attention's output."""

Read = Callable[[Tensor, tuple[Any, ...]], Tensor]
"""Makes of a tap's tensor, and of what was told, the tensor that is compared; linear, as slices and rotations are."""


@dataclasses.dataclass(frozen=True)
class Tap:
    """A tensor that passes a module.

    Attributes:
        name: for messages; the module's as a rule.
        module: whose output it is.
        of_input: it is the module's first argument instead.
        select: which element of an output that is a tuple.
        read: what is compared; None, the tensor itself.
    """

    name: str
    module: nn.Module
    of_input: bool = False
    select: int = 0
    read: Read | None = None


@dataclasses.dataclass(frozen=True)
class Told:
    """What a pass tells to the `read`s and masks of a point, at the call of a module that is around its taps.

    Attributes:
        module: whose call it is.
        of_call: makes it of the call's positional arguments and keywords: small things, since it is kept up to the
            backward pass.
    """

    module: nn.Module
    of_call: Callable[[tuple[Any, ...], Mapping[str, Any]], Any]


def arguments(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What a module is called with, by the names of the parameters of its own `forward`, for `Told.of_call`."""
    own = inspect.signature(type(module).forward)
    return own.bind(module, *args, **kwargs).arguments


def flat(x: Tensor, told: tuple[Any, ...]) -> Tensor:
    """A `Read` of [batch, positions, heads, channels] as [batch, positions, heads * channels]."""
    return x.flatten(2)


@dataclasses.dataclass(frozen=True)
class AttentionPoint:
    """An attention whose map of image queries over text keys is compared.

    Attributes:
        name: of the layer, for messages.
        queries, keys: read as [batch, queries, heads * channels] and [batch, tokens, heads * channels].
        heads: number of attention heads.
        scale: factor of the scores.
        mask: makes [batch, tokens], bool, True where a token takes part, of what was told; None, and a mask of None:
            all take part.
        told: what `read` and `mask` are given, as a tuple.
    """

    name: str
    queries: Tap
    keys: Tap
    heads: int
    scale: float
    mask: Callable[[tuple[Any, ...]], Tensor | None] | None = None
    told: tuple[Told, ...] = ()


@dataclasses.dataclass(frozen=True)
class HiddenPoint:
    """A hidden state that is compared, read as [batch, positions, channels] or [batch, channels, height, width].

    Attributes:
        name: for messages.
        tap: where it is.
        told: what the tap's `read` is given.
    """

    name: str
    tap: Tap
    told: tuple[Told, ...] = ()


@dataclasses.dataclass(frozen=True)
class Layout:
    """The points of a model, in the order in which they run.

    Attributes:
        attention, hidden: the points.
        blocks: the numbers of the blocks that they are in.
        noun: what these blocks are called in messages.
    """

    attention: Sequence[AttentionPoint] = ()
    hidden: Sequence[HiddenPoint] = ()
    blocks: tuple[int, ...] = ()
    noun: str = "blocks"


class Architecture(Protocol):
    """A module of `architectures`."""

    NAME: str
    """The models that are built like that, in words."""

    def is_one(self, model: nn.Module) -> bool:
        """Whether a model is built like that, by the modules that it has."""
        ...

    def preset(self, model: nn.Module) -> str | None:
        """The preset that is for such a model; None: not known."""
        ...

    def layout(self, model: nn.Module, blocks: Literal["auto"] | Sequence[int], source: Source) -> Layout:
        """The points in these blocks; "auto" takes the architecture's own choice.

        Raises:
            AptError: no such block, or nothing to compare in it.
        """
        ...
