"""A template: APT in a trainer of your own. Copy it, and put your trainer's calls in place of the parameters.

In the order of a step: `augment` once the timesteps are drawn, `predict` in place of the denoiser's call, `loss` of
your losses, `ended` when the batch is over; `close` at the end. Its tests are in `apt_hooks.training.adapter_contract`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from apt_hooks.config import AptConfig
from apt_hooks.errors import AptError
from apt_hooks.hooks.frozen import AdaptersOff
from apt_hooks.method.augmentation import Placement
from apt_hooks.method.error_units import epsilon_error_scale
from apt_hooks.training.objective import AptObjective
from apt_hooks.training.passes import Passes
from apt_hooks.training.run import AptRun
from apt_hooks.training.step import AptStep


class Adapter:
    """One run.

    Args:
        config: `AptConfig.from_toml(file)`, say.
        model: the denoiser, with its LoRA; `lora_off` makes a context in which the LoRA takes no part.
        trained: all that the optimizer trains, as `named_parameters` gives it.
        name: of the LoRA's files in `folder`; the log is written beside them. None writes no log (later ranks).
        predicts: "epsilon", "v_prediction" or "sample".
        alphas_cumprod: of the noise schedule, for models that predict something else than epsilon.
    """

    def __init__(
        self,
        config: AptConfig,
        model: nn.Module,
        lora_off: AdaptersOff,
        trained: list[tuple[str, nn.Parameter]],
        *,
        folder: Path,
        name: str | None,
        seed: int,
        rank: int = 0,
        predicts: str = "epsilon",
        alphas_cumprod: Tensor | None = None,
    ) -> None:
        objective = AptObjective(config, model, lora_off, trained=trained)
        log = None if name is None else folder / f"{name}-apt.jsonl"
        self.run = AptRun(
            objective, log_path=log, augment_space="image", seed=seed, rank=rank, trainer="mine 1.0", target=predicts
        )
        if self.run.indicator_units != predicts and alphas_cumprod is None:
            raise AptError(f"a model that predicts {predicts} needs alphas_cumprod, by which gamma is of epsilon")
        self._alphas_cumprod = alphas_cumprod
        self._instances: Tensor | None = None
        self._placement: Placement | None = None
        self._covered: Tensor | None = None
        self._passes: Passes | None = None
        self._step: AptStep | None = None
        print(self.run.start_line())

    def augment(self, images: Tensor, timesteps: Tensor, instances: Tensor | None = None) -> Tensor:
        """The images, black at -1, some of them zoomed out and rotated; call it before they are encoded.

        `instances`, [batch], bool, is False for class images, which are neither augmented nor measured nor aligned.
        """
        objective, self._instances = self.run.objective, instances
        self._placement = objective.draw_augmentation(timesteps, instances, self.run.generator())
        self._covered = objective.covered(self._placement, images.shape[-2:])
        return self._placement.apply(images, -1.0)

    def predict(self, call: Callable[[], Tensor]) -> Tensor:
        """The tuned model's prediction; `call` runs the denoiser."""
        self._passes = self.run.objective.passes(self._instances, self._covered)
        return self._passes.run(call)

    def loss(self, target: Tensor, timesteps: Tensor, per_sample: Callable[[Tensor], Tensor], **options: Any) -> Tensor:
        """The loss to differentiate; `per_sample` makes your loss of a prediction, one number a sample."""
        assert self._passes is not None  # `predict` comes first
        if self.run.indicator_units != self.run.target and self._alphas_cumprod is not None:
            options["error_scale"] = epsilon_error_scale(self.run.target, self._alphas_cumprod, timesteps)
        self._step = self._passes.step(target, timesteps, **options)
        return self._step.loss(per_sample(self._step.prediction))

    def ended(self, ends_step: bool = True) -> None:
        """The batch is over, and with it an optimizer step or not."""
        assert self._step is not None
        self.run.record(self._step, self._placement, ends_step=ends_step)
        self._instances = self._placement = self._covered = self._passes = self._step = None

    def close(self) -> None:
        """The training is over."""
        self.run.objective.verify()
        self.run.close()
