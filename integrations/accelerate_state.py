"""What every trainer built on accelerate needs: the run is announced, and its state goes with the accelerator's."""

from __future__ import annotations

import logging
from typing import Any

from apt_hooks.errors import errors_in_one_line
from apt_hooks.training.resume import load_state, save_state
from apt_hooks.training.run import AptRun

logger = logging.getLogger("apt_hooks")


def attach(run: AptRun, accelerator: Any) -> None:
    """Print the start line; save and load the run's state whenever the accelerator's is.

    The state is a file of its own in the state folder. A custom checkpoint object would be numbered, and accelerate
    refuses to load a folder that has another number of them, that is one saved without APT.
    """

    def save(models: Any, weights: Any, folder: str) -> None:
        if accelerator.is_main_process:
            save_state(run, folder)

    def load(models: Any, folder: str) -> None:
        with errors_in_one_line():
            loaded = load_state(run, folder)
        if loaded:
            logger.info("apt-hooks: the indicator goes on from step %d", run.step)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
    accelerator.print(run.start_line())
