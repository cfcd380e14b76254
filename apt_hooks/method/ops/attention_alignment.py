"""The attention alignment and its gradient at once, without a whole attention map in memory."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .precision import full_precision
from .triton_choice import Impl, fault, takes_triton

CHUNK = 2**22
"""Numbers of a map that the eager way holds at a time (16 MiB in float32; five such pieces live at once)."""


def attention_map(q: Tensor, k: Tensor, heads: int, scale: float, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T * scale): [batch, heads, queries, tokens], in float32; arguments: `attention_alignment_loss`."""
    q, k = (full_precision(x).unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k))
    scores = (q * scale) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None, :], torch.finfo(scores.dtype).min)
    return scores.softmax(dim=-1)


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
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The sum behind `losses.attention_alignment_loss`, and its gradients.

        sum over batch, heads, queries, tokens of (A - F)^2,  A = softmax(q k^T * scale),  F the frozen model's

    With D = A - F and P = 2 A D: the scores' gradient is P - A sum(P), from which those by q and k follow. Computed in
    float32 (float64 if given that).

    Args:
        q, q_frozen: [batch, queries, heads * channels].
        k, k_frozen: [batch, tokens, heads * channels].
        mask: [batch, tokens], bool, True where a token takes part; None lets all take part.
        gradients: whether to compute them.
        impl: "eager" goes through the queries in chunks; "triton" is one kernel for CUDA; "auto" takes Triton's where
            it can (`choice.takes_triton`).

    Returns:
        The sum (scalar), and the gradients by `q` and by `k` in their dtypes, or None.

    Raises:
        AptError: `impl` is "triton", and it cannot be used.
    """
    trial = functools.partial(_trial, q.dtype, k.shape[1], q.shape[2] // heads)
    if takes_triton(impl, q.device, trial):
        from .attention_alignment_triton import sum_and_gradients as fused

        return fused(q, k, q_frozen, k_frozen, heads=heads, scale=scale, mask=mask, gradients=gradients)
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        return _eager(q, k, q_frozen, k_frozen, heads, scale, mask, gradients)


class AttentionAlignment(torch.autograd.Function):
    """`sum_and_gradients` as a function that autograd knows: its gradients are there before the backward pass."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, q_frozen: Tensor, k_frozen: Tensor, options: dict[str, Any]) -> Tensor:
        wanted = options.pop("differentiated") and any(ctx.needs_input_grad)
        total, *gradients = sum_and_gradients(q, k, q_frozen, k_frozen, gradients=wanted, **options)
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        # In full precision: the factor of a mean over many may be beyond float16.
        q, k = ((full_precision(x) * factor).to(x.dtype) for x in ctx.saved_tensors)
        return q, k, None, None, None


def _eager(
    q: Tensor,
    k: Tensor,
    q_frozen: Tensor,
    k_frozen: Tensor,
    heads: int,
    scale: float,
    mask: Tensor | None,
    gradients: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    keys, keys_frozen = _split(k, heads).mul(scale), _split(k_frozen, heads).mul(scale)
    twice = keys + keys
    total, grad_q, grad_k = keys.new_zeros(()), None, None
    if gradients:
        grad_q, grad_k = torch.empty_like(q), torch.zeros_like(keys)
        by_head = grad_q.unflatten(-1, (heads, -1)).transpose(1, 2)
    rows = max(1, CHUNK // max(1, keys[..., 0].numel()))
    for start in range(0, q.shape[1], rows):
        piece = slice(start, start + rows)
        queries = _split(q[:, piece], heads)
        tuned = _softmax(queries, keys, mask)
        difference = tuned - _softmax(_split(q_frozen[:, piece], heads), keys_frozen, mask)
        total += difference.square().sum()
        if grad_k is None:
            continue
        scores = difference.mul_(tuned)  # half of P; the other half is in `twice`
        scores.addcmul_(tuned, scores.sum(dim=-1, keepdim=True), value=-1)
        by_head[:, :, piece] = scores @ twice
        grad_k += scores.transpose(-1, -2) @ queries
    if grad_k is not None:
        grad_k = grad_k.mul_(2 * scale).transpose(1, 2).flatten(2).to(k.dtype)
    return total, grad_q, grad_k


def _softmax(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    scores = q @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill_(~mask[:, None, None, :], torch.finfo(scores.dtype).min)
    return scores.softmax(dim=-1)


def _split(x: Tensor, heads: int) -> Tensor:
    """[batch, n, heads * channels] -> [batch, heads, n, channels], in full precision."""
    return full_precision(x).unflatten(-1, (heads, -1)).transpose(1, 2)


@functools.cache
def _trial(dtype: torch.dtype, tokens: int, size: int, device: torch.device) -> str | None:
    """Why Triton's kernel cannot do heads of this size on this device; found out by having it do some."""
    from .attention_alignment_triton import sum_and_gradients as fused
    from .attention_alignment_triton import supports

    # Several samples, heads and splits, the last of them not full, as a U-Net has: a 1 among them would be compiled
    # differently, and what only a sum over splits shows would stay unseen.
    generator, scale, heads = torch.Generator().manual_seed(0), size**-0.5, 3
    shapes = [(2, length, heads * size) for length in (300, tokens, 300, tokens)]
    q, k, q_frozen, k_frozen = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    if not supports(q, k, heads):
        return f"its kernel does not do {tokens} tokens of head size {size} in {dtype}"
    with torch.autocast(device.type, enabled=False):
        wanted = _eager(q, k, q_frozen, k_frozen, heads, scale, None, True)
    return fault(lambda: fused(q, k, q_frozen, k_frozen, heads=heads, scale=scale), wanted)
