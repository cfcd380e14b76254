"""What the step benchmarks train: denoisers of published configurations, random weights, LoRA, and one batch."""

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
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CHECKPOINTING = ("off", "nonreentrant", "reentrant")


Random = Callable[..., Tensor]
"""Makes a tensor of random numbers of a size, on the denoiser's device and in its precision."""


@dataclasses.dataclass(frozen=True)
class Kind:
    """A class of denoisers in diffusers.

    Attributes:
        name: of the class.
        inputs: makes what it is called with beside the timestep, of a setting, its configuration and random numbers;
            the first is the noisy picture, which the prediction has the shape of.
        lora: its layers that carry a LoRA.
        timesteps: what it is told for the timestep 1000.
    """

    name: str
    inputs: Callable[[Setting, Any, Random], dict[str, Tensor]]
    lora: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    timesteps: float = 1000


@dataclasses.dataclass(frozen=True)
class Model:
    """A denoiser's configuration, as its class takes it, the size of picture that it is made for, and of a caption."""

    config: dict[str, Any]
    px: int
    kind: Kind
    tokens: int = 77


class Setting(NamedTuple):
    """What is trained; `px`: pixels of a picture's side, `tokens`: of the caption."""

    model: str
    px: int
    batch: int
    dtype: str
    checkpointing: str
    tokens: int


def _unet_inputs(setting: Setting, config: Any, random: Random) -> dict[str, Tensor]:
    px, batch = setting.px, setting.batch
    given: dict[str, Any] = {"sample": random(batch, 4, px // 8, px // 8)}
    given["encoder_hidden_states"] = random(batch, setting.tokens, config.cross_attention_dim)
    if config.addition_embed_type == "text_time":
        like = given["sample"]
        time_ids = torch.tensor([[px, px, 0, 0, px, px]] * batch).to(like.device, like.dtype)
        given["added_cond_kwargs"] = {"text_embeds": random(batch, 1280), "time_ids": time_ids}
    return given


def _flux_inputs(setting: Setting, config: Any, random: Random) -> dict[str, Tensor]:
    side, batch = setting.px // 16, setting.batch  # latents in patches of 2
    noisy = random(batch, side * side, config.in_channels)
    places = torch.cartesian_prod(torch.zeros(1), torch.arange(float(side)), torch.arange(float(side)))
    return {
        "hidden_states": noisy,
        "encoder_hidden_states": random(batch, setting.tokens, config.joint_attention_dim),
        "pooled_projections": random(batch, config.pooled_projection_dim),
        "img_ids": places.to(noisy.device, noisy.dtype),
        "txt_ids": torch.zeros(setting.tokens, 3).to(noisy.device, noisy.dtype),
        "guidance": torch.ones(batch).to(noisy.device, noisy.dtype),
    }


def _cosmos_inputs(setting: Setting, config: Any, random: Random) -> dict[str, Tensor]:
    side, batch = setting.px // 8, setting.batch
    noisy = random(batch, config.out_channels, 1, side, side)
    return {
        "hidden_states": noisy,
        "encoder_hidden_states": random(batch, setting.tokens, config.text_embed_dim),
        "condition_mask": torch.zeros_like(noisy[:, :1]),  # joined to the picture just as the padding mask is
    }


UNET = Kind("UNet2DConditionModel", _unet_inputs)
# As sd-scripts' networks.lora_flux trains them, less the feed-forward and modulation layers.
FLUX = Kind("FluxTransformer2DModel", _flux_inputs, timesteps=1, lora=(
    "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
))  # fmt: skip
COSMOS = Kind("CosmosTransformer3DModel", _cosmos_inputs, timesteps=1)


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


def _anima(**others: Any) -> dict[str, Any]:
    """Anima as sd-scripts builds it (`dit_config`), less the adapter of its text encoder.

    The last channel is the padding mask's, which diffusers would resize by torchvision.
    """
    return {
        "in_channels": 17,
        "num_attention_heads": 16,
        "rope_scale": (1.0, 4.0, 4.0),
        "concat_padding_mask": False,
        "extra_pos_embed_type": None,
        **others,
    }


# Of the published config.json: what differs from the class's defaults, which are those of SD 1.x and of FLUX.1.
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
        UNET,
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
        UNET,
    ),
    "sd15": Model({"cross_attention_dim": 768, "sample_size": 64}, 512, UNET),
    "flux": Model({"guidance_embeds": True}, 1024, FLUX, 512),
    "anima": Model(_anima(), 1024, COSMOS, 512),
    "reduced": Model(_sdxl(64), 256, UNET),  # for CPUs, as are those of true width and few blocks
    "flux-wide": Model({"guidance_embeds": True, "num_layers": 2, "num_single_layers": 2}, 256, FLUX, 128),
    "anima-wide": Model(_anima(num_layers=4), 256, COSMOS, 128),
    "tiny-flux": Model(  # for tests, as all that is tiny
        {
            "in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "pooled_projection_dim": 8,
            "axes_dims_rope": (4, 6, 6),
            "guidance_embeds": True,
        },
        64,
        FLUX,
        8,
    ),
    "tiny-anima": Model(
        _anima(
            in_channels=5,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=3,
            text_embed_dim=16,
            adaln_lora_dim=4,
        ),
        64,
        COSMOS,
        8,
    ),
    "tiny": Model(
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
        UNET,
    ),
}


def make_denoiser(setting: Setting, device: torch.device | str) -> Any:
    """The denoiser in training, frozen but for LoRA: its weights in `dtype`, the LoRA's in float32, as in sd-scripts.

    Raises:
        AptError: diffusers or peft is not installed.
    """
    try:
        import diffusers
        from peft import LoraConfig
    except ImportError as error:
        raise AptError(f"the step benchmarks need diffusers and peft (apt-hooks[diffusers]): {error}") from error
    model = MODELS[setting.model]
    torch.manual_seed(0)
    usual = torch.get_default_dtype()
    with torch.device(device):
        torch.set_default_dtype(DTYPES[setting.dtype])
        try:
            unet = getattr(diffusers, model.kind.name)(**model.config)
        finally:
            torch.set_default_dtype(usual)
        unet.requires_grad_(False)
        unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(model.kind.lora)))
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
    """A denoiser and the one batch that every step trains it on.

    Attributes:
        noisy: [batch, ...]. Under reentrant checkpointing it requires a gradient: a block none of whose inputs does is
            then left out of the graph, and its LoRA with it. It does so for all methods alike.
        target: of that shape.
        timesteps: [batch], whole numbers.
        inputs: what the denoiser is called with, `noisy` among it.
        autocast: its dtype, as trainers with mixed precision have it; None: none.
    """

    unet: nn.Module
    noisy: Tensor
    target: Tensor
    timesteps: Tensor
    inputs: dict[str, Any]
    autocast: torch.dtype | None

    def __post_init__(self) -> None:
        self._trained = [self.noisy, *(p for p in self.unet.parameters() if p.requires_grad)]

    @classmethod
    def make(cls, unet: Any, setting: Setting) -> Training:
        """Random inputs on the denoiser's device."""
        kind, dtype = MODELS[setting.model].kind, DTYPES[setting.dtype]
        device = next(unet.parameters()).device
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        inputs = kind.inputs(setting, unet.config, random)
        noisy = next(iter(inputs.values()))
        target = random(*noisy.shape).float()
        timesteps = torch.randint(1000, (setting.batch,), generator=generator).to(device)
        inputs["timestep"] = timesteps if kind.timesteps == 1000 else timesteps.to(dtype) * (kind.timesteps / 1000)
        noisy.requires_grad_(setting.checkpointing == "reentrant")
        return cls(unet, noisy, target, timesteps, inputs, None if dtype == torch.float32 else dtype)

    def predict(self, unet: Callable[..., Any] | None = None) -> Tensor:
        """The denoiser's answer, or a compiled one's, in float32: [batch, ...]."""
        device = self.noisy.device.type
        with contextlib.nullcontext() if self.autocast is None else torch.autocast(device, self.autocast):
            return (self.unet if unet is None else unet)(**self.inputs).sample.float()

    def per_sample_loss(self, prediction: Tensor) -> Tensor:
        """Mean squared error: [batch]."""
        return (prediction - self.target).square().flatten(1).mean(dim=1)

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
    parser.add_argument("--tokens", type=int, help="of the caption; without: what the model is made for")
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
