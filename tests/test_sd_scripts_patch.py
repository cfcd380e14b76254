"""Patching a checkout of sd-scripts, the stand-in of it: what is written, refused and undone, and whether it runs."""

from __future__ import annotations

import ast
import concurrent.futures
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sd_scripts_standin import PATCHED_FILES, write_checkout, write_job
from typer.testing import CliRunner

from apt_hooks.cli import app
from apt_hooks.errors import AptError
from apt_hooks.integrations.patching import MARK
from apt_hooks.integrations.sd_scripts import patch as sd_scripts

Tree = dict[str, tuple[bytes, int]]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    return write_checkout(tmp_path / "sd-scripts")


def tree(folder: Path) -> Tree:
    """Content and mode of every file."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mode) for path in files}


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


# -- what is written ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("newline", ["\n", "\r\n"], ids=["lf", "crlf"])
def test_unpatching_restores_the_whole_tree(tmp_path: Path, newline: str) -> None:
    folder = write_checkout(tmp_path, newline=newline)
    before = tree(folder)
    assert sd_scripts.patch(folder)
    changed = {name for name, found in tree(folder).items() if found != before.get(name)}
    assert changed == set(PATCHED_FILES)
    assert sd_scripts.unpatch(folder)
    assert tree(folder) == before


def test_patching_twice_equals_patching_once(checkout: Path) -> None:
    sd_scripts.patch(checkout)
    once = tree(checkout)
    assert sd_scripts.patch(checkout) == ""
    assert tree(checkout) == once


def test_unpatching_what_is_not_patched_changes_nothing(checkout: Path) -> None:
    before = tree(checkout)
    assert sd_scripts.unpatch(checkout) == ""
    assert tree(checkout) == before


def test_dry_runs_change_nothing_and_show_every_line(checkout: Path) -> None:
    before = tree(checkout)
    shown = sd_scripts.patch(checkout, dry_run=True)
    assert tree(checkout) == before
    inserted = [line for insertions in sd_scripts.INSERTIONS.values() for i in insertions for line in i.lines]
    assert inserted and all(f"+{line}  {MARK}" in shown.splitlines() for line in inserted)
    assert sd_scripts.patch(checkout) == shown
    patched = tree(checkout)
    taken_out = sd_scripts.unpatch(checkout, dry_run=True).splitlines()
    assert tree(checkout) == patched
    assert all(f"-{line}  {MARK}" in taken_out for line in inserted)


def test_every_line_of_a_file_with_crlf_ends_with_crlf(tmp_path: Path) -> None:
    folder = write_checkout(tmp_path, newline="\r\n")
    sd_scripts.patch(folder)
    for name in PATCHED_FILES:
        content = (folder / name).read_bytes()
        assert MARK.encode() in content
        assert content.count(b"\r\n") == content.count(b"\n")


def test_file_modes_are_kept(checkout: Path) -> None:
    for name, mode in zip(PATCHED_FILES, (0o755, 0o640, 0o600), strict=True):
        (checkout / name).chmod(mode)
    before = tree(checkout)
    sd_scripts.patch(checkout)
    assert {name: mode for name, (_, mode) in tree(checkout).items()} == {n: m for n, (_, m) in before.items()}
    sd_scripts.unpatch(checkout)
    assert tree(checkout) == before


@pytest.mark.parametrize("newline", ["\n", "\r\n"], ids=["lf", "crlf"])
def test_patched_files_are_valid_python(tmp_path: Path, newline: str) -> None:
    folder = write_checkout(tmp_path, newline=newline)
    sd_scripts.patch(folder)
    for name in PATCHED_FILES:
        ast.parse((folder / name).read_bytes())


def test_the_users_own_edits_survive_patching_and_unpatching(checkout: Path) -> None:
    sd_scripts.patch(checkout)
    edit(checkout / "train_network.py", "running training", "running my training")
    sd_scripts.unpatch(checkout)
    wanted = write_checkout(checkout.parent / "edited")
    edit(wanted / "train_network.py", "running training", "running my training")
    assert tree(checkout) == tree(wanted)


# -- what is said ------------------------------------------------------------------------------------------------------


def test_status_names_version_and_state_of_each_file(checkout: Path) -> None:
    found = sd_scripts.status(checkout)
    assert (found.version, found.patched) == ("0.10.1", False)
    assert found.state == dict.fromkeys(PATCHED_FILES, "not patched")
    sd_scripts.patch(checkout)
    found = sd_scripts.status(checkout)
    assert found.patched
    assert found.state == dict.fromkeys(PATCHED_FILES, "patched")


def test_lines_of_another_version_are_told_and_replaced_and_taken_out(checkout: Path) -> None:
    before = tree(checkout)
    sd_scripts.patch(checkout)
    patched = tree(checkout)
    edit(checkout / "train_network.py", f"apt_trainer(trainer, args)  {MARK}", f"older_trainer(trainer)  {MARK}")
    found = sd_scripts.status(checkout)
    assert found.state["train_network.py"] == "patched by another version of apt-hooks"
    assert not found.patched
    older = tree(checkout)
    sd_scripts.patch(checkout)
    assert tree(checkout) == patched
    (checkout / "train_network.py").write_bytes(older["train_network.py"][0])
    sd_scripts.unpatch(checkout)
    assert tree(checkout) == before


def test_a_checkout_without_a_readme_is_patched_and_its_version_called_unknown(checkout: Path) -> None:
    (checkout / "README.md").unlink()
    assert sd_scripts.patch(checkout)
    assert sd_scripts.status(checkout).version == "unknown"


@pytest.mark.parametrize("act", [sd_scripts.patch, sd_scripts.unpatch, sd_scripts.status])
def test_a_folder_without_sd_scripts_is_refused_with_what_was_looked_for(
    tmp_path: Path, act: Callable[[Path], object]
) -> None:
    with pytest.raises(AptError) as error:
        act(tmp_path)
    assert all(name in str(error.value) for name in (str(tmp_path), *PATCHED_FILES))
    assert "No such file" in str(error.value)
    assert "there is one in" not in str(error.value)


def test_a_folder_above_sd_scripts_is_refused_with_a_hint(checkout: Path) -> None:
    with pytest.raises(AptError, match=re.escape(f"there is one in {checkout}")):
        sd_scripts.patch(checkout.parent)


# -- what is refused ---------------------------------------------------------------------------------------------------


def refused(checkout: Path, *said: str) -> None:
    """Patching says all of `said` in one line, and leaves the tree as it is."""
    before = tree(checkout)
    with pytest.raises(AptError) as error:
        sd_scripts.patch(checkout)
    assert [text for text in said if text not in str(error.value)] == [], str(error.value)
    assert "\n" not in str(error.value)
    assert tree(checkout) == before


def test_an_older_version_is_refused(checkout: Path) -> None:
    (checkout / "README.md").write_text("## Version 0.9.1\n")
    refused(checkout, "sd-scripts 0.9.1 is not supported", *sd_scripts.TESTED)


@pytest.mark.parametrize(
    ("name", "function"), [(name, function) for name, found in sd_scripts.REQUIRED.items() for function in found]
)
def test_a_missing_function_is_refused(checkout: Path, name: str, function: str) -> None:
    method = function.rsplit(".", 1)[-1]
    edit(checkout / name, f"def {method}(", f"def {method}_of_a_later_version(")
    refused(checkout, name, f"looked for {function}(), it is not there", "0.10.1")


@pytest.mark.parametrize(
    ("name", "old", "new", "said"),
    [
        (
            "library/train_util.py",
            "b_size: int,",
            "batch_size: int,",
            "looked for get_timesteps(min_timestep, max_timestep, b_size, device), "
            "found (min_timestep, max_timestep, batch_size, device)",
        ),
        ("train_network.py", "def shift_scale_latents(self, args, latents)", "def shift_scale_latents(self, latents)",
         "looked for NetworkTrainer.shift_scale_latents(self, args, latents), found (self, latents)"),
        ("train_network.py", "is_train=True, train_text_encoder=True, train_unet=True,\n    ):",
         "train_text_encoder=True, train_unet=True, is_train=True,\n    ):",
         "looked for NetworkTrainer.process_batch("),
        ("sdxl_train_network.py", "noisy_latents, timesteps, text_conds, batch, weight_dtype, indices",
         "timesteps, noisy_latents, text_conds, batch, weight_dtype, indices",
         "looked for SdxlNetworkTrainer.call_unet("),
    ],
    ids=["renamed", "left out", "moved", "swapped in sdxl"],
)  # fmt: skip
def test_changed_parameters_are_refused_with_what_was_found(
    checkout: Path, name: str, old: str, new: str, said: str
) -> None:
    edit(checkout / name, old, new)
    refused(checkout, name, said)


@pytest.mark.parametrize(
    ("name", "old", "new", "said"),
    [
        ("library/train_util.py", "        config_dict = toml.load(f)", "        config_dict = toml.load( f)",
         "it is not there"),
        ("train_network.py", "    trainer = NetworkTrainer()", "    trainer = NetworkTrainer( )", "it is not there"),
        ("sdxl_train_network.py", 'if __name__ == "__main__":', 'if __name__ == "__main__":\n    pass\n'
         'if __name__ == "__main__":', "it stands 2 times"),
    ],
)  # fmt: skip
def test_a_file_without_the_line_to_patch_at_is_refused_before_any_is_written(
    checkout: Path, name: str, old: str, new: str, said: str
) -> None:
    edit(checkout / name, old, new)
    refused(checkout, name, said)


def test_a_file_that_is_no_python_is_refused(checkout: Path) -> None:
    edit(checkout / "sdxl_train_network.py", "def setup_parser()", "def setup_parser(")
    refused(checkout, "sdxl_train_network.py", "cannot be read as Python")


# -- a crash between files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("undo", [False, True], ids=["patch", "unpatch"])
def test_a_crash_between_files_leaves_each_old_or_new_and_status_tells_which(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, undo: bool
) -> None:
    trees = [tree(checkout), {}]
    sd_scripts.patch(checkout)
    trees[1] = tree(checkout)
    if not undo:
        sd_scripts.unpatch(checkout)
    act, written, write = (sd_scripts.unpatch if undo else sd_scripts.patch), [], sd_scripts.write_atomically

    def fail_at_the_second(path: Path, content: bytes) -> None:
        written.append(path)
        if len(written) == 2:
            raise KeyboardInterrupt
        write(path, content)

    monkeypatch.setattr(sd_scripts, "write_atomically", fail_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        act(checkout)
    monkeypatch.undo()

    left = tree(checkout)
    assert left.keys() == trees[0].keys()
    old, new = (["patched", "not patched"], ["not patched", "patched"])[not undo]
    states = {name: "patched" if left[name] == trees[1][name] else "not patched" for name in PATCHED_FILES}
    assert all(left[name] in (trees[0][name], trees[1][name]) for name in left)
    assert sorted(states.values()) == sorted([old, old, new])
    # The scripts call what is in train_util: it is patched first and unpatched last.
    assert states["library/train_util.py"] == "patched"
    result = CliRunner().invoke(app, ["status", "sd-scripts", str(checkout)])
    assert result.exit_code == 1
    assert all(f"{name}: {state}\n" in result.output for name, state in states.items())
    act(checkout)
    assert tree(checkout) == trees[not undo]


@pytest.mark.parametrize("undo", [False, True], ids=["patch", "unpatch"])
def test_a_file_that_cannot_be_written_leaves_all_as_they_were(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, undo: bool
) -> None:
    if undo:
        sd_scripts.patch(checkout)
    before, write = tree(checkout), sd_scripts.write_atomically

    def fail_at_train_network(path: Path, content: bytes) -> None:
        if path.name == "train_network.py":
            raise AptError(f"{path}: cannot be written: Permission denied")
        write(path, content)

    monkeypatch.setattr(sd_scripts, "write_atomically", fail_at_train_network)
    with pytest.raises(AptError, match=r"/train_network\.py: cannot be written: .*; nothing was changed"):
        (sd_scripts.unpatch if undo else sd_scripts.patch)(checkout)
    assert tree(checkout) == before


# -- whole runs --------------------------------------------------------------------------------------------------------


APT_15 = 'preset = "sd15"\nblocks = [2, 3]\nenabled = true'


Ended = subprocess.CompletedProcess[str]


class Workshop:
    """A plain and a patched checkout, and runs by name, each made once and two at a time."""

    def __init__(self, folder: Path, pool: concurrent.futures.Executor) -> None:
        self.folder, self.pool = folder, pool
        self.begun: dict[str, concurrent.futures.Future[Ended]] = {}
        write_checkout(folder / "plain")
        sd_scripts.patch(write_checkout(folder / "patched"))
        (folder / "hidden").mkdir()
        (folder / "hidden/sitecustomize.py").write_text("import sys\nsys.modules['apt_hooks'] = None\n")

    def begin(
        self,
        name: str,
        *arguments: str,
        trainer: str = "patched",
        script: str = "train_network.py",
        apt: str | None = None,
        hidden: bool = False,
    ) -> None:
        write_job(self.folder / name, apt)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
        if hidden:
            environment["PYTHONPATH"] = str(self.folder / "hidden")
        self.begun[name] = self.pool.submit(
            subprocess.run,
            [sys.executable, str(self.folder / trainer / script), "--config_file", "train.toml", *arguments],
            cwd=self.folder / name, env=environment, capture_output=True, text=True, encoding="utf-8",
        )  # fmt: skip

    def ended(self, name: str) -> Ended:
        return self.begun[name].result()

    def trained(self, name: str) -> Path:
        """The output folder of a run that has to succeed."""
        result = self.ended(name)
        assert result.returncode == 0, result.stderr
        out = self.folder / name / "out"
        (out / "stdout.txt").write_text(result.stdout, encoding="utf-8")
        return out


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    """All runs of the tests below, begun in their order; those that no test has asked for by its end are left out."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        workshop = Workshop(tmp_path_factory.mktemp("runs"), pool)
        workshop.begin("plain", trainer="plain")
        workshop.begin("run patched")
        workshop.begin("run hidden", hidden=True)
        workshop.begin("refused", apt=APT_15, hidden=True)
        workshop.begin("apt", apt=APT_15)
        (workshop.folder / "apt.toml").write_text(f"[apt]\n{APT_15}\n")
        workshop.begin("by argument", "--apt_config", str(workshop.folder / "apt.toml"))
        workshop.begin("sdxl", apt='preset = "sdxl"', script="sdxl_train_network.py")
        workshop.begin("flux", apt=APT_15, script="flux_train_network.py")
        yield workshop
        pool.shutdown(cancel_futures=True)


def arguments_of(run: Path) -> dict[str, object]:
    return json.loads((run / "args.json").read_text())


@pytest.mark.parametrize("name", ["run patched", "run hidden"], ids=["apt-hooks installed", "apt-hooks not installed"])
def test_without_a_section_the_patched_trainer_writes_what_the_unpatched_one_does(
    workshop: Workshop, name: str
) -> None:
    plain, patched = workshop.trained("plain"), workshop.trained(name)
    assert sorted(path.name for path in patched.iterdir()) == sorted(path.name for path in plain.iterdir())
    for name in ("lora.pt", "tracker.jsonl", "stdout.txt"):
        assert (patched / name).read_bytes() == (plain / name).read_bytes()
    assert arguments_of(patched) == {**arguments_of(plain), "apt_config": None}


def test_a_section_without_apt_hooks_installed_ends_with_the_line_that_installs_it(workshop: Workshop) -> None:
    result = workshop.ended("refused")
    assert result.returncode == 1
    assert result.stderr.strip().endswith("pip install apt-hooks")
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_section_switches_apt_on_and_no_key_of_it_becomes_an_argument(workshop: Workshop) -> None:
    run, plain = workshop.trained("apt"), workshop.trained("plain")
    assert (run / "stdout.txt").read_text().count("is on | preset sd15") == 1
    assert (run / "lora-apt.jsonl").exists()
    assert (run / "lora.pt").read_bytes() != (plain / "lora.pt").read_bytes()
    assert arguments_of(run) == {**arguments_of(plain), "apt_config": None}
    assert arguments_of(run)["blocks"] is None


def test_the_argument_apt_config_equals_the_section(workshop: Workshop) -> None:
    by_argument, by_section = workshop.trained("by argument"), workshop.trained("apt")
    for name in ("lora.pt", "tracker.jsonl"):
        assert (by_argument / name).read_bytes() == (by_section / name).read_bytes()
    # Their first lines say when each was started.
    one, two = ((run / "lora-apt.jsonl").read_text().splitlines()[1:] for run in (by_argument, by_section))
    assert one == two


def test_the_patched_sdxl_script_runs_with_apt(workshop: Workshop) -> None:
    run = workshop.trained("sdxl")
    assert (run / "stdout.txt").read_text().count("is on | preset sdxl") == 1
    assert len((run / "lora-apt.jsonl").read_text().splitlines()) == 1 + 3


def test_another_script_refuses_a_section_that_it_would_ignore(workshop: Workshop) -> None:
    result = workshop.ended("flux")
    assert result.returncode == 1
    assert result.stderr.startswith("apt-hooks: error: ") and "flux_train_network.py" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert result.stdout == ""


# -- the real thing ----------------------------------------------------------------------------------------------------


@pytest.mark.real_trainer
@pytest.mark.skipif(not os.environ.get("SD_SCRIPTS_DIR"), reason="needs kohya's sd-scripts: set SD_SCRIPTS_DIR")
@pytest.mark.parametrize("newline", [b"\n", b"\r\n"], ids=["lf", "crlf"])
def test_a_real_checkout_is_patched_and_restored(tmp_path: Path, newline: bytes) -> None:
    source = Path(os.environ["SD_SCRIPTS_DIR"])
    for name in ("README.md", *PATCHED_FILES):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, tmp_path / name)
        content = (tmp_path / name).read_bytes().replace(b"\r\n", b"\n")
        (tmp_path / name).write_bytes(content.replace(b"\n", newline))
    before = tree(tmp_path)
    assert sd_scripts.status(tmp_path).version in sd_scripts.TESTED
    sd_scripts.patch(tmp_path)
    assert sd_scripts.status(tmp_path).patched
    for name in PATCHED_FILES:
        ast.parse((tmp_path / name).read_bytes())
    sd_scripts.unpatch(tmp_path)
    assert tree(tmp_path) == before
