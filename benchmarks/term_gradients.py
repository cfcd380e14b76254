"""How large each term's gradient is: what the presets' lambdas are chosen by.

    python benchmarks/term_gradients.py SD_SCRIPTS/train_network.py --config_file train.toml
    python benchmarks/term_gradients.py tinyworld [CONCEPT]

The first runs the patched script with its own arguments, in the trainer's environment; the second APT in the tiny
world. Every step prints the norms over all LoRA parameters of the gradient of the diffusion loss (`loss`), of the same
weighted by 1 - gamma (`weighted`), and of both regularizers without their lambdas (`representation`, `attention`); at
the end the medians and the greatest ratios to `loss`. The terms are differentiated apart, so gradient checkpointing has
to be off.
"""

from __future__ import annotations

import functools
import json
import runpy
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apt_hooks.training.passes import Passes
from apt_hooks.training.step import AptStep

rows: list[dict[str, float]] = []
seen: dict[str, Any] = {}


def main() -> None:
    Passes.end_tuned = functools.partialmethod(remember_terms, Passes.end_tuned)
    if sys.argv[1] == "tinyworld":
        run_tiny_world(int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    else:
        run_sd_scripts(Path(sys.argv[1]).resolve())
    for name in ("weighted", "representation", "attention"):
        ratios = [row[name] / row["loss"] for row in rows]
        shares = f"median {statistics.median(ratios):.3g}, at most {max(ratios):.3g}"
        print(f"{name}: {shares} of the loss's, {len(rows)} steps")


def remember_terms(self: Passes, end_tuned: Any, *args: Any) -> Any:
    prediction = end_tuned(self, *args)
    seen["terms"] = self.terms
    return prediction


def measure(losses: Tensor, weight: Tensor) -> None:
    """Print the norms of this step's gradients; `losses` and `weight` are of the samples."""
    terms = seen["terms"]
    parts = {
        "loss": losses.mean(),
        "weighted": (losses * weight).mean(),
        "representation": terms["l_mu"] + terms["l_sigma"],
        "attention": terms["l_attn"],
    }
    rows.append({name: norm(value) for name, value in parts.items()})
    print(json.dumps({"step": len(rows), **rows[-1]}), flush=True)


def norm(loss: Tensor) -> float:
    found = torch.autograd.grad(loss, seen["parameters"], retain_graph=True, allow_unused=True)
    return float(torch.stack([g.float().norm() for g in found if g is not None]).norm())


def run_sd_scripts(script: Path) -> None:
    from apt_hooks.integrations.sd_scripts.trainer import AptTrainer

    process_batch, post_process_loss = AptTrainer.process_batch, AptTrainer.post_process_loss

    def remember_network(
        self: AptTrainer, batch: Any, text_encoders: Any, unet: Any, network: Any, *rest: Any, **more: Any
    ):
        seen["parameters"] = [p for p in network.parameters() if p.requires_grad]
        return process_batch(self, batch, text_encoders, unet, network, *rest, **more)

    def measure_first(self: AptTrainer, loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._batch is not None and seen["terms"]:
            measure(super(AptTrainer, self).post_process_loss(loss, *args, **kwargs), self._batch.step.weight)
        return post_process_loss(self, loss, *args, **kwargs)

    AptTrainer.process_batch, AptTrainer.post_process_loss = remember_network, measure_first
    sys.argv, sys.path[0] = sys.argv[1:], str(script.parent)
    runpy.run_path(str(script), run_name="__main__")


def run_tiny_world(concept: int) -> None:
    from apt_hooks.tinyworld.concepts import CONCEPTS
    from apt_hooks.tinyworld.model import load_pipeline
    from apt_hooks.tinyworld.personalize import Training, lora, method_config, reference_pictures, train

    loss_of = AptStep.loss

    def measure_first(self: AptStep, losses: Tensor) -> Tensor:
        measure(losses, self.weight)
        return loss_of(self, losses)

    AptStep.loss = measure_first
    pipeline, training = load_pipeline(), Training()
    with lora(pipeline, training.rank, 0):
        seen["parameters"] = [p for name, p in pipeline.unet.named_parameters() if "lora_" in name]
        captions = CONCEPTS[concept].captions()
        train(pipeline, reference_pictures(CONCEPTS[concept]), captions, method_config("apt"), training, seed=0)


if __name__ == "__main__":
    main()
