import datetime
import gc
import json
import math
import os
import sys
import weakref
from pathlib import Path

import pytest
import torch
from models import make_tuned
from runs import GAMMAS, GAPS, KEYS, lines, make_run, make_step, moved, numbers

from apt_hooks import AptConfig, AptError, AptObjective
from apt_hooks.training.resume import load_state, save_state
from apt_hooks.training.run import AptRun, version
from apt_hooks.training.steplog import StepLog


def test_one_line_a_step_with_exactly_these_keys(tmp_path):
    run = make_run(tmp_path)
    for loss in (1.0, 2.0, 3.0):
        run.record(make_step(loss_tuned=loss))
    run.close()
    written = lines(tmp_path / "log.jsonl")
    assert [list(line) for line in written] == [KEYS] * 3
    assert [(line["step"], line["loss_tuned"]) for line in written] == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert (written[0]["gamma"], written[0]["gap"]) == (GAMMAS, GAPS)


def test_accumulated_batches_make_one_line_each_weighted_by_its_counted_samples(tmp_path):
    run = make_run(tmp_path)
    run.record(make_step(instances=1, loss_tuned=1.0, l_attn=8.0), moved(1), ends_step=False)
    run.record(make_step(instances=0), moved(0), ends_step=False)
    run.record(make_step(instances=3, loss_tuned=5.0, l_attn=4.0), moved(1))
    run.close()
    (line,) = lines(tmp_path / "log.jsonl")
    # (1 * 1 + 3 * 5) / 4, (1 * 8 + 3 * 4) / 4, and 2 of 4 instances moved.
    assert (line["step"], line["loss_tuned"], line["l_attn"], line["augmented"]) == (1, 4.0, 5.0, 0.5)


def _rank(rank, folder):
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # the machine's name may not resolve
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    run = make_run(Path(folder), log=None if rank else "log.jsonl", rank=rank)
    # Rank 0 has one sample that counts, rank 1 has three; then rank 1 has none, and no rank has `l_attn`.
    run.record(
        make_step(instances=(1, 3)[rank], loss_tuned=(1.0, 5.0)[rank], l_attn=(None, 4.0)[rank]), moved((1, 0)[rank])
    )
    seen = [run.tracker_values()]
    run.record(make_step(instances=(2, 0)[rank], loss_tuned=7.0, l_attn=None))
    Path(folder, f"{rank}.json").write_text(json.dumps([*seen, run.tracker_values()]))
    run.close()
    torch.distributed.destroy_process_group()


def test_values_are_over_the_samples_of_all_ranks(tmp_path):
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)
    one, two = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert one == two
    first, second = lines(tmp_path / "log.jsonl")
    assert (first["loss_tuned"], first["augmented"], first["l_attn"]) == (4.0, 0.25, 4.0)
    assert (second["loss_tuned"], second["l_attn"], second["gamma"]) == (7.0, None, GAMMAS)
    assert one[0]["apt/loss_tuned"] == 4.0


def test_a_value_is_the_mean_over_the_batches_that_have_it(tmp_path):
    run = make_run(tmp_path)
    run.record(make_step(instances=1, loss_frozen=6.0, loss_weight=1.0), ends_step=False)
    run.record(make_step(instances=3, loss_frozen=None, loss_weight=5.0))  # without frozen pass
    run.close()
    (line,) = lines(tmp_path / "log.jsonl")
    assert (line["loss_frozen"], line["loss_weight"]) == (6.0, 4.0)


def test_a_step_without_counted_samples_has_gamma_gap_and_nulls(tmp_path):
    run = make_run(tmp_path)
    run.record(make_step(instances=0))
    run.close()
    (line,) = lines(tmp_path / "log.jsonl")
    assert line == dict.fromkeys(KEYS) | {"step": 1, "gamma": GAMMAS, "gap": GAPS}


def test_what_is_off_or_not_finite_is_null(tmp_path):
    run = make_run(tmp_path)
    run.record(make_step(l_attn=None, loss_tuned=math.nan, delta_noise=math.inf))
    run.close()
    (line,) = lines(tmp_path / "log.jsonl")
    assert [name for name in KEYS if line[name] is None] == ["loss_tuned", "l_attn", "delta_noise"]


def test_a_line_is_written_when_the_next_step_ends_or_at_a_flush(tmp_path):
    path = tmp_path / "folder" / "log.jsonl"
    log = StepLog(path)
    log.add(make_step(), 0)
    log.end_step(1)
    assert not path.exists()
    log.add(make_step(), 0)
    log.end_step(2)
    assert [line["step"] for line in lines(path)] == [1]
    log.flush()
    log.flush()
    assert [line["step"] for line in lines(path)] == [1, 2]


def test_without_a_path_nothing_is_written_and_the_trackers_still_get_their_values(tmp_path):
    run = make_run(tmp_path, log=None)
    assert run.tracker_values() == {}
    run.record(make_step(loss_tuned=2.0, l_attn=None))
    values = run.tracker_values()
    assert values["apt/loss_tuned"] == 2.0
    assert "apt/l_attn" not in values
    assert [values[f"apt/gamma/{b}"] for b in range(10)] == GAMMAS
    run.close()
    assert list(tmp_path.iterdir()) == []


def test_a_new_run_begins_a_new_log(tmp_path):
    for loss in (1.0, 2.0):
        run = make_run(tmp_path)
        run.record(make_step(loss_tuned=loss))
        run.close()
    assert [line["loss_tuned"] for line in lines(tmp_path / "log.jsonl")] == [2.0]


def test_a_resumed_run_logs_on_behind_its_step_and_drops_what_came_after_it(tmp_path):
    first = make_run(tmp_path)
    for step in range(1, 6):
        first.record(make_step(loss_tuned=float(step)))
        if step == 3:
            save_state(first, tmp_path)
    first.close()
    path = tmp_path / "log.jsonl"
    path.write_text(path.read_text() + '{"step": 2, "gamma": [0.1')  # the piece of a line that a crash leaves
    second = make_run(tmp_path)
    assert load_state(second, tmp_path)
    second.record(make_step(loss_tuned=40.0))
    second.record(make_step(loss_tuned=50.0))
    second.close()
    assert [(line["step"], line["loss_tuned"]) for line in lines(path)] == [(1, 1), (2, 2), (3, 3), (4, 40), (5, 50)]


def test_no_log_of_an_earlier_run_is_lost_and_a_line_says_where_it_is(tmp_path, caplog):
    for loss in (1.0, 2.0, 3.0):
        run = make_run(tmp_path)
        run.record(make_step(loss_tuned=loss))
        save_state(run, tmp_path)
        run.record(make_step(loss_tuned=loss + 0.5))
        run.close()
    resumed = make_run(tmp_path)
    load_state(resumed, tmp_path)
    resumed.record(make_step(loss_tuned=9.0))
    resumed.close()
    found = {path.name: [line["loss_tuned"] for line in lines(path)] for path in tmp_path.glob("*.jsonl")}
    assert found == {
        "log.1.jsonl": [1.0, 1.5],
        "log.2.jsonl": [2.0, 2.5],
        "log.3.jsonl": [3.0, 3.5],  # the resumed run trained the second step anew
        "log.jsonl": [3.0, 9.0],
    }
    assert [message.rpartition(" ")[2] for message in caplog.messages] == [f"log.{i}.jsonl" for i in (1, 2, 3)]


def test_a_run_that_goes_on_where_its_log_ends_leaves_one_log(tmp_path):
    for loss in (1.0, 2.0):
        run = make_run(tmp_path)
        if loss == 2.0:
            load_state(run, tmp_path)
        run.record(make_step(loss_tuned=loss))
        save_state(run, tmp_path)
        run.close()
    assert [path.name for path in tmp_path.glob("*.jsonl")] == ["log.jsonl"]
    assert [line["loss_tuned"] for line in lines(tmp_path / "log.jsonl")] == [1.0, 2.0]


def test_an_earlier_log_that_cannot_be_put_aside_is_an_error_and_stays(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    run = make_run(tmp_path)
    run.record(make_step())
    run.close()
    before = (tmp_path / "log.jsonl").read_bytes()
    again = make_run(tmp_path)
    again.record(make_step())
    monkeypatch.setattr(type(tmp_path), "rename", refuse)
    with pytest.raises(AptError, match=r"log\.jsonl: is of an earlier run, .* log\.1\.jsonl: Permission denied"):
        again.close()
    assert (tmp_path / "log.jsonl").read_bytes() == before


@pytest.mark.parametrize(("resumed", "number", "steps", "trainer"), [
    (False, 1, [1, 2], 0),
    (False, 8, [8, 9], 7),
    (True, 1, [2, 3], 0),
    (True, 2, [2, 3], 1),
])  # fmt: skip
def test_a_trainer_that_begins_later_is_followed_and_one_that_counts_anew_is_told_apart(
    tmp_path, resumed, number, steps, trainer
):
    first = make_run(tmp_path)
    first.record(make_step())
    save_state(first, tmp_path)
    first.close()
    run = make_run(tmp_path)
    if resumed:
        load_state(run, tmp_path)
    run.trainer_counts(0)  # before the first step
    for i in range(2):
        run.record(make_step())
        run.trainer_counts(number + i)
        run.trainer_counts(number + i)  # and at an epoch's end
    run.close()
    written = lines(tmp_path / "log.jsonl", "run")[-1]["run"]
    assert [line["step"] for line in lines(tmp_path / "log.jsonl")][-2:] == steps and run.step == steps[-1]
    assert (written.get("resumed_from", 0), written["trainer_step"]) == (steps[0] - 1, trainer)


def test_the_log_says_first_what_run_it_is_of_and_again_where_it_was_resumed(tmp_path):
    path, first = tmp_path / "log.jsonl", make_run(tmp_path, ema_alpha=0.5)
    first.record(make_step())
    save_state(first, tmp_path)
    first.record(make_step())
    first.close()
    for _ in range(2):  # the second one takes the place of the first, and of what that had written
        resumed = make_run(tmp_path, ema_alpha=0.25)
        load_state(resumed, tmp_path)
        resumed.record(make_step())
        resumed.close()
    assert [next(iter(json.loads(text))) for text in path.read_text().splitlines()] == ["run", "step", "run", "step"]
    begun, again = (line["run"] for line in lines(path, "run"))
    assert (begun["config"]["ema_alpha"], again["config"]["ema_alpha"]) == (0.5, 0.25)
    assert begun["overrides"]["ema_alpha"] == 0.5
    assert ("resumed_from" in begun, again["resumed_from"]) == (False, 1)
    assert begun["torch"] == torch.__version__
    loaded, started = (datetime.datetime.fromisoformat(begun[key]) for key in ("loaded", "started"))
    assert loaded <= started and started.utcoffset() == started.astimezone().utcoffset()


def test_the_random_stream_is_another_for_every_batch_and_the_same_until_the_batch_is_assessed(tmp_path):
    run = make_run(tmp_path, log=None)
    drawn = []
    for ends_step in (False, True, True):
        assert numbers(run) == numbers(run)
        drawn.append(numbers(run))
        passes = run.objective.passes(instances=torch.tensor([False]))
        passes.end_tuned(torch.zeros(1, 4, 8, 8))
        passes.step(torch.zeros(1, 4, 8, 8), torch.tensor([3]), ends_step=ends_step)
    assert len(set(drawn)) == 3


def test_the_random_stream_is_another_for_every_seed_and_rank(tmp_path):
    runs = [make_run(tmp_path, log=None, seed=seed, rank=rank) for seed in (0, 1, 2) for rank in (0, 1)]
    assert len({numbers(run) for run in runs}) == 6


def test_the_random_stream_is_not_the_trainers(tmp_path):
    run = make_run(tmp_path, log=None)
    before = torch.get_rng_state()
    numbers(run)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_log_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    run = make_run(tmp_path, log="file/log.jsonl")
    run.record(make_step())
    with pytest.raises(AptError, match="file"):
        run.close()


def test_closing_takes_the_hooks_off_even_where_the_log_fails(tmp_path, monkeypatch):
    def fail():
        raise AptError("disk full")

    unet, network = make_tuned("up_blocks")
    run = AptRun(AptObjective(AptConfig(), unet, network.off), log_path=None, augment_space="image")
    monkeypatch.setattr(run.log, "flush", fail)
    with pytest.raises(AptError, match="disk full"):
        run.close()
    assert sum(len(m._forward_hooks) for m in unet.modules()) == 0


@pytest.mark.parametrize("ends_step", [False, True])
def test_the_log_does_not_keep_the_graph_of_a_step_alive(tmp_path, ends_step):
    run, step = make_run(tmp_path), make_step()
    prediction = weakref.ref(step.prediction)
    run.record(step, ends_step=ends_step)
    del step
    gc.collect()
    assert prediction() is None


def test_the_start_line_says_what_is_on(tmp_path):
    unet, network = make_tuned("output_blocks")
    config = AptConfig.from_mapping({"preset": "sdxl", "num_bins": 5})
    run = AptRun(AptObjective(config, unet, network.off), log_path=tmp_path / "a.jsonl", augment_space="latent")
    assert run.start_line().split(" | ") == [
        f"apt-hooks {version()} is on",
        "preset sdxl",
        "overrides num_bins = 5",
        "up-blocks 0, 1: 3 cross-attention layers, 3 hidden states",
        "augmentation of latents",
        f"log {tmp_path / 'a.jsonl'}",
    ]


def test_the_start_line_tells_what_the_objective_ignores(tmp_path):
    config = AptConfig.from_mapping({"preset": "sdxl", "objective": "dco", "lambda_attn": 0.5, "zoom_out": [1, 2]})
    run = AptRun(AptObjective(config, torch.nn.Linear(1, 1), torch.no_grad), log_path=None, augment_space="image")
    assert run.start_line().split(" | ")[2:] == [
        'overrides objective = "dco", zoom_out = [1.0, 2.0]',
        "no regularizers",
        "no augmentation",
        'objective "dco" ignores lambda_attn = 0.5, zoom_out = [1, 2]',
        "no log",
    ]


def test_a_stop_rule_that_nothing_would_follow_is_refused_at_start():
    config = AptConfig.from_mapping({"stop": "gamma > 0.9 for 200 steps", "lambda_dist": 0, "lambda_attn": 0})
    run = AptRun(AptObjective(config, torch.nn.Linear(1, 1), torch.no_grad), log_path=None, augment_space="image")
    with pytest.raises(AptError, match=r"^\[apt\] stop needs an adapter that measures checkpoints"):
        run.start_line()


def test_the_start_line_tells_the_joint_regularizer(tmp_path):
    unet, network = make_tuned("output_blocks")
    config = AptConfig.from_mapping({"preset": "sdxl", "regularizer": "joint"})
    run = AptRun(AptObjective(config, unet, network.off), log_path=None, augment_space="latent")
    assert "up-blocks 0, 1: 3 outputs of cross-attention" in run.start_line().split(" | ")


@pytest.mark.parametrize(
    ("space", "target", "units"),
    [
        ("auto", "epsilon", "epsilon"),
        ("auto", "v_prediction", "epsilon"),
        ("epsilon", "sample", "epsilon"),
        ("target", "v_prediction", "v_prediction"),
        ("target", "flow", "flow"),
    ],
)
def test_the_units_of_gamma_are_in_the_metadata_and_where_they_are_not_the_trainers_in_the_start_line(
    tmp_path, space, target, units
):
    run = make_run(tmp_path, target=target, indicator_space=space)
    assert run.metadata()["ss_apt_indicator_units"] == units
    said = f"gamma in epsilon units (the model predicts {target})"
    assert (said in run.start_line().split(" | ")) == (units != target)
    run.record(make_step())
    run.close()
    assert lines(tmp_path / "log.jsonl", "run")[0]["run"]["indicator_units"] == units


def test_a_target_of_unknown_units_is_refused_but_where_it_is_measured_as_it_is(tmp_path):
    with pytest.raises(AptError, match="the model predicts 'noise'"):
        make_run(tmp_path, target="noise")


def test_the_start_line_says_what_is_off(tmp_path):
    assert make_run(tmp_path, log=None, monitor_only=True).start_line().split(" | ") == [
        f"apt-hooks {version()} monitors only",
        "no preset",
        "overrides monitor_only = true, lambda_dist = 0.0, lambda_attn = 0.0",
        "no regularizers",
        "no augmentation",
        "no log",
    ]


def test_metadata_is_text_from_which_the_configuration_can_be_had_again(tmp_path):
    run = make_run(tmp_path, augment_space="latent", identifier="sks", class_word="dog")
    run.objective.indicator.update(torch.tensor([5]), torch.tensor([0.1]), torch.tensor([0.1005]))
    run.record(make_step())
    metadata = run.metadata()
    assert all(isinstance(value, str) for value in metadata.values())
    assert AptConfig.from_mapping(json.loads(metadata["ss_apt_config"])) == run.objective.config
    assert (metadata["ss_apt_steps"], metadata["ss_apt_augment_space"], metadata["ss_apt_preset"]) == (
        "1",
        "latent",
        "",
    )
    assert json.loads(metadata["ss_apt_gamma"]) == pytest.approx([1 - math.exp(-0.5)] + [0.0] * 9, abs=1e-4)


def test_the_weight_of_l2_sps_penalty_is_told_where_it_was_left_open(tmp_path):
    for config, weight in (({"objective": "l2-sp"}, 0.001), ({"lambda_offset": 2}, 2.0), ({}, None)):
        run = make_run(tmp_path, **config)
        assert json.loads(run.metadata()["ss_apt_config"]).get("lambda_offset") == weight
        assert ("weights' offset (L2-SP) times" in run.start_line()) == (weight is not None)
        run.close()
        watched = make_run(tmp_path, **config, monitor_only=True)  # which adds no penalty
        assert " times " not in watched.start_line()
        assert ("weights' offset" in watched.start_line()) == (weight is not None)
        watched.close()
