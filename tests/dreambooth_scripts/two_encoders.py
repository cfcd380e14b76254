"""Trains a LoRA with two text encoders: the structure of diffusers' train_dreambooth_lora_sdxl.py, and nothing else."""

import argparse
import functools
import os
from pathlib import Path

import tiny
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from diffusers.loaders import StableDiffusionXLLoraLoaderMixin
from diffusers.training_utils import compute_snr
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file


def parse_args():
    parser = argparse.ArgumentParser()
    parser.add_argument("--output_dir", default="out")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--max_train_steps", type=int, default=4)
    parser.add_argument("--train_batch_size", type=int, default=2)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--prediction_type", default="epsilon")
    parser.add_argument("--train_text_encoder", action="store_true")
    parser.add_argument("--with_prior_preservation", action="store_true")
    parser.add_argument("--prior_loss_weight", type=float, default=1.0)
    parser.add_argument("--snr_gamma", type=float, default=None)
    parser.add_argument("--do_edm_style_training", action="store_true")
    parser.add_argument("--output_kohya_format", action="store_true")
    parser.add_argument("--instance_prompt", default=tiny.INSTANCE_PROMPT)
    parser.add_argument("--class_prompt", default=tiny.CLASS_PROMPT)
    parser.add_argument("--captions", nargs="*", default=None)
    parser.add_argument("--resume_from_checkpoint", default=None)
    return parser.parse_args()


def tokenize_prompt(tokenizer, prompt):
    return tokenizer(prompt, truncation=True, padding="max_length", return_tensors="pt").input_ids


def encode_prompt(text_encoders, tokenizers, prompt, text_input_ids_list=None):
    if tokenizers is not None:
        text_input_ids_list = [tokenize_prompt(tokenizer, prompt) for tokenizer in tokenizers]
    states = [encoder(ids) for encoder, ids in zip(text_encoders, text_input_ids_list, strict=True)]
    return torch.cat([s[0] for s in states], dim=-1), states[1].pooler_output


def main(args):
    accelerator = Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])
    set_seed(0)
    noise_scheduler = tiny.make_scheduler(args.prediction_type)
    vae, text_encoder_one, text_encoder_two = tiny.make_vae(), tiny.make_text_encoder(), tiny.make_text_encoder()
    tokenizer_one, tokenizer_two = tiny.make_tokenizer(), tiny.make_tokenizer()
    unet = tiny.make_unet(
        2 * tiny.TEXT_WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=tiny.TEXT_WIDTH + 6 * 4,
    )
    set_seed(args.seed)
    for model in (unet, vae, text_encoder_one, text_encoder_two):
        model.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
    if args.train_text_encoder:
        for encoder in (text_encoder_one, text_encoder_two):
            encoder.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "v_proj"]))

    train_dataset = tiny.Photos(args.captions or [args.instance_prompt], args.class_prompt)
    train_dataloader = torch.utils.data.DataLoader(
        train_dataset,
        batch_size=args.train_batch_size,
        shuffle=True,
        collate_fn=functools.partial(tiny.collate, with_prior_preservation=args.with_prior_preservation),
    )
    trained = [p for m in (unet, text_encoder_one, text_encoder_two) for p in m.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate)

    if not args.train_text_encoder:
        tokenizers, text_encoders = [tokenizer_one, tokenizer_two], [text_encoder_one, text_encoder_two]

        def compute_text_embeddings(prompt, text_encoders, tokenizers):
            with torch.no_grad():
                prompt_embeds, pooled_prompt_embeds = encode_prompt(text_encoders, tokenizers, prompt)
            return prompt_embeds.to(accelerator.device), pooled_prompt_embeds.to(accelerator.device)

    # Prompts that do not change are encoded once, if the text encoders are not trained.
    if not args.train_text_encoder and not args.captions:
        instance_states, instance_pooled = compute_text_embeddings(args.instance_prompt, text_encoders, tokenizers)
    if args.with_prior_preservation and not args.train_text_encoder:
        class_states, class_pooled = compute_text_embeddings(args.class_prompt, text_encoders, tokenizers)
    if not args.train_text_encoder and not args.captions:
        del tokenizers, text_encoders

    if not args.captions:
        if not args.train_text_encoder:
            prompt_embeds = instance_states
            unet_add_text_embeds = instance_pooled
            if args.with_prior_preservation:
                prompt_embeds = torch.cat([prompt_embeds, class_states], dim=0)
                unet_add_text_embeds = torch.cat([unet_add_text_embeds, class_pooled], dim=0)
        else:
            tokens_one = tokenize_prompt(tokenizer_one, args.instance_prompt)
            tokens_two = tokenize_prompt(tokenizer_two, args.instance_prompt)
            if args.with_prior_preservation:
                tokens_one = torch.cat([tokens_one, tokenize_prompt(tokenizer_one, args.class_prompt)], dim=0)
                tokens_two = torch.cat([tokens_two, tokenize_prompt(tokenizer_two, args.class_prompt)], dim=0)

    if args.train_text_encoder:
        unet, text_encoder_one, text_encoder_two, optimizer, train_dataloader = accelerator.prepare(
            unet, text_encoder_one, text_encoder_two, optimizer, train_dataloader
        )
    else:
        unet, optimizer, train_dataloader = accelerator.prepare(unet, optimizer, train_dataloader)

    global_step = 0
    if args.resume_from_checkpoint:
        accelerator.load_state(args.resume_from_checkpoint)
    while global_step < args.max_train_steps:
        unet.train()
        for _step, batch in enumerate(train_dataloader):
            with accelerator.accumulate(unet):
                pixel_values = batch["pixel_values"].to(dtype=vae.dtype)
                prompts = batch["input_ids"]

                if args.captions:
                    if not args.train_text_encoder:
                        prompt_embeds, unet_add_text_embeds = compute_text_embeddings(
                            prompts, text_encoders, tokenizers
                        )
                    else:
                        tokens_one = tokenize_prompt(tokenizer_one, prompts)
                        tokens_two = tokenize_prompt(tokenizer_two, prompts)

                model_input = vae.encode(pixel_values).latent_dist.sample()
                model_input = model_input * vae.config.scaling_factor

                noise = torch.randn_like(model_input)
                bsz = model_input.shape[0]
                if not args.do_edm_style_training:
                    timesteps = torch.randint(
                        0, noise_scheduler.config.num_train_timesteps, (bsz,), device=model_input.device
                    )
                    timesteps = timesteps.long()
                else:
                    indices = torch.randint(0, noise_scheduler.config.num_train_timesteps, (bsz,))
                    timesteps = noise_scheduler.timesteps[indices].to(device=model_input.device)

                noisy_model_input = noise_scheduler.add_noise(model_input, noise, timesteps)
                if args.do_edm_style_training:
                    inp_noisy_latents = noisy_model_input / 2
                add_time_ids = torch.tensor([[16.0, 16.0, 0.0, 0.0, 16.0, 16.0]]).repeat(bsz, 1)
                repeats = bsz // 2 if args.with_prior_preservation else bsz
                if args.captions:
                    repeats = 1

                # Predict the noise
                if not args.train_text_encoder:
                    conditions = {
                        "time_ids": add_time_ids,
                        "text_embeds": unet_add_text_embeds.repeat(repeats, 1),
                    }
                    prompt_embeds_input = prompt_embeds.repeat(repeats, 1, 1)
                    model_pred = unet(
                        inp_noisy_latents if args.do_edm_style_training else noisy_model_input,
                        timesteps,
                        prompt_embeds_input,
                        added_cond_kwargs=conditions,
                        return_dict=False,
                    )[0]
                else:
                    conditions = {"time_ids": add_time_ids}
                    prompt_embeds, pooled_prompt_embeds = encode_prompt(
                        text_encoders=[text_encoder_one, text_encoder_two],
                        tokenizers=None,
                        prompt=None,
                        text_input_ids_list=[tokens_one, tokens_two],
                    )
                    conditions.update({"text_embeds": pooled_prompt_embeds.repeat(repeats, 1)})
                    prompt_embeds_input = prompt_embeds.repeat(repeats, 1, 1)
                    model_pred = unet(
                        inp_noisy_latents if args.do_edm_style_training else noisy_model_input,
                        timesteps,
                        prompt_embeds_input,
                        added_cond_kwargs=conditions,
                        return_dict=False,
                    )[0]

                weighting = None
                if args.do_edm_style_training:
                    model_pred = model_pred * 2 + noisy_model_input
                    weighting = torch.ones(bsz)

                if noise_scheduler.config.prediction_type == "epsilon":
                    target = model_input if args.do_edm_style_training else noise
                else:
                    target = noise_scheduler.get_velocity(model_input, noise, timesteps)

                if args.with_prior_preservation:
                    model_pred, model_pred_prior = torch.chunk(model_pred, 2, dim=0)
                    target, target_prior = torch.chunk(target, 2, dim=0)
                    if weighting is not None:
                        prior_loss = torch.mean((model_pred_prior.float() - target_prior.float()) ** 2)
                    else:
                        prior_loss = F.mse_loss(model_pred_prior.float(), target_prior.float(), reduction="mean")

                if args.snr_gamma is None:
                    loss = F.mse_loss(model_pred.float(), target.float(), reduction="mean")
                else:
                    snr = compute_snr(noise_scheduler, timesteps)[: len(target)]
                    weights = torch.stack([snr, args.snr_gamma * torch.ones_like(snr)], dim=1).min(dim=1)[0] / snr
                    loss = F.mse_loss(model_pred.float(), target.float(), reduction="none")
                    loss = loss.mean(dim=list(range(1, len(loss.shape)))) * weights
                    loss = loss.mean()

                if args.with_prior_preservation:
                    loss = loss + args.prior_loss_weight * prior_loss

                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()

            if accelerator.sync_gradients:
                global_step += 1
                if global_step % 500 == 0:
                    accelerator.save_state(os.path.join(args.output_dir, f"checkpoint-{global_step}"))  # noqa: PTH118
            logs = {"loss": loss.detach().item()}
            accelerator.log(logs, step=global_step)
            if global_step >= args.max_train_steps:
                break

    if accelerator.is_main_process:
        layers = {"unet_lora_layers": get_peft_model_state_dict(accelerator.unwrap_model(unet))}
        if args.train_text_encoder:
            one, two = (accelerator.unwrap_model(m) for m in (text_encoder_one, text_encoder_two))
            layers["text_encoder_lora_layers"] = get_peft_model_state_dict(one)
            layers["text_encoder_2_lora_layers"] = get_peft_model_state_dict(two)
        StableDiffusionXLLoraLoaderMixin.save_lora_weights(save_directory=args.output_dir, **layers)
        if args.output_kohya_format:
            saved = load_file(Path(args.output_dir) / "pytorch_lora_weights.safetensors")
            save_file(saved, Path(args.output_dir) / "pytorch_lora_weights_kohya.safetensors")
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())
