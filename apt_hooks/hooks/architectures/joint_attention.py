"""What transformers have in common whose attention is over text and picture at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ...errors import AptError
from ..layout import AttentionPoint, HiddenPoint, Layout, Source, Tap, Told
from .rotary_embedding import rotate_pairs
from .transformer_block_choice import select


@dataclasses.dataclass(frozen=True)
class Joint:
    """The joint sequence of a pass, as one of its blocks has it.

    Attributes:
        image, text: positions of each; of the text those of the longest, where samples differ.
        text_first: their order.
        starts: [batch], where each sample's picture begins, right behind its own text; None: behind `text` positions.
        mask: [batch, text], bool, which tokens take part; None: all.
        rotary: (cosines, sines) of the rotary embedding, both [batch or 1, positions, channels of a head], those of a
            pair alike; of the joint sequence, or of the picture alone, where text is not turned. None: there is none.
        rotate: which channels are a pair.
        padding: positions right behind the picture's that only fill it up; the model attends to them all the same.
    """

    image: int
    text: int
    text_first: bool = True
    starts: Tensor | None = None
    mask: Tensor | None = None
    rotary: tuple[Tensor, Tensor] | None = None
    rotate: Callable[[Tensor, Tensor, Tensor], Tensor] = rotate_pairs
    padding: int = 0

    @property
    def positions(self) -> int:
        return self.image + self.padding + self.text

    def part(self, x: Tensor, *, image: bool) -> Tensor:
        """The picture's part of [batch, positions, ...], or the text's, whether `x` holds that or both.

        Raises:
            AptError: it holds neither.
        """
        own, positions = self.image if image else self.text, x.shape[1]
        if positions == own:
            return x
        if image and positions == self.image + self.padding:
            return x.narrow(1, 0, own)
        if positions != self.positions:
            raise AptError(
                f"looked for {own} positions of the {'picture' if image else 'text'}, or "
                f"{self.positions} with the other's; found {positions}"
            )
        if self.starts is None or not image:
            first = image != self.text_first
            return x.narrow(1, 0 if first else positions - own - self.padding * image, own)
        where = self.starts[:, None] + torch.arange(own, device=x.device)
        where = where.reshape(*where.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:])
        return x.expand(len(self.starts), *x.shape[1:]).gather(1, where)

    def turned(self, x: Tensor, *, image: bool) -> Tensor:
        """The part of [batch, positions, heads, channels], turned by the rotary embedding."""
        x = self.part(x, image=image)
        if self.rotary is None or not (image or self.rotary[0].shape[1] == self.positions):
            return x
        cosines, sines = (self.part(turn.to(x.device), image=image)[:, :, None] for turn in self.rotary)
        return self.rotate(x, cosines, sines)


@dataclasses.dataclass(frozen=True)
class Block:
    """A block, by what is compared in it.

    Attributes:
        queries, keys: behind their norms, [batch, positions, heads * channels] or with the heads apart: in front of
            the positions, or behind them.
        heads: of the queries.
        channels: of a head.
        attention: the attention's output, whose first `heads * channels` channels are taken.
        block: its own output.
        told, joint: what a pass tells, and the joint sequence made of it.
        heads_first: whether heads are in front of positions; None: told by the sizes.
    """

    queries: Tap
    keys: Tap
    heads: int
    channels: int
    attention: Tap
    block: Tap
    told: tuple[Told, ...]
    joint: Callable[[tuple[Any, ...]], Joint]
    heads_first: bool | None = None

    def image_queries(self, x: Tensor, told: tuple[Any, ...]) -> Tensor:
        return self._turned(x, told, image=True)

    def text_keys(self, x: Tensor, told: tuple[Any, ...]) -> Tensor:
        return self._turned(x, told, image=False)

    def image(self, x: Tensor, told: tuple[Any, ...]) -> Tensor:
        return self.joint(told).part(x, image=True)[..., : self.heads * self.channels]

    def mask(self, told: tuple[Any, ...]) -> Tensor | None:
        return self.joint(told).mask

    def _turned(self, x: Tensor, told: tuple[Any, ...], image: bool) -> Tensor:
        joint = self.joint(told)
        if x.ndim == 3:
            x = x.unflatten(-1, (-1, self.channels))
        elif self.heads_first or (self.heads_first is None and self._has_heads_first(x, joint)):
            x = x.transpose(1, 2)
        x = joint.turned(x, image=image)
        # Keys may have fewer heads (grouped queries): each stands for as many neighboring ones.
        return x.repeat_interleave(self.heads // x.shape[2], dim=2).flatten(2)

    def _has_heads_first(self, x: Tensor, joint: Joint) -> bool:
        return x.shape[1] == self.heads and x.shape[2] in (joint.image, joint.text, joint.positions)


def layout(
    found: Sequence[Block], blocks: Literal["auto"] | Sequence[int], source: Source, noun: str = "blocks"
) -> Layout:
    """The points of the chosen blocks (`transformer_block_choice.select`), of all found, in the order they run."""
    numbers = select(len(found), blocks, found[0].heads * found[0].channels)
    attention, hidden = [], []
    for block in (found[number] for number in numbers):
        queries = dataclasses.replace(block.queries, read=block.image_queries)
        keys = dataclasses.replace(block.keys, read=block.text_keys)
        scale = block.channels**-0.5
        name = block.attention.name
        attention.append(AttentionPoint(name, queries, keys, block.heads, scale, block.mask, block.told))
        tap = dataclasses.replace(block.block if source == "block" else block.attention, read=block.image)
        hidden.append(HiddenPoint(tap.name, tap, block.told))
    return Layout(attention, hidden, numbers, noun)


def before(lengths: Tensor, positions: int) -> Tensor:
    """[batch, positions], bool: True for as many first positions as `lengths`, [batch], says."""
    return torch.arange(positions, device=lengths.device)[None] < lengths[:, None]
