import math

import pytest
import torch
from models import relative_difference

from apt_hooks import AptError, attention_alignment_loss, representation_loss
from apt_hooks.method.losses import dco_loss, dco_weight
from apt_hooks.method.ops.channel_statistics import representation_statistics

BATCH, QUERIES, TOKENS, HEADS, CHANNELS = 2, 7, 5, 3, 40
MASK = torch.tensor([[True, True, False, True, False], [True, False, True, True, True]])


def attention_inputs(dtype=torch.float32, seed=0):
    """q, k, q_frozen, k_frozen; the first two require a gradient."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(BATCH, length, HEADS * CHANNELS) for length in (QUERIES, TOKENS, QUERIES, TOKENS)]
    q, k, q_frozen, k_frozen = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return q.requires_grad_(), k.requires_grad_(), q_frozen, k_frozen


def doubles(*tensors):
    """The same numbers in float64, cut off from any graph; what required a gradient does so again."""
    return [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]


def attention_reference(q, k, q_frozen, k_frozen, scale, mask=None):
    """One head of one sample at a time, and the softmax written out."""
    total = 0.0
    for b in range(BATCH):
        for h in range(HEADS):
            at = slice(h * CHANNELS, (h + 1) * CHANNELS)
            maps = []
            for queries, keys in ((q, k), (q_frozen, k_frozen)):
                weights = torch.exp(scale * torch.einsum("qc,tc->qt", queries[b, :, at], keys[b, :, at]))
                weights = weights if mask is None else weights * mask[b]
                maps.append(weights / weights.sum(dim=1, keepdim=True))
            total = total + ((maps[0] - maps[1]) ** 2).sum()
    return total / (BATCH * HEADS * QUERIES)


def representation_reference(h, h_frozen):
    """Means and deviations one sample and channel at a time; h: [batch, positions, channels]."""
    l_mu = l_sigma = 0.0
    batch, positions, channels = h.shape
    for b in range(batch):
        for c in range(channels):
            means, deviations = [], []
            for x in (h[b, :, c], h_frozen[b, :, c]):
                means.append(x.sum() / positions)
                deviations.append((((x - means[-1]) ** 2).sum() / positions) ** 0.5)
            l_mu = l_mu + (means[0] - means[1]) ** 2
            l_sigma = l_sigma + (deviations[0] - deviations[1]) ** 2
    return l_mu / (batch * channels), l_sigma / (batch * channels)


def test_attention_alignment_of_a_case_computed_by_hand():
    # One head of one channel, scale 1: scores 0 and ln 3 give (1/4, 3/4); the frozen ones, 0 and 0, (1/2, 1/2).
    k = torch.tensor([[[0.0], [math.log(3.0)]]])
    ones, zeros = torch.ones(1, 1, 1), torch.zeros(1, 2, 1)
    loss = attention_alignment_loss(ones, k, ones, zeros, heads=1)
    assert float(loss) == pytest.approx(2 * 0.25**2, rel=1e-6)


def test_attention_alignment_is_zero_for_equal_maps_and_two_for_opposite_ones():
    q, k = torch.ones(1, 1, 1), torch.tensor([[[0.0], [200.0]]])
    assert float(attention_alignment_loss(q, k, q, k, heads=1)) == 0.0
    assert float(attention_alignment_loss(q, k, -q, k, heads=1)) == pytest.approx(2.0)


@pytest.mark.parametrize("scale", [None, 0.05])
@pytest.mark.parametrize("mask", [None, MASK], ids=["all tokens", "masked"])
def test_attention_alignment_agrees_with_an_independent_reference(scale, mask):
    inputs = attention_inputs()
    loss = attention_alignment_loss(*inputs, heads=HEADS, scale=scale, mask=mask)
    wide = doubles(*inputs)
    wanted = attention_reference(*wide, scale or 1 / math.sqrt(CHANNELS), mask)
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    found_gradients = torch.autograd.grad(loss, inputs[:2])
    for found, reference in zip(found_gradients, torch.autograd.grad(wanted, wide[:2]), strict=True):
        assert relative_difference(found.double(), reference) < 1e-5


def test_a_masked_token_has_no_influence_at_all():
    q, k, q_frozen, k_frozen = attention_inputs()
    wild = torch.where(MASK[..., None], k.detach(), 1e4)
    losses = [attention_alignment_loss(q, x, q_frozen, k_frozen, heads=HEADS, mask=MASK) for x in (k, wild)]
    assert float(losses[0].detach()) == float(losses[1].detach())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_computed_in_float32(dtype):
    inputs = attention_inputs(dtype)
    loss = attention_alignment_loss(*inputs, heads=HEADS)
    wanted = attention_reference(*doubles(*inputs), 1 / math.sqrt(CHANNELS))
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    assert torch.autograd.grad(loss, inputs[0])[0].dtype == dtype


def test_autocast_costs_the_losses_no_accuracy():
    inputs = attention_inputs()
    q, q_frozen = inputs[0], inputs[2]
    plain = [attention_alignment_loss(*inputs, heads=HEADS), *representation_loss(q, q_frozen)]
    with torch.autocast("cpu", torch.bfloat16):
        cast = [attention_alignment_loss(*inputs, heads=HEADS), *representation_loss(q, q_frozen)]
    for found, wanted in zip(cast, plain, strict=True):
        assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=1e-6)
        found_gradient, wanted_gradient = (torch.autograd.grad(x, q, retain_graph=True)[0] for x in (found, wanted))
        assert relative_difference(found_gradient, wanted_gradient) < 1e-6


def test_no_gradient_reaches_the_frozen_model():
    inputs = [x.detach().requires_grad_() for x in attention_inputs()]
    q, k, q_frozen, k_frozen = inputs
    loss = attention_alignment_loss(*inputs, heads=HEADS) + sum(representation_loss(q, q_frozen))
    loss.backward()
    assert (q_frozen.grad, k_frozen.grad) == (None, None)
    assert q.grad is not None
    assert k.grad is not None


def test_attention_alignment_passes_gradcheck():
    generator = torch.Generator().manual_seed(0)
    q, k, q_frozen, k_frozen = (torch.randn((1, n, 4), generator=generator, dtype=torch.float64) for n in (3, 2, 3, 2))
    torch.autograd.gradcheck(
        lambda q, k: attention_alignment_loss(q, k, q_frozen, k_frozen, heads=2),
        (q.requires_grad_(), k.requires_grad_()),
    )


@pytest.mark.parametrize("shape", [(2, 5, 3), (2, 3, 2, 3)], ids=["3-D", "4-D"])
def test_representation_passes_gradcheck(shape):
    generator = torch.Generator().manual_seed(0)
    h, h_frozen = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    torch.autograd.gradcheck(lambda h: representation_loss(h, h_frozen), h.requires_grad_())


def test_representation_of_a_case_computed_by_hand():
    # Means 2 and 0, squared distance 4; population deviations 1 and 3, squared distance 4; then 0, 0 for channel two.
    h = torch.tensor([[[1.0, 5.0], [3.0, 5.0]]])
    h_frozen = torch.tensor([[[-3.0, 5.0], [3.0, 5.0]]])
    assert [float(x) for x in representation_loss(h, h_frozen)] == pytest.approx([2.0, 2.0])


def test_representation_agrees_with_an_independent_reference():
    generator = torch.Generator().manual_seed(0)
    h, h_frozen = (torch.randn((2, 35, 6), generator=generator) for _ in range(2))
    h = (2 * h + 1).requires_grad_()
    wide = doubles(h, h_frozen)
    for found, wanted in zip(representation_loss(h, h_frozen), representation_reference(*wide), strict=True):
        assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
        gradient = torch.autograd.grad(found, h, retain_graph=True)[0]
        reference = torch.autograd.grad(wanted, wide[0], retain_graph=True)[0]
        assert relative_difference(gradient.double(), reference) < 1e-5


def test_representation_is_the_same_of_rows_and_of_a_feature_map():
    maps = torch.randn(2, 3, 6, 5, 7, generator=torch.Generator().manual_seed(0))
    rows = maps.flatten(3).transpose(2, 3)
    assert torch.stack(representation_loss(*maps)).tolist() == pytest.approx(
        torch.stack(representation_loss(*rows)).tolist(), rel=1e-5
    )


def test_a_constant_channel_has_a_finite_gradient():
    h = torch.full((1, 4, 2), 3.0, requires_grad=True)
    h_frozen = torch.randn(1, 4, 2, generator=torch.Generator().manual_seed(0))
    sum(representation_loss(h, h_frozen)).backward()
    assert h.grad.isfinite().all()
    assert h.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_statistics_of_half_hidden_states_are_those_of_float32(dtype):
    h = torch.randn(2, 50, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(representation_statistics(h), representation_statistics(h.float()))


@pytest.mark.parametrize(
    ("shapes", "found"),
    [
        ([(2, 7, 12), (2, 5, 12), (2, 6, 12), (2, 5, 12)], "(2, 6, 12)"),
        ([(2, 7, 12), (2, 5, 12), (2, 7, 12), (2, 4, 12)], "(2, 4, 12)"),
        ([(7, 12), (5, 12), (7, 12), (5, 12)], "(7, 12)"),
        ([(2, 7, 12), (1, 5, 12), (2, 7, 12), (1, 5, 12)], "(1, 5, 12)"),
        ([(2, 7, 12), (2, 5, 9), (2, 7, 12), (2, 5, 9)], "(2, 5, 9)"),
        ([(2, 7, 10), (2, 5, 10), (2, 7, 10), (2, 5, 10)], "3 heads"),
    ],
    ids=["queries", "tokens", "2-D", "batch", "width", "heads"],
)
def test_attention_shapes_that_do_not_fit_are_refused_and_named(shapes, found):
    with pytest.raises(AptError) as caught:
        attention_alignment_loss(*(torch.zeros(shape) for shape in shapes), heads=3)
    assert found in str(caught.value)


@pytest.mark.parametrize("mask", [MASK.float(), MASK[:, :4], MASK[:1]], ids=["not bool", "tokens", "batch"])
def test_a_mask_that_does_not_fit_is_refused(mask):
    with pytest.raises(AptError, match="mask must be bool of shape"):
        attention_alignment_loss(*attention_inputs(), heads=HEADS, mask=mask)


@pytest.mark.parametrize(
    "shapes",
    [
        ((2, 7, 12), (2, 7, 8)),
        ((2, 7, 12), (1, 7, 12)),
        ((2, 7), (2, 7)),
        ((2, 7, 12), (2, 5, 12)),
        ((2, 9, 4), (2, 4, 3, 3)),
    ],
    ids=["channels", "batch", "2-D", "positions", "layout"],
)
def test_hidden_states_of_other_shapes_are_refused(shapes):
    with pytest.raises(AptError):
        representation_loss(*(torch.zeros(shape) for shape in shapes))


BETA = 1000.0
# Differences of the losses: times beta 0, some way to either side, past where float32 has sigmoid as 0, and extreme.
GAPS = [0.0, 1e-4, -1e-4, 0.003, -0.003, 0.02, -0.02, 0.11, -0.11, 5.0, -5.0, 1e4]


def dco_inputs(dtype=torch.float32):
    """loss_tuned, which requires a gradient, and loss_frozen: [batch], by `GAPS` apart."""
    loss_frozen = torch.full((len(GAPS),), 0.0625, dtype=dtype)
    return (loss_frozen + torch.tensor(GAPS, dtype=dtype)).requires_grad_(), loss_frozen


def dco_reference(difference, beta):
    """-log sigmoid(-beta * difference) of one number, in float64, from whichever side exp does not overflow."""
    x = beta * difference
    return x + math.log1p(math.exp(-x)) if x > 0 else math.log1p(math.exp(x))


def test_dco_of_equal_losses_is_log_2_and_weighs_half_of_beta():
    losses = torch.tensor([0.0, 0.3, 70.0])
    assert dco_loss(losses, losses, BETA).tolist() == pytest.approx([math.log(2.0)] * 3, rel=1e-6)
    assert dco_weight(losses, losses, BETA).tolist() == [500.0] * 3


def test_dco_of_a_case_computed_by_hand():
    # beta * (L_tuned - L_frozen) = ln 3 and -ln 3: the sigmoid of its negative is 1/4 and 3/4.
    tuned, frozen = torch.tensor([math.log(3.0) / 2, 0.0]), torch.tensor([0.0, math.log(3.0) / 2])
    assert dco_loss(tuned, frozen, 2.0).tolist() == pytest.approx([math.log(4.0), math.log(4.0 / 3.0)], rel=1e-6)
    assert dco_weight(tuned, frozen, 2.0).tolist() == pytest.approx([1.5, 0.5], rel=1e-6)


def test_dco_agrees_with_a_reference_where_the_formula_as_written_overflows_too():
    tuned, frozen = dco_inputs()
    found = dco_loss(tuned, frozen, BETA)
    differences = (tuned.detach().double() - frozen.double()).tolist()
    assert found.tolist() == pytest.approx([dco_reference(d, BETA) for d in differences], rel=1e-5)
    naive = -torch.log(torch.sigmoid(-BETA * (tuned - frozen)))
    assert not naive.isfinite().all()
    assert found.isfinite().all()


def test_dco_is_exact_in_float64():
    tuned, frozen = dco_inputs(torch.float64)
    differences = (tuned.detach() - frozen).tolist()
    found = dco_loss(tuned, frozen, BETA)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx([dco_reference(d, BETA) for d in differences], rel=1e-9)


def test_the_weight_of_dco_is_the_derivative_of_its_loss():
    tuned, frozen = dco_inputs()
    weight = dco_weight(tuned, frozen, BETA)
    (derivative,) = torch.autograd.grad(dco_loss(tuned, frozen, BETA).sum(), tuned)
    assert not weight.requires_grad
    assert weight.shape == tuned.shape
    assert weight.tolist() == pytest.approx(derivative.tolist(), rel=1e-5)
    # Between letting a sample go and the whole of beta.
    assert (float(weight.min()), float(weight.max())) == (0.0, BETA)


def test_no_gradient_of_dco_reaches_the_frozen_model():
    tuned, frozen = dco_inputs()
    frozen.requires_grad_()
    dco_loss(tuned, frozen, BETA).sum().backward()
    assert frozen.grad is None
    assert (tuned.grad > 0).any()


def test_dco_passes_gradcheck():
    tuned, frozen = (torch.rand(4, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in (0, 1))
    torch.autograd.gradcheck(lambda tuned: dco_loss(tuned, frozen, 3.0), tuned.requires_grad_())


def test_weighted_statistics_are_those_of_the_positions_that_count():
    h = torch.randn(2, 12, 5, dtype=torch.float64)
    weights = torch.zeros(2, 12, 1, dtype=torch.float64)
    weights[:, 3:9] = 0.5
    wanted = torch.stack([h[:, 3:9].mean(dim=1), h[:, 3:9].std(dim=1, correction=0)])
    torch.testing.assert_close(representation_statistics(h, weights), wanted)
    as_map = h.transpose(1, 2).reshape(2, 5, 3, 4)
    torch.testing.assert_close(representation_statistics(as_map, weights.reshape(2, 1, 3, 4)), wanted)
