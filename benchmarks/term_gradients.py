"""How large each term's gradient is, in a real sd-scripts run: what the presets' lambdas are chosen by.

    python benchmarks/term_gradients.py SD_SCRIPTS/train_network.py --config_file train.toml

Runs the patched script with its own arguments, in the trainer's environment. Every step prints the norms over all LoRA
parameters of the gradient of the diffusion loss (`loss`), of the same weighted by 1 - gamma (`weighted`), and of both
regularizers without their lambdas (`representation`, `attention`); at the end the greatest ratios to `loss`. The terms
are differentiated apart, so gradient checkpointing has to be off.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apt_hooks.integrations.sd_scripts.trainer import AptTrainer
from apt_hooks.objective import AptObjective

rows: list[dict[str, float]] = []
seen: dict[str, Any] = {}
terms_of, process_batch, post_process_loss = (
    AptObjective._terms,
    AptTrainer.process_batch,
    AptTrainer.post_process_loss,
)


def remember_terms(self: AptObjective, *args: Any) -> dict[str, Tensor]:
    seen["terms"] = terms_of(self, *args)
    return seen["terms"]


def remember_network(
    self: AptTrainer, batch: Any, text_encoders: Any, unet: Any, network: Any, *rest: Any, **more: Any
):
    seen["parameters"] = [p for p in network.parameters() if p.requires_grad]
    return process_batch(self, batch, text_encoders, unet, network, *rest, **more)


def measure(self: AptTrainer, loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if self._batch is not None and seen["terms"]:
        own = super(AptTrainer, self).post_process_loss(loss, *args, **kwargs)
        terms = seen["terms"]
        losses = {
            "loss": own.mean(),
            "weighted": (own * self._batch.step.weight).mean(),
            "representation": terms["l_mu"] + terms["l_sigma"],
            "attention": terms["l_attn"],
        }
        rows.append({name: norm(value) for name, value in losses.items()})
        print(json.dumps({"step": len(rows), **rows[-1]}), flush=True)
    return post_process_loss(self, loss, *args, **kwargs)


def norm(loss: Tensor) -> float:
    found = torch.autograd.grad(loss, seen["parameters"], retain_graph=True, allow_unused=True)
    return float(torch.stack([g.float().norm() for g in found if g is not None]).norm())


if __name__ == "__main__":
    script = Path(sys.argv[1]).resolve()
    sys.argv, sys.path[0] = sys.argv[1:], str(script.parent)
    AptObjective._terms, AptTrainer.process_batch = remember_terms, remember_network
    AptTrainer.post_process_loss = measure
    runpy.run_path(str(script), run_name="__main__")
    for name in ("weighted", "representation", "attention"):
        print(f"{name}: at most {max(row[name] / row['loss'] for row in rows):.3g} of the loss's, {len(rows)} steps")
