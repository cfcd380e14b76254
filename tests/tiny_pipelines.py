"""Pipelines in diffusers' format that a CPU trains in a moment: real classes, a few narrow layers, random weights.

`python tests/tiny_pipelines.py FOLDER [FAMILY ...]` writes them; nothing is downloaded. The tokenizers are made here
and know single bytes, so that words of one length have the same number of tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

WIDTH = 32
"""Of the text encoders, and what the transformers expect of them."""
VOCABULARY = 512

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save(family: str, folder: Path) -> None:
    """Write a family's pipeline, of `FAMILIES`, into a folder."""
    torch.manual_seed(0)
    pipeline = FAMILIES[family]()
    for module in pipeline.components.values():
        if isinstance(module, torch.nn.Module):
            _settle(module)
    pipeline.save_pretrained(folder)


def _settle(module: torch.nn.Module) -> None:
    """Finite weights everywhere: some padding is left uninitialized, and some output layers are zero."""
    for parameter in module.parameters():
        if not torch.isfinite(parameter).all() or not parameter.abs().sum() or parameter.abs().max() > 100.0:
            torch.nn.init.normal_(parameter, std=0.02)


# -- tokenizers --------------------------------------------------------------------------------------------------------


def _bytes() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def _numbered(tokens: list[str]) -> dict[str, int]:
    return {token: i for i, token in enumerate(tokens)}


def clip_tokenizer() -> Any:
    from transformers import CLIPTokenizer

    tokens = ["<|startoftext|>", "<|endoftext|>", *_bytes(), *(f"{token}</w>" for token in _bytes())]
    return CLIPTokenizer(vocab=_numbered(tokens), merges=[], model_max_length=77)


def t5_tokenizer() -> Any:
    from transformers import T5Tokenizer

    pieces = ["▁", *(chr(i) for i in range(33, 127))]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((piece, -2.0) for piece in pieces)]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=128)


def qwen_tokenizer() -> Any:
    from transformers import Qwen2Tokenizer

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
    tokenizer = Qwen2Tokenizer(vocab=_numbered([*special, *_bytes()]), merges=[], model_max_length=1024)
    tokenizer.add_special_tokens({"additional_special_tokens": special[1:]})
    tokenizer.chat_template = CHAT
    return tokenizer


def byte_tokenizer(**special: str) -> Any:
    """With these special tokens, for what reads any tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = _numbered([*dict.fromkeys(special.values()), *_bytes()])
    tokenizer = Tokenizer(models.BPE(vocab=tokens, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **special)
    made.chat_template = CHAT
    return made


def gemma_tokenizer() -> Any:
    from transformers import GemmaTokenizer

    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *(f"<0x{i:02X}>" for i in range(256))]
    tokens += [chr(i) for i in range(33, 127)]
    return GemmaTokenizer(vocab=_numbered(tokens), merges=[], model_max_length=512)


# -- text encoders -----------------------------------------------------------------------------------------------------


def clip_encoder(*, projected: bool) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=VOCABULARY + 2,
        hidden_size=WIDTH // 2,
        intermediate_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=WIDTH // 2,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return CLIPTextModelWithProjection(config) if projected else CLIPTextModel(config)


def t5_encoder() -> Any:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, d_ff=WIDTH, num_layers=2, num_heads=4, is_encoder_decoder=False
    )
    return T5EncoderModel(config)


def _decoder(layers: int) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 2048,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }


def qwen3(layers: int = 3, *, causal: bool) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

    config = Qwen3Config(**_decoder(layers))
    return Qwen3ForCausalLM(config) if causal else Qwen3Model(config)


def _vision() -> dict[str, Any]:
    return {"depth": 1, "hidden_size": WIDTH, "intermediate_size": WIDTH, "num_heads": 2, "out_hidden_size": WIDTH}


def qwen2_5_vl() -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]}
    text = {**_decoder(2), "rope_scaling": rope, "rope_parameters": rope}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=_vision()))


def qwen3_vl(layers: int) -> Any:
    from transformers import Qwen3VLConfig, Qwen3VLModel

    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1]}
    vision = {**_vision(), "deepstack_visual_indexes": [0]}
    text = {**_decoder(layers), "rope_scaling": rope, "rope_parameters": rope}
    return Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=vision))


def gemma2() -> Any:
    from transformers import Gemma2Config, Gemma2Model

    return Gemma2Model(Gemma2Config(**_decoder(2)))


def mistral3() -> Any:
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    vision = {
        "model_type": "pixtral",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 30,
        "patch_size": 6,
    }
    # FLUX.2 reads layers 10, 20 and 30.
    text = {"model_type": "mistral", **_decoder(30), "sliding_window": None}
    config = Mistral3Config(text_config=text, vision_config=vision, image_token_index=3)
    return Mistral3ForConditionalGeneration(config)


def pixtral_processor() -> Any:
    from transformers import PixtralImageProcessor, PixtralProcessor

    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = byte_tokenizer(**special)
    tokenizer.add_special_tokens({"additional_special_tokens": ["[IMG]", "[IMG_BREAK]", "[IMG_END]"]})
    return PixtralProcessor(PixtralImageProcessor(), tokenizer, patch_size=6, chat_template=CHAT)


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**_decoder(4)))


# -- image encoders ----------------------------------------------------------------------------------------------------


def _blocks(count: int) -> dict[str, Any]:
    """Of a VAE that halves `count - 1` times."""
    return {
        "block_out_channels": (8,) * count,
        "down_block_types": ("DownEncoderBlock2D",) * count,
        "up_block_types": ("UpDecoderBlock2D",) * count,
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "sample_size": 32,
    }


def kl(blocks: int = 2, channels: int = 4) -> Any:
    from diffusers import AutoencoderKL

    scaling = {"shift_factor": 0.0609, "scaling_factor": 1.5035}
    return AutoencoderKL(
        **_blocks(blocks), **scaling, latent_channels=channels, use_quant_conv=False, use_post_quant_conv=False
    )


def kl_flux2() -> Any:
    from diffusers import AutoencoderKLFlux2

    return AutoencoderKLFlux2(**_blocks(2), latent_channels=4)


def kl_qwen() -> Any:
    from diffusers import AutoencoderKLQwenImage

    return AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1] * 4,
        latents_std=[0.9] * 4,
    )


def deep_compression() -> Any:
    from diffusers import AutoencoderDC

    return AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )


# -- pipelines ---------------------------------------------------------------------------------------------------------


def _schedule(**given: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**given)


_SHIFTED = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}


def sdxl() -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    schedule = EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    denoiser = UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 1),
        projection_class_embeddings_input_dim=8 * 6 + WIDTH // 2,
        cross_attention_dim=WIDTH,
    )
    return StableDiffusionXLPipeline(
        vae=kl(),
        text_encoder=clip_encoder(projected=False),
        text_encoder_2=clip_encoder(projected=True),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=denoiser,
        scheduler=schedule,
    )


def sd3() -> Any:
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=_schedule(shift=3.0),
        vae=kl(),
        text_encoder=clip_encoder(projected=True),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_encoder(projected=True),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_encoder(),
        tokenizer_3=t5_tokenizer(),
    )


def _flux(pipeline: Any) -> Any:
    from diffusers import FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH // 2,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    return pipeline(
        transformer=transformer,
        scheduler=_schedule(shift=3.0, **_SHIFTED),
        vae=kl(),
        text_encoder=clip_encoder(projected=False),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5_encoder(),
        tokenizer_2=t5_tokenizer(),
    )


def flux() -> Any:
    from diffusers import FluxPipeline

    return _flux(FluxPipeline)


def flux_kontext() -> Any:
    from diffusers import FluxKontextPipeline

    return _flux(FluxKontextPipeline)


def _flux2_transformer(text: int, *, guidance: bool) -> Any:
    from diffusers import Flux2Transformer2DModel

    return Flux2Transformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=text,
        timestep_guidance_channels=256,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance,
    )


def flux2() -> Any:
    from diffusers import Flux2Pipeline

    return Flux2Pipeline(
        transformer=_flux2_transformer(3 * WIDTH, guidance=True),
        scheduler=_schedule(**_SHIFTED),
        vae=kl_flux2(),
        text_encoder=mistral3(),
        tokenizer=pixtral_processor(),
    )


def flux2_klein() -> Any:
    from diffusers import Flux2KleinPipeline

    return Flux2KleinPipeline(
        transformer=_flux2_transformer(3 * WIDTH, guidance=False),
        scheduler=_schedule(**_SHIFTED),
        vae=kl_flux2(),
        text_encoder=qwen3(27, causal=True),  # of which layers 9, 18 and 27 are read
        tokenizer=qwen_tokenizer(),
    )


def qwen_image() -> Any:
    from diffusers import QwenImagePipeline, QwenImageTransformer2DModel

    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=4,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(8, 4, 4),
    )
    return QwenImagePipeline(
        transformer=transformer,
        scheduler=_schedule(**_SHIFTED),
        vae=kl_qwen(),
        text_encoder=qwen2_5_vl(),
        tokenizer=qwen_tokenizer(),
    )


def z_image() -> Any:
    from diffusers import ZImagePipeline, ZImageTransformer2DModel

    transformer = ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=4,
        dim=32,
        n_layers=4,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[8, 4, 4],
        axes_lens=[1024, 64, 64],
    )
    return ZImagePipeline(
        transformer=transformer,
        scheduler=_schedule(shift=3.0),
        vae=kl(),
        text_encoder=qwen3(causal=False),
        tokenizer=qwen_tokenizer(),
    )


def sana() -> Any:
    from diffusers import SanaPipeline, SanaTransformer2DModel

    transformer = SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=WIDTH,
        sample_size=16,
    )
    return SanaPipeline(
        transformer=transformer,
        scheduler=_schedule(shift=3.0),
        vae=deep_compression(),
        text_encoder=gemma2(),
        tokenizer=gemma_tokenizer(),
    )


def lumina2() -> Any:
    from diffusers import Lumina2Pipeline, Lumina2Transformer2DModel

    transformer = Lumina2Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        hidden_size=32,
        num_layers=4,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(8, 4, 4),
        axes_lens=(512, 64, 64),
        cap_feat_dim=WIDTH,
    )
    return Lumina2Pipeline(
        transformer=transformer,
        scheduler=_schedule(shift=6.0),
        vae=kl(),
        text_encoder=gemma2(),
        tokenizer=gemma_tokenizer(),
    )


def hidream() -> Any:
    from diffusers import HiDreamImagePipeline, HiDreamImageTransformer2DModel

    transformer = HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_channels=[WIDTH, WIDTH],
        text_emb_dim=WIDTH,
        num_routed_experts=4,
        num_activated_experts=2,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(32, 32),
        llama_layers=[0, 1, 2, 3],
    )
    return HiDreamImagePipeline(
        transformer=transformer,
        scheduler=_schedule(shift=3.0),
        vae=kl(),
        text_encoder=clip_encoder(projected=True),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_encoder(projected=True),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_encoder(),
        tokenizer_3=t5_tokenizer(),
        text_encoder_4=llama(),
        tokenizer_4=byte_tokenizer(pad_token="<pad>", bos_token="<s>", eos_token="</s>"),
    )


def krea2() -> Any:
    from diffusers import Krea2Pipeline, Krea2Transformer2DModel

    transformer = Krea2Transformer2DModel(
        in_channels=16,
        num_layers=4,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        timestep_embed_dim=8,
        text_hidden_dim=WIDTH,
        num_text_layers=3,
        text_num_attention_heads=2,
        text_num_key_value_heads=1,
        text_intermediate_size=16,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(8, 4, 4),
    )
    return Krea2Pipeline(
        transformer=transformer,
        scheduler=_schedule(**_SHIFTED),
        vae=kl_qwen(),
        text_encoder=qwen3_vl(2),
        tokenizer=qwen_tokenizer(),
        text_encoder_select_layers=(0, 1, 2),
    )


def ideogram4() -> Any:
    from diffusers import Ideogram4Pipeline, Ideogram4Transformer2DModel
    from diffusers.pipelines.ideogram4.pipeline_ideogram4 import QWEN3_VL_ACTIVATION_LAYERS as LAYERS

    def transformer() -> Any:
        return Ideogram4Transformer2DModel(
            in_channels=16,
            num_layers=4,
            attention_head_dim=16,
            num_attention_heads=2,
            intermediate_size=32,
            adaln_dim=16,
            llm_features_dim=len(LAYERS) * WIDTH,
            mrope_section=(4, 2, 2),
        )

    return Ideogram4Pipeline(
        transformer=transformer(),
        unconditional_transformer=transformer(),
        scheduler=_schedule(),
        vae=kl_flux2(),
        text_encoder=qwen3_vl(max(LAYERS) + 1),
        tokenizer=qwen_tokenizer(),
    )


FAMILIES: dict[str, Callable[[], Any]] = {
    made.__name__: made
    for made in (
        sdxl,
        sd3,
        flux,
        flux_kontext,
        flux2,
        flux2_klein,
        qwen_image,
        z_image,
        sana,
        lumina2,
        hidream,
        krea2,
        ideogram4,
    )
}

if __name__ == "__main__":
    for name in sys.argv[2:] or FAMILIES:
        save(name, Path(sys.argv[1], name))
