"""Trains a LoRA with one text encoder: the structure of diffusers' train_dreambooth_lora.py, and nothing else of it."""

import argparse
import functools
import os
from pathlib import Path

import tiny
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file


def parse_args(input_args=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--output_dir", default="out")
    parser.add_argument("--report_to", default=None)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--max_train_steps", type=int, default=4)
    parser.add_argument("--train_batch_size", type=int, default=2)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--lora_dropout", type=float, default=0.0)
    parser.add_argument("--mixed_precision", default="no")
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--train_text_encoder", action="store_true")
    parser.add_argument("--with_prior_preservation", action="store_true")
    parser.add_argument("--prior_loss_weight", type=float, default=1.0)
    parser.add_argument("--validation_epochs", type=int, default=0)
    parser.add_argument("--checkpointing_steps", type=int, default=500)
    parser.add_argument("--instance_prompt", default=tiny.INSTANCE_PROMPT)
    parser.add_argument("--class_prompt", default=tiny.CLASS_PROMPT)
    parser.add_argument("--pre_compute_text_embeddings", action="store_true")
    parser.add_argument("--resume_from_checkpoint", default=None)

    return parser.parse_args(input_args)


def tokenize_prompt(tokenizer, prompt):
    return tokenizer(prompt, truncation=True, padding="max_length", return_tensors="pt").input_ids


def encode_prompt(text_encoder, input_ids):
    return text_encoder(input_ids)[0]


def validate(unet, scheduler):
    """A few steps of sampling, in the middle of training, with random numbers of its own."""
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(unet.device, unet.dtype)
    scheduler.set_timesteps(2)
    with torch.no_grad():
        for t in scheduler.timesteps:
            predicted = unet(latents, t, latents.new_zeros(1, tiny.TOKENS, tiny.TEXT_WIDTH)).sample
            latents = scheduler.step(predicted, t, latents, generator=torch.Generator().manual_seed(0)).prev_sample


def main(args):
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=args.report_to,
        project_config=ProjectConfiguration(project_dir=args.output_dir, logging_dir=Path(args.output_dir, "logs")),
    )
    set_seed(0)
    noise_scheduler = tiny.make_scheduler()
    unet, vae, text_encoder = tiny.make_unet(), tiny.make_vae(), tiny.make_text_encoder()
    tokenizer = tiny.make_tokenizer()
    set_seed(args.seed)
    if accelerator.is_main_process:
        os.makedirs(args.output_dir, exist_ok=True)  # noqa: PTH103

    weight_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    for model in (unet, vae, text_encoder):
        model.requires_grad_(False).to(accelerator.device, dtype=weight_dtype)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
        if args.train_text_encoder:
            text_encoder.gradient_checkpointing_enable()

    unet.add_adapter(
        LoraConfig(
            r=2, lora_alpha=2, lora_dropout=args.lora_dropout, target_modules=["to_k", "to_q", "to_v", "to_out.0"]
        )
    )
    if args.train_text_encoder:
        text_encoder.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "v_proj"]))
    cast_training_params([unet, text_encoder], dtype=torch.float32)

    # The states of the accelerator keep the LoRA alone.
    def save_model_hook(models, weights, output_dir):
        if accelerator.is_main_process:
            layers = {}
            for model in models:
                own = isinstance(model, type(accelerator.unwrap_model(unet)))
                layers["unet" if own else "text_encoder"] = get_peft_model_state_dict(model)
                weights.pop()
            StableDiffusionLoraLoaderMixin.save_lora_weights(
                output_dir,
                unet_lora_layers=layers["unet"],
                text_encoder_lora_layers=layers.get("text_encoder"),
            )

    def load_model_hook(models, input_dir):
        saved = load_file(Path(input_dir) / "pytorch_lora_weights.safetensors")
        while models:
            model = models.pop()
            prefix = "unet." if isinstance(model, type(accelerator.unwrap_model(unet))) else "text_encoder."
            own = {k.removeprefix(prefix): v for k, v in saved.items() if k.startswith(prefix)}
            set_peft_model_state_dict(model, own, adapter_name="default")

    accelerator.register_save_state_pre_hook(save_model_hook)
    accelerator.register_load_state_pre_hook(load_model_hook)

    params_to_optimize = [p for p in unet.parameters() if p.requires_grad]
    if args.train_text_encoder:
        params_to_optimize += [p for p in text_encoder.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params_to_optimize, lr=args.learning_rate)

    if args.pre_compute_text_embeddings:

        def compute_text_embeddings(prompt):
            with torch.no_grad():
                return encode_prompt(text_encoder, tokenize_prompt(tokenizer, prompt))

        instance_text = compute_text_embeddings(args.instance_prompt)
        class_text = compute_text_embeddings(args.class_prompt)
        text_encoder = tokenizer = None
    else:
        instance_text = tokenize_prompt(tokenizer, args.instance_prompt)
        class_text = tokenize_prompt(tokenizer, args.class_prompt)

    train_dataset = tiny.Photos([instance_text], class_text)
    train_dataloader = torch.utils.data.DataLoader(
        train_dataset,
        batch_size=args.train_batch_size,
        shuffle=True,
        collate_fn=functools.partial(tiny.collate, with_prior_preservation=args.with_prior_preservation),
    )

    # Prepare everything with our `accelerator`.
    if args.train_text_encoder:
        unet, text_encoder, optimizer, train_dataloader = accelerator.prepare(
            unet, text_encoder, optimizer, train_dataloader
        )
    else:
        unet, optimizer, train_dataloader = accelerator.prepare(unet, optimizer, train_dataloader)

    if accelerator.is_main_process:
        accelerator.init_trackers("dreambooth-lora", config={})

    global_step, first_epoch = 0, 0
    updates_per_epoch = max(1, len(train_dataloader) // args.gradient_accumulation_steps)
    if args.resume_from_checkpoint:
        path = Path(args.resume_from_checkpoint).name
        accelerator.load_state(os.path.join(args.output_dir, path))  # noqa: PTH118
        global_step = int(path.split("-")[1])
        first_epoch = global_step // updates_per_epoch

    for epoch in range(first_epoch, args.max_train_steps):
        unet.train()
        if args.train_text_encoder:
            text_encoder.train()
        for _step, batch in enumerate(train_dataloader):
            with accelerator.accumulate(unet):
                pixel_values = batch["pixel_values"].to(dtype=weight_dtype)

                if vae is not None:
                    # Pictures to latents
                    model_input = vae.encode(pixel_values).latent_dist.sample()
                    model_input = model_input * vae.config.scaling_factor
                else:
                    model_input = pixel_values

                noise = torch.randn_like(model_input)
                bsz, channels, _height, _width = model_input.shape
                # A timestep for each picture
                timesteps = torch.randint(
                    0, noise_scheduler.config.num_train_timesteps, (bsz,), device=model_input.device
                )
                timesteps = timesteps.long()

                noisy_model_input = noise_scheduler.add_noise(model_input, noise, timesteps)

                # What the prompt says
                if args.pre_compute_text_embeddings:
                    encoder_hidden_states = batch["input_ids"]
                else:
                    encoder_hidden_states = encode_prompt(
                        text_encoder,
                        batch["input_ids"],
                    )
                if accelerator.unwrap_model(unet).config.in_channels == channels * 2:
                    noisy_model_input = torch.cat([noisy_model_input, noisy_model_input], dim=1)
                class_labels = None

                # Predict the noise
                model_pred = unet(
                    noisy_model_input,
                    timesteps,
                    encoder_hidden_states,
                    class_labels=class_labels,
                    return_dict=False,
                )[0]

                if noise_scheduler.config.prediction_type == "epsilon":
                    target = noise
                elif noise_scheduler.config.prediction_type == "v_prediction":
                    target = noise_scheduler.get_velocity(model_input, noise, timesteps)
                else:
                    raise ValueError(f"Unknown prediction type {noise_scheduler.config.prediction_type}")

                if args.with_prior_preservation:
                    model_pred, model_pred_prior = torch.chunk(model_pred, 2, dim=0)
                    target, target_prior = torch.chunk(target, 2, dim=0)
                    loss = F.mse_loss(model_pred.float(), target.float(), reduction="mean")
                    prior_loss = F.mse_loss(model_pred_prior.float(), target_prior.float(), reduction="mean")
                    loss = loss + args.prior_loss_weight * prior_loss
                else:
                    loss = F.mse_loss(model_pred.float(), target.float(), reduction="mean")

                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(params_to_optimize, 1.0)
                optimizer.step()
                optimizer.zero_grad()

            if accelerator.sync_gradients:
                global_step += 1
                if accelerator.is_main_process and global_step % args.checkpointing_steps == 0:
                    accelerator.save_state(os.path.join(args.output_dir, f"checkpoint-{global_step}"))  # noqa: PTH118

            logs = {"loss": loss.detach().item()}
            accelerator.log(logs, step=global_step)
            if global_step >= args.max_train_steps:
                break

        if args.validation_epochs and epoch % args.validation_epochs == 0:
            validate(accelerator.unwrap_model(unet), tiny.make_scheduler())
        if global_step >= args.max_train_steps:
            break

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        unet = accelerator.unwrap_model(unet).to(torch.float32)
        text_encoder_layers = None
        if args.train_text_encoder:
            text_encoder_layers = get_peft_model_state_dict(accelerator.unwrap_model(text_encoder))
        StableDiffusionLoraLoaderMixin.save_lora_weights(
            save_directory=args.output_dir,
            unet_lora_layers=get_peft_model_state_dict(unet),
            text_encoder_lora_layers=text_encoder_layers,
        )
    accelerator.end_training()


if __name__ == "__main__":
    args = parse_args()
    main(args)
