"""Lines about the LoRAs that a patched script saves, their drifts, and the key `stop`, on real diffusers and peft."""

from __future__ import annotations

import argparse
import gc
import json
import logging
import random
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytest.importorskip("transformers")

import test_dreambooth_run as runs
import torch
from safetensors.torch import load_file
from test_dreambooth_class_word import clip_like, ids
from test_dreambooth_run import WEIGHTS, Train, Trained, assert_same, refused
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from apt_hooks.errors import AptError
from apt_hooks.integrations.class_captions import ClassCaptions
from apt_hooks.integrations.diffusers_dreambooth import probe as probes
from apt_hooks.integrations.diffusers_dreambooth.adapter import class_words, probe_prompts
from apt_hooks.integrations.diffusers_dreambooth.class_word import ClassWords
from apt_hooks.integrations.diffusers_dreambooth.probe import StepProbe
from apt_hooks.integrations.diffusers_dreambooth.probe_prompts import ProbePrompts
from apt_hooks.results.checkpoint_table import checkpoint_table
from apt_hooks.results.read_checkpoints import find_runs
from apt_hooks.training.checkpoint_drifts import NEUTRAL, SAMPLES, Drifts, fixed_noise

train, unpatched, bases = runs.train, runs.unpatched, runs.bases  # fixtures
pytestmark = runs.pytestmark

WORDS = 'identifier = "w11"\nclass_word = "w5"'
PROMPT = ("--instance_prompt", "w7 w11 w8", "--learning_rate", "1e-2")
TRAINED = "--train_text_encoder"
EVERY_SECOND = ("--checkpointing_steps", "2")
CASES: list[tuple[str, ...]] = [
    ("one_encoder", *EVERY_SECOND),
    ("one_encoder", *EVERY_SECOND, TRAINED, "--with_prior_preservation"),
    ("one_encoder", *EVERY_SECOND, "--pre_compute_text_embeddings", "--with_prior_preservation"),
    ("one_encoder", *EVERY_SECOND, "--gradient_checkpointing", "--lora_dropout", "0.5"),
    ("two_encoders",),
    ("two_encoders", TRAINED),
    ("two_encoders", "--with_prior_preservation"),
    ("flow",),
    ("flow", TRAINED),
    ("flow", "--with_prior_preservation"),
]


def lines(found: Trained) -> list[dict[str, Any]]:
    text = (found.folder / f"{WEIGHTS}-checkpoints.jsonl").read_text(encoding="utf-8")
    return [line for line in map(json.loads, text.splitlines()) if "run" not in line]


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_drifts_are_measured_of_each_saved_lora_which_is_what_it_is_without(
    train: Train, case: tuple[str, ...]
) -> None:
    found = train(*case, *PROMPT, config=WORDS)
    measured = lines(found)
    last = f"{WEIGHTS}.safetensors"
    wanted = [(4, last)]
    if "--checkpointing_steps" in case:
        wanted = [(2, f"checkpoint-2/{last}"), (4, f"checkpoint-4/{last}"), (4, last)]
    assert [(line["step"], line["file"]) for line in measured] == wanted
    for line in measured:
        assert line["class_drift"] > 0 and line["free_drift"] > 0 and line["delta_noise"] > 0
        assert 0.5 < line["prompt_response"] < 1.5  # after four steps, of a model with random weights
        carried = json.loads(found.metadata(line["file"])["ss_apt_checkpoint"])
        assert carried == {name: value for name, value in line.items() if name not in ("file", "seconds")}
    assert_same(train(*case, *PROMPT, config=WORDS + "\ndrifts = false"), found)


@pytest.mark.parametrize(("extra", "times"), [((), 3), ((TRAINED,), 12)], ids=["frozen", "trained"])
def test_prompts_are_encoded_once_where_text_encoders_are_frozen(
    train: Train, monkeypatch: pytest.MonkeyPatch, extra: tuple[str, ...], times: int
) -> None:
    """No text, the neutral prompts, the class: by both models, at two checkpoints; and where they are trained, the
    words by both."""
    asked: list[Any] = []
    plain = StepProbe._texts_of_step
    monkeypatch.setattr(
        StepProbe, "_texts_of_step", lambda self, *given: (asked.append(given[-1]), plain(self, *given))[1]
    )
    train("one_encoder", *EVERY_SECOND, *extra, *PROMPT, config=WORDS)
    assert len(asked) == times and [""] in asked


@pytest.mark.parametrize("case", [CASES[1], CASES[3], ("flow", TRAINED)], ids=" ".join)
def test_a_monitored_run_is_that_of_the_unpatched_script(train: Train, case: tuple[str, ...]) -> None:
    found = train(*case, *PROMPT, config="monitor_only = true")
    assert lines(found)[-1]["free_drift"] > 0 and lines(found)[-1]["class_drift"] is None
    assert_same(found, train(*case, *PROMPT, patched=False))


@pytest.mark.parametrize(
    "case", [("one_encoder",), ("one_encoder", "--pre_compute_text_embeddings"), ("flow",)], ids=" ".join
)
def test_what_is_predicted_is_the_prompts_prediction_of_fixed_noise(
    train: Train, monkeypatch: pytest.MonkeyPatch, bases: dict[str, Any], case: tuple[str, ...]
) -> None:
    """Of the base model, whose copies are asked directly."""
    import tiny

    kept: list[tuple[Tensor, Tensor]] = []
    prompts = [NEUTRAL[0], ""] * (SAMPLES // 2)

    def measure(drifts: Drifts) -> dict[str, float | None]:
        with drifts._reference.apart(frozen=True):
            kept.append((drifts._probe.predict(prompts), drifts._probe.predict(prompts)))
        return dict.fromkeys(Drifts.NAMES)

    monkeypatch.setattr(Drifts, "measure", measure)
    train(*case, *PROMPT, config=WORDS)
    found, again = kept[0]
    assert torch.equal(found, again)
    pictures, noise = fixed_noise((4, 8, 8)), fixed_noise((4, 8, 8), 1)
    tokenizer = tiny.make_tokenizer()
    with torch.no_grad():
        read = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        text = bases["text_encoder"](read)
        if case[0] == "flow":
            shares = (torch.arange(SAMPLES) + 0.5) / SAMPLES
            noisy = (1 - shares.view(-1, 1, 1, 1)) * pictures + shares.view(-1, 1, 1, 1) * noise
            wanted = bases["transformer"](noisy, text[0], text.pooler_output, shares * 1000, return_dict=False)[0]
        else:
            times = (torch.arange(SAMPLES) + 0.5) * 1000 / SAMPLES
            noisy = tiny.make_scheduler().add_noise(pictures, noise, times.long())
            wanted = bases["unet"](noisy, times.long(), text[0]).sample
    assert torch.allclose(found.squeeze(1), wanted, atol=1e-5)


def test_the_rule_ends_the_training_behind_the_checkpoint_and_the_best_is_kept(
    train: Train, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="apt_hooks"):
        found = train("one_encoder", *EVERY_SECOND, *PROMPT, config='stop = "free_drift > 0"')
    assert len(found.lines) == 2 and [line["step"] for line in lines(found)] == [2, 2]
    assert f"[apt] stop has ended the training: free_drift > 0 at step 2; {WEIGHTS}-best" in caplog.text
    best = load_file(found.folder / f"{WEIGHTS}-best.safetensors")
    assert all(torch.equal(best[key], found.lora[key]) for key in best)


def test_without_an_end_the_best_is_the_last_one_and_keeps_its_own_line(train: Train) -> None:
    found = train("one_encoder", *EVERY_SECOND, *PROMPT, config='stop = "free_drift > 100"')
    assert len(found.lines) == 4
    assert json.loads(found.metadata(f"{WEIGHTS}-best.safetensors")["ss_apt_checkpoint"])["step"] == 4


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ("class_drift > 1", "stop names class_drift, which needs identifier and class_word"),
        ("held_out_gap < 0", "stop names held_out_gap, which needs a validation split"),
    ],
)
def test_a_rule_about_what_is_not_measured_is_refused_at_start(train: Train, rule: str, said: str) -> None:
    assert said in refused(train, "one_encoder", config=f'stop = "{rule}"')
    assert "(drifts = false)" in refused(train, "one_encoder", config='drifts = false\nstop = "free_drift > 1"')


def test_a_script_that_encodes_no_text_has_lines_without_drifts(train: Train) -> None:
    def without(source: str) -> str:
        old = "= compute_text_embeddings(args.instance_prompt, text_encoder, tokenizer)"
        assert source.count(old) == 1
        new = "= torch.ones(1, 6, 16), torch.ones(1, 16)"
        start = source.index("                if args.train_text_encoder:\n                    step_embeds")
        end = source.index("                    own = len(prompts)")
        return (source[:start] + "                if True:\n" + source[end:]).replace(old, new)

    found = train("flow", *PROMPT, config="", edit=without)
    text = (found.folder / f"{WEIGHTS}-checkpoints.jsonl").read_text(encoding="utf-8")
    assert "has no lines that encode text" in json.loads(text.splitlines()[0])["run"]["off"]
    (line,) = lines(found)
    assert line["free_drift"] is None and line["delta_noise"] > 0


def test_what_goes_wrong_in_measuring_ends_no_training(
    train: Train, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("shapes\ndiffer")

    plain = train("one_encoder", *EVERY_SECOND, config="drifts = false")
    for name in ("_texts", "_understood"):
        with monkeypatch.context() as patched:
            patched.setattr(StepProbe, name, fail)
            found = train("one_encoder", *EVERY_SECOND, config="")
        assert "are off from here on: " in caplog.text and "RuntimeError: shapes differ" in caplog.text
        assert_same(found, plain)
        assert [line["free_drift"] for line in lines(found)] == [None] * 3
        caplog.clear()


def test_a_resumed_run_goes_on_with_its_lines(train: Train, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    train("one_encoder", *EVERY_SECOND, *PROMPT, config="", folder=folder)
    more = ("--max_train_steps", "6", "--resume_from_checkpoint", "checkpoint-2")
    found = train("one_encoder", *EVERY_SECOND, *PROMPT, *more, config="", folder=folder)
    assert [line["step"] for line in lines(found)] == [2, 4, 6, 6]
    assert [name for name in folder.glob("*.1.jsonl") if "checkpoints" in name.name] == []


def test_pick_reads_the_files_in_their_folders(train: Train) -> None:
    found = train("one_encoder", *EVERY_SECOND, *PROMPT, config=WORDS)
    (run,) = find_runs(found.folder)
    names, rows = checkpoint_table(run)
    assert [row[-1] for row in rows] == [f"checkpoint-2/{WEIGHTS}.safetensors", f"{WEIGHTS}.safetensors"]
    assert {"class drift", "free drift"} < set(names)


# -- prompts in the caption's place ------------------------------------------------------------------------------------


def encoder_and_tokenizer() -> tuple[CLIPTextModel, Any]:
    tokenizer = clip_like()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=40, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return CLIPTextModel(config).eval(), tokenizer


def test_a_frame_of_the_scripts_own_is_put_around_the_prompt_and_other_texts_are_left() -> None:
    encoder, tokenizer = encoder_and_tokenizer()
    read: list[str] = []

    def encode(text: str | list[str]) -> tuple[Tensor, Tensor]:
        framed = [f"say {one} ." for one in ([text] if isinstance(text, str) else text)]
        both = []
        for texts in (framed, ["no"] * len(framed)):  # and a negative prompt
            tokens = tokenizer(texts, padding="max_length", max_length=40, truncation=True, return_tensors="pt")
            read.append(tokenizer.decode(tokens.input_ids[0], skip_special_tokens=True))
            both.append(encoder(tokens.input_ids)[0])
        return both[0], both[1]

    prompts = ProbePrompts({"encoder": encoder, "tokenizer": tokenizer}, ["", "a toy"])
    state = random.getstate(), torch.get_rng_state()
    prompts.keep(lambda: pytest.fail("called, though nothing was encoded"))
    encode("sks")
    prompts.keep(lambda: prompts.reading(encode)(["sks"]))
    prompts.keep(lambda: pytest.fail("called, though nothing more was encoded"))
    assert prompts.refused == "" and list(prompts.encoded) == ["", "a toy"]
    assert random.getstate() == state[0] and torch.equal(torch.get_rng_state(), state[1])
    for prompt, parts in prompts.encoded.items():
        with torch.no_grad():
            assert all(torch.equal(a, b) for a, b in zip(parts, encode(prompt), strict=True))  # type: ignore[arg-type]


def test_what_one_of_probe_and_class_words_encodes_again_is_nothing_to_the_other() -> None:
    encoder, tokenizer = encoder_and_tokenizer()
    names = {"encoder": encoder, "tokenizer": tokenizer}
    words, prompts = ClassWords(ClassCaptions("sks", "dog"), names), ProbePrompts(names, ["a toy"])

    def encode(text: str) -> Tensor:
        return encoder(torch.tensor([ids(tokenizer, text)]))[0]

    for first, second in ((words, prompts), (prompts, words)):
        encode("a sks")
        first.keep(lambda: encode("a sks"))
        second.keep(lambda: encode("a sks"))
        for kept in (words, prompts):
            kept.keep(lambda: pytest.fail("called, though nothing was encoded"))
    words.begin(2)
    prompts.begin()
    assert not encoder._forward_pre_hooks and not encoder.get_input_embeddings()._forward_pre_hooks


@pytest.mark.parametrize("of", [class_words, probe_prompts])
def test_what_the_script_deletes_is_not_kept_alive_by_its_variables_names(of: Any) -> None:
    args = argparse.Namespace(apt_config=None, apt_preset="sd15", identifier="sks", class_word="dog")

    def main() -> weakref.ref[Any]:
        encoder, tokenizer = encoder_and_tokenizer()
        found, made = weakref.ref(encoder), of(args, locals())
        del encoder, tokenizer
        gc.collect()
        assert found() is None, made
        return found

    main()


def test_tokens_that_were_made_before_are_the_prompts() -> None:
    encoder, tokenizer = encoder_and_tokenizer()
    tokens = torch.tensor([ids(tokenizer, "a sks")] * 2)
    prompts = ProbePrompts({"models": [encoder], "tokenizer": tokenizer}, [])
    for prompt in ("a toy", ""):
        with torch.no_grad(), prompts.asking(prompt):
            found = encoder(tokens)[0]
        assert prompts.ran
        with torch.no_grad():
            assert torch.equal(found, encoder(torch.tensor([ids(tokenizer, prompt)] * 2))[0])
    tokenizer.chat_template = "{{ messages }}"
    with pytest.raises(AptError, match="has a chat template, were made before"), prompts.asking("a toy"):
        encoder(tokens)


def test_of_several_texts_it_is_not_known_which_is_the_caption() -> None:
    encoder, tokenizer = encoder_and_tokenizer()

    def encode(text: str, system: Sequence[str]) -> Tensor:
        return encoder(torch.tensor([ids(tokenizer, text)]))[0]

    prompts = ProbePrompts({"encoder": encoder, "tokenizer": tokenizer}, [""])
    encode("sks", [])
    prompts.keep(lambda: prompts.reading(encode)("sks", ["be kind"]))
    assert "encode(...) is given several texts" in prompts.refused and prompts.encoded == {}
    assert "no text encoder" in ProbePrompts({"tokenizer": tokenizer}, [""]).refused


class Sequenced(nn.Module):
    """Is given a sequence: places of text, latents, a reference picture."""

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        return hidden_states + encoder_hidden_states.mean() + timestep[:, None, None]


@pytest.mark.parametrize(
    ("time", "scale"), [(lambda s: s, (1, 0)), (lambda s: 1000 - 1000 * s, (-1000, 1000)), (lambda s: 1 - s, (-1, 1))]
)
def test_latents_and_timestep_of_a_call_are_found_by_what_they_are(time: Any, scale: tuple[int, int]) -> None:
    model = Sequenced()
    prompts = ProbePrompts({}, [])
    text = torch.rand(3, 5, 4)
    prompts.own, prompts.encoded = [[text]], {"x": [text[:1] * 2]}
    probe = StepProbe(model, None, prompts, trained=False)
    share, latents = torch.tensor([0.3, 0.9]), torch.rand(2, 3, 4)
    given = torch.cat([torch.zeros(2, 2, 4), latents, torch.rand(2, 3, 4)], dim=1)
    probe.begin_step(lambda: None, share, latents)
    with torch.enable_grad():
        model(encoder_hidden_states=text[1:], hidden_states=given, timestep=time(share))
    assert len(model._forward_pre_hooks) == 0, "all is known"
    call = probe._call
    assert call is not None and call.scale == scale
    assert call.empty.flatten().tolist() == [True] * 2 + [False] * 6
    assert call.counted.flatten().tolist() == [False] * 2 + [True] * 3 + [False] * 3
    with torch.no_grad():
        found = probe.predict(["x"] * SAMPLES)
    noisy, shares = [fixed_noise((1, 8, 4), number) for number in range(2)], (torch.arange(8) + 0.5) / 8
    along = shares.view(-1, 1, 1, 1)
    wanted = (1 - along) * noisy[0] + along * noisy[1] + 2 * text[0].mean() + time(shares).view(-1, 1, 1, 1)
    assert torch.allclose(found[:, :, 2:5], wanted[:, :, 2:5], atol=1e-3 * abs(scale[0]))
    assert float(found[:, :, :2].abs().max()) == float(found[:, :, 5:].abs().max()) == 0.0


def test_a_lora_that_is_saved_before_the_first_batch_is_not_measured() -> None:
    probe = StepProbe(Sequenced(), None, ProbePrompts({}, []), trained=False)
    with pytest.raises(AptError, match="saved before the first batch"):
        probe.predict([""] * SAMPLES)
    assert probes.SAMPLES == SAMPLES
