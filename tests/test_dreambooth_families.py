"""Whole runs of all of diffusers' LoRA scripts, on pipelines made by `tiny_pipelines`: 4 steps, two seconds each.

Only when asked for:

DIFFUSERS_DIR     a git clone of diffusers with its tags (the scripts are taken from it; it is not changed)
DIFFUSERS_PYTHON  the interpreter of an environment that runs them, with this apt-hooks installed
DIFFUSERS_TAG     the scripts' tag; default v0.40.0
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_dreambooth_real import TAG, TINY_WORLD, WEIGHTS, FinishedRun, assert_same, draw_photo

NEEDED = ("DIFFUSERS_DIR", "DIFFUSERS_PYTHON")
EAGER = "[apt]\nindicator_scale = 1e7\naugment_max_probability = 1.0\nema_alpha = 1.0\nnum_bins = 1\n"

pytestmark = [
    pytest.mark.real_trainer,
    pytest.mark.skipif(
        not all(os.environ.get(n) for n in NEEDED), reason=f"needs diffusers' examples: set {', '.join(NEEDED)}"
    ),
]

PHOTOS = ("--instance_data_dir", "photos", "--instance_prompt", "a photo of sks toy")
TEXTS = ("--dataset_name", "texts")
PAIRS = ("--dataset_name", "pairs", "--image_column", "image", "--cond_image_column", "cond")
PAIRS += ("--caption_column", "text", "--instance_prompt", "a photo of sks toy")
LLAMA = ("--pretrained_text_encoder_4_name_or_path", "models/hidream/text_encoder_4")
LLAMA += ("--pretrained_tokenizer_4_name_or_path", "models/hidream/tokenizer_4")
LAYERS = ("--text_encoder_out_layers", "9", "18", "27")
TOKEN = ("--token_abstraction", "sks")
DREAMBOOTH = "train_dreambooth_lora"
SCRIPTS: dict[str, tuple[str, tuple[str, ...]]] = {  # of each the pipeline, and its arguments
    DREAMBOOTH: ("tiny", PHOTOS),
    f"{DREAMBOOTH}_sdxl": ("sdxl", PHOTOS),
    f"{DREAMBOOTH}_sd3": ("sd3", PHOTOS),
    f"{DREAMBOOTH}_flux": ("flux", PHOTOS),
    f"{DREAMBOOTH}_flux_kontext": ("flux_kontext", PAIRS),
    f"{DREAMBOOTH}_flux2": ("flux2", PHOTOS),
    f"{DREAMBOOTH}_flux2_img2img": ("flux2", PAIRS),
    f"{DREAMBOOTH}_flux2_klein": ("flux2_klein", PHOTOS + LAYERS),
    f"{DREAMBOOTH}_flux2_klein_img2img": ("flux2_klein", PAIRS),
    f"{DREAMBOOTH}_qwen_image": ("qwen_image", PHOTOS),
    f"{DREAMBOOTH}_z_image": ("z_image", PHOTOS),
    f"{DREAMBOOTH}_sana": ("sana", PHOTOS),
    f"{DREAMBOOTH}_lumina2": ("lumina2", PHOTOS),
    f"{DREAMBOOTH}_hidream": ("hidream", PHOTOS + LLAMA),
    f"{DREAMBOOTH}_krea2": ("krea2", PHOTOS),
    f"{DREAMBOOTH}_ideogram4": ("ideogram4", PHOTOS),
    f"{DREAMBOOTH}_sd15_advanced": ("tiny", PHOTOS + TOKEN),
    f"{DREAMBOOTH}_sdxl_advanced": ("sdxl", PHOTOS + TOKEN),
    f"{DREAMBOOTH}_flux_advanced": ("flux", PHOTOS),
    "train_text_to_image_lora": ("tiny", TEXTS),
    "train_text_to_image_lora_sdxl": ("sdxl", TEXTS),
}
PRIOR = ("--with_prior_preservation", "--class_data_dir", "class", "--class_prompt", "a photo of abc toy")
PRIOR += ("--num_class_images", "4")
OPTIONS: dict[str, tuple[str, ...]] = {  # each in the scripts that have all of it
    "prior": PRIOR,
    "prior of two": (*PRIOR, "--train_batch_size", "2"),
    "text encoder": ("--train_text_encoder",),
    "text encoder and prior": ("--train_text_encoder", *PRIOR),
    "sigma_sqrt": ("--weighting_scheme", "sigma_sqrt"),
    "logit_normal": ("--weighting_scheme", "logit_normal"),
    "mode": ("--weighting_scheme", "mode"),
    "cosmap": ("--weighting_scheme", "cosmap"),
    "no weighting": ("--weighting_scheme", "none"),
    "preconditioned": ("--precondition_outputs", "1"),
    "guidance": ("--guidance_scale", "4.5"),
    "several": ("--train_batch_size", "2", "--gradient_checkpointing", "--gradient_accumulation_steps", "2"),
    "8-bit": ("--use_8bit_adam",),
    "prodigy": ("--optimizer", "prodigy", "--learning_rate", "1.0"),
    "half": ("--mixed_precision", "bf16"),
    "offload": ("--offload", "--cache_latents"),
    "quantized": ("--bnb_quantization_config_path", "quantized.json"),
    "noise": ("--noise_offset", "0.1", "--snr_gamma", "5.0"),
    "flips": ("--random_flip", "--lora_dropout", "0.1", "--scale_lr"),
    "DoRA": ("--use_dora",),
}

Run = Callable[..., FinishedRun]


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    """The scripts of the tag."""
    git = ("git", "-C", os.environ["DIFFUSERS_DIR"])
    folders = ("dreambooth", "advanced_diffusion_training", "text_to_image")
    listing = [*git, "ls-tree", "-r", "--name-only", TAG, *(f"examples/{folder}" for folder in folders)]
    paths = subprocess.run(listing, check=True, capture_output=True, text=True).stdout.split()
    return {
        Path(path).stem: subprocess.run(
            [*git, "show", f"{TAG}:{path}"], check=True, capture_output=True, text=True
        ).stdout
        for path in paths
        if Path(path).stem in SCRIPTS
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, sources: dict[str, str]) -> Iterator[Run]:
    """Trains for four steps, once by each name; skips where the script itself fails."""
    folder = tmp_path_factory.mktemp("families")
    _draw(folder)
    python, here = os.environ["DIFFUSERS_PYTHON"], Path(__file__).parent
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done: dict[str, FinishedRun] = {}
    (folder / "models").mkdir()
    (folder / "models" / "tiny").symlink_to(TINY_WORLD / "weights" / "pipeline")
    server = subprocess.Popen(
        [python, str(here / "forked_scripts.py")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=folder, env=environment,
        text=True,
    )  # fmt: skip
    assert server.stdin is not None and server.stdout is not None

    def call(*command: str) -> tuple[int, str]:
        server.stdin.write(json.dumps([command[0], command[1:], "output.txt"]) + "\n")
        server.stdin.flush()
        answer = server.stdout.readline()
        assert answer, "the process that runs the scripts has ended"
        return int(answer), (folder / "output.txt").read_text()

    def train(script: str, name: str, *given: str, apt: str | None = None, patched: bool = True) -> FinishedRun:
        if script not in sources:
            pytest.skip(f"{TAG} has no {script}.py")
        model, own = SCRIPTS[script]
        if not (folder / f"{script}.py").exists():
            (folder / f"{script}.py").write_text(sources[script])
            patching = [python, "-c", "from apt_hooks.cli import main; main()", "patch", "diffusers", f"{script}.py"]
            subprocess.run(patching, cwd=folder, env=environment, check=True, capture_output=True)
        if not (folder / "models" / model).exists():
            assert call(str(here / "tiny_pipelines.py"), "models", model)[0] == 0
        # Tokens are saved to FOLDER/FOLDER_emb..., so a name and no path; `+` goes on in the folder of another run.
        out = re.sub(r"\W+", "-", f"{script}-{name.partition('+')[0]}")
        if f"{script} {name}" not in done:
            command = [f"{script}{'_apt' if patched else ''}.py", "--pretrained_model_name_or_path", f"models/{model}"]
            command += ["--seed", "1", "--resolution", "64", "--train_batch_size", "1", "--rank", "2"]
            command += ["--learning_rate", "1e-3", "--max_train_steps", "4", "--output_dir", out, *own, *given]
            if apt is not None:
                (folder / f"{out}.toml").write_text(apt)
                command += ["--apt_config", f"{out}.toml"]
            status, output = call(*command)
            if status and not patched:
                lines = output.strip().splitlines()
                why = next(
                    (line for line in reversed(lines) if re.match(r"\w+(Error|Exception)\b|.* error: ", line)), ""
                )
                pytest.skip(f"the script itself ends with {status}: {why[-200:]}")
            assert status == 0, output[-6000:]
            done[f"{script} {name}"] = FinishedRun(folder / out, output)
        return done[f"{script} {name}"]

    yield train
    server.stdin.close()
    server.wait()


def _draw(folder: Path) -> None:
    """Photos: four, one, of a class, with texts, and in pairs; and how a model is quantized."""
    for name, seed, count in (("photos", 0, 4), ("class", 100, 4), ("one", 0, 1), ("texts", 0, 4), ("pairs", 0, 4)):
        (folder / name).mkdir()
        lines = []
        for i in range(count):
            for prefix, other in (("", 0), ("c", 50))[: 1 + (name == "pairs")]:
                draw_photo(folder / name / f"{prefix}{i}.png", seed + other + i, (80, 64))
            beside = {"cond_file_name": f"c{i}.png"} if name == "pairs" else {}
            lines.append(json.dumps({"file_name": f"{i}.png", "text": "a photo of sks toy", **beside}) + "\n")
        if name in ("texts", "pairs"):
            (folder / name / "metadata.jsonl").write_text("".join(lines))
    (folder / "quantized.json").write_text(json.dumps({"load_in_8bit": True}))


def knows(source: str, arguments: tuple[str, ...]) -> bool:
    """Whether a script has all of the options."""
    return all(f'"{argument}"' in source for argument in arguments if argument.startswith("--"))


def assert_every_term_acts(found: FinishedRun) -> None:
    last = found.lines[-1]
    assert all(last[term] > 0.0 for term in ("l_mu", "l_sigma", "l_attn", "delta_noise")), last
    assert max(line["gamma"][0] for line in found.lines) > 0.0


@pytest.mark.parametrize("script", SCRIPTS)
def test_unpatched_patched_and_monitored_runs_give_one_lora(run: Run, script: str) -> None:
    plain = run(script, "plain", patched=False)
    assert_same(run(script, "patched"), plain)
    assert_same(run(script, "monitored", apt=EAGER + "monitor_only = true"), plain)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_term_of_apt_acts_and_images_are_augmented(run: Run, script: str) -> None:
    run(script, "plain", patched=False)
    found = run(script, "apt", apt=EAGER)
    assert len(found.lines) == 4
    assert_every_term_acts(found)
    assert max(line["augmented"] for line in found.lines) > 0.0
    assert found.metadata["ss_apt_steps"] == "4" and found.metadata["ss_apt_indicator_units"] == "epsilon"


@pytest.mark.parametrize("script", SCRIPTS)
def test_latents_of_a_cache_are_augmented(run: Run, sources: dict[str, str], script: str) -> None:
    if not knows(sources.get(script, ""), ("--cache_latents",)):
        pytest.skip("caches no latents")
    found = run(script, "cached", "--cache_latents", apt=EAGER)
    assert max(line["augmented"] for line in found.lines) > 0.0


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_base_model_reads_the_class_word(run: Run, sources: dict[str, str], script: str) -> None:
    word = "fish" if SCRIPTS[script][0] == "tiny" else "abc"
    words = f'{EAGER}identifier = "sks"\nclass_word = "{word}"\n'
    found = run(script, "word", apt=words)
    assert "is in none of the captions" not in found.output
    assert found.lines[0]["delta_noise"] > 0.0, "the LoRA is the base model yet, its text is not"
    assert_every_term_acts(found)
    assert_same(run(script, "monitored word", apt=words + "monitor_only = true"), run(script, "plain", patched=False))
    if knows(sources[script], ("--train_text_encoder",)):
        run(script, "plain, trained", "--train_text_encoder", patched=False)  # Kontext's refuses it with a dataset
        assert_every_term_acts(run(script, "word, trained", "--train_text_encoder", apt=words))


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("script", SCRIPTS)
def test_options(run: Run, sources: dict[str, str], script: str, option: str) -> None:
    given = OPTIONS[option]
    if not knows(sources.get(script, ""), given):
        pytest.skip("has no such option")
    plain = run(script, f"plain {option}", *given, patched=False)
    assert_same(run(script, f"monitored {option}", *given, apt=EAGER + "monitor_only = true"), plain)
    found = run(script, f"apt {option}", *given, apt=EAGER)
    assert_every_term_acts(found)
    assert "class images go through" not in found.output


@pytest.mark.parametrize("script", [script for script in SCRIPTS if script.endswith("_advanced")])
def test_embeddings_of_new_words_are_refused_in_one_line(run: Run, script: str) -> None:
    with pytest.raises(AssertionError, match="apt-hooks: error: --train_text_encoder_ti cannot be used with APT: it"):
        run(script, "tokens", "--train_text_encoder_ti", apt=EAGER)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_resumed_run_is_the_uninterrupted_one(run: Run, script: str) -> None:
    # One photo, as some of the scripts draw the order of several anew.
    every, eight = ("--checkpointing_steps", "4"), ("--max_train_steps", "8")
    if SCRIPTS[script][1][0] == "--instance_data_dir":
        every += ("--instance_data_dir", "one")

    def both(name: str, apt: str | None) -> tuple[FinishedRun, FinishedRun]:
        options: dict[str, Any] = {"apt": apt, "patched": apt is not None}
        whole = run(script, f"{name} whole", *every, *eight, **options)
        run(script, f"{name} halved", *every, **options)
        return run(script, f"{name} halved+", *every, *eight, "--resume_from_checkpoint", "latest", **options), whole

    plain, wanted = both("plain", None)
    if any(not torch.equal(plain.lora[key], wanted.lora[key]) for key in wanted.lora):
        pytest.skip("the script itself does not resume where it was")
    resumed, whole = both("apt", EAGER)
    assert_same(resumed, whole)
    assert resumed.lines == whole.lines


def words_of(script: str) -> str:
    word = "fish" if SCRIPTS[script][0] == "tiny" else "abc"
    return f'{EAGER}identifier = "sks"\nclass_word = "{word}"\n'


def checkpoints(found: FinishedRun) -> list[dict[str, Any]]:
    text = (found.folder / f"{WEIGHTS}-checkpoints.jsonl").read_text()
    return [line for line in map(json.loads, text.splitlines()) if "run" not in line]


EVERY_SECOND = ("--checkpointing_steps", "2")


@pytest.mark.parametrize("encoder", ["frozen", "trained"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_saved_lora_has_a_line_with_its_drifts_and_is_what_it_is_without(
    run: Run, sources: dict[str, str], script: str, encoder: str
) -> None:
    given = EVERY_SECOND
    if encoder == "trained":
        given += ("--train_text_encoder",)
        if not knows(sources.get(script, ""), given):
            pytest.skip("trains no text encoder")
        run(script, "plain, trained", "--train_text_encoder", patched=False)  # Kontext's refuses it with a dataset
    found = run(script, f"measured {encoder}", *given, apt=words_of(script))
    lines = checkpoints(found)
    names = ("checkpoint-2/", "checkpoint-4/", "")
    assert [line["file"] for line in lines] == [f"{name}{WEIGHTS}.safetensors" for name in names]
    assert [line["step"] for line in lines] == [2, 4, 4]
    for line in lines:
        assert line["class_drift"] is not None, found.output[-3000:]
        assert line["class_drift"] > 0 and line["free_drift"] > 0 and line["delta_noise"] > 0, found.output[-2000:]
        assert 0 < line["prompt_response"] < 2, (line, found.output[-2000:])
        assert (line["text_drift"] is None) == (encoder == "frozen")
    assert json.loads(found.metadata["ss_apt_checkpoint"])["class_drift"] == lines[-1]["class_drift"]
    assert_same(run(script, f"unmeasured {encoder}", *given, apt=words_of(script) + "drifts = false"), found)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_stop_rule_ends_the_training_and_keeps_the_best(run: Run, script: str) -> None:
    found = run(script, "stopped", *EVERY_SECOND, apt=EAGER + 'stop = "free_drift > 0"')
    lines = checkpoints(found)
    assert [line["step"] for line in lines] == [2, 2] and len(found.lines) == 2
    assert lines[0]["class_drift"] is None and lines[0]["stop"] == "free_drift > 0"
    assert "[apt] stop has ended the training" in found.output
    best, last = (load_file(found.folder / f"{WEIGHTS}{name}.safetensors") for name in ("-best", ""))
    # text_to_image_lora calls the same weights by two names: in its checkpoints lora_A, at the end lora.down.
    assert len(best) == len(last)
    assert all(torch.equal(best[one], last[other]) for one, other in zip(sorted(best), sorted(last), strict=True))


def test_the_scripts_of_the_tag_are_all_known(sources: dict[str, str]) -> None:
    assert sources and shutil.which("git")
