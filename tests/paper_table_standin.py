"""Stands for `accelerate launch SCRIPT` and for `apt-hooks eval` in the tests of the paper's table: no model, no torch.

Each call appends a line to $STANDIN_CALLS: its arguments and its device. A training fails behind its first checkpoint
where `breaks.txt` is beside the photos.
"""

import contextlib
import datetime
import json
import os
import sys
from pathlib import Path

STARTED = datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone.utc)
SECONDS = 2.5  # a step


@contextlib.contextmanager
def alone(device, calls):
    """Fails where another process is on the device."""
    busy = calls.with_name(f"busy-{device}")
    busy.touch(exist_ok=False)
    try:
        yield
    finally:
        busy.unlink()


def train(options):
    assert "apt_hooks" in Path(next(a for a in sys.argv if a.endswith("_apt.py"))).read_text(encoding="utf-8")
    out, steps = Path(options["output_dir"]), int(options["max_train_steps"])
    done = max((int(path.name.split("-")[1]) for path in out.glob("checkpoint-*")), default=0)
    assert done == 0 or options["resume_from_checkpoint"] == "latest"
    first = int(options["checkpointing_steps"])
    (out / f"checkpoint-{first}").mkdir(exist_ok=True)
    if (Path(options["instance_data_dir"]) / "breaks.txt").exists():
        sys.exit("\rno memory is left\n")
    start = {"started": STARTED.isoformat(), **({"resumed_from": done} if done else {})}
    values = dict.fromkeys(
        ("loss_tuned", "loss_frozen", "loss_weight", "augmented", "l_mu", "l_sigma", "l_attn", "delta_noise"), 0.0
    )
    lines = [{"run": start}, *({"step": i + 1, "gamma": [0.0], "gap": [0.0], **values} for i in range(steps))]
    log = out / "pytorch_lora_weights-apt.jsonl"
    log.write_text("\n".join(map(json.dumps, lines)) + "\n")
    written = STARTED.timestamp() + (steps - done - 1) * SECONDS
    os.utime(log, (written, written))
    (out / "pytorch_lora_weights.safetensors").write_text(f"{out} {done}")


def evaluate(options, loras):
    out = Path(options["out"])
    names = ["base", *(path.stem for path in loras)]
    for name in names:
        (out / name).mkdir(exist_ok=True)
        for i in range(4 if name == "base" else 2):
            (out / name / f"{i}.png").touch()
    scores = {name: {"fid": {"value": 10.0 * i}, "clip_t": {"value": 0.3}} for i, name in enumerate(names)}
    metrics = {"fid": {"best": "lowest"}, "clip_t": {"best": "highest"}}
    content = {"scores": scores, "metrics": metrics, "sampling": {"steps": 50}}
    (out / "metrics.json").write_text(json.dumps(content))


def main():
    calls, device = Path(os.environ["STANDIN_CALLS"]), os.environ["CUDA_VISIBLE_DEVICES"]
    judging = sys.argv[1] == "eval"
    if judging:
        pairs = list(zip(sys.argv[2::2], sys.argv[3::2], strict=True))
    else:
        pairs = [tuple(a.split("=", 1)) for a in sys.argv if a.startswith("--") and "=" in a]
    options = {name.removeprefix("--"): value for name, value in pairs}
    with calls.open("a") as file:
        file.write(json.dumps({"judging": judging, "device": device, "options": options}) + "\n")
    with alone(device, calls):
        if judging:
            evaluate(options, [Path(value) for name, value in pairs if name == "--lora"])
        else:
            train(options)


main()
