import dataclasses
import random
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("safetensors")

from apt_hooks.tinyworld.concepts import CONCEPTS, IDENTIFIER
from apt_hooks.tinyworld.datasets import held_out_scenes
from apt_hooks.tinyworld.evaluate import METRICS, Examination, agreement, as_decoded
from apt_hooks.tinyworld.experiment import Setting
from apt_hooks.tinyworld.judge_networks import AttributeClassifier, IdentityEncoder, Judges, load_judges
from apt_hooks.tinyworld.personalize import reference_pictures
from apt_hooks.tinyworld.render import render
from apt_hooks.tinyworld.world import BACKGROUNDS, COLORS, Subject

CONCEPT = CONCEPTS[6]


class StubPipeline:
    """Draws its noise, or what `draw` makes of the prompts; remembers what it was asked for. Encodes nothing."""

    components = ("unet",)

    def __init__(self, draw=None):
        self.draw, self.asked = draw, []
        self.vae = SimpleNamespace(
            config=SimpleNamespace(scaling_factor=1.0),
            encode=lambda images: SimpleNamespace(latent_dist=SimpleNamespace(mean=images)),
            decode=lambda latents: SimpleNamespace(sample=latents),
        )

    def __call__(self, prompt, *, latents, **_):
        self.asked.append((prompt, latents))
        images = self.draw(prompt) if self.draw else F.interpolate(latents[:, :3], size=64)
        return SimpleNamespace(images=images)


@pytest.fixture(scope="module")
def judges():
    torch.manual_seed(0)
    return Judges(AttributeClassifier().eval(), IdentityEncoder().eval())


def examination(judges, concept=CONCEPT, *, pipeline=None, references=None, scenes=8, repeats=1, seed=0):
    references = torch.rand(4, 3, 64, 64) if references is None else references
    pipeline = pipeline or StubPipeline()
    return Examination(pipeline, judges, concept, references, scenes=scenes, repeats=repeats, seed=seed)


# Prompts.


@pytest.mark.parametrize("number", range(len(CONCEPTS)))
def test_prompts_are_unique_and_none_is_before_the_references_background(judges, number):
    concept = CONCEPTS[number]
    exam = examination(judges, concept, scenes=24)
    assert len(set(exam.prompts())) == len(exam.prompts()) == 24
    assert all(scene.subject == concept.subject for scene in exam.scenes)
    assert not any(BACKGROUNDS[concept.background] in prompt for prompt in exam.prompts())
    # The others are all asked for.
    assert {scene.background for scene in exam.scenes} == BACKGROUNDS.keys() - {concept.background}


def test_a_prompt_is_drawn_as_often_as_asked(judges):
    once, thrice = examination(judges).prompts(), examination(judges, repeats=3).prompts()
    assert thrice == [prompt for prompt in once for _ in range(3)]


def test_the_identifier_stands_before_the_noun_or_is_left_out(judges):
    exam = examination(judges)
    kind = CONCEPT.subject.kind
    assert all(f" {IDENTIFIER} {kind} " in prompt for prompt in exam.prompts())
    assert exam.prompts(None) == [prompt.replace(f" {IDENTIFIER}", "") for prompt in exam.prompts()]
    # The concept's color is left to it.
    assert not any(set(prompt.split()) & set(COLORS) for prompt in exam.prompts())


def test_the_seed_decides_the_prompts_and_nothing_else_does(judges):
    exam = examination(judges, seed=3)
    state = torch.random.get_rng_state()
    assert examination(judges, seed=3, references=exam.references).scenes == exam.scenes
    assert examination(judges, seed=4, references=exam.references).scenes != exam.scenes
    assert examination(judges, seed=3, references=exam.references, scenes=12).scenes[:8] == exam.scenes
    assert torch.equal(state, torch.random.get_rng_state())


def test_what_was_asked_drawn_by_code_is_what_the_classifier_reads_and_the_subject():
    for package in ("diffusers", "peft"):
        pytest.importorskip(package)
    concept = CONCEPTS[3]
    exam = Setting(3, scenes=12, repeats=2).examination(base=torch.randn(24, 48))
    ideal, again = exam.ideal(), exam.ideal()
    assert torch.equal(ideal.pictures, again.pictures) and len(ideal.pictures) == 24
    assert ideal.scores["text"] > 0.97 and ideal.scores["black_frames"] == 0
    plain = [dataclasses.replace(scene, subject=Subject(concept.subject.kind, "red")) for scene in exam.scenes]
    rng = random.Random(0)
    others = exam.score(as_decoded(exam.pipeline, torch.stack([render(scene, rng) for scene in plain])))
    assert ideal.scores["identity"] > others.scores["identity"] + 0.3


# Scores.


def test_the_base_model_draws_the_class_word_and_those_judged_take_another_noise(judges):
    pipeline = StubPipeline()
    exam = examination(judges, pipeline=pipeline, seed=1)
    one, again, of_class = exam.judge(), exam.judge(), exam.judge(None)
    asked, noise = zip(*pipeline.asked, strict=True)
    assert list(asked) == [exam.prompts(None), exam.prompts(), exam.prompts(), exam.prompts(None)]
    assert all(torch.equal(noise[1], other) for other in noise[2:]) and not torch.isclose(noise[0], noise[1]).any()
    assert set(one.scores) == set(METRICS) and one.scores == again.scores == of_class.scores
    assert torch.equal(one.pictures, again.pictures) and one.pictures.shape == (8, 3, 64, 64)
    examination(judges, pipeline=pipeline, seed=2)
    assert all(not torch.isclose(pipeline.asked[-1][1], other).any() for other in noise)


def test_the_base_models_own_pictures_are_at_no_distance(judges):
    def draw(prompts):
        generator = torch.Generator().manual_seed(0)
        return torch.rand(len(prompts), 3, 64, 64, generator=generator)

    scores = examination(judges, pipeline=StubPipeline(draw)).judge().scores
    assert scores["frechet"] == pytest.approx(0, abs=1e-4) and scores["precision"] == scores["recall"] == 1


def test_who_draws_a_reference_shows_the_concept_and_lacks_variety(judges):
    reference = reference_pictures(CONCEPT)[:1]
    pipeline = StubPipeline()
    exam = examination(judges, pipeline=pipeline, references=reference)
    other = exam.judge().scores
    pipeline.draw = lambda prompts: reference.expand(len(prompts), -1, -1, -1)
    scores = exam.judge().scores
    assert scores["identity"] == pytest.approx(1, abs=1e-5) and other["identity"] < 0.99
    assert scores["recall"] == 0 and scores["frechet"] > other["frechet"]


def test_agreement_is_the_share_of_what_was_asked():
    scenes, judges = held_out_scenes(40, 5), load_judges()
    shown = {scene.caption(): render(scene, random.Random(i)) for i, scene in enumerate(scenes)}
    right = StubPipeline(lambda prompts: torch.stack([shown[prompt] for prompt in prompts]))
    wrong = StubPipeline(lambda prompts: torch.stack([shown[prompt] for prompt in prompts[1:] + prompts[:1]]))
    shares = agreement(right, judges, scenes, seed=0)
    assert set(shares) == {"kind", "size", "place", "background", "style", "second", "color", "mean"}
    assert min(shares.values()) >= 0.95
    assert shares["mean"] == pytest.approx(sum(v for k, v in shares.items() if k != "mean") / 7)
    assert agreement(wrong, judges, scenes, seed=0)["mean"] < 0.6
