"""Steering latents so that their cross-attention becomes that of another run.

DreamBlend (arXiv 2411.19390) does so with the attention of an earlier checkpoint. Its loss is not published; this is
the nearest one that is, pix2pix-zero's (arXiv 2302.03027, cross-attention guidance): one gradient step a denoising
step, of a sum over positions and tokens. Ours is that a step is bounded: an overfitted LoRA has single gradients that
throw the latents so far that no picture is left.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..errors import AptError
from ..method.ops.attention_alignment import AttentionAlignment
from ..method.ops.precision import full_precision
from .capture import FeatureCapture, Features
from .gradients import Kind
from .layout import AttentionPoint

RunDenoiser = Callable[[Tensor], object]
"""Runs a denoiser on inputs, [batch, channels, height, width], with everything else as in the step at hand."""

LONGEST = 0.1
"""The longest step, as a share of the input's own length."""


@dataclasses.dataclass
class AttentionRecording:
    """The queries and keys of a run's cross-attention, in float16: less than their maps, which come from them again.

    Attributes:
        layers: whose they are.
        steps: by the number of the denoising step, from 0.
    """

    layers: tuple[AttentionPoint, ...]
    steps: dict[int, Features] = dataclasses.field(default_factory=dict)

    @contextlib.contextmanager
    def record(
        self, step: int, capture: FeatureCapture, batch: int, *, device: torch.device | str | None = None
    ) -> Iterator[None]:
        """Read the pass that runs inside.

        Args:
            batch: how many samples, the last of the pass, to keep: behind those without a prompt, that is.
            device: where to keep them; None: where they are.
        """

        def keep(_kind: Kind, output: Tensor) -> Tensor:
            return output[-batch:].to(device or output.device, torch.float16, copy=True)

        with torch.no_grad(), capture.record(keep) as features:
            yield
        self.steps[step] = features

    @property
    def nbytes(self) -> int:
        """What it takes of memory, in bytes."""
        kept = [x for f in self.steps.values() for kind in (f.queries, f.keys) for x in kind.values()]
        return sum(x.numel() * x.element_size() for x in kept)


def attention_distance(layers: Sequence[AttentionPoint], features: Features, reference: Features) -> Tensor:
    """How far the attention maps of a batch are from a reference's: a sum over samples, so that no sample's gradient
    depends on the others.

        sum over samples, layers, queries, tokens of the mean over heads of (A - A_ref)^2

    Differentiable by the queries and keys of `features`, once; computed in float32.

    Raises:
        AptError: the maps have other sizes.
    """
    terms = []
    for i, layer in enumerate(layers):
        q, k = features.queries[i], features.keys[i]
        q, k = full_precision(q), full_precision(k)  # before their gradients are rounded
        wanted = [x.to(q.device, q.dtype) for x in (reference.queries[i], reference.keys[i])]
        if [x.shape for x in wanted] != [q.shape, k.shape]:
            found, recorded = (" and ".join(str(tuple(x.shape)) for x in pair) for pair in ((q, k), wanted))
            raise AptError(
                "guidance needs the recorded run's batch, picture size and token length; queries and keys of "
                f"{layer.name} are {found}, recorded were {recorded}"
            )
        masks = [of.masks[i].to(q.device) for of in (features, reference) if i in of.masks]
        mask = torch.stack(masks).all(dim=0) if masks else None
        options = {"heads": layer.heads, "scale": layer.scale, "mask": mask, "differentiated": True}
        terms.append(AttentionAlignment.apply(q, k, *wanted, options) / layer.heads)
    return torch.stack(terms).sum()


def guide(inputs: Tensor, predict: RunDenoiser, capture: FeatureCapture, reference: Features, lr: float) -> Tensor:
    """`inputs - lr * gradient of attention_distance`, in their dtype, no sample moved by more than `LONGEST`.

    Args:
        inputs: [batch, channels, height, width], the latents as the denoiser gets them: of variance 1 whatever the
            scheduler, so that one `lr` serves all.
        predict: one pass of the denoiser, with the prompt alone and not without it.
        capture: on the denoiser that `predict` runs.
        reference: of the same step of another run.
    """

    def gradient(scale: float) -> Tensor:
        with torch.enable_grad():
            start = inputs.detach().requires_grad_()
            with capture.record() as features:
                predict(start)
            distance = attention_distance(capture.layers, features, reference) * scale
            return torch.autograd.grad(distance, start)[0].float() / scale

    step = lr * (_finite(gradient) if inputs.dtype == torch.float16 else gradient(1.0))
    length, longest = (x.float().flatten(1).norm(dim=1) for x in (step, LONGEST * inputs.detach()))
    step *= (longest / length.clamp_min(1e-12)).clamp(max=1.0)[:, None, None, None]
    return (inputs.float() - step).to(inputs.dtype)


def _finite(gradient: Callable[[float], Tensor]) -> Tensor:
    """In float16 gradients of single queries may be too small, and those of an overfitted LoRA too large.

    By powers of two, which change no digit.
    """
    for exponent in (10, 0, -10):
        found = gradient(2.0**exponent)
        if bool(found.isfinite().all()):
            return found
    raise AptError("guidance finds no finite gradient in float16: load the pipeline in bfloat16 or float32")
