"""`reference = "start"`: the frozen pass is of the model that the training began from; and what a run says of both."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from models import LAYOUTS, LoRANetwork, make_batch, make_diffusers_unet, make_tuned
from torch import Tensor, nn

from apt_hooks import AptConfig, AptError, AptObjective
from apt_hooks.hooks.starting_weights import StartingWeights, from_file, to_bytes
from apt_hooks.integrations import peft as peft_adapters
from apt_hooks.integrations.sd_scripts.lora import dropout as dropout_of
from apt_hooks.training.resume import START_FILE, STATE_FILE, load_state, save_state
from apt_hooks.training.run import AptRun

NO_HOOKS = {"augmentation": False, "lambda_dist": 0.0, "lambda_attn": 0.0}


def objective_of(unet: nn.Module, network: LoRANetwork, **config: Any) -> AptObjective:
    """As sd-scripts' adapter makes one."""
    return AptObjective(
        AptConfig(**{"augmentation": False, "reference": "start", **config}),
        unet,
        network.off,
        also_frozen=[network],
        trained=network.named_parameters(),
    )


def step(objective: AptObjective, unet: nn.Module, **kwargs: Any) -> Any:
    """A step of a loop, up to the gradient."""
    x, timesteps, context, target = make_batch(unet)

    def predict() -> Tensor:
        output = unet(x, timesteps, context)
        return output if isinstance(output, Tensor) else output.sample

    found = objective.step(predict, target, timesteps, **kwargs)
    found.loss((found.prediction - target).square().mean(dim=(1, 2, 3))).backward()
    return found


def descend(network: nn.Module, lr: float = 0.3) -> None:
    torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=lr).step()
    network.zero_grad()


# -- the exchange ------------------------------------------------------------------------------------------------------


def test_inside_the_weights_are_those_of_the_start_and_afterwards_no_pointer_or_version_has_changed() -> None:
    network = nn.Linear(3, 2)
    first = [p.detach().clone() for p in network.parameters()]
    start = StartingWeights(network.named_parameters())
    x = torch.ones(1, 3)
    for p in network.parameters():
        nn.init.ones_(p)
    output = network(x).square().sum()  # its graph holds on to the weight of now
    before = [(p.data_ptr(), p._version) for p in network.parameters()]
    with torch.no_grad(), start.exchanged():
        assert torch.equal(network(x), nn.functional.linear(x, *first))
    with pytest.raises(KeyError), start.exchanged():
        raise KeyError
    assert before == [(p.data_ptr(), p._version) for p in network.parameters()]
    assert all(bool((p == 1).all()) and p.requires_grad for p in network.parameters())
    output.backward()
    assert torch.equal(network.weight.grad, torch.full((2, 3), 8.0))


def test_an_exchange_that_breaks_off_in_the_middle_puts_back_what_it_has_exchanged() -> None:
    network = nn.Linear(3, 2)
    start = StartingWeights(network.named_parameters())
    start._copies[1] = start._copies[1].to_sparse()
    before = [p.data_ptr() for p in network.parameters()]
    with pytest.raises(RuntimeError), start.exchanged():
        pass
    assert before == [p.data_ptr() for p in network.parameters()]


def test_a_model_that_was_moved_since_has_the_start_moved_after_it() -> None:
    network = nn.Linear(3, 2)
    start = StartingWeights(network.named_parameters())
    network.to(torch.bfloat16)
    with start.exchanged():
        assert network.weight.dtype == network.bias.dtype == torch.bfloat16


def test_in_an_autocast_context_that_has_seen_the_trained_weights_those_of_the_start_are_cast_anew() -> None:
    network = nn.Linear(8, 8)
    start = StartingWeights(network.named_parameters())
    x = torch.randn(2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = network(x).detach()
        torch.clear_autocast_cache()
        with torch.no_grad():
            network.weight.mul_(2)
        network(x)  # leaves a cast of the weight behind
        with torch.no_grad(), start.exchanged():
            assert torch.equal(network(x), wanted)


def test_saved_weights_come_back_to_the_bit_and_those_of_another_lora_are_refused(tmp_path: Path) -> None:
    network = nn.Linear(3, 2).to(torch.bfloat16)
    (tmp_path / "x.pt").write_bytes(to_bytes(StartingWeights(network.named_parameters()).named()))
    saved = from_file(tmp_path / "x.pt")
    first = network.weight.detach().clone()
    nn.init.zeros_(network.weight)
    with StartingWeights(network.named_parameters(), saved).exchanged():
        assert torch.equal(network.weight, first)
    for other in (nn.Linear(3, 4), nn.Linear(3, 2, bias=False), nn.Sequential(nn.Linear(3, 2))):
        with pytest.raises(AptError, match=r"are of another LoRA: 2 with .* where this run trains"):
            StartingWeights(other.named_parameters(), saved)
    for content in (b"", b"no file of torch's", (tmp_path / "x.pt").read_bytes()[:-40]):
        (tmp_path / "x.pt").write_bytes(content)
        with pytest.raises(
            AptError, match=r"^x\.pt cannot be read as the weights that the training began from \("
        ) as e:
            from_file(tmp_path / "x.pt")
        assert "\n" not in str(e.value)


# -- a step ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("checkpointing", ["off", "reentrant", "non_reentrant"])
def test_monitoring_by_the_start_changes_no_bit_of_a_training_with_dropout(layout: str, checkpointing: Any) -> None:
    found = []
    for way in ("plain", "start", "base"):
        unet, network = make_tuned(layout, checkpointing, dropout=0.5)
        objective = objective_of(unet, network, monitor_only=True, reference="start" if way == "start" else "base")
        torch.manual_seed(5)
        random.seed(5)
        for _ in range(3):
            if way == "plain":
                x, timesteps, context, target = make_batch(unet)
                (unet(x, timesteps, context) - target).square().mean(dim=(1, 2, 3)).mean().backward()
            else:
                step(objective, unet)
            descend(network)
        found.append([*(p.detach().clone() for p in network.parameters()), torch.get_rng_state()])
        assert random.random() == random.Random(5).random()
        objective.close()
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_the_lora_of_the_start_has_no_dropout_and_is_in_training_mode_again_afterwards() -> None:
    unet, network = make_tuned("up_blocks", dropout=0.5)
    objective = objective_of(unet, network)
    batch = make_batch(unet)
    network.eval()
    with torch.no_grad():
        wanted = (unet(*batch[:3]) - batch[3]).square().mean()
    network.train()
    for _ in range(2):
        found = step(objective, unet)
        descend(network)
        assert float(found.values["loss_frozen"]) == pytest.approx(float(wanted), rel=1e-6)
        assert float(found.values["delta_noise"]) > 0
    assert all(module.training for module in network.modules())


def test_python_s_random_numbers_are_those_of_a_run_without_the_pass() -> None:
    """DyLoRA draws its rank from them, in evaluation too."""
    unet, network = make_tuned("up_blocks")
    network.loras[0].lora_down.register_forward_hook(lambda *_: random.random() and None)
    state = random.getstate()
    with objective_of(unet, network).passes().frozen(), torch.no_grad():
        unet(*make_batch(unet)[:3])
    assert random.getstate() == state


def test_the_losses_of_two_steps_may_be_summed_before_the_backward_pass() -> None:
    found = []
    for reference in ("start", "base"):
        unet, network = make_tuned("up_blocks", "non_reentrant")
        objective = objective_of(unet, network, reference=reference, **NO_HOOKS, loss_weighting=False)
        x, timesteps, context, target = make_batch(unet)
        steps = [objective.step(lambda: unet(x, timesteps, context), target, timesteps) for _ in range(2)]  # noqa: B023
        sum((s.prediction - target).square().mean() for s in steps).backward()
        found.append(network.gradient())
    assert torch.equal(*found) and float(found[0].norm()) > 0


def test_a_first_batch_of_which_nothing_counts_does_not_put_the_start_behind_it() -> None:
    unet, network = make_tuned("up_blocks")
    objective = objective_of(unet, network)
    first = [p.detach().clone() for p in network.parameters()]
    step(objective, unet, instances=torch.zeros(2, dtype=torch.bool))
    descend(network)
    assert float(step(objective, unet).values["delta_noise"]) > 0
    assert objective.reference.start is not None
    assert all(map(torch.equal, first, objective.reference.start.weights))


def test_pefts_lora_needs_no_word_of_what_is_trained() -> None:
    peft = pytest.importorskip("peft")
    unet = make_diffusers_unet().train()
    unet.add_adapter(peft.LoraConfig(r=2, lora_dropout=0.3, target_modules=["to_q", "to_k"]))
    with torch.no_grad():
        for name, p in unet.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.3)
    losses = []
    with AptObjective(AptConfig(augmentation=False, reference="start"), unet, contextlib.nullcontext) as objective:
        for _ in range(3):
            losses.append(step(objective, unet).values)
            descend(unet, 0.1)
    assert [float(v["loss_frozen"]) for v in losses] == [float(losses[0]["loss_frozen"])] * 3
    assert len({float(v["loss_tuned"]) for v in losses}) == 3


# -- what takes part in the frozen pass --------------------------------------------------------------------------------

NOT_THE_START = r"^the frozen pass is not of the model that the training began from: .* with their weights of now, "


def test_what_is_trained_and_not_told_of_is_an_error_that_names_it() -> None:
    unet, network = make_tuned("up_blocks")
    norm = unet.up_blocks[2].attentions[0].norm1.requires_grad_(True)
    objective = AptObjective(AptConfig(reference="start"), unet, network.off)
    with pytest.raises(AptError, match=NOT_THE_START + rf"{2 * len(network.layers)} in all \(number .*\(trained=\)"):
        step(objective, unet)
    everything = [*network.named_parameters(), *norm.named_parameters()]
    step(AptObjective(AptConfig(reference="start"), unet, network.off, trained=everything), unet)
    unet.requires_grad_(False)
    with pytest.raises(AptError, match='reference = "start" exchanges what is trained, and nothing is known to be'):
        step(AptObjective(AptConfig(reference="start"), unet, network.off), unet)


def test_what_was_computed_of_trained_weights_before_the_pass_is_an_error() -> None:
    unet, network = make_tuned("up_blocks")
    encoder = nn.Linear(24, 24)
    x, timesteps, context, target = make_batch(unet)
    objective = objective_of(unet, network)
    objective.reference.trained = [*network.named_parameters(), *encoder.named_parameters()]
    encoded = encoder(context)
    with pytest.raises(AptError, match=NOT_THE_START + r"2 in all \(bias, weight\)"):
        objective.step(lambda: unet(x, timesteps, encoded), target, timesteps)
    objective.step(lambda: unet(x, timesteps, encoder(context)), target, timesteps)
    kept = network.loras[0].lora_up.weight.data
    network.loras[0].lora_up.register_forward_hook(lambda module, args, y: args[0] @ kept.T)
    with pytest.raises(AptError, match=NOT_THE_START + r"1 in all \(loras\.0\.lora_up\.weight\)"):
        step(objective_of(unet, network), unet)


def test_a_tuned_pass_without_the_lora_is_an_error_all_the_same() -> None:
    unet, network = make_tuned("up_blocks")
    for lora in network.loras:
        lora.multiplier = 0.0
    objective = objective_of(unet, network, **NO_HOOKS)
    x, timesteps, context, target = make_batch(unet)
    with pytest.raises(AptError, match="delta_noise is exactly 0 though weights have moved"):
        for _ in range(3):
            objective.step(lambda: unet(x, timesteps, context), target, timesteps)
            with torch.no_grad():
                network.loras[0].lora_up.weight.add_(1.0)


# -- saved and resumed -------------------------------------------------------------------------------------------------


def run_of(**config: Any) -> tuple[AptRun, nn.Module, LoRANetwork]:
    unet, network = make_tuned("up_blocks")
    objective = objective_of(unet, network, **config)
    return AptRun(objective, log_path=None, augment_space="image"), unet, network


def test_a_resumed_run_has_the_start_of_the_first(tmp_path: Path) -> None:
    run, unet, network = run_of()
    save_state(run, tmp_path)
    assert not (tmp_path / START_FILE).exists()  # nothing is trained yet: the LoRA of the state is the start
    assert load_state(run_of()[0], tmp_path)
    run.record(step(run.objective, unet))
    descend(network)
    save_state(run, tmp_path)
    wanted = step(run.objective, unet).values
    resumed, unet, other = run_of()
    assert load_state(resumed, tmp_path)
    other.load_state_dict(network.state_dict())
    save_state(resumed, tmp_path)  # as one that is stopped before its first step
    assert step(resumed.objective, unet).values == wanted and float(wanted["delta_noise"]) > 0
    again, unet, other = run_of()
    assert load_state(again, tmp_path)
    other.load_state_dict(network.state_dict())
    assert step(again.objective, unet).values == wanted


def test_a_state_without_the_start_is_an_error_that_says_the_way_out_and_changes_nothing(tmp_path: Path) -> None:
    run, unet, _ = run_of()
    with pytest.raises(
        AptError, match=r'has no apt-hooks\.json, .*; resume with reference = "base", or begin a new run'
    ):
        load_state(run, tmp_path)
    run.record(step(run.objective, unet))
    save_state(run, tmp_path)
    based = run_of(reference="base")[0]
    with pytest.raises(
        AptError, match=r'of reference = "start", this run\'s of "base": resume with \[apt\] reference = "s'
    ):
        load_state(based, tmp_path)
    content = (tmp_path / START_FILE).read_bytes()
    for broken in (None, content[: len(content) // 2]):
        (tmp_path / START_FILE).unlink() if broken is None else (tmp_path / START_FILE).write_bytes(broken)
        resumed = run_of()[0]
        with pytest.raises(
            AptError, match=rf"{STATE_FILE}: {START_FILE} cannot be read .*begin a new run from its LoRA$"
        ):
            load_state(resumed, tmp_path)
        assert (resumed.step, resumed.objective.reference.saved_start) == (0, None)
        assert bool(resumed.objective.indicator.gaps.isnan().all())
    (tmp_path / STATE_FILE).unlink()
    save_state(based, tmp_path)
    with pytest.raises(
        AptError, match=r'of reference = "base", this run\'s of "start": resume with \[apt\] reference = "b'
    ):
        load_state(run_of()[0], tmp_path)


# -- what is said of the LoRA that a run begins with -------------------------------------------------------------------

CHANGES = "the LoRA changes the model before the first step"


@pytest.mark.parametrize("way", ["step", "nothing counts", "other conditioning", "context"])
@pytest.mark.parametrize("lora", ["zero", "trained", "start for reference"])
def test_a_run_that_goes_on_from_a_lora_says_so_once(caplog: pytest.LogCaptureFixture, way: str, lora: str) -> None:
    unet, network = make_tuned("up_blocks")
    if lora == "zero":
        for module in network.loras:
            nn.init.zeros_(module.lora_up.weight)
    objective = objective_of(unet, network, reference="start" if lora.startswith("start") else "base")
    x, timesteps, context, target = make_batch(unet)
    for _ in range(3):
        kwargs: dict[str, Any] = {}
        if way == "nothing counts":
            kwargs["instances"] = torch.zeros(2, dtype=torch.bool)
        elif way == "other conditioning":
            kwargs["predict_frozen"] = lambda: unet(x, timesteps, context + 1)
        if way == "context":
            passes = objective.passes()
            with passes.frozen():
                frozen = unet(x, timesteps, context)
            passes.begin_tuned(frozen)
            tuned = passes.end_tuned(unet(x, timesteps, context))
            passes.step(target, timesteps)
            tuned.square().mean().backward()
        else:
            step(objective, unet, **kwargs)
        descend(network)
    assert [message for message in caplog.messages if CHANGES in message] == caplog.messages
    assert len(caplog.messages) == int(lora == "trained")
    if lora == "trained":
        assert caplog.messages[0].endswith('to go on from it as it is, set [apt] reference = "start"')


def test_a_base_model_that_predicts_nothing_is_compared_too(caplog: pytest.LogCaptureFixture) -> None:
    objective = objective_of(*make_tuned("up_blocks"), reference="base", lambda_dist=0.0, lambda_attn=0.0)
    passes = objective.passes()
    passes.begin_tuned(torch.zeros(2, 1))
    passes.end_tuned(torch.ones(2, 1))
    assert CHANGES in caplog.text and "difference inf" in caplog.text


@pytest.mark.parametrize("resumed", [True, False])
def test_a_run_that_goes_on_from_a_state_of_ours_does_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, resumed: bool
) -> None:
    run, unet, _ = run_of(reference="base")
    run.record(step(run.objective, unet))
    save_state(run, tmp_path)
    assert len(caplog.messages) == 1
    if not resumed:
        (tmp_path / STATE_FILE).unlink()
    again, unet, _ = run_of(reference="base")
    assert load_state(again, tmp_path) == resumed
    step(again.objective, unet)
    assert sum(CHANGES in message for message in caplog.messages) == (1 if resumed else 2)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, None),
        ({"init_lora_weights": "gaussian"}, None),
        ({"use_dora": True}, None),
        ({"init_lora_weights": False}, ""),
        ({"init_lora_weights": "pissa"}, ""),
    ],
    ids=["plain", "gaussian", "dora", "not zero", "pissa"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_pefts_ways_to_begin_those_are_told_that_do_not_begin_at_the_base_model(
    caplog: pytest.LogCaptureFixture, options: dict[str, Any], expected: str | None, dtype: torch.dtype
) -> None:
    peft = pytest.importorskip("peft")
    unet = make_diffusers_unet().train()
    unet.add_adapter(peft.LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"], **options))
    unet.requires_grad_(False)
    for name, p in unet.named_parameters():
        p.requires_grad_("lora_" in name)
        p.data = p.data if "lora_" in name else p.data.to(dtype)
    x, timesteps, context, target = make_batch(unet)
    objective = AptObjective(AptConfig(**NO_HOOKS), unet, lambda: peft_adapters.adapters_off(unet))

    def predict() -> Tensor:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return unet(x.to(dtype), timesteps, context.to(dtype)).sample.float()

    objective.step(predict, target, timesteps)
    if expected is None and not (dtype == torch.bfloat16 and options.get("use_dora")):
        assert caplog.messages == []
    else:
        (message,) = caplog.messages
        assert CHANGES in message and message.endswith("may be rounding)") == (expected is None)


# -- dropout -----------------------------------------------------------------------------------------------------------


class Lycoris(nn.Module):
    """A LoRA module with its dropout as LyCORIS keeps it."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.org_forward = None
        self.dropout, self.rank_dropout, self.module_dropout = nn.Dropout(p), 0.1, None


def test_dropout_of_sd_scripts_networks_is_found_by_what_their_modules_have() -> None:
    _, network = make_tuned("up_blocks", dropout=0.3)
    assert dropout_of(network) == {"network_dropout": 0.3}
    assert dropout_of(make_tuned("up_blocks")[1]) == {}
    network.loras[3].module_dropout = 0.2
    assert dropout_of(network) == {"network_dropout": 0.3, "module_dropout": 0.2}
    assert dropout_of(nn.ModuleList([Lycoris(0.2), Lycoris(0.4)])) == {"network_dropout": 0.4, "rank_dropout": 0.1}
    network.loras[3].dropout, network.loras[3].module_dropout = nn.Identity(), 0
    assert dropout_of(network) == {"network_dropout": 0.3}


def test_dropout_of_pefts_active_adapters_is_found_by_what_their_layers_have() -> None:
    peft = pytest.importorskip("peft")
    unet = make_diffusers_unet()
    unet.add_adapter(peft.LoraConfig(r=2, lora_dropout=0.3, target_modules=["to_q"]), "one")
    assert peft_adapters.dropout(unet) == {"lora_dropout": 0.3}
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]), "two")
    unet.set_adapter("two")
    assert peft_adapters.dropout(unet) == {}
    loha = peft.LoHaConfig(r=2, module_dropout=0.2, rank_dropout=0.1, target_modules=["0"])
    assert peft_adapters.dropout(peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), loha)) == {
        "rank_dropout": 0.1,
        "module_dropout": 0.2,
    }
