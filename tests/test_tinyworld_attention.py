import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("safetensors")

from apt_hooks.tinyworld import attention
from apt_hooks.tinyworld.attention import attention_of_words
from apt_hooks.tinyworld.concepts import CONCEPTS
from apt_hooks.tinyworld.model import TEXT_WIDTH, TOKENS, load_pipeline
from apt_hooks.tinyworld.personalize import reference_pictures

PROMPT = "a photo of a big sks cup in the snow"
WORDS = len(PROMPT.split())
PICTURE = reference_pictures(CONCEPTS[6])[0]


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline()


def test_a_map_a_word_and_together_no_more_than_all_attention(pipeline):
    maps = attention_of_words(pipeline, PROMPT, PICTURE)
    assert maps.shape == (WORDS, 16, 16) and not maps.requires_grad
    assert maps.min() >= 0 and maps.sum(dim=0).max() <= 1 + 1e-5
    # The rest is the start's, the end's and that of what fills up.
    assert (maps.sum(dim=0) < 1).any()


def test_tokens_that_are_all_the_same_share_the_attention_and_one_that_is_not_is_that_word(pipeline, monkeypatch):
    texts = torch.zeros(1, TOKENS, TEXT_WIDTH)
    monkeypatch.setattr(attention, "encode_texts", lambda pipeline, prompts: texts)
    assert torch.allclose(attention_of_words(pipeline, PROMPT, PICTURE), torch.tensor(1 / TOKENS), atol=1e-6)
    for word in (0, 6, WORDS - 1):
        texts = torch.zeros(1, TOKENS, TEXT_WIDTH)
        texts[0, 1 + word] = torch.randn(TEXT_WIDTH, generator=torch.Generator().manual_seed(1))
        maps = attention_of_words(pipeline, PROMPT, PICTURE)
        others = torch.cat([maps[:word], maps[word + 1 :]])
        assert torch.allclose(others, others[:1].expand_as(others), atol=1e-6)
        assert not torch.allclose(maps[word], others[0], atol=1e-4)
        assert torch.allclose(maps[word] + (TOKENS - 1) * others[0], torch.tensor(1.0), atol=1e-5)


def test_the_maps_are_the_softmax_of_diffusers_own_layers(pipeline):
    from diffusers.models.attention_processor import AttnProcessor

    class Remember(AttnProcessor):
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, **rest):
            heads = (attn.head_to_batch_dim(x) for x in (attn.to_q(hidden_states), attn.to_k(encoder_hidden_states)))
            seen.append(attn.get_attention_scores(*heads).mean(dim=0))
            return super().__call__(attn, hidden_states, encoder_hidden_states, **rest)

    seen: list[torch.Tensor] = []
    unet = pipeline.unet
    before = dict(unet.attn_processors)
    own = {name: Remember() if name.startswith("up_blocks") and "attn2" in name else p for name, p in before.items()}
    unet.set_attn_processor(own)
    try:
        maps = attention_of_words(pipeline, PROMPT, PICTURE)
    finally:
        unet.set_attn_processor(before)
    assert {len(probabilities) for probabilities in seen} == {64, 256}
    sides = [probabilities.T.reshape(1, TOKENS, *[round(len(probabilities) ** 0.5)] * 2) for probabilities in seen]
    grown = [torch.nn.functional.interpolate(x, size=(16, 16), mode="bilinear")[0] for x in sides]
    assert torch.allclose(maps, sum(grown)[1 : 1 + WORDS] / len(grown), atol=1e-5)


def test_maps_depend_on_the_picture_and_repeat_themselves(pipeline):
    state = torch.random.get_rng_state()
    one, again = (attention_of_words(pipeline, PROMPT, PICTURE) for _ in range(2))
    assert torch.equal(one, again) and torch.equal(state, torch.random.get_rng_state())
    assert not torch.equal(one, attention_of_words(pipeline, PROMPT, PICTURE.flip(-1)))


def test_nothing_is_left_on_the_unet(pipeline):
    keys = vars(pipeline.unet).keys() | set()
    attention_of_words(pipeline, PROMPT, PICTURE)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in pipeline.unet.modules())
    assert vars(pipeline.unet).keys() == keys and not pipeline.unet.training
