"""The command line: what it prints and writes, and that a user's mistake is one line and exit code 1."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import toml
import typer
from sd_scripts_standin import PATCHED_FILES, write_checkout
from typer.testing import CliRunner

from apt_hooks import AptConfig
from apt_hooks.cli import app, main
from apt_hooks.commands.training import TRAINERS
from apt_hooks.config import preset_names, preset_text
from apt_hooks.integrations.patching import MARK


def run(*arguments: object, code: int = 0) -> str:
    """What a command prints; it has to end with this exit code."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


def fail(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What `main` ends with: the one line that Python prints to stderr, leaving with exit code 1."""
    monkeypatch.setattr(sys, "argv", ["apt-hooks", *map(str, arguments)])
    with pytest.raises(SystemExit) as error:
        main()
    line = error.value.code
    assert isinstance(line, str) and line.startswith("apt-hooks: error: ") and "\n" not in line
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
    return line


def commands(command: Any, *path: str) -> Iterator[tuple[str, ...]]:
    if hasattr(command, "commands"):
        for name, child in command.commands.items():
            yield from commands(child, *path, name)
    else:
        yield path


COMMANDS = list(commands(typer.main.get_command(app)))


# -- help --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help_of_every_command_shows_an_example_of_it(path: tuple[str, ...]) -> None:
    shown = " ".join(run(*path, "--help").replace("`", "").split())
    assert re.search(f"Examples?: (.*, )?apt-hooks {' '.join(path)} ", shown + " ")


@pytest.mark.parametrize("path", [(), ("presets",), *COMMANDS], ids=" ".join)
def test_h_is_help(path: tuple[str, ...]) -> None:
    assert run(*path, "-h") == run(*path, "--help") != ""


def test_the_version_comes_with_those_of_the_packages_around(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"apt-hooks": "1.2", "torch": "3.4+cpu", "peft": "5.6"}

    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert run("--version").splitlines() == [
        "apt-hooks 1.2", "torch 3.4+cpu", "diffusers not installed", "accelerate not installed", "peft 5.6",
        "transformers not installed", "triton not installed",
    ]  # fmt: skip


def test_completion_is_installed_and_completes(tmp_path: Path) -> None:
    command = Path(sys.executable).with_name("apt-hooks")
    # Without the shell that this runs below, bash is what is named.
    environment = os.environ | {"HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}

    def call(*arguments: str, **given: str) -> str:
        done = subprocess.run([command, *arguments], env=environment | given, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    call("--install-completion", "bash")
    script = (tmp_path / ".bash_completions" / "apt-hooks.sh").read_text()
    assert "_APT_HOOKS_COMPLETE=complete_bash" in script and "apt-hooks.sh" in (tmp_path / ".bashrc").read_text()
    asked = {"_APT_HOOKS_COMPLETE": "complete_bash", "COMP_WORDS": "apt-hooks presets a", "COMP_CWORD": "2"}
    assert call(**asked).split() == ["apply"]


def test_readme_sets_up_with_the_versions_that_were_tested_together() -> None:
    top = Path(__file__).parents[1]
    block = (top / "README.md").read_text(encoding="utf-8").split("## Set up", 1)[1].split("```")[1]
    lines = [line for line in block.splitlines() if line.startswith("pip")]
    assert len(lines) == 2 and all("-c tests/constraints.txt " in line for line in lines)
    pins = [line for line in (top / "tests/constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.match(r"[a-z0-9-]+==[^\s;]+(; python_version (<|>=) \"3\.11\")?$", pin) for pin in pins)
    pinned = {pin.split("==")[0] for pin in pins}
    project = toml.loads((top / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = list(project["dependencies"])
    for extra in ("diffusers", "demo", "report", "fidelity", "test"):
        needed += project["optional-dependencies"][extra]
    names = {re.split(r"[^A-Za-z0-9-]", x)[0] for x in needed if "python_version" not in x}
    assert names - pinned == {"apt-hooks"}


def test_the_commands_are_those_that_readme_names() -> None:
    assert {" ".join(path) for path in COMMANDS} == {
        "patch", "unpatch", "status", "check", "calibrate", "demo", "blend", "maps",
        "report", "watch", "pick", "eval", "compare", "caption",
        "presets list", "presets show", "presets apply",
    }  # fmt: skip


# -- patch, unpatch, status --------------------------------------------------------------------------------------------


def test_patch_status_and_unpatch_say_what_they_did(tmp_path: Path) -> None:
    folder = write_checkout(tmp_path)
    before = run("status", "sd-scripts", folder, code=1)
    assert before.startswith(f"sd-scripts 0.10.1 in {folder}\n") and before.count(": not patched\n") == 5
    assert run("unpatch", "sd-scripts", folder) == f"{folder}: not patched, nothing to do\n"
    assert run("patch", "sd-scripts", folder) == f"{folder}: patched\n"
    assert run("patch", "sd-scripts", folder) == f"{folder}: already patched\n"
    assert run("status", "sd-scripts", folder).count(": patched\n") == 5
    assert run("unpatch", "sd-scripts", folder) == f"{folder}: unpatched\n"
    assert run("status", "sd-scripts", folder, code=1) == before


def test_the_folder_is_the_current_one_where_none_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write_checkout(tmp_path))
    assert run("patch", "sd-scripts") == f"{tmp_path}: patched\n"


def test_a_dry_run_prints_the_diff_and_changes_nothing(tmp_path: Path) -> None:
    folder = write_checkout(tmp_path)
    shown = run("patch", "sd-scripts", folder, "--dry-run")
    assert shown.count(MARK) == 24 and all(f"+++ b/{name}" in shown for name in PATCHED_FILES["0.10"])
    assert run("patch", "sd-scripts", folder) == f"{folder}: patched\n"
    assert run("patch", "sd-scripts", folder, "--dry-run") == f"{folder}: already patched\n"
    assert "-    parser.add_argument" in run("unpatch", "sd-scripts", folder, "--dry-run")
    assert run("status", "sd-scripts", folder).count(": patched\n") == 5


def test_a_version_that_was_not_tried_is_told(tmp_path: Path) -> None:
    folder = write_checkout(tmp_path)
    (folder / "README.md").write_text("Version 0.12.0\n")
    assert "sd-scripts, by its README 0.12.0 (tested: 0.10.0, 0.10.1, 0.10.4, " in run(
        "status", "sd-scripts", folder, code=1
    )
    note = "note: sd-scripts, by its README 0.12.0 (tested: "
    said = run("patch", "sd-scripts", folder)
    assert note in said and "has the structure of the tested ones" in said


def test_status_tells_how_to_mend_what_is_not_patched(tmp_path: Path) -> None:
    folder = write_checkout(tmp_path)
    said = f"`apt-hooks patch sd-scripts {folder}` inserts the lines, and mends what an update left\n"
    assert run("status", "sd-scripts", folder, code=1).endswith(said)
    run("patch", "sd-scripts", folder)
    assert said not in run("status", "sd-scripts", folder)


# -- patch, unpatch, status of a script of diffusers -------------------------------------------------------------------


SCRIPT = (Path(__file__).parent / "dreambooth_scripts/two_encoders.py").read_bytes()


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "train.py"
    path.write_bytes(b'check_min_version("0.40.0")\n' + SCRIPT)
    return path


def test_a_script_is_patched_into_a_copy_beside_it(script: Path) -> None:
    before, copy = script.read_bytes(), script.with_name("train_apt.py")
    assert run("status", "diffusers", script, code=1) == f"{script}, for diffusers 0.40.0: not patched\n"
    assert run("patch", "diffusers", script) == f"{copy}: patched\n"
    assert script.read_bytes() == before
    said = f"{script}, for diffusers 0.40.0: not patched; train_apt.py is\n"
    assert run("status", "diffusers", script, code=1) == said
    assert run("status", "diffusers", copy) == f"{copy}, for diffusers 0.40.0: patched\n"
    once = copy.read_bytes()
    said = f"{script}: not patched, nothing to do; train_apt.py is: name that, or delete it\n"
    assert run("unpatch", "diffusers", script) == said and copy.read_bytes() == once
    assert run("patch", "diffusers", script).startswith(f"{copy}: ")
    assert copy.read_bytes() == once
    assert run("unpatch", "diffusers", copy) == f"{copy}: unpatched\n"
    assert copy.read_bytes() == before
    assert run("unpatch", "diffusers", copy) == f"{copy}: not patched, nothing to do\n"


def test_a_script_is_patched_into_the_file_that_output_names(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(script.parent)
    assert run("patch", "diffusers", "train.py", "--output", "mine.py") == "mine.py: patched\n"
    assert sorted(path.name for path in script.parent.iterdir()) == ["mine.py", "train.py"]
    assert MARK.encode() in Path("mine.py").read_bytes()


def test_a_script_is_patched_in_place_where_asked(script: Path) -> None:
    before = script.read_bytes()
    assert run("patch", "diffusers", script, "--in-place") == f"{script}: patched\n"
    once = script.read_bytes()
    assert run("status", "diffusers", script) == f"{script}, for diffusers 0.40.0: patched\n"
    assert run("patch", "diffusers", script, "--in-place") == f"{script}: already patched\n"
    assert script.read_bytes() == once and list(script.parent.iterdir()) == [script]
    assert run("unpatch", "diffusers", script) == f"{script}: unpatched\n"
    assert script.read_bytes() == before


@pytest.mark.parametrize(
    ("how", "name"), [([], "train_apt.py"), (["--in-place"], "train.py"), (["--output", "x.py"], "x.py")]
)
def test_a_dry_run_of_a_script_prints_the_diff_and_changes_nothing(
    script: Path, how: list[str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(script.parent)
    before, output = script.read_bytes(), script.with_name(name)
    shown = run("patch", "diffusers", script, "--dry-run", *how)
    assert script.read_bytes() == before and list(script.parent.iterdir()) == [script]
    run("patch", "diffusers", script, *how)
    lines = [line for line in output.read_text().splitlines() if line.endswith(MARK)]
    assert shown.startswith("--- a/train.py\n+++ b/train.py\n")
    assert [line[1:] for line in shown.splitlines() if line.endswith(MARK)] == lines != []
    assert run("patch", "diffusers", output, "--in-place", "--dry-run") == f"{output}: already patched\n"
    gone = run("unpatch", "diffusers", output, "--dry-run")
    assert [line[1:] for line in gone.splitlines() if line.endswith(MARK)] == lines
    assert MARK in output.read_text()


def test_a_script_edited_since_is_told_and_exits_with_1(script: Path) -> None:
    run("patch", "diffusers", script, "--in-place")
    script.write_text(script.read_text().replace("regularized(loss)", "regularised(loss)"))
    said = run("status", "diffusers", script, code=1)
    assert said.endswith(
        ": patched, and edited since or by another version of apt-hooks; patching it again brings it up to date\n"
    )
    assert run("patch", "diffusers", script, "--in-place") == f"{script}: patched\n"
    run("status", "diffusers", script)


def test_a_script_for_a_version_that_was_not_tried_is_told(script: Path) -> None:
    script.write_text(script.read_text().replace("0.40.0", "0.41.0"))
    version = "for diffusers 0.41.0 (tested: 0.32.0, 0.35.0, 0.38.0, 0.40.0)"
    assert run("status", "diffusers", script, code=1) == f"{script}, {version}: not patched\n"
    done, note = run("patch", "diffusers", script).splitlines()
    assert done == f"{script.with_name('train_apt.py')}: patched"
    assert note.startswith("note: ") and version in note and "has the structure of the tested ones" in note


def test_a_script_that_names_no_version_is_told(script: Path) -> None:
    script.write_bytes(SCRIPT)
    version = "for no stated version of diffusers (tested: 0.32.0, 0.35.0, 0.38.0, 0.40.0)"
    assert run("status", "diffusers", script, code=1) == f"{script}, {version}: not patched\n"
    assert version in run("patch", "diffusers", script).splitlines()[1]


def test_ctrl_c_ends_a_command_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("apt_hooks.commands.training.preset_names", stopped)
    monkeypatch.setattr(sys, "argv", ["apt-hooks", "presets", "list"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130 and capsys.readouterr().err.strip() == "apt-hooks: stopped"


# -- presets and check -------------------------------------------------------------------------------------------------


def test_presets_are_listed_by_name_with_their_first_line_and_the_scripts_that_take_them() -> None:
    lines = run("presets", "list").splitlines()
    own = [line for line in lines if not line.startswith(" ")]
    assert [line.split()[0] for line in own] == list(preset_names())
    assert all("Adaptive Personalized Training for" in line for line in own)
    at = lines.index(next(line for line in own if line.startswith("flux ")))
    assert lines[at + 1].strip() == "sd-scripts: flux_train_network.py"
    assert lines[at + 2].strip().startswith("diffusers: train_dreambooth_lora_flux.py, ")
    assert all(any(name in trainer.SCRIPTS_OF_PRESET for trainer in TRAINERS) for name in preset_names())


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_shown_is_a_section_that_can_be_used_as_it_is(tmp_path: Path, name: str) -> None:
    shown = run("presets", "show", name)
    assert shown == preset_text(name) == run("presets", "show", name.upper())
    path = tmp_path / "apt.toml"
    path.write_text(shown)
    assert f"{path}: [apt] is valid" in run("check", path)


def test_check_prints_what_the_section_comes_to_and_marks_overrides(tmp_path: Path) -> None:
    path = tmp_path / "train.toml"
    path.write_text('seed = 1\n[apt]\npreset = "sd21"\nnum_bins = 7\n')
    lines = run("check", path).splitlines()
    assert lines[0] == f"{path}: [apt] is valid, preset sd21" and lines.pop().startswith("note: no sd-scripts found")
    assert [line for line in lines if "override" in line] == ["  num_bins = 7  # override"]
    assert "  indicator_scale = 100.0" in lines
    section = "[apt]\n" + "\n".join(line.split("  #")[0] for line in lines[1:])
    assert AptConfig.from_mapping(toml.loads(section)["apt"]) == AptConfig(
        indicator_scale=100.0, indicator_space="target", num_bins=7, blocks=(2, 3)
    )


def test_check_notes_what_the_objective_ignores(tmp_path: Path) -> None:
    path = tmp_path / "train.toml"
    path.write_text('[apt]\npreset = "sd21"\nobjective = "dreambooth"\nlambda_attn = 0.5\n')
    assert 'note: objective = "dreambooth" ignores lambda_attn = 0.5' in run("check", path).splitlines()


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [
        ('stop = "class_drift > 1"', "stop names class_drift, which needs identifier and class_word; found stop = "),
        (
            'stop = "gamma > 0.9 or free_drift > 1"\ndrifts = false',
            "stop names free_drift, which is not measured (drifts = false); found stop = ",
        ),
        (
            'stop = "held_out_gap < 0"\ndrifts = false',
            "stop names held_out_gap, which needs a validation split, pictures that are not trained on, and drifts",
        ),
    ],
)
def test_check_refuses_a_rule_about_what_is_not_measured(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    keys: str,
    wanted: str,
) -> None:
    path = tmp_path / "train.toml"
    path.write_text(f'[apt]\npreset = "sdxl"\n{keys}\n')
    assert wanted in fail(monkeypatch, capsys, "check", path)


def test_check_tells_what_a_rule_needs_of_the_data(tmp_path: Path) -> None:
    path = tmp_path / "train.toml"
    path.write_text('[apt]\npreset = "sdxl"\nidentifier = "sks"\nclass_word = "dog"\nstop = "class_drift > 1"\n')
    assert "validation split" not in run("check", path)
    path.write_text('[apt]\npreset = "sdxl"\nstop = "held_out_gap < 0"\n')
    assert "note: stop names held_out_gap, so the training needs a validation split" in run("check", path)


# -- presets apply -----------------------------------------------------------------------------------------------------

CONFIGS = {
    "no section": "# 学習\nseed = 1  # mine\n\n[training]\nlr = 1e-4\n",
    "no final newline": "seed = 1",
    "comment at the end": "seed = 1  # mine",
    "empty": "",
    "arrays of tables": "[[runs]]\nresolution = 512\n[[runs.parts]]\nimage_dir = 'x'\n",
    "section without preset": "seed = 1\n\n[apt]\nnum_bins = 3  # mine\n\n[training]\nlr = 1e-4  # low\n",
    "section with preset": "[apt]\npreset = 'sd15'  # for now\nnum_bins = 3\n[training]\nlr = 1e-4\n",
    "empty section": "[apt]\n\n[training]\nlr = 1e-4\n",
    "empty section at the end": "[training]\nlr = 1e-4\n[apt]",
    "section amid arrays of tables": "[[a]]\nx = 1\n[apt]\nnum_bins = 3\n[[a]]\nx = 2\n",
}


def apply(path: Path, content: bytes, name: str = "sdxl") -> tuple[str, bytes]:
    path.write_bytes(content)
    return run("presets", "apply", name, path).splitlines()[0], path.read_bytes()


@pytest.mark.parametrize("newline", ["\n", "\r\n"], ids=["lf", "crlf"])
@pytest.mark.parametrize("text", CONFIGS.values(), ids=CONFIGS)
def test_applying_a_preset_sets_it_keeps_all_else_and_applied_again_changes_nothing(
    tmp_path: Path, text: str, newline: str
) -> None:
    path = tmp_path / "train.toml"
    _, changed = apply(path, text.replace("\n", newline).encode())
    found = changed.decode()
    wanted = toml.loads(text)
    wanted["apt"] = {**wanted.get("apt", {}), "preset": "sdxl"}
    with path.open(encoding="utf-8") as file:  # as sd-scripts opens it
        assert toml.load(file) == wanted
    # Every line is still there and in its order, but for the one that names the preset.
    kept = [line for line in text.splitlines() if "preset" not in line]
    lines = iter(found.splitlines())
    assert all(line in lines for line in kept)
    assert found.count(newline) == found.count("\n") or "\n" not in text
    said, again = apply(path, changed)
    assert said == f"{path}: [apt] has preset sdxl already"
    assert again == changed
    run("check", path)


@pytest.mark.parametrize(
    ("text", "said", "wanted"),
    [
        ("seed = 1\n", "added [apt] with preset sdxl", 'seed = 1\n\n[apt]\npreset = "sdxl"\n'),
        ("[apt]\n", "[apt] preset is now sdxl", '[apt]\npreset = "sdxl"\n'),
        (
            '[apt]\npreset = "sd15"  # why\n',
            "[apt] preset is now sdxl (was sd15)",
            '[apt]\npreset = "sdxl"  # why\n',
        ),
    ],
    ids=["added", "set", "changed"],
)
def test_applying_a_preset_says_what_it_did(tmp_path: Path, text: str, said: str, wanted: str) -> None:
    path = tmp_path / "train.toml"
    assert apply(path, text.encode()) == (f"{path}: {said}", wanted.encode())


def test_a_file_with_a_number_that_is_none_is_edited_too(tmp_path: Path) -> None:
    _, changed = apply(tmp_path / "train.toml", b"x = nan\n[apt]\nnum_bins = 3\n")
    assert changed == b'x = nan\n[apt]\npreset = "sdxl"\nnum_bins = 3\n'


def test_a_new_key_does_not_come_between_the_next_section_and_its_comment(tmp_path: Path) -> None:
    text = "[apt]\nnum_bins = 3\n\n# low, for few photos\n[training]\nlr = 1e-4\n"
    _, changed = apply(tmp_path / "train.toml", text.encode())
    assert "# low, for few photos\n[training]\n" in changed.decode()


@pytest.mark.parametrize(
    ("text", "name", "said"),
    [
        ("[apt]\nlamda_attn = 1.0\n", "sdxl", 'did you mean "lambda_attn"'),
        ("[apt]\nnum_bins = 0\n", "sdxl", "num_bins must be"),
        ("apt = 3\n", "sdxl", "found apt = 3"),
        ("[apt\n", "sdxl", "is not valid TOML"),
        ("apt = { num_bins = 3 }\nseed = 1\n", "sdxl", "cannot be edited line by line"),
        ("apt.num_bins = 3\napt.preset = 'sd15'\n", "sdxl", "cannot be edited line by line"),
        ('text = """\n[apt]\n"""\n[apt]\nnum_bins = 3\n', "sdxl", "cannot be edited line by line"),
        ("seed = 1\n", "sd3", "found 'sd3'; did you mean \"sd35\"?"),
    ],
)
def test_a_config_that_would_not_be_valid_is_refused_and_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str, name: str, said: str
) -> None:
    path = tmp_path / "train.toml"
    path.write_text(text)
    assert said in fail(monkeypatch, capsys, "presets", "apply", name, path)
    assert path.read_text() == text


# -- what is said of the trainer beside --------------------------------------------------------------------------------


def notes(*arguments: object) -> list[str]:
    return [line for line in run(*arguments).splitlines() if line.startswith("note: ")]


@pytest.mark.parametrize("command", [("check",), ("presets", "apply", "sdxl")], ids=" ".join)
@pytest.mark.parametrize(
    "place", [".", "sd-scripts", "sd_scripts", "..", "../sd-scripts", "../..", "../../scripts/dev"]
)
def test_a_trainer_that_is_not_patched_is_told_with_what_to_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, command: tuple[str, ...]
) -> None:
    own = tmp_path / "a/b"
    own.mkdir(parents=True)
    config = own / "train.toml"
    config.write_text('seed = 1\n[apt]\npreset = "sd15"\n')
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    [said] = notes(*command, config)
    assert said.startswith(f"note: no sd-scripts found in {tmp_path / 'elsewhere'} or near {config}: ")
    folder = write_checkout((own / place).resolve())
    [said] = notes(*command, config)
    script = folder / ("train_network.py" if command == ("check",) else "sdxl_train_network.py")
    assert f"sd-scripts in {folder} is not patched" in said and "passes over [apt] without a word" in said
    assert f"`apt-hooks patch sd-scripts {folder}`" in said
    assert f"`accelerate launch -m apt_hooks.launch {script} --config_file {config}`" in said
    run("patch", "sd-scripts", folder)
    assert notes(*command, config) == []


def test_the_trainer_in_the_current_folder_is_the_one_that_is_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("here", "with space"):
        write_checkout(tmp_path / name)
    config = tmp_path / "with space/train.toml"
    config.write_text("seed = 1\n")
    monkeypatch.chdir(tmp_path / "here")
    [said] = notes("presets", "apply", "sd21", config)
    assert f"sd-scripts in {tmp_path / 'here'} is not patched" in said
    assert said.endswith(f'`accelerate launch -m apt_hooks.launch train_network.py --config_file "{config}"`')
    run("patch", "sd-scripts")
    assert notes("check", config) == []
    monkeypatch.chdir(tmp_path)
    [said] = notes("check", config)
    assert f'`apt-hooks patch sd-scripts "{config.parent}"`' in said


def test_a_trainer_that_cannot_be_patched_is_told_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(write_checkout(tmp_path))
    Path("train_network.py").write_text("print('another one')\n")
    Path("train.toml").write_text('seed = 1\n[apt]\npreset = "sdxl"\n')
    [said] = notes("check", "train.toml")
    assert said.startswith("note: the sd-scripts beside it cannot take [apt]: ") and "train_network.py" in said


def test_of_a_file_for_apt_config_no_trainer_is_told_since_none_passes_over_that(tmp_path: Path) -> None:
    path = tmp_path / "apt.toml"
    path.write_text('[apt]\npreset = "sdxl"\n')
    assert notes("check", path) == []


def test_a_preset_whose_model_sd_scripts_does_not_train_names_the_scripts_that_do(tmp_path: Path) -> None:
    path = tmp_path / "train.toml"
    path.write_text("seed = 1\n")
    (said,) = notes("presets", "apply", "qwen_image", path)
    assert said.startswith(
        "note: no script of sd-scripts trains this preset's model; diffusers' do with --apt_preset: "
    )
    assert said.endswith("train_dreambooth_lora_qwen_image.py")


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("patch", "sd-scripts", "nowhere"), "looked for kohya's sd-scripts"),
        (("unpatch", "sd-scripts", "nowhere"), "looked for kohya's sd-scripts"),
        (("status", "sd-scripts", "nowhere"), "looked for kohya's sd-scripts"),
        (("patch", "sd-script"), "sd-script: no such trainer; there are sd-scripts and diffusers"),
        (("unpatch", "sd-script"), "sd-script: no such trainer; there are sd-scripts and diffusers"),
        (
            ("patch", "t.py"),
            "t.py: no such trainer; there are sd-scripts and diffusers; did you mean `apt-hooks patch dif",
        ),
        (("status", "folder"), "; did you mean `apt-hooks status sd-scripts folder`?"),
        (("status", "Diffusers"), "Diffusers: no such trainer; there are sd-scripts and diffusers"),
        (
            ("patch", "sd-scripts", ".", "--output", "x.py"),
            "--output, --in-place and --force are for diffusers; sd-scripts is ",
        ),
        (
            ("patch", "sd-scripts", ".", "--in-place"),
            "--output, --in-place and --force are for diffusers; sd-scripts is always",
        ),
        (
            ("patch", "diffusers", "t.py", "--output", "x.py", "--in-place"),
            "both --output x.py and --in-place are given",
        ),
        (
            ("patch", "diffusers", "nowhere.py"),
            "nowhere.py: cannot be read: No such file or directory; name a training",
        ),
        (("patch", "diffusers", "nowhere.py", "--in-place"), "nowhere.py: cannot be read: No such file"),
        (("unpatch", "diffusers", "nowhere.py"), "nowhere.py: cannot be read: No such file"),
        (("status", "diffusers", "nowhere.py"), "nowhere.py: cannot be read: No such file"),
        (("patch", "diffusers", "folder"), "folder: is a folder; name a training script"),
        (("patch", "diffusers", "folder", "--in-place"), "folder: is a folder; name a training"),
        (("unpatch", "diffusers", "folder"), "folder: is a folder; name a training script"),
        (("status", "diffusers", "folder"), "folder: is a folder; name a training script"),
        (("patch", "diffusers", ".."), ": is a folder; name a training script"),
        (("patch", "diffusers", "."), ": is a folder; name a training script"),
        (("patch", "diffusers"), ".: is a folder; name a training script, such as train_dreambooth_lora_sdxl.py"),
        (("unpatch", "diffusers"), "name a training script"),
        (("status", "diffusers"), "name a training script"),
        (
            ("patch", "diffusers", "other.py"),
            "other.py: looked for the backward pass, `accelerator.backward(loss)` in a",
        ),
        (("status", "diffusers", "other.py"), "other.py: looked for the backward pass"),
        (("patch", "diffusers", "section.toml"), "section.toml: looked for the backward pass"),
        (("patch", "diffusers", "t.py", "--output", "folder"), "folder: "),
        (("patch", "diffusers", "t.py", "--output", "nowhere/x.py"), "nowhere: cannot be written to: No such file"),
        (("patch", "diffusers", "t.py", "--output", "other.py"), "other.py: is there already, with edits of its own"),
        (("presets", "show", "sdx"), "error: preset must be one of"),
        (("presets", "show", "sdx"), 'did you mean "sdxl"'),
        (("presets", "apply", "section.toml", "sdxl"), "goes first: `apt-hooks presets apply sdxl section.toml`"),
        (("presets", "apply", "sdxl", "nowhere.toml"), "nowhere.toml: cannot be read"),
        (("check", "nowhere.toml"), "nowhere.toml: cannot be read"),
        (("check", "section.toml"), "looked for a section [apt]"),
        (("check", "mixed.toml"), "line 2, column 12, `zoom_out = [1, 3.0]`: sd-scripts' parser takes no mixed"),
        (("check", "preset.json"), "preset.json: is JSON, as kohya_ss saves its settings"),
        (("presets", "apply", "sdxl", "preset.json"), "preset.json: is JSON, as kohya_ss saves its settings"),
        (("check", "latin.toml"), "latin.toml: is not valid TOML"),
        (("compare", "eval", "--page", "a.html", "--result", "v.jsonl"), "--result counts votes: name one of them"),
        (("compare", "eval", "--page", "a.txt"), "--page must name a .html file; found a.txt"),
        (("compare", "eval", "--methods", "apt"), "--methods goes with --page and --result"),
        (("unpatch", "diffusers", "null.py"), "null.py: cannot be read as Python: it has bytes that are 0; name a"),
        (("status", "diffusers", "null.py"), "null.py: cannot be read as Python: it has bytes that are 0; name a"),
        (
            ("maps", "--model", "tinyworld", "--prompt", "p", "--out", "x.jpg"),
            "--out must name a .png file; found x.jpg",
        ),
        (
            ("caption", "no", "--subject", "s", "--local", "m"),
            "no: no such folder; name the one that the photos are in",
        ),
        (("watch", "no", "--once"), "no: no such file or folder yet; name a RUN-apt.jsonl, or a folder that has some"),
        (("calibrate", "folder"), "folder: has no *-apt.jsonl, which a run with APT writes beside"),
        (("demo", "--out", "section.toml"), "section.toml: cannot be made: File exists; name another folder"),
        (("demo", "--concept", "99"), "--concept must be from 0 to 13; found 99"),
        (("demo", "--methods", "base,lora"), "found 'lora'"),
        (("demo", "--methods", "apt,apt"), "must name each method once; found 'apt,apt'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_mistake_is_one_line_and_no_traceback(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    said: str,
) -> None:
    if arguments[0] == "demo":
        pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    Path("section.toml").write_text("seed = 1\n")
    Path("mixed.toml").write_text("[apt]\nzoom_out = [1, 3.0]\n")
    Path("preset.json").write_text('{"seed": 1}')
    Path("latin.toml").write_bytes("[apt]\nidentifier = 'é'\n".encode("latin-1"))
    Path("null.py").write_bytes(b"x = 1\0")
    Path("folder").mkdir()
    Path("other.py").write_text("print('no training')\n")
    Path("t.py").write_bytes(SCRIPT)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert said in fail(monkeypatch, capsys, *arguments)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    assert list(Path("folder").iterdir()) == []


def test_a_mistake_leaves_the_shell_exit_code_1_and_the_line_on_stderr(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from apt_hooks.cli import main; main()", "status", "sd-scripts", str(tmp_path)]
    # Away from the checkout, whose bare apt_hooks folder lacks what the package is put together from.
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (1, "")
    assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith("apt-hooks: error: ")


# -- demo --------------------------------------------------------------------------------------------------------------


def test_the_demo_without_its_packages_says_how_to_get_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    pytest.importorskip("matplotlib")
    said = fail(monkeypatch, capsys, "demo", "--out", tmp_path / "out")
    assert 'pip install "apt-hooks[demo]"' in said and "diffusers" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [("blend", "--early", "a", "--late", "a", "--out", "o"), ("maps", "--collapse")])
def test_sampling_without_its_packages_says_how_to_get_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    for package in ("matplotlib", "diffusers", "numpy"):
        monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "a").touch()
    monkeypatch.chdir(tmp_path)
    more = ("--lora", "a") if arguments[0] == "maps" else ()
    said = fail(monkeypatch, capsys, *arguments, *more, "--model", "sd15", "--prompt", "sks dog")
    assert 'pip install "apt-hooks[demo]"' in said
    assert not (tmp_path / "o").exists()
