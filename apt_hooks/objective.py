"""One training step of APT for any loop: frozen pass, tuned pass, terms, per-sample weights."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .augmentation import Placement, ZoomOutRotate
from .capture import FeatureCapture, Features
from .config import AptConfig
from .errors import AptError
from .frozen import AdaptersOff, frozen_base
from .indicator import OverfittingIndicator
from .losses import attention_alignment_loss, dco_weight, representation_statistics, statistics_loss


@dataclasses.dataclass
class Passes:
    """Both models' answers to one noisy batch; `frozen` is None where no sample counts."""

    tuned: Tensor
    frozen: Tensor | None
    tuned_features: Features | None
    frozen_features: Features | None


@dataclasses.dataclass
class AptStep:
    """What one step adds to a training loss.

    Attributes:
        prediction: the tuned model's output; take the trainer's loss from this tensor.
        weight: [batch], the factor of each sample's loss: `1 - gamma` of a sample that counts, else 1; with the
            objective "dco" `dco_weight`.
        regularizer: scalar, `lambda_dist * (l_mu + l_sigma) + lambda_attn * l_attn`, to be added to the mean loss.
        gammas: [num_bins], as this step used them, that is before its own update.
        gaps: [num_bins], the indicator's gaps behind `gammas`; NaN for a bin never seen.
        counted: number of samples that APT acts on.
        values: scalars averaged over those samples, not differentiable: `loss_tuned`, `loss_frozen`, `loss_weight`,
            `delta_noise` (equation 9, as the mean of squares) and of `l_mu`, `l_sigma`, `l_attn` those that are on.
    """

    prediction: Tensor
    weight: Tensor
    regularizer: Tensor
    gammas: Tensor
    gaps: Tensor
    counted: int
    values: dict[str, Tensor]

    def loss(self, per_sample: Tensor) -> Tensor:
        """The loss to differentiate: `mean(weight * per_sample) + regularizer`, `per_sample`: [batch].

        Raises:
            AptError: another shape; a loss that is a mean already cannot be weighed by sample.
        """
        if per_sample.shape != self.weight.shape:
            raise AptError(
                f"the loss must be one number a sample, {tuple(self.weight.shape)}; found {tuple(per_sample.shape)}: "
                'take reduction="none" and the mean over all dimensions but the first'
            )
        return (per_sample * self.weight.to(per_sample.dtype)).mean() + self.regularizer

    def weigh(self, prediction: Tensor) -> Tensor:
        """The prediction, [batch, ...], with each sample's gradient multiplied by its weight.

        For a loop whose loss is a mean already: every loss that is a sum over the samples gets the gradient of the
        weighted one, and keeps its value.
        """
        return _ScaleGradient.apply(prediction, self.weight)


class AptObjective:
    """Adaptive Personalized Training around a training loop (APT, arXiv 2507.02687).

    In a loop: `augment` before the images are encoded, `step` in place of the call of the U-Net, `AptStep.loss` of the
    trainer's per-sample losses. A context manager; `close` leaves the U-Net as it was.

    Args:
        config: what to do; `monitor_only` computes and returns everything and changes no gradient.
        unet: the denoiser, adapters attached.
        adapters_off: makes a context in which the adapters take no part (`frozen_base`).
        num_train_timesteps: T of the noise schedule.
        also_frozen: further modules whose adapters `adapters_off` switches, e.g. trained text encoders.

    Raises:
        AptError: the U-Net has not what the configuration asks for.
    """

    def __init__(
        self,
        config: AptConfig,
        unet: nn.Module,
        adapters_off: AdaptersOff,
        *,
        num_train_timesteps: int = 1000,
        also_frozen: Iterable[nn.Module] = (),
    ) -> None:
        self.config = config
        self.adapters_off = adapters_off
        self.frozen_modules = (unet, *also_frozen)
        self.indicator = OverfittingIndicator(
            config.num_bins, num_train_timesteps, config.ema_alpha, config.indicator_scale
        )
        self.augmentation = ZoomOutRotate(config.zoom_out, config.rotation_degrees)
        self.capture: FeatureCapture | None = None
        if config.lambda_dist or config.lambda_attn:
            self.capture = FeatureCapture(
                unet,
                config.blocks,
                config.representation_source,
                attention=config.lambda_attn > 0,
                representation=config.lambda_dist > 0,
            )

    @property
    def _dco(self) -> bool:
        return self.config.objective == "dco" and not self.config.monitor_only

    @property
    def augments(self) -> bool:
        """Whether samples are augmented at all."""
        return self.config.augmentation and not self.config.monitor_only

    def draw_augmentation(
        self, timesteps: Tensor, counted: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Placement:
        """Choose the samples to augment, each with probability `clamp(gamma, 0, augment_max_probability)`.

        Args:
            timesteps: [batch], drawn already: the probability depends on them.
            counted: [batch], bool; None counts all. Others (regularization images) are never augmented.
            generator: a CPU generator; None takes torch's global one.
        """
        if not self.augments:
            nowhere = torch.zeros(len(timesteps))
            return Placement(scales=nowhere + 1, angles=nowhere, chosen=nowhere.bool())
        probability = self.indicator.gamma(timesteps).cpu().clamp(max=self.config.augment_max_probability)
        if counted is not None:
            probability = probability * counted.cpu()
        return self.augmentation.draw(probability, generator)

    def augment(
        self,
        images: Tensor,
        timesteps: Tensor,
        *,
        fill: float | Tensor = -1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """`images` ([batch, channels, height, width], black = `fill`), some of them zoomed out and rotated."""
        return self.draw_augmentation(timesteps, generator=generator).apply(images, fill)

    def step(
        self,
        predict: Callable[[], Tensor],
        target: Tensor,
        timesteps: Tensor,
        *,
        predict_frozen: Callable[[], Tensor] | None = None,
        counted: Tensor | None = None,
    ) -> AptStep:
        """Both passes and all terms of one batch.

        Args:
            predict: runs the denoiser on the noisy batch and returns [batch, ...].
            target: [batch, ...], what the denoiser should predict.
            timesteps: [batch], whole numbers.
            predict_frozen: the same with other conditioning (class word for identifier); None takes `predict`.
            counted: [batch], bool; False for regularization images, which are trained on as ever. None counts all.
        """
        return self.assess(self.passes(predict, predict_frozen, counted), target, timesteps, counted)

    def passes(
        self,
        predict: Callable[[], Tensor],
        predict_frozen: Callable[[], Tensor] | None = None,
        counted: Tensor | None = None,
    ) -> Passes:
        """The frozen pass and the tuned pass; for loops that know the target only later. Arguments as in `step`."""
        if counted is not None and not bool(counted.any()):
            return Passes(predict(), None, None, None)
        with self.frozen_pass() as before:
            frozen = (predict_frozen or predict)()
        with self.tuned_pass() as now:
            tuned = predict()
        return self.join(tuned, frozen, now, before)

    @contextlib.contextmanager
    def frozen_pass(self) -> Iterator[Features | None]:
        """Inside, the U-Net is the base model and is read; for loops that cannot hand over calls to `passes`."""
        with frozen_base(self.frozen_modules, self.adapters_off), self._record(representation_statistics) as features:
            yield features

    def tuned_pass(self) -> contextlib.AbstractContextManager[Features | None]:
        """Inside, the pass that is differentiated is read."""
        return self._record()

    def join(self, tuned: Tensor, frozen: Tensor, now: Features | None, before: Features | None) -> Passes:
        """Both predictions with what `tuned_pass` and `frozen_pass` read."""
        if self.capture is not None and now is not None and not self.config.monitor_only:
            tuned = self.capture.connect(tuned, now)
        return Passes(tuned, frozen, now, before)

    def assess(self, passes: Passes, target: Tensor, timesteps: Tensor, counted: Tensor | None = None) -> AptStep:
        """Losses, indicator and terms from both passes; updates the indicator. Arguments as in `step`."""
        batch = len(timesteps)
        rows = torch.arange(batch) if counted is None else torch.nonzero(counted.cpu()).flatten()
        rows = rows.to(timesteps.device)
        gammas, gaps = self.indicator.gammas, self.indicator.gaps
        weight = torch.ones(batch, device=timesteps.device)
        if self._dco:
            # What a sample starts with under DCO: the others keep their share of the trainer's loss.
            weight *= self.config.dco_beta / 2
        if passes.frozen is None:
            nothing = torch.zeros(0, device=target.device)
            self.indicator.update(timesteps[:0], nothing, nothing)
            return AptStep(passes.tuned, weight, passes.tuned.new_zeros((), dtype=torch.float32), gammas, gaps, 0, {})
        with torch.no_grad():
            tuned, frozen, wanted = (x[rows].float() for x in (passes.tuned, passes.frozen, target))
            loss_tuned, loss_frozen = (_mean_square(wanted - x) for x in (tuned, frozen))
            if self._dco:
                weight[rows] = dco_weight(loss_tuned, loss_frozen, self.config.dco_beta)
            elif self.config.loss_weighting and not self.config.monitor_only:
                weight[rows] = 1.0 - self.indicator.gamma(timesteps)[rows]
            self.indicator.update(timesteps[rows], loss_tuned, loss_frozen)
            values = {
                "loss_tuned": loss_tuned.mean(),
                "loss_frozen": loss_frozen.mean(),
                "loss_weight": weight[rows].mean(),
                "delta_noise": _mean_square(frozen - tuned).mean(),
            }
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.monitor_only):
            terms = self._terms(passes, None if len(rows) == batch else rows)
        regularizer = torch.zeros((), device=target.device)
        if not self.config.monitor_only:
            factors = {"l_mu": self.config.lambda_dist, "l_sigma": self.config.lambda_dist}
            factors["l_attn"] = self.config.lambda_attn
            # The terms are means over the samples that count; the trainer's loss is a mean over the whole batch.
            regularizer = sum((factors[k] * v for k, v in terms.items()), regularizer) * (len(rows) / batch)
        values.update({name: term.detach() for name, term in terms.items()})
        return AptStep(passes.tuned, weight, regularizer, gammas, gaps, len(rows), values)

    def verify(self) -> None:
        """Check that the last backward pass carried the regularizers' gradient (`FeatureCapture.verify`)."""
        if self.capture is not None:
            self.capture.verify()

    def close(self) -> None:
        """Take the hooks off; may be called again."""
        if self.capture is not None:
            self.capture.close()

    def __enter__(self) -> AptObjective:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.capture is not None:
            self.capture.__exit__(kind, error, tb)

    def _record(
        self, reduce: Callable[[Tensor], Tensor] | None = None
    ) -> contextlib.AbstractContextManager[Features | None]:
        return contextlib.nullcontext() if self.capture is None else self.capture.record(reduce)

    def _terms(self, passes: Passes, rows: Tensor | None) -> dict[str, Tensor]:
        tuned, frozen, capture = passes.tuned_features, passes.frozen_features, self.capture
        if capture is None or tuned is None or frozen is None:
            return {}

        def chosen(x: Tensor, dim: int = 0) -> Tensor:
            return x if rows is None else x.index_select(dim, rows.to(x.device))

        terms: dict[str, Tensor] = {}
        if capture.representation_places:
            distances = [
                _without_storing(_statistics_distance, chosen(tuned.hidden.pop(i)), chosen(frozen.hidden.pop(i), 1))
                for i in range(len(capture.representation_places))
            ]
            terms["l_mu"], terms["l_sigma"] = torch.stack(distances).mean(dim=0)
        if capture.layers:
            losses = []
            for i, layer in enumerate(capture.layers):
                q, k = chosen(tuned.queries.pop(i)), chosen(tuned.keys.pop(i))
                q_frozen, k_frozen = chosen(frozen.queries.pop(i)), chosen(frozen.keys.pop(i))
                if k.shape[1] != k_frozen.shape[1]:
                    raise AptError(
                        f"attention alignment needs captions of one token length; the tuned model saw {k.shape[1]} "
                        f"tokens, the frozen one {k_frozen.shape[1]}: choose a class_word as long as the identifier"
                    )
                alignment = functools.partial(attention_alignment_loss, heads=layer.heads, scale=layer.scale)
                losses.append(_without_storing(alignment, q, k, q_frozen, k_frozen))
            terms["l_attn"] = torch.stack(losses).mean()
        return terms


class _ScaleGradient(torch.autograd.Function):
    """Identity; its backward multiplies by a factor a sample."""

    @staticmethod
    def forward(ctx: Any, prediction: Tensor, factor: Tensor) -> Tensor:
        ctx.factor = factor
        return prediction.clone()  # which a script may change in place; a view would refuse

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return (gradient * ctx.factor.to(gradient.device).reshape(-1, *[1] * (gradient.ndim - 1))).to(
            gradient.dtype
        ), None


def _statistics_distance(h: Tensor, frozen: Tensor) -> Tensor:
    return torch.stack(statistics_loss(representation_statistics(h), frozen))


def _without_storing(term: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """A layer's term, computed again in the backward pass: its maps and float32 copies would fill a small card."""
    return checkpoint(term, *tensors, use_reentrant=False, preserve_rng_state=False)


def _mean_square(x: Tensor) -> Tensor:
    return x.square().flatten(1).mean(dim=1)
