import contextlib
import json
import sys

import pytest
import torch

pytest.importorskip("diffusers")

from safetensors.torch import load_file

from apt_hooks.errors import AptError
from apt_hooks.tinyworld import fit, pretrain
from apt_hooks.tinyworld.datasets import draw_scenes
from apt_hooks.tinyworld.model import load_pipeline, sample
from apt_hooks.tinyworld.render import render

STEPS = {"text": 2, "vae": 2, "decoder": 2}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    def render_all(scenes, seed):
        rng = pretrain.random.Random(seed)
        return torch.stack([(render(scene, rng) * 255).round().byte() for scene in scenes])

    monkeypatch.setattr(pretrain, "render_all", render_all)
    monkeypatch.setattr(pretrain, "VAE_SCENES", 20)
    monkeypatch.setattr(pretrain, "ZOOMED_OUT", 0.5)
    monkeypatch.setattr(fit, "CHECKPOINT_EVERY", 1)
    monkeypatch.setattr(pretrain, "write_card", lambda out: None)
    # In bfloat16 a processor that does not multiply it takes minutes.
    monkeypatch.setattr(pretrain, "_mixed", lambda device: contextlib.nullcontext())


def run(monkeypatch, work, *more, steps=2):
    options = [f"--{name}-steps={count}" for name, count in STEPS.items()]
    arguments = ["pretrain", f"--work={work}", "--scenes=40", f"--steps={steps}", "--device=cpu", *options, *more]
    monkeypatch.setattr(sys, "argv", arguments)
    pretrain.main()


def weights(work):
    files = sorted((work / "pipeline").rglob("*.safetensors"))
    return {file.parent.name: load_file(file) for file in files}


def test_a_stopped_pretraining_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    run(monkeypatch, tmp_path / "whole")
    saves = []

    def stops(content, path):
        save(content, path)
        saves.append(path.name)
        # Once in every stage, behind its first step.
        if saves.count(path.name) == 1 and path.name in ("text_encoder.pt", "autoencoder.pt", "unet.pt", "decoder.pt"):
            raise KeyboardInterrupt

    save = fit._save
    monkeypatch.setattr(fit, "_save", stops)
    for _ in range(4):
        with pytest.raises(KeyboardInterrupt):
            run(monkeypatch, tmp_path / "stopped")
    run(monkeypatch, tmp_path / "stopped")

    whole, stopped = weights(tmp_path / "whole"), weights(tmp_path / "stopped")
    assert whole.keys() == {"text_encoder", "unet", "vae"}
    for part, tensors in whole.items():
        assert all(torch.equal(tensor, stopped[part][name]) for name, tensor in tensors.items())
    scales = [json.loads((tmp_path / run / "pipeline/vae/config.json").read_text()) for run in ("whole", "stopped")]
    assert scales[0]["scaling_factor"] == scales[1]["scaling_factor"] != 0.18215
    history = json.loads((tmp_path / "stopped/pipeline/training.json").read_text())
    assert [history[part]["steps"] for part in ("text_encoder", "autoencoder", "unet", "decoder")] == [2, 2, 2, 2]

    # The last stage trains the decoder and nothing else.
    of_vae = torch.load(tmp_path / "whole/autoencoder.pt", weights_only=True)["parameters"]
    names = [name for name, _ in pretrain.new_model(pretrain.new_tokenizer())["vae"].named_parameters()]
    kept = {name: torch.equal(p.half(), whole["vae"][name]) for name, p in zip(names, of_vae, strict=True)}
    assert all(kept[name] for name in names if name.startswith(("encoder", "quant_conv")))
    assert not kept["decoder.conv_in.weight"] and not kept["decoder.conv_out.weight"]

    with pytest.raises(AptError, match=r"unet\.pt is of .*'steps': 2.*asked is .*'steps': 3"):
        run(monkeypatch, tmp_path / "stopped", steps=3)


TRANSFORMER_ALONE = ("--model=transformer", "--denoiser-only")


def test_the_transformer_goes_on_to_any_number_of_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(fit, "FALL_FROM", 1)
    run(monkeypatch, tmp_path / "whole", *TRANSFORMER_ALONE, steps=3)
    for steps in (1, 3):
        run(monkeypatch, tmp_path / "extended", *TRANSFORMER_ALONE, steps=steps)
    whole, extended = weights(tmp_path / "whole"), weights(tmp_path / "extended")
    assert whole.keys() == {"transformer"}
    assert all(torch.equal(tensor, extended["transformer"][name]) for name, tensor in whole["transformer"].items())
    written = {path.name for path in (tmp_path / "whole/pipeline").iterdir()}
    assert written == {"transformer", "scheduler", "training.json"}
    history = json.loads((tmp_path / "extended/pipeline/training.json").read_text())
    assert history["transformer"]["steps"] == 3 and not history.keys() & {"text_encoder", "autoencoder", "decoder"}

    with pytest.raises(AptError, match=r"transformer\.pt is of 3 steps, asked are 2"):
        run(monkeypatch, tmp_path / "extended", *TRANSFORMER_ALONE, steps=2)
    # Those of the packaged autoencoder are not those of one that is to be trained.
    with pytest.raises(AptError, match=r"latents\.pt is of .*packaged"):
        run(monkeypatch, tmp_path / "extended", "--model=transformer", steps=3)


def test_the_packaged_parts_are_what_a_denoiser_alone_learns_from(tmp_path, monkeypatch):
    asked = {}

    def seen(denoiser, parts, latents, *rest):
        asked.update(latents=latents, parts={name: parts[name].state_dict() for name in ("vae", "text_encoder")})
        return train(denoiser, parts, latents, *rest)

    train = pretrain._train_denoiser
    monkeypatch.setattr(pretrain, "_train_denoiser", seen)
    run(monkeypatch, tmp_path, *TRANSFORMER_ALONE, steps=1)
    packaged = load_pipeline()
    for name, state in asked["parts"].items():
        assert all(torch.equal(tensor, state[key]) for key, tensor in getattr(packaged, name).state_dict().items())
    stored = torch.load(tmp_path / "latents.pt", weights_only=True)["data"]["latents"]
    assert torch.equal(asked["latents"], stored * packaged.vae.config.scaling_factor)


def test_a_transformer_comes_about_from_nothing(tmp_path, monkeypatch):
    run(monkeypatch, tmp_path, "--model=transformer")
    assert weights(tmp_path).keys() == {"text_encoder", "transformer", "vae"}
    pipeline = load_pipeline(tmp_path / "pipeline")
    assert sample(pipeline, ["a photo of a red ball"], seed=0, steps=1).shape == (1, 3, 64, 64)


@pytest.mark.parametrize(("endless", "shares"), [(True, (1.0, 6**-0.5)), (False, (0.962, 0.146))])
def test_a_learning_rate_without_end_falls_with_the_root_of_the_step(tmp_path, monkeypatch, endless, shares):
    """Of a loss with slope 1 Adam takes steps as long as the learning rate."""
    monkeypatch.setattr(fit, "FALL_FROM", 200)
    monkeypatch.setattr(fit, "CHECKPOINT_EVERY", 100_000)
    module, way = torch.nn.Linear(1, 1, bias=False), []
    torch.nn.init.zeros_(module.weight)

    def loss(g):
        way.append(module.weight.item())
        return module.weight.sum(), {}

    fit.fit("line", {"line": module}, 1600, 1e-3, loss, tmp_path, {}, seed=0, endless=endless)
    lengths = [(way[i] - way[i + 1]) / 1e-3 for i in (200, 1200)]
    # A hundredth is added at all times.
    assert lengths == pytest.approx([share + 0.01 for share in shares], rel=0.03)


def test_captions_leave_color_and_size_out_at_times_and_hold_rare_words():
    rng = pretrain.random.Random(0)
    scenes = draw_scenes(400, 0)
    captions = [pretrain.caption(scene, rng).split() for scene in scenes]
    for of in (lambda scene: scene.subject.color, lambda scene: scene.size):
        told = [of(scene) in words for scene, words in zip(scenes, captions, strict=True)]
        assert 0.75 < sum(told) / len(told) < 0.95
    assert 0.15 < sum("sks" in words or "ohwx" in words for words in captions) / len(captions) < 0.35
