"""Switching peft's adapters off and on again, on a real U-Net of diffusers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from models import make_batch, make_diffusers_unet
from torch import Tensor, nn

from apt_hooks.errors import AptError
from apt_hooks.hooks.frozen import frozen_base
from apt_hooks.integrations.peft import adapters_off

peft = pytest.importorskip("peft")

# peft wonders about a second adapter, which is meant here.
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`")

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def tuned_unet(*adapters: str, dropout: float = 0.0) -> nn.Module:
    """In training mode, with LoRA of random weights on its attention layers."""
    unet = make_diffusers_unet().train()
    for name in adapters or ("default",):
        unet.add_adapter(peft.LoraConfig(r=2, target_modules=TARGETS, lora_dropout=dropout), name)
    return randomized(unet)


def randomized(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def output(unet: nn.Module) -> Tensor:
    return unet(*make_batch(unet)[:3]).sample.detach()


@pytest.fixture(scope="module")
def base() -> Tensor:
    """What the U-Net says before any adapter is added."""
    return output(make_diffusers_unet().train())


def lora_layers(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]


def trained(model: nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("adapters", [("default",), ("one", "two")], ids=["one adapter", "two adapters"])
def test_inside_the_output_is_the_base_models_bit_for_bit_and_afterwards_the_tuned_ones(
    base: Tensor, adapters: tuple[str, ...]
) -> None:
    unet = tuned_unet(*adapters)
    unet.set_adapter(list(adapters))
    tuned, requires_grad = output(unet), trained(unet)
    with adapters_off(unet):
        assert torch.equal(output(unet), base)
    assert not torch.equal(tuned, base)
    assert torch.equal(output(unet), tuned)
    assert trained(unet) == requires_grad


def test_an_adapter_that_is_not_the_active_one_stays_inactive(base: Tensor) -> None:
    unet = tuned_unet("one", "two")
    unet.set_adapter("one")
    tuned = output(unet)
    with adapters_off(unet):
        assert torch.equal(output(unet), base)
    assert [layer.active_adapters for layer in lora_layers(unet)] == [["one"]] * len(lora_layers(unet))
    assert torch.equal(output(unet), tuned)


def test_an_exception_inside_switches_the_adapters_on_again(base: Tensor) -> None:
    unet = tuned_unet()
    tuned = output(unet)
    with pytest.raises(KeyError), adapters_off(unet):
        assert torch.equal(output(unet), base)
        raise KeyError
    assert torch.equal(output(unet), tuned)


def test_the_dropout_of_lora_draws_no_random_number_inside(base: Tensor) -> None:
    unet = tuned_unet(dropout=0.5)
    before = torch.get_rng_state()
    with adapters_off(unet):
        assert torch.equal(output(unet), base)
    assert torch.equal(torch.get_rng_state(), before)
    output(unet)
    assert not torch.equal(torch.get_rng_state(), before), "dropout draws where the adapters are on"


def test_layers_whose_adapters_were_off_stay_off(base: Tensor) -> None:
    unet = tuned_unet()
    layers = lora_layers(unet)
    for layer in layers[::3]:
        layer.enable_adapters(False)
    before, tuned = [layer.disable_adapters for layer in layers], output(unet)
    assert set(before) == {True, False}
    with adapters_off(unet):
        assert all(layer.disable_adapters for layer in layers)
        assert torch.equal(output(unet), base)
    assert [layer.disable_adapters for layer in layers] == before
    assert torch.equal(output(unet), tuned)


def test_one_inside_the_other_ends_with_the_outer(base: Tensor) -> None:
    unet = tuned_unet()
    with adapters_off(unet):
        with adapters_off(unet):
            pass
        assert torch.equal(output(unet), base)
    assert not torch.equal(output(unet), base)


def test_under_the_frozen_pass_a_lora_parameter_that_is_not_trained_stays_so(base: Tensor) -> None:
    unet = tuned_unet()
    name = next(name for name, parameter in unet.named_parameters() if parameter.requires_grad)
    unet.get_parameter(name).requires_grad_(False)
    before = trained(unet)
    assert True in before.values()
    with frozen_base([unet], lambda: adapters_off(unet)):
        assert torch.equal(output(unet), base)
    assert trained(unet) == before


def test_layers_that_are_trained_whole_are_the_base_models_inside(base: Tensor) -> None:
    config = peft.LoraConfig(r=2, target_modules=["to_q"], modules_to_save=["conv_out"])
    model = randomized(peft.get_peft_model(make_diffusers_unet().train(), config))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.zeros_(parameter)  # so that conv_out alone makes the difference
    unet = model.base_model.model
    tuned = output(unet)
    with adapters_off(model):
        assert torch.equal(output(unet), base)
    assert not torch.equal(tuned, base)
    assert torch.equal(output(unet), tuned)


def small_encoder(train: bool) -> nn.Module:
    torch.manual_seed(3)
    encoder = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    if train:
        peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["0"]), encoder)
    return randomized(encoder)


@pytest.mark.parametrize("fails", [False, True], ids=["after the pass", "after an exception in it"])
def test_several_models_are_switched_at_once(base: Tensor, fails: bool) -> None:
    unet, encoder, x = tuned_unet(), small_encoder(True), torch.ones(2, 4)
    tuned = output(unet), encoder(x).detach()

    def inside() -> None:
        with adapters_off(unet, encoder):
            assert torch.equal(output(unet), base)
            assert torch.equal(encoder(x), small_encoder(False)(x))
            if fails:
                raise KeyError

    if fails:
        with pytest.raises(KeyError):
            inside()
    else:
        inside()
    assert torch.equal(output(unet), tuned[0])
    assert torch.equal(encoder(x), tuned[1])
    assert not torch.equal(tuned[1], small_encoder(False)(x))


class TextEncoder(nn.Linear):
    pass


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: [make_diffusers_unet()], "UNet2DConditionModel"),
        (lambda: [make_diffusers_unet(), TextEncoder(1, 1)], "UNet2DConditionModel, TextEncoder"),
    ],
    ids=["one", "two"],
)
def test_models_without_adapters_are_an_error_that_names_their_classes(
    make: Callable[[], list[nn.Module]], names: str
) -> None:
    with pytest.raises(AptError, match=f"peft in {names}, found none"), adapters_off(*make()):
        pass
