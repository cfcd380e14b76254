import contextlib
import json
import math

import pytest
import torch
from models import HEADS, LAYOUTS, TEXT_WIDTH, TOKENS, WIDTH, make_batch, make_tuned, relative_difference
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from apt_hooks import AptConfig, AptError, AptObjective, AptStep
from apt_hooks.method.augmentation import Placement
from apt_hooks.method.losses import dco_loss, dco_weight

TIMESTEPS = torch.tensor([50, 350, 950, 70])
COUNTED = torch.tensor([True, False, False, True])
# Gamma of bins 0 and 3, by the first update below.
GAPS = {0: 0.0005, 3: 0.0039}


def make_objective(unet, network, seen=True, **kwargs):
    """An objective; where `seen`, its indicator has met bins 0 and 3."""
    objective = AptObjective(AptConfig(**kwargs), unet, network.off)
    if seen:
        bins = torch.tensor(list(GAPS)) * 100
        objective.indicator.update(bins, torch.full((2,), 0.1), 0.1 + torch.tensor(list(GAPS.values())))
    return objective


def gamma_of(timesteps):
    """Gamma per sample, from `GAPS` alone."""
    return torch.tensor([1 - math.exp(-1000 * GAPS[b]) if (b := int(t) // 100) in GAPS else 0.0 for t in timesteps])


class Case:
    """A stand-in with LoRA, in float64, and a batch of four."""

    def __init__(self, layout="up_blocks", checkpointing="off"):
        self.unet, self.network = make_tuned(layout, checkpointing)
        self.unet.double()
        self.network.double()
        x, _, context, target = (t.double() for t in make_batch(self.unet, batch=4))
        self.x, self.context, self.target = x.detach().requires_grad_(), context, target
        self.frozen_calls = 0

    def predict(self, rows=slice(None)):
        self.frozen_calls += not torch.is_grad_enabled()
        return self.unet(self.x[rows], TIMESTEPS[rows], self.context[rows])

    def per_sample(self, prediction, rows=slice(None)):
        return (prediction - self.target[rows]).square().mean(dim=(1, 2, 3))

    def run(self, instances=None, rows=slice(None), **kwargs):
        """One step with the library: (step, loss, gradient of the LoRA)."""
        self.network.zero_grad()
        with make_objective(self.unet, self.network, **kwargs) as objective:
            step = objective.step(lambda: self.predict(rows), self.target[rows], TIMESTEPS[rows], instances=instances)
            loss = step.loss(self.per_sample(step.prediction, rows))
            loss.backward()
        return step, loss.detach(), self.network.gradient()

    def features(self, stems):
        """(prediction, {name: output}) by hooks of its own."""
        read, handles = {}, []
        for stem in stems:
            for name in (f"{stem}.attn2.to_q", f"{stem}.attn2.to_k", f"{stem}.attn1"):
                handles.append(
                    self.unet.get_submodule(name).register_forward_hook(
                        lambda m, a, y, name=name: read.update({name: y})
                    )
                )
        prediction = self.predict()
        for handle in handles:
            handle.remove()
        return prediction, read


STEMS = {
    "up_blocks": ["up_blocks.2.attentions.0", "up_blocks.3.attentions.0"],
    "output_blocks": ["output_blocks.0.1.body", "output_blocks.1.1.body", "output_blocks.2.1.body"],
}


def composed(case, layout, lambda_dist, lambda_attn, start=None):
    """The paper's total loss of all four samples, written out: (loss, gradient, values); by `start`, a copy of the
    model as it was, or by the base model."""
    case.network.zero_grad()
    with torch.no_grad(), case.network.off() if start is None else contextlib.nullcontext():
        frozen, read_frozen = (start or case).features(STEMS[layout])
    tuned, read = case.features(STEMS[layout])
    l_mu, l_sigma, l_attn = [], [], []
    for stem in STEMS[layout]:
        maps = []
        for features in (read, read_frozen):
            q, k = (features[f"{stem}.attn2.to_{p}"].reshape(4, -1, HEADS, WIDTH // HEADS) for p in "qk")
            maps.append(torch.softmax(torch.einsum("bqhc,bthc->bhqt", q, k) / (WIDTH // HEADS) ** 0.5, dim=3))
        l_attn.append(((maps[0] - maps[1]) ** 2).sum(dim=3).mean())
        h, h_frozen = read[f"{stem}.attn1"], read_frozen[f"{stem}.attn1"]
        l_mu.append((h.mean(dim=1) - h_frozen.mean(dim=1)).square().mean())
        l_sigma.append((h.std(dim=1, correction=0) - h_frozen.std(dim=1, correction=0)).square().mean())
    terms = {"l_mu": l_mu, "l_sigma": l_sigma, "l_attn": l_attn}
    terms = {name: sum(values) / len(values) for name, values in terms.items()}
    weight = 1 - gamma_of(TIMESTEPS)
    loss = (weight * case.per_sample(tuned)).mean()
    loss = loss + lambda_dist * (terms["l_mu"] + terms["l_sigma"]) + lambda_attn * terms["l_attn"]
    loss.backward()
    values = {name: float(value.detach()) for name, value in terms.items()} | {
        "loss_tuned": float(case.per_sample(tuned.detach()).mean()),
        "loss_frozen": float(case.per_sample(frozen).mean()),
        "loss_weight": float(weight.mean()),
        "delta_noise": float((frozen - tuned.detach()).square().mean()),
    }
    return loss.detach(), case.network.gradient(), values


def weighted_statistics(h, weights):
    """(means, deviations) of [batch, positions, channels]."""
    shares = weights / weights.sum(dim=1, keepdim=True)
    mean = (shares * h).sum(dim=1)
    return mean, ((shares * h.square()).sum(dim=1) - mean.square()).sqrt()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("checkpointing", ["off", "reentrant", "non_reentrant"])
@pytest.mark.parametrize("instances", [None, COUNTED])
def test_a_border_that_is_ignored_has_no_part_in_loss_indicator_and_channel_statistics(
    layout, checkpointing, instances
):
    config = {"lambda_dist": 0.7, "lambda_attn": 0.0, "augment_border": "ignore"}
    placement = Placement(torch.tensor([2.0, 2.0, 1.6, 1.0]), torch.zeros(4), torch.tensor([True, True, True, False]))
    here = torch.arange(4) if instances is None else instances.nonzero().flatten()

    case = Case(layout)
    height, width = case.x.shape[2:]
    covered = placement.covered((8 * height, 8 * width)).double()

    def at(height, width):
        return torch.nn.functional.adaptive_avg_pool2d(covered[here], (height, width))

    with torch.no_grad(), case.network.off():
        frozen, read_frozen = case.features(STEMS[layout])
    tuned, read = case.features(STEMS[layout])
    case.network.zero_grad()
    terms = []
    for stem in STEMS[layout]:
        h, h_frozen = read[f"{stem}.attn1"][here], read_frozen[f"{stem}.attn1"][here]
        side = math.isqrt(h.shape[1] * height // width)
        weights = at(side, h.shape[1] // side).reshape(len(here), -1, 1)
        pairs = zip(weighted_statistics(h, weights), weighted_statistics(h_frozen, weights), strict=True)
        terms.append(sum((a - b).square().mean() for a, b in pairs))
    weight = torch.ones(4).double()
    weight[here] = 1 - gamma_of(TIMESTEPS)[here].double()
    errors = (tuned - case.target).square() * torch.nn.functional.adaptive_avg_pool2d(covered, (height, width))
    share = len(here) / 4
    wanted = (weight * errors.mean(dim=(1, 2, 3))).mean() + share * 0.7 * sum(terms) / len(terms)
    wanted.backward()
    wanted_gradient = case.network.gradient()

    case = Case(layout, checkpointing)
    with make_objective(case.unet, case.network, **config) as objective:
        found = objective.covered(placement, (8 * height, 8 * width))
        passes = objective.passes(instances, found)
        passes.run(case.predict)
        step = passes.step(case.target, TIMESTEPS)
        step.loss(case.per_sample(step.prediction)).backward()
    assert relative_difference(case.network.gradient(), wanted_gradient) < 1e-5
    # What the indicator takes in is the mean over what is covered, whatever its size.
    mask = at(height, width).expand(-1, tuned.shape[1], -1, -1)
    for name, prediction in (("loss_tuned", tuned), ("loss_frozen", frozen)):
        squares = (prediction.detach() - case.target)[here].square() * mask
        mean = (squares.sum(dim=(1, 2, 3)) / mask.sum(dim=(1, 2, 3))).mean()
        assert float(step.values[name]) == pytest.approx(float(mean), rel=1e-5)


def test_where_nothing_is_uncovered_ignoring_the_border_changes_no_bit():
    nowhere = Placement(torch.ones(4), torch.zeros(4), torch.zeros(4, dtype=torch.bool))
    case = Case()
    with make_objective(case.unet, case.network, augment_border="ignore") as objective:
        assert objective.covered(nowhere, (64, 64)) is None and objective.covered(None, (64, 64)) is None
    _, loss, gradient = Case().run(augment_border="ignore")
    _, wanted_loss, wanted = Case().run(augment_border="learn")
    assert torch.equal(loss, wanted_loss) and torch.equal(gradient, wanted)


def test_a_border_that_is_learned_covers_everything():
    case = Case()
    moved = Placement(torch.full((4,), 2.0), torch.zeros(4), torch.ones(4, dtype=torch.bool))
    with make_objective(case.unet, case.network, augment_border="learn") as objective:
        assert objective.covered(moved, (64, 64)) is None


@pytest.mark.parametrize("border", ["learn", "ignore"])
def test_a_step_knows_what_augment_has_uncovered(border):
    case = Case()
    config = {"augment_border": border, "zoom_out": (2.0, 2.0), "rotation_degrees": 0.0, "augment_max_probability": 1.0}
    with make_objective(case.unet, case.network, seen=False, **config) as objective:
        objective.indicator.update(TIMESTEPS, torch.zeros(4), torch.full((4,), 1.0))  # gamma 1: each is augmented
        images = torch.zeros(4, 3, 8 * case.x.shape[2], 8 * case.x.shape[3])
        assert (objective.augment(images, TIMESTEPS) == -1).flatten(1).any(dim=1).all()
        step = objective.step(case.predict, case.target, TIMESTEPS)
        corner = torch.autograd.grad(step.prediction[:, :, 0, 0].sum(), list(case.network.parameters()))
        assert any(g.any() for g in corner) == (border == "learn")
        # What was augmented is forgotten by the next step.
        step = objective.step(case.predict, case.target, TIMESTEPS)
        corner = torch.autograd.grad(step.prediction[:, :, 0, 0].sum(), list(case.network.parameters()))
        assert any(g.any() for g in corner)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("checkpointing", ["off", "reentrant", "non_reentrant"])
def test_a_step_is_the_papers_total_loss(layout, checkpointing):
    wanted_loss, wanted_gradient, wanted_values = composed(Case(layout), layout, 0.7, 3.0)
    step, loss, gradient = Case(layout, checkpointing).run(lambda_dist=0.7, lambda_attn=3.0)
    assert float(loss) == pytest.approx(float(wanted_loss), rel=1e-5)
    assert relative_difference(gradient, wanted_gradient) < 1e-5
    assert {name: float(value) for name, value in step.values.items()} == pytest.approx(wanted_values, rel=1e-5)
    assert step.instances == 4


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("checkpointing", ["off", "reentrant", "non_reentrant"])
def test_with_the_start_for_reference_a_step_is_the_total_loss_by_a_copy_of_the_model_as_it_was(layout, checkpointing):
    lambdas = {"lambda_dist": 0.7, "lambda_attn": 3.0}
    case, plain = Case(layout, checkpointing), Case(layout)
    objective = make_objective(case.unet, case.network, reference="start", **lambdas)
    objective.reference.trained = list(case.network.named_parameters())
    with objective:
        for number in range(3):
            case.network.zero_grad()
            objective.indicator.load_state_dict(make_objective(case.unet, case.network).indicator.state_dict())
            step = objective.step(case.predict, case.target, TIMESTEPS)
            loss = step.loss(case.per_sample(step.prediction))
            loss.backward()
            wanted_loss, wanted_gradient, wanted = composed(plain, layout, *lambdas.values(), start=Case(layout))
            assert float(loss) == pytest.approx(float(wanted_loss), rel=1e-5)
            assert relative_difference(case.network.gradient(), wanted_gradient) < 1e-5
            assert {name: float(v) for name, v in step.values.items()} == pytest.approx(wanted, rel=1e-5, abs=1e-20)
            assert (wanted["delta_noise"] > 0) == (number > 0)
            for network in (case.network, plain.network):
                torch.optim.SGD(network.parameters(), lr=0.5).step()


def test_dco_takes_the_start_for_its_reference_too():
    case, start = Case(), Case()
    objective = make_objective(case.unet, case.network, objective="dco", dco_beta=BETA, reference="start")
    objective.reference.trained = list(case.network.named_parameters())
    for _ in range(2):
        case.network.zero_grad()
        step = objective.step(case.predict, case.target, TIMESTEPS)
        step.loss(case.per_sample(step.prediction)).backward()
        gradient = case.network.gradient()
        case.network.zero_grad()
        with torch.no_grad():
            frozen = start.per_sample(start.predict())
        dco_loss(case.per_sample(case.predict()), frozen, BETA).mean().backward()
        assert relative_difference(gradient, case.network.gradient()) < 1e-5
        torch.optim.SGD(case.network.parameters(), lr=0.5 / BETA).step()
    assert float(step.values["delta_noise"]) > 0


def test_values_carry_no_graph():
    step, _, _ = Case().run()
    assert [name for name, value in step.values.items() if value.requires_grad] == []


def test_weight_gammas_and_gaps_are_those_from_before_the_update():
    case = Case()
    objective = make_objective(case.unet, case.network)
    before, gaps = objective.indicator.gammas, objective.indicator.gaps
    step = objective.step(case.predict, case.target, TIMESTEPS)
    assert torch.allclose(step.weight, 1 - gamma_of(TIMESTEPS), atol=1e-5)
    assert torch.equal(step.gammas, before)
    assert torch.allclose(step.gaps, gaps, rtol=0, atol=0, equal_nan=True)
    assert not torch.equal(objective.indicator.gammas, before)


def test_the_indicator_is_updated_with_the_raw_losses_of_both_models():
    case = Case()
    objective = make_objective(case.unet, case.network, seen=False)
    with torch.no_grad():
        tuned = case.predict()
        with case.network.off():
            frozen = case.predict()
    objective.step(case.predict, case.target, TIMESTEPS)
    state = objective.indicator.state_dict()
    for name, prediction in (("loss_tuned", tuned), ("loss_frozen", frozen)):
        losses = case.per_sample(prediction).tolist()
        # Samples 0 and 3 share bin 0.
        assert state[name][0] == pytest.approx((losses[0] + losses[3]) / 2, rel=1e-5)
        assert [state[name][3], state[name][9]] == pytest.approx(losses[1:3], rel=1e-5)


def test_without_loss_weighting_every_weight_is_one():
    step, _, _ = Case().run(loss_weighting=False)
    assert step.weight.tolist() == [1.0] * 4


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("checkpointing", ["off", "reentrant"])
def test_monitor_only_changes_no_bit_of_loss_and_gradient_but_tells_everything(layout, checkpointing):
    case = Case(layout, checkpointing)
    wanted = case.per_sample(case.predict()).mean()
    wanted.backward()
    wanted_gradient = case.network.gradient()
    step, loss, gradient = case.run(monitor_only=True)
    assert torch.equal(loss, wanted.detach())
    assert torch.equal(gradient, wanted_gradient)
    # The same numbers as a run that acts, but for the weight.
    acting, _, _ = Case(layout, checkpointing).run()
    assert step.values.keys() == acting.values.keys()
    for name in step.values.keys() - {"loss_weight"}:
        assert float(step.values[name]) == pytest.approx(float(acting.values[name]), rel=1e-9)
    assert float(step.values["loss_weight"]) == 1.0


def test_monitor_only_draws_nothing_from_the_trainers_random_stream():
    case = Case()
    objective = make_objective(case.unet, case.network, monitor_only=True)
    before = torch.get_rng_state()
    images = torch.zeros(4, 3, 8, 8)
    assert objective.augment(images, TIMESTEPS) is images
    assert not objective.draw_augmentation(TIMESTEPS).chosen.any()
    objective.step(case.predict, case.target, TIMESTEPS)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("checkpointing", ["off", "reentrant"])
def test_only_counted_samples_are_weighted_regularized_and_watched(checkpointing):
    case, rows = Case(checkpointing=checkpointing), COUNTED.nonzero().flatten()
    step, loss, gradient = case.run(instances=COUNTED)
    assert step.weight[~COUNTED].tolist() == [1.0, 1.0]
    assert torch.allclose(step.weight[COUNTED], 1 - gamma_of(TIMESTEPS[COUNTED]), atol=1e-5)
    alone, loss_alone, gradient_alone = Case(checkpointing=checkpointing).run(rows=rows)
    assert step.instances == alone.instances == 2
    assert {name: float(value) for name, value in step.values.items()} == pytest.approx(
        {name: float(value) for name, value in alone.values.items()}, rel=1e-6
    )
    # Half of the batch counts; the other half is trained on as ever.
    assert float(step.regularizer.detach()) == pytest.approx(0.5 * float(alone.regularizer.detach()), rel=1e-6)
    plain = Case(checkpointing=checkpointing)
    others = plain.per_sample(plain.predict([1, 2]), [1, 2]).mean()
    others.backward()
    assert float(loss) == pytest.approx(0.5 * float(loss_alone) + 0.5 * float(others.detach()), rel=1e-6)
    assert relative_difference(gradient, 0.5 * gradient_alone + 0.5 * plain.network.gradient()) < 1e-6


def test_uncounted_samples_do_not_move_the_indicator():
    case = Case()
    objective = make_objective(case.unet, case.network)
    before = objective.indicator.state_dict()["loss_tuned"]
    objective.step(case.predict, case.target, TIMESTEPS, instances=COUNTED)
    after = objective.indicator.state_dict()["loss_tuned"]
    assert [b for b in range(10) if after[b] != before[b]] == [0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("checkpointing", ["off", "reentrant", "non_reentrant"])
@pytest.mark.parametrize("instances", [None, COUNTED], ids=["all count", "some count"])
def test_the_joint_regularizer_is_the_relative_distance_of_the_cross_attentions_outputs(
    layout, checkpointing, instances
):
    case, outputs = Case(layout), []
    rows = slice(None) if instances is None else instances
    handles = [
        case.unet.get_submodule(f"{stem}.attn2").register_forward_hook(lambda m, a, y: outputs.append(y[rows]))
        for stem in STEMS[layout]
    ]
    with torch.no_grad(), case.network.off():
        case.predict()
    frozen, outputs[:] = list(outputs), []
    prediction = case.predict()
    for handle in handles:
        handle.remove()
    terms = [
        ((now - before).square().sum(dim=(1, 2)) / before.square().sum(dim=(1, 2))).mean()
        for now, before in zip(outputs, frozen, strict=True)
    ]
    l_joint = sum(terms) / len(terms)
    share = 1.0 if instances is None else 0.5
    (case.per_sample(prediction).mean() + 0.7 * share * l_joint).backward()
    found = Case(layout, checkpointing)
    step, _, gradient = found.run(
        instances, regularizer="joint", lambda_joint=0.7, loss_weighting=False, lambda_dist=9.0, lambda_attn=9.0
    )
    assert step.values.keys() & {"l_mu", "l_sigma", "l_attn", "l_joint"} == {"l_joint"}
    assert float(step.values["l_joint"]) == pytest.approx(float(l_joint.detach()), rel=1e-9)
    assert float(step.regularizer.detach()) == pytest.approx(0.7 * share * float(l_joint.detach()), rel=1e-9)
    assert relative_difference(gradient, case.network.gradient()) < 1e-9


def test_a_frozen_pass_every_third_step_regularizes_with_three_times_the_strength_and_watches_then_only():
    every, third = Case(), Case()
    wanted, _, _ = every.run()
    objective = make_objective(third.unet, third.network, frozen_every=3)
    for step in range(7):
        before, weight = objective.indicator.state_dict(), 1 - objective.indicator.gamma(TIMESTEPS)
        due = objective.passes().due
        made = objective.step(third.predict, third.target, TIMESTEPS)
        made.loss(third.per_sample(made.prediction)).backward()
        objective.verify()
        assert due == (step % 3 == 0)
        assert (objective.indicator.state_dict() != before) == due
        assert torch.equal(made.weight, weight)
        assert set(made.values) == (set(wanted.values) if due else {"loss_weight"})
        strength = 3 * float(wanted.regularizer.detach()) if due else 0.0
        assert float(made.regularizer.detach()) == pytest.approx(strength, rel=1e-9)
    assert third.frozen_calls == 3


def in_pieces(objective, case, instances=None):
    """The passes of one batch, as a script's own lines make them."""
    passes = objective.passes(instances)
    with passes.frozen():
        frozen = case.predict()
    passes.begin_tuned(frozen)
    passes.end_tuned(case.predict())
    return passes


def test_the_frozen_pass_may_be_compiled():
    plain, found = Case(), Case()
    wanted, _, gradient = plain.run()
    with make_objective(found.unet, found.network) as objective:
        compiled = torch.compile(found.unet, backend="eager")  # after the hooks are on
        step = objective.step(
            found.predict,
            found.target,
            TIMESTEPS,
            predict_frozen=lambda: compiled(found.x, TIMESTEPS, found.context),
        )
        step.loss(found.per_sample(step.prediction)).backward()
    assert {k: float(v) for k, v in step.values.items()} == pytest.approx(
        {k: float(v) for k, v in wanted.values.items()}, rel=1e-9
    )
    assert relative_difference(found.network.gradient(), gradient) < 1e-9


def test_every_rank_updates_its_indicator_where_a_frozen_pass_is_due_though_nothing_counts(monkeypatch):
    case, updates = Case(), []
    objective = make_objective(case.unet, case.network, frozen_every=2)
    monkeypatch.setattr(objective.indicator, "add", lambda timesteps, *losses: updates.append(len(timesteps)))
    for instances in (None, None, torch.zeros(4, dtype=torch.bool), torch.zeros(4, dtype=torch.bool)):
        objective.step(case.predict, case.target, TIMESTEPS, instances=instances)
    assert updates == [4, 0]  # of the first and the third, as on every other rank


def test_the_batches_of_a_step_share_one_gamma_and_update_it_once_as_one_batch_would():
    whole, parts = Case(), Case()
    at_once, in_parts = (make_objective(case.unet, case.network) for case in (whole, parts))
    for _ in range(3):
        wanted = at_once.step(whole.predict, whole.target, TIMESTEPS)
        before = in_parts.indicator.state_dict()
        for i in range(4):
            rows = slice(i, i + 1)
            step = in_parts.step(
                lambda rows=rows: parts.predict(rows), parts.target[rows], TIMESTEPS[rows], ends_step=i == 3
            )
            assert torch.allclose(step.weight, wanted.weight[rows], rtol=1e-6)
            assert torch.allclose(step.gammas, wanted.gammas, rtol=0, atol=1e-5)
            assert (in_parts.indicator.state_dict() == before) == (i < 3)
    found, expected = in_parts.indicator.state_dict(), at_once.indicator.state_dict()
    for name in ("loss_tuned", "loss_frozen"):
        assert [found[name][b] for b in (0, 3, 9)] == pytest.approx([expected[name][b] for b in (0, 3, 9)], rel=1e-6)


@pytest.mark.parametrize("space", ["auto", "epsilon", "target"])
def test_the_gap_of_a_model_of_v_is_that_of_its_epsilon(space):
    kept = torch.tensor([0.99, 0.55, 0.0078, 0.98], dtype=torch.float64)
    a, s = kept.sqrt()[:, None, None, None], (1 - kept).sqrt()[:, None, None, None]
    of_v, of_epsilon = Case(), Case()
    options = {"seen": False, "indicator_space": space, "lambda_dist": 0.0, "lambda_attn": 0.0}
    measured = make_objective(of_v.unet, of_v.network, **options)
    wanted = make_objective(of_epsilon.unet, of_epsilon.network, **options)
    # e = a v + s x_t, of what is predicted and of what should be.
    step = measured.step(of_v.predict, of_v.target, TIMESTEPS, error_scale=kept.sqrt())
    wanted.step(
        lambda: a * of_epsilon.predict() + s * of_epsilon.x, a * of_epsilon.target + s * of_epsilon.x, TIMESTEPS
    )
    found, expected = (objective.indicator.gaps[[0, 3, 9]] for objective in (measured, wanted))
    if space != "target":
        assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-4)
    else:
        assert found[2] == pytest.approx(float(expected[2]) / 0.0078, rel=1e-4)
    raw = of_v.per_sample(step.prediction.detach()).mean()
    assert float(step.values["loss_tuned"]) == pytest.approx(raw.item(), rel=1e-6)


def masks():
    """Of four samples: a tenth of the frame, a soft one, all, and nothing; one channel for all."""
    mask = torch.zeros(4, 1, 8, 8)
    mask[0, :, :2, :3] = 1.0
    mask[1] = torch.linspace(0, 1, 64).reshape(8, 8)
    mask[2] = 1.0
    return mask


@pytest.mark.parametrize("config", [{}, {"objective": "dco", "dco_beta": 3.0}], ids=["apt", "dco"])
def test_losses_are_means_over_what_the_mask_covers_and_a_sample_without_any_is_not_measured(config):
    case = Case()
    case.x, case.target = case.x.detach()[..., :8, :8], case.target[..., :8, :8]
    mask = masks()
    objective = make_objective(case.unet, case.network, seen=False, **config)
    step = objective.step(case.predict, case.target, TIMESTEPS, mask=mask)
    with torch.no_grad():
        with case.network.off():
            frozen = case.predict()
        tuned = case.predict()
    losses = {"tuned": case.target - tuned, "frozen": case.target - frozen, "delta": frozen - tuned}
    means = {k: [float((x[i] ** 2).mean(0)[mask[i, 0] > 0].double() @ mask[i, 0][mask[i, 0] > 0].double())
                 / float(mask[i].sum()) for i in range(3)] for k, x in losses.items()}  # fmt: skip
    state = objective.indicator.state_dict()
    # Samples 0 and 3 share a bin, and sample 3 has no mask.
    assert [state["loss_tuned"][b] for b in (0, 3, 9)] == pytest.approx(means["tuned"], rel=1e-5)
    assert [state["loss_frozen"][b] for b in (0, 3, 9)] == pytest.approx(means["frozen"], rel=1e-5)
    names = {"loss_tuned": "tuned", "loss_frozen": "frozen", "delta_noise": "delta"}
    found = {name: float(step.values[name]) for name in names}
    assert found == pytest.approx({name: sum(means[k]) / 3 for name, k in names.items()}, rel=1e-5)
    if config:  # DCO of the masked trainer's loss, which is a mean over the whole frame
        whole = [(x.square() * mask).mean(dim=(1, 2, 3)).float() for x in (losses["tuned"], losses["frozen"])]
        assert torch.allclose(step.weight, dco_weight(*whole, 3.0), rtol=1e-5)


def test_where_no_sample_has_a_mask_nothing_is_measured():
    case = Case()
    objective = make_objective(case.unet, case.network)
    before = objective.indicator.state_dict()
    step = objective.step(case.predict, case.target, TIMESTEPS, mask=torch.zeros_like(case.target))
    assert objective.indicator.state_dict() == before
    assert math.isnan(step.values["loss_tuned"])
    assert torch.isfinite(step.loss(case.per_sample(step.prediction)))


@pytest.mark.parametrize("shape", [(4, 8, 8), (1, 1, 8, 8), (4, 1, 3, 8)])
def test_a_mask_of_another_shape_is_refused(shape):
    case = Case()
    with pytest.raises(AptError, match="the mask must be of the target's shape"):
        make_objective(case.unet, case.network).step(case.predict, case.target, TIMESTEPS, mask=torch.ones(shape))


def test_a_step_ends_though_its_last_batch_has_no_frozen_pass():
    case = Case()
    objective = make_objective(case.unet, case.network, frozen_every=2)
    before = objective.indicator.state_dict()
    objective.step(case.predict, case.target, TIMESTEPS, ends_step=False)
    assert objective.indicator.state_dict() == before and not objective.passes().due
    objective.step(case.predict, case.target, TIMESTEPS)
    assert objective.indicator.state_dict() != before


@pytest.mark.parametrize("config", [{}, {"regularizer": "joint"}], ids=["separate", "joint"])
def test_a_layer_without_variation_gives_finite_terms_and_gradients(config):
    case = Case()
    for stem in STEMS["up_blocks"]:
        for name in ("attn1", "attn2"):
            output = case.unet.get_submodule(f"{stem}.{name}").to_out[0]
            torch.nn.init.zeros_(output.weight)
            torch.nn.init.zeros_(output.bias)
    step, _, gradient = case.run(**config)
    assert all(math.isfinite(value) for value in step.values.values())
    assert torch.isfinite(gradient).all()


def test_where_nothing_counts_the_frozen_pass_does_not_run():
    case = Case()
    before = make_objective(case.unet, case.network).indicator.state_dict()
    objective = make_objective(case.unet, case.network)
    nothing = torch.zeros(4, dtype=torch.bool)
    objective.step(case.predict, case.target, TIMESTEPS, instances=nothing)
    assert case.frozen_calls == 1  # the run's first batch, which shows what model the training begins from
    step = objective.step(case.predict, case.target, TIMESTEPS, instances=nothing)
    loss = step.loss(case.per_sample(step.prediction))
    assert case.frozen_calls == 1
    assert torch.equal(loss, case.per_sample(step.prediction).mean())
    assert (step.instances, step.values, float(step.regularizer)) == (0, {}, 0.0)
    assert objective.indicator.state_dict() == before


def test_the_frozen_pass_runs_once_a_step():
    case = Case()
    case.run()
    assert case.frozen_calls == 1


@pytest.mark.parametrize(
    ("lambdas", "terms"),
    [
        ({"lambda_dist": 0.0, "lambda_attn": 0.0}, set()),
        ({"lambda_dist": 1.0, "lambda_attn": 0.0}, {"l_mu", "l_sigma"}),
        ({"lambda_dist": 0.0, "lambda_attn": 1.0}, {"l_attn"}),
    ],
)
def test_a_regularizer_of_weight_0_is_not_computed(lambdas, terms):
    step, _, _ = Case().run(**lambdas)
    assert step.values.keys() & {"l_mu", "l_sigma", "l_attn"} == terms
    assert bool(step.regularizer > 0) == bool(terms)


def test_without_regularizers_no_hook_is_taken_and_any_model_will_do():
    model = torch.nn.Linear(2, 2)
    objective = AptObjective(AptConfig(lambda_dist=0, lambda_attn=0), model, torch.no_grad)
    assert objective.capture is None
    assert len(model._forward_hooks) == 0


def test_closing_takes_the_hooks_off():
    case = Case()
    objective = make_objective(case.unet, case.network)
    assert sum(len(m._forward_hooks) for m in case.unet.modules()) > 0
    objective.close()
    objective.close()
    assert sum(len(m._forward_hooks) for m in case.unet.modules()) == 0


def test_the_frozen_model_gets_its_own_caption():
    case = Case()
    class_word = torch.randn_like(case.context)

    def predict_frozen():
        return case.unet(case.x, TIMESTEPS, class_word)

    with torch.no_grad(), case.network.off():
        wanted = case.per_sample(predict_frozen()).mean()
    objective = make_objective(case.unet, case.network)
    step = objective.step(case.predict, case.target, TIMESTEPS, predict_frozen=predict_frozen)
    assert float(step.values["loss_frozen"]) == pytest.approx(float(wanted), rel=1e-5)
    assert case.frozen_calls == 0


def test_captions_of_different_length_are_refused_by_attention_alignment_only():
    case = Case()
    longer = torch.randn(4, 9, TEXT_WIDTH, dtype=torch.float64)

    def step(**lambdas):
        with make_objective(case.unet, case.network, **lambdas) as objective:
            objective.step(
                case.predict,
                case.target,
                TIMESTEPS,
                predict_frozen=lambda: case.unet(case.x, TIMESTEPS, longer),
            )

    with pytest.raises(AptError, match=r"the tuned model saw 5 tokens, the frozen one 9: choose a class_word"):
        step()
    step(lambda_attn=0)


def test_a_gradient_that_got_lost_is_an_error():
    case = Case()
    attention = case.unet.up_blocks[3].attentions[0].attn2
    attention.forward = torch.no_grad()(attention.forward)
    objective = make_objective(case.unet, case.network)
    step = objective.step(case.predict, case.target, TIMESTEPS)
    step.loss(case.per_sample(step.prediction)).backward()
    with pytest.raises(AptError, match="gradient got lost"):
        objective.verify()


def test_a_step_under_autocast_trains_every_lora_matrix():
    unet, network = make_tuned("output_blocks", "reentrant")
    x, _, context, target = make_batch(unet, batch=4)
    with make_objective(unet, network) as objective:
        with torch.autocast("cpu", torch.bfloat16):
            step = objective.step(lambda: unet(x, TIMESTEPS, context), target, TIMESTEPS)
        step.loss((step.prediction.float() - target).square().mean(dim=(1, 2, 3))).backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize(("limit", "wanted"), [(1.0, gamma_of([350]).item()), (0.25, 0.25), (0.0, 0.0)])
def test_samples_are_augmented_with_probability_gamma_up_to_the_limit(limit, wanted):
    case = Case()
    objective = make_objective(case.unet, case.network, augment_max_probability=limit)
    placement = objective.draw_augmentation(torch.full((4000,), 350), generator=torch.Generator().manual_seed(0))
    tolerance = 4 * math.sqrt(wanted * (1 - wanted) / 4000)
    assert float(placement.chosen.float().mean()) == pytest.approx(wanted, abs=tolerance)


def test_only_counted_samples_of_a_bin_seen_are_augmented():
    case = Case()
    objective = make_objective(case.unet, case.network)
    timesteps, instances = torch.tensor([350, 350, 650]).repeat(100), torch.tensor([True, False, True]).repeat(100)
    chosen = objective.draw_augmentation(timesteps, instances, torch.Generator().manual_seed(0)).chosen.view(100, 3)
    assert (chosen.sum(dim=0) > 0).tolist() == [True, False, False]


@pytest.mark.parametrize("key", ["augmentation", "monitor_only"])
def test_augmentation_that_is_off_returns_the_images_themselves(key):
    case = Case()
    objective = make_objective(case.unet, case.network, **{key: key == "monitor_only"})
    images = torch.rand(50, 3, 8, 8)
    timesteps = torch.full((50,), 350)
    assert objective.augment(images, timesteps) is images
    assert not objective.draw_augmentation(timesteps).chosen.any()


def test_augment_moves_the_drawn_samples_onto_the_fill():
    case = Case()
    objective = make_objective(case.unet, case.network, zoom_out=(2.0, 2.0))
    images, timesteps = torch.full((20, 3, 8, 8), 0.5), torch.full((20,), 350)
    placement = objective.draw_augmentation(timesteps, generator=torch.Generator().manual_seed(0))
    moved = objective.augment(images, timesteps, fill=-0.25, generator=torch.Generator().manual_seed(0))
    assert 0 < placement.chosen.sum() < 20
    assert torch.equal(moved[~placement.chosen], images[~placement.chosen])
    assert torch.allclose(moved[placement.chosen][:, :, 0, 0], torch.tensor(-0.25))


class Storages(TorchDispatchMode):
    """Counts the bytes of all storages made inside that are still alive."""

    def __init__(self):
        super().__init__()
        self.made = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.made[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        return result

    def alive(self):
        return sum(nbytes for reference, nbytes in self.made.values() if not reference.expired())


@pytest.mark.parametrize("config", [{}, {"regularizer": "joint"}], ids=["separate", "joint"])
def test_a_step_keeps_for_its_backward_pass_one_gradient_a_layer_and_no_map(config):
    case = Case()
    with Storages() as plain:
        prediction = case.predict()
        wanted = plain.alive()
    del prediction
    with make_objective(case.unet, case.network, **config) as objective:
        with Storages() as storages:
            passes = objective.passes()
            passes.run(case.predict)
            found = storages.alive()
        with torch.no_grad(), objective.capture.record() as features:
            case.predict()
    read = [x.numel() * 8 for kind in (features.queries, features.keys, features.hidden) for x in kind.values()]
    maps = sum(4 * HEADS * q.shape[1] * TOKENS * 8 for q in features.queries.values())
    small = 2 * passes.tuned_prediction.numel() * 8 + 4096  # both predictions and numbers a channel
    assert found - wanted <= sum(read) + small
    assert maps > small or not features.queries  # the bound would notice one


def test_a_step_waits_for_no_device(monkeypatch):
    """The meta device has no values: whatever would fetch one from a device fails there."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # which does not know it
    unet, network = make_tuned("up_blocks")
    unet.to("meta")
    network.to("meta")
    x, timesteps, context, target = (t.detach().to("meta") for t in make_batch(unet, batch=4))
    with make_objective(unet, network, seen=False) as objective:
        for instances in (None, COUNTED):
            step = objective.step(lambda: unet(x, timesteps, context), target, timesteps, instances=instances)
            step.loss((step.prediction - target).square().mean(dim=(1, 2, 3))).backward()


def test_a_loss_that_is_a_mean_already_is_refused():
    case = Case()
    with make_objective(case.unet, case.network) as objective:
        step = objective.step(case.predict, case.target, TIMESTEPS)
        with pytest.raises(AptError, match=r"one number a sample, \(4,\); found \(\)"):
            step.loss(torch.tensor(1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_kept_loss_has_its_own_value_and_the_gradient_of_the_weighed_one_to_the_bit(dtype):
    found = []
    for kept in (False, True):
        case = Case()
        with make_objective(case.unet, case.network, lambda_dist=30.0) as objective:
            step = objective.step(case.predict, case.target, TIMESTEPS)
            step.weight = torch.tensor([0.1, 0.7, 1.0, 0.0])
            per_sample = case.per_sample(step.prediction).to(dtype)
            loss = step.weigh(per_sample, regularize=True).mean() if kept else step.loss(per_sample)
            assert torch.equal(loss, per_sample.mean()) == kept
            (loss * 1024.0).backward()  # as a gradient scaler does
            found.append(case.network.gradient())
    assert found[0].abs().sum() > 0 and torch.equal(*found)


# So small that no sample's weight is close to 0 or to beta: the stand-in's losses are some tenths apart.
BETA = 4.0


def hooks_of(unet):
    return sum(len(m._forward_hooks) for m in unet.modules())


def raw_losses(case):
    """(tuned, frozen), [batch] each, by passes of its own."""
    with torch.no_grad():
        tuned = case.per_sample(case.predict())
        with case.network.off():
            return tuned, case.per_sample(case.predict())


@pytest.mark.parametrize("objective", ["dco", "dreambooth"])
def test_another_objective_takes_no_hook_moves_no_image_and_has_no_regularizer(objective):
    case = Case()
    made = make_objective(case.unet, case.network, objective=objective, lambda_attn=3.0)
    assert (made.capture, hooks_of(case.unet)) == (None, 0)
    images, timesteps = torch.rand(50, 3, 8, 8), torch.full((50,), 350)
    assert not made.augments
    assert made.augment(images, timesteps) is images
    step = made.step(case.predict, case.target, TIMESTEPS)
    assert (float(step.regularizer), step.regularizer.requires_grad) == (0.0, False)
    assert step.values.keys() == {"loss_tuned", "loss_frozen", "loss_weight", "delta_noise"}


def test_under_dco_a_weight_is_that_of_the_samples_own_raw_losses():
    case = Case()
    wanted = dco_weight(*raw_losses(case), BETA)
    assert 0.01 * BETA < float(wanted.min()) < 0.5 * BETA < float(wanted.max()) < 0.99 * BETA
    step, _, _ = case.run(objective="dco", dco_beta=BETA)
    assert step.weight.tolist() == pytest.approx(wanted.tolist(), rel=1e-5)
    assert float(step.values["loss_weight"]) == pytest.approx(float(wanted.mean()), rel=1e-5)
    assert not step.weight.requires_grad


def test_under_dco_the_beta_of_the_defaults_is_1000():
    case = Case()
    wanted = dco_weight(*(x.float() for x in raw_losses(case)), 1000.0)
    step, _, _ = case.run(objective="dco")
    assert step.weight.tolist() == pytest.approx(wanted.tolist(), rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("checkpointing", ["off", "reentrant"])
def test_the_gradient_of_a_step_under_dco_is_that_of_dcos_loss(layout, checkpointing):
    plain = Case(layout)
    _, frozen = raw_losses(plain)
    dco_loss(plain.per_sample(plain.predict()), frozen, BETA).mean().backward()
    wanted = plain.network.gradient()
    _, _, gradient = Case(layout, checkpointing).run(objective="dco", dco_beta=BETA)
    assert wanted.norm() > 0
    assert relative_difference(gradient, wanted) < 1e-5


def test_under_dco_samples_that_do_not_count_weigh_what_a_sample_starts_with():
    case = Case()
    wanted = dco_weight(*raw_losses(case), BETA)
    step, loss, gradient = case.run(instances=COUNTED, objective="dco", dco_beta=BETA)
    assert step.weight[~COUNTED].tolist() == [BETA / 2] * 2
    assert step.weight[COUNTED].tolist() == pytest.approx(wanted[COUNTED].tolist(), rel=1e-5)
    assert float(step.values["loss_weight"]) == pytest.approx(float(wanted[COUNTED].mean()), rel=1e-5)
    plain = Case()
    weights = torch.where(COUNTED, wanted, BETA / 2)
    reference = (weights * plain.per_sample(plain.predict())).mean()
    reference.backward()
    assert float(loss) == pytest.approx(float(reference.detach()), rel=1e-5)
    assert relative_difference(gradient, plain.network.gradient()) < 1e-5


def test_under_dco_a_batch_of_which_nothing_counts_weighs_what_a_sample_starts_with():
    case = Case()
    step, loss, _ = case.run(instances=torch.zeros(4, dtype=torch.bool), objective="dco", dco_beta=BETA)
    assert (step.instances, step.weight.tolist(), step.values) == (0, [BETA / 2] * 4, {})
    assert float(loss) == pytest.approx(BETA / 2 * float(raw_losses(case)[0].mean()), rel=1e-6)


@pytest.mark.parametrize("instances", [None, COUNTED, torch.zeros(4, dtype=torch.bool)], ids=["all", "some", "none"])
def test_monitor_only_under_dco_weighs_nothing(instances):
    case = Case()
    wanted = case.per_sample(case.predict()).mean()
    wanted.backward()
    wanted_gradient = case.network.gradient()
    step, loss, gradient = case.run(instances=instances, objective="dco", monitor_only=True)
    assert step.weight.tolist() == [1.0] * 4
    assert torch.equal(loss, wanted.detach())
    assert torch.equal(gradient, wanted_gradient)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("instances", [None, COUNTED], ids=["all", "some"])
def test_dreambooth_is_the_plain_loss_bit_for_bit_and_tells_what_there_is_to_watch(layout, instances):
    case = Case(layout)
    wanted = case.per_sample(case.predict()).mean()
    wanted.backward()
    wanted_gradient = case.network.gradient()
    step, loss, gradient = case.run(instances=instances, objective="dreambooth", lambda_attn=3.0)
    assert torch.equal(loss, wanted.detach())
    assert torch.equal(gradient, wanted_gradient)
    assert step.weight.tolist() == [1.0] * 4
    # The same numbers as APT has of this step.
    acting, _, _ = Case(layout).run(instances=instances)
    for name in ("loss_tuned", "loss_frozen", "delta_noise"):
        assert float(step.values[name]) == pytest.approx(float(acting.values[name]), rel=1e-9)
    assert torch.equal(step.gammas, acting.gammas)
    assert float(step.gammas.max()) > 0.9


@pytest.mark.parametrize("objective", ["dco", "dreambooth"])
def test_the_indicator_goes_on_under_another_objective(objective):
    states = []
    for kind in ("apt", objective):
        case = Case()
        with make_objective(case.unet, case.network, objective=kind) as made:
            made.step(case.predict, case.target, TIMESTEPS)
            states.append(made.indicator.state_dict())
    assert states[0] == states[1]


def make_step(weight):
    """A step that weighs and does nothing else."""
    return AptStep(torch.zeros(0), weight, torch.zeros(()), torch.zeros(10), torch.zeros(10), len(weight), {})


def prediction_and_target(dtype):
    """[4, 4, 6, 5] each; the first requires a gradient."""
    generator = torch.Generator().manual_seed(0)
    prediction, target = (torch.randn((4, 4, 6, 5), generator=generator) for _ in range(2))
    return prediction.to(dtype).requires_grad_(), target


SNR_WEIGHTS = torch.tensor([0.1, 5.0, 1.0, 0.7])


def per_sample_mse(prediction, target):
    """As trainers have it, in float32."""
    return (prediction.float() - target).square().mean(dim=(1, 2, 3))


LOSSES = {
    "mse": (lambda x, y: torch.nn.functional.mse_loss(x.float(), y), per_sample_mse),
    "mse weighted by sample": (
        lambda x, y: (per_sample_mse(x, y) * SNR_WEIGHTS).mean(),
        lambda x, y: per_sample_mse(x, y) * SNR_WEIGHTS,
    ),
    # With prior preservation the halves of a batch make two means.
    "mean of halves": (
        lambda x, y: per_sample_mse(x[:2], y[:2]).mean() / 2 + per_sample_mse(x[2:], y[2:]).mean() / 2,
        per_sample_mse,
    ),
}
PRECISIONS = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])


@PRECISIONS
@pytest.mark.parametrize("name", LOSSES)
def test_a_mean_loss_of_a_weighed_prediction_has_the_gradient_of_the_weighted_loss(name, dtype, tolerance):
    mean_loss, by_sample = LOSSES[name]
    prediction, target = prediction_and_target(dtype)
    step = make_step(torch.tensor([0.02, 1.0, 400.0, 0.5]))
    (wanted,) = torch.autograd.grad(step.loss(by_sample(prediction, target)), prediction)
    (found,) = torch.autograd.grad(mean_loss(step.weigh(prediction), target), prediction)
    assert found.dtype == dtype
    # Each sample by itself: next to the largest weight an error in a small one would not show.
    for sample, reference in zip(found.float(), wanted.float(), strict=True):
        assert relative_difference(sample, reference) < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LOSSES)
def test_weighing_keeps_the_value_and_with_weights_of_one_the_gradient_bit_for_bit(name, dtype):
    mean_loss, _ = LOSSES[name]
    prediction, target = prediction_and_target(dtype)
    plain = mean_loss(prediction, target)
    (gradient,) = torch.autograd.grad(plain, prediction)
    weighed = make_step(torch.tensor([0.02, 1.0, 400.0, 0.5])).weigh(prediction)
    assert (weighed.dtype, weighed.shape) == (prediction.dtype, prediction.shape)
    assert torch.equal(weighed, prediction)
    assert torch.equal(mean_loss(weighed, target), plain)
    (of_ones,) = torch.autograd.grad(mean_loss(make_step(torch.ones(4)).weigh(prediction), target), prediction)
    assert torch.equal(of_ones, gradient)


@pytest.mark.parametrize("checkpointing", ["off", "reentrant", "non_reentrant"])
@pytest.mark.parametrize("config", [{}, {"objective": "dco", "dco_beta": BETA}], ids=["apt", "dco"])
def test_a_whole_step_by_weighing_the_prediction_has_the_gradient_of_its_loss(config, checkpointing):
    _, _, wanted = Case(checkpointing=checkpointing).run(instances=COUNTED, **config)
    case = Case(checkpointing=checkpointing)
    with make_objective(case.unet, case.network, **config) as objective:
        step = objective.step(case.predict, case.target, TIMESTEPS, instances=COUNTED)
        loss = (step.weigh(step.prediction) - case.target).square().mean() + step.regularizer
        loss.backward()
    # The regularizers' share is not weighed.
    assert relative_difference(case.network.gradient(), wanted) < 1e-9


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("checkpointing", ["off", "reentrant", "non_reentrant"])
@pytest.mark.parametrize(
    ("config", "instances"),
    [({}, None), ({}, COUNTED), ({"monitor_only": True}, None), ({"objective": "dco"}, COUNTED)],
    ids=["apt", "apt, some count", "monitor_only", "dco"],
)
def test_a_step_in_pieces_is_the_step(layout, checkpointing, config, instances):
    whole, wanted_loss, wanted = Case(layout, checkpointing).run(instances=instances, **config)
    case = Case(layout, checkpointing)
    with make_objective(case.unet, case.network, **config) as objective:
        step = in_pieces(objective, case, instances).step(case.target, TIMESTEPS)
        loss = step.loss(case.per_sample(step.prediction))
        loss.backward()
    for name in ("prediction", "weight", "regularizer", "gammas"):
        assert torch.equal(getattr(step, name), getattr(whole, name)), name
    assert step.instances == whole.instances
    assert step.values == whole.values
    assert torch.equal(loss, wanted_loss)
    assert torch.equal(case.network.gradient(), wanted)


def test_the_frozen_pass_alone_is_the_base_model_without_a_graph_and_puts_everything_back():
    case = Case()
    stream, modes = torch.get_rng_state(), [m.training for m in case.unet.modules()]
    with torch.no_grad(), case.network.off():
        wanted = case.predict()
    with make_objective(case.unet, case.network) as objective:
        with objective.passes().frozen():
            assert not case.unet.training
            torch.rand(1)
            prediction = case.predict()
        assert torch.equal(prediction, wanted) and not prediction.requires_grad
    assert torch.equal(torch.get_rng_state(), stream)
    assert [m.training for m in case.unet.modules()] == modes
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("config", [{"objective": "dco"}, {"lambda_dist": 0, "lambda_attn": 0}])
def test_without_hooks_the_passes_read_nothing(config):
    case = Case()
    objective = make_objective(case.unet, case.network, **config)
    prediction = case.predict()
    passes = objective.passes()
    with passes.frozen():
        frozen = case.predict()
    passes.begin_tuned(frozen)
    assert passes.end_tuned(prediction) is prediction and passes.terms == {}


def test_a_step_before_its_passes_is_an_error():
    case = Case()
    objective = make_objective(case.unet, case.network)
    with pytest.raises(AptError, match=r"before the passes have ended; call run\(\) or end_tuned\(\) first"):
        objective.passes().step(case.target, TIMESTEPS)


def test_an_objective_goes_on_from_its_state():
    case = Case()
    first = make_objective(case.unet, case.network, frozen_every=2)
    for _ in range(3):
        first.step(case.predict, case.target, TIMESTEPS)
    second = make_objective(case.unet, case.network, seen=False, frozen_every=2)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.state_dict() == first.state_dict() and not second.passes().due
    assert torch.equal(second.indicator.gammas, first.indicator.gammas)


def misused(way, passes, case):
    """The same batch, with something left out or done twice."""
    if way == "no frozen pass":
        passes.end_tuned(case.predict())
    elif way == "frozen pass not handed on":
        with passes.frozen():
            case.predict()
        passes.end_tuned(case.predict())
    elif way == "not in frozen()":
        passes.begin_tuned(case.predict())
    elif way == "twice":
        passes.run(case.predict)
        passes.step(case.target, TIMESTEPS)
    passes.step(case.target, TIMESTEPS)


@pytest.mark.parametrize(
    ("way", "found"),
    [
        ("no frozen pass", "due in this batch, did not run before"),
        ("frozen pass not handed on", "due in this batch, did not run before"),
        ("not in frozen()", "did not run within `frozen"),
        ("twice", "called twice for one batch"),
    ],
)
def test_passes_that_are_not_as_they_should_be_are_an_error_and_no_step_without_terms(way, found):
    case = Case()
    with make_objective(case.unet, case.network) as objective:
        passes = objective.passes()
        with pytest.raises(AptError, match=found):
            misused(way, passes, case)
        passes.give_up()


def test_a_frozen_pass_where_none_is_due_is_an_error():
    case = Case()
    with make_objective(case.unet, case.network, frozen_every=2) as objective:
        objective.step(case.predict, case.target, TIMESTEPS)
        with pytest.raises(AptError, match=r"no frozen pass is due in this batch \(frozen_every = 2\)"):
            in_pieces(objective, case)


def test_images_that_were_augmented_for_another_batch_are_an_error():
    case = Case()
    config = {"augment_border": "ignore", "zoom_out": (2.0, 2.0), "augment_max_probability": 1.0, "lambda_dist": 0.0}
    with make_objective(case.unet, case.network, seen=False, lambda_attn=0.0, **config) as objective:
        objective.indicator.update(TIMESTEPS, torch.zeros(4), torch.ones(4))
        objective.augment(torch.zeros(2, 3, 64, 64), TIMESTEPS[:2])
        with pytest.raises(AptError, match="augmented are 2, the batch is 4: augment each batch as a whole"):
            objective.step(case.predict, case.target, TIMESTEPS)


def test_class_images_are_not_augmented():
    case = Case()
    config = {"zoom_out": (2.0, 2.0), "augment_max_probability": 1.0}
    with make_objective(case.unet, case.network, seen=False, **config) as objective:
        objective.indicator.update(TIMESTEPS, torch.zeros(4), torch.ones(4))
        moved = objective.augment(torch.zeros(4, 3, 64, 64), TIMESTEPS, instances=COUNTED)
        assert moved.flatten(1).any(dim=1).tolist() == COUNTED.tolist()
