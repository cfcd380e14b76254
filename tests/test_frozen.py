import pytest
import torch
from models import LAYOUTS, make_batch, make_diffusers_unet, make_tuned, make_unet, relative_difference
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from apt_hooks.errors import AptError
from apt_hooks.hooks.frozen import frozen_base
from apt_hooks.integrations.peft import adapters_off


def state_of(*modules):
    """Modes and `requires_grad` of everything."""
    modes = [m.training for module in modules for m in module.modules()]
    return modes, [p.requires_grad for module in modules for p in module.parameters()]


def tuned_step(unet, network):
    """The LoRA's gradient of one ordinary step."""
    x, timesteps, context, target = make_batch(unet)
    (unet(x, timesteps, context).float() - target).square().mean().backward()
    return network.gradient()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("way", ["off", "muted"])
def test_the_output_is_the_base_models_bit_for_bit(layout, way):
    base = make_unet(layout).eval()
    unet, network = make_tuned(layout, dropout=0.5)
    batch = make_batch(unet)[:3]
    wanted = base(*batch)
    assert not torch.equal(unet(*batch), wanted)
    with frozen_base([unet], getattr(network, way)):
        assert torch.equal(unet(*batch), wanted)


def test_the_dropout_of_the_base_model_is_off_inside():
    unet = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    x = torch.ones(2, 4)
    with frozen_base([unet], torch.no_grad):
        assert torch.equal(unet(x), unet[0](x))


@pytest.mark.parametrize("way", ["off", "muted"])
def test_the_random_stream_of_the_run_is_untouched(way):
    unet, network = make_tuned("up_blocks", dropout=0.5)
    batch = make_batch(unet)[:3]
    before = torch.get_rng_state()
    with frozen_base([unet], getattr(network, way)):
        unet(*batch)
        torch.rand(1)
    assert torch.equal(torch.get_rng_state(), before)


def test_no_graph_is_made_inside():
    unet, network = make_tuned("up_blocks")
    with frozen_base([unet], network.muted):
        assert not unet(*make_batch(unet)[:3]).requires_grad


def test_modes_and_requires_grad_come_back_as_they_were_module_by_module():
    unet, network = make_tuned("up_blocks")
    text_encoder = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1)).eval()
    unet.up_blocks[1].eval()
    unet.conv_in.weight.requires_grad_()
    before = state_of(unet, text_encoder)
    assert {True, False} == set(before[0]) == set(before[1])
    with frozen_base([unet, text_encoder], network.off):
        assert not any(state_of(unet, text_encoder)[0])
    assert state_of(unet, text_encoder) == before


def test_an_exception_inside_restores_everything():
    unet, network = make_tuned("up_blocks")
    before, forwards = state_of(unet), [m.forward for m in unet.modules()]
    stream = torch.get_rng_state()
    with pytest.raises(KeyError), frozen_base([unet], network.off):
        torch.rand(1)
        raise KeyError
    assert state_of(unet) == before
    assert [m.forward for m in unet.modules()] == forwards
    assert torch.equal(torch.get_rng_state(), stream)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("way", ["diffusers", "peft"])
def test_pefts_adapters_come_back_with_the_requires_grad_they_had(way):
    peft = pytest.importorskip("peft")
    unet, config = make_diffusers_unet().train(), peft.LoraConfig(r=2, target_modules=["to_q", "to_k"])
    base = unet(*make_batch(unet)[:3]).sample
    if way == "diffusers":
        unet.add_adapter(config)
        model, off = unet, lambda: adapters_off(unet)
    else:
        model = peft.get_peft_model(unet, config)
        off = model.disable_adapter
    lora = [(name, p) for name, p in model.named_parameters() if "lora_" in name]
    for name, parameter in lora:
        nn.init.normal_(parameter)
        # Only the B matrices are trained, as in LoRA-FA; peft switches both on when its adapters come back.
        parameter.requires_grad_("lora_B" in name)
    before = state_of(model)
    with frozen_base([model], off):
        frozen = model(*make_batch(unet)[:3]).sample
    assert torch.equal(frozen, base)
    assert state_of(model) == before
    assert not torch.equal(model(*make_batch(unet)[:3]).sample, base)


@pytest.mark.parametrize("way", ["off", "muted"])
def test_a_tuned_pass_in_the_same_autocast_context_still_gives_lora_its_gradient(way):
    # Older releases of torch keep casts made under no_grad for it; 2.13 does not.
    found = []
    for frozen_first in (False, True):
        unet, network = make_tuned("up_blocks")
        with torch.autocast("cpu", torch.bfloat16):
            if frozen_first:
                with frozen_base([unet], getattr(network, way)):
                    unet(*make_batch(unet)[:3])
            found.append(tuned_step(unet, network))
    assert found[0].norm() > 0
    assert relative_difference(found[1], found[0]) == 0.0


def test_a_switch_that_makes_no_context_is_refused_and_everything_is_as_before() -> None:
    unet, _ = make_tuned("up_blocks")
    context = frozen_base([unet], lambda: None)
    with pytest.raises(AptError, match=r"^adapters_off must make a context .*; found NoneType; for peft: "):
        context.__enter__()
    assert unet.training and torch.is_grad_enabled()


@pytest.mark.parametrize("way", ["peft", "stand-in"])
def test_inside_lora_computes_nothing(way):
    if way == "peft":
        peft = pytest.importorskip("peft")
        base, unet = make_diffusers_unet(), make_diffusers_unet().train()
        unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_k"]))
        off = lambda: adapters_off(unet)  # noqa: E731
    else:
        base, (unet, network) = make_unet("up_blocks"), make_tuned("up_blocks")
        off = network.off
    batch, counts = make_batch(unet)[:3], []
    for model, context in ((base, torch.no_grad), (unet, lambda: frozen_base([unet], off)), (unet, torch.no_grad)):
        with FlopCounterMode(display=False) as counter, context():
            model(*batch)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] < counts[2]
