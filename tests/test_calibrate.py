"""What a step log says of the indicator's scale: the rule by hand, logs old, cut off and wrong, and the command."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from apt_hooks import AptConfig, AptError, AptObjective
from apt_hooks.cli import app
from apt_hooks.method.indicator import gamma_of_gap
from apt_hooks.results.calibrate import (
    GAMMA_AT_END,
    OFFSET_SHARE,
    calibrate,
    gaps_at_end,
    propose_offset_weight,
    propose_scale,
    read_log,
)
from apt_hooks.training.run import AptRun

NAN = math.nan
PAPER = [0.965, 0.98, 0.83, 0.39]  # its published bins at the end of training


def line(step: int, gaps: Sequence[float | None], scale: float, *, old: bool = False) -> dict[str, Any]:
    """A line of a step log, its gammas computed apart from the package; an old one has no gap."""
    gammas = [0.0 if gap is None else min(1.0, max(0.0, 1 - math.exp(-scale * gap))) for gap in gaps]
    return {"step": step, "gamma": gammas} | ({} if old else {"gap": list(gaps)}) | {"loss_tuned": 0.1}


def write(path: Path, lines: Sequence[object], end: str = "") -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in lines) + end)
    return path


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Twenty steps of three bins under S = 1000; one bin is never seen and one is negative at times."""
    rows = [[None, -0.001 if step < 15 else 0.002, 0.001 * step] for step in range(1, 21)]
    return write(tmp_path / "lora-apt.jsonl", [line(i, row, 1000.0) for i, row in enumerate(rows, start=1)])


# -- the rule ----------------------------------------------------------------------------------------------------------


def test_the_papers_own_run_is_given_the_papers_scale() -> None:
    gaps = torch.tensor([[-math.log1p(-gamma) / 1000 for gamma in PAPER]] * 10, dtype=torch.float64)
    assert propose_scale(gaps) == pytest.approx(1000, rel=0.01)
    assert propose_scale(10 * gaps) == pytest.approx(100, rel=0.01)
    assert float(torch.tensor(PAPER).quantile(0.75)) == pytest.approx(GAMMA_AT_END, abs=0.005)


def test_the_proposal_solves_the_rule_exactly() -> None:
    gaps = torch.zeros(30, 5, dtype=torch.float64)
    # Before the last tenth anything; there, the means are -0.5, 0.001, 0.002, 0.004 and 7: the upper quartile is 0.004.
    gaps[:27] = 99
    gaps[27:] = torch.tensor(
        [[-0.5, 0.001, 0.002, 0.003, 7], [-0.5, 0.001, 0.002, 0.004, 7], [-0.5, 0.001, 0.002, 0.005, 7]]
    )
    scale = propose_scale(gaps)
    assert scale == pytest.approx(math.log(1 / 0.03) / 0.004, rel=1e-6)
    assert float(gamma_of_gap(gaps_at_end(gaps), scale)[3]) == pytest.approx(0.97, rel=1e-6)


def test_the_last_tenth_is_at_least_a_step_and_a_bin_not_seen_does_not_count() -> None:
    gaps = torch.tensor([[1.0, 9.0, 9.0], [2.0, 3.0, NAN]], dtype=torch.float64)
    assert gaps_at_end(gaps)[:2].tolist() == [2.0, 3.0]
    assert propose_scale(gaps) == pytest.approx(-math.log(0.03) / 2.75)


def test_a_bin_seen_during_the_last_tenth_is_averaged_from_there() -> None:
    gaps = torch.full((20, 1), NAN, dtype=torch.float64)
    gaps[-1] = 0.5
    assert gaps_at_end(gaps).tolist() == [0.5]


def test_one_noisy_bin_hardly_moves_the_proposal() -> None:
    gaps = torch.linspace(0.002, 0.004, 10, dtype=torch.float64).expand(10, -1).clone()
    quiet = propose_scale(gaps)
    for outlier in (-1.0, 1.0):
        for b in range(10):
            noisy = gaps.clone()
            noisy[:, b] = outlier
            assert propose_scale(noisy) == pytest.approx(quiet, rel=0.1)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ([0.0, 0.0, 0.0], "it has learned nothing yet .* gaps: 0"),
        ([-0.002, -0.002, 0.1, -0.001, -0.004], "learned nothing yet .*-0.001"),
        ([NAN, NAN], "no bin of timesteps was seen"),
        ([math.inf, math.inf], "gamma is 1 to all digits"),
        ([0.1, 0.2, 0.3, math.inf, math.inf], "gamma is 1 to all digits"),
    ],
)
def test_gaps_from_which_no_scale_follows_are_an_error(row: list[float], said: str) -> None:
    with pytest.raises(AptError, match=said):
        propose_scale(torch.tensor([row] * 3, dtype=torch.float64))


# -- reading a log -----------------------------------------------------------------------------------------------------


def test_a_log_is_read_as_it_was_written(log: Path) -> None:
    run = read_log(log)
    assert run.steps.tolist() == list(range(1, 21))
    assert run.gaps[:, 0].isnan().all()
    assert run.gaps[:, 1].tolist() == [-0.001] * 14 + [0.002] * 6
    assert run.scale == 1000
    assert torch.allclose(gamma_of_gap(run.gaps, 1000.0), run.gammas, rtol=0, atol=1e-12)


def test_a_runs_own_log_gives_back_its_gammas_to_the_bit(tmp_path: Path) -> None:
    config = AptConfig(lambda_dist=0, lambda_attn=0, indicator_scale=123.4, monitor_only=True)
    objective = AptObjective(config, torch.nn.Linear(1, 1), torch.no_grad)
    run = AptRun(objective, log_path=tmp_path / "lora-apt.jsonl", augment_space="image")
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        timesteps = torch.randint(1000, (4,), generator=generator)
        target = torch.rand(4, 3, generator=generator)
        answers = iter([target * 1.1, target * 1.05])  # the frozen model's, the tuned one's
        run.record(objective.step(lambda answers=answers: next(answers), target, timesteps))
    run.close()
    logged = read_log(tmp_path / "lora-apt.jsonl")
    assert logged.gammas[0].tolist() == [0.0] * 10 and logged.gaps[0].isnan().all()
    assert (logged.gammas[-1] > 0).all()
    assert torch.equal(gamma_of_gap(logged.gaps, 123.4), logged.gammas)
    assert logged.scale == 123.4


def test_the_scale_is_that_of_the_end_and_unknown_where_gamma_does_not_tell(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [line(1, [0.001], 1000), line(2, [0.001], 50), line(3, [-0.1], 50)])
    assert read_log(path).scale == 50
    assert read_log(write(path, [line(1, [0.5, -0.5, None], 1000)])).scale is None
    start = {"run": {"config": {"indicator_scale": 1000.0}}}
    assert read_log(write(path, [start, line(1, [0.5, -0.5, None], 1000)])).scale == 1000
    assert read_log(write(path, [start, line(1, [0.001], 50)])).scale == 50


@pytest.mark.parametrize("end", ["", '{"step": 21, "gamma": [0.1', "\x00\x00"])
def test_the_piece_of_a_line_at_the_end_is_passed_over(log: Path, end: str) -> None:
    log.write_text(log.read_text() + end)
    assert len(read_log(log).steps) == 20


def test_a_log_without_gaps_is_read_with_the_runs_scale(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [line(i, [0.004, 0.001, -1.0, 0.5], 200, old=True) for i in (1, 2)])
    run = read_log(path, 200.0)
    assert run.gaps[0].tolist() == [pytest.approx(0.004), pytest.approx(0.001), 0.0, math.inf]
    assert run.scale == 200
    with pytest.raises(AptError, match=r"a\.jsonl: step 1 has no gap.* give the run's indicator_scale as --scale"):
        read_log(path)


def test_a_log_that_a_newer_version_went_on_with_is_read_too(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [line(1, [0.003], 100, old=True), line(2, [0.004], 100)])
    assert read_log(path, 100.0).gaps.flatten().tolist() == [pytest.approx(0.003), 0.004]


@pytest.mark.parametrize(
    ("content", "scale", "said"),
    [
        ("", None, "has no line yet"),
        ("gamma: 0.5\n", None, "line 1 is none of a step log, .* found 'gamma: 0.5'"),
        ("\x00PNG", None, "line 1 is none of a step log"),
        ('{"step": 1}\n', None, "line 1 is none of a step log"),
        ('{"gamma": [0.1]}\n', None, "line 1 is none of a step log"),
        ('{"step": 1, "gamma": 3}\n', None, "line 1 is none of a step log"),
        ('{"step": 1, "gamma": [0.1], "gap": [0.1, 0.2]}\n', None, "line 1 is none of a step log"),
        ('[1, 2]\n{"step": 1}\n', None, "line 1 is none of a step log"),
        ('{"step": 1, "gamma": [0.5], "gap": [0.1]}\n{"step": 2, "ga\n', None, "line 2 is none of a step log"),
        ('{"step": 1, "gamma": [0.5], "gap": [0.1]}\n{"step": 2, "gamma": [0, 0]}\n', None, "line 2 has 2 bins"),
        ('{"step": 1, "gamma": [0.5], "gap": [0.1]}\n', 10.0, "leave --scale 10 out"),
        ('{"step": 1, "gamma": [0.5]}\n', 0.0, "--scale must be a number above 0; found 0"),
        ('{"step": 1, "gamma": [0.5]}\n', NAN, "--scale must be a number above 0; found nan"),
    ],
)
def test_what_is_no_log_is_refused_in_one_line(tmp_path: Path, content: str, scale: float | None, said: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(AptError, match=said) as caught:
        read_log(path, scale)
    assert len(str(caught.value).splitlines()) == 1


def test_a_log_that_is_not_there_or_is_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AptError, match="nowhere: cannot be read: No such file"):
        read_log(tmp_path / "nowhere")
    with pytest.raises(AptError, match="cannot be read"):
        read_log(tmp_path)


def test_a_long_log_is_read_whole(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [line(i, [0.001 * b for b in range(10)], 1000) for i in range(1, 5001)])
    run = read_log(path)
    assert run.steps.tolist() == list(range(1, 5001)) and run.gaps.shape == (5000, 10)
    assert run.gaps[-1].tolist() == [0.001 * b for b in range(10)]


@pytest.mark.parametrize("number", ["", ".1"])
def test_lines_about_checkpoints_are_no_log_and_the_log_beside_them_is_named(log: Path, number: str) -> None:
    path = write(log.with_name(f"lora-checkpoints{number}.jsonl"), [line(1, [0.1], 1000) | {"file": "a.safetensors"}])
    log = log.rename(log.with_name(f"lora-apt{number}.jsonl"))
    for command in ("calibrate", "report", "watch"):
        result = CliRunner().invoke(app, [command, str(path)])
        said = f"{path}: has lines about checkpoints, for `apt-hooks pick`, and none of steps; name {log}"
        assert result.exit_code == 1 and str(result.exception) == said, command
    log.unlink()
    with pytest.raises(AptError, match=r"none of steps; name the RUN-apt\.jsonl of that run"):
        read_log(path)


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_says_the_scale_and_draws(log: Path) -> None:
    pytest.importorskip("matplotlib")
    result = CliRunner().invoke(app, ["calibrate", str(log)], catch_exceptions=False)
    assert result.exit_code == 0
    # Steps 19 and 20: gaps 0.002 and 0.0195; the upper quartile of both is 0.015125, -log(0.03) / 0.015125 = 231.8.
    assert result.output.splitlines() == [
        f"{log}: steps 1 to 20, 3 bins, indicator_scale = 1000",
        "gap (loss of base - loss of LoRA), mean of steps 19 to 20: "
        "largest bin 0.0195, upper quartile 0.0151, median 0.0107",
        "rule: the upper quartile of the bins ends at gamma 0.97, as in the paper's SDXL run (step 2000)",
        "write into [apt]: indicator_scale = 230",
        f"gamma per bin, as it was and under the proposed scale: {log.with_name('lora-apt-calibrate.png')}",
    ]
    assert log.with_name("lora-apt-calibrate.png").read_bytes().startswith(b"\x89PNG")
    AptConfig(indicator_scale=230)


def test_of_a_folder_its_one_log_is_taken(log: Path) -> None:
    result = CliRunner().invoke(app, ["calibrate", str(log.parent)], catch_exceptions=False)
    assert result.output.startswith(f"{log}: steps 1 to 20, 3 bins")
    log.with_name("other-apt.jsonl").write_bytes(log.read_bytes())
    with pytest.raises(
        AptError, match=r"has 2 \*-apt\.jsonl, a scale is of one run; name one of .*lora-apt.*, .*other-"
    ):
        CliRunner().invoke(app, ["calibrate", str(log.parent)], catch_exceptions=False)


@pytest.mark.parametrize("bins", [1, 2, 1000])
def test_any_number_of_bins_can_be_drawn(tmp_path: Path, bins: int) -> None:
    pytest.importorskip("matplotlib")
    path = write(tmp_path / "a.jsonl", [line(i, [0.0005] * bins, 1000, old=True) for i in range(1, 101)])
    picture = tmp_path / "picture.png"
    said: list[str] = []
    assert calibrate(path, picture, scale=1000.0, say=said.append) == 7000
    assert picture.exists() and str(picture) in said[-1]


@pytest.mark.parametrize(("gap", "proposed"), [(1e-6, "3500000"), (1.0, "3.5")])
def test_a_proposal_far_from_the_papers_comes_with_a_question(tmp_path: Path, gap: float, proposed: str) -> None:
    pytest.importorskip("matplotlib")
    said: list[str] = []
    calibrate(
        write(tmp_path / "a.jsonl", [line(i, [gap], 1000) for i in range(1, 6)]), None, scale=None, say=said.append
    )
    assert f"indicator_scale = {proposed}" in said[3]
    assert said[4].startswith("note: that is far from the paper's 100 to 1000")


def test_a_run_that_learned_nothing_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [line(i, [-0.1, 0.0], 1000) for i in range(1, 11)])
    with pytest.raises(AptError, match=r"a\.jsonl: the LoRA is not ahead of the base model"):
        calibrate(path, None, scale=None, say=print)


def test_a_picture_that_cannot_be_written_is_an_error_and_the_log_is_never_overwritten(log: Path) -> None:
    pytest.importorskip("matplotlib")
    before = log.read_bytes()
    for picture, said in ((log, r"must name a \.png file"), (log.parent / "nowhere" / "a.png", "cannot be written")):
        with pytest.raises(AptError, match=said):
            calibrate(log, picture, scale=None, say=print)
    assert log.read_bytes() == before


def test_the_dropout_of_the_run_is_said_beside_the_scale(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    steps = [line(i, [0.02], 1000) for i in range(1, 6)]
    for dropout in ({"network_dropout": 0.3, "module_dropout": 0.05}, None):
        start = {"run": {"config": {}} if dropout is None else {"dropout": dropout}}
        said: list[str] = []
        # That of a resumed run's own start, not that of the run before it.
        calibrate(
            write(tmp_path / "a.jsonl", [{"run": {"dropout": {"lora_dropout": 0.9}}}, steps[0], start, *steps[1:]]),
            None,
            scale=None,
            say=said.append,
        )
        wanted = "note: the run's LoRA had dropout (network_dropout = 0.3, module_dropout = 0.05), which makes gaps"
        assert [text[: len(wanted)] for text in said if "had dropout" in text] == [wanted] * (dropout is not None)


def test_without_matplotlib_the_scale_is_said_and_how_to_get_the_picture(
    log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said: list[str] = []
    assert calibrate(log, None, scale=None, say=said.append) == 230
    assert said[-2] == "write into [apt]: indicator_scale = 230"
    assert said[-1].startswith("no picture, which needs matplotlib") and said[-1].endswith(
        'pip install "apt-hooks[demo]"'
    )


def watched(
    path: Path,
    offset: float | None,
    *monitor_only: bool,
    gains: Sequence[float] = (0.05, 0.06, 0.05, 0.04),
    every: int = 1,
) -> Path:
    """A log of forty steps: these gains in the last tenth, before it 0.01; one or two starts, or none."""
    logged = []
    for i in range(1, 41):
        losses = {"loss_tuned": 0.1, "loss_frozen": 0.1 + ([0.01] * 36 + [*gains])[i - 1]}
        losses = losses if i % every == 0 else dict.fromkeys(losses)
        logged.append(line(i, [0.002], 1000) | losses | {"l_offset": offset and offset * i})
    starts = [{"run": {"config": {"monitor_only": given, "lambda_offset": 0.001}}} for given in monitor_only]
    return write(path, [*starts[:1], *logged[:20], *starts[1:], *logged[20:]])


def said_of(log: Path) -> list[str]:
    said: list[str] = []
    calibrate(log, None, scale=None, say=said.append)
    return [text for text in said if "lambda_offset" in text]


@pytest.mark.parametrize(
    ("every", "given", "seen"),
    [
        # 0.05 ± 0.0082 / 2; l_offset of steps 37 to 40 is 385 in the mean; 0.2 * 0.05 / 385 = 2.597e-5.
        (1, (True,), "lambda_offset = 2.6e-05 at most; rule: 0.2 of loss_frozen - loss_tuned 0.05 ± 0.004 in 4 steps"),
        # Of steps 38 and 40, and l_offset of all four.
        (
            2,
            (True, True),
            "lambda_offset = 2.6e-05 at most; rule: 0.2 of loss_frozen - loss_tuned 0.05 ± 0.01 in 2 steps",
        ),
    ],
    ids=["each step", "resumed, every second"],
)
def test_the_weight_of_the_offset_is_proposed_of_a_run_that_was_watched(
    tmp_path: Path, every: int, given: tuple[bool, ...], seen: str
) -> None:
    log = watched(tmp_path / "a.jsonl", 10.0, *given, every=every)
    assert said_of(log) == [
        f'to hold the weights, with objective = "l2-sp" or beside APT: {seen} of the last tenth, over l_offset 385'
    ]
    found = read_log(log)
    assert (found.gain, found.offset) == pytest.approx((0.05, 385))
    assert propose_offset_weight(found.gain, found.offset) == pytest.approx(OFFSET_SHARE * 0.05 / 385)
    AptConfig(lambda_offset=2.6e-5)


@pytest.mark.parametrize("given", [(False,), (True, False), (False, True)])
def test_of_a_run_on_which_a_penalty_may_have_acted_no_weight_is_proposed(
    tmp_path: Path, given: tuple[bool, ...]
) -> None:
    assert said_of(watched(tmp_path / "a.jsonl", 10.0, *given)) == [
        "no lambda_offset is proposed: not all of the run was with monitor_only, without which the offset may have "
        "been held"
    ]
    assert said_of(watched(tmp_path / "b.jsonl", 10.0)) == []  # an older log, which does not tell how it was trained


@pytest.mark.parametrize(
    ("offset", "gains", "every", "why"),
    [
        (None, [0.05] * 4, 1, "the log has no l_offset above 0, as that of an older apt-hooks or of no plain LoRA"),
        (0.0, [0.05] * 4, 1, "the log has no l_offset above 0, as that of an older apt-hooks or of no plain LoRA"),
        (10.0, [-0.02] * 4, 1, "the LoRA is not ahead of the base model (loss_frozen - loss_tuned -0.02 ± "),
        (
            10.0,
            [0.05, -0.01, 0.09, 0.01],
            1,
            "loss_frozen - loss_tuned 0.035 ± 0.02 in 4 steps of the last tenth is too",
        ),
        (10.0, [0.05] * 4, 4, "loss_frozen - loss_tuned 0.05 ± nan in 1 steps of the last tenth is too uncertain; log"),
    ],
)
def test_where_no_weight_follows_it_is_said_why(
    tmp_path: Path, offset: float | None, gains: list[float], every: int, why: str
) -> None:
    (said,) = said_of(watched(tmp_path / "a.jsonl", offset, True, gains=gains, every=every))
    assert said.startswith(f"no lambda_offset is proposed: {why}")


@pytest.mark.parametrize(
    ("bins", "noise", "said"),
    [
        (10, 0.02, "20 steps, and 2 of 10 bins of timesteps were never seen"),
        (2, 1e-4, r"20 steps, and the LoRA has hardly moved the model \(delta noise 1.0e-04\)"),
    ],
)
def test_no_scale_is_fitted_to_a_run_that_is_too_short(tmp_path: Path, bins: int, noise: float, said: str) -> None:
    gaps = [0.0015] * (bins - 2) + [None] * 2 if bins > 2 else [0.0015] * bins
    lines = [{**line(i, gaps, 1000), "delta_noise": noise} for i in range(1, 21)]
    with pytest.raises(AptError, match=rf"a\.jsonl: too short to fit a scale to: {said}; log a run as long"):
        calibrate(write(tmp_path / "a.jsonl", lines), None, scale=None, say=print)


def test_steps_without_the_base_model_do_not_make_a_run_long_enough(tmp_path: Path) -> None:
    lines = [{**line(i, [0.0015] * 10, 1000), "delta_noise": None if i % 50 > 1 else 0.02} for i in range(1, 601)]
    said = r"600 steps, the base model in 24 of them \(frozen_every\), and there are 10 bins of timesteps to be seen"
    with pytest.raises(AptError, match=rf"a\.jsonl: too short to fit a scale to: {said}; log a run as long"):
        calibrate(write(tmp_path / "a.jsonl", lines), None, scale=None, say=print)
    assert read_log(tmp_path / "a.jsonl").compared == 24
    lines = [{**line(i, [0.0015] * 10, 1000), "delta_noise": None if i % 12 else 0.02} for i in range(1, 601)]
    assert calibrate(write(tmp_path / "b.jsonl", lines), None, scale=None, say=print) > 0
