"""Drifts: the numbers, that a run is left as it was, and what rules and lines say of checkpoints."""

from __future__ import annotations

import contextlib
import json
import math
import random
import re
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from apt_hooks import AptConfig, AptError
from apt_hooks.method.deferred_checks import DeferredChecks
from apt_hooks.method.drift import embedding_drift, prediction_drift, prompt_response
from apt_hooks.stop_rule import StopRule
from apt_hooks.training.checkpoint_drifts import SAMPLES, Drifts, fixed_noise
from apt_hooks.training.checkpoints import METADATA, Checkpoints
from apt_hooks.training.held_out import HeldOut
from apt_hooks.training.objective import AptObjective
from apt_hooks.training.reference_model import Reference

# -- the numbers -------------------------------------------------------------------------------------------------------


def test_a_drift_is_measured_in_what_the_prompt_does() -> None:
    without_text, frozen = torch.zeros(3, 1, 2), torch.tensor([[[3.0, 4.0]], [[0.0, 2.0]], [[1.0, 0.0]]])
    moved = torch.tensor([[[3.0, 4.0]], [[0.0, 1.0]], [[0.0, 0.5]]])  # by 5 of 5, by 1 of 2, by 0.5 of 1
    assert prediction_drift(frozen + moved, frozen, without_text) == pytest.approx(0.5)
    assert prediction_drift(frozen, frozen, without_text) == 0


def test_a_drift_is_the_same_for_what_predicts_v() -> None:
    torch.manual_seed(0)
    a, s = torch.rand(2, SAMPLES, 1, 1) + 0.1
    noisy, *v = torch.randn(4, SAMPLES, 4, 4)
    epsilon = [a * each + s * noisy for each in v]
    assert prediction_drift(*v) == pytest.approx(prediction_drift(*epsilon))


def test_a_model_that_does_not_hear_its_text_drifts_endlessly_and_one_that_is_not_moved_does_not() -> None:
    frozen = torch.ones(2, 3)
    assert prediction_drift(frozen + 1, frozen, frozen) == math.inf
    assert prediction_drift(frozen, frozen, frozen) == 0


def test_a_response_is_what_is_left_of_what_the_prompt_does() -> None:
    torch.manual_seed(0)
    frozen, without_text, learned = torch.randn(3, 5, 2, 3)
    said = frozen - without_text
    # What is learned with and without text alike is no matter, and neither is what lies across.
    for share in (0.0, 0.25, 1.0, 2.0):
        tuned_without_text = without_text + 10 * learned
        tuned = tuned_without_text + share * said
        assert prompt_response(tuned, tuned_without_text, frozen, without_text) == pytest.approx(share, abs=1e-5)
    across = torch.randn(5, 6)
    across -= (
        (across * said.flatten(1)).sum(1, keepdim=True)
        / said.flatten(1).square().sum(1, keepdim=True)
        * (said.flatten(1))
    )
    moved = without_text + 0.5 * said + across.view_as(said)
    assert prompt_response(moved, without_text, frozen, without_text) == pytest.approx(0.5, abs=1e-5)


def test_a_response_is_the_median_and_the_same_for_what_predicts_v() -> None:
    without_text = torch.zeros(3, 2)
    frozen = torch.tensor([[1.0, 0.0], [0.0, 2.0], [4.0, 0.0]])
    tuned = frozen * torch.tensor([[0.9], [0.5], [-100.0]])
    assert prompt_response(tuned, without_text, frozen, without_text) == pytest.approx(0.5)
    torch.manual_seed(0)
    a, s = torch.rand(2, SAMPLES, 1, 1) + 0.1
    noisy, *v = torch.randn(5, SAMPLES, 4, 4)
    epsilon = [a * each + s * noisy for each in v]
    assert prompt_response(*v) == pytest.approx(prompt_response(*epsilon), rel=1e-4)


def test_a_model_that_does_not_hear_its_text_has_no_response_to_lose() -> None:
    frozen = torch.ones(2, 3)
    assert math.isnan(prompt_response(frozen, frozen, frozen, frozen))
    heard = torch.tensor([[2.0, 1.0, 1.0], [1.0, 1.0, 1.0]])  # in one of two samples
    assert prompt_response(1 + 0.5 * (heard - 1), frozen, heard, frozen) == pytest.approx(0.5)


def test_embeddings_drift_in_units_of_how_far_they_lie_apart() -> None:
    frozen = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert embedding_drift(frozen + torch.tensor([0.0, 0.5]), frozen) == pytest.approx(0.5)
    assert embedding_drift(frozen, frozen) == 0


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(AptError, match="one shape"):
        prediction_drift(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(3))
    with pytest.raises(AptError, match="one shape"):
        prompt_response(*[torch.zeros(2, 3)] * 3, torch.zeros(3))
    with pytest.raises(AptError, match="two or more"):
        embedding_drift(torch.zeros(1, 3), torch.zeros(1, 3))


# -- the rule ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "gammas", "line", "met"),
    [
        ("class_drift > 0.5", [], {"class_drift": 0.6}, "class_drift > 0.5"),
        ("class_drift > 0.5", [], {"class_drift": 0.5}, None),
        ("class_drift > 0.5", [], {"class_drift": None}, None),
        ("gamma > 0.9 for 3 steps", [0.5, 0.95, 0.95, 0.95], {}, "gamma > 0.9 for 3 steps"),
        ("gamma > 0.9 for 3", [0.95, 0.5, 0.95, 0.95], {}, None),
        ("gamma > 0.9 for 3", [0.95, 0.95], {}, None),
        ("gamma > 0.9", [0.1, math.nan], {}, None),
        ("held_out_gap < 0", [], {"held_out_gap": [0.1, None, -0.3]}, "held_out_gap < 0"),
        ("gamma > 0.5 and held_out_gap < 0", [0.9], {"held_out_gap": [0.1]}, None),
        ("gamma > 0.95 or text_drift > 1e-1", [0.9], {"text_drift": 0.2}, "text_drift > 0.1"),
        ("prompt_response < 0.25", [0.9], {"prompt_response": 0.2}, "prompt_response < 0.25"),
    ],
)
def test_a_rule_says_which_part_of_it_holds(text: str, gammas: list[float], line: dict[str, Any], met: Any) -> None:
    assert StopRule(text).met(gammas, line) == met


@pytest.mark.parametrize(
    "text",
    ["", "gamma", "gamma >= 1", "class_drift > 1 for 3", "gamma > 0.9 for 0", "gamma > x", "gamma > inf"],
)
def test_what_is_no_rule_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(AptError, match=r"\[apt\] stop must be .* such as .*gamma > 0\.9 for 200 steps"):
        AptConfig(stop=text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("loss > 1", "loss is nothing that is measured. A rule is about gamma, class_drift, "),
        ("Gamma > 0.9", 'Gamma is nothing that is measured; did you mean "gamma"? A rule is about gamma, '),
        ("gamma > 0.9 or class-drift > 1", 'class-drift is nothing that is measured; did you mean "class_drift"?'),
        ("gamma > 90", "gamma is from 0 to 1, so gamma > 90 never holds: compare it with a number between 0 and 1"),
        ("gamma > 1", "gamma > 1 never holds"),
        ("gamma > -1 and free_drift > 1", "gamma is from 0 to 1, so gamma > -1 always holds"),
        ("free_drift > 1 and gamma < 2", "gamma is from 0 to 1, so gamma < 2 always holds"),
        ("free_drift > 1 and gamma < 0", "gamma < 0 never holds"),
        ("class_drift > -1", "class_drift is never below 0, so class_drift > -1 always holds: compare it with a "),
        ("gamma > 0.9 and text_drift < 0", "text_drift is never below 0, so text_drift < 0 never holds"),
        (
            "prompt_response > 0.25",
            "a high prompt_response is good, and a rule ends the training; did you mean prompt_response <?",
        ),
        ("class_drift > 1 or held_out_gap > 0", "did you mean held_out_gap <?"),
        ("gamma < 0.5 and held_out_gap > 0", "a low gamma is good, and a rule ends the training; did you mean gamma >"),
        *((f"{name} < 0.5", f"did you mean {name} >?") for name in ("class_drift", "free_drift", "text_drift")),
    ],
)
def test_a_rule_that_cannot_be_meant_is_refused_with_the_part_and_the_reason(text: str, said: str) -> None:
    with pytest.raises(AptError, match="^" + re.escape(f"[apt] stop = {text!r}: ") + ".*" + re.escape(said)):
        AptConfig(stop=text)


@pytest.mark.parametrize(
    "text", ["gamma > 0", "class_drift > 1 and gamma < 0.5", "held_out_gap < 9", "prompt_response < 0"]
)
def test_a_rule_may_narrow_down_what_is_bad_and_have_any_bound_that_can_be_crossed(text: str) -> None:
    assert AptConfig(stop=text).stop == text


# -- measuring ---------------------------------------------------------------------------------------------------------


class Probe:
    """A model that draws random numbers, as dropout would, and one of two text encoders."""

    def __init__(self, model: nn.Module, embeds: bool) -> None:
        self.model, self.embeds, self.calls = model, embeds, 0

    def predict(self, prompts: Any) -> Tensor:
        assert len(prompts) == SAMPLES and not self.model.training and not torch.is_grad_enabled()
        self.calls += 1
        random.random(), numpy.random.rand(), torch.rand(1)
        words = torch.tensor([[float(len(prompt)), 1.0] for prompt in prompts])
        return self.model(words + fixed_noise((2,)))

    def embed(self, texts: Any) -> Tensor | None:
        return self.model(torch.tensor([[float(len(text)), 0.0] for text in texts])) if self.embeds else None


def drifts_of(embeds: bool = True, class_prompt: str | None = "a photo of a dog") -> tuple[Drifts, Probe, nn.Linear]:
    model = nn.Linear(2, 2)

    @contextlib.contextmanager
    def off() -> Any:
        weight = model.weight.detach().clone()
        with torch.no_grad():
            model.weight.copy_(torch.eye(2))
        yield
        with torch.no_grad():
            model.weight.copy_(weight)

    with torch.no_grad():
        model.weight.copy_(torch.eye(2))
    probe = Probe(model, embeds)
    reference = Reference("base", [model], off, model.named_parameters(), DeferredChecks())
    return Drifts(reference, probe, class_prompt), probe, model


def test_a_model_that_was_not_trained_has_not_drifted_and_one_that_was_has() -> None:
    drifts, probe, model = drifts_of()
    assert drifts.measure() == {"class_drift": 0, "free_drift": 0, "prompt_response": 1, "text_drift": 0}
    assert probe.calls == 6  # the empty prompt, neutral ones, the class: frozen, and as trained
    with torch.no_grad():
        model.weight.mul_(1.5)
    found = drifts.measure()
    assert probe.calls == 9 and all(value is not None and value > 0 for value in found.values())
    assert found["prompt_response"] == pytest.approx(1.5)
    assert drifts.measure() == found
    without, *_ = drifts_of(embeds=False, class_prompt=None)
    nothing = {"class_drift": None, "text_drift": None}
    assert without.measure() == {**nothing, "free_drift": 0, "prompt_response": 1}


def test_measuring_leaves_random_streams_modes_and_gradients_as_they_were() -> None:
    drifts, _, model = drifts_of()
    random.seed(1), numpy.random.seed(2), torch.manual_seed(3)
    expected = random.random(), numpy.random.rand(), torch.rand(2)
    random.seed(1), numpy.random.seed(2), torch.manual_seed(3)
    model.train()
    drifts.measure()
    assert random.random() == expected[0] and numpy.random.rand() == expected[1]
    assert torch.equal(torch.rand(2), expected[2])
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())


# -- held-out pictures -------------------------------------------------------------------------------------------------


def held_out_of(compare: Any, **config: Any) -> tuple[HeldOut, AptObjective]:
    off = {"augmentation": False, "lambda_dist": 0.0, "lambda_attn": 0.0}
    objective = AptObjective(AptConfig(**off, num_bins=4, **config), nn.Linear(1, 1), contextlib.nullcontext)
    return HeldOut(objective, compare), objective


TIMES = torch.tensor([0, 10, 999])
TARGET = torch.zeros(3, 1, 1, 2)
TUNED = torch.tensor([1.0, 2.0, 3.0])[:, None, None, None].expand(3, 1, 1, 2)
FROZEN = torch.tensor([2.0, 3.0, 1.0])[:, None, None, None].expand(3, 1, 1, 2)


def test_the_held_out_gap_is_a_mean_by_bin_over_one_pass_and_no_part_of_gamma() -> None:
    def compare(held_out: HeldOut) -> None:
        assert not torch.is_grad_enabled()
        random.random(), numpy.random.rand(), torch.rand(1)
        held_out.add(TUNED, FROZEN, TARGET, TIMES)
        held_out.add(TUNED, 2 * FROZEN, TARGET, TIMES, instances=torch.tensor([True, False, False]))

    held_out, objective = held_out_of(compare)
    random.seed(1), torch.manual_seed(3)
    expected = random.random(), torch.rand(2)
    random.seed(1), torch.manual_seed(3)
    wanted = [pytest.approx(((4 - 1) + (9 - 4) + (16 - 1)) / 3, rel=1e-4), None, None, 1 - 9]
    assert held_out.measure() == wanted
    assert held_out.measure() == wanted  # each pass by itself
    assert random.random() == expected[0] and torch.equal(torch.rand(2), expected[1])
    assert objective.indicator.gaps.isnan().all()


def test_the_held_out_gap_has_the_units_and_the_mask_of_the_indicator() -> None:
    scale, mask = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 0.0]).expand(3, 1, 1, 2)

    def compare(held_out: HeldOut) -> None:
        tuned = TUNED * torch.tensor([1.0, 50.0])  # where the mask is 0
        held_out.add(tuned, FROZEN, TARGET, TIMES, error_scale=scale, mask=mask)

    assert held_out_of(compare)[0].measure() == [(3 + 4 * 5) / 2, None, None, 9 * -8]
    assert held_out_of(compare, indicator_space="target")[0].measure() == [(3 + 5) / 2, None, None, -8]


def test_a_line_has_the_held_out_gap_a_rule_may_name_it_and_what_breaks_it_ends_no_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def compare(held_out: HeldOut) -> None:
        if (tmp_path / "broken").exists():
            raise torch.OutOfMemoryError("out of\nmemory")
        held_out.add(TUNED, FROZEN, TARGET, TIMES)

    path, rule = tmp_path / "lora-checkpoints.jsonl", "held_out_gap < -1"  # a mean of 4 and -8
    with pytest.raises(AptError, match=r"stop names held_out_gap, .*; found stop = 'held_out_gap < -1' without"):
        Checkpoints(path, rule=rule)
    checkpoints = Checkpoints(path, held_out=held_out_of(compare)[0], rule=rule)
    assert "held-out gap" in checkpoints.in_words()
    assert save(checkpoints, tmp_path, 1)["held_out_gap"] == [4, None, None, -8]
    assert checkpoints.stop is not None and checkpoints.stop.startswith("held_out_gap < -1 at step 1")
    (tmp_path / "broken").touch()
    assert save(checkpoints, tmp_path, 2)["held_out_gap"] is None
    assert save(checkpoints, tmp_path, 3)["held_out_gap"] is None
    said = [record.message for record in caplog.records if "held-out" in record.message]
    assert said == ["apt-hooks: the held-out gap is off from here on: OutOfMemoryError: out of memory"]


# -- the file ----------------------------------------------------------------------------------------------------------


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text().splitlines()]


def step_line(gamma: float = 0.5) -> dict[str, Any]:
    return {"gamma": [gamma, 0.0], "gap": [0.1, None], "delta_noise": 0.02}


def save(checkpoints: Checkpoints, folder: Path, step: int) -> dict[str, Any]:
    line = checkpoints.measure(step, [0.5, 0.0], [0.1, math.nan])
    file = folder / f"lora-{step}.safetensors"
    file.write_bytes(f"of step {step}".encode())
    checkpoints.saved(line, file)
    return line


def test_a_rule_about_text_encoders_that_are_not_trained_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    drifts, _, _ = drifts_of(embeds=False)
    rule = "text_drift > 1 or class_drift > 9"
    checkpoints = Checkpoints(tmp_path / "lora-checkpoints.jsonl", drifts, rule=rule)
    for step in (1, 2):
        checkpoints.took(step_line())
        assert save(checkpoints, tmp_path, step)["stop"] is None
    told = [record.getMessage() for record in caplog.records if "stop names" in record.getMessage()]
    assert told == ["apt-hooks: stop names text_drift, which is not measured here: that part of the rule holds never"]


def test_delta_noise_is_of_the_last_fifty_steps_that_have_it(tmp_path: Path) -> None:
    checkpoints, found = Checkpoints(tmp_path / "lora-checkpoints.jsonl"), []
    for step in range(1, 132):  # a frozen pass in every 60th: 1, 61, 121; the first has nothing moved yet
        value = step / 1000 if step % 60 == 1 else None
        checkpoints.took({**step_line(), "delta_noise": value if step > 1 else 0.0})
        if step in (1, 50, 51, 61, 110, 111, 131):
            found.append(checkpoints.measure(step, [0.5], [0.1])["delta_noise"])
    assert found == [0.0, 0.0, None, 0.061, 0.061, None, 0.121]


def test_each_checkpoint_has_a_line_and_carries_it(tmp_path: Path) -> None:
    drifts, _, model = drifts_of()
    checkpoints = Checkpoints(tmp_path / "lora-checkpoints.jsonl", drifts)
    assert checkpoints.in_words() == "drifts of checkpoints"
    for step in (1, 2):
        checkpoints.took(step_line())
        line = save(checkpoints, tmp_path, step)
        with torch.no_grad():
            model.weight.mul_(1.5)
    run, one, two = lines(tmp_path / "lora-checkpoints.jsonl")
    assert run["run"]["class"] == "a photo of a dog" and len(run["run"]["free"]) == 3
    assert (one["step"], one["file"], one["gamma"], one["gap"]) == (1, "lora-1.safetensors", [0.5, None], [0.1, None])
    assert one["delta_noise"] == pytest.approx(0.02) and one["class_drift"] == 0 and two["class_drift"] > 0
    carried = json.loads(checkpoints.metadata(line)[METADATA])
    assert carried["class_drift"] == two["class_drift"] and "seconds" not in carried  # the same file again
    assert not list(tmp_path.glob("*-best*")) and checkpoints.stop is None  # without a rule none is marked


def test_a_rule_keeps_the_last_checkpoint_before_it_held(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "lora-checkpoints.jsonl", off="drifts = false", rule="gamma > 0.9 for 2")
    for step, gamma in enumerate((0.5, 0.95, 0.95), 1):
        checkpoints.took(step_line(gamma))
        assert checkpoints.stop is None
        save(checkpoints, tmp_path, step)
    assert checkpoints.stop == "gamma > 0.9 for 2 steps at step 3; lora-best.safetensors is the LoRA of step 2"
    assert (tmp_path / "lora-best.safetensors").read_bytes() == b"of step 2"
    run, *found = lines(tmp_path / "lora-checkpoints.jsonl")
    assert run["run"]["off"] == "drifts = false" and [line["stop"] for line in found] == [
        None,
        None,
        "gamma > 0.9 for 2 steps",
    ]


def test_an_earlier_runs_file_is_kept_and_a_resumed_ones_continued(tmp_path: Path) -> None:
    path = tmp_path / "lora-checkpoints.jsonl"
    for _ in range(2):
        checkpoints = Checkpoints(path)
        save(checkpoints, tmp_path, 1), save(checkpoints, tmp_path, 2)
    assert [line["step"] for line in lines(tmp_path / "lora-checkpoints.1.jsonl")[1:]] == [1, 2]
    resumed = Checkpoints(path)
    resumed.resumed(1)
    save(resumed, tmp_path, 2)
    assert [line.get("step") for line in lines(path)] == [None, 1, None, 2]


def test_a_later_rank_writes_and_measures_nothing(tmp_path: Path) -> None:
    drifts, probe, _ = drifts_of()
    checkpoints = Checkpoints(None, drifts, rule="class_drift > 0")
    save(checkpoints, tmp_path, 1)
    assert probe.calls == 0 and checkpoints.stop is None and len(list(tmp_path.iterdir())) == 1
