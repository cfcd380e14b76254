import math
import random

import pytest
import torch

pytest.importorskip("safetensors")
pytest.importorskip("rich")

from apt_hooks import AptError
from apt_hooks.tinyworld.concepts import CONCEPTS
from apt_hooks.tinyworld.datasets import held_out_scenes
from apt_hooks.tinyworld.judge_networks import (
    ATTRIBUTES,
    AttributeClassifier,
    IdentityEncoder,
    Judges,
    attribute_labels,
    identity_score,
    load_judges,
    read_attributes,
    save_judges,
    text_score,
)
from apt_hooks.tinyworld.metrics import auc, frechet_distance, precision_recall
from apt_hooks.tinyworld.personalize import reference_pictures
from apt_hooks.tinyworld.render import render
from apt_hooks.tinyworld.train_judges import contrastive_loss
from apt_hooks.tinyworld.world import Scene, Subject, is_held_out, random_scene


@pytest.fixture(scope="module")
def judges():
    return load_judges()


def pictures(scenes, seed=0):
    rng = random.Random(seed)
    return torch.stack([render(scene, rng) for scene in scenes])


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Distances of sets.


def crosspolytope(mean, variances):
    """Samples with exactly this mean and this diagonal covariance."""
    d = len(variances)
    steps = torch.diag((torch.tensor(variances) * (2 * d - 1) / 2).sqrt())
    return torch.tensor(mean) + torch.cat([steps, -steps])


def test_frechet_distance_of_diagonal_gaussians_is_that_of_means_and_deviations():
    a = crosspolytope([0.0, 1.0, 2.0], [1.0, 4.0, 9.0])
    b = crosspolytope([1.0, 1.0, 0.0], [4.0, 4.0, 1.0])
    # |m|² = 1 + 0 + 4; deviations 1, 2, 3 against 2, 2, 1: 1 + 0 + 4.
    assert frechet_distance(a, b) == pytest.approx(10.0, abs=1e-5)
    assert frechet_distance(b, a) == pytest.approx(10.0, abs=1e-5)


def test_frechet_distance_agrees_with_the_eigenvalues_of_the_product():
    a, b = normal(50, 7) @ normal(7, 7, seed=1), normal(60, 7, seed=2) @ normal(7, 7, seed=3) + 0.5
    of_a, of_b = a.T.cov(), b.T.cov()
    cross = torch.linalg.eigvals(of_a @ of_b).real.clamp(min=0).sqrt().sum()
    expected = (a.mean(0) - b.mean(0)).square().sum() + of_a.trace() + of_b.trace() - 2 * cross
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-9)


def test_frechet_distance_of_a_set_to_itself_is_zero_also_with_fewer_samples_than_features():
    for shape in ((100, 5), (4, 30), (10, 1)):
        assert frechet_distance(normal(*shape), normal(*shape)) == pytest.approx(0.0, abs=1e-6)


def test_precision_and_recall_by_hand():
    real = torch.tensor([[0.0], [1.0], [3.0]])  # radii to the first neighbor: 1, 1, 2
    generated = torch.tensor([[4.5], [5.0], [9.0], [2.0]])  # radii 0.5, 0.5, 4, 2.5
    precision, recall = precision_recall(real, generated, k=1)
    # 4.5, 5 and 2 lie within 2 of 3, 9 within nothing. Of the real ones all lie within 2.5 of 2.
    assert (precision, recall) == (0.75, 1.0)
    precision, recall = precision_recall(real, generated[:3], k=1)
    # Nothing real lies within 0.5 of 4.5 or 5, or within 4 of 9.
    assert precision == pytest.approx(2 / 3) and recall == 0.0


def test_precision_and_recall_of_equal_and_of_far_sets():
    a = normal(40, 6)
    assert precision_recall(a, a.clone()) == (1.0, 1.0)
    assert precision_recall(a, a + 1000.0) == (0.0, 0.0)


def test_a_set_without_one_mode_keeps_its_precision_and_loses_recall():
    far = torch.tensor([100.0, 0.0])
    real = torch.cat([normal(60, 2), normal(60, 2, seed=1) + far])
    precision, recall = precision_recall(real, normal(60, 2, seed=2))
    assert precision > 0.9 and 0.4 < recall <= 0.5


@pytest.mark.parametrize("distance", [frechet_distance, precision_recall])
def test_sets_that_cannot_be_compared_are_refused(distance):
    with pytest.raises(AptError, match=r"\[n, d\] and \[m, d\], got \[9, 3\] and \[9, 4\]"):
        distance(torch.zeros(9, 3), torch.zeros(9, 4))
    with pytest.raises(AptError, match=r"got \[9\] and \[9\]"):
        distance(torch.zeros(9), torch.zeros(9))
    with pytest.raises(AptError, match="got 9 and 1"):
        distance(torch.zeros(9, 3), torch.zeros(1, 3))


def test_neighbors_are_counted_from_one():
    with pytest.raises(AptError, match="k must be at least 1, got 0"):
        precision_recall(normal(9, 2), normal(9, 2), k=0)
    with pytest.raises(AptError, match="at least 4 samples"):
        precision_recall(normal(9, 2), normal(3, 2))


@pytest.mark.parametrize(
    ("positive", "negative", "expected"),
    [
        ([3.0, 4.0], [1.0, 2.0], 1.0),
        ([1.0, 2.0], [3.0, 4.0], 0.0),
        ([1.0, 1.0], [1.0, 1.0, 1.0], 0.5),
        ([2.0, 4.0], [1.0, 2.0, 3.0], (1 + 0.5 + 0 + 1 + 1 + 1) / 6),
    ],
)
def test_auc(positive, negative, expected):
    assert auc(torch.tensor(positive), torch.tensor(negative)) == pytest.approx(expected)


def test_auc_needs_scores_on_both_sides():
    with pytest.raises(AptError, match="got 2 and 0"):
        auc(torch.zeros(2), torch.zeros(0))


# Scores of pictures.


class Oracle(AttributeClassifier):
    """Reads the scenes it was given, whatever the pictures are."""

    def __init__(self, scenes):
        super().__init__()
        self.labels = attribute_labels(scenes)

    def forward(self, images):
        return {name: torch.nn.functional.one_hot(label, len(ATTRIBUTES[name])) for name, label in self.labels.items()}


def test_text_score_is_the_share_of_the_asked_attributes():
    shown = Scene(Subject("car", "red"), "big", "on the left", "snow", "photo", "bird")
    patterned = Scene(Subject("car", "red", "dots"), "big", "on the left", "snow", "photo", "bird")
    asked = [
        shown,
        Scene(Subject("cup", "blue"), "small", "on the right", "night", "drawing", None),
        Scene(Subject("car", "blue"), "big", "on the left", "city", "photo", None),
        Scene(Subject("car", "blue", "dots"), "big", "on the left", "snow", "photo", "bird"),
    ]
    oracle, images = Oracle([shown, shown, shown, patterned]), torch.zeros(4, 3, 64, 64)
    assert text_score(oracle, images, asked).tolist() == pytest.approx([1.0, 0.0, 0.6, 1.0])
    # The color of a patterned subject is not asked.
    scores = text_score(oracle, images, asked, ("color", "size", "kind"))
    assert scores.tolist() == pytest.approx([1.0, 0.0, 2 / 3, 1.0])


def test_text_score_refuses_what_it_cannot_ask():
    patterned = Scene(Subject("car", "red", "dots"), "big", "on the left", "snow")
    images = torch.zeros(1, 3, 64, 64)
    with pytest.raises(AptError, match="unknown attribute 'hue'; there are background, color"):
        text_score(AttributeClassifier(), images, [patterned], ("hue",))
    with pytest.raises(AptError, match="got 2 scenes for 1 pictures"):
        text_score(AttributeClassifier(), images, [patterned, patterned])
    with pytest.raises(AptError, match="another attribute"):
        text_score(AttributeClassifier(), images, [patterned], ("color",))


def test_identity_score_is_the_cosine_to_the_mean_direction_of_the_references():
    class Corner(IdentityEncoder):
        """Embeds a picture as the direction of the first two values of its corner."""

        def forward(self, images):
            return torch.nn.functional.normalize(images[:, :2, 0, 0], dim=1)

    images = torch.zeros(4, 3, 64, 64)
    images[:, :2, 0, 0] = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, -1.0]])
    scores = identity_score(Corner(), images, images[:2])
    assert scores.tolist() == pytest.approx([0.5**0.5, 0.5**0.5, 1.0, 0.0], abs=1e-6)


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 3, 32, 32), (1, 1, 64, 64)])
def test_pictures_of_another_shape_are_refused(shape):
    for network in (AttributeClassifier(), IdentityEncoder()):
        with pytest.raises(AptError, match=r"must be \[n, 3, 64, 64\]"):
            network(torch.zeros(shape))


# Training.


def test_contrastive_loss_by_hand():
    a, b = [1.0, 0.0], [0.0, 1.0]
    # Each has one of its own at cosine 1 and two others at cosine 0.
    loss = contrastive_loss(torch.tensor([a, b, b, a]), torch.tensor([3, 7, 7, 3]), temperature=0.5)
    assert loss.item() == pytest.approx(-math.log(math.exp(2) / (math.exp(2) + 2)), rel=1e-6)
    # With three of one subject the other two count alike.
    loss = contrastive_loss(torch.tensor([a, a, b]), torch.tensor([1, 1, 1]), temperature=1.0)
    e = math.e
    expected = (2 * -(math.log(e / (e + 1)) + math.log(1 / (e + 1))) / 2 - math.log(1 / 2)) / 3
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_contrastive_loss_has_finite_gradients():
    embeddings = torch.nn.functional.normalize(normal(6, 4), dim=1).requires_grad_()
    contrastive_loss(embeddings, torch.tensor([0, 0, 1, 1, 2, 2])).backward()
    assert embeddings.grad.isfinite().all() and embeddings.grad.abs().sum() > 0


def test_held_out_scenes_are_held_out():
    scenes = held_out_scenes(50, 1, subjects=True)
    assert all(scene.subject.pattern or is_held_out(scene) for scene in scenes)
    assert sum(scene.subject.pattern is None for scene in scenes) == 25


# The networks that come with the package.


def test_weights_on_disk_give_the_same_judge_in_half_precision(tmp_path):
    saved = Judges(AttributeClassifier(), IdentityEncoder())
    save_judges(saved, tmp_path)
    loaded = load_judges(tmp_path)
    for a, b in ((saved.classifier, loaded.classifier), (saved.identity, loaded.identity)):
        assert not b.training
        for key, value in a.state_dict().items():
            assert b.state_dict()[key].dtype is torch.float32
            assert torch.equal(b.state_dict()[key], value.half().float())


def test_missing_weights_say_how_to_get_them(tmp_path):
    with pytest.raises(AptError, match="train_judges --out"):
        load_judges(tmp_path)


def test_the_classifier_reads_held_out_scenes(judges):
    scenes = held_out_scenes(100, 5, subjects=True)
    images = pictures(scenes)
    read, shown = read_attributes(judges.classifier, images), attribute_labels(scenes)
    plain = torch.tensor([scene.subject.pattern is None for scene in scenes])
    for name in ATTRIBUTES:
        right = read[name] == shown[name]
        assert (right[plain] if name == "color" else right).double().mean() >= 0.97, name
    assert text_score(judges.classifier, images, scenes).mean() >= 0.98
    # Asked for the neighbor's scene, a picture shows little of it.
    assert text_score(judges.classifier, images, scenes[1:] + scenes[:1]).mean() < 0.5


def test_features_tell_a_set_without_variety(judges):
    rng = random.Random(3)
    subject = CONCEPTS[4].subject
    real, again = (pictures([random_scene(rng, subject) for _ in range(80)], seed) for seed in (1, 2))
    one_place = pictures([Scene(subject, "big", "on the left", "city") for _ in range(80)], 3)
    features = [judges.features(images) for images in (real, again, one_place)]
    assert frechet_distance(features[0], features[2]) > 3 * frechet_distance(features[0], features[1])
    assert precision_recall(features[0], features[1])[1] > 0.6
    assert precision_recall(features[0], features[2])[1] < 0.2


@pytest.mark.parametrize("number", range(len(CONCEPTS)))
def test_identity_prefers_the_concept(judges, number):
    rng, concept = random.Random(number), CONCEPTS[number]
    references = reference_pictures(concept, number)
    # The hardest plain members of the class: of the same color, in all styles.
    subjects = [concept.subject] * 10 + [Subject(concept.subject.kind, concept.subject.color)] * 10
    scenes = [random_scene(rng, subject) for subject in subjects]
    own, plain = identity_score(judges.identity, pictures(scenes), references).split(10)
    assert auc(own, plain) >= 0.9
    assert own.mean() > plain.mean() + 0.2
