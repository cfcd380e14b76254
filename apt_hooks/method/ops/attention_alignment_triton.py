"""The attention alignment and its gradients in one Triton kernel, which writes no attention map to memory."""

# mypy: allow-untyped-defs
# (Triton reads a kernel's annotations itself.)

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_TOKENS = 256
MOST_CHANNELS = 256
MOST_BYTES_OF_K = 96 * 1024
"""One head's k, its sides rounded up to the kernel's tile: more does not fit the shared memory of every GPU."""

PROGRAMS = 256
"""Programs to start at least, if there are queries enough: two for each multiprocessor of a large GPU."""

FEWEST_QUERIES = 128
"""Queries a program at least, which bounds the partial gradients by k: at 77 tokens they take about what q takes."""

LOWEST = tl.constexpr(torch.finfo(torch.float32).min)

# The scores' gradient is at most 4 in size. Times this it fits float16, and what float16 then drops of it is too small
# to show in a float16 gradient by q or k.
LIFT = tl.constexpr(8192.0)


def sum_and_gradients(
    q: Tensor,
    k: Tensor,
    q_frozen: Tensor,
    k_frozen: Tensor,
    *,
    heads: int,
    scale: float,
    mask: Tensor | None = None,
    gradients: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The sum behind `losses.attention_alignment_loss`, and its gradients, in one pass over the queries.

        sum over batch, heads, queries, tokens of (A - F)^2,  A = softmax(q k^T * scale),  F the frozen model's

    With D = A - F and S = 2 A (D - rowsum(A D)): the gradients are scale * S k by q, and scale * S^T q by k. Softmax
    and sums are float32 whatever the inputs' dtype, and bitwise the same from run to run.

    Args:
        q, q_frozen: [batch, queries, heads * channels]; what `supports` says.
        k, k_frozen: [batch, tokens, heads * channels].
        mask: [batch, tokens], bool, True where a token takes part; None lets all take part.
        gradients: whether to compute them.

    Returns:
        The sum (scalar, float32), and the gradients by `q` and by `k` in their dtypes, or None.
    """
    if INTERPRETED and q.dtype == torch.bfloat16:
        # Triton's interpreter multiplies bfloat16's bits as integers, and truncates to it.
        wide = (x.float() for x in (q, k, q_frozen, k_frozen))
        total, *found = sum_and_gradients(*wide, heads=heads, scale=scale, mask=mask, gradients=gradients)
        grad_q, grad_k = (None if x is None else x.to(q.dtype) for x in found)
        return total, grad_q, grad_k
    q, k, q_frozen, k_frozen = (_with_dense_rows(x) for x in (q, k, q_frozen, k_frozen))
    (batch, queries, width), tokens = q.shape, k.shape[1]
    blocks = block_sizes(tokens, width // heads, q.dtype)
    splits, blocks_each = _splits(batch * heads, queries, blocks["BLOCK_Q"])
    partial_sums = q.new_empty((splits, batch, heads), dtype=torch.float32)
    grad_q = q.new_empty(q.shape) if gradients else None
    partial_grad_k = q.new_empty((splits, *k.shape), dtype=torch.float32) if gradients else None
    _launch(
        _attention_alignment,
        (splits, heads, batch),
        *(q, k, q_frozen, k_frozen),
        None if mask is None else mask.contiguous().view(torch.uint8),
        *(partial_sums, grad_q, partial_grad_k),
        *(scale, queries, tokens, blocks_each),
        *(stride for x in (q, k, q_frozen, k_frozen) for stride in x.stride()[:2]),
        CHANNELS=width // heads,
        GRADIENTS=gradients,
        enable_fp_fusion=False,  # with it A - F is rounded but once, and not 0 where A = F
        **blocks,
    )
    grad_k = None if partial_grad_k is None else partial_grad_k.sum(dim=0).to(k.dtype)
    return partial_sums.sum(), grad_q, grad_k


def supports(q: Tensor, k: Tensor, heads: int) -> bool:
    """Whether `sum_and_gradients` does such q and k.

    It takes float32, bfloat16 and float16, up to 256 tokens, and head sizes up to 256 as far as one head's k is small
    enough: in 16 bits all up to 160 are, in float32 those up to 128 tokens, or of head sizes up to 80.
    """
    tokens, channels = k.shape[1], q.shape[2] // heads
    if q.dtype not in DTYPES or k.dtype != q.dtype or q.numel() == 0:
        return False
    if not (1 <= tokens <= MOST_TOKENS and 1 <= channels <= MOST_CHANNELS):
        return False
    blocks = block_sizes(tokens, channels, q.dtype)
    return blocks["BLOCK_T"] * (blocks["MAIN"] + blocks["REST"]) * q.element_size() <= MOST_BYTES_OF_K


def block_sizes(tokens: int, channels: int, dtype: torch.dtype) -> dict[str, int]:
    """The kernel's tiles and warps: by shape alone, since trying them out costs time and need not come out the same.

    A tile's sides are powers of two. Many channels are a main part and the rest: 160 is 128 + 32, where one tile would
    be 256. A program holds the gradient by k, all tokens by all channels, in registers: hence 8 warps, and few queries
    at a time.
    """
    block_t = max(16, triton.next_power_of_2(tokens))
    main = max(16, triton.next_power_of_2(channels) if channels <= 64 else triton.next_power_of_2(channels + 1) // 2)
    rest = max(16, triton.next_power_of_2(channels - main)) if channels > main else 0
    roomy = dtype != torch.float32 and block_t <= 128 and main + rest == 64
    return {
        "BLOCK_Q": 32 if roomy else 16,
        "BLOCK_T": block_t,
        "CHUNK": min(main, 32),
        "MAIN": main,
        "REST": rest,
        "num_warps": 4 if block_t <= 64 else 8,
        "num_stages": 1,
    }


def _splits(rows: int, queries: int, block_q: int) -> tuple[int, int]:
    """How many programs share the queries of one head of one sample, and how many blocks each goes through."""
    blocks = triton.cdiv(queries, block_q)
    blocks_each = min(blocks, max(triton.cdiv(FEWEST_QUERIES, block_q), triton.cdiv(blocks * rows, PROGRAMS)))
    return triton.cdiv(blocks, blocks_each), blocks_each


def _with_dense_rows(x: Tensor) -> Tensor:
    x = x.detach()
    return x if x.stride(-1) == 1 else x.contiguous()


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """The one place where this module starts a kernel; the first argument's device is where it runs."""
    with torch.cuda.device(arguments[0].device) if arguments[0].is_cuda else contextlib.nullcontext():
        kernel[grid](*arguments, **constants)


@triton.jit
def _attention_alignment(
    q,
    k,
    q_frozen,
    k_frozen,
    mask,
    partial_sums,
    grad_q,
    partial_grad_k,
    scale,
    queries,
    tokens,
    blocks_each,
    q_batch,
    q_row,
    k_batch,
    k_row,
    q_frozen_batch,
    q_frozen_row,
    k_frozen_batch,
    k_frozen_row,
    CHANNELS: tl.constexpr,
    GRADIENTS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_T: tl.constexpr,
    CHUNK: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
):
    """One head of one sample and `blocks_each` blocks of its queries."""
    split = tl.program_id(0)
    head = tl.program_id(1)
    sample = tl.program_id(2).to(tl.int64)
    width = tl.num_programs(1) * CHANNELS
    q += sample * q_batch + head * CHANNELS
    k += sample * k_batch + head * CHANNELS
    q_frozen += sample * q_frozen_batch + head * CHANNELS
    k_frozen += sample * k_frozen_batch + head * CHANNELS

    token = tl.arange(0, BLOCK_T)
    takes_part = token < tokens
    # A token out of the mask gets the lowest score, so that softmax is even where none is in it, as in the
    # specification; one beyond the last is no token at all.
    left_out = tl.where(takes_part, LOWEST, float("-inf"))
    if mask is not None:
        takes_part = takes_part & (tl.load(mask + sample * tokens + token, mask=takes_part, other=0) != 0)

    grad_k_main = tl.zeros([BLOCK_T, MAIN], tl.float32)
    if REST > 0:
        grad_k_rest = tl.zeros([BLOCK_T, REST], tl.float32)

    row = tl.arange(0, BLOCK_Q)
    row_sums = tl.zeros([BLOCK_Q], tl.float32)
    for block in range(blocks_each):
        start = (split * blocks_each + block) * BLOCK_Q
        left = queries - start  # below 1 where the last program's blocks go past the end: all of its rows are zeros
        here = q + start.to(tl.int64) * q_row
        frozen_here = q_frozen + start.to(tl.int64) * q_frozen_row
        scores = _scores(
            frozen_here, q_frozen_row, left, k_frozen, k_frozen_row, tokens, CHANNELS, BLOCK_Q, BLOCK_T, CHUNK
        )
        frozen = _softmax(scores, scale, takes_part, left_out)
        scores = _scores(here, q_row, left, k, k_row, tokens, CHANNELS, BLOCK_Q, BLOCK_T, CHUNK)
        tuned = _softmax(scores, scale, takes_part, left_out)
        # Rows past the end are zeros in both models: their maps are equal, and they add nothing anywhere.
        difference = tuned - frozen
        row_sums += tl.sum(difference * difference, axis=0)

        if GRADIENTS:
            along = tl.sum(tuned * difference, axis=0)
            high, low = _two_terms(tuned * (difference - along[None, :]) * (2 * LIFT), q.dtype.element_ty)
            grad_here = grad_q + (sample * queries + start) * width + head * CHANNELS
            k_main = _tile(k, token, tokens, k_row, 0, CHANNELS, MAIN)
            part = _gradient_by_q(k_main, high, low) * (scale / LIFT)
            _store(grad_here, tl.trans(part), row, left, width, 0, CHANNELS, MAIN)
            q_main = _tile(here, row, left, q_row, 0, CHANNELS, MAIN)
            grad_k_main = _gradient_by_k(high, low, q_main, grad_k_main)
            if REST > 0:
                k_rest = _tile(k, token, tokens, k_row, MAIN, CHANNELS, REST)
                part = _gradient_by_q(k_rest, high, low) * (scale / LIFT)
                _store(grad_here, tl.trans(part), row, left, width, MAIN, CHANNELS, REST)
                q_rest = _tile(here, row, left, q_row, MAIN, CHANNELS, REST)
                grad_k_rest = _gradient_by_k(high, low, q_rest, grad_k_rest)

    rows = split * tl.num_programs(2) + sample
    tl.store(partial_sums + rows * tl.num_programs(1) + head, tl.sum(row_sums, axis=0))
    if GRADIENTS:
        partial_grad_k += rows * tokens * width + head * CHANNELS
        _store(partial_grad_k, grad_k_main * (scale / LIFT), token, tokens, width, 0, CHANNELS, MAIN)
        if REST > 0:
            _store(partial_grad_k, grad_k_rest * (scale / LIFT), token, tokens, width, MAIN, CHANNELS, REST)


@triton.jit
def _scores(
    q,
    q_row,
    queries,
    k,
    k_row,
    tokens,
    CHANNELS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_T: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """[tokens, queries]: with the tokens on the side that warps share, each holds a part of k and of its gradient."""
    row = tl.arange(0, BLOCK_Q)
    token = tl.arange(0, BLOCK_T)
    scores = tl.zeros([BLOCK_T, BLOCK_Q], tl.float32)
    for first in tl.static_range(0, CHANNELS, CHUNK):
        q_part = _tile(q, row, queries, q_row, first, CHANNELS, CHUNK)
        # From cache, except for the program's first block: kept in registers, k leaves none for the rest.
        k_part = _tile(k, token, tokens, k_row, first, CHANNELS, CHUNK)
        scores = tl.dot(k_part, tl.trans(q_part), scores, input_precision="ieee")
    return scores


@triton.jit
def _softmax(scores, scale, takes_part, left_out):
    """Over the tokens of scores [tokens, queries]."""
    scores = tl.where(takes_part[:, None], scores * scale, left_out[:, None])
    weights = tl.exp(scores - tl.max(scores, axis=0)[None, :])
    return tl.div_rn(weights, tl.sum(weights, axis=0)[None, :])


# In the inputs' 16 bits alone, the scores' gradient would cost more accuracy than the rounding of the result. Its two
# terms hold 16 bits of it in bfloat16 and 22 in float16, and the other side is exact: two dots on tensor cores, where
# float32 takes three (tf32x3), each at half the speed and with twice the shared memory.
@triton.jit
def _two_terms(x, dtype: tl.constexpr):
    """float32 `x` as a sum, high + low, of two of `dtype`; for float32 itself high alone counts."""
    high = x
    low = x
    if dtype != tl.float32:
        high = x.to(dtype)
        low = (x - high.to(tl.float32)).to(dtype)
    return high, low


@triton.jit
def _gradient_by_q(k, high, low):
    """[channels, queries]"""
    across = tl.trans(k)
    total = tl.dot(across, high, input_precision="ieee")
    if k.dtype != tl.float32:
        total = tl.dot(across, low, total)
    return total


@triton.jit
def _gradient_by_k(high, low, q, total):
    """[tokens, channels], on top of `total`."""
    total = tl.dot(high, q, total, input_precision="ieee")
    if q.dtype != tl.float32:
        total = tl.dot(low, q, total)
    return total


@triton.jit
def _tile(at, rows, limit, row_stride, first, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr):
    channel = first + tl.arange(0, BLOCK_C)
    inside = (rows < limit)[:, None] & (channel < CHANNELS)[None, :]
    return tl.load(at + rows[:, None] * row_stride + channel[None, :], mask=inside, other=0.0)


@triton.jit
def _store(at, x, rows, limit, row_stride, first, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr):
    channel = first + tl.arange(0, BLOCK_C)
    inside = (rows < limit)[:, None] & (channel < CHANNELS)[None, :]
    tl.store(at + rows[:, None] * row_stride + channel[None, :], x, mask=inside)


INTERPRETED = not isinstance(_attention_alignment, triton.JITFunction)
