"""A run's state in a trainer's state folder: what a resumed run goes on from."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from ..errors import AptError
from ..files import write_atomically
from ..hooks.starting_weights import from_file, to_bytes
from .run import AptRun

logger = logging.getLogger("apt_hooks")

STATE_FILE = "apt-hooks.json"
START_FILE = "apt-hooks-start.pt"
FORMAT = 1


def save_state(run: AptRun, folder: str | Path) -> None:
    """Write the state into a trainer's state folder, as `apt-hooks.json`.

    With `reference = "start"` the weights that the training began from are beside it, in `apt-hooks-start.pt`.
    """
    if run.objective.indicator.is_within_step:
        logger.warning(
            "apt-hooks: %s is saved in the middle of step %d: the batches so far are in no indicator, as their "
            "gradients are in no state",
            folder,
            run.step + 1,
        )
    run.log.flush()
    objective, reference = run.objective.state_dict(), run.objective.reference
    state = {
        "format": FORMAT,
        "step": run.step,
        "batches": objective["steps"],
        "indicator_units": run.indicator_units,
        "reference": reference.kind,
        "indicator": objective["indicator"],
    }
    start = reference.saved_start if reference.start is None else reference.start.named()
    if start is not None:
        write_atomically(Path(folder) / START_FILE, to_bytes(start))
    write_atomically(Path(folder) / STATE_FILE, json.dumps(state, indent=1).encode())


def load_state(run: AptRun, folder: str | Path) -> bool:
    """Take over the state of `save_state`; a folder without one is warned about and changes nothing.

    Raises:
        AptError: the file is broken, of other bins, of other units or of another reference; `reference = "start"`,
            and the folder has not the weights that the training began from.
    """
    path = Path(folder) / STATE_FILE
    if not path.exists():
        if run.objective.config.reference == "start":
            raise AptError(
                f'{folder}: [apt] reference = "start" needs the weights that the training began from, and this '
                f'state has no {STATE_FILE}, it was saved without apt-hooks; resume with reference = "base", or '
                "begin a new run from its LoRA"
            )
        logger.warning(
            "apt-hooks: %s has no %s, it was saved without apt-hooks; the overfitting indicator starts anew",
            folder,
            STATE_FILE,
        )
        return False
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        if state["format"] != FORMAT:
            raise AptError(f"has format {state['format']!r}, this apt-hooks reads {FORMAT}; update apt-hooks")
        units = state.get("indicator_units", run.target)  # as they were before there was a choice
        if units != run.indicator_units:
            raise AptError(
                f"the saved indicator is of errors of {units}, this run's of {run.indicator_units}: resume with "
                f'[apt] indicator_space = "{"target" if units == run.target else "epsilon"}", or delete the saved '
                "state to start the indicator anew"
            )
        own, saved = run.objective.reference.kind, state.get("reference", "base")
        if saved != own:
            raise AptError(
                f'the saved indicator is of reference = "{saved}", this run\'s of "{own}": resume with [apt] '
                f'reference = "{saved}", or begin a new run from its LoRA'
            )
        step, batches = int(state["step"]), int(state["batches"])
        # Before the first batch the LoRA of the state is what the training begins from.
        start = from_file(path.with_name(START_FILE)) if own == "start" and batches else None
        run.objective.load_state_dict({"steps": batches, "indicator": state["indicator"]})
    except AptError as error:
        raise AptError(f"{path}: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise AptError(f"{path}: no state of apt-hooks ({error!r}); delete it to start the indicator anew") from error
    run.step, run.resumed = step, True
    if run.checkpoints is not None:
        run.checkpoints.resumed(step)
    run.objective.reference.start, run.objective.reference.saved_start = None, start
    return True
