"""One training step of APT for any loop: frozen pass, tuned pass, terms, per-sample weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ..config import AptConfig
from ..errors import AptError
from ..hooks.capture import FeatureCapture
from ..hooks.frozen import AdaptersOff
from ..hooks.frozen_rows import FrozenRows
from ..hooks.layout import Layout
from ..hooks.lora_pairs import lora_pairs
from ..method.augmentation import Placement, ZoomOutRotate, covered_at
from ..method.deferred_checks import DeferredChecks
from ..method.indicator import OverfittingIndicator
from ..method.l2_sp import LowRank, difference, weight_offset
from ..method.losses import SampleLosses, dco_weight
from .passes import Passes, rows_of
from .reference_model import Reference
from .step import AptStep, scale_gradient


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
            `reference = "start"` also the LoRA itself where it is no part of them, for the sake of its dropout, and
            with `lambda_offset`, `objective = "l2-sp"` or `monitor_only`, whose pairs are looked for in it.
        bin_of: as in `OverfittingIndicator`, for timesteps that are no whole numbers, such as sigmas.
        layout: where to hook a denoiser of no known architecture, in place of the keys `blocks` and
            `representation_source`.
        trained: (name, parameter) of all that the optimizers train, as `named_parameters` gives them; may be set later
            (`reference.trained`), up to the first frozen pass. None takes every parameter that requires a gradient for
            trained.

    The first frozen pass is watched, and an error if its result comes from anything that is trained: a switch that
    switches nothing or not all, a norm trained beside the LoRA. So are both passes of the step after one in which they
    agreed to the last bit, though the weights had moved: then the tuned pass has to come from what is trained.

    With `reference = "start"` nothing is switched off: the frozen pass is of the model with the weights that `trained`
    had before the first step, which costs a copy of them (`reference.start`). Where another model than the base is at
    the first step compared with it, a warning says so.

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
        layout: Layout | None = None,
    ) -> None:
        self.config = config
        self._deferred = DeferredChecks()
        self.reference = Reference(config.reference, (unet, *also_frozen), adapters_off, trained, self._deferred)
        self.frozen_rows = FrozenRows()
        self.indicator = OverfittingIndicator(
            config.num_bins, num_train_timesteps, config.ema_alpha, config.indicator_scale, bin_of=bin_of
        )
        self.augmentation = ZoomOutRotate(config.zoom_out, config.rotation_degrees)
        self._augmented: tuple[Placement, torch.Size] | None = None  # by `augment`, for `step`
        self._pairs: list[LowRank] | None = None
        self.steps = 0
        """Batches so far; every `frozen_every`-th has a frozen pass."""
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
                layout=layout,
            )

    @property
    def _dco(self) -> bool:
        return self.config.objective == "dco" and not self.config.monitor_only

    @property
    def augments(self) -> bool:
        """Whether samples are augmented at all."""
        return self.config.augmentation and not self.config.monitor_only

    def draw_augmentation(
        self, timesteps: Tensor, instances: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Placement:
        """Choose the samples to augment, each with probability `clamp(gamma, 0, augment_max_probability)`.

        Args:
            timesteps: [batch], drawn already: the probability depends on them.
            instances: [batch], bool; None counts all. Others (regularization images) are never augmented.
            generator: a CPU generator; None takes torch's global one.
        """
        if not self.augments:
            nowhere = torch.zeros(len(timesteps))
            return Placement(scales=nowhere + 1, angles=nowhere, chosen=nowhere.bool())
        probability = self.indicator.gamma(timesteps).cpu().clamp(max=self.config.augment_max_probability)
        if instances is not None:
            probability = probability * instances.cpu()
        return self.augmentation.draw(probability, generator)

    def augment(
        self,
        images: Tensor,
        timesteps: Tensor,
        *,
        instances: Tensor | None = None,
        fill: float | Tensor = -1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """`images` ([batch, channels, height, width], black = `fill`), some of them zoomed out and rotated.

        `instances` is as in `step`, which then knows what was uncovered.
        """
        placement = self.draw_augmentation(timesteps, instances, generator)
        self._augmented = placement, images.shape[-2:]
        return placement.apply(images, fill)

    def covered(self, placement: Placement | None, size: Sequence[int]) -> Tensor | None:
        """What of a batch is to be learned from: `Placement.covered` of its images (or latents) of `size`.

        For `passes`; None where nothing was moved, or the border is learned as well.
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
        instances: Tensor | None = None,
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
            instances: [batch], bool; False for regularization images, which are trained on as ever. None counts all.
            ends_step: under gradient accumulation, whether the optimizer steps after this batch; up to there gamma
                stays what it is, and then the indicator is updated once with all the batches' samples.
            error_scale: [batch], what each sample's error has to be multiplied by to be an error of epsilon
                (`error_units.epsilon_error_scale`); the indicator measures that, unless `indicator_space` is "target".
                None measures the error as it is.
            mask: as `target`, or with 1 in place of any of its sizes but the first; what each element counts in your
                loss. Losses are means over what it covers, whatever its size; a sample without any is not measured.

        Raises:
            AptError: a mask of another shape.
        """
        augmented, self._augmented = self._augmented, None
        passes = self.passes(instances, None if augmented is None else self.covered(*augmented))
        passes.run(predict, predict_frozen)
        return passes.step(target, timesteps, ends_step=ends_step, error_scale=error_scale, mask=mask)

    def expect(self, numbers: Tensor, check: Callable[[list[float]], None]) -> None:
        """Have `check` called with `numbers`, [n], once their device has come to them, at the latest by `verify`."""
        self._deferred.expect(numbers, check)

    def passes(self, instances: Tensor | None = None, covered: Tensor | None = None) -> Passes:
        """The passes of one batch, for loops that know the target later, or run the model in lines of their own."""
        return Passes(self, instances, covered)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, in plain numbers; without the weights of `reference = "start"`."""
        return {"steps": self.steps, "indicator": self.indicator.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state of `state_dict`.

        Raises:
            AptError, KeyError, TypeError, ValueError: as `OverfittingIndicator.load_state_dict`.
        """
        steps = int(state["steps"])
        self.indicator.load_state_dict(state["indicator"])
        self.steps = steps

    def _step(
        self,
        passes: Passes,
        target: Tensor,
        timesteps: Tensor,
        *,
        ends_step: bool = True,
        error_scale: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> AptStep:
        self._deferred.look()
        tuned, frozen, covered = passes.check(target), passes.frozen_prediction, passes.covered
        if covered is not None:
            if len(covered) != len(target):
                raise AptError(
                    f"the last images that were augmented are {len(covered)}, the batch is {len(target)}: augment each "
                    "batch as a whole, right before its step"
                )
            covered = covered_at(covered, target.shape).to(target.device, non_blocking=True)
        batch, rows = len(timesteps), rows_of(passes.instances, timesteps.device)
        here = slice(None) if rows is None else rows
        count = batch if rows is None else len(rows)
        gammas, gaps = self.indicator.gammas, self.indicator.gaps
        self.steps += 1
        weight = self._weight(timesteps, here)
        values: dict[str, Tensor] = {}
        if frozen is not None:
            if covered is not None:
                mask = covered if mask is None else mask * covered
            losses = SampleLosses.of(tuned, frozen, target, mask, here)
            loss_tuned, loss_frozen, values = losses.tuned, losses.frozen, losses.means()
            if self._dco:
                weight[here] = dco_weight(losses.whole(loss_tuned), losses.whole(loss_frozen), self.config.dco_beta)
            if error_scale is not None and self.config.indicator_space != "target":
                squared = error_scale[here].square()
                loss_tuned, loss_frozen = squared * loss_tuned, squared * loss_frozen
            self.indicator.add(timesteps[here], loss_tuned, loss_frozen)
            self.reference.take_notice(values["delta_noise"])
        elif passes.due:  # Every rank takes part, also one whose batch has nothing that counts.
            nothing = torch.zeros(0, device=target.device)
            self.indicator.add(timesteps[:0], nothing, nothing)
        if ends_step:
            self.indicator.end_step()
        if count:
            values["loss_weight"] = weight[here].mean()
        # The terms are means over the samples that count; the trainer's loss is a mean over the whole batch.
        share = count / batch
        shares = dict.fromkeys(passes.terms, (self.config.frozen_every if passes.due else 0) * share)
        terms = passes.terms
        if count and (pairs := self._offset_pairs()):
            # Of the weights and not of a frozen pass, so that each batch has it.
            terms, shares = {**terms, "l_offset": self._weight_offset(pairs)}, {**shares, "l_offset": share}
        regularizer = torch.zeros((), device=target.device)
        if not self.config.monitor_only:
            regularizer = self._regularizer(terms, shares, regularizer)
        values.update({name: term.detach() for name, term in terms.items()})
        prediction = tuned if covered is None else scale_gradient(tuned, covered)
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

    def _regularizer(self, terms: dict[str, Tensor], shares: dict[str, float], nothing: Tensor) -> Tensor:
        """The terms by their lambdas, as they are added to a mean over the whole batch, each by its share in that."""
        dist, attn, joint = self.config.lambda_dist, self.config.lambda_attn, self.config.lambda_joint
        offset = self.config.offset_weight
        lambdas = {"l_mu": dist, "l_sigma": dist, "l_attn": attn, "l_joint": joint, "l_offset": offset}
        return sum((lambdas[name] * shares[name] * term.to(nothing.device) for name, term in terms.items()), nothing)

    def _offset_pairs(self) -> list[LowRank]:
        """The LoRA's pairs, whose offset is measured; none where it is not."""
        if not self.config.may_measure_offset:
            return []
        if self._pairs is None:
            try:
                self._pairs = lora_pairs(self.reference.modules, self.reference.named_trained())
            except AptError:
                if self.config.measures_offset:
                    raise
                self._pairs = []  # another kind of network, which is watched without
        return self._pairs

    def _weight_offset(self, pairs: list[LowRank]) -> Tensor:
        """How far the LoRA has gone from the reference (`weight_offset`)."""
        self.reference.keep_start()  # which a batch without a frozen pass may not have done, behind a loaded state
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.monitor_only):
            if self.reference.start is None:
                return weight_offset(pairs)
            first = self.reference.start.by_parameter()
            began = (LowRank(first.get(down, down), first.get(up, up), scale) for down, up, scale in pairs)
            return weight_offset([difference(now, then) for now, then in zip(pairs, began, strict=True)])

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
