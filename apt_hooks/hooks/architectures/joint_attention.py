"""What transformers have in common whose attention is over text and picture at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...errors import AptError
from ..layout import AttentionPoint, HiddenPoint, Layout, Source, Tap, Told

OBSERVED = 4
"""Blocks that "auto" takes, evenly over the second half of the depth: ours, as the paper has no transformer."""


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Positions of the picture and of the text in a pass."""

    image: int
    text: int


@dataclasses.dataclass(frozen=True)
class Block:
    """A block, by what is compared in it.

    Attributes:
        module: the block itself; the picture is its output's second element, or in its only one.
        attention: its joint attention.
        queries, keys: modules of `attention`, by name: those behind which nothing but rotation comes.
    """

    name: str
    module: nn.Module
    attention: Any
    queries: str
    keys: str


def picture_and_text(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """What a call of the whole transformer is given as `hidden_states` and `encoder_hidden_states`.

    Raises:
        AptError: it is not given one of them.
    """
    given = {**dict(zip(_INPUTS, args, strict=False)), **kwargs}
    if missing := [name for name in _INPUTS if name not in given]:
        raise AptError(f"the transformer was called without {missing[0]}")
    picture, text = (given[name] for name in _INPUTS)
    return picture, text


_INPUTS = ("hidden_states", "encoder_hidden_states")


def select(count: int, blocks: Literal["auto"] | Sequence[int]) -> tuple[int, ...]:
    """The numbers of the blocks to observe.

    Raises:
        AptError: one is no block's, or none is given.
    """
    if blocks == "auto":
        first, taken = count // 2, min(OBSERVED, count - count // 2)
        return tuple(first + (count - first) * i // taken for i in range(taken))
    if not blocks or not all(0 <= number < count for number in blocks):
        raise AptError(f"blocks: they are numbered from 0 to {count - 1} here; found {list(blocks)}")
    return tuple(blocks)


def layout(
    found: Sequence[Block],
    blocks: Literal["auto"] | Sequence[int],
    source: Source,
    told: Sequence[Told],
    rotary: Any = None,
    text_first: bool = True,
) -> Layout:
    """The points of the chosen blocks.

    Args:
        found: all blocks.
        told: of the whole transformer's call, `Lengths` first.
        rotary: makes (cosines, sines) of the keywords of an attention's call, both [positions, channels of a head] of
            the joint sequence; None: there is no rotary embedding.
        text_first: the order of a joint sequence.
    """
    numbers = select(len(found), blocks)
    attention, hidden = [], []
    for block in (found[number] for number in numbers):
        own = (*told, Told(block.attention, lambda _, kwargs: rotary and rotary(kwargs)))
        heads, name = int(block.attention.heads), f"{block.name}.attn"
        part = _Part(heads, text_first)
        attention.append(
            AttentionPoint(
                name,
                Tap(f"{name}.{block.queries}", block.attention.get_submodule(block.queries), read=part.image_queries),
                Tap(f"{name}.{block.keys}", block.attention.get_submodule(block.keys), read=part.text_keys),
                heads,
                (int(block.attention.to_q.out_features) // heads) ** -0.5,
                told=own,
            )
        )
        tap = Tap(name, block.attention, select=0, read=part.image)
        if source == "block":  # which gives the text first
            tap = Tap(block.name, block.module, select=1, read=part.image)
        hidden.append(HiddenPoint(tap.name, tap, own))
    return Layout(attention, hidden, numbers)


@dataclasses.dataclass(frozen=True)
class _Part:
    """Reads the picture's part, or the text's, whether a tensor holds one of the two or both."""

    heads: int
    text_first: bool

    def image(self, x: Tensor, told: tuple[Any, ...]) -> Tensor:
        return x[:, self._where(x.shape[1], told[0], image=True)[0]]

    def image_queries(self, x: Tensor, told: tuple[Any, ...]) -> Tensor:
        return self._projected(x, told, image=True)

    def text_keys(self, x: Tensor, told: tuple[Any, ...]) -> Tensor:
        return self._projected(x, told, image=False)

    def _projected(self, x: Tensor, told: tuple[Any, ...], image: bool) -> Tensor:
        lengths, rotary = told[0], told[-1]
        if x.ndim == 3:
            x = x.unflatten(-1, (self.heads, -1))
        elif x.shape[1] == self.heads and x.shape[2] in (lengths.image, lengths.text, lengths.image + lengths.text):
            x = x.transpose(1, 2)
        here, of_both = self._where(x.shape[1], lengths, image)
        x = x[:, here]
        if rotary is not None:
            x = rotate_pairs(x, *(turn[of_both].to(x.device)[None, :, None] for turn in rotary))
        return x.flatten(2)

    def _where(self, positions: int, lengths: Lengths, image: bool) -> tuple[slice, slice]:
        """Where a part is in a tensor of so many positions, and where in the joint sequence."""
        both = lengths.image + lengths.text
        own = lengths.image if image else lengths.text
        of_both = slice(both - own, both) if image == self.text_first else slice(0, own)
        if positions == both:
            return of_both, of_both
        if positions != own:
            raise AptError(
                f"looked for {own} positions of the {'picture' if image else 'text'}, or {both} with the other's; "
                f"found {positions}"
            )
        return slice(None), of_both


def rotate_pairs(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """RoPE (rotary embedding, arXiv 2104.09864) of neighboring channels, in float32: each pair is turned by its angle.

    Args:
        x: [..., channels].
        cosines, sines: broadcast to it; both of a pair alike.
    """
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-odd, even], dim=-1).flatten(-2)
    return (x.float() * cosines + turned * sines).to(x.dtype)
