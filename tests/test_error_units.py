import pytest
import torch

from apt_hooks import AptError
from apt_hooks.method.error_units import TARGETS, epsilon_error_scale, flow_error_scale, flow_target

# The schedule of Stable Diffusion and SDXL: betas linear in their roots.
ALPHAS_CUMPROD = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)


def noised(timesteps):
    """(x0, e, x_t, a, s) of some samples."""
    generator = torch.Generator().manual_seed(0)
    x0, e = torch.randn(2, len(timesteps), 4, 8, 8, generator=generator, dtype=torch.float64)
    kept = ALPHAS_CUMPROD[timesteps][:, None, None, None]
    a, s = kept.sqrt(), (1 - kept).sqrt()
    return x0, e, a * x0 + s * e, a, s


@pytest.mark.parametrize("target", TARGETS)
def test_a_wrong_prediction_is_as_wrong_an_epsilon_as_the_factor_says(target):
    timesteps = torch.tensor([0, 50, 250, 500, 750, 999])
    x0, e, x_t, a, s = noised(timesteps)
    true = {"epsilon": e, "v_prediction": a * e - s * x0, "sample": x0}[target]
    predicted = true + 0.1 * torch.randn(true.shape, generator=torch.Generator().manual_seed(1), dtype=true.dtype)
    # Both parts of the sample, as a sampler takes them from such a prediction, solved from the definitions.
    if target == "v_prediction":
        as_epsilon = torch.linalg.solve(
            torch.stack([torch.cat([a, s], 1), torch.cat([-s, a], 1)], 1).reshape(-1, 2, 2),
            torch.stack([x_t, predicted], 1).flatten(2),
        )[:, 1].reshape(x_t.shape)
    else:
        as_epsilon = (x_t - a * predicted) / s if target == "sample" else predicted
    wanted = (as_epsilon - e).square().mean(dim=(1, 2, 3))
    scale = epsilon_error_scale(target, ALPHAS_CUMPROD, timesteps)
    assert (scale is None) == (target == "epsilon")
    found = (predicted - true).square().mean(dim=(1, 2, 3)) * (1.0 if scale is None else scale.square())
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=0)


def test_a_loss_in_v_is_larger_by_18_45_and_128_in_the_three_noisiest_bins():
    scale = epsilon_error_scale("v_prediction", ALPHAS_CUMPROD, torch.arange(700, 1000))
    means = scale.square().reciprocal().reshape(3, 100).mean(dim=1)
    assert means.tolist() == pytest.approx([18, 45, 128], abs=0.6)


def test_without_signal_at_the_last_step_an_error_in_v_is_none_of_epsilon():
    schedule = torch.tensor([0.9, 0.25, 0.0])
    assert epsilon_error_scale("v_prediction", schedule, torch.tensor([2, 1])).tolist() == [0.0, 0.5]


def test_another_target_is_refused():
    with pytest.raises(AptError, match=r"predicts 'noise'.*epsilon, v_prediction, sample.*indicator_space"):
        epsilon_error_scale("noise", ALPHAS_CUMPROD, torch.tensor([0]))


@pytest.mark.parametrize("compared", ["velocity", "sample", "epsilon"])
def test_of_flow_matching_a_wrong_prediction_is_as_wrong_an_epsilon_as_the_factor_says(compared):
    sigmas = torch.tensor([0.02, 0.3, 0.5, 0.8, 0.999], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    x0, e = torch.randn(2, 5, 4, 8, 8, generator=generator, dtype=torch.float64)
    sigma = sigmas[:, None, None, None]
    x_t = (1 - sigma) * x0 + sigma * e
    true = {"velocity": e - x0, "sample": x0, "epsilon": e}[compared]
    predicted = true + 0.1 * torch.randn(true.shape, generator=generator, dtype=true.dtype)
    if compared == "velocity":  # both parts of the sample, from x_t and e - x0
        matrix = torch.stack([torch.stack([1 - sigmas, sigmas], 1), torch.tensor([[-1.0, 1.0]] * 5).double()], 1)
        parts = torch.linalg.solve(matrix, torch.stack([x_t, predicted], 1).flatten(2))
        as_epsilon = parts[:, 1].reshape(x_t.shape)
    else:
        as_epsilon = (x_t - (1 - sigma) * predicted) / sigma if compared == "sample" else predicted
    wanted = (as_epsilon - e).square().mean(dim=(1, 2, 3))
    found = (predicted - true).square().mean(dim=(1, 2, 3)) * flow_error_scale(compared, sigmas).square()
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=0)


def test_what_a_loss_of_flow_matching_compares_is_told_from_its_target():
    x0, noise = torch.randn(2, 3, 4, 8, 8)
    for wanted, target in (
        ("velocity", noise - x0), ("velocity", x0 - noise), ("sample", x0), ("epsilon", noise),
        ("velocity", (noise - x0).bfloat16()), (None, noise + x0), (None, noise[:, :1]),
    ):  # fmt: skip
        assert flow_target(target, x0, noise) == wanted


def test_without_noise_the_factor_of_a_sample_is_finite():
    scale = flow_error_scale("sample", torch.tensor([0.0, 0.02, 0.5, 1.0]))
    assert scale[0] == pytest.approx(50) and scale[1:].tolist() == pytest.approx([49.0, 1.0, 0.0])
