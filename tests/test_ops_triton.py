"""Triton's kernels against the plain losses: on a GPU where there is one, else in Triton's interpreter.

The interpreter has to be chosen before triton is imported. Where another test's imports came first, this file's tests
run in a process of their own, for which one of them waits.
"""

import os
import re
import sys
from pathlib import Path

import pytest
import torch
from models import relative_difference

from apt_hooks.method.losses import attention_alignment_loss
from apt_hooks.method.ops import attention_alignment, channel_statistics
from apt_hooks.method.ops.attention_alignment import attention_map
from apt_hooks.method.ops.channel_statistics import representation_statistics

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CHOSEN_BEFORE = os.environ.get("TRITON_INTERPRET")
if DEVICE == "cpu" and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"
triton = pytest.importorskip("triton", reason="triton is not installed")

from apt_hooks.method.ops import attention_alignment_triton as alignment  # noqa: E402
from apt_hooks.method.ops import channel_statistics_triton as statistics  # noqa: E402

if CHOSEN_BEFORE is None:  # no business of what other tests start
    os.environ.pop("TRITON_INTERPRET", None)

KERNELS_RUN = DEVICE == "cuda" or alignment.INTERPRETED
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BATCH, HEADS, SCALE = 2, 2, 0.2


@pytest.fixture(autouse=True)
def _only_where_kernels_run(request, monkeypatch):
    if alignment.INTERPRETED:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    elif not KERNELS_RUN and request.function not in (test_the_kernels_in_a_process_of_their_own, *WITHOUT_RUNNING):
        pytest.skip("triton was imported before its interpreter could be chosen: run in a process of their own")


def attention_inputs(dtype, channels=40, tokens=9, queries=19, spread=1.0, batch=BATCH, heads=HEADS):
    """q, k, q_frozen, k_frozen; those of the frozen model are `spread` times noise away from the others."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, length, heads * channels) for length in (queries, tokens, queries, tokens)]
    q, k, dq, dk = (torch.randn(shape, generator=generator) for shape in shapes)
    return [x.to(DEVICE, dtype) for x in (q, k, q + spread * dq, k + spread * dk)]


def some_tokens(tokens, batch=BATCH):
    mask = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(1)) < 0.7
    mask[:, 0] = True
    return mask.to(DEVICE)


def plain(inputs, dtype, mask=None, heads=HEADS):
    """Sum and gradients by autograd of the specification, computed in `dtype`; gradients rounded to the inputs' dtype
    unless that is the reference's float64."""
    q, k, q_frozen, k_frozen = (x.to(dtype) for x in inputs)
    q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
    loss = attention_alignment_loss(q, k, q_frozen, k_frozen, heads=heads, scale=SCALE, mask=mask)
    total = loss * (q.shape[0] * heads * q.shape[1])
    gradients = torch.autograd.grad(total, (q, k))
    kept = dtype if dtype == torch.float64 else inputs[0].dtype
    return [total.detach(), *(x.to(kept) for x in gradients)]


def fused(inputs, mask=None, heads=HEADS, **options):
    return alignment.sum_and_gradients(*inputs, heads=heads, scale=SCALE, mask=mask, **options)


def assert_no_less_accurate_than_eager(inputs, mask=None, heads=HEADS):
    wanted = plain(inputs, torch.float64, mask, heads)
    eager = plain(inputs, torch.float32, mask, heads)
    allowed = [eager_error_of_sum(inputs, mask, heads)]
    allowed += [relative_difference(x.double(), reference) for x, reference in zip(eager[1:], wanted[1:], strict=True)]
    for found, other, reference, bound in zip(fused(inputs, mask, heads), eager, wanted, allowed, strict=True):
        assert found.shape == reference.shape
        assert found.dtype == other.dtype
        # Float32's own rounding aside: its sums come in another order, by processor and library.
        assert relative_difference(found.double(), reference) <= 1.03 * bound + 16 * torch.finfo(torch.float32).eps


def eager_error_of_sum(inputs, mask, heads):
    """Of each query by itself, in absolute value: in the sum they cancel, on some processors nearly all of them."""
    queries = []
    for dtype in (torch.float32, torch.float64):
        q, k, q_frozen, k_frozen = (x.to(dtype) for x in inputs)
        tuned, frozen = attention_map(q, k, heads, SCALE, mask), attention_map(q_frozen, k_frozen, heads, SCALE, mask)
        queries.append((tuned - frozen).square().sum(dim=-1).double())
    found, wanted = queries
    return float((found - wanted).abs().sum() / wanted.sum()) if wanted.any() else 0.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("channels", "tokens", "queries", "masked"),
    [
        (40, 77, 19, False),
        (64, 9, 33, False),
        (64, 9, 33, True),
        (80, 154, 17, True),
        (64, 256, 5, False),
        (160, 77, 5, True),
        (64, 77, 1, False),
        (8, 1, 3, False),
    ],
)
def test_sum_and_gradients_are_no_less_accurate_than_eager(channels, tokens, queries, masked, dtype):
    inputs = attention_inputs(dtype, channels, tokens, queries)
    assert alignment.supports(*inputs[:2], HEADS)
    assert_no_less_accurate_than_eager(inputs, some_tokens(tokens) if masked else None)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_the_largest_k_of_16_bits(dtype):
    inputs = attention_inputs(dtype, channels=160, tokens=256, queries=5)
    assert alignment.supports(*inputs[:2], HEADS)
    assert_no_less_accurate_than_eager(inputs, some_tokens(256))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_small_differences_of_the_maps_keep_their_gradients(dtype):
    # So small that float16 would not hold the scores' gradient as it is.
    assert_no_less_accurate_than_eager(attention_inputs(dtype, tokens=77, queries=16, spread=0.005))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_queries_shared_by_several_programs_add_up(dtype, monkeypatch):
    monkeypatch.setattr(alignment, "FEWEST_QUERIES", 32)
    inputs = attention_inputs(dtype, channels=16, queries=70, batch=1)
    assert alignment._splits(HEADS, 70, 16) == (3, 2)
    assert_no_less_accurate_than_eager(inputs)


@pytest.mark.parametrize("block_q", [16, 32])
@pytest.mark.parametrize("rows", [1, 10, 80, 1000])
def test_every_query_has_one_program_and_no_program_is_without(rows, block_q):
    for queries in (1, 15, 16, 17, 64, 129, 300, 1024, 4096, 9216, 16385):
        splits, blocks_each = alignment._splits(rows, queries, block_q)
        assert (splits - 1) * blocks_each * block_q < queries <= splits * blocks_each * block_q
        assert splits == 1 or splits * rows <= 2 * alignment.PROGRAMS


def test_one_token_left_by_the_mask_is_all_of_both_maps():
    inputs = attention_inputs(torch.float32)
    mask = torch.zeros(BATCH, 9, dtype=torch.bool, device=DEVICE)
    mask[0, 3] = True  # and none at all in the other sample, where the specification's maps are even
    total, grad_q, grad_k = fused(inputs, mask)
    assert float(total) == 0.0
    assert not grad_q.any()
    assert not grad_k.any()


def test_a_masked_token_has_no_influence_at_all():
    q, k, q_frozen, k_frozen = attention_inputs(torch.float32)
    mask = some_tokens(9)
    wild = torch.where(mask[..., None], k, 1e4)
    found, with_wild = fused([q, k, q_frozen, k_frozen], mask), fused([q, wild, q_frozen, k_frozen], mask)
    assert not mask.all()
    assert float(found[0]) > 0
    for a, b in zip(found, with_wild, strict=True):
        assert torch.equal(a, b)


def test_strides_make_no_difference():
    inputs = attention_inputs(torch.float32)
    q, k, q_frozen, k_frozen = inputs
    columns = torch.cat([torch.full_like(q, 9.0), q, torch.full_like(q, 9.0)], dim=2).split(q.shape[2], dim=2)[1]
    tokens_first = k.transpose(0, 1).contiguous().transpose(0, 1)
    channels_first = q_frozen.transpose(1, 2).contiguous().transpose(1, 2)
    every_other = torch.stack([k_frozen, torch.full_like(k_frozen, 9.0)], dim=2).flatten(1, 2)[:, ::2]
    strided = [columns, tokens_first, channels_first, every_other]
    assert not any(x.is_contiguous() for x in strided)
    for found, wanted in zip(fused(strided), fused(inputs), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_runs_are_the_same_to_the_bit(dtype, monkeypatch):
    monkeypatch.setattr(alignment, "FEWEST_QUERIES", 32)
    inputs = attention_inputs(dtype, channels=16, queries=70, batch=1)
    for first, second in zip(fused(inputs), fused(inputs), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_models_have_a_sum_of_zero_and_no_gradient(dtype):
    q, k, *_ = attention_inputs(dtype)
    total, grad_q, grad_k = fused([q, k, q.clone(), k.clone()])
    assert float(total) == 0.0
    assert not grad_q.any()
    assert not grad_k.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_scores_give_numbers(dtype):
    inputs = [100 * x for x in attention_inputs(dtype)]
    found = fused(inputs, some_tokens(9))
    assert all(x.isfinite().all() for x in found)
    wanted = plain(inputs, torch.float64, some_tokens(9))
    assert float(wanted[0]) > BATCH * HEADS  # maps that are far apart
    assert float(found[0]) == pytest.approx(float(wanted[0]), rel=1e-3)


def test_without_gradients_the_sum_is_the_same_and_nothing_is_there_for_them(monkeypatch):
    inputs = attention_inputs(torch.float32)
    wanted = fused(inputs)[0]
    launched = []
    launch = alignment._launch

    def noted(kernel, grid, *arguments, **constants):
        launched.append((arguments, constants))
        launch(kernel, grid, *arguments, **constants)

    monkeypatch.setattr(alignment, "_launch", noted)
    total, grad_q, grad_k = fused(inputs, gradients=False)
    assert torch.equal(total, wanted)
    assert (grad_q, grad_k) == (None, None)
    ((arguments, constants),) = launched
    assert constants["GRADIENTS"] is False
    assert sum(isinstance(x, torch.Tensor) for x in arguments) == 5  # both models' q and k, and the partial sums


def test_nothing_of_it_is_in_a_graph():
    inputs = [x.requires_grad_() for x in attention_inputs(torch.float32)]
    assert not any(x.requires_grad for x in fused(inputs))


@pytest.mark.parametrize(
    ("dtype", "tokens", "channels", "wanted"),
    [
        (torch.float32, 128, 160, True),
        (torch.float32, 256, 80, True),
        (torch.float32, 129, 128, False),
        (torch.bfloat16, 1, 1, True),
        (torch.bfloat16, 256, 160, True),
        (torch.bfloat16, 128, 256, True),
        (torch.bfloat16, 256, 256, False),
        (torch.float16, 257, 64, False),
        (torch.float16, 77, 257, False),
        (torch.float64, 77, 64, False),
        (torch.float32, 0, 64, False),
    ],
)
def test_what_is_supported(dtype, tokens, channels, wanted):
    q, k = torch.empty(1, 4, 2 * channels, dtype=dtype), torch.empty(1, tokens, 2 * channels, dtype=dtype)
    assert alignment.supports(q, k, 2) is wanted
    assert not alignment.supports(q, k.double(), 2)


def rows(positions, channels, *, mean=0.0, deviation=1.0, batch=2):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(batch, positions, channels, generator=generator) * deviation + mean).to(DEVICE)


def as_map(h, height):
    """[batch, positions, channels] -> [batch, channels, height, width], in whatever strides."""
    return h.unflatten(1, (height, -1)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("positions", "channels"), [(1, 1), (35, 6), (131, 65), (700, 3), (3000, 5)], ids=lambda n: str(n)
)
def test_statistics_agree_with_float64(positions, channels, dtype):
    h = rows(positions, channels, mean=0.5).to(dtype)
    found = statistics.mean_and_deviation(h)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), representation_statistics(h.double()), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_statistics_of_a_feature_map_are_those_of_its_positions(memory_format, dtype):
    h = rows(35 * 41, 9).to(dtype)
    feature_map = as_map(h, 35).contiguous(memory_format=memory_format)
    found = statistics.mean_and_deviation(feature_map)
    torch.testing.assert_close(found.double(), representation_statistics(h.double()), rtol=2e-6, atol=1e-6)


def test_statistics_of_other_strides():
    h = rows(35, 12)
    wanted = representation_statistics(h[:, 1::2, ::3].double())
    torch.testing.assert_close(statistics.mean_and_deviation(h[:, 1::2, ::3]).double(), wanted, rtol=2e-6, atol=1e-6)
    sideways = as_map(h, 5).transpose(2, 3)
    wanted = representation_statistics(h.double())
    torch.testing.assert_close(statistics.mean_and_deviation(sideways).double(), wanted, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("layout", ["rows", "map"])
def test_a_small_deviation_beside_a_large_mean_keeps_its_digits(layout):
    h = rows(2000, 5, mean=1000.0, deviation=0.1)
    found = statistics.mean_and_deviation(h if layout == "rows" else as_map(h, 40).contiguous())
    mean, deviation = representation_statistics(h.double())
    assert float((found[0] - mean).abs().max()) <= 2**-14  # half a unit in the last place of 1000, and some more
    assert float((found[1] / deviation - 1).abs().max()) < 2e-6


@pytest.mark.parametrize("at", [0, 999, -1])
def test_a_position_far_from_the_others_costs_no_digits(at):
    h = rows(2000, 5)
    h[:, at] = 1e4
    wanted = representation_statistics(h.double())
    torch.testing.assert_close(statistics.mean_and_deviation(h).double(), wanted, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("value", [0.0, 3.3, -1e6])
def test_a_constant_channel_has_the_smallest_deviation(value):
    found = statistics.mean_and_deviation(torch.full((1, 300, 2), value, device=DEVICE))
    assert found[0].tolist() == [[pytest.approx(value, rel=1e-7)] * 2]
    assert found[1].tolist() == [[pytest.approx(1e-6, rel=1e-5)] * 2]


def test_two_runs_of_the_statistics_are_the_same_to_the_bit():
    h = rows(3000, 5)
    assert torch.equal(statistics.mean_and_deviation(h), statistics.mean_and_deviation(h))


# What of a kernel's partial results, [splits, batch, heads], a defect leaves out.
LOST = {"splits": (slice(1, None),), "samples": (slice(None), slice(1, None)), "heads": (..., slice(1, None))}


@pytest.fixture
def fresh_trials():
    for trial in (attention_alignment._trial, channel_statistics._trial):
        trial.cache_clear()
    yield
    for trial in (attention_alignment._trial, channel_statistics._trial):
        trial.cache_clear()


@pytest.mark.parametrize("lost", [None, *LOST])
def test_the_trial_notices_a_kernel_that_loses_all_but_the_first(lost, monkeypatch, fresh_trials):
    real = alignment._launch

    def launch(kernel, grid, *arguments, **constants):
        real(kernel, grid, *arguments, **constants)
        if lost is not None:
            arguments[5][LOST[lost]] = 0.0  # partial_sums: [splits, batch, heads]

    monkeypatch.setattr(alignment, "_launch", launch)
    found = attention_alignment._trial(torch.float16, 9, 16, torch.device(DEVICE))
    assert (found is None) == (lost is None)
    assert found is None or "the kernel's numbers are wrong here" in found


@pytest.mark.parametrize("ndim", [3, 4])
@pytest.mark.parametrize("lost", [None, "splits", "samples"])
def test_the_trial_of_the_statistics_notices_a_kernel_that_loses_all_but_the_first(
    ndim, lost, monkeypatch, fresh_trials
):
    real = statistics._launch

    def launch(kernel, grid, *arguments, **constants):
        real(kernel, grid, *arguments, **constants)
        if lost is not None and len(grid) == 3:
            arguments[1][(slice(None), *LOST[lost])] = 0.0  # partial: [2, splits, batch, channels]

    monkeypatch.setattr(statistics, "_launch", launch)
    found = channel_statistics._trial(torch.float32, ndim, torch.device(DEVICE))
    assert (found is None) == (lost is None)
    assert found is None or "the kernel's numbers are wrong here" in found


def own_process(_folder):
    if KERNELS_RUN:
        return None
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "not compiles",
        str(Path(__file__)),
    ]
    return command, os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}


@pytest.mark.skipif(KERNELS_RUN, reason="they run in this one")
@pytest.mark.ahead.with_args(own_process)
def test_the_kernels_in_a_process_of_their_own(ahead):
    assert ahead.returncode == 0, ahead.stdout + ahead.stderr
    assert int(re.search(r"(\d+) passed", ahead.stdout)[1]) > 50, ahead.stdout


COMPILE = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from apt_hooks.method.ops.attention_alignment_triton import _attention_alignment as kernel, block_sizes

blocks = block_sizes(77, 64, torch.bfloat16)
options = {name: blocks.pop(name) for name in ("num_warps", "num_stages")} | {"enable_fp_fusion": False}
constants = {"CHANNELS": 64, "GRADIENTS": True} | blocks
types = dict.fromkeys(("q", "k", "q_frozen", "k_frozen", "grad_q"), "*bf16") | {"mask": "*u8", "scale": "fp32"}
types |= dict.fromkeys(("partial_sums", "partial_grad_k"), "*fp32") | dict.fromkeys(constants, "constexpr")
signature = {name: types.get(name, "i32") for name in kernel.arg_names}
compiled = triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 80, 32), options=options)
assert compiled.asm["cubin"]
print("shared", compiled.metadata.shared)
"""


HAS_PTXAS = (Path(triton.__file__).parent / "backends/nvidia/bin/ptxas").exists()
COMPILES = HAS_PTXAS and tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 3)


def compilation(folder):
    if not COMPILES:
        return None
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return [sys.executable, "-c", COMPILE], environment | {"TRITON_CACHE_DIR": str(folder)}


@pytest.mark.skipif(not HAS_PTXAS, reason="this triton comes without ptxas")
@pytest.mark.skipif(HAS_PTXAS and not COMPILES, reason=f"triton {triton.__version__} compiles by another interface")
@pytest.mark.ahead.with_args(compilation)
def test_the_kernel_compiles_for_a_gpu_that_is_not_here(ahead):
    assert ahead.returncode == 0, ahead.stderr
    # What a block of a GeForce of compute capability 8.6 may have.
    assert int(re.search(r"shared (\d+)", ahead.stdout)[1]) <= 99 * 1024


# Tests that start no kernel in this process.
WITHOUT_RUNNING = (
    test_every_query_has_one_program_and_no_program_is_without,
    test_what_is_supported,
    test_the_kernel_compiles_for_a_gpu_that_is_not_here,
)
