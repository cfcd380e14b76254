import pytest
import torch

pytest.importorskip("diffusers")

from apt_hooks.tinyworld.denoisers import DENOISERS, MAX_WEIGHT, TEXT_WIDTH, TRANSFORMER, UNET


def noised(denoiser, early, seed=0):
    g = torch.Generator().manual_seed(seed)
    clean, noise = torch.randn(2, len(early), 4, 16, 16, generator=g)
    return clean, noise, denoiser.noised(denoiser.new_scheduler(), clean, noise, early, g)


def test_the_transformer_learns_the_way_from_the_picture_to_the_noise():
    clean, noise, at = noised(TRANSFORMER, torch.zeros(32, dtype=torch.bool))
    sigma = (at.timesteps / 1000).view(-1, 1, 1, 1)
    # From where it is, the velocity leads to both ends.
    assert torch.allclose(at.latents - sigma * at.target, clean, atol=1e-5)
    assert torch.allclose(at.latents + (1 - sigma) * at.target, noise, atol=1e-5)
    assert torch.equal(at.weight, torch.ones(32))


def test_the_transformer_s_timesteps_are_spread_over_the_batch():
    one, other = (noised(TRANSFORMER, torch.zeros(32, dtype=torch.bool), seed)[2].timesteps for seed in (0, 1))
    for timesteps in (one, other):
        assert torch.equal((timesteps * 32 / 1000).floor().long().sort().values, torch.arange(32))
    assert not torch.allclose(one, other, atol=1.0)


def test_the_unet_learns_the_noise_weighted_as_the_loss_of_v():
    clean, noise, at = noised(UNET, torch.zeros(64, dtype=torch.bool))
    alpha_bar = UNET.new_scheduler().alphas_cumprod[at.timesteps]
    root, rest = (part.sqrt().view(-1, 1, 1, 1) for part in (alpha_bar, 1 - alpha_bar))
    assert torch.equal(at.target, noise)
    assert torch.allclose(at.latents, root * clean + rest * noise, atol=1e-5)
    # An error of epsilon, and the error of v = a e - s x that it makes of the same noisy picture: e / a.
    assert torch.allclose(at.weight, (1 / alpha_bar).clamp(max=MAX_WEIGHT))
    assert at.weight.max() == MAX_WEIGHT and at.weight.min() < 2


@pytest.mark.parametrize("denoiser", DENOISERS.values(), ids=DENOISERS)
def test_pictures_on_black_are_shown_at_little_noise_alone(denoiser):
    early = torch.arange(256) % 2 == 0
    timesteps = noised(denoiser, early)[2].timesteps
    below = denoiser.zoomed_out_below
    assert timesteps[early].max() < below and timesteps[early].max() > 0.8 * below
    assert timesteps[~early].max() > 900


def test_the_two_show_pictures_on_black_at_about_the_same_noise():
    alpha_bar = UNET.new_scheduler().alphas_cumprod[UNET.zoomed_out_below]
    to_signal = ((1 - alpha_bar) / alpha_bar).sqrt()
    assert to_signal / (1 + to_signal) == pytest.approx(TRANSFORMER.zoomed_out_below / 1000, abs=0.01)


def test_the_transformer_is_told_the_mean_of_the_tokens_in_half_of_the_pictures_of_pretraining():
    text = torch.randn(400, 20, TEXT_WIDTH)
    told = TRANSFORMER.condition(text)
    assert torch.equal(told["encoder_hidden_states"], text)
    assert torch.allclose(told["pooled_projections"], text.sum(1) / 20, atol=1e-5)
    left = TRANSFORMER.condition(text, torch.Generator().manual_seed(0))
    assert torch.equal(left["encoder_hidden_states"], text)
    out = (left["pooled_projections"] == 0).all(1)
    assert 0.4 < out.float().mean() < 0.6
    assert torch.equal(left["pooled_projections"][~out], told["pooled_projections"][~out])


@pytest.mark.parametrize("denoiser", DENOISERS.values(), ids=DENOISERS)
def test_predictions_depend_on_picture_time_and_text(denoiser):
    torch.manual_seed(0)
    module = denoiser.new().eval()
    latents, other = torch.randn(2, 1, 4, 16, 16)
    text, another = torch.randn(2, 1, 20, TEXT_WIDTH)
    time = torch.full((1,), 500)

    def predicted(latents=latents, time=time, text=text):
        with torch.no_grad():
            return denoiser.predict(module, latents, time, denoiser.condition(text))

    assert predicted().shape == latents.shape
    for changed in (predicted(latents=other), predicted(time=time // 2), predicted(text=another)):
        assert not torch.allclose(predicted(), changed, atol=1e-5)


def test_the_transformer_is_of_the_size_that_it_is_to_have():
    assert 3e6 < sum(p.numel() for p in TRANSFORMER.new().parameters()) < 6e6
