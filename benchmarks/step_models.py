"""What the step benchmarks train: U-Nets with their published configurations, random weights, LoRA, and one batch."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from apt_hooks.errors import AptError
from apt_hooks.integrations.peft import adapters_off

RANK = 16
LORA_LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CHECKPOINTING = ("off", "nonreentrant", "reentrant")


@dataclasses.dataclass(frozen=True)
class Model:
    """A U-Net's configuration, as `UNet2DConditionModel` takes it, and the size of picture it is made for."""

    config: dict[str, Any]
    px: int


def _sdxl(width: int, **others: Any) -> dict[str, Any]:
    return {
        "block_out_channels": (width, 2 * width, 4 * width),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (width // 64, 2 * width // 64, 4 * width // 64),  # number of heads, despite its name
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        **others,
    }


# Of the published config.json: what differs from the class's defaults, which are those of SD 1.x.
MODELS = {
    "sdxl": Model(
        _sdxl(
            320,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
            sample_size=128,
        ),
        1024,
    ),
    "sd21": Model(
        {
            "attention_head_dim": (5, 10, 20, 20),
            "cross_attention_dim": 1024,
            "use_linear_projection": True,
            "upcast_attention": True,
            "sample_size": 96,
        },
        768,
    ),
    "sd15": Model({"cross_attention_dim": 768, "sample_size": 64}, 512),
    "reduced": Model(_sdxl(64), 256),  # for CPUs
    "tiny": Model(  # for tests
        {
            "block_out_channels": (32, 64),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "layers_per_block": 1,
            "attention_head_dim": (1, 2),
            "cross_attention_dim": 64,
            "use_linear_projection": True,
        },
        64,
    ),
}


class Setting(NamedTuple):
    """What is trained; `px`: pixels of a picture's side, `tokens`: of the caption."""

    model: str
    px: int
    batch: int
    dtype: str
    checkpointing: str
    tokens: int


def make_unet(setting: Setting, device: torch.device | str) -> Any:
    """The U-Net in training, frozen but for LoRA: its weights in `dtype`, the LoRA's in float32 as sd-scripts has them.

    Raises:
        AptError: diffusers or peft is not installed.
    """
    try:
        from diffusers import UNet2DConditionModel
        from peft import LoraConfig
    except ImportError as error:
        raise AptError(f"the step benchmarks need diffusers and peft (apt-hooks[diffusers]): {error}") from error
    torch.manual_seed(0)
    usual = torch.get_default_dtype()
    with torch.device(device):
        torch.set_default_dtype(DTYPES[setting.dtype])
        try:
            unet = UNet2DConditionModel(**MODELS[setting.model].config)
        finally:
            torch.set_default_dtype(usual)
        unet.requires_grad_(False)
        unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LORA_LAYERS))
    for name, parameter in unet.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
        if "lora_B" in name:
            # It begins at zero, where both models are one and the regularizers have no gradient.
            nn.init.normal_(parameter, std=0.02)
    set_checkpointing(unet, setting.checkpointing)
    return unet.train()


def set_checkpointing(unet: Any, checkpointing: str) -> None:
    """diffusers' own is non-reentrant; trainers that call `checkpoint` with `use_reentrant=True` are common."""
    unet.disable_gradient_checkpointing()
    if checkpointing == "nonreentrant":
        unet.enable_gradient_checkpointing()
    elif checkpointing == "reentrant":
        unet.enable_gradient_checkpointing(functools.partial(checkpoint, use_reentrant=True))


@dataclasses.dataclass
class Training:
    """A U-Net and the one batch that every step trains it on.

    Attributes:
        noisy: [batch, 4, px / 8, px / 8]. Under reentrant checkpointing it requires a gradient: a block none of whose
            inputs does is then left out of the graph, and its LoRA with it. It does so for all methods alike.
        target: [batch, 4, px / 8, px / 8].
        timesteps: [batch], whole numbers.
        conditions: what else the U-Net is called with.
        autocast: its dtype, as trainers with mixed precision have it; None: none.
    """

    unet: nn.Module
    noisy: Tensor
    target: Tensor
    timesteps: Tensor
    conditions: dict[str, Any]
    autocast: torch.dtype | None

    def __post_init__(self) -> None:
        self._trained = [self.noisy, *(p for p in self.unet.parameters() if p.requires_grad)]

    @classmethod
    def make(cls, unet: Any, setting: Setting) -> Training:
        """Random inputs on the U-Net's device; latents have an eighth of the picture's side."""
        px, batch, tokens, dtype = setting.px, setting.batch, setting.tokens, DTYPES[setting.dtype]
        device = next(unet.parameters()).device
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        noisy, target = random(batch, 4, px // 8, px // 8), random(batch, 4, px // 8, px // 8).float()
        conditions: dict[str, Any] = {"encoder_hidden_states": random(batch, tokens, unet.config.cross_attention_dim)}
        if unet.config.addition_embed_type == "text_time":
            time_ids = torch.tensor([[px, px, 0, 0, px, px]] * batch).to(device, dtype)
            conditions["added_cond_kwargs"] = {"text_embeds": random(batch, 1280), "time_ids": time_ids}
        timesteps = torch.randint(1000, (batch,), generator=generator).to(device)
        noisy.requires_grad_(setting.checkpointing == "reentrant")
        return cls(unet, noisy, target, timesteps, conditions, None if dtype == torch.float32 else dtype)

    def predict(self, unet: Callable[..., Any] | None = None) -> Tensor:
        """The U-Net's answer, or a compiled one's, in float32: [batch, 4, px / 8, px / 8]."""
        device = self.noisy.device.type
        with contextlib.nullcontext() if self.autocast is None else torch.autocast(device, self.autocast):
            return (self.unet if unet is None else unet)(self.noisy, self.timesteps, **self.conditions).sample.float()

    def per_sample_loss(self, prediction: Tensor) -> Tensor:
        """Mean squared error: [batch]."""
        return (prediction - self.target).square().mean(dim=(1, 2, 3))

    def adapters_off(self) -> contextlib.AbstractContextManager[None]:
        return adapters_off(self.unet)

    def drop_gradients(self) -> None:
        for tensor in self._trained:
            tensor.grad = None


def add_options(parser: argparse.ArgumentParser, *, several: bool) -> None:
    """The options that say what is trained; `several`: lists, separated by commas, of which every combination runs."""
    kind = names if several else str
    listed = ", separated by commas" if several else ""
    numbers = whole_numbers if several else int
    parser.add_argument("--model", type=kind, help=f"{', '.join(MODELS)}{listed}")
    parser.add_argument("--px", type=numbers, help=f"pixels of a side{listed}; without: what the model is made for")
    parser.add_argument("--batch", type=numbers)
    parser.add_argument("--tokens", type=int, default=77, help="of the caption")
    parser.add_argument("--dtype", choices=list(DTYPES), help="but float32: U-Net and autocast in it, LoRA in float32")
    parser.add_argument("--checkpointing", type=kind, help=f"{', '.join(CHECKPOINTING)}{listed}")
    parser.add_argument("--methods", type=names, help="separated by commas")
    parser.add_argument(
        "--extra",
        action="append",
        default=[],
        metavar="'KEY=VALUE ...'",
        help="one more method: APT with these keys of [apt], as TOML; may be given again",
    )


def names(text: str) -> list[str]:
    return list(dict.fromkeys(text.split(",")))


def whole_numbers(text: str) -> list[int]:
    return [int(part) for part in names(text)]


def check_choice(option: str, value: str, known: Any) -> None:
    """Raises AptError unless `value` is one of `known`."""
    if value not in known:
        raise AptError(f"--{option} takes {', '.join(known)}; found {value!r}")


def check_size(option: str, value: int, multiple: int = 1) -> None:
    """Raises AptError unless `value` is a multiple, above 0, of `multiple`."""
    if value < 1 or value % multiple:
        rule = "at least 1" if multiple == 1 else f"a multiple of {multiple}, above 0"
        raise AptError(f"--{option} must be {rule}; found {value}")
