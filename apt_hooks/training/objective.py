"""One training step of APT for any loop: frozen pass, tuned pass, terms, per-sample weights."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType

import torch
from torch import Tensor, nn

from ..config import AptConfig
from ..errors import AptError
from ..hooks.capture import FeatureCapture, Features
from ..hooks.frozen import AdaptersOff, frozen_base
from ..hooks.frozen_check import Watches
from ..hooks.gradients import ObservedPass
from ..hooks.starting_weights import Named, StartingWeights
from ..method.augmentation import Placement, ZoomOutRotate, covered_at
from ..method.deferred import Deferred
from ..method.indicator import OverfittingIndicator
from ..method.losses import dco_weight
from .regularizers import Regularizers, frozen_reduction
from .step import AptStep, scale_gradient

logger = logging.getLogger("apt_hooks")


@dataclasses.dataclass
class Passes:
    """Both models' answers to one noisy batch, and the regularizers' terms.

    Attributes:
        tuned, frozen: [batch, ...]; `frozen` is None in a step without frozen pass.
        terms: `l_mu`, `l_sigma`, `l_attn`, `l_joint`, those that are on; scalars that reach the LoRA.
    """

    tuned: Tensor
    frozen: Tensor | None = None
    terms: dict[str, Tensor] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class TunedPass:
    """What was compared in a pass that is differentiated; for `AptObjective.join`."""

    regularizers: Regularizers
    observed: ObservedPass


class AptObjective:
    """Adaptive Personalized Training around a training loop (APT, arXiv 2507.02687).

    In a loop: `augment` before the images are encoded, `step` in place of the call of the U-Net, `AptStep.loss` of the
    trainer's per-sample losses. A context manager; `close` leaves the U-Net as it was.

    Args:
        config: what to do; `monitor_only` computes and returns everything and changes no gradient.
        unet: the denoiser, adapters attached.
        adapters_off: makes a context in which the adapters take no part (`frozen_base`).
        num_train_timesteps: T of the noise schedule.
        also_frozen: further modules whose adapters `adapters_off` switches, e.g. trained text encoders; with
            `reference = "start"` also the LoRA itself where it is no part of them, for the sake of its dropout.
        bin_of: as in `OverfittingIndicator`, for timesteps that are no whole numbers, such as sigmas.
        trained: (name, parameter) of all that the optimizers train, as `named_parameters` gives them; may be set later,
            up to the first frozen pass. None takes every parameter that requires a gradient for trained.

    The first frozen pass is watched, and an error if its result comes from anything that is trained: a switch that
    switches nothing or not all, a norm trained beside the LoRA. So are both passes of the step after one in which they
    agreed to the last bit, though the weights had moved: then the tuned pass has to come from what is trained.

    With `reference = "start"` nothing is switched off: the frozen pass is of the model with the weights that `trained`
    had before the first step, which costs a copy of them (`start`). Where another model than the base is at the first
    step compared with it, a warning says so.

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
        trained: Iterable[tuple[str, nn.Parameter]] | None = None,
        bin_of: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.config = config
        self.adapters_off = adapters_off
        self.frozen_modules = (unet, *also_frozen)
        self.trained = None if trained is None else list(trained)
        self.start: StartingWeights | None = None
        """What the training began from, with `reference = "start"`, from the first batch on."""
        self.saved_start: Named | None = None
        """To be set by whoever loads a state: what `start.named()` was when that was saved."""
        self._watches = Watches()
        self._start_compared = False
        self._deferred = Deferred()
        self.indicator = OverfittingIndicator(
            config.num_bins, num_train_timesteps, config.ema_alpha, config.indicator_scale, bin_of=bin_of
        )
        self.augmentation = ZoomOutRotate(config.zoom_out, config.rotation_degrees)
        self._augmented: tuple[Placement, torch.Size] | None = None  # by `augment`, for `step`
        self.steps = 0
        """Batches assessed; every `frozen_every`-th has a frozen pass."""
        self.capture: FeatureCapture | None = None
        joint, attention = config.regularizer == "joint", config.aligns_attention
        representation = (config.lambda_joint if joint else config.lambda_dist) > 0
        if attention or representation:
            self.capture = FeatureCapture(
                unet,
                config.blocks,
                "cross_attention" if joint else config.representation_source,
                attention=attention,
                representation=representation,
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
        """`images` ([batch, channels, height, width], black = `fill`), some of them zoomed out and rotated.

        `step` then knows what was uncovered.
        """
        placement = self.draw_augmentation(timesteps, generator=generator)
        self._augmented = placement, images.shape[-2:]
        return placement.apply(images, fill)

    def covered(self, placement: Placement | None, size: Sequence[int]) -> Tensor | None:
        """What of a batch is to be learned from: `Placement.covered` of its images (or latents) of `size`.

        For `passes` and `assess`; None where nothing was moved, or the border is learned as well.
        """
        if placement is None or self.config.augment_border == "learn" or not bool(placement.chosen.any()):
            return None
        return placement.covered(size)

    def step(
        self,
        predict: Callable[[], Tensor],
        target: Tensor,
        timesteps: Tensor,
        *,
        predict_frozen: Callable[[], Tensor] | None = None,
        counted: Tensor | None = None,
        ends_step: bool = True,
        error_scale: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> AptStep:
        """Both passes and all terms of one batch.

        Args:
            predict: runs the denoiser on the noisy batch and returns [batch, ...].
            target: [batch, ...], what the denoiser should predict.
            timesteps: [batch], whole numbers, or what `bin_of` takes.
            predict_frozen: the same with other conditioning (class word for identifier); None takes `predict`.
            counted: [batch], bool; False for regularization images, which are trained on as ever. None counts all.
            ends_step: under gradient accumulation, whether the optimizer steps after this batch; up to there gamma
                stays what it is, and then the indicator is updated once with all the batches' samples.
            error_scale: [batch], what each sample's error has to be multiplied by to be an error of epsilon
                (`units.epsilon_error_scale`); the indicator measures that, unless `indicator_space` is "target". None
                measures the error as it is.
            mask: as `target`, or with 1 in place of any of its sizes but the first; what each element counts in your
                loss. Losses are means over what it covers, whatever its size; a sample without any is not measured.

        Raises:
            AptError: a mask of another shape.
        """
        augmented, self._augmented = self._augmented, None
        covered = None if augmented is None else self.covered(*augmented)
        return self.assess(
            self.passes(predict, predict_frozen, counted, covered),
            target,
            timesteps,
            counted,
            ends_step=ends_step,
            error_scale=error_scale,
            mask=mask,
            covered=covered,
        )

    def passes(
        self,
        predict: Callable[[], Tensor],
        predict_frozen: Callable[[], Tensor] | None = None,
        counted: Tensor | None = None,
        covered: Tensor | None = None,
    ) -> Passes:
        """The frozen pass and the tuned pass; for loops that know the target only later.

        Arguments as in `step` and, `covered`, in `assess`.
        """
        self.keep_start()
        counts = counted is None or bool(counted.any())
        if not self.frozen_due or not (counts or self._begins_from_base):
            return Passes(predict())
        with self.frozen_pass(covered) as features:
            frozen = (predict_frozen or predict)()
        if predict_frozen is not None and self._begins_from_base:
            # With other conditioning predictions differ for another reason too.
            with frozen_base(self.frozen_modules, contextlib.nullcontext):
                self._compare_start(predict_frozen(), frozen)
        if not counts:
            tuned = predict()
            if self._begins_from_base:
                self._compare_start(tuned, frozen)
            return Passes(tuned)
        with self.tuned_pass(features, counted, covered) as tuned_pass:
            tuned = predict()
        return self.join(tuned, frozen, tuned_pass)

    def keep_start(self) -> None:
        """With `reference = "start"`, take the weights of now for those of the start, unless a state has them.

        The first batch does it; to be called before where weights change without one.

        Raises:
            AptError: nothing is known to be trained, or the state was of another LoRA.
        """
        if self.config.reference == "start" and (self.start is None or self.saved_start is not None):
            trained = self.trained
            if trained is None:
                named = (item for module in self.frozen_modules for item in module.named_parameters())
                trained = [(name, p) for name, p in named if p.requires_grad]
            self.start, self.saved_start = StartingWeights(trained, self.saved_start), None

    @property
    def _begins_from_base(self) -> bool:
        """Whether it is still to be seen that the model of the first step is the base model."""
        return self.config.reference == "base" and self.steps == 0 and not self._start_compared

    def _compare_start(self, own: Tensor, base: Tensor) -> None:
        self._start_compared = True
        own, base = own.detach().float(), base.float()
        self._deferred.expect(torch.stack([(own - base).square().mean(), base.square().mean()]), _tell_start)

    @property
    def frozen_due(self) -> bool:
        """Whether this batch has a frozen pass; the same until `assess`. In others no regularizer acts."""
        return self.steps % self.config.frozen_every == 0

    @contextlib.contextmanager
    def frozen_pass(self, covered: Tensor | None = None) -> Iterator[Features | None]:
        """Inside, the U-Net is the reference and is read; for loops that cannot hand over calls to `passes`."""
        self.keep_start()
        with contextlib.ExitStack() as stack:
            exchanged = None if self.start is None else self.start.weights
            watch = self._watches.of_frozen_pass(self.frozen_modules, self.trained, exchanged)
            switch = self.adapters_off if self.start is None else self.start.exchanged
            stack.enter_context(frozen_base(self.frozen_modules, switch))
            stack.enter_context(watch)
            features = None
            if self.capture is not None:
                reduce = frozen_reduction(self.config.regularizer, self.config.attention_impl, covered)
                features = stack.enter_context(self.capture.record(reduce))
            yield features

    @contextlib.contextmanager
    def tuned_pass(
        self, features: Features | None, counted: Tensor | None = None, covered: Tensor | None = None
    ) -> Iterator[TunedPass | None]:
        """Inside, the pass that is differentiated is compared with what `frozen_pass` read, of the same `covered`."""
        with (
            self._watches.of_tuned_pass(self.frozen_modules, self.trained),
            self._compared(features, counted, covered) as passed,
        ):
            yield passed

    @contextlib.contextmanager
    def _compared(
        self, features: Features | None, counted: Tensor | None, covered: Tensor | None
    ) -> Iterator[TunedPass | None]:
        if self.capture is None or features is None:
            yield None
            return
        regularizers = Regularizers(
            features,
            self.capture.layers,
            len(self.capture.hidden),
            regularizer=self.config.regularizer,
            rows=_rows(counted),
            covered=covered,
            impl=self.config.attention_impl,
            differentiable=torch.is_grad_enabled() and not self.config.monitor_only,
        )
        with self.capture.regularize(regularizers.observe) as observed:
            yield TunedPass(regularizers, observed)

    def join(self, tuned: Tensor, frozen: Tensor, tuned_pass: TunedPass | None) -> Passes:
        """Both predictions with what was compared on the way.

        Raises:
            AptError: the frozen pass was not the base model's, or both passes were.
        """
        self._watches.judge(tuned, frozen)
        if self._begins_from_base:
            self._compare_start(tuned, frozen)
        if self.capture is None or tuned_pass is None:
            return Passes(tuned, frozen)
        tuned, terms = self.capture.connect(tuned, tuned_pass.observed, tuned_pass.regularizers.values())
        return Passes(tuned, frozen, terms)

    def assess(
        self,
        passes: Passes,
        target: Tensor,
        timesteps: Tensor,
        counted: Tensor | None = None,
        *,
        ends_step: bool = True,
        error_scale: Tensor | None = None,
        mask: Tensor | None = None,
        covered: Tensor | None = None,
    ) -> AptStep:
        """Losses, indicator and terms from both passes; takes the batch into the indicator. Arguments as in `step`.

        Args:
            covered: [batch, 1, height, width] of the images or of the latents, what of each sample to learn from
                (`covered`). The rest has no part in losses, indicator and channel statistics, and
                `AptStep.prediction` no gradient there. None: all.

        Raises:
            AptError: predictions and target differ in shape, or timesteps are none of the schedule's. What only a
                device's numbers show is told by a later step or `verify`.
        """
        self._deferred.look()
        _check_shapes(passes, target)
        if covered is not None:
            covered = covered_at(covered, target.shape).to(target.device, non_blocking=True)
        batch, rows = len(timesteps), _rows(counted, timesteps.device)
        here = slice(None) if rows is None else rows
        count = batch if rows is None else len(rows)
        due, gammas, gaps = self.frozen_due, self.indicator.gammas, self.indicator.gaps
        self.steps += 1
        weight = self._weight(timesteps, here)
        values: dict[str, Tensor] = {}
        if passes.frozen is not None:
            if covered is not None:
                mask = covered if mask is None else mask * covered
            losses = _Losses.of(passes.tuned, passes.frozen, target, mask, here)
            loss_tuned, loss_frozen, values = losses.tuned, losses.frozen, losses.means()
            if self._dco:
                weight[here] = dco_weight(losses.whole(loss_tuned), losses.whole(loss_frozen), self.config.dco_beta)
            if error_scale is not None and self.config.indicator_space != "target":
                squared = error_scale[here].square()
                loss_tuned, loss_frozen = squared * loss_tuned, squared * loss_frozen
            self.indicator.add(timesteps[here], loss_tuned, loss_frozen)
            if self._watches.trained_since_the_first():
                self._deferred.expect(values["delta_noise"][None], self._watches.take_notice)
        elif due:  # Every rank takes part, also one whose batch has nothing that counts.
            nothing = torch.zeros(0, device=target.device)
            self.indicator.add(timesteps[:0], nothing, nothing)
        if ends_step:
            self.indicator.end_step()
        if count:
            values["loss_weight"] = weight[here].mean()
        # The terms are means over the samples that count; the trainer's loss is a mean over the whole batch.
        share = (self.config.frozen_every if due else 0) * count / batch
        regularizer = torch.zeros((), device=target.device)
        if not self.config.monitor_only:
            regularizer = self._regularizer(passes.terms, share, regularizer)
        values.update({name: term.detach() for name, term in passes.terms.items()})
        prediction = passes.tuned if covered is None else scale_gradient(passes.tuned, covered)
        return AptStep(prediction, weight, regularizer, gammas, gaps, count, values)

    def _weight(self, timesteps: Tensor, here: slice | Tensor) -> Tensor:
        """What each sample's loss is multiplied by before the passes are compared: [batch]."""
        weight = torch.ones(len(timesteps), device=timesteps.device)
        if self._dco:
            # What a sample starts with under DCO: the others keep their share of the trainer's loss.
            weight *= self.config.dco_beta / 2
        elif self.config.loss_weighting and not self.config.monitor_only:
            weight[here] = 1.0 - self.indicator.gamma(timesteps)[here]
        return weight

    def _regularizer(self, terms: dict[str, Tensor], share: float, nothing: Tensor) -> Tensor:
        """The terms by their lambdas, as they are added to a mean over the whole batch."""
        dist, attn, joint = self.config.lambda_dist, self.config.lambda_attn, self.config.lambda_joint
        lambdas = {"l_mu": dist, "l_sigma": dist, "l_attn": attn, "l_joint": joint}
        return sum((lambdas[name] * share * term for name, term in terms.items()), nothing)

    def verify(self) -> None:
        """Check that the last backward pass carried the regularizers' gradient (`FeatureCapture.verify`), and what the
        steps left to be checked when the device would have come to it."""
        self._deferred.look(wait=True)
        self.indicator.verify()
        if self.capture is not None:
            self.capture.verify()

    def close(self) -> None:
        """Take the hooks off; may be called again."""
        if self.capture is not None:
            self.capture.close()

    def __enter__(self) -> AptObjective:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        try:
            if kind is None:
                self.verify()
        finally:
            self.close()


def _tell_start(squares: list[float]) -> None:
    """Say that the LoRA of a run's first batch is none that begins at zero."""
    difference, base = squares
    if difference > _ROUNDING * base and not _is_later_rank():
        logger.warning(
            "apt-hooks: the LoRA changes the model before the first step (mean square of the difference %.2g of the "
            "prediction's), and is measured from, and pulled back to, the model without it; to go on from it as it is, "
            'set [apt] reference = "start"%s',
            difference / base if base else math.inf,
            " (with DoRA, so little may be rounding)" if difference < _OF_HALF_PRECISION * base else "",
        )


# A LoRA that begins at zero gives exactly 0 in every precision. DoRA's decomposed weights are rounded: on a tiny U-Net
# 1.2e-4 in bfloat16, 1.6e-6 in float16, 0 in float32.
_ROUNDING, _OF_HALF_PRECISION = 1e-9, 1e-3


def _is_later_rank() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_rank() > 0


def _check_shapes(passes: Passes, target: Tensor) -> None:
    """A target of [batch, 1, height, width] would broadcast to another loss without a word."""
    for name, prediction in (("tuned", passes.tuned), ("frozen", passes.frozen)):
        if prediction is not None and prediction.shape != target.shape:
            raise AptError(
                f"prediction and target must have one shape; found {tuple(prediction.shape)} of the {name} model for a "
                f"target of {tuple(target.shape)}: hand over what the trainer takes its loss of"
            )


def _rows(counted: Tensor | None, device: torch.device | None = None) -> Tensor | None:
    """The samples that count, None where all do; found on the CPU, so that no device is waited for."""
    counted = None if counted is None else counted.cpu()
    return (
        None
        if counted is None or bool(counted.all())
        else torch.nonzero(counted).flatten().to(device, non_blocking=True)
    )


@dataclasses.dataclass
class _Losses:
    """Mean squares of both models' errors and of their difference, of the samples that count: each [samples].

    `covered` is the share of a sample that its mask covers, None without masks; where it is 0 the others are NaN.
    """

    tuned: Tensor
    frozen: Tensor
    delta_noise: Tensor
    covered: Tensor | None

    @classmethod
    @torch.no_grad()
    def of(cls, tuned: Tensor, frozen: Tensor, target: Tensor, mask: Tensor | None, here: slice | Tensor) -> _Losses:
        if mask is not None:
            fits = mask.ndim == target.ndim and mask.shape[:1] == target.shape[:1]
            if not fits or any(m not in (1, n) for m, n in zip(mask.shape, target.shape, strict=True)):
                raise AptError(
                    f"the mask must be of the target's shape {tuple(target.shape)}, or have 1 in place of any size but "
                    f"the first; found {tuple(mask.shape)}"
                )
            mask = mask.expand_as(target)[here].float()
        tuned, frozen, target = (x[here].float() for x in (tuned, frozen, target))
        return cls(
            _mean_square(target - tuned, mask),
            _mean_square(target - frozen, mask),
            _mean_square(frozen - tuned, mask),
            None if mask is None else mask.flatten(1).mean(dim=1),
        )

    def means(self) -> dict[str, Tensor]:
        """Their means over the samples that have a loss, by the names in the log; NaN where none has."""
        values = {"loss_tuned": self.tuned, "loss_frozen": self.frozen, "delta_noise": self.delta_noise}
        if self.covered is None:
            return {name: value.mean() for name, value in values.items()}
        seen = self.covered > 0
        return {name: torch.where(seen, value, 0.0).sum() / seen.sum() for name, value in values.items()}

    def whole(self, loss: Tensor) -> Tensor:
        """A loss as a trainer has it that takes the mean over the whole frame, nothing outside the mask."""
        return loss if self.covered is None else torch.where(self.covered > 0, loss * self.covered, 0.0)


def _mean_square(x: Tensor, mask: Tensor | None) -> Tensor:
    squares = x.square().flatten(1)
    if mask is None:
        return squares.mean(dim=1)
    weights = mask.flatten(1)
    return (squares * weights).sum(dim=1) / weights.sum(dim=1)
