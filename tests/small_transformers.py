"""Transformers in small, each with the parts, names and order of calls by which a layout knows its kind."""

from __future__ import annotations

import types

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

HEADS, CHANNELS = 2, 8
WIDTH = HEADS * CHANNELS


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(1 + 0.1 * torch.arange(float(CHANNELS)))

    def forward(self, x):
        return x * x.square().mean(dim=-1, keepdim=True).add(1e-6).rsqrt() * self.weight


class Checkpointed(nn.Module):
    """A block that runs `inner` under non-reentrant checkpointing, if told to."""

    checkpoints = False

    def run(self, *inputs):
        if self.checkpoints and self.training:
            return checkpoint(self.inner, *inputs, use_reentrant=False)
        return self.inner(*inputs)


class Transformer(nn.Module):
    def enable_gradient_checkpointing(self, **_):
        for module in self.modules():
            if isinstance(module, Checkpointed):
                module.checkpoints = True


def angles(places, channels=CHANNELS):
    """[..., channels / 2] of places along an axis."""
    return places[..., None] * 0.7 ** torch.arange(channels // 2)


def turn(x, cosines, sines):
    """Pairs of neighboring channels of `x`, turned."""
    pairs = torch.view_as_complex(x.contiguous().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.complex(cosines, sines)).flatten(-2)


def attend(q, k, v, mask=None):
    """Of [batch, positions, heads, channels]: [batch, positions, width]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


# -- Anima -------------------------------------------------------------------------------------------------------------


class AnimaAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.n_heads, self.head_dim = HEADS, CHANNELS
        self.q_proj, self.k_proj, self.v_proj, self.output_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.q_norm, self.k_norm = Norm(), Norm()

    def forward(self, x, context=None):
        source = x if context is None else context
        q, k, v = (
            p(y).unflatten(-1, (HEADS, -1)) for p, y in ((self.q_proj, x), (self.k_proj, source), (self.v_proj, source))
        )
        return self.output_proj(attend(self.q_norm(q), self.k_norm(k), v))


class AnimaBlock(Checkpointed):
    def __init__(self):
        super().__init__()
        self.self_attn, self.cross_attn = AnimaAttention(), AnimaAttention()

    def inner(self, x, context):
        x = x + self.self_attn(x.flatten(1, 3)).reshape(x.shape)
        return x + self.cross_attn(x.flatten(1, 3), context).reshape(x.shape)

    def forward(self, x, context):
        return self.run(x, context)


class Anima(Transformer):
    """Latents [batch, channels, 1, height, width]; padded tokens are zeroed."""

    def __init__(self, depth=4, latent_channels=4):
        super().__init__()
        self.into, self.out = nn.Linear(latent_channels, WIDTH), nn.Linear(WIDTH, latent_channels)
        self.blocks = nn.ModuleList(AnimaBlock() for _ in range(depth))

    def forward(self, x, timesteps, context=None, padding_mask=None, target_input_ids=None, target_attention_mask=None):
        if target_attention_mask is not None:
            context = context * target_attention_mask[..., None].to(context)
        x = self.into(x.movedim(1, -1)) + timesteps.reshape(-1, 1, 1, 1, 1).to(x)
        for block in self.blocks:
            x = block(x, context)
        return self.out(x).movedim(-1, 1)


# -- FLUX.1 and Chroma -------------------------------------------------------------------------------------------------


class BothNorms(nn.Module):
    def __init__(self):
        super().__init__()
        self.query_norm, self.key_norm = Norm(), Norm()

    def forward(self, q, k, v):
        return self.query_norm(q).to(v), self.key_norm(k).to(v)


class FusedAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.norm, self.proj = nn.Linear(WIDTH, 3 * WIDTH), BothNorms(), nn.Linear(WIDTH, WIDTH)


def split(qkv):
    """Queries, keys and values, heads first."""
    return qkv.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)


def attend_turned(q, k, v, pe, mask=None):
    cosines, sines = pe[..., 0, 0], pe[..., 1, 0]
    q, k = (turn(x, cosines, sines) for x in (q, k))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class FluxDouble(Checkpointed):
    text_first = True

    def __init__(self):
        super().__init__()
        self.num_heads = HEADS
        self.img_attn, self.txt_attn = FusedAttention(), FusedAttention()

    def both(self, img, txt):
        parts = []
        for attention, x in ((self.img_attn, img), (self.txt_attn, txt)):
            q, k, v = split(attention.qkv(x))
            parts.append((*attention.norm(q, k, v), v))
        return (torch.cat(x, dim=2) for x in zip(*(parts[::-1] if self.text_first else parts), strict=True))

    def apart(self, mixed, img, txt):
        own = mixed[:, txt.shape[1] :] if self.text_first else mixed[:, : img.shape[1]]
        other = mixed[:, : txt.shape[1]] if self.text_first else mixed[:, img.shape[1] :]
        return img + self.img_attn.proj(own), txt + self.txt_attn.proj(other)

    def inner(self, img, txt, pe, mask):
        whole = None if mask is None else F.pad(mask.bool(), (0, img.shape[1]), value=True)[:, None, None]
        return self.apart(attend_turned(*self.both(img, txt), pe, whole), img, txt)

    def forward(self, img, txt, vec, pe, txt_attention_mask=None):
        return self.run(img + vec, txt, pe, txt_attention_mask)


class FluxSingle(Checkpointed):
    def __init__(self):
        super().__init__()
        self.num_heads, self.hidden_dim = HEADS, WIDTH
        self.linear1, self.linear2 = nn.Linear(WIDTH, 5 * WIDTH), nn.Linear(3 * WIDTH, WIDTH)
        self.norm = BothNorms()

    def projected(self, x):
        qkv, mlp = self.linear1(x).split([3 * WIDTH, 2 * WIDTH], dim=-1)
        q, k, v = split(qkv)
        return (*self.norm(q, k, v), v), F.gelu(mlp)

    def inner(self, x, pe, mask):
        (q, k, v), mlp = self.projected(x)
        whole = None
        if mask is not None:
            whole = F.pad(mask.bool(), (0, x.shape[1] - mask.shape[1]), value=True)[:, None, None]
        return x + self.linear2(torch.cat([attend_turned(q, k, v, pe, whole), mlp], dim=-1))

    def forward(self, x, vec, pe, txt_attention_mask=None):
        return self.run(x + vec, pe, txt_attention_mask)


class ChromaDouble(FluxDouble):
    text_first = False

    def inner(self, img, txt, pe, lengths):
        q, k, v = self.both(img, txt)
        rows = [
            F.pad(
                attend_turned(*(x[i : i + 1, :, :n] for x in (q, k, v)), pe[i : i + 1, :, :n]),
                (0, 0, 0, q.shape[2] - n),
            )
            for i, n in enumerate((img.shape[1] + lengths).tolist())
        ]
        return self.apart(torch.cat(rows), img, txt)

    def forward(self, img, txt, pe, distill_vec, txt_seq_len):
        return self.run(img + distill_vec, txt, pe, txt_seq_len)


class ChromaSingle(FluxSingle):
    def inner(self, x, pe, lengths):
        qkv, mlp = self.projected(x)
        image = x.shape[1] - int(lengths.max())
        rows = [
            F.pad(
                attend_turned(*(y[i : i + 1, :, : image + n] for y in qkv), pe[i : i + 1, :, : image + n]),
                (0, 0, 0, x.shape[1] - image - n),
            )
            for i, n in enumerate(lengths.tolist())
        ]
        return x + self.linear2(torch.cat([torch.cat(rows), mlp], dim=-1))

    def forward(self, x, pe, distill_vec, txt_seq_len):
        return self.run(x + distill_vec, pe, txt_seq_len)


class Flux(Transformer):
    """Packed latents [batch, positions, channels]; text first, at place 0 of the rotary embedding.

    With swapped blocks a forward pass has to be prepared, unless a backward pass lies between it and the last one.
    """

    swapping, prepared = False, 0
    double_kind, single_kind = FluxDouble, FluxSingle

    def __init__(self, depth=2, latent_channels=4):
        super().__init__()
        self.img_in, self.txt_in = nn.Linear(latent_channels, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, latent_channels)
        self.double_blocks = nn.ModuleList(self.double_kind() for _ in range(depth))
        self.single_blocks = nn.ModuleList(self.single_kind() for _ in range(depth))

    def turns(self, ids):
        a = angles(ids.to(self.out.weight).sum(dim=-1))
        rows = torch.stack([torch.stack([a.cos(), -a.sin()], dim=-1), torch.stack([a.sin(), a.cos()], dim=-1)], dim=-2)
        return rows[:, None]

    def get_mod_vectors(self, timesteps, guidance=None, batch_size=None):
        return None

    def swap_blocks(self):
        self.swapping, self.ready = True, True

    def prepare_block_swap_before_forward(self):
        self.prepared += self.swapping
        self.ready = True

    def forward(
        self, img, img_ids, txt, txt_ids, timesteps, y, guidance=None, txt_attention_mask=None, mod_vectors=None
    ):
        assert not self.swapping or self.ready, "blocks are where the last forward pass left them"
        self.ready = False
        img, txt = self.img_in(img), self.txt_in(txt)
        vec = timesteps[:, None, None].to(img)
        pe = self.turns(torch.cat([txt_ids, img_ids], dim=1))
        for block in self.double_blocks:
            img, txt = block(img=img, txt=txt, vec=vec, pe=pe, txt_attention_mask=txt_attention_mask)
        x = torch.cat([txt, img], dim=1)
        for block in self.single_blocks:
            x = block(x, vec=vec, pe=pe, txt_attention_mask=txt_attention_mask)
        out = self.out(x[:, txt.shape[1] :])
        if self.swapping and out.requires_grad:
            out.register_hook(lambda gradient: setattr(self, "ready", True))
        return out


class Chroma(Flux):
    """Picture first; text cut to the longest of the batch; modulations of a network of their own."""

    double_kind, single_kind = ChromaDouble, ChromaSingle

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.distilled_guidance_layer = nn.Linear(1, 1)

    def get_mod_vectors(self, timesteps, guidance=None, batch_size=None):
        return self.distilled_guidance_layer(timesteps[:, None].to(self.out.weight))[:, None]

    def forward(
        self, img, img_ids, txt, txt_ids, timesteps, y, guidance=None, txt_attention_mask=None, mod_vectors=None
    ):
        img, txt = self.img_in(img), self.txt_in(txt)
        lengths = (txt_attention_mask.sum(dim=1).long() + 1).clamp(max=txt.shape[1])
        txt = txt[:, : int(lengths.max())]
        pe = self.turns(torch.cat([img_ids, txt_ids[:, : txt.shape[1]]], dim=1))
        vec = self.get_mod_vectors(timesteps) if mod_vectors is None else mod_vectors
        for block in self.double_blocks:
            img, txt = block(img=img, txt=txt, pe=pe, distill_vec=vec, txt_seq_len=lengths)
        x = torch.cat([img, txt], dim=1)
        for block in self.single_blocks:
            x = block(x, pe=pe, distill_vec=vec, txt_seq_len=lengths)
        return self.out(x[:, : img.shape[1]])


# -- SD 3.5 ------------------------------------------------------------------------------------------------------------


class Sd3Linears(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_heads, self.head_dim = HEADS, CHANNELS
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.ln_q, self.ln_k = Norm(), Norm()

    def split(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).unbind(2)
        return self.ln_q(q), self.ln_k(k), v


class Sd3Half(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = Sd3Linears()


class Sd3Block(Checkpointed):
    def __init__(self):
        super().__init__()
        self.context_block, self.x_block = Sd3Half(), Sd3Half()

    def inner(self, context, x, c):
        both = zip(self.context_block.attn.split(context), self.x_block.attn.split(x + c), strict=True)
        mixed = attend(*(torch.cat(parts, dim=1) for parts in both))
        text = context.shape[1]
        return context + self.context_block.attn.proj(mixed[:, :text]), x + self.x_block.attn.proj(mixed[:, text:])

    def forward(self, context, x, c):
        return self.run(context, x, c)


class Sd3(Transformer):
    """Latents [batch, channels, height, width]."""

    def __init__(self, depth=4, latent_channels=4):
        super().__init__()
        self.into, self.out = nn.Linear(latent_channels, WIDTH), nn.Linear(WIDTH, latent_channels)
        self.joint_blocks = nn.ModuleList(Sd3Block() for _ in range(depth))

    def forward(self, x, t, y=None, context=None):
        h = self.into(x.flatten(2).transpose(1, 2))
        for block in self.joint_blocks:
            context, h = block(context, h, t.reshape(-1, 1, 1).to(h) / 1000)
        return self.out(h).transpose(1, 2).reshape(x.shape)


# -- Lumina 2 ----------------------------------------------------------------------------------------------------------


class LuminaAttention(nn.Module):
    """One head of keys for all of the queries."""

    def __init__(self):
        super().__init__()
        self.n_local_heads, self.head_dim = HEADS, CHANNELS
        self.qkv, self.out = nn.Linear(WIDTH, WIDTH + 2 * CHANNELS), nn.Linear(WIDTH, WIDTH)
        self.q_norm, self.k_norm = Norm(), Norm()

    def forward(self, x, x_mask, freqs_cis):
        q, k, v = self.qkv(x).split([WIDTH, CHANNELS, CHANNELS], dim=-1)
        q, k, v = self.q_norm(q.unflatten(-1, (HEADS, -1))), self.k_norm(k[:, :, None]), v[:, :, None]
        q, k = (turn(y, freqs_cis.real[:, :, None], freqs_cis.imag[:, :, None]) for y in (q, k))
        k, v = (y.expand(-1, -1, HEADS, -1) for y in (k, v))
        return self.out(attend(q, k, v, x_mask[:, None, None].bool()))


class LuminaLayer(Checkpointed):
    def __init__(self):
        super().__init__()
        self.attention = LuminaAttention()

    def inner(self, x, x_mask, pe, t):
        return x + self.attention(x + t, x_mask, pe)

    def forward(self, *args):
        return self.run(*args)


class Lumina2(Transformer):
    """Latents in patches of 2; each sample's picture right behind its own text."""

    patch_size = 2

    def __init__(self, depth=4, latent_channels=4):
        super().__init__()
        self.cap_embedder = nn.Linear(WIDTH, WIDTH)
        self.into, self.final = nn.Linear(4 * latent_channels, WIDTH), nn.Linear(WIDTH, 4 * latent_channels)
        self.context_refiner, self.noise_refiner = nn.ModuleList(), nn.ModuleList()
        self.layers = nn.ModuleList(LuminaLayer() for _ in range(depth))

    def forward(self, x, t, cap_feats, cap_mask):
        rows = F.pixel_unshuffle(x, 2)
        picture, text = self.into(rows.flatten(2).transpose(1, 2)), self.cap_embedder(cap_feats)
        lengths, image = cap_mask.sum(dim=1).tolist(), picture.shape[1]
        joint = picture.new_zeros(len(x), max(lengths) + image, WIDTH)
        mask = torch.zeros(joint.shape[:2], dtype=torch.bool)
        places = torch.zeros(joint.shape[:2]).to(x)
        for i, n in enumerate(lengths):
            joint[i, : n + image] = torch.cat([text[i, :n], picture[i]])
            mask[i, : n + image] = True
            places[i, : n + image] = torch.arange(n + image).to(x)
        turns = torch.polar(torch.ones_like(angles(places)), angles(places))
        for layer in self.layers:
            joint = layer(joint, mask, turns, t.reshape(-1, 1, 1).to(x))
        out = torch.stack([joint[i, n : n + image] for i, n in enumerate(lengths)])
        return F.pixel_shuffle(self.final(out).transpose(1, 2).reshape(rows.shape), 2)


# -- HunyuanImage ------------------------------------------------------------------------------------------------------


class HunyuanDouble(Checkpointed):
    def __init__(self):
        super().__init__()
        self.heads_num = HEADS
        self.img_attn_qkv, self.txt_attn_qkv = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.img_attn_q_norm, self.img_attn_k_norm, self.txt_attn_q_norm, self.txt_attn_k_norm = (
            Norm() for _ in range(4)
        )
        self.img_attn_proj, self.txt_attn_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def inner(self, img, txt, vec, freqs_cis, attn_params):
        cosines, sines = (x[:, None, ::2] for x in freqs_cis)
        q, k, v = self.img_attn_qkv(img + vec).unflatten(-1, (3, HEADS, -1)).unbind(2)
        q, k = (turn(x, cosines, sines) for x in (self.img_attn_q_norm(q), self.img_attn_k_norm(k)))
        tq, tk, tv = self.txt_attn_qkv(txt).unflatten(-1, (3, HEADS, -1)).unbind(2)
        pairs = ((q, self.txt_attn_q_norm(tq)), (k, self.txt_attn_k_norm(tk)), (v, tv))
        mixed = attend(*(torch.cat(pair, dim=1) for pair in pairs), attn_params.attention_mask)
        own, other = mixed.split([img.shape[1], txt.shape[1]], dim=1)
        return img + self.img_attn_proj(own), txt + self.txt_attn_proj(other)

    def forward(self, img, txt, vec, freqs_cis=None, attn_params=None):
        return self.run(img, txt, vec, freqs_cis, attn_params)


class HunyuanSingle(Checkpointed):
    def __init__(self):
        super().__init__()
        self.heads_num = HEADS
        self.linear1, self.linear2 = nn.Linear(WIDTH, 5 * WIDTH), nn.Linear(3 * WIDTH, WIDTH)
        self.q_norm, self.k_norm = Norm(), Norm()

    def inner(self, x, vec, freqs_cis, attn_params):
        cosines, sines = (y[:, None, ::2] for y in freqs_cis)
        q, k, v, mlp = self.linear1(x + vec).split([WIDTH, WIDTH, WIDTH, 2 * WIDTH], dim=-1)
        q, k, v = (y.unflatten(-1, (HEADS, -1)) for y in (q, k, v))
        q, k = self.q_norm(q), self.k_norm(k)
        n = attn_params.img_len
        q, k = (torch.cat([turn(y[:, :n], cosines, sines), y[:, n:]], dim=1) for y in (q, k))
        return x + self.linear2(torch.cat([attend(q, k, v, attn_params.attention_mask), F.gelu(mlp)], dim=-1))

    def forward(self, x, vec, freqs_cis=None, attn_params=None):
        return self.run(x, vec, freqs_cis, attn_params)


class HunyuanImage(Transformer):
    """Latents [batch, channels, height, width]; the picture first, and turned alone."""

    hidden_size = WIDTH

    def __init__(self, depth=2, latent_channels=4):
        super().__init__()
        self.img_in, self.out = nn.Linear(latent_channels, WIDTH), nn.Linear(WIDTH, latent_channels)
        self.double_blocks = nn.ModuleList(HunyuanDouble() for _ in range(depth))
        self.single_blocks = nn.ModuleList(HunyuanSingle() for _ in range(depth))

    def forward(
        self, hidden_states, timestep, text_states, encoder_attention_mask, byt5_text_states=None, byt5_text_mask=None
    ):
        img = self.img_in(hidden_states.flatten(2).transpose(1, 2))
        lengths = encoder_attention_mask.sum(dim=1)
        txt = text_states[:, : int(lengths.max())]
        mask = F.pad(encoder_attention_mask[:, : txt.shape[1]].bool(), (img.shape[1], 0), value=True)[:, None, None]
        params = types.SimpleNamespace(
            img_len=img.shape[1],
            max_seqlen=img.shape[1] + txt.shape[1],
            seqlens=lengths + img.shape[1],
            attention_mask=mask,
        )
        a = angles(torch.arange(img.shape[1]).to(img)).repeat_interleave(2, dim=-1)
        vec, turns = timestep.reshape(-1, 1, 1).to(img) / 1000, (a.cos(), a.sin())
        for block in self.double_blocks:
            img, txt = block(img, txt, vec, turns, params)
        x = torch.cat([img, txt], dim=1)
        for block in self.single_blocks:
            x = block(x, vec, turns, params)
        return self.out(x[:, : img.shape[1]]).transpose(1, 2).reshape(hidden_states.shape)
