"""Runs and steps made by hand, for tests of what is kept of them."""

import json
import math

import torch

from apt_hooks import AptConfig, AptObjective, AptStep
from apt_hooks.method.augmentation import Placement
from apt_hooks.training.run import AptRun

KEYS = [
    "step",
    "gamma",
    "gap",
    "loss_tuned",
    "loss_frozen",
    "loss_weight",
    "augmented",
    "l_mu",
    "l_sigma",
    "l_attn",
    "l_joint",
    "l_offset",
    "delta_noise",
]


GAMMAS = [0.5, 0.25] + [0.0] * 8


GAPS = [0.004, 0.002, -0.001] + [None] * 7


def make_run(folder, *, log="log.jsonl", seed=0, rank=0, augment_space="image", target="epsilon", **config):
    """A run around a model without attention, its regularizers off; logs into `folder`."""
    config = AptConfig(lambda_dist=0, lambda_attn=0, **config)
    objective = AptObjective(config, torch.nn.Linear(1, 1), torch.no_grad)
    path = None if log is None else folder / log
    return AptRun(objective, log_path=path, augment_space=augment_space, seed=seed, rank=rank, target=target)


def make_step(instances=2, **values):
    """A step of a batch of four; scalars not given are 0, those given as None are left out."""
    values = dict.fromkeys(KEYS[3:], 0.0) | values if instances else {}
    values = {name: torch.tensor(v) for name, v in values.items() if v is not None and name != "augmented"}
    gammas = torch.tensor(GAMMAS, dtype=torch.float64)
    gaps = torch.tensor([math.nan if gap is None else gap for gap in GAPS], dtype=torch.float64)
    return AptStep(torch.zeros(4), torch.ones(4), torch.zeros(()), gammas, gaps, instances, values)


def moved(count):
    return Placement(torch.ones(4), torch.zeros(4), torch.arange(4) < count)


def lines(path, key="step"):
    """The log's lines of steps, or of runs, read strictly: JSON has no NaN."""

    def refuse(constant):
        raise AssertionError(constant)

    found = [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]
    return [line for line in found if key in line]


def numbers(run):
    return tuple(torch.rand(3, generator=run.generator()).tolist())
