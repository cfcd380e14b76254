"""Whole runs of patched DreamBooth scripts: those of dreambooth_scripts, on real diffusers, peft and accelerate."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib.util
import itertools
import json
import logging
import math
import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from diffusers import DDPMScheduler
from safetensors import safe_open
from safetensors.torch import load_file

from apt_hooks.hooks.architectures import unet_common as blocks
from apt_hooks.hooks.starting_weights import from_file, to_bytes
from apt_hooks.integrations.diffusers_dreambooth import adapter
from apt_hooks.integrations.diffusers_dreambooth.adapter import DreamBoothRun
from apt_hooks.integrations.diffusers_dreambooth.patch import patch
from apt_hooks.method.augmentation import Placement
from apt_hooks.method.indicator import OverfittingIndicator
from apt_hooks.training import adapter_contract as contract
from apt_hooks.training.objective import AptObjective

SCRIPTS = Path(__file__).with_name("dreambooth_scripts")
WEIGHTS = "pytorch_lora_weights"
MASKED = 'loss = loss * batch["input_ids"].ge(0).float().mean()\n                '
GOES_ON = "the LoRA changes the model before the first step"
FROM_START = 'monitor_only = true\nreference = "start"'
NOTHING_ON = "loss_weighting = false\naugmentation = false\nlambda_dist = 0\nlambda_attn = 0"

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries beneath; what apt-hooks says is asserted


@dataclasses.dataclass
class Trained:
    """What a run left behind."""

    folder: Path

    @functools.cached_property
    def lora(self) -> dict[str, Tensor]:
        return load_file(self.folder / f"{WEIGHTS}.safetensors")

    @property
    def lines(self) -> list[dict[str, Any]]:
        text = (self.folder / f"{WEIGHTS}-apt.jsonl").read_text(encoding="utf-8")
        return [line for line in map(json.loads, text.splitlines()) if "run" not in line]

    def metadata(self, name: str = f"{WEIGHTS}.safetensors") -> dict[str, str]:
        with safe_open(self.folder / name, framework="pt") as file:
            return file.metadata() or {}


Train = Callable[..., Trained]


@pytest.fixture(scope="module")
def unpatched(tmp_path_factory: pytest.TempPathFactory) -> Callable[[tuple[str, ...]], Path]:
    """Where the run of an unpatched script is kept, so that each is made once."""
    folder = tmp_path_factory.mktemp("unpatched")
    return lambda given: folder / str(abs(hash(given)))


@pytest.fixture
def train(
    tmp_path: Path, unpatched: Callable[[tuple[str, ...]], Path], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Train]:
    """Runs a script: `config` is what its [apt] holds, None leaves APT out; `edit` is done to the unpatched text."""
    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    runs = 0

    def run(
        name: str,
        *arguments: str,
        config: str | None = None,
        patched: bool = True,
        edit: Callable[[str], str] = str,
        folder: Path | None = None,
    ) -> Trained:
        nonlocal runs
        runs += 1
        if "--train_text_encoder" in arguments:
            skip_without_text_encoder_lora()
        if not patched and edit is str and folder is None:
            folder = unpatched((name, *arguments))
            if (folder / f"{WEIGHTS}.safetensors").exists():
                return Trained(folder)
        own = tmp_path / f"run{runs}"
        own.mkdir()
        script = own / f"{name}.py"
        source = edit((SCRIPTS / f"{name}.py").read_text(encoding="utf-8"))
        script.write_text(patched_source(source, name) if patched else source, encoding="utf-8")
        given = [*arguments, "--output_dir", str(folder or own / "out")]
        if config is not None:
            (own / "apt.toml").write_text(f"[apt]\n{config}\n", encoding="utf-8")
            given += ["--apt_config", str(own / "apt.toml")]
        monkeypatch.setattr(sys, "argv", [str(script), *given])
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        module = _load(script, f"script_{runs}")
        module.main(module.parse_args())
        return Trained(folder or own / "out")

    yield run
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@functools.cache
def text_encoder_lora_refused() -> str | None:
    """What transformers says, with both versions, where it lets peft put no LoRA on a text encoder.

    So do releases that want a peft which is not out yet; a script then fails without a patch too.
    """
    config = transformers.CLIPTextConfig(
        vocab_size=8, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1
    )
    try:
        transformers.CLIPTextModel(config).add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
    except (ImportError, ValueError) as error:
        pair = f"transformers {transformers.__version__} takes no LoRA of peft {peft.__version__}"
        return f"{pair} on a text encoder: {error}"
    return None


def skip_without_text_encoder_lora() -> None:
    if reason := text_encoder_lora_refused():
        pytest.skip(reason)


@functools.cache
def patched_source(source: str, name: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, f"{name}.py")
        script.write_text(source, encoding="utf-8")
        patch(script, script)
        return script.read_text(encoding="utf-8")


def _load(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_same(found: Trained, wanted: Trained) -> None:
    assert found.lora.keys() == wanted.lora.keys()
    assert all(torch.equal(found.lora[k], wanted.lora[k]) for k in wanted.lora)


def refused(train: Train, name: str, *arguments: str, **options: Any) -> str:
    """The one line with which a run ends."""
    with pytest.raises(SystemExit) as error:
        train(name, *arguments, **options)
    line = error.value.code
    assert isinstance(line, str) and line.startswith("apt-hooks: error: ") and "\n" not in line
    return line


@pytest.fixture
def bases(monkeypatch: pytest.MonkeyPatch, train: Train) -> dict[str, Any]:
    """Untouched copies of the models that the script makes, by kind; the originals by kind with "own_" before."""
    import tiny

    made: dict[str, Any] = {}

    def kept(kind: str) -> None:
        make = getattr(tiny, f"make_{kind}")

        def make_and_keep(*args: Any, **kwargs: Any) -> Any:
            made[f"own_{kind}"] = make(*args, **kwargs)
            made[kind] = copy.deepcopy(made[f"own_{kind}"]).eval()
            return made[f"own_{kind}"]

        monkeypatch.setattr(tiny, f"make_{kind}", make_and_keep)

    kept("unet")
    kept("transformer")
    kept("text_encoder")
    return made


# -- as it was ---------------------------------------------------------------------------------------------------------

EVERYTHING = ("--train_text_encoder", "--with_prior_preservation", "--gradient_accumulation_steps", "2")
EVERYTHING += ("--gradient_checkpointing", "--lora_dropout", "0.3", "--validation_epochs", "1")

ARGUMENTS = {
    "one_encoder": [(), EVERYTHING, ("--mixed_precision", "bf16")],
    "two_encoders": [(), ("--train_text_encoder", "--with_prior_preservation", "--snr_gamma", "5")],
}
CASES = [(name, arguments) for name, cases in ARGUMENTS.items() for arguments in cases]


@pytest.mark.parametrize(("name", "arguments"), CASES)
def test_without_apt_arguments_a_patched_script_trains_the_lora_of_the_unpatched_one(
    train: Train, name: str, arguments: tuple[str, ...]
) -> None:
    plain = train(name, *arguments, patched=False)
    found = train(name, *arguments)
    assert_same(found, plain)
    assert plain.metadata().keys() == found.metadata().keys()


@pytest.mark.parametrize(
    "config",
    ["monitor_only = true", FROM_START, NOTHING_ON, 'objective = "dreambooth"', "enabled = false"],
    ids=str.split,
)
@pytest.mark.parametrize(("name", "arguments"), CASES)
def test_with_nothing_that_acts_a_run_trains_the_lora_of_the_unpatched_script(
    train: Train, name: str, arguments: tuple[str, ...], config: str
) -> None:
    found = train(name, *arguments, config=config)
    assert_same(found, train(name, *arguments, patched=False))
    if config != "enabled = false":
        assert len(found.lines) == 4 and found.lines[-1]["delta_noise"] > 0.0
        assert found.lines[-1]["loss_weight"] == 1.0 and max(found.lines[-1]["gamma"]) > 0.0


def test_without_apt_hooks_a_patched_script_runs_and_says_what_its_arguments_need(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "apt_hooks.integrations.diffusers_dreambooth", None)
    train("one_encoder", "--max_train_steps", "1")
    with pytest.raises(SystemExit, match=r"^--apt_config and --apt_preset need apt-hooks, not found here .*: pip"):
        train("one_encoder", "--max_train_steps", "1", config="")


# -- what acts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "arguments"), CASES)
def test_apt_trains_another_lora_and_says_what_it_did(
    train: Train, name: str, arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments += ("--learning_rate", "1e-2")
    found = train(name, *arguments, config="num_bins = 1\nema_alpha = 1.0")
    plain = train(name, *arguments, patched=False)
    assert any(not torch.equal(found.lora[k], plain.lora[k]) for k in plain.lora)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("apt-hooks"))
    assert " is on | no preset | overrides num_bins = 1, ema_alpha = 1.0 | up-blocks 1, 2: 4 cross-attention" in line
    drifts = "drifts of checkpoints (no class drift: give identifier and class_word)"
    assert line.endswith(f" | augmentation of images | {drifts} | log {found.folder / WEIGHTS}-apt.jsonl")
    assert [line["step"] for line in found.lines] == [1, 2, 3, 4]
    first, last = found.lines[0], found.lines[-1]
    assert first["gamma"] == [0.0]
    if "--gradient_accumulation_steps" not in arguments:  # with it, a line is the mean of several batches
        for before, after in itertools.pairwise(found.lines):
            gap = before["loss_frozen"] - before["loss_tuned"]
            assert after["gamma"] == [pytest.approx(max(0.0, 1 - math.exp(-1000 * gap)), rel=1e-2, abs=1e-3)]
    assert first["l_attn"] < last["l_attn"] and first["l_mu"] < last["l_mu"]


def test_a_preset_may_be_named_in_place_of_a_file(train: Train) -> None:
    line = refused(train, "one_encoder", "--apt_preset", "sdxl")  # the tiny U-Net has other up-blocks
    assert "up-block 0 has no attention layers here" in line
    for name in ("sdx", ""):
        assert "preset must be one of" in refused(train, "one_encoder", "--apt_preset", name)


def test_a_preset_of_another_model_is_refused(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "TEXT_WIDTHS", {"sd15": 768, "sd21": 16})
    train("one_encoder", "--max_train_steps", "1", config='preset = "sd21"\nblocks = "auto"')
    line = refused(train, "one_encoder", config='preset = "sd15"\nblocks = "auto"')
    assert 'preset = "sd15" is for another model: this one\'s is "sd21"; name that one' in line


def by_hand(source: str) -> str:
    """The script with APT written into it as README's own loop has it: per-sample losses, and no patch."""
    call_at = source.index("                model_pred = unet(")
    call_end = source.index("\n                if noise_scheduler.config.prediction_type", call_at)
    call = source[call_at:call_end].rstrip()
    loss_at = source.index("                if args.with_prior_preservation:\n                    model_pred, model")
    loss_end = source.index("                accelerator.backward(loss)")
    loss = """
                n = len(timesteps) // 2 if args.with_prior_preservation else len(timesteps)
                instances = torch.arange(len(timesteps)) < n
                step = apt.step(predict, target, timesteps, instances=instances)
                per_sample = (step.prediction - target).square().mean(dim=(1, 2, 3))
                loss = (per_sample * step.weight)[:n].mean() + step.regularizer * (len(timesteps) / n)
                if args.with_prior_preservation:
                    loss = loss + args.prior_loss_weight * per_sample[n:].mean()
"""
    indented = "\n".join(f"    {line}" for line in call.splitlines())
    source = source[:loss_at] + loss + source[loss_end:]
    source = source.replace(
        source[call_at:call_end], f"                def predict():\n{indented}\n                    return model_pred\n"
    )
    setup = """
    from apt_hooks import AptConfig, AptObjective
    from apt_hooks.integrations.peft import adapters_off
    apt = AptObjective(AptConfig(augmentation=False), unet, lambda: adapters_off(unet))
"""
    return source.replace(
        "    if accelerator.is_main_process:\n        accelerator.init",
        setup + "    if True:\n        accelerator.init",
    )


@pytest.mark.parametrize("prior", [(), ("--with_prior_preservation",)], ids=["alone", "prior"])
def test_a_patched_script_trains_what_apt_written_into_it_by_hand_does(train: Train, prior: tuple[str, ...]) -> None:
    arguments = (*prior, "--max_train_steps", "6", "--learning_rate", "1e-2")
    wanted = train("one_encoder", *arguments, patched=False, edit=by_hand).lora
    found = train("one_encoder", *arguments, config="augmentation = false")
    plain = train("one_encoder", *arguments, patched=False).lora
    assert found.lines[-1]["loss_weight"] < 0.99 or max(found.lines[-1]["gamma"]) > 0.5
    for key, tensor in wanted.items():
        torch.testing.assert_close(found.lora[key], tensor, rtol=1e-3, atol=2e-5)
    assert max(float((plain[k] - wanted[k]).abs().max()) for k in wanted) > 1e-3


def test_with_frozen_every_the_base_runs_in_those_steps_only(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[int] = []
    frozen_pass = DreamBoothRun.frozen_pass

    def spied(self: DreamBoothRun) -> Any:
        entered.append(self._run.step + 1)
        return frozen_pass(self)

    monkeypatch.setattr(DreamBoothRun, "frozen_pass", spied)
    config = 'frozen_every = 3\nregularizer = "joint"'
    found = train("one_encoder", "--train_text_encoder", "--learning_rate", "1e-2", config=config)
    assert entered == [1, 4]
    compared = [line["step"] for line in found.lines if line["l_joint"] is not None and line["loss_frozen"] is not None]
    assert compared == [1, 4]
    assert [line["loss_weight"] for line in found.lines][1:3] != [None, None]
    assert found.lines[3]["l_joint"] > 0.0 and found.lines[3]["l_attn"] is None


def test_the_batches_of_a_step_update_the_indicator_once_an_epochs_incomplete_last_one_too(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[list[tuple[Tensor, ...]]] = [[]]
    gammas: list[list[Tensor]] = [[]]
    add, end_step = OverfittingIndicator.add, OverfittingIndicator.end_step

    def spied_add(self: OverfittingIndicator, *batch: Tensor) -> None:
        steps[-1].append(batch)
        gammas[-1].append(self.gammas)
        add(self, *batch)

    def spied_end(self: OverfittingIndicator) -> None:
        end_step(self)
        steps.append([])
        gammas.append([])

    with monkeypatch.context() as patched:
        patched.setattr(OverfittingIndicator, "add", spied_add)
        patched.setattr(OverfittingIndicator, "end_step", spied_end)
        arguments = ("--gradient_accumulation_steps", "3", "--train_batch_size", "1", "--learning_rate", "1e-2")
        found = train("one_encoder", *arguments, "--max_train_steps", "6", config="num_bins = 2")
    assert [len(step) for step in steps] == [3, 1, 3, 1, 3, 1, 0]  # four photos an epoch
    assert len(found.lines) == 6
    wanted = OverfittingIndicator(num_bins=2)
    for batches, line, used in zip(steps, found.lines, gammas, strict=False):
        assert line["gamma"] == pytest.approx(wanted.gammas.tolist(), abs=1e-9)
        assert all(torch.equal(gamma, used[0]) for gamma in used)
        wanted.update(*(torch.cat(column) for column in zip(*batches, strict=True)))
    assert wanted.gammas.max() > 0


def test_a_mask_that_would_not_move_with_an_augmented_image_is_refused_and_else_told(
    train: Train, caplog: pytest.LogCaptureFixture
) -> None:
    def masked(text: str) -> str:
        return text.replace("accelerator.backward(", MASKED + "accelerator.backward(")

    message = refused(train, "one_encoder", config="", edit=masked)
    assert "set [apt] augmentation = false" in message and "batch['input_ids']" in message
    for config in ("augmentation = false", "monitor_only = true"):
        caplog.clear()
        assert len(train("one_encoder", config=config, edit=masked).lines) == 4
        assert "gamma is measured over the whole frame" in caplog.text


@pytest.mark.parametrize("space", ["auto", "target"])
def test_gamma_of_a_model_of_v_is_in_epsilon_units(train: Train, monkeypatch: pytest.MonkeyPatch, space: str) -> None:
    batches: list[tuple[Tensor, ...]] = []
    add = OverfittingIndicator.add
    monkeypatch.setattr(OverfittingIndicator, "add", lambda self, *batch: (batches.append(batch), add(self, *batch)))
    config = f'augmentation = false\nindicator_space = "{space}"'
    found = train(
        "one_encoder", "--train_batch_size", "1", config=config, edit=lambda text: text.replace(
            "tiny.make_scheduler()", 'tiny.make_scheduler("v_prediction")'
        ),
    )  # fmt: skip
    kept = DDPMScheduler().alphas_cumprod
    assert len(batches) == len(found.lines) == 4
    for (timestep, tuned, frozen), line in zip(batches, found.lines, strict=True):
        factor = float(kept[timestep]) if space == "auto" else 1.0
        assert float(tuned) == pytest.approx(factor * line["loss_tuned"], rel=1e-5)
        assert float(frozen) == pytest.approx(factor * line["loss_frozen"], rel=1e-5)
    units = {"auto": "epsilon", "target": "v_prediction"}[space]
    assert found.metadata()["ss_apt_indicator_units"] == units


def test_a_schedule_whose_target_changes_after_the_start_is_refused(train: Train) -> None:
    change = 'noise_scheduler.register_to_config(prediction_type="v_prediction")\n    '
    message = refused(
        train,
        "one_encoder",
        config="",
        edit=lambda text: text.replace("global_step, first", change + "global_step, first"),
    )
    assert "predicts epsilon, and now that it predicts v_prediction" in message


def test_the_loss_that_is_shown_stays_the_scripts_own(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[dict[str, float]] = []
    monkeypatch.setattr(Accelerator, "log", lambda self, values, step=None: shown.append({**values, "step": step}))
    found = train("one_encoder", config="augmentation = false\nlambda_attn = 1000")
    losses = [values["loss"] for values in shown if "loss" in values]
    assert losses == [pytest.approx(line["loss_tuned"], rel=1e-6) for line in found.lines]
    values = [values for values in shown if "apt/gamma/0" in values]
    assert [v["step"] for v in values] == [1, 2, 3, 4]
    assert values[-1]["apt/l_attn"] == found.lines[-1]["l_attn"] > 0.0
    assert [values[-1][f"apt/gamma/{b}"] for b in range(10)] == found.lines[-1]["gamma"]


@pytest.mark.parametrize("name", SCRIPTS_NAMES := ["one_encoder", "two_encoders"])
def test_class_images_are_neither_augmented_nor_counted(
    train: Train, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    batches: list[tuple[Tensor, Tensor]] = []
    instances: list[list[bool]] = []
    moved, assess = DreamBoothRun.moved, AptObjective._step

    def spied_moved(self: DreamBoothRun, images: Tensor, *, latents: bool = False) -> Tensor:
        if latents:
            return moved(self, images, latents=True)
        batches.append((images.clone(), moved(self, images)))
        return batches[-1][1]

    def spied_assess(self: AptObjective, *args: Any, **options: Any) -> Any:
        instances.append(args[0].instances.tolist())
        step = assess(self, *args, **options)
        assert step.weight[2:].tolist() == [1.0, 1.0] and step.instances == 2
        return step

    monkeypatch.setattr(DreamBoothRun, "moved", spied_moved)
    monkeypatch.setattr(AptObjective, "_step", spied_assess)
    monkeypatch.setattr(OverfittingIndicator, "gamma", lambda self, timesteps: torch.ones(len(timesteps)))
    found = train(name, "--with_prior_preservation", config="augment_max_probability = 1.0")
    assert instances == [[True, True, False, False]] * 4
    assert len(batches) == 4
    for before, after in batches:
        assert torch.equal(before[2:], after[2:]) and not torch.equal(before[0], after[0])
        assert (after[0] == -1.0).any() and not (before[0] == -1.0).any()
    assert found.lines[-1]["augmented"] == 1.0 and found.lines[-1]["loss_weight"] == 0.0


@pytest.mark.parametrize("border", ["learn", "ignore"])
@pytest.mark.parametrize("name", SCRIPTS_NAMES)
def test_a_border_that_is_ignored_gets_no_gradient_but_that_of_the_class_images(
    train: Train, monkeypatch: pytest.MonkeyPatch, name: str, border: str
) -> None:
    gradients: list[Tensor] = []
    assess = AptObjective._step

    def spied(self: AptObjective, passes: Any, *rest: Any, **options: Any) -> Any:
        passes.tuned_prediction.register_hook(gradients.append)
        return assess(self, passes, *rest, **options)

    monkeypatch.setattr(AptObjective, "_step", spied)
    monkeypatch.setattr(OverfittingIndicator, "gamma", lambda self, timesteps: torch.full((len(timesteps),), 0.9))
    config = (
        f'augment_max_probability = 1.0\nzoom_out = [3.0, 3.0]\nrotation_degrees = 0\naugment_border = "{border}"\n'
    )
    config += "lambda_dist = 0\nlambda_attn = 0"
    found = train(name, "--with_prior_preservation", config=config)
    assert len(gradients) == 4 and any(line["augmented"] for line in found.lines)
    learned = [gradient[:, :, 0].flatten(1).any(dim=1).tolist() for gradient in gradients]
    assert all(all(samples[2:]) for samples in learned)
    assert all(all(samples) for samples in learned) == (border == "learn")


def test_a_weight_that_is_drawn_with_the_timesteps_is_of_those_that_the_step_uses(train: Train) -> None:
    """A helper that gives both, as `timesteps, huber_c = ...`; the loss is taken of neither if they do not belong."""
    draw = "timesteps = torch.randint(\n                    0, noise_scheduler.config.num_train_timesteps, (bsz,), "
    draw += "device=model_input.device\n                )"
    loss = "                accelerator.backward(loss)"
    check = "                assert torch.equal(doubled, 2 * timesteps)\n"

    def edit(text: str) -> str:
        assert draw in text and loss in text
        helper = draw.replace("timesteps = ", "timesteps, doubled = (lambda t: (t, 2 * t))(") + ")"
        return text.replace(draw, helper).replace(loss, check + loss)

    found = train("one_encoder", edit=edit, config="")
    assert len(found.lines) == 4


def test_the_timesteps_of_the_augmentation_are_those_of_the_step(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[list[int]] = []
    used: list[list[int]] = []
    noised: list[list[int]] = []
    import tiny

    draw, assess, make = AptObjective.draw_augmentation, AptObjective._step, tiny.make_scheduler

    def spied_draw(self: AptObjective, timesteps: Tensor, *rest: Any) -> Placement:
        drawn.append(timesteps.tolist())
        return draw(self, timesteps, *rest)

    def spied_assess(
        self: AptObjective, passes: Any, target: Tensor, timesteps: Tensor, *rest: Any, **options: Any
    ) -> Any:
        used.append(timesteps.tolist())
        return assess(self, passes, target, timesteps, *rest, **options)

    def spied_scheduler(*args: Any) -> Any:
        scheduler = make(*args)
        add_noise = scheduler.add_noise
        scheduler.add_noise = lambda x, noise, t: noised.append(t.tolist()) or add_noise(x, noise, t)
        return scheduler

    monkeypatch.setattr(AptObjective, "draw_augmentation", spied_draw)
    monkeypatch.setattr(AptObjective, "_step", spied_assess)
    monkeypatch.setattr(tiny, "make_scheduler", spied_scheduler)
    train("two_encoders", config="drifts = false")  # which add noise too
    assert drawn == used == noised and len(drawn) == 4 and len({t for batch in drawn for t in batch}) > 4


@pytest.mark.parametrize("arguments", [(), EVERYTHING], ids=["plain", "everything"])
def test_the_frozen_pass_is_the_base_models_text_encoder_included(
    train: Train, bases: dict[str, Any], monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    asked: list[tuple[Any, ...]] = []
    words: list[Tensor] = []
    differences: list[float] = []
    begin = DreamBoothRun.begin_tuned_pass

    def spied(self: DreamBoothRun, frozen_prediction: Tensor) -> None:
        if not asked:
            bases["own_unet"].register_forward_pre_hook(lambda module, args: asked.append(args))
            bases["own_text_encoder"].register_forward_pre_hook(lambda module, args: words.append(args[0]))
        elif words:
            count = len(frozen_prediction) // (2 if arguments else 1)  # the class images' half has no frozen pass
            with torch.no_grad():
                noisy, timesteps, _ = asked[-1]
                text = bases["text_encoder"](words[-1])[0][:count]
                base = bases["unet"](noisy[:count], timesteps[:count], text).sample
            torch.testing.assert_close(frozen_prediction[:count], base)
            assert len(differences) < 1 or not frozen_prediction[count:].any()
            differences.append(1.0)
        begin(self, frozen_prediction)

    monkeypatch.setattr(DreamBoothRun, "begin_tuned_pass", spied)
    train("one_encoder", *arguments, "--learning_rate", "1e-1", config="")
    assert len(differences) >= 3


def goes_on(source: str) -> str:
    """The script with a LoRA that was trained before."""
    begun = "    for n, p in unet.named_parameters():\n        if 'lora_B' in n:\n"
    begun += "            torch.nn.init.normal_(p, std=0.1)\n"
    place = "    cast_training_params(["
    assert source.count(place) == 1
    return source.replace(place, begun + place)


@pytest.mark.parametrize("arguments", [(), EVERYTHING, ("--mixed_precision", "bf16")], ids=["plain", "all", "bf16"])
def test_a_run_that_goes_on_from_a_lora_says_so_and_may_take_it_for_reference(
    train: Train, caplog: pytest.LogCaptureFixture, bases: dict[str, Any], arguments: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    train("one_encoder", *arguments, config="")
    assert GOES_ON not in caplog.text
    train("one_encoder", *arguments, config="", edit=goes_on)
    assert caplog.text.count(GOES_ON) == 1
    caplog.clear()
    copies: list[Any] = []
    asked: list[tuple[Any, ...]] = []
    words: list[Tensor] = []
    compared: list[float] = []
    begin = DreamBoothRun.begin_tuned_pass

    def spied(self: DreamBoothRun, frozen_prediction: Tensor) -> None:
        own = bases["own_unet"], bases["own_text_encoder"]
        if not copies:
            copies.extend(copy.deepcopy(model).eval() for model in own)  # before the first step
            own[0].register_forward_pre_hook(lambda module, args: asked.append(args))
            own[1].register_forward_pre_hook(lambda module, args: words.append(args[0]))
        else:
            count = len(frozen_prediction) // (2 if arguments == EVERYTHING else 1)  # as above
            with torch.no_grad():
                noisy, timesteps, _ = asked[-1]
                text = copies[1](words[-1])[0][:count]
                copied = copies[0](noisy[:count], timesteps[:count], text).sample
            compared.append(float((frozen_prediction[:count].float() - copied.float()).abs().max()))
        begin(self, frozen_prediction)

    monkeypatch.setattr(DreamBoothRun, "begin_tuned_pass", spied)
    found = train("one_encoder", *arguments, "--learning_rate", "1e-1", config='reference = "start"', edit=goes_on)
    assert len(compared) >= 3 and max(compared) < 1e-5 and GOES_ON not in caplog.text
    assert found.lines[-1]["delta_noise"] > found.lines[0]["delta_noise"]


def test_dropout_is_told_at_start_and_in_the_log(train: Train, caplog: pytest.LogCaptureFixture) -> None:
    found = train("one_encoder", "--lora_dropout", "0.3", config="")
    assert caplog.text.count("the LoRA has dropout (lora_dropout = 0.3): its loss is measured with it") == 1
    log = found.folder / f"{WEIGHTS}-apt.jsonl"
    assert json.loads(log.read_text(encoding="utf-8").splitlines()[0])["run"]["dropout"] == {"lora_dropout": 0.3}
    caplog.clear()
    train("one_encoder", config="")
    assert "dropout" not in caplog.text


def test_nothing_is_left_on_the_models(train: Train, bases: dict[str, Any]) -> None:
    train("one_encoder", *EVERYTHING, config="")
    for model in (bases["own_unet"], bases["own_text_encoder"]):
        for module in model.modules():
            hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
            assert not [hook for hook in hooks if hook.__module__.startswith("apt_hooks")]
        lora = [p.requires_grad for name, p in model.named_parameters() if "lora_" in name]
        assert lora and all(lora)
        assert not any(p.requires_grad for name, p in model.named_parameters() if "lora_" not in name)


def test_dco_trains_with_the_gradient_of_its_loss(train: Train) -> None:
    def dco(source: str) -> str:
        return by_hand(source).replace("AptConfig(augmentation=False)", 'AptConfig(objective="dco", dco_beta=50)')

    wanted = train("one_encoder", patched=False, edit=dco).lora
    found = train("one_encoder", config='objective = "dco"\ndco_beta = 50')
    for key, tensor in wanted.items():
        torch.testing.assert_close(found.lora[key], tensor, rtol=1e-3, atol=2e-5)
    assert found.lines[0]["loss_weight"] == pytest.approx(25.0, rel=1e-3)
    assert found.lines[0]["l_attn"] is None and found.lines[-1]["augmented"] == 0.0


@pytest.mark.parametrize("prior", [(), ("--with_prior_preservation",)], ids=["alone", "prior"])
def test_l2_sp_adds_its_penalty_to_the_scripts_own_loss(train: Train, prior: tuple[str, ...]) -> None:
    def penalized(source: str) -> str:
        pairs = "[(m.lora_A['default'].weight, m.lora_B['default'].weight) for m in unet.modules() "
        pairs += "if hasattr(m, 'lora_A')]"
        backward = "                accelerator.backward(loss)"
        penalty = f"                loss = loss + 0.7 * sum((b @ a).square().sum() for a, b in {pairs})\n"
        return source.replace(backward, penalty + backward)

    arguments = (*prior, "--max_train_steps", "6", "--learning_rate", "1e-2")
    wanted = train("one_encoder", *arguments, patched=False, edit=penalized).lora
    found = train("one_encoder", *arguments, config='objective = "l2-sp"\nlambda_offset = 0.7')
    plain = train("one_encoder", *arguments, patched=False).lora
    for key, tensor in wanted.items():
        torch.testing.assert_close(found.lora[key], tensor, rtol=1e-3, atol=2e-5)
    assert max(float((plain[k] - wanted[k]).abs().max()) for k in wanted) > 1e-3
    assert found.lines[0]["l_offset"] == 0.0 < found.lines[-1]["l_offset"] and found.lines[-1]["l_attn"] is None


def test_monitor_only_tells_the_weights_offset_unasked(train: Train) -> None:
    arguments = ("--max_train_steps", "4", "--learning_rate", "1e-2", "--train_text_encoder")
    asked = train("one_encoder", *arguments, config='monitor_only = true\nobjective = "l2-sp"')
    found = train("one_encoder", *arguments, config="monitor_only = true")
    assert found.lines[0]["l_offset"] == 0.0 < found.lines[-1]["l_offset"]
    assert [line["l_offset"] for line in found.lines] == [line["l_offset"] for line in asked.lines]


def test_beside_apt_lambda_offset_adds_its_penalty(train: Train) -> None:
    arguments = ("--max_train_steps", "6", "--learning_rate", "1e-2")
    apt = train("one_encoder", *arguments, config="lambda_offset = 0")
    held = train("one_encoder", *arguments, config="lambda_offset = 0.7")
    assert held.lines[0]["l_offset"] == 0.0 < held.lines[-1]["l_offset"] and held.lines[-1]["l_attn"] > 0
    assert apt.lines[-1]["l_offset"] is None

    def offset(lora: dict[str, Tensor]) -> float:
        ups = {key: tensor for key, tensor in lora.items() if "lora_B" in key}
        return sum(float((up @ lora[key.replace("lora_B", "lora_A")]).square().sum()) for key, up in ups.items())

    assert offset(held.lora) < 0.9 * offset(apt.lora)


@pytest.mark.parametrize("objective", ["l2-sp", "dreambooth"])
def test_the_frozen_pass_that_only_the_log_needs_can_be_spared(train: Train, objective: str) -> None:
    arguments = ("--max_train_steps", "5", "--learning_rate", "1e-2")
    config = f'objective = "{objective}"\nlambda_offset = 0.7\n'
    each = train("one_encoder", *arguments, config=config)
    spared = train("one_encoder", *arguments, config=config + "frozen_every = 4")
    assert spared.lora.keys() == each.lora.keys()
    assert all(torch.equal(tensor, each.lora[key]) for key, tensor in spared.lora.items())
    assert [line["gap"] for line in each.lines][:2] == [line["gap"] for line in spared.lines][:2]
    assert any(gap is not None for gap in spared.lines[1]["gap"])
    assert all(line["gap"] == spared.lines[1]["gap"] for line in spared.lines[2:])
    assert [line["delta_noise"] is not None for line in spared.lines] == [True, False, False, False, True]
    assert [line["l_offset"] for line in spared.lines] == [line["l_offset"] for line in each.lines]


def test_l2_sp_holds_trained_text_encoders_too(train: Train) -> None:
    arguments = ("--train_text_encoder", "--gradient_accumulation_steps", "2", "--learning_rate", "1e-2")
    found = train("one_encoder", *arguments, config='objective = "l2-sp"\nlambda_offset = 100').lora
    plain = train("one_encoder", *arguments, patched=False).lora
    sizes = []
    for lora in (found, plain):
        ups = [tensor for key, tensor in lora.items() if key.startswith("text_encoder.") and "lora_B" in key]
        sizes.append(sum(float(up.square().sum()) for up in ups))
    assert 0 < sizes[0] < 0.5 * sizes[1]


def test_a_script_that_a_user_edited_trains_alike(train: Train) -> None:
    names = {
        "model_pred": "guess",
        "noise_scheduler": "ddpm",
        "unet": "denoiser",
        "target": "goal",
        "timesteps": "when",
    }
    names |= {"accelerator": "acc", "model_input": "z", "encoder_hidden_states": "text", "loss": "total"}

    def renamed(source: str) -> str:
        import re

        for old, new in names.items():
            source = re.sub(rf"(?<![\w.\"'-]){old}\b(?!\"|=)|(?<=[(\s]){old}(?= = )", new, source)
        return source.replace(
            "                acc.backward(total)",
            "                total = total + 0.1 * F.l1_loss(guess.float(), goal.float())\n"
            "                acc.backward(total)",
        )

    def extra(source: str) -> str:
        return source.replace(
            "                accelerator.backward(loss)",
            "                loss = loss + 0.1 * F.l1_loss(model_pred.float(), target.float())\n"
            "                accelerator.backward(loss)",
        )

    wanted = train("one_encoder", config="", edit=extra)
    found = train("one_encoder", config="", edit=renamed)
    assert_same(found, wanted)
    assert found.lines == wanted.lines
    plain = train("one_encoder", config="")
    assert any(not torch.equal(plain.lora[k], wanted.lora[k]) for k in plain.lora)


@pytest.mark.parametrize("check", contract.CONTRACT, ids=lambda check: check.__name__)
def test_the_adapter_keeps_the_contract(
    train: Train, bases: dict[str, Any], tmp_path: Path, check: Callable[[Any], None]
) -> None:
    names = iter(range(9))

    def run(config: dict[str, Any] | None, *, stopped: bool = False) -> contract.Trained:
        folder, text = tmp_path / str(next(names)), None
        if config is not None:
            text = "\n".join(f"{key} = {json.dumps(value)}" for key, value in config.items())
        given = {"config": text, "folder": folder, "patched": config is not None}
        if stopped:
            train("one_encoder", "--checkpointing_steps", "2", "--max_train_steps", "2", **given)
            found = train("one_encoder", "--resume_from_checkpoint", "checkpoint-2", **given)
        else:
            found = train("one_encoder", **given)
        return contract.Trained(found.lora, [] if config is None else found.lines, [bases["own_unet"]])

    check(run)


# -- saving and resuming -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", ["frozen_every = 3", 'reference = "start"'])  # what has to come back too
def test_a_resumed_run_equals_the_uninterrupted_one(train: Train, tmp_path: Path, config: str) -> None:
    arguments = ("--checkpointing_steps", "4", "--max_train_steps", "8", "--train_text_encoder")
    whole = train("one_encoder", *arguments, config=config, folder=tmp_path / "whole")
    halved = tmp_path / "halved"
    train("one_encoder", "--checkpointing_steps", "4", "--train_text_encoder", config=config, folder=halved)
    resumed = train("one_encoder", *arguments, "--resume_from_checkpoint", "checkpoint-4", config=config, folder=halved)
    assert_same(resumed, whole)
    assert resumed.lines == whole.lines and [line["step"] for line in whole.lines] == list(range(1, 9))
    assert resumed.metadata()["ss_apt_gamma"] == whole.metadata()["ss_apt_gamma"]
    assert max(json.loads(whole.metadata()["ss_apt_gamma"])) > 0.0


def test_a_checkpoint_without_apt_resumes_with_a_warning_and_one_with_it_without_apt(
    train: Train, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    resume = ("--checkpointing_steps", "2", "--resume_from_checkpoint", "checkpoint-2")
    plain = tmp_path / "plain"
    train("one_encoder", "--checkpointing_steps", "2", "--max_train_steps", "2", patched=False, folder=plain)
    with caplog.at_level(logging.WARNING, logger="apt_hooks"):
        found = train("one_encoder", *resume, config="", folder=plain)
    assert "was saved without apt-hooks; the overfitting indicator starts anew" in caplog.text
    assert [line["step"] for line in found.lines] == [3, 4], "as the script counts on"
    assert found.lines[0]["gamma"] == [0.0] * 10
    caplog.clear()
    with_apt = tmp_path / "with"
    train("one_encoder", "--checkpointing_steps", "2", "--max_train_steps", "2", config="", folder=with_apt)
    assert (with_apt / "checkpoint-2" / "apt-hooks.json").exists()
    train("one_encoder", *resume, folder=with_apt)
    assert not [record for record in caplog.records if record.name == "apt_hooks"]


def test_a_checkpoint_that_has_not_what_reference_start_needs_is_refused_in_one_line(
    train: Train, tmp_path: Path
) -> None:
    first, resume = (
        ("--checkpointing_steps", "2", "--max_train_steps", "2"),
        ("--resume_from_checkpoint", "checkpoint-2"),
    )
    start, state = 'reference = "start"', tmp_path / "start" / "checkpoint-2" / "apt-hooks-start.pt"
    train("one_encoder", *first, config="", folder=tmp_path / "base")
    line = refused(train, "one_encoder", *resume, config=start, folder=tmp_path / "base")
    assert 'is of reference = "base", this run\'s of "start": resume with [apt] reference = "base"' in line
    train("one_encoder", *first, config=start, folder=tmp_path / "start")
    state.write_bytes(to_bytes(from_file(state)[:-1]))
    line = refused(train, "one_encoder", *resume, config=start, folder=tmp_path / "start")
    assert "the saved weights that the training began from are of another LoRA" in line
    state.unlink()
    line = refused(train, "one_encoder", *resume, config=start, folder=tmp_path / "start")
    assert "apt-hooks-start.pt cannot be read" in line and "begin a new run from its LoRA" in line


def test_a_checkpoint_of_other_bins_is_refused_in_one_line(train: Train, tmp_path: Path) -> None:
    train("one_encoder", "--checkpointing_steps", "2", "--max_train_steps", "2", config="", folder=tmp_path / "out")
    resume = ("--resume_from_checkpoint", "checkpoint-2")
    line = refused(train, "one_encoder", *resume, config="num_bins = 5", folder=tmp_path / "out")
    assert "apt-hooks.json: the saved indicator has num_bins = 10, this run 5: resume with the same value" in line


def test_every_lora_that_is_saved_carries_the_metadata(train: Train) -> None:
    found = train("one_encoder", "--checkpointing_steps", "2", config='objective = "dco"')
    half = found.metadata(f"checkpoint-2/{WEIGHTS}.safetensors")
    assert (half["ss_apt_steps"], found.metadata()["ss_apt_steps"]) == ("2", "4")
    assert json.loads(half["ss_apt_config"])["objective"] == "dco" and half["ss_apt_augment_space"] == "image"
    two = train("two_encoders", "--output_kohya_format", config="")
    names = sorted(path.name for path in two.folder.glob("*.safetensors"))
    assert names == [f"{WEIGHTS}.safetensors", f"{WEIGHTS}_kohya.safetensors"]
    assert two.metadata(names[0])["ss_apt_steps"] == two.metadata(names[1])["ss_apt_steps"] == "4"


# -- the class word ----------------------------------------------------------------------------------------------------

ONE_WORD = {"w11": "w5"}
TWO_WORDS = {"w11": "w5 w6"}


def worded(words: dict[str, str], *more: str) -> str:
    """The two words, without drifts, whose passes would be among those that are looked at."""
    ((identifier, class_word),) = words.items()
    return "\n".join([f'identifier = "{identifier}"', f'class_word = "{class_word}"', "drifts = false", *more])


class Read:
    """What the U-Net is given in each pass, and what texts are to the base model's text encoders."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import tiny

        self.frozen: list[Any] = []
        self.tuned: list[Any] = []
        self.encoders: list[Any] = []
        self.tokenize = tiny.make_tokenizer()
        make_unet, make_text_encoder = tiny.make_unet, tiny.make_text_encoder

        def noting_unet(*args: Any, **kwargs: Any) -> Any:
            unet = make_unet(*args, **kwargs)

            def note(_: Any, args: Any, kwargs: Any, result: Any) -> None:
                layer = next(m for m in unet.modules() if isinstance(m, peft.tuners.lora.LoraLayer))
                given = [args[2], *({**kwargs}.get("added_cond_kwargs") or {}).values()]
                if layer.disable_adapters or torch.is_grad_enabled():  # neither is what the start is compared by
                    (self.frozen if layer.disable_adapters else self.tuned).append([t.detach().clone() for t in given])

            unet.register_forward_hook(note, with_kwargs=True)
            return unet

        def kept_encoder() -> Any:
            encoder = make_text_encoder()
            self.encoders.append(copy.deepcopy(encoder).eval())
            return encoder

        monkeypatch.setattr(tiny, "make_unet", noting_unet)
        monkeypatch.setattr(tiny, "make_text_encoder", kept_encoder)

    @torch.no_grad()
    def text(self, prompt: str) -> list[Tensor]:
        """What the U-Net is given for it, without the sample."""
        ids = self.tokenize(prompt, truncation=True, padding="max_length", return_tensors="pt").input_ids
        states = [encoder(ids) for encoder in self.encoders]
        pooled = [states[-1].pooler_output[0]] if len(states) > 1 else []
        return [torch.cat([state[0] for state in states], dim=-1)[0], *pooled]

    def caption(self, given: list[Tensor], row: int, prompts: Iterable[str]) -> str:
        """Which of the prompts a row is."""
        pairs = {prompt: self.text(prompt) for prompt in prompts}
        own = [tensor[row] for tensor in given]
        (found,) = [
            prompt
            for prompt, texts in pairs.items()
            if all(any(o.shape == t.shape and torch.allclose(o, t, atol=1e-5) for o in own) for t in texts)
        ]
        return found

    def check(self, captions: dict[str, str], class_prompt: str | None = None) -> None:
        """Each sample's caption in the tuned pass, and that of `captions` in the frozen one."""
        if class_prompt:  # the first two passes are of all; the second is made once more, of the half that counts
            halves = [i for i, given in enumerate(self.frozen) if len(given[0]) < len(self.tuned[0][0])]
            assert halves == list(range(2, len(self.frozen)))
            del self.frozen[2:3]
        assert len(self.frozen) == len(self.tuned) > 0
        known = {*captions, *captions.values(), *([class_prompt] if class_prompt else [])}
        seen = set()
        for frozen, tuned in zip(self.frozen, self.tuned, strict=True):
            half = len(tuned[0]) // 2 if class_prompt else len(tuned[0])
            for row in range(half):
                caption = self.caption(tuned, row, known)
                if caption != class_prompt:  # the scripts' embeddings of a batch of four alternate
                    assert self.caption(frozen, row, known) == captions[caption]
                    seen.add(caption)
        assert seen == set(captions)


@pytest.fixture
def read(train: Train, monkeypatch: pytest.MonkeyPatch) -> Read:
    return Read(monkeypatch)


PRIOR = ("--with_prior_preservation", "--train_batch_size", "1", "--class_prompt", "w7 w8 w9")
CAPTIONS = {"w8 w11 w9": "w8 w5 w9", "w11 w20": "w5 w20", "w8 w9 w10": "w8 w9 w10", "w21 w11 w11": "w21 w5 w5"}
GIVEN = ("--captions", *CAPTIONS)
PROMPT = ("--instance_prompt", "w8 w11 w9 w10")


@pytest.mark.parametrize("trained", [(), ("--train_text_encoder", "--max_train_steps", "1")], ids=["", "trained"])
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("one_encoder", ()),
        ("one_encoder", PRIOR),
        ("one_encoder", ("--pre_compute_text_embeddings",)),
        ("one_encoder", ("--pre_compute_text_embeddings", *PRIOR)),
        ("two_encoders", ()),
        ("two_encoders", PRIOR),
        ("two_encoders", GIVEN),
        ("two_encoders", (*GIVEN, *PRIOR)),
    ],
)
def test_the_base_model_reads_the_class_word_in_place_of_the_identifier(
    train: Train, read: Read, caplog: pytest.LogCaptureFixture, name: str, arguments: tuple[str, ...], trained: Any
) -> None:
    if trained and "--pre_compute_text_embeddings" in arguments:
        pytest.skip("the scripts refuse these two together")
    if trained and arguments[:1] == ("--captions",):
        trained = (trained[0],)  # LoRA's first weights change nothing, and one batch has not all of the captions
        arguments += ("--learning_rate", "0.0")
    train(name, *PROMPT, *arguments, *trained, config=worded(ONE_WORD, "monitor_only = true"))
    prompts = CAPTIONS if "--captions" in arguments else {"w8 w11 w9 w10": "w8 w5 w9 w10"}
    read.check(prompts, "w7 w8 w9" if PRIOR[0] in arguments else None)
    assert "none of the captions" not in caplog.text
    assert GOES_ON not in caplog.text


@pytest.mark.parametrize("arguments", [(), ("--pre_compute_text_embeddings",), EVERYTHING], ids=["", "once", "all"])
def test_with_a_class_word_a_lora_that_is_gone_on_from_is_still_told(
    train: Train, caplog: pytest.LogCaptureFixture, arguments: tuple[str, ...]
) -> None:
    """Its model is compared with the base model on the same text: the class word alone makes predictions differ."""
    config = worded(ONE_WORD, "monitor_only = true")
    train("one_encoder", *PROMPT, *arguments, config=config)
    assert GOES_ON not in caplog.text
    found = train("one_encoder", *PROMPT, *arguments, config=config, edit=goes_on)
    assert caplog.text.count(GOES_ON) == 1
    assert_same(found, train("one_encoder", *PROMPT, *arguments, patched=False, edit=goes_on))


@pytest.mark.parametrize("prompt", ["w11", "w8 w11 w9", "w8 w9 w11 w10 w12 w13"], ids=["alone", "padded", "full"])
@pytest.mark.parametrize(("name", "arguments"), [("one_encoder", ()), ("two_encoders", ())])
def test_words_of_other_length_are_read_where_attention_is_not_compared(
    train: Train, read: Read, name: str, arguments: tuple[str, ...], prompt: str
) -> None:
    train(name, "--instance_prompt", prompt, config=worded(TWO_WORDS, "lambda_attn = 0"))
    read.check({prompt: prompt.replace("w11", "w5 w6")})


def test_words_of_other_length_are_refused_where_attention_is_compared(train: Train) -> None:
    line = refused(train, "one_encoder", config=worded(TWO_WORDS))
    assert "identifier 'w11' is 1 tokens, class_word 'w5 w6' is 2 (" in line
    assert "): attention alignment compares token by token" in line
    train("one_encoder", "--max_train_steps", "1", config=worded(TWO_WORDS, 'regularizer = "joint"'))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("one_encoder", ()),
        ("one_encoder", ("--pre_compute_text_embeddings", *PRIOR)),
        ("two_encoders", ("--snr_gamma", "5")),
        ("two_encoders", (*GIVEN, *PRIOR)),
        ("two_encoders", (*GIVEN, "--train_text_encoder")),
    ],
)
def test_with_a_class_word_a_monitored_run_trains_the_lora_of_the_unpatched_script(
    train: Train, name: str, arguments: tuple[str, ...]
) -> None:
    found = train(name, *PROMPT, *arguments, config=worded(ONE_WORD, "monitor_only = true"))
    assert_same(found, train(name, *PROMPT, *arguments, patched=False))
    without = train(name, *PROMPT, *arguments, config="monitor_only = true")
    assert [line["loss_tuned"] for line in found.lines] == [line["loss_tuned"] for line in without.lines]
    assert [line["loss_frozen"] for line in found.lines] != [line["loss_frozen"] for line in without.lines]


@pytest.mark.parametrize(
    ("name", "arguments", "warned"),
    [
        ("one_encoder", PROMPT, False),
        ("one_encoder", ("--instance_prompt", "w8 w9 w12"), True),
        ("one_encoder", ("--instance_prompt", "w8 w9 w12", "--pre_compute_text_embeddings"), True),
        ("two_encoders", ("--instance_prompt", "w8 w9 w12"), True),
        ("two_encoders", ("--captions", "w8", "w11", "w10", "w10"), False),
        ("two_encoders", ("--captions", "w8", "w9", "w10", "w110"), True),
    ],
)
def test_an_identifier_in_none_of_the_captions_is_warned_of_once(
    train: Train, caplog: pytest.LogCaptureFixture, name: str, arguments: tuple[str, ...], warned: bool
) -> None:
    train(name, *arguments, "--class_prompt", "w7", config=worded(ONE_WORD))
    said = [r for r in caplog.records if "identifier 'w11' is in none of the captions" in r.getMessage()]
    assert len(said) == warned


def test_captions_that_a_user_encodes_once_each_are_found(train: Train, read: Read) -> None:
    def cached(source: str) -> str:
        at = "        instance_text = compute_text_embeddings(args.instance_prompt)\n"
        assert at in source
        own = "        texts = []\n"
        own += f"        for caption in {list(CAPTIONS)}:\n            texts.append(compute_text_embeddings(caption))\n"
        source = source.replace("tiny.Photos([instance_text]", "tiny.Photos(texts")
        return source.replace(at, own + at)

    train("one_encoder", *PROMPT, "--pre_compute_text_embeddings", config=worded(ONE_WORD), edit=cached)
    read.check(CAPTIONS)


def test_text_that_cannot_be_followed_is_refused_with_the_way_out(train: Train) -> None:
    def replaced(*edits: tuple[str, str]) -> Callable[[str], str]:
        def edit(source: str) -> str:
            for old, new in edits:
                assert old in source
                source = source.replace(old, new)
            return source

        return edit

    once = ("--pre_compute_text_embeddings", "--class_prompt", "w7", *PROMPT)
    text = "compute_text_embeddings(args.instance_prompt)"
    at = "        text_encoder = tokenizer = None\n"
    hidden_first = (text, f"(lambda: {text})()")
    hidden_last = (f"        instance_text = {text}\n", ""), (at, f"        instance_text = (lambda: {text})()\n{at}")
    for hidden in (replaced(hidden_first), replaced(*hidden_last)):
        line = refused(train, "one_encoder", *once, config=worded(ONE_WORD), edit=hidden)
        assert "the U-Net was given text of which it cannot be told whether it has 'w11' in it" in line
        assert line.endswith("or leave identifier and class_word out")

    changed = replaced(('hidden_states = batch["input_ids"]', 'hidden_states = batch["input_ids"] * 1.5'))
    line = refused(train, "one_encoder", *once, config=worded(ONE_WORD), edit=changed)
    assert "the U-Net was given text of which it cannot be told whether it has 'w11' in it" in line
    train("one_encoder", *once, "--max_train_steps", "1", config="", edit=changed)

    out_of_sight = replaced(
        ("                        text_encoder,\n", "                        encoders[0],\n"),
        (
            "    global_step, first_epoch",
            "    encoders = list((text_encoder,))\n    global_step, first_epoch",
        ),
    )
    line = refused(train, "one_encoder", *PROMPT, config=worded(ONE_WORD), edit=out_of_sight)
    assert "no text encoder ran in the base model's pass" in line

    elsewhere = replaced(
        ("    tokenizer = tiny.make_tokenizer()\n", ""),
        ("tokenize_prompt(tokenizer, args.", "tokenize_prompt(tiny.make_tokenizer(), args."),
    )
    line = refused(train, "one_encoder", *PROMPT, config=worded(ONE_WORD), edit=elsewhere)
    assert "identifier needs the script's tokenizers" in line


def test_a_class_images_text_may_be_anything(train: Train) -> None:
    def zeroed(source: str) -> str:
        at = "        class_text = compute_text_embeddings(args.class_prompt)\n"
        assert at in source
        return source.replace(at, "        class_text = torch.zeros_like(instance_text)\n")

    arguments = (*PROMPT, *PRIOR, "--pre_compute_text_embeddings")
    assert train("one_encoder", *arguments, config=worded(ONE_WORD), edit=zeroed).lines


def test_steps_that_do_not_repeat_their_text_are_refused_for_a_class_word_alone(train: Train) -> None:
    def drawn(source: str) -> str:
        at = "                        prompt_embeds, unet_add_text_embeds = compute_text_embeddings(\n"
        assert at in source
        return source.replace(
            at, f"                        prompts = random.sample(prompts, len(prompts))\n{at}"
        ).replace("import os\n", "import os\nimport random\n")

    line = refused(train, "two_encoders", *GIVEN, config=worded(ONE_WORD), edit=drawn)
    assert (
        "identifier and class_word cannot be used with this script: two_encoders.py: looked for nothing drawn" in line
    )
    assert train("two_encoders", *GIVEN, config="", edit=drawn).lines


def test_a_text_encoder_that_is_never_trained_nor_prepared_is_found(train: Train, read: Read) -> None:
    def loaded(source: str) -> str:
        source = source.replace("unet, text_encoder, optimizer, train_dataloader", "unet, optimizer, train_dataloader")
        at = "    tokenizer = tiny.make_tokenizer()\n"
        assert at in source
        load = "    loader = type('Loader', (), {'from_pretrained': staticmethod(lambda: text_encoder_made)})\n"
        load = "    text_encoder_made = text_encoder\n" + load
        return source.replace(
            at, f"{at}{load}    text_encoder = loader.from_pretrained()\n    text_encoder.to('cpu')\n"
        )

    train("one_encoder", *PROMPT, config=worded(ONE_WORD), edit=loaded)
    read.check({"w8 w11 w9 w10": "w8 w5 w9 w10"})


def test_a_script_that_was_patched_without_words_does_not_ignore_them(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter, "class_words", lambda *given: None)
    assert "patch it again" in refused(train, "one_encoder", *PROMPT, config=worded(ONE_WORD))


# -- refused -----------------------------------------------------------------------------------------------------------


def test_what_cannot_be_done_is_refused_before_training(train: Train) -> None:
    line = refused(train, "two_encoders", "--do_edm_style_training", config="")
    assert "--do_edm_style_training cannot be used with APT" in line
    assert "both --apt_config" in refused(train, "one_encoder", "--apt_preset", "sd15", config="")
    assert 'augment_space = "latent" is for' in refused(train, "one_encoder", config='augment_space = "latent"')
    assert "there is no such key" in refused(train, "one_encoder", config="lamda_attn = 1")
    assert "looked for a section [apt]" in refused(train, "one_encoder", "--apt_config", os.devnull)


@pytest.mark.parametrize(("attribute", "value"), [("DEEPSPEED", None), ("FSDP", None), (None, "_orig_mod")])
def test_engines_that_own_the_model_and_compiled_ones_are_refused(
    train: Train, monkeypatch: pytest.MonkeyPatch, attribute: str | None, value: str | None
) -> None:
    start = adapter.start

    def other(args: Any, accelerator: Any, unet: Any, schedule: Any, **options: Any) -> Any:
        if value:
            unet._orig_mod = torch.nn.Identity()
        kind = type("Fake", (), {"value": attribute or "NO"})()
        monkeypatch.setattr(Accelerator, "distributed_type", kind, raising=False)
        try:
            return start(args, accelerator, unet, schedule, **options)
        finally:
            monkeypatch.undo()

    monkeypatch.setattr(adapter, "start", other)
    line = refused(train, "one_encoder", config="")
    assert (attribute or "compiled U-Net") in line


@pytest.mark.parametrize("change", ["model_pred = model_pred * 1.5", "model_pred *= 1.5"])
def test_a_prediction_that_the_script_changes_first_is_refused(train: Train, change: str) -> None:
    def changed(source: str) -> str:
        at = "                if noise_scheduler.config.prediction_type"
        return source.replace(at, f"                {change}\n{at}", 1)

    assert "changes the U-Net's prediction before the loss" in refused(train, "one_encoder", config="", edit=changed)


def test_a_trained_text_encoder_that_is_called_out_of_sight_is_refused(train: Train) -> None:
    def hidden(source: str) -> str:
        source = source.replace("                        text_encoder,\n", "                        encoders[0],\n")
        return source.replace(
            "    global_step, first_epoch", "    encoders = list((text_encoder,))\n    global_step, first_epoch"
        )

    line = refused(train, "one_encoder", "--train_text_encoder", config="", edit=hidden)
    assert "the lines that run it were not found" in line
    train("one_encoder", "--max_train_steps", "1", config="", edit=hidden)  # not trained: nothing to encode anew


def test_latents_of_which_nothing_is_known_cannot_be_augmented_and_that_is_said_at_once(train: Train) -> None:
    def cached(source: str) -> str:
        old = "                if vae is not None:\n"
        assert old in source
        source = source.replace(old, "                if global_step > 4:\n")
        return source.replace("model_input = pixel_values", "model_input = torch.ones(2, 4, 8, 8)")

    line = refused(train, "one_encoder", config="", edit=cached)
    assert "the latents come from a cache" in line and line.endswith("set [apt] augmentation = false")
    train("one_encoder", config="augmentation = false", edit=cached)


@pytest.mark.parametrize("part", ["unet.conv_out.bias", "next(text_encoder.parameters())"])
def test_weights_that_are_trained_beside_the_lora_leave_no_base_model(train: Train, part: str) -> None:
    def trained(source: str) -> str:
        at = "    optimizer = torch.optim.AdamW("
        return source.replace(at, f"    params_to_optimize.append({part}.requires_grad_(True))\n{at}")

    line = refused(train, "one_encoder", "--train_text_encoder", config="", edit=trained)
    name = "conv_out.bias" if "unet" in part else "embeddings.token_embedding.weight"
    assert re.search(rf"trained parameters take part in it, 1 in all \((text_model\.)?{re.escape(name)}\)", line)


def test_a_text_encoder_that_was_not_prepared_leaves_no_base_model(train: Train) -> None:
    def unprepared(source: str) -> str:
        prepared = "unet, text_encoder, optimizer, train_dataloader"
        return source.replace(prepared, "unet, optimizer, train_dataloader")

    line = refused(train, "one_encoder", "--train_text_encoder", config="", edit=unprepared)
    assert re.search(r"trained parameters take part in it, [1-9]\d* in all \(number \d+ of the optimizer's, \(", line)
    assert "adapters_off must leave out the LoRA of every layer and of every model" in line


def test_an_adapter_that_is_active_but_not_trained_is_refused(train: Train) -> None:
    def styled(source: str) -> str:
        at = "    params_to_optimize = ["
        style = "    unet.add_adapter(LoraConfig(r=2, target_modules=['to_v']), 'style')\n"
        style += "    unet.set_adapters(['default', 'style'])\n"
        style += "    [p.requires_grad_(False) for n, p in unet.named_parameters() if '.style.' in n]\n"
        return source.replace(at, style + at, 1)

    line = refused(train, "one_encoder", config="", edit=styled)
    assert "the adapter 'style' is active but not trained" in line
    # In both models' passes it is the same, where nothing is switched off.
    assert len(train("one_encoder", config='reference = "start"', edit=styled).lines) == 4


def test_one_timestep_for_the_whole_batch_counts_for_every_sample(train: Train) -> None:
    found = train("one_encoder", config="", edit=lambda source: source.replace("(bsz,), device", "(1,), device"))
    assert len(found.lines) == 4 and found.lines[-1]["delta_noise"] > 0.0
    both = train(
        "one_encoder", "--with_prior_preservation", config="", edit=lambda s: s.replace("(bsz,), d", "(1,), d")
    )
    assert len(both.lines) == 4


def test_a_script_may_change_the_prediction_in_place_once_it_is_assessed(train: Train) -> None:
    def masked(change: str) -> Callable[[str], str]:
        at = "                if args.with_prior_preservation:\n                    model_pred, model"
        return lambda source: source.replace(at, f"                {change}\n{at}")

    found = train("one_encoder", config="", edit=masked("model_pred *= 0.5"))
    assert_same(found, train("one_encoder", config="", edit=masked("model_pred = model_pred * 0.5")))


def test_a_step_that_the_script_breaks_off_is_forgotten(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = train("one_encoder", config="")
    frozen_pass = DreamBoothRun.frozen_pass

    def after_another(self: DreamBoothRun) -> Any:
        with frozen_pass(self):
            self._run.objective.reference.modules[0](torch.zeros(1, 4, 8, 8), 1, torch.zeros(1, 6, 16))
        self.begin_tuned_pass(torch.zeros(1))  # in which the memory ran out
        return frozen_pass(self)

    monkeypatch.setattr(DreamBoothRun, "frozen_pass", after_another)
    found = train("one_encoder", config="")
    assert_same(found, wanted)
    assert found.lines == wanted.lines


def test_a_lora_under_another_name_is_said_to_have_no_metadata(train: Train, caplog: pytest.LogCaptureFixture) -> None:
    named = "            unet_lora_layers=get_peft_model_state_dict(unet),\n"
    train(
        "one_encoder", config="", edit=lambda s: s.replace(named, f'{named}            weight_name="my.safetensors",\n')
    )
    assert f"no {WEIGHTS}*.safetensors in" in caplog.text


# -- several processes, and a GPU --------------------------------------------------------------------------------------

DRIVER = """
import importlib.util, json, sys
from apt_hooks.integrations.diffusers_dreambooth.adapter import DreamBoothRun

seen = {"losses": [], "gammas": []}
regularized, close = DreamBoothRun.regularized, DreamBoothRun.close

def keep(self, loss):
    seen["losses"].append(loss.item())
    return regularized(self, loss)

def write(self):
    seen["gammas"] = self._run.objective.indicator.gammas.tolist()
    with open(f"rank{self._accelerator.process_index}.json", "w") as file:
        json.dump(seen, file)
    close(self)

DreamBoothRun.regularized, DreamBoothRun.close = keep, write
spec = importlib.util.spec_from_file_location("script", "script.py")
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)
script.main(script.parse_args())
"""


@pytest.fixture(scope="module", autouse=True)
def two_processes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[subprocess.Popen[bytes], Path] | None]:
    """What accelerate launches, and its folder: begun before the file's first test, to run beside those of one core."""
    chosen = [item.name for item in request.session.items]
    if test_two_processes_have_one_indicator_and_learn.__name__ not in chosen or text_encoder_lora_refused():
        yield None
        return
    folder = tmp_path_factory.mktemp("two_processes")
    script = folder / "script.py"
    script.write_bytes((SCRIPTS / "one_encoder.py").read_bytes())
    patch(script, script)
    (folder / "driver.py").write_text(DRIVER, encoding="utf-8")
    (folder / "apt.toml").write_text("[apt]\n", encoding="utf-8")
    with socket.socket() as free:  # not 0 for the launcher, which older versions of accelerate wait at
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(port), "driver.py"]
    arguments = ["--apt_config", "apt.toml", "--max_train_steps", "24", "--learning_rate", "1e-2"]
    arguments += ["--train_batch_size", "1", "--train_text_encoder"]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    with (folder / "said.txt").open("wb") as said:  # a file: nobody empties a pipe meanwhile
        process = subprocess.Popen(
            [sys.executable, *launch, *arguments], cwd=folder, env=environment, stdout=said, stderr=subprocess.STDOUT
        )
    yield process, folder
    if process.poll() is None:  # not waited for: the session was stopped; the launcher ends its processes
        process.terminate()
        process.wait()


def test_two_processes_have_one_indicator_and_learn(two_processes: tuple[subprocess.Popen[bytes], Path]) -> None:
    skip_without_text_encoder_lora()
    process, folder = two_processes
    assert process.wait(timeout=300) == 0, (folder / "said.txt").read_text(errors="replace")
    ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0]["gammas"] == ranks[1]["gammas"] and max(ranks[0]["gammas"]) > 0.0
    losses = [sum(pair) / 2 for pair in zip(ranks[0]["losses"], ranks[1]["losses"], strict=True)]
    assert ranks[0]["losses"] != ranks[1]["losses"]
    assert sum(losses[-8:]) < sum(losses[:8])
    assert len((folder / "out" / f"{WEIGHTS}-apt.jsonl").read_text().splitlines()) == 1 + 24


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_on_a_gpu_a_run_has_finite_terms_and_monitoring_changes_nothing(
    train: Train, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    torch.use_deterministic_algorithms(True, warn_only=True)
    arguments = ("--mixed_precision", precision, "--gradient_checkpointing")
    lines = train("one_encoder", *arguments, config="").lines
    assert len(lines) == 4 and all(line["l_attn"] is not None and line["delta_noise"] is not None for line in lines)
    monitored = train("one_encoder", *arguments, config="monitor_only = true")
    assert_same(monitored, train("one_encoder", *arguments, patched=False))
