import random

import pytest
import torch

pytest.importorskip("diffusers")

from apt_hooks.errors import AptError
from apt_hooks.tinyworld.evaluate import agreement
from apt_hooks.tinyworld.judges import load_judges
from apt_hooks.tinyworld.model import WEIGHTS, encode_images, load_pipeline, sample
from apt_hooks.tinyworld.render import render
from apt_hooks.tinyworld.world import draw_scenes, held_out_scenes, is_held_out, random_scene, vocabulary


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline()


def test_the_weights_are_small():
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()) < 25e6


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


def test_the_model_draws_what_captions_ask_that_it_never_saw(pipeline):
    scenes = held_out_scenes(24, seed=7)
    shares = agreement(pipeline, load_judges(), scenes, seed=0)
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
    with pytest.raises(AptError, match=r"found no model_index\.json"):
        load_pipeline(tmp_path)
