"""What the rule for `lambda_offset` makes of plain runs of the tiny world."""

import concurrent.futures
import importlib
import sys

import pytest
from benchmark_path import benchmarks_importable

for package in ("diffusers", "peft", "rich", "safetensors"):
    pytest.importorskip(package)


@pytest.fixture(scope="module")
def rule():
    with benchmarks_importable():
        return importlib.import_module("offset_rule")


@pytest.mark.parametrize("model", ["unet", "transformer"])
def test_a_plain_run_of_either_model_logs_what_the_rule_needs(rule, model):
    gain, offset = rule.learn(model, 4, rule.Training(steps=10))
    assert offset > 0 and gain == gain  # of so few steps, not yet ahead of the base model for sure


def test_each_concept_and_the_mean_of_a_model_has_its_row(rule, monkeypatch, capsys):
    ends = {4: (0.06, 400.0), 5: (0.04, 600.0), 8: (-0.01, 500.0)}
    monkeypatch.setattr(rule, "learn", lambda model, concept, training: ends[concept])
    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", concurrent.futures.ThreadPoolExecutor)
    monkeypatch.setattr(sys, "argv", ["offset_rule.py", "--models", "unet", "--concepts", "4,5,8"])
    rule.main()
    assert capsys.readouterr().out.splitlines()[-6:] == [
        "| model | concept | offset | gain | share of 3e-05 | proposed |",
        "|---|---|---|---|---|---|",
        "| unet | 4 | 400 | 0.060 | 0.20 | 3.0e-05 |",
        "| unet | 5 | 600 | 0.040 | 0.45 | 1.3e-05 |",
        "| unet | 8 | 500 | -0.010 | -1.50 | nan |",
        "| unet | mean | 500 | 0.030 | 0.50 | 1.2e-05 |",
    ]
