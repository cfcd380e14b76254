"""Models and data for the scripts beside: diffusers' own classes, random weights, a step in milliseconds."""

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

WIDTH, TEXT_WIDTH, TOKENS, WORDS = 32, 16, 6, 40

torch.set_num_threads(1)


def make_unet(text_width=TEXT_WIDTH, **more):
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(WIDTH, WIDTH, WIDTH),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=text_width,
        attention_head_dim=2,
        norm_num_groups=8,
        **more,
    )


def make_vae():
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
    )


def make_text_encoder():
    config = CLIPTextConfig(
        vocab_size=WORDS,
        hidden_size=TEXT_WIDTH,
        intermediate_size=TEXT_WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=0,
        eos_token_id=WORDS - 1,
        pad_token_id=1,
    )
    return CLIPTextModel(config)


def make_tokenizer():
    """Reads "w7" as 7; a text is its words alone, filled up."""
    words = {"<unknown>": 0, "<pad>": 1, **{f"w{i}": i for i in range(2, WORDS - 1)}, "<end>": WORDS - 1}
    made = Tokenizer(models.WordLevel(words, unk_token="<unknown>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unknown>", pad_token="<pad>", eos_token="<end>", model_max_length=TOKENS
    )


def make_scheduler(prediction_type="epsilon"):
    return DDPMScheduler(prediction_type=prediction_type)


def _prompts():
    words = torch.randint(2, WORDS - 1, (2, TOKENS), generator=_generator())
    return tuple(" ".join(f"w{number}" for number in row) for row in words.tolist())


def _generator():
    """Behind the pictures' numbers."""
    generator = torch.Generator().manual_seed(7)
    torch.rand(8, 3, 16, 16, generator=generator)
    return generator


INSTANCE_PROMPT, CLASS_PROMPT = _prompts()


class Photos(torch.utils.data.Dataset):
    """Eight pictures of a class, the first four of one subject, each with its text: tokens, or whatever is given."""

    def __init__(self, texts, class_text):
        self.pixels = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(7)) * 2 - 1
        self.texts, self.class_text = texts, class_text

    def __len__(self):
        return 4

    def __getitem__(self, i):
        return {
            "own": (self.pixels[i], self.texts[i % len(self.texts)]),
            "of_class": (self.pixels[4 + i], self.class_text),
        }


def collate(examples, with_prior_preservation=False):
    """With prior preservation the class pictures make the second half of the batch."""
    chosen = [e["own"] for e in examples]
    if with_prior_preservation:
        chosen += [e["of_class"] for e in examples]
    texts = [c[1] for c in chosen]
    if isinstance(texts[0], torch.Tensor):
        texts = torch.cat(texts)
    return {"pixel_values": torch.stack([c[0] for c in chosen]), "input_ids": texts}


def make_transformer():
    """Pictures of 8x8 latents in patches of two, packed or not as `SD3Transformer2DModel` has them."""
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=TEXT_WIDTH,
        pos_embed_max_size=8,
    )
