"""Small stand-ins for what the library meets: both U-Net layouts, and kohya-style LoRA on their attention layers."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

WIDTH, HEADS, TEXT_WIDTH, TOKENS, LATENTS, DIFFUSERS_SIZE = 32, 2, 24, 5, 4, 8

torch.set_num_threads(1)  # tensors this small are not worth a second thread's waiting

Checkpointing = Literal["off", "reentrant", "non_reentrant"]


class TinyAttention(nn.Module):
    """Attention with the parts the trainers' layers have: to_q, to_k, to_v, to_out, heads, scale."""

    def __init__(self, context_width: int = WIDTH) -> None:
        super().__init__()
        self.heads, self.scale = HEADS, (WIDTH // HEADS) ** -0.5
        self.to_q = nn.Linear(WIDTH, WIDTH, bias=False)
        self.to_k = nn.Linear(context_width, WIDTH, bias=False)
        self.to_v = nn.Linear(context_width, WIDTH, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(WIDTH, WIDTH)])

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = (
            projected.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projected in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        mixed = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return self.to_out[0](mixed.transpose(1, 2).flatten(-2))


class TinyTransformer(nn.Module):
    """Self-attention, cross-attention and a linear layer over the positions of a feature map."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn1 = nn.LayerNorm(WIDTH), TinyAttention()
        self.norm2, self.attn2 = nn.LayerNorm(WIDTH), TinyAttention(TEXT_WIDTH)
        self.norm3, self.feed_forward = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        rows = x.flatten(2).transpose(1, 2)
        rows = rows + self.attn1(self.norm1(rows))
        rows = rows + self.attn2(self.norm2(rows), context)
        rows = rows + self.feed_forward(self.norm3(rows))
        return rows.transpose(1, 2).unflatten(-1, x.shape[-2:])


class TinyResnet(nn.Module):
    def __init__(self, width_in: int = WIDTH) -> None:
        super().__init__()
        self.shortcut = nn.Conv2d(width_in, WIDTH, 1)
        self.conv, self.time = nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        x = self.shortcut(x)
        return x + self.conv(F.silu(x + self.time(emb)[:, :, None, None]))


class UpsampleTwice(nn.Module):
    """Its class name is what ends a level in Stability's layout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0))


def time_embedding(timesteps: Tensor, like: Tensor) -> Tensor:
    """Sines and cosines: [batch, WIDTH]."""
    frequencies = torch.exp(torch.linspace(0.0, -6.0, WIDTH // 2, device=timesteps.device))
    angles = timesteps[:, None].float() * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1).to(like)


class TinyUpBlock(nn.Module):
    """One level of diffusers' layout; it is called, and does all of the level."""

    def __init__(self, attention: bool, upsample: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([TinyResnet(2 * WIDTH)])
        self.attentions = nn.ModuleList([TinyTransformer()] if attention else [])
        self.upsamplers = nn.ModuleList([UpsampleTwice()] if upsample else [])

    def forward(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        for module in (*self.resnets, *self.attentions, *self.upsamplers):
            x = module(x, emb, context)
        return x


class TinyUpBlocksUNet(nn.Module):
    """diffusers' layout: `up_blocks` of called blocks, the first without attention; whole blocks are checkpointed."""

    attention_blocks = (1, 2, 3)
    size = 16

    def __init__(self, checkpointing: Checkpointing = "off") -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.conv_in, self.mid_block = nn.Conv2d(LATENTS, WIDTH, 3, padding=1), TinyTransformer()
        self.up_blocks = nn.ModuleList([TinyUpBlock(attention=i > 0, upsample=i < 3) for i in range(4)])
        self.conv_out = nn.Conv2d(WIDTH, LATENTS, 3, padding=1)

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        emb, full = time_embedding(timesteps, x), self.conv_in(x)
        x = self.mid_block(F.avg_pool2d(full, 8), emb, context)
        for block in self.up_blocks:
            x = torch.cat([x, F.adaptive_avg_pool2d(full, x.shape[-2:])], dim=1)
            x = _run(block, self.checkpointing if torch.is_grad_enabled() else "off", x, emb, context)
        return self.conv_out(x)


class TinyOutputBlocksUNet(nn.Module):
    """Stability's layout: flat lists of lists that are never called; every module in them checkpoints its own body."""

    attention_blocks = (0, 1)
    size = 8

    def __init__(self, gradient_checkpointing: bool = False, use_reentrant: bool = True) -> None:
        super().__init__()
        self.input_blocks = nn.ModuleList(
            [
                nn.ModuleList([_CheckpointedResnet(LATENTS)]),
                nn.ModuleList([_CheckpointedResnet(), _CheckpointedTransformer()]),
                nn.ModuleList([_CheckpointedResnet(), _CheckpointedTransformer()]),
            ]
        )
        self.middle_block = nn.ModuleList([_CheckpointedResnet(), _CheckpointedTransformer()])
        self.output_blocks = nn.ModuleList(
            [
                nn.ModuleList([_CheckpointedResnet(2 * WIDTH), _CheckpointedTransformer()]),
                nn.ModuleList([_CheckpointedResnet(), _CheckpointedTransformer(), UpsampleChecked()]),
                nn.ModuleList([_CheckpointedResnet(2 * WIDTH), _CheckpointedTransformer(), UpsampleChecked()]),
                nn.ModuleList([_CheckpointedResnet(2 * WIDTH)]),
                nn.ModuleList([_CheckpointedResnet()]),
            ]
        )
        self.out = nn.Conv2d(WIDTH, LATENTS, 3, padding=1)
        for module in self.modules():
            if isinstance(module, _ChecksItself):
                module.mode = ("reentrant" if use_reentrant else "non_reentrant") if gradient_checkpointing else "off"

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        emb, skips = time_embedding(timesteps, x), []
        for level, modules in enumerate(self.input_blocks):
            x = F.avg_pool2d(x, 2) if level else x
            for module in modules:
                x = module(x, emb, context)
            skips.append(x)
        for module in self.middle_block:
            x = module(x, emb, context)
        for modules in self.output_blocks:
            if modules[0].body.shortcut.in_channels == 2 * WIDTH:
                x = torch.cat([x, skips.pop()], dim=1)
            for module in modules:
                x = module(x, emb, context)
        return self.out(x)


class _ChecksItself(nn.Module):
    """The module is called outside of checkpointing, its body inside."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.mode: Checkpointing = "off"

    def forward(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        return _run(self.body, self.mode if self.training else "off", x, emb, context)


class _CheckpointedResnet(_ChecksItself):
    def __init__(self, width_in: int = WIDTH) -> None:
        super().__init__(TinyResnet(width_in))


class _CheckpointedTransformer(_ChecksItself):
    def __init__(self) -> None:
        super().__init__(TinyTransformer())


class UpsampleChecked(_ChecksItself):
    def __init__(self) -> None:
        super().__init__(UpsampleTwice())


def _run(module: nn.Module, mode: Checkpointing, *args: Tensor) -> Tensor:
    if mode == "off":
        return module(*args)
    return checkpoint(module, *args, use_reentrant=mode == "reentrant")


class KohyaLoRA(nn.Module):
    """Replaces `layer.forward` on the instance and keeps the old one; not a submodule of the U-Net."""

    def __init__(self, layer: nn.Linear, rank: int, dropout: float) -> None:
        super().__init__()
        self.lora_down = nn.Linear(layer.in_features, rank, bias=False)
        self.lora_up = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.normal_(self.lora_up.weight, std=0.3)  # trained already, so that the tuned model differs from the base
        self.dropout, self.multiplier, self.scale = dropout, 1.0, 1.0
        self.org_forward = layer.forward
        layer.forward = self.forward

    def forward(self, x: Tensor) -> Tensor:
        low = F.dropout(self.lora_down(x), self.dropout, self.training)
        return self.org_forward(x) + self.multiplier * self.scale * self.lora_up(low)


class LoRANetwork(nn.Module):
    """A `KohyaLoRA` on every attention projection of a U-Net, whose own weights are frozen."""

    def __init__(self, unet: nn.Module, rank: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        unet.requires_grad_(False)
        wanted = ("to_q", "to_k", "to_v", "to_out.0")
        # A plain list: the base layers are no submodules of the network.
        self.layers = [layer for name, layer in unet.named_modules() if name.endswith(wanted)]
        self.loras = nn.ModuleList([KohyaLoRA(layer, rank, dropout) for layer in self.layers])

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """The base layers alone: no LoRA computed, no dropout drawn."""
        try:
            for layer, lora in zip(self.layers, self.loras, strict=True):
                layer.forward = lora.org_forward
            yield
        finally:
            for layer, lora in zip(self.layers, self.loras, strict=True):
                layer.forward = lora.forward

    @contextlib.contextmanager
    def muted(self) -> Iterator[None]:
        """Multiplier 0: the base model's output too, but LoRA is computed and dropout drawn."""
        try:
            for lora in self.loras:
                lora.multiplier = 0.0
            yield
        finally:
            for lora in self.loras:
                lora.multiplier = 1.0

    def gradient(self) -> Tensor:
        """All gradients as one vector; a parameter without one counts as zeros."""
        gradients = (torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters())
        return torch.cat([gradient.flatten() for gradient in gradients])


LAYOUTS = ("up_blocks", "output_blocks")


def make_unet(layout: str, checkpointing: Checkpointing = "off", seed: int = 0) -> nn.Module:
    """A stand-in in training mode; the same weights for the same seed, whatever the checkpointing."""
    torch.manual_seed(seed)
    if layout == "up_blocks":
        return TinyUpBlocksUNet(checkpointing)
    return TinyOutputBlocksUNet(checkpointing != "off", use_reentrant=checkpointing == "reentrant")


def make_tuned(
    layout: str, checkpointing: Checkpointing = "off", *, dropout: float = 0.0
) -> tuple[nn.Module, LoRANetwork]:
    """A stand-in with LoRA."""
    unet = make_unet(layout, checkpointing)
    torch.manual_seed(1)
    return unet, LoRANetwork(unet, dropout=dropout)


def make_diffusers_unet() -> nn.Module:
    """A real U-Net of diffusers, tiny, attention in up-blocks 1 and 2; skips the test where diffusers is missing."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=DIFFUSERS_SIZE,
        block_out_channels=(WIDTH, WIDTH, WIDTH),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=HEADS,
        norm_num_groups=8,
    )
    unet.size = DIFFUSERS_SIZE
    return unet.requires_grad_(False)


def make_batch(unet: nn.Module, batch: int = 2, seed: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x, timesteps, context, target); `x` requires a gradient, as reentrant checkpointing needs."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, LATENTS, unet.size, unet.size)
    x, target = (torch.randn(shape, generator=generator) for _ in range(2))
    context = torch.randn((batch, TOKENS, TEXT_WIDTH), generator=generator)
    timesteps = torch.randint(0, 1000, (batch,), generator=generator)
    return x.requires_grad_(), timesteps, context, target


def relative_difference(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| / |wanted|, as vectors; infinite where `wanted` is zero and `found` is not."""
    distance, size = float((found - wanted).norm()), float(wanted.norm())
    if size == 0.0:
        return 0.0 if distance == 0.0 else math.inf
    return distance / size
