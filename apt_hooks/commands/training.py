"""Commands around a training: patch a trainer, choose and check a config, try it, fit the indicator's scale."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from apt_hooks.config import AptConfig, preset_names, preset_text
from apt_hooks.errors import AptError
from apt_hooks.integrations.diffusers_dreambooth import patch as diffusers
from apt_hooks.integrations.sd_scripts import patch as sd_scripts
from apt_hooks.integrations.trainers import Change, Trainer

app = typer.Typer()
presets = typer.Typer(help="The presets that come with apt-hooks.", no_args_is_help=True)
app.add_typer(presets, name="presets")


TRAINERS: tuple[Trainer, ...] = (sd_scripts, diffusers)
_NAMES = " and ".join(trainer.NAME for trainer in TRAINERS)
TrainerName = Annotated[
    str, typer.Argument(metavar="TRAINER", help=f"{' or '.join(trainer.NAME for trainer in TRAINERS)}.")
]
Place = Annotated[
    Path, typer.Argument(metavar="PATH", help="sd-scripts' folder, or a DreamBooth-LoRA script of diffusers.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the diff and change nothing.")]


@app.command(
    epilog="Examples: `apt-hooks patch sd-scripts ~/sd-scripts --dry-run`, "
    "`apt-hooks patch diffusers train_dreambooth_lora_sdxl.py`"
)
def patch(
    trainer: TrainerName,
    path: Place = Path(),
    dry_run: DryRun = False,
    output: Annotated[
        Path | None, typer.Option(help="diffusers: where to write the patched copy; SCRIPT_apt.py if not given.")
    ] = None,
    in_place: Annotated[
        bool, typer.Option("--in-place", help="diffusers: change the script itself in place of a copy.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="diffusers: replace a copy that holds something else.")
    ] = False,
) -> None:
    """Insert the lines that let a trainer take `[apt]`. Undone by `unpatch`; twice is once."""
    known = _trainer(trainer, "patch")
    options = {"output": output, "in_place": in_place, "force": force}
    given = {name: value for name, value in options.items() if value}
    if not given.keys() <= known.OPTIONS:
        takers = [other.NAME for other in TRAINERS if given.keys() <= other.OPTIONS]
        raise AptError(
            f"--output, --in-place and --force are for {' and '.join(takers)}; {known.NAME} is always patched in its "
            "folder"
        )
    change = known.apply(path, dry_run=dry_run, **given)
    _tell(change, dry_run, "patched", "already patched")
    found = known.status(path)
    if found.version not in known.TESTED:
        name = known.named(found)
        name = f"{path.name}, {name}," if path.is_file() else name
        typer.echo(f"note: {name} has the structure of the tested ones, but was not tested")


@app.command(epilog="Example: `apt-hooks unpatch sd-scripts ~/sd-scripts`")
def unpatch(trainer: TrainerName, path: Place = Path(), dry_run: DryRun = False) -> None:
    """Take the inserted lines out again; the files are then what they were, to the byte."""
    known = _trainer(trainer, "unpatch")
    diff = known.unpatch(path, dry_run=dry_run)
    copy = known.patched_copy(path)
    other = f"; {copy.name} is: name that, or delete it" if copy else ""
    _tell(Change(path.resolve(), diff, bool(diff)), dry_run, "unpatched", f"not patched, nothing to do{other}")


@app.command(epilog="Example: `apt-hooks status sd-scripts && echo patched`")
def status(trainer: TrainerName, path: Place = Path()) -> None:
    """Say the trainer's version and which of its files are patched. Exit code 0 if all are, 1 if not."""
    known = _trainer(trainer, "status")
    found = known.status(path)
    for line in known.report(path, found):
        typer.echo(line)
    if not found.patched:
        raise typer.Exit(1)


@presets.command("list", epilog="Example: `apt-hooks presets list`")
def presets_list() -> None:
    """Name the presets, with the first line of each and the scripts that take it."""
    for name in preset_names():
        typer.echo(f"{name}  {preset_text(name).splitlines()[0].lstrip('# ').removesuffix('.')}")
        for trainer in TRAINERS:
            if scripts := trainer.SCRIPTS_OF_PRESET.get(name):
                typer.echo(f"    {trainer.NAME}: {', '.join(scripts)}")


@presets.command("show", epilog="Example: `apt-hooks presets show sdxl > apt.toml`")
def presets_show(name: str) -> None:
    """Print a preset, each value with its source."""
    typer.echo(preset_text(name.lower()), nl=False)


@presets.command("apply", epilog="Example: `apt-hooks presets apply sdxl train.toml`")
def presets_apply(
    name: str, config: Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="The training TOML.")]
) -> None:
    """Add `[apt]` with this preset to a training TOML, or change the preset there; all else stays as it is."""
    from apt_hooks.tomledit import apply_preset

    if name.lower() not in preset_names() and str(config).lower() in preset_names():
        raise AptError(f"the preset goes first: `apt-hooks presets apply {config} {_typed(Path(name))}`")
    name = name.lower()
    typer.echo(f"{config}: {apply_preset(config, name)}")
    _note_of_trainer(config, name)


@app.command(epilog="Example: `apt-hooks check train.toml`")
def check(config: Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="The training TOML.")]) -> None:
    """Check the `[apt]` section of a training TOML and print what it comes to."""
    from apt_hooks.stop_rule import StopRule
    from apt_hooks.tomledit import check_section
    from apt_hooks.training.checkpoints import check_rule

    found = check_section(config)
    # Whether there is a validation split is told by the data's own file.
    check_rule(
        found.stop,
        off="" if found.drifts else "drifts = false",
        class_word=bool(found.class_word),
        held_out=found.drifts,
    )
    overrides = found.overrides()
    preset = (
        f"preset {found.preset_name}"
        if found.preset_name
        else "the trainer takes the preset of the model, where it has one, for all but overrides"
    )
    typer.echo(f"{config}: [apt] is valid, {preset}")
    for key in AptConfig.key_names():
        value = None if key == "preset" else getattr(found, key)
        if key == "lambda_offset" and found.measures_offset:
            value = found.offset_weight  # also where it was left open
        if value is not None:
            typer.echo(f"  {key} = {json.dumps(value)}{'  # override' if key in overrides else ''}")
    for key, value in found.ignored.items():
        typer.echo(f'note: objective = "{found.objective}" ignores {key} = {json.dumps(value)}')
    if found.stop is not None and "held_out_gap" in StopRule(found.stop).names:
        typer.echo("note: stop names held_out_gap, so the training needs a validation split")
    _note_of_trainer(config, found.preset_name)


@app.command(epilog="Example: `apt-hooks demo --concept 7 --methods base,dreambooth,dco,apt`")
def demo(
    concept: Annotated[int, typer.Option(help="Number of the concept, from 0 to 13.")] = 3,
    seed: Annotated[
        int, typer.Option(min=0, max=2**31 - 1, help="Random seed; the same seed gives the same numbers.")
    ] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps of each method; 600 if not given.")] = None,
    model: Annotated[str, typer.Option(help="The tiny world's model: unet, or transformer (flow matching).")] = "unet",
    methods: Annotated[
        str,
        typer.Option(
            help="Columns of the comparison: ideal, base, dreambooth, dco, l2-sp, prior, dop, t-lora, t-lora+ortho, "
            "ata, ata+rs, apt, apt+prior, apt+dop, apt+l2-sp, apt+t-lora."
        ),
    ] = "ideal,base,dreambooth,apt",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Trainings side by side, a process each; one a core if not given.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for pictures, numbers and LoRAs.")] = Path("apt-demo"),
) -> None:
    """Personalize a tiny pretrained model with and without APT, and show the difference in pictures and numbers.

    Takes about three minutes on two CPU cores. What each of the methods is: docs/rivals.md.
    """
    from apt_hooks.tinyworld.demo import run_demo
    from apt_hooks.tinyworld.personalize import Training

    training = Training() if steps is None else Training(steps=steps)
    names = [name.strip() for name in methods.split(",") if name.strip()]
    run_demo(
        out,
        concept=concept,
        seed=seed,
        methods=names,
        training=training,
        model=model,
        workers=workers,
        say=typer.echo,
    )


@app.command(epilog="Example: `apt-hooks calibrate out/lora-apt.jsonl`")
def calibrate(
    log: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="A log, RUN-apt.jsonl, with `monitor_only` or not; or its folder."),
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="PICTURE.png", help="Where to draw; RUN-apt-calibrate.png if not given.")
    ] = None,
    scale: Annotated[
        float | None, typer.Option(help="The run's `indicator_scale`, for a log without the key `gap`.")
    ] = None,
) -> None:
    """Propose an `indicator_scale` that fits the model, and draw gamma per bin as it was and would have been.

    Under the proposed scale the run ends (mean of its last tenth) with the upper quartile of its bins at gamma 0.97, as
    the paper's SDXL run did. So let the run be as long as the training is to be.

    Of a run with `monitor_only` and a plain LoRA a `lambda_offset` is proposed as well, to hold the weights.
    """
    from apt_hooks.results.calibrate import calibrate

    calibrate(log, out, scale=scale, say=typer.echo)


def _note_of_trainer(config: Path, preset: str | None) -> None:
    """Tell where the sd-scripts that would be run is not patched: it then trains without APT, and without a word."""
    from apt_hooks.tomledit import is_for_apt_config

    if is_for_apt_config(config):
        return  # an unpatched trainer knows no --apt_config, and says so
    if preset and preset in diffusers.SCRIPTS_OF_PRESET and preset not in sd_scripts.SCRIPTS_OF_PRESET:
        scripts = ", ".join(diffusers.SCRIPTS_OF_PRESET[preset])
        typer.echo(
            f"note: no script of sd-scripts trains this preset's model; diffusers' do with --apt_preset: {scripts}"
        )
        return
    near = [Path(), config.parent, *config.absolute().parents[1:3]]
    within = ("", "sd-scripts", "sd_scripts", "scripts/dev")  # as kohya_ss, LoRA_Easy and lora-scripts carry it
    places = [(place / name).resolve() for place in near for name in within]
    folder = next((place for place in places if (place / "train_network.py").exists()), None)
    what, where = f"no sd-scripts found in {places[0]} or near {config}: an unpatched one", "FOLDER"
    if folder is not None:
        try:
            found = sd_scripts.status(folder)
        except AptError as error:
            typer.echo(f"note: the sd-scripts beside it cannot take [apt]: {error}")
            return
        if found.patched:
            return
        states = dict.fromkeys(state for state in found.state.values() if state != "patched")
        what, where = f"sd-scripts in {folder} is {' and '.join(states)}: an unpatched one", _typed(folder)
    (script,) = sd_scripts.SCRIPTS_OF_PRESET.get(preset or "", ("train_network.py",))
    if folder is not None and folder != places[0]:
        script = _typed(folder / script)
    typer.echo(
        f"note: {what} passes over [apt] without a word. Run `apt-hooks patch sd-scripts {where}`, or start it with "
        f"`accelerate launch -m apt_hooks.launch {script} --config_file {_typed(config)}`"
    )


def _typed(path: Path) -> str:
    """A path as it is typed in a shell."""
    return f'"{path}"' if " " in str(path) else str(path)


def _trainer(name: str, command: str) -> Trainer:
    found = next((trainer for trainer in TRAINERS if name == trainer.NAME), None)
    if found is None:
        path = Path(name)
        meant = sd_scripts if path.is_dir() else diffusers if path.suffix == ".py" else None
        hint = f"; did you mean `apt-hooks {command} {meant.NAME} {_typed(path)}`?" if meant else ""
        raise AptError(f"{name}: no such trainer; there are {_NAMES}{hint}")
    return found


def _tell(change: Change, dry_run: bool, done: str, nothing: str) -> None:
    if dry_run:
        typer.echo(change.diff or f"{change.path}: {nothing}")
    else:
        typer.echo(f"{change.path}: {done if change.changed else nothing}")
