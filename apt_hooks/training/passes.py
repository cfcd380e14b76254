"""The two passes of one batch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from ..config import AptConfig
from ..errors import AptError
from ..hooks.capture import FeatureCapture, Features
from ..hooks.frozen_rows import Counted, FrozenRows
from ..hooks.gradients import ObservedPass
from .reference_model import Reference
from .regularizers import Regularizers, Weights, frozen_reduction
from .step import AptStep


class Objective(Protocol):
    """What the passes need of an `AptObjective`."""

    config: AptConfig
    reference: Reference
    capture: FeatureCapture | None
    frozen_rows: FrozenRows
    steps: int

    @property
    def _step(self) -> Callable[..., AptStep]: ...


class Passes:
    """Both passes of one batch and what is made of them; for adapters, in place of `AptObjective.step`.

    Where the passes can be called, `prediction = passes.run(predict)`. In a script's own lines:

        if passes.due:
            with passes.frozen():
                frozen = unet(noisy, ...)
            passes.begin_tuned(frozen)  # `give_up` where the pass behind it breaks off
        prediction = passes.end_tuned(unet(noisy, ...))

    Then, with the target, `step = passes.step(target, timesteps)`; the loss is to be taken of `step.prediction`.

    Args:
        instances: [batch], bool; False for regularization images, which are trained on as ever. None counts all.
        covered: [batch, 1, height, width] of the images or of the latents, what of each sample to learn from
            (`AptObjective.covered`). The rest has no part in losses, indicator and channel statistics, and
            `AptStep.prediction` no gradient there. None: all.

    Attributes:
        due: whether this batch has a frozen pass; in others no term that compares the models acts.
        tuned_prediction, frozen_prediction: [batch, ...]; the latter None without a frozen pass.
        terms: `l_mu`, `l_sigma`, `l_attn`, `l_joint`, those that are on; scalars that reach the LoRA.
    """

    def __init__(self, objective: Objective, instances: Tensor | None = None, covered: Tensor | None = None) -> None:
        self._objective = objective
        self.instances, self.covered = instances, covered
        self._weights = None if covered is None else Weights(covered)
        self.due = objective.steps % objective.config.frozen_every == 0
        self.tuned_prediction: Tensor | None = None
        self.frozen_prediction: Tensor | None = None
        self.terms: dict[str, Tensor] = {}
        self._features: Features | None = None
        self._compared: tuple[Regularizers, ObservedPass] | None = None
        self._tuned = contextlib.ExitStack()
        self._over = False

    def run(
        self,
        predict: Callable[[], Tensor],
        predict_frozen: Callable[[], Tensor] | None = None,
        *,
        same_conditioning: bool = False,
    ) -> Tensor:
        """Both passes; the tuned model's prediction.

        Args:
            predict, predict_frozen: as in `AptObjective.step`.
            same_conditioning: `predict_frozen` is a way of its own to the same, and not of another conditioning.
        """
        other = predict_frozen is not None and not same_conditioning
        reference, step = self._objective.reference, self._objective.steps
        reference.keep_start()
        if not self.due or not (self._counts or reference.awaits_comparison(step)):
            return self.end_tuned(predict())
        with self.frozen():
            frozen = (predict_frozen or predict)()
        if predict_frozen is not None and other and reference.awaits_comparison(step):
            # With other conditioning predictions differ for another reason too.
            reference.compare_alike(predict_frozen, frozen)
        if not self._counts:
            self._features = None
            tuned = self.end_tuned(predict())
            if reference.awaits_comparison(step):
                reference.compare(tuned, frozen)
            return tuned
        with self.begin_tuned(frozen):
            tuned = predict()
        return self.end_tuned(tuned)

    @property
    def _counts(self) -> bool:
        """Whether any sample does."""
        return self.instances is None or bool(self.instances.any())

    @contextlib.contextmanager
    def frozen(self, counted: Counted | None = None) -> Iterator[None]:
        """Inside, the model is the reference, and is read.

        Args:
            counted: tells of the model's first argument which samples count, as `instances`, so that the others need
                no pass (`FrozenRows`); their prediction is 0. None: the pass is of all.
        """
        objective, rows = self._objective, self._objective.frozen_rows
        if not self.due:
            raise AptError(f"no frozen pass is due in this batch (frozen_every = {objective.config.frozen_every})")
        with objective.reference.frozen(), contextlib.ExitStack() as stack:
            # The first step's predictions are compared with the tuned model's, all of them.
            if counted is not None and not objective.reference.awaits_comparison(objective.steps):
                stack.enter_context(rows.passes_of(objective.reference.modules[0], counted))
            if objective.capture is not None:
                config = objective.config
                reduce = frozen_reduction(config.regularizer, config.attention_impl, self._weights, rows)
                self._features = stack.enter_context(objective.capture.record(reduce))
            yield
            if self._features is not None:
                self._features.masks = {i: rows.restored(mask) for i, mask in self._features.masks.items()}

    def begin_tuned(self, frozen_prediction: Tensor) -> contextlib.ExitStack:
        """From here on, up to `end_tuned`, the pass is the one that is differentiated, and is compared.

        Returns:
            A context manager that ends the comparison, also where the pass is broken off.
        """
        objective, features = self._objective, self._features
        if objective.capture is not None and features is None:
            raise AptError("the base model's pass did not run within `frozen()`, so there is nothing to compare with")
        self.frozen_prediction, self._features = frozen_prediction, None
        with contextlib.ExitStack() as stack:
            stack.enter_context(objective.reference.tuned())
            if objective.capture is not None and features is not None:
                config = objective.config
                regularizers = Regularizers(
                    features,
                    objective.capture.layers,
                    len(objective.capture.hidden),
                    regularizer=config.regularizer,
                    rows=rows_of(self.instances),
                    weights=self._weights,
                    impl=config.attention_impl,
                    differentiable=torch.is_grad_enabled() and not config.monitor_only,
                )
                observed = stack.enter_context(objective.capture.regularize(regularizers.observe))
                self._compared = regularizers, observed
            self._tuned = stack.pop_all()
        return self._tuned

    def end_observation(self) -> None:
        """End the comparison of a tuned pass that has come through the whole model, where more follows it.

        Raises:
            AptError: as `end_tuned`, which is still to be called.
        """
        self._tuned.close()

    def end_tuned(self, prediction: Tensor) -> Tensor:
        """The prediction to go on with.

        Raises:
            AptError: the frozen pass was not the reference's, or both passes were; or the pass did not come through all
                places.
        """
        self._tuned.close()
        objective, reference = self._objective, self._objective.reference
        if self.frozen_prediction is not None:
            reference.judge(prediction, self.frozen_prediction)
            if reference.awaits_comparison(objective.steps):
                reference.compare(prediction, self.frozen_prediction)
            if objective.capture is not None and self._compared is not None:
                regularizers, observed = self._compared
                prediction, self.terms = objective.capture.connect(prediction, observed, regularizers.values())
        self._compared = None
        self.tuned_prediction = prediction
        return prediction

    def give_up(self) -> None:
        """End a tuned pass that was broken off, as by one that ran out of memory."""
        self._tuned.__exit__(RuntimeError, RuntimeError("the step was broken off"), None)
        self._compared = self._features = None

    def step(self, target: Tensor, timesteps: Tensor, **options: Any) -> AptStep:
        """Losses, indicator and terms; takes the batch into the indicator. Options as in `AptObjective.step`.

        Raises:
            AptError: predictions and target differ in shape, or timesteps are none of the schedule's. What only a
                device's numbers show is told by a later step or `AptObjective.verify`.
        """
        if self._over:
            raise AptError("step() was called twice for one batch; take new passes for each")
        if self.due and self._counts and self.tuned_prediction is not None and self.frozen_prediction is None:
            raise AptError("the base model's pass, which is due in this batch, did not run before step()")
        step = self._objective._step(self, target, timesteps, **options)
        self._over = True
        return step

    def check(self, target: Tensor) -> Tensor:
        """The tuned prediction, if all that there is has the target's shape."""
        # A target of [batch, 1, height, width] would broadcast to another loss without a word.
        for name, prediction in (("tuned", self.tuned_prediction), ("frozen", self.frozen_prediction)):
            if prediction is not None and prediction.shape != target.shape:
                raise AptError(
                    f"prediction and target must have one shape; found {tuple(prediction.shape)} of the {name} model "
                    f"for a target of {tuple(target.shape)}: hand over what the trainer takes its loss of"
                )
        if self.tuned_prediction is None:
            raise AptError("step() before the passes have ended; call run() or end_tuned() first")
        return self.tuned_prediction


def rows_of(instances: Tensor | None, device: torch.device | None = None) -> Tensor | None:
    """The samples that count, None where all do; found on the CPU, so that no device is waited for."""
    instances = None if instances is None else instances.cpu()
    return (
        None
        if instances is None or bool(instances.all())
        else torch.nonzero(instances).flatten().to(device, non_blocking=True)
    )
