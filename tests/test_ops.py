import pytest
import torch
from models import relative_difference

from apt_hooks import AptError, attention_alignment_loss
from apt_hooks.method.ops import attention_alignment, channel_statistics
from apt_hooks.method.ops import triton_choice as choice
from apt_hooks.method.ops.attention_alignment import sum_and_gradients
from apt_hooks.method.ops.channel_statistics import mean_and_deviation, representation_statistics

HEADS = 3
MASK = torch.tensor([[True, True, False, True, False], [True, False, True, True, True]])


def inputs(queries=11, channels=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, length, HEADS * channels) for length in (queries, 5, queries, 5)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def plain(q, k, q_frozen, k_frozen, mask=None):
    """(sum, gradient by q, gradient by k) of the specification, by autograd."""
    q, k = q.clone().requires_grad_(), k.clone().requires_grad_()
    loss = attention_alignment_loss(q, k, q_frozen, k_frozen, heads=HEADS, scale=0.4, mask=mask, impl="plain")
    total = loss * (len(q) * HEADS * q.shape[1])
    return total.detach(), *torch.autograd.grad(total, (q, k))


@pytest.mark.parametrize("mask", [None, MASK], ids=["all tokens", "masked"])
@pytest.mark.parametrize("chunk", [1, 120, 10**6], ids=["a query at a time", "some", "all"])
def test_the_eager_sum_and_gradients_are_those_of_the_plain_loss(monkeypatch, mask, chunk):
    monkeypatch.setattr(attention_alignment, "CHUNK", chunk)
    batch = inputs()
    found = sum_and_gradients(*batch, heads=HEADS, scale=0.4, mask=mask, impl="eager")
    for one, other in zip(found, plain(*batch, mask), strict=True):
        assert relative_difference(one, other) < 1e-12


def test_without_gradients_only_the_sum_is_computed():
    batch = inputs()
    total, *gradients = sum_and_gradients(*batch, heads=HEADS, scale=0.4, gradients=False)
    assert float(total) == pytest.approx(float(plain(*batch)[0]), rel=1e-12)
    assert gradients == [None, None]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_err_no_more_than_the_plain_loss_does(dtype):
    batch = inputs(dtype=dtype)
    wanted = plain(*(x.double() for x in batch))
    found = sum_and_gradients(*batch, heads=HEADS, scale=0.4, impl="eager")
    assert [x.dtype for x in found] == [torch.float32, dtype, dtype]
    for one, other, truth in zip(found, plain(*batch), wanted, strict=True):
        assert relative_difference(one.double(), truth) <= 1.01 * relative_difference(other.double(), truth) + 1e-6


def test_autocast_costs_no_accuracy():
    batch = [x.float() for x in inputs()]
    wanted = sum_and_gradients(*batch, heads=HEADS, scale=0.4)
    with torch.autocast("cpu", torch.bfloat16):
        found = sum_and_gradients(*batch, heads=HEADS, scale=0.4)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("impl", ["plain", "auto", "eager"])
def test_the_loss_has_one_value_and_one_gradient_whatever_computes_it(impl):
    q, k, q_frozen, k_frozen = inputs()
    q.requires_grad_()
    loss = attention_alignment_loss(q, k, q_frozen, k_frozen, heads=HEADS, impl=impl)
    wanted = attention_alignment_loss(q, k, q_frozen, k_frozen, heads=HEADS, impl="plain")
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-12)
    gradients = [torch.autograd.grad(3 * x, q)[0] for x in (loss, wanted)]
    assert relative_difference(*gradients) < 1e-12


def test_the_loss_of_a_fixed_q_and_k_needs_no_graph():
    assert not attention_alignment_loss(*inputs(), heads=HEADS).requires_grad


@pytest.mark.parametrize("shape", [(2, 35, 6), (2, 6, 7, 5)], ids=["3-D", "4-D"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1, 100, 10**6], ids=["small pieces", "pieces", "whole"])
def test_the_eager_statistics_are_the_specifications(monkeypatch, shape, dtype, chunk):
    monkeypatch.setattr(channel_statistics, "CHUNK", chunk)
    h = (2 * torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 30).to(dtype)
    found, wanted = mean_and_deviation(h, impl="eager"), representation_statistics(h)
    assert found.dtype == wanted.dtype
    assert relative_difference(found, wanted) < (1e-12 if dtype == torch.float64 else 1e-6)


def test_statistics_of_a_shape_without_positions_are_refused():
    with pytest.raises(AptError, match=r"h must be .* found \(2, 3\)"):
        mean_and_deviation(torch.zeros(2, 3))


def test_triton_asked_for_where_it_cannot_run_is_refused_with_the_reason(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for call in (
        lambda: sum_and_gradients(*inputs(dtype=torch.float32), heads=HEADS, scale=1.0, impl="triton"),
        lambda: mean_and_deviation(torch.zeros(2, 3, 4), impl="triton"),
    ):
        with pytest.raises(
            AptError, match=r'attention_impl = "triton" cannot be used here: .*; take "auto" or "eager"'
        ):
            call()


def test_what_the_kernels_do_not_do_is_told(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(choice, "unavailable", lambda device: None)
    with pytest.raises(AptError, match=r"its kernel does not do 5 tokens of head size 8 in torch\.float64"):
        sum_and_gradients(*inputs(), heads=HEADS, scale=1.0, impl="triton")
    with pytest.raises(AptError, match="its kernel does no float64"):
        mean_and_deviation(torch.zeros(2, 3, 4, dtype=torch.float64), impl="triton")


def test_a_kernel_that_cannot_be_used_is_told_once_and_gone_without(monkeypatch, caplog):
    cuda = torch.device("cuda")
    choice._say_once.cache_clear()
    monkeypatch.setattr(choice, "unavailable", lambda device: None)
    assert not choice.takes_triton("auto", cuda, lambda device: "no C compiler")
    assert not choice.takes_triton("auto", cuda, lambda device: "no C compiler")
    assert [record.getMessage() for record in caplog.records] == [
        "apt-hooks: the regularizers run without Triton's kernel: no C compiler"
    ]
    assert choice.takes_triton("auto", cuda, lambda device: None)
    assert not choice.takes_triton("eager", cuda, lambda device: None)
    assert not choice.takes_triton("auto", torch.device("cpu"), lambda device: None)


def test_a_kernel_that_fails_or_finds_other_numbers_is_no_good():
    wanted = torch.ones(3), torch.full((2,), 5.0)

    def failing():
        raise RuntimeError("Failed to find\nC compiler")

    assert choice.fault(lambda: wanted, wanted) is None
    assert choice.fault(failing, wanted) == "the kernel cannot be built (RuntimeError: Failed to find C compiler)"
    for wrong in (torch.full((2,), 5.2), torch.full((2,), float("nan"))):
        assert "numbers are wrong" in choice.fault(lambda wrong=wrong: (wanted[0], wrong), wanted)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        choice.fault(lambda: (_ for _ in ()).throw(torch.cuda.OutOfMemoryError()), wanted)
