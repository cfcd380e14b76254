"""Run by the trainer's own interpreter: LoRA gradients of APT in sd-scripts' SDXL U-Net, checkpointed or not.

    python sdxl_unet_gradients.py SD_SCRIPTS_DIR

Prints the greatest relative difference of a LoRA matrix as JSON. The U-Net is the real one at a fifth of its width.
"""

from __future__ import annotations

import json
import sys

import torch

sys.path.insert(0, sys.argv[1])

import library.sdxl_original_unet as original
from networks import lora

from apt_hooks import AptConfig, AptObjective
from apt_hooks.integrations.sd_scripts.lora import LoraSwitch

original.MODEL_CHANNELS, original.TIME_EMBED_DIM = 64, 256


def gradients(
    *, checkpointing: bool, reentrant: bool = True, terms: bool = True, source: str = "self_attention"
) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    original.USE_REENTRANT = reentrant
    unet = original.SdxlUNet2DConditionModel()
    unet.requires_grad_(False)
    unet.set_use_sdpa(True)
    network = lora.LoRANetwork(torch.nn.Module(), unet, lora_dim=4, alpha=4)
    network.apply_to(torch.nn.Module(), unet, False, True)
    for name, parameter in network.named_parameters():
        if "lora_up" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    unet.train()
    if checkpointing:
        unet.enable_gradient_checkpointing()
    noisy, text = torch.randn(2, 4, 16, 16).requires_grad_(), torch.randn(2, 77, 2048).requires_grad_()
    vector, target, timesteps = torch.randn(2, 2816), torch.randn(2, 4, 16, 16), torch.tensor([10, 500])
    # Factors at which the regularizers dominate, so that a gradient of theirs that got lost could not hide.
    config = AptConfig(lambda_dist=30.0 * terms, lambda_attn=1000.0 * terms, representation_source=source)
    with AptObjective(config, unet, LoraSwitch([unet], "networks.lora").off) as apt:
        if source == "block":  # 16x16 latents stand for 128x128: the supplement's 32x32 and 64x64 are 4x4 and 8x8
            assert apt.capture is not None
            with torch.no_grad(), apt.capture.record() as features:
                unet(noisy, timesteps, text, vector)
            assert [tuple(h.shape[-2:]) for h in features.hidden.values()] == [(4, 4), (8, 8)]
        step = apt.step(lambda: unet(noisy, timesteps, text, vector), target, timesteps)
        step.loss((step.prediction - target).square().mean(dim=(1, 2, 3))).backward()
    return {name: parameter.grad for name, parameter in network.named_parameters()}


def norm(found: dict[str, torch.Tensor]) -> float:
    return float(torch.stack([g.norm() for g in found.values()]).norm())


differences = {"reentrant": 0.0, "non_reentrant": 0.0}
for source in ("block", "self_attention"):
    exact = gradients(checkpointing=False, source=source)
    for name in differences:
        found = gradients(checkpointing=True, reentrant=name == "reentrant", source=source)
        worst = max(float((found[k] - g).norm() / (g.norm() + 1e-12)) for k, g in exact.items())
        differences[name] = max(differences[name], worst)
without = gradients(checkpointing=False, terms=False)
print(json.dumps({**differences, "norm_with_terms": norm(exact), "norm_without_terms": norm(without)}))
