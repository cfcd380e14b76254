import pytest
import small_transformers
from models import LAYOUTS, TEXT_WIDTH, TinyAttention, make_diffusers_unet, make_tuned, make_unet
from torch import nn

from apt_hooks import AptConfig, AptError
from apt_hooks.hooks.architectures import ALL, layout_of, preset_of, unet_sdxl_output_blocks, unet_up_blocks
from apt_hooks.hooks.architectures import unet_common as up_blocks
from apt_hooks.hooks.architectures.transformer_block_choice import select as select_blocks
from apt_hooks.hooks.architectures.unet_common import select


def find_up_blocks(unet):
    return (unet_up_blocks if unet_up_blocks.is_one(unet) else unet_sdxl_output_blocks).find(unet)


def select_up_blocks(unet, blocks):
    return select(unet, find_up_blocks(unet), blocks)


def names(pairs):
    return [name for name, _ in pairs]


def test_levels_of_called_up_blocks_are_the_blocks_themselves():
    unet = make_unet("up_blocks")
    found = find_up_blocks(unet)
    assert [block.index for block in found] == [0, 1, 2, 3]
    ends = [(f"up_blocks.{i}.upsamplers.0", unet.up_blocks[i].upsamplers[0]) for i in range(3)]
    assert [block.end for block in found] == [*ends, ("up_blocks.3", unet.up_blocks[3])]
    assert [block.upsamples for block in found] == [True, True, True, False]
    assert names(found[0].cross_attention + found[0].self_attention) == []
    assert names(found[2].cross_attention) == ["up_blocks.2.attentions.0.attn2"]
    assert names(found[2].self_attention) == ["up_blocks.2.attentions.0.attn1"]


def test_levels_of_uncalled_output_blocks_end_with_their_upsampler():
    unet = make_unet("output_blocks")
    found = find_up_blocks(unet)
    assert names(block.end for block in found) == ["output_blocks.1.2", "output_blocks.2.2", "output_blocks.4.0"]
    assert [block.upsamples for block in found] == [True, True, False]
    assert found[0].end[1] is unet.output_blocks[1][2]
    assert names(found[0].cross_attention) == ["output_blocks.0.1.body.attn2", "output_blocks.1.1.body.attn2"]
    assert names(found[1].self_attention) == ["output_blocks.2.1.body.attn1"]
    assert names(found[2].cross_attention + found[2].self_attention) == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_names_are_those_the_unet_knows(layout):
    unet = make_unet(layout)
    for block in find_up_blocks(unet):
        for name, module in (*block.cross_attention, *block.self_attention, block.end):
            assert unet.get_submodule(name) is module


@pytest.mark.parametrize(("layout", "last_two"), [("up_blocks", [2, 3]), ("output_blocks", [0, 1])])
def test_auto_takes_the_last_two_levels_with_attention(layout, last_two):
    assert [block.index for block in select_up_blocks(make_unet(layout), "auto")] == last_two


@pytest.mark.parametrize("layout", LAYOUTS)
def test_lora_on_the_projections_changes_nothing_of_what_is_found(layout):
    plain, tuned = find_up_blocks(make_unet(layout)), find_up_blocks(make_tuned(layout)[0])
    assert [names(b.cross_attention) for b in tuned] == [names(b.cross_attention) for b in plain]
    assert [names(b.self_attention) for b in tuned] == [names(b.self_attention) for b in plain]


def test_chosen_blocks_come_in_the_order_given():
    assert [block.index for block in select_up_blocks(make_unet("up_blocks"), [3, 1])] == [3, 1]


@pytest.mark.parametrize("blocks", [[0], [7], [1, 7]], ids=["no attention", "no such block", "one of two"])
def test_a_block_without_attention_is_refused_with_those_that_have_it(blocks):
    with pytest.raises(AptError) as caught:
        select_up_blocks(make_unet("up_blocks"), blocks)
    assert f"up-block {blocks[-1]} has no attention layers here; those that have are 1, 2, 3" in str(caught.value)


def test_cross_attention_is_told_by_its_width_whatever_its_name():
    unet = make_unet("up_blocks")
    unet.up_blocks[1].other = TinyAttention(TEXT_WIDTH)
    assert names(find_up_blocks(unet)[1].cross_attention) == ["up_blocks.1.attentions.0.attn2", "up_blocks.1.other"]


def test_cross_attention_is_told_by_its_name_where_the_widths_agree():
    unet = make_unet("up_blocks")
    unet.up_blocks[2].attentions[0].attn2 = TinyAttention()
    block = find_up_blocks(unet)[2]
    assert names(block.cross_attention) == ["up_blocks.2.attentions.0.attn2"]
    assert names(block.self_attention) == ["up_blocks.2.attentions.0.attn1"]


def test_a_model_of_neither_layout_is_refused_with_what_it_has():
    with pytest.raises(
        AptError, match=r"looked for the parts of a known denoiser in Sequential, found 0, 1; known are .*FLUX"
    ):
        layout_of(nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)))


def test_up_blocks_without_any_attention_are_refused():
    unet = make_unet("up_blocks")
    unet.up_blocks = unet.up_blocks[:1]
    with pytest.raises(AptError, match=r"TinyUpBlocksUNet, found 1 up-blocks without any"):
        select_up_blocks(unet, "auto")


def test_normalised_queries_are_refused():
    unet = make_unet("up_blocks")
    unet.up_blocks[1].attentions[0].attn2.norm_q = nn.LayerNorm(32)
    with pytest.raises(AptError, match=r"up_blocks\.1\.attentions\.0\.attn2 normalises q and k"):
        find_up_blocks(unet)


def test_places_in_a_real_diffusers_unet():
    unet = make_diffusers_unet()
    found = select_up_blocks(unet, "auto")
    assert [block.index for block in found] == [1, 2]
    stem = "up_blocks.1.attentions.{}.transformer_blocks.0."
    assert names(found[0].cross_attention) == [stem.format(i) + "attn2" for i in range(2)]
    assert names(found[0].self_attention) == [stem.format(i) + "attn1" for i in range(2)]
    assert found[0].end == ("up_blocks.1.upsamplers.0", unet.up_blocks[1].upsamplers[0])
    assert found[1].end == ("up_blocks.2", unet.up_blocks[2])  # whose `upsamplers` is None
    assert [block.upsamples for block in found] == [True, False]


def test_fused_projections_of_diffusers_are_refused_until_the_errors_advice_is_taken():
    unet = make_diffusers_unet()
    unet.fuse_qkv_projections()
    with pytest.raises(AptError, match=r"up_blocks\.1\.attentions\.0\..* has fused .* call unfuse_qkv_projections\(\)"):
        find_up_blocks(unet)
    unet.unfuse_qkv_projections()
    assert len(find_up_blocks(unet)) == 3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_width_of_the_text_tells_the_preset(layout, monkeypatch):
    monkeypatch.setattr(up_blocks, "TEXT_WIDTHS", {"sd15": TEXT_WIDTH, "sd21": 2 * TEXT_WIDTH})
    for unet in (make_unet(layout), make_tuned(layout)[0]):
        assert preset_of(unet) == "sd15"


def test_a_model_of_none_of_the_presets_has_none():
    for unet in (make_unet("up_blocks"), nn.Linear(768, 768)):
        assert preset_of(unet) is None


KINDS = {
    "anima": small_transformers.Anima, "flux": small_transformers.Flux, "chroma": small_transformers.Chroma,
    "sd35": small_transformers.Sd3, "lumina2": small_transformers.Lumina2,
    "hunyuan_image": small_transformers.HunyuanImage,
}  # fmt: skip


@pytest.mark.parametrize("preset", KINDS)
def test_a_transformer_has_its_preset_and_is_of_one_architecture(preset):
    model = KINDS[preset]()
    assert preset_of(model) == preset
    assert sum(architecture.is_one(model) for architecture in ALL) == 1


def test_a_models_preset_is_taken_where_none_is_named_and_another_ones_is_refused():
    config = AptConfig.from_mapping({"num_bins": 5, "lambda_attn": 0.5})
    own = config.of_model("sd21")
    assert (own.preset_name, own.indicator_scale, own.num_bins, own.lambda_attn) == ("sd21", 100.0, 5, 0.5)
    assert own.preset_is_the_models and not config.preset_is_the_models
    assert own.overrides() == {"num_bins": 5, "lambda_attn": 0.5}
    assert config.of_model(None) is config and own.of_model("sd21") is own
    with pytest.raises(AptError, match=r'preset = "flux" is for another model: this one\'s is "sdxl"; name that one'):
        AptConfig.preset("flux").of_model("sdxl")
    assert AptConfig(num_bins=5).of_model("sd21").num_bins == 5


def test_a_key_that_is_given_with_its_default_is_kept_over_the_models_preset():
    assert AptConfig.from_mapping({"indicator_scale": 1000.0}).of_model("sd21").indicator_scale == 1000.0


@pytest.mark.parametrize(
    ("width", "count", "taken"),
    [(3072, 57, 4), (2048, 28, 5), (1536, 24, 7), (2432, 38, 4), (3584, 60, 3), (16, 4, 2), (10**6, 9, 1)],
)
def test_as_many_blocks_are_taken_as_cost_what_sdxls_do(width, count, taken):
    found = select_blocks(count, "auto", width)
    assert len(found) == taken == len(set(found)) and min(found) >= count // 2 and max(found) < count
