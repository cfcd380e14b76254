"""What the frozen model reads: the class word for the identifier, encoded without LoRA and no oftener than needed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from apt_hooks.errors import AptError
from apt_hooks.integrations.class_captions import ClassCaptions
from apt_hooks.integrations.sd_scripts.conditioning import FrozenConditioning, TextEncoders


@pytest.mark.parametrize(
    ("identifier", "caption", "wanted"),
    [
        ("sks", "a sks dog", "a bag dog"),
        ("sks", "sks", "bag"),
        ("sks", "sks, photo of (sks:1.2)", "bag, photo of (bag:1.2)"),
        ("sks", "he asks sksy sks2 _sks", "he asks sksy sks2 _sks"),
        ("sks", "a SKS dog", "a bag dog"),
        ("sks", "a sks's toy", "a bag's toy"),
        ("sks", "a dog", "a dog"),
        ("sks", "", ""),
        ("my dog", "my dog and my doge", "bag and my doge"),
        ("s.s", "sks and s.s", "sks and bag"),
        ("犬", "犬 と 子犬", "bag と 子犬"),
        ("<sks>", "a <sks> dog", "a bag dog"),
    ],
)
def test_whole_words_only_are_replaced(identifier: str, caption: str, wanted: str) -> None:
    captions = ClassCaptions(identifier, "bag")
    assert captions(caption) == wanted
    assert captions.occurs_in(["nothing here", caption]) == (caption != wanted)


def test_the_class_word_is_taken_as_it_stands() -> None:
    assert ClassCaptions("sks", r"\1 \g<0>")("a sks dog") == r"a \1 \g<0> dog"


def tokenizer(lengths: dict[str, int]) -> object:
    def tokenize(text: str, add_special_tokens: bool) -> SimpleNamespace:
        assert not add_special_tokens
        return SimpleNamespace(input_ids=[0] * sum(lengths.get(word, 1) for word in text.split()))

    return tokenize


def test_words_of_one_token_length_are_accepted() -> None:
    ClassCaptions("sks", "bag").check_lengths([tokenizer({"sks": 2, "bag": 2}), tokenizer({"sks": 1, "bag": 1})])


def test_a_word_is_counted_as_within_a_caption() -> None:
    def tokenize(text: str, add_special_tokens: bool) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[0] * (len(text.split()) + (text == "vase")))  # which begins a text in two

    ClassCaptions("sks", "vase").check_lengths([tokenize])


def test_words_of_unequal_token_length_in_any_tokenizer_are_refused() -> None:
    tokenizers = [tokenizer({"sks": 1, "toy": 1}), tokenizer({"sks": 1, "toy": 3})]
    with pytest.raises(AptError, match=r"'sks' is 1 tokens, class_word 'toy' is 3"):
        ClassCaptions("sks", "toy").check_lengths(tokenizers)


class Encoders:
    """Encodes a caption as its length, and keeps what it was asked for."""

    models: tuple[str, ...] | None = ("one",)

    def __init__(self) -> None:
        self.asked: list[tuple[list[str], bool]] = []

    def of_tokens(self, ids: list[Tensor]) -> list[Tensor]:
        self.asked.append((ids, False))
        return conditions()

    def for_good(self, caption: str, weighted: bool) -> list[Tensor]:
        return self([caption], weighted)

    def __call__(self, captions: list[str], weighted: bool) -> list[Tensor]:
        self.asked.append((captions, weighted))
        lengths = torch.tensor([float(len(caption)) for caption in captions])
        return [lengths[:, None, None].expand(-1, 3, 2), lengths[:, None].expand(-1, 4)]


COUNTED = torch.tensor([True, True, False])
GIVEN = ["a sks dog", "a dog", "sks"]


def conditions(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.full((3, 3, 2), -1.0, dtype=dtype), torch.full((3, 4), -1.0, dtype=dtype)]


def test_captions_of_samples_that_count_are_encoded_with_the_class_word() -> None:
    encoders = Encoders()
    frozen = FrozenConditioning(ClassCaptions("sks", "puppy"), lora=False, weighted=True)
    found = frozen(encoders, {"captions": GIVEN}, COUNTED, conditions(torch.bfloat16))
    assert encoders.asked == [(["a puppy dog", "a dog", "sks"], True)]
    assert [cond.dtype for cond in found] == [torch.bfloat16] * 2
    assert found[1][:, 0].tolist() == [11.0, 5.0, 3.0]


def test_without_words_to_replace_the_batchs_own_tokens_are_encoded_without_lora() -> None:
    encoders = Encoders()
    batch = {"input_ids_list": ["ids 1", "ids 2"]}
    FrozenConditioning(None, lora=True, weighted=False)(encoders, batch, COUNTED, conditions())
    assert encoders.asked == [(["ids 1", "ids 2"], False)]


def test_weighted_captions_are_encoded_from_their_text() -> None:
    encoders = Encoders()
    FrozenConditioning(None, lora=True, weighted=True)(encoders, {"captions": GIVEN}, COUNTED, conditions())
    assert encoders.asked == [(GIVEN, True)]


def test_what_no_lora_and_no_word_changes_is_not_encoded_again() -> None:
    encoders, given = Encoders(), conditions()
    frozen = FrozenConditioning(ClassCaptions("xyz", "puppy"), lora=False, weighted=False)
    assert frozen(encoders, {"captions": GIVEN}, COUNTED, given) is given
    assert encoders.asked == []


def test_of_cached_outputs_only_changed_captions_are_encoded_and_each_once() -> None:
    encoders, given = Encoders(), conditions()
    frozen = FrozenConditioning(ClassCaptions("sks", "puppy"), lora=False, weighted=False)
    batch = {"captions": GIVEN, "text_encoder_outputs_list": given}
    for _ in range(3):
        found = frozen(encoders, batch, COUNTED, given)
        assert found[0][:, 0, 0].tolist() == [11.0, -1.0, -1.0]
        assert found[1][:, 0].tolist() == [11.0, -1.0, -1.0]
    assert encoders.asked == [(["a puppy dog"], False)]
    frozen(encoders, {**batch, "captions": ["sks cat", "a sks dog", "a dog"]}, torch.tensor([True] * 3), given)
    assert encoders.asked[1:] == [(["puppy cat"], False)]


def test_the_cached_outputs_themselves_stay_as_they_are() -> None:
    given = [cond.requires_grad_() for cond in conditions(torch.float16)]
    batch = {"captions": GIVEN, "text_encoder_outputs_list": given}
    frozen = FrozenConditioning(ClassCaptions("sks", "puppy"), lora=False, weighted=False)
    found = frozen(Encoders(), batch, COUNTED, given)
    assert all(torch.equal(cond, like) for cond, like in zip(given, conditions(torch.float16), strict=True))
    assert not any(cond.requires_grad for cond in found)
    assert [cond.dtype for cond in found] == [torch.float16] * 2


def test_text_encoders_run_through_the_trainers_strategies() -> None:
    asked: list[object] = []
    tokenizing = SimpleNamespace(
        tokenize=lambda captions: ["ids", captions],
        tokenize_with_weights=lambda captions: (("ids", captions), "weights"),
    )
    encoding = SimpleNamespace(
        encode_tokens=lambda *given: asked.append(given) or [torch.ones(1)],
        encode_tokens_with_weights=lambda *given: asked.append(given) or [torch.zeros(1)],
    )
    encoders = TextEncoders("models", encoding, tokenizing)
    assert encoders(["a"], weighted=False) == [torch.ones(1)]
    assert encoders(["a"], weighted=True) == [torch.zeros(1)]
    assert asked == [
        (tokenizing, "models", ["ids", ["a"]]),
        (tokenizing, "models", ("ids", ["a"]), "weights"),
    ]


def test_for_good_a_caption_is_encoded_with_the_strategys_masks_and_without_dropout() -> None:
    class Sd3Like:
        apply_t5_attn_mask, apply_lg_attn_mask = True, False

        def __init__(self) -> None:
            self.given: list[object] = []

        def encode_tokens(
            self, tokenizing: object, models: object, ids: object, apply_lg_attn_mask: bool = False,
            apply_t5_attn_mask: bool = False, enable_dropout: bool = True,
        ) -> list[Tensor]:  # fmt: skip
            self.given.append((apply_lg_attn_mask, apply_t5_attn_mask, enable_dropout))
            return [torch.ones(1)]

    encoding = Sd3Like()
    encoders = TextEncoders("models", encoding, SimpleNamespace(tokenize=lambda captions: captions))
    encoders.for_good("a dog", weighted=False)
    encoders(["a dog"], weighted=False)  # as the trainer does it in a step
    assert encoding.given == [(False, True, False), (False, False, True)]


def test_what_was_encoded_with_the_lora_off_is_not_overwritten_by_what_was_encoded_for_good() -> None:
    """A trained CLIP beside a cached T5."""
    given = [torch.zeros(2, 3), torch.zeros(2, 3)]

    class ClipAlone(Encoders):
        def __call__(self, captions: list[str], weighted: bool) -> list[object]:
            return [torch.full((len(captions), 3), 7.0), None]

        def for_good(self, caption: str, weighted: bool) -> list[Tensor]:
            return [torch.full((1, 3), 1.0), torch.full((1, 3), 2.0)]

    dataset = SimpleNamespace(
        image_data={"a": SimpleNamespace(caption="sks")}, image_to_subset={"a": None},
        process_caption=lambda subset, caption: caption,
    )  # fmt: skip
    frozen = FrozenConditioning(ClassCaptions("sks", "dog"), lora=True, weighted=False)
    frozen.prepare(ClipAlone(), dataset)
    batch = {"captions": ["sks", "cat"], "text_encoder_outputs_list": given}
    clip, t5 = frozen(ClipAlone(), batch, torch.tensor([True, True]), given)
    assert clip.tolist() == [[7.0] * 3] * 2 and t5.tolist() == [[2.0] * 3, [0.0] * 3]

    class Later(ClipAlone):
        def for_good(self, caption: str, weighted: bool) -> list[object]:
            return [torch.full((1, 3), 1.0), None]

    with pytest.raises(AptError, match="caption 'a dog' was not encoded when the others were"):
        frozen(Later(), {**batch, "captions": ["a sks", "cat"]}, torch.tensor([True, True]), given)
