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
from types import SimpleNamespace

import pytest
from sd_scripts_standin import LAYOUTS, PATCHED_FILES, write_checkout, write_job
from typer.testing import CliRunner

from apt_hooks.cli import app
from apt_hooks.errors import AptError
from apt_hooks.integrations import patching
from apt_hooks.integrations.patching import MARK
from apt_hooks.integrations.sd_scripts import patch as sd_scripts
from apt_hooks.integrations.sd_scripts.checkout import METHODS, SCRIPTS, SUPPORTED

Tree = dict[str, tuple[bytes, int]]


@pytest.fixture(params=LAYOUTS)
def checkout(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A checkout in the layout that its name says."""
    return write_checkout(tmp_path / request.param, layout=request.param)


either_newline = pytest.mark.parametrize("newline", ["\n", "\r\n"], ids=["lf", "crlf"])
either_layout = pytest.mark.parametrize("layout", LAYOUTS)


def tree(folder: Path) -> Tree:
    """Content and mode of every file."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mode) for path in files}


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


# -- what is written ---------------------------------------------------------------------------------------------------


@either_newline
@either_layout
def test_unpatching_restores_the_whole_tree(tmp_path: Path, newline: str, layout: str) -> None:
    folder = write_checkout(tmp_path, newline=newline, layout=layout)
    before = tree(folder)
    assert sd_scripts.patch(folder)
    changed = {name for name, found in tree(folder).items() if found != before.get(name)}
    assert changed == set(PATCHED_FILES[layout])
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
    assert sd_scripts.patch(checkout) == shown
    patched = tree(checkout)
    new = [line for name in PATCHED_FILES[checkout.name] for line in patched[name][0].decode().splitlines()]
    inserted = [line for line in new if line.endswith(MARK)]
    assert len(inserted) == 8 + 4 * 4
    assert [line[1:] for line in shown.splitlines() if line[0] == "+" and line[:3] != "+++"] == inserted
    taken_out = sd_scripts.unpatch(checkout, dry_run=True).splitlines()
    assert tree(checkout) == patched
    assert sorted(line[1:] for line in taken_out if line[0] == "-" and line[:3] != "---") == sorted(inserted)


def test_every_line_of_a_file_with_crlf_ends_with_crlf(tmp_path: Path) -> None:
    folder = write_checkout(tmp_path, newline="\r\n")
    sd_scripts.patch(folder)
    for name in PATCHED_FILES["0.10"]:
        content = (folder / name).read_bytes()
        assert MARK.encode() in content
        assert content.count(b"\r\n") == content.count(b"\n")


def test_file_modes_are_kept(checkout: Path) -> None:
    for name, mode in zip(PATCHED_FILES[checkout.name], (0o755, 0o640, 0o600), strict=False):
        (checkout / name).chmod(mode)
    before = tree(checkout)
    sd_scripts.patch(checkout)
    assert {name: mode for name, (_, mode) in tree(checkout).items()} == {n: m for n, (_, m) in before.items()}
    sd_scripts.unpatch(checkout)
    assert tree(checkout) == before


@either_newline
@either_layout
def test_patched_files_are_valid_python(tmp_path: Path, newline: str, layout: str) -> None:
    folder = write_checkout(tmp_path, newline=newline, layout=layout)
    sd_scripts.patch(folder)
    for name in PATCHED_FILES[layout]:
        ast.parse((folder / name).read_bytes())


def test_the_users_own_edits_survive_patching_and_unpatching(checkout: Path) -> None:
    sd_scripts.patch(checkout)
    edit(checkout / "train_network.py", "running training", "running my training")
    sd_scripts.unpatch(checkout)
    wanted = write_checkout(checkout.parent / "edited", layout=checkout.name)
    edit(wanted / "train_network.py", "running training", "running my training")
    assert tree(checkout) == tree(wanted)


# -- what is said ------------------------------------------------------------------------------------------------------


def test_status_names_version_and_state_of_each_file(checkout: Path) -> None:
    found = sd_scripts.status(checkout)
    assert (found.version, found.patched) == ("0.10.1", False)
    assert found.state == dict.fromkeys(PATCHED_FILES[checkout.name], "not patched")
    sd_scripts.patch(checkout)
    found = sd_scripts.status(checkout)
    assert found.patched
    assert found.state == dict.fromkeys(PATCHED_FILES[checkout.name], "patched")


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


def test_lines_that_lost_their_marks_are_told_and_nothing_is_changed(checkout: Path) -> None:
    sd_scripts.patch(checkout)
    name = "train_network.py"
    path = checkout / name
    path.write_bytes(path.read_bytes().replace(MARK.encode(), b""))
    before = tree(checkout)
    for change in (sd_scripts.status, sd_scripts.patch, sd_scripts.unpatch):
        with pytest.raises(AptError, match=rf"^{re.escape(name)}: .* line \d+ .*has lost the mark"):
            change(checkout)
        assert tree(checkout) == before


def test_a_checkout_without_a_readme_is_patched_and_its_version_called_unknown(checkout: Path) -> None:
    (checkout / "README.md").unlink()
    assert sd_scripts.patch(checkout)
    assert sd_scripts.status(checkout).version == "unknown"


@pytest.mark.parametrize("act", [sd_scripts.patch, sd_scripts.unpatch, sd_scripts.status])
def test_a_folder_without_sd_scripts_is_refused_with_its_whole_path_and_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, act: Callable[[Path], object]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AptError) as error:
        act(Path())
    assert str(error.value).startswith(f"{tmp_path}: looked for kohya's sd-scripts, that is train_network.py and ")
    assert "No such file" in str(error.value)
    assert str(error.value).endswith("cd there, or name its folder, as in `apt-hooks patch sd-scripts PATH`")


def test_a_folder_above_sd_scripts_is_refused_with_where_it_is(tmp_path: Path) -> None:
    folder = write_checkout(tmp_path / "sd-scripts")
    with pytest.raises(AptError, match=re.escape(f"as in `apt-hooks patch sd-scripts {folder}`")):
        sd_scripts.patch(tmp_path)


# -- what is refused ---------------------------------------------------------------------------------------------------


def refused(checkout: Path, *said: str) -> None:
    """Patching says all of `said` in one line, and leaves the tree as it is."""
    before = tree(checkout)
    with pytest.raises(AptError) as error:
        sd_scripts.patch(checkout)
    assert [text for text in said if text not in str(error.value)] == [], str(error.value)
    assert "\n" not in str(error.value)
    assert tree(checkout) == before


@pytest.mark.parametrize("version", ["0.9.1", "0.10.0", "0.12.0", "1.0.0"])
def test_a_readme_decides_nothing(checkout: Path, version: str) -> None:
    """GUIs carry copies of newer code under an older README."""
    (checkout / "README.md").write_text(f"## Version {version}\n")
    assert sd_scripts.patch(checkout)
    found = sd_scripts.status(checkout)
    assert found.patched and found.version == version


@pytest.mark.parametrize("method", METHODS)
def test_a_missing_method_is_refused_with_what_can_be_patched(checkout: Path, method: str) -> None:
    for name in SCRIPTS:
        text = (checkout / name).read_text(encoding="utf-8")
        (checkout / name).write_text(text.replace(f"def {method}(", f"def {method}_of_a_later_version("), "utf-8")
    refused(checkout, "train_network.py: looked for NetworkTrainer.", f".{method}()", "it is not there", SUPPORTED)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("get_timesteps", "loss"),
        ("get_noise_noisy_latents_and_timesteps", "loss"),
        ("read_config_from_file", "args"),
    ],
)
def test_a_missing_function_is_refused_with_the_file_where_it_was_looked_for(
    checkout: Path, name: str, file: str
) -> None:
    home = "library/train_util.py" if checkout.name == "0.10" else f"library/{file}.py"
    edit(checkout / home, f"def {name}(", f"def {name}_of_a_later_version(")
    refused(checkout, f"{checkout / home}: looked for {name}()", "it is not there")


@pytest.mark.parametrize(
    ("name", "old", "new", "said"),
    [
        ("loss", "b_size: int,", "batch_size: int,",
         "looked for get_timesteps(min_timestep, max_timestep, b_size, device), "
         "found (min_timestep, max_timestep, batch_size, device)"),
        ("train_network.py", "def shift_scale_latents(self, args, latents)", "def shift_scale_latents(self, latents)",
         "looked for NetworkTrainer.shift_scale_latents(self, args, latents), found (self, latents)"),
        ("train_network.py", "is_train=True, train_text_encoder=True, train_unet=True,\n    ):",
         "train_text_encoder=True, train_unet=True, is_train=True,\n    ):",
         "looked for NetworkTrainer.process_batch("),
        ("sdxl_train_network.py", "def load_target_model(self, args, weight_dtype, accelerator)",
         "def load_target_model(self, weight_dtype, args, accelerator)",
         "looked for SdxlNetworkTrainer.load_target_model("),
        ("train_network.py", "get_noise_noisy_latents_and_timesteps(args", "own_noise(args",
         "looked for a call of get_noise_noisy_latents_and_timesteps() in get_noise_pred_and_target(), found none"),
        ("loss", "timesteps = get_timesteps(low", "timesteps = samplers.get_timesteps(low",
         "looked for get_timesteps(...) by its own name in get_noise_noisy_latents_and_timesteps()"),
        ("args", "= toml.load(f)", "= read(f)", "looked for one `... = toml.load(...)` in read_config_from_file()"),
        ("train_network.py", "    trainer = NetworkTrainer()", "    trainer = make()", "looked for make.train()"),
        ("train_network.py", "    trainer.train(args)", "    run(trainer, args)", "`trainer.train(args)`"),
        ("sdxl_train_network.py", 'if __name__ == "__main__":', 'if __name__ == "__main__":\n    pass\n'
         'if __name__ == "__main__":', "found 2 of them"),
        ("sdxl_train_network.py", "def setup_parser()", "def setup_parser(", "cannot be read as Python: line "),
        ("sdxl_train_network.py", "    trainer.train(args)", "    pass; trainer.train(args)", "on a line of its own"),
    ],
    ids=["renamed", "left out", "moved", "swapped in sdxl", "other noise", "sampler of a module", "other parser",
         "not a class", "not trained", "two mains", "no python", "two statements"],
)  # fmt: skip
def test_what_has_not_the_structure_is_refused_with_what_was_found(
    checkout: Path, name: str, old: str, new: str, said: str
) -> None:
    if not name.endswith(".py"):
        name = "library/train_util.py" if checkout.name == "0.10" else f"library/{name}.py"
    edit(checkout / name, old, new)
    refused(checkout, name, said)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("flux_train_utils.get_noisy_model_input_and_timesteps(", "own_noise(",
         "looked for a call of get_noise_noisy_latents_and_timesteps() in get_noise_pred_and_target(), found none"),
        ("def encode_images_to_latents(self, args, vae, images)", "def encode_images_to_latents(self, vae, images)",
         "looked for AnimaNetworkTrainer.encode_images_to_latents(self, args, vae, images), found (self, vae, images)"),
        ("train_unet, is_train=True,", "train_unet,", "looked for get_noise_pred_and_target(..., is_train)"),
    ],
)  # fmt: skip
def test_a_script_that_has_not_the_structure_is_left_out_and_named_and_the_others_are_patched(
    checkout: Path, caplog: pytest.LogCaptureFixture, old: str, new: str, said: str
) -> None:
    name = "anima_train_network.py"
    edit(checkout / name, old, new)
    before = (checkout / name).read_bytes()
    sd_scripts.patch(checkout)
    found = sd_scripts.status(checkout)
    assert (checkout / name).read_bytes() == before
    assert found.patched and set(found.state) == set(PATCHED_FILES[checkout.name]) - {name}
    assert list(found.refused) == [name] and said in found.refused[name]
    assert caplog.text.count(f"left out: {checkout / name}: looked for") == 1
    assert any(name in line and "cannot take [apt]" in line for line in sd_scripts.report(checkout, found))
    sd_scripts.unpatch(checkout)
    assert (checkout / name).read_bytes() == before


def test_noise_made_with_other_parameters_is_refused(checkout: Path) -> None:
    edit(checkout / "library/flux_train_utils.py", "latents, noise, device, dtype)", "latents, noise, seed)")
    found = sd_scripts.status(checkout)
    assert set(found.refused) == {"anima_train_network.py", "flux_train_network.py"}
    assert "found (args, noise_scheduler, latents, noise, seed)" in found.refused["flux_train_network.py"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (
            "trainer = NetworkTrainer()\n    trainer.train(args)",
            "t = NetworkTrainer()\n    print(1)\n    t.train(args)",
        ),
        ("    args = parser.parse_args()", "    # as given\n    args = parser.parse_args()  # all of them"),
        ("class NetworkTrainer:", "class NetworkTrainer(object):"),
    ],
    ids=["other names", "comments", "a base that is not the checkout's"],
)
def test_what_has_the_structure_is_patched_whatever_its_names(checkout: Path, old: str, new: str) -> None:
    edit(checkout / "train_network.py", old, new)
    sd_scripts.patch(checkout)
    assert sd_scripts.status(checkout).patched


def test_functions_are_followed_through_imports_by_other_names(tmp_path: Path) -> None:
    """Another split of the library than any release's."""
    folder = write_checkout(tmp_path, layout="0.11")
    (folder / "library/configs").mkdir()
    (folder / "library/configs/__init__.py").write_text("from .reading import read_config_from_file\n")
    (folder / "library/args.py").rename(folder / "library/configs/reading.py")
    (folder / "library/args.py").write_text(
        "from library.configs import read_config_from_file as read_config_from_file\n"
    )
    edit(
        folder / "sdxl_train_network.py",
        "import library.args as args_util,",
        "from library import args as args_util\nimport",
    )
    sd_scripts.patch(folder)
    assert set(sd_scripts.status(folder).state) == {"library/configs/reading.py", *PATCHED_FILES["0.11"][1:]}
    assert "    from library.configs.reading import apt_hooks_adapter" in (folder / "train_network.py").read_text(
        "utf-8"
    )


# -- after an update ---------------------------------------------------------------------------------------------------


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=x", "-c", "user.email=x@localhost", "-c", "init.defaultBranch=main"]
    return subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def cloned(tmp_path: Path) -> Path:
    """A patched clone in the layout of 0.10, whose origin has gone on to that of 0.11."""
    origin = write_checkout(tmp_path / "origin")
    for arguments in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "0.10"]):
        git(origin, *arguments)
    git(tmp_path, "clone", "-q", str(origin), "clone")
    sd_scripts.patch(tmp_path / "clone")
    write_checkout(origin, layout="0.11")
    git(origin, "add", "-A")
    git(origin, "commit", "-qm", "0.11")
    return tmp_path / "clone"


def test_after_stash_pull_and_pop_status_tells_the_conflict_and_patch_mends_it(cloned: Path) -> None:
    git(cloned, "stash")
    git(cloned, "pull", "-q")
    subprocess.run(["git", "stash", "pop"], cwd=cloned, capture_output=True)
    assert "<<<<<<<" in (cloned / "library/train_util.py").read_text("utf-8")
    assert sd_scripts.status(cloned).state == {
        "library/args.py": "not patched",
        "library/train_util.py": sd_scripts.CONFLICT,
        **dict.fromkeys(PATCHED_FILES["0.11"][1:], sd_scripts.OTHER_LINES),
    }
    sd_scripts.patch(cloned)
    assert sd_scripts.status(cloned).patched
    sd_scripts.unpatch(cloned)
    wanted = tree(write_checkout(cloned.parent / "wanted", layout="0.11"))
    assert {name: tree(cloned)[name] for name in wanted} == wanted


def test_a_conflict_with_the_users_own_edits_is_left_to_them(cloned: Path) -> None:
    edit(cloned / "library/train_util.py", "    flat = {}", "    flat = {'mine': 1}")
    git(cloned, "stash")
    git(cloned, "pull", "-q")
    subprocess.run(["git", "stash", "pop"], cwd=cloned, capture_output=True)
    refused(
        cloned, f"{cloned / 'library/train_util.py'}: git left a conflict", "checkout HEAD -- library/train_util.py"
    )


def test_lines_left_where_a_function_was_before_the_update_are_told_and_taken_out(tmp_path: Path) -> None:
    folder = write_checkout(tmp_path)
    sd_scripts.patch(folder)
    left = (folder / "library/train_util.py").read_bytes()
    write_checkout(folder, layout="0.11")
    edited = (folder / "library/train_util.py").read_bytes()
    marked = b"".join(line for line in left.splitlines(keepends=True) if line.rstrip().endswith(MARK.encode()))
    (folder / "library/train_util.py").write_bytes(edited + b"\n\n" + marked.split(b"    return adapter")[0] + b"")
    found = sd_scripts.status(folder)
    assert found.state["library/train_util.py"] == sd_scripts.LEFT_OVER and not found.patched
    sd_scripts.patch(folder)
    assert sd_scripts.status(folder).patched
    assert (folder / "library/train_util.py").read_bytes() == edited + b"\n\n"


def test_lines_that_name_another_place_to_install_from_are_brought_up_to_date(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sd_scripts.patch(checkout)
    monkeypatch.setattr(patching, "install_hint", lambda: "pip install file:///elsewhere")
    assert not sd_scripts.status(checkout).patched
    assert "file:///elsewhere" in sd_scripts.patch(checkout)
    assert sd_scripts.status(checkout).patched


@pytest.mark.parametrize(
    ("origin", "command"),
    [
        (None, "pip install apt-hooks"),
        ({"url": "file:///a%20b/apt-hooks", "dir_info": {}}, "pip install file:///a%20b/apt-hooks"),
        ({"url": "https://x/y.git", "vcs_info": {"vcs": "git", "commit_id": "abc"}}, "pip install git+https://x/y.git@abc"),
        ({"url": 'file:///{"}\\', "dir_info": {}}, "pip install file:///%7B%22%7D%5C"),
    ],
    ids=["index", "folder", "git", "signs that would end the line"],
)  # fmt: skip
def test_what_the_trainer_says_without_apt_hooks_is_where_it_came_from(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, origin: object, command: str
) -> None:
    text = None if origin is None else json.dumps(origin)
    found = SimpleNamespace(read_text={"direct_url.json": text}.__getitem__)
    monkeypatch.setattr("importlib.metadata.distribution", lambda name: found)
    assert patching.install_hint() == command
    assert f"not found here ({{e}}): {command}" in sd_scripts.patch(checkout)


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
    files = PATCHED_FILES[checkout.name]
    states = {name: "patched" if left[name] == trees[1][name] else "not patched" for name in files}
    assert all(left[name] in (trees[0][name], trees[1][name]) for name in left)
    assert sorted(states.values()) == sorted([*[old] * (len(files) - 1), new])
    # The scripts call what is in the library: it is patched first and unpatched last.
    assert states[files[0]] == "patched"
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


@pytest.mark.parametrize("undo", [False, True], ids=["patch", "unpatch"])
def test_what_a_killed_run_left_is_taken_away(checkout: Path, undo: bool) -> None:
    name = PATCHED_FILES[checkout.name][0]
    left = checkout / name
    left = left.with_name(f".{left.name}.k2j_a9x0.tmp")
    left.write_text("half a file")
    own = checkout / ".notes.tmp"
    own.write_text("the user's")
    (sd_scripts.unpatch if undo else sd_scripts.patch)(checkout)
    assert not left.exists() and own.exists()


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
        workshop.begin("flux", apt=APT_15, script="train_other.py")
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
    assert result.stderr.strip().endswith(f": {patching.install_hint()}")
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
    assert result.stderr.startswith("apt-hooks: error: ") and "train_other.py" in result.stderr
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
