"""The tiny world's model: a diffusers pipeline of 6 M parameters, and where its weights lie."""

from __future__ import annotations

import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import AptError, why_not_imported
from ..integrations.quiet import quiet
from .world import vocabulary

WEIGHTS = Path(__file__).with_name("weights")
LATENT_CHANNELS = 4
TEXT_WIDTH = 128
TOKENS = 20
GUIDANCE = 4.0
SAMPLING_STEPS = 10


def new_tokenizer() -> Any:
    """CLIP's tokenizer with the world's words, one token each; the same numbers every time."""
    from transformers import CLIPTokenizer

    merges = _merges(vocabulary())
    letters = sorted({letter for word in vocabulary() for letter in word})
    tokens = [_START, _END, *letters, *(letter + _WORD_END for letter in letters), *("".join(pair) for pair in merges)]
    with tempfile.TemporaryDirectory() as folder:
        _write_tokens(Path(folder), {token: i for i, token in enumerate(dict.fromkeys(tokens))}, merges)
        return CLIPTokenizer(*(str(Path(folder, name)) for name in _TOKEN_FILES), model_max_length=TOKENS)


_START, _END, _WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"
_TOKEN_FILES = ("vocab.json", "merges.txt")


def _write_tokens(folder: Path, numbers: dict[str, int], merges: list[tuple[str, str]]) -> None:
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
    by_number = dict(sorted(numbers.items(), key=lambda token: token[1]))
    for name, text in zip(_TOKEN_FILES, (json.dumps(by_number), "\n".join(lines)), strict=True):
        (folder / name).write_text(text, encoding="utf-8")


def _merges(words: list[str]) -> list[tuple[str, str]]:
    """Merges of byte-pair encoding that make one token of each word.

    A merge is added behind all others, so that it does not change how the words before it come together.
    """
    merges: dict[tuple[str, str], int] = {}
    for word in words:
        pieces = [*word[:-1], word[-1] + _WORD_END]
        while len(pieces) > 1:
            pairs = list(itertools.pairwise(pieces))
            known = [pair for pair in pairs if pair in merges]
            pair = min(known, key=merges.__getitem__) if known else pairs[0]
            merges.setdefault(pair, len(merges))
            merged: list[str] = []
            for piece in pieces:
                if merged and (merged[-1], piece) == pair:
                    merged[-1] += piece
                else:
                    merged.append(piece)
            pieces = merged
    return list(merges)


def new_model(tokenizer: Any) -> dict[str, Any]:
    """All parts with random weights: `vae`, `text_encoder`, `unet`, `tokenizer`, `scheduler`."""
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    vae = AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=64,
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(64, 96, 128),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=16,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=(2, 3, 4),
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    # Stable Diffusion's noise schedule.
    scheduler = DDPMScheduler(
        num_train_timesteps=1000,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        steps_offset=1,
    )
    return {
        "vae": vae,
        "text_encoder": text_encoder,
        "unet": unet,
        "tokenizer": tokenizer,
        "scheduler": scheduler,
    }


def save_pipeline(parts: dict[str, Any], folder: Path) -> None:
    """Write a folder that `StableDiffusionPipeline.from_pretrained` reads, in float16."""
    from diffusers import StableDiffusionPipeline

    pipeline: Any = StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipeline.to("cpu", torch.float16).save_pretrained(folder, safe_serialization=True)
    _make_readable_for_older_releases(folder, parts["tokenizer"])


def _make_readable_for_older_releases(folder: Path, tokenizer: Any) -> None:
    """Transformers 4 reads other token files, merges in another form, and the text encoder's tensors by other names."""
    from safetensors.torch import load_file, save_file

    merges = _merges(vocabulary())
    _write_tokens(folder / "tokenizer", tokenizer.get_vocab(), merges)
    path = folder / "tokenizer" / "tokenizer.json"
    if path.exists():
        content = json.loads(path.read_text(encoding="utf-8"))
        content["model"]["merges"] = [" ".join(pair) for pair in merges]
        path.write_text(json.dumps(content, indent=1), encoding="utf-8")
    path = folder / "text_encoder" / "model.safetensors"
    prefix = "text_model."
    tensors = {prefix + name.removeprefix(prefix): tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    # Transformers 5 would load this part in the type that it is stored in, and diffusers the others in float32.
    path = folder / "text_encoder" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.update({key: "float32" for key in ("dtype", "torch_dtype") if key in config})
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o644)


def load_pipeline(folder: Path | None = None) -> Any:
    """The pretrained pipeline in float32 on the CPU; `training_scheduler` beside its own keeps the noise schedule.

    Args:
        folder: as `save_pipeline` wrote it; None takes the one that comes with the package.

    Raises:
        AptError: diffusers, or another package that it takes, is missing; a folder without a pipeline.
    """
    folder = folder or WEIGHTS / "pipeline"
    if not (folder / "model_index.json").exists():
        raise AptError(f"{folder}: looked for a pipeline, found no model_index.json; `pretrain` writes one")
    try:
        import diffusers.utils.logging as diffusers_logging
        import transformers.utils.logging as transformers_logging

        with quiet(diffusers_logging), quiet(transformers_logging):
            from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline
    # A library beneath that does not fit is a RuntimeError.
    except (ImportError, RuntimeError) as error:
        why = why_not_imported(error)
        raise AptError(f'the tiny world needs diffusers ({why}): pip install "apt-hooks[demo]"') from error
    with quiet(diffusers_logging), quiet(transformers_logging):
        pipeline: Any = StableDiffusionPipeline.from_pretrained(folder).to(torch.float32)
    pipeline.training_scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    for part in (pipeline.vae, pipeline.unet, pipeline.text_encoder):
        part.requires_grad_(False).eval()
    return pipeline


@torch.no_grad()
def encode_images(pipeline: Any, images: Tensor) -> Tensor:
    """[batch, 3, 64, 64] in [-1, 1] to scaled latents, [batch, 4, 16, 16]."""
    return pipeline.vae.encode(images).latent_dist.mean * pipeline.vae.config.scaling_factor


@torch.no_grad()
def decode_latents(pipeline: Any, latents: Tensor) -> Tensor:
    """Scaled latents, [batch, 4, 16, 16], to pictures, [batch, 3, 64, 64], from 0 to 1."""
    decoded: Tensor = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    return (decoded / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
def encode_texts(pipeline: Any, texts: list[str]) -> Tensor:
    """[batch, TOKENS, TEXT_WIDTH]."""
    return pipeline.text_encoder(token_numbers(pipeline.tokenizer, texts))[0]


def token_numbers(tokenizer: Any, texts: list[str]) -> Tensor:
    """[batch, TOKENS], filled up with the end of the text."""
    numbers: Tensor = tokenizer(texts, padding="max_length", max_length=TOKENS, return_tensors="pt").input_ids
    return numbers


@torch.no_grad()
def sample(
    pipeline: Any, prompts: list[str], *, seed: int, guidance_scale: float = GUIDANCE, steps: int = SAMPLING_STEPS
) -> Tensor:
    """One picture a prompt: [prompts, 3, 64, 64], from 0 to 1. The noise depends on the seed and the place alone."""
    noise = torch.randn(len(prompts), LATENT_CHANNELS, 16, 16, generator=torch.Generator().manual_seed(seed))
    pictures = []
    for i in range(0, len(prompts), 64):
        shown = pipeline(
            prompts[i : i + 64],
            latents=noise[i : i + 64],
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            output_type="pt",
        )
        pictures.append(shown.images.clamp(0, 1))
    return torch.cat(pictures)
