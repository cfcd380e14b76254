"""`python -m apt_hooks.launch`: the stand-in of sd-scripts, not patched, run as if it were."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from sd_scripts_standin import LAYOUTS, PATCHED_FILES, write_checkout, write_job

from apt_hooks.errors import AptError
from apt_hooks.integrations.patching import strip
from apt_hooks.integrations.sd_scripts import patch as sd_scripts
from apt_hooks.integrations.sd_scripts.checkout import Checkout
from apt_hooks.integrations.sd_scripts.launch import loaded_sources

APT = 'preset = "sd15"\nblocks = [2, 3]'


def run(job: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command, "--config_file", "train.toml"],
        cwd=job,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )


def launched(job: Path, script: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return run(job, *options, "-m", "apt_hooks.launch", str(script))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def log(job: Path) -> list[str]:
    return (job / "out/lora-apt.jsonl").read_text().splitlines()[1:]  # the first line says when it was started


@pytest.mark.parametrize("layout", LAYOUTS)
def test_python_sees_the_lines_that_patch_writes(tmp_path: Path, layout: str) -> None:
    folder = write_checkout(tmp_path, layout=layout)
    seen = loaded_sources(Checkout(folder))
    sd_scripts.patch(folder)
    assert seen.keys() == {folder / name for name in PATCHED_FILES[layout]}
    for path, content in seen.items():
        assert strip(content) == strip(path.read_bytes())
        lines, patched = content.splitlines(), path.read_bytes().splitlines()
        # The scripts have three more, which say that nothing asks for APT.
        at = next((i for i, line in enumerate(lines) if line.strip() == b"else:  # [apt-hooks]"), len(lines))
        assert lines[:at] + lines[at + 3 :] == patched
    # Patched files, too.
    assert loaded_sources(Checkout(folder)) == seen


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_launched_run_is_the_patched_one_and_the_checkout_stays(tmp_path: Path, layout: str) -> None:
    plain = write_checkout(tmp_path / "plain", layout=layout)
    patched = write_checkout(tmp_path / "patched", layout=layout)
    sd_scripts.patch(patched)
    jobs = {name: tmp_path / name for name in ("by patch", "by launch")}
    for job in jobs.values():
        write_job(job, APT)
    before = files(plain)
    results = [run(jobs["by patch"], str(patched / "train_network.py"))]
    results.append(launched(jobs["by launch"], plain / "train_network.py", "-B"))
    assert [result.returncode for result in results] == [0, 0], results[-1].stderr
    assert files(plain) == before
    for name in ("lora.pt", "tracker.jsonl", "args.json"):
        assert (jobs["by launch"] / "out" / name).read_bytes() == (jobs["by patch"] / "out" / name).read_bytes()
    assert log(jobs["by launch"]) == log(jobs["by patch"])


def test_without_a_section_it_is_the_trainer_and_says_so(tmp_path: Path) -> None:
    plain = write_checkout(tmp_path / "plain", layout="0.11")
    for name in ("alone", "launched", "monitored"):
        write_job(tmp_path / name, "monitor_only = true" if name == "monitored" else None)
    assert run(tmp_path / "alone", str(plain / "train_network.py")).returncode == 0
    result = launched(tmp_path / "launched", plain / "train_network.py")
    said = "apt-hooks: train.toml has no [apt] section and --apt_config is not given: training without APT\n"
    assert result.stdout.count(said) == 1
    assert launched(tmp_path / "monitored", plain / "train_network.py").returncode == 0
    loras = [(tmp_path / name / "out/lora.pt").read_bytes() for name in ("alone", "launched", "monitored")]
    assert loras[0] == loras[1]
    assert json.loads((tmp_path / "monitored/out/tracker.jsonl").read_text().splitlines()[-1])["apt/gamma/0"] >= 0


def test_no_cache_of_python_mixes_launched_and_plain_runs(tmp_path: Path) -> None:
    plain = write_checkout(tmp_path / "plain", layout="0.11")
    for name in ("first", "second"):
        write_job(tmp_path / name, 'preset = "sdxl"')
    # An unpatched trainer flattens the section into its arguments, and trains on.
    assert run(tmp_path / "first", str(plain / "sdxl_train_network.py")).returncode == 0
    assert not (tmp_path / "first/out/lora-apt.jsonl").exists()
    assert launched(tmp_path / "second", plain / "sdxl_train_network.py").returncode == 0
    assert len(log(tmp_path / "second")) == 3
    assert run(tmp_path / "first", str(plain / "sdxl_train_network.py")).returncode == 0
    assert not (tmp_path / "first/out/lora-apt.jsonl").exists()


def test_the_script_sees_what_python_gives_a_script(tmp_path: Path) -> None:
    folder = write_checkout(tmp_path / "plain")
    script = folder / "train_network.py"
    shown = "__name__, __file__, __spec__, sys.argv, sys.path[0], sys.modules['__main__'].__file__"
    report = f"    import sys\n    print([{shown}], flush=True)\n"
    text = script.read_text("utf-8").replace("    parser = setup", f"{report}    parser = setup")
    script.write_text(
        text.replace("    trainer.train(args)", "    raise ValueError('here')\n    trainer.train(args)"), "utf-8"
    )
    write_job(tmp_path / "job", APT)
    alone, other = run(tmp_path / "job", str(script)), launched(tmp_path / "job", script)
    assert other.stdout.splitlines()[0] == alone.stdout.splitlines()[0]
    # Tracebacks have the line numbers of the file.
    raised = [line for line in other.stderr.splitlines() if str(script) in line]
    assert raised and raised == [line for line in alone.stderr.splitlines() if str(script) in line]
    assert "raise ValueError('here')" in other.stderr


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "train_other.py",
            "only train_network.py, sdxl_train_network.py, anima_train_network.py, flux_train_network.py can take",
        ),
        ("nothing.py", "no such file"),
        ("library/args.py", "only train_network.py"),
    ],
)
def test_what_cannot_be_launched_is_one_line(tmp_path: Path, name: str, said: str) -> None:
    folder = write_checkout(tmp_path / "plain", layout="0.11")
    write_job(tmp_path / "job", APT)
    result = launched(tmp_path / "job", folder / name)
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith(f"apt-hooks: error: {folder / name}: ") and said in result.stderr


def test_a_checkout_that_cannot_be_patched_cannot_be_launched(tmp_path: Path) -> None:
    folder = write_checkout(tmp_path / "plain")
    path = folder / "train_network.py"
    path.write_text(path.read_text("utf-8").replace("def post_process_loss(", "def process_loss("), "utf-8")
    with pytest.raises(AptError, match=r"looked for NetworkTrainer\.post_process_loss\(\)"):
        loaded_sources(Checkout(folder))


def test_alone_it_says_how_it_is_used(tmp_path: Path) -> None:
    result = subprocess.run([sys.executable, "-m", "apt_hooks.launch"], capture_output=True, text=True)
    assert result.returncode == 0 and "accelerate launch -m apt_hooks.launch" in result.stdout
