"""The class word in captions that are tokens already, and in what the U-Net is given."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("peft")
from peft import LoraConfig, PeftModel
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from apt_hooks.errors import AptError
from apt_hooks.integrations.class_captions import ClassCaptions
from apt_hooks.integrations.diffusers_dreambooth.class_word import ClassTokens, ClassWords

LENGTH = 10
PICTURES = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
}


def clip_like(*more: str) -> PreTrainedTokenizerFast:
    """Takes words apart as CLIP's does, the last piece with a mark; "sks", "dog" and "toy" are one token."""
    letters = "abcdefghijklmnopqrstuvwxyz1,"
    pieces = [*letters, *(f"{c}</w>" for c in letters)]
    merges = [("k", "s</w>"), ("s", "ks</w>"), ("o", "g</w>"), ("d", "og</w>"), ("o", "y</w>"), ("t", "oy</w>")]
    names = ["<start>", "<end>", *more, *pieces, *("".join(pair) for pair in merges)]
    vocabulary = {name: i for i, name in enumerate(names)}
    made = Tokenizer(models.BPE(vocabulary, merges, end_of_word_suffix="</w>"))
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    made.decoder = decoders.BPEDecoder("</w>")
    made.post_processor = processors.TemplateProcessing(
        "<start> $A <end>", special_tokens=[("<start>", 0), ("<end>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<start>", eos_token="<end>", pad_token="<end>", model_max_length=LENGTH
    )


def ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, padding="max_length", truncation=True).input_ids


@pytest.mark.parametrize("class_word", ["dog", "big dog", "a"])
@pytest.mark.parametrize(
    "caption",
    ["sks", "a sks toy", "sks sks", "a toy, sks, a sks", "xsks", "xsks sks", "asks a sks", "sksx", "sks x", "toy"],
)
def test_tokens_become_those_of_the_caption_with_the_class_word(caption: str, class_word: str) -> None:
    tokenizer = clip_like()
    captions = ClassCaptions("sks", class_word)
    new, grown = ClassTokens(captions, tokenizer)(ids(tokenizer, caption))
    assert new == ids(tokenizer, captions(caption))
    assert grown == sum(len(tokenizer(c).input_ids) for c in (captions(caption), "a")) - sum(
        len(tokenizer(c).input_ids) for c in (caption, "a")
    )


@pytest.mark.parametrize("class_word", ["dog", "dog dog dog"])
def test_a_caption_that_fills_its_row_still_ends(class_word: str) -> None:
    tokenizer = clip_like()
    caption = "a a a a a sks b c d e f g"
    new, _ = ClassTokens(ClassCaptions("sks", class_word), tokenizer)(ids(tokenizer, caption))
    assert new == ids(tokenizer, caption.replace("sks", class_word)) and new[-1] == 1


def test_an_identifier_of_several_words_is_replaced_whole() -> None:
    tokenizer = clip_like()
    tokens = ClassTokens(ClassCaptions("sks dog", "toy"), tokenizer)
    assert tokens(ids(tokenizer, "a sks dog b"))[0] == ids(tokenizer, "a toy b")
    assert tokens(ids(tokenizer, "a sks b dog"))[0] == ids(tokenizer, "a sks b dog")


def bytes_like() -> PreTrainedTokenizerFast:
    """Reads a word with the space before it, as Qwen's and Llama's do; "sks", "dog" are one token, either way."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("k", "s"), ("s", "ks"), ("Ġ", "sks"), ("o", "g"), ("d", "og"), ("Ġ", "dog"), ("(", "sks")]
    names = ["<end>", *letters, *("".join(pair) for pair in merges)]
    made = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges))
    words = pre_tokenizers.Split(Regex(r"[^\w]?\w+|."), behavior="isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<end>", pad_token="<end>", model_max_length=2 * LENGTH
    )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("class_word", ["dog", "big dog", "a"])
@pytest.mark.parametrize(
    "caption", ["sks", "a sks toy", "sks sks", "a sks, a sks", "sks's", "xsks", "asks a sks", "SKS", "a SKS", "toy"]
)
def test_a_tokenizer_of_bytes_reads_the_word_with_the_space_before_it(caption: str, class_word: str, side: str) -> None:
    tokenizer = bytes_like()
    tokenizer.padding_side = side
    captions = ClassCaptions("sks", class_word)
    assert ClassTokens(captions, tokenizer)(ids(tokenizer, caption))[0] == ids(tokenizer, captions(caption))


def test_an_identifier_within_another_token_is_refused() -> None:
    tokenizer = bytes_like()
    with pytest.raises(AptError, match=r"identifier 'sks' stands in 'a\(sks', but not as tokens of its own"):
        ClassTokens(ClassCaptions("sks", "dog"), tokenizer)(ids(tokenizer, "a(sks"))


# -- models ------------------------------------------------------------------------------------------------------------


def encoder() -> CLIPTextModel:
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=70, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=LENGTH, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return CLIPTextModel(config).eval()


class Unet(nn.Module):
    """Returns what it is given."""

    def forward(self, *given: Any, **named: Any) -> Any:
        return given, named


def uncounted(samples: torch.Tensor) -> None:
    return None


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("class_word", ["dog", "big dog", "a"])
@pytest.mark.parametrize(
    "call",
    [
        lambda model, ids, mask: model(ids, mask),
        lambda model, ids, mask: model(ids, attention_mask=mask),
        lambda model, ids, mask: model(input_ids=ids, attention_mask=mask, return_dict=False),
    ],
)
def test_text_encoders_read_the_class_word_however_they_are_called(
    call: Callable[..., Any], class_word: str, masked: bool
) -> None:
    model, tokenizer = encoder(), clip_like()
    captions = ["a sks", "a toy"]
    words = ClassWords(ClassCaptions("sks", class_word), {"model": [model], "tokenizer": tokenizer})
    words.begin(2)
    given, wanted = (
        tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
        for texts in (captions, [caption.replace("sks", class_word) for caption in captions])
    )
    with words.read_by(Unet(), uncounted):
        found = call(model, given.input_ids, given.attention_mask if masked else None)[0]
    torch.testing.assert_close(found, call(model, wanted.input_ids, wanted.attention_mask if masked else None)[0])
    plain = call(model, given.input_ids, None)[0]
    assert not torch.equal(found[0], plain[0])
    assert torch.equal(call(model, given.input_ids, None)[0], plain), "no hook is left"


@torch.no_grad()
@pytest.mark.parametrize("wrapped", [lambda model: nn.ModuleDict({"module": model}), PeftModel])
def test_a_text_encoder_within_a_wrapper_is_found(wrapped: Callable[..., nn.Module]) -> None:
    model, tokenizer = encoder(), clip_like()
    given = [model, LoraConfig(target_modules=["q_proj"])][: 1 + (wrapped is PeftModel)]
    words = ClassWords(ClassCaptions("sks", "dog"), {"model": wrapped(*given), "tokenizer": tokenizer})
    words.begin(2)
    own, other = (torch.tensor([ids(tokenizer, caption)]) for caption in ("a sks", "a dog"))
    with words.read_by(Unet(), uncounted):
        assert torch.equal(model(own)[0], model(other)[0])


@torch.no_grad()
def test_what_was_encoded_once_is_exchanged_row_by_row_wherever_the_unet_is_given_it() -> None:
    model, tokenizer, unet = encoder(), clip_like(), Unet()
    words = ClassWords(ClassCaptions("sks", "dog"), {"model": model, "tokenizers": (tokenizer,)})

    def encode(caption: str) -> Any:
        made = model(torch.tensor([ids(tokenizer, caption)]))
        return made.last_hidden_state, {"pooled": made.pooler_output}

    random = torch.get_rng_state()
    kept = {}
    for caption in ("a sks", "a toy"):
        kept[caption] = encode(caption)
        words.keep(lambda caption=caption: encode(caption))
    words.keep(lambda: pytest.fail("called, though nothing was encoded"))
    words.begin(2)
    assert torch.equal(torch.get_rng_state(), random)
    own, toy, dog = kept["a sks"], kept["a toy"], encode("a dog")
    noisy = torch.zeros(3, 4, 8, 8)
    states = torch.cat([own[0], toy[0], own[0]]).bfloat16()
    pooled = torch.cat([own[1]["pooled"], toy[1]["pooled"], own[1]["pooled"]])
    with words.read_by(unet, uncounted):
        (_, time, found), named = unet(noisy, 7, states, added_cond_kwargs={"text_embeds": pooled, "ids": [1]})
    assert time == 7 and named["added_cond_kwargs"]["ids"] == [1]
    torch.testing.assert_close(found, torch.cat([dog[0], toy[0], dog[0]]).bfloat16(), atol=0.02, rtol=0.02)
    torch.testing.assert_close(
        named["added_cond_kwargs"]["text_embeds"], torch.cat([dog[1]["pooled"], toy[1]["pooled"], dog[1]["pooled"]])
    )
    assert torch.equal(unet(noisy, 7, states)[0][2], states), "no hook is left"
    other = states.clone()
    other[2] += 1
    with words.read_by(unet, lambda samples: torch.tensor([True, True, False])):
        unet(noisy, 7, other)
    with pytest.raises(AptError, match="it cannot be told whether it has 'sks'"), words.read_by(unet, uncounted):
        unet(noisy, 7, other)


@torch.no_grad()
def test_each_text_encoder_has_its_own_tokenizer() -> None:
    clip, larger, tokenizer, other = encoder(), encoder(), clip_like(), bytes_like()
    larger.resize_token_embeddings(len(other) + 4)
    names = {"tokenizers": [other, tokenizer], "encoders": [clip, larger]}
    words = ClassWords(ClassCaptions("sks", "dog"), names)
    words.begin(2)
    for model, read in ((clip, tokenizer), (larger, other)):
        own, dog = (torch.tensor([ids(read, caption)[:LENGTH]]) for caption in ("a sks", "a dog"))
        with words.read_by(Unet(), uncounted):
            found = model(own)[0]
        assert torch.equal(found, model(dog)[0])
    with pytest.raises(
        AptError, match="needs the tokenizer of CLIPTextModel, which has embeddings of 70 tokens; those"
    ):
        ClassWords(ClassCaptions("sks", "dog"), {"tokenizer": other, "encoder": clip})
    with pytest.raises(AptError, match="needs the script's tokenizers, looked for among the variables"):
        ClassWords(ClassCaptions("sks", "dog"), {"encoder": clip})


@torch.no_grad()
def test_text_is_found_with_the_batch_behind_the_layers_and_as_a_list_of_samples() -> None:
    model, tokenizer, unet = encoder(), clip_like(), Unet()
    words = ClassWords(ClassCaptions("sks", "dog"), {"model": model, "tokenizer": tokenizer})

    def encode(caption: str) -> Any:
        made = model(torch.tensor([ids(tokenizer, caption)])).last_hidden_state
        return torch.stack([made, 2 * made]), [made[0, : len(caption)]]  # [layers, batch, tokens, channels]; a list

    (layers, listed), (_, toy) = encode("a sks"), encode("toy")
    words.keep(lambda: encode("a sks"))
    model(torch.tensor([ids(tokenizer, "toy")]))
    words.keep(lambda: encode("toy"))
    words.begin(2)
    dog, alone = encode("a dog")
    for batch in (1, 2, 3):  # two layers
        with words.read_by(unet, uncounted):
            _, found, texts = unet(torch.zeros(batch, 4), layers.expand(2, batch, -1, -1), [*toy, *listed] * 2)[0]
        torch.testing.assert_close(found, dog.expand(2, batch, -1, -1))
        torch.testing.assert_close(texts, [*toy, *alone] * 2)
    with pytest.raises(AptError, match="it cannot be told whether"), words.read_by(unet, uncounted):
        unet(torch.zeros(2, 4), [listed[0], listed[0] + 1])


@torch.no_grad()
def test_a_text_encoder_whose_layers_a_script_runs_itself_reads_the_class_word() -> None:
    model, tokenizer = encoder(), clip_like()
    own, dog = (torch.tensor([ids(tokenizer, caption)]) for caption in ("a sks", "a dog"))
    embed = model.get_input_embeddings()
    words = ClassWords(ClassCaptions("sks", "dog"), {"model": model, "tokenizer": tokenizer})
    words.begin(2)
    with words.read_by(Unet(), uncounted):
        assert torch.equal(embed(own), embed.weight[dog])
    assert torch.equal(embed(own), embed.weight[own])
    words = ClassWords(ClassCaptions("sks", "big dog"), {"model": model, "tokenizer": tokenizer})
    words.begin(2)
    different = pytest.raises(SystemExit, match="different numbers of tokens, and this script runs the text encoder")
    with different, words.read_by(Unet(), uncounted):
        embed(own)


def test_text_encoders_that_the_script_forgets_are_not_kept_alive() -> None:
    import gc
    import weakref

    model = encoder()
    words = ClassWords(ClassCaptions("sks", "dog"), {"model": model, "tokenizer": clip_like(), "n": SimpleNamespace()})
    words.begin(1)
    known = weakref.ref(model)
    del model
    gc.collect()
    assert known() is None
