"""Small folders as `apt-hooks eval` writes them, for tests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PROMPTS = ("in the snow", "on the beach", "that is red", "in a city", "on a road")
SAMPLING = {"steps": 50, "guidance_scale": 7.5, "scheduler": "DDIMScheduler", "height": 64, "width": 64}
SECRET = "trained-by-"  # begins the name of every LoRA, so that no answer to a rater may hold it


def color_of(method: str, prompt: int, seed: int) -> tuple[int, int, int]:
    """Another one for each picture."""
    return sum(method.encode()) % 256, 40 * prompt % 256, 60 * seed % 256


def write_eval(
    folder: Path, loras: Sequence[str], *, seeds: Sequence[int] = (0, 1), side: int = 64, **changed: Any
) -> Path:
    """A finished evaluation; `changed` are keys of its manifest. Each picture's metadata names its LoRA."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    photos = folder.parent / "photos"
    photos.mkdir(parents=True, exist_ok=True)
    for number in range(2):
        Image.new("RGB", (90, 60), (250, 200 * number, 0)).save(photos / f"{number}.jpg")
    prompts = [{"prompt": f"a sks backpack {words}", "plain": f"a backpack {words}"} for words in PROMPTS]
    for method in ("base", *loras):
        (folder / method).mkdir(parents=True)
        notes = PngInfo()
        notes.add_text("lora", method)
        for prompt in range(len(prompts)):
            for seed in seeds:
                picture = Image.new("RGB", (side, side), color_of(method, prompt, seed))
                picture.save(folder / method / f"{prompt:03d}-{seed}.png", pnginfo=notes)
    manifest = {
        "format": 1,
        "model": "sd15",
        "loras": {name: f"/loras/{name}.safetensors" for name in loras},
        "references": [str(path) for path in sorted(photos.iterdir())],
        "prompts": prompts,
        "seeds": list(seeds),
        "sampling": SAMPLING,
        **changed,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder
