import itertools
import random

import pytest
import torch

pytest.importorskip("diffusers")

from apt_hooks.errors import AptError
from apt_hooks.tinyworld.datasets import draw_scenes, held_out_scenes
from apt_hooks.tinyworld.denoisers import DENOISERS, TRANSFORMER
from apt_hooks.tinyworld.evaluate import agreement
from apt_hooks.tinyworld.judge_networks import load_judges
from apt_hooks.tinyworld.model import (
    PIPELINES,
    WEIGHTS,
    decode_latents,
    encode_images,
    encode_texts,
    load_pipeline,
    new_model,
    sample,
    save_denoiser,
    save_pipeline,
)
from apt_hooks.tinyworld.render import render
from apt_hooks.tinyworld.world import is_held_out, random_scene, vocabulary


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline()


def test_the_weights_are_small():
    for folder, most in {WEIGHTS: 27e6, PIPELINES["transformer"]: 12e6}.items():
        assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < most


def test_diffusers_loads_the_pipeline_as_any_other():
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(WEIGHTS / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a photo of a red ball", num_inference_steps=1, output_type="np").images.shape == (1, 64, 64, 3)


def test_every_word_is_one_token(pipeline):
    assert [word for word in vocabulary() if len(pipeline.tokenizer.tokenize(word)) != 1] == []


def test_the_autoencoder_keeps_what_a_picture_shows(pipeline):
    rng = random.Random(0)
    pictures = torch.stack([render(random_scene(rng), rng) for _ in range(16)]) * 2 - 1
    latents = encode_images(pipeline, pictures)
    assert latents.shape == (16, 4, 16, 16) and 0.7 < latents.std() < 1.4
    with torch.no_grad():
        decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    assert (decoded - pictures).abs().mean() < 0.08


def test_pictures_depend_on_the_seed_and_on_nothing_else(pipeline):
    prompts = ["a photo of a red ball", "a drawing of a blue car"]
    state = torch.random.get_rng_state()
    one, two, other = (sample(pipeline, prompts, seed=seed, steps=2) for seed in (1, 1, 2))
    assert torch.equal(one, two) and not torch.allclose(one, other, atol=0.05)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("folder", PIPELINES.values(), ids=PIPELINES)
def test_the_models_draw_what_captions_ask_that_they_never_saw(folder):
    scenes = held_out_scenes(24, seed=7)
    shares = agreement(load_pipeline(folder), load_judges(), scenes, seed=0)
    assert shares["mean"] > 0.9 and shares["place"] > 0.9


def test_pretraining_never_sees_what_is_held_out():
    scenes = draw_scenes(500, 3)
    assert not any(is_held_out(scene) or scene.subject.pattern for scene in scenes)
    assert scenes == draw_scenes(500, 3) != draw_scenes(500, 4)
    patterned = [scene for scene in draw_scenes(500, 3, subjects=True) if scene.subject.pattern]
    assert 150 < len(patterned) < 350


def test_no_diffusers_is_one_line(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(AptError, match=r"needs diffusers .*pip install \"apt-hooks\[demo\]\""):
        load_pipeline()


def test_stored_names_are_those_of_transformers_4_and_are_read_by_5(pipeline):
    from safetensors.torch import load_file

    stored = load_file(WEIGHTS / "pipeline" / "text_encoder" / "model.safetensors")
    assert all(name.startswith("text_model.") for name in stored)
    read = {"text_model." + name.removeprefix("text_model."): p for name, p in pipeline.text_encoder.named_parameters()}
    assert read.keys() <= stored.keys()
    assert all(torch.equal(stored[name].float(), tensor) for name, tensor in read.items())


def test_a_folder_without_a_pipeline_is_one_line(tmp_path):
    (tmp_path / "vae").mkdir()
    with pytest.raises(AptError, match=r"looked for one of the parts unet, transformer, found vae; .*pretrain"):
        load_pipeline(tmp_path)


@pytest.mark.parametrize("denoiser", DENOISERS.values(), ids=DENOISERS)
def test_a_denoiser_alone_takes_the_rest_from_the_packaged_pipeline(tmp_path, pipeline, denoiser):
    torch.manual_seed(0)
    parts = new_model(pipeline.tokenizer, denoiser)
    save_denoiser(parts, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {denoiser.part, "scheduler"}
    read = load_pipeline(tmp_path)
    for name, of in (("vae", pipeline), ("text_encoder", pipeline)):
        states = [getattr(p, name).state_dict() for p in (read, of)]
        assert all(torch.equal(tensor, states[1][key]) for key, tensor in states[0].items())
    stored = getattr(read, denoiser.part).state_dict()
    assert all(torch.equal(tensor.float(), stored[key]) for key, tensor in parts[denoiser.part].state_dict().items())
    assert read.training_scheduler.config.num_train_timesteps == 1000


def test_all_parts_of_a_transformer_are_read_back(tmp_path, pipeline):
    torch.manual_seed(0)
    parts = new_model(pipeline.tokenizer, TRANSFORMER)
    parts["vae"].register_to_config(scaling_factor=0.5)
    save_pipeline(parts, tmp_path)
    read = load_pipeline(tmp_path)
    assert type(read).__name__ == "StableDiffusion3Pipeline" and read.vae.config.scaling_factor == 0.5
    for name in ("vae", "text_encoder", "transformer"):
        state = getattr(read, name).state_dict()
        prefix = "text_model."
        written = {key.removeprefix(prefix): tensor for key, tensor in parts[name].state_dict().items()}
        assert all(
            torch.equal(tensor.float(), written[key.removeprefix(prefix)].float()) for key, tensor in state.items()
        )


def test_the_transformer_s_pipeline_refuses_embeddings(tmp_path, pipeline):
    save_denoiser(new_model(pipeline.tokenizer, TRANSFORMER), tmp_path)
    ready = {"prompt_embeds": torch.zeros(1, 32, 128), "pooled_prompt_embeds": torch.zeros(1, 128)}
    with pytest.raises(AptError, match="takes prompts as texts; found prompt_embeds, pooled_prompt_embeds"):
        load_pipeline(tmp_path)(**ready)


def test_sampling_with_the_transformer_is_euler_s_method_on_the_guided_velocity(tmp_path, pipeline):
    torch.manual_seed(0)
    parts = new_model(pipeline.tokenizer, TRANSFORMER)
    with torch.no_grad():
        # A velocity that is no longer almost nothing.
        parts["transformer"].proj_out.weight.normal_(std=0.5)
    save_denoiser(parts, tmp_path)
    read = load_pipeline(tmp_path)
    prompts = ["a photo of a red ball at night", "a drawing of a blue car"]
    drawn = sample(read, prompts, seed=3, steps=4, guidance_scale=3.0)
    assert torch.equal(drawn, sample(read, prompts, seed=3, steps=4, guidance_scale=3.0))

    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    told, untold = (TRANSFORMER.condition(encode_texts(read, texts)) for texts in (prompts, ["", ""]))
    sigmas = [*read.scheduler.sigmas.tolist()]
    assert len(sigmas) == 5 and sigmas[0] == 1 and sigmas[-1] == 0
    with torch.no_grad():
        for sigma, following in itertools.pairwise(sigmas):
            time = torch.full((2,), 1000 * sigma)
            with_text, without = (TRANSFORMER.predict(read.transformer, x, time, c) for c in (told, untold))
            x = x + (following - sigma) * (without + 3.0 * (with_text - without))
    assert torch.allclose(drawn, decode_latents(read, x), atol=1e-3)
