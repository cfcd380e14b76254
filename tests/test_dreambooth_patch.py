"""Patching DreamBooth-LoRA scripts of diffusers: what is found, inserted, refused, undone, and what it computes.

The steps of small scripts are run here with fakes for models and accelerator; whole runs are elsewhere.
"""

from __future__ import annotations

import ast
import contextlib
import itertools
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from apt_hooks.errors import AptError
from apt_hooks.integrations import patching
from apt_hooks.integrations.diffusers_dreambooth import adapter, script_anchors
from apt_hooks.integrations.diffusers_dreambooth import patch as diffusers
from apt_hooks.integrations.patching import MARK

FOLDER = Path(__file__).parent / "dreambooth_scripts"
STAND_INS = ("one_encoder", "two_encoders")
both = pytest.mark.parametrize("name", STAND_INS)


def source(name: str, *edits: tuple[str, str]) -> str:
    """The text of a stand-in, every edit made wherever its text stands."""
    text = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    for old, new in edits:
        assert old in text, old
        text = text.replace(old, new)
    return text


def patched_bytes(folder: Path, content: bytes) -> bytes:
    path, output = folder / "script.py", folder / "script_apt.py"
    path.write_bytes(content)
    output.unlink(missing_ok=True)
    diffusers.patch(path, output)
    assert path.read_bytes() == content
    return output.read_bytes()


def patched(folder: Path, text: str) -> str:
    return patched_bytes(folder, text.encode()).decode()


def refused(folder: Path, text: str | bytes, *said: str) -> str:
    """Patching says all of `said` in one line that names the script, and writes nothing."""
    path = folder / "script.py"
    content = text.encode() if isinstance(text, str) else text
    path.write_bytes(content)
    (folder / "script_apt.py").unlink(missing_ok=True)
    for output in (path, folder / "script_apt.py"):
        with pytest.raises(AptError) as error:
            diffusers.patch(path, output)
        assert [part for part in said if part not in str(error.value)] == [], str(error.value)
        assert "\n" not in str(error.value) and "script.py: " in str(error.value)
        assert path.read_bytes() == content
        assert list(folder.iterdir()) == [path]
    return str(error.value)


def bare(line: str) -> str:
    return line.removesuffix(MARK).strip()


def inserted(text: str) -> list[str]:
    return [bare(line) for line in text.splitlines() if line.endswith(MARK)]


def groups(text: str) -> list[tuple[str, list[str], str]]:
    """Every run of inserted lines, with the line of code or comment above and below it."""
    lines = [line for line in text.splitlines() if line.strip()] + [""]
    found = []
    for marked, numbers in itertools.groupby(range(len(lines)), key=lambda i: lines[i].endswith(MARK)):
        at = list(numbers)
        if marked:
            found.append((lines[at[0] - 1].strip(), [bare(lines[i]) for i in at], lines[at[-1] + 1].strip()))
    return found


def group(text: str, fragment: str) -> tuple[str, list[str], str]:
    (found,) = [found for found in groups(text) if any(fragment in line for line in found[1])]
    return found


def again(text: str) -> list[str]:
    """The lines that make the latents once more, of images that are moved."""
    _, lines, below = group(text, "apt_hooks_run.moves(")
    assert "add_noise(" in below or "scheduler" in below or "* noise" in below
    return lines[1:]


def frozen(text: str) -> list[str]:
    """The lines inside the base model's pass."""
    _, lines, _ = group(text, "apt_hooks_run.frozen_pass()")
    assert lines[0] == "if apt_hooks_run is not None:" and lines[1].startswith("def apt_hooks_again():")
    at = next(i for i, line in enumerate(lines) if line.startswith("return "))
    prediction = lines[at].removeprefix("return ")
    assert lines[at + 1].startswith("apt_hooks_run.begin_step(apt_hooks_again, ")
    assert lines[at + 2 :] == [
        "if apt_hooks_run is not None and apt_hooks_run.frozen_due():",
        "with apt_hooks_run.frozen_pass():",
        f"{prediction} = apt_hooks_again()",
        f"apt_hooks_run.begin_tuned_pass({prediction})",
    ]
    return lines[2:at]


# -- the stand-ins -----------------------------------------------------------------------------------------------------


@both
def test_a_patched_script_is_valid_python_and_unpatched_it_is_what_it_was(tmp_path: Path, name: str) -> None:
    content = source(name).encode()
    new = patched_bytes(tmp_path, content)
    ast.parse(new)
    assert new != content and patching.strip(new) == content


@both
def test_only_whole_marked_lines_are_inserted(tmp_path: Path, name: str) -> None:
    old = source(name)
    new = patched(tmp_path, old)
    assert [line for line in new.splitlines(keepends=True) if not line.endswith(f"  {MARK}\n")] == old.splitlines(
        keepends=True
    )


@both
def test_patching_in_place_twice_equals_once(tmp_path: Path, name: str) -> None:
    path = tmp_path / "script.py"
    path.write_text(source(name))
    assert diffusers.patch(path, path)
    once = path.read_bytes()
    assert diffusers.patch(path, path) == ""
    assert path.read_bytes() == once
    assert patched_bytes(tmp_path, once) == once


@both
def test_without_an_argument_of_apt_hooks_nothing_of_it_is_imported(tmp_path: Path, name: str) -> None:
    new = patched(tmp_path, source(name))
    asked = 'if (getattr(args, "apt_config", None), getattr(args, "apt_preset", None)) != (None, None):'
    _, lines, _ = group(new, "import")
    assert lines[:3] == ["apt_hooks_words = None", "apt_hooks_prompts = None", asked]
    assert all("import" not in line for line in inserted(new) if line not in lines)
    assert group(new, "adapter.start(")[1][:2] == ["apt_hooks_run = None", asked]
    (small,) = [lines for _, lines, _ in groups(patched(tmp_path, script())) if "adapter.start(" in "".join(lines)]
    assert small[:2] == ["apt_hooks_run = None", asked] and "import" in "".join(small)


# A fragment of the inserted lines, and the lines above and below them.
PLACES = {
    "one_encoder": [
        ('parser.add_argument("--apt_config"', 'parser.add_argument("--resume_from_checkpoint"', "return parser."),
        ("adapter.class_words(args, locals())", "optimizer = ", "if args.pre_compute_text_embeddings:"),
        ("words.keep(lambda: compute_text_embeddings(args.instance_prompt))", "instance_text = ", "class_text = "),
        ("words.keep(lambda: compute_text_embeddings(args.class_prompt))", "class_text = ", "text_encoder = tok"),
        ("adapter.start(args, accelerator, unet, noise_scheduler,", "unet, optimizer, train_dataloader = accelerator.p",
         "if accelerator.is_main_process:"),
        ("if apt_hooks_run is not None and apt_hooks_run.augments and apt_hooks_run.moves(timesteps, model_input):",
         "timesteps = timesteps.long()", "noisy_model_input = "),
        ("with apt_hooks_run.frozen_pass():", "class_labels = None", "# Predict the noise"),
        ("model_pred = apt_hooks_run.end_tuned_pass(model_pred)", ")[0]", "if noise_scheduler.config."),
        ("model_pred = apt_hooks_run.assess(model_pred, target, timesteps)", "raise ValueError(",
         "if args.with_prior_preservation:"),
        ("loss = apt_hooks_run.regularized(loss)", "loss = F.mse_loss(", "accelerator.backward(loss)"),
        ("accelerator.log(apt_hooks_run.tracker_values(), step=global_step)", "accelerator.log(logs, step=global_step)",
         "if global_step >= args.max_train_steps:"),
        ("apt_hooks_run is not None and apt_hooks_run.stops:", "break", "if args.validation_epochs and epoch"),
        ("apt_hooks_run.finish()", "break", "accelerator.wait_for_everyone()"),
        ("apt_hooks_run.add_metadata(args.output_dir)", ")", "accelerator.end_training()"),
    ],
    "two_encoders": [
        ('parser.add_argument("--apt_preset"', 'parser.add_argument("--resume_from_checkpoint"', "return parser."),
        ("adapter.class_words(args, locals())", "return prompt_embeds.to(", "# Prompts that do not change"),
        ("words.keep(lambda: compute_text_embeddings(args.instance_prompt, text_encoders, tokenizers))",
         "instance_states, instance_pooled = ", "if args.with_prior_preservation"),
        ("words.keep(lambda: compute_text_embeddings(args.class_prompt, text_encoders, tokenizers))", "class_states",
         "if not args.train_text_encoder and not args.captions:"),
        ("adapter.start(args, accelerator, unet, noise_scheduler,", "unet, optimizer, train_dataloader = accelerator.p",
         "global_step = 0"),
        ("if apt_hooks_run is not None and apt_hooks_run.augments and apt_hooks_run.moves(timesteps, model_input):",
         "timesteps = noise_scheduler.timesteps[indices]", "noisy_model_input = noise_scheduler.add_noise("),
        ("with apt_hooks_run.frozen_pass():", "repeats = 1", "# Predict the noise"),
        ("model_pred = apt_hooks_run.end_tuned_pass(model_pred)", ")[0]", "weighting = None"),
        ("model_pred = apt_hooks_run.assess(model_pred, target, timesteps)", "target = noise_scheduler.get_velocity(",
         "if args.with_prior_preservation:"),
        ("loss = apt_hooks_run.regularized(loss)", "loss = loss + args.prior_loss", "accelerator.backward(loss)"),
        ("accelerator.log(apt_hooks_run.tracker_values(), step=global_step)", "accelerator.log(logs, step=global_step)",
         "if global_step >= args.max_train_steps:"),
        ("apt_hooks_run.finish()", "break", "if accelerator.is_main_process:"),
        ("apt_hooks_run.add_metadata(args.output_dir)", "save_file(saved,", "accelerator.end_training()"),
    ],
}  # fmt: skip


@both
def test_lines_stand_where_they_belong_and_nowhere_else(tmp_path: Path, name: str) -> None:
    found = groups(patched(tmp_path, source(name)))
    assert len(found) == len(PLACES[name])
    for (above, lines, below), (fragment, wanted_above, wanted_below) in zip(found, PLACES[name], strict=True):
        assert any(fragment in line for line in lines), (fragment, lines)
        assert above.startswith(wanted_above) and below.startswith(wanted_below), (fragment, above, below)


@both
def test_a_group_of_lines_is_indented_as_its_neighbour(tmp_path: Path, name: str) -> None:
    lines = patched(tmp_path, source(name)).splitlines()
    indent = [len(line) - len(line.lstrip()) for line in lines]
    at = {fragment: next(i for i, line in enumerate(lines) if fragment in line) for fragment, _, _ in PLACES[name]}
    loop = next(i for i, line in enumerate(lines) if "for epoch in" in line or "while global_step" in line)
    assert indent[at["apt_hooks_run.finish()"] - 1] == indent[loop]
    save = max(i for i, line in enumerate(lines) if "save_directory=args.output_dir" in line)
    metadata = at["apt_hooks_run.add_metadata(args.output_dir)"]
    assert indent[metadata - 1] == 8 and metadata > save


def test_start_stands_between_both_branches_of_prepare_and_the_loading_of_a_checkpoint(tmp_path: Path) -> None:
    for name in STAND_INS:
        lines = patched(tmp_path, source(name)).splitlines()
        start = next(i for i, line in enumerate(lines) if "apt_hooks_run = None" in line)
        assert max(i for i, line in enumerate(lines) if "accelerator.prepare(" in line) < start
        assert start < next(i for i, line in enumerate(lines) if "accelerator.load_state(" in line)
        assert lines[start].startswith("    apt")


def test_what_makes_the_latents_is_made_again_and_nothing_that_is_drawn(tmp_path: Path) -> None:
    assert again(patched(tmp_path, source("one_encoder"))) == [
        "pixel_values = apt_hooks_run.moved(pixel_values)",
        "if vae is not None:",
        "model_input = vae.encode(pixel_values).latent_dist.sample()",
        "model_input = model_input * vae.config.scaling_factor",
        "else:",
        "model_input = pixel_values",
        "model_input = apt_hooks_run.moved(model_input, latents=True)",
    ]
    assert again(patched(tmp_path, source("two_encoders"))) == [
        "model_input = vae.encode(apt_hooks_run.moved(pixel_values)).latent_dist.sample()",
        "model_input = apt_hooks_run.moved(model_input, latents=True)",
        "model_input = model_input * vae.config.scaling_factor",
    ]


# -- small scripts, and running them with fakes ------------------------------------------------------------------------

SCRIPT = """\
def parse_args():
    parser = Parser()
    args = parser.parse_args()
    return args


def main(args):
    unet, text_encoder, text_encoder_two, optimizer, loader = accelerator.prepare(*make())
    accelerator.load_state("checkpoint")
    for epoch in range(1):
        for step, batch in enumerate(loader):
            with accelerator.accumulate(unet):
@ENCODE@
                noise = randn_like(latents)
@DRAW@
                noisy = scheduler.add_noise(latents, noise, timesteps)
@CALL@
                target = noise
                loss = mse_loss(pred, target)
                accelerator.backward(loss)
            accelerator.log({"loss": loss}, step=step)
    accelerator.save_state("checkpoint")
    Pipeline.save_lora_weights(save_directory=args.output_dir)


if __name__ == "__main__":
    main(parse_args())
"""
ENCODE = 'images = batch["pixels"]\nlatents = vae.encode(images).latent_dist.sample()'
DRAW = "timesteps = randint(0, 1000, (latents.shape[0],), device=latents.device)"
CALL = 'emb = text_encoder(batch["ids"])[0]\npred = unet(noisy, timesteps, emb)[0]'


def script(*, encode: str = ENCODE, draw: str = DRAW, call: str = CALL) -> str:
    """`SCRIPT` with these lines in its step."""
    parts = {"@ENCODE@": encode, "@DRAW@": draw, "@CALL@": call}
    lines = []
    for line in SCRIPT.splitlines():
        new = parts[line].splitlines() if line in parts else [line]
        lines += ["                " + part for part in new] if line in parts else new
    return "\n".join(lines) + "\n"


class Value:
    """Stands for a tensor; its text says how it came about. Methods that end in _ and += change it in place."""

    device, dtype = "cpu", "float32"

    def __init__(self, text: str, shape: tuple[int, ...] = (2, 4, 8, 8)) -> None:
        self.text, self.shape = text, shape

    def __repr__(self) -> str:
        return self.text

    def __len__(self) -> int:
        return self.shape[0]

    def __add__(self, other: object) -> Value:
        return Value(f"({self}+{other})", self.shape)

    def __iadd__(self, other: object) -> Value:
        self.text = f"({self}+{other})"
        return self

    def __mul__(self, other: object) -> Value:
        return Value(f"({self}*{other})", self.shape)

    def __getitem__(self, key: object) -> Value:
        return Value(f"{self}[{key}]", self.shape)

    def __setitem__(self, key: object, value: object) -> None:
        self.text = f"{self} with [{key}]={value}"

    def __iter__(self) -> Iterator[Value]:
        return iter([self[0], self[1]])

    def mul_(self, other: object) -> Value:
        self.text = f"({self}*{other})"
        return self

    def size(self, axis: int) -> int:
        return self.shape[axis]

    def to(self, *_: object, **__: object) -> Value:
        return self

    def float(self) -> Value:
        return self


class World:
    """The globals of a small script: models and accelerator that note what they are given.

    Args:
        base: the text encoders are the base model's all along, which is what the frozen pass has to come to.
        flags: more attributes of `args`.
    """

    def __init__(self, *, base: bool = False, **flags: object) -> None:
        self.base, self.phase = base, "plain"
        self.calls: list[tuple[str, str]] = []  # what the U-Net was given in which phase
        self.events: list[str] = []
        self.options: list[str] = []  # what the parser was told, until now and until it parsed
        self.options_parsed: list[str] = []
        self.draws = 0
        self.args = SimpleNamespace(**{"output_dir": "out", "apt_config": None, "apt_preset": None, **flags})

    def encoder(self, name: str) -> Callable[[object], list[Value]]:
        def encode(ids: object) -> list[Value]:
            base = self.base or self.phase == "frozen"
            return [Value(f"{'base' if base else 'tuned'}-{name}({ids})"), Value(f"pooled({ids})")]

        return encode

    def unet(self, *given: object, **named: object) -> Any:
        self.calls.append((self.phase, repr((given, sorted(named.items())))))
        prediction = Value(f"pred{len(self.calls)}")
        return Output([prediction, Value("rest")])

    def draw(self, *_: object, **__: object) -> Value:
        self.draws += 1
        return Value(f"random{self.draws}", (2,))

    def namespace(self) -> dict[str, Any]:
        def note(name: str, result: object = None) -> Callable[..., Any]:
            def called(*given: object, **named: object) -> Any:
                self.events.append(name)
                return result

            return called

        def make() -> list[Any]:
            batches = [{"pixels": Value(f"images{i}"), "ids": f"ids{i}", "ids_two": f"other{i}"} for i in range(2)]
            return [self.unet, self.encoder("one"), self.encoder("two"), "optimizer", batches]

        def parse_args() -> Any:
            self.options_parsed = list(self.options)
            return self.args

        return {
            "Parser": lambda: SimpleNamespace(
                add_argument=lambda name, **_: self.options.append(name), parse_args=parse_args
            ),
            "make": make,
            "accelerator": SimpleNamespace(
                prepare=lambda *models: models,
                accumulate=lambda model: contextlib.nullcontext(),
                autocast=contextlib.nullcontext,
                backward=note("backward"),
                log=note("log"),
                load_state=note("load_state"),
                save_state=note("save_state"),
                print=note("print"),
            ),
            "vae": SimpleNamespace(
                encode=lambda images: SimpleNamespace(
                    latent_dist=SimpleNamespace(sample=lambda: Value(f"latents of {images}"))
                )
            ),
            "scheduler": SimpleNamespace(add_noise=lambda *given: Value(f"noised{given}"), timesteps=Value("table")),
            "Pipeline": SimpleNamespace(save_lora_weights=note("save_lora_weights")),
            "Value": Value,
            "randn_like": self.draw,
            "randint": self.draw,
            "rand": self.draw,
            "mse_loss": lambda *given: Value(f"loss{given}"),
        }

    def train(self, text: str) -> World:
        exec(compile(text, "script.py", "exec"), {**self.namespace(), "__name__": "__main__"})
        return self


class Output(list):  # type: ignore[type-arg]
    """What a U-Net returns: a tuple, or so it seems, with its first element by name."""

    @property
    def sample(self) -> Value:
        return self[0]


class StubRun:
    """Stands for the adapter's run, and notes what it is told."""

    def __init__(self, world: World, *, augments: bool, encodes_text: bool) -> None:
        self.augments, self.encodes_text = augments, encodes_text
        self.world, self.encoded = world, False
        self.told: list[tuple[str, str]] = []
        self.started: list[tuple[Any, ...]] = []
        self.refused: dict[str, Any] = {}

    def moves(self, timesteps: Value, latents: Value) -> bool:
        self.encoded = False
        self.told.append(("moves", repr((latents, timesteps))))
        return True

    def moved(self, images: Value, *, latents: bool = False) -> Value:
        if latents and self.encoded:
            return images
        self.encoded = True
        return Value(f"augmented {images}", images.shape)

    def frozen_due(self) -> bool:
        return True

    @contextlib.contextmanager
    def frozen_pass(self) -> Iterator[None]:
        self.world.phase = "frozen"
        yield
        self.world.phase = "between"

    def begin_tuned_pass(self, prediction: Value) -> None:
        assert repr(prediction) == f"pred{len(self.world.calls)}"
        self.world.phase = "tuned"

    def end_tuned_pass(self, prediction: Value) -> Value:
        assert repr(prediction) == f"pred{len(self.world.calls)}"
        self.world.phase = "plain"
        return prediction

    def assess(self, prediction: Value, target: Value, timesteps: Value) -> Value:
        self.told.append(("assess", repr((prediction, target, timesteps))))
        return Value(f"weighed {prediction}")

    def regularized(self, loss: Value) -> Value:
        self.told.append(("regularized", repr(loss)))
        return loss

    def tracker_values(self) -> dict[str, float]:
        return {}

    def add_metadata(self, folder: str) -> None:
        self.told.append(("add_metadata", folder))

    stops = False

    def reading(self, function: Any) -> Any:
        return function

    def begin_step(self, again: Any, timesteps: Value, latents: Value) -> None:
        pass

    def finish(self) -> None:
        self.told.append(("finish", ""))


class Workshop:
    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.monkeypatch = folder, monkeypatch

    def train(
        self,
        text: str,
        *,
        augments: bool = False,
        encodes_text: bool = True,
        base: bool = False,
        **flags: object,
    ) -> tuple[World, StubRun]:
        """A run of the patched script with APT."""
        world = World(base=base, apt_config="apt.toml", **flags)
        run = StubRun(world, augments=augments, encodes_text=encodes_text)

        def start(*given: Any, **more: Any) -> StubRun:
            run.started.append(given)
            run.refused = {name: why for name, why in more.items() if name in ("masked", "unmoved")}
            return run

        self.monkeypatch.setattr(adapter, "start", start)
        self.monkeypatch.setattr(adapter, "class_words", lambda *given: None)
        self.monkeypatch.setattr(adapter, "probe_prompts", lambda *given: None)
        world.train(patched(self.folder, text))
        assert world.options_parsed == ["--apt_config", "--apt_preset"]
        ((args, accelerator, unet, schedule),) = run.started
        assert args is world.args and unet == world.unet
        assert hasattr(accelerator, "backward") and hasattr(schedule, "add_noise")
        return world, run

    def check_passes(self, text: str, **flags: object) -> None:
        """The tuned pass sees what it sees without APT, the frozen one what it would with the base's text encoders."""
        plain, base = World(**flags).train(text), World(base=True, **flags).train(text)
        without = World(**flags).train(patched(self.folder, text))
        assert (without.calls, without.events) == (plain.calls, plain.events)
        for trained in (True, False):
            # Untrained encoders are the base model's in the tuned pass too.
            world, _ = self.train(text, encodes_text=trained, base=not trained, **flags)
            tuned = [given for phase, given in world.calls if phase == "tuned"]
            frozen = [given for phase, given in world.calls if phase == "frozen"]
            assert [phase for phase, _ in world.calls] == ["frozen", "tuned"] * len(plain.calls)
            assert tuned == [given for _, given in (plain if trained else base).calls]
            assert frozen == [given for _, given in base.calls]
            assert world.draws == plain.draws


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    return Workshop(tmp_path, monkeypatch)


def test_the_lines_are_called_in_the_order_of_a_training_step(workshop: Workshop) -> None:
    world, run = workshop.train(script(), augments=True)
    assert [name for name, _ in run.told] == ["moves", "assess", "regularized"] * 2 + ["finish", "add_metadata"]
    assert run.told[-1] == ("add_metadata", "out")
    assert world.events == ["load_state", "backward", "log", "log", "backward", "log", "log", "save_state",
                            "save_lora_weights"]  # fmt: skip
    assess = [said for name, said in run.told if name == "assess"]
    assert assess[0].startswith("(pred2, random1, random2")  # draws: noise, then timesteps
    assert all("loss(weighed pred" in said for name, said in run.told if name == "regularized")


# -- images that are moved ---------------------------------------------------------------------------------------------

DRAWS = {
    "unpacked shape": "bsz, c, h, w = latents.shape\ntimesteps = randint(0, 1000, (bsz,), device=latents.device)",
    "shape[0]": "timesteps = randint(0, 1000, (latents.shape[0],))",
    "len": "timesteps = randint(0, 1000, (len(latents),))",
    "of the noise": "timesteps = randint(0, 1000, (noise.shape[0],), device=noise.device)",
    "by the latents' height": "bsz, c, h, w = latents.shape\ntimesteps = randint(0, h * w, (bsz,))",
    "of their kind": "timesteps = rand(2, dtype=latents.dtype)",
    "several statements": "timesteps = randint(0, 1000, (len(latents),))\ntimesteps = timesteps * 1",
    "augmented assignment": "timesteps = randint(0, 1000, (len(latents),))\ntimesteps += 1",
    "changed in place": f"{DRAW}\ntimesteps[0] = 5\ntimesteps.mul_(5)",
    "own distribution": "u = rand(len(latents))\nu = u * u\ntimesteps = (u * 1000).to(int)",
    "with something else": "timesteps, w = rand(len(latents)), rand(len(latents))\nprint(w)",
    "by path": "if args.half:\n    timesteps = randint(0, 500, (len(latents),))\n"
    "else:\n    i = rand(len(noise))\n    timesteps = i * 1000",
}


@pytest.mark.parametrize("half", [True, False], ids=["one path", "the other"])
@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_the_augmentation_is_told_the_timesteps_that_the_step_uses_and_nothing_is_drawn_twice(
    workshop: Workshop, draw: str, half: bool
) -> None:
    text = script(draw=draw)
    plain = World(half=half).train(text)
    world, run = workshop.train(text, augments=True, half=half)
    assert world.draws == plain.draws
    tuned = [given for phase, given in world.calls if phase == "tuned"]
    # What the U-Net is given is that of the unpatched script, but for the images.
    assert [given.replace("augmented ", "") for given in tuned] == [given for _, given in plain.calls]
    assert all(given.startswith(f"((noised(latents of augmented images{i}, ") for i, given in enumerate(tuned))
    for (_, moves), (_, assess) in zip(run.told[:6:3], run.told[1:6:3], strict=True):
        timesteps = moves.partition(", ")[2].removesuffix(")")
        assert "random" in timesteps and assess.endswith(f", {timesteps})")
    workshop.check_passes(text, half=half)


ENCODINGS = {
    "beside a cache": (
        'if args.cached:\n    latents = cache[step].sample()\nelse:\n    images = batch["pixels"]\n'
        "    latents = vae.encode(images).latent_dist.sample()"
    ),
    "with": (
        'with accelerator.autocast():\n    images = batch["pixels"]\n'
        "    latents = vae.encode(images).latent_dist.sample()"
    ),
    "straight from the batch": 'latents = vae.encode(batch["pixels"].to(int)).latent_dist.sample()',
    "an expression": 'images = batch["pixels"]\nlatents = vae.encode(images * 2).latent_dist.sample()',
    "the VAE put elsewhere": (
        'coder = vae\nif args.cached:\n    latents = 1\nelse:\n    coder = coder\n    images = batch["pixels"]\n'
        "    latents = coder.encode(images).latent_dist.sample()"
    ),
}


@pytest.mark.parametrize("encode", ENCODINGS.values(), ids=ENCODINGS)
def test_images_are_moved_where_they_are_encoded(workshop: Workshop, encode: str) -> None:
    world, run = workshop.train(script(encode=encode + "\nlatents = latents * 3"), augments=True, cached=False)
    for i, (_, given) in enumerate(world.calls):
        assert f"augmented (images{i // 2}*2)" in given or f"augmented images{i // 2}" in given
        assert given.count("augmented") == 1 and given.count("*3") == 1
    assert run.refused == {}


def test_latents_of_a_cache_are_moved_themselves(workshop: Workshop) -> None:
    text = script(encode=ENCODINGS["beside a cache"] + "\nlatents = latents * 3")
    text = text.replace("    for epoch", '    cache = [Value("kept0"), Value("kept1")]\n    for epoch')
    assert text.count("cache = [") == 1
    world, _ = workshop.train(text.replace("cache[step].sample()", "cache[step] * 1"), augments=True, cached=True)
    assert [given.startswith(f"((noised((augmented (kept{i // 2}*1)*3)") for i, (_, given) in enumerate(world.calls)]


def test_images_that_another_path_takes_as_they_are_are_moved_before_the_paths(workshop: Workshop) -> None:
    encode = (
        'images = batch["pixels"]\nif args.encoded:\n    latents = vae.encode(images).latent_dist.sample()\n'
        "else:\n    latents = images * 1"
    )
    text = script(encode=encode)
    assert again(patched(workshop.folder, text))[0] == "images = apt_hooks_run.moved(images)"
    for encoded in (True, False):
        world, _ = workshop.train(text, augments=True, encoded=encoded)
        assert all(given.count("augmented images") == 1 for _, given in world.calls)


def test_timesteps_may_be_drawn_before_the_encoding(workshop: Workshop) -> None:
    text = script(encode="bsz = 2\ntimesteps = randint(0, 1000, (bsz,))\n" + ENCODE, draw="pass")
    _, run = workshop.train(text, augments=True)
    assert run.told[0] == ("moves", "(latents of images0, random1)")
    workshop.check_passes(text)


UNMOVED = {
    "timesteps of the latents": (
        {"draw": "timesteps = pick(latents.mean() * 1000)"},
        "`timesteps` is made of `latents`",
    ),
    "summed up": (
        {"encode": f"total = 0\n{ENCODE}\ntotal = total + latents.mean()\nlatents = latents * total"},
        "`total = total + latents.mean()` runs once more, and `total` changes",
    ),
    "counted": ({"encode": f"n = []\n{ENCODE}\nn.append(latents)"}, "and `n` changes"),
    "changed since": (
        {"encode": f"factor = 2\n{ENCODE}\nlatents = latents * factor\nfactor = 3"},
        "`latents = latents * factor` runs once more, and `factor` changes",
    ),
}


@pytest.mark.parametrize(("parts", "reason"), UNMOVED.values(), ids=UNMOVED)
def test_latents_that_cannot_be_made_again_are_left_and_the_run_is_told_why(
    tmp_path: Path, parts: dict[str, str], reason: str
) -> None:
    new = patched(tmp_path, script(**parts))
    assert "moves(" not in new
    ((_, lines, _),) = [found for found in groups(new) if any("adapter.start(" in line for line in found[1])]
    (said,) = re.findall(r"unmoved=(.*)\)$", "\n".join(lines), re.MULTILINE)
    assert reason in ast.literal_eval(said)


def test_images_encoded_one_by_one_are_refused(tmp_path: Path) -> None:
    encode = (
        'images = batch["pixels"]\nlatents = Value("")\nfor i in range(2):\n'
        "    latents = latents + vae.encode(images[i]).latent_dist.sample()"
    )
    refused(tmp_path, script(encode=encode), "the encoding of the images in one call", "it in a loop of its own")


# -- the frozen pass ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        'emb = cached(batch["ids"])\npred = unet(noisy, timesteps, emb)[0]',
        "noisy2 = noisy * 2\nif args.labels:\n    labels = rand(2)\nelse:\n    labels = None\n"
        "pred = unet(noisy2, timesteps, labels).sample",
        "for i in range(2):\n    emb = cached(i)\npred = unet(noisy, timesteps, encoder_hidden_states=emb).sample",
    ],
)
def test_without_a_trained_text_encoder_only_the_call_is_repeated(tmp_path: Path, call: str) -> None:
    last = call.splitlines()[-1]
    assert frozen(patched(tmp_path, script(call=call))) == [f"frozen_{last}"]


def test_the_one_statement_of_a_text_encoder_is_repeated_under_other_names(tmp_path: Path) -> None:
    assert frozen(patched(tmp_path, script())) == [
        "frozen_emb = emb",
        "if apt_hooks_run.encodes_text:",
        "frozen_emb = text_encoder(batch['ids'])[0]",
        "frozen_pred = unet(noisy, timesteps, frozen_emb)[0]",
    ]


PASSES = {
    "plain": CALL,
    "two encoders": 'one, two = text_encoder(batch["ids"]), text_encoder_two(batch["ids_two"])\n'
    "emb = one[0] + two[0]\npred = unet(noisy, timesteps, emb)[0]",
    "list of encoders": 'parts = [encoder(batch["ids"])[0] for encoder in (text_encoder, text_encoder_two)]\n'
    "pred = unet(noisy, timesteps, parts)[0]",
    "random numbers besides": f"extra = rand(2)\n{CALL.replace('emb)', 'emb + extra)')}",
    "what does not concern the call": f"{CALL.splitlines()[0]}\naccelerator.print(emb)\nother = rand(2)\n"
    f"{CALL.splitlines()[1]}",
    "keywords and sample": 'emb = text_encoder(batch["ids"])[0]\n'
    'pred = unet(sample=noisy, timestep=timesteps, encoder_hidden_states=emb, more={"emb": emb}).sample',
    "dict, item": 'cond = {"time": 3}\ncond["text"] = text_encoder(batch["ids"])[0]\n'
    "pred = unet(noisy, timesteps, None, added=cond)[0]",
    "dict, update": 'cond = {"time": 3}\ncond.update({"text": text_encoder(batch["ids"])[0]})\n'
    'cond.update(late=4)\npred = unet(noisy, timesteps, None, added=cond)[0]',
    "dict, changed before": 'cond = {"time": 3}\ncond["size"] = 4\ncond.update(text=text_encoder(batch["ids"])[0])\n'
    "pred = unet(noisy, timesteps, None, added=cond)[0]",
    "dict of dicts": 'cond = {"in": {}}\ncond["in"]["text"] = text_encoder(batch["ids"])[0]\n'
    "pred = unet(noisy, timesteps, None, added=cond)[0]",
    "list, append": 'parts = [1]\nparts.append(text_encoder(batch["ids"])[0])\npred = unet(noisy, timesteps, parts)[0]',
    "in place": 'emb = text_encoder(batch["ids"])[0]\nemb.mul_(2)\nemb[0] = 7\npred = unet(noisy, timesteps, emb)[0]',
    "augmented assignment": 'emb = text_encoder(batch["ids"])[0]\nemb += 1\nemb *= 2\n'
    "pred = unet(noisy, timesteps, emb)[0]",
    "assigned twice": 'emb = text_encoder(batch["ids"])[0]\nemb = emb * 2\nemb = emb + emb\n'
    "pred = unet(noisy, timesteps, emb)[0]",
    "annotated": 'emb: Value = text_encoder(batch["ids"])[0]\npred = unet(noisy, timesteps, emb)[0]',
    "several targets": 'a = emb = text_encoder(batch["ids"])[0]\n(b, *c), d = (a, emb), emb\n'
    "pred = unet(noisy, timesteps, emb, a=a, b=b, c=c, d=d)[0]",
    "if and else": "if args.flag:\n    emb = text_encoder(batch['ids'])[0]\n"
    "else:\n    emb = text_encoder(batch['ids_two'])[0] * 2\npred = unet(noisy, timesteps, emb)[0]",
    "elif": "if args.flag is None:\n    emb = 3\nelif args.flag:\n    emb = text_encoder(batch['ids'])[0]\n"
    "else:\n    emb = text_encoder(batch['ids_two'])[0] * 2\npred = unet(noisy, timesteps, emb)[0]",
    "else raises": "if args.flag or True:\n    emb = text_encoder(batch['ids'])[0]\n"
    "else:\n    raise ValueError(args.flag)\npred = unet(noisy, timesteps, emb)[0]",
    "on one path only": "emb = 5\nif args.flag:\n    emb = text_encoder(batch['ids'])[0]\n"
    "pred = unet(noisy, timesteps, emb)[0]",
    "changed on one path": "emb = text_encoder(batch['ids'])[0]\nif args.flag:\n    emb = emb * 2\n"
    "pred = unet(noisy, timesteps, emb)[0]",
    "encoders per path": "if args.flag:\n    pred = unet(noisy, timesteps, text_encoder(batch['ids'])[0])[0]\n"
    "else:\n    emb = text_encoder_two(batch['ids'])[0]\n    pred = unet(noisy, timesteps, emb)[0]",
    "text before the paths": "emb = text_encoder(batch['ids'])[0]\nif args.flag:\n"
    "    pred = unet(noisy, timesteps, emb * 2)[0]\nelse:\n    emb = emb + 1\n"
    "    pred = unet(noisy, timesteps, emb)[0]",
    "with": "with accelerator.autocast():\n    emb = text_encoder(batch['ids'])[0]\n"
    "with accelerator.autocast() as cast:\n    pred = unet(noisy, timesteps, emb)[0]",
    "names of a comprehension": "emb = text_encoder(batch['ids'])[0]\nparts = [part * 2 for part in emb]\n"
    "pred = unet(noisy, timesteps, parts)[0]",
    "f-string": "emb = text_encoder(f\"{batch['ids']}-{len(batch):>3}\")[0]\npred = unet(noisy, timesteps, emb)[0]",
    "non-ASCII": "emb = text_encoder('naïve 写真 \\u2028 \\x85' + batch['ids'])[0]  # é\n"
    "pred = unet(noisy, timesteps, emb)[0]",
    "continued line": "emb = \\\n    text_encoder(batch['ids'])[0] \\\n    * 2\npred = unet(noisy, timesteps, emb)[0]",
    "string of several lines": 'emb = text_encoder("""a\n  photo "of"\n  \'it\' """ + batch["ids"])[0]\n'
    "pred = unet(noisy, timesteps, emb)[0]",
    "another text on one path": "emb = text_encoder(batch['ids'])[0]\nif args.flag:\n    emb = 3\n"
    "pred = unet(noisy, timesteps, emb)[0]",
    "another text on one path, by another name": "emb = text_encoder(batch['ids'])[0]\nother = emb\nif args.flag:\n"
    "    other = 3\npred = unet(noisy, timesteps, other)[0]",
    "nothing of the text is trained": 'pred = unet(noisy, timesteps, batch["ids"])[0]',
}  # fmt: skip


@pytest.mark.parametrize("flag", [True, False], ids=["one path", "the other"])
@pytest.mark.parametrize("call", PASSES.values(), ids=PASSES)
def test_the_tuned_pass_is_that_of_the_plain_script_and_the_frozen_one_the_same_by_the_base(
    workshop: Workshop, call: str, flag: bool
) -> None:
    workshop.check_passes(script(call=call), flag=flag)


WRONG_PASSES = {
    # what differs from call to call
    "caption dropout": "emb = text_encoder(batch['ids'])[0]\nif rand(1):\n    emb = 3\n"
    "pred = unet(noisy, timesteps, emb)[0]",
    "dropout by a function of one's own": "emb = maybe_drop(text_encoder(batch['ids'])[0], 0.1)\n"
    "pred = unet(noisy, timesteps, emb)[0]",
    "numpy's numbers": "emb = text_encoder(batch['ids'])[0] * np.random.binomial(1, 0.9)\n"
    "pred = unet(noisy, timesteps, emb)[0]",
    "given another text in a loop": "emb = text_encoder(batch['ids'])[0]\nfor i in range(2):\n    emb = i\n"
    "pred = unet(noisy, timesteps, emb)[0]",
    # a copied statement reads what was assigned anew between it and the call
    "ids assigned anew": 'ids = batch["ids"]\none = text_encoder(ids)[0]\nids = batch["ids_two"]\n'
    "two = text_encoder_two(ids)[0]\npred = unet(noisy, timesteps, one + two)[0]",
    "encoded under its own name": 'emb = batch["ids"]\nemb = text_encoder(emb)[0]\n'
    "pred = unet(noisy, timesteps, emb)[0]",
    "added to what was there": 'emb = Value("start")\nemb = emb + text_encoder(batch["ids"])[0]\n'
    "pred = unet(noisy, timesteps, emb)[0]",
    "added in place to what was there": 'emb = Value("start")\nemb += text_encoder(batch["ids"])[0]\n'
    "pred = unet(noisy, timesteps, emb)[0]",
    # what is changed in place is older than the step, so that the copy changes the tuned pass's own
    "item of the batch": 'batch["emb"] = text_encoder(batch["ids"])[0]\npred = unet(noisy, timesteps, batch["emb"])[0]',
    "attribute": 'args.emb = text_encoder(batch["ids"])[0]\npred = unet(noisy, timesteps, args.emb)[0]',
    # a second name for what is changed in place
    "alias changed": 'cond = {}\nsame = cond\nsame["text"] = text_encoder(batch["ids"])[0]\n'
    "pred = unet(noisy, timesteps, None, added=cond)[0]",
    "held before it is changed": 'cond = {}\nnamed = {"added": cond}\ncond["text"] = text_encoder(batch["ids"])[0]\n'
    "pred = unet(noisy, timesteps, None, **named)[0]",
    "taken out of the batch": 'emb = text_encoder(batch.pop("ids"))[0]\npred = unet(noisy, timesteps, emb)[0]',
    "item deleted": 'cond = {"text": text_encoder(batch["ids"])[0], "extra": 1}\ndel cond["extra"]\n'
    "pred = unet(noisy, timesteps, None, added=cond)[0]",
    "name deleted": 'tokens = batch["ids"]\nlong = text_encoder(tokens)\nemb = long[0]\ndel tokens, long\n'
    "pred = unet(noisy, timesteps, emb)[0]",
    # names that are assigned within expressions, or mean something else there
    "walrus": 'emb = (states := text_encoder(batch["ids"]))[0]\npred = unet(noisy, timesteps, emb, more=states[0])[0]',
    "comprehension's name is an older one": 'e = text_encoder(batch["ids"])[0]\nparts = [e * 2 for e in e]\n'
    "more = [e * 3 for e in parts]\npred = unet(noisy, timesteps, more)[0]",
    "parameter of a lambda": 'e = text_encoder(batch["ids"])[0]\ntwice = lambda e: e * 2\n'
    "pred = unet(noisy, timesteps, e, more=twice(3))[0]",
    "function of the step": "emb = text_encoder(batch['ids'])[0]\ndef more():\n    return emb * 2\n"
    "pred = unet(noisy, timesteps, more())[0]",
    # a name of one path is asked for on the other
    "assigned on one path and used there": "emb = text_encoder(batch['ids'])[0]\nif args.flag:\n    more = emb * 2\n"
    "added = more if args.flag else None\npred = unet(noisy, timesteps, emb, added=added)[0]",
    "assigned on each path and used there": "if args.flag:\n    one = text_encoder(batch['ids'])[0]\n"
    "else:\n    two = text_encoder(batch['ids'])[0] * 2\n"
    "if args.flag:\n    pred = unet(noisy, timesteps, one)[0]\nelse:\n    pred = unet(noisy, timesteps, two)[0]",
    # what the branch of the call changes in place is the tuned pass's own
    "list lengthened beside the call": "parts = [1]\nif args.flag:\n    parts.append(2)\n"
    "    pred = unet(noisy, timesteps, parts)[0]\nelse:\n    pred = unet(noisy, timesteps, parts)[0]",
    # the optimizer and the data loader are prepared too, but encode no text
    "asks the data loader": 'extra = rand(len(loader))\nemb = text_encoder(batch["ids"])[0]\n'
    "pred = unet(noisy, timesteps, emb, extra=extra)[0]",
    # the script's own variable has the name of a copy
    "frozen_ is taken": 'frozen_emb = Value("cached")\nemb = text_encoder(batch["ids"])[0]\n'
    "pred = unet(noisy, timesteps, emb, other=frozen_emb)[0]",
}  # fmt: skip


RIGHT_PASSES = {
    "item deleted", "parameter of a lambda", "assigned on one path and used there",
    "assigned on each path and used there", "list lengthened beside the call", "asks the data loader",
    "frozen_ is taken",
}  # fmt: skip
"""Those that are repeated; the others are refused."""


@pytest.mark.parametrize("flag", [True, False], ids=["one path", "the other"])
@pytest.mark.parametrize("name", WRONG_PASSES)
def test_passes_that_are_hard_to_repeat_are_repeated_right_or_refused(
    workshop: Workshop, name: str, flag: bool
) -> None:
    text = script(call=WRONG_PASSES[name])
    if name not in RIGHT_PASSES:
        refused(workshop.folder, text, "Nothing was changed")
        return
    workshop.check_passes(text, flag=flag)


@pytest.mark.parametrize(
    ("statement", "shown"),
    [
        ("for part in range(2):\n    emb = emb + part", "for part in range(2):"),
        ("while not emb:\n    emb = emb + 1", "while not emb:"),
        ("try:\n    emb = emb + 1\nexcept TypeError:\n    pass", "try:"),
        ("with accelerator.autocast():\n    for part in range(2):\n        emb = emb + part", "for part in range(2):"),
    ],
)
def test_statements_that_the_base_model_cannot_repeat_are_refused(tmp_path: Path, statement: str, shown: str) -> None:
    emb, pred = CALL.splitlines()
    call = f"{emb}\n{statement}\n{pred}"
    found = refused(
        tmp_path, script(call=call), "looked for assignments and `if` between the text encoding and the U-N"
    )
    assert f"found `{shown}`" in found


def test_other_statements_may_stand_between_where_they_are_not_repeated(workshop: Workshop) -> None:
    emb, pred = CALL.splitlines()
    workshop.check_passes(script(call=f"for i in range(2):\n    extra = i\n{emb}\ntry:\n    other = 1\n"
                                      f"except TypeError:\n    pass\n{pred}"))  # fmt: skip


def test_a_block_that_draws_and_encodes_text_is_repeated_right_or_refused(workshop: Workshop) -> None:
    draw = f"with accelerator.autocast():\n    {DRAW}\n    {CALL.splitlines()[0]}"
    text = script(draw=draw, call=CALL.splitlines()[1])
    try:
        patched(workshop.folder, text)
    except AptError as error:
        assert "\n" not in str(error) and "Nothing was changed" in str(error)
        return
    workshop.check_passes(text)


# -- text that is encoded before the training --------------------------------------------------------------------------

HELPERS = """\
def encode(encoder, text):
    return encoder(text)


def main(args):
    text_encoder = Model.from_pretrained()
    tokenizer = Tokenizer.from_pretrained()
    text_encoder.to(device)
    encoders = [text_encoder]

    def compute(text):
        return encode(text_encoder, text)

"""


@pytest.mark.parametrize(
    ("line", "again"),
    [
        ("a = compute(args.prompt)", "compute(args.prompt)"),
        ("a, b = encode(text_encoder, args.prompt)", "encode(text_encoder, args.prompt)"),
        ("a = encode(encoder=encoders, text=args.prompt).to(device)", "encode(encoder=encoders, text=args.prompt)"),
        ("a = text_encoder(args.prompt)[0]", "text_encoder(args.prompt)"),
        ("made.append(compute(args.prompt))", "compute(args.prompt)"),
        ("made = [compute(text) for text in args.captions]", "[compute(text) for text in args.captions]"),
        ("made = {t: encode(text_encoder, t) for t in args.captions}", "{t: encode(text_encoder, t) for t in args.cap"),
        ("a = encode(text_encoder, compute(args.prompt))", "encode(text_encoder, compute(args.prompt))"),
        ("args.prompt = compute(args.prompt)", "compute(args.prompt)"),
    ],
)
def test_what_encodes_text_before_the_training_is_told_once_more(tmp_path: Path, line: str, again: str) -> None:
    made = f"{HELPERS}    if args.once:\n        {line}\n"
    new = patched(tmp_path, script().replace("def main(args):\n", made))
    above, (guard, kept, *asked), _ = group(new, "apt_hooks_words.keep(")
    assert above == line and guard == "if apt_hooks_words is not None:"
    assert kept.startswith(f"apt_hooks_words.keep(lambda: {again}") and kept.endswith(")")
    # Functions of the script, and not the encoder itself, are given the prompt in place of a text.
    whole = kept.removeprefix("apt_hooks_words.keep(lambda: ")
    read = re.sub(r"\b(compute|encode)\(", r"apt_hooks_prompts.reading(\1)(", whole)
    assert asked == ["if apt_hooks_prompts is not None:", f"apt_hooks_prompts.keep(lambda: {read}"]
    _, making, below = group(new, "adapter.class_words(args, locals())")
    assert making[:2] == ["apt_hooks_words = None", "apt_hooks_prompts = None"] and below == "if args.once:"


@pytest.mark.parametrize(
    "line",
    [
        "a = tokenizer(args.prompt)",
        "a = encode(tokenizer, args.prompt)",
        "a = text_encoder.parameters()",
        "text = compute(text)",
        "a = compute(random.choice(args.captions))",
        "a = lambda text: compute(text)",
        "for text in compute(args.prompt):\n            pass",
    ],
)
def test_what_encodes_nothing_or_could_not_be_run_again_is_not(tmp_path: Path, line: str) -> None:
    made = f"{HELPERS}    if args.once:\n        {line}\n"
    new = patched(tmp_path, script().replace("def main(args):\n", made))
    assert "apt_hooks_words.keep(" not in new
    _, lines, _ = group(new, "adapter.class_words(args, locals())")
    assert lines[0] == "apt_hooks_run = None", "where the run starts"


def test_a_step_that_cannot_be_given_other_text_says_why_when_words_are_given(tmp_path: Path) -> None:
    call = "emb = compute(choice(batch['captions']))\npred = unet(noisy, timesteps, emb)[0]"
    new = patched(tmp_path, script(call=call).replace("def main(args):\n", HELPERS))
    _, lines, _ = group(new, "adapter.class_words(")
    (line,) = [line for line in lines if "class_words(" in line]
    assert re.search(r"locals\(\), .script\.py: looked for nothing drawn at random .* found `compute\(choice\(", line)
    assert frozen(new) == ["frozen_pred = unet(noisy, timesteps, emb)[0]"]
    new = patched(tmp_path, script(call=call.replace("choice", "list")).replace("def main(args):\n", HELPERS))
    assert "frozen_emb = apt_hooks_run.reading(compute)(list(batch['captions']))" in frozen(new)


# -- what users make of their scripts ----------------------------------------------------------------------------------

NAMES = {
    "unet": "denoiser", "model_pred": "guess", "target": "goal", "noise_scheduler": "ddpm", "accelerator": "acc",
    "args": "options", "timesteps": "ts", "loss": "total", "vae": "coder", "pixel_values": "photos", "parser": "cli",
    "model_input": "z", "noise": "eps", "bsz": "n", "batch": "data", "text_encoder": "words", "global_step": "count",
    "text_encoder_one": "words_a", "prompt_embeds": "p", "conditions": "given",
}  # fmt: skip


def renamed(text: str, names: dict[str, str]) -> str:
    """All variables of these names, and their copies, but no attribute."""
    for old, new in names.items():
        text = re.sub(rf"(?<!the )(?<![\w.\"'])((?:frozen_)?){old}(?![\w\"'])", rf"\g<1>{new}", text)
        text = text.replace(f'"{old}" in locals()', f'"{new}" in locals()')
    return text


@pytest.mark.parametrize(
    "names", [NAMES, *({old: new} for old, new in NAMES.items())], ids=lambda names: ",".join(names)
)
@both
def test_the_names_of_variables_do_not_matter(tmp_path: Path, name: str, names: dict[str, str]) -> None:
    old = source(name)
    assert renamed(old, names) != old or len(names) == 1
    ast.parse(renamed(old, names))
    assert patched(tmp_path, renamed(old, names)) == renamed(patched(tmp_path, old), names)


@pytest.mark.parametrize("loss", ["F.smooth_l1_loss", "F.huber_loss", "my_loss", "losses.robust", "diffusion_loss"])
@both
def test_another_loss_of_the_prediction_is_found(tmp_path: Path, name: str, loss: str) -> None:
    edit = ("F.mse_loss", loss)
    assert inserted(patched(tmp_path, source(name, edit))) == inserted(patched(tmp_path, source(name)))


@pytest.mark.parametrize(
    "loss",
    [
        "loss = ((pred.float() - target.float()) ** 2).mean()",
        "loss = (target - pred).abs()",
        "loss = mse_loss(target, pred)",
        "loss = weights * mse_loss(pred.to(float), target.to(float), reduction='none')",
        "error = target - pred\nloss = error * error",
        "huber = True\nif huber:\n    loss = huber_loss(pred, target)\nelse:\n    loss = mse_loss(pred, target)",
    ],
)
def test_prediction_and_target_are_assessed_before_whatever_loss_is_taken_of_them(tmp_path: Path, loss: str) -> None:
    text = script().replace("loss = mse_loss(pred, target)", loss.replace("\n", "\n" + 16 * " "))
    _, lines, below = group(patched(tmp_path, text), "apt_hooks_run.assess(")
    assert lines[1] == "pred = apt_hooks_run.assess(pred, target, timesteps)"
    assert below == next(line for line in loss.splitlines() if not line.startswith("huber ="))


def test_an_extra_term_of_the_loss_is_part_of_what_is_regularized(tmp_path: Path) -> None:
    extra = "extra = extra_loss(model_pred, model_input)\n                loss = loss + 0.1 * extra\n"
    text = source("one_encoder", ("accelerator.backward(loss)", f"{extra}                accelerator.backward(loss)"))
    new = patched(tmp_path, text)
    above, _, below = group(new, "apt_hooks_run.regularized(loss)")
    assert (above, below) == ("loss = loss + 0.1 * extra", "accelerator.backward(loss)")
    assert "assess(model_pred, target, timesteps)" in new


@pytest.mark.parametrize(
    "extra",
    ["mse_loss(pred, teacher)", "(pred - latents).mean()", "perceptual_loss(pred, latents)", "mse_loss(pred, noisy)"],
)
@pytest.mark.parametrize("loss", ["mse_loss(pred, target)", "((pred - target) ** 2).mean()"])
def test_of_several_comparisons_the_target_is_made_from_the_noise(tmp_path: Path, extra: str, loss: str) -> None:
    lines = f"extra = {extra}\n{16 * ' '}loss = {loss} + extra"
    text = script(call=f"teacher = old(noisy)\n{CALL}").replace("loss = mse_loss(pred, target)", lines)
    assert "assess(pred, target, timesteps)" in patched(tmp_path, text)


def test_a_mask_on_both_sides_is_refused_where_the_difference_could_not_be_measured_before_it(tmp_path: Path) -> None:
    masked = "target = target * mask\n                pred = pred * mask\n                loss = mse_loss(pred, target)"
    refused(tmp_path, script().replace("loss = mse_loss(pred, target)", masked), "looked for masks in the loss")
    other = "pred = pred * mask\n                target = target * mask\n                loss = mse_loss(pred, target)"
    _, _, below = group(patched(tmp_path, script().replace("loss = mse_loss(pred, target)", other)), ".assess(")
    assert below == "pred = pred * mask"


@pytest.mark.parametrize(
    ("before", "loss", "told"),
    [
        ("", "loss = (error * batch['masks']).mean()", "loss = (error * batch['masks']).mean()"),
        ("", "error *= interpolate(batch['masks'], size=8)\nloss = error.mean()", "error *= interpolate("),
        (
            "masks = batch['masks'].to(device)\nsmall = interpolate(masks)\n",
            "loss = (error * small).mean()",
            "* small)",
        ),
        ("", "if masked:\n    error = error * batch['masks']\nloss = error.mean()", "error = error * batch['masks']"),
        ("count = noise.shape[0] + 1\n", "loss = (error * snr_weights(schedule, timesteps)).mean() * count", None),
        ("", "loss = error.mean()", None),
        (
            "",
            "loss = error.mean()\nif told and 'n' in batch:\n    accelerator.log({n: loss for n in batch['n']})",
            None,
        ),
    ],
)
def test_what_a_loss_takes_of_the_batch_is_told_to_the_run(
    tmp_path: Path, before: str, loss: str, told: str | None
) -> None:
    lines = f"{before}error = mse_loss(pred, target, reduction='none')\n{loss}".replace("\n", "\n" + 16 * " ")
    new = patched(tmp_path, script().replace("loss = mse_loss(pred, target)", lines))
    _, made, _ = group(new, "adapter.start(")
    (start,) = [line for line in made if "adapter.start(" in line]
    assert ("masked=" in start) == (told is not None)
    assert told is None or told in start


def test_a_second_picture_of_the_batch_is_refused(tmp_path: Path) -> None:
    encode = f"{ENCODE}\nmasked = vae.encode(batch['masked']).latent_dist.sample()"
    refused(tmp_path, script(encode=encode), "looked for one encoding of the images", "`vae.encode(batch['masked'])`")


def test_halves_of_a_batch_under_another_argument_are_refused(tmp_path: Path) -> None:
    text = source("one_encoder", ("with_prior_preservation", "with_class_images"))
    refused(
        tmp_path, text, "looked for the argument `with_prior_preservation`", "found `torch.chunk(model_pred, 2, dim=0)`"
    )


@pytest.mark.parametrize("chunk", ["torch.chunk(model_pred, 2, dim=1)", "model_pred.chunk(2, 1)"])
def test_a_variance_that_is_cut_off_is_no_half_of_a_batch(tmp_path: Path, chunk: str) -> None:
    cut = "                if model_pred.shape[1] == 6:\n                    model_pred, _ = " + chunk + "\n\n"
    before = "                if noise_scheduler.config.prediction_type == "
    prior = source("one_encoder").partition("                if args.with_prior_preservation:\n")[2]
    prior = prior.partition("                else:\n")[0]
    text = source(
        "one_encoder",
        (before + '"epsilon"', cut + before + '"epsilon"'),
        (
            "                if args.with_prior_preservation:\n" + prior,
            "                if False:\n                    pass\n",
        ),
        ("with_prior_preservation=args.with_prior_preservation", ""),
    )
    assert "args.with_prior_preservation" not in text
    assert "model_pred, _ = " in patched(tmp_path, text)


@pytest.mark.parametrize(
    "chunk", ["model_pred.chunk(2)", "torch.chunk(model_pred, 2)", "model_pred.chunk(2, dim=axis)"]
)
def test_halves_are_found_however_they_are_made(tmp_path: Path, chunk: str) -> None:
    edits = ("with_prior_preservation", "with_class_images"), ("torch.chunk(model_pred, 2, dim=0)", chunk)
    refused(tmp_path, source("one_encoder", *edits), "looked for the argument `with_prior_preservation`", chunk)


def test_a_script_that_logs_to_no_tracker_is_patched(workshop: Workshop) -> None:
    text = script()
    (log,) = re.findall(r"^.*accelerator\.log\(.*$", text, flags=re.MULTILINE)
    text = text.replace(log + "\n", "")
    assert "tracker_values" not in patched(workshop.folder, text)
    workshop.check_passes(text)


def test_text_encoders_may_be_looped_over(workshop: Workshop) -> None:
    text = script().replace(
        "    for epoch in", "    for model in (unet, text_encoder):\n        pass\n    for epoch in"
    )
    workshop.check_passes(text)


def test_an_extra_loss_above_does_not_make_its_other_side_the_target(tmp_path: Path) -> None:
    extra = "extra = extra_loss(pred, noisy)\n                loss = mse_loss(pred, target) + extra"
    text = script().replace("loss = mse_loss(pred, target)", extra)
    try:
        new = patched(tmp_path, text)
    except AptError as error:
        assert "target" in str(error) and "noisy" in str(error)
    else:
        assert "assess(pred, target, timesteps)" in new


def test_a_target_that_is_the_noise_itself_needs_no_assignment_of_its_own(workshop: Workshop) -> None:
    text = (
        script()
        .replace("                target = noise\n", "")
        .replace("mse_loss(pred, target)", "mse_loss(pred, noise)")
    )
    _, run = workshop.train(text)
    assert [said for name, said in run.told if name == "assess"] == [
        "(pred2, random1, random2)",
        "(pred4, random3, random4)",
    ]


def test_the_prediction_may_be_called_sample(tmp_path: Path) -> None:
    new = patched(tmp_path, source("one_encoder", ("return_dict=False,\n                )[0]", ").sample")))
    assert any(re.fullmatch(r"frozen_model_pred = unet\(.*\)\.sample", line) for line in inserted(new))


@both
def test_tabs_stay_tabs(tmp_path: Path, name: str) -> None:
    def tabbed(text: str) -> str:
        return re.sub(r"^(?: {4})+", lambda found: "\t" * (len(found[0]) // 4), text, flags=re.MULTILINE)

    new = patched(tmp_path, tabbed(source(name)))
    ast.parse(new)
    assert patching.strip(new.encode()).decode() == tabbed(source(name))
    assert ast.dump(ast.parse(new)) == ast.dump(ast.parse(patched(tmp_path, source(name))))


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"], ids=["plain", "bom"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"], ids=["lf", "crlf"])
@both
def test_line_endings_and_byte_order_mark_are_kept(tmp_path: Path, name: str, newline: str, start: bytes) -> None:
    content = start + source(name).replace("\n", newline).encode()
    new = patched_bytes(tmp_path, content)
    assert new == start + patched(tmp_path, source(name)).replace("\n", newline).encode()
    assert patching.strip(new) == content
    ast.parse(new)


def test_text_in_any_language_is_kept_and_hides_no_statement(workshop: Workshop) -> None:
    text = script(
        call="emb = text_encoder('写真 ' + batch['ids'])[0]  # é; 学習\npred = unet(noisy, timesteps, emb)[0]  # ü"
    )
    text = text.replace('{"loss": loss}, step=step)', '{"損失": loss}, step=step)  # ; 記録')
    workshop.check_passes(text)
    refused(
        workshop.folder, text.replace("  # ; 記録", "; x = 1"), '`accelerator.log({"損失": loss}, step=step); x = 1`'
    )


def test_the_encoding_that_a_script_declares_is_kept_or_refused(workshop: Workshop) -> None:
    call = "emb = text_encoder('é' + batch['ids'])[0]\npred = unet(noisy, timesteps, emb)[0]"
    content = f"# -*- coding: latin-1 -*-\n{script(call=call)}".encode("latin-1")
    try:
        new = patched_bytes(workshop.folder, content)
    except AptError as error:
        assert "latin-1" in str(error) or "UTF-8" in str(error)
    else:
        assert "text_encoder('é' + " in group(new.decode("latin-1"), "frozen_pass")[1][4]


COMMENTED = {
    "unet, text_encoder, text_encoder_two, optimizer, loader = ": None,
    "latents = vae.encode(": None,
    "noisy = scheduler.add_noise(": "apt_hooks_run.moves(",
    "pred = unet(": "apt_hooks_run.frozen_pass()",
    "loss = mse_loss(": "apt_hooks_run.assess(",
    "accelerator.backward(": "apt_hooks_run.regularized(",
    "args = parser.parse_args()": '"--apt_config"',
}


@pytest.mark.parametrize("anchor", COMMENTED)
def test_comments_stay_with_the_statement_below_them(workshop: Workshop, anchor: str) -> None:
    comment = ["# first of two", "# second"]
    text = re.sub(
        rf"^( *)({re.escape(anchor)})", rf"\1{comment[0]}\n\1{comment[1]}\n\1\2", script(), flags=re.MULTILINE
    )
    new = patched(workshop.folder, text)
    if COMMENTED[anchor]:
        assert group(new, COMMENTED[anchor])[2] == comment[0]
    plain = [line for line in new.splitlines() if line.strip() not in comment]
    assert plain == patched(workshop.folder, script()).splitlines()


def test_a_string_that_ends_like_a_comment_is_not_written_into(workshop: Workshop) -> None:
    emb, pred = CALL.splitlines()
    text = script(call=f'{emb}\nnote = """\n# all of it"""\n{pred}')
    workshop.check_passes(text)


def lines_between(text: str, first: str, last: str) -> list[str]:
    lines = text.splitlines()
    return lines[lines.index(first) + 1 : lines.index(last)]


def body() -> list[str]:
    """What main() does, without indentation."""
    return [line[4:] for line in lines_between(script(), "def main(args):", 'if __name__ == "__main__":')]


def indented(lines: list[str]) -> list[str]:
    return ["    " + line for line in lines]


PARSE = ["parser = Parser()", "args = parser.parse_args()"]
MAINS = {
    "main parses": script()
    .replace("def main(args):", "def main():\n    args = parse_args()")
    .replace("main(parse_args())", "main()"),
    "main has the parser": "\n".join(["def main():", *indented(PARSE + body()), "main()"]) + "\n",
    "no main": "\n".join(PARSE + body()) + "\n",
    "main and a global": script().replace("    main(parse_args())", "    args = parse_args()\n    main(args)"),
    "main with more": script().replace("main(args):", "main(args, more=None):"),
}


@pytest.mark.parametrize("text", MAINS.values(), ids=MAINS)
def test_the_arguments_are_found_wherever_they_are_parsed(workshop: Workshop, text: str) -> None:
    workshop.check_passes(text)


HARD_MAINS = {
    "main parses under another name": script().replace("def main(args):", "def main():\n    options = parse_args()")
    .replace("args.output_dir", "options.output_dir").replace("main(parse_args())", "main()"),
    "all under the guard": "\n".join(['if __name__ == "__main__":', *indented(PARSE + body())]) + "\n",
    "parser outside, the rest under the guard": "\n".join([*PARSE, 'if __name__ == "__main__":', *indented(body())])
    + "\n",
    "parser under the guard": script().replace("    main(parse_args())", "\n".join(indented([*PARSE, "main(args)"])))
    .replace("\n".join(script().splitlines()[:4]), ""),
    "all in try": "\n".join(
        ["def main(args):", "    try:", *indented(indented(body())), "    finally:", "        pass",
         *script().splitlines()[:4], "main(parse_args())"]
    ) + "\n",
    "all in with": "\n".join(
        ["def main(args):", "    with accelerator.autocast():", *indented(indented(body())),
         *script().splitlines()[:4], "main(parse_args())"]
    ) + "\n",
    "method": "\n".join(
        ["class Trainer:", "    def main(self, args):", *indented(indented(body())),
         *script().splitlines()[:4], "Trainer().main(parse_args())"]
    ) + "\n",
    "method that keeps the arguments": "\n".join(
        ["class Trainer:", "    def main(self):", *indented(indented(body())),
         *script().splitlines()[:4], "trainer = Trainer()", "trainer.args = parse_args()", "trainer.main()"]
    ).replace("args.output_dir", "self.args.output_dir") + "\n",
    "the arguments second": script().replace("main(args):", "main(rank, args):").replace("main(parse", "main(0, parse"),
    "a parser of something else first": "def configure():\n    other = OtherParser()\n    return other.parse_args()\n\n"
    "configure()\n" + script(),
    "schedule made after prepare": script().replace("    accelerator.load_state(",
    "    schedule = scheduler\n    accelerator.load_state(").replace("scheduler.add_noise", "schedule.add_noise"),
    "schedule made in the loop": script(draw=f"schedule = scheduler\n{DRAW}").replace(
        "scheduler.add_noise", "schedule.add_noise"
    ),
}  # fmt: skip


RIGHT_MAINS = HARD_MAINS.keys() - {"method that keeps the arguments", "schedule made in the loop"}


@pytest.mark.parametrize("name", HARD_MAINS)
def test_scripts_put_together_otherwise_run_or_are_refused(workshop: Workshop, name: str) -> None:
    text = HARD_MAINS[name]
    other = SimpleNamespace(add_argument=lambda *_, **__: None, parse_args=lambda: None)
    namespace = World.namespace
    workshop.monkeypatch.setattr(World, "namespace", lambda world: {**namespace(world), "OtherParser": lambda: other})
    World().train(text)
    if name not in RIGHT_MAINS:
        refused(workshop.folder, text, "Nothing was changed")
        return
    workshop.check_passes(text)


# -- what is refused ---------------------------------------------------------------------------------------------------

MISSING = {
    "own backward": ("accelerator.backward(loss)", "loss.backward()",
                     "the backward pass, `accelerator.backward(loss)` in a training loop, the loss a variable",
                     "found `loss.backward()` in line "),
    "no backward": ("accelerator.backward(loss)", "pass", "the backward pass", "found none"),
    "two backward passes": ("accelerator.backward(loss)", "accelerator.backward(loss)\n" + 16 * " " +
                            "accelerator.backward(more)", "the backward pass",
                            "found `accelerator.backward(loss)` in line ", ", `accelerator.backward(more)` in line "),
    "sum in backward": ("accelerator.backward(loss)", "accelerator.backward(loss + 1)", "the loss a variable",
                        "found `accelerator.backward(loss + 1)`"),
    "no prepare": ("accelerator.prepare(", "my_prepare(", "models, assigned from `accelerator.prepare(...)`", "none"),
    "another's prepare": ("accelerator.prepare(", "other.prepare(", "assigned from `accelerator.prepare(...)`",
                          "found `other.prepare(unet, text_encoder, optimizer, train_dataloader)` in line "),
    "no noising": (".add_noise(", ".scale_noise(", "the noising, a call of .add_noise(...) or one "
                   "`(1 - sigmas) * latents + sigmas * noise`", "found none"),
    "another U-Net": ("model_pred = unet(", "model_pred = other(", "the call of the U-Net", "of a prepared model",
                      "found none"),
    "U-Net is given no noise": ("                    noisy_model_input,\n", "                    noise,\n",
                                "the call of the U-Net", "found `unet(noise, timesteps, "),
    "two calls": ("                class_labels = None\n", "                class_labels = None\n"
                  "                model_pred = unet(noisy_model_input, timesteps)[0]\n",
                  "one call of the U-Net a step", "found `unet(noisy_model_input, timesteps)` in line ", ", `unet("),
    "two predictions": ("                class_labels = None\n", "                class_labels = None\n"
                        "                other_pred = unet(noisy_model_input, timesteps)[0]\n",
                        "one name for the U-Net's prediction", "found model_pred, other_pred"),
    "output as a whole": (")[0]\n\n", ")\n\n", "`x = model(noisy, timesteps, ...)[0]` or `.sample`", "found `unet("),
    "no encoding": (".latent_dist.sample()", ".latents", "the encoding of the images, `vae.encode(images).latent_dist`",
                    "found none"),
    "no images": ("vae.encode(pixel_values)", "vae.encode()", "the images, as what the VAE encodes", "`vae.encode()`"),
    "timesteps inline": ("                    timesteps,\n", "                    timesteps.long(),\n",
                         "the timesteps, a variable given to the U-Net", "found `timesteps.long()`"),
    "timesteps drawn elsewhere": ("timesteps = t", "drawn = t", "the draw of `timesteps` before the noise is added",
                                  "found none beside it"),
    "no loss": ("F.mse_loss(", "F.distance(", "the loss of `model_pred`, such as `mse_loss(model_pred, ", "none"),
    "loss of another": ("F.mse_loss(model_pred.f", "F.mse_loss(my_pred.f", "the loss of `model_pred`",
                        "found `F.mse_loss(my_pred.float(), target.float(), reduction='mean')` in line "),
    "no target": (" target = noise", " goal = noise", "the assignment of the target `target` beside the U-Net's call",
                  "found none"),
    "no saving of states": ("accelerator.save_state(", "print(", "a call of accelerator.save_state(...)", "none"),
    "no loading of states": ("accelerator.load_state(", "print(", "a call of accelerator.load_state(...)", "none"),
    "no LoRA saved": ("save_lora_weights(\n            save_directory=", "save(\n            save_directory=",
                      "the saving of the LoRA, `.save_lora_weights(save_directory=...)` after training", "found none"),
    "LoRA saved without a folder": ("            save_directory=args.output_dir,\n", "", "save_directory=...",
                                    "found `StableDiffusionLoraLoaderMixin.save_lora_weights(unet_lora_layers="),
    "no parsing": ("parser.parse_args(", "parser.parse(", "the argument parser, `parser.parse_args()`", "found none"),
    "two on a line": ("accelerator.backward(loss)", "accelerator.backward(loss); x = 1", "one statement in line ",
                      "found `accelerator.backward(loss); x = 1`; put each on a line of its own"),
    "second on a line": ("accelerator.backward(loss)", "x = 1; accelerator.backward(loss)", "one statement in line "),
    "behind an if": ("accelerator.backward(loss)", "if loss: accelerator.backward(loss)", "one statement in line "),
    "no Python": ("def main(args):", "def main(args:", "cannot be read as Python"),
    "Python 2": ("accelerator.end_training()", "print 'done'", "cannot be read as Python"),
    "null byte": ("accelerator.end_training()", "\0", "cannot be read as Python"),
}  # fmt: skip


@pytest.mark.parametrize(("old", "new", "said"), [(o, n, s) for o, n, *s in MISSING.values()], ids=MISSING)
def test_a_missing_or_ambiguous_anchor_is_refused_with_what_was_found(
    tmp_path: Path, old: str, new: str, said: list[str]
) -> None:
    edits = [(old, new)]
    if new == "def main():":
        edits.append(("    args = parse_args()\n    main(args)", "    main()"))
    refused(tmp_path, source("one_encoder", *edits), *said)


@pytest.mark.parametrize("text", ["", "\n", "# nothing\n", "x = 1\n"], ids=["empty", "newline", "comment", "statement"])
def test_another_program_is_refused(tmp_path: Path, text: str) -> None:
    refused(
        tmp_path, text, "looked for the backward pass, `accelerator.backward(loss)` in a training loop; found none. "
    )


def test_a_broken_script_is_told_with_its_line(tmp_path: Path) -> None:
    said = refused(tmp_path, "x = 1\ny = (\n", "cannot be read as Python", "line 2")
    assert "<unknown>" not in said


def test_an_anchor_that_ends_the_file_without_a_newline_is_refused(tmp_path: Path) -> None:
    text = MAINS["no main"].rstrip("\n")
    assert text.endswith("save_lora_weights(save_directory=args.output_dir)")
    refused(tmp_path, text, "ends the file without a newline; add one")


@pytest.mark.parametrize("act", [lambda path: diffusers.patch(path, path), diffusers.unpatch, diffusers.status])
@pytest.mark.parametrize(("name", "said"), [("missing.py", "cannot be read: "), (".", "is a folder; ")])
def test_what_is_no_file_is_refused(tmp_path: Path, act: Callable[[Path], object], name: str, said: str) -> None:
    with pytest.raises(AptError, match=re.escape(f"{tmp_path / name}: {said}")) as error:
        act(tmp_path / name)
    assert "\n" not in str(error.value) and "name a training script" in str(error.value)


# -- what is written ---------------------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "train.py"
    path.write_text(source("one_encoder"))
    return path


def test_a_copy_leaves_the_script_alone_and_unpatched_is_the_script(path: Path) -> None:
    before, output = path.read_bytes(), path.with_name("copy.py")
    shown = diffusers.patch(path, output)
    assert path.read_bytes() == before and output.read_bytes() != before
    assert all(f"+{line}" in shown.splitlines() for line in output.read_text().splitlines() if line.endswith(MARK))
    assert diffusers.unpatch(output)
    assert output.read_bytes() == before


def test_in_place_and_copy_are_the_same(path: Path) -> None:
    output = path.with_name("copy.py")
    assert diffusers.patch(path, output) == diffusers.patch(path, path)
    assert path.read_bytes() == output.read_bytes()


def test_a_file_that_holds_something_else_is_not_written_over(path: Path) -> None:
    output = path.with_name("copy.py")
    output.write_text("mine\n")
    with pytest.raises(AptError) as error:
        diffusers.patch(path, output)
    assert output.read_text() == "mine\n"
    assert str(error.value).startswith(f"{output}: is there already, with edits of its own or of an older train.py;")
    assert "\n" not in str(error.value)
    diffusers.patch(path, output, force=True)
    assert patching.strip(output.read_bytes()) == path.read_bytes()


def test_a_copy_that_was_unpatched_or_patched_otherwise_is_replaced(path: Path) -> None:
    output = path.with_name("copy.py")
    diffusers.patch(path, output)
    right = output.read_bytes()
    for content in (path.read_bytes(), right.replace(b"regularized(loss)", b"older(loss)")):
        output.write_bytes(content)
        diffusers.patch(path, output)
        assert output.read_bytes() == right


def test_a_patched_script_has_no_copy_of_its_own(path: Path) -> None:
    copy = diffusers.beside(path)
    assert copy == path.with_name("train_apt.py")
    diffusers.patch(path, copy)
    assert diffusers.beside(copy) == copy and diffusers.beside(path) == copy


def test_inserted_lines_that_a_formatter_broke_apart_are_told_and_nothing_is_lost(path: Path) -> None:
    diffusers.patch(path, path)
    line = next(line for line in path.read_text().splitlines() if "apt_hooks_run.assess(" in line)
    broken = line.replace("assess(", "assess(\n").replace(", target", ",\ntarget")
    path.write_text(path.read_text().replace(line, broken))
    before = path.read_bytes()
    ast.parse(before)
    for change in (diffusers.unpatch, diffusers.status, lambda path: diffusers.patch(path, path)):
        with pytest.raises(AptError, match=r"^train\.py: inserted lines were rewritten"):
            change(path)
        assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("lost", "found", "more"),
    [
        (("",), 'parser.add_argument("--apt_config"', True),  # by a search and replace of them all
        (("is not None:  # scales", ".assess("), "if apt_hooks_run is not None:  # scales", True),
        ((".assess(",), "model_pred = apt_hooks_run.assess(", False),
        (('"--apt_preset"', "no other"), 'parser.add_argument("--apt_preset"', False),
    ],
)
def test_inserted_lines_that_lost_their_marks_are_told_and_nothing_is_lost(
    path: Path, lost: tuple[str, ...], found: str, more: bool
) -> None:
    diffusers.patch(path, path)
    lines = path.read_text().splitlines(keepends=True)
    old = [n for n, line in enumerate(lines, 1) if MARK in line and any(one in line.split("help")[0] for one in lost)]
    path.write_text("".join(line.replace(f"  {MARK}", "") if n in old else line for n, line in enumerate(lines, 1)))
    before = path.read_bytes()
    for change in (diffusers.unpatch, diffusers.status, lambda path: diffusers.patch(path, path)):
        with pytest.raises(AptError, match=rf"rewritten .*: line {old[0]} .*: `{re.escape(found)}") as error:
            change(path)
        assert (" more) is of apt-hooks" in str(error.value)) == more and "\n" not in str(error.value)
        assert path.read_bytes() == before


def test_each_inserted_line_that_names_what_is_ours_is_known_without_its_mark(path: Path) -> None:
    diffusers.patch(path, path)
    lines = path.read_text().splitlines(keepends=True)
    named = [n for n, line in enumerate(lines) if "apt_hooks_" in line.split("#")[0] and MARK in line]
    assert len(named) > 20
    for n in named:
        path.write_text("".join([*lines[:n], lines[n].replace(f"  {MARK}", ""), *lines[n + 1 :]]))
        with pytest.raises(AptError, match=rf"line {n + 1} is of apt-hooks and has lost the mark"):
            diffusers.status(path)


def test_a_script_that_speaks_of_our_options_is_not_taken_for_a_patched_one(path: Path) -> None:
    path.write_text(f'"""Also for: python script_apt.py --apt_config apt.toml"""\n{path.read_text()}')
    plain = path.read_bytes()
    diffusers.patch(path, path)
    diffusers.unpatch(path)
    assert path.read_bytes() == plain


def test_other_line_ends_spaces_behind_marks_and_lines_moved_or_taken_out_do_no_harm(path: Path) -> None:
    plain = path.read_bytes()
    diffusers.patch(path, path)
    patched = path.read_bytes()
    lines = patched.splitlines(keepends=True)
    at = next(n for n, line in enumerate(lines) if b".assess(" in line)
    moved = [*lines[: at - 1], *lines[at + 1 : at + 3], *lines[at - 1 : at + 1], *lines[at + 3 :]]
    mark = MARK.encode()
    for edited, wanted in (
        (patched.replace(b"\n", b"\r\n"), plain.replace(b"\n", b"\r\n")),
        (patched.replace(mark, mark + b" \t"), plain),
        (b"".join(moved), plain),
        (b"".join(lines[: at - 1] + lines[at + 1 :]), plain),
    ):
        path.write_bytes(edited)
        diffusers.unpatch(path)
        assert path.read_bytes() == wanted


def test_an_equal_copy_is_not_written_again(path: Path) -> None:
    output = path.with_name("copy.py")
    shown = diffusers.patch(path, output)
    found = output.stat()
    assert diffusers.patch(path, output) == shown
    assert (output.stat().st_ino, output.stat().st_mtime_ns) == (found.st_ino, found.st_mtime_ns)


def test_dry_runs_write_nothing_and_show_the_same(path: Path) -> None:
    before, output = path.read_bytes(), path.with_name("copy.py")
    shown = diffusers.patch(path, output, dry_run=True)
    assert shown == diffusers.patch(path, path, dry_run=True)
    assert path.read_bytes() == before and not output.exists()
    assert diffusers.patch(path, path) == shown
    new = path.read_bytes()
    gone = diffusers.unpatch(path, dry_run=True)
    assert path.read_bytes() == new
    assert diffusers.unpatch(path) == gone
    changed = [line for line in shown.splitlines() if line.endswith(MARK)]
    assert changed and ["-" + line[1:] for line in changed] == [x for x in gone.splitlines() if x.endswith(MARK)]


def test_unpatching_what_is_not_patched_changes_nothing(path: Path) -> None:
    found = path.stat()
    assert diffusers.unpatch(path) == ""
    assert path.stat().st_ino == found.st_ino and path.stat().st_mtime_ns == found.st_mtime_ns


def test_the_mode_of_a_script_patched_in_place_is_kept(path: Path) -> None:
    path.chmod(0o751)
    diffusers.patch(path, path)
    assert path.stat().st_mode & 0o777 == 0o751
    diffusers.unpatch(path)
    assert path.stat().st_mode & 0o777 == 0o751


def test_a_copy_of_a_program_is_a_program(path: Path) -> None:
    path.chmod(0o755)
    diffusers.patch(path, path.with_name("copy.py"))
    assert path.with_name("copy.py").stat().st_mode & 0o100


def test_a_folder_cannot_be_the_output(path: Path) -> None:
    with pytest.raises(AptError, match=re.escape(f"{path.parent}: ")):
        diffusers.patch(path, path.parent)


def test_a_folder_that_is_missing_cannot_hold_the_output(path: Path) -> None:
    with pytest.raises(AptError, match=re.escape(f"{path.parent / 'nowhere'}: cannot be written to")):
        diffusers.patch(path, path.parent / "nowhere" / "copy.py")


def test_the_script_itself_by_another_name_is_no_other_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    before = path.read_bytes()
    try:
        diffusers.patch(Path(path.name), path)
    except AptError as error:
        assert "delete it" not in str(error) and path.read_bytes() == before
    else:
        assert patching.is_patched(path.read_bytes())


def test_users_edits_survive_unpatching(path: Path) -> None:
    before = path.read_text()
    diffusers.patch(path, path)
    text = path.read_text()
    edits = [
        ("logs = {", "logs = {'mine': 1, "),
        ("# Predict the noise", "# Guess the noise"),
        ("def main(", "X = 1\n\n\ndef main("),
    ]
    for old, new in edits:
        assert old in text
        text, before = text.replace(old, new), before.replace(old, new)
    path.write_text(text)
    diffusers.unpatch(path)
    assert path.read_text() == before


def test_the_status_tells_patched_from_not_patched_and_from_edited_since(path: Path) -> None:
    found = diffusers.status(path)
    assert (found.path, found.state, found.patched) == (path, "not patched", False)
    diffusers.patch(path, path)
    assert (diffusers.status(path).state, diffusers.status(path).patched) == ("patched", True)
    path.write_text(path.read_text().replace("# Predict the noise", "# An edit that matters to no line"))
    assert diffusers.status(path).patched
    right = path.read_text()
    edited = "patched, and edited since or by another version of apt-hooks; patching it again brings it up to date"
    for text in (
        right.replace("class_labels=class_labels,\n", ""),  # the base model's call still has it
        right.replace("regularized(loss)", "regularised(loss)"),
        "".join(line for line in right.splitlines(True) if "finish()" not in line),
        f"x = 1  {MARK}\n{right}",
    ):
        assert text != right
        path.write_text(text)
        assert (diffusers.status(path).state, diffusers.status(path).patched) == (edited, False)
        before = path.read_bytes()
        assert diffusers.patch(path, path)
        assert diffusers.status(path).patched
        assert patching.strip(before) == patching.strip(path.read_bytes())


def test_the_status_of_a_script_that_cannot_be_patched_says_why(path: Path) -> None:
    path.write_text(path.read_text().replace("accelerator.backward(loss)", "loss.backward()"))
    with pytest.raises(
        AptError, match=r"train\.py: looked for the backward pass.*found `loss\.backward\(\)` in line \d+"
    ):
        diffusers.status(path)


@pytest.mark.parametrize("line", ['check_min_version("0.35.0")', "check_min_version('0.35.0')  # at least"])
def test_the_version_is_the_one_that_the_script_asks_for(path: Path, line: str) -> None:
    assert diffusers.status(path).version == "unknown"
    path.write_text(path.read_text().replace("def parse_args", f"{line}\n\n\ndef parse_args"))
    assert diffusers.status(path).version == "0.35.0"


def test_a_script_of_full_fine_tuning_is_told_that_it_trains_no_lora():
    loop = b"for batch in data:\n    loss = model(batch)\n    accelerator.backward(loss)\n"
    with pytest.raises(AptError, match=r"^full.py: trains no LoRA of diffusers .* take a `..._lora...` script"):
        script_anchors.find(loop + b"pipeline.save_pretrained(args.output_dir)\n", "full.py")


def test_the_version_of_a_script_from_the_main_branch_is_told(path: Path) -> None:
    path.write_text(path.read_text().replace("def parse_args", 'check_min_version("0.36.0.dev0")\n\n\ndef parse_args'))
    assert diffusers.status(path).version in ("0.36.0.dev0", "0.36.0")


# -- the scripts themselves --------------------------------------------------------------------------------------------


@pytest.mark.real_trainer
@pytest.mark.skipif(not os.environ.get("DIFFUSERS_DIR"), reason="needs a git clone of diffusers: set DIFFUSERS_DIR")
@pytest.mark.parametrize("name", ["train_dreambooth_lora.py", "train_dreambooth_lora_sdxl.py"])
@pytest.mark.parametrize("tag", ["v0.32.1", "v0.35.2", "v0.40.0"])
def test_the_scripts_of_diffusers_are_patched_once_and_restored(tmp_path: Path, tag: str, name: str) -> None:
    command = ["git", "-C", os.environ["DIFFUSERS_DIR"], "show", f"{tag}:examples/dreambooth/{name}"]
    content = subprocess.run(command, capture_output=True, check=True).stdout
    new = patched_bytes(tmp_path, content)
    ast.parse(new)
    assert patching.strip(new) == content
    assert patched_bytes(tmp_path, new) == new
    assert diffusers.status(tmp_path / "script.py").version in diffusers.TESTED
    once = [
        "add_argument(\"--apt_config\"", "adapter.class_words(args, locals())",
        "adapter.start(args, accelerator, unet, noise_scheduler,", "apt_hooks_run.read_class_word(apt_hooks_words)",
        "apt_hooks_run.moves(timesteps, model_input)",
        "apt_hooks_run.begin_tuned_pass(frozen_model_pred)", "model_pred = apt_hooks_run.end_tuned_pass(model_pred)",
        "model_pred = apt_hooks_run.assess(model_pred, target, timesteps)", "loss = apt_hooks_run.regularized(loss)",
        "accelerator.log(apt_hooks_run.tracker_values(), step=global_step)", "apt_hooks_run.finish()",
        "apt_hooks_run.add_metadata(args.output_dir)",
    ]  # fmt: skip
    lines = inserted(new.decode())
    at = [[i for i, line in enumerate(lines) if fragment in line] for fragment in once]
    assert all(len(found) == 1 for found in at) and at == sorted(at)
    assert any(re.match(r"frozen_\w+.* = .*text_encoder", line) for line in frozen(new.decode()))
    kept = [line for line in lines if "apt_hooks_words.keep(lambda: compute_text_embeddings(args." in line]
    assert [re.search(r"args\.(\w+)", line)[1] for line in kept if "validation" not in line] == [  # type: ignore[index]
        "instance_prompt",
        "class_prompt",
    ]
