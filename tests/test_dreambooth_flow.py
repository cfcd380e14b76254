"""Whole runs of a patched script that mixes noise in (flow matching), on real diffusers, peft and accelerate."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytest.importorskip("transformers")

import test_dreambooth_run as runs
import torch
from test_dreambooth_run import Train, assert_same, refused
from torch import Tensor

from apt_hooks.integrations.diffusers_dreambooth.adapter import BlackLatents, DreamBoothRun
from apt_hooks.integrations.diffusers_dreambooth.patch import patch, unpatch
from apt_hooks.method.augmentation import Placement
from apt_hooks.method.indicator import OverfittingIndicator

train, unpatched = runs.train, runs.unpatched  # fixtures
pytestmark = runs.pytestmark

EAGER = "num_bins = 1\nema_alpha = 1.0\nindicator_scale = 1e7\naugment_max_probability = 1.0\n"
EVERYTHING = ("--train_text_encoder", "--with_prior_preservation", "--weighting_scheme", "mode")
CASES: list[tuple[str, ...]] = [
    (),
    ("--cache_latents",),
    ("--precondition_outputs", "1", "--weighting_scheme", "sigma_sqrt"),
    EVERYTHING,
]


def reversed_levels(source: str) -> str:
    """As in Lumina 2: the share of the picture is what is called sigma, and the target the other way round."""
    source = source.replace(
        "(1.0 - sigmas) * model_input + sigmas * noise", "(1.0 - sigmas) * noise + sigmas * model_input"
    )
    source = source.replace("target = noise - model_input", "target = model_input - noise")
    return source.replace("timestep=timesteps,", "timestep=1000 - timesteps,")


def in_lists(source: str) -> str:
    """As in Z-Image: what the model gives is a list of samples with the sign turned, its time the other way round."""
    source = source.replace("model_pred = transformer(", "predictions = transformer(")
    unpacked = """predictions = list(predictions.unbind(dim=0))
                model_pred = torch.stack(predictions, dim=0)
                model_pred = -model_pred
                model_pred = model_pred.view("""
    source = source.replace("model_pred = model_pred.view(", unpacked)
    return source.replace("timestep=timesteps,", "timestep=1000 - timesteps,")


def levels_drawn(source: str) -> str:
    """As in Ideogram 4: sigmas themselves are drawn, by what the latents' size makes of the options."""
    begin, end = (
        source.index("                indices = (u *"),
        source.index("                noisy_model_input = (1.0"),
    )
    drawn = """                height = model_input.shape[-2] * 2
                mean = float(height) / 16 - 1
                sigmas = (0.1 + 0.8 * u + 0.1 * mean).to(dtype=model_input.dtype).view(bsz, 1, 1, 1)
                timesteps = (sigmas * 1000).reshape(bsz)
"""
    return source[:begin] + drawn + source[end:]


def own_names(source: str) -> str:
    """As a user has it, who has written the sum the other way round."""
    mixing = "(1.0 - sigmas) * model_input + sigmas * noise"
    source = source.replace(mixing, "noise.float() * sigmas + latents * (1 - sigmas)")
    drawn = "noise = torch.randn_like(model_input)"
    return source.replace(drawn, f"latents = model_input\n                {drawn}")


EDITS = [str, reversed_levels, in_lists, levels_drawn, own_names]


@pytest.mark.parametrize("arguments", CASES, ids=lambda given: given[0] if given else "plain")
@pytest.mark.parametrize("config", [None, "monitor_only = true", runs.NOTHING_ON, runs.FROM_START])
def test_with_nothing_that_acts_a_run_trains_the_lora_of_the_unpatched_script(
    train: Train, arguments: tuple[str, ...], config: str | None
) -> None:
    found = train("flow", *arguments, config=config)
    assert_same(found, train("flow", *arguments, patched=False))
    if config is not None:
        assert len(found.lines) == 4 and found.lines[-1]["delta_noise"] > 0.0
        assert found.lines[-1]["loss_weight"] == 1.0


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("arguments", CASES, ids=lambda given: given[0] if given else "plain")
def test_apt_acts_whatever_way_the_script_mixes(train: Train, arguments: tuple[str, ...], edit: Any) -> None:
    arguments += ("--learning_rate", "1e-2")
    found = train("flow", *arguments, config="num_bins = 1\nema_alpha = 1.0\nindicator_scale = 3.0", edit=edit)
    plain = train("flow", *arguments, patched=False, edit=edit)
    assert any(not torch.equal(found.lora[k], plain.lora[k]) for k in plain.lora)
    first, last = found.lines[0], found.lines[-1]
    assert first["gamma"] == [0.0]
    assert all(first[term] < last[term] for term in ("l_attn", "l_mu", "l_sigma"))


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("arguments", [(), ("--precondition_outputs", "1")], ids=["velocity", "sample"])
def test_gamma_is_in_epsilon_units_and_binned_by_the_noises_share(
    train: Train, monkeypatch: pytest.MonkeyPatch, edit: Any, arguments: tuple[str, ...]
) -> None:
    batches: list[tuple[Tensor, ...]] = []
    shares: list[Tensor] = []
    add, assess = OverfittingIndicator.add, DreamBoothRun.assess
    monkeypatch.setattr(OverfittingIndicator, "add", lambda self, *batch: (batches.append(batch), add(self, *batch)))

    def spied(self: DreamBoothRun, prediction: Tensor, target: Tensor, level: Tensor, *mixed: Tensor) -> Tensor:
        shares.append(level)
        return assess(self, prediction, target, level, *mixed)

    monkeypatch.setattr(DreamBoothRun, "assess", spied)
    if arguments and edit is reversed_levels:
        pytest.skip("that script has no such option")
    found = train("flow", "--train_batch_size", "1", *arguments, config="augmentation = false", edit=edit)
    assert len(batches) == len(found.lines) == 4
    for (level, tuned, frozen), share, line in zip(batches, shares, found.lines, strict=True):
        assert torch.equal(level, share.reshape(1)) and 0 < float(level) <= 1
        factor = (1 - level) / level if arguments else 1 - level
        assert float(tuned) == pytest.approx(float(factor**2) * line["loss_tuned"], rel=1e-4)
        assert float(frozen) == pytest.approx(float(factor**2) * line["loss_frozen"], rel=1e-4)
        assert len(line["gamma"]) == 10


def test_the_shares_of_a_reversed_script_are_the_noises(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    levels: list[list[Tensor]] = []
    add = OverfittingIndicator.add
    monkeypatch.setattr(
        OverfittingIndicator, "add", lambda self, *batch: (levels[-1].append(batch[0]), add(self, *batch))
    )
    for edit in (str, reversed_levels):
        levels.append([])
        train("flow", config="augmentation = false", edit=edit)
    assert all(torch.allclose(a, 1 - b) for a, b in zip(*levels, strict=True)) and len(levels[0]) == 4


@pytest.mark.parametrize("cached", [False, True], ids=["images", "cached"])
def test_what_is_moved_is_the_images_or_latents_of_a_cache_with_what_black_is_in_them(
    train: Train, monkeypatch: pytest.MonkeyPatch, cached: bool
) -> None:
    import tiny

    moved: list[tuple[torch.Size, Any]] = []
    vaes: list[Any] = []
    make_vae, apply = tiny.make_vae, Placement.apply

    def made() -> Any:
        vaes.append(make_vae())
        return vaes[-1]

    def spied(self: Placement, content: Tensor, fill: Any, dims: str = "bchw") -> Tensor:
        moved.append((content.shape, fill))
        return apply(self, content, fill, dims)

    monkeypatch.setattr(tiny, "make_vae", made)
    monkeypatch.setattr(Placement, "apply", spied)
    arguments = ("--cache_latents",) if cached else ()
    found = train("flow", *arguments, "--learning_rate", "1e-2", "--max_train_steps", "6", config=EAGER)
    assert moved and found.lines[0]["augmented"] == 0.0 and max(line["augmented"] for line in found.lines) > 0.0
    for shape, fill in moved:
        if cached:
            vae = vaes[0]
            with torch.no_grad():
                black = (
                    vae.encode(torch.full((1, 3, 16, 16), -1.0)).latent_dist.mode()[0, :, 2:-2, 2:-2].mean(dim=(1, 2))
                )
            assert shape == (2, 4, 8, 8) and torch.allclose(fill, black, atol=1e-6)
        else:
            assert shape == (2, 3, 16, 16) and fill == -1.0


def test_latents_that_are_moved_are_shifted_and_scaled_once_and_noise_is_not_drawn_again(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A placement that leaves everything where it is gives the LoRA of a run without augmentation."""
    monkeypatch.setattr(Placement, "apply", lambda self, content, fill, dims="bchw": content)
    calls: list[int] = []
    moves = DreamBoothRun.moves

    def always(self: DreamBoothRun, *given: Tensor) -> bool:
        with torch.random.fork_rng():
            moves(self, *given)
        calls.append(1)
        return True

    def mode(source: str) -> str:  # a posterior that is not drawn from
        return source.replace("latent_dist.sample()", "latent_dist.mode()").replace("[step].sample()", "[step].mode()")

    for arguments in ((), ("--cache_latents",)):
        plain = train("flow", *arguments, config="augmentation = false", edit=mode)
        with monkeypatch.context() as patched:
            patched.setattr(DreamBoothRun, "moves", always)
            assert_same(train("flow", *arguments, config="", edit=mode), plain)
    assert len(calls) == 8


def test_an_ignored_border_reaches_the_loss_of_what_the_model_gives(train: Train) -> None:
    found = train("flow", "--learning_rate", "1e-2", config=EAGER + 'augment_border = "ignore"')
    assert max(line["augmented"] for line in found.lines) > 0.0


def test_a_resumed_run_is_the_uninterrupted_one(train: Train) -> None:
    whole = train("flow", config=EAGER)
    state = str(whole.folder / "checkpoint-2")
    resumed = train(
        "flow",
        "--resume_from_checkpoint",
        state,
        config=EAGER,
        edit=lambda text: text.replace("global_step = 0\n", "global_step = 2 if args.resume_from_checkpoint else 0\n"),
    )
    assert [line["step"] for line in resumed.lines] == [3, 4]
    assert_same(resumed, whole)


def test_the_base_model_reads_the_class_word(train: Train) -> None:
    import tiny

    identifier = tiny.INSTANCE_PROMPT.split()[0]
    words = f'identifier = "{identifier}"\nclass_word = "w3"\nmonitor_only = true'
    arguments = ("--learning_rate", "0")
    found = train("flow", *arguments, config=words)
    assert all(line["delta_noise"] > 0.0 for line in found.lines), "the LoRA is the base model, its text is not"
    assert_same(found, train("flow", *arguments, patched=False))


@pytest.mark.parametrize("arguments", [(), ("--cache_latents",)], ids=["images", "cache"])
@pytest.mark.parametrize("apart", [False, True], ids=["in one statement", "apart"])
def test_a_second_picture_such_as_one_to_edit_is_moved_alike(
    train: Train, arguments: tuple[str, ...], apart: bool
) -> None:
    def edit(source: str) -> str:
        cached = "model_input = latents_cache[step].sample()"
        encoded = "model_input = vae.encode(pixel_values).latent_dist.sample()"
        scaled = "                model_input = (model_input - shift_factor) * scaling_factor\n"
        added = "                noisy_model_input = (1.0"
        assert all(source.count(line) == 1 for line in (cached, encoded, scaled, added))
        beside = "other = vae.encode(pixel_values * 1.0).latent_dist.mode()"
        source = source.replace("latent_dist.sample()", "latent_dist.mode()").replace(
            "[step].sample()", "[step].mode()"
        )
        encoded, cached = encoded.replace("sample", "mode"), cached.replace("sample", "mode")
        if apart:
            second = cached.replace("model_input", "other")
            both = f"                if args.cache_latents:\n                    {second}\n"
            both += f"                else:\n                    {beside}\n"
            source = source.replace(scaled, both + scaled)
        else:
            for line, second in ((cached, cached.replace("model_input", "other")), (encoded, beside)):
                source = source.replace(line, f"{line}\n                    {second}")
        source = source.replace(scaled, scaled + scaled.replace("model_input", "other"))
        return source.replace(added, f"                assert torch.equal(other, model_input)\n{added}")

    found = train("flow", *arguments, config=EAGER, edit=edit)
    assert max(line["augmented"] for line in found.lines) > 0.0


REFUSED = {
    "level of the latents": (
        "                noisy_model_input = (1.0",
        "                sigmas = sigmas * model_input.abs().mean().clamp(max=1)\n"
        "                noisy_model_input = (1.0",
        "`sigmas` is made of `model_input`",
    ),
    "changed in place": (
        "                noise = torch.randn_like(model_input)",
        "                scaling_factor += model_input.mean().item()\n"
        "                noise = torch.randn_like(model_input)",
        "runs once more, and `scaling_factor` changes",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_images_that_cannot_be_made_again_are_not_augmented_and_that_is_told(train: Train, case: str) -> None:
    old, new, said = REFUSED[case]

    def edit(source: str) -> str:
        assert source.count(old) == 1
        return source.replace(old, new)

    line = refused(train, "flow", config="", edit=edit)
    assert said in line and line.endswith("set [apt] augmentation = false")
    assert len(train("flow", config="augmentation = false", edit=edit).lines) == 4


def test_a_cache_that_nothing_was_seen_of_is_refused_when_its_latents_would_be_moved(train: Train) -> None:
    def elsewhere(source: str) -> str:  # the cache is filled by a function of the script's own
        filled = 'latents_cache.append(vae.encode(batch["pixel_values"]).latent_dist)'
        assert filled in source
        source = source.replace(filled, 'latents_cache.append(encoded(vae, batch["pixel_values"]))')
        function = "def encoded(vae, images):\n    return vae.encode(images).latent_dist\n\n\ndef to_sequence("
        return source.replace("def to_sequence(", function)

    line = refused(train, "flow", "--cache_latents", "--learning_rate", "1e-2", config=EAGER, edit=elsewhere)
    assert "come from a cache" in line and line.endswith("set [apt] augmentation = false")


def test_a_prediction_that_needs_what_is_made_behind_it_is_refused(tmp_path: Any) -> None:
    source = (runs.SCRIPTS / "flow.py").read_text(encoding="utf-8")
    old = "                model_pred = model_pred.view(noisy_model_input.shape)\n"
    assert old in source
    script = tmp_path / "script.py"
    script.write_text(
        source.replace(old, "                taken = counter.pop()\n" + old.replace(")\n", ") * taken\n"))
    )
    with pytest.raises(Exception, match="counter"):
        patch(script, script)
    script.write_text(source)
    patch(script, script)
    assert script.read_text() != source
    unpatch(script)
    assert script.read_text() == source


def test_black_is_encoded_once_without_a_draw() -> None:
    import sys

    sys.path.insert(0, str(runs.SCRIPTS))
    try:
        import tiny
    finally:
        sys.path.pop(0)
    vae, black = tiny.make_vae(), BlackLatents()
    state = torch.get_rng_state()
    black.keep(vae, torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    first = black.latent
    black.keep(vae, torch.zeros(2, 3, 32, 32))
    assert first is black.latent and first is not None and first.shape == (4,)
    assert torch.equal(state, torch.get_rng_state())
