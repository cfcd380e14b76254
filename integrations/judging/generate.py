"""The pictures that are judged: one for each prompt and seed, by the base model and with each LoRA."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from apt_hooks.errors import AptError
from apt_hooks.files import make_folder, write_atomically
from apt_hooks.integrations.sampling.loras import LoraFile, Loras
from apt_hooks.integrations.sampling.pipelines import Sampling
from apt_hooks.results.comparison.folders import BASE, Prompt, picture_name


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which pictures are drawn, and how.

    Attributes:
        prompts, seeds: each model draws one of each.
        further: more seeds, of the base model alone: what the distances to the base model are measured to. Those of the
            same seeds would be too near, the noise having decided much of both.
    """

    prompts: tuple[Prompt, ...]
    seeds: tuple[int, ...]
    further: tuple[int, ...]

    def pictures(self, out: Path, name: str) -> list[Path]:
        """Files of the base model's or a LoRA's pictures: all seeds of the first prompt, then those of the next."""
        return self._of(out / name, self.seeds)

    def more_of_the_base(self, out: Path) -> list[Path]:
        """Files of the base model's pictures of the further seeds."""
        return self._of(out / BASE, self.further)

    def missing(self, out: Path, names: Sequence[str]) -> list[Path]:
        """The pictures that are not there yet, the base model's first, in a fixed order."""
        wanted = [*self.pictures(out, BASE), *self.more_of_the_base(out)]
        wanted += [path for name in names for path in self.pictures(out, name)]
        return [path for path in wanted if not path.exists()]

    def _of(self, folder: Path, seeds: Sequence[int]) -> list[Path]:
        return [folder / picture_name(i, seed) for i in range(len(self.prompts)) for seed in seeds]


STRIDE = 1_000_000
"""Seed s of prompt i is torch's seed s + STRIDE * i: prompts that share their noise are no independent samples."""


@dataclasses.dataclass(frozen=True)
class Share:
    """Which of several processes this is, of `accelerate launch`; alone, it is the first of one."""

    rank: int = 0
    processes: int = 1

    def wait(self) -> None:
        """Until all of them are here."""
        if self.processes > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()


@contextlib.contextmanager
def share() -> Iterator[Share]:
    """This process's share of the work, on the GPU of its own where there are several.

    Raises:
        AptError: launched as several processes, and accelerate is missing.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Share()
        return
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise AptError(f'several processes need accelerate ({error}): pip install "apt-hooks[eval]"') from error
    # Each waits for the slowest, which may have a judge to download: more than the ten minutes that NCCL gives.
    state = PartialState(timeout=datetime.timedelta(days=1))
    try:
        yield Share(state.process_index, state.num_processes)
    finally:
        state.destroy_process_group()


def generate(
    pipeline: Any,
    files: Mapping[str, LoraFile],
    plan: Plan,
    sampling: Sampling,
    out: Path,
    *,
    batch: int,
    own: Share,
    advance: Callable[[int], None],
    begin: Callable[[], None] = lambda: None,
) -> None:
    """Draw what is missing, this process's share of it; each picture is written as soon as it is there.

    The noise of a picture depends on its prompt's number and its seed alone, so the base model and all LoRAs start from
    the same one, whatever the batch and the number of processes.

    Args:
        pipeline: of diffusers, without LoRAs.
        files: LoRAs by name.
        sampling: how.
        out: `out/base` and `out/NAME` take the pictures.
        batch: pictures at once.
        own: the share of this process.
        advance: is told how many more are there.
        begin: is called before the first picture, when the LoRAs have been loaded.

    Raises:
        AptError: a LoRA that cannot be loaded, a folder that cannot be written to; what the pipeline refuses.
    """
    seeds = (*plan.seeds, *plan.further)
    asked = {
        picture_name(i, seed): (prompt, seed + STRIDE * i) for i, prompt in enumerate(plan.prompts) for seed in seeds
    }
    todo = plan.missing(out, list(files))[own.rank :: own.processes]
    own.wait()  # all of them have to see the same pictures missing
    with Loras(pipeline, files) as loras:
        begin()
        for name in (BASE, *files):
            make_folder(out / name)
            mine = [path for path in todo if path.parent.name == name]
            with loras.active(None if name == BASE else name):
                for start in range(0, len(mine), batch):
                    paths = mine[start : start + batch]
                    wanted = [asked[path.name] for path in paths]
                    texts = [prompt.plain if name == BASE else prompt.text for prompt, _ in wanted]
                    generators = [torch.Generator().manual_seed(seed) for _, seed in wanted]
                    drawn = _drawn(pipeline, texts, generators, sampling.options(len(texts)))
                    for path, picture in zip(paths, drawn, strict=True):
                        content = io.BytesIO()
                        picture.save(content, format="png")
                        write_atomically(path, content.getvalue())
                    advance(len(paths))
    own.wait()


def _drawn(pipeline: Any, texts: list[str], generators: list[torch.Generator], options: dict[str, Any]) -> list[Any]:
    from PIL import Image

    name = type(pipeline).__name__
    try:
        pictures, *_ = pipeline(prompt=texts, generator=generators, return_dict=False, **options)
    except torch.cuda.OutOfMemoryError as error:
        raise AptError(f"{name}: {len(texts)} pictures at once are too many for the GPU's memory: --batch") from error
    # What pipelines say of what they are called with, and what befalls those that draw from a picture.
    except (ValueError, TypeError, AttributeError) as error:
        why = " ".join(str(error).split())
        raise AptError(f"{name} draws nothing with {', '.join(options)}: {why}") from error
    if not isinstance(pictures, list) or not all(isinstance(picture, Image.Image) for picture in pictures):
        raise AptError(f"{name} is not supported: it draws no pictures")
    return pictures
