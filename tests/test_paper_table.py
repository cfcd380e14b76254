import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import toml
from benchmark_path import benchmarks_importable

pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytest.importorskip("rich")

from apt_hooks import AptError

with benchmarks_importable():
    import paper_table
    import paper_table_scores
    import processes

STANDIN = str(Path(__file__).with_name("paper_table_standin.py"))
SCRIPT = Path(__file__).with_name("dreambooth_scripts") / "one_encoder.py"
CLASSES = (
    "Classes\n\nsubject_name,class\ncan,can\ndog,dog\nplushie,stuffed animal\nvase,vase\n\nPrompts\n\n'a {0}, {1}'\n"
)


@pytest.fixture
def data(tmp_path):
    """Three subjects of four that are listed."""
    folder = tmp_path / "data"
    for name in ("can", "dog", "plushie"):
        (folder / name).mkdir(parents=True)
    (folder / "prompts_and_classes.txt").write_text(CLASSES)
    return folder


@pytest.fixture
def bench(data, monkeypatch, tmp_path):
    """Calls the benchmark with options; returns what it started, in order of method, seed and subject."""
    calls = tmp_path / "calls.jsonl"
    monkeypatch.setenv("STANDIN_CALLS", str(calls))
    monkeypatch.setattr(paper_table, "LAUNCH", [sys.executable, STANDIN])
    monkeypatch.setattr(paper_table, "EVAL", [sys.executable, STANDIN, "eval"])
    monkeypatch.setattr(paper_table, "devices", lambda: {"": "a processor"})

    def call(*options):
        calls.unlink(missing_ok=True)
        common = ["--model", "owner/model", "--script", str(SCRIPT), "--data", str(data), "--out", str(call.out)]
        common += ["--methods", "dreambooth,apt", "--subjects", "can,dog", "--steps", "20"]
        monkeypatch.setattr(sys, "argv", ["paper_table.py", *common, *options])
        paper_table.main()
        return call.started()

    def started():
        return [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []

    call.out, call.started = tmp_path / "out", started
    return call


def named(started):
    """Which runs and evaluations these are."""
    folders = [Path(each["options"]["out" if each["judging"] else "output_dir"]) for each in started]
    return [f"{folder.parent.name}/{folder.name}" for folder in folders]


ALL = ["can/dreambooth-0", "can/apt-0", "dog/dreambooth-0", "dog/apt-0", "can/eval", "dog/eval"]


# What is run.


def test_each_method_trains_each_subject_and_then_the_subjects_are_judged(bench, data):
    started = bench("--script-options=--resolution=64", "--eval-options", "--batch 3", "--mixed-precision", "fp16")
    assert named(started) == ALL
    options = started[1]["options"]
    assert options | {"apt_config": "", "output_dir": ""} == {
        "pretrained_model_name_or_path": "owner/model",
        "instance_data_dir": str(data / "can"),
        "instance_prompt": "a photo of a sks can",
        "output_dir": "",
        "seed": "0",
        "train_batch_size": "1",
        "max_train_steps": "20",
        "learning_rate": "5e-05",
        "rank": "32",
        "mixed_precision": "fp16",
        "checkpointing_steps": "6",
        "checkpoints_total_limit": "2",
        "resume_from_checkpoint": "latest",
        "apt_config": "",
        "resolution": "64",
    }
    judged = started[-1]["options"]
    assert {k: v for k, v in judged.items() if k not in ("out", "lora", "references")} == {
        "model": "owner/model",
        "prompts": "live",
        "class-word": "dog",
        "subject": "sks dog",
        "count": "4",
        "batch": "3",
    }
    assert started[-2]["options"]["prompts"] == "object"
    launch = json.loads((bench.out / "accelerate.json").read_text())
    assert (launch["num_processes"], launch["use_cpu"], launch["mixed_precision"]) == (1, True, "fp16")


def test_a_method_is_its_keys_of_apt(bench, tmp_path):
    shared = tmp_path / "shared.toml"
    shared.write_text("[apt]\nindicator_scale = 27.0\n")
    started = bench("--methods", "dreambooth,ata,ata+rs,apt", "--subjects", "can", "--apt", str(shared))
    found = [toml.load(each["options"]["apt_config"])["apt"] for each in started if not each["judging"]]
    scale = {"indicator_scale": 27.0}
    assert found == [
        scale | {"objective": "dreambooth"},
        scale | {"lambda_dist": 0.0, "lambda_attn": 0.0},
        scale | {"lambda_attn": 0.0},
        scale,
    ]


def test_nothing_is_made_twice(bench, capsys):
    assert named(bench()) == ALL
    table = capsys.readouterr().out.split("owner/model: ")[1]
    assert bench() == []
    assert capsys.readouterr().out.split("owner/model: ")[1] == table
    assert named(bench("--methods", "dreambooth,apt,dco", "--subjects", "can")) == ["can/dco-0", "can/eval"]
    assert named(bench("--seeds", "0,1", "--subjects", "dog")) == ["dog/dreambooth-1", "dog/apt-1", "dog/eval"]
    assert bench("--methods", "apt") == []
    assert named(bench("--count", "2", "--subjects", "can")) == ["can/eval"]


def test_a_run_that_is_made_anew_is_judged_anew(bench):
    bench()
    (bench.out / "dog" / "apt-0" / "apt-0.safetensors").unlink()
    assert named(bench()) == ["dog/apt-0", "dog/eval"]


def test_without_subjects_all_that_have_a_folder_are_trained(bench, data):
    assert [s.name for s in paper_table.read_subjects(data, None, None)] == ["can", "dog", "plushie"]
    (plushie,) = paper_table.read_subjects(data, ["plushie"], "mine.txt")
    assert plushie == paper_table.Subject("plushie", data / "plushie", "stuffed animal", "mine.txt")


def test_the_tiny_world_is_trained_from_its_folder_and_judged_by_its_name(bench):
    train, judge = bench("--model", "tinyworld", "--methods", "apt", "--subjects", "can")
    assert Path(train["options"]["pretrained_model_name_or_path"], "unet").is_dir()
    assert judge["options"]["model"] == "tinyworld"


# Stopped, and failed.


def test_a_failure_is_told_at_the_end_and_the_run_goes_on_from_its_checkpoint(bench, data, capsys):
    (data / "can" / "breaks.txt").touch()
    with pytest.raises(SystemExit) as ended:
        bench()
    assert named(bench.started()) == [*ALL[:4], "dog/eval"]
    output = bench.out / "can" / "apt-0" / "output.txt"
    assert f"can/apt-0: ended with 1, 'no memory is left' ({output})" in str(ended.value.code)
    assert str(ended.value.code).startswith("apt-hooks: error: failed, and made again by the same command: can/dream")
    assert "| apt | 1 | 20.00 |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"'no memory is left' .*; if checkpoint-6 is broken, remove it"):
        bench()
    (data / "can" / "breaks.txt").unlink()
    assert named(bench()) == ["can/dreambooth-0", "can/apt-0", "can/eval"]
    record = json.loads((output.parent / "run.json").read_text())
    # From the checkpoint at step 6 to 20, which are 13 steps behind the first.
    assert (record["resumed_from"], record["seconds_a_step"]) == (6, 2.5)
    assert sorted(p.suffix for p in output.parent.iterdir() if p.name != "run.json") == [
        ".jsonl",
        ".safetensors",
        ".toml",
        ".txt",
    ]


def test_where_it_is_stopped_all_that_runs_ends(tmp_path):
    """What a process has started too, as accelerate starts the script."""
    pid = tmp_path / "pid"
    inner = f"import os, pathlib, time; pathlib.Path({str(pid)!r}).write_text(str(os.getpid())); time.sleep(60)"
    outer = [sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"]

    def stop():
        while not (pid.exists() and pid.read_text()):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    try:
        tasks = {name: lambda execute: execute(outer, tmp_path / "output.txt") for name in ("one", "two")}
        threading.Thread(target=stop).start()
        with pytest.raises(SystemExit, match="stopped"):
            processes.Processes({"": "a processor"}).work(tasks)
    finally:
        signal.signal(signal.SIGTERM, before)
    for _ in range(6000):  # an orphan is gone when init has seen its end
        state = Path(f"/proc/{pid.read_text()}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.01)
    pytest.fail("the process goes on")


# Devices.


def test_every_gpu_is_used_by_one_process_at_a_time(bench, monkeypatch):
    monkeypatch.setattr(paper_table, "devices", lambda: {"2": "GPU A", "5": "GPU B"})
    started = bench("--seeds", "0,1,2")
    assert {each["device"] for each in started} == {"2", "5"}  # the stand-in fails where two are on one
    rows = json.loads((bench.out / "table.json").read_text())["runs"]
    assert {row["device"] for row in rows if row["method"] != "base"} <= {"GPU A", "GPU B"}
    assert started[0]["options"]["mixed_precision"] == "bf16"
    assert json.loads((bench.out / "accelerate.json").read_text())["use_cpu"] is False


@pytest.mark.parametrize(
    ("visible", "ids"), [(None, ["0", "1"]), ("3, GPU-ab", ["3", "GPU-ab"]), ("7,4,9", ["7", "4"])]
)
def test_gpus_are_those_that_are_visible(monkeypatch, visible, ids):
    said = subprocess.CompletedProcess([], 0, stdout="GPU A\nGPU B\n")
    monkeypatch.setattr(processes.subprocess, "run", lambda *_, **__: said)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert processes.devices() == dict(zip(ids, ["GPU A", "GPU B"], strict=True))
    said.stdout = ""
    assert list(processes.devices()) == [""]


# The table.


def row(subject, method, seed, fid):
    return {"subject": subject, "method": method, "seed": seed, "scores": {"fid": fid}}


def both(subject, seed):
    return (subject, "dreambooth", seed), (subject, "apt", seed)


def table_of(*rows, model="owner/model"):
    return paper_table_scores.tables(
        {"settings": {"model": model}, "metrics": {"fid": {"best": "lowest"}}, "runs": list(rows)}
    )


def test_the_error_is_that_of_the_subjects_means_and_the_papers_row_is_below():
    fids = {("can", 0): (20.0, 10.0), ("can", 1): (40.0, 20.0), ("dog", 0): (50.0, 46.0), ("dog", 1): (70.0, 64.0)}
    rows = [row(*place, fid[i]) for place, fid in fids.items() for i, place in enumerate(both(*place))]
    lines = table_of(row("can", "base", 0, 1.0), row("dog", "base", 0, 3.0), *rows)
    assert lines[0] == "owner/model: mean ± standard error over subjects, each the mean of its seeds:"
    # Means of 30 and 60 deviate by 15 from theirs: 15 * sqrt(2) / sqrt(2).
    assert lines[2:9] == [
        "| method | runs | fid ↓ |",
        "|---|---|---|",
        "| base | 2 | 2.00 ± 1.00 |",
        "| dreambooth | 4 | 45.00 ± 15.00 |",
        "| the paper's dreambooth | | 53.13 |",
        "| apt | 4 | 35.00 ± 20.00 |",
        "| the paper's apt | | 41.967 |",
    ]
    # Of the subjects -15 and -5.
    assert lines[14:16] == ["| apt | 4 | -10.00 ± 5.00 |", ""]


def test_of_one_subject_the_error_is_that_of_its_seeds_and_a_run_without_a_partner_is_in_no_pair():
    rows = [row("can", "dreambooth", 0, 20.0), row("can", "dreambooth", 1, 40.0), row("can", "apt", 1, 30.0)]
    lines = table_of(*rows, row("can", "apt", 2, 32.0), model="tinyworld")
    assert lines[0] == "tinyworld: mean ± standard error over the seeds of one subject:"
    assert "| dreambooth | 2 | 30.00 ± 10.00 |" in lines and "| apt | 2 | 31.00 ± 1.00 |" in lines
    assert "| apt | 1 | -10.00 |" in lines
    assert not any("paper's apt" in line for line in lines), "the paper did not train that model"


def test_the_table_is_printed_again_from_its_file_alone(bench, monkeypatch, capsys, tmp_path):
    bench()
    table = capsys.readouterr().out.split("owner/model: ")[1]
    found = json.loads((bench.out / "table.json").read_text())
    assert found["settings"]["steps"] == 20 and found["settings"]["script"] == "one_encoder_apt.py"
    last = found["runs"][-1]
    assert last["seconds_a_step"] == 2.5 and last["device"] == "a processor" and last["versions"]["torch"]
    assert last["scores"] == {"fid": 20.0, "clip_t": 0.3}
    (tmp_path / "elsewhere").mkdir()
    (bench.out / "table.json").rename(tmp_path / "elsewhere" / "table.json")
    monkeypatch.setattr(sys, "argv", ["paper_table.py", "--out", str(tmp_path / "elsewhere"), "--table-only"])
    paper_table.main()
    assert capsys.readouterr().out == "owner/model: " + table


def test_the_estimate_is_arithmetic_from_short_runs():
    trained = {"resumed_from": 0, "seconds_a_step": 2.0, "seconds": 160.0, "device": "GPU A"}
    runs = [row("can", "base", 0, 1.0), *({**row("can", m, 0, 1.0), **trained} for m in ("dreambooth", "apt"))]
    judged = {"can": {"seconds": 400.0, "pictures": {"base": 50, "dreambooth-0": 25, "apt-0": 25}}}
    size = {"smoke_steps": 50, "steps": 1000, "count": 4, "subjects": 3, "seeds": 2, "devices": 5}
    lines = paper_table_scores.estimate({"runs": runs, "judged": judged}, **size)
    assert lines[0] == "dreambooth: 2.000 s a step and 60 s a run, on GPU A"
    assert lines[2] == "4.00 s a picture, loading and judging included"
    # 12 runs of 2060 s, and for each of 3 subjects 4 * (50 + 2 * 50) pictures of 4 s.
    assert lines[3] == (
        "2 methods x 3 subjects x 2 seeds, 1000 steps each, and 1800 pictures: "
        "6.87 + 2.00 hours of a device, 1.77 hours on 5"
    )


def test_smoke_is_short_and_in_a_folder_of_its_own(bench, capsys):
    started = bench("--smoke", "--seeds", "3,4")
    assert named(started) == ["can/dreambooth-3", "can/apt-3", "can/eval"]
    assert started[0]["options"]["max_train_steps"] == "50" and started[2]["options"]["count"] == "1"
    assert Path(started[2]["options"]["out"]) == bench.out / "smoke" / "can" / "eval"
    assert "2 methods x 2 subjects x 2 seeds, 20 steps each, and 96 pictures" in capsys.readouterr().out


# What is refused.


@pytest.mark.parametrize(
    ("options", "key"),
    [
        (("--steps", "30"), "steps 20, here 30"),
        (("--script-options=--resolution=8",), 'script_options "", here "--resolution=8"'),
        (("--model", "owner/other"), 'model "owner/model", here "owner/other"'),
    ],
)
def test_a_folder_with_runs_of_other_settings_is_refused(bench, options, key):
    bench("--subjects", "can")
    with pytest.raises(SystemExit) as ended:
        bench("--subjects", "can", *options)
    assert (
        str(ended.value.code)
        == f"apt-hooks: error: --out {bench.out}: has runs of other settings, {key}; choose another"
    )
    assert bench.started() == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--methods", "apt,prior"), "--methods takes dreambooth, dco, .*; found 'prior'"),
        (("--methods", "apt,apt+l2-sp"), r"--methods takes dreambooth, dco, .*; found 'apt\+l2-sp'"),
        (("--subjects", "can,vase"), "--subjects: 'vase' has no folder in .*data, or no class"),
        (("--data", "nowhere"), "--data nowhere: has no prompts_and_classes.txt that can be read"),
        (("--model", "nowhere"), "--model nowhere: no such folder or file"),
        (("--model", "tinyworld-transformer"), "reads texts in a way of its own, which no script of diffusers trains"),
        (("--script", "nowhere.py"), "nowhere.py: cannot be read"),
        (("--script", STANDIN), "paper_table_standin.py"),
        (("--apt", "{wrong}"), 'lambda_atn = 2: there is no such key; did you mean "lambda_attn"'),
        (("--apt", "{none}"), "has no section"),
        (("--steps", "0"), "--steps must be at least 1; found 0"),
    ],
)
def test_wrong_options_are_told_in_one_line_before_anything_runs(bench, tmp_path, options, said):
    for name, text in {"wrong": "[apt]\nlambda_atn = 2\n", "none": "seed = 1\n"}.items():
        (tmp_path / f"{name}.toml").write_text(text)
    options = [option.format(wrong=tmp_path / "wrong.toml", none=tmp_path / "none.toml") for option in options]
    with pytest.raises(SystemExit, match=said) as ended:
        bench(*options)
    assert str(ended.value.code).count("\n") == 0 and bench.started() == []


def test_what_is_needed_is_named(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["paper_table.py", "--out", "out"])
    with pytest.raises(AptError, match="--model is needed"):
        paper_table._arguments()
