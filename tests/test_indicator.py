import json
import math
import os
import sys
from pathlib import Path

import pytest
import torch

from apt_hooks import AptError, OverfittingIndicator
from apt_hooks.method.indicator import sigma_bins


def updated(timesteps, tuned, frozen, **kwargs):
    indicator = OverfittingIndicator(**kwargs)
    indicator.update(torch.tensor(timesteps), torch.tensor(tuned), torch.tensor(frozen))
    return indicator


@pytest.mark.parametrize(("gap", "gamma"), [(0.0039, 0.98), (0.0005, 0.39)])
def test_gamma_is_what_the_papers_plot_shows(gap, gamma):
    indicator = updated([50], [0.1], [0.1 + gap], scale=1000.0)
    assert float(indicator.gammas[0]) == pytest.approx(gamma, abs=0.005)


@pytest.mark.parametrize(("gap", "gamma"), [(0.0, 0.0), (-0.002, 0.0), (-10.0, 0.0), (10.0, 1.0)])
def test_gamma_is_clamped_to_0_and_1(gap, gamma):
    assert float(updated([0], [20.0], [20.0 + gap]).gammas[0]) == gamma


def test_the_scale_is_that_of_the_equation():
    assert float(updated([0], [0.1], [0.2], scale=7.0).gammas[0]) == pytest.approx(1 - math.exp(-0.7), rel=1e-6)


def test_gaps_are_the_averages_difference_and_nan_for_a_bin_never_seen():
    gaps = updated([0, 150], [1.0, 3.0], [1.5, 2.0], num_bins=10).gaps
    assert gaps[:2].tolist() == [0.5, -1.0]
    assert gaps[2:].isnan().all()


def test_the_first_value_initialises_the_average_and_later_ones_move_it():
    indicator = OverfittingIndicator(ema_alpha=0.25)
    for tuned, frozen in [(1.0, 2.0), (3.0, 6.0), (5.0, 2.0)]:
        indicator.update(torch.tensor([0]), torch.tensor([tuned]), torch.tensor([frozen]))
    state = indicator.state_dict()
    # 1 -> 0.75 + 0.75 = 1.5 -> 1.125 + 1.25 = 2.375;  2 -> 1.5 + 1.5 = 3 -> 2.25 + 0.5 = 2.75
    assert (state["loss_tuned"][0], state["loss_frozen"][0]) == (2.375, 2.75)


def test_several_samples_of_one_bin_are_one_update_with_their_mean():
    indicator = updated([0], [1.0], [1.0], ema_alpha=0.5)
    indicator.update(torch.tensor([10, 150, 20]), torch.tensor([2.0, 9.0, 4.0]), torch.tensor([3.0, 9.0, 7.0]))
    state = indicator.state_dict()
    assert (state["loss_tuned"][:2], state["loss_frozen"][:2]) == ([2.0, 9.0], [3.0, 9.0])


@pytest.mark.parametrize(
    ("bins", "length", "timestep", "bin_"),
    [
        (10, 1000, 0, 0),
        (10, 1000, 99, 0),
        (10, 1000, 100, 1),
        (10, 1000, 999, 9),
        (3, 10, 3, 0),
        (3, 10, 4, 1),
        (4, 4, 3, 3),
    ],
)
def test_bins_are_of_equal_width(bins, length, timestep, bin_):
    indicator = updated([timestep], [0.0], [1.0], num_bins=bins, num_train_timesteps=length)
    assert indicator.gammas.nonzero().flatten().tolist() == [bin_]


def test_a_bin_never_seen_has_gamma_0_and_its_sample_too():
    indicator = updated([50], [0.1], [0.2])
    assert indicator.gammas[1:].tolist() == [0.0] * 9
    gamma = indicator.gamma(torch.tensor([999, 99]))
    assert gamma.dtype == torch.float32
    assert gamma.tolist() == [0.0, 1.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("model", [0, 1])
def test_a_sample_with_a_loss_that_is_not_finite_is_left_out_with_both_losses(bad, model):
    losses = torch.tensor([[1.0, 2.0, 5.0], [3.0, 4.0, 6.0]])
    losses[model, 0] = bad
    indicator = OverfittingIndicator()
    indicator.update(torch.tensor([0, 1, 500]), *losses)
    state = indicator.state_dict()
    assert (state["loss_tuned"][0], state["loss_frozen"][0], state["loss_tuned"][5]) == (2.0, 4.0, 5.0)


def test_a_batch_of_bad_samples_only_leaves_a_bin_unseen():
    assert updated([0], [math.nan], [1.0]).state_dict()["loss_tuned"][0] is None


def test_an_empty_batch_changes_nothing():
    indicator = updated([0, 700], [1.0, 2.0], [3.0, 4.0])
    before = indicator.state_dict()
    indicator.update(torch.zeros(0, dtype=torch.long), torch.zeros(0), torch.zeros(0))
    assert indicator.state_dict() == before


def test_losses_with_a_graph_leave_none_behind():
    loss = torch.tensor([0.1], requires_grad=True)
    indicator = OverfittingIndicator()
    indicator.update(torch.tensor([0]), loss, loss + 1)
    assert not indicator.gammas.requires_grad


def test_state_survives_json_and_resumes_alike():
    first = updated([0, 500, 999], [0.1, 0.2, 0.3], [0.1004, 0.2003, 0.2])
    second = OverfittingIndicator()
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    for indicator in (first, second):
        indicator.update(torch.tensor([1, 300]), torch.tensor([0.05, 0.1]), torch.tensor([0.06, 0.2]))
    assert torch.equal(first.gammas, second.gammas)
    assert first.state_dict() == second.state_dict()


@pytest.mark.parametrize("name", ["num_bins", "num_train_timesteps"])
def test_a_state_of_other_bins_is_refused_and_changes_nothing(name):
    indicator = updated([0], [1.0], [2.0])
    before = indicator.state_dict()
    with pytest.raises(AptError, match=f"saved indicator has {name} = 500, this run"):
        indicator.load_state_dict({**before, name: 500})
    assert indicator.state_dict() == before


@pytest.mark.parametrize(
    ("kwargs", "key"),
    [
        ({"num_bins": 0}, "num_bins"),
        ({"num_bins": 11, "num_train_timesteps": 10}, "num_bins"),
        ({"ema_alpha": 0.0}, "ema_alpha"),
        ({"ema_alpha": 1.5}, "ema_alpha"),
        ({"scale": 0.0}, "scale"),
        ({"scale": math.nan}, "scale"),
    ],
)
def test_an_argument_out_of_range_is_refused(kwargs, key):
    with pytest.raises(AptError, match=key):
        OverfittingIndicator(**kwargs)


@pytest.mark.parametrize(
    "timesteps",
    [torch.tensor([-1]), torch.tensor([1000]), torch.tensor([3.0]), torch.tensor(3), torch.tensor([[3]])],
    ids=["negative", "too large", "float", "scalar", "2-D"],
)
def test_timesteps_that_are_no_whole_numbers_in_range_are_refused(timesteps):
    with pytest.raises(AptError, match="timesteps must"):
        OverfittingIndicator().gamma(timesteps)


def test_losses_of_another_shape_than_the_timesteps_are_refused():
    with pytest.raises(AptError, match="one shape"):
        OverfittingIndicator().update(torch.tensor([1, 2]), torch.zeros(2), torch.zeros(3))


def test_eight_samples_give_one_gamma_as_one_batch_or_as_eight_of_one_step():
    generator = torch.Generator().manual_seed(0)
    at_once, in_parts = OverfittingIndicator(), OverfittingIndicator()
    for _ in range(5):
        timesteps = torch.randint(300, 400, (8,), generator=generator)
        tuned = torch.rand(8, generator=generator)
        frozen = tuned + torch.rand(8, generator=generator) * 1e-3
        at_once.update(timesteps, tuned, frozen)
        before = in_parts.gammas
        for sample in zip(timesteps.split(1), tuned.split(1), frozen.split(1), strict=True):
            in_parts.add(*sample)
            assert torch.equal(in_parts.gammas, before) and in_parts.is_within_step
        in_parts.end_step()
        assert in_parts.gammas[3] > 0 and not in_parts.is_within_step
        assert in_parts.gammas.tolist() == pytest.approx(at_once.gammas.tolist(), abs=1e-9)
    before = in_parts.gammas
    in_parts.end_step()  # to which nothing was added
    assert torch.equal(in_parts.gammas, before)


def test_a_state_is_of_steps_that_ended():
    indicator, other = OverfittingIndicator(), OverfittingIndicator()
    sample = torch.tensor([5]), torch.tensor([0.1]), torch.tensor([0.2])
    indicator.update(*sample)
    state = indicator.state_dict()
    indicator.add(*sample)
    assert indicator.state_dict() == state
    other.add(*sample)
    other.load_state_dict(state)
    other.end_step()
    assert other.state_dict() == state


def test_it_agrees_with_an_independent_simulation():
    generator = torch.Generator().manual_seed(0)
    bins, length, alpha, scale = 7, 50, 0.3, 20.0
    indicator = OverfittingIndicator(bins, length, alpha, scale)
    averages = {}
    for _ in range(100):
        batch = int(torch.randint(1, 6, (), generator=generator))
        timesteps = torch.randint(0, length, (batch,), generator=generator)
        tuned, frozen = torch.rand((2, batch), generator=generator, dtype=torch.float64)
        indicator.update(timesteps, tuned, frozen)
        groups = {}
        for t, a, b in zip(timesteps.tolist(), tuned.tolist(), frozen.tolist(), strict=True):
            groups.setdefault(math.floor(t / length * bins), []).append((a, b))
        for b, pairs in groups.items():
            means = [sum(column) / len(pairs) for column in zip(*pairs, strict=True)]
            old = averages.get(b, means)
            averages[b] = [(1 - alpha) * o + alpha * m for o, m in zip(old, means, strict=True)]
    wanted = [min(1.0, max(0.0, 1 - math.exp(-scale * (f - t)))) for t, f in (averages[b] for b in range(bins))]
    assert 0.0 < sum(wanted) < bins  # the case has bins on both sides of the clamp
    assert indicator.gammas.tolist() == pytest.approx(wanted, abs=1e-12)


def _rank(rank, folder):
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # the machine's name may not resolve
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    indicator = OverfittingIndicator(ema_alpha=0.5)
    batches = [
        # Rank 0 has one sample of bin 0, rank 1 has three: the mean is over samples, not over ranks.
        (([1], [4.0], [8.0]), ([2, 3, 4], [0.0, 2.0, 2.0], [4.0, 4.0, 4.0])),
        (([], [], []), ([5, 900], [4.0, 1.0], [5.0, 2.0])),
    ]
    for batch in batches:
        timesteps, tuned, frozen = batch[rank]
        indicator.update(torch.tensor(timesteps, dtype=torch.long), torch.tensor(tuned), torch.tensor(frozen))
    accumulated = OverfittingIndicator()
    for batch in batches:
        timesteps, tuned, frozen = batch[rank]
        accumulated.add(torch.tensor(timesteps, dtype=torch.long), torch.tensor(tuned), torch.tensor(frozen))
    accumulated.end_step()
    state = {**indicator.state_dict(), "accumulated": accumulated.state_dict()}
    Path(folder, f"{rank}.json").write_text(json.dumps(state))
    torch.distributed.destroy_process_group()


def test_two_ranks_hold_the_mean_over_the_samples_of_both_even_where_one_has_none(tmp_path):
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)
    states = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert states[0] == states[1]
    # tuned: (4 + 0 + 2 + 2) / 4 = 2, then 2 / 2 + 4 / 2 = 3;  frozen: (8 + 12) / 4 = 5, then 5 / 2 + 5 / 2 = 5
    assert (states[0]["loss_tuned"][0], states[0]["loss_frozen"][0]) == (3.0, 5.0)
    assert (states[0]["loss_tuned"][9], states[0]["loss_frozen"][9]) == (1.0, 2.0)
    # One step of both batches: (4 + 0 + 2 + 2 + 4) / 5 and (8 + 12 + 5) / 5
    step = states[0]["accumulated"]
    assert (step["loss_tuned"][0], step["loss_frozen"][0]) == (2.4, 5.0)
    assert (step["loss_tuned"][9], step["loss_frozen"][9]) == (1.0, 2.0)


def test_sigmas_of_flow_matching_have_bins_of_equal_width_with_1_in_the_last():
    indicator = OverfittingIndicator(10, bin_of=sigma_bins(10), ema_alpha=1.0)
    sigmas = torch.tensor([0.0, 0.0999, 0.1, 0.55, 0.9999, 1.0])
    indicator.update(sigmas, torch.zeros(6), torch.tensor([1.0, 1.0, 2.0, 3.0, 4.0, 6.0]))
    wanted = [1.0, 2.0, None, None, None, 3.0, None, None, None, 5.0]
    assert indicator.state_dict()["loss_frozen"] == pytest.approx(wanted)
    assert indicator.gamma(sigmas).tolist() == pytest.approx(indicator.gammas[[0, 0, 1, 5, 9, 9]].tolist())


@pytest.mark.parametrize("sigma", [-0.01, 1.01, float("nan")])
def test_sigmas_out_of_range_are_refused(sigma):
    indicator = OverfittingIndicator(10, bin_of=sigma_bins(10))
    with pytest.raises(
        AptError, match=r"timesteps must be in one of the 10 bins; found (0.5 to 1.01|-0.01 to 0.5|nan to nan)"
    ):
        indicator.update(torch.tensor([0.5, sigma]), torch.zeros(2), torch.zeros(2))
