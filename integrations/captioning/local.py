"""Captions from a vision-language model of transformers on this machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from apt_hooks.errors import AptError
from apt_hooks.integrations.library_logging import quiet

from .answers import BadAnswer, shorten

MAX_TOKENS = 512


class LocalModel:
    """A model that follows instructions about pictures, on the GPU in half precision where there is one.

    It decodes greedily, so the same photo gets the same caption, and a bad answer is not asked for twice.

    Args:
        model: its folder, or its name on the Hugging Face hub. Code that comes with a model is not run.

    Raises:
        AptError: transformers or a package that the model needs is missing, or it cannot be loaded.
    """

    def __init__(self, model: str) -> None:
        try:
            import transformers
            import transformers.utils.logging as logging
            from safetensors import SafetensorError
        except ImportError as error:
            raise AptError(f'--local needs transformers ({error}): pip install "apt-hooks[diffusers]"') from error
        self._quiet = lambda: quiet(logging)
        self._name = model
        try:
            with self._quiet():
                self._processor = transformers.AutoProcessor.from_pretrained(model)
                loaded = _kind(transformers).from_pretrained(model, torch_dtype=_dtype())
            self._model = loaded.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        except torch.cuda.OutOfMemoryError as error:
            raise self._too_large() from error
        except ImportError as error:
            raise AptError(f"--local {model}: needs a package that is missing ({shorten(str(error))})") from error
        except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
            raise AptError(
                f"--local {model}: cannot be loaded; name a folder that holds a vision-language model of transformers "
                "(config.json, its .safetensors, tokenizer and preprocessor_config.json), or let the hub be reached "
                f"once ({shorten(str(error), 150)})"
            ) from error

    def describe(self, picture: Any, prompt: str, read: Callable[[str], str]) -> str:
        """The caption of a picture; arguments as for `Endpoint.describe`.

        Raises:
            NoCaption: the answer is no caption, or does not end.
            AptError: the model takes no such question or fails at it, or the GPU is too small.
        """
        inputs = self._inputs(picture, prompt)
        try:
            with self._quiet(), torch.no_grad():
                found = self._model.generate(**inputs, max_new_tokens=MAX_TOKENS, do_sample=False)
        except torch.cuda.OutOfMemoryError as error:
            raise self._too_large() from error
        # Where model and processor do not fit together, each model fails in its own way.
        except (ValueError, TypeError, IndexError, RuntimeError) as error:
            raise AptError(f"--local {self._name}: fails at a photo ({shorten(str(error), 150)})") from error
        new = found[0, inputs["input_ids"].shape[1] :]
        if len(new) == MAX_TOKENS and int(new[-1]) not in self._ends():
            raise BadAnswer(f"the answer does not end within {MAX_TOKENS} tokens")
        return read(self._processor.decode(new, skip_special_tokens=True))

    def _inputs(self, picture: Any, prompt: str) -> dict[str, Any]:
        """What the model takes, where it is and in its precision."""
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
        try:
            text = self._processor.apply_chat_template(messages, add_generation_prompt=True)
            # Some templates write the token of the begin, which the tokenizer would write again.
            begin = getattr(getattr(self._processor, "tokenizer", None), "bos_token", None)
            twice = {"add_special_tokens": False} if begin and text.startswith(begin) else {}
            found = self._processor(text=[text], images=[picture], return_tensors="pt", **twice)
        except (ValueError, TypeError, AttributeError) as error:
            raise AptError(
                f"--local {self._name}: takes no instruction about a picture; name a vision-language model with a "
                f"chat template ({shorten(str(error), 150)})"
            ) from error

        device, dtype = self._model.device, self._model.dtype
        return {name: x.to(device, dtype if x.is_floating_point() else x.dtype) for name, x in found.items()}

    def _too_large(self) -> AptError:
        return AptError(
            f"--local {self._name}: the GPU's memory is too small; take a smaller model or a lower --max-side"
        )

    def _ends(self) -> set[int]:
        ends = self._model.generation_config.eos_token_id
        return set(ends) if isinstance(ends, (list, tuple)) else {ends}


def _kind(transformers: Any) -> Any:
    """Before 4.46 transformers knew the second name only."""
    new = getattr(transformers, "AutoModelForImageTextToText", None)
    return new if new is not None else transformers.AutoModelForVision2Seq


def _dtype() -> torch.dtype:
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
