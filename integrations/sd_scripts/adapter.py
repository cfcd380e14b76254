"""What the patched lines of sd-scripts call: reading the configuration and making the trainer."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from typing import Any

from apt_hooks.config import AptConfig
from apt_hooks.errors import AptError, errors_in_one_line

from .trainer import AptTrainer

logger = logging.getLogger("apt_hooks")


def take_section(config: dict[str, Any], parser: argparse.ArgumentParser) -> None:
    """Move `[apt]` out of the parsed training TOML, which the trainer flattens into its arguments.

    Ends the program with one line where the script is none that apt-hooks supports.
    """
    if "apt" not in config:
        found = next(name for name in config if name.lower() == "apt")
        sys.exit(f"apt-hooks: error: --config_file has a section [{found}]; write [apt], in small letters")
    section = config.pop("apt")
    if not any(action.dest == "apt_config" for action in parser._actions):
        sys.exit(
            f"apt-hooks: error: {parser.prog} has an [apt] section in its --config_file, but only train_network.py, "
            "sdxl_train_network.py and the other *_train_network.py can take one, once patched: run `apt-hooks patch "
            "sd-scripts` or take the section out"
        )
    parser.set_defaults(apt_section=section)


def apt_trainer(trainer: Any, args: argparse.Namespace) -> Any:
    """The trainer to use in place of `trainer`: one that does APT, or `trainer` itself where `enabled` is false.

    Ends the program with one line where the configuration or the trainer's arguments rule APT out.
    """
    with errors_in_one_line():
        section = args.__dict__.pop("apt_section", None)
        if section is not None and args.apt_config:
            raise AptError(
                f"both an [apt] section in --config_file and --apt_config {args.apt_config} are given; keep one"
            )
        if args.apt_config:
            config = AptConfig.from_toml(args.apt_config)
        elif isinstance(section, dict):
            config = AptConfig.from_mapping(section)
        else:
            raise AptError(f"apt in --config_file must be a section [apt]; found apt = {section!r}")
        if not config.enabled:
            logger.info("apt-hooks: [apt] enabled = false, training without APT")
            return trainer
        _check_arguments(args, config)
        kind = type(trainer)
        made = type(f"Apt{kind.__name__}", (AptTrainer, kind), {})()
        made.apt_config = config
        return made


def without_section(args: argparse.Namespace) -> None:
    """Say that nothing asks for APT, where it was launched for that."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        found = (
            f"{args.config_file.removesuffix('.toml')}.toml has no [apt] section"
            if args.config_file
            else "there is no --config_file"
        )
        print(f"apt-hooks: {found} and --apt_config is not given: training without APT")


def _check_arguments(args: argparse.Namespace, config: AptConfig) -> None:
    for name, reason in {
        "torch_compile": "hooks are lost in a compiled model",
        "compile": "hooks are lost in compiled blocks",
        "deepspeed": "its engine owns the model",
    }.items():
        if getattr(args, name, False):
            raise AptError(f"--{name} cannot be used with APT ({reason}); leave it out, or set [apt] enabled = false")
    stabilizes = config.regularizer == "separate" and config.lambda_dist > 0
    compares_blocks = stabilizes and config.representation_source == "block"
    if compares_blocks and getattr(args, "cpu_offload_checkpointing", False):
        raise AptError(
            "--cpu_offload_checkpointing moves what a block gives to the CPU, where [apt] representation_source = "
            '"block" would compare it; set that to "self_attention"'
        )
    cached = args.cache_latents or args.cache_latents_to_disk
    if config.augmentation and not config.monitor_only and config.augment_space == "image" and cached:
        raise AptError(
            '[apt] augment_space = "image" needs the images, which cached latents leave out: drop cache_latents '
            '(and cache_latents_to_disk), or set augment_space = "latent" (an approximation)'
        )
