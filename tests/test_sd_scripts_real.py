"""Whole runs of kohya's sd-scripts. Each takes about a minute on two CPU cores, so they run only when asked for.

SD_SCRIPTS_DIR     an unpatched checkout (it is copied, never changed)
SD_SCRIPTS_PYTHON  the interpreter of its environment, with this apt-hooks installed
SD_SCRIPTS_MODELS  a folder with sd15/, sdxl/ and perhaps sd21/, each with model/ (diffusers format) and tokenizers/
SD_SCRIPTS_PHOTOS  a folder of photos; default: the backpack_dog photos beside this checkout
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PHOTOS = Path(os.environ.get("SD_SCRIPTS_PHOTOS", ROOT.parent / "shared/data/backpack_dog"))
NEEDED = ("SD_SCRIPTS_DIR", "SD_SCRIPTS_PYTHON", "SD_SCRIPTS_MODELS")

pytestmark = [
    pytest.mark.real_trainer,
    pytest.mark.skipif(
        not all(os.environ.get(n) for n in NEEDED), reason=f"needs kohya's sd-scripts: set {', '.join(NEEDED)}"
    ),
    pytest.mark.skipif(not PHOTOS.exists(), reason=f"no photos in {PHOTOS}; set SD_SCRIPTS_PHOTOS"),
]

TRAINING = """
pretrained_model_name_or_path = "{models}/{kind}/model"
tokenizer_cache_dir = "{models}/{kind}/tokenizers"
dataset_config = "dataset.toml"
output_dir = "out"
network_module = "networks.lora"
network_dim = 4
max_train_steps = 3
learning_rate = 1e-3
optimizer_type = "AdamW"
gradient_checkpointing = true
sdpa = true
seed = 1
max_data_loader_n_workers = 0
logging_dir = "logs"
"""
KINDS = {
    "sd15": "network_train_unet_only = true\nmixed_precision = 'no'\n",
    "sd21": "network_train_unet_only = true\nmixed_precision = 'no'\nv2 = true\nv_parameterization = true\n",
    "sdxl": "network_train_unet_only = true\nmixed_precision = 'bf16'\nfull_bf16 = true\n"
    "cache_text_encoder_outputs = true\n",
}
SCRIPTS = {"sd15": "train_network.py", "sd21": "train_network.py", "sdxl": "sdxl_train_network.py"}
DATASET = """
[general]
caption_extension = ".txt"
[[datasets]]
resolution = 128
batch_size = 2
enable_bucket = true
min_bucket_reso = 64
bucket_reso_steps = 64
{dataset}
  [[datasets.subsets]]
  image_dir = "photos"
  num_repeats = 2
{subset}
"""
# A scale at which three steps are enough for gamma to leave 0, and for samples to be augmented.
EAGER = "indicator_scale = 1e7\naugment_max_probability = 1.0\nema_alpha = 1.0\nnum_bins = 1\n"


class Workshop:
    """A folder with photos, an unpatched and a patched copy of the trainer, and runs by name, each made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        source = Path(os.environ["SD_SCRIPTS_DIR"])
        for name in ("plain", "patched"):
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns(".git", "__pycache__"))
        self.cli("patch", "sd-scripts", str(folder / "patched"))
        for name in ("photos", "reg"):
            (folder / name).mkdir()
            for photo in sorted(PHOTOS.glob("*.jpg")):
                shutil.copy(photo, folder / name)
                text = "a photo of sks backpack on a table" if name == "photos" else "a photo of a backpack"
                (folder / name / photo.with_suffix(".txt").name).write_text(text)
        self.done: dict[str, Path] = {}

    def cli(self, *args: str) -> str:
        python = os.environ["SD_SCRIPTS_PYTHON"]
        return subprocess.run(
            [python, "-c", "from apt_hooks.cli import main; main()", *args],
            check=True, capture_output=True, text=True, cwd=self.folder,
        ).stdout  # fmt: skip

    def start(
        self,
        name: str,
        *,
        kind: str = "sd15",
        trainer: str = "patched",
        apt: str | None = None,
        args: str = "",
        dataset: str = "",
        subset: str = "",
        command: tuple[str, ...] = (),
    ) -> subprocess.CompletedProcess[str]:
        run = self.folder / name
        run.mkdir(exist_ok=True)
        for linked in ("photos", "reg"):
            if not (run / linked).exists():
                shutil.copytree(self.folder / linked, run / linked)
        usual = (TRAINING + KINDS[kind]).format(models=os.environ["SD_SCRIPTS_MODELS"], kind=kind).splitlines()
        given = {line.split(" = ")[0] for line in args.splitlines()}
        text = "\n".join(line for line in usual if line.split(" = ")[0] not in given) + "\n" + args
        if apt is not None:
            text += f"\n[apt]\n{apt}\n"
        (run / "train.toml").write_text(text)
        (run / "dataset.toml").write_text(DATASET.format(dataset=dataset, subset=subset))
        script = self.folder / trainer / SCRIPTS[kind]
        arguments = ["--config_file", "train.toml", "--output_name", "lora", *command]
        return subprocess.run(
            [os.environ["SD_SCRIPTS_PYTHON"], str(script), *arguments],
            cwd=run,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
        )

    def train(self, name: str, **options: object) -> Path:
        """The folder of a run that has to succeed; the same name is run once."""
        if name not in self.done:
            result = self.start(name, **options)  # type: ignore[arg-type]
            assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-5000:]
            (self.folder / name / "stdout.txt").write_text(result.stdout + result.stderr)
            self.done[name] = self.folder / name
        return self.done[name]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("sd-scripts"))


def lora(run: Path) -> tuple[dict, dict]:
    """Weights as bytes by name, and metadata."""
    from safetensors import safe_open

    with safe_open(run / "out/lora.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata())  # noqa: SIM118


def same_lora(one: Path, two: Path) -> bool:
    a, b = lora(one)[0], lora(two)[0]
    return a.keys() == b.keys() and all(bool((a[k] == b[k]).all()) for k in a)


def log(run: Path) -> list[dict]:
    found = map(json.loads, (run / "out/lora-apt.jsonl").read_text().splitlines())
    return [line for line in found if "run" not in line]


@pytest.mark.parametrize(
    "apt",
    [
        None,
        "enabled = false",
        "monitor_only = true",
        "loss_weighting = false\naugmentation = false\nlambda_dist = 0.0\nlambda_attn = 0.0",
    ],
)
def test_with_no_term_on_the_lora_is_the_unpatched_trainers_bit_for_bit(workshop: Workshop, apt: str | None) -> None:
    plain = workshop.train("plain15", trainer="plain")
    other = workshop.train(f"off{hash(apt)}", apt=apt)
    assert same_lora(plain, other)
    assert (other / "out/lora-apt.jsonl").exists() == (apt is not None and "enabled" not in apt)


def test_monitoring_leaves_the_lora_alone_with_text_encoders_dropout_validation_and_accumulation(
    workshop: Workshop,
) -> None:
    options = {
        "args": "network_train_unet_only = false\nnetwork_dropout = 0.5\ngradient_accumulation_steps = 2\n"
        "validation_split = 0.4\nvalidate_every_n_steps = 1\nmin_snr_gamma = 5\nnoise_offset = 0.05\n"
    }
    plain = workshop.train("plain-te", trainer="plain", **options)
    other = workshop.train("monitor-te", apt="monitor_only = true\n" + EAGER, **options)
    assert same_lora(plain, other)
    lines = log(other)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[0]["delta_noise"] == 0.0 < lines[-1]["delta_noise"]


CHANGES = "model before the first step (mean square of the difference"


def test_a_run_that_goes_on_from_a_lora_says_so_and_may_take_it_for_reference(workshop: Workshop) -> None:
    encoders = "network_train_unet_only = false\n"
    first = workshop.train("first-te", trainer="plain", args=encoders) / "out/lora.safetensors"
    goes_on = f'{encoders}network_weights = "{first}"\n'
    dropout = 'network_dropout = 0.3\nnetwork_args = ["rank_dropout=0.2", "module_dropout=0.1"]\n'
    plain = workshop.train("goes-on", trainer="plain", args=goes_on + dropout)
    assert not same_lora(workshop.folder / "first-te", plain)
    for reference in ("base", "start"):
        apt = f'monitor_only = true\nreference = "{reference}"\n{EAGER}'
        run = workshop.train(f"goes-on-{reference}", apt=apt, args=goes_on + dropout)
        assert same_lora(plain, run)
        said = " ".join((run / "stdout.txt").read_text().split())  # which sd-scripts breaks into short lines
        assert said.count(CHANGES) == (reference == "base")
        assert said.count("(network_dropout = 0.3, rank_dropout = 0.2, module_dropout = 0.1)") == 1
    without = workshop.train("goes-on-without", apt=apt, args=goes_on)
    lines = log(without)
    assert lines[0]["delta_noise"] == 0.0 < lines[-1]["delta_noise"]
    assert CHANGES not in " ".join((without / "stdout.txt").read_text().split())


def test_apt_changes_the_lora_and_says_so(workshop: Workshop) -> None:
    run = workshop.train("apt15", apt='preset = "sd15"\n' + EAGER)
    assert not same_lora(workshop.train("plain15", trainer="plain"), run)
    lines, metadata = log(run), lora(run)[1]
    assert len(lines) == 3
    assert lines[-1]["gamma"] == [pytest.approx(1.0)]
    assert lines[-1]["loss_weight"] == pytest.approx(0.0, abs=1e-5)
    assert lines[-1]["augmented"] == 1.0
    assert lines[-1]["l_attn"] > 0 and lines[-1]["l_mu"] > 0 and lines[-1]["l_sigma"] > 0
    assert metadata["ss_apt_preset"] == "sd15" and json.loads(metadata["ss_apt_config"])["num_bins"] == 1
    assert not any(key in metadata for key in ("ss_num_bins", "ss_preset"))
    assert (run / "stdout.txt").read_text().count("is on | preset sd15") == 1
    events = list((run / "logs").rglob("events.*"))
    assert events and any(b"apt/gamma/0" in event.read_bytes() for event in events)


def test_apt_config_argument_equals_the_section(workshop: Workshop, tmp_path: Path) -> None:
    (tmp_path / "apt.toml").write_text('[apt]\npreset = "sd15"\n' + EAGER)
    run = workshop.train("apt15-file", command=("--apt_config", str(tmp_path / "apt.toml")))
    assert same_lora(workshop.train("apt15", apt='preset = "sd15"\n' + EAGER), run)


def test_reg_images_masks_text_encoders_identifier_and_sampling(workshop: Workshop) -> None:
    (workshop.folder / "prompts.txt").write_text("a backpack --w 64 --h 64 --s 2\n")
    reg = '  [[datasets.subsets]]\n  image_dir = "reg"\n  is_reg = true\n'
    run = workshop.train(
        "everything",
        apt=EAGER + 'identifier = "sks"\nclass_word = "bag"\n',
        args="network_train_unet_only = false\nmin_snr_gamma = 5\nmasked_loss = true\nmax_train_steps = 6\n"
        f'sample_prompts = "{workshop.folder}/prompts.txt"\nsample_every_n_steps = 3\nmax_token_length = 150\n',
        subset="  alpha_mask = true\n" + reg,
    )
    lines = log(run)
    assert len(lines) == 6 and all(line["delta_noise"] is None or line["delta_noise"] > 0 for line in lines[:1])
    assert list((run / "out/sample").glob("*.png"))


def test_cached_latents_are_augmented_in_latent_space_and_it_is_said(workshop: Workshop) -> None:
    run = workshop.train("cached", apt=EAGER, args="cache_latents = true\n")
    assert log(run)[-1]["augmented"] == 1.0
    assert (run / "stdout.txt").read_text().count("latents, which are augmented") == 1
    assert lora(run)[1]["ss_apt_augment_space"] == "latent"


def test_resuming_goes_on_with_the_indicator_and_the_log(workshop: Workshop) -> None:
    first = workshop.train("resume", apt=EAGER, args="save_state = true\nsave_every_n_steps = 2\n")
    state = next((first / "out").glob("lora-step*-state"))
    saved = json.loads((state / "apt-hooks.json").read_text())
    assert saved["step"] == 2
    shutil.copytree(state, workshop.folder / "state")
    workshop.done.pop("resume")
    again = workshop.train("resume", apt=EAGER, args=f'resume = "{workshop.folder}/state"\nmax_train_steps = 5\n')
    steps = [line["step"] for line in log(again)]
    assert steps[:3] == [1, 2, 3] and steps == sorted(set(steps))
    (workshop.folder / "state/apt-hooks.json").unlink()
    without = workshop.train(
        "resume-without", apt=EAGER, args=f'resume = "{workshop.folder}/state"\nmax_train_steps = 5\n'
    )
    assert "starts anew" in " ".join((without / "stdout.txt").read_text().split())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"apt": "lamda_attn = 1.0"}, 'did you mean "lambda_attn"'),
        ({"apt": 'augment_space = "image"', "args": "cache_latents = true\n"}, "drop cache_latents"),
        ({"apt": "", "args": "torch_compile = true\n"}, "--torch_compile cannot be used"),
        ({"apt": "", "command": ("--apt_config", "x.toml")}, "keep one"),
        ({"apt": 'identifier = "sks"\nclass_word = "stuffed animal"'}, "as many tokens"),
        ({"apt": "blocks = [0]"}, "up-block 0 has no attention"),
    ],
)  # fmt: skip
def test_what_cannot_work_ends_with_one_line(workshop: Workshop, options: dict, said: str) -> None:
    result = workshop.start("refused", **options)
    assert result.returncode == 1
    last = " ".join(result.stderr.strip().splitlines()[-1].split())
    assert last.startswith("apt-hooks: error:")
    assert said in last or (said == "as many tokens" and "is 1 tokens, class_word" in last)
    assert "Traceback" not in result.stderr


def test_without_apt_hooks_installed_the_patched_trainer_is_the_unpatched_one(workshop: Workshop) -> None:
    hide = workshop.folder / "hide"
    hide.mkdir(exist_ok=True)
    (hide / "sitecustomize.py").write_text("import sys\nsys.modules['apt_hooks'] = None\n")
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(hide)
    try:
        run = workshop.train("not-installed")
        refused = workshop.start("not-installed-apt", apt="")
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    assert same_lora(workshop.train("plain15", trainer="plain"), run)
    assert refused.returncode == 1 and ": pip install " in refused.stderr


def test_sdxl_with_reentrant_checkpointing_and_cached_text(workshop: Workshop) -> None:
    plain = workshop.train("plainxl", kind="sdxl", trainer="plain")
    monitor = workshop.train("monitorxl", kind="sdxl", apt="monitor_only = true")
    apt = workshop.train("aptxl", kind="sdxl", apt='preset = "sdxl"\nidentifier = "sks"\nclass_word = "bag"\n' + EAGER)
    assert same_lora(plain, monitor)
    assert not same_lora(plain, apt)
    assert log(apt)[-1]["l_attn"] > 0


def test_sd21_with_v_prediction(workshop: Workshop) -> None:
    if not (Path(os.environ["SD_SCRIPTS_MODELS"]) / "sd21").exists():
        pytest.skip("no sd21/ in SD_SCRIPTS_MODELS")
    plain = workshop.train("plain21", kind="sd21", trainer="plain")
    monitor = workshop.train("monitor21", kind="sd21", apt='preset = "sd21"\nmonitor_only = true')
    apt = workshop.train("apt21", kind="sd21", apt='preset = "sd21"\n' + EAGER)
    assert same_lora(plain, monitor)
    assert not same_lora(plain, apt)
    assert log(apt)[-1]["augmented"] == 1.0


def test_gradients_under_reentrant_checkpointing_in_the_trainers_own_sdxl_unet() -> None:
    script = ROOT / "tests/sdxl_unet_gradients.py"
    result = subprocess.run(
        [os.environ["SD_SCRIPTS_PYTHON"], str(script), os.environ["SD_SCRIPTS_DIR"]], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout.strip().splitlines()[-1])
    assert found["reentrant"] < 1e-3 and found["non_reentrant"] < 1e-3
    assert found["norm_with_terms"] > 5 * found["norm_without_terms"]


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-v"]))
