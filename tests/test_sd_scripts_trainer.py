"""APT in the stand-in's trainer, by whole runs: what a batch meets on its way, and what a run leaves behind."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from models import TEXT_WIDTH
from sd_scripts_standin import SUBSETS, write_checkout, write_dataset
from torch import Tensor

from apt_hooks import AptConfig, AptObjective
from apt_hooks.hooks.architectures import unet_common as blocks
from apt_hooks.integrations.sd_scripts import adapter, trainer
from apt_hooks.results.read_steplog import read_run
from apt_hooks.results.report.samples import read_samples
from apt_hooks.training.adapter_contract import CONTRACT, Trained
from apt_hooks.training.resume import START_FILE, STATE_FILE
from apt_hooks.training.run import version
from apt_hooks.training.steplog import VALUES

# Reentrant checkpointing under no_grad, as a trainer's validation has it.
pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")

OWN = {"captions": ["a sks dog", "one sks dog"]}
REG = {"captions": ["a dog", "one sks cat"], "is_reg": True}
PRIOR = {"captions": ["a dog", "one sks cat"], "custom_attributes": {"diff_output_preservation": True}}
UNSEEN = {"captions": ["sks dog in the sea", "sks dog at home"], "validation": True}

WEIGHTS_ONLY = {"augmentation": False, "lambda_dist": 0.0, "lambda_attn": 0.0}
ALL_OFF = {**WEIGHTS_ONLY, "loss_weighting": False}
DREAMBOOTH = {"objective": "dreambooth"}
ALWAYS_SMALLER = {"augment_max_probability": 1.0, "zoom_out": [3.0, 3.0], "rotation_degrees": 0.0}


KINDS = {"sd15": "", "sdxl": "sdxl_", "anima": "anima_", "flux": "flux_"}


@pytest.fixture(scope="module")
def trainers(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, ModuleType]]:
    """The stand-in's modules, in the layout of 0.10 if nothing else is asked for; none of them stays imported."""
    before, layout = set(sys.modules), getattr(request, "param", "0.10")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(write_checkout(tmp_path_factory.mktemp("sd-scripts"), layout=layout))
        names = {kind: f"{prefix}train_network" for kind, prefix in KINDS.items()}
        names["flow"] = "library.flux_train_utils"
        names["noising"] = "library.train_util" if layout == "0.10" else "library.loss"
        yield {kind: importlib.import_module(name) for kind, name in names.items()}
        for name in set(sys.modules) - before:
            if name.split(".")[0] in ("library", "networks") or name.endswith("train_network"):
                del sys.modules[name]


@dataclasses.dataclass
class Run:
    trainer: Any
    args: argparse.Namespace
    folder: Path

    def saved(self, name: str = "lora.pt") -> dict[str, Any]:
        return torch.load(self.folder / name)

    @property
    def log(self) -> list[dict[str, Any]]:
        return read_log(self.folder / "lora-apt.jsonl")

    @property
    def tracked(self) -> list[dict[str, Any]]:
        return [json.loads(text) for text in (self.folder / "tracker.jsonl").read_text().splitlines()]

    def same_lora(self, other: Run) -> bool:
        one, two = self.saved()["weights"], other.saved()["weights"]
        return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def read_log(path: Path) -> list[dict[str, Any]]:
    found = map(json.loads, path.read_text().splitlines())
    return [line for line in found if "run" not in line]


Train = Callable[..., Run]


@pytest.fixture
def make(trainers: dict[str, ModuleType], tmp_path: Path) -> Train:
    """A trainer of the stand-in, made to do APT where `apt` is given, and its arguments; not started yet."""

    def make(
        apt: Any = None,
        *,
        kind: str = "sd15",
        subsets: Any = SUBSETS,
        spy: Any = None,
        name: str = "out",
        **arguments: Any,
    ) -> Run:
        args = trainers[kind].setup_parser().parse_args([])
        args.apt_config, args.network_train_unet_only = None, True
        args.dataset_config = str(write_dataset(tmp_path / f"{name}.toml", subsets))
        args.output_dir = str(tmp_path / name)
        assert vars(args).keys() >= arguments.keys()
        vars(args).update(arguments)
        base = next(c for n, c in vars(trainers[kind]).items() if n.endswith("NetworkTrainer"))
        trainer = base() if spy is None else type(f"Spied{base.__name__}", (spy, base), {})()
        if apt is not None:
            # Off unless asked for: their passes would be among those that tests count.
            args.apt_section = {"drifts": False, **apt} if isinstance(apt, dict) else apt
        if apt is not None or args.apt_config is not None:
            trainer = adapter.apt_trainer(trainer, args)
        return Run(trainer, args, tmp_path / name)

    return make


@pytest.fixture
def train(make: Train) -> Train:
    """As `make`, and trained."""

    def train(*args: Any, **options: Any) -> Run:
        run = make(*args, **options)
        run.trainer.train(run.args)
        return run

    return train


@dataclasses.dataclass
class Seen:
    """One batch: as the data set gave it, and at each place it came by."""

    given: dict[str, Any]
    is_train: bool
    moved: dict[str, Any] = dataclasses.field(default_factory=dict)
    latents: Tensor | None = None
    timesteps: list[Tensor] = dataclasses.field(default_factory=list)
    conds: list[list[Tensor]] = dataclasses.field(default_factory=list)
    squares: Tensor | None = None
    before_weights: Tensor | None = None
    weights: Tensor | None = None  # by which the gradient of each sample's loss was multiplied
    regularizer: float = math.nan  # and this one's value
    regularizer_weight: float = math.nan
    loss: float = math.nan
    indicator: list[dict[str, Any]] = dataclasses.field(default_factory=list)


class Spy:
    """Stands between the trainer and `AptTrainer`; `gamma`, where set, is what the indicator says in every bin."""

    gamma: float | None = None

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Seen] = []
        self.models: tuple[Any, ...] = ()

    def load_target_model(self, *args: Any) -> Any:
        self.models = super().load_target_model(*args)
        return self.models

    def on_step_start(self, *args: Any, is_train: bool) -> None:
        self.seen.append(Seen(args[5], is_train))
        indicator = self.apt.objective.indicator
        if self.gamma is not None and is_train:
            ahead = 1e9 if self.gamma == 1.0 else -math.log1p(-self.gamma) / indicator.scale
            bins = {"num_bins": indicator.num_bins, "num_train_timesteps": 1000}
            losses = {"loss_tuned": [0.0] * indicator.num_bins, "loss_frozen": [ahead] * indicator.num_bins}
            indicator.load_state_dict({**bins, **losses})
        self.seen[-1].indicator.append(indicator.state_dict())

    def process_batch(self, batch: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        self.seen[-1].moved = batch
        loss = super().process_batch(batch, *args, **kwargs)
        self.seen[-1].loss = loss.item()
        self.seen[-1].indicator.append(self.apt.objective.indicator.state_dict())
        return loss

    def shift_scale_latents(self, args: Any, latents: Tensor) -> Tensor:
        self.seen[-1].latents = latents
        return super().shift_scale_latents(args, latents)

    def call_unet(self, *args: Any, **kwargs: Any) -> Tensor:
        timesteps, conds = args[4:6]
        self.seen[-1].timesteps.append(timesteps)
        self.seen[-1].conds.append([cond.detach().clone() for cond in conds])
        return super().call_unet(*args, **kwargs)

    def get_noise_pred_and_target(self, *args: Any, **kwargs: Any) -> Any:
        result = super().get_noise_pred_and_target(*args, **kwargs)
        self.seen[-1].squares = (result[0] - result[1]).detach().float().square().mean(dim=(1, 2, 3))
        return result

    def post_process_loss(self, *args: Any, **kwargs: Any) -> Tensor:
        loss, seen = super().post_process_loss(*args, **kwargs), self.seen[-1]
        seen.before_weights = loss.detach()
        if seen.is_train and loss.requires_grad:
            loss.register_hook(lambda gradient: setattr(seen, "weights", gradient * len(gradient)))
            seen.regularizer = self._batch.step.regularizer.item()
            if self._batch.step.regularizer.requires_grad:
                hook = self._batch.step.regularizer.register_hook
                hook(lambda gradient: setattr(seen, "regularizer_weight", gradient.item()))
        return loss


class Overfitted(Spy):
    gamma = 1.0


class HalfOverfitted(Spy):
    gamma = 0.5


def uncounted(seen: Seen) -> Tensor:
    """Which samples of the batch are REG's or PRIOR's."""
    return torch.tensor([caption in REG["captions"] for caption in seen.given["captions"]])


# -- nothing on is nothing changed -------------------------------------------------------------------------------------

SETTINGS: dict[str, dict[str, Any]] = {
    "dropout": {"network_dropout": 0.5},
    "text encoder trained, dropout": {"network_train_unet_only": False, "network_dropout": 0.3},
    "regularization images": {"subsets": (OWN, REG), "prior_loss_weight": 0.5, "train_batch_size": 3},
    "differential output preservation": {"subsets": (OWN, PRIOR), "network_dropout": 0.3},
    "validation": {"subsets": (OWN, UNSEEN), "validate_every_n_steps": 1, "network_train_unet_only": False},
    "checkpointing, accumulation, min-snr": {
        "gradient_checkpointing": True, "gradient_accumulation_steps": 2, "min_snr_gamma": 5.0, "network_dropout": 0.3,
    },
    "cached latents, masks, v-prediction": {
        "cache_latents": True, "subsets": ({**OWN, "mask": "alpha"},), "v_parameterization": True,
    },
    "bf16, weighted captions": {"mixed_precision": "bf16", "weighted_captions": True},
    "sdxl, cached text, checkpointing": {
        "kind": "sdxl", "cache_text_encoder_outputs": True, "gradient_checkpointing": True, "network_dropout": 0.5,
    },
    "anima": {"kind": "anima", "network_dropout": 0.5},
    "anima, cached text and latents, checkpointing, regularization images": {
        "kind": "anima", "cache_text_encoder_outputs": True, "cache_latents": True, "gradient_checkpointing": True,
        "subsets": (OWN, REG), "timestep_sampling": "shift", "prior_loss_weight": 0.5,
    },
    "flux, preservation, swapped blocks, checkpointing, dropout": {
        "kind": "flux", "subsets": (OWN, PRIOR), "blocks_to_swap": 1, "gradient_checkpointing": True,
        "network_dropout": 0.3, "apply_t5_attn_mask": True,
    },
    "flux, text encoder trained, validation, accumulation, noise of its own": {
        "kind": "flux", "subsets": (OWN, UNSEEN), "network_train_unet_only": False, "validate_every_n_steps": 1,
        "gradient_accumulation_steps": 2, "ip_noise_gamma": 0.1, "model_prediction_type": "sample",
    },
    "flux, masks, bf16": {"kind": "flux", "subsets": ({**OWN, "mask": "alpha"},), "mixed_precision": "bf16"},
    "sdxl, everything trained": {
        "kind": "sdxl", "network_train_unet_only": False, "gradient_checkpointing": True, "subsets": (OWN, REG, UNSEEN),
        "validate_every_n_steps": 2,
    },
}  # fmt: skip


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_monitoring_and_all_terms_off_give_the_plain_trainers_lora_bit_for_bit(
    train: Train, setting: dict[str, Any]
) -> None:
    plain = train(**setting, name="plain")
    from_start = {"monitor_only": True, "reference": "start"}
    ways = {"monitor": {"monitor_only": True}, "start": from_start, "off": ALL_OFF, "dreambooth": DREAMBOOTH}
    for name, apt in ways.items():
        run = train(apt, **setting, name=name)
        assert run.same_lora(plain), name
        assert [line["loss/current"] for line in run.tracked] == [line["loss/current"] for line in plain.tracked], name
        assert len(run.log) == 3, name


class SeededSteps:
    """Random numbers by the step: what the trainer itself does not bring back on resuming."""

    taken = 0

    def load_target_model(self, *args: Any) -> Any:
        self.models = super().load_target_model(*args)  # type: ignore[misc]
        return self.models

    def on_step_start(self, *args: Any, is_train: bool) -> None:
        super().on_step_start(*args, is_train=is_train)  # type: ignore[misc]
        torch.manual_seed(self.apt.step if hasattr(self, "apt") else self.taken)
        self.taken += 1


@pytest.mark.parametrize("check", CONTRACT, ids=lambda check: check.__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_the_adapter_keeps_the_contract(train: Train, kind: str, check: Callable[[Any], None]) -> None:
    names = iter(range(9))

    def run(config: dict[str, Any] | None, *, stopped: bool = False) -> Trained:
        options = {"kind": kind, "subsets": (OWN,), "spy": SeededSteps, "save_state": True, "save_every_n_steps": 2}
        options["name"] = str(next(names))
        found = train(config, max_train_steps=2 if stopped else 4, **options)
        if stopped:
            found = train(config, max_train_steps=2, resume=str(found.folder / "lora-step2-state"), **options)
        models = [m for given in found.trainer.models for m in (given if isinstance(given, list) else [given])]
        models = [model for model in models if isinstance(model, torch.nn.Module)]
        return Trained(found.saved()["weights"], [] if config is None else found.log, models)

    check(run)


@pytest.mark.parametrize("kind", KINDS)
def test_each_term_alone_changes_the_lora(train: Train, kind: str) -> None:
    plain = train(kind=kind, name="plain")
    for term in ({"lambda_attn": 1.0}, {"lambda_dist": 1.0}, {"loss_weighting": True}, {"augmentation": True}):
        assert not train({**ALL_OFF, **term}, kind=kind, spy=HalfOverfitted).same_lora(plain), term


def test_disabled_the_trainer_is_the_one_given(make: Train) -> None:
    run = make()
    run.args.apt_section = {"enabled": False, "preset": "sd15"}
    assert adapter.apt_trainer(run.trainer, run.args) is run.trainer
    assert not hasattr(run.args, "apt_section")


# -- timesteps before augmentation -------------------------------------------------------------------------------------


class Noted(Overfitted):
    """Notes the order of events, of which `events` has those of the sampler too."""

    events: list[Any]

    def encode_images_to_latents(self, *args: Any) -> Tensor:
        self.events.append(torch.get_rng_state())
        return super().encode_images_to_latents(*args)


@pytest.fixture
def events(trainers: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    found: list[Any] = []
    sampler = trainers["noising"].get_timesteps

    def noted(*args: Any) -> Tensor:
        found.append((args[0], args[1], sampler(*args), torch.get_rng_state()))
        return found[-1][2]

    monkeypatch.setattr(trainers["noising"], "get_timesteps", noted)
    monkeypatch.setattr(Noted, "events", found, raising=False)
    return found


either_layout = pytest.mark.parametrize("trainers", ["0.10", "0.11"], indirect=True)


@either_layout
@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_timesteps_are_drawn_once_before_the_images_are_encoded_and_exactly_those_are_used(
    train: Train, trainers: dict[str, ModuleType], events: list[Any], kind: str
) -> None:
    sampler = trainers["noising"].get_timesteps
    run = train({}, spy=Noted, kind=kind, min_timestep=100, max_timestep=300)
    assert len(run.trainer.seen) == 3
    for i, seen in enumerate(run.trainer.seen):
        (low, high, drawn, random_state), at_encoding = events[2 * i : 2 * i + 2]
        assert (low, high) == (100, 300)
        assert torch.equal(random_state, at_encoding), "augmentation has a random stream of its own"
        assert drawn.min() >= 100 and drawn.max() < 300
        assert len(seen.timesteps) == 2 and all(torch.equal(used, drawn) for used in seen.timesteps)
    assert len(events) == 6
    assert trainers["noising"].get_timesteps is sampler


@either_layout
def test_noise_is_added_at_the_timesteps_that_decided_the_augmentation(
    train: Train, trainers: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    decided: list[Tensor] = []
    noised: list[Tensor] = []
    draw, scheduler = AptObjective.draw_augmentation, importlib.import_module("library.train_util").NoiseScheduler
    add_noise = scheduler.add_noise

    def noted_draw(self: AptObjective, timesteps: Tensor, *args: Any) -> Any:
        decided.append(timesteps.clone())
        return draw(self, timesteps, *args)

    def noted_noise(self: Any, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        noised.append(timesteps.clone())
        return add_noise(self, latents, noise, timesteps)

    monkeypatch.setattr(AptObjective, "draw_augmentation", noted_draw)
    monkeypatch.setattr(scheduler, "add_noise", noted_noise)
    train({}, max_train_steps=6)
    assert len(decided) == 6 and len(noised) == 12  # of both passes
    assert all(map(torch.equal, decided, noised[::2])) and all(map(torch.equal, decided, noised[1::2]))


def test_a_trainer_that_noises_at_other_timesteps_is_stopped(make: Train) -> None:
    class Moved(Overfitted):
        def get_noise_pred_and_target(self, *args: Any, **kwargs: Any) -> Any:
            prediction, target, timesteps, weighting = super().get_noise_pred_and_target(*args, **kwargs)
            return prediction, target, (timesteps + 1) % 1000, weighting

    run = make({}, spy=Moved)
    with pytest.raises(SystemExit, match="adds noise at other timesteps than those drawn for the augmentation"):
        run.trainer.train(run.args)
    assert not (run.folder / "lora.pt").exists()


def test_a_sampler_that_cannot_be_found_is_told_before_the_first_step(
    make: Train, trainers: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainers["sd15"].NetworkTrainer, "get_noise_pred_and_target", lambda self, *_, **__: None)
    run = make({})
    with pytest.raises(SystemExit, match=r"looked for a call of get_noise_noisy_latents_and_timesteps\(\)"):
        run.trainer.train(run.args)


def test_validation_draws_its_own_timesteps(train: Train, events: list[Any]) -> None:
    run = train({}, spy=Noted, subsets=(OWN, UNSEEN), validate_every_n_steps=3)
    validated = [seen.timesteps for seen in run.trainer.seen if not seen.is_train]
    assert [[t.tolist() for t in timesteps] for timesteps in validated] == [[[300, 300]], [[700, 700]]]


def test_the_sampler_and_the_models_are_as_before_after_an_exception(
    make: Train, trainers: dict[str, ModuleType]
) -> None:
    class Failing(Overfitted):
        def encode_images_to_latents(self, *args: Any) -> Tensor:
            if len(self.seen) == 2:
                raise RuntimeError("out of memory")
            return super().encode_images_to_latents(*args)

    sampler = trainers["noising"].get_timesteps
    run = make({}, spy=Failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        run.trainer.train(run.args)
    assert trainers["noising"].get_timesteps is sampler
    assert not any(module._forward_hooks for module in run.trainer.models[3].modules())
    assert len(run.log) == 1


# -- what is augmented -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", [REG, PRIOR], ids=["regularization images", "differential output preservation"])
def test_prior_samples_are_neither_augmented_nor_counted_nor_weighted(train: Train, other: dict[str, Any]) -> None:
    apt = {**ALWAYS_SMALLER, "lambda_dist": 0.0, "lambda_attn": 0.0}
    run = train(apt, spy=Overfitted, subsets=(OWN, other), train_batch_size=4, prior_loss_weight=0.5)
    for seen, line in zip(run.trainer.seen, run.log, strict=True):
        prior = uncounted(seen)
        assert prior.sum() == 2
        assert torch.equal(seen.moved["images"][prior], seen.given["images"][prior])
        assert not (seen.moved["images"][~prior] == seen.given["images"][~prior]).flatten(1).all(dim=1).any()
        # gamma is 1, so that the samples that count weigh nothing and the others all of the loss.
        assert seen.weights.tolist() == prior.float().tolist()
        assert line["loss_weight"] == 0.0 and line["augmented"] == 1.0
        assert line["loss_tuned"] == pytest.approx(float(seen.squares[~prior].mean()), rel=1e-5)


@pytest.mark.parametrize("other", [REG, PRIOR], ids=["regularization images", "differential output preservation"])
def test_a_batch_of_prior_samples_alone_is_the_plain_trainers(train: Train, other: dict[str, Any]) -> None:
    plain = train(subsets=(other,), name="plain", network_dropout=0.5)
    run = train({"augmentation": False}, spy=Spy, subsets=(other,), network_dropout=0.5)
    assert run.same_lora(plain)
    assert all(line[name] is None for line in run.log for name in VALUES)
    assert run.trainer.apt.objective.indicator.state_dict()["loss_tuned"] == [None] * 10


def test_images_and_masks_move_together_and_what_they_uncover_is_black_and_masked(train: Train) -> None:
    for mask, nothing in (("alpha", 0.0), ("conditioning", -1.0)):
        run = train(ALWAYS_SMALLER, spy=Overfitted, subsets=({**OWN, "mask": mask},), name=mask)
        for seen in run.trainer.seen:
            images = seen.moved["images"]
            masks = seen.moved["alpha_masks"] if mask == "alpha" else seen.moved["conditioning_images"][:, 0]
            # A third of 128 pixels, in the middle.
            inside = torch.zeros_like(masks, dtype=torch.bool)
            inside[:, 43:85, 43:85] = True
            outside = torch.ones_like(inside)
            outside[:, 42:86, 42:86] = False
            assert masks[inside].min() > 0.99 and (masks[outside] == nothing).all()
            assert (images[outside[:, None].expand_as(images)] == -1.0).all()
            assert (images[inside[:, None].expand_as(images)] > -1.0).all()


@pytest.mark.parametrize("mask", ["alpha", "conditioning", "not asked for"])
def test_gamma_and_the_log_follow_the_mask_of_the_loss(train: Train, mask: str) -> None:
    subset = {**OWN, "mask": "alpha" if mask == "alpha" else "conditioning"}
    run = train(ALWAYS_SMALLER, spy=Overfitted, subsets=(subset,), masked_loss=mask == "conditioning")
    for seen, line in zip(run.trainer.seen, run.log, strict=True):
        masks = seen.moved["alpha_masks"] if mask == "alpha" else (seen.moved["conditioning_images"][:, 0] + 1) / 2
        covered = masks.mean(dim=(1, 2))
        assert (covered < 0.2).all()
        # The trainer's own loss is a mean over the whole frame.
        wanted = seen.before_weights / (1.0 if mask == "not asked for" else covered)
        assert line["loss_tuned"] == pytest.approx(float(wanted.mean()), rel=1e-4)
        bins = seen.timesteps[0] // 100
        for b in set(bins.tolist()):
            assert seen.indicator[-1]["loss_tuned"][b] == pytest.approx(0.1 * float(wanted[bins == b].mean()), rel=1e-4)


def test_the_seed_decides_where_samples_are_moved_to(train: Train) -> None:
    apt = {"augment_max_probability": 1.0}
    runs = [train(apt, spy=Overfitted, train_batch_size=4, seed=s, name=f"{i}") for i, s in enumerate((1, 1, 2))]
    one, again, other = (run.trainer.seen[0].moved["images"] for run in runs)
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert not torch.equal(*(seen.moved["images"] for seen in runs[0].trainer.seen[:2]))


def test_at_gamma_zero_the_batch_stays_as_it_is(train: Train) -> None:
    class Fresh(Spy):
        gamma = 0.0

    run = train(ALWAYS_SMALLER, spy=Fresh, subsets=({**OWN, "mask": "alpha"},))
    for seen in run.trainer.seen:
        assert all(seen.moved[name] is seen.given[name] for name in ("images", "alpha_masks"))
    assert [line["augmented"] for line in run.log] == [0.0] * 3


def test_validation_is_neither_augmented_nor_weighted_nor_counted(train: Train) -> None:
    run = train(ALWAYS_SMALLER, spy=Overfitted, subsets=(OWN, UNSEEN), validate_every_n_steps=1)
    validated = [seen for seen in run.trainer.seen if not seen.is_train]
    assert len(validated) == 6 and len(run.log) == 3
    for seen in validated:
        assert seen.moved is seen.given
        assert seen.indicator[0] == seen.indicator[1]
        assert seen.loss == float(seen.before_weights.mean())
        assert len(seen.timesteps) == 1
    trained = [seen for seen in run.trainer.seen if seen.is_train]
    assert all(seen.indicator[0] != seen.indicator[1] for seen in trained)


# -- cached latents ----------------------------------------------------------------------------------------------------

SAID = "latents, which are augmented in place of the images"


def check_latents_move_into_black(run: Run) -> None:
    vae = run.trainer.models[2]
    black = vae.encode(torch.full((1, 3, 128, 128), -1.0)).latent_dist.mode()[0, :, 0, 0]
    for seen in run.trainer.seen:
        border = torch.ones(16, 16, dtype=torch.bool)
        border[5:11, 5:11] = False
        # Of a sampled latent, with a standard deviation of 0.1 here, the mean over 256 places is taken.
        wanted = black[:, None].expand(2, 4, int(border.sum()))
        torch.testing.assert_close(seen.latents[:, :, border], wanted, atol=0.03, rtol=0)
        assert (seen.latents[:, :, 6:10, 6:10] != black[:, None, None]).all()
        assert seen.moved["latents"] is seen.given["latents"]


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_cached_latents_are_zoomed_out_of_what_the_vae_encodes_black_to_and_that_is_said_once(
    train: Train, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(ALWAYS_SMALLER, kind=kind, spy=Overfitted, cache_latents=True, subsets=({**OWN, "mask": "alpha"},))
    check_latents_move_into_black(run)
    assert capsys.readouterr().out.count(SAID) == 1
    assert all((seen.moved["alpha_masks"][:, 0] == 0).all() for seen in run.trainer.seen)
    assert run.saved()["metadata"]["ss_apt_augment_space"] == "latent"


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("border", ["learn", "ignore"])
@pytest.mark.parametrize("trainers", ["0.10", "0.11"], indirect=True)
def test_a_border_that_is_ignored_gets_no_gradient_but_that_of_the_prior_samples(
    train: Train, monkeypatch: pytest.MonkeyPatch, border: str, cached: bool
) -> None:
    gradients: list[tuple[Tensor, Tensor]] = []
    assess = AptObjective._step

    def spied(self: AptObjective, passes: Any, *rest: Any, **options: Any) -> Any:
        step = assess(self, passes, *rest, **options)
        passes.tuned_prediction.register_hook(lambda gradient: gradients.append((gradient, passes.instances)))
        return step

    monkeypatch.setattr(AptObjective, "_step", spied)
    apt = {**ALWAYS_SMALLER, "augment_border": border, "lambda_dist": 0.0, "lambda_attn": 0.0, "loss_weighting": False}
    train(apt, spy=Overfitted, cache_latents=cached, subsets=({**OWN}, {**OWN, "is_reg": True}))
    assert len(gradients) == 3 and any(not instances.all() for _, instances in gradients)
    for gradient, instances in gradients:
        inside = torch.zeros(16, 16, dtype=torch.bool)
        inside[5:11, 5:11] = True
        learns = gradient[:, :, ~inside].flatten(1).any(dim=1)
        assert learns.tolist() == [border == "learn" or not own for own in instances.tolist()]
        assert gradient[:, :, inside].flatten(1).any(dim=1).all()


@pytest.mark.parametrize("apt", [{"monitor_only": True}, {"augmentation": False}])
def test_without_augmentation_cached_latents_are_not_spoken_of(
    train: Train, apt: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    train(apt, cache_latents=True)
    assert SAID not in capsys.readouterr().out


class OwnLatents(Overfitted):
    """A data set that comes with latents, which no argument tells."""

    def assert_extra_args(self, args: Any, train_dataset_group: Any, val_dataset_group: Any) -> None:
        for info in train_dataset_group.datasets[0].image_data.values():
            info.latents = torch.randn(4, 16, 16)


def test_latents_found_only_in_the_data_set_are_augmented_and_that_is_said_once(
    train: Train, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "apt_hooks"):
        run = train(ALWAYS_SMALLER, spy=OwnLatents)
    check_latents_move_into_black(run)
    assert (caplog.text + capsys.readouterr().out).count(SAID) == 1
    assert run.saved()["metadata"]["ss_apt_augment_space"] == "latent"


def test_the_vae_keeps_its_precision(train: Train) -> None:
    class HalfPrecision(OwnLatents):
        def load_target_model(self, *args: Any) -> Any:
            loaded = super().load_target_model(*args)
            loaded[2].bfloat16()
            return loaded

    run = train({**ALWAYS_SMALLER, "augment_space": "latent"}, spy=HalfPrecision)
    assert next(run.trainer.models[2].parameters()).dtype == torch.bfloat16
    run.trainer.models[2].float()
    check_latents_move_into_black(run)


@pytest.mark.parametrize(("kind", "fitting"), [("sd15", "sd15"), ("sdxl", "sdxl")])
def test_a_preset_of_another_model_ends_the_run_with_one_line_that_names_the_one_that_fits(
    make: Train, monkeypatch: pytest.MonkeyPatch, kind: str, fitting: str
) -> None:
    monkeypatch.setattr(blocks, "TEXT_WIDTHS", {"sd21": 1024, fitting: TEXT_WIDTH})
    run = make({"preset": "sd21", "blocks": "auto"}, kind=kind)
    with pytest.raises(
        SystemExit, match=rf'^apt-hooks: error: \[apt\] preset = "sd21" .* this one\'s is "{fitting}"'
    ) as error:
        run.trainer.train(run.args)
    assert "\n" not in str(error.value)
    run = make({"preset": fitting, "blocks": "auto"}, kind=kind)
    run.trainer.train(run.args)
    assert run.saved()["metadata"]["ss_apt_preset"] == fitting


def test_latents_in_place_of_the_images_asked_for_end_the_run_with_one_line(make: Train) -> None:
    run = make({**ALWAYS_SMALLER, "augment_space": "image"}, spy=OwnLatents)
    with pytest.raises(SystemExit, match=r'^apt-hooks: error: .*augment_space = "image"') as error:
        run.trainer.train(run.args)
    assert "\n" not in str(error.value)


def test_a_noise_schedule_of_another_length_ends_the_run_with_one_line(
    make: Train, trainers: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Longer(trainers["sd15"].train_util.NoiseScheduler):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.config.num_train_timesteps = 4000

    monkeypatch.setattr(trainers["sd15"].train_util, "NoiseScheduler", Longer)
    run = make({})
    with pytest.raises(SystemExit, match=r"^apt-hooks: error: the noise schedule has 4000 timesteps; .* of 1000$"):
        run.trainer.train(run.args)


def test_latent_space_asked_for_leaves_the_images_alone(train: Train) -> None:
    run = train({**ALWAYS_SMALLER, "augment_space": "latent"}, spy=Overfitted)
    assert all(seen.moved["images"] is seen.given["images"] for seen in run.trainer.seen)
    check_latents_move_into_black(run)
    assert run.saved()["metadata"]["ss_apt_augment_space"] == "latent"


@pytest.mark.parametrize("option", ["noise_offset", "multires_noise_iterations", "ip_noise_gamma"])
def test_noise_that_the_base_model_does_not_know_is_told_at_start(
    make: Train, caplog: pytest.LogCaptureFixture, option: str
) -> None:
    said = "opens a gap that is no overfitting, and gamma"
    for value in (0, 1):
        run = make({"monitor_only": True})
        setattr(run.args, option, value)
        with caplog.at_level(logging.WARNING, "apt_hooks"):
            run.trainer.train(run.args)
        assert (said in caplog.text) == bool(value)
    assert f"apt-hooks: {option} = 1: " in caplog.text and caplog.text.count(said) == 1


# -- the loss ----------------------------------------------------------------------------------------------------------


def test_the_weight_multiplies_the_loss_after_all_else(train: Train) -> None:
    run = train(WEIGHTS_ONLY, spy=HalfOverfitted, min_snr_gamma=1.0, max_timestep=200)
    for seen in run.trainer.seen:
        assert (seen.before_weights < 0.9 * seen.squares).all(), "min-SNR is to have its say"
        assert seen.weights.tolist() == pytest.approx([0.5] * len(seen.weights))
    assert [line["loss_weight"] for line in run.log] == [pytest.approx(0.5)] * 3


@pytest.mark.parametrize("apt", [{}, {"objective": "dco"}], ids=["apt", "dco"])
def test_the_loss_shown_is_the_plain_one_to_the_bit(train: Train, apt: dict[str, Any]) -> None:
    terms = apt or {"augmentation": False, "lambda_dist": 30.0}
    run = train(terms, spy=Overfitted, subsets=(OWN, UNSEEN), min_snr_gamma=1.0, validate_every_n_steps=2)
    trained = [seen for seen in run.trainer.seen if seen.is_train]
    shown = [line["loss/current"] for line in run.tracked if "loss/current" in line]
    assert shown == [seen.loss for seen in trained] == [float(seen.before_weights.mean()) for seen in trained]
    plain = train(subsets=(OWN, UNSEEN), min_snr_gamma=1.0, validate_every_n_steps=2, name="plain")
    assert shown[0] == plain.tracked[0]["loss/current"], "of the first step, which begins from the same weights"


def test_dco_weighs_a_sample_by_how_much_better_than_the_base_it_does(train: Train) -> None:
    run = train(
        {"objective": "dco", "dco_beta": 100.0}, spy=Spy, subsets=(OWN, REG), train_batch_size=1, max_train_steps=8
    )
    owns = [not uncounted(seen).item() for seen in run.trainer.seen]
    assert set(owns) == {True, False}
    for seen, line, own in zip(run.trainer.seen, run.log, owns, strict=True):
        weight = 50.0  # what every sample starts with, and regularization images stay with
        if own:
            weight = 100.0 / (1.0 + math.exp(-100.0 * (line["loss_tuned"] - line["loss_frozen"])))
            assert line["loss_weight"] == pytest.approx(weight, rel=1e-3)
        assert seen.weights.tolist() == pytest.approx([weight], rel=1e-3)
        assert line["l_attn"] is None and not line["augmented"]


def test_gamma_comes_from_the_raw_losses(train: Train) -> None:
    apt = {"monitor_only": True, "ema_alpha": 1.0, "num_bins": 1}
    run = train(apt, spy=Spy, min_snr_gamma=1.0, max_timestep=200)
    for seen, line in zip(run.trainer.seen, run.log, strict=True):
        assert line["loss_tuned"] == pytest.approx(float(seen.squares.mean()), rel=1e-5)
        assert seen.indicator[1]["loss_tuned"] == [pytest.approx(float(seen.squares.mean()), rel=1e-5)]


@pytest.mark.parametrize(("preset", "units"), [("sd15", "epsilon"), ("sd21", "v_prediction")])
def test_gamma_of_a_model_of_v_is_in_epsilon_units_but_for_the_papers_sd21(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], preset: str, units: str
) -> None:
    monkeypatch.setattr(trainer, "preset_of", lambda *_: None)
    options = {"train_batch_size": 1, "v_parameterization": True, "max_train_steps": 4}
    run = train({"preset": preset, **WEIGHTS_ONLY, "ema_alpha": 1.0, "num_bins": 1}, spy=Spy, **options)
    kept = importlib.import_module("library.train_util").NoiseScheduler().alphas_cumprod
    for seen, line in zip(run.trainer.seen, run.log, strict=True):
        factor = float(kept[seen.timesteps[0]]) if units == "epsilon" else 1.0
        assert seen.indicator[-1]["loss_tuned"] == pytest.approx([factor * float(seen.squares)], rel=1e-5)
        assert line["loss_tuned"] == pytest.approx(float(seen.squares), rel=1e-5)
    assert run.saved()["metadata"]["ss_apt_indicator_units"] == units
    said = "gamma in epsilon units (the model predicts v_prediction)"
    assert (said in capsys.readouterr().out) == (units == "epsilon")


def test_the_batches_of_a_step_update_the_indicator_once_and_share_its_gamma(train: Train) -> None:
    options = {"gradient_accumulation_steps": 4, "train_batch_size": 1, "max_timestep": 300}
    run = train(WEIGHTS_ONLY, spy=Spy, **options)
    assert len(run.trainer.seen) == 4 * len(run.log) == 12
    averages: dict[int, float] = {}
    for i, line in enumerate(run.log):
        step = run.trainer.seen[4 * i : 4 * i + 4]
        states = [state for seen in step for state in seen.indicator]
        assert all(state == states[0] for state in states[:-1]) and states[-1] != states[0]
        samples: dict[int, list[float]] = {}
        for seen in step:
            samples.setdefault(int(seen.timesteps[0]) // 100, []).append(float(seen.squares))
            weight = 1 - line["gamma"][int(seen.timesteps[0]) // 100]
            assert 4 * float(seen.weights) == pytest.approx(weight, abs=1e-6)  # a batch is a quarter of the step
        assert max(map(len, samples.values())) > 1
        for b, squares in samples.items():
            mean = sum(squares) / len(squares)
            averages[b] = 0.9 * averages.get(b, mean) + 0.1 * mean
        assert {b: states[-1]["loss_tuned"][b] for b in averages} == pytest.approx(averages, rel=1e-5)


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_the_regularizer_is_added_once_and_for_the_samples_that_count(train: Train, kind: str) -> None:
    apt = {"loss_weighting": False, "augmentation": False, "lambda_dist": 2.0, "lambda_attn": 3.0}
    run = train(apt, kind=kind, spy=Overfitted, subsets=(OWN, {**REG, "captions": ["a dog"]}), train_batch_size=3)
    for seen, line in zip(run.trainer.seen, run.log, strict=True):
        regularizer = 2.0 * (line["l_mu"] + line["l_sigma"]) + 3.0 * line["l_attn"]
        assert regularizer > 0
        assert seen.regularizer == pytest.approx(regularizer * 2 / 3, rel=1e-5)
        assert seen.regularizer_weight == pytest.approx(1.0, abs=1e-6)


L2_SP = {"objective": "l2-sp", "lambda_offset": 0.02}


@pytest.mark.parametrize("kind", KINDS)
def test_l2_sp_holds_the_whole_network_for_the_samples_that_count(train: Train, kind: str) -> None:
    options = {"kind": kind, "network_train_unet_only": False, "gradient_checkpointing": True, "train_batch_size": 3}
    run = train(L2_SP, spy=Spy, subsets=(OWN, {**REG, "captions": ["a dog"]}), **options)
    for seen, line in zip(run.trainer.seen, run.log, strict=True):
        assert line["l_offset"] > 0 and line["loss_weight"] == 1.0 and line["delta_noise"] > 0
        assert seen.regularizer == pytest.approx(0.02 * line["l_offset"] * 2 / 3, rel=1e-5)
        assert seen.regularizer_weight == pytest.approx(1.0, abs=1e-6)
    # A run of one step less ends with the network that the last line is of.
    weights = train(L2_SP, subsets=(OWN, {**REG, "captions": ["a dog"]}), **options, max_train_steps=2, name="two")
    held = weights.saved()["weights"]
    offsets = [held[name.replace("_down", "_up")] @ held[name] for name in held if "lora_down" in name]
    assert any(name.startswith("loras.te0") for name in held)
    wanted = sum(float(offset.double().square().sum()) for offset in offsets)
    assert run.log[-1]["l_offset"] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_monitor_only_tells_the_weights_offset_unasked(train: Train, kind: str) -> None:
    options = {"kind": kind, "network_train_unet_only": False}
    asked = train({**L2_SP, "monitor_only": True}, **options)
    unasked = train({"monitor_only": True}, **options, name="unasked")
    found = [line["l_offset"] for line in unasked.log]
    assert min(found) > 0 and found == [line["l_offset"] for line in asked.log]
    weights, wanted = unasked.saved()["weights"], train(None, **options, name="plain").saved()["weights"]
    assert weights.keys() == wanted.keys() and all(torch.equal(weights[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("config", [L2_SP, {"objective": "dreambooth"}], ids=["l2-sp", "dreambooth"])
def test_the_frozen_pass_that_only_the_log_needs_can_be_spared(train: Train, config: dict[str, Any]) -> None:
    each, spared = train(config), train({**config, "frozen_every": 2}, name="spared")
    weights, wanted = spared.saved()["weights"], each.saved()["weights"]
    assert weights.keys() == wanted.keys() and all(torch.equal(weights[key], wanted[key]) for key in wanted)
    assert [line["loss_frozen"] is not None for line in spared.log] == [True, False, True]
    assert [line["l_offset"] for line in spared.log] == [line["l_offset"] for line in each.log]


@pytest.mark.parametrize("kind", KINDS)
def test_beside_apt_the_whole_network_is_held(train: Train, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"kind": kind, "network_train_unet_only": False, "train_batch_size": 3}
    run = train(
        {"num_bins": 4, "lambda_offset": 0.02}, spy=Spy, subsets=(OWN, {**REG, "captions": ["a dog"]}), **options
    )
    assert ", weights' offset (L2-SP) times 0.02" in capsys.readouterr().out
    for seen, line in zip(run.trainer.seen, run.log, strict=True):
        terms = line["l_mu"] + line["l_sigma"] + line["l_attn"] + 0.02 * line["l_offset"]
        assert line["l_offset"] > 0 and line["l_attn"] is not None
        assert seen.regularizer == pytest.approx(terms * 2 / 3, rel=1e-5)
    assert any(name.startswith("loras.te0") for name in run.saved()["weights"])


def test_l2_sp_under_accumulation_is_the_penalty_of_the_step(train: Train) -> None:
    options = {"subsets": (OWN,), "max_train_steps": 2}
    whole = train(L2_SP, train_batch_size=1, **options)
    parts = train(L2_SP, spy=Spy, train_batch_size=1, gradient_accumulation_steps=2, **options, name="parts")
    first = whole.log[0]["l_offset"]
    assert parts.log[0]["l_offset"] == pytest.approx(first, rel=1e-6)
    # Each of two batches adds half of the gradient.
    assert [seen.regularizer_weight for seen in parts.trainer.seen] == pytest.approx([0.5] * 4)


def test_l2_sp_refuses_what_is_no_pair(make: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    network = importlib.import_module("networks.lora").Network
    init = network.__init__

    def with_more(self: Any, *args: Any) -> None:
        init(self, *args)
        self.dora_scale = torch.nn.Parameter(torch.zeros(3))

    monkeypatch.setattr(network, "__init__", with_more)
    run = make(L2_SP)
    with pytest.raises(SystemExit, match=r'"l2-sp" is for plain LoRAs: .* 1 of \d+ trained .*\(dora_scale\)') as error:
        run.trainer.train(run.args)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_reentrant_checkpointing_gives_the_same_lora(train: Train, kind: str) -> None:
    apt = {"augmentation": False, "lambda_dist": 30.0, "lambda_attn": 1000.0}
    options = {"kind": kind, "cache_text_encoder_outputs": True, "max_train_steps": 2}
    runs = [train(apt, gradient_checkpointing=on, name=f"{on}", **options) for on in (False, True)]
    weights = [run.saved()["weights"] for run in runs]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-3, atol=1e-5)
    assert not runs[0].same_lora(train(ALL_OFF, name="off", **options))


# -- what the frozen model reads ---------------------------------------------------------------------------------------


class Reading(Spy):
    """Keeps the tokens that each text encoder was given, and whether for a pass that is differentiated."""

    def load_target_model(self, *args: Any) -> Any:
        loaded = super().load_target_model(*args)
        self.read: list[Tensor] = []
        encoders = loaded[1] if isinstance(loaded[1], list) else [loaded[1]]
        encoders[0].register_forward_pre_hook(lambda module, given: self.read.append(given[0]))
        return loaded


WORDS = {"identifier": "sks", "class_word": "bag"}


def base_conditioning(trainers: dict[str, ModuleType], kind: str, args: argparse.Namespace, captions: list[str]) -> Any:
    """What the text encoders without LoRA make of captions."""
    util = trainers["noising"]
    widths = [24] if kind == "sd15" else [8, 16]
    models, _, _ = util.load_models(args, widths, lambda checkpointing: None)
    tokens = util.TokenizeStrategy(len(widths)).tokenize(captions)
    models += [models[-1]] if kind == "sdxl" else []
    with torch.no_grad():
        return util.TextEncodingStrategy().encode_tokens(None, models, tokens)


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
@pytest.mark.parametrize("unet_only", [True, False], ids=["text encoder as it is", "text encoder trained"])
@pytest.mark.parametrize("words", [{}, WORDS], ids=["no identifier", "identifier"])
def test_the_frozen_model_reads_the_class_word_through_text_encoders_without_lora(
    train: Train, trainers: dict[str, ModuleType], kind: str, unet_only: bool, words: dict[str, str]
) -> None:
    options = {"kind": kind, "network_train_unet_only": unet_only, "network_dropout": 0.3}
    if not unet_only:
        options["gradient_checkpointing"] = True  # puts text encoders into training mode, with their dropout
    run = train(words, spy=Reading, subsets=(OWN, REG), train_batch_size=4, **options)
    for seen in run.trainer.seen:
        own = [c.replace("sks", "bag") if words and c in OWN["captions"] else c for c in seen.given["captions"]]
        frozen, *with_lora, tuned = seen.conds
        # The first batch shows whether the training begins from the base model, where both read other conditioning.
        assert len(with_lora) == int(seen is run.trainer.seen[0] and (bool(words) or not unet_only))
        for conds in with_lora:
            assert all(map(torch.allclose, conds, frozen)) == unet_only
        for found, wanted in zip(frozen, base_conditioning(trainers, kind, run.args, own), strict=True):
            torch.testing.assert_close(found, wanted)
        plain = base_conditioning(trainers, kind, run.args, seen.given["captions"])
        same = all(torch.allclose(found, wanted) for found, wanted in zip(tuned, plain, strict=True))
        assert same == unet_only
    assert len(run.trainer.read) == (3 * 2 + 1 if words or not unet_only else 3)


def test_the_weights_of_a_caption_go_to_the_class_word(train: Train, trainers: dict[str, ModuleType]) -> None:
    run = train(WORDS, spy=Reading, subsets=({"captions": ["(sks:1.5) dog", "a (sks:1.5)"]},), weighted_captions=True)
    for seen in run.trainer.seen:
        swapped = [c.replace("(sks:1.5)", "bag") for c in seen.given["captions"]]
        (wanted,) = base_conditioning(trainers, "sd15", run.args, swapped)
        places = [c.split().index("bag") for c in swapped]
        wanted[range(2), places] *= 1.5
        torch.testing.assert_close(seen.conds[0][0], wanted)


def test_of_cached_text_only_changed_captions_are_encoded_and_once_a_run(
    train: Train, trainers: dict[str, ModuleType]
) -> None:
    subsets = ({"captions": ["a sks dog", "a cat", "one sks dog", "two cats"]},)
    run = train(WORDS, kind="sdxl", spy=Reading, subsets=subsets, cache_text_encoder_outputs=True, max_train_steps=6)
    cached, later = run.trainer.read[:4], run.trainer.read[4:]
    assert len(cached) == 4 and len(later) == 2
    for seen in run.trainer.seen:
        swapped = [caption.replace("sks", "bag") for caption in seen.given["captions"]]
        for found, wanted in zip(seen.conds[0], base_conditioning(trainers, "sdxl", run.args, swapped), strict=True):
            torch.testing.assert_close(found, wanted)


def test_words_of_unequal_token_length_end_the_run_with_one_line(make: Train) -> None:
    run = make({"identifier": "sks", "class_word": "stuffed animal"})
    with pytest.raises(SystemExit, match=r"^apt-hooks: error: .*'sks' is 1 tokens.*'stuffed animal' is 2"):
        run.trainer.train(run.args)


@pytest.mark.parametrize(("identifier", "warned"), [("sks", False), ("ohwx", True)])
def test_an_identifier_in_none_of_the_captions_is_warned_of(
    train: Train, caplog: pytest.LogCaptureFixture, identifier: str, warned: bool
) -> None:
    train({"identifier": identifier, "class_word": "bag"}, max_train_steps=1)
    assert ("is in none of the captions" in caplog.text) == warned


# -- what a run leaves behind ------------------------------------------------------------------------------------------


def test_a_line_a_step_is_logged_and_tracked(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    run = train({"preset": "sd15", "num_bins": 4}, gradient_accumulation_steps=2)
    assert [line["step"] for line in run.log] == [1, 2, 3]
    assert all(list(line) == ["step", "gamma", "gap", *VALUES] and len(line["gamma"]) == 4 for line in run.log)
    on = set(VALUES) - {"l_joint", "l_offset"}  # which are in place of the other regularizers
    assert all(math.isfinite(line[name]) for line in run.log for name in on)
    names = {f"apt/{name}" for name in on} | {f"apt/gamma/{i}" for i in range(4)}
    assert set(run.tracked[-1]) == names | {"at", "loss/current", "loss/average"}
    assert run.tracked[-1]["apt/delta_noise"] == run.log[-1]["delta_noise"]
    said = capsys.readouterr().out
    assert said.count("apt-hooks") == 1 and "overrides num_bins = 4" in said and "up-blocks 2, 3" in said


def test_with_frozen_every_a_line_in_so_many_compares_the_models(train: Train) -> None:
    run = train({"preset": "sd15", "frozen_every": 2, "regularizer": "joint"})
    assert [line["loss_frozen"] is not None for line in run.log] == [True, False, True]
    assert [line["l_joint"] is not None for line in run.log] == [True, False, True]
    assert all(line["loss_weight"] is not None and line["l_attn"] is None for line in run.log)


def test_every_saved_lora_carries_metadata_of_its_moment(train: Train) -> None:
    run = train({"preset": "sd15", "num_bins": 4}, save_every_n_steps=2)
    last, second = (run.saved(name)["metadata"] for name in ("lora.pt", "lora-step2.pt"))
    assert (second["ss_apt_steps"], last["ss_apt_steps"]) == ("2", "3")
    assert (last["ss_apt_version"], last["ss_apt_preset"]) == (version(), "sd15")
    assert json.loads(last["ss_apt_config"])["num_bins"] == 4
    gammas = run.trainer.apt.objective.indicator.gammas.tolist()
    assert json.loads(last["ss_apt_gamma"]) == pytest.approx(gammas, abs=1e-6)
    assert last["ss_seed"] == "1" and "modelspec.title" in last
    plain = train(name="plain").saved()["metadata"]
    assert {key for key in last.keys() - plain.keys() if not key.startswith("ss_apt_")} == set()


def test_no_metadata_means_none_of_ours_either(train: Train) -> None:
    assert not [key for key in train({}, no_metadata=True).saved()["metadata"] if "apt" in key]


def test_a_resumed_run_goes_on_with_the_indicator_and_the_log(train: Train) -> None:
    first = train({"ema_alpha": 0.5}, spy=Spy, save_every_n_steps=2, save_state=True)
    state = first.folder / "lora-step2-state"
    saved = json.loads((state / STATE_FILE).read_text())
    assert saved["step"] == 2 and any(saved["indicator"]["loss_tuned"])
    lines = first.log
    again = train({"ema_alpha": 0.5}, spy=Spy, resume=str(state), max_train_steps=2)
    assert again.trainer.seen[0].indicator[0] == saved["indicator"]
    assert [line["step"] for line in again.log] == [1, 2, 3, 4]
    assert again.log[:2] == lines[:2]
    assert again.saved()["metadata"]["ss_apt_steps"] == "4"


class StartKept(Spy):
    """Tells of each pass whether it is differentiated, has the LoRA's first weights, and in which modes."""

    first: dict[str, Tensor]

    def on_step_start(self, *args: Any, is_train: bool) -> None:
        super().on_step_start(*args, is_train=is_train)
        if not hasattr(self, "first"):
            self.network, self.calls = args[2], []
            self.first = {k: x.clone() for k, x in self.network.state_dict().items()}

    def call_unet(self, *args: Any, **kwargs: Any) -> Tensor:
        weights = self.network.state_dict()
        as_first = all(torch.equal(weights[k], x) for k, x in self.first.items())
        self.calls.append((torch.is_grad_enabled(), as_first, {module.training for module in self.network.modules()}))
        return super().call_unet(*args, **kwargs)


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_frozen_pass_of_reference_start_has_the_first_weights_and_no_dropout(
    train: Train, trainers: dict[str, ModuleType], kind: str, precision: str
) -> None:
    options = {"kind": kind, "network_train_unet_only": False, "network_dropout": 0.3, "mixed_precision": precision}
    run = train({"reference": "start"}, spy=StartKept, gradient_checkpointing=True, **options)
    frozen, tuned = run.trainer.calls[::2], run.trainer.calls[1::2]
    assert frozen == [(False, True, {False})] * 3
    assert tuned == [(True, True, {True}), (True, False, {True}), (True, False, {True})]
    base = base_conditioning(trainers, kind, run.args, run.trainer.seen[0].given["captions"])
    assert not any(map(torch.allclose, run.trainer.seen[0].conds[0], base)), "the text encoders keep their LoRA"
    assert json.loads(run.saved()["metadata"]["ss_apt_config"])["reference"] == "start"
    assert not any(map(torch.equal, run.trainer.first.values(), run.saved()["weights"].values()))


def test_a_resumed_run_of_reference_start_equals_the_uninterrupted_one(train: Train) -> None:
    # One batch, and numbers by the step: what the trainer itself does not bring back.
    options: dict[str, Any] = {"subsets": (OWN,), "network_train_unet_only": False, "save_state": True}
    apt = {"reference": "start", "augmentation": False}

    class Seeded(Spy):
        def on_step_start(self, *args: Any, is_train: bool) -> None:
            super().on_step_start(*args, is_train=is_train)
            torch.manual_seed(self.apt.step)

    whole = train(apt, spy=Seeded, save_every_n_steps=2, max_train_steps=4, **options, name="whole")
    half = train(apt, spy=Seeded, save_every_n_steps=2, max_train_steps=2, **options, name="half")
    state = half.folder / "lora-step2-state"
    assert {STATE_FILE, START_FILE} <= {path.name for path in state.iterdir()}
    assert not half.same_lora(whole)
    again = train(apt, spy=Seeded, resume=str(state), max_train_steps=2, **options, name="half")
    assert again.same_lora(whole)
    assert again.log == whole.log and len(whole.log) == 4
    by_base = train({**apt, "reference": "base"}, spy=Seeded, max_train_steps=4, **options)
    assert not by_base.same_lora(whole)


def test_states_without_the_start_end_a_run_of_reference_start_with_one_line(train: Train) -> None:
    start = {"reference": "start"}
    plain = train(save_every_n_steps=2, save_state=True, name="plain")
    with pytest.raises(
        SystemExit, match=r'^apt-hooks: error: .*was saved without apt-hooks; resume with reference = "b'
    ):
        train(start, resume=str(plain.folder / "lora-step2-state"), name="again")
    first = train(start, save_every_n_steps=2, save_state=True)
    (first.folder / "lora-step2-state" / START_FILE).unlink()
    with pytest.raises(
        SystemExit, match=rf"^apt-hooks: error: .*{START_FILE} cannot be read .* begin a new run from its"
    ):
        train(start, resume=str(first.folder / "lora-step2-state"), name="again")


class Zeroed(Spy):
    """A LoRA that begins at zero, as sd-scripts' does."""

    def on_step_start(self, *args: Any, is_train: bool) -> None:
        if not self.seen:
            for lora in args[2].loras.values():
                torch.nn.init.zeros_(lora.lora_up.weight)
        super().on_step_start(*args, is_train=is_train)


GOES_ON = "the LoRA changes the model before the first step"


@pytest.mark.parametrize("setting", [
    {}, {"apt": WORDS}, {"network_train_unet_only": False, "gradient_checkpointing": True, "network_dropout": 0.5},
    {"subsets": (REG, OWN), "train_batch_size": 1, "max_train_steps": 4}, {"mixed_precision": "bf16", "kind": "sdxl"},
], ids=["plain", "class word", "text encoders in training mode", "regularization images", "bf16"])  # fmt: skip
def test_a_run_that_goes_on_from_a_lora_says_so_and_one_that_begins_at_zero_does_not(
    train: Train, caplog: pytest.LogCaptureFixture, setting: dict[str, Any]
) -> None:
    apt = setting.get("apt", {})
    options = {key: value for key, value in setting.items() if key != "apt"}
    train(apt, spy=Zeroed, **options)
    assert GOES_ON not in caplog.text
    state = train(apt, save_every_n_steps=2, save_state=True, **options, name="other").folder / "lora-step2-state"
    assert [GOES_ON in message for message in caplog.messages].count(True) == 1
    caplog.clear()
    train(apt, resume=str(state), **options)
    train({**apt, "reference": "start"}, **options)
    assert GOES_ON not in caplog.text
    (state / STATE_FILE).unlink()
    train(apt, resume=str(state), **options)
    assert caplog.text.count(GOES_ON) == 1


def test_dropout_is_told_at_start_and_in_the_log(train: Train, caplog: pytest.LogCaptureFixture) -> None:
    run = train({}, network_dropout=0.3)
    assert caplog.text.count("the LoRA has dropout (network_dropout = 0.3): its loss is measured with it") == 1
    about = json.loads((run.folder / "lora-apt.jsonl").read_text().splitlines()[0])["run"]
    assert about["dropout"] == {"network_dropout": 0.3}
    caplog.clear()
    run = train({}, name="none")
    about = json.loads((run.folder / "lora-apt.jsonl").read_text().splitlines()[0])["run"]
    assert "dropout" not in about and "dropout" not in caplog.text


@pytest.mark.parametrize("place", ["library.sampling", "library.train_util"])
def test_the_log_has_the_prompts_of_the_pictures(train: Train, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    def load_prompts(path: str) -> list[dict[str, Any]]:
        if path != "p.txt":
            raise FileNotFoundError(path)
        return [{"prompt": "a dog at sea", "enum": 0}, {"enum": 1}]

    module = sys.modules.get(place) or ModuleType(place)
    monkeypatch.setitem(sys.modules, place, module)
    monkeypatch.setattr(module, "load_prompts", load_prompts, raising=False)
    for path, prompts in (("p.txt", ["a dog at sea", ""]), ("missing.txt", None), (None, None)):
        run = train({}, name=str(path), sample_prompts=path)
        about = json.loads((run.folder / "lora-apt.jsonl").read_text().splitlines()[0])["run"]
        assert about.get("sample_prompts") == prompts


def test_log_pictures_and_report_of_a_resumed_run_agree(train: Train) -> None:
    pytest.importorskip("PIL.Image")
    options = {"ema_alpha": 0.5}, {"sample_every_n_steps": 1}
    first = train(options[0], **options[1], save_every_n_steps=2, save_state=True)
    run = read_run(first.folder / "lora-apt.jsonl")
    assert run is not None and read_samples(run.path, run.starts).moments == [("step", i) for i in (1, 2, 3)]
    time.sleep(1.1)  # pictures have their second in the name
    again = train(options[0], **options[1], resume=str(first.folder / "lora-step2-state"), max_train_steps=3)
    assert [line["step"] for line in again.log] == [1, 2, 3, 4, 5]
    assert [line["step"] for line in read_log(again.folder / "lora-apt.1.jsonl")] == [1, 2, 3]
    run = read_run(again.folder / "lora-apt.jsonl")
    found = read_samples(run.path, run.starts)
    assert found.moments == [("step", i) for i in (1, 2, 3, 4, 5)] and not found.notes
    names = sorted(path.name[:11] for path in (again.folder / "sample").iterdir())
    assert names == [f"lora_00000{i}" for i in (1, 1, 2, 2, 3, 3)], "the trainer's own names stay"


@pytest.mark.parametrize("resumed", [False, True])
def test_a_run_that_skips_up_to_a_step_counts_on_from_there(train: Train, resumed: bool) -> None:
    first = train({}, save_every_n_steps=3, save_state=True, max_train_steps=4)
    state = {"resume": str(first.folder / "lora-step3-state")} if resumed else {}
    earlier = first.log
    again = train({}, initial_step=3, skip_until_initial_step=True, max_train_steps=5, **state)
    assert [line["step"] for line in again.log] == [1, 2, 3, 4, 5]
    assert again.log[:3] == earlier[:3]
    assert read_log(again.folder / "lora-apt.1.jsonl") == earlier
    assert again.saved()["metadata"]["ss_apt_steps"] == "5"


def test_a_state_saved_without_apt_is_warned_of_and_starts_anew(train: Train, caplog: pytest.LogCaptureFixture) -> None:
    plain = train(save_every_n_steps=2, save_state=True, name="plain")
    state = plain.folder / "lora-step2-state"
    assert not (state / STATE_FILE).exists()
    run = train({}, spy=Spy, resume=str(state))
    assert "starts anew" in caplog.text
    assert run.trainer.seen[0].indicator[0]["loss_tuned"] == [None] * 10
    assert [line["step"] for line in run.log] == [1, 2, 3]


def test_a_state_of_other_bins_ends_the_run_with_one_line(train: Train) -> None:
    first = train({}, save_every_n_steps=2, save_state=True)
    with pytest.raises(SystemExit, match=r"^apt-hooks: error: .*num_bins = 10, this run 5"):
        train({"num_bins": 5}, resume=str(first.folder / "lora-step2-state"), name="again")


def test_the_models_carry_no_hook_after_the_run(train: Train) -> None:
    run = train({}, spy=Spy, kind="sdxl", gradient_checkpointing=True)
    unet = run.trainer.models[3]
    assert not any(module._forward_hooks for module in unet.modules())
    assert not any(parameter.requires_grad for parameter in unet.parameters())
    assert all(module.training for module in unet.modules())


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("apt", "arguments", "said"),
    [
        ({}, {"torch_compile": True}, "--torch_compile cannot be used"),
        ({"monitor_only": True}, {"deepspeed": True}, "--deepspeed cannot be used"),
        ({"augment_space": "image"}, {"cache_latents": True}, "drop cache_latents"),
        ({"augment_space": "image"}, {"cache_latents_to_disk": True}, "drop cache_latents"),
        ({"lamda_attn": 1.0}, {}, 'did you mean "lambda_attn"'),
        ({}, {"apt_config": "apt.toml"}, "--apt_config apt.toml"),
        (None, {"apt_config": "nowhere.toml"}, "nowhere.toml"),
        (3, {}, "found apt = 3"),
    ],
)
def test_what_cannot_work_ends_with_one_line_before_anything_is_loaded(
    make: Train, apt: Any, arguments: dict[str, Any], said: str
) -> None:
    with pytest.raises(SystemExit) as error:
        make(apt, **arguments)
    assert str(error.value).startswith("apt-hooks: error: ") and said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("apt", [{"monitor_only": True}, {"augmentation": False}])
def test_image_space_is_no_matter_to_cached_latents_where_nothing_is_augmented(
    make: Train, apt: dict[str, Any]
) -> None:
    assert make({"augment_space": "image", **apt}, cache_latents=True).trainer.apt_config == AptConfig(
        augment_space="image", drifts=False, **apt
    )


@pytest.mark.parametrize(("apt", "said"), [({"blocks": [0]}, "up-block 0 has no attention"), ({}, "networks.other")])
def test_what_only_the_models_tell_ends_with_one_line(
    make: Train, monkeypatch: pytest.MonkeyPatch, apt: dict[str, Any], said: str
) -> None:
    class Other(torch.nn.Linear):
        """A network that replaces no forward."""

        def apply_to(self, *args: Any) -> None: ...

    other = SimpleNamespace(create_network=lambda *args: Other(1, 1))
    monkeypatch.setitem(sys.modules, "networks.other", other)
    run = make(apt, network_module="networks.other")
    with pytest.raises(SystemExit) as error:
        run.trainer.train(run.args)
    assert str(error.value).startswith("apt-hooks: error: ") and said in str(error.value)


def test_the_argument_apt_config_is_read_as_the_section_is(make: Train, tmp_path: Path) -> None:
    path = tmp_path / "apt.toml"
    path.write_text('[apt]\npreset = "sdxl"\nnum_bins = 3\n')
    found = make(None, kind="sdxl", apt_config=str(path)).trainer
    assert found.apt_config == AptConfig.from_mapping({"preset": "sdxl", "num_bins": 3})
    assert type(found).__name__ == "AptSdxlNetworkTrainer"


def test_the_section_is_moved_out_of_the_config_and_into_the_arguments() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--apt_config", default=None)
    config = {"seed": 1, "apt": {"enabled": True}, "training": {"seed": 2}}
    adapter.take_section(config, parser)
    assert config == {"seed": 1, "training": {"seed": 2}}
    assert parser.parse_args([]).apt_section == {"enabled": True}


def test_a_script_without_the_argument_refuses_the_section() -> None:
    with pytest.raises(SystemExit, match=r"^apt-hooks: error: flux\.py .*take the section out"):
        adapter.take_section({"apt": {}}, argparse.ArgumentParser(prog="flux.py"))


# -- transformers ------------------------------------------------------------------------------------------------------

transformer = pytest.mark.parametrize("kind", ["anima", "flux"])


@pytest.fixture
def noised(trainers: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the trainer's function that adds noise was given and gave, call by call."""
    found: list[dict[str, Any]] = []
    plain = trainers["flow"].get_noisy_model_input_and_timesteps

    def noted(args: Any, noise_scheduler: Any, latents: Tensor, noise: Tensor, device: Any, dtype: Any) -> Any:
        made = plain(args, noise_scheduler, latents, noise, device, dtype)
        found.append({"latents": latents, "noise": noise, "noisy": made[0], "sigmas": made[2].flatten()})
        return made

    monkeypatch.setattr(trainers["flow"], "get_noisy_model_input_and_timesteps", noted)
    return found


@transformer
@pytest.mark.parametrize("cached", [True, False], ids=["latents", "images"])
def test_sigmas_are_drawn_first_by_the_trainers_own_function_and_those_are_used(
    train: Train, trainers: dict[str, ModuleType], noised: list[dict[str, Any]], kind: str, cached: bool
) -> None:
    before = trainers["flow"].get_noisy_model_input_and_timesteps
    options = {"timestep_sampling": "shift", "ip_noise_gamma": 0.1, "cache_latents": cached}  # shifted by their size
    run = train({}, spy=Overfitted, kind=kind, max_train_steps=4, **options)
    assert len(noised) == 3 * 4 and trainers["flow"].get_noisy_model_input_and_timesteps is before
    for drawn, frozen, tuned in zip(*[iter(noised)] * 3, strict=True):
        assert torch.equal(drawn["sigmas"], frozen["sigmas"]) and torch.equal(drawn["sigmas"], tuned["sigmas"])
        assert all(torch.equal(frozen[name], tuned[name]) for name in ("latents", "noise", "noisy"))
        # What is added to the noise is none of its own numbers.
        sigmas = tuned["sigmas"][:, None, None, None]
        added = (tuned["noisy"] - (1 - sigmas) * tuned["latents"]) / sigmas - tuned["noise"]
        assert abs(float(torch.corrcoef(torch.stack([added.flatten(), tuned["noise"].flatten()]))[0, 1])) < 0.1
    assert sum(line["augmented"] for line in run.log) > 0
    assert len({float(call["sigmas"][0]) for call in noised}) == 4


@transformer
def test_without_augmentation_the_sigmas_are_drawn_where_the_trainer_draws_them(
    train: Train, noised: list[dict[str, Any]], kind: str
) -> None:
    train(kind=kind, name="plain")
    plain = [call["noisy"] for call in noised]
    noised.clear()
    train({"augmentation": False}, kind=kind)
    assert len(noised) == 6
    for frozen, tuned, wanted in zip(noised[::2], noised[1::2], plain, strict=True):
        assert torch.equal(frozen["noisy"], wanted) and torch.equal(tuned["noisy"], wanted)


@pytest.mark.parametrize("predicted", ["raw", "sample"])
def test_gamma_of_flow_matching_is_in_epsilon_units_whatever_the_loss_compares(
    train: Train, noised: list[dict[str, Any]], predicted: str
) -> None:
    apt = {**WEIGHTS_ONLY, "ema_alpha": 1.0, "num_bins": 1}
    options = {"train_batch_size": 1, "max_train_steps": 4, "model_prediction_type": predicted}
    run = train(apt, kind="flux", spy=Spy, **options)
    for seen, line, call in zip(run.trainer.seen, run.log, noised[1::2], strict=True):
        sigma = float(call["sigmas"])
        factor = (1 - sigma) ** 2 / (sigma**2 if predicted == "sample" else 1)
        assert seen.indicator[-1]["loss_tuned"] == pytest.approx([factor * float(seen.squares)], rel=1e-4)
        assert line["loss_tuned"] == pytest.approx(float(seen.squares), rel=1e-5)
    assert run.saved()["metadata"]["ss_apt_indicator_units"] == "epsilon"
    own = train({**apt, "indicator_space": "target"}, kind="flux", spy=Spy, name="target", **options)
    for seen in own.trainer.seen:
        assert seen.indicator[-1]["loss_tuned"] == pytest.approx([float(seen.squares)], rel=1e-5)
    assert own.saved()["metadata"]["ss_apt_indicator_units"] == "flow"


def test_bins_are_those_of_the_sigmas(train: Train, noised: list[dict[str, Any]]) -> None:
    run = train({**WEIGHTS_ONLY, "num_bins": 4}, kind="anima", train_batch_size=1)
    for line, call in zip(run.log[1:], noised[1::2], strict=False):
        assert line["gap"][int(4 * float(call["sigmas"]))] is not None


class Doubled:
    """A trainer whose loss compares something of its own."""

    def get_noise_pred_and_target(self, *args: Any, **kwargs: Any) -> Any:
        prediction, target, timesteps, weighting = super().get_noise_pred_and_target(*args, **kwargs)  # type: ignore[misc]
        return prediction, 2 * target + 1, timesteps, weighting


def test_a_loss_of_something_unknown_is_one_line_with_a_way_out(make: Train) -> None:
    def doubled(apt: dict[str, Any], name: str) -> tuple[Any, argparse.Namespace]:
        plain = make(kind="flux", name=name)
        kind = type("Other", (Doubled, type(plain.trainer)), {})
        plain.args.apt_section = apt
        return adapter.apt_trainer(kind(), plain.args), plain.args

    trainer, args = doubled({}, "epsilon")
    with pytest.raises(SystemExit, match=r'neither velocity, image nor noise.*indicator_space = "target"'):
        trainer.train(args)
    trainer, args = doubled({"indicator_space": "target"}, "target")
    trainer.train(args)


def test_swapped_blocks_are_brought_back_between_the_passes(train: Train) -> None:
    run = train({}, kind="flux", spy=Overfitted, subsets=(OWN, PRIOR), blocks_to_swap=1, train_batch_size=4)
    model = run.trainer.models[3]
    assert model.swapping and model.prepared == 2 * 3  # behind each frozen pass, and by preservation itself


@transformer
@pytest.mark.parametrize("apt", [{}, {"regularizer": "joint", "lambda_joint": 0.1}], ids=["separate", "joint"])
def test_checkpointing_and_swapped_blocks_give_the_same_lora(train: Train, kind: str, apt: dict[str, Any]) -> None:
    # Cached, since the text encoders have dropout in training mode.
    options = {"kind": kind, "spy": HalfOverfitted, "cache_text_encoder_outputs": True}
    plain = train(apt, **options, name="plain").saved()["weights"]
    ways = {"checkpointing": {"gradient_checkpointing": True}}
    if kind == "flux":
        ways["swap"] = {"gradient_checkpointing": True, "blocks_to_swap": 1}
    for name, way in ways.items():
        run = train(apt, **options, **way, name=name)
        for key, value in run.saved()["weights"].items():
            torch.testing.assert_close(value, plain[key], rtol=1e-4, atol=1e-6, msg=f"{name}: {key}")
        assert all(line["l_joint" if apt else "l_attn"] > 0 for line in run.log)


def test_a_target_that_the_trainer_computes_with_a_graph_is_no_part_of_the_regularized_pass(train: Train) -> None:
    options = {"kind": "flux", "subsets": (OWN, PRIOR), "train_batch_size": 4, "cache_text_encoder_outputs": True}
    apt = {"augmentation": False, "loss_weighting": False}
    plain = train(apt, **options, name="plain").saved()["weights"]
    run = train(apt, **options, gradient_checkpointing=True)
    for key, value in run.saved()["weights"].items():
        torch.testing.assert_close(value, plain[key], rtol=1e-4, atol=1e-6, msg=key)


@transformer
def test_cached_latents_of_a_transformer_are_zoomed_out_of_its_own_black(train: Train, kind: str) -> None:
    run = train(ALWAYS_SMALLER, kind=kind, spy=Overfitted, cache_latents=True)
    vae = run.trainer.models[2]
    black = vae.encode(torch.full((1, 3, 128, 128), -1.0)).latent_dist.mode()[0, :, 0, 0]
    black = black * 0.5 if kind == "anima" else black
    for seen in run.trainer.seen:
        torch.testing.assert_close(seen.latents[:, :, 0, 0], black.expand(2, 4), atol=0.03, rtol=0)


def test_the_class_word_is_encoded_while_the_text_encoders_are_there(
    train: Train, trainers: dict[str, ModuleType]
) -> None:
    subsets = ({"captions": ["sks dog", "a cat", "one sks dog", "two cats"], "caption_prefix": "nice"},)
    read: list[Any] = []

    class Listening(Spy):
        def get_noise_pred_and_target(self, *args: Any, **kwargs: Any) -> Any:
            read.append((self.seen[-1].given["captions"], args[5]))
            return super().get_noise_pred_and_target(*args, **kwargs)

    options = {"subsets": subsets, "cache_text_encoder_outputs": True, "max_train_steps": 4}
    run = train(WORDS, kind="anima", spy=Listening, **options)
    frozen = run.trainer._conditioning
    assert sorted(frozen._encoded) == ["bag dog", "nice bag dog", "nice one bag dog", "one bag dog"]
    models, _, _ = trainers["noising"].load_models(run.args, [16], lambda checkpointing: None)
    util = trainers["noising"]
    for captions, conds in read:
        swapped = [c.removeprefix("nice ").replace("sks", "bag") for c in captions]
        wanted = util.TextEncodingStrategy().encode_tokens(None, models, util.TokenizeStrategy(1).tokenize(swapped))
        given = {"captions": captions, "text_encoder_outputs_list": conds}
        (found,) = frozen(SimpleNamespace(models=None), given, torch.ones(len(captions), dtype=torch.bool), conds)
        torch.testing.assert_close(found, wanted[0])


def test_dropout_of_an_encoders_output_excludes_a_trained_text_encoder(make: Train) -> None:
    run = make({}, kind="anima", network_train_unet_only=False)
    run.args.t5_dropout_rate = 0.1
    with pytest.raises(SystemExit, match=r"a trained text encoder cannot be used with t5_dropout_rate and APT"):
        run.trainer.train(run.args)


def test_captions_that_are_dropped_behind_the_batchs_back_exclude_a_class_word(make: Train) -> None:
    run = make(
        WORDS,
        kind="anima",
        subsets=({**OWN, "caption_dropout_rate": 0.1},),
        cache_text_encoder_outputs=True,
    )
    with pytest.raises(SystemExit, match=r"class_word cannot be used with caption_dropout_rate with cache_text"):
        run.trainer.train(run.args)


@pytest.mark.parametrize(
    ("apt", "arguments", "said"),
    [
        ({}, {"compile": True}, "--compile cannot be used with APT"),
        ({"representation_source": "block"}, {"cpu_offload_checkpointing": True}, 'set that to "self_attention"'),
    ],
)
def test_options_that_hide_what_is_compared_are_one_line(
    make: Train, apt: dict[str, Any], arguments: dict[str, Any], said: str
) -> None:
    with pytest.raises(SystemExit) as error:
        make(apt, kind="anima", **arguments)
    assert str(error.value).startswith("apt-hooks: error: ") and said in str(error.value)


@transformer
def test_the_models_preset_is_taken_and_said(train: Train, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    run = train({}, kind=kind)
    assert f"| preset {kind}, the model's |" in capsys.readouterr().out
    assert run.saved()["metadata"]["ss_apt_preset"] == kind
    with pytest.raises(SystemExit, match=rf'preset = "sdxl" is for another model: this one\'s is "{kind}"'):
        train({"preset": "sdxl"}, kind=kind, name="other")


def test_words_are_counted_by_every_tokenizer_that_the_strategy_has(make: Train) -> None:
    class Letters:
        model_max_length = 64

        def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
            return SimpleNamespace(input_ids=list(text))

    class TwoTokenizers(Spy):
        def get_tokenize_strategy(self, args: Any) -> Any:
            strategy = super().get_tokenize_strategy(args)
            strategy.t5_tokenizer = Letters()
            return strategy

    run = make({"identifier": "sks", "class_word": "puppy"}, kind="anima", spy=TwoTokenizers)
    with pytest.raises(SystemExit, match=r"'sks' is 4 tokens, class_word 'puppy' is 6 \(Letters\)"):
        run.trainer.train(run.args)
    run = make({"identifier": "sks", "class_word": "bag"}, kind="anima", spy=TwoTokenizers, name="equal")
    run.trainer.train(run.args)


# -- checkpoints -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "anima", "flux"])
@pytest.mark.parametrize("trained", [False, True], ids=["unet", "text-encoders"])
def test_drifts_of_checkpoints_leave_the_lora_as_it_is_to_the_bit(train: Train, kind: str, trained: bool) -> None:
    options = {"kind": kind, "save_every_n_steps": 2, "max_train_steps": 5, "network_train_unet_only": not trained}
    on, off = (train({"drifts": drifts}, name=f"out-{drifts}", **options) for drifts in (True, False))
    assert on.same_lora(off)
    lines = read_log(on.folder / "lora-checkpoints.jsonl")
    assert [(line["step"], line["file"]) for line in lines] == [
        (2, "lora-step2.pt"),
        (4, "lora-step4.pt"),
        (5, "lora.pt"),
    ]
    for line, plain in zip(lines, read_log(off.folder / "lora-checkpoints.jsonl"), strict=True):
        assert line["free_drift"] > 0 and line["class_drift"] is None and plain["free_drift"] is None
        assert 0 < line["prompt_response"] < 2 and plain["prompt_response"] is None
        assert (line["text_drift"] is not None) == trained and plain["gap"] == line["gap"]
        assert json.loads(on.saved(line["file"])["metadata"]["ss_apt_checkpoint"])["free_drift"] == line["free_drift"]
    assert lines[0]["free_drift"] != lines[-1]["free_drift"]


def test_a_class_word_has_a_class_drift_and_a_rule_ends_the_training_at_a_checkpoint(
    train: Train, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "apt_hooks")
    words = {"identifier": "sks", "class_word": "cat", "lambda_attn": 0.0}
    run = train({**words, "drifts": True, "stop": "class_drift > 1e-9"}, save_every_n_steps=2, max_train_steps=8)
    (line,) = read_log(run.folder / "lora-checkpoints.jsonl")
    assert line["step"] == 2 and line["class_drift"] > 0 and line["stop"] == "class_drift > 1e-09"
    assert run.saved("lora-best.pt")["weights"].keys() == run.saved("lora-step2.pt")["weights"].keys()
    assert not (run.folder / "lora.pt").exists() and [line["step"] for line in run.log] == [1, 2]
    assert "[apt] stop has ended the training: class_drift > 1e-09 at step 2; lora-best.pt is the LoRA" in caplog.text


def test_drifts_of_cached_text_are_those_of_text_that_is_not(train: Train) -> None:
    found = []
    for cached in (False, True):
        run = train(
            {"drifts": True}, kind="sdxl", name=f"out-{cached}", cache_text_encoder_outputs=cached, max_train_steps=2
        )
        (line,) = read_log(run.folder / "lora-checkpoints.jsonl")
        found.append(line["free_drift"])
    assert found[0] == pytest.approx(found[1])


@pytest.mark.parametrize(
    "options",
    [
        {"network_dropout": 0.5, "network_train_unet_only": False, "mixed_precision": "bf16"},
        {"kind": "sdxl", "cache_text_encoder_outputs": True, "gradient_checkpointing": True},
        {"v_parameterization": True, "cache_latents": True},
        {"kind": "anima", "network_dropout": 0.5},
        {"kind": "flux", "blocks_to_swap": 1, "network_train_unet_only": False},
    ],
    ids=["text encoder trained, dropout", "cached text", "v", "anima", "flux"],
)
def test_held_out_pictures_are_measured_and_the_run_is_what_it_is_without(
    train: Train, options: dict[str, Any]
) -> None:
    options = {"subsets": (OWN, UNSEEN), "validate_every_n_steps": 2, "save_every_n_steps": 2, **options}
    words = {"identifier": "sks", "class_word": "cat", "lambda_attn": 0.0}
    on, off = (
        train({**words, "drifts": drifts}, name=f"out-{drifts}", spy=Validated, max_train_steps=4, **options)
        for drifts in (True, False)
    )
    assert on.same_lora(off)
    assert on.trainer.losses == off.trainer.losses and len(on.trainer.losses) == 4
    lines = read_log(on.folder / "lora-checkpoints.jsonl")
    assert [line["held_out_gap"] for line in read_log(off.folder / "lora-checkpoints.jsonl")] == [None] * 3
    gaps = [[gap for gap in line["held_out_gap"] if gap is not None] for line in lines]
    assert len(gaps[0]) == len(gaps[-1]) > 2 and gaps[0] != gaps[1]
    assert gaps[1] == gaps[2]  # the last LoRA is saved twice
    assert json.loads(on.saved()["metadata"]["ss_apt_checkpoint"])["held_out_gap"] == lines[-1]["held_out_gap"]
    (tracked, *_) = [found for found in on.tracked if "apt/held_out_gap" in found]
    assert tracked["apt/held_out_gap"] == pytest.approx(sum(gaps[0]) / len(gaps[0]))
    assert [value for name, value in tracked.items() if name.startswith("apt/held_out_gap/")] == gaps[0]


class Validated:
    """Keeps the losses of the trainer's own validation."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []

    def process_batch(self, *args: Any, is_train: bool, **kwargs: Any) -> Tensor:
        loss = super().process_batch(*args, is_train=is_train, **kwargs)  # type: ignore[misc]
        if not is_train and self._batch is None:  # type: ignore[attr-defined]
            self.losses.append(loss.item())
        return loss


def test_of_many_held_out_pictures_the_same_few_are_measured_and_it_is_said(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    compared: list[str] = []

    class Compared:
        """Keeps which held-out pictures go through the model."""

        def get_noise_pred_and_target(self, *args: Any, **options: Any) -> Any:
            if self._batch is not None and self._batch.held_out is not None:
                compared.append(args[4]["captions"][0])
            return super().get_noise_pred_and_target(*args, **options)

    many = {"captions": [f"sks dog {n}" for n in range(40)], "validation": True}  # 20 batches of 2
    train({"drifts": True}, spy=Compared, subsets=(OWN, many), max_train_steps=2, save_every_n_steps=1)
    wanted = [f"sks dog {n}" for n in (2, 6, 12, 16, 22, 26, 32, 36)]
    once = [caption for caption in wanted for _ in range(20)]  # ten timesteps, both models
    assert len(compared) > len(once) and compared == once * (len(compared) // len(once))
    assert "the held-out gap is of 8 of 20 batches of the validation split" in capsys.readouterr().out


def test_the_held_out_gap_is_that_of_the_losses(train: Train) -> None:
    squares: list[Tensor] = []

    class Losses(Spy):
        def get_noise_pred_and_target(self, *args: Any, **kwargs: Any) -> Any:
            result = super().get_noise_pred_and_target(*args, **kwargs)
            if self._batch is not None and self._batch.held_out is not None:
                squares.append(self.seen[-1].squares)
            return result

    run = train({"drifts": True, "num_bins": 1}, subsets=(OWN, UNSEEN), spy=Losses)
    (line,) = read_log(run.folder / "lora-checkpoints.jsonl")
    frozen, tuned = torch.stack(squares[::2]), torch.stack(squares[1::2])
    assert frozen.shape == tuned.shape == (10, 2)
    wanted = (frozen.mean() - tuned.mean()).item()
    assert line["held_out_gap"] == [pytest.approx(wanted, rel=1e-3)] and wanted != 0


def test_regularization_images_of_the_split_are_not_held_out_pictures(train: Train) -> None:
    reg = {**REG, "validation": True}
    alone, both = (
        train({"drifts": True}, subsets=(OWN, *split), name=name)
        for name, split in {"alone": (UNSEEN,), "both": (UNSEEN, reg)}.items()
    )
    (wanted,), (found,) = (read_log(run.folder / "lora-checkpoints.jsonl") for run in (alone, both))
    assert found["held_out_gap"] == wanted["held_out_gap"]


@pytest.mark.parametrize("apt", [{}, {"drifts": False, "subsets": (OWN, UNSEEN)}], ids=["no split", "drifts off"])
def test_a_rule_about_held_out_pictures_that_nothing_measures_is_one_line(make: Train, apt: dict[str, Any]) -> None:
    subsets = apt.pop("subsets", SUBSETS)
    run = make({"drifts": True, **apt, "stop": "gamma > 0.9 and held_out_gap < 0"}, subsets=subsets)
    with pytest.raises(SystemExit, match=r"stop names held_out_gap, .* a validation split") as error:
        run.trainer.train(run.args)
    assert "\n" not in str(error.value)


def test_a_rule_about_held_out_pictures_ends_the_training(train: Train) -> None:
    run = train({"drifts": True, "stop": "held_out_gap < 9"}, subsets=(OWN, UNSEEN), save_every_n_steps=2)
    assert [line["step"] for line in run.log] == [1, 2]
