"""benchmarks/pick.py: its score, and what its table counts."""

from __future__ import annotations

import concurrent.futures
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from benchmark_path import benchmarks_importable

for package in ("diffusers", "peft", "rich", "safetensors"):
    pytest.importorskip(package)

with benchmarks_importable():
    pick = importlib.import_module("pick")

IDEAL = {"text": [1.0, 1.0], "identity": [0.8, 0.6]}


def test_the_score_is_the_harmonic_mean_of_shares_of_the_ideals() -> None:
    found = pick.Score({"text": [1.0, 0.5], "identity": [0.2, 0.5]}, IDEAL)
    assert found.value == pytest.approx(2 * 0.75 * 0.5 / (0.75 + 0.5))
    none = pick.Score({"text": [1.0, 1.0], "identity": [-0.1, -0.2]}, IDEAL)
    assert (none.value, none.error) == (0, 0)
    assert pick.Score(IDEAL, IDEAL).value == 1


def test_the_error_is_the_standard_error_where_the_score_is_a_mean() -> None:
    """With both scores alike the harmonic mean is their share: the jackknife's error is then that of the mean."""
    values, ideal = [0.2, 0.4, 0.9, 0.5], {"text": [1.0] * 4, "identity": [1.0] * 4}
    one = pick.Score({"text": values, "identity": values}, ideal)
    assert one.value == pytest.approx(0.5)
    assert one.error == pytest.approx((sum((v - 0.5) ** 2 for v in values) / 3 / 4) ** 0.5)
    lower = [v - 0.1 for v in values]
    other = pick.Score({"text": lower, "identity": lower}, ideal)
    assert other.short_of(one) == pytest.approx((0.1, 0))  # the same prompts: what they differ by is no error


def line(step: int, gap: float, response: float, held_out: float) -> dict[str, Any]:
    own = {"gamma": [0.5], "gap": [gap], "delta_noise": 0.02, "class_drift": 1.0, "free_drift": 1.0}
    last = {"prompt_response": response, "held_out_gap": [held_out]}
    return {"step": step, "file": f"{step}.safetensors", **own, **last}


def test_the_table_counts_what_is_within_the_error_of_the_best(tmp_path: Path) -> None:
    lines = [line(100, 0.0, 0.9, 0.2), line(200, 0.9, 0.8, 0.19), line(300, 1.0, 0.5, 0.0), line(400, 1.0, 0.3, -1.0)]
    for concept in (4, 5):
        (tmp_path / f"{concept}-0-0.003").mkdir()
        path = tmp_path / f"{concept}-0-0.003" / "dreambooth-checkpoints.jsonl"
        # Of the second one's checkpoints the rule says nothing.
        own = lines if concept == 4 else [{**each, "prompt_response": None} for each in lines[:2]]
        path.write_text("".join(json.dumps(each) + "\n" for each in own))
    texts = {100: [1.0, 0.7], 200: [0.8, 0.8], 300: [0.6, 0.6], 400: [0.5, 0.5]}
    judged = {str(step): {"text": text, "identity": [0.7, 0.7]} for step, text in texts.items()}
    rows = [
        {"concept": 4, "seed": 0, "learning_rate": 3e-3, "judged": {"ideal": IDEAL, **judged}},
        {
            "concept": 5,
            "seed": 0,
            "learning_rate": 3e-3,
            "judged": {"ideal": IDEAL, **{k: judged[k] for k in ("100", "200")}},
        },
    ]
    *_, four, five, hits, paired, short = (
        [cell.strip() for cell in row.split("|")] for row in pick.table(tmp_path, rows)
    )
    best = pick.Score(judged["100"], IDEAL)
    shorter, error = pick.Score(judged["200"], IDEAL).short_of(best)
    assert shorter < min(error, best.error)  # 200 is as good as 100, the others are not
    assert four[3:6] == ["0.003", "100", f"{best.value:.3f} ± {best.error:.3f}"]
    assert four[6:-1] == ["200", "400 (no)", "400 (no)", "200", "2 of 4", "100"]
    assert five[6:-1] == ["none", "none", "200", "100", "2 of 2", "100"]
    assert hits[6:-1] == ["1 of 2", "0 of 2", "1 of 2", "2 of 2", "1.5 of 2", "2 of 2"]
    assert paired[6:-1] == hits[6:-1]
    assert short[6] == f"{shorter:.3f}" and short[11] == "0.000"


def test_ranks_are_within_runs_and_over_all_of_them(tmp_path: Path) -> None:
    rows = []
    # The same numbers in both, but the second run's prompts are followed less at any response.
    for concept, less in ((4, 0.0), (5, 0.5)):
        (tmp_path / f"{concept}-0-0.003").mkdir()
        lines = [line(100 * k, k / 10, 1 - k / 10, 0.1) for k in (1, 2, 3)]
        path = tmp_path / f"{concept}-0-0.003" / "dreambooth-checkpoints.jsonl"
        path.write_text("".join(json.dumps(each) + "\n" for each in lines))
        judged = {str(100 * k): {"text": [1 - k / 10 - less] * 2, "identity": [k / 10] * 2} for k in (1, 2, 3)}
        rows.append({"concept": concept, "seed": 0, "learning_rate": 3e-3, "judged": {"ideal": IDEAL, **judged}})
    cells = {row.split("|")[1].strip(): [c.strip() for c in row.split("|")[2:-1]] for row in pick.ranks(tmp_path, rows)}
    assert cells["prompt response"][:2] == ["+1.00 ± 0.00", "-1.00 ± 0.00"]
    assert cells["prompt response"][3] == "+0.48" and cells["step"][3] == "-0.48"
    assert cells["held-out gap"] == ["-", "-", "-", "-"]
    first = tmp_path / "4-0-0.003" / "dreambooth-checkpoints.jsonl"
    first.write_text(first.read_text().replace('"prompt_response": 0.9, ', ""))  # as an earlier apt-hooks wrote it
    cells = {row.split("|")[1].strip(): [c.strip() for c in row.split("|")[2:-1]] for row in pick.ranks(tmp_path, rows)}
    assert cells["prompt response"][3] == "+1.00" and cells["step"][3] == "-0.48"


def test_a_run_that_fails_is_told_after_the_table_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "4-0-0.003"
    folder.mkdir()
    lines = [line(300, 0.9, 0.8, 0.1), line(600, 1.0, 0.7, 0.2)]
    (folder / "dreambooth-checkpoints.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))

    def run(out: Path, log: Path, asked: dict[str, Any]) -> None:
        if asked["concept"] == 5:
            raise ValueError("no picture")
        pick.append_line(log, json.dumps({**asked, "judged": {"ideal": IDEAL, "300": IDEAL, "600": IDEAL}}))

    monkeypatch.setattr(pick, "train_and_judge", run)
    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", concurrent.futures.ThreadPoolExecutor)
    options = ["--out", str(tmp_path), "--learning-rates", "3e-3"]
    monkeypatch.setattr(sys, "argv", ["pick.py", *options, "--concepts", "4,5"])
    with pytest.raises(SystemExit, match=r"made again by the same command: 5-0-0.003: ValueError\('no picture'\)"):
        pick.main()
    assert "| 4 | 0 | 0.003 | 300 | 1.000" in capsys.readouterr().out
    for wrong, said in ((["--concepts", "99"], "--concepts takes 0, .*; found 99"), (["--scenes", "0"], "at least 1")):
        monkeypatch.setattr(sys, "argv", ["pick.py", *options, *wrong])
        with pytest.raises(SystemExit, match=said):
            pick.main()
