"""`apt-hooks blend` and `apt-hooks maps`: pictures of checkpoints side by side, and where their words look."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apt_hooks.errors import AptError, told_when_stopped
from apt_hooks.files import make_folder, write_atomically
from apt_hooks.hooks.attention_guidance import AttentionRecording
from apt_hooks.hooks.capture import FeatureCapture
from apt_hooks.integrations.embedders import CLIP

from .collapse import attention_collapse
from .denoising_steps import denoising_steps
from .dreamblend import DreamBlend, SampledRun
from .lora_files import check_file
from .loras import LoraFile, Loras, named
from .pipelines import load_unet_pipeline, make_movable
from .sweep import ClipJudge, find_checkpoints, sweep, write_rows
from .word_maps import word_maps, words_of

Say = Callable[[str], None]


def run_blend(
    model: str,
    early: LoraFile,
    late: LoraFile,
    prompt: str,
    out: Path,
    *,
    seed: int = 0,
    count: int = 1,
    options: dict[str, Any],
    say: Say,
    **guidance: Any,
) -> None:
    """Early, late and blended pictures of a prompt, one seed after another: memory is that of one picture.

    Writes into `out`: `SEED-early.png`, `SEED-late.png`, `SEED-blend.png`, `blend.png` with all of them side by side
    and `SEED-maps.png` with the attention of their words.

    Args:
        options: of the pipeline's call.
        guidance: of `DreamBlend`.

    Raises:
        AptError: what `DreamBlend` and `load_unet_pipeline` raise; a folder that cannot be written to.
    """
    pictures = _pictures()
    for path in (early, late):
        check_file(Path(path))
    _check_range(guidance.get("guidance_steps"), options)
    if Path(early).resolve() == Path(late).resolve():
        raise AptError(f"--early and --late are the same file, {late}; name two checkpoints of one training")
    pipeline = load_unet_pipeline(model)
    make_movable(pipeline, say)
    words = words_of(pipeline.tokenizer, prompt)
    rows: dict[str, list[Tensor]] = {"early": [], "late": [], "blend": []}
    with DreamBlend(pipeline, early, late, **guidance) as blend:
        make_folder(out)
        for number in range(seed, seed + count):
            _name_progress(pipeline, f"early, seed {number}")
            runs = {"early": blend.early(prompt, number, **options)}
            kept, shown = runs["early"].attention.nbytes / 2**20, _telling(sorted(runs["early"].attention.steps))
            _name_progress(pipeline, f"blend, seed {number}")
            blended = blend.blend(runs["early"], keep=shown)
            _name_progress(pipeline, f"late, seed {number}")
            runs |= {"late": blend.late(runs["early"], keep=shown), "blend": blended}
            for name, run in runs.items():
                rows[name].append(_picture(run))
                _save(out / f"{number}-{name}.png", run.images[0])
            if words:
                maps = {name: _mean_maps(run, shown, words) for name, run in runs.items()}
                newest = {name: own[-1] for name, own in rows.items()}
                pictures.draw_attention(out / f"{number}-maps.png", [word for word, _ in words], newest, maps)
            runs.clear()  # before the next run's attention is recorded
    pictures.draw_table(out / "blend.png", prompt, [f"seed {seed + i}" for i in range(count)], rows)
    say(f"in {out}: blend.png, and of each seed early, late, blend and maps; attention kept of a run: {kept:.1f} MiB")


def run_sweep(
    model: str,
    folder: Path,
    references: Path,
    prompt: str,
    out: Path,
    *,
    clip: str | None = None,
    plain_prompt: str | None = None,
    seed: int = 0,
    count: int = 1,
    options: dict[str, Any],
    say: Say,
    **guidance: Any,
) -> list[dict[str, Any]]:
    """Score each checkpoint of a folder and each pair of them (`sweep`); writes pictures, `sweep.json` and `.png`."""
    pictures = _pictures()
    files = find_checkpoints(folder)
    _check_range(guidance.get("guidance_steps"), options)
    judge = ClipJudge(references, clip or CLIP)
    make_folder(out)
    pipeline = load_unet_pipeline(model)
    make_movable(pipeline, say)
    with told_when_stopped(lambda: f"the pictures so far are in {out}, without scores; the same command starts over"):
        rows = sweep(
            pipeline,
            files,
            judge,
            prompt,
            plain_prompt or prompt,
            seeds=list(range(seed, seed + count)),
            options=options,
            tell=lambda what: _name_progress(pipeline, what),
            keep=lambda name, picture: _save(out / f"{name}.png", picture),
            **guidance,
        )
    write_rows(out / "sweep.json", rows)
    at = {(row["early"], row["late"]): (row["subject"], row["text"]) for row in rows}
    singles = {late: xy for (early, late), xy in at.items() if early is None}
    blends = {pair: xy for pair, xy in at.items() if pair[0] is not None}
    pictures.draw_plane(out / "sweep.png", singles, {"blends": blends}, ("subject: CLIP-I", "prompt: CLIP-T"))
    for row in rows:
        name = row["late"] if row["early"] is None else f"{row['early']} + {row['late']}"
        say(f"{name:24} text {row['text']:.4f}  subject {row['subject']:.4f}")
    say(f"in {out}: sweep.png, sweep.json; {count} pictures of each")
    return rows


def run_maps(
    model: str,
    loras: Sequence[Path],
    prompt: str,
    out: Path,
    *,
    seed: int = 0,
    timesteps: Sequence[int],
    options: dict[str, Any],
    say: Say,
) -> None:
    """Draw where each word of a prompt looks, in the base model and with each LoRA, at some timesteps."""
    pictures, files = _pictures(), named(loras)
    if not out.parent.is_dir() or out.is_dir():
        raise AptError(f"--out {out}: must be a file in a folder that exists")
    if beyond := [moment for moment in timesteps if not 0 <= moment < 1000]:
        raise AptError(f"--timesteps are from 0 to 999; found {beyond[0]}")
    pipeline = load_unet_pipeline(model)
    words = words_of(pipeline.tokenizer, prompt)
    if not words:
        raise AptError(f"--prompt {prompt!r} has no words to draw but {', '.join(prompt.split()) or 'none'}")
    shown: dict[str, Tensor] = {}
    maps: dict[str, Tensor] = {}
    with Loras(pipeline, files) as on:
        for name in (None, *files):
            title = name or "base model"
            _name_progress(pipeline, title)
            with on.active(name), FeatureCapture(pipeline.unet, representation=False) as capture:
                run, steps = _watch(pipeline, capture, prompt, seed, timesteps, options)
            for step, timestep in steps.items():
                shown[f"{title}, t={timestep}"] = _picture(run)
                maps[f"{title}, t={timestep}"] = _mean_maps(run, [step], words)
    pictures.draw_attention(out, [word for word, _ in words], shown, maps)
    say(f"{out}: {len(words)} words, {', '.join(shown)}")


def run_collapse(
    model: str, loras: Sequence[Path], prompt: str, *, seed: int = 0, options: dict[str, Any], say: Say
) -> dict[str, float]:
    """Print each LoRA's attention shift (`attention_collapse`), by file."""
    if not loras:
        raise AptError("--collapse compares LoRAs with the base model: name one or more by --lora")
    files, pipeline = named(loras), load_unet_pipeline(model)

    def call() -> None:
        pipeline(prompt, generator=torch.Generator().manual_seed(seed), **{**options, "output_type": "latent"})

    _name_progress(pipeline, "base model")
    found = attention_collapse(pipeline, files, call)
    width = max(len(name) for name in found)
    say(f"{'LoRA':{width}}  share of the attention that lies elsewhere than the base model's")
    for name, shift in found.items():
        say(f"{name:{width}}  {shift:.3f}")
    return found


def _watch(
    pipeline: Any, capture: Any, prompt: str, seed: int, timesteps: Sequence[int], options: dict[str, Any]
) -> tuple[SampledRun, dict[int, int]]:
    """A run whose attention is kept at the steps nearest to some timesteps, and those steps' own timesteps."""
    attention = AttentionRecording(capture.layers)
    kept: dict[int, int] = {}

    def around(step: int, batch: int) -> contextlib.AbstractContextManager[None]:
        moments = pipeline.scheduler.timesteps.tolist()
        nearest = {min(range(len(moments)), key=lambda i: abs(moments[i] - t)) for t in timesteps}
        if step not in nearest:
            return contextlib.nullcontext()
        kept[step] = round(moments[step])
        return attention.record(step, capture, batch, device="cpu")

    with denoising_steps(pipeline, around=around):
        images = pipeline(prompt, generator=torch.Generator().manual_seed(seed), **options).images
    return SampledRun(images, attention, [prompt], [seed], options), kept


def _pictures() -> Any:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise AptError(f'pictures need matplotlib ({error}): pip install "apt-hooks[demo]"') from error
    from apt_hooks.results import pictures

    return pictures


def _check_range(guided: tuple[int, int | None] | None, options: dict[str, Any]) -> None:
    start, stop = guided or (0, None)
    if stop is not None and stop <= start:
        raise AptError(f"--guide-from {start} must be below --guide-to {stop}")
    if start >= options["num_inference_steps"]:
        raise AptError(f"--guide-from {start}: there are only {options['num_inference_steps']} steps, from 0")


def _name_progress(pipeline: Any, what: str) -> None:
    """Say by the pipeline's own bar what it draws."""
    pipeline.set_progress_bar_config(desc=what, disable=None)


def _telling(steps: Sequence[int]) -> list[int]:
    """Three of the steps: the maps of all would be much to keep."""
    return [steps[len(steps) * i // 4] for i in (1, 2, 3)] if len(steps) > 3 else list(steps)


def _mean_maps(run: SampledRun, steps: Sequence[int], words: Sequence[tuple[str, list[int]]]) -> Tensor:
    picture = _picture(run)
    ratio = picture.shape[1] / picture.shape[2]
    return torch.stack([word_maps(run.attention, step, words, ratio) for step in steps]).mean(dim=0)


def _picture(run: SampledRun) -> Tensor:
    """[3, height, width], from 0 to 1."""
    import numpy

    return torch.from_numpy(numpy.array(run.images[0].convert("RGB"))).permute(2, 0, 1) / 255


def _save(path: Path, picture: Any) -> None:
    content = io.BytesIO()
    picture.save(content, format="png")
    write_atomically(path, content.getvalue())
