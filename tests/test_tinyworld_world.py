import random

import pytest
import torch

from apt_hooks.tinyworld.concepts import CONCEPTS, IDENTIFIER, REPORTED, TUNING
from apt_hooks.tinyworld.datasets import random_subject
from apt_hooks.tinyworld.personalize import reference_pictures
from apt_hooks.tinyworld.render import render
from apt_hooks.tinyworld.world import (
    BACKGROUNDS,
    COLORS,
    KINDS,
    PARTS,
    PATTERNS,
    PLACES,
    SECONDS,
    SIZES,
    STYLES,
    Scene,
    Subject,
    is_held_out,
    random_scene,
    vocabulary,
)

SCENE = Scene(Subject("ball", "red"), "small", "on the left", "beach", "photo", "cloud")


def test_a_caption_says_what_the_scene_holds():
    assert SCENE.caption() == "a photo of a small red ball on the left at the beach with a cloud"
    plain = SCENE.caption(rare_word="sks", color=False, size=False)
    assert plain == "a photo of a sks ball on the left at the beach with a cloud"


def test_the_vocabulary_covers_every_caption_and_is_small():
    rng = random.Random(0)
    words = {word for _ in range(3000) for word in random_scene(rng).caption(rare_word=IDENTIFIER).split()}
    assert words <= set(vocabulary()) and len(vocabulary()) < 60


def test_an_eighth_of_the_combinations_is_held_out_and_no_attribute_is_lost_by_it():
    scenes = [
        Scene(Subject(kind, color), "big", "on the left", background)
        for kind in KINDS
        for color in COLORS
        for background in BACKGROUNDS
    ]
    held_out = [scene for scene in scenes if is_held_out(scene)]
    assert len(held_out) / len(scenes) == pytest.approx(1 / 8, abs=0.01)
    seen = [scene for scene in scenes if not is_held_out(scene)]
    assert {(s.subject.kind, s.subject.color) for s in seen} == {(k, c) for k in KINDS for c in COLORS}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("background", BACKGROUNDS)
def test_every_background_and_style_is_drawn(style, background):
    scene = Scene(Subject("house", "blue"), "big", "in the middle", background, style)
    picture = render(scene, random.Random(0))
    assert picture.shape == (3, 64, 64) and picture.min() >= 0 and picture.max() <= 1
    assert torch.equal(picture, render(scene, random.Random(0)))


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_part_shows_on_every_kind(kind, part):
    without, with_it = (
        render(Scene(Subject(kind, "green", "dots", "blue", p), "big", "in the middle", "snow"), random.Random(0))
        for p in ((), (part,))
    )
    assert (without - with_it).abs().amax(0).gt(0.2).sum() > 20


@pytest.mark.parametrize("kind", KINDS)
def test_patterns_differ(kind):
    scenes = [
        Scene(Subject(kind, "green", pattern, "red"), "big", "in the middle", "snow") for pattern in (None, *PATTERNS)
    ]
    pictures = [render(scene, random.Random(0)) for scene in scenes]
    for i, one in enumerate(pictures):
        assert all((one - other).abs().amax(0).gt(0.2).sum() > 20 for other in pictures[:i])


def test_what_is_asked_decides_where_and_how_large():
    def columns(place, size):
        scene = Scene(Subject("ball", "red"), size, place, "night")
        red = render(scene, random.Random(0))[0] > 0.6
        x = red.nonzero()[:, 1].float()
        return x.mean().item(), len(x)

    middles = [columns(place, "small")[0] for place in PLACES]
    assert middles == sorted(middles) and middles[2] - middles[0] > 20
    assert columns("in the middle", "big")[1] > 1.8 * columns("in the middle", "small")[1]


def test_second_objects_are_in_the_sky_beside_the_subject():
    for second in SECONDS:
        for place in PLACES:
            scenes = (Scene(Subject("cup", "red"), SIZES[0], place, "desert", "photo", s) for s in (None, second))
            without, with_it = (render(s, random.Random(3), background_rng=random.Random(1)) for s in scenes)
            assert (without - with_it)[:, :18].abs().amax(0).gt(0.05).sum() > 10


def test_the_concepts_are_of_known_kinds_and_never_drawn_by_chance():
    subjects = [concept.subject for concept in CONCEPTS]
    assert len(set(subjects)) == len(CONCEPTS) >= 12 and {s.kind for s in subjects} == set(KINDS)
    assert all(s.pattern in PATTERNS and s.parts and set(s.parts) <= set(PARTS) for s in subjects)
    rng = random.Random(0)
    assert not {random_subject(rng) for _ in range(2000)} & set(subjects)
    assert not set(TUNING) & set(REPORTED)


@pytest.mark.parametrize("number", range(len(CONCEPTS)))
def test_reference_pictures_share_a_background_and_are_not_the_same(number):
    concept = CONCEPTS[number]
    pictures = reference_pictures(concept)
    assert len(pictures) == concept.pictures == len(concept.captions()) in (4, 5)
    assert set(concept.captions()) == {f"a photo of a {IDENTIFIER} {concept.subject.kind}"}
    spread = pictures.std(dim=0).amax(0)
    assert (spread < 1e-3).float().mean() > 0.5  # the same background, wherever no subject was
    assert (spread > 0.05).float().mean() > 0.02
