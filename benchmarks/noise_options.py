"""What sd-scripts' noise options do to the overfitting indicator, where there is nothing to overfit.

    python benchmarks/noise_options.py [--seeds 0,1,2] [--steps 600]

A LoRA of the tiny world is trained with `monitor_only` on pictures that are drawn anew for every step, as the base
model's were, with captions that tell all of them. What it gains on the base model is then what the option has taught
it, and not a picture. Printed: the gaps of the bins over the last tenth of the run, gamma by the tiny world's scale.
"""

from __future__ import annotations

import argparse
import functools
import random

import torch
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F

from apt_hooks.integrations.peft import adapters_off
from apt_hooks.method.indicator import gamma_of_gap
from apt_hooks.results.calibrate import gaps_at_end
from apt_hooks.tinyworld.model import encode_images, encode_texts, load_pipeline
from apt_hooks.tinyworld.personalize import Training, lora, method_config
from apt_hooks.tinyworld.render import render
from apt_hooks.tinyworld.world import random_scene
from apt_hooks.training.objective import AptObjective

OPTIONS = {
    "none": {},
    "noise_offset 0.1": {"offset": 0.1},
    "multires_noise 6 at 0.3": {"discount": 0.3},
    "ip_noise_gamma 0.1": {"perturbation": 0.1},
}
ITERATIONS = 6  # of multires_noise


def noise_of(shape: tuple[int, ...], stream: torch.Generator, offset: float = 0.0, discount: float = 0.0) -> Tensor:
    """Noise to predict: with an offset of each channel (`noise_offset`), or with coarser noise (`multires_noise`)."""
    noise = torch.randn(shape, generator=stream)
    noise += offset * torch.randn(*shape[:2], 1, 1, generator=stream)
    if discount:
        height, width = shape[2:]
        for i in range(ITERATIONS):
            ratio = 2 + 2 * torch.rand(1, generator=stream).item()
            height, width = max(1, int(height / ratio**i)), max(1, int(width / ratio**i))
            coarse = torch.randn(*shape[:2], height, width, generator=stream)
            noise += discount**i * F.interpolate(coarse, size=shape[2:], mode="bilinear")
            if 1 in (height, width):
                break
        noise /= noise.std()
    return noise


def gaps(option: dict[str, float], seed: int, training: Training) -> Tensor:
    """Gaps of the bins at the end of one run, [bins]; NaN for a bin not seen."""
    pipeline, rng, stream = load_pipeline(), random.Random(seed), torch.Generator().manual_seed(seed)
    config = method_config("dreambooth", {"monitor_only": True})
    perturbation = option.get("perturbation", 0.0)
    logged = []
    with lora(pipeline, training.rank, seed):
        unet = pipeline.unet.train()
        parameters = [p for name, p in unet.named_parameters() if "lora_" in name]
        for parameter in parameters:
            parameter.requires_grad_(True)
        optimizer = torch.optim.AdamW(parameters, training.learning_rate, weight_decay=0.0)
        with AptObjective(config, unet, functools.partial(adapters_off, unet)) as objective:
            for _ in range(training.steps):
                scenes = [random_scene(rng) for _ in range(training.batch)]
                clean = encode_images(
                    pipeline, torch.stack([render(s, random.Random(rng.random())) for s in scenes]) * 2 - 1
                )
                texts = encode_texts(pipeline, [scene.caption() for scene in scenes])
                timesteps = torch.randint(1000, (len(scenes),), generator=stream)
                target = noise_of(clean.shape, stream, option.get("offset", 0.0), option.get("discount", 0.0))
                added = target + perturbation * torch.randn(clean.shape, generator=stream)
                noisy = pipeline.training_scheduler.add_noise(clean, added, timesteps)
                predict = lambda: unet(noisy, timesteps, texts).sample  # noqa: B023, E731 - called within the step
                step = objective.step(predict, target, timesteps)
                step.loss((step.prediction - target).square().mean(dim=(1, 2, 3))).backward()
                optimizer.step()
                optimizer.zero_grad()
                logged.append(step.gaps)
    return gaps_at_end(torch.stack(logged))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=lambda text: [int(n) for n in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--options", type=lambda text: text.split(","), default=list(OPTIONS), help="some of OPTIONS")
    args = parser.parse_args()
    torch.set_num_threads(1)
    scale = method_config("dreambooth").indicator_scale
    training = Training(steps=args.steps, batch=args.batch, learning_rate=args.learning_rate)
    runs = [(name, seed) for name in args.options for seed in args.seeds]
    found: dict[str, list[Tensor]] = {name: [] for name in args.options}
    for name, seed in track(runs):
        found[name].append(gaps(OPTIONS[name], seed, training))
    print("gaps of the bins, low to high noise, times 1000; gamma of each by the tiny world's scale")
    for name, of_seeds in found.items():
        mean = torch.stack(of_seeds).nanmean(dim=0)
        print(f"{name:22}", " ".join(f"{1000 * gap:7.2f}" for gap in mean.tolist()))
        print(" " * 22, " ".join(f"{gamma:7.2f}" for gamma in gamma_of_gap(mean, scale).tolist()))
        if len(of_seeds) > 1:
            spread = torch.stack(of_seeds).std(dim=0).nanmean().item()
            print(
                " " * 22, f"mean {1000 * mean.nanmean():.2f}, standard deviation over seeds {1000 * spread:.2f} a bin"
            )


if __name__ == "__main__":
    main()
