import dataclasses
import functools
import json

import pytest
import safetensors
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

from apt_hooks import AptError
from apt_hooks.integrations.sampling.loras import Loras
from apt_hooks.tinyworld import preservation
from apt_hooks.tinyworld.attention import attention_of_words
from apt_hooks.tinyworld.concepts import CONCEPTS
from apt_hooks.tinyworld.denoisers import DENOISERS
from apt_hooks.tinyworld.lora_file import save_lora
from apt_hooks.tinyworld.methods import METHODS
from apt_hooks.tinyworld.model import PIPELINES, load_pipeline, sample
from apt_hooks.tinyworld.personalize import Training, lora, method_config, reference_pictures, train
from apt_hooks.tinyworld.saving import Saving

CONCEPT = CONCEPTS[4]
TRAINING = Training(steps=3, batch=1)
PICTURES = reference_pictures(CONCEPT)


@pytest.fixture(scope="module", autouse=True)
def few_class_pictures():
    """And rough ones: no test here looks at how good they are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preservation, "CLASS_PICTURES", 6)
        patch.setattr(preservation, "sample", functools.partial(sample, steps=2))
        yield


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline()


def trained_weights(pipeline, method, seed=0, log_path=None):
    """All methods without augmentation, with which the samples would be others as soon as gammas are."""
    with lora(pipeline, TRAINING.rank, seed), METHODS[method].adapter(pipeline.unet, seed):
        config, made = method_config(method, {"augmentation": False}), METHODS[method]
        trained = train(
            pipeline, PICTURES, CONCEPT.captions(), config, TRAINING, seed=seed, log_path=log_path, method=made
        )
        weights = {n: p.detach().clone() for n, p in pipeline.unet.named_parameters() if "lora_" in n}
    return weights, trained


@pytest.fixture(scope="module")
def untouched(pipeline):
    return state_of(pipeline.unet)


@pytest.fixture(scope="module")
def runs(pipeline, untouched, tmp_path_factory):
    """Of each method the LoRA, what else training returns, and the log."""
    folder, found = tmp_path_factory.mktemp("logs"), {}
    for method in METHODS:
        weights, trained = trained_weights(pipeline, method, log_path=folder / method)
        found[method] = weights, trained, logged(folder / method)
    return found


def state_of(unet):
    """Everything about a U-Net but its weights that a training could leave changed."""
    modules = list(unet.modules())
    return (
        sorted(vars(unet)),
        [type(m) for m in modules],
        [m.training for m in modules],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in modules],
        [(name, p.requires_grad) for name, p in unet.named_parameters()],
    )


def logged(path):
    return [line for line in map(json.loads, path.read_text().splitlines()) if "run" not in line]


def test_methods_are_what_their_names_say():
    configs = {name: method_config(name) for name in METHODS}
    plain = ("dreambooth", "prior", "dop", "t-lora", "t-lora+ortho")
    for name, config in configs.items():
        own = name if name in ("dco", "l2-sp") else "dreambooth" if name in plain else "apt"
        assert config.objective == own
        stabilized = name == "ata+rs" or name.startswith("apt")
        assert (bool(config.lambda_dist), bool(config.lambda_attn)) == (stabilized, name.startswith("apt"))
        assert config.loss_weighting == config.augmentation == (own == "apt")
        method = METHODS[name]
        assert (method.prior_preservation, method.output_preservation) == ("prior" in name, "dop" in name)
        assert (method.masks_rank, method.orthogonal) == ("t-lora" in name, "ortho" in name)


def test_all_methods_see_the_same_samples_timesteps_and_noise(runs):
    frozen = [[line["loss_frozen"] for line in log] for _, _, log in runs.values()]
    assert len(set(frozen[0])) == TRAINING.steps and all(losses == frozen[0] for losses in frozen)
    # A new LoRA changes nothing: what they have learned by the first step is nothing.
    assert {log[0]["loss_tuned"] for _, _, log in runs.values()} == {frozen[0][0]}
    assert len({log[-1]["loss_tuned"] for _, _, log in runs.values()}) > 1


@pytest.mark.parametrize("method", ["dreambooth", "apt", "apt+prior", "dop", "t-lora+ortho"])
def test_a_training_repeats_itself_and_leaves_nothing_behind(pipeline, untouched, runs, method):
    before = {name: tensor.clone() for name, tensor in pipeline.unet.state_dict().items()}
    random_state = torch.random.get_rng_state()
    weights, trained = trained_weights(pipeline, method)
    one, once, _ = runs[method]
    assert all(torch.equal(one[name], weights[name]) for name in one) and trained.delta_noise == once.delta_noise
    assert torch.equal(random_state, torch.random.get_rng_state())
    after = pipeline.unet.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert state_of(pipeline.unet) == untouched


def test_another_seed_is_another_lora(pipeline, runs):
    other, _ = trained_weights(pipeline, "dreambooth", seed=1)
    assert all(not torch.equal(weight, other[name]) for name, weight in runs["dreambooth"][0].items())


def test_a_training_that_is_stopped_leaves_the_unet_in_eval_mode_and_without_hooks(pipeline, untouched, tmp_path):
    def stop():
        raise KeyboardInterrupt

    with lora(pipeline, TRAINING.rank, 0):
        with pytest.raises(KeyboardInterrupt):
            config, log = method_config("apt"), tmp_path / "apt.jsonl"
            train(pipeline, PICTURES, CONCEPT.captions(), config, TRAINING, seed=0, log_path=log, advance=stop)
        assert not any(m.training or m._forward_hooks for m in pipeline.unet.modules())
    assert state_of(pipeline.unet) == untouched
    assert [line["step"] for line in logged(log)] == [1]


def test_delta_noise_begins_at_nothing_and_grows(runs):
    _, trained, _ = runs["dreambooth"]
    assert trained.steps == [1, 2, 3]
    assert 0 < trained.delta_noise[0] < trained.delta_noise[-1]


def test_every_step_is_logged(runs):
    *_, log = runs["apt"]
    assert [line["step"] for line in log] == [1, 2, 3] and all(line["l_attn"] is not None for line in log)


def test_without_a_rank_the_weights_are_fine_tuned_one_by_one(pipeline, untouched, tmp_path):
    """Adam's first step moves each number that has a gradient by the learning rate: of a product it would not."""
    one = dataclasses.replace(TRAINING, steps=1, rank=None, learning_rate=1e-3, average=0.0)
    with lora(pipeline, None, 0):
        train(pipeline, PICTURES, CONCEPT.captions(), method_config("dreambooth"), one, seed=0)
        weights = {n: p.detach().clone() for n, p in pipeline.unet.named_parameters() if "lora_" in n}
        save_lora(pipeline, tmp_path / "tuned.safetensors")
    assert state_of(pipeline.unet) == untouched
    for name, weight in weights.items():
        if "lora_A" in name:
            assert torch.equal(weight.flatten(1), torch.eye(len(weight))), name
        else:
            assert weight.abs().max() == pytest.approx(1e-3, rel=0.05), name
            assert weight.abs().median() == pytest.approx(1e-3, rel=0.1), name
    base = load_pipeline()
    name = next(n for n, _ in base.unet.named_modules() if n.endswith("attn1.to_q"))
    module, x = base.unet.get_submodule(name), torch.randn(2, base.unet.get_submodule(name).in_features)
    with Loras(base, {"it": tmp_path / "tuned.safetensors"}) as loras, loras.active("it"):
        change = weights[f"{name}.lora_B.concept.weight"]
        torch.testing.assert_close(module(x), torch.nn.functional.linear(x, module.weight + change, module.bias))


def test_a_saved_lora_is_what_diffusers_loads(pipeline, tmp_path):
    x, t, text = torch.randn(1, 4, 16, 16), torch.tensor([500]), torch.randn(1, 20, 128)
    with lora(pipeline, TRAINING.rank, 0):
        train(pipeline, PICTURES, CONCEPT.captions(), method_config("dreambooth"), TRAINING, seed=0)
        save_lora(pipeline, tmp_path / "dreambooth.safetensors")
        with torch.no_grad():
            wanted = pipeline.unet(x, t, text).sample
    with torch.no_grad():
        base = pipeline.unet(x, t, text).sample
        fresh = load_pipeline()
        fresh.load_lora_weights(tmp_path, weight_name="dreambooth.safetensors")
        assert torch.allclose(fresh.unet(x, t, text).sample, wanted, atol=1e-5)
    assert not torch.allclose(base, wanted, atol=1e-5)


@pytest.mark.parametrize("model", DENOISERS)
def test_either_model_is_trained_and_saved_with_what_its_own_preset_says(model, tmp_path):
    pipeline, denoiser = load_pipeline(PIPELINES[model]), DENOISERS[model]
    module, judged = getattr(pipeline, denoiser.part), []
    untouched = state_of(module)
    with lora(pipeline, TRAINING.rank, 0):
        carried = {name.rsplit(".lora_A", 1)[0] for name, _ in module.named_parameters() if ".lora_A" in name}
        assert all(any(name.endswith(target) for name in carried) for target in denoiser.lora_targets)
        config, log = method_config("apt", denoiser=denoiser), tmp_path / "apt.jsonl"
        checkpoints = {2: lambda: judged.append(module.training)}
        train(pipeline, PICTURES, CONCEPT.captions(), config, TRAINING, seed=0, log_path=log, checkpoints=checkpoints)
        save_lora(pipeline, tmp_path / "apt.safetensors")
        maps = attention_of_words(pipeline, "a photo of a sks ball", PICTURES[0])
    assert judged == [False] and state_of(module) == untouched
    assert maps.shape == (6, 16, 16) and (maps >= 0).all() and maps.std() > 0
    last = logged(log)[-1]
    assert all(last[term] > 0 for term in ("l_mu", "l_sigma", "l_attn", "delta_noise"))
    assert (tmp_path / "apt.safetensors").stat().st_size > 10_000


def test_the_lora_is_the_average_of_its_weights_over_the_steps(pipeline):
    seen, kept = [], []
    training = dataclasses.replace(TRAINING, average=0.5)
    with lora(pipeline, TRAINING.rank, 0):
        weights = [p for name, p in pipeline.unet.named_parameters() if "lora_" in name]
        start = [w.detach().clone() for w in weights]
        config = method_config("dreambooth")
        checkpoints = {step: lambda: kept.append([w.detach().clone() for w in weights]) for step in (1, 2, 3)}
        train(
            pipeline,
            PICTURES,
            CONCEPT.captions(),
            config,
            training,
            seed=0,
            advance=lambda: seen.append([w.detach().clone() for w in weights]),
            checkpoints=checkpoints,
        )
        kept.append([w.detach().clone() for w in weights])
    wanted = start
    for step, of_step in enumerate(seen, start=1):
        decay = min(0.5, step / (step + 10))
        wanted = [decay * w + (1 - decay) * x for w, x in zip(wanted, of_step, strict=True)]
        assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(wanted, kept[step - 1], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(kept[2], kept[3], strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(seen[-1], kept[-1], strict=True))


def test_held_out_pictures_are_others_before_the_same_background():
    held_out = reference_pictures(CONCEPT, take="held out ")
    assert held_out.shape == PICTURES.shape and torch.equal(PICTURES, reference_pictures(CONCEPT))
    same = (held_out == PICTURES).all(dim=1).float().mean(dim=(1, 2))
    assert ((same > 0.3) & (same < 1)).all()


@pytest.mark.parametrize("model", DENOISERS)
def test_the_held_out_gap_leaves_the_lora_as_it_is_and_is_zero_where_nothing_is_learned(model, tmp_path):
    pipeline, denoiser = load_pipeline(PIPELINES[model]), DENOISERS[model]
    held_out, found = reference_pictures(CONCEPT, take="held out "), {}
    for name, pictures, rate in (("on", held_out, 3e-3), ("off", None, 3e-3), ("zero", held_out, 0.0)):
        saving = Saving(tmp_path, name, 3, CONCEPT.subject.kind, pictures)
        training = dataclasses.replace(TRAINING, learning_rate=rate)
        with lora(pipeline, TRAINING.rank, 0):
            config = method_config("apt", denoiser=denoiser)
            train(pipeline, PICTURES, CONCEPT.captions(), config, training, seed=0, saving=saving)
            module = getattr(pipeline, denoiser.part)
            weights = [p.detach().clone() for n, p in module.named_parameters() if "lora_" in n]
        (line,) = logged(tmp_path / f"{name}-checkpoints.jsonl")
        found[name] = weights, line["held_out_gap"]
    assert all(map(torch.equal, found["on"][0], found["off"][0])) and found["off"][1] is None
    assert found["zero"][1] == [0] * 10 and len(found["on"][1]) == 10 and all(found["on"][1])
    with lora(pipeline, TRAINING.rank, 0), pytest.raises(AptError, match="stop names held_out_gap"):
        config = method_config("apt", {"stop": "held_out_gap < 0"}, denoiser)
        saving = Saving(tmp_path, "none", 3, CONCEPT.subject.kind)
        train(pipeline, PICTURES, CONCEPT.captions(), config, TRAINING, seed=0, saving=saving)


def test_drifts_and_checkpoints_leave_the_lora_as_it_is_to_the_bit_and_a_rule_ends_the_training(pipeline, tmp_path):
    found = {}
    for name, overrides in {"on": {}, "off": {"drifts": False}, "stopped": {"stop": "class_drift > 0"}}.items():
        saving = Saving(tmp_path, name, 2, CONCEPT.subject.kind)
        with lora(pipeline, TRAINING.rank, 0):
            torch.manual_seed(0)
            config = method_config("apt", overrides)
            train(pipeline, PICTURES, CONCEPT.captions(), config, TRAINING, seed=0, saving=saving)
            weights = {n: p.detach().clone() for n, p in pipeline.unet.named_parameters() if "lora_" in n}
        found[name] = weights, torch.rand(1), logged(tmp_path / f"{name}-checkpoints.jsonl")
    on, off, stopped = found.values()
    assert all(torch.equal(on[0][name], off[0][name]) for name in on[0]) and torch.equal(on[1], off[1])
    assert [line["step"] for line in on[2]] == [2, 3] and [line["step"] for line in stopped[2]] == [2]
    assert all(line["class_drift"] > 0 and line["free_drift"] > 0 for line in on[2])
    assert all(
        line["class_drift"] is None and line["gap"] == other["gap"] for line, other in zip(off[2], on[2], strict=True)
    )
    assert (tmp_path / "stopped-best.safetensors").read_bytes() == (
        tmp_path / "stopped-step00000002.safetensors"
    ).read_bytes()
    with safetensors.safe_open(tmp_path / "on.safetensors", "pt") as file:
        assert json.loads(file.metadata()["ss_apt_checkpoint"])["class_drift"] == on[2][-1]["class_drift"]
