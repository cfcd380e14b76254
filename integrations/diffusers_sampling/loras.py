"""Several LoRAs on one pipeline, of which one takes part at a time."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from apt_hooks.errors import AptError
from apt_hooks.integrations.peft import adapter_layers, unload_adapters
from apt_hooks.integrations.quiet import quiet

LoraFile = str | Path


class Loras:
    """LoRA files of kohya's or diffusers' format, loaded on a pipeline that has none; `close` leaves it as it was.

    In between the pipeline is to be used inside of `active` only.

    Raises:
        AptError: a pipeline that has LoRAs; a file that cannot be read, is no LoRA, or is one of another base model.
    """

    def __init__(self, pipeline: Any, files: Mapping[str, LoraFile]) -> None:
        self.pipeline = pipeline
        self._models = [m for m in (getattr(pipeline, n, None) for n in _MODELS) if m is not None]
        if adapter_layers(*self._models):
            raise AptError("the pipeline has LoRAs loaded already: call unload_lora_weights() first")
        self._trained = [p for model in self._models for p in model.parameters() if p.requires_grad]
        self._open = True
        self._active: str | None = None
        try:
            for name, path in files.items():
                self._load(name, Path(path))
            self._switch(None)
        except BaseException:
            self.close()
            raise

    @contextlib.contextmanager
    def active(self, name: str | None) -> Iterator[None]:
        """Inside, the LoRA of this name takes part, and no other; None: the base model. May be nested."""
        before = self._active
        self._switch(name)
        try:
            yield
        finally:
            self._switch(before)

    def _switch(self, name: str | None) -> None:
        if name is not None:
            self.pipeline.set_adapters([_adapter(name)])
        for layer in adapter_layers(*self._models):
            object.__setattr__(layer, "_disable_adapters", name is None)
        self._active = name

    def close(self) -> None:
        """Take them off; may be called again."""
        if not self._open:
            return
        self._open = False
        unload_adapters(self.pipeline, *self._models)
        for parameter in self._trained:  # peft freezes what it is put on
            parameter.requires_grad_(True)

    def __enter__(self) -> Loras:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def _load(self, name: str, path: Path) -> None:
        import diffusers.utils.logging as logging
        import transformers.utils.logging as transformers_logging
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        check_file(path)
        try:
            tensors = load_file(path)
        except OSError as error:
            raise AptError(f"{path}: cannot be read: {error.strerror or error}") from error
        except SafetensorError as error:
            raise AptError(f"{path}: is no safetensors file ({error})") from error
        for part, name_of_it in _UNSUPPORTED.items():
            if any(part in key for key in tensors):
                raise AptError(f"{path}: is a {name_of_it}, which diffusers does not load; LoRA alone is supported")
        if not any("lora" in key.lower() for key in tensors):
            raise AptError(f"{path}: is no LoRA, its tensors are named like {next(iter(tensors), 'nothing')!r}")
        try:
            layers = sum(any(key.endswith(end) for end in _DOWN) for key in tensors)
            with quiet(logging), quiet(transformers_logging), warnings.catch_warnings():
                logging.set_verbosity(logging.CRITICAL)  # its errors are told in one line below
                warnings.simplefilter("ignore")  # that it is the second adapter, for example
                # Some releases of peft draw the weights that the file then replaces.
                with torch.random.fork_rng(range(torch.cuda.device_count())):
                    self.pipeline.load_lora_weights(tensors, adapter_name=_adapter(name))
        except torch.cuda.OutOfMemoryError:
            raise
        # Each release of diffusers and peft fails at another place, in another way.
        except Exception as error:
            raise AptError(_misfit(path, self.pipeline, str(error))) from error
        loaded = sum(_adapter(name) in getattr(layer, "lora_A", ()) for layer in adapter_layers(*self._models))
        if loaded < layers:
            raise AptError(_misfit(path, self.pipeline, f"{layers - loaded} of its {layers} layers are not there"))


def _adapter(name: str) -> str:
    """A LoRA's name for peft, to which some words, such as "type", are taken."""
    return f"apt_hooks_{name}"


def named(paths: Sequence[Path], taken: Sequence[str] = ()) -> dict[str, LoraFile]:
    """LoRA files by names that are folders' names too: the file's, and as many folders' as tell them apart.

    Args:
        taken: names that none of them may have.

    Raises:
        AptError: a file that is not there, or is named twice.
    """
    for path in paths:
        check_file(path)
    parts = [path.resolve().with_suffix("").parts for path in paths]
    for i, part in enumerate(parts):
        if part in parts[:i]:
            raise AptError(f"--lora {paths[i]}: is named twice")
    length = 1
    while len({part[-length:] for part in parts}) < len(parts):
        length += 1
    names = ["_".join(part[-length:]).replace(".", "_") for part in parts]
    for i, name in enumerate(names):
        if name in (*names[:i], *taken):
            raise AptError(f"--lora {paths[i]}: {name!r} is the name of another model; rename the file")
    return dict(zip(names, paths, strict=True))


def check_file(path: Path) -> None:
    """Raises AptError where there is no such file: to be told before a model is loaded."""
    if path.is_dir():
        raise AptError(f"{path}: is a folder; name the .safetensors file in it")
    if not path.is_file():
        raise AptError(f"{path}: no such file")


_DOWN = ("lora_down.weight", "lora_A.weight", "lora.down.weight")
_UNSUPPORTED = {"dora_scale": "DoRA", "hada_": "LoHa of LyCORIS", "lokr_": "LoKr of LyCORIS"}
_MODELS = ("unet", "text_encoder", "text_encoder_2")


def _misfit(path: Path, pipeline: Any, why: str) -> str:
    why = " ".join(why.split())[:150]
    return f"{path}: does not fit the model, a {type(pipeline).__name__}; is it of another base model? ({why})"
