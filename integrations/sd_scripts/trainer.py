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
from apt_hooks.hooks.architectures import preset_of
from apt_hooks.hooks.frozen import frozen_base
from apt_hooks.method.augmentation import Placement
from apt_hooks.training.checkpoint_drifts import SAMPLES, asked_prompts
from apt_hooks.training.checkpoints import STOPPED
from apt_hooks.training.held_out import HeldOut
from apt_hooks.training.objective import AptObjective
from apt_hooks.training.run import AptRun

from ..accelerate_state import attach
from ..class_captions import ClassCaptions
from .augment import black_latent, moved
from .conditioning import FrozenConditioning, TextEncoders, WithClassCaptions
from .denoiser import FirstCall, prepare_block_swap
from .lora import LoraSwitch, dropout
from .measured_saves import HELD_OUT_TIMESTEPS, MeasuredSaves
from .probe import TrainerProbe
from .sample_prompts import sample_prompts
from .trainer_functions import FlowNoising, LossMask, noising_of

logger = logging.getLogger("apt_hooks")

UNCOUNTED = "apt_hooks_uncounted"
"""Custom attribute of a dataset subset whose samples APT leaves alone: regularization images and their like."""

PRESERVATION = "diff_output_preservation"
"""The trainer's own custom attribute of subsets whose samples are to stay as the base model has them."""

_OTHER_TIMESTEPS = (
    "the trainer adds noise at other timesteps than those drawn for the augmentation; set [apt] augmentation = false"
)
_OTHER_NOISE = (
    "the trainer's step, run twice with the same random numbers, added other noise the second time; it draws from a "
    "stream that apt-hooks does not know of"
)
_LATENTS_AUGMENTED = "the data set gives latents, which are augmented in place of the images; that is an approximation"


class AptTrainer:
    """Mixed in before a `NetworkTrainer`; `apt_config` is set before `train`, `apt` when the models are loaded."""

    apt_config: AptConfig
    apt: AptRun
    _batch: _Batch | None = None
    _captions: ClassCaptions | None = None
    _conditioning: FrozenConditioning | None = None
    _measured: MeasuredSaves

    # -- before the first step ---------------------------------------------------------------------------------------

    def train(self, args: argparse.Namespace) -> None:
        self._measured = MeasuredSaves(self.apt_config)
        with errors_in_one_line():
            try:
                super().train(args)  # type: ignore[misc]
                if hasattr(self, "apt"):
                    self.apt.objective.verify()
            except _Stopped as stopped:
                self._accelerator.end_training()
                logger.info(STOPPED, stopped)
            except BaseException:
                with contextlib.suppress(AptError):  # of closing; the error that ended the training matters more
                    self._close()
                raise
            self._close()

    def get_tokenizers(self, tokenize_strategy: Any) -> Any:
        tokenizers = super().get_tokenizers(tokenize_strategy)  # type: ignore[misc]
        self._tokenizing = tokenize_strategy
        self._captions = None
        if self.apt_config.identifier and self.apt_config.class_word:
            self._captions = ClassCaptions(self.apt_config.identifier, self.apt_config.class_word)
            if self.apt_config.aligns_attention:
                # Anima reads a second tokenizer's tokens, which its trainer has as the strategy's own alone.
                own = [t for t in vars(tokenize_strategy).values() if hasattr(t, "model_max_length")]
                every = {id(t): t for t in [*tokenizers, *own]}.values()
                # Of bytes (byT5 in HunyuanImage) text in quotes alone is read.
                self._captions.check_lengths([t for t in every if getattr(t, "vocab_size", 1000) >= 1000])
        return tokenizers

    def assert_extra_args(self, args: argparse.Namespace, train_dataset_group: Any, val_dataset_group: Any) -> None:
        super().assert_extra_args(args, train_dataset_group, val_dataset_group)  # type: ignore[misc]
        if self._captions is not None or self.is_train_text_encoder(args):  # type: ignore[attr-defined]
            self._check_caption_dropout(args, train_dataset_group, words=self._captions is not None)
        captions: list[str] = []
        _mark_uncounted(val_dataset_group)
        _mark_uncounted(train_dataset_group)
        self._measured.unseen = val_dataset_group if val_dataset_group is not None and len(val_dataset_group) else None
        for dataset in getattr(train_dataset_group, "datasets", []):
            for subset in getattr(dataset, "subsets", []):
                captions += [
                    str(getattr(subset, k, None) or "") for k in ("caption_prefix", "caption_suffix", "class_tokens")
                ]
            captions += [info.caption for info in getattr(dataset, "image_data", {}).values()]
        if self._captions is not None and not self._captions.occurs_in(captions):
            self._captions.warn_of_absence()

    def get_text_encoding_strategy(self, args: argparse.Namespace) -> Any:
        self._encoding = super().get_text_encoding_strategy(args)  # type: ignore[misc]
        return self._encoding

    def load_target_model(self, args: argparse.Namespace, weight_dtype: torch.dtype, accelerator: Any) -> Any:
        loaded = super().load_target_model(args, weight_dtype, accelerator)  # type: ignore[misc]
        _, text_encoder, self._vae, denoiser = loaded
        if denoiser is not None:
            self._prepare(args, accelerator, text_encoder, denoiser)
        return loaded

    def load_unet_lazily(self, args: argparse.Namespace, *rest: Any) -> Any:
        # Where text encoders and latents are cached before the denoiser takes their place in memory.
        loaded = super().load_unet_lazily(args, *rest)  # type: ignore[misc]
        denoiser, text_encoders = loaded
        _, accelerator, *_ = rest
        self._prepare(args, accelerator, text_encoders, denoiser)
        return loaded

    def cache_text_encoder_outputs_if_needed(
        self,
        args: argparse.Namespace,
        accelerator: Any,
        unet: Any,
        vae: Any,
        text_encoders: Any,
        dataset: Any,
        weight_dtype: Any,
    ) -> None:
        def prepare(models: Any) -> None:
            encoders = TextEncoders(models, self._encoding, self._tokenizing)
            if self._captions is not None:
                self._conditioning.prepare(encoders, dataset)  # type: ignore[union-attr]
            if prompts is not None:
                prompts.encode(encoders, asked_prompts(self.apt_config.class_word))

        prompts = self._measured.prompts_of_drifts(args, self.is_train_text_encoder(args))  # type: ignore[attr-defined]
        seen = dataset
        if self._captions is not None:
            self._conditioning = self._frozen_conditioning(args)
        if self._captions is not None or prompts is not None:
            seen = WithClassCaptions(dataset, prepare)
        super().cache_text_encoder_outputs_if_needed(  # type: ignore[misc]
            args, accelerator, unet, vae, text_encoders, seen, weight_dtype
        )

    def _frozen_conditioning(self, args: argparse.Namespace) -> FrozenConditioning:
        if self._conditioning is not None:
            return self._conditioning
        trained = bool(self.is_train_text_encoder(args))  # type: ignore[attr-defined]
        return FrozenConditioning(self._captions, lora=trained, weighted=args.weighted_captions)

    def _prepare(self, args: argparse.Namespace, accelerator: Any, text_encoder: Any, denoiser: nn.Module) -> None:
        """All that is known before the network is applied."""
        config = self.apt_config = self.apt_config.of_model(preset_of(denoiser))
        text_encoders = text_encoder if isinstance(text_encoder, list) else [text_encoder]
        trained = text_encoders if self.is_train_text_encoder(args) else []  # type: ignore[attr-defined]
        space = config.augment_space
        if space == "auto":
            space = "latent" if args.cache_latents else "image"
        self._switch: LoraSwitch | None = None
        self._switched = (denoiser, *trained)
        self._network = args.network_module
        if trained or self._captions is not None:
            self._conditioning = self._frozen_conditioning(args)
        self._noising = noising_of(type(self), augments=config.augmentation and not config.monitor_only)
        objective = AptObjective(
            config,
            denoiser,
            self._lora_off,
            also_frozen=text_encoders if self._conditioning is not None else (),
            bin_of=self._noising.bin_of(config.num_bins),
        )
        log_path = Path(args.output_dir or ".") / f"{args.output_name or 'last'}-apt.jsonl"
        self.apt = AptRun(
            objective,
            log_path=log_path if accelerator.is_main_process else None,
            augment_space=space,
            seed=args.seed,
            rank=accelerator.process_index,
            trainer="sd-scripts",
            target=self._noising.target(args),
        )
        if prompts := sample_prompts(getattr(args, "sample_prompts", None)):
            self.apt.log.add_about("sample_prompts", prompts)
        if getattr(args, "skip_until_initial_step", False):
            self.apt.step = getattr(args, "initial_step", None) or 0  # until a state is loaded that knows better
        if accelerator.is_main_process:
            self._noising.tell_options(args)
        self._loss_mask = LossMask(type(self))
        self._encode_images = functools.partial(self.encode_images_to_latents, args, self._vae)  # type: ignore[attr-defined]
        self._latent_of_black: tuple[Tensor, int] | None = None
        if space == "latent" and objective.augments:
            self._black(accelerator.device)
        self._accelerator = accelerator
        self._measured.watch(self.apt, args, accelerator, trains_text=bool(trained))
        attach(self.apt, accelerator)
        if objective.augments and config.augment_space == "auto" and space == "latent":
            accelerator.print(f"apt-hooks: {_LATENTS_AUGMENTED}")

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
        def process(batch: dict[str, Any], is_train: bool = is_train) -> Tensor:
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
        if self.apt.checkpoints.stop is not None and accelerator.num_processes == 1:  # type: ignore[union-attr]
            # Only now: behind a save the trainer still keeps its state, draws and logs.
            raise _Stopped(self.apt.checkpoints.stop)  # type: ignore[union-attr]
        self._begin(accelerator, network, noise_scheduler)
        # Here the trainer has just fetched the last step's loss, so fetching its other numbers waits for nothing.
        self.apt.log.flush()

        def known(batch: dict[str, Any]) -> _Batch:
            current = _Batch(_instances(batch), accelerator.sync_gradients)
            if self._conditioning is not None or self._measured.awaits_probe:
                models = self.get_models_for_text_encoding(args, accelerator, text_encoders)  # type: ignore[attr-defined]
                current.encoders = TextEncoders(models, text_encoding_strategy, tokenize_strategy)
            if self._conditioning is not None:
                current.frozen_conds = functools.partial(self._conditioning, current.encoders, batch, current.instances)
            return current

        @contextlib.contextmanager
        def on_its_way(current: _Batch, batch: dict[str, Any]) -> Iterator[None]:
            current.mask = functools.partial(self._loss_mask, args, batch)
            self._batch = current
            try:
                with self._noising.watched(noise_scheduler, current.drawn):
                    yield
            finally:
                self._batch = None

        def compare(held_out: HeldOut, batch: dict[str, Any], number: int) -> None:
            current = known(batch)
            current.held_out = held_out
            spread = self._noising.spread(args, noise_scheduler, HELD_OUT_TIMESTEPS, accelerator.device)
            current.drawn = None if spread is None else spread[number].expand(len(current.instances))
            with self.apt.objective.reference.apart(frozen=False), on_its_way(current, batch):
                process(batch, is_train=False)

        self._measured.compare = compare
        current = known(batch)
        if self.apt.objective.augments:
            batch = self._augment(batch, current, args, noise_scheduler, accelerator.device, weight_dtype)
        with on_its_way(current, batch):
            loss = process(batch)
        self.apt.record(current.step, current.placement, ends_step=current.ends_step)
        return loss

    def shift_scale_latents(self, args: argparse.Namespace, latents: Tensor) -> Tensor:
        current = self._batch
        if current is not None and current.placement is not None and self.apt.augment_space == "latent":
            black, _ = self._black(latents.device)
            latents = current.placement.apply(latents, black, "bchw" if latents.ndim == 4 else "bcfhw")
            current.covered = self.apt.objective.covered(current.placement, latents.shape[-2:])
        return super().shift_scale_latents(args, latents)  # type: ignore[misc]

    def get_noise_pred_and_target(
        self,
        args: argparse.Namespace,
        accelerator: Any,
        noise_scheduler: Any,
        latents: Tensor,
        batch: dict[str, Any],
        text_conds: list[Any],
        denoiser: Any,
        *rest: Any,
        is_train: bool = True,
    ) -> Any:
        """Both passes: the trainer's own method, run twice with the same random numbers.

        Once as the base model, whose frozen pass gives the random streams back as they were, and once as it is. So
        nothing is known here of how a trainer adds its noise, calls its model and makes of what it answers.
        """

        def run(batch: dict[str, Any], conds: list[Any], model: Any, is_train: bool) -> Any:
            return super(AptTrainer, self).get_noise_pred_and_target(  # type: ignore[misc]
                args, accelerator, noise_scheduler, latents, batch, conds, model, *rest, is_train=is_train
            )

        current = self._batch
        if current is None:  # validation
            return run(batch, text_conds, denoiser, is_train)
        if current.held_out is not None:
            return self._compare_on(current, current.held_out, accelerator, batch, text_conds, denoiser, run)
        if self._measured.awaits_probe and accelerator.is_main_process:
            self._measured.probe = self._probe_of(
                current, args, accelerator, noise_scheduler, latents, batch, text_conds, denoiser, *rest
            )
        passes = self.apt.objective.passes(current.instances, current.covered)
        results: dict[str, Any] = {}

        def predict() -> Tensor:
            # Differential output preservation calls the model once more, which is no pass of APT's.
            regularized = self.apt.objective.capture is not None and not self.apt_config.monitor_only
            model = FirstCall(denoiser, passes.end_observation, later_without_graph=regularized)
            results["tuned"] = run(batch, text_conds, model, is_train)
            prediction: Tensor = results["tuned"][0]
            return prediction

        def predict_frozen() -> Tensor:
            conds = text_conds
            if self._conditioning is not None:
                modules = self.apt.objective.reference.modules
                # It gives the random streams back. The trainer encodes within autocast, too.
                with frozen_base(modules, contextlib.nullcontext), accelerator.autocast():
                    conds = current.frozen_conds(text_conds)
            result = run(_without_preservation(batch), conds, denoiser, False)
            prepare_block_swap(accelerator.unwrap_model(denoiser))
            # The LoRA's own, once compared in the first step, comes behind it.
            results.setdefault("frozen", (*result[:2], self._noising.noise()))
            prediction: Tensor = result[0]
            return prediction

        passes.run(predict, predict_frozen, same_conditioning=self._conditioning is None)
        _, target, timesteps, weighting = results["tuned"]
        times = self._noising.times(timesteps)
        if current.drawn is not None and current.drawn is not times:
            self._expect_none(current.drawn != times, _OTHER_TIMESTEPS)
        scale = None
        if "frozen" in results:
            _, frozen_target, noise = results["frozen"]
            both = (frozen_target, target) if noise is None else (noise, self._noising.noise())
            rows = current.instances.to(target.device, non_blocking=True)
            self._expect_none((both[0] != both[1]).flatten(1).any(dim=1).logical_and(rows), _OTHER_NOISE)
            if self.apt.indicator_units != self.apt.target:
                scale = self._noising.error_scale(self.apt.target, times, frozen_target)
        current.step = passes.step(
            target.detach(), times, ends_step=current.ends_step, error_scale=scale, mask=current.mask(target)
        )
        return current.step.prediction, target, timesteps, weighting

    def _compare_on(
        self,
        current: _Batch,
        held_out: HeldOut,
        accelerator: Any,
        batch: dict[str, Any],
        text_conds: list[Any],
        denoiser: Any,
        run: Callable[[dict[str, Any], list[Any], Any, bool], Any],
    ) -> Any:
        """Both models on held-out pictures; what the trainer makes of it is not looked at."""
        denoiser, batch = accelerator.unwrap_model(denoiser), _without_preservation(batch)
        with self.apt.objective.reference.apart(frozen=True):  # gives the random streams back
            conds = text_conds
            if self._conditioning is not None:
                with frozen_base(self.apt.objective.reference.modules, contextlib.nullcontext), accelerator.autocast():
                    conds = current.frozen_conds(text_conds)
            frozen = run(batch, conds, denoiser, False)[0]
            prepare_block_swap(denoiser)
        tuned, target, timesteps, weighting = run(batch, text_conds, denoiser, False)
        prepare_block_swap(denoiser)
        times, scale = self._noising.times(timesteps), None
        if self.apt.indicator_units != self.apt.target:
            scale = self._noising.error_scale(self.apt.target, times, target)
        mask, instances = current.mask(target), current.instances
        held_out.add(tuned, frozen, target, times, instances=instances, error_scale=scale, mask=mask)
        return tuned, target, timesteps, weighting

    def _probe_of(
        self,
        current: _Batch,
        args: argparse.Namespace,
        accelerator: Any,
        noise_scheduler: Any,
        latents: Tensor,
        batch: dict[str, Any],
        text_conds: list[Any],
        denoiser: Any,
        *rest: Any,
    ) -> TrainerProbe:
        """What measures drifts, from what the first batch tells."""

        def run(noise: Tensor, like: dict[str, Any], conds: list[Any], model: Any) -> Any:
            return super(AptTrainer, self).get_noise_pred_and_target(  # type: ignore[misc]
                args, accelerator, noise_scheduler, noise, like, conds, model, *rest, is_train=False
            )

        def at_timesteps(rows: slice, call: Callable[[], Any]) -> Any:
            drawn = self._noising.spread(args, noise_scheduler, SAMPLES, latents.device)
            with self._noising.watched(noise_scheduler, None if drawn is None else drawn[rows]):
                return call()

        return TrainerProbe(
            run,
            accelerator.unwrap_model(denoiser),
            _without_preservation({**batch, "images": None, "latents": None}),
            text_conds,
            latents,
            current.encoders,
            self._measured.prompts,  # type: ignore[arg-type]
            at_timesteps,
            accelerator.autocast,
        )

    def post_process_loss(self, loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().post_process_loss(loss, *args, **kwargs)  # type: ignore[misc]
        step = self._batch.step if self._batch is not None else None
        if step is None:
            return loss
        # The trainer differentiates the mean of these, and shows it beside the validation loss.
        return step.weigh(loss, regularize=True)

    def sample_images(
        self, accelerator: Any, args: argparse.Namespace, epoch: Any, global_step: int, *rest: Any
    ) -> None:
        # Called behind every optimizer step, and the one method that is told how the trainer counts.
        self.apt.trainer_counts(global_step)
        super().sample_images(accelerator, args, epoch, global_step, *rest)  # type: ignore[misc]

    def generate_step_logs(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {**super().generate_step_logs(*args, **kwargs), **self.apt.tracker_values()}  # type: ignore[misc]

    @staticmethod
    def _check_caption_dropout(args: argparse.Namespace, datasets: Any, *, words: bool) -> None:
        """That no caption is dropped where no batch says so: the frozen model would read it all the same.

        Raises:
            AptError: one is.
        """
        subsets = [s for d in getattr(datasets, "datasets", []) for s in getattr(d, "subsets", [])]
        cached = getattr(args, "cache_text_encoder_outputs", False)
        names = ("clip_l_dropout_rate", "clip_g_dropout_rate", "t5_dropout_rate")
        dropped = [name for name in names if getattr(args, name, None)]
        for name in ("caption_dropout_rate", "caption_dropout_every_n_epochs") if cached and words else ():
            if any(getattr(subset, name, 0) for subset in subsets):
                dropped.append(f"{name} with cache_text_encoder_outputs")
        if dropped:
            raise AptError(
                f"{'[apt] identifier and class_word' if words else 'a trained text encoder'} cannot be used with "
                f"{' and '.join(dropped)} and APT: the base model would read captions that are dropped for the LoRA, "
                "and the other way round; leave one of the two out"
            )

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
        if self.apt_config.reference == "start" or self.apt_config.may_measure_offset:
            objective.reference.modules = (*objective.reference.modules, network)
        self.apt.has_dropout(dropout(network))
        self._measured.begin(network)

    @contextlib.contextmanager
    def _lora_off(self) -> Iterator[None]:
        if self._switch is None:
            raise RuntimeError("a frozen pass before the first batch")
        with self._switch.off():
            yield

    def _expect_none(self, different: Tensor, otherwise: str) -> None:
        """An error that says `otherwise` where any is True, once their device has come to them."""

        def check(found: list[float]) -> None:
            if any(found):
                raise AptError(otherwise)

        self.apt.objective.expect(different.any()[None].float(), check)

    def _augment(
        self,
        batch: dict[str, Any],
        current: _Batch,
        args: argparse.Namespace,
        noise_scheduler: Any,
        device: Any,
        dtype: Any,
    ) -> dict[str, Any]:
        """The batch with some images and their masks moved; timesteps are drawn first, by the trainer's sampler."""
        if self.apt.augment_space == "image" and batch.get("images") is None:
            self._go_on_in_latent_space()
        images = self.apt.augment_space == "image"
        of_images = batch.get("images") is not None
        *_, height, width = batch["images" if of_images else "latents"].shape
        if of_images and isinstance(self._noising, FlowNoising):  # some samplers go by the size of the latents
            _, pixels = self._black(device)
            height, width = height // pixels, width // pixels
        like = torch.zeros(len(batch["loss_weights"]), 1, height, width, device=device)
        current.drawn = self._noising.draw(args, noise_scheduler, like, dtype)
        current.placement = self.apt.objective.draw_augmentation(current.drawn, current.instances, self.apt.generator())
        if images:
            current.covered = self.apt.objective.covered(current.placement, batch["images"].shape[-2:])
        return moved(batch, current.placement, images=images)

    def _black(self, device: Any) -> tuple[Tensor, int]:
        """The black latent, and the pixels of a latent's side; encoded once."""
        if self._latent_of_black is None:
            self._latent_of_black = black_latent(self._encode_images, self._vae, device)
        return self._latent_of_black

    def _close(self) -> None:
        self._measured.close()
        if hasattr(self, "apt"):
            self.apt.close()

    def _go_on_in_latent_space(self) -> None:
        """The data set came with latents of its own, which no argument tells beforehand."""
        if self.apt_config.augment_space == "image":
            raise AptError(
                '[apt] augment_space = "image", but the data set has latents only; set it to "latent" or "auto"'
            )
        self.apt.augment_space = "latent"
        logger.info("apt-hooks: %s", _LATENTS_AUGMENTED)


class _Stopped(Exception):
    """The key `stop` ends the training; what it says is why."""


@dataclasses.dataclass
class _Batch:
    """What is known of the training batch on its way through the trainer."""

    instances: Tensor
    ends_step: bool
    held_out: HeldOut | None = None  # what compares both models on it, where it is of the validation split
    encoders: Any = None  # TextEncoders
    frozen_conds: Callable[[list[Any]], list[Any]] = lambda conds: conds
    mask: Callable[[Tensor], Tensor | None] = lambda target: None
    drawn: Tensor | None = None  # what `Noising.draw` gave
    placement: Placement | None = None
    covered: Tensor | None = None
    step: Any = None  # AptStep, from the target on


def _without_preservation(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch, with no sample whose target the trainer takes from the base model by a pass of its own."""
    attributes = batch.get("custom_attributes")
    if not attributes:
        return batch
    kept = [{key: value for key, value in (own or {}).items() if key != PRESERVATION} for own in attributes]
    return {**batch, "custom_attributes": kept}


def _mark_uncounted(group: Any) -> None:
    """A batch carries its subsets' attributes, and nothing else that tells a regularization image."""
    for subset in (s for d in getattr(group, "datasets", []) for s in getattr(d, "subsets", [])):
        attributes = dict(getattr(subset, "custom_attributes", None) or {})
        attributes[UNCOUNTED] = bool(getattr(subset, "is_reg", False) or attributes.get(PRESERVATION, False))
        subset.custom_attributes = attributes


def _instances(batch: dict[str, Any]) -> Tensor:
    attributes = batch.get("custom_attributes")
    if not attributes:  # a dataset class of the user's own
        return torch.ones(len(batch["loss_weights"]), dtype=torch.bool)
    return torch.tensor([not (a or {}).get(UNCOUNTED, False) for a in attributes])
