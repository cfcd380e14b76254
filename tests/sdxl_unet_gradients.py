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


def gradients(*, checkpointing: bool, reentrant: bool = True, terms: bool = True) -> dict[str, torch.Tensor]:
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
    config = AptConfig(lambda_dist=30.0 * terms, lambda_attn=1000.0 * terms)
    with AptObjective(config, unet, LoraSwitch([unet], "networks.lora").off) as apt:
        step = apt.step(lambda: unet(noisy, timesteps, text, vector), target, timesteps)
        step.loss((step.prediction - target).square().mean(dim=(1, 2, 3))).backward()
    return {name: parameter.grad for name, parameter in network.named_parameters()}


def norm(found: dict[str, torch.Tensor]) -> float:
    return float(torch.stack([g.norm() for g in found.values()]).norm())


exact = gradients(checkpointing=False)
differences = {
    name: max(float((other[k] - g).norm() / (g.norm() + 1e-12)) for k, g in exact.items())
    for name, other in {
        "reentrant": gradients(checkpointing=True, reentrant=True),
        "non_reentrant": gradients(checkpointing=True, reentrant=False),
    }.items()
}
without = gradients(checkpointing=False, terms=False)
print(json.dumps({**differences, "norm_with_terms": norm(exact), "norm_without_terms": norm(without)}))
