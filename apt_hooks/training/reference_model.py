"""The model that the tuned one is measured from: the base model, or what the training began from."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Literal

import torch
from torch import Tensor, nn

from ..hooks.frozen import AdaptersOff, frozen_base
from ..hooks.frozen_check import Watches
from ..hooks.starting_weights import Named, StartingWeights
from ..method.deferred_checks import DeferredChecks

logger = logging.getLogger("apt_hooks")


class Reference:
    """Makes frozen passes of one denoiser, and sees to it that they are frozen.

    Args:
        kind: the key `reference`.
        modules: the denoiser, and further modules whose adapters `adapters_off` switches.
        adapters_off, trained: as in `AptObjective`.
        deferred: where a device's numbers are looked at later.

    Attributes:
        start: what the training began from, with "start", from the first batch on.
        saved_start: to be set by whoever loads a state: what `start.named()` was when that was saved.
    """

    def __init__(
        self,
        kind: Literal["base", "start"],
        modules: Iterable[nn.Module],
        adapters_off: AdaptersOff,
        trained: Iterable[tuple[str, nn.Parameter]] | None,
        deferred: DeferredChecks,
    ) -> None:
        self.kind = kind
        self.modules = tuple(modules)
        self.adapters_off = adapters_off
        self.trained = None if trained is None else list(trained)
        self.start: StartingWeights | None = None
        self.saved_start: Named | None = None
        self._watches = Watches()
        self._compared = False
        self._deferred = deferred

    def keep_start(self) -> None:
        """With "start", take the weights of now for those of the start, unless a state has them.

        The first batch does it; to be called before where weights change without one.

        Raises:
            AptError: nothing is known to be trained, or the state was of another LoRA.
        """
        if self.kind == "start" and (self.start is None or self.saved_start is not None):
            self.start, self.saved_start = StartingWeights(self.named_trained(), self.saved_start), None

    def named_trained(self) -> list[tuple[str, nn.Parameter]]:
        """(name, parameter) of all that is trained: what was told, or whatever of the modules requires a gradient."""
        if self.trained is not None:
            return self.trained
        named = (item for module in self.modules for item in module.named_parameters())
        return [(name, p) for name, p in named if p.requires_grad]

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Inside, the modules compute as the reference does (`frozen_base`)."""
        self.keep_start()
        exchanged = None if self.start is None else self.start.weights
        watch = self._watches.of_frozen_pass(self.modules, self.trained, exchanged)
        with self.apart(frozen=True), watch:
            yield

    def apart(self, *, frozen: bool) -> AbstractContextManager[None]:
        """Inside, outside of any step, the modules compute in evaluation mode, as the reference does or as trained."""
        if not frozen:
            return frozen_base(self.modules, contextlib.nullcontext)
        self.keep_start()
        return frozen_base(self.modules, self.adapters_off if self.start is None else self.start.exchanged)

    def tuned(self) -> AbstractContextManager[object]:
        """What the pass behind a frozen one has to run in."""
        return self._watches.of_tuned_pass(self.modules, self.trained)

    def judge(self, tuned: Tensor, frozen: Tensor) -> None:
        """Look where both predictions came from.

        Raises:
            AptError: the frozen pass was not the reference's, or both passes were.
        """
        self._watches.judge(tuned, frozen)

    def take_notice(self, delta_noise: Tensor) -> None:
        """Watch the next step's passes if these agreed to the last bit though the weights have moved."""
        if self._watches.trained_since_the_first():
            self._deferred.expect(delta_noise[None], self._watches.take_notice)

    def awaits_comparison(self, step: int) -> bool:
        """Whether it is still to be seen that the model of the first step is the base model."""
        return self.kind == "base" and step == 0 and not self._compared

    def compare(self, own: Tensor, base: Tensor) -> None:
        """Say if these predictions of the first step, of one conditioning, are not the same."""
        self._compared = True
        own, base = own.detach().float(), base.float()
        self._deferred.expect(torch.stack([(own - base).square().mean(), base.square().mean()]), _tell_start)

    def compare_alike(self, predict_frozen: Callable[[], Tensor], base: Tensor) -> None:
        """`compare` where the base model had conditioning of its own: with a pass of the LoRA's model on the same."""
        with frozen_base(self.modules, contextlib.nullcontext):
            self.compare(predict_frozen(), base)


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
