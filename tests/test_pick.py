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
RESPONSES = (0.9, 0.6, 0.25, 0.24, 0.2, 0.1)


def checkpoint(step: int, gap: float = 0.01, response: float = 0.9, **other: Any) -> Checkpoint:
    known: dict[str, Any] = {"gamma": 0.5, "held_out_gap": math.nan, "bins": 10, "unseen": 0, "delta_noise": 0.02}
    drifts = {"class_drift": 2.0, "free_drift": 1.0, "prompt_response": response, "text_drift": math.nan}
    return Checkpoint(step=step, file=f"lora-{step}.safetensors", gap=gap, **{**known, **drifts, **other})


def run(gaps: Any = GAPS, responses: Any = RESPONSES, **other: Any) -> list[Checkpoint]:
    rows = enumerate(zip(gaps, responses, strict=True), 1)
    return [checkpoint(100 * k, gap, **{"response": response, **other}) for k, (gap, response) in rows]


def unseen(gaps: Any, responses: Any = (0.9,) * 6) -> list[Checkpoint]:
    """A run with a held-out gap."""
    rows = enumerate(zip(gaps, responses, strict=True), 1)
    return [checkpoint(100 * k, 0.05, response, held_out_gap=gap) for k, (gap, response) in rows]


def test_the_last_that_listens_to_other_prompts_is_picked() -> None:
    found = verdict(run())
    assert found.picked is not None and found.picked.step == 300
    assert str(found) == (
        "Step 300 (lora-300.safetensors): the last that is not worn out: other prompts still do 0.25 of what they do "
        "to the base model. At step 400 other prompts do 0.24 of what they do to the base model: they are ignored."
    )


def test_a_response_that_comes_back_is_no_end() -> None:
    found = verdict(run(responses=(0.9, 0.2, 0.6, 0.2, 0.3, 0.2)))
    assert found.picked is not None and found.picked.step == 500


def test_of_the_first_one_it_is_said_that_none_is_earlier() -> None:
    found = verdict(run(responses=(0.9, 0.2, 0.2, 0.2, 0.2, 0.2)))
    assert found.picked is not None and found.picked.step == 100
    assert found.sentences[1].endswith(
        "It is the first that was saved: save more often, or train at a lower learning rate."
    )


def test_of_the_last_one_nothing_behind_it_is_said() -> None:
    found = verdict(run(responses=(0.9, 0.8, 0.8, 0.7, 0.75, 0.9)))
    assert found.picked is not None and found.picked.step == 600
    assert found.sentences[1] == "It is the last: a longer training may give one that is better still."


def test_where_all_are_worn_out_the_least_is_picked_and_what_to_do_is_said() -> None:
    found = verdict(run(responses=(0.1, 0.2, 0.15, -0.1, 0.1, 0.05)))
    assert found.picked is not None and found.picked.step == 200
    assert found.sentences[0].endswith(
        "all are worn out; this one listens to other prompts most, but other prompts do 0.2 of what they do to the "
        "base model: they are ignored."
    )
    assert found.sentences[1] == "Save earlier ones, or train at a lower learning rate."


def test_what_is_lost_on_pictures_that_were_not_trained_on_counts() -> None:
    # 0.88 of 0.02 is 0.0176.
    found = verdict(unseen((0.01, 0.02, 0.019, 0.0177, 0.0175, 0.01)))
    assert found.picked is not None and found.picked.step == 400
    assert found.sentences[1] == (
        "At step 500 it is behind what it was on pictures that were not trained on: it overfits."
    )
    assert "furthest ahead of the base model at step 200 (0.02), and 0.01 at the end" in found.sentences[2]


def test_a_lora_that_is_never_ahead_on_them_is_judged_by_its_best_too() -> None:
    found = verdict(unseen((-0.01, -0.0105, -0.0111, -0.0113, -0.02, -0.03)))
    assert found.picked is not None and found.picked.step == 300


def test_what_has_moved_far_is_worn_out_whatever_its_prompts_do() -> None:
    found = verdict([checkpoint(100), checkpoint(200, free_drift=2.0), checkpoint(300, free_drift=14.0)])
    assert found.picked is not None and found.picked.step == 200
    assert found.sentences[1] == "At step 300 other prompts have moved by 14 of what they mean: it is another model."


def test_both_have_to_hold() -> None:
    found = verdict(unseen((0.02,) * 5 + (0.01,), RESPONSES[::-1]))
    assert found.picked is not None and found.picked.step == 500  # of those that listen, 400 to 600


@pytest.mark.parametrize(
    ("checkpoints", "said"),
    [
        ([], "No checkpoint has been saved yet."),
        (
            [checkpoint(20, delta_noise=1e-4)],
            "Too short to say: 20 steps, and the LoRA has hardly moved the model (delta noise 1",
        ),
        ([checkpoint(20, unseen=2)], "Too short to say: 20 steps, and 2 of 10 bins of timesteps were never seen."),
        (
            run(response=math.nan),
            "Cannot tell: not all of these checkpoints have a prompt response, which an earlier apt-hooks did not "
            "measure. Let pictures decide.",
        ),
        (
            run(response=math.nan, free_drift=math.nan),
            "Cannot tell: not all of these checkpoints have a prompt response. Let pictures decide.",
        ),
        (
            [*run(), checkpoint(700, response=math.nan)],
            "Cannot tell: not all of these checkpoints have a prompt response",
        ),
    ],
)
def test_it_says_when_it_cannot_tell(checkpoints: list[Checkpoint], said: str) -> None:
    found = verdict(checkpoints)
    assert found.picked is None and str(found).startswith(said)


# -- the command -------------------------------------------------------------------------------------------------------


def line(step: int, gap: float, response: float, **other: Any) -> dict[str, Any]:
    own = {"gamma": [0.5, 0.7], "gap": [gap, gap], "delta_noise": 0.02, "class_drift": 1.25, "free_drift": 0.75}
    last = {"prompt_response": response, "text_drift": None}
    return {"step": step, "file": f"lora-{step}.safetensors", **own, **last, **other}


def write(folder: Path, lines: list[dict[str, Any]], name: str = "lora", end: str = "", **about: Any) -> Path:
    path = folder / f"{name}-checkpoints.jsonl"
    texts = [json.dumps(each) for each in [{"run": {"class": "a photo of a dog", **about}}, *lines]]
    path.write_text("\n".join(texts) + "\n" + end)
    return path


LINES = [line(100 * k, gap, response) for k, (gap, response) in enumerate(zip(GAPS, RESPONSES, strict=True), 1)]


def pick(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["pick", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_the_table_marks_what_was_picked_and_what_is_gone(tmp_path: Path) -> None:
    write(tmp_path, LINES, end='{"step": 700, "ga')
    (tmp_path / "lora-300.safetensors").write_bytes(b"")
    said = pick(tmp_path).splitlines()
    (marked,) = [text for text in said if text.startswith(">")]
    assert marked.split() == [">", "300", "0.60", "0.05", "0.02", "1.25", "0.75", "0.25", "lora-300.safetensors"]
    assert said[2].endswith("lora-100.safetensors (gone)") and "text drift" not in said[1]
    assert said[-3].startswith("Step 300 (lora-300.safetensors)") and len(said) == 11
    assert said[-2].startswith("At step 400 other prompts do 0.24")
    assert said[-1].startswith("By these numbers alone, which are no match for pictures")


def test_one_that_is_gone_is_not_picked_while_others_are_there(tmp_path: Path) -> None:
    write(tmp_path, LINES)
    for step in (100, 200, 600):
        (tmp_path / f"lora-{step}.safetensors").touch()
    said = pick(tmp_path).splitlines()
    assert [text.split()[1] for text in said if text.startswith(">")] == ["200"]
    assert said[-3].startswith(
        "Step 200 (lora-200.safetensors): the last that is not worn out: other prompts still do 0.60"
    )
    assert said[-2].startswith(
        "Step 300 (lora-300.safetensors) was better, but is gone: the trainer deletes older ones "
    )
    assert said[-2].endswith("This is the best of those still there.")
    for step in (100, 200, 600):
        (tmp_path / f"lora-{step}.safetensors").unlink()
    said = pick(tmp_path).splitlines()
    assert [text.split()[1] for text in said if text.startswith(">")] == ["300"]
    assert said[-2].startswith("Its file is gone, as all of this run are: ")


def test_where_those_that_are_left_are_worn_out_the_least_is_picked() -> None:
    found = verdict(run(), gone=(100, 200, 300))
    assert found.picked is not None and found.picked.step == 400
    assert "those that are left are worn out" in found.sentences[0] and "Step 300" in found.sentences[1]
    held_out = unseen([6, 5, 4, 3, 2, 1])
    assert "at step 100 (6, gone), and 1 at the end: it overfits by then" in str(verdict(held_out, gone=(100,)))


@pytest.mark.parametrize(
    ("gaps", "said"),
    [
        ((0.3, 0.4, 0.45, 0.5, 0.5, 0.49), "at step 500 (0.5), and 0.49 at the end: hardly less."),
        ((0.3, 0.4, 0.45, 0.5, 0.5, 0.5), "gets ahead of the base model to the end: no overfitting there."),
        ((-0.5, -0.4, -0.3, -0.2, -0.1, -0.2), "was never ahead of the base model, least behind at step 500 (-0.1)."),
        ((0.3, 0.4, 0.45, 0.5, 0.2, math.nan), "at step 400 (0.5), and 0.2 at step 500: it overfits by then."),
    ],
)
def test_what_is_said_of_pictures_that_were_not_trained_on(gaps: tuple[float, ...], said: str) -> None:
    assert verdict(unseen(gaps)).sentences[2].endswith(said)


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
    off = dict.fromkeys(("class_drift", "free_drift", "prompt_response"))
    write(tmp_path, [{**each, **off} for each in LINES], off="drifts = false")
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
