"""What a LoRA's file says of a module is what the module does, whoever wrote the file."""

import copy
import json
import math
import types

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytest.importorskip("safetensors")

from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from models import relative_difference
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from apt_hooks import AptError
from apt_hooks.integrations.sampling import loras as loras_module
from apt_hooks.integrations.sampling.loras import Loras

ATTENTION = "up_blocks.1.attentions.0.transformer_blocks.0"
TEXT = "text_model.encoder.layers.1"
LINEAR = {
    f"unet.{ATTENTION}.attn1.to_q": 1,
    f"unet.{ATTENTION}.attn1.to_out.0": 2,
    f"unet.{ATTENTION}.attn2.to_k": 3,
    f"unet.{ATTENTION}.ff.net.0.proj": 4,
    "unet.up_blocks.1.attentions.0.proj_in": 5,
    f"text_encoder.{TEXT}.self_attn.q_proj": 2,
    f"text_encoder.{TEXT}.self_attn.out_proj": 3,
    f"text_encoder.{TEXT}.mlp.fc1": 1,
    f"text_encoder_2.{TEXT}.self_attn.k_proj": 4,
}
"""Ranks by place; each has another."""
CONVOLUTIONS = {
    "unet.down_blocks.0.resnets.0.conv1": 2,
    "unet.down_blocks.1.resnets.0.conv_shortcut": 3,
    "unet.down_blocks.0.downsamplers.0.conv": 4,
    "unet.up_blocks.0.upsamplers.0.conv": 1,
}
STABILITY = {
    "up_blocks.1.attentions.0": "output_blocks.2.1",
    "down_blocks.0.resnets.0.conv1": "input_blocks.1.0.in_layers.2",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.1.resnets.0.conv_shortcut": "input_blocks.3.0.skip_connection",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.1.1.conv",
}


@pytest.fixture(scope="module")
def pipeline():
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=24,
        attention_head_dim=8,
        norm_num_groups=8,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64,
    )
    sizes = {"vocab_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}
    config = CLIPTextConfig(hidden_size=16, projection_dim=16, **sizes)
    pipeline = StableDiffusionXLPipeline(
        unet=unet,
        text_encoder=CLIPTextModel(config),
        text_encoder_2=CLIPTextModelWithProjection(config),
        vae=AutoencoderKL(block_out_channels=(8,), norm_num_groups=4),
        tokenizer=None,
        tokenizer_2=None,
        scheduler=DDIMScheduler(),
        add_watermarker=False,
    )
    for model in (unet, pipeline.text_encoder, pipeline.text_encoder_2):
        model.requires_grad_(False)
    return pipeline


def module_at(pipeline, place):
    part, _, path = place.partition(".")
    model = getattr(pipeline, part)
    try:
        return model.get_submodule(path)
    except AttributeError:  # transformers 5
        return model.get_submodule(path.removeprefix("text_model."))


def factors(pipeline, places, seed=0):
    """{place: (down, up)}, of shapes as sd-scripts saves them."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for place, rank in places.items():
        weight = module_at(pipeline, place).weight
        up = (len(weight), rank, *[1] * (weight.ndim - 2))
        found[place] = tuple(0.5 * torch.randn(shape, generator=generator) for shape in ((rank, *weight.shape[1:]), up))
    return found


def product(pipeline, place, down, up, scale):
    """The whole delta, shaped as the weight."""
    return scale * (up.flatten(1) @ down.flatten(1)).reshape(module_at(pipeline, place).weight.shape)


def kohya(place, *, stability=False):
    part, _, path = place.partition(".")
    if stability:
        block = next((block for block in STABILITY if path.startswith(block)), "")
        path = STABILITY.get(block, "") + path.removeprefix(block)
    prefix = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}[part]
    return f"{prefix}_{path}".replace(".", "_")


def kohya_file(pairs, alphas=None, name=kohya):
    tensors = {}
    for place, (down, up) in pairs.items():
        tensors |= {f"{name(place)}.lora_down.weight": down, f"{name(place)}.lora_up.weight": up}
        if alphas:
            tensors[f"{name(place)}.alpha"] = torch.tensor(alphas[place])
    return tensors


def diffusers_file(pairs, prefix=""):
    return {f"{prefix}{p}.lora_{x}.weight": t for p, pair in pairs.items() for x, t in zip("AB", pair, strict=True)}


def before_peft(place):
    """Names that diffusers saved before it had peft."""
    part, _, path = place.partition(".")
    for new, old in (("q_proj", "to_q"), ("k_proj", "to_k"), ("out_proj", "to_out"), ("to_out.0", "to_out")):
        path = path.replace(new, old)
    path = path.replace("attn1.", "attn1.processor.").replace("attn2.", "attn2.processor.")
    join = ".lora_linear_layer" if ".mlp." in path else "_lora" if ".to_" in path else ".lora"
    return f"{part}.{path}{join}"


# Kinds of files: each returns tensors, header, the scale of every place, and what else is in the folder.

EVERY = {**LINEAR, **CONVOLUTIONS}
OWN = {place: 0.25 * (i + 1) for i, place in enumerate(EVERY)}
"""Alphas, as resizing by sv_ratio and block_alphas leave them."""


def an_alpha_of_its_own_for_each_module(pairs):
    return kohya_file(pairs, OWN), {}, {p: OWN[p] / EVERY[p] for p in pairs}


def stabilitys_names(pairs):
    tensors = kohya_file(pairs, OWN, lambda place: kohya(place, stability=True))
    return tensors, {}, {p: OWN[p] / EVERY[p] for p in pairs}


def ranks_without_alphas(pairs):
    return kohya_file(pairs), {}, dict.fromkeys(pairs, 1.0)


def the_header_of_sd_scripts(pairs):
    header = {"ss_network_alpha": "1", "ss_network_args": json.dumps({"conv_dim": "4", "conv_alpha": "0.5"})}
    wide = {"unet.down_blocks.0.resnets.0.conv1", "unet.down_blocks.0.downsamplers.0.conv"}
    wide |= {"unet.up_blocks.0.upsamplers.0.conv"}
    return kohya_file(pairs), header, {p: (0.5 if p in wide else 1.0) / EVERY[p] for p in pairs}


def the_header_of_diffusers(pairs):
    config = {"r": 8, "lora_alpha": 2, "rank_pattern": {}, "alpha_pattern": {"attn2.to_k": 6, "conv1": 7.0}}
    flat = {f"{part}.{k}": v for part in ("unet", "text_encoder", "text_encoder_2") for k, v in config.items()}
    alphas = {p: 6 if p.endswith("attn2.to_k") else 7 if p.endswith("conv1") else 2 for p in pairs}
    return diffusers_file(pairs), {"lora_adapter_metadata": json.dumps(flat)}, {p: alphas[p] / EVERY[p] for p in pairs}


def rank_stabilized(pairs):
    flat = {
        f"{part}.{k}": v for part in ("unet", "text_encoder") for k, v in {"lora_alpha": 3, "use_rslora": 1}.items()
    }
    scales = {p: 1.0 if p.startswith("text_encoder_2") else 3 / math.sqrt(EVERY[p]) for p in pairs}
    return diffusers_file(pairs), {"lora_adapter_metadata": json.dumps(flat)}, scales


def diffusers_ranks_without_alphas(pairs):
    return diffusers_file(pairs), {}, dict.fromkeys(pairs, 1.0)


def alphas_in_diffusers_names(pairs):
    tensors = {**diffusers_file(pairs), **{f"{place}.alpha": torch.tensor(OWN[place]) for place in pairs}}
    return tensors, {}, {p: OWN[p] / EVERY[p] for p in pairs}


def names_before_peft(pairs):
    tensors = {
        f"{before_peft(p)}.{x}.weight": t
        for p, pair in pairs.items()
        for x, t in zip(("down", "up"), pair, strict=True)
    }
    return tensors, {}, dict.fromkeys(pairs, 1.0)


def lora_of_peft_beside_its_names(pairs):
    tensors = {
        f"{p}.lora.{x}.weight": t for p, pair in pairs.items() for x, t in zip(("down", "up"), pair, strict=True)
    }
    return tensors, {}, dict.fromkeys(pairs, 1.0)


KINDS = (
    an_alpha_of_its_own_for_each_module,
    stabilitys_names,
    ranks_without_alphas,
    the_header_of_sd_scripts,
    the_header_of_diffusers,
    rank_stabilized,
    diffusers_ranks_without_alphas,
    alphas_in_diffusers_names,
    names_before_peft,
    lora_of_peft_beside_its_names,
)


def save(path, tensors, header=None):
    save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, path, header)
    return path


def check(pipeline, path, weights):
    """That with the file every place computes with the weight that is wanted there, and no other place with another.

    Args:
        weights: by place.
    """
    parts = ("unet", "text_encoder", "text_encoder_2")
    base = {p: {k: v.clone() for k, v in getattr(pipeline, p).state_dict().items()} for p in parts}
    plain = {place: module_at(pipeline, place) for place in weights}
    with Loras(pipeline, {"it": path}) as loras:
        for place, weight in weights.items():
            own, x = plain[place], _input(weight)
            with loras.active(None):
                before = module_at(pipeline, place)(x)
            with loras.active("it"):
                found = module_at(pipeline, place)(x)
            assert relative_difference(before, _computed(own, x, own.weight)) < 1e-5, place
            assert relative_difference(found - before, _computed(own, x, weight) - before) < 1e-4, place
    for part, state in base.items():
        after = getattr(pipeline, part).state_dict()
        assert list(after) == list(state) and all(torch.equal(after[key], state[key]) for key in state)


def _input(weight):
    shape = (2, weight.shape[1]) if weight.ndim == 2 else (2, weight.shape[1], 6, 6)
    return torch.randn(shape, generator=torch.Generator().manual_seed(9))


def _computed(layer, x, weight):
    if weight.ndim == 2:
        return F.linear(x, weight, layer.bias)
    return F.conv2d(x, weight, layer.bias, layer.stride, layer.padding)


GROUPS = {
    "attention": [place for place in LINEAR if place.startswith("unet")],
    "convolutions": list(CONVOLUTIONS),
    "text encoders": [place for place in LINEAR if place.startswith("text_encoder")],
    "all": list(EVERY),
}


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_each_module_adds_up_times_down_times_alpha_over_rank(pipeline, tmp_path, kind, group):
    pairs = factors(pipeline, {place: EVERY[place] for place in GROUPS[group]})
    tensors, header, scales = kind(pairs)
    path = save(tmp_path / "lora.safetensors", tensors, header or None)
    weights = {p: module_at(pipeline, p).weight + product(pipeline, p, *pairs[p], scales[p]) for p in pairs}
    check(pipeline, path, weights)


@pytest.mark.parametrize("part", ("unet", "text_encoder"))
def test_pefts_own_format_has_its_alphas_beside_it(pipeline, tmp_path, part):
    places = {p: rank for p, rank in EVERY.items() if p.startswith(f"{part}.")}
    pairs = factors(pipeline, places)
    named = {p.removeprefix(f"{part}."): pair for p, pair in pairs.items()}
    path = save(tmp_path / "adapter_model.safetensors", diffusers_file(named, "base_model.model."))
    alone = types.SimpleNamespace(**{part: getattr(pipeline, part)})
    with pytest.raises(AptError, match=r"peft's own format, whose alpha stands in adapter_config.json: put it beside"):
        Loras(alone, {"it": path})
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 4, "alpha_pattern": {"proj_in": 1, r".*\.fc1": 3}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    alphas = {p: 1 if p.endswith("proj_in") else 3 if p.endswith("fc1") else 4 for p in places}
    weights = {p: module_at(pipeline, p).weight for p in places}
    weights = {p: w + product(pipeline, p, *pairs[p], alphas[p] / places[p]) for p, w in weights.items()}
    own = {part: getattr(pipeline, part) for part in ("unet", "text_encoder", "text_encoder_2")}
    if part == "unet":
        check(pipeline, path, weights)
    else:  # both text encoders have such modules, of one size
        with pytest.raises(AptError, match=r"may be of text_encoder\..* or text_encoder_2\..*; name them in the file"):
            Loras(pipeline, {"it": path})
        empty = torch.nn.Module()
        check(types.SimpleNamespace(**{**own, "text_encoder_2": empty}), path, weights)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "LOHA"}))
    with pytest.raises(AptError, match="is a LOHA of peft"):
        Loras(alone, {"it": path})


def test_tuckers_kernel_between_two_1x1_is_a_lora_too(pipeline, tmp_path):
    place, rank = "unet.down_blocks.0.resnets.0.conv1", 3
    weight = module_at(pipeline, place).weight
    down, mid, up = torch.randn(rank, 16, 1, 1), torch.randn(rank, rank, 3, 3), torch.randn(16, rank, 1, 1)
    name = kohya(place)
    tensors = {f"{name}.lora_{x}.weight": t for x, t in (("down", down), ("mid", mid), ("up", up))}
    path = save(tmp_path / "tucker.safetensors", {**tensors, f"{name}.alpha": torch.tensor(1.5)})
    delta = torch.einsum("or,rshw,si->oihw", up.flatten(1), mid, down.flatten(1)) * 1.5 / rank
    check(pipeline, path, {place: weight + delta})


@pytest.mark.parametrize("ending", ("dora_scale", "lora_magnitude_vector"))
def test_dora_brings_the_rows_of_the_sum_to_its_lengths(pipeline, tmp_path, ending):
    pairs = factors(pipeline, EVERY)
    tensors, weights = {}, {}
    for place, (down, up) in pairs.items():
        name, weight = kohya(place), module_at(pipeline, place).weight
        lengths = 0.5 + torch.rand(len(weight), generator=torch.Generator().manual_seed(1))
        own = lengths.reshape(-1, *[1] * (weight.ndim - 1)) if ending == "dora_scale" else lengths
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.{ending}": own}
        tensors[f"{name}.alpha"] = torch.tensor(OWN[place])
        rows = weight + product(pipeline, place, down, up, OWN[place] / EVERY[place])
        rows = lengths[:, None] * rows.flatten(1) / rows.flatten(1).norm(dim=1, keepdim=True)
        weights[place] = rows.reshape(weight.shape)
    check(pipeline, save(tmp_path / "dora.safetensors", tensors), weights)


def test_peft_computes_the_same_dora(pipeline, tmp_path):
    """By peft's own layers, for it wrote the files that have a magnitude vector."""
    from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model

    torch.manual_seed(3)
    layers = torch.nn.ModuleDict({"to_q": torch.nn.Linear(8, 8), "conv": torch.nn.Conv2d(8, 8, 3, 2, 1)})
    plain = {name: {k: v.clone() for k, v in layer.state_dict().items()} for name, layer in layers.items()}
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["to_q", "conv"], use_dora=True, init_lora_weights=False)
    tuned = inject_adapter_in_model(config, layers, "default").eval()
    state = {f"unet.{key}": value for key, value in get_peft_model_state_dict(tuned, adapter_name="default").items()}
    path = save(tmp_path / "dora.safetensors", state, {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 3})})
    inputs = {"to_q": torch.randn(2, 8), "conv": torch.randn(2, 8, 5, 5)}
    wanted = {name: tuned[name](x) for name, x in inputs.items()}
    own = torch.nn.ModuleDict({"to_q": torch.nn.Linear(8, 8), "conv": torch.nn.Conv2d(8, 8, 3, 2, 1)})
    for name, layer in own.items():
        layer.load_state_dict(plain[name])
    own.down_blocks, own.up_blocks = (), ()
    pipeline = types.SimpleNamespace(unet=own)
    with Loras(pipeline, {"it": path}) as loras, loras.active("it"):
        for name, x in inputs.items():
            assert relative_difference(own[name](x), wanted[name]) < 1e-5


OTHERS = {
    "hada_w1_a": "a LoHa of LyCORIS",
    "lokr_w1": "a LoKr of LyCORIS",
    "oft_blocks": "an OFT or BOFT",
    "on_input": r"an \(IA\)\^3 of LyCORIS",
    "a1.weight": "a GLoRA of LyCORIS",
    "w_norm": "norms trained beside the LoRA",
    "b_norm": "norms trained beside the LoRA",
    "diff": "whole weights' differences",
    "diff_b": "whole weights' differences",
    "scalar": "LyCORIS' use_scalar",
    "lora_up.bias": "biases beside the LoRA",
    "reshape_weight": r"reshape_weight is no part of a LoRA",
}


@pytest.mark.parametrize("ending", OTHERS)
def test_other_kinds_are_named_by_what_they_are(pipeline, tmp_path, ending):
    pairs = factors(pipeline, EVERY)
    tensors = {**kohya_file(pairs), f"{kohya(next(iter(EVERY)))}.{ending}": torch.ones(2, 2)}
    with pytest.raises(AptError, match=OTHERS[ending]) as error:
        Loras(pipeline, {"it": save(tmp_path / "lora.safetensors", tensors)})
    assert "another base model" not in str(error.value) and "\n" not in str(error.value)


def test_pivotal_tuning_and_textual_inversion_are_named(pipeline, tmp_path):
    tensors = {**kohya_file(factors(pipeline, EVERY)), "bundle_emb.sks.string_to_param.*": torch.ones(1, 16)}
    with pytest.raises(AptError, match="has pivotal tuning, with embeddings of new words"):
        Loras(pipeline, {"it": save(tmp_path / "pivotal.safetensors", tensors)})
    with pytest.raises(AptError, match="has textual inversion"):
        Loras(pipeline, {"it": save(tmp_path / "embedding.safetensors", {"emb_params": torch.ones(1, 16)})})


def test_dora_over_inputs_is_named(pipeline, tmp_path):
    place = f"unet.{ATTENTION}.attn1.to_q"  # as many outputs as inputs
    tensors = kohya_file(factors(pipeline, {place: 2}))
    tensors[f"{kohya(place)}.dora_scale"] = torch.ones(1, 16)
    with pytest.raises(AptError, match=r"is a DoRA whose lengths \[1, 16\] are not of its 16 outputs"):
        Loras(pipeline, {"it": save(tmp_path / "dora.safetensors", tensors)})


PLACE = f"unet.{ATTENTION}.attn1.to_q"
NAME = kohya(PLACE)


@pytest.mark.parametrize(
    ("change", "header", "message"),
    (
        (
            {f"{NAME}.alpha": torch.tensor(0.0)},
            {},
            "the alpha of .*to_q is to be a finite number that is not 0; found 0.0",
        ),
        ({f"{NAME}.alpha": torch.tensor(float("nan"))}, {}, "the alpha of .*to_q is to be a finite number.*found nan"),
        ({f"{NAME}.alpha": torch.ones(2)}, {}, r"its alpha is one number; found \[2\]"),
        ({f"{NAME}.lora_up.weight": torch.full((16, 2), float("inf"))}, {}, "to_q: holds numbers that are not finite"),
        ({f"{NAME}.lora_up.weight": torch.ones(16, 3)}, {}, r"do not fit one another \(down \[2, 16\], up \[16, 3\]\)"),
        ({f"{NAME}.lora_up.weight": None}, {}, "has down and no up"),
        ({f"{NAME}.lora_down.weight": torch.ones(2, 24)}, {}, r"is 16 to 16, lora_unet_.*to_q 24 to 16\)"),
        ({}, {"ss_network_alpha": "Dynamic"}, "ss_network_alpha in its header is to be a finite number.*found Dynamic"),
        (
            {},
            {"ss_network_alpha": "4", "ss_network_args": '{"block_alphas": "1,2"}'},
            "trained with block_alphas and has lost",
        ),
        ({}, {"ss_network_alpha": "4", "ss_network_args": "{"}, "ss_network_args cannot be read as JSON"),
        ({}, {"lora_adapter_metadata": "[]"}, r"lora_adapter_metadata is to be an object of JSON; found \[\]"),
        ({}, {"lora_adapter_metadata": '{"unet.init_lora_weights": "pissa"}'}, "changes the base model's weights too"),
        (
            {f"{PLACE}.lora_A.weight": torch.ones(2, 16), f"{PLACE}.lora_B.weight": torch.ones(16, 2)},
            {},
            f"{NAME} and {PLACE} are of one module|{PLACE} and {NAME} are of one module",
        ),
    ),
)
def test_a_file_that_is_not_whole_is_refused(pipeline, tmp_path, change, header, message):
    tensors = {**kohya_file(factors(pipeline, {PLACE: 2})), **change}
    tensors = {key: tensor for key, tensor in tensors.items() if tensor is not None}
    with pytest.raises(AptError, match=message) as error:
        Loras(pipeline, {"it": save(tmp_path / "lora.safetensors", tensors, header or None)})
    assert "lora.safetensors" in str(error.value) and "\n" not in str(error.value)


def test_a_module_that_is_not_there_is_named(pipeline, tmp_path):
    pairs = factors(pipeline, EVERY)
    tensors = kohya_file(pairs)
    tensors |= {key.replace("up_blocks_1", "up_blocks_7"): t for key, t in tensors.items() if "up_blocks_1" in key}
    with pytest.raises(AptError, match=r"5 of its 18 modules are not there, such as lora_unet_up_blocks_7_attentions"):
        Loras(pipeline, {"it": save(tmp_path / "lora.safetensors", tensors)})


@pytest.mark.parametrize("place", (PLACE, "unet.down_blocks.0.downsamplers.0.conv", f"text_encoder.{TEXT}.mlp.fc1"))
@pytest.mark.parametrize("fault", ("scale", "absent", "kept from before"))
def test_what_is_on_the_model_is_compared_with_the_file(pipeline, tmp_path, monkeypatch, place, fault):
    """A loader that puts one module on wrongly is found out, and the module named."""
    path = save(tmp_path / "lora.safetensors", kohya_file(factors(pipeline, EVERY), OWN))
    wrong = module_at(pipeline, place)
    own = loras_module._Addition.__init__

    def init(self, module, delta):
        own(self, module, delta)
        if module is wrong and fault == "scale":
            self.scale *= 1.01
        if module is wrong and fault == "kept from before":
            self._own = self._cast = [torch.zeros_like(t) for t in self._own]

    monkeypatch.setattr(loras_module._Addition, "__init__", init)
    if fault == "absent":
        monkeypatch.setattr(wrong, "register_forward_hook", lambda *_, **_options: types.SimpleNamespace(remove=list))
    message = "found 0" if fault == "absent" else "adds something else than"
    with pytest.raises(AptError, match=f"{kohya(place)}: .*{message}"):
        Loras(pipeline, {"it": path})
    assert not any(m._forward_hooks for m in pipeline.unet.modules())


def test_the_models_own_pass_is_that_of_merged_weights(pipeline, tmp_path):
    """Of the U-Net and of both text encoders."""
    pairs = factors(pipeline, EVERY)
    path = save(tmp_path / "lora.safetensors", kohya_file(pairs, OWN))
    words, x, context = torch.tensor([[1, 5, 7, 2]]), torch.randn(1, 4, 8, 8), torch.randn(1, 4, 24)
    conditions = {"text_embeds": torch.randn(1, 16), "time_ids": torch.ones(1, 6)}

    def outputs(of):
        texts = [model(words).last_hidden_state for model in (of.text_encoder, of.text_encoder_2)]
        return [*texts, of.unet(x, 500, context, added_cond_kwargs=conditions).sample]

    parts = ("unet", "text_encoder", "text_encoder_2")
    merged = types.SimpleNamespace(**{part: copy.deepcopy(getattr(pipeline, part)) for part in parts})
    for place, (down, up) in pairs.items():
        module_at(merged, place).weight += product(merged, place, down, up, OWN[place] / EVERY[place])
    before = outputs(pipeline)
    with Loras(pipeline, {"it": path}) as loras:
        with loras.active("it"):
            found = outputs(pipeline)
        assert all(torch.equal(*pair) for pair in zip(outputs(pipeline), before, strict=True))
    for own, want, plain in zip(found, outputs(merged), before, strict=True):
        assert relative_difference(own - plain, want - plain) < 1e-3


def test_the_precision_is_the_models_own_of_the_moment(pipeline, tmp_path):
    """What bfloat16 has rounded is not rounded any more when the model is back in float32."""
    pairs = factors(pipeline, EVERY)
    path = save(tmp_path / "lora.safetensors", kohya_file(pairs, OWN))
    modules = {place: copy.deepcopy(module_at(pipeline, place)) for place in EVERY}
    with Loras(pipeline, {"it": path}) as loras, loras.active("it"):
        for place, layer in modules.items():
            module, x = module_at(pipeline, place), _input(layer.weight)
            want = _computed(
                layer, x, layer.weight + product(pipeline, place, *pairs[place], OWN[place] / EVERY[place])
            )
            try:
                rough = module.to(torch.bfloat16)(x.bfloat16())
            finally:
                module.float().load_state_dict(layer.state_dict())
            assert rough.dtype is torch.bfloat16 and 0 < relative_difference(rough.float(), want) < 0.03, place
            assert relative_difference(module(x), want) < 1e-5, place


def test_two_that_are_loaded_apart_are_never_active_at_once(pipeline, tmp_path):
    path = save(tmp_path / "lora.safetensors", kohya_file(factors(pipeline, EVERY), OWN))
    with Loras(pipeline, {"one": path}) as one, Loras(pipeline, {"two": path}) as two, one.active("one"):
        with pytest.raises(AptError, match="'two' cannot be active while one of another Loras is"), two.active("two"):
            pass
        with pytest.raises(AptError, match="has LoRAs loaded already"):
            Loras(pipeline, {"three": path})
