"""Whole runs of diffusers' DreamBooth-LoRA scripts for transformers, on pipelines made by `tiny_pipelines`.

Each takes half a minute on a CPU core, so only when asked for:

DIFFUSERS_DIR     a git clone of diffusers with its tags (the scripts are taken from it; it is not changed)
DIFFUSERS_PYTHON  the interpreter of an environment that runs them, with this apt-hooks installed
DIFFUSERS_TAG     the scripts' tag; default v0.40.0
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_dreambooth_real import TAG, FinishedRun, assert_same

NEEDED = ("DIFFUSERS_DIR", "DIFFUSERS_PYTHON")
EAGER = "[apt]\nindicator_scale = 1e7\naugment_max_probability = 1.0\nema_alpha = 1.0\nnum_bins = 1\n"

pytestmark = [
    pytest.mark.real_trainer,
    pytest.mark.skipif(
        not all(os.environ.get(n) for n in NEEDED), reason=f"needs diffusers' examples: set {', '.join(NEEDED)}"
    ),
]

LLAMA = ("--pretrained_text_encoder_4_name_or_path", "models/hidream/text_encoder_4")
LLAMA += ("--pretrained_tokenizer_4_name_or_path", "models/hidream/tokenizer_4")
KLEIN = ("--text_encoder_out_layers", "9", "18", "27")
FAMILIES: dict[str, tuple[str, tuple[str, ...]]] = {  # of each script the pipeline, and what it needs beside
    "sd3": ("sd3", ()),
    "flux": ("flux", ()),
    "flux_kontext": ("flux_kontext", ()),
    "flux2": ("flux2", ()),
    "flux2_klein": ("flux2_klein", KLEIN),
    "qwen_image": ("qwen_image", ()),
    "z_image": ("z_image", ()),
    "sana": ("sana", ()),
    "lumina2": ("lumina2", ()),
    "hidream": ("hidream", LLAMA),
    "krea2": ("krea2", ()),
    "ideogram4": ("ideogram4", ()),
}
MOVED = [family for family in FAMILIES if family != "flux_kontext"]  # which may have two pictures a sample

Run = Callable[..., FinishedRun]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Trains for four steps, once by each name."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("families")
    (folder / "photos").mkdir()
    for i in range(4):
        pixels = (torch.rand(8, 8, 3, generator=torch.Generator().manual_seed(i)) * 255).byte().numpy()
        Image.fromarray(pixels).resize((80, 64)).save(folder / "photos" / f"{i}.png")
    (folder / "one").mkdir()
    shutil.copy(folder / "photos" / "0.png", folder / "one")
    done: dict[str, FinishedRun] = {}
    python = os.environ["DIFFUSERS_PYTHON"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}

    def call(*command: str) -> str:
        result = subprocess.run([python, *command], cwd=folder, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
        return result.stdout + result.stderr

    def train(family: str, name: str, *given: str, apt: str | None = None, patched: bool = True) -> FinishedRun:
        model, beside = FAMILIES[family]
        script = f"train_dreambooth_lora_{family}"
        if not (folder / f"{script}.py").exists():
            command = ["git", "-C", os.environ["DIFFUSERS_DIR"], "show", f"{TAG}:examples/dreambooth/{script}.py"]
            (folder / f"{script}.py").write_bytes(subprocess.run(command, check=True, capture_output=True).stdout)
            call("-c", "from apt_hooks.cli import main; main()", "patch", "diffusers", f"{script}.py")
        if not (folder / "models" / model).exists():
            call(str(Path(__file__).with_name("tiny_pipelines.py")), "models", model)
        if f"{family}-{name}" not in done:
            command = [f"{script}{'_apt' if patched else ''}.py", "--pretrained_model_name_or_path", f"models/{model}"]
            command += ["--instance_data_dir", "photos", "--instance_prompt", "a photo of sks toy", "--seed", "1"]
            command += ["--resolution", "64", "--train_batch_size", "1", "--rank", "2", "--learning_rate", "1e-3"]
            command += ["--max_train_steps", "4", "--output_dir", f"{family}-{name.split('+')[0]}", *beside, *given]
            if apt is not None:
                (folder / f"{family}-{name}.toml").write_text(apt)
                command += ["--apt_config", f"{family}-{name}.toml"]
            done[f"{family}-{name}"] = FinishedRun(folder / f"{family}-{name.split('+')[0]}", call(*command))
        return done[f"{family}-{name}"]

    return train


@pytest.mark.parametrize("family", FAMILIES)
def test_unpatched_patched_and_monitored_runs_give_one_lora(run: Run, family: str) -> None:
    plain = run(family, "plain", patched=False)
    assert_same(run(family, "patched"), plain)
    assert_same(run(family, "monitored", apt=EAGER + "monitor_only = true"), plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_term_of_apt_acts(run: Run, family: str) -> None:
    found = run(family, "apt", apt=EAGER + ("" if family in MOVED else "augmentation = false"))
    assert len(found.lines) == 4
    last = found.lines[-1]
    assert all(last[term] > 0.0 for term in ("l_mu", "l_sigma", "l_attn", "delta_noise"))
    assert max(line["gamma"][0] for line in found.lines) > 0.0
    assert (max(line["augmented"] for line in found.lines) > 0.0) == (family in MOVED)
    assert found.metadata["ss_apt_steps"] == "4" and found.metadata["ss_apt_indicator_units"] == "epsilon"


@pytest.mark.parametrize("family", MOVED)
def test_latents_of_a_cache_are_augmented(run: Run, family: str) -> None:
    found = run(family, "cached", "--cache_latents", apt=EAGER)
    assert max(line["augmented"] for line in found.lines) > 0.0


@pytest.mark.parametrize("family", MOVED)
def test_a_resumed_run_is_the_uninterrupted_one(run: Run, family: str) -> None:
    # One photo, as some of the scripts draw the order of several anew.
    every, eight = ("--checkpointing_steps", "4", "--instance_data_dir", "one"), ("--max_train_steps", "8")
    whole = run(family, "whole", *every, *eight, apt=EAGER)
    run(family, "halved", *every, apt=EAGER)
    resumed = run(family, "halved+", *every, *eight, "--resume_from_checkpoint", "latest", apt=EAGER)
    assert_same(resumed, whole)
    assert resumed.lines == whole.lines
