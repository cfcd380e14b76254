"""LoRA files read by what is in them: of every module its two factors, and the scale that its trainer gave them.

A file is of kohya's format (`lora_down`, `lora_up`, `alpha`), of diffusers' (`lora_A`, `lora_B`; before them
`lora.down`, `lora.up`) or of peft's own, whose alphas are in the `adapter_config.json` beside it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apt_hooks.errors import AptError

PEFT_PREFIX = "base_model.model."


@dataclasses.dataclass(frozen=True)
class Delta:
    """What a LoRA adds to the weight of one module: scale * up @ down.

    Attributes:
        down: [rank, in], or [rank, in, height, width] of a convolution.
        up: [out, rank], or [out, rank, 1, 1].
        scale: alpha / rank.
        magnitude: [out]; with DoRA (arXiv 2402.09353, equation 5), the lengths that the rows of the sum of weight and
            delta are brought to; None without.
    """

    down: Tensor
    up: Tensor
    scale: float
    magnitude: Tensor | None = None

    def times(self, x: Tensor) -> Tensor:
        """`matrix` times a vector of as many numbers as it has columns, without the matrix."""
        return self.scale * (self.up.float().flatten(1) @ (self.down.float().flatten(1) @ x))

    def size_squared(self) -> float:
        """The sum of the squares of `matrix`, without the matrix."""
        down, up = self.down.double().flatten(1), self.up.double().flatten(1)
        return float(((down @ down.T) * (up.T @ up)).sum()) * self.scale**2

    def matrix(self) -> Tensor:
        """[out, in * height * width], in float32."""
        return self.scale * (self.up.float().flatten(1) @ self.down.float().flatten(1))


def check_file(path: Path) -> None:
    """Raises AptError where there is no such file: to be told before a model is loaded."""
    if path.is_dir():
        raise AptError(f"{path}: is a folder; name the .safetensors file in it")
    if not path.is_file():
        raise AptError(f"{path}: no such file; name a LoRA, as a trainer has saved it")


Convert = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def read_lora(path: Path) -> dict[str, Delta]:
    """Every module's delta, by the module's name as it stands in the file.

    A module's alpha is its own tensor; without one the header's (`lora_adapter_metadata` of diffusers,
    `ss_network_alpha` of sd-scripts); without that, the rank, as sd-scripts and diffusers take it.

    Raises:
        AptError: a file that cannot be read, is no LoRA or is of a kind that is not loaded, or one whose alphas are not
            known.
    """
    tensors, metadata = _read(path)
    _check_kind(path, tensors)
    modules = _modules(path, tensors)
    alphas = _Alphas(path, metadata, any(name.startswith(PEFT_PREFIX) for name in modules))
    return {name: _delta(path, name, parts, alphas) for name, parts in modules.items()}


def convert_lora(path: Path, deltas: Mapping[str, Delta], convert: Convert) -> dict[str, Delta]:
    """Some of a file's deltas by other names.

    Args:
        path: of the file.
        deltas: of it (`read_lora`), those that are to be converted; none with DoRA's lengths.
        convert: makes tensors of other names, its own alphas in the factors, of the file's tensors.

    Raises:
        AptError: what it makes is no LoRA, or does not change weights by as much in all: it has left some of it out.
    """
    tensors: dict[str, Tensor] = {}
    for key, tensor in _read(path)[0].items():
        match = _matched(path, key)
        if (delta := deltas.get(match["module"])) is None:
            continue
        # The scale goes into the factors: of those who convert, each knows another way to an alpha, or none.
        if match["up"] is not None:
            tensor = (tensor.float() * delta.scale).to(tensor.dtype)
        elif match["alpha"] is not None:
            tensor = torch.full_like(tensor, len(delta.down))
        tensors[key] = tensor
    alphas = _Alphas(path, {}, of_peft=False)
    found = {name: _delta(path, name, parts, alphas) for name, parts in _modules(path, convert(tensors)).items()}
    before, after = (sum(delta.size_squared() for delta in of.values()) for of in (deltas, found))
    # What is split, joined or renamed changes as much as before.
    if not abs(after - before) <= 1e-2 * before:
        share = after / before if before else math.inf
        raise AptError(
            f"{path}: diffusers' converter takes {share:.3g} of what the {len(deltas)} modules change that have other "
            f"names than diffusers', such as {next(iter(deltas))}; is it of another base model?"
        )
    return found


def _modules(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors of each module, by what they are in it."""
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _matched(path, key)
        part = next(name for name in _PARTS if match[name] is not None)
        own = modules.setdefault(match["module"], {})
        if part in own:
            raise AptError(f"{path}: {match['module']} has two tensors for its {part}")
        own[part] = tensor
    return modules


def _matched(path: Path, key: str) -> re.Match[str]:
    match = _KEY.fullmatch(key)
    if match is None:
        raise AptError(f"{path}: {key} is no part of a LoRA, and what it does would be missing; not supported")
    return match


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    check_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except OSError as error:
        raise AptError(f"{path}: cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise AptError(f"{path}: is no safetensors file ({error}); name a LoRA, as a trainer has saved it") from error


_PARTS = {
    "down": r"\.lora_(?:down|A)(?:\.\w+)?\.weight|[._]lora(?:_linear_layer)?\.down\.weight",
    "up": r"\.lora_(?:up|B)(?:\.\w+)?\.weight|[._]lora(?:_linear_layer)?\.up\.weight",
    "mid": r"\.lora_mid\.weight",
    "alpha": r"\.alpha",
    "dora_scale": r"\.dora_scale",
    "magnitude": r"[._]lora_magnitude_vector(?:\.\w+)*",
}
_KEY = re.compile("(?P<module>.+?)(?:" + "|".join(f"(?P<{name}>{end})" for name, end in _PARTS.items()) + ")")

_MERGE = "merge it into the model with {}, and name that model"
_LYCORIS = _MERGE.format("LyCORIS' tools")
_OTHER_KINDS = {
    r"^bundle_emb": (
        "pivotal tuning, with embeddings of new words",
        "the tokenizer does not know them; take one that was trained without",
    ),
    r"\.hada_": ("a LoHa of LyCORIS", _LYCORIS),
    r"\.lokr_": ("a LoKr of LyCORIS", _LYCORIS),
    r"\.oft_(blocks|diag)$": ("an OFT or BOFT (of LyCORIS or sd-scripts)", _MERGE.format("its trainer's tools")),
    r"\.on_input$": ("an (IA)^3 of LyCORIS", _LYCORIS),
    r"\.[ab][12]\.weight$": ("a GLoRA of LyCORIS", _LYCORIS),
    r"\.[wb]_norm$": ("norms trained beside the LoRA (LyCORIS' train_norm)", _LYCORIS),
    r"\.diff(_b)?$": ("whole weights' differences (LyCORIS' full, or an extraction's)", _MERGE.format("its tools")),
    r"\.scalar$": (
        "LyCORIS' use_scalar, whose releases differ in whether the factor is in lora_up too",
        "save it anew with the release that trained it, which leaves it out, or " + _LYCORIS,
    ),
    r"\.lora_embedding_": ("a LoRA of embeddings", _MERGE.format("peft's merge_and_unload")),
    r"\.(lora_(B|up)(\.\w+)?|lora\.up)\.bias$": ("biases beside the LoRA", _MERGE.format("peft's merge_and_unload")),
    r"\.(ia3_l|oft_R|oft_r|boft_R|boft_s|vera_lambda|hra_u|poly_)": (
        "another method's adapter of peft",
        _MERGE.format("peft's merge_and_unload"),
    ),
    r"^(emb_params|clip_l|clip_g|\*|string_to_param)$": (
        "textual inversion",
        "an embedding is no LoRA; take one that was trained without",
    ),
}


def _check_kind(path: Path, keys: Iterable[str]) -> None:
    keys = list(keys)
    for pattern, (kind, way_out) in _OTHER_KINDS.items():
        found = next((key for key in keys if re.search(pattern, key)), None)
        if found is not None:
            raise AptError(f"{path}: has {kind} ({found}), which is not loaded here, LoRA and DoRA are: {way_out}")
    if not any("lora" in key.lower() for key in keys):
        raise AptError(f"{path}: is no LoRA, its tensors are named like {next(iter(keys), 'nothing')!r}")


def _delta(path: Path, name: str, parts: Mapping[str, Tensor], alphas: _Alphas) -> Delta:
    missing = [part for part in ("down", "up") if part not in parts]
    if missing:
        raise AptError(f"{path}: {name} has {', '.join(sorted(parts))} and no {' and no '.join(missing)}")
    down, up, mid = parts["down"], parts["up"], parts.get("mid")
    rank = len(down)
    whole = min(down.ndim, up.ndim) >= 2 and up.shape[1:].numel() == rank
    if not whole or (mid is not None and (mid.shape[:2] != (rank, rank) or down.shape[2:].numel() != 1)):
        shapes = ", ".join(f"{part} {list(tensor.shape)}" for part, tensor in parts.items())
        raise AptError(f"{path}: {name}: its factors do not fit one another ({shapes})")
    if mid is not None:  # Tucker's decomposition: a kernel between two 1x1, which with the first of them is one again
        down = torch.einsum("rshw,si->rihw", mid.float(), down.float().flatten(1))
    magnitude = parts.get("magnitude", parts.get("dora_scale"))
    if magnitude is not None and (
        magnitude.numel() != len(up) or ("dora_scale" in parts and len(magnitude) != len(up))
    ):
        raise AptError(
            f"{path}: {name}: is a DoRA whose lengths {list(magnitude.shape)} are not of its {len(up)} outputs; those "
            f"of a weight's inputs (LyCORIS' wd_on_output=False) are not loaded here: {_LYCORIS}"
        )
    scale = alphas.scale(name, parts.get("alpha"), down)
    return Delta(down, up, scale, None if magnitude is None else magnitude.flatten())


class _Alphas:
    """What a file knows of its alphas beside its modules' own tensors."""

    def __init__(self, path: Path, metadata: Mapping[str, str], of_peft: bool) -> None:
        self.path, self.metadata = path, metadata
        self.configs: dict[str, Any] = {}
        """peft's configurations by the prefix of the names that they are for."""
        text = metadata.get("lora_adapter_metadata")
        if of_peft:
            beside = path.with_name("adapter_config.json")
            if not beside.is_file():
                raise AptError(
                    f"{path}: is of peft's own format, whose alpha stands in {beside.name}: put it beside it; where "
                    'its trainer wrote none, write {"peft_type": "LORA", "lora_alpha": ALPHA} into one'
                )
            self.configs = {PEFT_PREFIX: self._json(beside.read_bytes(), str(beside))}
        elif text is not None:
            flat = self._json(text, "lora_adapter_metadata")
            for key, value in flat.items():
                part, _, option = key.partition(".")
                self.configs.setdefault(f"{part}.", {})[option] = value
        for config in self.configs.values():
            self._check(config)

    def scale(self, name: str, own: Tensor | None, down: Tensor) -> float:
        """alpha / rank of a module, or alpha / sqrt(rank) where peft's configuration says so (use_rslora)."""
        rank = len(down)
        config: Mapping[str, Any] = next((c for prefix, c in self.configs.items() if name.startswith(prefix)), {})
        if own is not None:
            if own.numel() != 1:
                raise AptError(f"{self.path}: {name}: its alpha is one number; found {list(own.shape)}")
            return self._number(own.item(), f"the alpha of {name}") / rank
        if "lora_alpha" in config:
            alpha = self._number(_matching(config, name), "lora_alpha")
            return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        if self.metadata.get("ss_network_alpha", "None") in ("None", "", "0"):  # to sd-scripts each of them is the rank
            return 1.0
        return self._of_sd_scripts(down) / rank

    def _of_sd_scripts(self, down: Tensor) -> float:
        args = self._json(self.metadata.get("ss_network_args", "{}"), "ss_network_args")
        by_block = [key for key in args if "block" in key]
        if by_block:
            raise AptError(
                f"{self.path}: was trained with {by_block[0]} and has lost the modules' own alphas, so their scales "
                "are not known: take the file as its trainer saved it"
            )
        if down.shape[2:].numel() > 1 and "conv_dim" in args:
            return self._number(args.get("conv_alpha") or 1.0, "conv_alpha in ss_network_args")
        return self._number(self.metadata["ss_network_alpha"], "ss_network_alpha in its header")

    def _check(self, config: Mapping[str, Any]) -> None:
        kind = config.get("peft_type", "LORA")
        if kind != "LORA":
            raise AptError(f"{self.path}: is a {kind} of peft; LoRA and DoRA are loaded here")
        start = str(config.get("init_lora_weights", ""))
        if start.lower().startswith(("pissa", "olora", "corda", "loftq")):
            raise AptError(
                f"{self.path}: was trained with init_lora_weights={start}, which changes the base model's weights too: "
                "convert it with peft's save_pretrained(path_initial_model_for_weight_conversion=...)"
            )

    def _number(self, value: Any, what: str) -> float:
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number) or number == 0:
            raise AptError(f"{self.path}: {what} is to be a finite number that is not 0; found {value}")
        return number

    def _json(self, text: str | bytes, what: str) -> dict[str, Any]:
        try:
            found = json.loads(text)
        except ValueError as error:
            raise AptError(f"{self.path}: {what} cannot be read as JSON ({error})") from error
        if not isinstance(found, dict):
            raise AptError(f"{self.path}: {what} is to be an object of JSON; found {found!r}")
        return found


def _matching(config: Mapping[str, Any], name: str) -> Any:
    """A module's alpha by peft's rule: that of the first pattern that is the end of its name, or the one for all."""
    for pattern, alpha in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return alpha
    return config["lora_alpha"]
