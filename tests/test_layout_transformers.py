"""The layouts of joint attention, by tiny transformers of diffusers and by models of a user's own."""

import contextlib

import pytest
import small_transformers
import torch
from models import relative_difference
from torch import nn
from torch.nn import functional as F

from apt_hooks import AptConfig, AptError, AptObjective, FeatureCapture
from apt_hooks.hooks.architectures import layout_of
from apt_hooks.hooks.layout import AttentionPoint, HiddenPoint, Layout, Tap, Told
from apt_hooks.method.losses import attention_alignment_loss

HEADS, CHANNELS, TEXT, SIDE = 2, 8, 5, 4
WIDTH = HEADS * CHANNELS
CONFIG = {"lambda_dist": 0.7, "lambda_attn": 30.0, "loss_weighting": False, "augmentation": False}
TIMESTEPS = torch.tensor([50, 350, 950])
COUNTED = torch.tensor([True, False, True])


def diffusers_class(name):
    diffusers = pytest.importorskip("diffusers")
    if not hasattr(diffusers, name):
        pytest.skip(f"diffusers {diffusers.__version__} has no {name}")
    return getattr(diffusers, name)


class Lora(nn.Module):
    """Low-rank terms on the projections of a model, switched by `on`."""

    def __init__(self, model, names):
        super().__init__()
        self.on = True
        self.parts = nn.ModuleList()
        for name, module in list(model.named_modules()):
            if name.rsplit(".", 1)[-1] in names:
                down, up = (nn.Linear(a, b, bias=False) for a, b in ((module.in_features, 2), (2, module.out_features)))
                nn.init.normal_(up.weight, std=0.3)
                self.parts.append(nn.ModuleList([down, up]))
                module.register_forward_hook(self._add(down, up))

    def _add(self, down, up):
        return lambda module, args, output: output + up(down(args[0])) if self.on else None

    @contextlib.contextmanager
    def off(self):
        self.on = False
        try:
            yield
        finally:
            self.on = True

    def gradient(self):
        return torch.cat([p.grad.flatten() for p in self.parameters()])


class Transformer:
    """A tiny transformer with LoRA, in float64, and a batch of three.

    `joint` has for each call of its attention that is compared (queries, keys, text first) as they go into the
    softmax, and `hidden` what comes out of it.
    """

    text_first = True
    heads, channels = HEADS, CHANNELS
    tolerance = 1e-6
    projections = frozenset({"to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"})

    def __init__(self, checkpointing=False):
        torch.manual_seed(0)
        self.model = self.make().double().requires_grad_(False)
        self.lora = self.adapt()
        if checkpointing:
            self.model.enable_gradient_checkpointing()  # non-reentrant
        self.model.train(checkpointing)  # which has no dropout, and checkpoints in training only
        self.text = torch.randn(3, TEXT, self.width).double()

    def adapt(self):
        """LoRA on the model's projections, with what is used of `Lora`."""
        return Lora(self.model, self.projections).double()

    def scores(self, monkeypatch):
        """Queries and keys of each attention of a pass, [batch, heads, positions, channels], as the model has them."""
        seen, plain = [], F.scaled_dot_product_attention

        def spied(query, key, value, *args, **kwargs):
            seen.append((query, key))
            return plain(query, key, value, *args, **kwargs)

        monkeypatch.setattr(F, "scaled_dot_product_attention", spied)
        return seen

    def part(self, x, image, dim):
        """The picture's part of a joint sequence, or the text's."""
        first = image != self.text_first
        return x.narrow(dim, 0 if first else x.shape[dim] - self.lengths[image], self.lengths[image])

    @property
    def width(self):
        return self.heads * self.channels

    @property
    def lengths(self):
        return {True: SIDE * SIDE, False: TEXT}

    def compared(self, seen):
        """(image queries, text keys, mask) of each observed block, heads first."""
        found = []
        for q, k in (seen[i] for i in self.blocks):
            if q.shape[1] != HEADS:
                q, k = q.transpose(1, 2), k.transpose(1, 2)
            found.append((self.part(q, True, 2), self.part(k, False, 2), None))
        return found

    def states(self, source):
        """(name of a module, what of its first argument and output is the picture's hidden state)."""

        def image(_, out):
            if isinstance(out, tuple):  # attention gives (picture, text), a block (text, picture)
                out = out[1] if source == "block" else out[0]
            return out if out.shape[1] == SIDE * SIDE else self.part(out, True, 1)

        return [(name if source == "block" else f"{name}.attn", image) for name in self.names]


class Flux(Transformer):
    names = ("transformer_blocks.1", "single_transformer_blocks.0", "single_transformer_blocks.1")
    blocks = (1, 2, 3)
    auto = (2, 3)

    def make(self):
        from diffusers import FluxTransformer2DModel

        return FluxTransformer2DModel(
            patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=CHANNELS,
            num_attention_heads=HEADS, joint_attention_dim=WIDTH, pooled_projection_dim=8, axes_dims_rope=(2, 4, 2),
        )  # fmt: skip

    def __init__(self, *args):
        super().__init__(*args)
        self.x, self.target = torch.randn(2, 3, SIDE * SIDE, 4).double()
        self.ids = torch.cartesian_prod(torch.zeros(1).long(), torch.arange(SIDE), torch.arange(SIDE)).double()

    def predict(self):
        return self.model(
            hidden_states=self.x, encoder_hidden_states=self.text, pooled_projections=self.text[:, 0, :8],
            timestep=TIMESTEPS / 1000, img_ids=self.ids, txt_ids=1.0 + torch.arange(3 * TEXT).reshape(TEXT, 3),
        ).sample  # fmt: skip


class Sd3(Transformer):
    names = ("transformer_blocks.1", "transformer_blocks.2")
    blocks = (1, 2)
    auto = (1, 2)
    text_first = False

    def make(self):
        from diffusers import SD3Transformer2DModel

        return SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=CHANNELS,
            num_attention_heads=HEADS, joint_attention_dim=WIDTH, caption_projection_dim=WIDTH,
            pooled_projection_dim=8, pos_embed_max_size=8, qk_norm=self.norm,
        )  # fmt: skip

    norm = None

    def __init__(self, *args):
        super().__init__(*args)
        self.x, self.target = torch.randn(2, 3, 4, 2 * SIDE, 2 * SIDE).double()

    def predict(self):
        return self.model(
            hidden_states=self.x, encoder_hidden_states=self.text, pooled_projections=self.text[:, 0, :8],
            timestep=TIMESTEPS,
        ).sample  # fmt: skip


class Sd35(Sd3):
    norm = "rms_norm"


LENGTHS = torch.tensor([3, TEXT, 2])
MASK = torch.arange(TEXT)[None] < LENGTHS[:, None]


class Small(Transformer):
    """One of `small_transformers`."""

    projections: frozenset[str] = frozenset({"qkv", "linear1"})
    latents: tuple[int, ...] = (3, 4, SIDE, SIDE)

    def __init__(self, *args):
        super().__init__(*args)
        self.x, self.target = torch.randn(2, *self.latents).double()
        self.ids = torch.arange(3.0 * SIDE * SIDE).reshape(1, SIDE * SIDE, 3).expand(3, -1, -1)
        self.text_ids = torch.zeros(3, TEXT, 3)

    mask = None

    def image_of(self, x):
        """The picture's part of [batch, positions, ...]."""
        return self.part(x, True, 1)

    def compared(self, seen):
        """(image queries, text keys, mask) of each observed block, heads first."""
        return [
            (*(self.of_heads(x, image) for x, image in zip(seen[i], (True, False), strict=True)), self.mask)
            for i in self.blocks
        ]

    def of_heads(self, x, image):
        return self.part(x, image, 2)


class Anima(Small):
    blocks = auto = (2, 3)
    projections = frozenset({"q_proj", "k_proj", "v_proj"})
    latents = (3, 4, 1, SIDE, SIDE)
    mask = MASK
    make = staticmethod(small_transformers.Anima)

    def predict(self):
        return self.model(self.x, TIMESTEPS / 1000, self.text, target_input_ids=None, target_attention_mask=MASK)

    def compared(self, seen):
        return [(*seen[2 * i + 1], MASK) for i in self.blocks]

    def states(self, source):
        end = "" if source == "block" else ".self_attn"
        return [(f"blocks.{i}{end}", lambda _, out: out.flatten(1, -2)) for i in self.blocks]


class Cosmos(Small):
    blocks = auto = (2, 3)
    channels = 12  # of which the rotary embedding has three axes
    projections = frozenset({"to_q", "to_k", "to_v"})
    latents = (3, 4, 1, SIDE, SIDE)

    def make(self):
        return diffusers_class("CosmosTransformer3DModel")(
            in_channels=4, out_channels=4, num_attention_heads=HEADS, attention_head_dim=self.channels, num_layers=4,
            mlp_ratio=1.0, text_embed_dim=self.width, adaln_lora_dim=4, max_size=(4, 8, 8), patch_size=(1, 1, 1),
            concat_padding_mask=False, extra_pos_embed_type=None,
        )  # fmt: skip

    def predict(self):
        return self.model(self.x, TIMESTEPS.double() / 1000, self.text).sample

    def compared(self, seen):
        return [(*seen[2 * i + 1], None) for i in self.blocks]

    def states(self, source):
        end = "" if source == "block" else ".attn1"
        return [(f"transformer_blocks.{i}{end}", lambda _, out: out) for i in self.blocks]


class FluxOriginal(Small):
    blocks = (1, 2, 3)
    auto = (2, 3)
    latents = (3, SIDE * SIDE, 4)
    make = staticmethod(small_transformers.Flux)

    def predict(self):
        return self.model(
            img=self.x, img_ids=self.ids, txt=self.text, txt_ids=self.text_ids, timesteps=TIMESTEPS / 1000, y=None,
            txt_attention_mask=self.mask,
        )  # fmt: skip

    def states(self, source):
        if source == "block":
            return [
                ("double_blocks.1", lambda _, out: out[0]),
                *((f"single_blocks.{i}", lambda _, out: self.image_of(out)) for i in (0, 1)),
            ]
        return [
            ("double_blocks.1.img_attn.proj", lambda _, out: out),
            *((f"single_blocks.{i}.linear2", lambda x, _: self.image_of(x)[..., : self.width]) for i in (0, 1)),
        ]


class FluxMasked(FluxOriginal):
    mask = MASK


class Chroma(FluxOriginal):
    """Each sample's attention is a call of its own, with one token of padding."""

    text_first = False
    mask = torch.arange(TEXT)[None] < (LENGTHS + 1).clamp(max=TEXT)[:, None]
    make = staticmethod(small_transformers.Chroma)

    def predict(self):
        return self.model(
            img=self.x, img_ids=self.ids, txt=self.text, txt_ids=self.text_ids, timesteps=TIMESTEPS / 1000, y=None,
            txt_attention_mask=MASK,
        )  # fmt: skip

    def compared(self, seen):
        def padded(k):
            k = k[:, :, SIDE * SIDE :]
            return F.pad(k, (0, 0, 0, TEXT - k.shape[2]))

        found = []
        for i in self.blocks:
            samples = seen[3 * i : 3 * i + 3]
            queries = torch.cat([q[:, :, : SIDE * SIDE] for q, _ in samples])
            found.append((queries, torch.cat([padded(k) for _, k in samples]), self.mask))
        return found


class Sd3Original(Small):
    blocks = (1, 2)
    auto = (2, 3)
    make = staticmethod(small_transformers.Sd3)

    def predict(self):
        return self.model(self.x, TIMESTEPS, context=self.text, y=None)

    def states(self, source):
        if source == "block":
            return [(f"joint_blocks.{i}", lambda _, out: out[1]) for i in self.blocks]
        return [(f"joint_blocks.{i}.x_block.attn.proj", lambda _, out: out) for i in self.blocks]


class Lumina2(Small):
    blocks = (1, 3)
    auto = (2, 3)
    latents = (3, 4, 2 * SIDE, 2 * SIDE)
    mask = MASK
    make = staticmethod(small_transformers.Lumina2)

    def predict(self):
        return self.model(x=self.x, t=TIMESTEPS / 1000, cap_feats=self.text, cap_mask=MASK.int())

    def image_of(self, x):
        return torch.stack([x[i, n : n + SIDE * SIDE] for i, n in enumerate(LENGTHS.tolist())])

    def of_heads(self, x, image):
        return self.image_of(x.transpose(1, 2)).transpose(1, 2) if image else x[:, :, :TEXT]

    def states(self, source):
        end = "" if source == "block" else ".attention"
        return [(f"layers.{i}{end}", lambda _, out: self.image_of(out)) for i in self.blocks]


class HunyuanImage(Small):
    blocks = (1, 2, 3)
    auto = (2, 3)
    projections = frozenset({"img_attn_qkv", "txt_attn_qkv", "linear1"})
    text_first = False
    mask = MASK
    make = staticmethod(small_transformers.HunyuanImage)

    def predict(self):
        return self.model(self.x, TIMESTEPS, self.text, MASK.long())

    def states(self, source):
        if source == "block":
            return [
                ("double_blocks.1", lambda _, out: out[0]),
                *((f"single_blocks.{i}", lambda _, out: self.image_of(out)) for i in (0, 1)),
            ]
        return [
            ("double_blocks.1.img_attn_proj", lambda _, out: out),
            *((f"single_blocks.{i}.linear2", lambda x, _: self.image_of(x)[..., : self.width]) for i in (0, 1)),
        ]


KINDS = [Flux, Sd3, Sd35, Cosmos, Anima, FluxOriginal, FluxMasked, Chroma, Sd3Original, Lumina2, HunyuanImage]


def plain(kind, monkeypatch, source, instances):
    """Loss and gradient of the LoRA by the formulas, all in one graph."""
    case = kind()
    here = slice(None) if instances is None else instances
    share = 1.0 if instances is None else float(instances.float().mean())

    def run():
        states = []
        handles = [
            case.model.get_submodule(name).register_forward_hook(
                lambda m, args, out, read=read: states.append(read(args[0] if args else None, out)[here])
            )
            for name, read in case.states(source)
        ]
        seen = case.scores(monkeypatch)
        prediction = case.predict()
        monkeypatch.undo()
        for handle in handles:
            handle.remove()
        maps = []
        for q, k, mask in case.compared(seen):
            scores = q @ k.transpose(-1, -2) / case.channels**0.5
            if mask is not None:
                scores = scores.masked_fill(~mask[:, None, None], -float("inf"))
            maps.append(scores.softmax(dim=-1)[here])
        return prediction, maps, states

    with torch.no_grad(), case.lora.off():
        _, maps_frozen, states_frozen = run()
    prediction, maps, states = run()
    attn = [(a - b).square().sum(dim=-1).mean() for a, b in zip(maps, maps_frozen, strict=True)]
    dist = [
        sum((f(a) - f(b)).square().mean() for f in (lambda x: x.mean(dim=1), lambda x: x.std(dim=1, correction=0)))
        for a, b in zip(states, states_frozen, strict=True)
    ]
    loss = (prediction - case.target).square().mean()
    loss = loss + share * (0.7 * sum(dist) / len(dist) + 30.0 * sum(attn) / len(attn))
    loss.backward()
    return loss.detach(), case.lora.gradient()


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def check(kind, source, checkpointing, instances, monkeypatch):
    """Value and gradient of an objective against `plain`, and that nothing is left behind."""
    wanted, wanted_gradient = plain(kind, monkeypatch, source, instances)
    case = kind(checkpointing)
    before = hooks(case.model)
    config = AptConfig(**CONFIG, blocks=list(case.blocks), representation_source=source)
    with AptObjective(config, case.model, case.lora.off, trained=case.lora.named_parameters()) as objective:
        step = objective.step(case.predict, case.target, TIMESTEPS, instances=instances)
        loss = step.loss((step.prediction - case.target).square().flatten(1).mean(dim=1))
        loss.backward()
    assert float(loss.detach()) == pytest.approx(float(wanted), rel=kind.tolerance)
    assert relative_difference(case.lora.gradient(), wanted_gradient) < kind.tolerance
    assert hooks(case.model) == before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", ["self_attention", "block"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("instances", [None, COUNTED], ids=["all", "instances"])
def test_value_and_gradient_are_those_of_the_models_own_scores_and_states(
    kind, source, checkpointing, instances, monkeypatch
):
    check(kind, source, checkpointing, instances, monkeypatch)


@pytest.mark.parametrize("kind", KINDS)
def test_auto_takes_blocks_of_the_second_half(kind):
    assert layout_of(kind().model).blocks == kind.auto


@pytest.mark.parametrize("blocks", [[4], [-1], []])
def test_a_block_that_is_none_is_refused(blocks):
    with pytest.raises(AptError, match=r"numbered from 0 to 3 here; found \["):
        layout_of(Flux().model, blocks)


def test_monitor_only_changes_no_bit_of_a_transformer():
    def train(monitored):
        case = Flux()
        if not monitored:
            (case.predict() - case.target).square().flatten(1).mean(dim=1).mean().backward()
            return case.lora.gradient()
        with AptObjective(AptConfig(monitor_only=True), case.model, case.lora.off) as objective:
            step = objective.step(case.predict, case.target, TIMESTEPS)
            step.loss((step.prediction - case.target).square().flatten(1).mean(dim=1)).backward()
        assert step.values["l_attn"] > 0 and step.values["l_mu"] > 0
        return case.lora.gradient()

    assert torch.equal(train(True), train(False))


# -- a model of a user's own -------------------------------------------------------------------------------------------


class Padded(nn.Module):
    """Fused projections, fewer heads of keys than of queries, and text of a length that each sample has of its own."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Module()
        self.inner.qkv = nn.Linear(WIDTH, WIDTH + 2 * CHANNELS)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, text, image, lengths):
        joint = torch.cat([text, image], dim=1)
        q, k, v = self.inner.qkv(joint).split([WIDTH, CHANNELS, CHANNELS], dim=-1)
        q = q.unflatten(-1, (HEADS, -1)).transpose(1, 2)
        k, v = (x[:, None].expand(-1, HEADS, -1, -1) for x in (k, v))
        takes_part = torch.arange(joint.shape[1])[None] < lengths[:, None]
        takes_part = takes_part | (torch.arange(joint.shape[1])[None] >= text.shape[1])
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=takes_part[:, None, None])
        return self.out(mixed.transpose(1, 2).flatten(2)), lengths


def layout_of_padded(model):
    told = Told(model, lambda args, kwargs: (args[0].shape[1], args[2]))

    def queries(x, told):
        return x[:, told[0][0] :, :WIDTH]

    def keys(x, told):
        return x[:, : told[0][0], WIDTH : WIDTH + CHANNELS].repeat(1, 1, HEADS)

    def mask(told):
        text, lengths = told[0]
        return torch.arange(text)[None] < lengths[:, None]

    qkv = model.inner.qkv
    point = AttentionPoint("padded", Tap("q", qkv, read=queries), Tap("k", qkv, read=keys), HEADS, CHANNELS**-0.5, mask)
    image = Tap("out", model, read=lambda x, told: x[:, told[0][0] :])
    point = AttentionPoint(point.name, point.queries, point.keys, HEADS, CHANNELS**-0.5, mask, (told,))
    return Layout([point], [HiddenPoint("image", image, (told,))], (0,))


def test_a_layout_of_ones_own_says_fused_projections_shared_keys_slices_and_a_mask_of_the_pass():
    def case():
        torch.manual_seed(0)
        model = Padded().double()
        model.requires_grad_(False)
        return model, Lora(model, {"qkv"}).double()

    text, image = torch.randn(2, TEXT, WIDTH).double(), torch.randn(2, SIDE * SIDE, WIDTH).double()
    lengths = torch.tensor([2, TEXT])

    def of(model, lora):
        read = {}
        handle = model.inner.qkv.register_forward_hook(lambda m, a, out: read.update(qkv=out))
        out, _ = model(text, image, lengths)
        handle.remove()
        q = read["qkv"][:, TEXT:, :WIDTH]
        k = torch.cat([read["qkv"][:, :TEXT, WIDTH : WIDTH + CHANNELS]] * HEADS, dim=2)
        return q, k, out[:, TEXT:]

    model, lora = case()
    with torch.no_grad(), lora.off():
        q_frozen, k_frozen, h_frozen = of(model, lora)
    q, k, h = of(model, lora)
    mask = torch.arange(TEXT)[None] < lengths[:, None]
    wanted = attention_alignment_loss(q, k, q_frozen, k_frozen, heads=HEADS, mask=mask, impl="plain")
    wanted_mu = (h.mean(dim=1) - h_frozen.mean(dim=1)).square().mean()
    (3 * wanted + 0.5 * wanted_mu).backward()
    wanted_gradient = lora.gradient()

    from apt_hooks.training.regularizers import Regularizers, frozen_reduction

    model, lora = case()
    with FeatureCapture(model, layout=layout_of_padded(model)) as capture:
        with torch.no_grad(), lora.off(), capture.record(frozen_reduction("separate", "auto")) as frozen:
            model(text, image, lengths)
        regularizers = Regularizers(frozen, capture.layers, len(capture.hidden))
        with capture.regularize(regularizers.observe) as observed:
            out, _ = model(text, image, lengths)
        _, terms = capture.connect(out, observed, regularizers.values())
        for name, value in {"l_attn": wanted, "l_mu": wanted_mu}.items():
            assert terms[name].item() == pytest.approx(value.item(), rel=1e-9)
        (3 * terms["l_attn"] + 0.5 * terms["l_mu"]).backward()
    assert relative_difference(lora.gradient(), wanted_gradient) < 1e-9
    assert not model._forward_pre_hooks and not model._forward_hooks


def test_a_place_that_runs_outside_of_the_call_that_tells_how_to_read_it_is_an_error():
    model = Padded().double()
    with (
        FeatureCapture(model, layout=layout_of_padded(model)) as capture,
        pytest.raises(AptError, match="q ran without a call of the Padded around it"),
        capture.record(),
    ):
        model.inner.qkv(torch.zeros(1, TEXT, WIDTH).double())


def test_a_layout_without_what_is_asked_for_is_an_error():
    model = Padded()
    layout = layout_of_padded(model)
    with pytest.raises(AptError, match="the layout has no attention layers and no hidden states"):
        FeatureCapture(model, layout=Layout())
    with pytest.raises(AptError, match="the layout has no hidden states"):
        FeatureCapture(model, layout=Layout(layout.attention))
    FeatureCapture(model, layout=Layout(layout.attention), representation=False).close()


def test_an_objective_takes_a_layout_of_ones_own():
    model = Padded()
    with AptObjective(AptConfig(), model, contextlib.nullcontext, layout=layout_of_padded(model)) as objective:
        assert [point.name for point in objective.capture.layers] == ["padded"]
