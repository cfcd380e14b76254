"""Judges of generated pictures: what each picture shows, and whether it shows the concept.

Both networks are trained on rendered scenes only (`train_judges`), so no generated picture has shaped its own judge.
Pictures are always [n, 3, 64, 64], from 0 to 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import AptError
from .world import BACKGROUNDS, COLORS, KINDS, PLACES, SECONDS, SIZES, STYLES, Scene

WEIGHTS = Path(__file__).parent / "weights" / "judges"
ATTRIBUTES: dict[str, tuple[str | None, ...]] = {
    "background": tuple(BACKGROUNDS),
    "color": tuple(COLORS),
    "kind": KINDS,
    "place": tuple(PLACES),
    "style": STYLES,
    "size": SIZES,
    "second": (None, *SECONDS),
}
"""What the classifier reads, each with its values in the order of the logits."""
TOLD = ("background", "place", "style", "second", "kind")
"""What a caption tells of any subject: the default of `text_score`."""

_BATCH = 250


class AttributeClassifier(nn.Module):
    """Reads the attributes of a scene from its picture."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.stages = _stages()
        # Not pooled: the place head needs to know where.
        self.project = nn.Linear(128 * 4 * 4, width)
        self.heads = nn.ModuleDict({name: nn.Linear(width, len(values)) for name, values in ATTRIBUTES.items()})

    def features(self, images: Tensor) -> Tensor:
        """The penultimate layer, [n, width], of pictures [n, 3, 64, 64]: for `metrics.py`."""
        return self.project(self.stages(_centered(images)).flatten(1))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Logits [n, values] by attribute, in the order of `ATTRIBUTES`, of pictures [n, 3, 64, 64]."""
        features = self.features(images)
        return {name: head(features) for name, head in self.heads.items()}


class IdentityEncoder(nn.Module):
    """Embeds pictures so that those of one subject lie together, whatever the background, place, size and style."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.stages = _stages()
        self.project = nn.Linear(2 * 128, width)

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings of unit length, [n, width], of pictures [n, 3, 64, 64]."""
        maps = self.stages(_centered(images))
        pooled = torch.cat([maps.amax((2, 3)), maps.mean((2, 3))], 1)
        return F.normalize(self.project(pooled), dim=1)


def _stages() -> nn.Sequential:
    """Four times half the resolution: [n, 3, 64, 64] to [n, 128, 4, 4]."""
    layers: list[nn.Module] = []
    channels = 3
    for width in (24, 48, 96, 128):
        layers += [nn.Conv2d(channels, width, 5 if channels == 3 else 3, stride=2, padding=2 if channels == 3 else 1)]
        layers += [nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1), nn.SiLU()]
        channels = width
    return nn.Sequential(*layers)


def _centered(images: Tensor) -> Tensor:
    if images.dim() != 4 or images.shape[1:] != (3, 64, 64):
        raise AptError(f"judges: pictures must be [n, 3, 64, 64], got {list(images.shape)}")
    return 2 * images.float() - 1


# The networks on disk.


@dataclasses.dataclass(frozen=True)
class Judges:
    """Both networks, in eval mode."""

    classifier: AttributeClassifier
    identity: IdentityEncoder

    def features(self, images: Tensor) -> Tensor:
        """The classifier's features of any number of pictures, [n, width]: for `metrics.py`."""
        return in_batches(self.classifier.features, images)


_FILES = {"classifier": "attributes.safetensors", "identity": "identity.safetensors"}


def load_judges(folder: Path | str = WEIGHTS) -> Judges:
    """The judges stored in `folder` (the package's own if not given), in float32.

    Raises:
        AptError: a file of weights is missing.
    """
    judges = Judges(AttributeClassifier(), IdentityEncoder())
    for name, file in _FILES.items():
        path = Path(folder) / file
        if not path.exists():
            raise AptError(
                f"{path}: no such file; `python -m apt_hooks.tinyworld.train_judges --out {folder}` writes it"
            )
        module: nn.Module = getattr(judges, name)
        module.load_state_dict({key: value.float() for key, value in load_file(path).items()})
        module.eval().requires_grad_(False)
    return judges


def save_judges(judges: Judges, folder: Path | str) -> None:
    """Write both networks into `folder`, in half precision: what `load_judges` reads."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, file in _FILES.items():
        state = getattr(judges, name).state_dict()
        save_file({key: value.half().contiguous() for key, value in state.items()}, Path(folder) / file)


# Scores of single pictures.


def in_batches(function: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """`function` of all pictures, a few at a time and without gradients: [n, ...]."""
    with torch.no_grad():
        return torch.cat([function(part) for part in images.split(_BATCH)])


def read_attributes(classifier: AttributeClassifier, images: Tensor) -> dict[str, Tensor]:
    """The likeliest value of each attribute: by name indices [n] into `ATTRIBUTES[name]`."""

    def likeliest(part: Tensor) -> Tensor:
        return torch.stack([logits.argmax(1) for logits in classifier(part).values()], 1)

    return dict(zip(ATTRIBUTES, in_batches(likeliest, images).unbind(1), strict=True))


def attribute_labels(scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """What the scenes truly show: by name indices [n] into `ATTRIBUTES[name]`; the color is that of the body."""

    def value(scene: Scene, name: str) -> str | None:
        shown: str | None = getattr(scene.subject if name in ("kind", "color") else scene, name)
        return shown

    return {name: torch.tensor([v.index(value(s, name)) for s in scenes]) for name, v in ATTRIBUTES.items()}


def text_score(
    classifier: AttributeClassifier, images: Tensor, scenes: Sequence[Scene], attributes: Sequence[str] = TOLD
) -> Tensor:
    """How much of what was asked each picture shows: the share of the attributes that the classifier reads in it.

    Args:
        classifier, images: of `load_judges`, and the pictures, [n, 3, 64, 64].
        scenes: what each picture was asked to show, n of them.
        attributes: names out of `ATTRIBUTES` that the captions told. A patterned body has two colors: "color" counts
            for plain subjects only.

    Returns:
        Shares from 0 to 1, [n].

    Raises:
        AptError: an unknown attribute, another number of scenes than of pictures, or a scene left without an attribute.
    """
    if unknown := [name for name in attributes if name not in ATTRIBUTES]:
        raise AptError(f"text_score: unknown attribute {unknown[0]!r}; there are {', '.join(ATTRIBUTES)}")
    if len(images) != len(scenes) or not scenes:
        raise AptError(f"text_score: one scene for each picture, got {len(scenes)} scenes for {len(images)} pictures")
    plain = torch.tensor([scene.subject.pattern is None for scene in scenes])
    asked = torch.stack([plain if name == "color" else torch.ones_like(plain) for name in attributes], 1)
    if not asked.any(1).all():
        raise AptError("text_score: color alone cannot be asked of a patterned subject; add another attribute")
    read, shown = read_attributes(classifier, images), attribute_labels(scenes)
    right = torch.stack([read[name].cpu() == shown[name] for name in attributes], 1)
    return (right & asked).sum(1) / asked.sum(1)


def identity_score(encoder: IdentityEncoder, images: Tensor, references: Tensor) -> Tensor:
    """How much each picture shows the subject of the references.

    The cosine similarity of the picture's embedding to the mean embedding of the references, brought to unit length.

    Args:
        encoder, images: of `load_judges`, and the pictures, [n, 3, 64, 64].
        references: pictures of the one subject, [m, 3, 64, 64].

    Returns:
        Scores from -1 to 1, [n].
    """
    prototype = F.normalize(in_batches(encoder, references).mean(0), dim=0)
    return in_batches(encoder, images) @ prototype
