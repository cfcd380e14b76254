"""What a method does beside APT: prior preservation and differential output preservation, in a training's own terms."""

import dataclasses
import functools
import re
import typing

import pytest
import torch
from models import make_batch, make_tuned
from torch import nn

pytest.importorskip("diffusers")
pytest.importorskip("peft")

from apt_hooks import AptConfig, AptObjective
from apt_hooks.integrations.peft import adapters_off
from apt_hooks.tinyworld import experiment, personalize, preservation
from apt_hooks.tinyworld.concepts import CONCEPTS
from apt_hooks.tinyworld.methods import METHODS
from apt_hooks.tinyworld.model import PIPELINES, denoiser_of, encode_images, encode_texts, load_pipeline, sample
from apt_hooks.tinyworld.personalize import Training, lora, method_config, reference_pictures, train
from apt_hooks.tinyworld.preservation import class_caption, class_pictures, output_preservation_loss

CONCEPT, COUNT = CONCEPTS[4], 6
PICTURES = reference_pictures(CONCEPT)


@pytest.fixture(scope="module", autouse=True)
def few_class_pictures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preservation, "CLASS_PICTURES", COUNT)
        patch.setattr(preservation, "sample", functools.partial(sample, steps=2))
        yield


@pytest.fixture(scope="module", params=PIPELINES)
def pipeline(request):
    return load_pipeline(PIPELINES[request.param])


def denoiser(pipeline):
    return getattr(pipeline, denoiser_of(pipeline.components).part)


@pytest.fixture
def off(pipeline):
    """Of a LoRA that is on the pipeline meanwhile, and changes what it draws."""
    with lora(pipeline, 4, 0):
        for name, p in denoiser(pipeline).named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p, std=0.02)
        yield functools.partial(adapters_off, denoiser(pipeline))


@torch.no_grad()
def predict(pipeline, clean, noise, timesteps, texts):
    kind = denoiser_of(pipeline.components)
    noisy = kind.add_noise(pipeline.training_scheduler, clean, noise, timesteps)
    return kind.predict(denoiser(pipeline), noisy, timesteps, kind.condition(texts))


def test_the_class_is_told_by_the_caption_without_the_identifier():
    assert class_caption("a photo of a big sks ball on the left") == "a photo of a big ball on the left"
    assert class_caption("a photo of a ball") == "a photo of a ball"


def test_class_pictures_are_the_base_models_with_captions_of_their_own(pipeline, off):
    captions = ["a photo of a sks ball", "a photo of a small sks ball in the snow"]
    pictures, prompts = class_pictures(pipeline, captions, off, seed=3)
    assert prompts == ["a photo of a ball", "a photo of a small ball in the snow"] * (COUNT // 2)
    assert pictures.shape == (COUNT, 3, 64, 64) and 0 <= pictures.min() < pictures.max() <= 1
    with off():
        assert torch.equal(pictures, sample(pipeline, prompts, seed=3, steps=2))
    assert not torch.equal(pictures, sample(pipeline, prompts, seed=3, steps=2))
    other, _ = class_pictures(pipeline, captions, off, seed=4)
    assert not torch.equal(pictures, other)


def test_prior_preservation_is_dreambooths_batch_of_two_halves(pipeline, off):
    """Written out as the scripts have it: both halves through the U-Net at once, and the mean of each."""
    captions = CONCEPT.captions()
    samples = personalize._Samples(pipeline, PICTURES, captions, 2, 0)
    terms = personalize._ClassTerms(METHODS["prior"], samples, captions, off, 0)
    drawn, stream = [], terms._prior._stream.get_state()
    found = float(terms.loss().detach())
    terms._prior._stream.set_state(stream)
    # Of a stream of their own: the judges' pictures of the class begin from the noise of the seed itself.
    pictures, prompts = class_pictures(pipeline, captions, off, 0xFFFFFFFF)
    for images, texts, own in ((PICTURES, captions, samples), (pictures, prompts, terms._prior)):
        rows, timesteps, noise = own.draw()
        clean = encode_images(pipeline, images * 2 - 1)[rows]
        drawn.append((clean, timesteps, noise, encode_texts(pipeline, texts)[rows]))
    (clean, timesteps, noise, texts), halves = map(torch.cat, zip(*drawn, strict=True)), [len(d[0]) for d in drawn]
    assert halves == [2, 2] and not torch.equal(drawn[0][1], drawn[1][1]) and not torch.equal(drawn[0][2], drawn[1][2])
    predicted = predict(pipeline, clean, noise, timesteps, texts)
    missed = predicted - denoiser_of(pipeline.components).target(clean, noise)
    _, prior = missed.square().mean(dim=(1, 2, 3)).chunk(2)
    assert found == pytest.approx(float(prior.mean()), rel=1e-4)
    terms._prior._stream.set_state(stream)
    terms._method = dataclasses.replace(terms._method, prior_preservation=2.0)
    assert float(terms.loss().detach()) == pytest.approx(2 * found, rel=1e-4)


def test_output_preservation_is_nothing_for_a_lora_at_its_start_and_grows_with_it(pipeline):
    captions = CONCEPT.captions()
    with lora(pipeline, 4, 0):
        off = functools.partial(adapters_off, denoiser(pipeline))
        samples = personalize._Samples(pipeline, PICTURES, captions, 2, 0)
        terms = personalize._ClassTerms(METHODS["dop"], samples, captions, off, 0)
        rows, timesteps, noise = samples.draw()
        clean, sizes = samples.latents(rows), []
        for scale in (0.0, 0.01, 0.02):
            for name, p in denoiser(pipeline).named_parameters():
                if "lora_B" in name:
                    torch.nn.init.constant_(p, scale)
            sizes.append(float(terms.loss(rows, clean, timesteps, noise).detach()))
        # On the batch's own noisy latents, told the class: the mean square of the two models' difference there.
        texts = encode_texts(pipeline, [class_caption(captions[row]) for row in rows])
        tuned = predict(pipeline, clean, noise, timesteps, texts)
        with off():
            base = predict(pipeline, clean, noise, timesteps, texts)
    assert sizes[0] == 0.0 < sizes[1] < sizes[2]
    assert sizes[2] == pytest.approx(float((tuned - base).square().mean()), rel=1e-4)


def test_beside_apts_regularizers_output_preservation_adds_its_own_gradient_and_no_other():
    unet, network = make_tuned("up_blocks")
    x, timesteps, context, target = make_batch(unet)
    config = AptConfig(augmentation=False, lambda_dist=3.0, lambda_attn=30.0)

    def gradient(*, apt, dop):
        network.zero_grad()
        with AptObjective(config, unet, network.off) as objective:
            loss = torch.zeros(())
            if apt:
                step = objective.step(lambda: unet(x, timesteps, context), target, timesteps)
                loss = loss + step.loss((step.prediction - target).square().mean(dim=(1, 2, 3)))
            if dop:
                loss = loss + output_preservation_loss(lambda: unet(x, timesteps, -context), network.off)
            loss.backward()
        return network.gradient()

    both, alone, preserved = gradient(apt=True, dop=True), gradient(apt=True, dop=False), gradient(apt=False, dop=True)
    assert preserved.norm() > 0 and alone.norm() > 0
    torch.testing.assert_close(both, alone + preserved, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["prior", "dop"])
def test_what_a_method_adds_changes_what_is_learned_at_its_weight(pipeline, name):
    def lora_of(method):
        with lora(pipeline, 4, 0):
            config = method_config("dreambooth", denoiser=denoiser_of(pipeline.components))
            training = Training(steps=2)
            train(pipeline, PICTURES, CONCEPT.captions(), config, training, seed=0, method=method)
            named = denoiser(pipeline).named_parameters()
            return torch.cat([p.detach().flatten() for n, p in named if "lora_B" in n])

    plain, method = lora_of(METHODS["dreambooth"]), METHODS[name]
    key = {"prior": "prior_preservation", "dop": "output_preservation"}[name]
    assert not torch.equal(plain, lora_of(method))
    assert torch.equal(plain, lora_of(dataclasses.replace(method, **{key: 0.0})))


class Stop(Exception):
    pass


class Examination:
    """Has the pipeline draw nothing, and stops where the pictures would be judged."""

    def __init__(self, pipeline):
        self.pipeline, self.references, self.concept = pipeline, PICTURES, CONCEPT

    def judge(self, identifier):
        self.hooks = sum(len(m._forward_hooks) for m in denoiser(self.pipeline).modules())
        raise Stop


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("dop", {"dop.safetensors", "dop-apt.jsonl", "dop-checkpoints.jsonl"}),
        ("t-lora", {"t-lora-apt.jsonl"}),
    ],
)
def test_a_t_lora_is_drawn_with_as_it_was_trained_and_no_file_says_it_is_a_plain_one(pipeline, tmp_path, name, files):
    examination = Examination(pipeline)
    setting = experiment.Setting(CONCEPTS.index(CONCEPT), training=Training(steps=1))
    with pytest.raises(Stop):
        experiment.run_method(name, examination, setting, out=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == files
    assert (examination.hooks > 0) == (name == "t-lora")
    assert not any(m._forward_hooks for m in denoiser(pipeline).modules())


def test_what_is_done_beside_is_told_by_name_and_nothing_where_keys_are_all():
    told = {name: method.beside for name, method in METHODS.items() if method.beside}
    assert told == {
        "prior": {"prior_preservation": 1.0},
        "dop": {"output_preservation": 1.0},
        "t-lora": {"masks_rank": True},
        "t-lora+ortho": {"masks_rank": True, "orthogonal": True},
        "apt+prior": {"prior_preservation": 1.0},
        "apt+dop": {"output_preservation": 1.0},
        "apt+t-lora": {"masks_rank": True},
    }


def test_the_help_names_every_method():
    from apt_hooks.commands.training import demo
    from apt_hooks.tinyworld.experiment import UNTRAINED

    (option,) = typing.get_type_hints(demo, include_extras=True)["methods"].__metadata__
    assert re.findall(r"[\w+-]+", option.help.split(":")[1]) == [*UNTRAINED, *METHODS]
