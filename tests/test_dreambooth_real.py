"""Whole runs of diffusers' DreamBooth-LoRA examples. Each takes a minute on two CPU cores, so only when asked for.

DIFFUSERS_DIR     a git clone of diffusers with its tags (the scripts are taken from it; it is not changed)
DIFFUSERS_PYTHON  the interpreter of an environment that runs them, with this apt-hooks installed
DIFFUSERS_MODELS  a folder with sd15/model and sdxl/model in diffusers format; random weights will do
DIFFUSERS_TAG     the scripts' tag; default v0.40.0
DIFFUSERS_PHOTOS  a folder of four or more photos; default: drawn ones
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

NEEDED = ("DIFFUSERS_DIR", "DIFFUSERS_PYTHON", "DIFFUSERS_MODELS")
TAG = os.environ.get("DIFFUSERS_TAG", "v0.40.0")
SCRIPTS = {"sd15": "train_dreambooth_lora", "sdxl": "train_dreambooth_lora_sdxl", "tiny": "train_dreambooth_lora"}
TINY_WORLD = Path(__file__).parents[1] / "apt_hooks" / "tinyworld"
WEIGHTS = "pytorch_lora_weights"
# A scale at which a few steps are enough for gamma to leave 0, and for samples to be augmented.
EAGER = 'preset = "{kind}"\nindicator_scale = 1e7\naugment_max_probability = 1.0\nema_alpha = 1.0\nnum_bins = 1\n'

pytestmark = [
    pytest.mark.real_trainer,
    pytest.mark.skipif(
        not all(os.environ.get(n) for n in NEEDED), reason=f"needs diffusers' examples: set {', '.join(NEEDED)}"
    ),
]


class FinishedRun:
    """What a run left in its output folder."""

    def __init__(self, folder: Path, output: str) -> None:
        self.folder = folder
        self.output = output

    @property
    def lines(self) -> list[dict[str, Any]]:
        found = map(json.loads, (self.folder / f"{WEIGHTS}-apt.jsonl").read_text().splitlines())
        return [line for line in found if "run" not in line]

    @property
    def lora(self) -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file

        return load_file(self.folder / f"{WEIGHTS}.safetensors")

    @property
    def metadata(self) -> dict[str, str]:
        from safetensors import safe_open

        with safe_open(self.folder / f"{WEIGHTS}.safetensors", framework="pt") as file:
            return file.metadata()


def draw_photo(path: Path, seed: int, size: tuple[int, int]) -> None:
    """A picture of random colors, of that width and height."""
    from PIL import Image

    pixels = (torch.rand(8, 8, 3, generator=torch.Generator().manual_seed(seed)) * 255).byte().numpy()
    Image.fromarray(pixels).resize(size).save(path)


class Workshop:
    """A folder with photos, the scripts unpatched and patched, and runs by name, each made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in set(SCRIPTS.values()):
            path = f"examples/dreambooth/{name}.py"
            shown = subprocess.run(
                ["git", "-C", os.environ["DIFFUSERS_DIR"], "show", f"{TAG}:{path}"], check=True, capture_output=True
            )
            (folder / f"{name}.py").write_bytes(shown.stdout)
            self.cli("patch", "diffusers", f"{name}.py")
        self.photos = Path(os.environ.get("DIFFUSERS_PHOTOS", folder / "photos"))
        (folder / "model-tiny").symlink_to(TINY_WORLD / "weights" / "pipeline")
        for kind in ("sd15", "sdxl"):
            self.link_model(Path(os.environ["DIFFUSERS_MODELS"], kind, "model"), folder / f"model-{kind}")
        self.draw(folder / "photos")
        self.draw(folder / "class")
        self.done: dict[str, FinishedRun] = {}

    def link_model(self, source: Path, folder: Path) -> None:
        """The model, but sampling pictures of 64 px, which a CPU can do."""
        for path in source.rglob("*"):
            if path.is_file():
                link = folder / path.relative_to(source)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(path.resolve())
        config = folder / "unet" / "config.json"
        text = json.dumps({**json.loads(config.read_text()), "sample_size": 8})
        config.unlink()
        config.write_text(text)

    def draw(self, folder: Path) -> None:
        folder.mkdir()
        for i in range(4):
            draw_photo(folder / f"{i}.png", i, (160, 128))

    def cli(self, *args: str) -> str:
        code = "from apt_hooks.cli import main; main()"
        python = os.environ["DIFFUSERS_PYTHON"]
        return subprocess.run(
            [python, "-c", code, *args], check=True, capture_output=True, text=True, cwd=self.folder
        ).stdout

    def start(self, name: str, *args: str, kind: str, apt: str | None, patched: bool, processes: int) -> Any:
        script = f"{SCRIPTS[kind]}{'_apt' if patched else ''}.py"
        command = [os.environ["DIFFUSERS_PYTHON"]]
        if processes > 1:
            command += ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
            command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
            command += ["--main_process_port", "0"]
        command += [script, "--pretrained_model_name_or_path", f"model-{kind}"]
        command += [] if "--dataset_name" in args else ["--instance_data_dir", str(self.photos)]
        command += ["--instance_prompt", "a photo of sks toy", "--seed", "1"]
        command += ["--resolution", "128", "--train_batch_size", "1", "--rank", "4", "--learning_rate", "1e-3"]
        command += ["--output_dir", name, *args]
        if "--max_train_steps" not in args:
            command += ["--max_train_steps", "3"]
        if "--with_prior_preservation" in args:
            command += ["--class_data_dir", "class", "--class_prompt", "a photo of a toy", "--num_class_images", "4"]
        if kind == "sdxl":
            command += ["--mixed_precision", "bf16", "--gradient_checkpointing"]
        if apt is not None:
            (self.folder / f"{name}.toml").write_text("[apt]\n" + apt.format(kind=kind))
            command += ["--apt_config", f"{name}.toml"]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive", "ACCELERATE_USE_CPU": "true"}
        return subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True)

    def run(
        self,
        name: str,
        *args: str,
        kind: str = "sd15",
        apt: str | None = None,
        patched: bool = True,
        processes: int = 1,
    ) -> FinishedRun:
        if name not in self.done:
            result = self.start(name, *args, kind=kind, apt=apt, patched=patched, processes=processes)
            assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
            self.done[name] = FinishedRun(self.folder / name, result.stdout + result.stderr)
        return self.done[name]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("dreambooth"))


def assert_same(found: FinishedRun, wanted: FinishedRun) -> None:
    assert found.lora.keys() == wanted.lora.keys()
    assert all(torch.equal(found.lora[k], wanted.lora[k]) for k in wanted.lora)


EVERYTHING = ("--train_text_encoder", "--with_prior_preservation")
ARGUMENTS = {
    "sd15": [(), (*EVERYTHING, "--gradient_accumulation_steps", "2", "--gradient_checkpointing")],
    "sdxl": [(), (*EVERYTHING, "--snr_gamma", "5", "--lora_dropout", "0.2")],
}
CASES = [(kind, arguments) for kind, cases in ARGUMENTS.items() for arguments in cases]


def named(kind: str, arguments: tuple[str, ...]) -> str:
    return f"{kind}-{'everything' if arguments else 'plain'}"


@pytest.mark.parametrize(("kind", "arguments"), CASES)
def test_unpatched_patched_and_monitored_runs_give_one_lora(
    shop: Workshop, kind: str, arguments: tuple[str, ...]
) -> None:
    name = named(kind, arguments)
    plain = shop.run(f"{name}-unpatched", *arguments, kind=kind, patched=False)
    assert_same(shop.run(f"{name}-patched", *arguments, kind=kind), plain)
    monitored = shop.run(f"{name}-monitored", *arguments, kind=kind, apt=EAGER + "monitor_only = true")
    assert_same(monitored, plain)
    assert monitored.lines[-1]["delta_noise"] > 0.0 and monitored.lines[-1]["l_attn"] > 0.0


@pytest.mark.parametrize(("kind", "arguments"), CASES)
def test_apt_acts_and_the_lora_says_so(shop: Workshop, kind: str, arguments: tuple[str, ...]) -> None:
    run = shop.run(f"{named(kind, arguments)}-apt", *arguments, kind=kind, apt=EAGER)
    layers = {"sd15": "up-blocks 2, 3: 6 cross-attention layers, 6 hidden states"}
    layers["sdxl"] = "up-blocks 0, 1: 36 cross-attention layers, 36 hidden states"
    assert f"is on | preset {kind} | overrides" in run.output and layers[kind] in run.output
    assert len(run.lines) == 3 and run.lines[-1]["gamma"][0] > 0.0 and run.lines[-1]["loss_weight"] < 1.0
    assert run.metadata["ss_apt_preset"] == kind and run.metadata["ss_apt_steps"] == "3"
    unpatched = shop.done.get(f"{named(kind, arguments)}-unpatched")
    if unpatched is not None:
        assert any(not torch.equal(run.lora[k], unpatched.lora[k]) for k in run.lora)


WORDS = 'identifier = "sks"\nclass_word = "toy"\n'
PROMPT_ONCE = ("--pre_compute_text_embeddings",)


@pytest.mark.parametrize(("kind", "arguments"), [*CASES, ("sd15", PROMPT_ONCE)])
def test_the_base_model_reads_the_class_word(shop: Workshop, kind: str, arguments: tuple[str, ...]) -> None:
    """What an instance prompt with the class word gives a model that knows no LoRA."""
    name = named(kind, arguments)
    if arguments == PROMPT_ONCE:
        name = f"{kind}-once"
    monitor = EAGER + "monitor_only = true\n"
    plain = shop.run(f"{name}-unpatched", *arguments, kind=kind, patched=False)
    worded = shop.run(f"{name}-worded", *arguments, kind=kind, apt=monitor + WORDS)
    assert_same(worded, plain)
    class_prompt = ("--instance_prompt", "a photo of toy toy")
    of_class = shop.run(f"{name}-class", *arguments, *class_prompt, kind=kind, apt=monitor)
    frozen, frozen_class = ([line["loss_frozen"] for line in run.lines] for run in (worded, of_class))
    assert frozen == frozen_class
    first = worded.lines[0]
    assert first["delta_noise"] > 0.0 and first["l_attn"] > 0.0, "the LoRA is the base model yet, its text is not"
    assert "none of the captions" not in worded.output
    assert "the LoRA changes the model before the first step" not in worded.output


@pytest.mark.parametrize("trained", [(), ("--train_text_encoder",)], ids=["", "trained"])
def test_captions_of_a_dataset_are_read_with_the_class_word(shop: Workshop, trained: tuple[str, ...]) -> None:
    folder = shop.folder / "captioned"
    if not folder.exists():
        shop.draw(folder)
        captions = ["a sks toy", "a photo of sks", "a house", "a tree"]
        lines = [json.dumps({"file_name": f"{i}.png", "text": text}) for i, text in enumerate(captions)]
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    given = ("--dataset_name", str(folder), "--caption_column", "text", "--max_train_steps", "4")
    apt = EAGER + "monitor_only = true\n"
    given += ("--learning_rate", "0", "--text_encoder_lr", "0")
    run = shop.run(f"captions-{len(trained)}", *given, *trained, kind="sdxl", apt=apt + WORDS)
    differing = [line["delta_noise"] > 0.0 for line in run.lines]
    assert sum(differing) == 2, "with a LoRA that learns nothing, the two captions that have the identifier"
    assert "none of the captions" not in run.output


@pytest.mark.parametrize("arguments", [(), PROMPT_ONCE])
def test_words_are_checked_at_start(shop: Workshop, arguments: tuple[str, ...]) -> None:
    absent = 'identifier = "ohwx"\nclass_word = "toy"\n'
    run = shop.run(
        f"absent-{len(arguments)}", *arguments, "--max_train_steps", "4", apt=EAGER + absent + "lambda_attn = 0\n"
    )
    assert run.output.count("identifier 'ohwx' is in none of the captions") == 1
    longer = 'identifier = "sks"\nclass_word = "stuffed animal"\n'
    result = shop.start("longer", *arguments, kind="sd15", apt=EAGER + longer, patched=True, processes=1)
    assert result.returncode == 1 and "is 1 tokens, class_word 'stuffed animal' is 2" in result.stderr.splitlines()[-1]


def test_a_resumed_run_equals_the_uninterrupted_one(shop: Workshop) -> None:
    arguments = ("--checkpointing_steps", "4", "--max_train_steps", "8")
    whole = shop.run("whole", *arguments, apt=EAGER)
    shop.run("halved", "--checkpointing_steps", "4", "--max_train_steps", "4", apt=EAGER)
    first = shop.done.pop("halved")
    resumed = shop.run("halved", *arguments, "--resume_from_checkpoint", "latest", apt=EAGER)
    assert first.folder == resumed.folder
    assert_same(resumed, whole)
    assert resumed.lines == whole.lines and len(whole.lines) == 8
    assert resumed.metadata["ss_apt_gamma"] == whole.metadata["ss_apt_gamma"]


def test_images_sampled_during_training_do_not_disturb_it(shop: Workshop) -> None:
    arguments = ("--validation_prompt", "a toy", "--num_validation_images", "1", "--validation_epochs", "1")
    arguments += ("--max_train_steps", "5")
    plain = shop.run("sampled-plain", *arguments, patched=False)
    assert_same(shop.run("sampled", *arguments, apt=EAGER + "monitor_only = true"), plain)


def test_two_processes_train_one_lora(shop: Workshop) -> None:
    run = shop.run("two", "--max_train_steps", "4", apt=EAGER, processes=2)
    assert len(run.lines) == 4 and run.lines[-1]["gamma"][0] > 0.0
    assert run.output.count("apt-hooks 0.1.0 is on") == 1


def test_the_tiny_world_is_a_model_like_any_other(shop: Workshop) -> None:
    apt = (TINY_WORLD / "preset.toml").read_text().split("[apt]")[1]
    run = shop.run("tiny", "--resolution", "64", "--max_train_steps", "20", kind="tiny", apt=apt)
    assert len(run.lines) == 20 and run.metadata["ss_apt_steps"] == "20"
    assert max(run.lines[-1]["gamma"]) > 0.0 and run.lines[-1]["delta_noise"] > 0.0


def test_edm_style_training_is_refused_in_one_line(shop: Workshop) -> None:
    result = shop.start("edm", "--do_edm_style_training", kind="sdxl", apt=EAGER, patched=True, processes=1)
    assert result.returncode == 1
    assert "apt-hooks: error: --do_edm_style_training cannot be used with APT" in result.stderr
