import pytest
import torch

from apt_hooks import AptError
from apt_hooks.method.units import TARGETS, epsilon_error_scale

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
    with pytest.raises(AptError, match=r"predicts 'flow'.*epsilon, v_prediction, sample.*indicator_space"):
        epsilon_error_scale("flow", ALPHAS_CUMPROD, torch.tensor([0]))
