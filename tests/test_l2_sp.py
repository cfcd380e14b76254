"""L2-SP's penalty and the pairs that it is of, against whole weights written out in float64."""

import contextlib

import pytest
import torch
from models import make_batch, make_tuned
from torch import nn

from apt_hooks import AptConfig, AptError, AptObjective
from apt_hooks.hooks.lora_pairs import lora_pairs
from apt_hooks.method.l2_sp import LowRank, difference, weight_offset

BASE = {"linear": nn.Linear(5, 7), "other": nn.Linear(5, 7), "wide": nn.Linear(6, 3), "conv": nn.Conv2d(4, 6, 3)}


class KohyaPair(nn.Module):
    """As sd-scripts' LoRAModule holds it: alpha over rank as `scale`."""

    def __init__(self, layer, rank=2, alpha=3.0):
        super().__init__()
        if isinstance(layer, nn.Conv2d):
            self.lora_down = nn.Conv2d(layer.in_channels, rank, layer.kernel_size, bias=False)
            self.lora_up = nn.Conv2d(rank, layer.out_channels, 1, bias=False)
        else:
            self.lora_down = nn.Linear(layer.in_features, rank, bias=False)
            self.lora_up = nn.Linear(rank, layer.out_features, bias=False)
        self.scale = alpha / rank
        self.register_buffer("alpha", torch.tensor(alpha))


class SplitPair(nn.Module):
    """As sd-scripts' FLUX networks hold the LoRA of a fused layer: one pair for each part of its outputs."""

    def __init__(self):
        super().__init__()
        self.lora_down = nn.ModuleList([nn.Linear(5, 2, bias=False) for _ in range(3)])
        self.lora_up = nn.ModuleList([nn.Linear(2, width, bias=False) for width in (4, 4, 8)])
        self.scale = 0.25


def kohya():
    torch.manual_seed(0)
    return nn.ModuleDict({name: KohyaPair(layer) for name, layer in BASE.items()} | {"split": SplitPair()}).double()


def peft_model(**options):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = nn.Sequential()
    for name, layer in BASE.items():
        model.add_module(name, layer)
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=list(BASE), init_lora_weights=False, **options)
    return peft.inject_adapter_in_model(config, model, "own").double()


def trained(model):
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def changes_of_kohya(model):
    for pair in model.values():
        if isinstance(pair, SplitPair):
            parts = zip(pair.lora_down, pair.lora_up, strict=True)
            yield torch.cat([up.weight @ down.weight for down, up in parts]) * pair.scale
        else:
            yield torch.einsum("or,ri...->oi...", pair.lora_up.weight.flatten(1), pair.lora_down.weight) * 1.5


def changes_of_peft(model):
    for name in BASE:
        yield model.get_submodule(name).get_delta_weight("own")


KINDS = {"sd-scripts": (kohya, changes_of_kohya), "peft": (peft_model, changes_of_peft)}


@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradient_are_those_of_the_whole_changes_written_out(kind):
    make, changes = KINDS[kind]
    model = make()
    parameters = [p for _, p in trained(model)]
    wanted = sum(change.square().sum() for change in changes(model))
    found = weight_offset(lora_pairs([model], trained(model)))
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=1e-12)
    gradients = (torch.autograd.grad(value, parameters) for value in (found, wanted))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "scale", [None, torch.ones(3), nn.Identity(), "auto"], ids=["none", "vector", "module", "text"]
)
def test_what_has_no_number_for_a_scale_is_no_pair(scale):
    model = nn.ModuleDict({"linear": KohyaPair(BASE["linear"])})
    del model["linear"].scale
    model["linear"].scale = scale
    with pytest.raises(AptError, match="2 of 2 trained parameters are of none"):
        lora_pairs([model], trained(model))


def test_it_passes_gradcheck():
    down, up = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 5), (4, 2)))
    torch.autograd.gradcheck(lambda down, up: weight_offset([LowRank(down, up, 0.7)]), (down, up))


def test_a_lora_at_its_start_has_gone_nowhere():
    model = kohya()
    for name, p in model.named_parameters():
        if "lora_up" in name:
            nn.init.zeros_(p)
    assert float(weight_offset(lora_pairs([model], trained(model)))) == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_weights_are_computed_in_float32_under_autocast_too(dtype):
    down, up = torch.randn(4, 64).to(dtype), 100 * torch.randn(32, 4).to(dtype)
    wanted = float((up.double() @ down.double()).square().sum())
    with torch.autocast("cpu", torch.bfloat16):
        found = weight_offset([LowRank(down, up, 1.0)])
    assert found.dtype == torch.float32 and float(found) == pytest.approx(wanted, rel=1e-5)


def test_the_difference_of_two_changes_is_that_of_their_products_and_nothing_where_they_are_one():
    down, up, down0, up0 = (torch.randn(shape, dtype=torch.float64) for shape in ((2, 5), (4, 2), (2, 5), (4, 2)))
    now, start = LowRank(down, up, 0.7), LowRank(down0, up0, 0.7)
    wanted = 0.49 * (up @ down - up0 @ down0).square().sum()
    assert float(weight_offset([difference(now, start)])) == pytest.approx(float(wanted), rel=1e-12)
    assert float(weight_offset([difference(now, now)])) == 0.0


def test_pairs_that_are_not_trained_are_left_out_and_one_trained_side_is_enough():
    model = kohya()
    model["linear"].requires_grad_(False)
    model["other"].lora_down.requires_grad_(False)
    pairs = lora_pairs([model], trained(model))
    assert len(pairs) == len(BASE) - 1 + 3  # and the three parts of the split one
    assert not any(pair.down is model["linear"].lora_down.weight for pair in pairs)


def loha():
    model = nn.Module()
    model.hada_w1_a, model.hada_w1_b = nn.Parameter(torch.zeros(5, 2)), nn.Parameter(torch.zeros(2, 5))
    return model


def tucker():
    model = nn.ModuleDict({"conv": KohyaPair(BASE["conv"])})
    model["conv"].lora_mid = nn.Conv2d(2, 2, 3, bias=False)
    return model


def kernel_above():
    model = nn.ModuleDict({"conv": KohyaPair(BASE["conv"])})
    model["conv"].lora_up = nn.Conv2d(2, 6, 3, bias=False)
    return model


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda: nn.Linear(3, 3), "2 of 2 trained parameters are of none (bias, weight)"),
        (loha, "2 of 2 trained parameters are of none (hada_w1_a, hada_w1_b)"),
        (tucker, "1 of 3 trained parameters are of none (conv.lora_mid.weight)"),
        (kernel_above, "2 of 2 trained parameters are of none"),
        (lambda: peft_model(use_dora=True), "lora_magnitude_vector"),
        (lambda: kohya().requires_grad_(False), "nothing is trained"),
    ],
    ids=["full", "LoHa", "Tucker", "kernel above", "DoRA", "nothing"],
)
def test_what_is_trained_and_no_pair_is_one_line_that_names_it(make, found):
    model = make()
    with pytest.raises(AptError) as caught:
        lora_pairs([model], trained(model))
    assert found in str(caught.value) and "\n" not in str(caught.value)


# -- in a step ---------------------------------------------------------------------------------------------------------

TIMESTEPS = torch.tensor([50, 350, 950, 70])


class Case:
    """A stand-in with LoRA, in float64, and a batch of four."""

    def __init__(self, **config):
        self.unet, self.network = make_tuned("up_blocks")
        self.unet.double()
        self.network.double()
        self.x, _, self.context, self.target = (t.detach().double() for t in make_batch(self.unet, batch=4))
        config = AptConfig(**{"objective": "l2-sp", "lambda_offset": 0.3, **config})
        self.objective = AptObjective(config, self.unet, self.network.off, also_frozen=[self.network])
        self.objective.reference.trained = list(self.network.named_parameters())

    def predict(self):
        return self.unet(self.x, TIMESTEPS, self.context)

    def per_sample(self, prediction):
        return (prediction - self.target).square().mean(dim=(1, 2, 3))

    def step(self, instances=None):
        self.network.zero_grad()
        step = self.objective.step(self.predict, self.target, TIMESTEPS, instances=instances)
        loss = step.loss(self.per_sample(step.prediction))
        loss.backward()
        return step, float(loss.detach()), self.network.gradient()

    def changes(self):
        return [lora.lora_up.weight @ lora.lora_down.weight for lora in self.network.loras]

    def written_out(self, share=1.0, start=None):
        """(loss, gradient, penalty) of the plain loss and the penalty."""
        self.network.zero_grad()
        begun = start or [torch.zeros(()) for _ in self.network.loras]
        penalty = sum((now - then).square().sum() for now, then in zip(self.changes(), begun, strict=True))
        loss = self.per_sample(self.predict()).mean() + 0.3 * share * penalty
        loss.backward()
        return float(loss.detach()), self.network.gradient(), float(penalty.detach())


@pytest.mark.parametrize("instances", [None, torch.tensor([True, False, False, True])], ids=["all", "half"])
def test_a_step_is_plain_training_and_the_penalty_beside_it_for_what_counts(instances):
    case = Case(loss_weighting=True, augmentation=True, frozen_every=3)
    step, loss, gradient = case.step(instances)
    wanted_loss, wanted, penalty = case.written_out(1.0 if instances is None else 0.5)
    assert loss == pytest.approx(wanted_loss, rel=1e-6)
    torch.testing.assert_close(gradient, wanted, rtol=1e-6, atol=1e-9)
    assert float(step.values["l_offset"]) == pytest.approx(penalty, rel=1e-6) and penalty > 0
    # And beside it all of the log's own, from the frozen pass.
    assert {"loss_frozen", "delta_noise"} <= step.values.keys() and float(step.values["loss_weight"]) == 1.0
    assert case.objective.capture is None and not case.objective.augments


def test_with_frozen_every_the_penalty_is_of_each_step_and_the_frozen_pass_of_some():
    case, passes = Case(frozen_every=3), []
    predict = case.predict
    case.predict = lambda: passes.append(torch.is_grad_enabled()) or predict()
    for number in range(4):
        passes.clear()
        step, loss, gradient = case.step()
        due = number % 3 == 0
        assert passes == ([False] * due + [True]) and ("delta_noise" in step.values) == due
        wanted_loss, wanted, penalty = case.written_out()
        assert loss == pytest.approx(wanted_loss, rel=1e-6)
        torch.testing.assert_close(gradient, wanted, rtol=1e-6, atol=1e-9)
        assert float(step.values["l_offset"]) == pytest.approx(penalty, rel=1e-6) and penalty > 0


@pytest.mark.parametrize("regularizer", ["separate", "joint"])
@pytest.mark.parametrize("instances", [None, torch.tensor([True, False, False, True])], ids=["all", "half"])
def test_beside_apt_it_is_one_more_term_of_each_batch(instances, regularizer):
    own = {"objective": "apt", "frozen_every": 2, "regularizer": regularizer, "loss_weighting": False}
    apt, both = Case(**own, lambda_offset=0), Case(**own)
    for number in range(3):
        step, _, gradient = apt.step(instances)
        found, _, with_offset = both.step(instances)
        half = 1.0 if instances is None else 0.5
        both.network.zero_grad()
        (0.3 * half * sum(change.square().sum() for change in both.changes())).backward()
        torch.testing.assert_close(with_offset - gradient, both.network.gradient(), rtol=1e-6, atol=1e-9)
        penalty = float(sum(change.square().sum() for change in both.changes()))
        assert float(found.values.pop("l_offset")) == pytest.approx(penalty, rel=1e-6)
        assert float(found.regularizer - step.regularizer) == pytest.approx(0.3 * half * penalty, rel=1e-6)
        assert found.values.keys() == step.values.keys()
        assert (("l_joint" if regularizer == "joint" else "l_attn") in step.values) == (number != 1)


def test_where_nothing_counts_there_is_no_penalty():
    step, _, _ = Case().step(torch.zeros(4, dtype=torch.bool))
    assert float(step.regularizer) == 0.0 and "l_offset" not in step.values


ALONE = [{}, {"objective": "apt", "lambda_dist": 0, "lambda_attn": 0, "loss_weighting": False}]
alone = pytest.mark.parametrize("own", ALONE, ids=["l2-sp", "apt"])


@alone
def test_monitor_only_tells_it_and_changes_nothing(own, monkeypatch):
    def offset(pairs):
        assert not torch.is_grad_enabled()  # no graph over the whole LoRA, while the pass holds its own
        return weight_offset(pairs)

    monkeypatch.setattr("apt_hooks.training.objective.weight_offset", offset)
    case = Case(monitor_only=True, **own)
    step, loss, gradient = case.step()
    case.network.zero_grad()
    plain = case.per_sample(case.predict()).mean()
    plain.backward()
    assert loss == float(plain.detach()) and torch.equal(gradient, case.network.gradient())
    assert float(step.values["l_offset"]) > 0 and not step.regularizer.requires_grad


@pytest.mark.parametrize("objective", ["apt", "dco", "dreambooth"])
def test_monitor_only_tells_it_unasked_where_the_network_is_a_plain_lora(objective):
    case = Case(monitor_only=True, objective=objective, lambda_offset=None)
    for _ in range(2):
        step, _, gradient = case.step()
        wanted = sum(change.square().sum() for change in case.changes())
        assert float(step.values["l_offset"]) == pytest.approx(float(wanted.detach()), rel=1e-6) and wanted > 0
        case.network.zero_grad()
        case.per_sample(case.predict()).mean().backward()
        assert torch.equal(gradient, case.network.gradient())
    other = Case(monitor_only=True, objective=objective, lambda_offset=None)
    other.objective.reference.trained += list(loha().named_parameters())
    for _ in range(2):
        step, _, _ = other.step()
        assert "l_offset" not in step.values and "delta_noise" in step.values
    assert "l_offset" not in Case(objective=objective, lambda_offset=None).step()[0].values


@alone
def test_with_the_start_for_reference_the_offset_is_from_there(own):
    case = Case(reference="start", **own)
    start = [change.detach().clone() for change in case.changes()]
    for number in range(2):
        step, loss, gradient = case.step()
        wanted_loss, wanted, penalty = case.written_out(start=start)
        assert loss == pytest.approx(wanted_loss, rel=1e-6)
        torch.testing.assert_close(gradient, wanted, rtol=1e-6, atol=1e-9)
        assert float(step.values["l_offset"]) == pytest.approx(penalty, rel=1e-6, abs=1e-20)
        assert (penalty > 0) == (number > 0)
        torch.optim.SGD(case.network.parameters(), lr=0.5).step()


@alone
def test_a_loaded_start_holds_in_a_batch_without_a_frozen_pass_too(own):
    case = Case(reference="start", frozen_every=3, **own)
    start = [change.detach().clone() for change in case.changes()]
    begun = [(name, p.detach().clone()) for name, p in case.network.named_parameters()]
    torch.optim.SGD(case.network.parameters(), lr=0.5).step(lambda: case.step()[1])
    # As a resumed run has it: the weights of now, and those that the training began from waiting to be taken.
    case.objective.reference.start, case.objective.reference.saved_start = None, begun
    case.network.zero_grad()
    passes = case.objective.passes()
    assert not passes.due
    prediction = passes.end_tuned(case.predict())  # in a script's own lines
    step = passes.step(case.target, TIMESTEPS)
    step.loss(case.per_sample(prediction)).backward()
    gradient = case.network.gradient()
    _, wanted, penalty = case.written_out(start=start)
    assert float(step.values["l_offset"]) == pytest.approx(penalty, rel=1e-6) and penalty > 0
    torch.testing.assert_close(gradient, wanted, rtol=1e-6, atol=1e-9)


@alone
def test_a_lora_that_the_objective_does_not_know_of_is_one_line(own):
    case = Case(**own)
    case.objective.reference.modules = (case.unet,)
    with (
        pytest.raises(AptError, match=r"trained parameters are of none .*also_frozen"),
        contextlib.closing(case.objective),
    ):
        case.step()
