"""The layouts of what diffusers' DreamBooth-LoRA scripts train, on diffusers' own classes, built small.

What `test_layout_transformers` checks: against the queries and keys that reach torch's attention.
"""

import contextlib
import inspect

import pytest
import torch
from test_layout_transformers import (
    CHANNELS,
    COUNTED,
    HEADS,
    KINDS,
    LENGTHS,
    MASK,
    SIDE,
    TEXT,
    TIMESTEPS,
    WIDTH,
    Flux,
    Sd35,
    Transformer,
    check,
    diffusers_class,
)
from torch import nn

from apt_hooks import AptError, FeatureCapture
from apt_hooks.hooks.architectures import ALL, layout_of, preset_of
from apt_hooks.hooks.architectures.joint_attention import Joint

IMAGE = SIDE * SIDE
AXES = (2, 4, 2)


def tiny(kind, **options):
    """A model of one of diffusers' classes in which nothing begins at 0 and no norm at 1."""
    model = diffusers_class(kind)(**options)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
        elif name.endswith(("scale_shift_table", "pad_token")):  # the latter may be left as memory has it
            nn.init.normal_(parameter, std=0.3)
    return model


class Diffusers(Transformer):
    """One of diffusers' classes; the first `before` calls of attention in a pass are of no block that is counted."""

    kind: str
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")  # what its script trains
    projections = frozenset({"to_q", "to_k", "to_v"})
    tolerance = 1e-6
    blocks: tuple[int, ...] = (1, 3)
    auto: tuple[int, ...] = (2, 3)
    before = 0
    latents: tuple[int, ...] = (3, IMAGE, 4)
    mask = None
    attention = "attn"
    layers = "transformer_blocks"

    def __init__(self, *args):
        super().__init__(*args)
        self.x, self.target = torch.randn(2, *self.latents).double()

    def compared(self, seen):
        return [(*self.parts(*seen[self.before + i]), self.mask) for i in self.blocks]

    def parts(self, queries, keys):
        return self.part(queries, True, 2), self.part(keys, False, 2)

    def hidden(self, _, output):
        """The picture's part of a module's output."""
        output = output[0] if isinstance(output, tuple) else output
        return output if output.shape[1] == IMAGE else self.part(output, True, 1)

    def states(self, source):
        end = "" if source == "block" else f".{self.attention}"
        return [(f"{self.layers}.{i}{end}", self.hidden) for i in self.blocks]


class QwenImage(Diffusers):
    kind, preset = "QwenImageTransformer2DModel", "qwen_image"
    projections = Transformer.projections
    mask = MASK

    def make(self):
        return tiny(
            self.kind,
            patch_size=1, in_channels=4, out_channels=4, num_layers=4, attention_head_dim=CHANNELS,
            num_attention_heads=HEADS, joint_attention_dim=WIDTH, axes_dims_rope=AXES,
        )  # fmt: skip

    def predict(self):
        return self.model(
            hidden_states=self.x, encoder_hidden_states=self.text, timestep=TIMESTEPS / 1000,
            encoder_hidden_states_mask=None if self.mask is None else self.mask.long(),
            img_shapes=[[(1, SIDE, SIDE)]] * 3, **self.told_lengths(),
        ).sample  # fmt: skip

    def told_lengths(self):
        """diffusers before 0.37 has to be told."""
        known = "txt_seq_lens" in inspect.signature(type(self.model).forward).parameters
        return {"txt_seq_lens": [TEXT] * 3} if known else {}

    def states(self, source):
        if source == "block":  # text comes first
            return [(f"transformer_blocks.{i}", lambda _, output: output[1]) for i in self.blocks]
        return super().states(source)


class QwenImageUnmasked(QwenImage):
    mask = None


class Flux2(Diffusers):
    kind, preset = "Flux2Transformer2DModel", "flux2"
    targets = (
        "to_q", "to_k", "to_v", "to_out.0", "to_qkv_mlp_proj",
        "single_transformer_blocks.0.attn.to_out", "single_transformer_blocks.1.attn.to_out",
    )  # fmt: skip
    projections = Transformer.projections | {"to_qkv_mlp_proj"}
    blocks = (1, 2, 3)

    def make(self):
        return tiny(
            self.kind,
            in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=CHANNELS,
            num_attention_heads=HEADS, joint_attention_dim=WIDTH, timestep_guidance_channels=8,
            mlp_ratio=2.0, axes_dims_rope=(2, 2, 2, 2),
        )  # fmt: skip

    def predict(self):
        return self.model(
            hidden_states=self.x, encoder_hidden_states=self.text, timestep=TIMESTEPS / 1000,
            img_ids=torch.cartesian_prod(*(torch.arange(n) for n in (1, SIDE, SIDE, 1))),
            txt_ids=torch.cartesian_prod(*(torch.arange(n) for n in (1, 1, 1, TEXT))),
            guidance=torch.full((3,), 4.0),
        ).sample  # fmt: skip

    def states(self, source):
        if source == "block":
            double = ("transformer_blocks.1", lambda _, output: output[1])
            return [double, *((f"single_transformer_blocks.{i}", self.hidden) for i in (0, 1))]
        single = [
            (f"single_transformer_blocks.{i}.attn.to_out", lambda x, _: self.part(x, True, 1)[..., :WIDTH])
            for i in (0, 1)
        ]
        return [("transformer_blocks.1.attn", self.hidden), *single]


class ZImage(Diffusers):
    """Pictures of 16 positions filled up to 32, captions to 32 or 64."""

    kind, preset = "ZImageTransformer2DModel", "z_image"
    latents = (3, 4, 1, 2 * SIDE, 2 * SIDE)
    before = 2
    attention, layers = "attention", "layers"
    captions = (3, 40, 2)
    mask = torch.arange(64)[None] < torch.tensor(captions)[:, None]

    def make(self):
        return tiny(
            self.kind,
            all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=WIDTH, n_layers=4,
            n_refiner_layers=1, n_heads=HEADS, n_kv_heads=HEADS, cap_feat_dim=WIDTH,
            axes_dims=list(AXES), axes_lens=[128, 16, 16],
        )  # fmt: skip

    def __init__(self, *args):
        super().__init__(*args)
        self.captions = [torch.randn(n, WIDTH).double() for n in type(self).captions]

    def predict(self):
        return torch.stack(self.model(list(self.x), TIMESTEPS / 1000, self.captions, return_dict=False)[0])

    def parts(self, queries, keys):
        return queries[:, :, :IMAGE], keys[:, :, 32:]

    def hidden(self, _, output):
        return output[:, :IMAGE]


class ZImageEven(ZImage):
    """No attention mask in the model."""

    captions = (3, 32, 2)
    mask = torch.arange(32)[None] < torch.tensor(captions)[:, None]


class ZImageMoreCaptions(ZImage):
    """As diffusers' script gives them with batches of several, from its second step on."""

    def __init__(self, *args):
        super().__init__(*args)
        self.captions.append(torch.randn(5, WIDTH).double())


class Sana(Diffusers):
    kind, preset = "SanaTransformer2DModel", "sana"
    norm: str | None = None
    targets = ("to_q", "to_k", "to_v")
    latents = (3, 4, SIDE, SIDE)
    mask = MASK
    attention = "attn1"

    def make(self):
        return tiny(
            self.kind,
            in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=WIDTH // 4, num_layers=4,
            num_cross_attention_heads=HEADS, cross_attention_head_dim=CHANNELS, cross_attention_dim=WIDTH,
            caption_channels=WIDTH, sample_size=SIDE, qk_norm=self.norm,
        )  # fmt: skip

    def predict(self):
        return self.model(
            hidden_states=self.x, encoder_hidden_states=self.text, encoder_attention_mask=MASK.long(),
            timestep=TIMESTEPS,
        ).sample  # fmt: skip

    def parts(self, queries, keys):
        return queries, keys


class SanaNormed(Sana):
    norm = "rms_norm_across_heads"


class Lumina2(Diffusers):
    kind, preset = "Lumina2Transformer2DModel", "lumina2"
    latents = (3, 4, 2 * SIDE, 2 * SIDE)
    before = 2
    mask = MASK
    layers = "layers"

    def make(self):
        return tiny(
            self.kind,
            sample_size=2 * SIDE, in_channels=4, hidden_size=WIDTH, num_layers=4, num_refiner_layers=1,
            num_attention_heads=HEADS, num_kv_heads=1, multiple_of=8, axes_dim_rope=AXES,
            axes_lens=(64, 16, 16), cap_feat_dim=WIDTH,
        )  # fmt: skip

    def predict(self):
        return self.model(
            hidden_states=self.x, timestep=TIMESTEPS / 1000, encoder_hidden_states=self.text,
            encoder_attention_mask=MASK.long(),
        ).sample  # fmt: skip

    def parts(self, queries, keys):
        return self.hidden(None, queries.transpose(1, 2)).transpose(1, 2), keys[:, :, :TEXT]

    def hidden(self, _, output):
        return torch.stack([row[n : n + IMAGE] for row, n in zip(output, LENGTHS.tolist(), strict=True)])


class HiDream(Diffusers):
    """Text of T5, of the last layer of Llama, and of the layer of the block."""

    kind, preset = "HiDreamImageTransformer2DModel", "hidream"
    targets = ("to_k", "to_q", "to_v", "to_out")
    projections = frozenset({"to_q", "to_k", "to_v", "to_q_t", "to_k_t", "to_v_t"})
    latents = (3, 4, 2 * SIDE, 2 * SIDE)
    blocks = (1, 2, 3)
    text_first = False

    def make(self):
        return tiny(
            self.kind,
            patch_size=2, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=CHANNELS,
            num_attention_heads=HEADS, caption_channels=[WIDTH, WIDTH], text_emb_dim=8, num_routed_experts=2,
            num_activated_experts=1, axes_dims_rope=AXES, max_resolution=(16, 16), llama_layers=[0, 1, 2, 3],
            force_inference_output=True,  # as its script has it
        )  # fmt: skip

    def __init__(self, *args):
        super().__init__(*args)
        self.llama = torch.randn(4, 3, 3, WIDTH).double()

    @property
    def lengths(self):
        return {True: IMAGE, False: TEXT + 2 * 3}

    def predict(self):
        return self.model(
            hidden_states=self.x, timesteps=TIMESTEPS, encoder_hidden_states_t5=self.text,
            encoder_hidden_states_llama3=self.llama, pooled_embeds=self.text[:, 0, :8], return_dict=False,
        )[0]  # fmt: skip

    def hidden(self, _, output):
        output = output[0] if isinstance(output, tuple) else output
        return output[:, :IMAGE]

    def states(self, source):
        end = "" if source == "block" else ".block.attn1"
        return [
            (f"{name}{end}", self.hidden)
            for name in ("double_stream_blocks.1", "single_stream_blocks.0", "single_stream_blocks.1")
        ]


class HiDreamOblong(HiDream):
    """A picture that is not square is filled up to 64 patches."""

    latents = (3, 4, SIDE, 4 * SIDE)


class Krea2(Diffusers):
    kind, preset = "Krea2Transformer2DModel", "krea2"
    before = 2
    mask = MASK

    def make(self):
        return tiny(
            self.kind,
            in_channels=4, num_layers=4, attention_head_dim=CHANNELS, num_attention_heads=HEADS,
            num_key_value_heads=1, intermediate_size=WIDTH, timestep_embed_dim=8, text_hidden_dim=WIDTH,
            num_text_layers=2, text_num_attention_heads=HEADS, text_num_key_value_heads=HEADS,
            text_intermediate_size=WIDTH, num_layerwise_text_blocks=1, num_refiner_text_blocks=1,
            axes_dims_rope=AXES,
        )  # fmt: skip

    def predict(self):
        places = torch.cartesian_prod(*(torch.arange(n) for n in (1, SIDE, SIDE)))
        return self.model(
            hidden_states=self.x, encoder_hidden_states=torch.stack([self.text, self.text.flip(1)], dim=2),
            timestep=TIMESTEPS / 1000, position_ids=torch.cat([torch.zeros(TEXT, 3).long(), places]),
            encoder_attention_mask=self.mask,
        ).sample  # fmt: skip


class Krea2Unmasked(Krea2):
    mask = None


class Ideogram4(Diffusers):
    """Captions are filled up on the left, and the padding attends to itself."""

    kind, preset = "Ideogram4Transformer2DModel", "ideogram4"
    targets = ("to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3")
    attention, layers = "attention", "layers"
    mask = MASK.flip(1)
    indicator = torch.cat([torch.where(mask, 3, -1), torch.full((3, IMAGE), 2)], dim=1)

    def make(self):
        return tiny(
            self.kind,
            in_channels=4, num_layers=4, attention_head_dim=CHANNELS, num_attention_heads=HEADS,
            intermediate_size=WIDTH, adaln_dim=8, llm_features_dim=WIDTH, mrope_section=(2, 1, 1),
        )  # fmt: skip

    def predict(self):
        text = self.mask.cumsum(dim=1)[..., None].expand(-1, -1, 3) - 1
        picture = torch.cartesian_prod(*(torch.arange(n) for n in (1, SIDE, SIDE))) + 65536
        return self.model(
            hidden_states=torch.cat([torch.zeros(3, TEXT, 4).double(), self.x], dim=1),
            timestep=TIMESTEPS.double() / 1000,
            encoder_hidden_states=torch.cat([self.text, torch.zeros(3, IMAGE, WIDTH).double()], dim=1),
            position_ids=torch.cat([text.clamp(min=0), picture.expand(3, -1, -1)], dim=1),
            segment_ids=torch.where(self.indicator == -1, -1, 1),
            indicator=self.indicator,
        ).sample[:, TEXT:]  # fmt: skip


class FluxKontext(Flux):
    """Behind the noisy picture's positions those of a reference: both are the picture's for a layout."""

    preset = "flux"

    def __init__(self, *args):
        super().__init__(*args)
        reference = self.ids + torch.tensor([1, 0, 0])
        self.x = torch.cat([self.x, torch.randn(3, IMAGE, 4).double()], dim=1)
        self.ids = torch.cat([self.ids, reference])

    @property
    def lengths(self):
        return {True: 2 * IMAGE, False: TEXT}

    def predict(self):
        return super().predict()[:, :IMAGE]

    def states(self, source):
        def image(_, output):
            if isinstance(output, tuple):
                output = output[1] if source == "block" else output[0]
            return output if output.shape[1] == 2 * IMAGE else self.part(output, True, 1)

        return [(name if source == "block" else f"{name}.attn", image) for name in self.names]


class Sd35Medium(Sd35):
    """A second attention, of the picture alone, in the first blocks."""

    preset = "sd35"
    blocks = auto = (1, 2)

    def make(self):
        return tiny(
            "SD3Transformer2DModel",
            sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=CHANNELS,
            num_attention_heads=HEADS, joint_attention_dim=WIDTH, caption_projection_dim=WIDTH,
            pooled_projection_dim=8, pos_embed_max_size=8, qk_norm="rms_norm", dual_attention_layers=(0, 1),
        )  # fmt: skip

    def compared(self, seen):
        return super().compared([seen[0], seen[2], seen[4]])


FAMILIES = [
    QwenImage, QwenImageUnmasked, Flux2, ZImage, ZImageEven, ZImageMoreCaptions, Sana, SanaNormed, Lumina2, HiDream,
    HiDreamOblong, Krea2, Krea2Unmasked, Ideogram4, FluxKontext, Sd35Medium,
]  # fmt: skip


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("source", ["self_attention", "block"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_value_and_gradient_are_those_of_the_models_own_scores_and_states(kind, source, checkpointing, monkeypatch):
    check(kind, source, checkpointing, COUNTED if checkpointing else None, monkeypatch)


class Peft:
    """The LoRA of peft, as a script adds it, with what is used of `Lora`."""

    def __init__(self, model, targets):
        peft = pytest.importorskip("peft")
        model.add_adapter(peft.LoraConfig(r=2, lora_alpha=2, target_modules=list(targets), init_lora_weights=False))
        self.model = model.double()

    def named_parameters(self):
        return [(name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad]

    @contextlib.contextmanager
    def off(self):
        self.model.disable_adapters()
        try:
            yield
        finally:
            self.model.enable_adapters()

    def gradient(self):
        return torch.cat([parameter.grad.flatten() for _, parameter in self.named_parameters()])


@pytest.mark.parametrize("kind", [kind for kind in FAMILIES if issubclass(kind, Diffusers)])
def test_it_is_so_with_the_adapter_that_the_script_adds(kind, monkeypatch):
    class Adapted(kind):
        def adapt(self):
            return Peft(self.model, self.targets)

    check(Adapted, "self_attention", False, None, monkeypatch)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_family_has_its_preset_and_auto_takes_blocks_of_the_second_half(kind):
    model = kind().model
    assert preset_of(model) == kind.preset
    assert layout_of(model).blocks == kind.auto


@pytest.mark.parametrize("kind", [*KINDS, *FAMILIES])
def test_a_model_is_of_one_architecture(kind):
    model = kind().model
    assert len([architecture.NAME for architecture in ALL if architecture.is_one(model)]) == 1


@pytest.mark.parametrize("kind", FAMILIES)
def test_reading_changes_no_bit_of_the_prediction_and_leaves_nothing_behind(kind):
    def hooked(model):
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    case = kind()
    before = hooked(case.model)
    with torch.no_grad():
        wanted = case.predict()
        with FeatureCapture(case.model, kind.blocks) as capture, capture.record() as features:
            assert torch.equal(case.predict(), wanted)
    assert len(features.queries) == len(features.hidden) == len(kind.blocks)
    assert hooked(case.model) == before


def test_sanas_cross_attention_can_be_the_hidden_state():
    case = Sana()
    with torch.no_grad(), FeatureCapture(case.model, (1,), "cross_attention") as capture, capture.record() as features:
        case.predict()
    assert capture.hidden[0].name == "transformer_blocks.1.attn2"
    assert features.hidden[0].shape == (3, IMAGE, WIDTH)


def test_the_parts_of_a_joint_sequence_with_padding_behind_its_picture():
    for text_first, image, text in ((True, [3, 4], [0, 1, 2]), (False, [0, 1], [3, 4, 5])):
        joint, x = Joint(2, 3, text_first, padding=1), torch.arange(6)[None]
        assert joint.part(x, image=True).tolist() == [image]
        assert joint.part(x, image=False).tolist() == [text]


# -- what is refused ---------------------------------------------------------------------------------------------------


def reading(case):
    with torch.no_grad(), FeatureCapture(case.model, case.blocks) as capture, capture.record():
        case.predict()


def test_a_batch_of_z_image_with_pictures_of_two_sizes_is_refused():
    case = ZImage()
    case.x = [case.x[0], case.x[1], case.x[2][..., :SIDE]]
    with pytest.raises(AptError, match=r"pictures of one batch have to be of one size; found latents of \[\(1, 8, 4\)"):
        reading(case)


def test_reference_pictures_of_z_image_are_refused():
    case = ZImage()
    case.x = [[picture] for picture in case.x]
    with pytest.raises(AptError, match="only single pictures are known here"):
        reading(case)


def test_a_packed_sequence_of_ideogram_that_does_not_end_with_its_picture_is_refused():
    case = Ideogram4()
    case.indicator = case.indicator.flip(1)
    with pytest.raises(AptError, match="has to end with its picture"):
        reading(case)
