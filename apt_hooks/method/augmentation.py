"""The paper's image augmentation: zoom-out and rotation, on images, latents and the masks that go with them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import AptError


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where each sample of a batch goes: one zoom-out scale and one angle a sample.

    Attributes:
        scales: [batch]; the content shrinks to `1 / scale` of its size. Unit: none.
        angles: [batch]; degrees, counter-clockwise.
        chosen: [batch], bool; the samples that are moved at all.
    """

    scales: Tensor
    angles: Tensor
    chosen: Tensor

    def covered(self, size: Sequence[int]) -> Tensor:
        """What is content once samples of `size`, (height, width), were moved, and not what that has uncovered.

        Returns:
            [batch, 1, height, width], float32, on the CPU: the share of each position that the content covers.
        """
        return self.apply(torch.ones(len(self.chosen), 1, *size), 0.0)

    def apply(self, content: Tensor, fill: float | Tensor, dims: str = "bchw") -> Tensor:
        """Move the chosen samples and fill what they uncover; the others stay bit for bit.

        Args:
            content: of any floating dtype. Packed latents, [batch, positions, channels], have to be unpacked.
            fill: value of the uncovered area, or one value a channel: [channels].
            dims: what its dimensions are, a letter each: batch first, height and width last, between them channels,
                if there are any, and frames, which move alike: "bchw", "bhw" (a mask), "bcfhw".

        Returns:
            The shape, dtype and device of `content`; the input itself where no sample is chosen.

        Raises:
            AptError: `content` has other dimensions than said, or the batch is another.
        """
        if dims not in ("bchw", "bhw", "bcfhw"):
            raise AptError(f'dims must be "bchw", "bhw" or "bcfhw"; found "{dims}"')
        if content.ndim != len(dims):
            names = {"b": "batch", "c": "channels", "f": "frames", "h": "height", "w": "width"}
            raise AptError(
                f"what is moved must be [{', '.join(names[d] for d in dims)}]; found {tuple(content.shape)}: unpack "
                "packed latents, or say its dimensions"
            )
        if len(content) != len(self.chosen):
            raise AptError(f"the placement is for {len(self.chosen)} samples; found a batch of {len(content)}")
        if not bool(self.chosen.any()):
            return content
        result = content.clone()
        for i in torch.nonzero(self.chosen).flatten().tolist():
            planes = content[i].reshape(content.shape[1] if "c" in dims else 1, -1, *content.shape[-2:])
            moved = _zoom_out_and_rotate(planes, float(self.scales[i]), float(self.angles[i]), fill)
            result[i] = moved.reshape(content[i].shape)
        return result


@dataclasses.dataclass(frozen=True)
class ZoomOutRotate:
    """Zoom-out and rotation of the paper's adaptive augmentation (APT, "Adaptive Training Adjustment").

    `draw` decides, `Placement.apply` moves; so an image and its mask, or an image and its latents, move alike.

    Args:
        zoom_out: range of the scale; the content shrinks to `1 / scale`.
        rotation_degrees: the angle is drawn from `[-rotation_degrees, +rotation_degrees]`.

    Raises:
        AptError: a range that is empty or zooms in.
    """

    zoom_out: tuple[float, float] = (1.0, 3.0)
    rotation_degrees: float = 15.0

    def __post_init__(self) -> None:
        low, high = self.zoom_out
        if not 1.0 <= low <= high:
            raise AptError(f"zoom_out must be (low, high) with 1 <= low <= high; found {self.zoom_out}")
        if not 0.0 <= self.rotation_degrees <= 180.0:
            raise AptError(f"rotation_degrees must be from 0 to 180; found {self.rotation_degrees}")

    def draw(self, probabilities: Tensor, generator: torch.Generator | None = None) -> Placement:
        """Choose which samples move, and where to.

        Always takes three numbers a sample from the generator, whatever the probabilities, so that one sample's fate
        does not shift the next one's numbers.

        Args:
            probabilities: [batch], each from 0 to 1.
            generator: a CPU generator; the same state gives the same placement. None takes torch's global one.
        """
        choice, scale, angle = torch.rand(len(probabilities), 3, generator=generator, dtype=torch.float64).unbind(1)
        low, high = self.zoom_out
        return Placement(
            scales=low + (high - low) * scale,
            angles=self.rotation_degrees * (2 * angle - 1),
            chosen=choice < probabilities.detach().cpu().double(),
        )

    def __call__(
        self, content: Tensor, *, fill: float | Tensor = -1.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """Move every sample: `content` as in `Placement.apply`; black is -1 in images scaled to [-1, 1]."""
        return self.draw(torch.ones(len(content)), generator).apply(content, fill)


def color_of(latents: Tensor) -> Tensor:
    """What an even color is in latents of a picture of it, [1, channels, ..., height, width]: [channels].

    The mean away from the border, where an autoencoder makes something else of it, and which leaves of a sampled latent
    nothing of its sampling.
    """
    height, width = latents.shape[-2:]
    inner = latents[0, ..., height // 4 : height - height // 4, width // 4 : width - width // 4]
    return inner.flatten(1).float().mean(dim=1)


def covered_at(covered: Tensor, shape: Sequence[int]) -> Tensor:
    """`Placement.covered` as it is at the positions of latents or hidden states of the same pictures.

    Args:
        covered: [batch, 1, height, width].
        shape: [batch, ..., height, width], or [batch, positions, channels] of a picture whose sides were halved some
            number of times.

    Returns:
        [batch, 1, ..., height, width], or [batch, positions, 1]; on the device of `covered`.

    Raises:
        AptError: the positions are those of no such picture.
    """
    if len(shape) > 3:
        shrunk = F.interpolate(covered, size=tuple(shape[-2:]), mode="area")
        return shrunk.reshape(len(shrunk), *[1] * (len(shape) - 3), *shape[-2:])
    size = _halved(covered.shape[2:], shape[1])
    return F.interpolate(covered, size=size, mode="area").flatten(2).transpose(1, 2)


def _halved(size: Sequence[int], positions: int) -> tuple[int, int]:
    """The sides that have so many positions: an autoencoder rounds down where it halves an odd one, a U-Net up."""
    sides = {(size[0], size[1])}
    while sides:
        for height, width in sorted(sides):
            if height * width == positions:
                return height, width
        larger = [(height, width) for height, width in sides if height * width > positions and height > 1 < width]
        sides = {side for h, w in larger for side in ((h // 2, w // 2), ((h + 1) // 2, (w + 1) // 2))}
    raise AptError(
        f'[apt] augment_border = "ignore" looks for {positions} positions in pictures of {size[0]}x{size[1]} whose '
        'sides are halved, and there is none with as many: set it to "learn"'
    )


def _zoom_out_and_rotate(sample: Tensor, scale: float, angle: float, fill: float | Tensor) -> Tensor:
    """One sample, [channels, frames, height, width].

    Shrinking comes first and with an antialiasing filter: sampling one pixel in three, as one affine warp would, puts
    moire into the picture that the model then learns. On CPU half precision has no such filter, hence float32.
    """
    height, width = sample.shape[-2:]
    background = torch.as_tensor(fill, dtype=torch.float32, device=sample.device).reshape(-1, 1, 1, 1)
    # Relative to the background, so that "nothing there" is zero for the padding, the filter and the warp.
    content = (sample.float() - background).flatten(0, 1)
    down, across = _margin(height, scale), _margin(width, scale)
    if down or across:
        size = (height - 2 * down, width - 2 * across)
        content = F.interpolate(content[None], size=size, mode="bilinear", antialias=True)[0]
        content = F.pad(content, (across, across, down, down))
    if angle != 0.0:
        cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        # affine_grid works in units of half a side, so a turn of a picture that is not square needs the side ratio.
        matrix = torch.tensor(
            [[cos, -sin * height / width, 0.0], [sin * width / height, cos, 0.0]], device=sample.device
        )
        grid = F.affine_grid(matrix[None], [1, *content.shape], align_corners=False)
        content = F.grid_sample(content[None], grid, padding_mode="zeros", align_corners=False)[0]
    return (content.reshape(sample.shape) + background).to(sample.dtype)


def _margin(side: int, scale: float) -> int:
    """What a zoom-out leaves free at each end of a side, in whole pixels and the same at both.

    So the content stays in the middle, and on the grid: half a pixel of an odd rest would be four pixels of the image
    where it is a latent, always towards the same corner, and a shift by half a pixel would blur. The price is a
    content up to a pixel larger or smaller than `side / scale`.
    """
    return min(round(side * (1 - 1 / scale) / 2), (side - 1) // 2)
