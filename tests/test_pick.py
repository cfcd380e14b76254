"""Which checkpoint: the verdict from lines alone, and the command that shows it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from apt_hooks import AptError
from apt_hooks.cli import app
from apt_hooks.results.read_checkpoints import Checkpoint, find_runs, read_checkpoints
from apt_hooks.results.verdict import verdict

GAPS = (0.02, 0.04, 0.05, 0.052, 0.054, 0.055)
DRIFTS = (0.2, 0.25, 0.3, 0.5, 0.8, 1.2)


def checkpoint(step: int, gap: float = 0.01, drift: float = 0.1, **other: Any) -> Checkpoint:
    known: dict[str, Any] = {"gamma": 0.5, "held_out_gap": math.nan, "bins": 10, "unseen": 0, "delta_noise": 0.02}
    drifts = {"class_drift": drift, "free_drift": drift / 2, "text_drift": math.nan}
    return Checkpoint(step=step, file=f"lora-{step}.safetensors", gap=gap, **{**known, **drifts, **other})


def run(gaps: Any = GAPS, drifts: Any = DRIFTS, **other: Any) -> list[Checkpoint]:
    return [
        checkpoint(100 * k, gap, drift, **other) for k, (gap, drift) in enumerate(zip(gaps, drifts, strict=True), 1)
    ]


def test_the_knee_of_learning_against_drift_is_picked() -> None:
    found = verdict(run())
    assert found.picked is not None and found.picked.step == 300
    # learned 0.03 of 0.035, drifted 0.1 of 1.0
    assert found.benefits[2] == pytest.approx(0.03 / 0.035 - 0.1)
    assert found.benefits[0] == 0 and found.benefits[-1] == pytest.approx(0)
    assert str(found).startswith("Step 300 (lora-300.safetensors): from the first checkpoint on it has 86% of what was")
    assert len(found.sentences) == 2


def test_of_the_last_one_nothing_behind_it_is_said() -> None:
    found = verdict(run(drifts=(0.1, 0.2, 0.2, 0.19, 0.15, 0.1)))
    assert found.picked is not None and found.picked.step == 600 and found.sure
    assert found.sentences[1].startswith("Before it less is learned, and it is the last: a longer training may")


def test_the_unit_of_gaps_and_drifts_is_no_matter() -> None:
    one, other = verdict(run()), verdict(run([7 * gap for gap in GAPS], [30 * drift for drift in DRIFTS]))
    assert one.benefits == pytest.approx(other.benefits)


def test_where_others_are_as_good_it_says_which() -> None:
    found = verdict(run(range(6), range(6)))  # learning and drift go together
    assert not found.sure and "cannot be told from steps 200, 300, 400, 500, 600" in str(found)


@pytest.mark.parametrize(
    ("checkpoints", "said"),
    [
        ([], "No checkpoint has been saved yet."),
        (
            [checkpoint(20, delta_noise=1e-4)],
            "Too short to say: 20 steps, and the LoRA has hardly moved the model (delta noise 1",
        ),
        ([checkpoint(20, unseen=2)], "Too short to say: 20 steps, and 2 of 10 bins of timesteps were never seen."),
        (run()[:2], "Cannot tell from 2 checkpoints"),
        (run(class_drift=math.nan, free_drift=math.nan), "Cannot tell: not all of these checkpoints have drifts"),
        (run(gaps=[0.05] * 6), "Cannot tell: behind the first checkpoint the LoRA got no further ahead"),
    ],
)
def test_it_says_when_it_cannot_tell(checkpoints: list[Checkpoint], said: str) -> None:
    found = verdict(checkpoints)
    assert found.picked is None and str(found).startswith(said) and len(found.benefits) == len(checkpoints)


def test_pictures_that_were_not_trained_on_have_a_sentence() -> None:
    held_out = (0.01, 0.02, 0.015, 0.01, 0.0, -0.01)
    checkpoints = [
        checkpoint(one.step, one.gap, one.class_drift, held_out_gap=h) for one, h in zip(run(), held_out, strict=True)
    ]
    assert "furthest ahead of the base model at step 200 (0.02), and -0.01 at the end" in str(verdict(checkpoints))


# -- the command -------------------------------------------------------------------------------------------------------


def line(step: int, gap: float, drift: float, **other: Any) -> dict[str, Any]:
    own = {"gamma": [0.5, 0.7], "gap": [gap, gap], "delta_noise": 0.02, "class_drift": drift, "free_drift": drift}
    return {"step": step, "file": f"lora-{step}.safetensors", **own, "text_drift": None, **other}


def write(folder: Path, lines: list[dict[str, Any]], name: str = "lora", end: str = "", **about: Any) -> Path:
    path = folder / f"{name}-checkpoints.jsonl"
    texts = [json.dumps(each) for each in [{"run": {"class": "a photo of a dog", **about}}, *lines]]
    path.write_text("\n".join(texts) + "\n" + end)
    return path


LINES = [line(100 * k, gap, drift) for k, (gap, drift) in enumerate(zip(GAPS, DRIFTS, strict=True), 1)]


def pick(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["pick", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_the_table_marks_what_was_picked_and_what_is_gone(tmp_path: Path) -> None:
    write(tmp_path, LINES, end='{"step": 700, "ga')
    (tmp_path / "lora-300.safetensors").write_bytes(b"")
    said = pick(tmp_path).splitlines()
    (marked,) = [text for text in said if text.startswith(">")]
    assert marked.split() == [">", "300", "0.60", "0.05", "0.02", "0.30", "0.30", "lora-300.safetensors"]
    assert said[2].endswith("lora-100.safetensors (gone)") and "text drift" not in said[1]
    assert said[-3].startswith("Step 300 (lora-300.safetensors)") and len(said) == 11
    assert said[-2].startswith("Before it less is learned, and behind it")
    assert said[-1].startswith("By these numbers alone, which are no match for pictures")


def test_one_that_is_gone_is_not_picked_while_others_are_there(tmp_path: Path) -> None:
    """Benefits: 0.76 at step 300, behind it 0.61, 0.37 and 0."""
    write(tmp_path, LINES)
    for step in (400, 500, 600):
        (tmp_path / f"lora-{step}.safetensors").touch()
    said = pick(tmp_path).splitlines()
    assert [text.split()[1] for text in said if text.startswith(">")] == ["400"]
    assert said[-3].startswith("Step 400 (lora-400.safetensors): from the first checkpoint on it has 91% of what was")
    assert said[-2].startswith(
        "Step 300 (lora-300.safetensors) was better, but is gone: the trainer deletes older ones "
    )
    assert said[-2].endswith("This is the best of those still there.")
    for step in (400, 500, 600):
        (tmp_path / f"lora-{step}.safetensors").unlink()
    said = pick(tmp_path).splitlines()
    assert [text.split()[1] for text in said if text.startswith(">")] == ["300"]
    assert said[-2].startswith("Its file is gone, as all of this run are: ")


def test_those_that_are_gone_are_none_to_look_at() -> None:
    found = verdict(run(range(6), range(6)), gone=(300, 400))  # learning and drift go together
    assert found.picked is not None and found.picked.step == 100
    assert "cannot be told from steps 200, 500, 600" in str(found)
    held_out = [checkpoint(one.step, one.gap, one.class_drift, held_out_gap=-one.step) for one in run()]
    assert "at step 100 (-100, gone), and -600 at the end" in str(verdict(held_out, gone=(100,)))


def test_a_run_that_cannot_be_read_is_left_out_beside_others(tmp_path: Path) -> None:
    write(tmp_path, LINES)
    broken = write(tmp_path, [{"step": 1}], "broken")
    write(tmp_path, [], "begun")
    result = CliRunner().invoke(app, ["pick", str(tmp_path)], catch_exceptions=False)
    assert result.exit_code == 1
    assert "Step 300 (" in result.stdout and "No checkpoint has been saved yet." in result.stdout
    assert result.stderr.startswith(f"apt-hooks: left out: {broken}: line 2 is none of a checkpoint")
    assert len(result.stderr.splitlines()) == 1


def test_a_run_without_drifts_or_class_says_why(tmp_path: Path) -> None:
    write(tmp_path, LINES, **{"class": None})
    assert "no class drift: give identifier and class_word" in pick(tmp_path)
    write(tmp_path, [{**each, "class_drift": None, "free_drift": None} for each in LINES], off="drifts = false")
    assert "no drifts: drifts = false" in pick(tmp_path) and "Cannot tell" in pick(tmp_path)


def test_of_a_step_that_was_saved_twice_the_later_counts_and_several_runs_are_told_apart(tmp_path: Path) -> None:
    path = write(tmp_path, [*LINES, line(200, 0.5, 0.1)])
    assert [round(one.gap, 3) for one in read_checkpoints(path).checkpoints][:3] == [0.02, 0.5, 0.05]
    write(tmp_path, LINES, "other")
    (tmp_path / "lora-checkpoints.1.jsonl").write_text("of an earlier run")
    assert [found.name for found in find_runs(tmp_path)] == ["lora", "other"]
    assert [found.name for found in find_runs(path)] == ["lora"]


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AptError, match=r"looked for \*-checkpoints.jsonl"):
        find_runs(tmp_path)
    with pytest.raises(AptError, match="no such folder"):
        find_runs(tmp_path / "nowhere")
    (tmp_path / "lora-apt.jsonl").write_text('{"run": {}}\n')
    with pytest.raises(AptError, match=r"lora-apt.jsonl: is no RUN-checkpoints.jsonl; name that"):
        find_runs(tmp_path / "lora-apt.jsonl")
    write(tmp_path, [{"step": 1}])
    with pytest.raises(AptError, match="line 2 is none of a checkpoint"):
        find_runs(tmp_path)
