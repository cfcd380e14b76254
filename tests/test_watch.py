"""What `watch` knows of a log that grows, is replaced or is not there yet, and what it shows of it."""

from __future__ import annotations

import io
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from step_logs import start, step, write

from apt_hooks import AptError
from apt_hooks.results.report import watch
from apt_hooks.results.report.watch import HISTORY, History, Watched, run_watch


def append(path: Path, *lines: dict[str, Any], end: str = "") -> None:
    with path.open("a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines) + end)


def looked(place: Path) -> Watched:
    watched = Watched(place)
    watched.look()
    return watched


def shown(place: Path, *, width: int = 80, height: int = 40) -> list[str]:
    """The lines of one picture, without colors."""
    console = pytest.importorskip("rich.console").Console
    out = io.StringIO()
    run_watch(place, once=True, console=console(file=out, width=width, height=height))
    return out.getvalue().splitlines()


# -- following a log ---------------------------------------------------------------------------------------------------


def test_what_is_appended_is_taken_in_and_a_piece_waits_for_its_end(tmp_path: Path) -> None:
    log = write(tmp_path / "a-apt.jsonl", [start(), step(1)])
    watched = looked(log)
    text = json.dumps(step(3)) + "\n"
    append(log, step(2), end=text[:50])
    watched.look()
    assert watched.last is not None and watched.last.step == 2
    append(log, end=text[50:])
    watched.look()
    assert watched.last.step == 3 and len(watched.histories["delta_noise"].values) == 3
    append(log, start(3), step(4))
    watched.look()
    assert watched.start["resumed_from"] == 3 and watched.last.step == 4


def test_only_what_is_new_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = write(tmp_path / "a-apt.jsonl", [step(1)])
    watched, parsed, parse_line = looked(log), [], watch.parse_line
    monkeypatch.setattr(watch, "parse_line", lambda *given: parsed.append(given[1]) or parse_line(*given))
    append(log, step(2), step(3))
    watched.look()
    watched.look()
    assert parsed == [2, 3]


def test_a_new_run_in_the_place_of_the_old_one_begins_anew(tmp_path: Path) -> None:
    log = write(tmp_path / "a-apt.jsonl", [start(), *(step(i) for i in range(1, 9))])
    watched = looked(log)
    write(tmp_path / "new", [start(preset="sd15"), *(step(i) for i in range(1, 12))]).replace(log)
    watched.look()
    assert watched.last is not None and watched.last.step == 11 and watched.start["preset"] == "sd15"
    assert len(watched.histories["augmented"].values) == 11
    write(log, [step(1)])  # shorter than before
    watched.look()
    assert watched.last.step == 1 and watched.start == {}


def test_a_log_that_is_not_there_yet_or_goes_away_is_waited_for(tmp_path: Path) -> None:
    log = tmp_path / "out" / "a-apt.jsonl"
    watched = looked(log)
    assert watched.last is None and watched.waiting_for() == "no such file or folder yet"
    write(log, [start()])
    watched.look()
    assert watched.last is None and watched.waiting_for() == "no step yet; a run writes a line a step"
    append(log, step(1))
    watched.look()
    assert watched.last is not None
    log.unlink()
    watched.look()
    assert watched.last is None and watched.waiting_for() == "no such file or folder yet"


def test_of_a_folder_the_newest_log_is_shown_and_others_are_named(tmp_path: Path) -> None:
    watched = Watched(tmp_path / "out")
    watched.look()
    (tmp_path / "out").mkdir()
    watched.look()
    assert watched.path is None and watched.waiting_for().startswith("no *-apt.jsonl here yet")
    for i, name in enumerate(("c", "deep/a", "b")):
        log = write(tmp_path / "out" / f"{name}-apt.jsonl", [step(i + 1)])
        os.utime(log, (1000 - i, 1000 - i))
    watched.look()
    assert watched.path == tmp_path / "out" / "c-apt.jsonl" and [p.name[0] for p in watched.others] == ["a", "b"]
    os.utime(tmp_path / "out" / "b-apt.jsonl", (2000, 2000))
    watched._looked = -math.inf
    watched.look()
    assert watched.last is not None and (watched.path.name, watched.last.step) == ("b-apt.jsonl", 3)
    assert any(line == "also here: c, a" for line in shown(tmp_path / "out"))


def test_of_a_folder_a_broken_log_is_left_out_until_it_is_written_again(tmp_path: Path) -> None:
    bad, good = tmp_path / "bad-apt.jsonl", write(tmp_path / "good-apt.jsonl", [start(), step(4)])
    write(bad, [step(1)], end="no json\n")
    os.utime(good, (1000, 1000))
    watched = looked(tmp_path)
    assert watched.path == good and watched.last is not None and watched.last.step == 4
    assert [path.name for path in watched.left_out] == ["bad-apt.jsonl"]
    assert any(line.startswith(f"left out: {tmp_path}"[:79]) for line in shown(tmp_path))
    write(bad, [step(1), step(2)])
    os.utime(bad, (2000, 2000))
    watched._looked = -math.inf
    watched.look()
    assert watched.path == bad and not watched.left_out and watched.last.step == 2
    append(bad, end="no json\n")  # while it is shown
    watched.look()
    assert watched.path == good and watched.last is not None and watched.last.step == 4
    append(good, end="no json\n")
    with pytest.raises(AptError, match=r"bad-apt.jsonl: line 3 .*; .*good-apt.jsonl: line 3 "):
        watched.look()


def test_once_shows_the_newest_log_of_a_folder_that_has_a_step(tmp_path: Path) -> None:
    log = write(tmp_path / "old-apt.jsonl", [start(), step(4)])
    os.utime(log, (1000, 1000))
    write(tmp_path / "new-apt.jsonl", [start()])
    assert (
        shown(tmp_path, width=200)[-1]
        == f"left out: {tmp_path / 'new-apt.jsonl'}: no step yet; a run writes a line a step"
    )
    log.unlink()
    with pytest.raises(AptError, match=r"new-apt.jsonl: no step yet"):
        shown(tmp_path)


def test_a_broken_new_line_is_named_by_its_number(tmp_path: Path) -> None:
    log = write(tmp_path / "a-apt.jsonl", [start(), step(1)])
    watched = looked(log)
    append(log, step(2), end="no json\n")
    with pytest.raises(AptError, match=r"a-apt.jsonl: line 4 is none of a step log, .* found 'no json'"):
        watched.look()
    watched = looked(write(log, [start(), step(1)]))
    append(log, step(1))
    with pytest.raises(AptError, match="line 3 is of step 1, one before it of step 1"):
        watched.look()


def test_a_history_stays_short_and_keeps_the_course() -> None:
    history, thinned = History(), History()
    for i in range(10 * HISTORY):
        history.add(float(i) if i % 3 else math.nan)
        if i % 16 == 0:
            thinned.add(float(i), 16)
    for values in (history.values, thinned.values):
        assert HISTORY / 2 <= len(values) < HISTORY and values == sorted(values)
        assert sum(values) / len(values) == pytest.approx(5 * HISTORY, rel=0.1)


# -- how fast ----------------------------------------------------------------------------------------------------------


def test_the_rate_is_of_the_last_minute_once_steps_were_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, now = write(tmp_path / "a-apt.jsonl", [start(), step(1)]), 0.0
    monkeypatch.setattr(watch.time, "monotonic", lambda: now)
    watched = looked(log)
    for number in range(2, 100):
        now += 2.0 if number < 50 else 0.5
        append(log, step(number))
        watched.look()
    assert watched.rate() == pytest.approx(68 / 60, rel=0.05)  # 18 slow ones and 50 fast ones
    slow = looked(write(tmp_path / "slow-apt.jsonl", [step(1)]))
    for number in (2, 3):
        now += 100
        slow.look()
        append(slow.place, step(number))
        slow.look()
    assert slow.rate() == pytest.approx(0.01)


def test_at_first_the_rate_is_what_the_log_tells(tmp_path: Path) -> None:
    begun = start(10, started="2026-11-22T23:00:00+00:00")
    log = write(tmp_path / "a-apt.jsonl", [begun, step(60)])
    os.utime(log, (1795388500, 1795388500))  # 23:01:40 UTC
    assert looked(log).rate() == pytest.approx(0.5)
    assert any("30.0 steps/min, last line" in line for line in shown(log))
    assert looked(write(tmp_path / "b-apt.jsonl", [step(60)])).rate() is None
    assert looked(write(tmp_path / "c-apt.jsonl", [start(started="soon"), step(60)])).rate() is None


# -- what is shown -----------------------------------------------------------------------------------------------------


def test_a_picture_has_a_bar_a_bin_and_a_sparkline_a_value(tmp_path: Path) -> None:
    lines = [step(i, (1.0, 0.5, 0.0), delta_noise=0.1 * i) for i in range(1, 9)]
    lines[-1]["gap"][2] = None
    text = shown(write(tmp_path / "lora-apt.jsonl", [start(), *lines]))
    assert text[0] == "lora  preset sdxl, lambda_attn = 0.5" and text[2].startswith("step 8  ")
    bars = {line.split()[0]: line for line in text if line.strip()[:1].isdigit() or line.strip().startswith("mean")}
    assert [bars[key].count("\u2588") for key in ("0-333", "334-666", "mean")] == [64, 32, 48]
    assert bars["0-333"].endswith(" 1.00") and bars["667-999"].endswith("not seen yet")
    sparks = [line for line in text if line.startswith("delta noise")]
    assert sparks == ["delta noise  \u2582\u2583\u2584\u2585\u2586\u2587\u2588\u2588       0.8"]
    assert not any(line.startswith("l_joint") for line in text)


@pytest.mark.parametrize("width", [30, 60, 80, 200])
def test_a_picture_fits_the_terminal(tmp_path: Path, width: int) -> None:
    name = "a_very_long_name_" * 5
    log = write(tmp_path / f"{name}-apt.jsonl", [start(), *(step(i, [0.5] * 50) for i in range(1, 300))])
    text = shown(log, width=width)
    assert all(len(line) <= width for line in text) and 20 < len(text) < 40
    assert sum("0.50" in line for line in text) == 18  # 17 lines of three bins, and the mean


def test_a_picture_is_as_high_as_the_terminal_at_most(tmp_path: Path) -> None:
    screen = pytest.importorskip("apt_hooks.results.report.watch")
    console = pytest.importorskip("rich.console").Console
    write(tmp_path / "b-apt.jsonl", [step(1)])
    watched = looked(write(tmp_path / "a-apt.jsonl", [start(), *(step(i, [0.5] * 40) for i in range(1, 5))]).parent)
    for height in (14, 24, 34):
        lines = console(width=80, file=io.StringIO()).render_lines(screen.picture(watched, 80, height))
        assert height - 8 < len(lines) <= height


def test_markup_in_a_name_is_text(tmp_path: Path) -> None:
    log = write(tmp_path / "[red]x-apt.jsonl", [start(overrides={"[bold]": "[/bold]"}), step(1)])
    assert shown(log)[0] == '[red]x  preset sdxl, [bold] = "[/bold]"'


def test_an_old_log_is_shown_without_config(tmp_path: Path) -> None:
    old = {"step": 7, "gamma": [0.0, 0.5]}
    text = shown(write(tmp_path / "a-apt.jsonl", [old]))
    assert text[0] == "a  config not in the log" and any(line.endswith(" 0.25") for line in text)


def test_a_long_log_is_shown_from_a_part_of_it_and_followed(tmp_path: Path) -> None:
    log = write(tmp_path / "a-apt.jsonl", [step(i, (0.5,)) for i in range(1, 20_100)])
    watched = looked(log)
    assert watched.last is not None and watched.last.step == 20_099
    append(log, step(20_100, (0.7,)))
    watched.look()
    assert watched.last.gamma == [0.7] and len(watched.histories["loss_tuned"].values) < HISTORY


# -- the loop ----------------------------------------------------------------------------------------------------------


def test_the_picture_follows_until_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    console = pytest.importorskip("rich.console").Console
    log, slept = tmp_path / "a-apt.jsonl", []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            raise KeyboardInterrupt
        write(log, [step(i) for i in range(1, 5 * len(slept) + 1)])

    monkeypatch.setattr(watch.time, "sleep", sleep)
    out = io.StringIO()
    environment = {"TERM": "xterm-256color"}  # a dumb one would be shown nothing before the end
    run_watch(tmp_path, console=console(file=out, force_terminal=True, width=400, height=24, _environ=environment))
    text = out.getvalue()
    assert slept == [watch.INTERVAL] * 3
    assert text.index("no *-apt.jsonl here yet") < text.index("step 5") < text.index("step 10")


def test_no_terminal_gets_one_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    console = pytest.importorskip("rich.console").Console
    monkeypatch.setattr(watch.time, "sleep", lambda _: pytest.fail("it waits"))
    out = io.StringIO()
    run_watch(write(tmp_path / "a-apt.jsonl", [step(3)]), console=console(file=out, width=80))
    assert "step 3" in out.getvalue() and "\x1b" not in out.getvalue()


def test_once_needs_a_step(tmp_path: Path) -> None:
    begun = write(tmp_path / "a-apt.jsonl", [start()])
    for place, message in (
        (begun, "a-apt.jsonl: no step yet; a run writes a line a step"),
        (tmp_path / "no", "no: no such file or folder yet"),
    ):
        with pytest.raises(AptError, match=message):
            shown(place)


def test_rich_missing_is_told_with_what_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with pytest.raises(AptError, match=r'watching needs rich .*: pip install "apt-hooks\[report\]"'):
        run_watch(tmp_path)
