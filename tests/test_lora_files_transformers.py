"""A transformer's LoRAs, by whatever names their trainer gave the modules."""

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


@pytest.mark.parametrize(
    ("family", "own"),
    [("sd3", Sampling(28, 7.0)), ("flux", Sampling(28, 3.5)), ("qwen_image", Sampling(50, 4.0, "true_cfg_scale"))],
)
def test_each_draws_by_its_pipelines_own_steps_and_guidance(family, own, tmp_path, monkeypatch):
    tiny_pipelines.save(family, tmp_path / "model")
    model = str(tmp_path / "model")
    pipeline = load_pipeline(model)
    assert sampling(model, pipeline, None, None) == own
    few = sampling(model, pipeline, 1, 2.0)
    assert few == Sampling(1, 2.0, own.guided_by)
    asked = []
    call = type(pipeline).__call__

    def smaller(self, **given):
        asked.append(given)
        return call(self, **given, height=32, width=32)

    monkeypatch.setattr(type(pipeline), "__call__", smaller)
    name = next(n for n, m in pipeline.transformer.named_modules() if n.endswith("to_q"))
    pairs = factors(pipeline, [f"transformer.{name}"])
    lora = save(tmp_path / "one.safetensors", diffusers_names(pairs))
    plan = generate.Plan((Prompt("a sks dog", "a dog"), Prompt("a sks dog at night", "a dog at night")), (0, 1), (2,))
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
