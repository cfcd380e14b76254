"""Scores of pictures by CLIP, as DreamBooth's paper has them: CLIP-T for the prompt, CLIP-I for the subject."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from apt_hooks.errors import AptError
from apt_hooks.integrations.quiet import quiet

CLIP = "openai/clip-vit-base-patch32"
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_MEAN, _DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP's training


class ClipJudge:
    """Cosine similarities of pictures to a text, and to reference pictures.

    Args:
        references: folder of pictures of the subject.
        model: folder or name on the hub of a CLIP.

    Raises:
        AptError: no pictures there; a model that cannot be loaded.
    """

    def __init__(self, references: Path, model: str = CLIP) -> None:
        try:
            import transformers.utils.logging as logging
            from PIL import Image, ImageOps
            from safetensors import SafetensorError
            from transformers import AutoTokenizer, CLIPModel
        except ImportError as error:
            raise AptError(f'scores need transformers ({error}): pip install "apt-hooks[demo]"') from error
        files = [p for p in sorted(references.glob("*")) if p.suffix.lower() in PICTURES] if references.is_dir() else []
        if not files:
            raise AptError(f"--references {references}: no pictures there ({', '.join(PICTURES)})")
        try:
            with quiet(logging):
                kind: Any = CLIPModel
                self._model, info = kind.from_pretrained(model, output_loading_info=True)
                self._tokenizer = AutoTokenizer.from_pretrained(model)
            if missing := [key for key in info["missing_keys"] if not key.endswith("position_ids")]:
                raise ValueError(f"it lacks {missing[0]} and {len(missing) - 1} more")
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise AptError(
                f"--clip {model}: cannot be loaded; name a folder that holds a CLIP model of transformers, or let the "
                f"hub be reached once ({' '.join(str(error).split())[:150]})"
            ) from error
        self._model.to("cuda" if torch.cuda.is_available() else "cpu")
        try:
            photos = [ImageOps.exif_transpose(Image.open(path)) for path in files]
        except OSError as error:
            raise AptError(f"--references {references}: {error}") from error
        self._references = self._embed(photos)[0]

    def score(self, pictures: Sequence[Any], prompt: str) -> tuple[float, float]:
        """(text score, subject score) of PIL pictures: means of cosine similarities, the second over all pairs.

        Args:
            prompt: what the pictures should show, the identifier left out: CLIP does not know it.
        """
        images, text = self._embed(pictures, prompt)
        return (images @ text.T).mean().item(), (images @ self._references.T).mean().item()

    @torch.no_grad()
    def _embed(self, pictures: Sequence[Any], prompt: str = "") -> tuple[Tensor, Tensor]:
        from PIL import Image, ImageOps
        from torch import frombuffer, uint8

        side, device = self._model.config.vision_config.image_size, self._model.device
        tensors = []
        for picture in pictures:
            square = ImageOps.fit(picture.convert("RGB"), (side, side), Image.Resampling.BICUBIC)
            tensors.append(frombuffer(bytearray(square.tobytes()), dtype=uint8).view(side, side, 3))
        pixels = torch.stack(tensors).permute(0, 3, 1, 2).float() / 255
        mean, deviation = (torch.tensor(x)[:, None, None] for x in (_MEAN, _DEVIATION))
        words = self._tokenizer([prompt], truncation=True, return_tensors="pt").to(device)
        found = self._model(pixel_values=((pixels - mean) / deviation).to(device), **words)
        return F.normalize(found.image_embeds, dim=-1), F.normalize(found.text_embeds, dim=-1)
