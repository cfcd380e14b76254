import contextlib
import functools
import warnings

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytest.importorskip("safetensors")

from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, PNDMScheduler
from models import relative_difference
from safetensors.torch import load_file, save_file

from apt_hooks import AptError
from apt_hooks.hooks import attention_guidance
from apt_hooks.hooks.attention_guidance import AttentionRecording, attention_distance, guide
from apt_hooks.hooks.attention_maps import attention_shift, token_maps
from apt_hooks.hooks.capture import FeatureCapture, Features
from apt_hooks.hooks.layout import AttentionPoint, Tap
from apt_hooks.integrations.sampling import dreamblend
from apt_hooks.integrations.sampling.collapse import attention_collapse
from apt_hooks.integrations.sampling.denoising_steps import denoising_steps
from apt_hooks.integrations.sampling.dreamblend import DreamBlend
from apt_hooks.integrations.sampling.loras import Loras
from apt_hooks.integrations.sampling.pipelines import make_movable
from apt_hooks.method.ops.attention_alignment import attention_map
from apt_hooks.tinyworld.lora_file import save_lora
from apt_hooks.tinyworld.model import TOKENS, load_pipeline
from apt_hooks.tinyworld.personalize import lora

PROMPT, OTHER = "a photo of a big sks cup in the snow", "a drawing of a small sks cup in the forest"
SCHEDULERS = {
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "dpm++ 2m": DPMSolverMultistepScheduler,
}
OPTIONS = {"num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "latent"}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline()


@pytest.fixture(params=SCHEDULERS)
def scheduled(request, pipeline, monkeypatch):
    scheduler = SCHEDULERS[request.param].from_config(pipeline.training_scheduler.config)
    monkeypatch.setattr(pipeline, "scheduler", scheduler)
    return pipeline


@pytest.fixture(scope="module")
def loras(pipeline, tmp_path_factory):
    """Two random ones, in diffusers' format."""
    folder = tmp_path_factory.mktemp("loras")
    return [_random_lora(pipeline, folder / f"{seed}.safetensors", seed) for seed in (0, 1)]


def _random_lora(pipeline, path, seed):
    with lora(pipeline, 4, seed):
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in pipeline.unet.named_parameters():
            if "lora_B" in name:
                parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
        save_lora(pipeline, path)
    return path


def plain(pipeline, path, prompts=PROMPT, seeds=(7,)):
    """The pipeline's pictures with one LoRA, by diffusers alone."""
    pipeline.load_lora_weights(load_file(path), adapter_name="one")
    try:
        noise = [torch.Generator().manual_seed(seed) for seed in seeds]
        prompts = [prompts] * len(seeds) if isinstance(prompts, str) else prompts
        return pipeline(prompts, generator=noise, **OPTIONS).images
    finally:
        pipeline.unload_lora_weights()


# The latents' step.


def test_the_distance_is_a_sum_over_samples_of_squares_averaged_over_heads(pipeline):
    unet = pipeline.unet
    x, text = torch.randn(2, 2, 4, 16, 16), torch.randn(2, 2, TOKENS, 128)
    passes = []
    with FeatureCapture(unet, representation=False) as capture, torch.no_grad():
        for latents, words in zip(x, text, strict=True):
            with capture.record() as features:
                unet(latents, 500, words)
            passes.append(features)
    found = attention_distance(capture.layers, *passes)
    wanted = 0.0
    for i, layer in enumerate(capture.layers):
        maps = [attention_map(p.queries[i], p.keys[i], layer.heads, layer.scale) for p in passes]
        wanted += (maps[0] - maps[1]).square().sum(dim=(2, 3)).mean(dim=1).sum()
    assert float(found) == pytest.approx(float(wanted), rel=1e-5)


def test_a_step_goes_down_the_gradient(pipeline):
    latents, text = torch.randn(1, 4, 16, 16), torch.randn(1, TOKENS, 128)

    def predict(x):
        return pipeline.unet(x, 500, text)

    def distance(x):
        with capture.record() as features:
            predict(x)
        return attention_distance(capture.layers, features, reference)

    recording = AttentionRecording(())
    with FeatureCapture(pipeline.unet, representation=False) as capture:
        with recording.record(0, capture, 1):
            pipeline.unet(torch.randn(1, 4, 16, 16), 500, torch.randn(1, TOKENS, 128))
        reference = recording.steps[0]
        moved = guide(latents, predict, capture, reference, 1.0)
        assert torch.equal(guide(latents, predict, capture, reference, 0.0), latents)
        with torch.enable_grad():
            start = latents.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(distance(start), start)
        assert relative_difference(latents - moved, gradient) < 1e-4
        with torch.no_grad():
            assert distance(guide(latents, predict, capture, reference, 0.01)) < distance(latents)
    assert not latents.requires_grad and not moved.requires_grad


def test_no_step_is_longer_than_a_share_of_the_input_and_each_sample_has_its_own_length(pipeline):
    latents, text = torch.randn(2, 4, 16, 16), torch.randn(2, TOKENS, 128)
    latents[1] *= 3
    recording = AttentionRecording(())
    with FeatureCapture(pipeline.unet, representation=False) as capture:
        with recording.record(0, capture, 2):
            pipeline.unet(torch.randn(2, 4, 16, 16), 500, text)

        def guided(lr):
            return guide(latents, lambda x: pipeline.unet(x, 500, text), capture, recording.steps[0], lr) - latents

        far, near = guided(1e6), guided(1e-2)
    assert torch.allclose(far.flatten(1).norm(dim=1), 0.1 * latents.flatten(1).norm(dim=1), rtol=1e-4)
    for i in range(2):
        assert torch.cosine_similarity(far[i].flatten(), near[i].flatten(), dim=0) > 0.99


def test_float16_loses_no_small_gradients(pipeline):
    latents, text = torch.randn(1, 4, 16, 16), torch.randn(1, TOKENS, 128)
    recording, moves = AttentionRecording(()), {}
    with FeatureCapture(pipeline.unet, representation=False) as capture:
        with recording.record(0, capture, 1):
            pipeline.unet(latents + 0.01, 500, text)
        for dtype in (torch.float32, torch.float16):
            start, words = latents.to(dtype), text.to(dtype)
            predict = functools.partial(pipeline.unet.to(dtype), timestep=500, encoder_hidden_states=words)
            try:
                moved = guide(start, predict, capture, recording.steps[0], 100.0)
            finally:
                pipeline.unet.to(torch.float32)
            moves[dtype] = (moved - start).float()
    assert moves[torch.float32].abs().max() > 1e-4
    assert relative_difference(moves[torch.float16], moves[torch.float32]) < 0.3


def test_float16_is_guided_where_a_gradient_is_too_large_for_it(pipeline):
    tried = []

    def overflowing(scale):
        tried.append(scale)
        return torch.tensor([float("nan") if scale >= 1 else 3.0])

    assert attention_guidance._finite(overflowing).tolist() == [3.0] and tried == [2.0**10, 1.0, 2.0**-10]
    with pytest.raises(AptError, match="no finite gradient in float16"):
        attention_guidance._finite(lambda scale: torch.tensor([float("inf")]))


# In the pipeline.


def test_a_guidance_of_strength_0_is_the_plain_pipeline_bit_for_bit(scheduled, loras):
    early, late = loras
    with DreamBlend(scheduled, early, late, guidance_lr=0.0) as blend:
        recording = blend.early(PROMPT, 7, **OPTIONS)
        blended = blend.blend(recording).images
    assert sorted(recording.attention.steps) == [0, 1, 2]
    assert torch.equal(recording.images, plain(scheduled, early))
    assert torch.equal(blended, plain(scheduled, late))


def test_the_scheduler_steps_from_the_moved_latents_and_the_unet_sees_them_scaled(scheduled):
    """By hand: each step's latents, scaled, are moved by a known amount, predicted from, scaled back and stepped."""
    texts, generator = None, torch.Generator().manual_seed(7)
    start = torch.randn(1, 4, 16, 16, generator=generator)
    seen = []

    def before(step, inputs, predict):
        seen.append(inputs)
        return inputs + 0.1 * (step + 1)

    with denoising_steps(scheduled, before=before):
        found = scheduled(PROMPT, latents=start, **OPTIONS).images
    texts = scheduled.encode_prompt(PROMPT, "cpu", 1, True)
    scheduler = type(scheduled.scheduler).from_config(scheduled.scheduler.config)
    scheduler.set_timesteps(3)
    latents = start * scheduler.init_noise_sigma
    for step, timestep in enumerate(scheduler.timesteps):
        inputs = scheduler.scale_model_input(latents, timestep)
        assert torch.allclose(seen[step], inputs, atol=1e-5)
        latents = latents + 0.1 * (step + 1) * float(latents.norm() / inputs.norm())
        noisy = scheduler.scale_model_input(torch.cat([latents] * 2), timestep)
        with torch.no_grad():
            without, prompted = scheduled.unet(noisy, timestep, torch.cat(texts[::-1])).sample.chunk(2)
        latents = scheduler.step(without + 4.0 * (prompted - without), timestep, latents).prev_sample
    assert torch.allclose(found, latents, atol=1e-4)


def test_what_guides_is_the_pass_with_the_prompt(pipeline):
    conditions = []

    def before(step, inputs, predict):
        output = predict(inputs)
        with torch.no_grad():
            wanted = pipeline.unet(inputs, timestep, pipeline.encode_prompt(PROMPT, "cpu", 1, False)[0])
        conditions.append(torch.allclose(output[0], wanted.sample, atol=1e-5))

    options = {**OPTIONS, "num_inference_steps": 1}
    timestep = 999
    pipeline.scheduler.set_timesteps(1)
    timestep = pipeline.scheduler.timesteps[0]
    with denoising_steps(pipeline, before=before):
        pipeline(PROMPT, **options)
        assert conditions == [True]
    with denoising_steps(pipeline, before=before):
        pipeline(PROMPT, **{**options, "guidance_scale": 1.0})  # no pass without the prompt at all
    assert conditions == [True, True]


def test_a_picture_does_not_depend_on_those_made_with_it(pipeline, loras):
    with DreamBlend(pipeline, *loras, guidance_lr=1.0) as blend:
        both = blend.early([PROMPT, OTHER], [7, 8], **OPTIONS)
        together = blend.blend(both).images
        for i, (prompt, seed) in enumerate(((PROMPT, 7), (OTHER, 8))):
            alone = blend.early(prompt, seed, **OPTIONS)
            assert torch.allclose(both.images[i], alone.images[0], atol=1e-4)
            assert torch.allclose(together[i], blend.blend(alone).images[0], atol=1e-3)
            assert not torch.allclose(together[i], blend.late(alone).images[0], atol=1e-2)


def test_only_the_steps_of_the_range_are_recorded_and_guided(pipeline, loras):
    with DreamBlend(pipeline, *loras, guidance_lr=1.0, guidance_steps=(1, 2)) as blend:
        recording = blend.early(PROMPT, 7, **OPTIONS)
        one = blend.blend(recording).images
    assert list(recording.attention.steps) == [1]
    with DreamBlend(pipeline, *loras, guidance_lr=1.0) as blend:
        every = blend.blend(blend.early(PROMPT, 7, **OPTIONS)).images
    assert not torch.equal(one, every) and not torch.equal(one, plain(pipeline, loras[1]))


def test_a_recording_takes_two_bytes_a_number_of_the_queries_and_keys_of_what_is_guided(pipeline, loras):
    with DreamBlend(pipeline, *loras, guidance_steps=(0, 2), offload=True) as blend:
        recording = blend.early([PROMPT, OTHER], [7, 8], **OPTIONS)
    queries = 2 * 256 * 64 + 2 * 64 * 96  # two layers a level; the levels are 16x16 and 8x8
    keys = 2 * TOKENS * (64 + 96)
    assert recording.attention.nbytes == 2 * 2 * 2 * (queries + keys)  # bytes, steps, pictures: no half without prompt
    assert {x.dtype for f in recording.attention.steps.values() for x in f.queries.values()} == {torch.float16}


def test_the_pipeline_is_left_as_it_was(pipeline, loras):
    unet, scheduler = pipeline.unet, pipeline.scheduler
    names, before = [name for name, _ in unet.named_modules()], torch.random.get_rng_state()
    attributes = vars(scheduler).keys() | set()
    with DreamBlend(pipeline, *loras) as blend:
        blend.blend(blend.early(PROMPT, 7, **OPTIONS))
    blend.close()
    assert [name for name, _ in unet.named_modules()] == names
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in unet.modules())
    assert not {"step", "scale_model_input"} & vars(scheduler).keys() and attributes <= vars(scheduler).keys()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(p.grad is None for p in unet.parameters())


def test_weights_take_no_part_in_the_gradient_and_ask_for_theirs_afterwards(pipeline, loras, monkeypatch):
    monkeypatch.setattr(dreamblend, "guide", lambda latents, *_: trained.append(_trained(pipeline.unet)) or latents)
    trained = []
    pipeline.unet.requires_grad_(True)
    try:
        with DreamBlend(pipeline, *loras) as blend:
            blend.blend(blend.early(PROMPT, 7, **OPTIONS))
        assert trained == [0, 0, 0] and _trained(pipeline.unet) == len(list(pipeline.unet.parameters()))
    finally:
        pipeline.unet.requires_grad_(False)


def _trained(model):
    return sum(p.requires_grad for p in model.parameters())


def test_an_error_in_the_middle_leaves_nothing_behind(pipeline, loras):
    before = plain(pipeline, loras[0])

    def fail(*_):
        raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt), denoising_steps(pipeline, before=fail):
        pipeline(PROMPT, **OPTIONS)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in pipeline.unet.modules())
    assert "step" not in vars(pipeline.scheduler)
    assert torch.equal(plain(pipeline, loras[0]), before)


def test_a_pass_that_fails_is_not_explained_by_what_it_did_not_come_through(pipeline, loras, monkeypatch):
    def fail(*_args, **_options):
        raise ValueError("of the U-Net's own")

    monkeypatch.setattr(pipeline.unet.mid_block, "forward", fail)
    with (
        DreamBlend(pipeline, *loras) as blend,
        warnings.catch_warnings(record=True) as told,
        pytest.raises(ValueError, match="of the U-Net's own"),
    ):
        blend.early(PROMPT, 7, **OPTIONS)
    assert not [x for x in told if "did not come through" in str(x.message)]


def test_steps_may_be_watched_by_two_at_once(pipeline):
    seen = []
    with denoising_steps(pipeline, before=lambda step, *_: seen.append(("outer", step))):
        with denoising_steps(pipeline, before=lambda step, *_: seen.append(("inner", step))):
            pipeline(PROMPT, **OPTIONS)
        assert "step" in vars(pipeline.scheduler)
    assert "step" not in vars(pipeline.scheduler) and ("outer", 2) in seen and ("inner", 2) in seen


def test_what_is_recorded_is_the_pass_with_the_prompt_of_each_step(pipeline, loras):
    inputs = []
    with DreamBlend(pipeline, *loras) as blend:
        with denoising_steps(pipeline, before=lambda _step, x, _predict: inputs.append(x)):
            recording = blend.early(PROMPT, 7, **OPTIONS)
        words = pipeline.encode_prompt(PROMPT, "cpu", 1, False)[0]
        with (
            blend.loras.active("early"),
            FeatureCapture(pipeline.unet, representation=False) as capture,
            torch.no_grad(),
        ):
            for step, timestep in enumerate(pipeline.scheduler.timesteps):
                with capture.record() as features:
                    pipeline.unet(inputs[step], timestep, words)
                for kind in ("queries", "keys"):
                    for i, wanted in getattr(features, kind).items():
                        found = getattr(recording.attention.steps[step], kind)[i].float()
                        assert relative_difference(found, wanted) < 5e-3


def test_each_step_is_guided_by_the_same_step_of_the_early_run(pipeline, loras, monkeypatch):
    given = []
    monkeypatch.setattr(dreamblend, "guide", lambda inputs, *others: given.append(others[2]) or inputs)
    with DreamBlend(pipeline, *loras) as blend:
        early = blend.early(PROMPT, 7, **OPTIONS)
        blend.blend(early)
    assert [id(features) for features in given] == [id(early.attention.steps[step]) for step in range(3)]


def test_a_lora_of_kohyas_format_is_the_same_lora(pipeline, loras, tmp_path):
    path = tmp_path / "kohya.safetensors"
    own = {}
    for key, tensor in load_file(loras[0]).items():
        module, _, part = key.removeprefix("unet.").partition(".lora_")
        name = f"lora_unet_{module.replace('.to_out.0', '.to_out_0').replace('.', '_')}"
        own[f"{name}.lora_{'down' if part.startswith('A') else 'up'}.weight"] = tensor
        own[f"{name}.alpha"] = torch.tensor(4.0)
    save_file(own, path)
    with DreamBlend(pipeline, path, loras[0]) as blend:
        recording = blend.early(PROMPT, 7, **OPTIONS)
        assert torch.allclose(recording.images, blend.late(recording).images, atol=1e-5)


@pytest.fixture
def with_text(pipeline, loras, tmp_path):
    """A LoRA of U-Net and text encoder, in diffusers' format."""
    tensors, generator = load_file(loras[0]), torch.Generator().manual_seed(2)
    for name, module in pipeline.text_encoder.named_modules():
        if name.endswith("q_proj"):
            key = f"text_encoder.text_model.{name.removeprefix('text_model.')}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(4, module.in_features, generator=generator)
            tensors[f"{key}.lora_B.weight"] = torch.randn(module.out_features, 4, generator=generator)
    save_file(tensors, tmp_path / "with_text.safetensors")
    return tmp_path / "with_text.safetensors"


def test_a_lora_with_weights_for_the_text_encoder_acts_there_and_leaves_nothing(pipeline, loras, with_text):
    words = pipeline.tokenizer([PROMPT], return_tensors="pt").input_ids
    with torch.no_grad():
        base = pipeline.text_encoder(words)[0]
        for _ in range(2):
            with Loras(pipeline, {"both": with_text, "unet": loras[0]}) as files:
                for name, same in (("both", False), ("unet", True), (None, True)):
                    with files.active(name):
                        assert torch.equal(pipeline.text_encoder(words)[0], base) == same
            assert torch.equal(pipeline.text_encoder(words)[0], base)


def test_v_prediction_takes_smaller_steps(pipeline, loras, monkeypatch):
    with DreamBlend(pipeline, *loras) as blend:
        assert blend.guidance_lr == 0.1
    config = {**pipeline.scheduler.config, "prediction_type": "v_prediction"}
    monkeypatch.setattr(pipeline, "scheduler", type(pipeline.scheduler).from_config(config))
    with DreamBlend(pipeline, *loras) as blend:
        assert blend.guidance_lr == 0.01


# Bad input.


def test_a_lora_of_another_base_model_is_refused_in_one_line(pipeline, loras, tmp_path):
    wide = tmp_path / "wide.safetensors"
    save_file({k: torch.cat([v, v], dim=1 if "lora_A" in k else 0) for k, v in load_file(loras[0]).items()}, wide)
    elsewhere = tmp_path / "elsewhere.safetensors"
    elsewhere_keys = {f"unet.other.{k.removeprefix('unet.')}": v for k, v in load_file(loras[0]).items()}
    save_file(elsewhere_keys, elsewhere)
    for path in (wide, elsewhere):
        with pytest.raises(
            AptError, match=r"does not fit the model, a StableDiffusionPipeline; is it of another"
        ) as error:
            DreamBlend(pipeline, loras[0], path)
        assert "\n" not in str(error.value)
    DreamBlend(pipeline, *loras).close()  # nothing stayed loaded


def test_files_that_are_no_lora_are_refused(pipeline, loras, tmp_path):
    (tmp_path / "text.safetensors").write_text("no tensors")
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    for name, message in {
        "text.safetensors": "is no safetensors file",
        "other.safetensors": "is no LoRA, its tensors are named like 'weight'",
        "missing.safetensors": "no such file",
    }.items():
        with pytest.raises(AptError, match=f"{name}: {message}"):
            DreamBlend(pipeline, loras[0], tmp_path / name)


def test_a_pipeline_that_has_loras_is_refused(pipeline, loras):
    pipeline.load_lora_weights(load_file(loras[0]))
    try:
        with pytest.raises(AptError, match=r"call unload_lora_weights\(\) first"):
            DreamBlend(pipeline, *loras)
    finally:
        pipeline.unload_lora_weights()
    with Loras(pipeline, {"mine": loras[0]}) as own, own.active("mine"), pytest.raises(AptError, match="has LoRAs"):
        DreamBlend(pipeline, *loras)


def test_prompts_of_other_tokens_are_refused(pipeline, loras):
    with DreamBlend(pipeline, *loras) as blend:
        recording = blend.early(PROMPT, 7, **OPTIONS)
        with pytest.raises(AptError, match=r"'a photo of a cup' has 7, 'a photo of a big sks cup in the snow' 12"):
            blend.blend(recording, "a photo of a cup")


def test_another_size_than_the_recordings_is_refused(pipeline, loras):
    with DreamBlend(pipeline, *loras) as blend:
        recording = blend.early(PROMPT, 7, **OPTIONS)
        recording.options = {**OPTIONS, "height": 32, "width": 32}
        with pytest.raises(AptError, match=r"recorded run's batch, picture size"):
            blend.blend(recording)


def test_schedulers_that_go_on_from_other_latents_are_refused(pipeline, loras, monkeypatch):
    monkeypatch.setattr(pipeline, "scheduler", PNDMScheduler.from_config(pipeline.training_scheduler.config))
    with pytest.raises(AptError, match="the pipeline's scheduler is PNDMScheduler"):
        DreamBlend(pipeline, *loras)
    make_movable(pipeline, (said := []).append)
    assert type(pipeline.scheduler) is DDIMScheduler and said
    DreamBlend(pipeline, *loras).close()


def test_what_would_not_be_loaded_whole_is_refused(pipeline, loras, tmp_path):
    own = load_file(loras[0])
    key = next(iter(own))
    elsewhere = {k.replace("up_blocks.1", "up_blocks.7"): v.clone() for k, v in own.items()}
    for name, tensors, message in (
        ("dora", {**own, key.replace("lora_A.weight", "dora_scale"): torch.ones(1)}, "is a DoRA whose lengths"),
        ("loha", {"lora_unet_x.hada_w1_a": torch.ones(1)}, "has a LoHa of LyCORIS"),
        ("part", {**own, **elsewhere}, r"of its \d+ modules are not there"),
    ):
        save_file(tensors, tmp_path / f"{name}.safetensors")
        with pytest.raises(AptError, match=message):
            DreamBlend(pipeline, loras[0], tmp_path / f"{name}.safetensors")
    DreamBlend(pipeline, *loras).close()


def test_a_range_of_steps_that_holds_none_is_refused(pipeline, loras):
    with DreamBlend(pipeline, *loras, guidance_steps=(30, None)) as blend:
        early = blend.early(PROMPT, 7, **OPTIONS)
        with pytest.raises(AptError, match=r"leaves no denoising step to guide; the early run recorded 0"):
            blend.blend(early)


def test_options_that_are_the_runs_own_are_refused_and_a_negative_prompt_is_for_all(pipeline, loras):
    with DreamBlend(pipeline, *loras) as blend:
        with pytest.raises(AptError, match="generator, num_images_per_prompt: not among the options"):
            blend.early(PROMPT, 7, num_images_per_prompt=2, generator=None)
        one, two = (blend.early(PROMPT, [7, 8], negative_prompt=p, **OPTIONS).images for p in ("a cup", ["a cup"] * 2))
        assert torch.equal(one, two)


@pytest.mark.parametrize(
    "given",
    [{"guidance_lr": -1.0}, {"guidance_lr": float("nan")}, {"guidance_steps": (3, 2)}, {"guidance_steps": (-1, None)}],
)
def test_guidance_that_makes_no_sense_is_refused(pipeline, loras, given):
    with pytest.raises(AptError, match="guidance_"):
        DreamBlend(pipeline, *loras, **given)


def test_as_many_prompts_as_seeds_are_needed(pipeline, loras):
    with DreamBlend(pipeline, *loras) as blend, pytest.raises(AptError, match="found 2 and 1"):
        blend.early([PROMPT, OTHER], 7)


def test_other_pipelines_are_refused():
    with pytest.raises(AptError, match="object is not supported, it has no unet"):
        DreamBlend(object(), "a", "b")


def test_nothing_is_warned_of(pipeline, loras):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DreamBlend(pipeline, *loras).close()


# Attention maps and collapse.


def test_maps_of_tokens_are_shares_of_the_attention_also_of_wide_pictures(pipeline):
    with FeatureCapture(pipeline.unet, representation=False) as capture, torch.no_grad(), capture.record() as features:
        pipeline.unet(torch.randn(2, 4, 8, 32), 500, torch.randn(2, TOKENS, 128))
    maps = token_maps(capture.layers, features, (8, 32))
    assert maps.shape == (2, TOKENS, 8, 32)
    assert torch.allclose(maps.sum(dim=1), torch.ones(2, 8, 32), atol=1e-5)
    own = attention_map(features.queries[2], features.keys[2], capture.layers[2].heads, capture.layers[2].scale)
    finest = FeatureCapture(pipeline.unet, [2], representation=False)
    finest.close()
    layers = [i for i, layer in enumerate(capture.layers) if layer in finest.layers]
    alone = Features(
        {j: features.queries[i] for j, i in enumerate(layers)}, {j: features.keys[i] for j, i in enumerate(layers)}
    )
    one = token_maps(finest.layers[:1], alone, (8, 32))
    assert torch.allclose(one[1, 3].flatten(), own[1].mean(dim=0)[:, 3], atol=1e-6)


def test_the_shift_is_0_for_the_base_and_1_where_nothing_is_shared():
    layer = AttentionPoint("attn2", Tap("to_q", torch.nn.Identity()), Tap("to_k", torch.nn.Identity()), 1, 1.0)
    q = torch.eye(2)[None] * 50
    one = Features({0: q}, {0: torch.eye(2)[None]})
    other = Features({0: q}, {0: torch.eye(2).flip(0)[None]})
    assert attention_shift([layer], one, one).tolist() == [0.0]
    assert attention_shift([layer], one, other).tolist() == pytest.approx([1.0])


def test_the_collapse_of_loras_is_measured_on_the_base_models_way(pipeline, loras):
    small = loras[0].with_name("small.safetensors")
    save_file({k: v * (0.1 if "lora_B" in k else 1) for k, v in load_file(loras[0]).items()}, small)
    options = {**OPTIONS, "generator": torch.Generator()}
    images = []

    def call():
        options["generator"].manual_seed(7)
        images.append(pipeline(PROMPT, **options).images)

    call()
    found = attention_collapse(pipeline, {"small": small, "large": loras[0], "again": small}, call)
    assert 0 < found["small"] < found["large"] < 1 and found["small"] == pytest.approx(found["again"], rel=1e-5)
    assert torch.equal(*images)  # the way was the base's
    call()
    assert torch.equal(images[0], images[2])


# SDXL, whose U-Net is given more than a text.


def test_sdxl_is_guided_as_sd_is(tmp_path):
    pipeline = _tiny_sdxl()
    files = [_random_lora(pipeline, tmp_path / f"{seed}.safetensors", seed) for seed in (0, 1)]
    options = {**OPTIONS, "height": 32, "width": 32}
    before = pipeline(PROMPT, generator=torch.Generator().manual_seed(7), **options).images
    for lr in (0.0, 10.0):
        with DreamBlend(pipeline, *files, guidance_lr=lr) as blend:
            both = blend.early([PROMPT, OTHER], [7, 8], **options)
            late, blended = blend.late(both).images, blend.blend(both).images
            assert torch.equal(late, blended) == (lr == 0)
            assert not torch.equal(late, both.images)
            alone = blend.blend(blend.early(OTHER, 8, **options)).images[0]
            assert torch.allclose(blended[1], alone, atol=1e-3)
    assert torch.equal(pipeline(PROMPT, generator=torch.Generator().manual_seed(7), **options).images, before)


def _tiny_sdxl():
    from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from apt_hooks.tinyworld.model import new_tokenizer

    torch.manual_seed(0)
    tokenizer = new_tokenizer()
    numbers = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        projection_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        **numbers,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=(2, 4),
        cross_attention_dim=32,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16 + 6 * 8,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=4,
    )
    pipeline = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        text_encoder_2=CLIPTextModelWithProjection(text),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=EulerDiscreteScheduler(),
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
