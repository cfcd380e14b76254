import json
import logging

import pytest
import torch
from runs import lines, make_run, make_step

from apt_hooks import AptError
from apt_hooks.training.resume import STATE_FILE, load_state, save_state


def test_saving_writes_the_lines_up_to_its_step_first(tmp_path):
    run = make_run(tmp_path)
    run.record(make_step())
    save_state(run, tmp_path)
    assert [line["step"] for line in lines(tmp_path / "log.jsonl")] == [1]


def test_state_round_trip_keeps_step_indicator_and_the_place_in_the_random_stream(tmp_path):
    first = make_run(tmp_path)
    first.objective.indicator.update(torch.tensor([5, 505]), torch.tensor([0.1, 0.2]), torch.tensor([0.1004, 0.2005]))
    first.record(make_step(), ends_step=False)
    first.record(make_step())
    save_state(first, tmp_path)
    second = make_run(tmp_path)
    assert load_state(second, tmp_path) is True
    assert second.step == 1
    assert torch.equal(second.objective.indicator.gammas, first.objective.indicator.gammas)
    assert torch.equal(torch.rand(9, generator=second.generator()), torch.rand(9, generator=first.generator()))


def test_a_state_of_half_a_step_is_warned_of(tmp_path, caplog):
    run = make_run(tmp_path)
    run.objective.indicator.add(torch.tensor([5]), torch.tensor([0.1]), torch.tensor([0.2]))
    save_state(run, tmp_path)
    assert "is saved in the middle of step 1" in caplog.text
    caplog.clear()
    run.objective.indicator.end_step()
    save_state(run, tmp_path)
    assert not caplog.text


def test_the_place_between_two_frozen_passes_comes_back(tmp_path):
    first = make_run(tmp_path, frozen_every=3)
    first.objective.steps = 2
    save_state(first, tmp_path)
    second = make_run(tmp_path, frozen_every=3)
    assert load_state(second, tmp_path)
    assert not second.objective.passes().due
    second.objective.steps += 1
    assert second.objective.passes().due


def test_a_folder_without_state_is_warned_about_and_changes_nothing(tmp_path, caplog):
    run = make_run(tmp_path)
    run.record(make_step())
    with caplog.at_level(logging.WARNING, "apt_hooks"):
        assert load_state(run, tmp_path) is False
    (record,) = caplog.records
    assert f"{tmp_path} has no {STATE_FILE}" in record.getMessage()
    assert run.step == 1


def broken(change):
    """The text of a saved state after a change."""
    indicator = {"num_bins": 10, "num_train_timesteps": 1000, "loss_tuned": [None] * 10, "loss_frozen": [None] * 10}
    state = {"format": 1, "step": 3, "batches": 3, "indicator": indicator}
    change(state)
    return json.dumps(state)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"format": 1, "step"',
        b"[1]",
        b"\xff\xfe",
        broken(lambda s: s.pop("batches")).encode(),
        broken(lambda s: s.update(step="three")).encode(),
        broken(lambda s: s.update(indicator=None)).encode(),
        broken(lambda s: s["indicator"].pop("loss_frozen")).encode(),
        broken(lambda s: s["indicator"].update(loss_tuned=["x"] * 10)).encode(),
        broken(lambda s: s["indicator"].update(loss_tuned=[0.5] * 3, loss_frozen=[0.5] * 3)).encode(),
    ],
    ids=[
        "empty",
        "cut off",
        "a list",
        "not UTF-8",
        "without batches",
        "step is text",
        "no indicator",
        "indicator without a row",
        "averages are text",
        "averages too few",
    ],
)
def test_a_broken_state_file_is_one_error_that_names_it_and_changes_nothing(tmp_path, content):
    (tmp_path / STATE_FILE).write_bytes(content)
    run = make_run(tmp_path)
    with pytest.raises(AptError) as caught:
        load_state(run, tmp_path)
    assert str(tmp_path / STATE_FILE) in str(caught.value)
    assert run.step == 0
    assert run.objective.indicator.gammas.tolist() == [0.0] * 10


def test_a_state_of_other_bins_is_refused(tmp_path):
    save_state(make_run(tmp_path), tmp_path)
    with pytest.raises(AptError, match="the saved indicator has num_bins = 10, this run 5"):
        load_state(make_run(tmp_path, num_bins=5), tmp_path)


def test_a_state_folder_that_is_missing_is_an_error(tmp_path):
    with pytest.raises(AptError, match="cannot be written"):
        save_state(make_run(tmp_path), tmp_path / "missing")


@pytest.mark.parametrize(("saved", "resumed"), [("target", "epsilon"), ("epsilon", "target")])
def test_a_state_of_other_units_is_refused_and_the_key_that_fits_is_named(tmp_path, saved, resumed):
    save_state(make_run(tmp_path, target="v_prediction", indicator_space=saved), tmp_path)
    assert load_state(make_run(tmp_path, target="v_prediction", indicator_space=saved), tmp_path)
    with pytest.raises(AptError, match=f'indicator_space = "{saved}"'):
        load_state(make_run(tmp_path, target="v_prediction", indicator_space=resumed), tmp_path)
