"""That the frozen pass is frozen, and that the tuned pass is not: whatever the switch, and whatever the values."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import LAYOUTS, LoRANetwork, make_batch, make_diffusers_unet, make_tuned
from torch import Tensor, nn

from apt_hooks import AptConfig, AptError, AptObjective
from apt_hooks.hooks.frozen_check import Reach
from apt_hooks.integrations.peft import adapters_off
from apt_hooks.integrations.sd_scripts.lora import LoraSwitch
from apt_hooks.method.deferred_checks import DeferredChecks
from apt_hooks.method.indicator import OverfittingIndicator

NOT_THE_BASE = r"^the frozen pass is not the base model's: trained parameters take part in it, "
CONFIG = AptConfig(augmentation=False)


def run_step(objective: AptObjective, unet: nn.Module, call: Any = None, context: Tensor | None = None) -> Tensor:
    """One training step: the loss, differentiated."""
    x, timesteps, text, target = make_batch(unet)
    text = text if context is None else context

    def predict() -> Tensor:
        output = (unet if call is None else call)(x, timesteps, text)
        return output if isinstance(output, Tensor) else output.sample

    step = objective.step(predict, target, timesteps)
    loss = step.loss((step.prediction - target).square().mean(dim=(1, 2, 3)))
    if loss.requires_grad:
        loss.backward()
    return step.values["delta_noise"]


def peft_unet() -> nn.Module:
    peft = pytest.importorskip("peft")
    unet = make_diffusers_unet().train()
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"]))
    for name, parameter in unet.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    return unet


@contextlib.contextmanager
def all_but_one(network: LoRANetwork) -> Iterator[None]:
    with network.off():
        network.layers[3].forward = network.loras[3].forward
        yield


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("lambdas", [{}, {"lambda_dist": 0.0, "lambda_attn": 0.0}], ids=["regularized", "no hooks"])
def test_a_switch_that_switches_nothing_is_an_error_at_the_first_step(layout: str, lambdas: dict[str, float]) -> None:
    unet, network = make_tuned(layout)
    with (
        AptObjective(AptConfig(augmentation=False, **lambdas), unet, contextlib.nullcontext) as objective,
        pytest.raises(AptError, match=NOT_THE_BASE + rf"{2 * len(network.layers)} in all \(number"),
    ):
        run_step(objective, unet)


def test_a_lora_layer_that_the_switch_misses_is_named() -> None:
    unet, network = make_tuned("up_blocks")
    objective = AptObjective(
        CONFIG, unet, lambda: all_but_one(network), trained=((f"lora.{n}", p) for n, p in network.named_parameters())
    )
    with pytest.raises(AptError, match=NOT_THE_BASE + r"2 in all \(lora\.loras\.3\.lora_down\.weight, lora\.loras\.3"):
        run_step(objective, unet)


def test_pefts_adapters_that_no_one_switches_off_are_named() -> None:
    unet = peft_unet()
    with pytest.raises(AptError, match=r"in all \(down_blocks\.0\.attentions\.0\..*lora_A\.default\.weight, "):
        run_step(AptObjective(CONFIG, unet, contextlib.nullcontext), unet)


@pytest.mark.parametrize("trained", ["found by its gradient", "told"])
def test_a_norm_that_is_trained_beside_the_lora_is_named(trained: str) -> None:
    unet, network = make_tuned("up_blocks")
    norm = unet.up_blocks[2].attentions[0].norm1.requires_grad_(True)
    told = [*network.named_parameters(), *norm.named_parameters()] if trained == "told" else None
    with pytest.raises(AptError, match=r"2 in all \(up_blocks\.2\.attentions\.0\.norm1\.bias, up_blocks\.2\."):
        run_step(AptObjective(CONFIG, unet, network.off, trained=told), unet)


def test_what_is_not_trained_may_require_a_gradient_where_it_is_told_what_is() -> None:
    unet, network = make_tuned("up_blocks")
    unet.conv_in.requires_grad_(True)  # for the sake of reentrant checkpointing, say
    run_step(AptObjective(CONFIG, unet, network.off, trained=network.named_parameters()), unet)
    with pytest.raises(AptError, match=r"\(conv_in\.bias, conv_in\.weight\); .* must not require a gradient"):
        run_step(AptObjective(CONFIG, unet, network.off), unet)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("checkpointing", ["off", "reentrant", "non_reentrant"])
@pytest.mark.parametrize("way", ["off", "muted"])
def test_a_switch_that_works_passes(layout: str, checkpointing: Any, way: str) -> None:
    """Also a multiplier of 0, with which the LoRA is computed and comes to nothing."""
    unet, network = make_tuned(layout, checkpointing)
    with AptObjective(CONFIG, unet, getattr(network, way)) as objective:
        for _ in range(2):
            assert run_step(objective, unet) > 0


def test_a_frozen_pass_that_reads_a_trained_encoders_output_is_an_error() -> None:
    unet, network = make_tuned("up_blocks")
    encoder = nn.Linear(24, 24)
    context = encoder(make_batch(unet)[2])
    with pytest.raises(AptError, match=NOT_THE_BASE + "2 in all"):
        run_step(AptObjective(CONFIG, unet, network.off), unet, context=context)
    run_step(AptObjective(CONFIG, unet, network.off), unet, context=context.detach())


NO_HOOKS = AptConfig(augmentation=False, lambda_dist=0.0, lambda_attn=0.0)


def test_compiled_parts_are_seen_through() -> None:
    unet = peft_unet()
    unet.mid_block = torch.compile(unet.mid_block, backend="eager")
    with pytest.raises(AptError, match=r"12 in all \(mid_block\.attentions\.0\."):
        run_step(AptObjective(NO_HOOKS, unet, lambda: adapters_off(unet.down_blocks, unet.up_blocks)), unet)
    objective = AptObjective(NO_HOOKS, unet, lambda: adapters_off(unet))
    for _ in range(2):
        assert run_step(objective, unet) > 0


def test_a_data_parallel_wrapper_is_seen_through(tmp_path: Path) -> None:
    unet = peft_unet()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(unet)
        for model in (unet, wrapped):
            with pytest.raises(AptError, match=r"in all \((module\.)?down_blocks\.0\.attentions\.0\."):
                run_step(AptObjective(NO_HOOKS, model, contextlib.nullcontext), unet, wrapped)
            assert run_step(AptObjective(NO_HOOKS, model, lambda model=model: adapters_off(model)), unet, wrapped) > 0
    finally:
        torch.distributed.destroy_process_group()


class Training:
    """A LoRA that begins at zero, and its optimizer."""

    def __init__(self, lr: float) -> None:
        self.unet, self.network = make_tuned("up_blocks")
        for lora in self.network.loras:
            nn.init.zeros_(lora.lora_up.weight)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=lr)

    def steps(self, number: int, **kwargs: Any) -> list[float]:
        found = []
        with AptObjective(CONFIG, self.unet, self.network.off, **kwargs) as objective:
            for _ in range(number):
                found.append(float(run_step(objective, self.unet)))
                self.optimizer.step()
                self.optimizer.zero_grad()
        return found


@pytest.mark.parametrize("told", [True, False])
def test_models_that_stay_equal_while_weights_move_are_an_error(told: bool) -> None:
    training = Training(lr=1e-2)
    for lora in training.network.loras:
        lora.multiplier = 0.0
    kwargs = {"trained": training.network.named_parameters()} if told else {}
    with pytest.raises(AptError, match="delta_noise is exactly 0 though weights have moved: nothing that is trained"):
        training.steps(4, **kwargs)


def test_a_lora_that_begins_at_zero_and_one_whose_learning_rate_is_0_yet_are_no_error() -> None:
    told = Training(lr=1e-2)
    first, *others = told.steps(3, trained=told.network.named_parameters())
    assert first == 0.0 and min(others) > 0.0
    assert Training(lr=1e-2).steps(2)[0] == 0.0
    warming = Training(lr=0.0)
    assert warming.steps(4, trained=warming.network.named_parameters()) == [0.0] * 4


def test_passes_are_followed_at_the_first_step_only(monkeypatch: pytest.MonkeyPatch) -> None:
    entered, enter = [], Reach.__enter__
    monkeypatch.setattr(Reach, "__enter__", lambda self: entered.append(1) or enter(self))
    unet, network = make_tuned("up_blocks")
    objective = AptObjective(CONFIG, unet, network.off)
    for _ in range(3):
        run_step(objective, unet)
    assert len(entered) == 1


def follow(function: Callable[[Tensor], Any]) -> list[str]:
    parameter = nn.Parameter(torch.ones(2, 2))
    with torch.no_grad(), Reach([], [("p", parameter)]) as reach:
        return sorted(reach.of(function(parameter)))


@pytest.mark.parametrize(
    ("function", "reached"),
    [
        (lambda p: torch.ones(2, 2) @ p, True),
        (lambda p: torch.cat([torch.ones(2, 2), p]).T[0], True),
        (lambda p: torch.stack(torch.ones(2, 2).addmm(p, p).unbind()), True),
        (lambda p: torch.ones(2, 2).add_(p.data), True),
        (lambda p: torch.ones(2) + 0.0 * torch.ones(2) * (p.sum() * 2), True),
        (lambda p: torch.ones(2) + p.sum() * 0.0, False),
        (lambda p: torch.ones(2) + 0 * p[0], False),
        (lambda p: torch.ones(2).to(p), False),
        (lambda p: torch.zeros_like(p) + p.new_ones(2), False),
        (lambda p: torch.ones(p.shape, dtype=p.dtype), False),
    ],
)
def test_what_a_result_comes_from(function: Callable[[Tensor], Any], reached: bool) -> None:
    assert follow(function) == (["p"] if reached else [])


def test_setting_items_counts() -> None:
    def written(p: Tensor) -> Tensor:
        x = torch.zeros(3, 2)
        x[1:] = p
        return x

    assert follow(written) == ["p"]


# -- sd-scripts' switch ----------------------------------------------------------------------------------------------


def test_a_forward_that_torch_excludes_from_compiling_is_seen_through() -> None:
    """As the `--compile` helpers of sd-scripts 0.11 wrap the layers of swapped blocks."""
    unet, network = make_tuned("up_blocks")
    layer = network.layers[3]
    layer.forward = torch._dynamo.disable()(layer.forward)
    wrapped = layer.forward
    with AptObjective(CONFIG, unet, LoraSwitch([unet], "networks.lora", network).off) as objective:
        assert run_step(objective, unet) > 0
    assert layer.forward is wrapped


def test_a_lora_behind_a_forward_that_hides_it_is_named() -> None:
    unet, network = make_tuned("up_blocks")
    network.loras[3].lora_name = "lora_unet_mid_to_v"
    hidden = network.layers[3].forward
    network.layers[3].forward = lambda x: hidden(x)
    with pytest.raises(AptError, match=r"1 LoRA modules are in no layer's forward, .*\(lora_unet_mid_to_v\): some"):
        LoraSwitch([unet], "networks.lora", network)
    for parameter in network.loras[3].parameters():
        parameter.requires_grad_(False)  # not trained: part of the base model
    LoraSwitch([unet], "networks.lora", network)


def test_a_forward_replaced_during_the_training_is_an_error() -> None:
    unet, network = make_tuned("up_blocks")
    switch = LoraSwitch([unet], "networks.lora", network)
    hidden = network.layers[3].forward
    network.layers[3].forward = lambda x: hidden(x)
    with pytest.raises(AptError, match="forward of a Linear with LoRA was replaced after the first step"), switch.off():
        pass


# -- what a device knows later ---------------------------------------------------------------------------------------


def test_numbers_of_a_device_are_looked_at_a_step_later_and_at_the_end() -> None:
    deferred, found = DeferredChecks(), []
    for i in range(3):
        numbers: Any = types.SimpleNamespace(device=torch.device("xpu"), tolist=lambda i=i: [float(i)])
        deferred.expect(numbers, found.append)
        deferred.look()
        assert found == [[float(j)] for j in range(i)]
    deferred.look(wait=True)
    assert found == [[0.0], [1.0], [2.0]]


def test_timesteps_out_of_range_on_a_device_count_nowhere_and_are_told_later() -> None:
    indicator, waiting = OverfittingIndicator(), []
    indicator._deferred.expect = lambda numbers, check: waiting.append((numbers, check))  # type: ignore[method-assign]
    timesteps = torch.tensor([-1, 1000, 50])
    assert indicator.gamma(timesteps).shape == (3,)
    indicator.update(timesteps, torch.tensor([0.1, 0.1, 0.3]), torch.tensor([0.9, 0.9, 0.4]))
    state = indicator.state_dict()
    assert state["loss_tuned"] == [pytest.approx(0.3), *[None] * 9]
    numbers, check = waiting[0]
    with pytest.raises(AptError, match=r"must lie in 0 \.\. 999; found -1 to 1000"):
        check(numbers.tolist())


@pytest.mark.parametrize("which", ["target", "frozen"])
def test_shapes_that_would_broadcast_are_refused(which: str) -> None:
    unet, network = make_tuned("up_blocks")
    x, timesteps, context, target = make_batch(unet)
    kwargs: dict[str, Any] = {}
    if which == "target":
        target = target[:, :1]
    else:
        kwargs["predict_frozen"] = lambda: unet(x, timesteps, context)[:, :1]
    objective = AptObjective(CONFIG, unet, network.off)
    with pytest.raises(AptError, match=r"must have one shape; found \(2, [14], 16, 16\) of the (tuned|frozen) model"):
        objective.step(lambda: unet(x, timesteps, context), target, timesteps, **kwargs)
