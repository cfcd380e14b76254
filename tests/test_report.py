"""What the report reads, what it makes of it, and the page's text; `test_report_in_browser` looks at its plots."""

from __future__ import annotations

import ast
import base64
import dataclasses
import functools
import importlib
import io
import json
import math
import re
import sys
from html import escape
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from step_logs import checkpoint, start, step, write
from typer.testing import CliRunner

from apt_hooks import AptError
from apt_hooks.cli import app
from apt_hooks.results.read_checkpoints import Checkpoint, SavedRun
from apt_hooks.results.read_events import find_events, read_events
from apt_hooks.results.read_steplog import RunLog, find_logs, read_run
from apt_hooks.results.report.curves import downsample, fold_bins, smooth, timesteps_of
from apt_hooks.results.report.figures import (
    bin_color,
    checkpoint_plots,
    gamma_plot,
    loss_plot,
    loss_span,
    points_for,
    run_color,
    value_plot,
)
from apt_hooks.results.report.samples import SIDE, read_samples
from apt_hooks.results.report.saved import Saved, read_saved
from apt_hooks.results.report.summary import how_trained, in_words, summarize
from apt_hooks.results.verdict import verdict
from apt_hooks.training.step import AptStep
from apt_hooks.training.steplog import StepLog

NAN = math.nan
GAPS, DRIFTS = (0.02, 0.04, 0.05, 0.052, 0.054, 0.055), (0.8, 1.6, 2.0, 3.0, 4.0, 5.0)  # the third is picked


def read(path: Path, **options: Any) -> RunLog:
    run = read_run(path, **options)
    assert run is not None
    return run


def words(path: Path) -> str:
    run = read(path)
    return " ".join(in_words(run, summarize(run)))


def saved(folder: Path, name: str = "lora") -> Saved:
    """Six checkpoints beside a log, 100 steps from one to the next."""
    lines = [checkpoint(100 * k, gap, drift) for k, (gap, drift) in enumerate(zip(GAPS, DRIFTS, strict=True), 1)]
    write(folder / f"{name}-checkpoints.jsonl", [{"run": {"class": "a photo of a dog"}}, *lines])
    found = read_saved(folder / f"{name}-apt.jsonl")
    assert found is not None
    return found


# -- finding and reading -----------------------------------------------------------------------------------------------


def test_logs_are_found_in_folders_below_them_and_once_only(tmp_path: Path) -> None:
    a, b = (write(tmp_path / name, [step(1)]) for name in ("a-apt.jsonl", "deep/er/b-apt.jsonl"))
    write(tmp_path / "metrics.jsonl", [step(1)])
    assert find_logs([tmp_path]) == {"a": a, "b": b}
    assert list(find_logs([b, tmp_path, a])) == ["b", "a"]


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        write(tmp_path / folder / "lora-apt.jsonl", [step(1)])
    assert list(find_logs([tmp_path])) == ["one/lora", "two/lora"]
    assert list(find_logs([tmp_path / "two"])) == ["lora"]


def test_what_step_log_writes_is_read(tmp_path: Path) -> None:
    path = tmp_path / "lora-apt.jsonl"
    log = StepLog(path, {"preset": "sd15", "config": {"num_bins": 2}})
    nothing, gammas = torch.zeros(1), torch.tensor([0.25, 0.0])
    for number in (1, 2):
        values = {"loss_tuned": torch.tensor(0.5 * number), "delta_noise": torch.tensor(NAN)}
        log.add(AptStep(nothing, nothing, nothing, gammas, torch.tensor([0.125, NAN]), 1, values), 1)
        log.end_step(number)
    log.flush()
    run = read(path)
    assert (run.name, run.total, run.every, run.steps.tolist()) == ("lora", 2, 1, [1, 2])
    assert run.gammas.tolist() == [[0.25, 0.0]] * 2 and run.seen.tolist() == [[True, False]] * 2
    assert run.values["loss_tuned"].tolist() == [0.5, 1.0] and run.values["augmented"].tolist() == [1.0, 1.0]
    assert run.values["delta_noise"].isnan().all() and run.values["l_mu"].isnan().all()
    assert [about["preset"] for about in run.starts] == ["sd15"] and run.resumptions == []


def test_a_resumed_run_says_where(tmp_path: Path) -> None:
    lines = [start(), step(1), step(2), start(2), step(3), start(3), step(4)]
    run = read(write(tmp_path / "a-apt.jsonl", lines))
    assert run.resumptions == [2, 3] and run.steps.tolist() == [1, 2, 3, 4]
    assert (run.lines, run.end) == (7, run.path.stat().st_size)


def test_the_piece_of_a_line_at_the_end_is_left_out(tmp_path: Path) -> None:
    run = read(write(tmp_path / "a-apt.jsonl", [start(), step(1)], end='{"step": 2, "gam'))
    assert run.steps.tolist() == [1] and run.lines == 2


def test_an_older_log_without_starts_gaps_and_l_joint_is_read(tmp_path: Path) -> None:
    old = step(1)
    del old["gap"], old["l_joint"]
    run = read(write(tmp_path / "a-apt.jsonl", [old]))
    assert run.starts == [] and run.gaps.isnan().all() and run.seen.all() and run.values["l_joint"].isnan().all()


@pytest.mark.parametrize("most", [2, 7, 100, 1000])
@pytest.mark.parametrize("steps", [1, 2, 3, 64, 65, 999, 1000])
def test_of_a_long_log_an_even_part_with_first_and_last_is_read(tmp_path: Path, steps: int, most: int) -> None:
    lines = [start(), *(step(i) for i in range(1, steps + 1))]
    lines.insert(steps // 2 + 1, start(steps // 2))
    run = read(write(tmp_path / "a-apt.jsonl", lines), most=most)
    assert run.total == steps and len(run.steps) <= most + 1 and len(run.starts) == 2
    assert run.steps[0] == 1 and run.steps[-1] == steps
    assert run.steps.tolist() == sorted({*range(1, steps + 1, run.every), steps})
    assert run.every == 1 if steps <= most else len(run.steps) > most / 2


def test_many_bins_make_fewer_lines_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apt_hooks.results.read_steplog.MOST_BYTES", 3000)
    run = read(write(tmp_path / "a-apt.jsonl", [step(i) for i in range(1, 101)]))
    assert 2 <= len(run.steps) <= 20 and run.steps[-1] == 100


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("no json", "line 3 is none of a step log"),
        ('{"loss": 1}', "line 3 is none of a step log, with step and gamma; found '{\"loss\": 1}': name the RUN"),
        ('{"step": 2, "gamma": ["0.5"]}', "line 3 is none"),
        ('{"step": 2, "gamma": []}', "line 3 is none"),
        ('{"step": 2.5, "gamma": [0, 0, 0]}', "line 3 is none"),
        ('{"step": 2, "gamma": [0, 0, 0], "gap": [0]}', "line 3 is none"),
        ('{"step": 2, "gamma": [0, 0, 0], "loss_tuned": true}', "line 3 is none"),
        ('{"step": 2, "gamma": [0, 0]}', "line 3 has 2 bins, those before have 3"),
        ('{"step": 1, "gamma": [0, 0, 0]}', "line 3 is of step 1, one before it of step 1; have two runs"),
        ('{"run": 5}', "line 3 is none"),
        ('{"run": {"config": 5}}', "line 3 is none"),
        ('{"run": {"resumed_from": "x"}}', "line 3 is none"),
        ('["step"]', "line 3 is none"),
        ("7", "line 3 is none"),
        ("", "line 3 is none"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, broken: str, message: str) -> None:
    path = write(tmp_path / "a-apt.jsonl", [start(), step(1)], end=broken + "\n" + json.dumps(step(3)) + "\n")
    with pytest.raises(AptError, match=re.escape(message)) as caught:
        read_run(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


# -- fewer points ------------------------------------------------------------------------------------------------------


def test_points_are_means_with_lowest_and_highest() -> None:
    values = torch.tensor([[1.0, NAN], [3.0, NAN], [5.0, 1.0], [NAN, 2.0], [9.0, 4.0]])
    curve = downsample(torch.tensor([1, 2, 3, 4, 5]), values, 3)
    assert curve.each == 2 and curve.steps.tolist() == [2, 4, 5]
    assert curve.mean[:, 0].tolist() == [2, 5, 9] and curve.low[:, 0].tolist() == [1, 5, 9]
    assert curve.high[:, 0].tolist() == [3, 5, 9]
    assert curve.mean[:, 1].isnan().tolist() == [True, False, False] and curve.high[1, 1] == 2
    assert curve.low[:, 1].isnan().tolist() == [True, False, False]


def test_few_steps_stay_as_they_are() -> None:
    steps, values = torch.arange(1, 6), torch.rand(5, 2)
    assert torch.equal(downsample(steps, values, 5).mean, values) and torch.equal(
        downsample(steps, values, 5).steps, steps
    )


@pytest.mark.parametrize("window", [1, 2, 5, 50])
def test_smoothing_is_the_mean_around_each_point(window: int) -> None:
    values = torch.rand(20, 1, dtype=torch.float64)
    values[3] = NAN
    left = window // 2
    expected = [values[max(0, i - left) : i - left + window].nanmean() for i in range(20)]
    torch.testing.assert_close(smooth(values, window)[:, 0], torch.stack(expected), equal_nan=True)


def test_neighbouring_bins_are_folded_and_named_by_their_timesteps() -> None:
    folded, groups = fold_bins(torch.arange(7.0)[None], 3)
    assert folded.tolist() == [[1.0, 4.0, 6.0]] and groups == [(0, 2), (3, 5), (6, 6)]
    assert timesteps_of([(0, 0), (9, 9)], 10) == ["0-99", "900-999"]
    assert timesteps_of(groups, 7) == ["0-428", "429-857", "858-999"]


# -- plots and words ---------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> RunLog:
    lines = [step(i, (i / 100, 0.5, 0.1)) for i in range(1, 101)]
    for line in lines[:10]:
        line["gamma"][2], line["gap"][2] = 0.0, None
    return read(write(tmp_path / "lora <i>-apt.jsonl", [start(), *lines[:50], start(50), *lines[50:]]))


def test_gamma_has_a_line_a_bin_from_where_it_was_seen_and_a_mean(run: RunLog) -> None:
    plot = gamma_plot(run, 200, 1000)
    *bins, mean = plot["data"]
    assert [trace["name"] for trace in bins] == ["0-333", "334-666", "667-999"]
    assert [(trace["x"][0], trace["x"][-1]) for trace in bins] == [(1, 100), (1, 100), (11, 100)]
    assert bins[0]["y"][-1] == 1.0 and mean["y"][-1] == pytest.approx(1.6 / 3, abs=1e-4)
    assert mean["y"][0] == pytest.approx(0.51 / 2, abs=1e-4)  # over the bins seen
    assert plot["layout"]["xaxis"]["range"] == [0, 200] and plot["layout"]["yaxis"]["range"] == [-0.02, 1.02]
    assert [shape["x0"] for shape in plot["layout"]["shapes"]] == [50]
    assert len({trace["line"]["color"] for trace in plot["data"]}) == 4


def test_a_long_curve_shows_a_band_from_lowest_to_highest(run: RunLog) -> None:
    pale, bold = value_plot("augmented", [run], 100, 10, "augmented")["data"]
    assert pale["fill"] == "toself" and set(pale["y"]) == {0.0, 1.0} and len(bold["x"]) == 10
    assert bold["y"] == [0.5] * 10 and "lora &lt;i&gt;" in bold["hovertemplate"]


def test_the_axis_of_losses_is_about_the_distance_of_the_bold_lines(tmp_path: Path) -> None:
    # Single steps from 0.1 to 0.9, and 0.01 between both.
    lines = [step(i, loss_tuned=0.1 + 0.8 * (i % 2), loss_frozen=0.11 + 0.8 * (i % 2)) for i in range(1, 401)]
    low, high = loss_span([read(write(tmp_path / "a-apt.jsonl", lines))])
    assert 0.4 < low < 0.5 and 0.51 < high < 0.6
    flat = [step(i, loss_tuned=0.5, loss_frozen=0.5) for i in (1, 2)]
    low, high = loss_span([read(write(tmp_path / "b-apt.jsonl", flat))])
    assert low < 0.5 < high


def test_checkpoints_have_a_plot_of_the_gap_and_one_of_the_drifts_that_there_are(tmp_path: Path) -> None:
    found = saved(tmp_path)
    plots = checkpoint_plots(found.run.checkpoints, found.verdict.picked, 600)
    assert [trace["y"] for trace in plots["gap"]["data"]] == [list(GAPS)]
    assert [trace["y"] for trace in plots["drift"]["data"]] == [list(DRIFTS), [drift / 2 for drift in DRIFTS]]
    assert [trace["y"] for trace in plots["response"]["data"]] == [
        [pytest.approx(1 - drift / 3, abs=1e-4) for drift in DRIFTS]
    ]
    assert [shape["x0"] for plot in plots.values() for shape in plot["layout"]["shapes"]] == [300, 300, 300]
    assert not checkpoint_plots(found.run.checkpoints, None, 600)["gap"]["layout"]["shapes"]
    off = dict.fromkeys(("class_drift", "free_drift", "prompt_response"), NAN)
    without = [dataclasses.replace(one, **off) for one in found.run.checkpoints]
    assert list(checkpoint_plots(without, None, 600)) == ["gap"]
    unseen = [dataclasses.replace(one, held_out_gap=one.gap / 2) for one in found.run.checkpoints]
    assert [trace["y"] for trace in checkpoint_plots(unseen, None, 600)["gap"]["data"]][1] == [gap / 2 for gap in GAPS]


def test_plots_are_what_plotly_accepts(run: RunLog) -> None:
    go = pytest.importorskip("plotly.graph_objects")
    for points in (10, 1000):
        plots = [gamma_plot(run, 100, points), loss_plot(run, 100, loss_span([run]), points)]
        for plot in [*plots, value_plot("delta_noise", [run, run], 100, points, "delta noise")]:
            assert len(go.Figure(plot).data) == len(plot["data"])


def test_colors_are_distinct_and_pages_of_many_runs_stay_small() -> None:
    assert len({run_color(i) for i in range(8)}) == 8 and len({bin_color(i, 20) for i in range(20)}) == 20
    assert bin_color(0, 1) == bin_color(0, 10)
    assert points_for(1) == 1500 and points_for(4) == 1000 and points_for(1000) == 300


def test_words_tell_what_the_last_tenth_measured(run: RunLog) -> None:
    text = words(run.path)
    assert "last tenth of the run (steps 91 to 100) gamma was 0.52 on average over the 3 bins" in text
    assert "0-333 (0.95), 334-666 (0.50), 667-999 (0.10) by timesteps" in text
    assert "delta noise was 0.00955" in text
    assert "The loss was multiplied by 0.50 there and 50 % of all images were augmented." in text
    assert text.endswith("Resumed behind step 50.")


def test_of_many_bins_the_highest_and_the_lowest_are_named(tmp_path: Path) -> None:
    gammas = [0.1, 0.9, 0.3, 0.8, 0.2, 0.7]
    text = words(write(tmp_path / "a-apt.jsonl", [step(1, gammas)]))
    assert "(step 1) gamma was 0.50 on average over the 6 bins; highest at timesteps 167-333 (0.90), 500-666" in text
    assert "lowest at 0-166 (0.10)" in text


@pytest.mark.parametrize(
    ("config", "values", "expected"),
    [
        ({"monitor_only": True}, {}, "APT only watched (monitor_only): it changed nothing."),
        ({"objective": "dreambooth"}, {}, "Plain training (objective dreambooth)"),
        ({"objective": "dco"}, {"loss_weight": 123.4}, "DCO's factor was 123 there"),
        ({}, {"loss_weight": 1.0, "augmented": 0.0}, "Neither was the loss turned down there, nor were any images"),
        (
            {"lambda_offset": 3e-5},
            {"l_offset": 2.0},
            "The weights were held to the base model's (lambda_offset 3.00e-05).",
        ),
        ({}, {"delta_noise": 0.0}, "delta noise was 0: the LoRA has learned nothing, or is not off"),
        ({}, {"gap": [None] * 3, "gamma": [0.0] * 3}, "no bin of timesteps had been seen, so there is no gamma"),
    ],
)
def test_words_tell_what_apt_did(tmp_path: Path, config: dict[str, Any], values: dict[str, Any], expected: str) -> None:
    assert expected in words(write(tmp_path / "a-apt.jsonl", [start(config=config), step(1) | values]))


def test_an_older_log_has_the_key_of_a_penalty_that_had_no_part(tmp_path: Path) -> None:
    lines = [start(config={"lambda_offset": 0.001}), step(1)]
    assert "held to" not in words(write(tmp_path / "a-apt.jsonl", lines))
    run = read_run(
        write(tmp_path / "b-apt.jsonl", [start(config={"lambda_offset": 0.002}), step(1) | {"l_offset": 1.0}])
    )
    assert run is not None and "lambda_offset 0.002" in how_trained(run)
    for objective, told in (("l2-sp", "objective l2-sp, lambda_offset 0.002"), ("dreambooth", "objective dreambooth")):
        config = {"objective": objective, "lambda_offset": 0.002}
        run = read_run(write(tmp_path / "d-apt.jsonl", [start(config=config), step(1) | {"l_offset": 1.0}]))
        assert run is not None and how_trained(run).endswith(told)
    # Watched, and gone on with.
    lines = [start(config={"lambda_offset": 0.0}), step(1) | {"l_offset": 1.0}]
    run = read_run(write(tmp_path / "c-apt.jsonl", lines))
    assert run is not None and "lambda_offset" not in how_trained(run) and "held to" not in words(run.path)


def test_bins_without_a_gap_have_no_gamma(tmp_path: Path) -> None:
    unseen = [step(i) | {"gap": [None, None, 0.001]} for i in (1, 2)]
    assert "gamma was 0.10 on average over the 1 of 3 bins seen" in words(write(tmp_path / "a-apt.jsonl", unseen))


def test_a_loss_that_was_no_number_is_told(tmp_path: Path) -> None:
    lost = [step(i) | {"gap": [None, 0.1, 0.1], "gamma": [0.0, 0.5, 0.1]} for i in range(6, 11)]
    path = write(tmp_path / "a-apt.jsonl", [*(step(i) for i in range(1, 6)), *lost])
    assert "From step 6 on a bin that had been seen has no gap: a loss was not a finite number" in words(path)
    assert "over the 2 of 3 bins seen" in words(path)
    assert gamma_plot(read(path), 10, 100)["data"][0]["x"] == [1, 2, 3, 4, 5]


# -- sample pictures ---------------------------------------------------------------------------------------------------


def draw(log: Path, name: str, color: str = "red", size: tuple[int, int] = (600, 300)) -> Path:
    image = pytest.importorskip("PIL.Image")
    path = log.parent / "sample" / f"{name}.png"
    path.parent.mkdir(exist_ok=True)
    image.new("RGB", size, color).save(path)
    return path


def shown(uri: str) -> Any:
    image = pytest.importorskip("PIL.Image")
    assert uri.startswith("data:image/jpeg;base64,")
    return image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def test_pictures_of_a_run_are_found_by_name_and_made_small(tmp_path: Path) -> None:
    log = tmp_path / "lora-apt.jsonl"
    for name in ("lora_e000001_00", "lora_e000001_01", "lora_e000002_00"):
        draw(log, f"{name}_20261122230000_42")
    draw(log, "lora_big_e000001_00_20261122230000")
    draw(log, "e000009_00_20261122230000")
    found = read_samples(log)
    assert found is not None and found.notes == []
    assert found.moments == [("epoch", 1), ("epoch", 2)] and list(found.prompts) == [0, 1]
    assert set(found.pictures) == {(("epoch", 1), 0), (("epoch", 1), 1), (("epoch", 2), 0)}
    assert shown(found.pictures[("epoch", 1), 0]).size == (SIDE, SIDE // 2)
    assert read_samples(tmp_path / "last-apt.jsonl").moments == [("epoch", 9)]  # type: ignore[union-attr]
    assert read_samples(tmp_path / "other-apt.jsonl") is None


def test_of_several_pictures_the_newest_is_shown_and_none_of_an_earlier_run(tmp_path: Path) -> None:
    log = tmp_path / "a-apt.jsonl"
    draw(log, "a_000100_00_20261101000000", "red")
    draw(log, "a_000100_00_20261122000000", "blue")
    draw(log, "a_000900_00_20261101090000", "red")
    found = read_samples(log)
    assert found is not None and list(found.pictures) == [(("step", 100), 0)]
    red, _, blue = shown(found.pictures[("step", 100), 0]).getpixel((5, 5))
    assert blue > 200 and red < 50
    assert found.notes == ["Left out, since an earlier run of that name drew them, by the times in their names: 1."]


def test_pictures_are_of_the_logs_steps_where_the_trainer_counted_from_one_again(tmp_path: Path) -> None:
    log = tmp_path / "a-apt.jsonl"
    starts = [
        start(loaded="2026-11-22T10:00:00+05:00", trainer_step=0),
        start(100, loaded="2026-11-22T12:00:00+05:00", trainer_step=0),
        start(160, loaded="2026-11-22T14:00:00+05:00", trainer_step=160),
    ]
    write(log, [starts[0], step(1), step(100), starts[1], step(101), step(160), starts[2], step(161)])
    for name in (
        "000050_00_20261122080000",  # of an earlier run
        "000050_00_20261122101000", "000100_00_20261122102000",
        "000150_00_20261122103000",  # drawn before the resumption, from behind the step it went back to
        "e000000_00_20261122120001", "000050_00_20261122121000", "000060_00_20261122122000",
        "000170_00_20261122141000",
    ):  # fmt: skip
        draw(log, f"a_{name}", "blue" if "20261122121000" in name else "red")
    run = read_run(log)
    assert run is not None
    found = read_samples(log, run.starts)
    assert found is not None and found.moments == [("step", number) for number in (50, 100, 150, 160, 170)]
    assert shown(found.pictures[("step", 150), 0]).getpixel((5, 5))[2] > 200
    assert found.notes == ["Left out, since an earlier run of that name drew them, by the times in their names: 1."]


def test_of_many_pictures_an_even_part_is_shown_and_said(tmp_path: Path) -> None:
    log = tmp_path / "a-apt.jsonl"
    for number in range(1, 16):
        for prompt in range(6 if number == 1 else 1):
            draw(log, f"a_e{number:06d}_{prompt:02d}_20261122{number:06d}", size=(8, 8))
    found = read_samples(log)
    assert found is not None and [count for _, count in found.moments] == [1, 3, 5, 7, 9, 11, 13, 15]
    assert list(found.prompts) == [0, 2, 3, 5]
    assert found.notes == [
        "8 of 15 moments are shown, evenly chosen.",
        "4 of 6 prompts are shown, evenly chosen.",
    ]


def test_a_picture_that_is_half_written_or_none_is_noted(tmp_path: Path) -> None:
    log = tmp_path / "a-apt.jsonl"
    half = draw(log, "a_e000001_00_20261122230000")
    half.write_bytes(half.read_bytes()[:-200])
    none = draw(log, "a_e000002_00_20261122230001")
    none.write_text("no picture")
    draw(log, "a_e000003_00_20261122230002")
    found = read_samples(log)
    assert found is not None and list(found.pictures) == [(("epoch", 3), 0)]
    assert [note.split(" is left out, it cannot be read (")[0] for note in found.notes] == [half.name, none.name]


def test_rows_have_their_prompts_where_the_log_knows_them(tmp_path: Path) -> None:
    log = tmp_path / "a-apt.jsonl"
    for prompt in (0, 2):
        draw(log, f"a_000010_{prompt:02d}_20261122230000", size=(8, 8))
    found = read_samples(log, [start(sample_prompts=["of old"])["run"], start(sample_prompts=["one", "two"])["run"]])
    assert found is not None and found.prompts == {0: "one", 2: ""}


def test_of_many_pictures_those_of_checkpoints_are_shown_and_the_picked_ones(tmp_path: Path) -> None:
    log, found = tmp_path / "lora-apt.jsonl", saved(tmp_path)
    for number in range(0, 601, 50):
        draw(log, f"lora_{number:06d}_00_20261122{number:06d}", size=(8, 8))
    shown = read_samples(log, (), found)
    assert shown is not None and shown.moments == [("step", number) for number in range(0, 601, 100)]
    many = [dataclasses.replace(found.run.checkpoints[0], step=10 * k) for k in range(1, 61)]
    for picked in (many[0], many[1], many[32], many[58], many[59]):
        of_many = Saved(
            dataclasses.replace(found.run, checkpoints=many), dataclasses.replace(found.verdict, picked=picked)
        )
        for number in range(10, 601, 10):
            draw(log, f"lora_{number:06d}_00_20261122{number:06d}", size=(8, 8))
        shown = read_samples(log, (), of_many)
        assert shown is not None and len(shown.moments) == 8 and ("step", picked.step) in shown.moments
        assert shown.moments == sorted(shown.moments)
        assert shown.notes == ["8 of 61 moments are shown, those of checkpoints, evenly chosen."]


def epochs(*files: tuple[int, str]) -> Saved:
    checkpoints = [Checkpoint(step, file, 0.5, 0.1, NAN, 10, 0, 0.02, 0.1, 0.1, 0.9, NAN) for step, file in files]
    return Saved(SavedRun("lora", Path("lora-checkpoints.jsonl"), {}, checkpoints), verdict(checkpoints))


def test_a_picture_is_of_the_nearest_checkpoint(tmp_path: Path) -> None:
    found = saved(tmp_path)
    steps = {0: None, 10: 100, 149: 100, 151: 200, 900: 600}
    assert {number: (one := found.nearest(("step", number))) and one.step for number in steps} == steps
    assert found.nearest(("epoch", 1)) is None and found.nearest(("epoch", 0)) is None
    assert found.picked_among([("step", 260), ("step", 290), ("step", 400)]) == ("step", 290)
    assert found.picked_among([("step", 100), ("step", 400)]) is None
    by_epoch = epochs((40, "lora-000002.safetensors"), (80, "lora-000004.safetensors"), (100, "lora.safetensors"))
    assert [by_epoch.step_of(("epoch", number)) for number in (0, 2, 4, 5)] == [0, 40, 80, 100]
    assert [one.file for number in (1, 4, 5) if (one := by_epoch.nearest(("epoch", number)))] == [
        "lora-000002.safetensors", "lora-000004.safetensors", "lora.safetensors",
    ]  # fmt: skip


# -- the page ----------------------------------------------------------------------------------------------------------


def report(places: list[Path], out: Path) -> tuple[str, list[str]]:
    """The page without plotly.js, and what was said."""
    pytest.importorskip("plotly")
    from apt_hooks.results.report.page import run_report

    said: list[str] = []
    run_report(places, out, say=said.append)
    parts = re.split(r"<script>.*?</script>", out.read_text(encoding="utf-8"), flags=re.DOTALL)
    return "".join(parts), said


def test_the_page_tells_results_settings_and_how_it_was_read(tmp_path: Path) -> None:
    write(tmp_path / "own-apt.jsonl", [start(), *(step(i) for i in range(1, 31))])
    write(tmp_path / "plain-apt.jsonl", [step(i, (1.0, 0.9, 0.8), delta_noise=0.5) for i in range(1, 21)])
    page, said = report([tmp_path], tmp_path / "report.html")
    assert said == [f"{tmp_path / 'report.html'}: 2 runs, 50 steps"]
    assert "mean gamma ended lowest in own (0.50), highest in plain (0.90)" in page
    assert "highest in plain (0.5). They ended at different steps." in page
    assert (
        "preset sdxl; up to step 30, written " in page and "its configuration is not in the log; up to step 20" in page
    )
    assert "The config is not in the log: plain." in page
    assert ">lambda_attn</th><td>0.5 (own)</td>" in page and "3 more keys of [apt]" in page
    assert ">indicator_units</th><td>epsilon</td>" in page
    assert "Shown: all 30 steps." in page and "None of these runs has pictures" in page
    assert 'id="plot-l_attn"' in page and 'id="plot-l_joint"' not in page
    assert "Their indicator_scale" not in page


def test_the_page_begins_with_the_verdict_of_pick(tmp_path: Path) -> None:
    log = write(tmp_path / "lora-apt.jsonl", [start(sample_prompts=["a <dog>"]), *(step(i) for i in range(1, 601))])
    found = saved(tmp_path)
    for number in range(100, 700, 100):
        draw(log, f"lora_{number:06d}_00_20261122{number:06d}", size=(8, 8))
    page, _ = report([log], tmp_path / "report.html")
    first, _, rest = page.partition("Did it overfit?")
    assert f'<p class="verdict">{found.verdict}</p>' in first and "Step 300" in str(found.verdict)
    assert "drift of:" in first and "gap on:" not in first  # without held-out pictures there is one
    assert "<tr class=picked><td>300</td><td>0.60</td><td>0.05</td><td>0.02</td><td>2.00</td><td>1.00</td>" in first
    assert 'id="plot-gap-0"' in first and 'id="plot-drift-0"' in first and "No class drift" not in first
    assert "<i>picked</i>step 300<br><code>lora-step00000300</code>" in first and first.count("<td class=picked>") == 1
    assert "<strong>00</strong> a &lt;dog&gt;" in first and "<img" not in rest


def test_without_a_verdict_the_page_says_why(tmp_path: Path) -> None:
    write(tmp_path / "none-apt.jsonl", [start(), step(1)])
    write(tmp_path / "few-apt.jsonl", [start(), step(1)])
    off = dict.fromkeys(("class_drift", "free_drift", "prompt_response"))
    write(tmp_path / "few-checkpoints.jsonl", [{"run": {"off": "drifts = false"}}, {**checkpoint(60, 0.1, 0.1), **off}])
    page, _ = report([tmp_path], tmp_path / "report.html")
    assert "No verdict: beside its log there is no none-checkpoints.jsonl" in page
    assert (
        '<p class="verdict unsure">Cannot tell: not all of these checkpoints have a prompt response.' in page
        and "No drifts: drifts = false." in page
    )
    assert "plot-gap" not in page and "1 checkpoint in numbers" in page


def test_runs_of_another_scale_are_not_compared_by_gamma(tmp_path: Path) -> None:
    for name, scale in (("a", 1000.0), ("b", 100.0)):
        write(tmp_path / f"{name}-apt.jsonl", [start(config={"indicator_scale": scale}), step(1)])
    page, _ = report([tmp_path], tmp_path / "report.html")
    assert "Their indicator_scale is not the same: compare gaps, not gammas." in page
    assert '<tr class=differs><th scope="row">indicator_scale</th><td>1000.0</td><td>100.0</td></tr>' in page


def test_a_page_of_a_part_says_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apt_hooks.results.report.page.read_run", functools.partial(read_run, most=1000))
    write(tmp_path / "a-apt.jsonl", [step(i) for i in range(1, 3001)])
    monkeypatch.setattr("apt_hooks.results.report.figures.points_for", lambda runs: 300)
    page, said = report([tmp_path], tmp_path / "report.html")
    assert "Shown: every 4th of 3000 steps; a point of a curve is the mean of 3 of these." in page
    assert said[0].endswith("1 run, 3000 steps")


def test_names_and_settings_from_files_are_text_and_no_markup(tmp_path: Path) -> None:
    evil = "<img src=x onerror=alert(1)><" + "script>"
    config = {"config": {evil: evil}, "overrides": {evil: evil}, "preset": evil, "trainer": evil, "torch": evil}
    write(tmp_path / f"{evil.replace('/', '')}-apt.jsonl", [start(**config), step(1)])
    page, _ = report([tmp_path], tmp_path / "report.html")
    assert "<img" not in page and "&lt;img src=x onerror=alert(1)&gt;" in page
    plots = page.partition('id="plots">')[2].partition("</script>")[0]
    assert "<" not in plots and "&lt;img" in json.dumps(json.loads(plots))


def test_pictures_are_on_the_page_with_the_gamma_of_their_step(tmp_path: Path) -> None:
    log = write(tmp_path / "a-apt.jsonl", [step(i, (i / 10, i / 10)) for i in range(1, 11)])
    draw(log, "a_000005_00_20261122230000")
    page, _ = report([log], tmp_path / "report.html")
    assert page.count('<img src="data:image/jpeg;base64,') == 1 and 'alt="a, step 5, prompt 00"' in page
    assert "A row without its prompt, which the log does not know" in page
    assert "step 5<br>gamma 0.50" in page


def test_a_log_without_steps_is_noted_beside_others_and_refused_alone(tmp_path: Path) -> None:
    begun = write(tmp_path / "begun-apt.jsonl", [start()])
    out = tmp_path / "report.html"
    with pytest.raises(AptError, match=r"begun-apt.jsonl: no step yet; a run writes a line a step"):
        report([begun], out)
    assert not out.exists()
    write(tmp_path / "a-apt.jsonl", [step(1)])
    page, said = report([tmp_path], out)
    assert f"{begun}: no step yet, left out." in page and said[0].endswith(f"1 run, 1 step; no step yet in {begun}")


def broken(path: Path) -> Path:
    return write(path, [start(), step(1)], end="no json\n")


def test_what_cannot_be_read_is_left_out_and_named_once_and_the_others_are_reported(tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    good = write(tmp_path / "good-apt.jsonl", [start(), step(1)], end='{"step": 2, "gam')  # a crash's last line
    bad, begun, no = broken(tmp_path / "bad-apt.jsonl"), write(tmp_path / "begun-apt.jsonl", [start()]), tmp_path / "no"
    lines = write(tmp_path / "good-checkpoints.jsonl", [{"step": 1}])
    (tmp_path / "none").mkdir()
    places, out = [bad, no, tmp_path / "none", begun, good], tmp_path / "r.html"
    result = CliRunner().invoke(app, ["report", *map(str, places), "--out", str(out)], catch_exceptions=False)
    assert result.exit_code == 1
    assert result.stdout == f"{out}: 1 run, 1 step; no step yet in {begun}\n"
    said = result.stderr.splitlines()
    assert [line.split(": ")[:3] for line in said] == [
        ["apt-hooks", "left out", str(no)],
        ["apt-hooks", "left out", str(tmp_path / "none")],
        ["apt-hooks", "left out", str(bad)],
        ["apt-hooks", "left out", str(lines)],
    ]
    page = out.read_text()
    assert all(f"Left out: {escape(line.removeprefix('apt-hooks: left out: '))}." in page for line in said)
    assert "No verdict: good-checkpoints.jsonl cannot be read, as said at the top." in page


def test_where_nothing_can_be_read_all_is_named_in_one_line_and_no_page_is_written(tmp_path: Path) -> None:
    bad, begun = broken(tmp_path / "bad-apt.jsonl"), write(tmp_path / "begun-apt.jsonl", [start()])
    with pytest.raises(AptError, match=r"no: no such .*; .*bad-apt.jsonl: line 3 .*; .*begun-apt.jsonl: no step"):
        report([bad, begun, tmp_path / "no"], tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_a_run_that_has_no_step_yet_is_no_failure(tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    write(tmp_path / "begun-apt.jsonl", [start()])
    write(tmp_path / "good-apt.jsonl", [step(1)])
    result = CliRunner().invoke(app, ["report", str(tmp_path), "--out", str(tmp_path / "r.html")])
    assert (result.exit_code, result.stderr) == (0, "")


def test_bad_places_and_outputs_are_refused(tmp_path: Path) -> None:
    log = write(tmp_path / "a-apt.jsonl", [step(1)])
    (tmp_path / "none").mkdir()
    for places, out, message in (
        ([tmp_path / "no"], "r.html", "no: no such file or folder; name a RUN-apt.jsonl"),
        ([tmp_path / "none"], "r.html", r"none: has no \*-apt.jsonl, which a run with APT writes"),
        ([], "r.html", "no run is named"),
        ([log], "r.png", "--out must name an .html file; found .*r.png"),
        ([log], "no/r.html", "no: cannot be written to"),
    ):
        with pytest.raises(AptError, match=message) as caught:
            report(places, tmp_path / out)
        assert "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a-apt.jsonl", "none"]


def test_missing_packages_are_named_with_what_installs_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from apt_hooks.results.report.page import run_report

    log = write(tmp_path / "a-apt.jsonl", [step(1)])
    draw(log, "a_e000001_00_20261122230000")
    for package, message in (("PIL", "sample pictures need Pillow"), ("plotly.offline", "the report needs plotly")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(AptError, match=rf'{message} .*: pip install "apt-hooks\[report\]"'):
            run_report([log], tmp_path / "r.html", say=print)


# -- what trainers logged ----------------------------------------------------------------------------------------------


class Accumulator:
    """TensorBoard's reader, of `LOGGED`: times, steps and values by folder and tag."""

    LOGGED: ClassVar[dict[str, dict[str, list[tuple[float, int, float]]]]] = {}

    def __init__(self, folder: str, size_guidance: dict[str, int]) -> None:
        assert size_guidance == {"scalars": 0}
        self.scalars = self.LOGGED[Path(folder).parent.name]

    def Reload(self) -> None:
        pass

    def Tags(self) -> dict[str, list[str]]:
        return {"scalars": list(self.scalars)}

    def Scalars(self, tag: str) -> list[SimpleNamespace]:
        return [SimpleNamespace(wall_time=t, step=step, value=value) for t, step, value in self.scalars[tag]]


LOSSES = [(float(i), i, 0.05 + 0.001 * i) for i in range(1, 7)]
PLAIN = {
    "loss/current": [*LOSSES[:5], (6.0, 6, math.inf)],
    "loss/epoch_average": [(3.5, 1, 0.052), (9.0, 2, 0.055)],
    "lr/unet": LOSSES,
}


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Event files of two runs, by the names of their folders; what is in them is `Accumulator.LOGGED`."""
    name = "tensorboard.backend.event_processing.event_accumulator"
    for part in ("tensorboard", "tensorboard.backend", "tensorboard.backend.event_processing", name):
        monkeypatch.setitem(sys.modules, part, ModuleType(part))
    vars(sys.modules[name])["EventAccumulator"] = Accumulator

    def logged(logging_dir: Path, **runs: Any) -> Path:
        for run, scalars in runs.items():
            folder = logging_dir / run / "network_train"
            folder.mkdir(parents=True)
            (folder / "events.out.tfevents.1795747022.host.1.0").touch()
            monkeypatch.setitem(Accumulator.LOGGED, run, scalars)
        return logging_dir

    return logged


def test_losses_stand_at_training_steps_and_runs_are_called_by_their_places(tmp_path: Path, logged: Any) -> None:
    place = logged(tmp_path / "plain", first=PLAIN, second=PLAIN, empty={"lr/unet": LOSSES})
    one, two = read_events(find_events([place]))
    assert (one.name, two.name) == ("plain/first", "plain/second") and list(one.scalars) == list(PLAIN)[:2]
    assert [column.tolist() for column in one.scalars["loss/epoch_average"]] == [[3, 6], [0.052, 0.055]]
    (file,) = (place / "first").rglob("events*")
    for single in (place / "first", file, file.parent):
        assert [log.name for log in read_events(find_events([single]))] == ["first"]
    assert not find_events([tmp_path / "no"]) and read_events({}) == []


def test_a_run_without_apt_stands_beside_one_with_it(tmp_path: Path, logged: Any) -> None:
    write(tmp_path / "out/own-apt.jsonl", [start(), *(step(i) for i in range(1, 7))])
    own = [(float(i), i, step(i)["loss_tuned"] * (1 + 1e-8)) for i in range(1, 7)]
    logged(tmp_path / "out/logs", itsown={"apt/loss_tuned": own, "loss/current": LOSSES})
    plain = logged(tmp_path / "plain", one=PLAIN)
    page, said = report([tmp_path / "out", plain], tmp_path / "report.html")
    assert said[0].endswith("1 run, 6 steps, losses of 1 other")
    section = page.partition('id="trainer-losses"')[2].partition("</section>")[0]
    assert re.findall(r'data-line="(.*?)".*?<span>(.*?)</span>', section) == [("run-0", "own"), ("run-1", "plain")]
    assert re.findall("<h3>(.*?)</h3>", section) == ["loss/current", "loss/epoch_average"] and "No event" not in section
    page, _ = report([tmp_path / "out/own-apt.jsonl", plain], tmp_path / "report.html")
    assert "No event files of own were found: name its logging_dir too." in page
    page, _ = report([tmp_path / "out/own-apt.jsonl"], tmp_path / "report.html")
    assert "trainer-losses" not in page


def test_losses_are_of_the_run_whose_log_agrees(tmp_path: Path, logged: Any) -> None:
    lines = [*(step(i) for i in range(1, 5)), start(4, trainer_step=0), *(step(i) for i in range(5, 8))]
    run = read(write(tmp_path / "a-apt.jsonl", [start(), *lines]))
    same = [(float(i), i, step(i)["loss_tuned"]) for i in range(1, 8)]
    resumed = [(float(i), i - 4, step(i)["loss_tuned"]) for i in range(5, 8)]
    other = [(t, i, value if i == 1 else 0.5) for t, i, value in same]  # of one seed, which is why they begin alike
    runs = {"same": same, "resumed": resumed, "other": other, "none": [(0.0, 1, NAN)], "later": [(0.0, 9, 0.5)]}
    place = logged(tmp_path / "p", **{name: {"apt/loss_tuned": v, "loss/current": LOSSES} for name, v in runs.items()})
    found = {log.name.removeprefix("p/"): log.agreement(run) for log in read_events(find_events([place]))}
    assert found == {"same": (1, 0), "resumed": (1, 4), "other": (1 / 7, 0), "none": (0, 0), "later": (0, 0)}
    page, said = report([tmp_path], tmp_path / "report.html")
    assert said[0].endswith("losses of 3 others") and page.count("Resumed behind step 4.") == 1
    plots = json.loads(page.partition('id="plots">')[2].partition("</script>")[0])
    drawn = [max(line["x"]) for line in plots["plot-trainer-0"]["data"] if line["legendgroup"] == "run-0"]
    assert sorted(drawn) == [6, 10] and page.count('data-line="run-0" data-within="trainer-losses"') == 1


def test_event_files_alone_are_refused_and_without_tensorboard_told(
    tmp_path: Path, logged: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, out = logged(tmp_path / "plain", one=PLAIN), tmp_path / "report.html"
    with pytest.raises(
        AptError, match=r"plain: has event files of TensorBoard, and no \*-apt.jsonl; name a run with APT"
    ):
        report([place], out)
    monkeypatch.setitem(sys.modules, "tensorboard.backend.event_processing.event_accumulator", None)
    log = write(tmp_path / "a-apt.jsonl", [step(1)])
    with pytest.raises(AptError, match=r"event files are read by the package tensorboard .*: pip install tensorboard"):
        report([log, place], out)
    page, _ = report([tmp_path], out)  # it has a log, and the event files are beside the matter
    assert "Left out: " in page and "pip install tensorboard" in page


def test_what_tensorboard_writes_is_read(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path / "plain")) as writer:
        for number in (1, 2, 3):
            writer.add_scalar("loss/current", 0.25 * number, number)
        writer.add_scalar("loss/validation/epoch_average", 0.5, 1)
    (log,) = read_events(find_events([tmp_path]))
    assert [column.tolist() for column in log.scalars["loss/current"]] == [[1, 2, 3], [0.25, 0.5, 0.75]]
    assert [column.tolist() for column in log.scalars["loss/validation/epoch_average"]] == [[3], [0.5]]


MODULES = ["curves", "figures", "page", "samples", "saved", "summary", "tables", "watch", "which_checkpoint"]


@pytest.mark.parametrize("module", MODULES)
def test_optional_packages_are_imported_where_they_are_needed_only(module: str) -> None:
    path = importlib.import_module(f"apt_hooks.results.report.{module}").__file__ or ""
    source = Path(path).read_text(encoding="utf-8")
    top = [node for node in ast.parse(source).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {name for node in top for name in [getattr(node, "module", None), *(alias.name for alias in node.names)]}
    assert names and not {"plotly", "rich", "PIL", "numpy"} & {str(name).partition(".")[0] for name in names}
