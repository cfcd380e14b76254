"""Functions of the trainer that APT calls or answers for, found where the trainer's own methods look them up."""

from __future__ import annotations

import contextlib
import dis
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from apt_hooks.errors import AptError
from apt_hooks.method.error_units import FLOW, FlowLoss, epsilon_error_scale, per_sample
from apt_hooks.method.indicator import sigma_bins

from ..noise_options import tell_noise_options
from .checkout import FLOW_NOISING, MASKING, METHOD, NOISING, SAMPLER


class DiffusionNoising:
    """How a U-Net's trainer adds noise (DDPM): by whole timesteps, which are drawn by a function of their own.

    Its sampler is taken and replaced where the trainer looks it up: in the globals of the function that makes noisy
    latents, which is found from the trainer's method. Another module may re-export both; replaced there, it would do
    nothing.

    Args:
        trainer: its class, whose `get_noise_pred_and_target`, or that of a class below, makes noisy latents.
        augments: whether timesteps are to be drawn beforehand.

    Raises:
        AptError: they are, and no such function is called, or it calls no such sampler.
    """

    def __init__(self, trainer: type, *, augments: bool) -> None:
        noising = _called_by(trainer, METHOD, NOISING)
        self._globals: dict[str, Any] = {} if noising is None else noising.__globals__
        self._alphas_cumprod: Tensor | None = None
        if augments and SAMPLER not in self._globals:
            raise AptError(
                f"{trainer.__name__}.{METHOD}: looked for a call of {NOISING}(), which calls {SAMPLER}(), to augment "
                "by timestep; it is not there. Set [apt] augmentation = false"
            )

    def target(self, args: Any) -> str:
        """What the model predicts, for `AptRun`."""
        return "v_prediction" if args.v_parameterization else "epsilon"

    def bin_of(self, num_bins: int) -> None:
        """Bins are those of whole timesteps."""

    def noise(self) -> None:
        """It is the target, or part of it."""

    def tell_options(self, args: Any) -> None:
        """Say which options add noise that the base model does not know."""
        tell_noise_options(args)

    def draw(self, args: Any, noise_scheduler: Any, latents: Tensor, dtype: Any) -> Tensor:
        """Timesteps, [batch], in the range of the trainer's arguments; of `latents` shape and device alone count."""
        low = 0 if args.min_timestep is None else args.min_timestep
        high = noise_scheduler.config.num_train_timesteps if args.max_timestep is None else args.max_timestep
        timesteps: Tensor = self._globals[SAMPLER](low, high, len(latents), latents.device)
        return timesteps

    def spread(self, args: Any, noise_scheduler: Any, count: int, device: Any) -> Tensor | None:
        """So many timesteps, evenly over the range of the trainer's arguments; None where it has no such sampler."""
        if SAMPLER not in self._globals:
            return None
        low = 0 if args.min_timestep is None else args.min_timestep
        high = noise_scheduler.config.num_train_timesteps if args.max_timestep is None else args.max_timestep
        return (low + (torch.arange(count) + 0.5) * (high - low) / count).long().to(device)

    @contextlib.contextmanager
    def watched(self, noise_scheduler: Any, drawn: Tensor | None) -> Iterator[None]:
        """Inside, the trainer's sampler returns the timesteps that it was already asked for, if any."""
        self._alphas_cumprod = noise_scheduler.alphas_cumprod  # as `zero_terminal_snr` may have changed them
        if drawn is None:
            yield
            return
        sampler = self._globals[SAMPLER]
        self._globals[SAMPLER] = lambda *args, **kwargs: drawn
        try:
            yield
        finally:
            self._globals[SAMPLER] = sampler

    def times(self, timesteps: Tensor) -> Tensor:
        """What the indicator's bins are of, [batch]; `timesteps`: as the trainer's method returned them."""
        return timesteps

    def error_scale(self, predicted: str, times: Tensor, target: Tensor) -> Tensor | None:
        """[batch], what makes errors of `target` errors of epsilon, within `watched`."""
        assert self._alphas_cumprod is not None
        return epsilon_error_scale(predicted, self._alphas_cumprod, times)


class FlowNoising:
    """How a transformer's trainer adds noise (flow matching): by sigmas, which the function that adds it draws itself.

    It is called beforehand with a seed of its own, to learn the sigmas, and with that seed again when the trainer calls
    it: the same sigmas, however it draws them. Where nothing is drawn beforehand it only is listened to. It is replaced
    where the trainer's method looks it up.

    Args:
        names: among which the trainer's method looks that function up.
    """

    def __init__(self, names: dict[str, Any]) -> None:
        self._names = names
        self._plain: Any = names[FLOW_NOISING]
        self._signature = inspect.signature(self._plain)
        self._seed: int | None = None
        self._used: tuple[Tensor, Tensor, Tensor] | None = None
        self._loss = FlowLoss()

    def target(self, args: Any) -> str:
        """What the model predicts, for `AptRun`."""
        return FLOW

    def bin_of(self, num_bins: int) -> Callable[[Tensor], Tensor]:
        """Bins are those of sigmas."""
        return sigma_bins(num_bins)

    def noise(self) -> Tensor:
        """What the last call was given as noise, within `watched`."""
        return self._seen()[2]

    def tell_options(self, args: Any) -> None:
        """As for `DiffusionNoising`; of these options its function knows one at most."""
        if "ip_noise_gamma" in self._plain.__code__.co_names:
            tell_noise_options(args, ("ip_noise_gamma",))

    def draw(self, args: Any, noise_scheduler: Any, latents: Tensor, dtype: Any) -> Tensor:
        """Sigmas, [batch], as the trainer will draw them; of `latents` shape and device alone count."""
        known = {
            "args": args,
            "noise_scheduler": noise_scheduler,
            "latents": latents,
            "noise": torch.zeros_like(latents),
            "device": latents.device,
            "dtype": dtype,
        }
        seed = int(torch.randint(2**63 - 1, ()))
        with _seeded(seed, latents.device):
            *_, sigmas = self._plain(**{name: known[name] for name in self._signature.parameters})
        self._seed = seed
        return per_sample(sigmas)

    def spread(self, args: Any, noise_scheduler: Any, count: int, device: Any) -> None:
        """It draws sigmas itself, by the random stream."""

    @contextlib.contextmanager
    def watched(self, noise_scheduler: Any, drawn: Tensor | None) -> Iterator[None]:
        """Inside, the trainer's function is listened to, and draws what it drew beforehand, if anything."""
        seed = None if drawn is None else self._seed

        def listening(*args: Any, **kwargs: Any) -> Any:
            given = self._signature.bind(*args, **kwargs).arguments
            latents, noise = given["latents"], given["noise"]
            with contextlib.nullcontext() if seed is None else _seeded(seed, noise.device):
                made = self._plain(*args, **kwargs)
            self._used = made[-1], latents, noise
            return made

        self._names[FLOW_NOISING] = listening
        try:
            yield
        finally:
            self._names[FLOW_NOISING] = self._plain
            self._used = self._seed = None

    def times(self, timesteps: Tensor) -> Tensor:
        """What the indicator's bins are of, [batch]: the sigmas, which the trainer's timesteps may be rounded of."""
        return per_sample(self._seen()[0])

    def error_scale(self, predicted: str, times: Tensor, target: Tensor) -> Tensor:
        """[batch], what makes errors of `target` errors of epsilon, within `watched`.

        Args:
            target: of the whole batch, as it is without an option that puts anything else in its place.

        Raises:
            AptError: it is nothing of which that is known.
        """
        _, latents, noise = self._seen()
        return self._loss.error_scale(target, latents, noise, times)

    def _seen(self) -> tuple[Tensor, Tensor, Tensor]:
        if self._used is None:
            raise AptError(f"{METHOD} did not call {FLOW_NOISING}(), by which the sigmas are learned")
        return self._used


Noising = DiffusionNoising | FlowNoising


def noising_of(trainer: type, *, augments: bool) -> Noising:
    """How a trainer adds noise, by what its `get_noise_pred_and_target`, or that of a class below, calls.

    Raises:
        AptError: timesteps are to be drawn beforehand, and the trainer's way is none that is known.
    """
    names = _called_from(trainer, METHOD, FLOW_NOISING)
    return DiffusionNoising(trainer, augments=augments) if names is None else FlowNoising(names)


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, torch's random streams of the CPU and of a device begin at a seed; afterwards they are as they were."""
    others = [] if device.type == "cpu" else [device.index or 0]
    kind = {} if device.type == "cpu" else {"device_type": device.type}
    with torch.random.fork_rng(devices=others, **kind):
        torch.manual_seed(seed)
        yield


class LossMask:
    """The mask that the trainer's loss is multiplied by, as the trainer itself makes it.

    Args:
        trainer: its class, whose `process_batch`, or that of a class below, masks the loss.
    """

    def __init__(self, trainer: type) -> None:
        self._apply = _called_by(trainer, "process_batch", MASKING)

    def __call__(self, args: Any, batch: dict[str, Any], target: Tensor) -> Tensor | None:
        """The factor of each element of a loss of `target`'s shape; None where the trainer masks nothing.

        Raises:
            AptError: the trainer was told to mask, and what does it was not found.
        """
        if not getattr(args, "masked_loss", False) and batch.get("alpha_masks") is None:
            return None
        if self._apply is None:
            raise AptError(
                f"the loss is masked, and process_batch was looked for a call of {MASKING}(), by which the indicator "
                "is masked alike; it is not there. Leave masked_loss and alpha_mask out"
            )
        mask: Tensor = self._apply(torch.ones_like(target, dtype=torch.float32), batch)
        return mask


def _called_by(trainer: type, method: str, name: str) -> Any:
    """What a trainer's method, or that of a class below, calls by this name; None where none calls such."""
    found = _called_from(trainer, method, name)
    return None if found is None else found[name]


def _called_from(trainer: type, method: str, name: str) -> dict[str, Any] | None:
    """The names among which such a method finds what it calls by this name: its own globals or those of a module."""
    own = [inspect.unwrap(vars(kind)[method]) for kind in trainer.__mro__ if method in vars(kind)]
    return next((found for function in own if (found := _reached(function, name)) is not None), None)


def _reached(function: Any, name: str) -> dict[str, Any] | None:
    """Of two modules that have a function of this name, that whose own is called: read off the code itself."""
    waiting = [function.__code__]
    while waiting:
        code = waiting.pop()
        waiting += [inner for inner in code.co_consts if isinstance(inner, types.CodeType)]
        path: list[str] = []
        for instruction in dis.get_instructions(code):
            if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                path = [instruction.argval]
            elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD") and path:
                path.append(instruction.argval)
            elif instruction.opname not in ("CACHE", "PUSH_NULL", "NOP"):
                path = []
            if path and path[-1] == name and (found := _names_behind(path, function.__globals__)) is not None:
                return found
    return None


def _names_behind(path: list[str], names: dict[str, Any]) -> dict[str, Any] | None:
    """The names among which the last part of a dotted name is found."""
    for part in path[:-1]:
        try:
            names = vars(names[part])
        except (KeyError, TypeError):
            return None
    return names if path[-1] in names else None
