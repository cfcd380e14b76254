"""T-LoRA: which ranks take part, by sample and by what the denoiser is called with; on both kinds of denoiser."""

import math

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import peft

from apt_hooks import AptError
from apt_hooks.integrations.peft import adapters_off
from apt_hooks.tinyworld.denoisers import DENOISERS
from apt_hooks.tinyworld.timestep_lora import active_rank, timestep_lora

RANK = 4


class Denoiser(nn.Module):
    """A linear layer, and a convolution of its outputs as a picture, both with LoRA."""

    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.rows, self.map = nn.Linear(6, 8), nn.Conv2d(8, 5, 1)
        config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["rows", "map"], **options)
        peft.inject_adapter_in_model(config, self, "own")

    def forward(self, sample, timestep, return_dict=True):
        return self.map(self.rows(sample).transpose(1, 2).unflatten(2, (2, 2)))


def trained(denoiser):
    for layer in (denoiser.rows, denoiser.map):
        nn.init.normal_(layer.lora_B["own"].weight)
    return denoiser


def with_first_ranks(denoiser, x, ranks):
    """The model with the LoRA cut off behind these ranks, by its weights written out."""
    y, layers = x, (denoiser.rows, denoiser.map)
    for layer, ax in zip(layers, ("...i,oi->...o", "bi...,oi->bo..."), strict=True):
        down, up = (getattr(layer, f"lora_{side}")["own"].weight.flatten(1) for side in "AB")
        weight = layer.base_layer.weight.flatten(1) + 2.0 * up[:, :ranks] @ down[:ranks]
        bias = layer.base_layer.bias
        y = torch.einsum(ax, y, weight) + (bias if layer is denoiser.rows else bias[:, None, None])
        y = y.transpose(1, 2).unflatten(2, (2, 2)) if layer is denoiser.rows else y
    return y


def state_of(module):
    modules = list(module.modules())
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules]
    return hooks, [sorted(vars(m)) for m in modules], [name for name, _ in module.named_parameters()]


def test_the_rank_is_the_papers_at_its_ends_and_between():
    timesteps = torch.arange(1001)
    found = active_rank(timesteps, 64, 32)
    assert (int(found[0]), int(found[1]), int(found[-1])) == (64, 63, 32)
    # By whole numbers: no division is rounded.
    assert found.tolist() == [32 * (1000 - t) // 1000 + 32 for t in range(1001)]
    assert active_rank(torch.tensor([0.0, 999.9, 1000.0, 250.0]), 8, 4).tolist() == [8, 4, 4, 7]
    assert active_rank(torch.tensor([500]), 8, 8).tolist() == [8]


@pytest.mark.parametrize("orthogonal", [False, True], ids=["plain", "orthogonal"])
def test_each_sample_has_the_ranks_of_its_own_timestep(orthogonal):
    denoiser, x = trained(Denoiser()), torch.randn(3, 4, 6)
    timesteps = torch.tensor([0, 500, 1000])
    with timestep_lora(denoiser, orthogonal=orthogonal), torch.no_grad():
        if orthogonal:
            for layer in (denoiser.rows, denoiser.map):
                layer.lora_B["own"].weight.add_(torch.randn(layer.lora_B["own"].weight.shape))
        together = denoiser(x, timesteps)
        for i, ranks in enumerate((4, 3, 2)):
            alone = denoiser(x[i : i + 1], timestep=timesteps[i])
            torch.testing.assert_close(together[i : i + 1], alone)
            if not orthogonal:
                torch.testing.assert_close(alone, with_first_ranks(denoiser, x[i : i + 1], ranks))
        assert not torch.allclose(denoiser(x, 0), denoiser(x, 1000))


def test_at_the_end_of_the_noise_the_least_ranks_take_part_and_the_others_learn_nothing():
    denoiser = trained(Denoiser())
    for least, ranks in ((None, 2), (1, 1)):
        denoiser.zero_grad()
        with timestep_lora(denoiser, least=least):
            denoiser(torch.randn(2, 4, 6), torch.tensor([1000, 1000])).square().sum().backward()
        gradient = denoiser.rows.lora_B["own"].weight.grad
        assert gradient[:, :ranks].abs().min() > 0 and not gradient[:, ranks:].any()
        assert not denoiser.map.lora_A["own"].weight.grad[ranks:].any()


def test_the_base_model_is_the_base_model_whatever_the_timestep():
    denoiser, x = trained(Denoiser()), torch.randn(2, 4, 6)
    with timestep_lora(denoiser, orthogonal=True), adapters_off(denoiser), torch.no_grad():
        torch.testing.assert_close(denoiser(x, 700), with_first_ranks(denoiser, x, 0))


@pytest.mark.parametrize("timestep", [0, 600, 1000])
def test_an_orthogonal_lora_begins_at_nothing_and_learns_all_its_parts(timestep):
    denoiser, x = Denoiser(), torch.randn(2, 4, 6, requires_grad=True)
    with adapters_off(denoiser):
        base = denoiser(x, timestep)
    (of_base,) = torch.autograd.grad(base.square().sum(), x)
    with timestep_lora(denoiser, orthogonal=True):
        prediction = denoiser(x, timestep)
        assert torch.equal(prediction, base)
        prediction.square().sum().backward()
        torch.testing.assert_close(x.grad, of_base)  # to what lies before it, its start is nothing either
        for layer in (denoiser.rows, denoiser.map):
            down, up = layer.lora_A["own"], layer.lora_B["own"]
            ones = torch.eye(RANK)
            torch.testing.assert_close(down.weight.flatten(1) @ down.weight.flatten(1).T, ones, atol=1e-5, rtol=0)
            torch.testing.assert_close(up.weight.flatten(1).T @ up.weight.flatten(1), ones, atol=1e-5, rtol=0)
            values = down.lora_singular_values
            assert (values[:-1] >= values[1:]).all() and values[-1] > 0
            assert all(p.grad.any() for p in (down.weight, up.weight, values))
        # Its name is one by which a training finds a LoRA's parameters.
        assert sum("lora_singular_values" in name for name, _ in denoiser.named_parameters()) == 2


def test_the_orthogonal_start_is_of_the_last_singular_values():
    denoiser = Denoiser()
    with timestep_lora(denoiser, orthogonal=True, seed=3):
        values = denoiser.rows.lora_A["own"].lora_singular_values.detach().clone()
        again = denoiser.rows.lora_A["own"].weight.detach().clone()
    matrix = torch.randn(8, 6, generator=torch.Generator().manual_seed(3)) / RANK
    torch.testing.assert_close(values, torch.linalg.svdvals(matrix)[-RANK:])
    with timestep_lora(denoiser, orthogonal=True, seed=3):
        assert torch.equal(denoiser.rows.lora_A["own"].weight, again)


@pytest.mark.parametrize("orthogonal", [False, True], ids=["plain", "orthogonal"])
def test_nothing_is_left_on_the_model_afterwards_an_error_or_not(orthogonal):
    denoiser = Denoiser()
    before, random_state = state_of(denoiser), torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt), timestep_lora(denoiser, orthogonal=orthogonal):
        denoiser(torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0)), 5)
        raise KeyboardInterrupt
    assert state_of(denoiser) == before and torch.equal(torch.get_rng_state(), random_state)


def test_a_model_without_lora_and_a_rank_above_the_layers_are_refused():
    with pytest.raises(AptError, match="found none"), timestep_lora(nn.Linear(2, 2)):
        pass
    narrow = Denoiser(rank_pattern={"map": 6})
    before, message = state_of(narrow), "rank 6 needs layers as wide; found one of 8 to 5"
    with pytest.raises(AptError, match=message), timestep_lora(narrow, orthogonal=True):
        pass
    assert state_of(narrow) == before


@pytest.mark.parametrize("part", DENOISERS)
@pytest.mark.parametrize("orthogonal", [False, True], ids=["plain", "orthogonal"])
def test_both_of_the_tiny_worlds_denoisers_are_called_as_it_expects(part, orthogonal):
    kind = DENOISERS[part]
    torch.manual_seed(0)
    module = kind.new().requires_grad_(False).eval()
    for p in module.parameters():
        if p.ndim > 1 and not p.any():  # adaptive norms and outputs begin at zero, behind which no LoRA would show
            nn.init.normal_(p, std=0.02)
    module.add_adapter(peft.LoraConfig(r=8, target_modules=["to_q", "to_v", "to_out.0"]), "own")
    latents, text = torch.randn(2, 4, 16, 16), torch.randn(2, 20, 128)
    timesteps = torch.tensor([10.0, 990.0])

    def predict(rows):
        return kind.predict(module, latents[rows], timesteps[rows], kind.condition(text[rows]))

    with timestep_lora(module, orthogonal=orthogonal), torch.no_grad():
        start = predict(slice(None))
        for name, p in module.named_parameters():
            if "lora_B" in name:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)), alpha=0.1)
        together = predict(slice(None))
        for i in range(2):
            torch.testing.assert_close(together[i : i + 1], predict(slice(i, i + 1)), rtol=1e-3, atol=1e-4)
        with adapters_off(module):
            torch.testing.assert_close(start, predict(slice(None)), rtol=1e-4, atol=1e-5)
    assert not math.isclose(float(together.square().mean()), float(start.square().mean()), rel_tol=1e-4)
