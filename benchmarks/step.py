"""What a training step costs: plain, plain with the frozen pass (the floor of APT), and APT.

    python benchmarks/step.py [--size 32] [--batch 2] [--rounds 20] [--device cpu] [--out benchmarks/results.csv]

The three are timed in one process, one after the other in every round, on a U-Net of SDXL's topology at reduced width.
A row is appended for each: median, 20th and 80th percentile in ms, ratio of the median to the floor's, and on a GPU
the peak memory.
"""

from __future__ import annotations

import argparse
import csv
import functools
import importlib.metadata
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig

from apt_hooks import AptConfig, AptObjective
from apt_hooks.frozen import frozen_base
from apt_hooks.integrations.peft import adapters_off

COLUMNS = ["what", "median_ms", "p20_ms", "p80_ms", "to_floor", "peak_mib", "width", "size", "batch", "rounds"]
COLUMNS += ["device", "torch", "commit"]


def make_unet(width: int) -> UNet2DConditionModel:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(width, 2 * width, 4 * width),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=tuple(max(1, n * width // 64) for n in (1, 2, 4)),
        cross_attention_dim=2048,
        use_linear_projection=True,
    )
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=8, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    return unet.train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=64, help="channels of the first level (SDXL: 320)")
    parser.add_argument("--size", type=int, default=32, help="height and width of the latents (SDXL: 128)")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results.csv"))
    parser.add_argument("--smoke", action="store_true", help="one small round, to see that it runs")
    args = parser.parse_args()
    if args.smoke:
        args.width, args.size, args.rounds = 32, 8, 1

    device = torch.device(args.device)
    unet = make_unet(args.width).to(device)
    parameters = [p for p in unet.parameters() if p.requires_grad]
    shape = (args.batch, 4, args.size, args.size)
    noisy, target = torch.randn(shape, device=device), torch.randn(shape, device=device)
    text = torch.randn(args.batch, 77, 2048, device=device)
    timesteps = torch.randint(1000, (args.batch,), device=device)

    base = functools.partial(adapters_off, unet)

    def predict() -> torch.Tensor:
        return unet(noisy, timesteps, text).sample

    def plain() -> None:
        (predict() - target).square().mean().backward()

    def floor() -> None:
        with frozen_base([unet], base):
            predict()
        plain()

    def apt() -> None:
        step = objective.step(predict, target, timesteps)
        step.loss((step.prediction - target).square().mean(dim=(1, 2, 3))).backward()

    with AptObjective(AptConfig(), unet, base) as objective:
        measured = measure({"plain": plain, "floor": floor, "apt": apt}, args.rounds, device, parameters)
    middle = {name: sorted(times)[len(times) // 2] for name, (times, _) in measured.items()}
    new = not args.out.exists()
    with args.out.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(COLUMNS)
        for name, (times, peak) in measured.items():
            ordered = sorted(times)
            row = [f"{1000 * ordered[len(times) * part // 10]:.1f}" for part in (5, 2, 8)]
            row += [f"{middle[name] / middle['floor']:.3f}", "" if peak is None else f"{peak / 2**20:.0f}"]
            row += [args.width, args.size, args.batch, args.rounds, device_name(device), torch.__version__, commit()]
            writer.writerow([name, *row])
            print(
                f"{name:6} median {row[0]} ms  p20 {row[1]}  p80 {row[2]}  {row[3]} x floor  peak {row[4] or '-'} MiB"
            )


def measure(
    steps: dict[str, Callable[[], None]], rounds: int, device: torch.device, parameters: list[torch.Tensor]
) -> dict[str, tuple[list[float], int | None]]:
    """Seconds of every round and peak memory of each step; the first round warms up and is left out."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    peaks: dict[str, int | None] = dict.fromkeys(steps)
    for _ in range(rounds + 1):
        for name, step in steps.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
                peaks[name] = torch.cuda.max_memory_allocated()
            times[name].append(time.perf_counter() - start)
            for parameter in parameters:
                parameter.grad = None
    return {name: (seconds[1:], peaks[name]) for name, seconds in times.items()}


def device_name(device: torch.device) -> str:
    return (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"{platform.machine()} {torch.get_num_threads()} threads"
    )


def commit() -> str:
    try:
        found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return importlib.metadata.version("apt-hooks")
    return found.stdout.strip()


if __name__ == "__main__":
    main()
