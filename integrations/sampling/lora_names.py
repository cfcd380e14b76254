"""Which module of a pipeline a LoRA's file means: by diffusers' names, of a U-Net also Stability's or older ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from .lora_files import PEFT_PREFIX

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")
PARTS = ("unet", "transformer", *TEXT_ENCODERS)
_PREFIXES = {
    "lora_unet_": ("unet", "transformer"),
    "lora_transformer_": ("transformer",),
    "lora_te_": ("text_encoder",),
    "lora_te1_": ("text_encoder",),
    "lora_te2_": ("text_encoder_2",),
    "lora_te3_": ("text_encoder_3", "text_encoder_2"),  # T5 to sd-scripts, whichever it is of the model
    "unet_": ("unet",),
    "transformer_": ("transformer",),
    **{f"{part}_": (part,) for part in reversed(TEXT_ENCODERS)},  # the shortest is the beginning of the others
}


class ModuleNames:
    """The modules of a pipeline by every name that a LoRA's file may have for them.

    kohya's names have `_` for each `.`, so all are looked up like that. What has no prefix is of the U-Net or the
    transformer where that has such a module, else of a text encoder.
    """

    def __init__(self, pipeline: Any) -> None:
        self.models: dict[str, nn.Module] = {p: m for p in PARTS if (m := getattr(pipeline, p, None)) is not None}
        self._paths: dict[str, dict[str, str]] = {part: _spellings(part, model) for part, model in self.models.items()}

    def find(self, name: str) -> list[tuple[str, nn.Module]]:
        """The modules that a name may mean, each with its path in the pipeline; more than one where only their sizes
        tell the text encoders' apart."""
        plain = name.removeprefix(PEFT_PREFIX).replace(".", "_").replace("_processor_", "_")
        prefix = next((prefix for prefix in _PREFIXES if plain.startswith(prefix)), "")
        part = next((part for part in _PREFIXES.get(prefix, ()) if part in self.models), None)
        found = self._places([part], plain.removeprefix(prefix)) if part else []
        # Without a prefix a module's own name may begin like one: `transformer_blocks`.
        return found if found or prefix.startswith("lora_") else self._places([*self.models], plain)

    def _places(self, parts: list[str], name: str) -> list[tuple[str, nn.Module]]:
        found = [(part, self._paths[part].get(name)) for part in parts]
        return [(f"{part}.{path}", self.models[part].get_submodule(path)) for part, path in found if path is not None]


def _spellings(part: str, model: nn.Module) -> dict[str, str]:
    """The paths of a model's linear layers and convolutions by their names, `.` replaced."""
    paths = [path for path, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    names: dict[str, str] = {}
    if part in TEXT_ENCODERS:
        spelled = _of_text_encoder(paths)
    else:
        spelled = _of_unet(model, paths) if part == "unet" else ((path, path) for path in paths)
    for name, path in spelled:
        names.setdefault(name.replace(".", "_"), path)
    return names


def _of_text_encoder(paths: list[str]) -> Iterator[tuple[str, str]]:
    """transformers 5 has left `text_model.` out of its names; LoRAs before peft called the projections otherwise."""
    for path in paths:
        bare = path.removeprefix("text_model.")
        for name in (path, bare, f"text_model.{bare}"):
            yield name, path
            for new, old in (("q_proj", "to_q"), ("k_proj", "to_k"), ("v_proj", "to_v"), ("out_proj", "to_out")):
                yield name.replace(f"self_attn.{new}", f"self_attn.{old}"), path


def _of_unet(unet: nn.Module, paths: list[str]) -> Iterator[tuple[str, str]]:
    blocks = list(_stability_blocks(unet))
    for path in paths:
        yield path, path
        yield path.replace("to_out.0", "to_out"), path  # before peft
        for ours, theirs in blocks:
            if path == ours or path.startswith(f"{ours}."):
                inside = path[len(ours) + 1 :]
                yield f"{theirs}.{_STABILITY_RESNET.get(inside, inside)}".removesuffix("."), path
    yield from ((theirs, ours) for theirs, ours in _STABILITY_ENDS.items() if ours in paths)


def _stability_blocks(unet: Any) -> Iterator[tuple[str, str]]:
    """diffusers' names, and for the same parts Stability's, which sd-scripts has for SDXL: one flat list of inputs, of
    which the first is the first convolution, and one of outputs, whose upsamplers stand behind what they follow."""
    for number, part in enumerate(("resnets.0", "attentions.0", "resnets.1")):
        yield f"mid_block.{part}", f"middle_block.{number}"
    for side, theirs, number in (("down", "input", 1), ("up", "output", 0)):
        for i, block in enumerate(getattr(unet, f"{side}_blocks")):
            for j in range(len(block.resnets)):
                yield f"{side}_blocks.{i}.resnets.{j}", f"{theirs}_blocks.{number}.0"
                yield f"{side}_blocks.{i}.attentions.{j}", f"{theirs}_blocks.{number}.1"
                number += 1
            if side == "down" and block.downsamplers is not None:
                yield f"down_blocks.{i}.downsamplers.0.conv", f"input_blocks.{number}.0.op"
                number += 1
            if side == "up" and block.upsamplers is not None:
                place = 2 if hasattr(block, "attentions") else 1
                yield f"up_blocks.{i}.upsamplers.0.conv", f"output_blocks.{number - 1}.{place}.conv"


_STABILITY_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_STABILITY_ENDS = {
    "input_blocks.0.0": "conv_in",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
