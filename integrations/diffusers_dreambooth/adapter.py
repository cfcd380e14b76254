"""What the inserted lines of a DreamBooth-LoRA script call, in the order of a training step."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import importlib.metadata
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apt_hooks.config import AptConfig
from apt_hooks.errors import AptError, errors_in_one_line
from apt_hooks.hooks.architectures import preset_of
from apt_hooks.hooks.call_structure import prediction_of
from apt_hooks.hooks.frozen import frozen_base
from apt_hooks.method.augmentation import Placement, color_of
from apt_hooks.method.error_units import FLOW, FlowLoss, epsilon_error_scale, per_sample
from apt_hooks.method.indicator import sigma_bins
from apt_hooks.training.checkpoint_drifts import asked_prompts
from apt_hooks.training.objective import AptObjective
from apt_hooks.training.passes import Passes
from apt_hooks.training.run import AptRun
from apt_hooks.training.step import AptStep

from ..accelerate_state import attach
from ..class_captions import ClassCaptions
from ..noise_options import tell_noise_options
from ..peft import adapters_off, check_active, dropout
from .class_word import ClassWords
from .measured_saves import WEIGHTS, MeasuredSaves
from .probe_prompts import ProbePrompts

logger = logging.getLogger("apt_hooks")

_NO_FROZEN_PASS = "the base model's pass did not run before the U-Net's call; patch the script again"
_NOT_MOVED = (
    "noise was not added in this step where it was found when the script was patched, so images could "
    "not be augmented; patch the script again, or set [apt] augmentation = false"
)


def start(
    args: argparse.Namespace,
    accelerator: Any,
    unet: nn.Module,
    noise_scheduler: Any,
    *,
    masked: str | None = None,
    unmoved: str | None = None,
    black: BlackLatents | None = None,
    prompts: ProbePrompts | None = None,
    textless: bool = False,
) -> DreamBoothRun | None:
    """The run for `--apt_config` or `--apt_preset`; None where the configuration has `enabled = false`.

    To be called once the accelerator has prepared the models and before it loads a checkpoint. Ends the program with
    one line where the configuration or the script's arguments rule APT out.

    Args:
        unet: the denoiser.
        noise_scheduler: what adds the noise; None: it is mixed in, as in flow matching.
        masked: the line by which the script's loss takes in something else of the batch, such as a mask.
        unmoved: why the images cannot be augmented.
        black: what has seen the latents being cached.
        prompts: what encodes other prompts, for the drifts of checkpoints.
        textless: a step encodes no text.
    """
    with errors_in_one_line():
        config = _config(args)
        if not config.enabled:
            logger.info("apt-hooks: [apt] enabled = false, training without APT")
            return None
        _check(args, config, accelerator, unet)
        if masked is not None:
            _check_mask(masked, config)
        if unmoved is not None and config.augmentation and not config.monitor_only:
            raise AptError(f"this script's images cannot be augmented: {unmoved}; set [apt] augmentation = false")
        return DreamBoothRun(
            config, args, accelerator, unet, noise_scheduler, black, prompts=prompts, textless=textless
        )


def class_words(args: argparse.Namespace, names: dict[str, Any], refused: str | None = None) -> ClassWords | None:
    """What puts the class word in place of the identifier; None where the configuration has none.

    To be called once tokenizers and text encoders are loaded, before any text is encoded. Ends the program with one
    line where this script's text cannot be followed.

    Args:
        names: the variables of the function that trains.
        refused: what was missing in the script when it was patched.
    """
    with _forgotten(names), errors_in_one_line():
        config = _config(args)
        if not config.enabled or not config.identifier or not config.class_word:
            return None
        if refused is not None:
            raise AptError(f"[apt] identifier and class_word cannot be used with this script: {refused}")
        words = ClassWords(ClassCaptions(config.identifier, config.class_word), names)
        if config.aligns_attention:
            words.captions.check_lengths(words.tokenizers)
        return words


def probe_prompts(args: argparse.Namespace, names: dict[str, Any]) -> ProbePrompts | None:
    """What encodes the prompts of the drifts of checkpoints; None where the configuration has them off.

    To be called where `class_words` is.

    Args:
        names: the variables of the function that trains.
    """
    with _forgotten(names), errors_in_one_line():
        config = _config(args)
        if not config.enabled or not config.drifts:
            return None
        return ProbePrompts(names, asked_prompts(config.class_word))


@contextlib.contextmanager
def _forgotten(names: dict[str, Any]) -> Iterator[None]:
    """Behind it a function's `locals()` hold nothing: Python before 3.13 keeps them with the function, and so what the
    script deletes from then on. `globals()` stay."""
    try:
        yield
    finally:
        if "__builtins__" not in names:
            names.clear()


class DreamBoothRun:
    """APT in a script's own loop; its methods are called by the inserted lines, from top to bottom.

    Attributes:
        augments: whether images are augmented.
    """

    def __init__(
        self,
        config: AptConfig,
        args: argparse.Namespace,
        accelerator: Any,
        unet: nn.Module,
        noise_scheduler: Any,
        black: BlackLatents | None = None,
        *,
        prompts: ProbePrompts | None = None,
        textless: bool = False,
    ) -> None:
        own = accelerator.unwrap_model(unet)
        # accelerate has no public list of the models and optimizers that it prepared.
        trained = [accelerator.unwrap_model(model) for model in accelerator._models]
        self._text_encoders = [m for m in trained if m is not own and any(p.requires_grad for p in m.parameters())]
        parameters = [p for opt in accelerator._optimizers for group in opt.param_groups for p in group["params"]]
        if config.reference == "base":
            check_active(own, *self._text_encoders)
        config = config.of_model(preset_of(own))
        self._prior = bool(getattr(args, "with_prior_preservation", False))
        self._accelerator = accelerator
        self._schedule = noise_scheduler
        bins: dict[str, Any] = {"bin_of": sigma_bins(config.num_bins)}
        target = FLOW
        if noise_scheduler is not None:
            bins = {"num_train_timesteps": noise_scheduler.config.num_train_timesteps}
            target = noise_scheduler.config.prediction_type
        objective = AptObjective(
            config,
            own,
            lambda: adapters_off(own, *self._text_encoders),
            **bins,
            also_frozen=self._text_encoders,
            trained=[(f"number {i} of the optimizer's, {tuple(p.shape)}", p) for i, p in enumerate(parameters)],
        )
        log_path = Path(args.output_dir or ".") / f"{WEIGHTS}-apt.jsonl"
        self._run = AptRun(
            objective,
            log_path=log_path if accelerator.is_main_process else None,
            augment_space="image",
            seed=torch.initial_seed(),
            rank=accelerator.process_index,
            trainer=f"diffusers {importlib.metadata.version('diffusers')}",
            target=target,
        )
        self.augments = objective.augments
        self._prompts = prompts
        trains_text = bool(self._text_encoders)
        self._saves = MeasuredSaves(
            self._run, args, accelerator, own, noise_scheduler, prompts, trains_text=trains_text, textless=textless
        )
        self._words: ClassWords | None = None
        self._call: tuple[tuple[Any, ...], dict[str, Any], Tensor] | None = None
        self._placement: Placement | None = None
        self._covered: Tensor | None = None
        self._black, self._encoded = black, False
        self._flow_loss = FlowLoss()
        self._passes: Passes | None = None
        self._version = 0
        self._step: AptStep | None = None
        if accelerator.is_main_process:
            tell_noise_options(args)
        attach(self._run, accelerator)
        self._run.has_dropout(dropout(own, *self._text_encoders))
        accelerator.register_load_state_pre_hook(lambda models, folder: self._saves.count_from(folder))
        atexit.register(self.close)  # a run that is interrupted keeps its last step's line

    def read_class_word(self, words: ClassWords) -> None:
        """Let the base model read the class word in place of the identifier."""
        words.begin(_batches(self._accelerator._dataloaders))
        self._words = words

    @property
    def encodes_text(self) -> bool:
        """Whether the text has to be encoded anew, for the base model or for a prompt of apt-hooks' own."""
        asked = self._prompts is not None and self._prompts.is_asked
        return asked or self._words is not None or bool(self._text_encoders)

    @property
    def stops(self) -> bool:
        """Whether the training is to end here, by the key `stop`."""
        return self._saves.stops

    def reading(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function that encodes text, which is given a prompt of apt-hooks' own while one is asked for."""
        return function if self._prompts is None else self._prompts.reading(function)

    def begin_step(self, again: Callable[[], Any], timesteps: Tensor, latents: Tensor) -> None:
        """A step's own lines from the text to the denoiser's prediction.

        Args:
            again: runs them once more.
            timesteps: where noise is mixed in its share.
            latents: [batch, ...], clean.
        """
        self._saves.begin_step(again, timesteps, latents)

    def moves(self, timesteps: Tensor, latents: Tensor) -> bool:
        """Whether any sample is augmented, so that the latents are to be made once more, with `moved`.

        A run's first batch's are made again whatever is chosen, so that what rules it out is told at once.

        Args:
            timesteps: one a sample or for all; where noise is mixed in its share, of any number of dimensions.
            latents: [batch, ...], clean.
        """
        with errors_in_one_line():
            self._encoded = False
            self._placement = self._run.objective.draw_augmentation(
                self._each(timesteps, latents), self._instances(latents), self._run.generator()
            )
            self._covered = self._run.objective.covered(self._placement, latents.shape[-2:])
            return self._run.objective.steps == 0 or bool(self._placement.chosen.any())

    def moved(self, images: Tensor, *, latents: bool = False) -> Tensor:
        """`images` ([batch, channels, height, width], or of one frame each, in [-1, 1]), some zoomed out and rotated.

        Args:
            latents: these are latents; they are moved where no images were, as they come from a cache.
        """
        with errors_in_one_line():
            if latents and self._encoded:
                return images
            fill: float | Tensor = -1.0
            if latents:
                if self._black is None or self._black.latent is None:
                    raise AptError(
                        "the latents come from a cache, and what makes it was not found when the script was patched, "
                        "so it is not known what black looks like in them; set [apt] augmentation = false"
                    )
                fill = self._black.latent.to(images)
            self._encoded = self._encoded or not latents
            placement = self._placement
            if placement is None:
                raise AptError(_NOT_MOVED)
            return placement.apply(images, fill, "bcfhw" if images.ndim == 5 else "bchw")

    def frozen_due(self) -> bool:
        """Whether this step has a `frozen_pass`, and `begin_tuned_pass` after it."""
        self._saves.see()
        self._give_up()
        return self._run.objective.passes().due

    @contextlib.contextmanager
    def frozen_pass(self) -> Iterator[None]:
        """Inside, U-Net and text encoders are those of the base model."""
        called: set[nn.Module] = set()
        with errors_in_one_line():
            self._give_up()
            if self._run.objective.config.identifier and self._words is None:
                raise AptError("[apt] identifier is given, but the script was patched without it; patch it again")
            with contextlib.ExitStack() as stack:
                for encoder in self._text_encoders:
                    handle = encoder.register_forward_pre_hook(lambda module, _: called.add(module))
                    stack.callback(handle.remove)
                self._passes = self._run.objective.passes(covered=self._covered)
                stack.enter_context(self._passes.frozen(self._instances if self._prior else None))
                if self._words is not None:
                    unet = self._run.objective.reference.modules[0]
                    stack.enter_context(self._words.read_by(unet, self._instances))
                    stack.callback(unet.register_forward_hook(self._keep_call, with_kwargs=True).remove)
                yield
            if len(called) < len(self._text_encoders):
                raise AptError(
                    "a text encoder is trained, but the lines that run it were not found when the script was patched, "
                    "so the base model would read the trained one's text; call it by the name that accelerator.prepare "
                    "gave it, next to the U-Net's call, and patch again"
                )

    def begin_tuned_pass(self, frozen_prediction: Tensor) -> None:
        """What the base model predicted; the next pass of the U-Net is the one that is trained."""
        with errors_in_one_line():
            if self._passes is None:
                raise AptError(_NO_FROZEN_PASS)
            self._passes.instances = self._instances(frozen_prediction)
            self._compare_start()
            self._passes.begin_tuned(frozen_prediction)

    def end_tuned_pass(self, prediction: Tensor) -> Tensor:
        """The prediction, to go on with in place of `prediction`."""
        with errors_in_one_line():
            if self._passes is None:
                self._passes = self._run.objective.passes(self._instances(prediction), self._covered)
                if self._passes.due:
                    raise AptError(_NO_FROZEN_PASS)
            prediction = self._passes.end_tuned(prediction)
            self._version = prediction._version
            return prediction

    def assess(self, prediction: Tensor, target: Tensor, timesteps: Tensor, *mixed: Tensor) -> Tensor:
        """The prediction, its gradient scaled by each sample's weight, whatever loss is taken of it.

        Args:
            timesteps: where noise is mixed in its share.
            mixed: there, the clean latents and the noise.
        """
        with errors_in_one_line():
            passes, self._passes = self._passes, None
            if passes is None or prediction is not passes.tuned_prediction or prediction._version != self._version:
                raise AptError(
                    "the script changes the U-Net's prediction before the loss, but not the base model's, so the two "
                    "cannot be compared; take the loss of what the U-Net predicts"
                )
            if prediction.shape != target.shape:
                raise AptError(
                    f"the U-Net predicts {tuple(prediction.shape)} for a target of {tuple(target.shape)}; models that "
                    "predict their variance are not supported"
                )
            if self.augments and self._placement is None:
                raise AptError(_NOT_MOVED)
            timesteps = self._each(timesteps, prediction)
            self._step = passes.step(
                target,
                timesteps,
                ends_step=self._accelerator.sync_gradients,
                error_scale=self._error_scale(timesteps, target, *mixed),
            )
            return self._step.weigh(self._step.prediction)

    def regularized(self, loss: Tensor) -> Tensor:
        """The loss with the regularizers' gradient and its own value, which stays comparable with other runs'."""
        with errors_in_one_line():
            step, self._step = self._step, None
            if step is None:  # a batch that the script did not ask the U-Net about
                return loss
            self._run.record(step, self._placement, ends_step=self._accelerator.sync_gradients)
            self._placement = self._covered = None
            # The objective's is for a mean over the whole batch; prior preservation adds the means of two halves.
            regularizer = step.regularizer * (2 if self._prior else 1)
            return loss + (regularizer - regularizer.detach())

    def tracker_values(self) -> dict[str, float]:
        """The last step's values for `accelerator.log`."""
        return self._run.tracker_values()

    def add_metadata(self, folder: str | Path) -> None:
        """Write what is known of the run into the metadata of the LoRAs in a folder, and the last one's line."""
        with errors_in_one_line():
            self._saves.add_metadata(folder)

    def finish(self) -> None:
        """The loop is over: measure the LoRA that is saved behind it, and close."""
        with errors_in_one_line():
            self._saves.finish()
        self.close()

    def close(self) -> None:
        """Write what is left of the log and take the hooks off; may be called again."""
        with errors_in_one_line():
            atexit.unregister(self.close)
            self._saves.close()
            try:
                if self._words is not None:
                    self._words.close()
            finally:
                self._run.close()

    def _keep_call(self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], predicted: Any) -> None:
        if self._run.objective.reference.awaits_comparison(self._run.objective.steps):
            self._call = args, kwargs, prediction_of(predicted)

    def _compare_start(self) -> None:
        """Where the base model read other words, the denoiser with the LoRA is asked about these, once."""
        call, self._call = self._call, None
        if call is not None:
            reference, (args, kwargs, frozen) = self._run.objective.reference, call
            reference.compare_alike(lambda: prediction_of(reference.modules[0](*args, **kwargs)), frozen)

    def _give_up(self) -> None:
        """Forget a step that the script broke off between the passes, as one does that ran out of memory."""
        if self._passes is not None:
            self._passes.give_up()
        self._passes = self._step = None

    def _each(self, timesteps: Tensor, samples: Tensor) -> Tensor:
        """A timestep, or share of noise, for each sample: [batch]."""
        if self._schedule is None:
            timesteps = per_sample(timesteps)
        # A script may have drawn one for all.
        return timesteps.reshape(-1).expand(len(samples)) if timesteps.numel() == 1 else timesteps

    def _error_scale(self, timesteps: Tensor, target: Tensor, *mixed: Tensor) -> Tensor | None:
        if self._schedule is None:
            if self._run.indicator_units == FLOW:
                return None
            clean, noise = mixed
            return self._flow_loss.error_scale(target, clean, noise, timesteps)
        predicted = self._schedule.config.prediction_type
        if predicted != self._run.target:
            raise AptError(
                f"the script's schedule said at start that the model predicts {self._run.target}, and now that it "
                f"predicts {predicted}; set its prediction_type before accelerator.prepare(...)"
            )
        if self._run.indicator_units == predicted:
            return None
        return epsilon_error_scale(predicted, self._schedule.alphas_cumprod, timesteps)

    def _instances(self, samples: Tensor) -> Tensor | None:
        """With prior preservation the second half of a batch are class images, which APT leaves alone."""
        if not self._prior:
            return None
        batch = len(samples)
        if batch % 2:
            raise AptError(
                f"--with_prior_preservation puts as many class images as instance images in a batch; found {batch}"
            )
        return torch.arange(batch) < batch // 2


class BlackLatents:
    """What a script's VAE encodes black to, where its latents are cached, and the VAE is forgotten.

    Attributes:
        latent: [channels], before any scaling of the script's; None before any image was encoded.
    """

    def __init__(self) -> None:
        self.latent: Tensor | None = None

    def keep(self, vae: nn.Module, images: Tensor) -> None:
        """Encode black of the images' size. Moves no random stream."""
        if self.latent is not None:
            return
        with frozen_base([vae], contextlib.nullcontext):
            encoded = vae.encode(torch.full_like(images[:1], -1.0))  # type: ignore[operator]
        self.latent = color_of(encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent)


def _config(args: argparse.Namespace) -> AptConfig:
    file, preset = (getattr(args, name, None) for name in ("apt_config", "apt_preset"))
    if file is not None and preset is not None:
        raise AptError(
            f"both --apt_config {file} and --apt_preset {preset} are given; keep one, and name the preset in the "
            "file if both are wanted"
        )
    return AptConfig.preset(str(preset)) if file is None else AptConfig.from_toml(file)


def _batches(loaders: Sequence[Any]) -> float:
    """How many batches an epoch has; infinity where that is not known."""
    try:
        return max(map(len, loaders), default=math.inf)
    except TypeError:  # a dataset without a length
        return math.inf


def _check_mask(line: str, config: AptConfig) -> None:
    if config.augmentation and not config.monitor_only:
        raise AptError(
            f"the loss takes in something else of the batch, in `{line}`: a mask would not be moved with an augmented "
            "image; set [apt] augmentation = false"
        )
    logger.warning("apt-hooks: gamma is measured over the whole frame, without what the loss takes in by `%s`", line)


def _check(args: argparse.Namespace, config: AptConfig, accelerator: Any, unet: nn.Module) -> None:
    if getattr(args, "do_edm_style_training", False):
        raise AptError(
            "--do_edm_style_training cannot be used with APT, which is defined over the timesteps of a DDPM schedule; "
            "leave one of the two out"
        )
    if getattr(args, "train_text_encoder_ti", False):
        raise AptError(
            "--train_text_encoder_ti cannot be used with APT: it trains embeddings of new words, which the base model "
            "that APT compares with has not; leave it out, and train the LoRA with a word that is there (--train_text_"
            "encoder trains the text encoder's own)"
        )
    engine = accelerator.distributed_type.value
    if engine in ("DEEPSPEED", "FSDP", "MEGATRON_LM"):
        raise AptError(
            f"accelerate's {engine} cannot be used with APT (its engine owns the model); use plain processes"
        )
    if any(hasattr(model, "_orig_mod") for model in (unet, getattr(unet, "module", None))):
        raise AptError(
            "a compiled U-Net cannot be used with APT (hooks are lost in it); set accelerate's dynamo_backend to no"
        )
    if config.augment_space == "latent":
        raise AptError(
            '[apt] augment_space = "latent" is for trainers that cache latents, and this script has the images; '
            'leave it out, or set "image"'
        )
