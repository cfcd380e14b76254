"""The tiny world's models: diffusers pipelines of 6 M parameters, and where their weights lie."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import AptError, why_not_imported
from ..integrations.library_logging import quiet
from .denoisers import DENOISERS, LATENT_CHANNELS, LATENT_SIZE, TEXT_WIDTH, UNET, Denoiser
from .world import vocabulary

WEIGHTS = Path(__file__).with_name("weights")
PIPELINES = {"unet": WEIGHTS / "pipeline", "transformer": WEIGHTS / "transformer"}
"""Where the pretrained models are, by the denoiser's name."""
TOKENS = 20


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


def new_model(tokenizer: Any, denoiser: Denoiser = UNET) -> dict[str, Any]:
    """All parts with random weights: `vae`, `text_encoder`, the denoiser by its name, `tokenizer`, `scheduler`."""
    from diffusers import AutoencoderKL
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
    module = denoiser.new()
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
    return {
        "vae": vae,
        "text_encoder": text_encoder,
        denoiser.part: module,
        "tokenizer": tokenizer,
        "scheduler": denoiser.new_scheduler(),
    }


def denoiser_of(names: Iterable[str]) -> Denoiser:
    """The kind of denoiser by the names of a model's parts.

    Raises:
        AptError: there is none among them.
    """
    found = sorted(names)
    for name, denoiser in DENOISERS.items():
        if name in found:
            return denoiser
    raise AptError(f"looked for one of the parts {', '.join(DENOISERS)}, found {', '.join(found) or 'none'}")


def denoiser_and_module(pipeline: Any) -> tuple[Denoiser, Any]:
    """The kind of denoiser that a pipeline has, and the module itself."""
    denoiser = denoiser_of(pipeline.components)
    return denoiser, getattr(pipeline, denoiser.part)


def save_pipeline(parts: dict[str, Any], folder: Path) -> None:
    """Write all parts into a folder that `load_pipeline` reads, in float16."""
    pipeline = denoiser_of(parts).pipeline(parts, encode_texts)
    pipeline.to("cpu", torch.float16).save_pretrained(folder, safe_serialization=True)
    _make_readable_for_older_releases(folder, parts["tokenizer"])
    _make_public(folder)


def save_denoiser(parts: dict[str, Any], folder: Path) -> None:
    """Write denoiser and scheduler alone, in float16: `load_pipeline` takes the rest from the packaged pipeline."""
    name = denoiser_of(parts).part
    parts[name].to("cpu", torch.float16).save_pretrained(folder / name, safe_serialization=True)
    parts["scheduler"].save_pretrained(folder / "scheduler")
    _make_public(folder)


def _make_public(folder: Path) -> None:
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o644)


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


def load_pipeline(folder: Path | None = None) -> Any:
    """A pretrained pipeline in float32 on the CPU; `training_scheduler` beside its own keeps the noise schedule.

    Args:
        folder: one of `PIPELINES`, or as `save_pipeline` or `save_denoiser` wrote it; None takes the U-Net's.

    Raises:
        AptError: diffusers, or another package that it takes, is missing; a folder without a pipeline.
    """
    folder = folder or PIPELINES["unet"]
    try:
        denoiser = denoiser_of(path.name for path in folder.glob("*"))
    except AptError as error:
        raise AptError(f"{folder}: {error}; `pretrain` writes a pipeline") from None
    try:
        import diffusers
        import diffusers.utils.logging as diffusers_logging
        import transformers
        import transformers.utils.logging as transformers_logging

        with quiet(diffusers_logging), quiet(transformers_logging):
            classes = {part: getattr(diffusers, name) for part, name in denoiser.classes.items()}
            classes["vae"] = diffusers.AutoencoderKL
            classes |= {"text_encoder": transformers.CLIPTextModel, "tokenizer": transformers.CLIPTokenizer}
    # A library beneath that does not fit is a RuntimeError.
    except (ImportError, RuntimeError) as error:
        why = why_not_imported(error)
        raise AptError(f'the tiny world needs diffusers ({why}): pip install "apt-hooks[demo]"') from error
    with quiet(diffusers_logging), quiet(transformers_logging):
        lent = {"vae", "text_encoder", "tokenizer"} - {path.name for path in folder.glob("*")}
        parts = {
            part: of.from_pretrained((PIPELINES["unet"] if part in lent else folder) / part)
            for part, of in classes.items()
        }
        pipeline: Any = denoiser.pipeline(parts, encode_texts).to(torch.float32)
    pipeline.training_scheduler = parts["scheduler"]
    pipeline.scheduler = denoiser.sampling_scheduler(parts["scheduler"])
    pipeline.set_progress_bar_config(disable=True)
    for part in (pipeline.vae, getattr(pipeline, denoiser.part), pipeline.text_encoder):
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
    pipeline: Any,
    prompts: list[str],
    *,
    seed: int,
    guidance_scale: float | None = None,
    steps: int | None = None,
) -> Tensor:
    """One picture a prompt: [prompts, 3, 64, 64], from 0 to 1. The noise depends on the seed and the place alone.

    Guidance and steps are the denoiser's own if not given.
    """
    denoiser = denoiser_of(pipeline.components)
    shape = (len(prompts), LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    pictures = []
    for i in range(0, len(prompts), 64):
        shown = pipeline(
            prompts[i : i + 64],
            latents=noise[i : i + 64],
            num_inference_steps=steps or denoiser.sampling_steps,
            guidance_scale=denoiser.guidance if guidance_scale is None else guidance_scale,
            output_type="pt",
        )
        pictures.append(shown.images.clamp(0, 1))
    return torch.cat(pictures)
