"""A stand-in for a checkout of kohya's sd-scripts: its files, functions and order of calls, on models that fit a test.

Only names and the lines that the patch looks for are those of sd-scripts. `write_checkout` writes the files,
`write_job` a training TOML that they run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

README = """# Training scripts, in small

### Version 0.10.1

Older: Version 0.9.1
"""

READER = """\
# 設定ファイルの節はすべて一つにまとめられる
def read_config_from_file(args: argparse.Namespace, parser: argparse.ArgumentParser):
    if not args.config_file:
        return args
    with open(args.config_file, encoding="utf-8") as f:
        config_dict = toml.load(f)
    flat = {}
    for name, value in config_dict.items():
        flat.update(value if isinstance(value, dict) else {name: value})
    return parser.parse_args(namespace=argparse.Namespace(**flat))
"""

NOISING = """\
def get_timesteps(min_timestep: int, max_timestep: int, b_size: int, device: torch.device):
    if min_timestep == max_timestep:
        return torch.full((b_size,), min_timestep).to(device)
    return torch.randint(min_timestep, max_timestep, (b_size,)).to(device)


def get_noise_noisy_latents_and_timesteps(args, noise_scheduler, latents):
    noise = torch.randn_like(latents)
    low = 0 if args.min_timestep is None else args.min_timestep
    high = noise_scheduler.config.num_train_timesteps if args.max_timestep is None else args.max_timestep
    timesteps = get_timesteps(low, high, len(latents), latents.device)
    return noise, noise_scheduler.add_noise(latents, noise, timesteps), timesteps
"""

TRAIN_UTIL = '''\
"""Models, data and the accelerator, all small."""
import argparse
import contextlib
import json
import os
import random
import re
import types
import zlib

import toml
import torch
from torch import nn
from torch.nn import functional as F

from library import tiny_models

IMAGE_SIZE, VOCABULARY, MAX_TOKENS = 128, 101, 6


class TextEncoder(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.mix, self.dropout = nn.Linear(width, width), nn.Dropout(0.5)

    def forward(self, ids):
        x = self.embedding(ids)
        return x + self.dropout(torch.tanh(self.mix(x)))


class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 8, stride=8)

    def encode(self, images):
        mean = self.conv(images)
        return types.SimpleNamespace(
            latent_dist=types.SimpleNamespace(
                mode=lambda: mean, sample=lambda: mean + 0.1 * torch.randn(mean.shape, dtype=mean.dtype)
            )
        )


def load_models(args, text_widths, unet_class):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        text_encoders = [TextEncoder(width).eval() for width in text_widths]
        return text_encoders, VAE(), unet_class("reentrant" if args.gradient_checkpointing else "off")


class Tokenizer:
    def __call__(self, text, add_special_tokens=True):
        return types.SimpleNamespace(input_ids=[1 + zlib.crc32(w.encode()) % (VOCABULARY - 1) for w in text.split()])


class TokenizeStrategy:
    def __init__(self, count):
        self.tokenizers = [Tokenizer() for _ in range(count)]

    def tokenize(self, text):
        texts = [text] if isinstance(text, str) else text
        rows = [(t(text).input_ids + [0] * MAX_TOKENS)[:MAX_TOKENS] for t in self.tokenizers for text in texts]
        return list(torch.tensor(rows).split(len(texts)))

    def tokenize_with_weights(self, text):
        # 「(単語:1.5)」の形で単語の重さを決める
        words = [re.findall(r"\\((\\w+):([\\d.]+)\\)|(\\w+)", t) for t in text]
        weights = [([float(w or 1) for _, w, _ in row] + [1.0] * MAX_TOKENS)[:MAX_TOKENS] for row in words]
        return self.tokenize([" ".join(a or b for a, _, b in row) for row in words]), torch.tensor(weights)


class TextEncodingStrategy:
    def encode_tokens(self, tokenize_strategy, models, tokens):
        states = [model(ids) for model, ids in zip(models, tokens)]
        return states if len(tokens) == 1 else [*states, models[-1](tokens[-1])[:, -1]]

    def encode_tokens_with_weights(self, tokenize_strategy, models, tokens, weights):
        encoded = self.encode_tokens(tokenize_strategy, models, tokens)
        return [x * weights[..., None] if x.ndim == 3 else x for x in encoded]


class Dataset:
    def __init__(self, subsets, args, tokenize_strategy):
        self.subsets, self.batch_size, self.prior_loss_weight = subsets, args.train_batch_size, args.prior_loss_weight
        self.tokenize_strategy, self.image_data, self.image_to_subset = tokenize_strategy, {}, {}
        for subset in subsets:
            for caption in subset.captions:
                key = f"image{len(self.image_data)}"
                generator = torch.Generator().manual_seed(zlib.crc32(caption.encode()) + len(self.image_data))
                self.image_data[key] = types.SimpleNamespace(
                    image=torch.rand(3, IMAGE_SIZE, IMAGE_SIZE, generator=generator) * 2 - 1,
                    caption=caption, is_reg=subset.is_reg, latents=None, text_encoder_outputs=None,
                )  # fmt: skip
                self.image_to_subset[key] = subset

    def __len__(self):
        return -(-len(self.image_data) // self.batch_size)

    def __getitem__(self, index):
        keys = list(self.image_data)[index * self.batch_size : (index + 1) * self.batch_size]
        infos, subsets = [self.image_data[key] for key in keys], [self.image_to_subset[key] for key in keys]
        batch = {
            "custom_attributes": [subset.custom_attributes for subset in subsets],
            "loss_weights": torch.tensor([self.prior_loss_weight if info.is_reg else 1.0 for info in infos]),
            # Where all is cached, a caption is no longer put together.
            "captions": [
                info.caption if info.text_encoder_outputs else self.process_caption(s, info.caption)
                for s, info in zip(subsets, infos)
            ],
            "input_ids_list": self.tokenize_strategy.tokenize([info.caption for info in infos]),
            "images": None,
            "latents": None,
            "alpha_masks": None,
            "text_encoder_outputs_list": None,
        }
        if infos[0].latents is None:
            batch["images"] = torch.stack([info.image for info in infos])
        else:
            batch["latents"] = torch.stack([info.latents for info in infos])
        if infos[0].text_encoder_outputs is not None:
            batch["text_encoder_outputs_list"] = [torch.stack(x) for x in zip(*(i.text_encoder_outputs for i in infos))]
        if any(subset.mask == "alpha" for subset in subsets):
            batch["alpha_masks"] = torch.ones(len(infos), IMAGE_SIZE, IMAGE_SIZE)
        if any(subset.mask == "conditioning" for subset in subsets):
            batch["conditioning_images"] = torch.ones(len(infos), 3, IMAGE_SIZE, IMAGE_SIZE)
        return batch

    @torch.no_grad()
    def new_cache_latents(self, encode):
        for info in self.image_data.values():
            info.latents = encode(info.image[None])[0]

    def process_caption(self, subset, caption):
        return f"{subset.caption_prefix} {caption}" if subset.caption_prefix else caption

    @torch.no_grad()
    def new_cache_text_encoder_outputs(self, models, accelerator):
        for info in self.image_data.values():
            tokens = self.tokenize_strategy.tokenize(info.caption)
            info.text_encoder_outputs = [x[0] for x in TextEncodingStrategy().encode_tokens(None, models, tokens)]


class DatasetGroup:
    def __init__(self, dataset):
        self.datasets = [dataset]

    def __len__(self):
        return len(self.datasets[0])

    def __getitem__(self, index):
        return self.datasets[0][index]

    def new_cache_text_encoder_outputs(self, models, accelerator):
        for dataset in self.datasets:
            dataset.new_cache_text_encoder_outputs(models, accelerator)


def make_dataset_groups(args, tokenize_strategy):
    """Training and validation; the latter may be None."""
    with open(args.dataset_config, encoding="utf-8") as f:
        tables = toml.load(f)["subsets"]
    fields = {"captions": [], "is_reg": False, "mask": "", "validation": False, "custom_attributes": {},
              "caption_prefix": "", "caption_dropout_rate": 0.0, "caption_dropout_every_n_epochs": 0}
    subsets = [types.SimpleNamespace(**{**fields, **table}) for table in tables]
    parts = [[s for s in subsets if s.validation == wanted] for wanted in (False, True)]
    return [DatasetGroup(Dataset(part, args, tokenize_strategy)) if part else None for part in parts]


class Tracker:
    name = "jsonl"

    def __init__(self, path):
        self.path = path

    def log(self, values, step):
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(json.dumps({"at": step, **values}) + "\\n")


class Accelerator:
    device, is_main_process, process_index, sync_gradients = torch.device("cpu"), True, 0, True
    num_processes = 1
    print = staticmethod(print)

    def end_training(self):
        pass

    def __init__(self, args):
        self.args, self.batches, self.prepared = args, 0, []
        self.trackers = [Tracker(os.path.join(args.output_dir, "tracker.jsonl"))]
        self.save_hooks, self.load_hooks = [], []

    def autocast(self):
        return torch.autocast("cpu", torch.bfloat16, enabled=self.args.mixed_precision == "bf16")

    @contextlib.contextmanager
    def accumulate(self, model):
        self.batches += 1
        self.sync_gradients = self.batches % self.args.gradient_accumulation_steps == 0
        yield

    def backward(self, loss):
        (loss / self.args.gradient_accumulation_steps).backward()

    def prepare(self, *things):
        self.prepared += things
        return things if len(things) > 1 else things[0]

    def unwrap_model(self, model):
        return model

    def register_save_state_pre_hook(self, hook):
        self.save_hooks.append(hook)

    def register_load_state_pre_hook(self, hook):
        self.load_hooks.append(hook)

    def save_state(self, folder):
        os.makedirs(folder, exist_ok=True)
        for hook in self.save_hooks:
            hook([], [], folder)
        torch.save([thing.state_dict() for thing in self.prepared], os.path.join(folder, "state.pt"))

    def load_state(self, folder):
        for hook in self.load_hooks:
            hook([], folder)
        for thing, state in zip(self.prepared, torch.load(os.path.join(folder, "state.pt"))):
            thing.load_state_dict(state)


class Optimizer:
    """Plain gradient descent: importing torch's own takes longer than a whole run."""

    def __init__(self, parameters, lr):
        self.parameters, self.lr = list(parameters), lr

    @torch.no_grad()
    def step(self):
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter -= self.lr * parameter.grad

    def zero_grad(self, set_to_none=True):
        for parameter in self.parameters:
            parameter.grad = None


class NoiseScheduler:
    def __init__(self):
        self.config = types.SimpleNamespace(num_train_timesteps=1000)
        self.alphas_cumprod = (1 - torch.linspace(0.03, 0.11, 1000) ** 2).cumprod(0)

    def levels(self, timesteps):
        kept = self.alphas_cumprod[timesteps][:, None, None, None]
        return kept.sqrt(), (1 - kept).sqrt()

    def add_noise(self, latents, noise, timesteps):
        signal, spread = self.levels(timesteps)
        return signal * latents + spread * noise

    def get_velocity(self, latents, noise, timesteps):
        signal, spread = self.levels(timesteps)
        return signal * noise - spread * latents


def set_seed(seed):
    random.seed(seed)
    torch.manual_seed(seed)


def apply_masked_loss(loss, batch):
    if "conditioning_images" in batch:
        mask = (batch["conditioning_images"][:, :1] + 1) / 2
    elif batch["alpha_masks"] is not None:
        mask = batch["alpha_masks"][:, None]
    else:
        return loss
    return loss * F.adaptive_avg_pool2d(mask, loss.shape[2:])
'''

TRAIN_NETWORK = '''\
"""Trains a LoRA; U-Net in the layout of SD 1.x."""
import argparse
import functools
import importlib
import json
import os
import random
import time

import torch

import library.train_util as train_util
from library import tiny_models


class NetworkTrainer:
    def __init__(self):
        self.vae_scale_factor = 0.5

    def generate_step_logs(self, args, current_loss, avr_loss, lr_scheduler, lr_descriptions, optimizer=None):
        return {"loss/current": current_loss, "loss/average": avr_loss}

    def step_logging(self, accelerator, logs: dict, global_step: int, epoch: int):
        for tracker in accelerator.trackers:
            tracker.log(logs, step=global_step)

    def assert_extra_args(self, args, train_dataset_group, val_dataset_group):
        pass

    def load_target_model(self, args, weight_dtype, accelerator):
        text_encoders, vae, unet = train_util.load_models(args, [24], tiny_models.TinyUpBlocksUNet)
        return "sd_v1", text_encoders[0], vae, unet

    def load_unet_lazily(self, args, weight_dtype, accelerator, text_encoders):
        raise NotImplementedError()

    def get_tokenize_strategy(self, args):
        return train_util.TokenizeStrategy(1)

    def get_text_encoding_strategy(self, args):
        return train_util.TextEncodingStrategy()

    def cache_text_encoder_outputs_if_needed(
        self, args, accelerator, unet, vae, text_encoders, dataset, weight_dtype
    ):
        if args.cache_text_encoder_outputs:
            models = self.get_models_for_text_encoding(args, accelerator, text_encoders)
            dataset.new_cache_text_encoder_outputs(models, accelerator)

    def get_noise_scheduler(self, args, device):
        return train_util.NoiseScheduler()

    def get_tokenizers(self, tokenize_strategy):
        return tokenize_strategy.tokenizers

    def get_models_for_text_encoding(self, args, accelerator, text_encoders):
        return text_encoders

    def is_train_text_encoder(self, args):
        return not args.network_train_unet_only

    def call_unet(
        self, args, accelerator, unet, noisy_latents, timesteps, text_conds, batch, weight_dtype, indices=None
    ):
        rows = slice(None) if indices is None else indices
        return unet(noisy_latents[rows], timesteps[rows], text_conds[0][rows])

    def encode_images_to_latents(self, args, vae, images):
        return vae.encode(images).latent_dist.sample()

    def shift_scale_latents(self, args, latents):
        return latents * self.vae_scale_factor

    def get_noise_pred_and_target(
        self, args, accelerator, noise_scheduler, latents, batch, text_encoder_conds, unet, network, weight_dtype,
        train_unet, is_train=True,
    ):  # fmt: skip
        drawn = train_util.get_noise_noisy_latents_and_timesteps(args, noise_scheduler, latents)
        noise, noisy_latents, timesteps = drawn
        if args.gradient_checkpointing:
            for conds in text_encoder_conds:
                conds.requires_grad_(True)
        inputs = (noisy_latents.requires_grad_(train_unet), timesteps, text_encoder_conds, batch, weight_dtype)
        with torch.set_grad_enabled(is_train), accelerator.autocast():
            noise_pred = self.call_unet(args, accelerator, unet, *inputs)
        target = noise_scheduler.get_velocity(latents, noise, timesteps) if args.v_parameterization else noise
        # 元のモデルの出力を教師とする画像
        kept = [i for i, a in enumerate(batch["custom_attributes"]) if a.get("diff_output_preservation")]
        if kept:
            network.set_multiplier(0.0)
            with torch.no_grad(), accelerator.autocast():
                target[kept] = self.call_unet(args, accelerator, unet, *inputs, indices=kept).to(target.dtype)
            network.set_multiplier(1.0)
        return noise_pred, target, timesteps, None

    def post_process_loss(self, loss, args, timesteps, noise_scheduler):
        if args.min_snr_gamma:
            kept = noise_scheduler.alphas_cumprod[timesteps]
            loss = loss * (args.min_snr_gamma * (1 - kept) / kept).clamp(max=1.0)
        return loss

    def get_sai_model_spec(self, args):
        return {"modelspec.title": args.output_name}

    def update_metadata(self, metadata, args):
        pass

    def on_step_start(self, args, accelerator, network, text_encoders, unet, batch, weight_dtype, is_train=True):
        pass

    def on_validation_step_end(self, args, accelerator, network, text_encoders, unet, batch, weight_dtype):
        pass

    def process_batch(
        self, batch, text_encoders, unet, network, vae, noise_scheduler, vae_dtype, weight_dtype, accelerator, args,
        text_encoding_strategy, tokenize_strategy, is_train=True, train_text_encoder=True, train_unet=True,
    ):  # fmt: skip
        with torch.no_grad():
            latents = batch["latents"]
            if latents is None:  # 画像を潜在空間へ写す
                latents = self.encode_images_to_latents(args, vae, batch["images"].to(dtype=vae_dtype))
            latents = self.shift_scale_latents(args, latents)
        conds = batch["text_encoder_outputs_list"]
        if conds is None:
            models = self.get_models_for_text_encoding(args, accelerator, text_encoders)
            with torch.set_grad_enabled(is_train and train_text_encoder), accelerator.autocast():
                if args.weighted_captions:
                    ids, weights = tokenize_strategy.tokenize_with_weights(batch["captions"])
                    conds = text_encoding_strategy.encode_tokens_with_weights(tokenize_strategy, models, ids, weights)
                else:
                    conds = text_encoding_strategy.encode_tokens(tokenize_strategy, models, batch["input_ids_list"])
        noise_pred, target, timesteps, weighting = self.get_noise_pred_and_target(
            args, accelerator, noise_scheduler, latents, batch, conds, unet, network, weight_dtype, train_unet,
            is_train=is_train,
        )  # fmt: skip
        loss = (noise_pred.float() - target.float()) ** 2
        if weighting is not None:
            loss = loss * weighting
        if args.masked_loss or batch["alpha_masks"] is not None:
            loss = train_util.apply_masked_loss(loss, batch)
        loss = loss.mean(dim=(1, 2, 3)) * batch["loss_weights"]
        return self.post_process_loss(loss, args, timesteps, noise_scheduler).mean()

    def train(self, args):
        os.makedirs(args.output_dir, exist_ok=True)
        with open(os.path.join(args.output_dir, "args.json"), "w", encoding="utf-8") as f:
            json.dump(vars(args), f)
        train_util.set_seed(args.seed)
        tokenize_strategy = self.get_tokenize_strategy(args)
        self.get_tokenizers(tokenize_strategy)
        train_dataset_group, val_dataset_group = train_util.make_dataset_groups(args, tokenize_strategy)
        self.assert_extra_args(args, train_dataset_group, val_dataset_group)

        accelerator = train_util.Accelerator(args)
        dtype = torch.float32
        model_version, text_encoder, vae, unet = self.load_target_model(args, dtype, accelerator)
        text_encoders = text_encoder if isinstance(text_encoder, list) else [text_encoder]
        groups = [group for group in (train_dataset_group, val_dataset_group) if group is not None]
        text_encoding_strategy = self.get_text_encoding_strategy(args)
        for group in groups:
            if args.cache_latents:
                group.datasets[0].new_cache_latents(functools.partial(self.encode_images_to_latents, args, vae))
            self.cache_text_encoder_outputs_if_needed(args, accelerator, unet, vae, text_encoders, group, dtype)
        if unet is None:
            unet, text_encoders = self.load_unet_lazily(args, dtype, accelerator, text_encoders)

        network_module = importlib.import_module(args.network_module)
        network = network_module.create_network(1.0, args.network_dim, args.network_dropout)
        train_text_encoder = self.is_train_text_encoder(args)
        network.apply_to(text_encoders, unet, train_text_encoder, True)
        optimizer = train_util.Optimizer(network.parameters(), args.learning_rate)
        options = {"batch_size": 1, "collate_fn": lambda examples: examples[0]}
        train_dataloader = torch.utils.data.DataLoader(train_dataset_group, shuffle=True, **options)
        val_dataloader = torch.utils.data.DataLoader(val_dataset_group or [], **options)
        for model in (unet, vae, *text_encoders):
            model.requires_grad_(False)
        network = accelerator.prepare(network)
        for model in (unet, *text_encoders):
            model.train(args.gradient_checkpointing)
        network.requires_grad_(True)

        epoch_and_step = [0, 0]

        def save_model_hook(models, weights, output_dir):
            with open(os.path.join(output_dir, "train_state.json"), "w", encoding="utf-8") as f:
                json.dump(epoch_and_step, f)

        def load_model_hook(models, input_dir):
            with open(os.path.join(input_dir, "train_state.json"), encoding="utf-8") as f:
                epoch_and_step[:] = json.load(f)

        accelerator.register_save_state_pre_hook(save_model_hook)
        accelerator.register_load_state_pre_hook(load_model_hook)
        if args.resume:
            accelerator.load_state(args.resume)

        accelerator.print("running training / 学習を始めます")
        metadata = {"ss_seed": args.seed, "ss_base_model_version": model_version}
        self.update_metadata(metadata, args)
        metadata = {key: str(value) for key, value in metadata.items()}

        def save_model(name, step):
            saved = {"ss_steps": str(step)} if args.no_metadata else {**metadata, "ss_steps": str(step)}
            saved.update(self.get_sai_model_spec(args))
            network.save_weights(os.path.join(args.output_dir, name), dtype, saved)

        noise_scheduler = self.get_noise_scheduler(args, accelerator.device)
        common = (text_encoders, unet, network, vae, noise_scheduler, dtype, dtype, accelerator, args)
        common += (text_encoding_strategy, tokenize_strategy)
        trained = {"train_text_encoder": train_text_encoder, "train_unet": True}
        # As sd-scripts: a resumed run counts from 1 again, but for one that is told to skip up to a step.
        global_step, losses = args.initial_step if args.skip_until_initial_step else 0, []
        sampled = (accelerator.device, vae, None, text_encoder, unet)
        self.sample_images(accelerator, args, 0, 0, *sampled)
        while global_step < args.max_train_steps:
            epoch_and_step[0] += 1
            network.train()
            for batch in train_dataloader:
                with accelerator.accumulate(network):
                    self.on_step_start(args, accelerator, network, text_encoders, unet, batch, dtype, is_train=True)
                    loss = self.process_batch(batch, *common, is_train=True, **trained)
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
                        optimizer.step()
                        optimizer.zero_grad(set_to_none=True)
                losses.append(loss.detach().item())
                if accelerator.sync_gradients:
                    global_step += 1
                    epoch_and_step[1] += 1
                    self.sample_images(accelerator, args, None, global_step, *sampled)
                    if args.save_every_n_steps and global_step % args.save_every_n_steps == 0:
                        name = f"{args.output_name}-step{global_step}"
                        save_model(f"{name}.pt", global_step)
                        if args.save_state:
                            accelerator.save_state(os.path.join(args.output_dir, f"{name}-state"))
                if accelerator.trackers:
                    logs = self.generate_step_logs(args, losses[-1], sum(losses) / len(losses), None, None, optimizer)
                    self.step_logging(accelerator, logs, global_step, epoch_and_step[0])
                validates = args.validate_every_n_steps and global_step % args.validate_every_n_steps == 0
                if accelerator.sync_gradients and validates:
                    self.validate(val_dataloader, common, trained)
                if global_step >= args.max_train_steps:
                    break
        save_model(f"{args.output_name}.pt", global_step)

    def sample_images(self, accelerator, args, epoch, global_step, device, vae, tokenizers, text_encoder, unet):
        if not args.sample_every_n_steps or global_step % args.sample_every_n_steps or epoch is not None:
            return
        folder = os.path.join(args.output_dir, "sample")
        os.makedirs(folder, exist_ok=True)
        name = f"{args.output_name}_{global_step:06d}_00_{time.strftime('%Y%m%d%H%M%S', time.localtime())}.png"
        from PIL import Image

        Image.new("RGB", (8, 8)).save(os.path.join(folder, name))

    def validate(self, val_dataloader, common, trained):
        text_encoders, unet, network, vae, noise_scheduler, _, dtype, accelerator, args = common[:9]
        network.eval()
        states, limits = (torch.get_rng_state(), random.getstate()), (args.min_timestep, args.max_timestep)
        train_util.set_seed(args.seed)
        for batch in val_dataloader:
            for timestep in (300, 700):
                self.on_step_start(args, accelerator, network, text_encoders, unet, batch, dtype, is_train=False)
                args.min_timestep = args.max_timestep = timestep
                self.process_batch(batch, *common, is_train=False, **trained)
                self.on_validation_step_end(args, accelerator, network, text_encoders, unet, batch, dtype)
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        args.min_timestep, args.max_timestep = limits
        network.train()


def setup_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    for name in ("config_file", "dataset_config", "resume", "mixed_precision", "blocks", "sample_prompts"):
        parser.add_argument(f"--{name}", default=None)
    for name, default in {"output_dir": "out", "output_name": "lora", "network_module": "networks.lora"}.items():
        parser.add_argument(f"--{name}", default=default)
    whole = "save_every_n_steps sample_every_n_steps validate_every_n_steps initial_step min_timestep max_timestep"
    for name in whole.split():
        parser.add_argument(f"--{name}", type=int, default=None)
    counts = {"seed": 1, "max_train_steps": 3, "train_batch_size": 2, "gradient_accumulation_steps": 1}
    for name, default in {**counts, "network_dim": 4}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    amounts = {"learning_rate": 0.1, "network_dropout": 0.0, "min_snr_gamma": None, "prior_loss_weight": 1.0}
    for name, default in amounts.items():
        parser.add_argument(f"--{name}", type=float, default=default)
    flags = "network_train_unet_only gradient_checkpointing cache_latents cache_latents_to_disk"
    flags += " cache_text_encoder_outputs weighted_captions v_parameterization no_metadata save_state masked_loss"
    flags += " skip_until_initial_step"
    for name in (*flags.split(), "torch_compile", "deepspeed"):
        parser.add_argument(f"--{name}", action="store_true")
    return parser


if __name__ == "__main__":
    parser = setup_parser()

    args = parser.parse_args()
    args = train_util.read_config_from_file(args, parser)

    trainer = NetworkTrainer()
    trainer.train(args)
'''

SDXL_TRAIN_NETWORK = '''\
"""Trains a LoRA; U-Net in the layout of SDXL, two text encoders."""
import argparse

import torch

from library import tiny_models, train_util
import train_network


def make_unet(checkpointing):
    return tiny_models.TinyOutputBlocksUNet(checkpointing != "off", use_reentrant=checkpointing == "reentrant")


class SdxlNetworkTrainer(train_network.NetworkTrainer):
    def __init__(self):
        super().__init__()
        self.vae_scale_factor = 0.25

    def load_target_model(self, args, weight_dtype, accelerator):
        text_encoders, vae, unet = train_util.load_models(args, [8, 16], make_unet)
        return "sdxl_base_v1-0", text_encoders, vae, unet

    def get_tokenize_strategy(self, args):
        return train_util.TokenizeStrategy(2)

    def get_models_for_text_encoding(self, args, accelerator, text_encoders):
        return text_encoders + [accelerator.unwrap_model(text_encoders[-1])]

    def call_unet(
        self, args, accelerator, unet, noisy_latents, timesteps, text_conds, batch, weight_dtype, indices=None
    ):
        first, second, pooled = text_conds
        # 全体の意味も各単語に足しておく
        text = torch.cat([first, second + pooled[:, None]], dim=2)
        rows = slice(None) if indices is None else indices
        return unet(noisy_latents[rows], timesteps[rows], text[rows])


def setup_parser() -> argparse.ArgumentParser:
    return train_network.setup_parser()


if __name__ == "__main__":
    parser = setup_parser()

    args = parser.parse_args()
    args = train_util.read_config_from_file(args, parser)

    trainer = SdxlNetworkTrainer()
    trainer.train(args)
'''

OTHER_SCRIPT = '''\
"""Another script that reads the same training TOML."""
import train_network
from library import train_util

if __name__ == "__main__":
    parser = train_network.setup_parser()
    args = parser.parse_args()
    args = train_util.read_config_from_file(args, parser)
    print("trained with seed", args.seed)
'''

FLOW_NOISING = """\
import types

import torch


class FlowScheduler:
    def __init__(self):
        self.config = types.SimpleNamespace(num_train_timesteps=1000)


def get_noisy_model_input_and_timesteps(args, noise_scheduler, latents, noise, device, dtype):
    # 大きさによってずらす
    shift = 1.0 if args.timestep_sampling == "uniform" else float(latents.shape[-1] * latents.shape[-2])
    drawn = torch.rand(len(latents), device=device)
    sigmas = (shift * drawn / (1 + (shift - 1) * drawn)).reshape(-1, *[1] * (latents.ndim - 1))
    if args.ip_noise_gamma:
        noise = noise + args.ip_noise_gamma * torch.randn_like(latents)
    noisy = (1 - sigmas) * latents + sigmas * noise
    return noisy.to(dtype), (sigmas.flatten() * 1000).to(dtype), sigmas
"""

FLOW_PARSER = """
def setup_parser() -> argparse.ArgumentParser:
    parser = train_network.setup_parser()
    parser.add_argument("--timestep_sampling", default="uniform")
    parser.add_argument("--ip_noise_gamma", type=float, default=None)
    parser.add_argument("--model_prediction_type", default="raw")
    parser.add_argument("--blocks_to_swap", type=int, default=0)
    for name in ("show_timesteps", "apply_t5_attn_mask", "compile", "cpu_offload_checkpointing"):
        parser.add_argument(f"--{name}", action="store_true")
    return parser


if __name__ == "__main__":
    parser = setup_parser()

    args = parser.parse_args()
    args = train_util.read_config_from_file(args, parser)

    if args.show_timesteps:
        print("no trainer here")
    else:
        trainer = TRAINER()
        trainer.train(args)
"""

ANIMA_TRAIN_NETWORK = '''\
"""Trains a LoRA; the transformer comes once all is cached; latents have one frame in it."""
import argparse

import torch

import train_network
from library import flux_train_utils, tiny_transformers, train_util


class AnimaNetworkTrainer(train_network.NetworkTrainer):
    def load_target_model(self, args, weight_dtype, accelerator):
        text_encoders, vae, _ = train_util.load_models(args, [16], lambda checkpointing: None)
        return "anima", text_encoders, vae, None

    def load_unet_lazily(self, args, weight_dtype, accelerator, text_encoders):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = tiny_transformers.Anima()
        if args.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        return model, text_encoders

    def get_models_for_text_encoding(self, args, accelerator, text_encoders):
        return None if args.cache_text_encoder_outputs else text_encoders

    def cache_text_encoder_outputs_if_needed(
        self, args, accelerator, unet, vae, text_encoders, dataset, weight_dtype
    ):
        if args.cache_text_encoder_outputs:
            dataset.new_cache_text_encoder_outputs(text_encoders, accelerator)

    def get_noise_scheduler(self, args, device):
        return flux_train_utils.FlowScheduler()

    def encode_images_to_latents(self, args, vae, images):
        return 0.5 * vae.encode(images).latent_dist.sample()

    def shift_scale_latents(self, args, latents):
        return latents

    def get_noise_pred_and_target(
        self, args, accelerator, noise_scheduler, latents, batch, text_encoder_conds, unet, network, weight_dtype,
        train_unet, is_train=True,
    ):  # fmt: skip
        noise = torch.randn_like(latents)
        noisy, timesteps, sigmas = flux_train_utils.get_noisy_model_input_and_timesteps(
            args, noise_scheduler, latents, noise, accelerator.device, weight_dtype
        )
        timesteps = timesteps / 1000
        if args.gradient_checkpointing:
            noisy.requires_grad_(True)
        known = torch.ones(text_encoder_conds[0].shape[:2]) if batch.get("input_ids_list") is None else (
            batch["input_ids_list"][0] != 0
        )
        with torch.set_grad_enabled(is_train), accelerator.autocast():
            pred = unet(noisy.unsqueeze(2), timesteps, text_encoder_conds[0], target_attention_mask=known)
        return pred.squeeze(2), noise - latents, timesteps, 1 + sigmas
'''

FLUX_TRAIN_NETWORK = '''\
"""Trains a LoRA; latents are packed."""
import argparse

import torch
from torch.nn import functional as F

import train_network
from library import flux_train_utils, tiny_transformers, train_util


class FluxNetworkTrainer(train_network.NetworkTrainer):
    def load_target_model(self, args, weight_dtype, accelerator):
        def make(checkpointing):
            model = tiny_transformers.Flux(latent_channels=16)
            if args.gradient_checkpointing:
                model.enable_gradient_checkpointing()
            if args.blocks_to_swap:
                model.swap_blocks()
            return model

        text_encoders, vae, model = train_util.load_models(args, [16], make)
        return "flux1", text_encoders, vae, model

    def get_noise_scheduler(self, args, device):
        return flux_train_utils.FlowScheduler()

    def get_noise_pred_and_target(
        self, args, accelerator, noise_scheduler, latents, batch, text_encoder_conds, unet, network, weight_dtype,
        train_unet, is_train=True,
    ):  # fmt: skip
        noise = torch.randn_like(latents)
        noisy, timesteps, sigmas = flux_train_utils.get_noisy_model_input_and_timesteps(
            args, noise_scheduler, latents, noise, accelerator.device, weight_dtype
        )
        packed = F.pixel_unshuffle(noisy, 2).flatten(2).transpose(1, 2)
        ids = torch.arange(3.0 * packed.shape[1]).reshape(1, -1, 3).expand(len(packed), -1, -1)
        if args.gradient_checkpointing:
            ids = ids.clone().requires_grad_(True)
        text = text_encoder_conds[0]
        mask = (batch["input_ids_list"][0] != 0).to(noisy) if args.apply_t5_attn_mask else None

        def call(rows):
            with torch.set_grad_enabled(is_train), accelerator.autocast():
                pred = unet(
                    img=packed[rows], img_ids=ids[rows], txt=text[rows], txt_ids=torch.zeros_like(text[rows, :, :3]),
                    timesteps=timesteps[rows] / 1000, y=None, mod_vectors=unet.get_mod_vectors(timesteps[rows]),
                    txt_attention_mask=None if mask is None else mask[rows],
                )
            return pred

        def unpacked(pred, rows):
            height, width = noisy.shape[-2] // 2, noisy.shape[-1] // 2
            pred = F.pixel_shuffle(pred.transpose(1, 2).reshape(len(pred), -1, height, width), 2)
            if args.model_prediction_type == "sample":
                pred = noisy[rows] - sigmas[rows] * pred
            return pred

        pred = unpacked(call(slice(None)), slice(None))
        target = latents.clone() if args.model_prediction_type == "sample" else noise - latents
        kept = [i for i, a in enumerate(batch.get("custom_attributes", [])) if a.get("diff_output_preservation")]
        if kept:
            network.set_multiplier(0.0)
            unet.prepare_block_swap_before_forward()
            with torch.no_grad():
                prior = call(kept)  # with a graph, as sd-scripts' own
            network.set_multiplier(1.0)
            target[kept] = unpacked(prior, kept).to(target.dtype)
        return pred, target, timesteps, None

    def on_validation_step_end(self, args, accelerator, network, text_encoders, unet, batch, weight_dtype):
        accelerator.unwrap_model(unet).prepare_block_swap_before_forward()
'''

LORA = '''\
"""LoRA on the attention of the U-Net and on the text encoders."""
import torch
from torch import nn

from library.tiny_models import KohyaLoRA


class Network(nn.Module):
    def __init__(self, multiplier, dim, dropout):
        super().__init__()
        self.dim, self.dropout, self.loras = dim, dropout, nn.ModuleDict()

    def apply_to(self, text_encoders, unet, train_text_encoder, train_unet):
        # 学習する層の forward を置き換える
        roots = {"unet": unet, **{f"te{i}": t for i, t in enumerate(text_encoders) if train_text_encoder}}
        for root, model in roots.items():
            for name, layer in model.named_modules():
                if name.endswith(("to_q", "to_k", "to_v", "mix", "qkv", "linear1", "q_proj", "k_proj", "v_proj")):
                    self.loras[f"{root}.{name}".replace(".", "_")] = KohyaLoRA(layer, self.dim, self.dropout)

    def set_multiplier(self, multiplier):
        for lora in self.loras.values():
            lora.multiplier = multiplier

    def save_weights(self, file, dtype, metadata):
        # 同じ学習なら同じバイト列になる
        torch.save({"weights": {k: x.to(dtype) for k, x in self.state_dict().items()}, "metadata": metadata}, file)


def create_network(multiplier, network_dim, dropout):
    return Network(multiplier, network_dim, dropout)
'''

# Where the functions are that the patch looks for, by the release that put them there.
LAYOUTS = {
    "0.10": {"library/train_util.py": f"{TRAIN_UTIL}\n\n{READER}\n\n{NOISING}"},
    "0.11": {
        "library/train_util.py": TRAIN_UTIL
        + "\n\nfrom library.args import read_config_from_file\n"
        + "from library.loss import get_noise_noisy_latents_and_timesteps, get_timesteps\n",
        "library/args.py": f"import argparse\n\nimport toml\n\n\n{READER}",
        "library/loss.py": f"import torch\n\n\n{NOISING}",
    },
}
_SCRIPTS = ("train_network.py", "sdxl_train_network.py", "anima_train_network.py", "flux_train_network.py")
PATCHED_FILES = {"0.10": ("library/train_util.py", *_SCRIPTS), "0.11": ("library/args.py", *_SCRIPTS)}

FILES = {
    "README.md": README,
    "library/__init__.py": "",
    "library/tiny_models.py": Path(__file__).with_name("models.py").read_text(encoding="utf-8"),
    "networks/__init__.py": "",
    "networks/lora.py": LORA,
    "train_network.py": TRAIN_NETWORK,
    "sdxl_train_network.py": SDXL_TRAIN_NETWORK,
    "library/tiny_transformers.py": Path(__file__).with_name("small_transformers.py").read_text(encoding="utf-8"),
    "library/flux_train_utils.py": FLOW_NOISING,
    "anima_train_network.py": ANIMA_TRAIN_NETWORK + "\n" + FLOW_PARSER.replace("TRAINER", "AnimaNetworkTrainer"),
    "flux_train_network.py": FLUX_TRAIN_NETWORK + "\n" + FLOW_PARSER.replace("TRAINER", "FluxNetworkTrainer"),
    "train_other.py": OTHER_SCRIPT,
}
SUBSETS: tuple[dict[str, Any], ...] = (
    {"captions": ["a sks dog", "sks dog on grass", "one sks dog", "sks dog asleep"]},
)


def write_checkout(folder: Path, *, newline: str = "\n", layout: str = "0.10") -> Path:
    """Write the stand-in into a folder, which is made where it is missing; returns the folder."""
    for name, text in {**FILES, **LAYOUTS[layout]}.items():
        if layout == "0.11" and name.startswith(("train_", "sdxl_", "anima_", "flux_")):
            text = text.replace("train_util.read_config", "args_util.read_config")
            text = text.replace("train_util.get_noise", "loss_util.get_noise")
            text = text.replace(
                "\nif __name__", "\nimport library.args as args_util, library.loss as loss_util\n\nif __name__"
            )
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text.replace("\n", newline).encode("utf-8"))
    return folder


def write_dataset(path: Path, subsets: tuple[Mapping[str, Any], ...] = SUBSETS) -> Path:
    """The data set's TOML; a subset has `captions`, maybe `is_reg`, `mask`, `validation`, `custom_attributes`."""
    tables = ["[[subsets]]\n" + "".join(f"{k} = {_toml(v)}\n" for k, v in subset.items()) for subset in subsets]
    path.write_text("\n".join(tables), encoding="utf-8")
    return path


def write_job(folder: Path, apt: str | None = None, **args: Any) -> Path:
    """`train.toml`, with `[apt]` where these lines of it are given, to be run in its own folder; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    args = {"dataset_config": write_dataset(folder / "dataset.toml").name, **args}
    text = "".join(f"{key} = {_toml(value)}\n" for key, value in args.items())
    path = folder / "train.toml"
    path.write_text(text if apt is None else f"{text}\n[apt]\n{apt}\n", encoding="utf-8")
    return path


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{k} = {_toml(v)}" for k, v in value.items()) + " }"
    return json.dumps(value, ensure_ascii=False)
