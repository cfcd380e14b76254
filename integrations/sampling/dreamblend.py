"""DreamBlend (WACV 2025, arXiv 2411.19390): the layout of an early checkpoint, the subject of a late one."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Container, Iterator, Sequence
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor

from apt_hooks.errors import AptError
from apt_hooks.hooks.attention_guidance import AttentionRecording, RunDenoiser, guide
from apt_hooks.hooks.capture import FeatureCapture

from .denoising_steps import MOVABLE, check_pipeline, denoising_steps
from .loras import LoraFile, Loras

EARLY, LATE = "early", "late"
_OURS = {"prompt", "prompt_embeds", "generator", "latents", "num_images_per_prompt", "return_dict"}


@dataclasses.dataclass
class SampledRun:
    """Pictures, and the attention on the way to them.

    Attributes:
        images: what the pipeline returned.
        attention: of the steps that were kept.
        prompts, seeds: one a picture.
        options: what else the pipeline was called with.
    """

    images: Any
    attention: AttentionRecording
    prompts: list[str]
    seeds: list[int]
    options: dict[str, Any]


class DreamBlend:
    """Two LoRAs of one run on one pipeline: pictures of the late one, steered to the attention of the early one.

    DreamBlend's loss is not published; the guidance is pix2pix-zero's (`attention_guidance`). A context manager;
    `close` leaves the pipeline as it was.

    Args:
        pipeline: of diffusers, for SD 1.x, 2.x or SDXL.
        early, late: LoRA files, as for `Loras`.
        guidance_lr: how far to go along the gradient; None: 0.1, for v-prediction 0.01.
        guidance_steps: the first denoising step that is guided and the first that is not any more; None: to the end.
        blocks: the up-blocks whose cross-attention guides; as in `FeatureCapture`.
        offload: keep the attention of runs in the CPU's memory.
        loras: has both LoRAs, `early` and `late` being their names in it, and stays open; None loads them.

    Raises:
        AptError: an unsupported pipeline, a file that is no LoRA, or one of another base model.
    """

    def __init__(
        self,
        pipeline: Any,
        early: LoraFile,
        late: LoraFile,
        *,
        guidance_lr: float | None = None,
        guidance_steps: tuple[int, int | None] = (0, None),
        blocks: Literal["auto"] | Sequence[int] = "auto",
        offload: bool = False,
        loras: Loras | None = None,
    ) -> None:
        check_pipeline(pipeline)
        scheduler = type(pipeline.scheduler).__name__
        if scheduler not in MOVABLE:
            raise AptError(f"guidance works with {', '.join(MOVABLE)}; the pipeline's scheduler is {scheduler}")
        start, stop = guidance_steps
        if start < 0 or (stop is not None and stop < start):
            raise AptError(f"guidance_steps must be two numbers of steps, the first not above; found {start}, {stop}")
        if guidance_lr is None:
            guidance_lr = 0.01 if pipeline.scheduler.config.prediction_type == "v_prediction" else 0.1
        if not 0 <= guidance_lr < math.inf:
            raise AptError(f"guidance_lr must be a number, not below 0; found {guidance_lr}")
        self.pipeline = pipeline
        self.guidance_lr = guidance_lr
        self.guidance_steps = start, stop
        self.blocks = blocks
        self.offload = offload
        self._names = (EARLY, LATE) if loras is None else (str(early), str(late))
        self._shared = loras is not None
        self.loras = loras or Loras(pipeline, {EARLY: early, LATE: late})

    def early(self, prompts: str | Sequence[str], seeds: int | Sequence[int], **options: Any) -> SampledRun:
        """The early checkpoint's pictures, and its attention at the steps to be guided.

        Args:
            prompts, seeds: one a picture.
            options: further arguments of the pipeline's call.
        """
        return self._run(self._names[0], prompts, seeds, options, keep=self._guided)

    def late(self, early: SampledRun, *, keep: Container[int] = ()) -> SampledRun:
        """The late checkpoint's pictures without guidance, of the same prompts and from the same noise.

        Args:
            keep: the steps whose attention to keep.
        """
        return self._run(self._names[1], early.prompts, early.seeds, early.options, keep=keep.__contains__)

    def blend(
        self, early: SampledRun, prompts: str | Sequence[str] | None = None, *, keep: Container[int] = ()
    ) -> SampledRun:
        """The late checkpoint's pictures from the same noise, guided to the early one's attention.

        Args:
            prompts: others of the same number of tokens; None: the same.
            keep: the steps whose attention to keep.

        Raises:
            AptError: prompts whose tokens do not stand where the others do; other sizes than the early run's.
        """
        if not any(map(self._guided, early.attention.steps)):
            raise AptError(
                f"guidance_steps {self.guidance_steps} leaves no denoising step to guide; the early run recorded "
                f"{len(early.attention.steps)}"
            )
        prompts, _ = _same_number(early.prompts if prompts is None else prompts, early.seeds)
        for ours, theirs in zip(prompts, early.prompts, strict=True):
            self._check_tokens(ours, theirs)
        return self._run(
            self._names[1], prompts, early.seeds, early.options, keep=keep.__contains__, reference=early.attention
        )

    def close(self) -> None:
        """Take the LoRAs off; may be called again."""
        if not self._shared:
            self.loras.close()

    def __enter__(self) -> DreamBlend:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _guided(self, step: int) -> bool:
        start, stop = self.guidance_steps
        return start <= step and (stop is None or step < stop)

    def _run(
        self,
        lora: str,
        prompts: str | Sequence[str],
        seeds: int | Sequence[int],
        options: dict[str, Any],
        *,
        keep: Callable[[int], bool],
        reference: AttentionRecording | None = None,
    ) -> SampledRun:
        prompts, seeds = _same_number(prompts, seeds)
        if own := sorted(_OURS & options.keys()):
            raise AptError(
                f"{', '.join(own)}: not among the options of a run, which has prompts and seeds, one a picture"
            )
        if isinstance(options.get("negative_prompt"), str):
            options = {**options, "negative_prompt": [options["negative_prompt"]] * len(prompts)}
        unet = self.pipeline.unet
        with (
            self.loras.active(lora),
            _nothing_trained(unet),
            FeatureCapture(unet, self.blocks, representation=False) as capture,
        ):
            attention = AttentionRecording(capture.layers)

            def before(step: int, inputs: Tensor, predict: RunDenoiser) -> Tensor | None:
                if reference is None or step not in reference.steps or not self._guided(step):
                    return None
                return guide(inputs, predict, capture, reference.steps[step], self.guidance_lr)

            def around(step: int, batch: int) -> contextlib.AbstractContextManager[None]:
                if not keep(step):
                    return contextlib.nullcontext()
                return attention.record(step, capture, batch, device="cpu" if self.offload else None)

            # On the CPU, so that a seed gives one picture on every device.
            noise = [torch.Generator().manual_seed(seed) for seed in seeds]
            with denoising_steps(self.pipeline, before=before, around=around):
                images = self.pipeline(prompts, generator=noise, **options).images
        return SampledRun(images, attention, prompts, seeds, options)

    def _check_tokens(self, ours: str, theirs: str) -> None:
        tokenizers = [getattr(self.pipeline, name, None) for name in ("tokenizer", "tokenizer_2")]
        for tokenizer in filter(None, tokenizers):
            counts = [len(tokenizer(text).input_ids) for text in (ours, theirs)]
            if counts[0] != counts[1]:
                raise AptError(
                    f"the prompts of both checkpoints need one number of tokens, or their maps are of other words; "
                    f"{ours!r} has {counts[0]}, {theirs!r} {counts[1]}: say it in as many"
                )


@contextlib.contextmanager
def _nothing_trained(model: Any) -> Iterator[None]:
    """What asks for gradients makes a pass with a graph keep more."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _same_number(prompts: str | Sequence[str], seeds: int | Sequence[int]) -> tuple[list[str], list[int]]:
    seeds = [seeds] if isinstance(seeds, int) else [int(seed) for seed in seeds]
    prompts = [prompts] * len(seeds) if isinstance(prompts, str) else list(prompts)
    if len(prompts) != len(seeds) or not seeds:
        raise AptError(f"as many prompts as seeds are needed; found {len(prompts)} and {len(seeds)}")
    return prompts, seeds
