"""`apt-hooks demo`: the whole method on a U-Net so small that a laptop trains it in under a minute."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config import AptConfig
from .errors import AptError
from .integrations.peft import adapters_off
from .objective import AptObjective
from .run import AptRun

SIZE = 32
BATCH = 4


def run_demo(out: Path, *, steps: int, seed: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Personalize a tiny random diffusers U-Net on four drawn pictures, with LoRA and APT.

    Writes `OUT/demo-apt.jsonl` (a line a step) and `OUT/indicator.png` (gamma per bin over steps). The weights are
    random and no sample is worth a look: what it shows is the indicator at work, not the method's quality.

    Args:
        out: folder, made where it is missing.
        steps: training steps of four samples.
        seed: of everything; the same seed gives the same numbers.
        say: takes each line of text for the user.

    Returns:
        The last line of the log.

    Raises:
        AptError: an optional package is missing, or `out` cannot be written to.
    """
    try:
        import matplotlib.figure  # noqa: F401
        from diffusers import DDPMScheduler, UNet2DConditionModel
        from peft import LoraConfig
        from rich.progress import track
    except ImportError as error:
        raise AptError(
            f'the demo needs diffusers, peft and matplotlib ({error}): pip install "apt-hooks[demo]"'
        ) from error
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AptError(f"{out}: cannot be made: {error.strerror}") from error

    torch.manual_seed(seed)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small that threads only wait for each other, on a busy machine for minutes
    unet: Any = UNet2DConditionModel(
        sample_size=SIZE,
        in_channels=3,
        out_channels=3,
        block_out_channels=(16, 32, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=24,
        attention_head_dim=8,
    )
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=8, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    unet.train()
    schedule: Any = DDPMScheduler(num_train_timesteps=1000)
    pictures, caption = _pictures(), torch.randn(1, 8, 24)

    # A random U-Net is so far from any data that the paper's scale would put every bin at 1 within a few steps.
    config = AptConfig(indicator_scale=20.0)
    optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], lr=2e-3)
    objective = AptObjective(config, unet, functools.partial(adapters_off, unet))
    run = AptRun(objective, log_path=out / "demo-apt.jsonl", augment_space="image", seed=seed)
    say(run.start_line())
    with objective:
        for _ in track(range(steps), description="training"):
            images = pictures[torch.randint(len(pictures), (BATCH,))]
            timesteps = torch.randint(1000, (BATCH,))
            placement = objective.draw_augmentation(timesteps, generator=run.generator())
            images = placement.apply(images, -1.0)
            noise = torch.randn_like(images)
            noisy = schedule.add_noise(images, noise, timesteps)
            predict = functools.partial(_predict, unet, noisy, timesteps, caption.expand(BATCH, -1, -1))
            step = objective.step(predict, noise, timesteps)
            step.loss((step.prediction - noise).square().mean(dim=(1, 2, 3))).backward()
            optimizer.step()
            optimizer.zero_grad()
            run.record(step, placement)
        run.log.flush()
    torch.set_num_threads(threads)
    _draw(out / "demo-apt.jsonl", out / "indicator.png")
    last = run.log.latest() or {}
    say("gamma per bin, low to high noise: " + " ".join(f"{g:.2f}" for g in last["gamma"]))
    say(f"{len(last['gamma'])} bins over {steps} steps: {out / 'indicator.png'}; every step: {out / 'demo-apt.jsonl'}")
    return last


def _predict(unet: Any, noisy: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
    return unet(noisy, timesteps, text).sample


def _pictures() -> Tensor:
    """Four pictures of one striped ball on one background, [4, 3, SIZE, SIZE] in [-1, 1]: photos of a subject."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, SIZE), torch.linspace(-1, 1, SIZE), indexing="ij")
    background = torch.stack([0.2 + 0.3 * y, 0.1 + 0.0 * x, -0.4 + 0.2 * x])
    pictures = []
    for dx, dy, turn in ((-0.2, 0.0, 0.0), (0.1, 0.2, 0.5), (0.2, -0.1, 1.1), (-0.1, -0.2, 2.0)):
        u, v = x - dx, y - dy
        stripes = torch.sin(14 * (u * math.cos(turn) + v * math.sin(turn)))
        ball = torch.stack([0.9 * stripes.sign(), 0.6 * torch.ones_like(u), -0.8 * stripes.sign()])
        pictures.append(torch.where(u.square() + v.square() < 0.3, ball, background))
    return torch.stack(pictures)


def _draw(log: Path, picture: Path) -> None:
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    lines = [json.loads(text) for text in log.read_text(encoding="utf-8").splitlines()]
    steps = [line["step"] for line in lines]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    bins = len(lines[0]["gamma"])
    for b in range(bins):
        color = colormaps["viridis"](b / max(1, bins - 1))
        axes.plot(steps, [line["gamma"][b] for line in lines], color=color, label=f"{b * 1000 // bins}")
    axes.set(xlabel="step", ylabel="gamma", ylim=(-0.02, 1.02), title="Overfitting indicator per timestep bin")
    axes.legend(title="bin from", ncols=2, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(picture, dpi=120)
