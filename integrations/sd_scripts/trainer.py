"""APT as a subclass of sd-scripts' trainer.

Everything the trainer does goes on as it is; the subclass overrides the few methods through which a batch passes.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apt_hooks.config import AptConfig
from apt_hooks.errors import AptError, errors_in_one_line
from apt_hooks.hooks.architectures.unet import check_preset
from apt_hooks.method.augmentation import Placement
from apt_hooks.method.units import epsilon_error_scale
from apt_hooks.training.objective import AptObjective
from apt_hooks.training.run import AptRun

from ..accelerate_state import attach
from ..class_captions import ClassCaptions
from ..noise_options import tell_noise_options
from .augment import black_latent, moved
from .conditioning import FrozenConditioning, TextEncoders
from .lora import LoraSwitch, dropout
from .trainer_functions import LossMask, TimestepSampler

logger = logging.getLogger("apt_hooks")

UNCOUNTED = "apt_hooks_uncounted"
"""Custom attribute of a dataset subset whose samples APT leaves alone: regularization images and their like."""

_LATENTS_AUGMENTED = "the data set gives latents, which are augmented in place of the images; that is an approximation"


class AptTrainer:
    """Mixed in before a `NetworkTrainer`; `apt_config` is set before `train`, `apt` when the models are loaded."""

    apt_config: AptConfig
    apt: AptRun
    _batch: _Batch | None = None

    # -- before the first step ---------------------------------------------------------------------------------------

    def train(self, args: argparse.Namespace) -> None:
        with errors_in_one_line():
            try:
                super().train(args)  # type: ignore[misc]
                if hasattr(self, "apt"):
                    self.apt.objective.verify()
            except BaseException:
                with contextlib.suppress(AptError):  # of closing; the error that ended the training matters more
                    self._close()
                raise
            self._close()

    def get_tokenizers(self, tokenize_strategy: Any) -> Any:
        tokenizers = super().get_tokenizers(tokenize_strategy)  # type: ignore[misc]
        self._captions = None
        if self.apt_config.identifier and self.apt_config.class_word:
            self._captions = ClassCaptions(self.apt_config.identifier, self.apt_config.class_word)
            if self.apt_config.aligns_attention:
                self._captions.check_lengths(tokenizers)
        return tokenizers

    def assert_extra_args(self, args: argparse.Namespace, train_dataset_group: Any, val_dataset_group: Any) -> None:
        super().assert_extra_args(args, train_dataset_group, val_dataset_group)  # type: ignore[misc]
        captions: list[str] = []
        for dataset in getattr(train_dataset_group, "datasets", []):
            for subset in getattr(dataset, "subsets", []):
                attributes = dict(getattr(subset, "custom_attributes", None) or {})
                # A batch carries its subsets' attributes, and nothing else that tells a regularization image.
                kept_as_prior = attributes.get("diff_output_preservation", False)
                attributes[UNCOUNTED] = bool(getattr(subset, "is_reg", False) or kept_as_prior)
                subset.custom_attributes = attributes
                captions += [
                    str(getattr(subset, k, None) or "") for k in ("caption_prefix", "caption_suffix", "class_tokens")
                ]
            captions += [info.caption for info in getattr(dataset, "image_data", {}).values()]
        if self._captions is not None and not self._captions.occurs_in(captions):
            self._captions.warn_of_absence()

    def load_target_model(self, args: argparse.Namespace, weight_dtype: torch.dtype, accelerator: Any) -> Any:
        loaded = super().load_target_model(args, weight_dtype, accelerator)  # type: ignore[misc]
        _, text_encoder, vae, unet = loaded
        check_preset(self.apt_config.preset_name, unet)
        text_encoders = text_encoder if isinstance(text_encoder, list) else [text_encoder]
        trained = text_encoders if self.is_train_text_encoder(args) else []  # type: ignore[attr-defined]
        config = self.apt_config
        space = config.augment_space
        if space == "auto":
            space = "latent" if args.cache_latents else "image"
        self._switch: LoraSwitch | None = None
        self._switched = (unet, *trained)
        self._network = args.network_module
        reencoding = bool(trained) or self._captions is not None
        objective = AptObjective(config, unet, self._lora_off, also_frozen=text_encoders if reencoding else ())
        log_path = Path(args.output_dir or ".") / f"{args.output_name or 'last'}-apt.jsonl"
        self.apt = AptRun(
            objective,
            log_path=log_path if accelerator.is_main_process else None,
            augment_space=space,
            seed=args.seed,
            rank=accelerator.process_index,
            trainer="sd-scripts",
            target="v_prediction" if args.v_parameterization else "epsilon",
        )
        if getattr(args, "skip_until_initial_step", False):
            self.apt.step = getattr(args, "initial_step", None) or 0  # until a state is loaded that knows better
        if accelerator.is_main_process:
            tell_noise_options(args)
        self._conditioning: FrozenConditioning | None = None
        if reencoding:
            self._conditioning = FrozenConditioning(self._captions, lora=bool(trained), weighted=args.weighted_captions)
        self._vae = vae
        self._black = None
        self._loss_mask = LossMask(type(self))
        if objective.augments:
            self._sampler = TimestepSampler(type(self))
        if space == "latent" and objective.augments:
            self._black = black_latent(vae, accelerator.device)
        attach(self.apt, accelerator)
        if objective.augments and config.augment_space == "auto" and space == "latent":
            accelerator.print(f"apt-hooks: {_LATENTS_AUGMENTED}")
        return loaded

    def get_sai_model_spec(self, args: argparse.Namespace) -> dict[str, Any]:
        # Asked for at every save, so what it adds to the metadata is of that moment.
        spec = super().get_sai_model_spec(args)  # type: ignore[misc]
        return spec if args.no_metadata else {**spec, **self.apt.metadata()}

    # -- a step ------------------------------------------------------------------------------------------------------

    def process_batch(
        self,
        batch: dict[str, Any],
        text_encoders: list[Any],
        unet: Any,
        network: Any,
        vae: Any,
        noise_scheduler: Any,
        vae_dtype: Any,
        weight_dtype: Any,
        accelerator: Any,
        args: argparse.Namespace,
        text_encoding_strategy: Any,
        tokenize_strategy: Any,
        is_train: bool = True,
        train_text_encoder: bool = True,
        train_unet: bool = True,
    ) -> Tensor:
        def process(batch: dict[str, Any]) -> Tensor:
            return super(AptTrainer, self).process_batch(  # type: ignore[misc]
                batch,
                text_encoders,
                unet,
                network,
                vae,
                noise_scheduler,
                vae_dtype,
                weight_dtype,
                accelerator,
                args,
                text_encoding_strategy,
                tokenize_strategy,
                is_train=is_train,
                train_text_encoder=train_text_encoder,
                train_unet=train_unet,
            )

        if not is_train:
            return process(batch)
        self._begin(accelerator, network, noise_scheduler)
        # Here the trainer has just fetched the last step's loss, so fetching its other numbers waits for nothing.
        self.apt.log.flush()
        current = _Batch(_counted(batch), accelerator.sync_gradients, noise_scheduler.alphas_cumprod)
        if self._conditioning is not None:
            models = self.get_models_for_text_encoding(args, accelerator, text_encoders)  # type: ignore[attr-defined]
            encoders = TextEncoders(models, text_encoding_strategy, tokenize_strategy)
            current.frozen_conds = functools.partial(self._conditioning, encoders, batch, current.counted)
        with contextlib.ExitStack() as stack:
            if self.apt.objective.augments:
                batch = self._augment(batch, current, args, noise_scheduler, accelerator.device)
                stack.enter_context(self._sampler.drawn(current.timesteps))
            current.mask = functools.partial(self._loss_mask, args, batch)
            self._batch = current
            try:
                loss = process(batch)
            finally:
                self._batch = None
        self.apt.record(current.step, current.placement, ends_step=current.ends_step)
        return loss

    def shift_scale_latents(self, args: argparse.Namespace, latents: Tensor) -> Tensor:
        current = self._batch
        if current is not None and current.placement is not None and self._black is not None:
            latents = current.placement.apply(latents, self._black)
            current.covered = self.apt.objective.covered(current.placement, latents.shape[-2:])
        return super().shift_scale_latents(args, latents)  # type: ignore[misc]

    def call_unet(
        self,
        args: argparse.Namespace,
        accelerator: Any,
        unet: Any,
        noisy_latents: Tensor,
        timesteps: Tensor,
        text_conds: list[Tensor],
        batch: dict[str, Any],
        weight_dtype: Any,
        **kwargs: Any,
    ) -> Tensor:
        def predict(conds: list[Tensor]) -> Tensor:
            return super(AptTrainer, self).call_unet(  # type: ignore[misc]
                args, accelerator, unet, noisy_latents, timesteps, conds, batch, weight_dtype, **kwargs
            )

        current = self._batch
        # Outside of a training step, and for the trainer's own second call (differential output preservation).
        if current is None or current.passes is not None:
            return predict(text_conds)
        other = None if self._conditioning is None else lambda: predict(current.frozen_conds(text_conds))
        current.passes = self.apt.objective.passes(current.counted, current.covered)
        return current.passes.run(lambda: predict(text_conds), other)

    def get_noise_pred_and_target(self, *args: Any, **kwargs: Any) -> Any:
        result = super().get_noise_pred_and_target(*args, **kwargs)  # type: ignore[misc]
        current = self._batch
        if current is not None:
            _, target, timesteps, _ = result
            drawn = timesteps if current.timesteps is None else current.timesteps
            # The same tensor as a rule, so that no device is waited for.
            if drawn is not timesteps and not torch.equal(drawn, timesteps.to(drawn.device)):
                raise AptError(
                    "the trainer adds noise at other timesteps than those drawn for the augmentation; "
                    "set [apt] augmentation = false"
                )
            current.step = current.passes.step(
                target,
                timesteps,
                ends_step=current.ends_step,
                error_scale=epsilon_error_scale(self.apt.target, current.alphas_cumprod, timesteps),
                mask=current.mask(target),
            )
            if current.covered is not None:
                result = (current.step.prediction, *result[1:])
        return result

    def post_process_loss(self, loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().post_process_loss(loss, *args, **kwargs)  # type: ignore[misc]
        step = self._batch.step if self._batch is not None else None
        if step is None:
            return loss
        # The trainer differentiates the mean of these, and shows it beside the validation loss.
        return step.keep(loss)

    def sample_images(
        self, accelerator: Any, args: argparse.Namespace, epoch: Any, global_step: int, *rest: Any
    ) -> None:
        # Called behind every optimizer step, and the one method that is told how the trainer counts.
        self.apt.counted(global_step)
        super().sample_images(accelerator, args, epoch, global_step, *rest)  # type: ignore[misc]

    def generate_step_logs(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {**super().generate_step_logs(*args, **kwargs), **self.apt.tracker_values()}  # type: ignore[misc]

    # -- helpers -----------------------------------------------------------------------------------------------------

    def _begin(self, accelerator: Any, network: nn.Module, noise_scheduler: Any) -> None:
        """What is known at the first step only: the network is applied to the models after they were loaded."""
        if self._switch is not None:
            return
        objective = self.apt.objective
        found, wanted = noise_scheduler.config.num_train_timesteps, objective.indicator.num_train_timesteps
        if found != wanted:
            raise AptError(f"the noise schedule has {found} timesteps; APT in sd-scripts is for those of {wanted}")
        network = accelerator.unwrap_model(network)
        self._switch = LoraSwitch(self._switched, self._network, network)
        # And nothing else, though a text encoder's embeddings require a gradient for the sake of its checkpointing.
        objective.reference.trained = list(network.named_parameters())
        if self.apt_config.reference == "start":
            objective.reference.modules = (*objective.reference.modules, network)
        self.apt.has_dropout(dropout(network))

    @contextlib.contextmanager
    def _lora_off(self) -> Iterator[None]:
        if self._switch is None:
            raise RuntimeError("a frozen pass before the first batch")
        with self._switch.off():
            yield

    def _augment(
        self, batch: dict[str, Any], current: _Batch, args: argparse.Namespace, noise_scheduler: Any, device: Any
    ) -> dict[str, Any]:
        """The batch with some images and their masks moved; timesteps are drawn first, by the trainer's sampler."""
        current.timesteps = self._sampler.draw(args, noise_scheduler, len(batch["loss_weights"]), device)
        current.placement = self.apt.objective.draw_augmentation(
            current.timesteps, current.counted, self.apt.generator()
        )
        if self.apt.augment_space == "image" and batch.get("images") is None:
            self._go_on_in_latent_space(device)
        images = self.apt.augment_space == "image"
        if images:
            current.covered = self.apt.objective.covered(current.placement, batch["images"].shape[-2:])
        return moved(batch, current.placement, images=images)

    def _close(self) -> None:
        if hasattr(self, "apt"):
            self.apt.close()

    def _go_on_in_latent_space(self, device: Any) -> None:
        """The data set came with latents of its own, which no argument tells beforehand."""
        if self.apt_config.augment_space == "image":
            raise AptError(
                '[apt] augment_space = "image", but the data set has latents only; set it to "latent" or "auto"'
            )
        self.apt.augment_space = "latent"
        self._black = black_latent(self._vae, device)
        logger.info("apt-hooks: %s", _LATENTS_AUGMENTED)


@dataclasses.dataclass
class _Batch:
    """What is known of the training batch on its way through the trainer."""

    counted: Tensor
    ends_step: bool
    alphas_cumprod: Tensor  # as `zero_terminal_snr` may have changed them
    frozen_conds: Callable[[list[Tensor]], list[Tensor]] = lambda conds: conds
    mask: Callable[[Tensor], Tensor | None] = lambda target: None
    timesteps: Any = None  # Tensor, once drawn
    placement: Placement | None = None
    covered: Tensor | None = None
    passes: Any = None  # Passes, from the call of the U-Net on
    step: Any = None  # AptStep, from the target on


def _counted(batch: dict[str, Any]) -> Tensor:
    attributes = batch.get("custom_attributes")
    if not attributes:  # a dataset class of the user's own
        return torch.ones(len(batch["loss_weights"]), dtype=torch.bool)
    return torch.tensor([not (a or {}).get(UNCOUNTED, False) for a in attributes])
