"""What the drifts of a checkpoint are measured with: the denoiser's own call, on fixed noise and with other prompts.

first steps   the script calls its denoiser        what it is given is kept for one sample: where latents, timestep
                                                   and text are in it, and all the rest as it is
a checkpoint  text: as it was encoded before the   noise: fixed, at fixed timesteps, so that the denoiser's
              training, or by the step's lines     predictions can be compared
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from apt_hooks.errors import AptError
from apt_hooks.hooks.call_structure import batch_axes, first_tensor, is_samples, mapped, prediction_of
from apt_hooks.method.error_units import per_sample
from apt_hooks.training.checkpoint_drifts import NEUTRAL, SAMPLES, fixed_noise

from .probe_prompts import Parts, ProbePrompts, in_a_line

Place = tuple[Any, ...]
"""Where something stands in the arguments of a call: keys and indices, from outside in."""

_TIMES = ((1.0, 0.0), (1000.0, 0.0), (-1.0, 1.0), (-1000.0, 1000.0))
"""What a timestep may be by the noise's share: a factor of it, and what is added; the last two are the picture's."""

_LOOKS = 500
"""Steps in which text that was encoded before the training is looked for."""


@dataclasses.dataclass(frozen=True)
class _Piece:
    """A piece of what a prompt came to, and where it belongs.

    Attributes:
        place: in the call.
        part: its number in `Parts`.
        axis, row: of it, where it has a batch; None: it has none.
    """

    place: Place
    part: int
    axis: int | None
    row: int

    def of(self, parts: Parts, like: Tensor) -> Tensor | None:
        found = parts[min(self.part, len(parts) - 1)]  # of a list of samples each is this prompt's
        if found is not None and self.axis is not None:
            found = found.narrow(self.axis, min(self.row, found.shape[self.axis] - 1), 1)
        return None if found is None else found.to(like.device, like.dtype if found.is_floating_point() else None)


@dataclasses.dataclass
class _Call:
    """A call of the denoiser with one sample, without its latents and its text's values.

    Attributes:
        given: its arguments, a tuple of positional ones and a dict.
        latents, time: where these are.
        empty: [..., 1], bool, where no latents are in a sequence, but text.
        counted: [..., 1], bool, where a prediction is one of the latents, and not of a reference picture's.
        scale: of `_TIMES`; None: the timestep is the schedule's.
        text: what was encoded before the training; None: text comes from the step's own lines.
        autocast: what the script calls it within.
    """

    given: tuple[tuple[Any, ...], dict[str, Any]]
    latents: Place
    time: Place
    empty: Tensor
    counted: Tensor
    scale: tuple[float, float] | None
    text: list[_Piece] | None
    autocast: tuple[str, bool, torch.dtype]


class StepProbe:
    """As `training.checkpoint_drifts.Probe`, of a script's denoiser.

    Noise stands in the pictures' place too, as what the LoRA makes of the training's own pictures is no matter of the
    class; so it does in a reference picture's. What else a call tells, such as SDXL's sizes, is that of the run's first
    sample.

    Args:
        denoiser: without what several processes wrap it in.
        schedule: what adds the noise; None: it is mixed in.
        prompts: what encodes them.
        trained: whether text encoders are trained, so that a prompt has to be encoded anew at each checkpoint.
        wrapped: all models that the accelerator has prepared.
    """

    def __init__(
        self, denoiser: nn.Module, schedule: Any, prompts: ProbePrompts, *, trained: bool, wrapped: Sequence[Any] = ()
    ) -> None:
        self._denoiser, self._schedule, self._prompts, self._trained = denoiser, schedule, prompts, trained
        self._wrapped = list(wrapped)
        self._texts_kept: dict[tuple[str, ...], dict[str, dict[Place, Tensor | None]]] = {}
        self._call: _Call | None = None
        self._step: Callable[[], Any] = _no_step
        self._share: Tensor | None = None
        self._size = self._looks = 0
        self._unknown = "a LoRA is saved before the first batch, so nothing was there to measure it with"
        self._hook: Any = denoiser.register_forward_pre_hook(self._look, with_kwargs=True, prepend=True)

    def begin_step(self, step: Callable[[], Any], timesteps: Tensor, latents: Tensor) -> None:
        """A step's lines that encode its text and call the denoiser, to be run again.

        Args:
            timesteps: where noise is mixed in its share.
            latents: [batch, ...], clean.
        """
        self._step, self._share, self._size = step, timesteps, latents[0].numel()

    def close(self) -> None:
        """Take the hook off, and forget the step."""
        if self._hook is not None:
            self._hook.remove()
        self._hook = self._share = None
        self._step = _no_step

    # -- as `Probe` ----------------------------------------------------------------------------------------------------

    def predict(self, prompts: Sequence[str]) -> Tensor:
        """The denoiser's prediction, one sample after the other: [samples, ...]."""
        with _in_one_line():
            call = self._known()
            texts = self._texts(call, list(dict.fromkeys(prompts)))
            latents, times = self._inputs(call)
            found = []
            for row, prompt in enumerate(prompts):
                given = _replaced(call.given, {**texts[prompt], call.latents: latents[row], call.time: times[row]})
                device, enabled, dtype = call.autocast
                with torch.autocast(device, dtype, enabled=enabled):
                    prediction = prediction_of(self._denoiser(*given[0], **given[1]))
                found.append(_of_latents(prediction, call.counted).detach().float().cpu())
            return torch.stack(found)

    def embed(self, texts: Sequence[str]) -> Tensor | None:
        """What the trained text encoders make of texts, [texts, ...]; None where none is trained."""
        if not self._trained:
            return None
        with _in_one_line():
            call = self._known()
            of_texts = self._texts(call, list(texts))
            rows = [[t for t in of_texts[text].values() if t is not None and t.is_floating_point()] for text in texts]
            return torch.stack([torch.cat([t.flatten().float() for t in row]) for row in rows])

    def _known(self) -> _Call:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        if self._call is None:
            raise AptError(self._unknown)
        self._prompts.forget_own()
        return self._call

    # -- what the first steps show -------------------------------------------------------------------------------------

    def _look(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take notice of a call in training, until all is known about it."""
        if self._share is None or not torch.is_grad_enabled():  # a pass of the base model, or sample pictures
            return
        try:
            with torch.no_grad(), _in_one_line():
                call = self._understood(denoiser, args, kwargs)
        except AptError as error:
            self._unknown, call = f"what the denoiser is given is not understood: {error}", None
        if call is None:
            return
        self._call, self._looks = call, self._looks + 1
        if call.text is not None or self._trained or not self._prompts.own or self._looks == _LOOKS:
            self._hook.remove()
            self._hook = None
            self._prompts.forget_own()

    def _understood(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call | None:
        samples = first_tensor(args, kwargs)
        if samples is None:
            self._unknown = "the denoiser is given no tensor"
            return None
        batch = len(samples)
        one = _first_sample((args, kwargs), batch)
        names = list(inspect.signature(type(denoiser).forward).parameters)[1:]
        tensors = dict(sorted(_tensors(one), key=lambda found: _order(found[0], names)))
        latents = next((place for place, t in tensors.items() if t.is_floating_point() and t.ndim > 2), None)
        time = None if latents is None else self._time(names, tensors, latents)
        if latents is None or time is None:
            self._unknown = "which of the denoiser's arguments are its latents and its timestep is not known"
            return None
        place, scale = time
        held = {place: None, latents: None}
        text = None if self._trained else self._text({p: t for p, t in tensors.items() if p not in held})
        empty, counted = self._of_sequence(tensors[latents])
        kind = samples.device.type
        taken = {p: t.detach().clone() for p, t in tensors.items() if p not in held}
        # Of one element: its value is nobody's, its kind is.
        kinds = {latents: tensors[latents].new_zeros(1).expand(tensors[latents].shape), place: tensors[place].clone()}
        given = _replaced(one, {**taken, **kinds})
        autocast = kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        return _Call(given, latents, place, empty, counted, scale, text, autocast)

    def _of_sequence(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """`_Call.empty` and `_Call.counted`; behind the latents of a sequence a reference picture's may stand."""
        empty = (latents == 0).all(dim=-1, keepdim=True)
        if latents.ndim != 3:  # the last axis is no channels'
            return torch.zeros_like(empty), torch.ones_like(empty)
        tokens, rest = divmod(self._size, latents.shape[-1])
        counted = ~empty
        return empty, counted if rest else counted & (counted.cumsum(dim=1) <= tokens)

    def _time(
        self, names: Sequence[str], tensors: dict[Place, Tensor], latents: Place
    ) -> tuple[Place, tuple[float, float] | None] | None:
        """Where the timestep is, and how it is made of the noise's share; None where that cannot be told yet."""
        assert self._share is not None
        small = [place for place, t in tensors.items() if t.numel() == 1 and place != latents]
        named = [place for place in small if "time" in _name(place, names) or _name(place, names) == "t"]
        for place in named or small:
            value = float(tensors[place])
            if self._schedule is not None:
                if value == float(self._share.reshape(-1)[0]):
                    return place, None
                continue
            share = float(per_sample(self._share)[0])
            # Within what bfloat16 rounds.
            fitting = [(a, b) for a, b in _TIMES if abs(a * share + b - value) <= 0.008 * max(abs(a), 1.0)]
            if len(fitting) == 1:
                return place, fitting[0]
        return None

    def _text(self, tensors: dict[Place, Tensor]) -> list[_Piece] | None:
        """Where text that was encoded before the training is; None where it is nowhere."""
        rows = {place: tensor.cpu() for place, tensor in tensors.items() if tensor.numel() > 1}
        for own in self._prompts.own:
            pieces = [piece for place, tensor in rows.items() if (piece := _found(place, tensor, own)) is not None]
            if any(rows[piece.place].is_floating_point() for piece in pieces):
                return pieces
        return None

    # -- what is asked -------------------------------------------------------------------------------------------------

    def _texts(self, call: _Call, prompts: Sequence[str]) -> dict[str, dict[Place, Tensor | None]]:
        """Of each prompt, what is to be put into the call; encoded once a run where text encoders are frozen."""
        like = dict(_tensors(call.given))
        if call.text is not None:
            encoded = self._prompts.encoded
            return {
                prompt: {piece.place: piece.of(encoded[prompt], like[piece.place]) for piece in call.text}
                for prompt in prompts
            }
        kept = self._texts_kept.get(tuple(prompts))
        if kept is None:
            kept = self._texts_of_step(call, prompts)
            if not self._trained:
                self._texts_kept[tuple(prompts)] = _on(torch.device("cpu"), kept)
        return _on(like[call.latents].device, kept)

    def _texts_of_step(self, call: _Call, prompts: Sequence[str]) -> dict[str, dict[Place, Tensor | None]]:
        """The same, by the step's own lines."""
        first = dict(_tensors(self._asked(None)))
        # Of three it is seen where the text goes.
        calls = {prompt: dict(_tensors(self._asked(prompt))) for prompt in dict.fromkeys([*prompts, "", *NEUTRAL[:2]])}
        differing = [
            place
            for place, t in first.items()
            if place not in (call.latents, call.time)
            and any(not _same(t, other.get(place)) for other in calls.values())
        ]
        if not differing:
            raise AptError("the denoiser is given the same whatever the prompt is")
        return {prompt: {place: calls[prompt].get(place) for place in differing} for prompt in prompts}

    def _asked(self, prompt: str | None) -> Any:
        """What the denoiser is given by the step's own lines, for the first sample; without a prompt while learning."""
        found: list[Any] = []

        def take(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            samples = first_tensor(args, kwargs)
            found.append(_first_sample((args, kwargs), 1 if samples is None else len(samples)))
            raise _EnoughError

        handle = self._denoiser.register_forward_pre_hook(take, with_kwargs=True, prepend=True)
        try:
            asking = self._prompts.learning() if prompt is None else self._prompts.asking(prompt)
            with asking, _without_buffers_sent(self._wrapped), contextlib.suppress(_EnoughError):
                self._step()
        finally:
            handle.remove()
        if not found or not self._prompts.ran:
            raise AptError(
                self._prompts.refused
                or "no text encoder runs in a step, and of the first texts that were encoded before the training none "
                "was met there so far"
            )
        return found[0]

    def _inputs(self, call: _Call) -> tuple[list[Tensor], list[Tensor]]:
        """Noisy latents and timesteps, of each sample."""
        kinds = dict(_tensors(call.given))
        like, time = kinds[call.latents], kinds[call.time]
        # Where the training adds noise: a schedule takes its table along.
        pictures, noise = (fixed_noise(like.shape, number).to(like.device) for number in range(2))
        shares = (torch.arange(SAMPLES, device=like.device) + 0.5) / SAMPLES
        if call.scale is None:
            times = (shares * self._schedule.config.num_train_timesteps).long()
            noisy = self._schedule.add_noise(pictures, noise, times)
        else:
            times = shares * call.scale[0] + call.scale[1]
            along = shares.view(-1, *[1] * like.ndim)
            noisy = (1 - along) * pictures + along * noise
        noisy = noisy.to(like.dtype).masked_fill(call.empty[None], 0.0)
        return list(noisy), [moment.to(time.device, time.dtype).view(time.shape) for moment in times]


class _EnoughError(Exception):
    """What was asked of a step's lines is known."""


def _no_step() -> None:
    """Before the first step, and behind the last."""


@contextlib.contextmanager
def _in_one_line() -> Iterator[None]:
    """A training is worth more than what is measured of it: what a model makes of a call that was put together is no
    reason to end it, but one to measure no more.

    Raises:
        AptError: for any error but that memory is out.
    """
    try:
        yield
    except (AptError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise AptError(in_a_line(error)) from error


@contextlib.contextmanager
def _without_buffers_sent(models: Sequence[Any]) -> Iterator[None]:
    """Inside, models of several processes do not wait for the others, which measure nothing."""
    sending = [model for model in models if getattr(model, "broadcast_buffers", False)]
    waits = [model.require_forward_param_sync for model in sending]
    try:
        for model in sending:
            model.broadcast_buffers = False
        yield
    finally:
        for model, wait in zip(sending, waits, strict=True):
            model.broadcast_buffers, model.require_forward_param_sync = True, wait


# -- arguments by their places -----------------------------------------------------------------------------------------


def _first_sample(given: Any, batch: int) -> Any:
    """The arguments with the first sample alone; rows of a batch are told by its length."""
    if isinstance(given, Tensor):
        axes = batch_axes(given, batch)
        return given.narrow(axes[0], 0, 1) if axes else given
    if is_samples(given, batch):
        return given[:1]
    if isinstance(given, list) and batch > 1 and len(given) == batch and not dict(_tensors(given)):
        return given[:1]  # such as Qwen-Image's sizes
    return mapped(given, lambda part: _first_sample(part, batch))


def _tensors(given: Any, place: Place = ()) -> Iterator[tuple[Place, Tensor]]:
    """All tensors, with their places."""
    if isinstance(given, Tensor):
        yield place, given
    elif isinstance(given, (dict, list, tuple)):
        for key, part in given.items() if isinstance(given, dict) else enumerate(given):
            yield from _tensors(part, (*place, key))


def _replaced(given: Any, new: dict[Place, Any], place: Place = ()) -> Any:
    """The same with other things at some places."""
    if place in new:
        return new[place]
    if isinstance(given, dict):
        return type(given)(**{key: _replaced(part, new, (*place, key)) for key, part in given.items()})
    if not isinstance(given, (list, tuple)):
        return given
    parts = [_replaced(part, new, (*place, index)) for index, part in enumerate(given)]
    return type(given)(*parts) if hasattr(given, "_fields") else type(given)(parts)


def _name(place: Place, names: Sequence[str]) -> str:
    """Of the argument that something stands in, or is."""
    outer, inner = place[0], place[1]
    if outer == 0:
        return names[inner] if inner < len(names) else ""
    return str(inner) if len(place) == 2 else ""


def _order(place: Place, names: Sequence[str]) -> int:
    """Where an argument stands among the parameters of a model, of which the latents are the first."""
    outer, name = place[:2]
    return name if outer == 0 else names.index(name) if name in names else len(names)


def _found(place: Place, given: Tensor, own: Parts) -> _Piece | None:
    """The piece of an encoding that an argument is, of one sample."""
    for number, part in enumerate(own):
        if part is None or part.is_floating_point() != given.is_floating_point() or part.ndim != given.ndim:
            continue
        if part.shape == given.shape and torch.equal(part.to(given.dtype), given):
            return _Piece(place, number, None, 0)
        for axis in batch_axes(given, 1):
            rows = part.movedim(axis, 0)
            sample = given.movedim(axis, 0)[0]
            if rows.shape[1:] == sample.shape:
                same = [row for row in range(len(rows)) if torch.equal(rows[row].to(sample.dtype), sample)]
                if same:
                    return _Piece(place, number, axis, same[0])
    return None


def _on(device: torch.device, texts: dict[str, dict[Place, Tensor | None]]) -> dict[str, dict[Place, Tensor | None]]:
    return {
        prompt: {place: None if tensor is None else tensor.to(device) for place, tensor in of.items()}
        for prompt, of in texts.items()
    }


def _same(one: Tensor, other: Tensor | None) -> bool:
    return other is not None and one.shape == other.shape and torch.equal(one, other)


def _of_latents(prediction: Tensor, counted: Tensor) -> Tensor:
    """Without what is predicted elsewhere in a sequence."""
    return prediction if prediction.shape[:-1] != counted.shape[:-1] else prediction.masked_fill(~counted, 0.0)
