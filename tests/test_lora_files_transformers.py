"""A transformer's LoRAs, by whatever names their trainer gave the modules."""

import inspect
import json

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytest.importorskip("safetensors")

import tiny_pipelines
from models import relative_difference
from safetensors.torch import save_file

from apt_hooks import AptError
from apt_hooks.integrations.judging import generate
from apt_hooks.integrations.sampling import pipelines
from apt_hooks.integrations.sampling.loras import Loras
from apt_hooks.integrations.sampling.pipelines import Sampling, load_pipeline, sampling
from apt_hooks.results.comparison.folders import BASE, Prompt

RANK, ALPHA = 4, 2.0
DOUBLE = "transformer.transformer_blocks.1.attn"
SINGLE = "transformer.single_transformer_blocks.0.attn"


@pytest.fixture(scope="module")
def pipeline():
    torch.manual_seed(0)
    pipeline = tiny_pipelines.flux()
    for part in (pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2):
        part.requires_grad_(False)
    return pipeline


def module_at(pipeline, place):
    part, _, path = place.partition(".")
    return getattr(pipeline, part).get_submodule(path)


def factors(pipeline, places):
    """{place: (down, up)} of modules, from one random stream."""
    g = torch.Generator().manual_seed(0)
    sizes = {place: module_at(pipeline, place).weight.shape for place in places}
    return {p: (torch.randn(RANK, i, generator=g), torch.randn(o, RANK, generator=g)) for p, (o, i) in sizes.items()}


def diffusers_names(pairs, prefix=""):
    return {f"{prefix}{p}.lora_{x}.weight": t for p, pair in pairs.items() for x, t in zip("AB", pair, strict=True)}


def save(path, tensors, header=None):
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, header)
    return path


def check(pipeline, path, weights):
    """That with the file every place computes with the weight that is wanted there; without, with its own."""
    with Loras(pipeline, {"it": path}) as loras:
        for place, weight in weights.items():
            module = module_at(pipeline, place)
            x = torch.randn(2, weight.shape[1], generator=torch.Generator().manual_seed(9))
            before = module(x)
            with loras.active("it"):
                found = module(x)
            assert relative_difference(found - before, x @ (weight - module.weight).T) < 1e-5, place
            assert torch.equal(module(x), before)


@pytest.mark.parametrize("prefix", ("transformer.", ""))
def test_diffusers_names_with_and_without_the_part(pipeline, tmp_path, prefix):
    pairs = factors(pipeline, [f"{DOUBLE}.to_q", f"{DOUBLE}.add_k_proj", f"{SINGLE}.to_v"])
    tensors = diffusers_names({place.removeprefix("transformer."): pair for place, pair in pairs.items()}, prefix)
    path = save(tmp_path / "lora.safetensors", tensors)
    check(pipeline, path, {p: module_at(pipeline, p).weight + up @ down for p, (down, up) in pairs.items()})


def test_the_text_encoders_lora_of_diffusers_script_is_loaded_too(pipeline, tmp_path):
    (place,) = [
        f"text_encoder.{name}"
        for name, _ in pipeline.text_encoder.named_modules()
        if name.endswith("1.self_attn.q_proj")
    ]
    pairs = factors(pipeline, [place, f"{DOUBLE}.to_q"])
    path = save(tmp_path / "lora.safetensors", diffusers_names(pairs))
    check(pipeline, path, {p: module_at(pipeline, p).weight + up @ down for p, (down, up) in pairs.items()})


def sd_scripts_file(pipeline):
    """The names of sd-scripts: one module for query, key and value, and its alpha; and the weights that are wanted."""
    width = pipeline.transformer.inner_dim
    g = torch.Generator().manual_seed(0)
    down, up = torch.randn(RANK, width, generator=g), torch.randn(3 * width, RANK, generator=g)
    text_down, text_up = torch.randn(RANK, width, generator=g), torch.randn(3 * width, RANK, generator=g)
    names = {
        "lora_unet_double_blocks_1_img_attn_qkv": (down, up),
        "lora_unet_double_blocks_1_txt_attn_qkv": (text_down, text_up),
    }
    tensors = {
        f"{name}.lora_{part}.weight": t for name, p in names.items() for part, t in zip(("down", "up"), p, strict=True)
    }
    tensors |= {f"{name}.alpha": torch.tensor(ALPHA) for name in names}
    added = {
        (DOUBLE, ("to_q", "to_k", "to_v")): up @ down,
        (DOUBLE, ("add_q_proj", "add_k_proj", "add_v_proj")): text_up @ text_down,
    }
    weights = {
        f"{block}.{name}": module_at(pipeline, f"{block}.{name}").weight + ALPHA / RANK * part
        for (block, modules), delta in added.items()
        for name, part in zip(modules, delta.chunk(3), strict=True)
    }
    return tensors, weights


def test_sd_scripts_names_are_read_by_diffusers_converter_with_their_alphas(pipeline, tmp_path):
    tensors, weights = sd_scripts_file(pipeline)
    # The header's alpha is that of the tensors, and not to be counted twice.
    path = save(tmp_path / "lora.safetensors", tensors, {"ss_network_alpha": str(ALPHA), "ss_network_dim": str(RANK)})
    check(pipeline, path, weights)


def test_an_alpha_that_the_header_alone_tells_is_kept_through_the_converter(pipeline, tmp_path):
    tensors, weights = sd_scripts_file(pipeline)
    tensors = {key: tensor for key, tensor in tensors.items() if not key.endswith(".alpha")}
    check(pipeline, save(tmp_path / "lora.safetensors", tensors, {"ss_network_alpha": str(ALPHA)}), weights)


def test_pefts_own_format_has_its_alpha_beside_it(pipeline, tmp_path):
    pairs = factors(pipeline, [f"{DOUBLE}.to_q"])
    tensors = diffusers_names({p.removeprefix("transformer."): pair for p, pair in pairs.items()}, "base_model.model.")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA}))
    path = save(tmp_path / "adapter_model.safetensors", tensors)
    wanted = {p: module_at(pipeline, p).weight + ALPHA / RANK * up @ down for p, (down, up) in pairs.items()}
    check(pipeline, path, wanted)


@pytest.mark.parametrize("prefix", ("lora_transformer_", "lora_unet_"))
def test_diffusers_names_with_underscores_need_no_converter(pipeline, tmp_path, prefix, monkeypatch):
    """As OneTrainer and musubi-tuner write them."""
    monkeypatch.setattr(type(pipeline), "lora_state_dict", None)
    pairs = factors(pipeline, [f"{DOUBLE}.to_q", f"{SINGLE}.to_v"])
    names = {place: prefix + place.removeprefix("transformer.").replace(".", "_") for place in pairs}
    tensors = {
        f"{names[p]}.lora_{x}.weight": t for p, pair in pairs.items() for x, t in zip(("down", "up"), pair, strict=True)
    }
    tensors |= {f"{name}.alpha": torch.tensor(ALPHA) for name in names.values()}
    weights = {p: module_at(pipeline, p).weight + ALPHA / RANK * up @ down for p, (down, up) in pairs.items()}
    check(pipeline, save(tmp_path / "lora.safetensors", tensors), weights)


def test_t5_of_sd_scripts_is_the_second_text_encoder_of_flux(pipeline, tmp_path):
    """The converter, which the transformer's part goes through, would leave it out."""
    tensors, weights = sd_scripts_file(pipeline)
    place = "text_encoder_2.encoder.block.1.layer.0.SelfAttention.q"
    ((_, (down, up)),) = factors(pipeline, [place]).items()
    name = f"lora_te3_{place.removeprefix('text_encoder_2.').replace('.', '_')}"
    tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(ALPHA)}
    weights[place] = module_at(pipeline, place).weight + ALPHA / RANK * up @ down
    check(pipeline, save(tmp_path / "lora.safetensors", tensors), weights)


@pytest.mark.parametrize("found", ("nothing", "half"))
def test_what_a_converter_leaves_out_is_noticed(pipeline, tmp_path, monkeypatch, found):
    """Some of diffusers' only warn of it."""
    tensors, _ = sd_scripts_file(pipeline)
    of_class = type(pipeline).lora_state_dict

    def forgetful(given, **options):
        whole = of_class(given, **options)
        return {key: t for key, t in whole.items() if found == "half" and ".to_" not in key}

    monkeypatch.setattr(type(pipeline), "lora_state_dict", forgetful)
    share = "0" if found == "nothing" else r"0\.\d+"
    with pytest.raises(
        AptError, match=rf"converter takes {share} of what the 2 modules change .*lora_unet_double_blocks_1"
    ):
        Loras(pipeline, {"it": save(tmp_path / "lora.safetensors", tensors)})


def test_a_model_with_sd_scripts_lora_predicts_as_with_diffusers_own_loader(tmp_path):
    torch.manual_seed(0)
    pipeline = tiny_pipelines.flux().to(torch.float64)
    for part in (pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2):
        part.eval()
    tensors, _ = sd_scripts_file(pipeline)
    path = save(
        tmp_path / "lora.safetensors", {key: t if key.endswith("alpha") else 0.1 * t for key, t in tensors.items()}
    )
    options = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "pt"}
    pipeline.set_progress_bar_config(disable=True)

    def draw():
        return pipeline("a fox", generator=torch.Generator().manual_seed(1), **options).images

    with Loras(pipeline, {"it": path}) as loras:
        plain = draw()
        with loras.active("it"):
            ours = draw()
    pipeline.load_lora_weights(str(path))
    theirs = draw()
    assert relative_difference(ours - plain, theirs - plain) < 1e-4


def test_names_that_nobody_knows_are_told(pipeline, tmp_path):
    pairs = factors(pipeline, [f"{DOUBLE}.to_q"])
    path = save(tmp_path / "lora.safetensors", diffusers_names({"transformer.layers.0.q": pairs[f"{DOUBLE}.to_q"]}))
    with pytest.raises(AptError, match=r"does not fit the model, a FluxPipeline.*transformer.layers.0.q"):
        Loras(pipeline, {"it": path})


def test_what_diffusers_converter_cannot_read_is_told_in_one_line(pipeline, tmp_path):
    tensors, _ = sd_scripts_file(pipeline)
    tensors["lora_unet_no_such_block.lora_down.weight"] = torch.ones(2, 2)
    tensors["lora_unet_no_such_block.lora_up.weight"] = torch.ones(2, 2)
    with pytest.raises(
        AptError, match=r"lora.safetensors: (diffusers cannot read it for a FluxPipeline|does not fit)"
    ) as e:
        Loras(pipeline, {"it": save(tmp_path / "lora.safetensors", tensors)})
    assert "\n" not in str(e.value)


# Drawing.


def called(**parameters):
    """A pipeline of a transformer, by what it is called with."""
    signature = inspect.Signature(
        [inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
        + [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=d) for n, d in parameters.items()]
    )
    call = lambda self, **_given: ([],)  # noqa: E731
    call.__signature__ = signature
    return type("SomePipeline", (), {"__call__": call, "transformer": object(), "components": {}})()


COMMON = {"prompt": None, "generator": None, "num_inference_steps": 30}


@pytest.mark.parametrize(
    ("parameters", "given", "options"),
    [
        ({"guidance_scale": 4.0}, None, {"guidance_scale": 4.0}),
        ({"guidance_scale": 3.5, "true_cfg_scale": 1.0}, 2.0, {"guidance_scale": 2.0}),
        ({"guidance_scale": None, "true_cfg_scale": 4.0}, None, {"true_cfg_scale": 4.0, "negative_prompt": [" ", " "]}),
        ({"true_cfg_scale": 1.0}, None, {"true_cfg_scale": 1.0}),
        ({"true_cfg_scale": 1.0}, 4.0, {"true_cfg_scale": 4.0, "negative_prompt": [" ", " "]}),
        ({"distilled_guidance_scale": 3.25}, 2.0, {"distilled_guidance_scale": 2.0}),
        ({"guidance_scale": None, "guidance_schedule": (7.0,)}, None, {}),
        (
            {"guidance_scale": None, "guidance_schedule": (7.0,)},
            4.0,
            {"guidance_scale": 4.0, "guidance_schedule": None},
        ),
        ({}, None, {}),
    ],
)
def test_the_scale_of_guidance_goes_where_the_pipeline_takes_it(parameters, given, options):
    pipeline = called(**COMMON, **parameters)
    assert sampling("a/model", pipeline, None, given).options(2) == {"num_inference_steps": 30, **options}


def test_a_scale_that_a_pipeline_does_not_take_is_refused():
    with pytest.raises(AptError, match="--guidance-scale 4: SomePipeline takes none; leave it out"):
        sampling("a/model", called(**COMMON), None, 4)


@pytest.mark.parametrize(
    ("parameters", "lack"),
    [
        ({**COMMON, "num_frames": 81}, r"goes by more than a text \(num_frames\)"),
        ({**COMMON, "image": None, "strength": 0.6}, r"goes by more than a text \(strength\)"),
        ({"prompt": None, "generator": None}, "takes no num_inference_steps"),
    ],
)
def test_what_draws_no_pictures_by_a_text_is_refused(parameters, lack):
    with pytest.raises(
        AptError, match=f"^SomePipeline is not supported, it {lack}: take a pipeline that draws pictures"
    ):
        pipelines._check_drawing(called(**parameters))


def test_a_pipeline_that_draws_something_else_is_refused(tmp_path):
    pipeline = called(**COMMON)
    with pytest.raises(AptError, match="SomePipeline is not supported: it draws no pictures"):
        type(pipeline).__call__ = lambda self, **_given: ([["frame", "frame"]],)
        generate._drawn(pipeline, ["a dog"], [], {})


def test_blend_and_maps_take_unets_alone(tmp_path):
    tiny_pipelines.save("sd3", tmp_path / "model")
    with pytest.raises(
        AptError, match="StableDiffusion3Pipeline is not supported, it has no unet: take a plain pipeline"
    ):
        pipelines.load_unet_pipeline(str(tmp_path / "model"))


@pytest.mark.parametrize(
    ("family", "own"),
    [
        ("sd3", Sampling(28, 7.0)),
        ("flux", Sampling(28, 3.5)),
        ("qwen_image", Sampling(50, 4.0, "true_cfg_scale", " ")),
        ("z_image", Sampling(50, 5.0)),
        ("lumina2", Sampling(30, 4.0)),
        ("krea2", Sampling(28, 4.5)),
    ],
)
def test_each_draws_by_its_pipelines_own_steps_and_guidance(family, own, tmp_path, monkeypatch):
    tiny_pipelines.save(family, tmp_path / "model")
    model = str(tmp_path / "model")
    pipeline = load_pipeline(model)
    assert sampling(model, pipeline, None, None) == own
    few = sampling(model, pipeline, 1, 2.0)
    assert few == Sampling(1, 2.0, own.guided_by, own.negative)
    asked = []
    call = type(pipeline).__call__

    def smaller(self, **given):
        asked.append({**given, "prompt": list(given["prompt"])})  # Z-Image writes into it
        return call(self, **given, height=32, width=32)

    monkeypatch.setattr(type(pipeline), "__call__", smaller)
    names = [n for n, _ in pipeline.transformer.named_modules() if n.endswith("to_q")]
    pairs = factors(pipeline, [f"transformer.{name}" for name in names])
    lora = save(tmp_path / "one.safetensors", diffusers_names(pairs))
    prompts = (Prompt("a dog", "a dog"), Prompt("a dog at night", "a dog at night"))  # for both: all else is the LoRA's
    plan = generate.Plan(prompts, (0, 1), (2,))
    pipeline.set_progress_bar_config(disable=True)
    generate.generate(
        *(pipeline, {"one": lora}, plan, few, tmp_path / "out"),
        batch=2,
        own=generate.Share(),
        advance=lambda _count: None,
    )
    assert [given["prompt"] for given in asked[:1]] == [["a dog", "a dog"]] and len(asked) == 5
    assert all(given[own.guided_by] == 2.0 and given["num_inference_steps"] == 1 for given in asked)
    assert ("negative_prompt" in asked[0]) == (own.guided_by == "true_cfg_scale")
    base, one = (plan.pictures(tmp_path / "out", name) for name in (BASE, "one"))
    assert all(path.exists() for path in (*base, *one, *plan.more_of_the_base(tmp_path / "out")))
    assert base[0].read_bytes() != one[0].read_bytes()
