import dataclasses
import math

import pytest

from apt_hooks import AptConfig, AptError
from apt_hooks.config import preset_names, preset_text
from apt_hooks.tomlread import read_toml

WRONG_VALUES = {
    "enabled": ["yes", 1, None],
    "objective": ["APT", "dpo", "", 1, True, ["dco"], None],
    "dco_beta": [0, 0.0, -1, "1000", True, math.nan, math.inf, None],
    "lambda_offset": [-0.1, "1", True, math.nan, math.inf],
    "monitor_only": ["no", 0, None],
    "reference": ["lora", "", None],
    "num_bins": [0, -1, 2.0, "10", True, None],
    "ema_alpha": [0, -0.1, 1.01, "0.1", True, math.nan, None],
    "indicator_scale": [0.0, -1, "1000", True, math.inf, None],
    "indicator_space": ["v", "", 1, True, ["target"], None],
    "loss_weighting": [1, "true", None],
    "augmentation": [1, "true", None],
    "augment_max_probability": [-0.1, 1.1, "0.8", True, math.nan, None],
    "zoom_out": [[0.9, 2.0], [3.0, 1.0], [1.0], [1.0, 2.0, 3.0], 2.0, ["1", "3"], [True, 2.0], [1.0, math.inf], None],
    "rotation_degrees": [-1, 181, "15", True, None],
    "augment_space": ["pixels", 1, True, ["image"], None],
    "augment_border": ["black", 1, True, None],
    "lambda_dist": [-0.1, "1", True, math.nan, math.inf, None],
    "lambda_attn": [-0.1, "1", True, math.nan, math.inf, None],
    "regularizer": ["both", True, None],
    "lambda_joint": [-0.1, "1", True, math.nan, math.inf, None],
    "representation_source": ["cross_attention", 1, None],
    "blocks": [[], [-1], [1, 1], [1.0], [True], "all", 1, None],
    "frozen_every": [0, 1.5, True, "2", None],
    "attention_impl": ["fused", True, None],
    "drifts": ["no", 0, None],
    "stop": ["", "gamma", 1, True],
    "identifier": ["", "  ", 1],
    "class_word": ["", "  ", 1],
    "preset_name": [1, True],
}
LIMITS = {
    "num_bins": [1],
    "ema_alpha": [1],
    "augment_max_probability": [0, 1],
    "zoom_out": [(1.0, 1.0)],
    "rotation_degrees": [0, 180],
    "lambda_dist": [0],
    "lambda_attn": [0],
    "lambda_joint": [0],
    "lambda_offset": [0],
    "frozen_every": [1],
    "blocks": [(0,), "auto"],
}


def rule_of(key):
    return next(f.metadata["rule"] for f in dataclasses.fields(AptConfig) if f.name == key)


def test_every_key_has_wrong_values_listed_here():
    assert set(WRONG_VALUES) == {field.name for field in dataclasses.fields(AptConfig)}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in WRONG_VALUES.items() for value in values])
def test_a_wrong_value_is_refused_with_key_rule_and_value(key, value):
    with pytest.raises(AptError) as caught:
        AptConfig(**{key: value})
    message = str(caught.value)
    assert f"[apt] {key} must be {rule_of(key)}" in message
    assert repr(value) in message


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in LIMITS.items() for value in values])
def test_a_value_at_its_limit_is_accepted(key, value):
    assert getattr(AptConfig(**{key: value}), key) == value


def test_a_whole_number_too_large_for_a_float_is_refused_as_any_other_value():
    with pytest.raises(AptError, match="indicator_scale"):
        AptConfig(indicator_scale=10**400)


def test_the_defaults_are_the_papers():
    config = AptConfig()
    assert (config.num_bins, config.ema_alpha, config.indicator_scale) == (10, 0.1, 1000.0)
    assert (config.zoom_out, config.rotation_degrees) == ((1.0, 3.0), 15.0)
    assert config.representation_source == "self_attention"


def test_lists_become_tuples_and_whole_numbers_floats():
    config = AptConfig(zoom_out=[1, 2], blocks=[1, 2], lambda_attn=2)
    assert (config.zoom_out, config.blocks) == ((1.0, 2.0), (1, 2))
    assert [type(v) for v in (*config.zoom_out, config.lambda_attn)] == [float] * 3


def test_it_cannot_be_changed_afterwards():
    with pytest.raises(dataclasses.FrozenInstanceError):
        AptConfig().num_bins = 5


@pytest.mark.parametrize(("given", "missing"), [("identifier", "class_word"), ("class_word", "identifier")])
def test_identifier_and_class_word_need_each_other(given, missing):
    with pytest.raises(AptError, match=rf"\[apt\] {given} = 'dog' needs {missing} too"):
        AptConfig(**{given: "dog"})


@pytest.mark.parametrize("word", ["dog", " dog"])
def test_identifier_and_class_word_are_two_words(word):
    with pytest.raises(AptError, match=r"identifier and class_word must differ, .* such as .*; found 'dog' for both"):
        AptConfig(identifier="dog", class_word=word)


@pytest.mark.parametrize(
    ("key", "nearest"), [("lamda_dist", "lambda_dist"), ("bins", "num_bins"), ("preset_name", "preset")]
)
def test_an_unknown_key_names_the_nearest(key, nearest):
    with pytest.raises(AptError) as caught:
        AptConfig.from_mapping({key: 1})
    assert f"[apt] {key} = 1: there is no such key" in str(caught.value)
    assert f'did you mean "{nearest}"?' in str(caught.value)


def test_an_unknown_key_like_no_other_names_none_but_lists_all():
    with pytest.raises(AptError) as caught:
        AptConfig.from_mapping({"zzzzzzzz": 1})
    assert "did you mean" not in str(caught.value)
    assert all(key in str(caught.value) for key in AptConfig.key_names())


def test_every_known_model_has_a_preset():
    assert preset_names() == (
        "anima", "chroma", "flux", "flux2", "hidream", "hunyuan_image", "ideogram4", "krea2", "lumina2", "qwen_image",
        "sana", "sd15", "sd21", "sd35", "sdxl", "z_image",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "scale", "blocks"), [("sdxl", 1000.0, (0, 1)), ("sd21", 100.0, (2, 3)), ("sd15", 1000.0, (2, 3))]
)
def test_every_preset_loads_with_its_familys_scale_and_blocks(name, scale, blocks):
    config = AptConfig.preset(name)
    assert (config.preset_name, config.indicator_scale, config.blocks) == (name, scale, blocks)
    assert config.overrides() == {}


@pytest.mark.parametrize("name", preset_names())
def test_every_value_of_a_preset_has_its_source_beside_it(name):
    lines = [line for line in preset_text(name).splitlines() if "=" in line.split("#")[0]]
    assert lines
    assert [line for line in lines if "# APT" not in line and "# ours" not in line] == []


def test_a_key_beside_the_preset_overrides_it_and_counts_as_override():
    config = AptConfig.from_mapping({"preset": "sd21", "num_bins": 5, "ema_alpha": 0.1})
    assert (config.num_bins, config.indicator_scale) == (5, 100.0)
    assert config.overrides() == {"num_bins": 5}


def test_overrides_without_a_preset_are_those_of_the_defaults():
    assert AptConfig(lambda_dist=0, blocks=[1]).overrides() == {"lambda_dist": 0.0, "blocks": (1,)}


@pytest.mark.parametrize("objective", ["apt", "dco", "l2-sp", "dreambooth"])
def test_every_objective_is_accepted_and_the_one_given_counts_as_override(objective):
    assert AptConfig.from_mapping({"objective": objective}).objective == objective
    assert AptConfig(objective=objective).overrides() == ({} if objective == "apt" else {"objective": objective})


def test_apt_is_the_objective_of_the_defaults_and_of_every_preset():
    assert {AptConfig().objective, *(AptConfig.preset(name).objective for name in preset_names())} == {"apt"}


GIVEN = {"loss_weighting": True, "augmentation": True, "lambda_dist": 2.0, "lambda_attn": 3.0, "lambda_joint": 4.0}
GIVEN["frozen_every"] = 5
OWN_TERMS = tuple(GIVEN)


@pytest.mark.parametrize("objective", ["dco", "l2-sp", "dreambooth"])
@pytest.mark.parametrize(
    "values",
    [{}, GIVEN, {"preset": "sdxl"}, {"preset": "sd15", **GIVEN}],
    ids=["defaults", "given", "preset", "given beside a preset"],
)
def test_with_another_objective_apts_own_terms_are_off_whatever_was_given(objective, values):
    config = AptConfig.from_mapping({**values, "objective": objective})
    terms = [getattr(config, name) for name in OWN_TERMS]
    # Each batch has a frozen pass where the loss is made of it; where it is for the log alone it can be spared.
    kept = {} if objective == "dco" or "frozen_every" not in values else {"frozen_every": 5}
    assert terms == [False, False, 0.0, 0.0, 0.0, kept.get("frozen_every", 1)]
    assert [type(term) for term in terms] == [bool, bool, float, float, float, int]
    # They follow from the objective, so that they are not told beside it.
    assert config.overrides() == {"objective": objective, **kept}


@pytest.mark.parametrize("objective", ["dco", "l2-sp", "dreambooth"])
def test_keys_of_the_users_own_that_the_objective_drops_are_told_and_no_others(objective):
    own = {"num_bins": 5, "lambda_attn": 0.5, "zoom_out": [1.0, 2.0], "augmentation": False, "frozen_every": 1}
    dropped = {"lambda_attn": 0.5, "zoom_out": [1.0, 2.0]}
    assert AptConfig.from_mapping({"preset": "sdxl", "objective": objective, **own}).ignored == dropped
    assert AptConfig.from_mapping({"preset": "sdxl", "objective": objective}).ignored == {}
    assert AptConfig.from_mapping({"preset": "sdxl", **own}).ignored == {}
    spared = AptConfig.from_mapping({"frozen_every": 3, "objective": objective})
    assert spared.ignored == ({"frozen_every": 3} if objective == "dco" else {})
    of_one = {"dco_beta": ("dco", 5), "lambda_offset": ("l2-sp", 0.5)}
    for key, (owner, value) in of_one.items():
        ignored = AptConfig.from_mapping({key: value, "objective": objective}).ignored
        assert ignored == ({} if objective == owner else {key: value})


@pytest.mark.parametrize(
    ("values", "weight", "measured"),
    [
        ({}, 0.0, False),
        ({"lambda_offset": 0}, 0.0, False),
        ({"lambda_offset": 2}, 2.0, True),
        ({"preset": "sdxl"}, 0.0, False),
        ({"objective": "l2-sp"}, 0.001, True),
        ({"objective": "l2-sp", "lambda_offset": 0}, 0.0, True),
        ({"objective": "l2-sp", "lambda_offset": 0.5}, 0.5, True),
        ({"objective": "dco", "lambda_offset": 0.5}, 0.0, False),
        ({"objective": "dreambooth", "lambda_offset": 0.5}, 0.0, False),
    ],
)
def test_the_weights_offset_is_held_beside_apt_where_asked_and_by_l2_sp_always(values, weight, measured):
    config = AptConfig.from_mapping(values)
    assert (config.offset_weight, type(config.offset_weight), config.measures_offset) == (weight, float, measured)


def test_with_apt_as_the_objective_its_own_terms_are_what_was_given():
    config = AptConfig.from_mapping({"preset": "sdxl", "objective": "apt", **GIVEN})
    assert {name: getattr(config, name) for name in OWN_TERMS} == GIVEN


@pytest.mark.parametrize("key", ["loss_weighting", "lambda_attn"])
def test_a_wrong_value_of_a_term_that_is_off_is_refused_all_the_same(key):
    with pytest.raises(AptError, match=rf"\[apt\] {key} must be"):
        AptConfig(objective="dco", **{key: "much"})


@pytest.mark.parametrize("objective", ["dco", "l2-sp", "dreambooth"])
def test_a_preset_beside_another_objective_keeps_its_other_values(objective):
    preset, config = AptConfig.preset("sd21"), AptConfig.from_mapping({"preset": "sd21", "objective": objective})
    assert (config.preset_name, config.indicator_scale, config.blocks) == ("sd21", 100.0, (2, 3))
    differing = {f.name for f in dataclasses.fields(config) if getattr(config, f.name) != getattr(preset, f.name)}
    assert differing == {"objective", *OWN_TERMS} - {"frozen_every"}  # 1 in the preset too


def test_the_beta_of_dco_is_a_float_and_an_override_where_it_is_not_the_papers():
    config = AptConfig.from_mapping({"preset": "sdxl", "objective": "dco", "dco_beta": 2000, "num_bins": 5})
    assert (config.dco_beta, type(config.dco_beta), AptConfig().dco_beta) == (2000.0, float, 1000.0)
    assert config.overrides() == {"objective": "dco", "dco_beta": 2000.0, "num_bins": 5}
    assert AptConfig(objective="dco", dco_beta=1000).overrides() == {"objective": "dco"}


@pytest.mark.parametrize(
    ("name", "hint"), [("sdlx", 'did you mean "sdxl"?'), ("auraflow", '"sd15", "sd21", "sd35", "sdxl"'), (1, "")]
)
def test_an_unknown_preset_is_refused_with_those_there_are(name, hint):
    with pytest.raises(AptError) as caught:
        AptConfig.preset(name)
    assert f"found {name!r}" in str(caught.value)
    assert hint in str(caught.value)


def test_from_toml_reads_its_section_and_leaves_the_others_alone(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text('[other]\nnum_bins = "anything"\n[apt]\npreset = "sdxl"\nnum_bins = 4\n')
    assert AptConfig.from_toml(path) == AptConfig.from_mapping({"preset": "sdxl", "num_bins": 4})


def test_from_toml_reads_another_section_on_request(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text("[adaptive]\nnum_bins = 4\n")
    assert AptConfig.from_toml(str(path), "adaptive").num_bins == 4


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (b"[other]\n", "[other]"),
        (b"[APT]\n[train]\n", "[APT], [train]"),
        (b"seed = 1\n", "no section at all"),
        (b"apt = 1\n", "apt = 1"),
        (b"[[apt]]\n", "apt = [{}]"),
    ],
)
def test_from_toml_without_the_section_says_what_was_found(tmp_path, text, found):
    path = tmp_path / "config.toml"
    path.write_bytes(text)
    with pytest.raises(AptError) as caught:
        AptConfig.from_toml(path)
    assert str(caught.value) == (
        f"{path}: looked for a section [apt], found {found}; `apt-hooks presets apply NAME {path}` adds one"
    )


@pytest.mark.parametrize("text", [b"[apt\n", b"[apt]\nnum_bins = \xff\n", b"\xef\xbb\xbf[apt]\nnum_bins = 4\n"])
def test_from_toml_refuses_what_is_not_toml(tmp_path, text):
    path = tmp_path / "config.toml"
    path.write_bytes(text)
    with pytest.raises(AptError) as caught:
        AptConfig.from_toml(path)
    assert str(caught.value).startswith(f"{path}: is not valid TOML")


@pytest.mark.parametrize("name", ["missing.toml", ""])
def test_a_file_that_cannot_be_read_is_named(tmp_path, name):
    path = tmp_path / name
    with pytest.raises(AptError) as caught:
        read_toml(path)
    assert str(caught.value).startswith(f"{path}: cannot be read: ")
