"""What `apt-hooks eval` does: draw what is missing, judge, and write it down."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from apt_hooks.errors import AptError, told_when_stopped
from apt_hooks.files import make_folder
from apt_hooks.images import find_photos, open_picture
from apt_hooks.integrations.embedders import CLIP, DINO, HPS, Clip, Dino
from apt_hooks.integrations.sampling.loras import LoraFile, named
from apt_hooks.integrations.sampling.pipelines import TINY_WORLDS, Sampling, check_model, load_pipeline, sampling
from apt_hooks.results.comparison.folders import BASE
from apt_hooks.results.comparison.grid import run_grid

from .embedding_judges import Embedder, SubjectJudge, TextJudge, VarietyJudge
from .generate import Plan, Share, generate, share
from .judge import Drawn, Judge, score_all
from .manifest import Manifest, check_same, digest, new_manifest, read_before, write_manifest
from .prompts import read_prompts
from .results import Scores, table, write_results

Say = Callable[[str], None]
METRICS = ("clip", "dino", "hps", "fidelity", "vendi")
GRID_ROWS = 8


@dataclasses.dataclass(frozen=True)
class Models:
    """Who judges: names on the hub or folders, files of weights."""

    clip: str = CLIP
    dino: str = DINO
    hps: str = HPS
    inception: Path | None = None
    vgg: Path | None = None


def run_eval(
    model: str,
    loras: Sequence[Path],
    references: Path,
    prompts: str,
    out: Path,
    *,
    subject: str,
    class_word: str,
    seed: int = 0,
    count: int = 4,
    batch: int = 1,
    steps: int | None = None,
    guidance_scale: float | None = None,
    metrics: Sequence[str] = METRICS,
    models: Models = Models(),
    say: Say,
) -> Scores:
    """Draw pictures of prompts by a base model and with LoRAs, judge them, and write `metrics.json` and the like.

    Pictures that are in `out` already are kept, so a stopped evaluation goes on, and another LoRA can be added.

    Args:
        model: as for `load_pipeline`.
        loras: files; called as `named` does.
        references: folder of photos of the subject.
        prompts, subject, class_word: as for `read_prompts`.
        out: folder.
        seed, count: pictures of each prompt are drawn from the seeds `seed` to `seed + count - 1`.
        batch: pictures at once.
        steps, guidance_scale: as for `sampling`; the scheduler is the model's own.
        metrics: some of `METRICS`; the tiny world has judges of its own in their place.
        models: who judges.
        say: takes each line of text for the user.

    Returns:
        Scores by model (`base`, LoRAs) and metric; of a process that is not the first, none.

    Raises:
        AptError: bad input; a model that cannot be loaded; `out` holds pictures of other settings.
    """
    check_model(model)
    before = read_before(out)
    files, digests = _known_names(named(loras, taken=(BASE,)), before)
    photos = find_photos(references)
    texts = tuple(read_prompts(prompts, subject, class_word))
    seeds = tuple(range(seed, seed + 2 * count))
    against = model in TINY_WORLDS or "fidelity" in metrics
    plan = Plan(texts, seeds[:count], seeds[count:] if against else ())
    given = _described(steps, guidance_scale)
    wanted = new_manifest(model, files, digests, photos, plan.prompts, plan.seeds, given)
    check_same(out, before, wanted)
    with share() as own:
        # Before hours of drawing: whether there is somebody to judge.
        judges = [] if own.rank else _judges(model, metrics, models, plan, photos, say)
        todo = len(plan.missing(out, list(files)))
        pipeline = load_pipeline(model) if todo or before is None else None
        if pipeline is not None:
            how = sampling(model, pipeline, steps, guidance_scale)
            if (steps is None or guidance_scale is None) and own.rank == 0:
                say(_told(how))
            wanted["sampling"] = _described(how.steps, how.guidance_scale)
            wanted["sampling"]["scheduler"] = type(pipeline.scheduler).__name__
            check_same(out, before, wanted)
        own.wait()  # all have looked at what was there before

        def begin() -> None:
            if own.rank == 0:
                make_folder(out)
                write_manifest(out, before, wanted)

        if pipeline is None:
            begin()
        else:
            _draw(pipeline, out, files, plan, how, batch, own, todo, begin)
            del pipeline  # its memory is the judges' now
        if own.rank:
            return {}
        scores = _judge(out, list(files), plan, judges, say)
    columns = [metric for judge in judges for metric in judge.metrics]
    about = {key: wanted[key] for key in ("apt_hooks", "model", "loras", "seeds")}
    width, height = open_picture(plan.pictures(out, BASE)[0]).size
    about |= {"prompts": len(plan.prompts), "sampling": {**wanted["sampling"], "height": height, "width": width}}
    write_results(out, columns, scores, about)
    for line in table(columns, scores):
        say(line)
    run_grid([out], out, references=None, rows=GRID_ROWS, methods=list(files), say=say)
    say(f"in {out}: metrics.json, metrics.csv, grid.png; {len(plan.prompts)} prompts, {count} pictures of each")
    return scores


def _described(steps: int | None, guidance_scale: float | None) -> dict[str, Any]:
    """As the manifest has it; without what is not given, or what the pipeline does not know."""
    both = {"steps": steps, "guidance_scale": guidance_scale}
    return {name: value for name, value in both.items() if value is not None}


def _told(how: Sampling) -> str:
    guided = "" if how.guidance_scale is None else f", guided by {how.guidance_scale}"
    return f"drawn in {how.steps} steps{guided}"


def _known_names(files: Mapping[str, LoraFile], before: Manifest | None) -> tuple[dict[str, LoraFile], dict[str, str]]:
    """Files and digests by name; a LoRA that the folder has pictures of keeps its name there, whatever it is with."""
    known = {own: name for name, own in before["digests"].items()} if before else {}
    found: dict[str, LoraFile] = {}
    digests: dict[str, str] = {}
    for name, path in files.items():
        own = digest(Path(path))
        name = known.get(own, name)
        if name in found:
            raise AptError(f"--lora {path}: is the same as {found[name]}; leave one of them out")
        found[name], digests[name] = path, own
    return found, digests


def _judges(
    model: str, metrics: Sequence[str], models: Models, plan: Plan, photos: Sequence[Path], say: Say
) -> list[Judge]:
    for metric in metrics:
        if metric not in METRICS:
            raise AptError(f"--metrics takes {', '.join(METRICS)}, separated by commas; found {metric!r}")
    pictures, each = len(plan.prompts) * len(plan.seeds), len(plan.seeds)
    if model in TINY_WORLDS:
        if models != Models() or set(metrics) != set(METRICS):
            raise AptError("the tiny world has judges of its own: leave --metrics and the judges' models out")
        try:
            from .tinyworld_judge import TinyWorldJudge
        except ImportError as error:
            raise AptError(f'the tiny world needs diffusers ({error}): pip install "apt-hooks[eval]"') from error
        return [TinyWorldJudge([prompt.plain for prompt in plan.prompts], photos, pictures)]
    if "vendi" in metrics and each < 2:
        say("note: the Vendi score compares a prompt's pictures, so it needs a --count of 2 or more; left out")
        metrics = [metric for metric in metrics if metric != "vendi"]
    if not metrics:
        raise AptError(f"--metrics must name one or more of {', '.join(METRICS)}; nothing is left")
    judges: list[Judge] = []
    if "clip" in metrics:
        judges.append(TextJudge("clip_t", Clip(models.clip, "--clip")))
    if {"dino", "vendi"} & set(metrics):
        dino = Embedder(models.dino, Dino(models.dino, "--dino").images)
        judges += [SubjectJudge(dino, photos)] if "dino" in metrics else []
        judges += [VarietyJudge(dino, each)] if "vendi" in metrics else []
    if "hps" in metrics:
        judges.append(TextJudge("hps_v2", Clip(models.hps, "--hps")))
    if "fidelity" in metrics:
        from .fidelity_judge import FidelityJudge

        judges.append(FidelityJudge(pictures, models.inception, models.vgg))
    return judges


def _draw(
    pipeline: Any,
    out: Path,
    files: Mapping[str, LoraFile],
    plan: Plan,
    how: Sampling,
    batch: int,
    own: Share,
    total: int,
    begin: Callable[[], None],
) -> None:
    from rich.progress import Progress

    pipeline.set_progress_bar_config(disable=True)

    def kept() -> str:
        return f"the same command goes on with the {len(plan.missing(out, list(files)))} pictures that are missing"

    # Outside of the bar, which has ended its own line by then.
    with told_when_stopped(kept), Progress(disable=own.rank > 0) as progress:
        task = progress.add_task("pictures", total=len(range(own.rank, total, own.processes)))

        def advance(count: int) -> None:
            progress.advance(task, count)

        generate(pipeline, files, plan, how, out, batch=batch, own=own, advance=advance, begin=begin)


def _judge(out: Path, names: Sequence[str], plan: Plan, judges: Sequence[Judge], say: Say) -> Scores:
    from rich.progress import Progress

    plain, base = [prompt.plain for prompt in plan.prompts for _ in plan.seeds], plan.more_of_the_base(out)
    files = {name: plan.pictures(out, name) for name in (BASE, *names)}
    drawn = {name: Drawn(of, plain, len(plan.seeds), base) for name, of in files.items()}
    if black := [path for of in (*files.values(), base) for path in of if open_picture(path).getbbox() is None]:
        say(
            f"note: {len(black)} pictures are black, first {black[0]}, as a safety checker of the model leaves them; "
            "the scores count them"
        )
    kept = "all pictures are there, and the same command judges them"
    with told_when_stopped(lambda: kept), Progress() as progress:
        task = progress.add_task("judges", total=len(judges) * len(drawn))

        def tell(what: str) -> None:
            progress.update(task, description=what, advance=1)

        return score_all(judges, drawn, tell)
