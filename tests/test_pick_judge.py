"""`apt-hooks pick --judge`: a run's checkpoints by pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytest.importorskip("matplotlib")

from PIL import Image
from tiny_judges import save_clip, save_dino, save_loras
from typer.testing import CliRunner

from apt_hooks.cli import app
from apt_hooks.integrations.judging import evaluation, judged_run
from apt_hooks.results.pareto_front import front
from apt_hooks.tinyworld.model import PIPELINES

PROMPTS = ("a photo of a big {} on the left in the city", "a drawing of a small {} in the middle at night")
NAMES = ("lora-step00000100", "lora-step00000200", "lora")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three checkpoints, with their lines; what they were trained on and are asked for is beside it."""
    folder = tmp_path_factory.mktemp("run")
    save_loras(folder, NAMES)
    own = {"gamma": [0.5], "gap": [0.1], "delta_noise": 0.02, "class_drift": 0.1, "free_drift": 0.1}
    own |= {"prompt_response": 0.9}
    lines = [
        {"run": {"class": "a photo of a cup"}},
        {"step": 50, "file": "gone.safetensors", **own},
        *({"step": 100 * k, "file": f"{name}.safetensors", **own} for k, name in enumerate(NAMES, 1)),
    ]
    (folder / "lora-checkpoints.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "photos").mkdir()
    Image.new("RGB", (40, 30), "red").save(folder / "photos" / "0.png")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    return folder


def asked(run: Path, model: str = "tinyworld") -> tuple[Any, ...]:
    task = ("--references", run / "photos", "--prompts", run / "prompts.txt")
    words = ("--subject", "sks cup", "--class-word", "cup")
    return ("--judge", "--model", model, *task, *words, "--count", "2", "--steps", "2", "--guidance-scale", "4")


def pick(*given: Any, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["pick", *map(str, given)])
    if code == 0 and result.exception:
        raise result.exception
    assert (result.exit_code != 0) == (code != 0)
    return result.output + ("" if result.exception is None else str(result.exception))


def test_each_checkpoint_that_is_there_is_drawn_and_judged_and_the_front_is_told(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, Any] = {}
    plain = judged_run.draw_curves
    monkeypatch.setattr(
        judged_run, "draw_curves", lambda *given, **more: (drawn.update(given[1], **more), plain(*given, **more))
    )
    said = pick(run, *asked(run))
    scores = json.loads((run / "lora-judged" / "metrics.json").read_text())["scores"]
    assert list(scores) == ["base", *NAMES]
    points = {100 * k: (scores[n]["identity"]["value"], scores[n]["text"]["value"]) for k, n in enumerate(NAMES, 1)}
    assert {step: (of["identity"][0], of["text"][0]) for step, of in drawn["lora"].items()} == points
    best = [step for step, by in front(points).items() if by is None]
    assert drawn["front"] == best and f"{', '.join(map(str, best))}; drawn in" in said.splitlines()[-1]
    with Image.open(run / "lora-judged" / "curves.png") as picture:
        assert picture.width > picture.height
    lines = [line.split() for line in said.splitlines()[-4:-1]]
    assert [line[0] for line in lines] == ["100", "200", "300"]
    assert [float(line[1]) for line in lines] == [pytest.approx(xy[0], abs=5e-4) for xy in points.values()]
    assert "Step 300 (lora.safetensors): " in said  # the rule without pictures has its say too


def test_another_model_is_judged_by_clip_and_dino_and_ctrl_c_says_what_is_kept(
    run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked_for: dict[str, Any] = {}

    def judges(_model: str, metrics: Any, models: Any, *_rest: Any) -> list[Any]:
        asked_for.update(metrics=metrics, models=models)
        return []

    def stopped(*_given: Any, **_more: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "_judges", judges)
    monkeypatch.setattr(evaluation, "generate", stopped)
    clip, dino = save_clip(tmp_path / "clip"), save_dino(tmp_path / "dino")
    out = pick(
        run, *asked(run, str(PIPELINES["unet"])), "--clip", clip, "--dino", dino, "--out", tmp_path / "out", code=130
    )
    assert asked_for["metrics"] == ("clip", "dino") and str(asked_for["models"].clip) == str(clip)
    told = [line for line in (out + capsys.readouterr().err).splitlines() if "stopped" in line]
    assert told == ["apt-hooks: stopped; the same command goes on with the 16 pictures that are missing"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--judge", "--model", "tinyworld"), "needs --references, --prompts, --subject, --class-word too"),
        (("--model", "tinyworld", "--seed", "0"), "--model, --seed: only with --judge"),
    ],
)
def test_options_that_do_not_go_together_are_one_line(run: Path, given: tuple[str, ...], said: str) -> None:
    assert said in pick(run, *given, code=1)


def test_one_run_with_two_checkpoints_is_needed(run: Path, tmp_path: Path) -> None:
    lines = (run / "lora-checkpoints.jsonl").read_text()
    (tmp_path / "a-checkpoints.jsonl").write_text(lines)
    assert "--judge needs two checkpoints or more; 0 of 4 are there" in pick(tmp_path, *asked(run), code=1)
    (tmp_path / "b-checkpoints.jsonl").write_text(lines)
    assert f"--judge takes one run; {tmp_path} has 2" in pick(tmp_path, *asked(run), code=1)


def test_the_front_is_what_no_other_is_better_than_by_both() -> None:
    points = {"a": (0.0, 1.0), "b": (0.5, 0.9), "c": (0.4, 0.8), "d": (0.5, 0.5), "e": (1.0, 0.0), "f": (0.5, 0.9)}
    assert front(points) == {"a": None, "b": None, "c": "b", "d": "b", "e": None, "f": None}
