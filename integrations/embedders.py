"""CLIP and DINOv2, by transformers: pictures and texts as vectors whose cosines say how alike they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from apt_hooks.errors import AptError, why_not_imported
from apt_hooks.images import to_tensor

from .library_logging import quiet

CLIP, DINO, HPS = "openai/clip-vit-base-patch32", "facebook/dinov2-base", "adams-story/HPSv2-hf"
"""Names on the hub of the usual ones; the last is HPSv2's v2.0 (arXiv 2306.09341) as a CLIP model of transformers."""
_BATCH = 16
_CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # mean, deviation of its training
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Clip:
    """A CLIP model of transformers.

    Args:
        model: folder, or name on the Hugging Face hub.
        option: what the user names the model by, for errors.

    Raises:
        AptError: a missing package, or a model that cannot be loaded.
    """

    def __init__(self, model: str, option: str = "--clip") -> None:
        self.name = model
        self._model, self._tokenizer = _load(model, option, "CLIP", "CLIPModel", with_tokenizer=True)

    def images(self, pictures: Sequence[Any]) -> Tensor:
        """PIL pictures, cut to squares, as unit vectors [pictures, channels]."""
        side = self._model.config.vision_config.image_size
        return _embed(self._model, pictures, lambda p: _pixels(p, side, side, _CLIP), self._image_features)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Texts, cut at the model's longest, as unit vectors [texts, channels]."""

        def features(part: Sequence[str]) -> Tensor:
            longest = self._model.config.text_config.max_position_embeddings
            tokens = self._tokenizer(list(part), padding=True, truncation=True, max_length=longest, return_tensors="pt")
            model = self._model
            return model.text_projection(model.text_model(**tokens.to(model.device)).pooler_output)

        return _embed(self._model, texts, list, features)

    def _image_features(self, pixels: Tensor) -> Tensor:
        # Not get_image_features: what it returns differs between releases of transformers.
        model = self._model
        return model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)


class Dino:
    """A DINOv2 model of transformers. Arguments and errors as `Clip`."""

    def __init__(self, model: str, option: str = "--dino") -> None:
        self.name = model
        self._model, _ = _load(model, option, "DINOv2", "Dinov2Model")

    def images(self, pictures: Sequence[Any]) -> Tensor:
        """PIL pictures, the middle 224 of 256 pixels, as unit vectors [pictures, channels]: the class token's."""

        def features(pixels: Tensor) -> Tensor:
            return self._model(pixel_values=pixels).last_hidden_state[:, 0]

        return _embed(self._model, pictures, lambda p: _pixels(p, 256, 224, _IMAGENET), features)


def _load(model: str, option: str, what: str, kind: str, *, with_tokenizer: bool = False) -> tuple[Any, Any]:
    try:
        import PIL  # noqa: F401
        import transformers
        import transformers.utils.logging as logging
        from safetensors import SafetensorError
    except ImportError as error:
        raise AptError(f'scores need transformers and Pillow ({error}): pip install "apt-hooks[eval]"') from error
    try:
        with quiet(logging):
            loaded, info = getattr(transformers, kind).from_pretrained(model, output_loading_info=True)
            tokenizer = transformers.AutoTokenizer.from_pretrained(model) if with_tokenizer else None
        if missing := [key for key in info["missing_keys"] if not key.endswith("position_ids")]:
            raise ValueError(f"it lacks {missing[0]} and {len(missing) - 1} more")
    except ImportError as error:  # of what transformers imports lazily
        raise AptError(f"{what} cannot be imported from transformers ({why_not_imported(error)})") from error
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise AptError(
            f"{option} {model}: cannot be loaded as a {what} model of transformers; without network, download it "
            f"elsewhere (hf download NAME --local-dir FOLDER) and name the folder by {option} "
            f"({' '.join(str(error).split())[:150]})"
        ) from error
    return loaded.float().eval(), tokenizer


def _pixels(pictures: Sequence[Any], resized: int, side: int, statistics: tuple[Sequence[float], ...]) -> Tensor:
    """[pictures, 3, side, side], normalized: the shorter side brought to `resized`, then the middle cut out."""
    from PIL import Image, ImageOps

    squares = []
    for picture in pictures:
        square = ImageOps.fit(picture.convert("RGB"), (resized, resized), Image.Resampling.BICUBIC)
        cut = (resized - side) // 2
        squares.append(to_tensor(square)[:, cut : cut + side, cut : cut + side])
    mean, deviation = (torch.tensor(values)[:, None, None] for values in statistics)
    return (torch.stack(squares).float() / 255 - mean) / deviation


@torch.no_grad()
def _embed(
    model: Any, items: Sequence[Any], prepare: Callable[[Sequence[Any]], Any], features: Callable[[Any], Tensor]
) -> Tensor:
    found = []
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    try:
        for start in range(0, len(items), _BATCH):
            batch = prepare(items[start : start + _BATCH])
            found.append(features(batch.to(model.device) if isinstance(batch, Tensor) else batch))
        return F.normalize(torch.cat(found), dim=-1).cpu()
    finally:
        model.to("cpu")  # its memory is the next one's
