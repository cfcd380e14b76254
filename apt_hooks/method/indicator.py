"""The overfitting indicator: how much better than the frozen model the tuned one has become, per timestep bin."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import AptError
from .deferred_checks import DeferredChecks


def gamma_of_gap(gap: Tensor, scale: float) -> Tensor:
    """Gamma of gaps between both models' losses (APT, "Adaptive Training Adjustment"), 0 where the gap is NaN.

        gamma = clamp(1 - exp(-scale * gap), 0, 1)

    The paper prints no clamp; it is ours: a tuned model that is worse than the frozen one by 0.002 would give -6.4, a
    weight of 7.4.

    Args:
        gap: any shape, loss of the frozen model less that of the tuned one.
        scale: S of the equation.
    """
    return (-torch.expm1(-scale * gap)).nan_to_num(nan=0.0).clamp(0.0, 1.0)


def sigma_bins(num_bins: int) -> Callable[[Tensor], Tensor]:
    """`bin_of` for sigmas of flow matching, from 0 to 1: bins of equal width, 1 in the last.

    Ours: the paper has the whole timesteps of DDPM.
    """
    return lambda sigmas: torch.where(sigmas == 1, num_bins - 1, (sigmas * num_bins).floor())


class OverfittingIndicator:
    """Gamma per timestep bin, from moving averages of both models' losses (APT, "Adaptive Training Adjustment").

        gamma_b = clamp(1 - exp(-scale * (EMA_b[L_frozen] - EMA_b[L_tuned])), 0, 1)

    A bin never seen has gamma 0.

    Args:
        num_bins: bins of equal width over `0 .. num_train_timesteps - 1`.
        num_train_timesteps: T of the noise schedule.
        ema_alpha: smoothing factor; `ema <- (1 - alpha) * ema + alpha * value`, and a bin's first value initialises it.
        scale: S of the equation; T for SDXL, T / 10 for SD 2.1.
        bin_of: makes [batch] numbers of bins, from 0, of what the timesteps are ([batch], any dtype); `sigma_bins` for
            those of flow matching. None: bins of equal width over whole numbers.

    Raises:
        AptError: an argument out of range.
    """

    def __init__(
        self,
        num_bins: int = 10,
        num_train_timesteps: int = 1000,
        ema_alpha: float = 0.1,
        scale: float = 1000.0,
        *,
        bin_of: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if not 1 <= num_bins <= num_train_timesteps:
            raise AptError(f"num_bins must be from 1 to num_train_timesteps ({num_train_timesteps}); found {num_bins}")
        if not 0 < ema_alpha <= 1:
            raise AptError(f"ema_alpha must be above 0 and at most 1; found {ema_alpha}")
        if not scale > 0:
            raise AptError(f"scale must be above 0; found {scale}")
        self.num_bins = num_bins
        self.num_train_timesteps = num_train_timesteps
        self.ema_alpha = ema_alpha
        self.scale = scale
        self._bin_of = bin_of
        # One row per model (tuned, frozen), one column per bin; NaN marks a bin never seen.
        self._ema = torch.full((2, num_bins), float("nan"), dtype=torch.float64)
        self._deferred = DeferredChecks()
        # Of the step that has not ended: per bin the sums of both losses, and how many samples they are of.
        self._pending: Tensor | None = None

    def like(self, *, ema_alpha: float) -> OverfittingIndicator:
        """Another one of the same bins, which has seen nothing; with an alpha of 1 it has a step's own means."""
        return OverfittingIndicator(self.num_bins, self.num_train_timesteps, ema_alpha, self.scale, bin_of=self._bin_of)

    def update(self, timesteps: Tensor, loss_tuned: Tensor, loss_frozen: Tensor) -> None:
        """A step of one batch: `add` and `end_step`."""
        self.add(timesteps, loss_tuned, loss_frozen)
        self.end_step()

    @torch.no_grad()
    def add(self, timesteps: Tensor, loss_tuned: Tensor, loss_frozen: Tensor) -> None:
        """Take in one batch of a step; gamma stays what it is up to `end_step`.

        A sample with a loss that is not finite is left out: it would never leave the average again.

        Args:
            timesteps: [batch], whole numbers in `0 .. num_train_timesteps - 1`, or what `bin_of` takes.
            loss_tuned: [batch], mean squared error of the tuned model per sample, before any weighting.
            loss_frozen: [batch], the same of the frozen model with the same noisy input.

        Raises:
            AptError: shapes that differ, or timesteps that are no whole numbers in range; out of range on an
                accelerator they are left out, and the error comes from a later call or `verify`.
        """
        if not timesteps.shape == loss_tuned.shape == loss_frozen.shape:
            shapes = [tuple(x.shape) for x in (timesteps, loss_tuned, loss_frozen)]
            raise AptError(f"timesteps, loss_tuned and loss_frozen must have one shape [batch]; found {shapes}")
        bins = self._bins(timesteps)
        self._move_to(loss_tuned.device)
        losses = torch.stack([loss_tuned, loss_frozen]).detach().to(self._ema.dtype)
        finite = losses.isfinite().all(dim=0)
        # Sums over a membership matrix, not index_add: their order is fixed; and no matmul, which autocast would round.
        every = torch.arange(self.num_bins, device=losses.device)
        members = (bins.to(losses.device)[:, None] == every).to(losses.dtype) * finite[:, None]
        totals = torch.cat(
            [(torch.where(finite, losses, 0.0)[:, :, None] * members).sum(dim=1), members.sum(dim=0)[None]]
        )
        self._pending = totals if self._pending is None else self._pending.to(totals) + totals

    @torch.no_grad()
    def end_step(self, *, of_all_ranks: bool = True) -> None:
        """Move the averages by what was added since the last call: a bin's samples count as one update with their mean.

        Where a process group is up, the mean is over the samples of all its ranks. Every rank has to `add` in the same
        steps, if need be empty tensors: where nothing was added, this does nothing and no rank is asked.
        """
        totals, self._pending = self._pending, None
        if totals is None:
            return
        if of_all_ranks and torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(totals)
        mean, count = totals[:2] / totals[2], totals[2]
        moved = torch.where(self._ema.isnan(), mean, torch.lerp(self._ema, mean, self.ema_alpha))
        self._ema = torch.where(count > 0, moved, self._ema)

    @property
    def is_within_step(self) -> bool:
        """Whether batches were added to a step that has not ended."""
        return self._pending is not None

    @property
    def gaps(self) -> Tensor:
        """`EMA_b[L_frozen] - EMA_b[L_tuned]`, how far the tuned model is ahead: [num_bins]; NaN, a bin never seen."""
        tuned, frozen = self._ema
        return frozen - tuned

    @property
    def gammas(self) -> Tensor:
        """Gamma of each bin: [num_bins], from 0 to 1."""
        return gamma_of_gap(self.gaps, self.scale)

    def gamma(self, timesteps: Tensor) -> Tensor:
        """Gamma of each sample's bin: [batch], float32, on the device of `timesteps` ([batch]).

        Raises:
            AptError: timesteps that are no whole numbers in range.
        """
        bins = self._bins(timesteps)
        return self.gammas.to(timesteps.device, torch.float32)[bins.clamp(0, self.num_bins - 1)]

    def verify(self) -> None:
        """Check the timesteps that an accelerator was not waited for.

        Raises:
            AptError: some were out of range.
        """
        self._deferred.look(wait=True)

    def state_dict(self) -> dict[str, Any]:
        """The averages as plain numbers (None for a bin never seen), fit for JSON and for `torch.save`.

        Batches of a step that has not ended are not in them, as their gradients are in no trainer's state.
        """
        tuned, frozen = ([None if v != v else v for v in row] for row in self._ema.tolist())
        return {
            "num_bins": self.num_bins,
            "num_train_timesteps": self.num_train_timesteps,
            "loss_tuned": tuned,
            "loss_frozen": frozen,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the averages of `state_dict()`; `ema_alpha` and `scale` stay this indicator's own.

        A step that has not ended is dropped.

        Raises:
            AptError: the state has other bins or another schedule length.
            KeyError, TypeError, ValueError: it is no state of `state_dict`; the indicator is left as it was.
        """
        for name in ("num_bins", "num_train_timesteps"):
            if state.get(name) != getattr(self, name):
                raise AptError(
                    f"the saved indicator has {name} = {state.get(name)}, this run {getattr(self, name)}: "
                    "resume with the same value, or delete the saved state to start the indicator anew"
                )
        rows = [
            [float("nan") if v is None else float(v) for v in state[name]] for name in ("loss_tuned", "loss_frozen")
        ]
        if any(len(row) != self.num_bins for row in rows):
            raise ValueError(f"{[len(row) for row in rows]} averages for {self.num_bins} bins")
        self._ema = torch.tensor(rows, dtype=self._ema.dtype, device=self._ema.device)
        self._pending = None

    def _bins(self, timesteps: Tensor) -> Tensor:
        whole = not (timesteps.is_floating_point() or timesteps.is_complex())
        if timesteps.ndim != 1 or not (whole or self._bin_of):
            raise AptError(
                f"timesteps must be whole numbers of shape [batch]; found {timesteps.dtype} {tuple(timesteps.shape)}"
            )
        self._deferred.look()
        if self._bin_of is None:
            self._expect_range(timesteps, timesteps, self.num_train_timesteps)
            return timesteps.long() * self.num_bins // self.num_train_timesteps
        bins = self._bin_of(timesteps)
        self._expect_range(bins, timesteps, self.num_bins)
        return bins.long()

    def _expect_range(self, numbers: Tensor, timesteps: Tensor, end: int) -> None:
        """`numbers`, those of `timesteps`, are to lie in 0 .. end - 1."""

        def check(found: list[float]) -> None:
            least, greatest, low, high = found
            if not (least >= 0 and greatest < end):  # so that NaN is found too
                last = self.num_train_timesteps - 1
                rule = f"lie in 0 .. {last}" if self._bin_of is None else f"be in one of the {end} bins"
                raise AptError(
                    f"timesteps must {rule}; found {low:g} to {high:g}: is num_train_timesteps that of the noise "
                    "schedule?"
                )

        if timesteps.numel():
            # What is out of range counts nowhere: an accelerator's numbers are known only later.
            both = (*numbers.aminmax(), *timesteps.aminmax())
            self._deferred.expect(torch.stack([x.to(torch.float32) for x in both]), check)

    def _move_to(self, device: torch.device) -> None:
        if self._ema.device != device:
            dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
            self._ema = self._ema.to(dtype).to(device)
