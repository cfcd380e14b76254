"""CLIP and DINOv2 models of random weights, a few channels wide, and LoRAs of random weights for the tiny world."""

from __future__ import annotations

from pathlib import Path

import torch

from apt_hooks.tinyworld.lora_file import save_lora
from apt_hooks.tinyworld.model import PIPELINES, TOKENS, denoiser_and_module, load_pipeline, new_tokenizer
from apt_hooks.tinyworld.personalize import lora

_SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def save_clip(folder: Path, seed: int = 0) -> Path:
    """With the tiny world's tokenizer."""
    from transformers import CLIPConfig, CLIPModel

    tokenizer = new_tokenizer()
    numbers = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    small = {**_SMALL, "intermediate_size": 32}
    text = {**small, "vocab_size": len(tokenizer), "max_position_embeddings": TOKENS, **numbers}
    vision = {**small, "image_size": 32, "patch_size": 8}
    torch.manual_seed(seed)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_dino(folder: Path) -> Path:
    """Its weights are large, so that the class token is not the same for all pictures."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(**_SMALL, image_size=56, patch_size=14, initializer_range=0.3)).save_pretrained(folder)
    return folder


def save_loras(folder: Path, names: tuple[str, ...], model: str = "unet") -> list[Path]:
    """Each moves the tiny world's model, of `PIPELINES`, further than the one before."""
    pipeline, paths = load_pipeline(PIPELINES[model]), [folder / f"{name}.safetensors" for name in names]
    for seed, path in enumerate(paths):
        with lora(pipeline, 4, seed):
            generator = torch.Generator().manual_seed(seed)
            for key, parameter in denoiser_and_module(pipeline)[1].named_parameters():
                if "lora_B" in key:
                    parameter.data = 0.2 * (seed + 1) * torch.randn(parameter.shape, generator=generator)
            save_lora(pipeline, path)
    return paths
