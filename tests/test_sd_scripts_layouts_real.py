"""The layouts on sd-scripts' own transformers, built small: what `test_layout_transformers` checks on our stand-ins.

SD_SCRIPTS_DIR     a checkout of sd-scripts, whose `library` is imported
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from test_layout_transformers import COUNTED, MASK, SIDE, TIMESTEPS, FluxMasked, FluxOriginal, check
from test_layout_transformers import Anima as SmallAnima
from test_layout_transformers import Chroma as SmallChroma
from test_layout_transformers import HunyuanImage as SmallHunyuanImage
from test_layout_transformers import Lumina2 as SmallLumina2
from test_layout_transformers import Sd3Original as SmallSd3
from torch.nn import functional as F

from apt_hooks.integrations.sd_scripts.lora import LoraSwitch

FOLDER = os.environ.get("SD_SCRIPTS_DIR")

pytestmark = [
    pytest.mark.real_trainer,
    pytest.mark.skipif(not FOLDER, reason="needs kohya's sd-scripts and what it imports: set SD_SCRIPTS_DIR"),
]


@pytest.fixture(autouse=True)
def library():
    """`library` is importable; sd-scripts' norms compute in float32, which is what the tolerance is for."""
    sys.path.insert(0, str(Path(FOLDER)))
    yield
    sys.path.remove(str(Path(FOLDER)))


class Real:
    heads, channels = 2, 16
    tolerance = 2e-3

    def __init__(self, *args):
        super().__init__(*args)
        # Weights that a checkpoint is to bring are left as memory has them, and some begin at zero.
        for name, parameter in self.model.named_parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
            elif name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.05)
            else:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
        if torch.is_tensor(getattr(self.model, "pos_embed", None)):
            torch.nn.init.normal_(self.model.pos_embed)


class Anima(Real, SmallAnima):
    def make(self):
        from library.anima_models import Anima

        model = Anima(
            max_img_h=64, max_img_w=64, max_frames=4, in_channels=4, out_channels=4, patch_spatial=1, patch_temporal=1,
            concat_padding_mask=False, model_channels=self.width, num_blocks=4,
            num_heads=self.heads, crossattn_emb_channels=self.width, pos_emb_cls="rope3d", use_adaln_lora=True,
            adaln_lora_dim=8,
        )  # fmt: skip
        model.t_embedder[0].register_forward_hook(lambda module, args, out: out.double())
        return model


class Flux(Real, FluxOriginal):
    def make(self):
        from library.flux_models import Flux, FluxParams

        return Flux(
            FluxParams(
                in_channels=4, vec_in_dim=8, context_in_dim=self.width, hidden_size=self.width, mlp_ratio=2.0,
                num_heads=self.heads, depth=2, depth_single_blocks=2, axes_dim=[4, 6, 6], theta=100, qkv_bias=True,
                guidance_embed=True,
            )
        )  # fmt: skip

    def predict(self):
        return self.model(
            img=self.x, img_ids=self.ids.double(), txt=self.text, txt_ids=self.text_ids.double(),
            timesteps=TIMESTEPS.double() / 1000, y=self.text[:, 0, :8], guidance=torch.full((3,), 3.5).double(),
            txt_attention_mask=self.mask,
        )  # fmt: skip


class FluxWithMask(Flux, FluxMasked):
    pass


class Chroma(Real, SmallChroma):
    def make(self):
        from library.chroma_models import Chroma, ChromaParams

        return Chroma(
            ChromaParams(
                in_channels=4, context_in_dim=self.width, hidden_size=self.width, mlp_ratio=2.0, num_heads=self.heads,
                depth=2, depth_single_blocks=2, axes_dim=[4, 6, 6], theta=100, qkv_bias=True, guidance_embed=True,
                approximator_in_dim=16, approximator_depth=1, approximator_hidden_size=16, _use_compiled=False,
            )
        )  # fmt: skip

    def predict(self):
        times, guidance = TIMESTEPS.double() / 1000, torch.zeros(3).double()
        return self.model(
            img=self.x, img_ids=self.ids.double(), txt=self.text, txt_ids=self.text_ids.double(), timesteps=times,
            y=None, guidance=guidance, txt_attention_mask=MASK,
            mod_vectors=self.model.get_mod_vectors(times, guidance, 3).detach().double(),
        )  # fmt: skip


class Sd3(Real, SmallSd3):
    heads, channels = 4, 64
    latents = (3, 4, 2 * SIDE, 2 * SIDE)

    def make(self):
        from library.sd3_models import MMDiT

        return MMDiT(
            input_size=None, pos_embed_max_size=8, patch_size=2, in_channels=4, adm_in_channels=8, depth=4,
            context_embedder_in_features=self.width, context_embedder_out_features=self.width, mlp_ratio=2,
            qk_norm="rms", x_block_self_attn_layers=[0, 1], num_patches=64, attn_mode="torch", model_type="m",
        )  # fmt: skip

    def compared(self, seen):
        # The first two blocks have a second attention, over the picture alone.
        joint = [seen[i] for i in (0, 2, 4, 5)]
        return [(*(self.part(x, image, 2) for x, image in zip(joint[i], (True, False), strict=True)), None)
                for i in self.blocks]  # fmt: skip

    def predict(self):
        return self.model(self.x, TIMESTEPS.double(), context=self.text, y=self.text[:, 0, :8])


class Lumina2(Real, SmallLumina2):
    def make(self):
        from library.lumina_models import NextDiT

        return NextDiT(
            patch_size=2, in_channels=4, dim=self.width, n_layers=4, n_refiner_layers=1, n_heads=self.heads,
            n_kv_heads=1, multiple_of=8, qk_norm=True, cap_feat_dim=self.width, axes_dims=[4, 6, 6],
            axes_lens=[64, 64, 64],
        )  # fmt: skip

    def scores(self, monkeypatch):
        seen = super().scores(monkeypatch)
        spied = F.scaled_dot_product_attention
        for module in self.model.layers.modules():
            if hasattr(module, "attention_processor"):
                monkeypatch.setattr(module, "attention_processor", spied)
        return seen


class HunyuanImage(Real, SmallHunyuanImage):
    def make(self):
        from library import hunyuan_image_modules as parts
        from library.hunyuan_image_models import HYImageDiffusionTransformer

        model = HYImageDiffusionTransformer.__new__(HYImageDiffusionTransformer)
        torch.nn.Module.__init__(model)
        width, heads = self.width, self.heads
        constants = {
            "patch_size": [1, 1], "out_channels": 4, "unpatchify_channels": 4, "hidden_size": width, "heads_num": heads,
            "rope_dim_list": [8, 8], "rope_theta": 100, "attn_mode": "torch", "split_attn": False,
            "blocks_to_swap": None, "gradient_checkpointing": False, "cpu_offload_checkpointing": False,
        }  # fmt: skip
        for name, value in constants.items():
            setattr(model, name, value)
        model.byt5_in = parts.ByT5Mapper(8, 16, 16, width, use_residual=False)
        model.img_in = parts.PatchEmbed2D([1, 1], 4, width)
        model.txt_in = parts.SingleTokenRefiner(width, width, heads, depth=1)
        model.time_in = parts.TimestepEmbedder(width, torch.nn.SiLU)
        model.double_blocks = torch.nn.ModuleList(
            parts.MMDoubleStreamBlock(width, heads, mlp_width_ratio=2, qkv_bias=True) for _ in range(2)
        )
        model.single_blocks = torch.nn.ModuleList(
            parts.MMSingleStreamBlock(width, heads, mlp_width_ratio=2) for _ in range(2)
        )
        model.final_layer = parts.FinalLayer(width, [1, 1], 4, torch.nn.SiLU)
        return model

    def compared(self, seen):
        return super().compared(seen[-4:])  # behind those of the refiner of the text

    def predict(self):
        none = torch.zeros(3, 2, 8).double(), torch.zeros(3, 2).long()
        return self.model(self.x, TIMESTEPS, self.text, MASK.long(), *none)


KINDS = [Anima, Flux, FluxWithMask, Chroma, Sd3, Lumina2, HunyuanImage]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", ["self_attention", "block"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("instances", [None, COUNTED], ids=["all", "instances"])
def test_value_and_gradient_are_those_of_the_models_own_scores_and_states(
    kind, source, checkpointing, instances, monkeypatch
):
    check(kind, source, checkpointing, instances, monkeypatch)


NETWORKS = [
    ("networks.lora_anima", Anima, {}),
    ("networks.lora_flux", Flux, {}),
    ("networks.lora_flux", Chroma, {}),
    ("networks.lora_sd3", Sd3, {}),
    ("networks.lora_sd3", Sd3, {"split_qkv": "True"}),
    ("networks.lora_lumina", Lumina2, {}),
    ("networks.lora_hunyuan_image", HunyuanImage, {}),
    ("networks.loha", Anima, {}),
    ("networks.lokr", Anima, {}),
    ("lycoris.kohya", Flux, {"algo": "lokr", "preset": "attn-mlp"}),
    ("lycoris.kohya", Anima, {"algo": "locon", "preset": "attn-mlp"}),
]


@pytest.mark.parametrize(("name", "kind", "options"), NETWORKS)
def test_a_network_off_is_the_base_bit_for_bit_and_on_again_itself(name, kind, options):
    if name.startswith("networks.lo") and not (Path(FOLDER) / f"{name.replace('.', '/')}.py").exists():
        pytest.skip(f"this sd-scripts has no {name}")
    create_network = pytest.importorskip(name).create_network
    case = kind()
    with torch.no_grad(), case.lora.off():
        base = case.predict()
        network = create_network(1.0, 2, 2, None, [torch.nn.Identity()], case.model, **options)
        network.apply_to([torch.nn.Identity()], case.model, False, True)
        network.double()
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        own = case.predict()
        switch = LoraSwitch([case.model], name, network)
        with switch.off():
            off = case.predict()
        assert torch.equal(off, base) and torch.equal(case.predict(), own) and not torch.equal(own, base)
