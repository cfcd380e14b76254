"""Trains a LoRA of a transformer by flow matching: the structure of diffusers' scripts for such, and nothing else."""

import argparse
import copy
import functools
import os
from pathlib import Path

import tiny
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.loaders import SD3LoraLoaderMixin
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict


def parse_args():
    parser = argparse.ArgumentParser()
    parser.add_argument("--output_dir", default="out")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--max_train_steps", type=int, default=4)
    parser.add_argument("--train_batch_size", type=int, default=2)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--weighting_scheme", default="logit_normal")
    parser.add_argument("--precondition_outputs", type=int, default=0)
    parser.add_argument("--cache_latents", action="store_true")
    parser.add_argument("--train_text_encoder", action="store_true")
    parser.add_argument("--with_prior_preservation", action="store_true")
    parser.add_argument("--prior_loss_weight", type=float, default=1.0)
    parser.add_argument("--instance_prompt", default=tiny.INSTANCE_PROMPT)
    parser.add_argument("--class_prompt", default=tiny.CLASS_PROMPT)
    parser.add_argument("--resume_from_checkpoint", default=None)
    return parser.parse_args()


def encode_prompt(text_encoder, tokenizer, prompt):
    ids = tokenizer(prompt, truncation=True, padding="max_length", return_tensors="pt").input_ids
    states = text_encoder(ids)
    return states[0], states.pooler_output


def to_sequence(latents):
    """[batch, channels, 1, height, width], as of a video of one frame, to pictures, as some models are given them."""
    return latents.unsqueeze(2).flatten(1, 2)


def main(args):
    accelerator = Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])
    set_seed(0)
    noise_scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    noise_scheduler_copy = copy.deepcopy(noise_scheduler)
    vae, text_encoder, tokenizer = tiny.make_vae(), tiny.make_text_encoder(), tiny.make_tokenizer()
    transformer = tiny.make_transformer()
    set_seed(args.seed)
    for model in (transformer, vae, text_encoder):
        model.requires_grad_(False)
    transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
    if args.train_text_encoder:
        text_encoder.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "v_proj"]))

    def get_sigmas(timesteps, n_dim=4, dtype=torch.float32):
        sigmas = noise_scheduler_copy.sigmas.to(dtype=dtype)
        indices = [(noise_scheduler_copy.timesteps == t).nonzero().item() for t in timesteps]
        return sigmas[indices].view(-1, *[1] * (n_dim - 1))

    train_dataset = tiny.Photos([args.instance_prompt], args.class_prompt)
    train_dataloader = torch.utils.data.DataLoader(
        train_dataset,
        batch_size=args.train_batch_size,
        shuffle=True,
        collate_fn=functools.partial(tiny.collate, with_prior_preservation=args.with_prior_preservation),
    )
    trained = [p for m in (transformer, text_encoder) for p in m.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate)

    if not args.train_text_encoder:

        def compute_text_embeddings(prompt, text_encoder, tokenizer):
            with torch.no_grad():
                prompt_embeds, pooled_prompt_embeds = encode_prompt(text_encoder, tokenizer, prompt)
            return prompt_embeds.to(accelerator.device), pooled_prompt_embeds.to(accelerator.device)

        prompt_embeds, pooled_prompt_embeds = compute_text_embeddings(args.instance_prompt, text_encoder, tokenizer)
        if args.with_prior_preservation:
            class_embeds, class_pooled = compute_text_embeddings(args.class_prompt, text_encoder, tokenizer)
    scaling_factor, shift_factor = vae.config.scaling_factor, 0.1
    if args.cache_latents:
        latents_cache = []
        for batch in train_dataloader:
            with torch.no_grad():
                batch["pixel_values"] = batch["pixel_values"].to(accelerator.device, dtype=vae.dtype)
                latents_cache.append(vae.encode(batch["pixel_values"]).latent_dist)
        del vae

    if args.train_text_encoder:
        transformer, text_encoder, optimizer, train_dataloader = accelerator.prepare(
            transformer, text_encoder, optimizer, train_dataloader
        )
    else:
        transformer, optimizer, train_dataloader = accelerator.prepare(transformer, optimizer, train_dataloader)

    global_step = 0
    if args.resume_from_checkpoint:
        accelerator.load_state(args.resume_from_checkpoint)
    while global_step < args.max_train_steps:
        transformer.train()
        for step, batch in enumerate(train_dataloader):
            with accelerator.accumulate([transformer]):
                prompts = batch["input_ids"]
                if args.train_text_encoder:
                    step_embeds, step_pooled = encode_prompt(text_encoder, tokenizer, prompts)
                else:
                    own = len(prompts) // 2 if args.with_prior_preservation else len(prompts)
                    step_embeds = prompt_embeds.repeat(own, 1, 1)
                    step_pooled = pooled_prompt_embeds.repeat(own, 1)
                    if args.with_prior_preservation:
                        step_embeds = torch.cat([step_embeds, class_embeds.repeat(own, 1, 1)])
                        step_pooled = torch.cat([step_pooled, class_pooled.repeat(own, 1)])

                if args.cache_latents:
                    model_input = latents_cache[step].sample()
                else:
                    pixel_values = batch["pixel_values"].to(dtype=vae.dtype)
                    model_input = vae.encode(pixel_values).latent_dist.sample()
                model_input = (model_input - shift_factor) * scaling_factor

                noise = torch.randn_like(model_input)
                bsz = model_input.shape[0]
                u = compute_density_for_timestep_sampling(
                    weighting_scheme=args.weighting_scheme,
                    batch_size=bsz,
                    logit_mean=0.0,
                    logit_std=1.0,
                    mode_scale=1.3,
                )
                indices = (u * noise_scheduler_copy.config.num_train_timesteps).long()
                timesteps = noise_scheduler_copy.timesteps[indices].to(device=model_input.device)
                sigmas = get_sigmas(timesteps, n_dim=model_input.ndim, dtype=model_input.dtype)
                noisy_model_input = (1.0 - sigmas) * model_input + sigmas * noise

                # What the model is given and what it gives have another form than the latents.
                given = to_sequence(noisy_model_input)
                model_pred = transformer(
                    hidden_states=given,
                    timestep=timesteps,
                    encoder_hidden_states=step_embeds,
                    pooled_projections=step_pooled,
                    return_dict=False,
                )[0]
                model_pred = model_pred.view(noisy_model_input.shape)
                if args.precondition_outputs:
                    model_pred = model_pred * (-sigmas) + noisy_model_input

                weighting = compute_loss_weighting_for_sd3(weighting_scheme=args.weighting_scheme, sigmas=sigmas)
                target = noise - model_input
                if args.precondition_outputs:
                    target = model_input

                if args.with_prior_preservation:
                    model_pred, model_pred_prior = torch.chunk(model_pred, 2, dim=0)
                    target, target_prior = torch.chunk(target, 2, dim=0)
                    weighting, weighting_prior = torch.chunk(weighting, 2, dim=0)
                    prior_loss = weighting_prior.float() * (model_pred_prior.float() - target_prior.float()) ** 2
                    prior_loss = prior_loss.flatten(1).mean(dim=1).mean()
                loss = (weighting.float() * (model_pred.float() - target.float()) ** 2).flatten(1).mean(dim=1)
                loss = loss.mean()
                if args.with_prior_preservation:
                    loss = loss + args.prior_loss_weight * prior_loss

                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()

            if accelerator.sync_gradients:
                global_step += 1
                if global_step == 2:
                    accelerator.save_state(os.path.join(args.output_dir, f"checkpoint-{global_step}"))  # noqa: PTH118
            logs = {"loss": loss.detach().item()}
            accelerator.log(logs, step=global_step)
            if global_step >= args.max_train_steps:
                break

    if accelerator.is_main_process:
        Path(args.output_dir).mkdir(exist_ok=True)
        layers = {"transformer_lora_layers": get_peft_model_state_dict(accelerator.unwrap_model(transformer))}
        if args.train_text_encoder:
            encoder = accelerator.unwrap_model(text_encoder)
            layers["text_encoder_lora_layers"] = get_peft_model_state_dict(encoder)
        SD3LoraLoaderMixin.save_lora_weights(save_directory=args.output_dir, **layers)
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())
