"""Pretrains the tiny world's model: `python -m apt_hooks.tinyworld.pretrain --work DIR`.

First the text encoder, which learns to read the attributes out of captions (Stable Diffusion's comes pretrained too);
then the autoencoder; then the denoiser on its latents, under the frozen text encoder: the U-Net, or with `--model
transformer` the other; last the decoder alone. All leave checkpoints in DIR from which a stopped run goes on; every
step draws from a random stream of its own, so that nothing depends on where it was stopped. The transformer's learning
rate depends on the step alone: it goes on with more `--steps` whenever one likes, and what a stopped run has reached is
written by asking for that many.

With `--denoiser-only` text encoder and autoencoder are those of the pipeline that comes with the package, and the
folder that is written leaves them out.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import random
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import errors_in_one_line
from ..method.augmentation import ZoomOutRotate
from .card import write_card
from .datasets import draw_scenes
from .denoisers import DENOISERS, TEXT_WIDTH, Denoiser
from .fit import cached, fit
from .judge_networks import ATTRIBUTES, attribute_labels
from .model import load_pipeline, new_model, new_tokenizer, save_denoiser, save_pipeline, token_numbers
from .render import render
from .world import RARE_WORDS, Scene

VAE_SCENES = 12_000
ZOOMED_OUT = 0.04
"""Share of the denoiser's pictures that are zoomed out on black, as APT's augmentation makes them."""
ZOOM_OUT = ZoomOutRotate((1.0, 3.0), 15.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for data and checkpoints")
    parser.add_argument("--out", type=Path, help="folder of the finished pipeline; WORK/pipeline if not given")
    parser.add_argument("--model", choices=DENOISERS, default="unet", help="the denoiser; unet if not given")
    parser.add_argument("--denoiser-only", action="store_true", help="keep text encoder and autoencoder of the package")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--scenes", type=int, default=40_000)
    parser.add_argument("--text-steps", type=int, default=800)
    parser.add_argument("--vae-steps", type=int, default=2400)
    defaults = ", ".join(f"{denoiser.training_steps} for {name}" for name, denoiser in DENOISERS.items())
    parser.add_argument("--steps", type=int, help=f"of the denoiser, 32 scenes each; if not given {defaults}")
    parser.add_argument("--decoder-steps", type=int, default=1600)
    args = parser.parse_args()
    denoiser = DENOISERS[args.model]
    if args.steps is None:
        args.steps = denoiser.training_steps
    args.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    parts = new_model(new_tokenizer(), denoiser)
    history: dict[str, Any] = {"seed": args.seed, "device": _device_name(args.device), "torch": torch.__version__}
    history["options"] = f" --model {args.model}{' --denoiser-only' if args.denoiser_only else ''}"
    history["data"] = _data(denoiser, args)
    scenes = draw_scenes(args.scenes, args.seed)
    rng = random.Random(args.seed)
    captions = [[caption(scene, rng) for _ in range(2)] for scene in scenes]
    if args.denoiser_only:
        packaged = load_pipeline()
        parts.update({name: getattr(packaged, name).to(args.device) for name in ("vae", "text_encoder")})
    else:
        history["text_encoder"] = _train_text_encoder(parts, scenes, captions, args)
        history["autoencoder"] = _train_vae(parts["vae"], args)
    latents, zoomed_out = _latents(parts["vae"], scenes, args)
    history[args.model] = _train_denoiser(denoiser, parts, latents, zoomed_out, captions, args)
    if not args.denoiser_only:
        history["decoder"] = _train_vae(parts["vae"], args, decoder_only=True)
    out = args.out or args.work / "pipeline"
    (save_denoiser if args.denoiser_only else save_pipeline)(parts, out)
    (out / "training.json").write_text(json.dumps(history, indent=1), encoding="utf-8")
    write_card(out)
    print(f"{out}: the pipeline and its card")


# Data.


def _data(denoiser: Denoiser, args: argparse.Namespace) -> list[str]:
    """What the card says of it."""
    autoencoder = (
        f"Autoencoder: {VAE_SCENES} scenes, half of them with patterned subjects and parts (none of the numbered "
        "concepts), 15 % zoomed out and rotated on black."
    )
    return [
        *([] if args.denoiser_only else [autoencoder]),
        f"{denoiser.title[0].upper()}{denoiser.title[1:]}: {args.scenes} scenes with plain subjects, two captions "
        "drawn for each; every eighth combination of kind, color and background is held out. "
        f"{100 * ZOOMED_OUT:g} % are zoomed out and rotated on black, and shown below timestep "
        f"{denoiser.zoomed_out_below} only."
        + ("" if args.denoiser_only else " Text encoder: the first caption of each."),
        "Captions: color and size are each left out of 15 %, a word without a meaning (sks, ohwx) is put before the "
        f"noun in 25 %; 10 % of the captions of a step of the {denoiser.title} are empty.",
    ]


def render_all(scenes: list[Scene], seed: int) -> Tensor:
    """All pictures, [count, 3, 64, 64], uint8."""
    jobs = [(scenes[i : i + 500], seed * 1_000_003 + i) for i in range(0, len(scenes), 500)]
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        chunks = track(pool.map(_render_chunk, *zip(*jobs, strict=True)), description="rendering", total=len(jobs))
        return torch.cat([torch.from_numpy(chunk) for chunk in chunks])


def _render_chunk(scenes: list[Scene], seed: int) -> Any:
    torch.set_num_threads(1)
    rng = random.Random(seed)
    return (torch.stack([render(scene, rng) for scene in scenes]) * 255).round().byte().numpy()


def caption(scene: Scene, rng: random.Random) -> str:
    """A caption of pretraining: color and size are told mostly, a rare word stands before one noun in four."""
    rare = rng.choice(RARE_WORDS) if rng.random() < 0.25 else None
    return scene.caption(rare_word=rare, color=rng.random() < 0.85, size=rng.random() < 0.85)


# Stages.


def _train_text_encoder(
    parts: dict[str, Any], scenes: list[Scene], captions: list[list[str]], args: argparse.Namespace
) -> dict[str, Any]:
    """From the tokens that end and fill up a text, linear heads read each attribute, or that it is left out.

    Without this stage a word is one of twenty tokens to the U-Net, which then never learned the places.
    """
    batch = 128
    text, tokenizer = parts["text_encoder"].to(args.device).train(), parts["tokenizer"]
    ids = token_numbers(tokenizer, [versions[0] for versions in captions])
    labels = attribute_labels(scenes)
    for name, of in (("color", lambda scene: scene.subject.color), ("size", lambda scene: scene.size)):
        told = [of(scene) in versions[0].split() for scene, versions in zip(scenes, captions, strict=True)]
        labels[name] = torch.where(torch.tensor(told), labels[name], len(ATTRIBUTES[name]))
    heads = nn.ModuleDict({name: nn.Linear(TEXT_WIDTH, len(ATTRIBUTES[name]) + 1) for name in labels}).to(args.device)

    def loss(g: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        rows = torch.randint(len(ids), (batch,), generator=g)
        words = ids[rows].to(args.device)
        row, place = (words == tokenizer.eos_token_id).nonzero(as_tuple=True)
        ends = text(words)[0][row, place]
        off = torch.stack([F.cross_entropy(heads[k](ends), labels[k][rows].to(args.device)[row]) for k in heads]).sum()
        return off, {"cross_entropy": off.item()}

    settings = {"scenes": args.scenes}
    record = fit(
        "text_encoder", {"text": text, "heads": heads}, args.text_steps, 1e-3, loss, args.work, settings, seed=args.seed
    )
    text.eval().requires_grad_(False)
    return {"batch": batch, **record}


def _train_vae(vae: Any, args: argparse.Namespace, *, decoder_only: bool = False) -> dict[str, Any]:
    """All of the autoencoder, or the decoder alone, which changes no latents."""
    batch = 16
    data = cached(
        args.work / "vae-scenes.pt",
        {"scenes": VAE_SCENES, "seed": args.seed},
        lambda: render_all(draw_scenes(VAE_SCENES, args.seed + 1, subjects=True), args.seed + 1),
    )
    vae.to(args.device).train()
    modules = {"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv} if decoder_only else {"vae": vae}
    name, steps, lr = ("decoder", args.decoder_steps, 1e-3) if decoder_only else ("autoencoder", args.vae_steps, 3e-3)

    def loss(g: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        images = data[torch.randint(len(data), (batch,), generator=g)].float() / 127.5 - 1
        # Augmented pictures are decodable too, as with any large autoencoder.
        images = ZOOM_OUT.draw(torch.full((batch,), 0.15), g).apply(images, -1.0).to(args.device)
        with _mixed(args.device):
            with torch.set_grad_enabled(not decoder_only):
                posterior = vae.encode(images).latent_dist
            decoded = vae.decode(posterior.mean + posterior.std * _normal(posterior.mean, g)).sample.float()
        off = F.l1_loss(decoded, images) + F.mse_loss(decoded, images)
        kl = posterior.kl().float().sum() / posterior.mean.numel()
        return off + 1e-4 * kl, {"l1_l2": off.item(), "kl": kl.item()}

    settings = {"scenes": args.scenes}
    return {"batch": batch, **fit(name, modules, steps, lr, loss, args.work, settings, seed=args.seed)}


def _latents(vae: Any, scenes: list[Scene], args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Latents of all scenes, [count, 4, 16, 16], scaled to unit deviation, and which of them are zoomed out."""
    vae.to(args.device).eval()

    def encode() -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(args.seed)
        encoded, chosen = [], []
        with torch.no_grad():
            for part in track(render_all(scenes, args.seed).split(100), description="encoding"):
                images = part.float() / 127.5 - 1
                placement = ZOOM_OUT.draw(torch.full((len(images),), ZOOMED_OUT), g)
                images = placement.apply(images, -1.0)
                encoded.append(vae.encode(images.to(args.device)).latent_dist.mean.cpu())
                chosen.append(placement.chosen)
        return {"latents": torch.cat(encoded), "zoomed_out": torch.cat(chosen)}

    settings = {"scenes": len(scenes), "seed": args.seed, "vae_steps": args.vae_steps, "zoomed_out": ZOOMED_OUT}
    if args.denoiser_only:
        settings["vae_steps"] = "packaged"
    stored = cached(args.work / "latents.pt", settings, encode)
    if not args.denoiser_only:
        vae.register_to_config(scaling_factor=1.0 / stored["latents"].std().item())
    return stored["latents"] * vae.config.scaling_factor, stored["zoomed_out"]


def _train_denoiser(
    denoiser: Denoiser,
    parts: dict[str, Any],
    latents: Tensor,
    zoomed_out: Tensor,
    captions: list[list[str]],
    args: argparse.Namespace,
) -> dict[str, Any]:
    batch = 32
    module, text, tokenizer, scheduler = (parts[k] for k in (denoiser.part, "text_encoder", "tokenizer", "scheduler"))
    module.to(args.device).train()
    ids = torch.stack([token_numbers(tokenizer, list(version)) for version in zip(*captions, strict=True)])
    empty = token_numbers(tokenizer, [""])[0]

    def loss(g: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        rows = torch.randint(len(latents), (batch,), generator=g)
        version = torch.randint(len(ids), (batch,), generator=g)
        words = torch.where(torch.rand(batch, 1, generator=g) < 0.1, empty, ids[version, rows]).to(args.device)
        clean = latents[rows].to(args.device)
        noised = denoiser.noised(scheduler, clean, _normal(clean, g), zoomed_out[rows], g)
        with _mixed(args.device):
            condition = denoiser.condition(text(words)[0], g)
            predicted = denoiser.predict(module, noised.latents, noised.timesteps, condition).float()
        off = (predicted - noised.target).square().mean((1, 2, 3))
        weighted = (off * noised.weight).mean()
        return weighted, {"weighted": weighted.item(), "mse": off.mean().item()}

    settings = {"scenes": args.scenes, "zoomed_out": ZOOMED_OUT, "zoomed_out_below": denoiser.zoomed_out_below}
    settings |= denoiser.settings
    record = fit(
        denoiser.part,
        {denoiser.part: module},
        args.steps,
        denoiser.learning_rate,
        loss,
        args.work,
        settings,
        seed=args.seed,
        ema=0.999,
        endless=denoiser.endless,
    )
    return {"batch": batch, **record}


def _normal(like: Tensor, g: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=g).to(like.device)


def _mixed(device: str) -> Any:
    return torch.autocast(torch.device(device).type, torch.bfloat16)


def _device_name(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    with errors_in_one_line():
        main()
