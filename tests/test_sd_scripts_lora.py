"""Switching sd-scripts' LoRA off, without running it."""

from __future__ import annotations

import pytest
import torch
from models import LAYOUTS, KohyaLoRA, make_batch, make_tuned, make_unet
from torch import nn

from apt_hooks.errors import AptError
from apt_hooks.integrations.sd_scripts.lora import LoraSwitch


@pytest.mark.parametrize("layout", LAYOUTS)
def test_switched_off_the_output_is_the_base_models_bit_for_bit(layout: str) -> None:
    unet, _ = make_tuned(layout, dropout=0.5)
    inputs = make_batch(unet)[:3]
    with LoraSwitch([unet], "networks.lora").off(), torch.no_grad():
        off = unet(*inputs)
    with torch.no_grad():
        assert torch.equal(off, make_unet(layout)(*inputs))
        assert not torch.equal(off, unet(*inputs))


def test_switched_off_no_random_number_is_drawn() -> None:
    unet, network = make_tuned("up_blocks", dropout=0.5)
    inputs, switch = make_batch(unet)[:3], LoraSwitch([unet], "networks.lora")
    before = torch.get_rng_state()
    with switch.off():
        unet(*inputs)
    assert torch.equal(torch.get_rng_state(), before)
    with network.muted():
        unet(*inputs)
    assert not torch.equal(torch.get_rng_state(), before), "a multiplier of 0 draws, which is what the switch is for"


@pytest.mark.parametrize("fails", [False, True], ids=["after the pass", "after an exception in it"])
def test_every_forward_is_put_back(fails: bool) -> None:
    unet, network = make_tuned("output_blocks")
    replaced = [layer.__dict__["forward"] for layer in network.layers]
    switch = LoraSwitch([unet], "networks.lora")

    def run() -> None:
        with switch.off():
            assert all(
                layer.forward == lora.org_forward for layer, lora in zip(network.layers, network.loras, strict=True)
            )
            if fails:
                raise RuntimeError("in the pass")

    for _ in range(2):
        if fails:
            with pytest.raises(RuntimeError, match="in the pass"):
                run()
        else:
            run()
        assert [layer.__dict__["forward"] for layer in network.layers] == replaced


def test_several_loras_on_one_layer_are_all_off() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(8, 8), torch.randn(3, 8)
    base = layer(x)
    loras = [KohyaLoRA(layer, 2, 0.0), KohyaLoRA(layer, 2, 0.0)]
    tuned = layer(x)
    with LoraSwitch([nn.Sequential(layer)], "networks.lora").off():
        assert torch.equal(layer(x), base)
    assert torch.equal(layer(x), tuned)
    assert layer.forward == loras[-1].forward


def test_text_encoders_are_switched_with_the_unet() -> None:
    torch.manual_seed(0)
    unet, text_encoder, x = nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4)
    base = [model(x) for model in (unet, text_encoder)]
    loras = [KohyaLoRA(model[0], 2, 0.0) for model in (unet, text_encoder)]
    with LoraSwitch([unet, text_encoder], "networks.lora").off():
        assert all(torch.equal(model(x), y) for model, y in zip((unet, text_encoder), base, strict=True))
    assert len(loras) == 2


def test_models_without_a_replaced_forward_are_refused_with_the_networks_name() -> None:
    with pytest.raises(AptError, match=r"networks\.other.*found none"):
        LoraSwitch([make_unet("up_blocks")], "networks.other")


def test_a_forward_replaced_by_something_that_keeps_no_original_is_refused() -> None:
    layer = nn.Linear(4, 4)
    layer.forward = lambda x: x
    with pytest.raises(AptError, match="found none"):
        LoraSwitch([nn.Sequential(layer)], "networks.other")
