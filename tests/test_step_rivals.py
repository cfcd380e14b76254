"""What a step of each method costs on the tiny world: turns, passes, and what is left out."""

import concurrent.futures
import importlib
import sys
import threading

import pytest
from benchmark_path import benchmarks_importable

for package in ("diffusers", "peft", "rich", "safetensors"):
    pytest.importorskip(package)


@pytest.fixture(scope="module")
def costs():
    with benchmarks_importable():
        return importlib.import_module("step_rivals")


def test_in_each_round_every_thread_has_one_turn_until_it_is_done(costs):
    turns, told = costs.Turns(["a", "b", "c"]), []

    def work(name, count):
        with turns.taking_part(name) as give_away:
            for _ in range(count - 1):
                told.append(name)
                give_away()
            told.append(name)

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        list(pool.map(work, "cba", (1, 30, 20)))
    rounds = [told[:3], *(told[at : at + 2] for at in range(3, 41, 2)), *([name] for name in told[41:])]
    assert [sorted(each) for each in rounds] == [["a", "b", "c"]] + [["a", "b"]] * 19 + [["b"]] * 10
    assert {tuple(each) for each in rounds} >= {("a", "b"), ("b", "a")}


def test_a_thread_that_fails_ends_the_others(costs, monkeypatch):
    waiting = threading.Event()

    def train_in_turn(name, steps, turns):
        with turns.taking_part(name) as give_away:
            if name == "apt":
                raise ValueError("no picture")
            waiting.set()
            while True:
                give_away()

    monkeypatch.setattr(costs, "train_in_turn", train_in_turn)
    with pytest.raises(ValueError, match="no picture"):
        costs.measure(["dreambooth", "apt", "dco"], 30)
    assert waiting.is_set()


def test_passes_are_counted_at_the_denoiser_without_those_for_the_log(costs, monkeypatch):
    monkeypatch.setattr("apt_hooks.tinyworld.personalize.MEASUREMENTS", 1)
    timed = costs.measure(["dreambooth", "l2-sp", "dco", "dop", "apt", "apt+dop", "t-lora"], 4)
    rows = costs.summarize(timed, block=2)
    assert {row["method"]: row["passes"] for row in rows} == {
        "dreambooth": "1 + 0",
        "l2-sp": "1 + 0",
        "dco": "1 + 1",
        "dop": "2 + 1",
        "apt": "1 + 1",
        "apt+dop": "2 + 2",
        "t-lora": "1 + 0",
    }
    # Of four steps the first and the last were measured.
    assert {len(steps) for steps in timed.values()} == {2}
    assert all(step.seconds > 0 for steps in timed.values() for step in steps)


def test_ratios_are_those_of_the_same_block(costs):
    seconds = {"dreambooth": [1, 3, 4, 4, 10, 10, 10], "apt": [2, 4, 12, 12, 10, 20, 30]}
    timed = {name: [costs.Step(s, 1, 1) for s in of] for name, of in seconds.items()}
    # Of two steps each, what is left over with the last: ratios of 1.5, 3 and 2, which deviate by 0.764 from 2.167.
    assert costs.summarize(timed, block=2) == [
        {"method": "dreambooth", "passes": "1 + 1", "ms": "4000", "ratio": "1.00 ± 0.00", "blocks": "3"},
        {"method": "apt", "passes": "1 + 1", "ms": "12000", "ratio": "2.17 ± 0.44", "blocks": "3"},
    ]


@pytest.mark.parametrize(("wrong", "named"), [("--steps", "29"), ("--block", "0"), ("--methods", "ap")])
def test_wrong_options_are_told_before_anything_runs(costs, monkeypatch, wrong, named):
    monkeypatch.setattr(sys, "argv", ["step_rivals.py", wrong, named])
    monkeypatch.setattr(costs, "measure", None)
    with pytest.raises(SystemExit, match=wrong):
        costs.main()
