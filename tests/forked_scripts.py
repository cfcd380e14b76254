"""Runs scripts, each in a fork of a process that has imported what they need: two seconds in place of twenty.

`python forked_scripts.py` reads jobs, a line of JSON each ([script, arguments, file for its output]), and
answers each with its exit status.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import sys
import traceback

import diffusers
import peft
import torch
import torchvision
import transformers
from diffusers import AutoencoderKL, FluxPipeline, StableDiffusionXLPipeline
from transformers import CLIPTextModel, T5EncoderModel

IMPORTED = (diffusers, peft, torchvision, transformers)
LOADED = (AutoencoderKL, FluxPipeline, StableDiffusionXLPipeline, CLIPTextModel, T5EncoderModel)  # when asked for


def run(script: str, arguments: list[str], output: str) -> int:
    """The exit status of a script that is run in a process of its own."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = [script, *arguments]
    status = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if end.code is not None and not isinstance(end.code, int):
            print(end.code)
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        print(run(*json.loads(line)), flush=True)
