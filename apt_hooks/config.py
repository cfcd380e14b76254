"""What a user can set: one frozen dataclass, read from the `[apt]` section of a TOML file or from a preset."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, Literal

import toml

from .errors import AptError, nearest
from .stop_rule import RULE, is_stop_rule
from .tomlread import read_toml


def _is_number(value: object) -> bool:
    # Compared rather than math.isfinite, which cannot take a whole number too large for a float.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_zoom_range(value: object) -> bool:
    if not isinstance(value, (list, tuple)) or len(value) != 2 or not all(_is_number(v) for v in value):
        return False
    return 1.0 <= value[0] <= value[1]


def _is_blocks(value: object) -> bool:
    if value == "auto":
        return True
    if not isinstance(value, (list, tuple)) or not value:
        return False
    return all(_is_count(v, 0) for v in value) and len(set(value)) == len(value)


_NOT_APT = {
    "loss_weighting": False,
    "augmentation": False,
    "lambda_dist": 0.0,
    "lambda_attn": 0.0,
    "lambda_joint": 0.0,
}

_OFF: dict[str, dict[str, Any]] = {
    "apt": {},
    "dco": {**_NOT_APT, "frozen_every": 1},  # its loss takes the frozen pass of every batch
    "l2-sp": _NOT_APT,
    "dreambooth": _NOT_APT,
}
"""What keys are with each objective, whatever was given."""

OF_OBJECTIVES = {"dco_beta": ("dco",), "lambda_offset": ("l2-sp", "apt")}
"""Keys that only some objectives take notice of."""

_OF_ITS_TERMS = (
    *("augment_max_probability", "zoom_out", "rotation_degrees", "augment_space", "augment_border"),
    *("regularizer", "representation_source", "blocks", "attention_impl"),
)


def _key(default: Any, rule: str, accepts: Callable[[Any], bool]) -> Any:
    return dataclasses.field(default=default, metadata={"rule": rule, "accepts": accepts})


def _flag(default: bool) -> Any:
    return _key(default, "true or false", lambda v: isinstance(v, bool))


def _at_least_zero(default: float | None) -> Any:
    """None: may be left open, for what depends on other keys."""
    return _key(
        default,
        "a number, 0 or larger (0 switches it off)",
        lambda v: v is default is None or (_is_number(v) and v >= 0),
    )


def _choice(default: str, *choices: str) -> Any:
    return _key(default, "one of " + ", ".join(f'"{c}"' for c in choices), lambda v: v in choices)


def _word() -> Any:
    return _key(None, "text that is not empty", lambda v: v is None or (isinstance(v, str) and bool(v.strip())))


@dataclasses.dataclass(frozen=True)
class AptConfig:
    """The keys of `[apt]`, each checked against its rule.

    Defaults are those of the paper (arXiv 2507.02687) for SDXL; where the paper leaves a value open it is ours, and
    `presets/*.toml` says so beside it. The key `preset` is kept in `preset_name`. With another `objective` than "apt"
    the keys that switch APT's own terms are off, and with "dco" `frozen_every` is 1, whatever was given, so that a
    preset can serve for a baseline too;
    `ignored` tells which of the user's own keys have come to nothing by that.

    Raises:
        AptError: a value breaks the rule of its key, only one of `identifier` and `class_word` is given, or both are
            one word.
    """

    enabled: bool = _flag(True)
    objective: Literal["apt", "dco", "l2-sp", "dreambooth"] = _choice("apt", "apt", "dco", "l2-sp", "dreambooth")
    dco_beta: float = _key(1000.0, "a number above 0", lambda v: _is_number(v) and v > 0)
    lambda_offset: float | None = _at_least_zero(None)
    monitor_only: bool = _flag(False)
    reference: Literal["base", "start"] = _choice("base", "base", "start")
    num_bins: int = _key(10, "a whole number from 1 to 1000", lambda v: _is_count(v, 1) and v <= 1000)
    ema_alpha: float = _key(0.1, "a number above 0, at most 1", lambda v: _is_number(v) and 0 < v <= 1)
    indicator_scale: float = _key(1000.0, "a number above 0", lambda v: _is_number(v) and v > 0)
    indicator_space: Literal["auto", "target", "epsilon"] = _choice("auto", "auto", "target", "epsilon")
    loss_weighting: bool = _flag(True)
    augmentation: bool = _flag(True)
    augment_max_probability: float = _key(0.4, "a number from 0 to 1", lambda v: _is_number(v) and 0 <= v <= 1)
    zoom_out: tuple[float, float] = _key((1.0, 3.0), "[low, high] with 1 <= low <= high", _is_zoom_range)
    rotation_degrees: float = _key(15.0, "a number from 0 to 180", lambda v: _is_number(v) and 0 <= v <= 180)
    augment_space: Literal["auto", "image", "latent"] = _choice("auto", "auto", "image", "latent")
    augment_border: Literal["learn", "ignore"] = _choice("learn", "learn", "ignore")
    lambda_dist: float = _at_least_zero(1.0)
    lambda_attn: float = _at_least_zero(1.0)
    regularizer: Literal["separate", "joint"] = _choice("separate", "separate", "joint")
    lambda_joint: float = _at_least_zero(0.01)
    representation_source: Literal["self_attention", "block"] = _choice("self_attention", "self_attention", "block")
    blocks: Literal["auto"] | tuple[int, ...] = _key(
        "auto", '"auto" or a list of different block numbers, counted from 0', _is_blocks
    )
    frozen_every: int = _key(1, "a whole number, 1 or larger", lambda v: _is_count(v, 1))
    attention_impl: Literal["auto", "eager", "triton"] = _choice("auto", "auto", "eager", "triton")
    drifts: bool = _flag(True)
    stop: str | None = _key(None, RULE, is_stop_rule)
    identifier: str | None = _word()
    class_word: str | None = _word()
    _given: ClassVar[Mapping[str, Any]] = {}
    _of_model: ClassVar[bool] = False
    preset_name: str | None = _key(None, "the name of a preset", lambda v: v is None or v in preset_names())

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not field.metadata["accepts"](value):
                raise AptError(f"[apt] {field.name} must be {field.metadata['rule']}; found {value!r}")
            # One form per key, whatever TOML or the caller wrote: tuples for lists, floats where a float is meant.
            if isinstance(value, list):
                value = tuple(value)
            if field.name == "zoom_out":
                value = (float(value[0]), float(value[1]))
            elif isinstance(field.default, float) or (field.name == "lambda_offset" and value is not None):
                value = float(value)
            object.__setattr__(self, field.name, value)
        for name, off in _OFF[self.objective].items():
            object.__setattr__(self, name, off)
        if (self.identifier is None) != (self.class_word is None):
            given, missing = ("identifier", "class_word") if self.identifier else ("class_word", "identifier")
            raise AptError(f"[apt] {given} = {getattr(self, given)!r} needs {missing} too: give both or neither")
        if self.identifier and self.class_word and self.identifier.strip() == self.class_word.strip():
            raise AptError(
                "[apt] identifier and class_word must differ, a word for the subject and one for what it is, such as "
                f'"sks" and "dog"; found {self.identifier!r} for both'
            )

    @classmethod
    def key_names(cls) -> tuple[str, ...]:
        """The keys that an `[apt]` section may hold."""
        fields = (field.name for field in dataclasses.fields(cls))
        return ("preset", *(name for name in fields if name != "preset_name"))

    @classmethod
    def preset(cls, name: str) -> AptConfig:
        """The configuration of a preset.

        Raises:
            AptError: there is no preset of that name.
        """
        return cls.from_mapping({"preset": name})

    @classmethod
    def from_toml(cls, path: str | Path, section: str = "apt") -> AptConfig:
        """Read one section of a TOML file; its other sections may hold anything.

        Raises:
            AptError: no such file, not TOML, no such section, or a key or value that is not allowed.
        """
        content = read_toml(path)
        values = content.get(section)
        if not isinstance(values, dict):
            sections = ", ".join(f"[{name}]" for name, value in content.items() if isinstance(value, dict))
            found = f"{section} = {values!r}" if values is not None else sections or "no section at all"
            raise AptError(
                f"{path}: looked for a section [{section}], found {found}; "
                f"`apt-hooks presets apply NAME {path}` adds one"
            )
        try:
            return cls.from_mapping(values)
        except AptError as error:
            raise AptError(f"{path}: {error}") from error

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> AptConfig:
        """Build from keys and values as `[apt]` holds them; a key given beside `preset` overrides the preset's.

        Raises:
            AptError: an unknown key, an unknown preset, or a value that breaks the rule of its key.
        """
        for key, value in values.items():
            if key not in cls.key_names():
                raise AptError(
                    f"[apt] {key} = {value!r}: there is no such key{nearest(key, cls.key_names())} "
                    f"The keys are {', '.join(cls.key_names())}; the trainer's own go above [apt]."
                )
        own = {key: value for key, value in values.items() if key != "preset"}
        if "preset" in values:
            try:
                base = toml.loads(preset_text(values["preset"]))["apt"]
            except AptError as error:
                raise AptError(f"[apt] {error}") from error
            config = cls(**{**base, **own}, preset_name=values["preset"])
        else:
            config = cls(**own)
        object.__setattr__(config, "_given", own)
        return config

    def of_model(self, own: str | None) -> AptConfig:
        """This configuration for a model whose preset is `own`: that preset's values below the keys that were given.

        Args:
            own: its name; None where no preset is known for the model, which then takes any.

        Raises:
            AptError: it names the preset of another model, whose scale would make gamma wrong by a factor.
        """
        if own is None or self.preset_name == own:
            return self
        if self.preset_name is not None:
            raise AptError(
                f'[apt] preset = "{self.preset_name}" is for another model: this one\'s is "{own}"; name that one, or '
                "none, which takes it"
            )
        config = self.from_mapping({"preset": own, **self.overrides(), **self._given})
        object.__setattr__(config, "_of_model", True)
        return config

    @property
    def preset_is_the_models(self) -> bool:
        """Whether the preset was not named but taken for the model's (`of_model`)."""
        return self._of_model

    @property
    def aligns_attention(self) -> bool:
        """Whether attention maps are compared, for which both models' captions must be of one token length."""
        return self.lambda_attn > 0 and self.regularizer == "separate"

    @property
    def offset_weight(self) -> float:
        """Weight of L2-SP's penalty: `lambda_offset`, and where that is left open 0.001 where nothing else is held."""
        if self.objective not in OF_OBJECTIVES["lambda_offset"]:
            return 0.0
        alone = self.objective == "l2-sp"
        return (0.001 if alone else 0.0) if self.lambda_offset is None else self.lambda_offset

    @property
    def measures_offset(self) -> bool:
        """Whether the weights' offset is asked for, for which the network has to be a plain LoRA."""
        return self.objective == "l2-sp" or self.offset_weight > 0

    @property
    def may_measure_offset(self) -> bool:
        """Whether the weights' offset is measured of a plain LoRA: `monitor_only` tells it unasked."""
        return self.measures_offset or self.monitor_only

    @property
    def ignored(self) -> dict[str, Any]:
        """The keys given beside a preset (`from_mapping`) that the objective takes no notice of, as they were given."""
        off = _OFF[self.objective]
        unused = {key for key, objectives in OF_OBJECTIVES.items() if self.objective not in objectives}
        if self.objective != "apt":
            unused |= {*off, *_OF_ITS_TERMS}
        return {key: value for key, value in self._given.items() if key in unused and off.get(key) != value}

    def overrides(self) -> dict[str, Any]:
        """The keys whose value differs from the preset's, or from the defaults where no preset is named."""
        base = AptConfig.preset(self.preset_name) if self.preset_name else AptConfig()
        ignored = {"preset_name", *_OFF[self.objective]}
        names = [field.name for field in dataclasses.fields(self) if field.name not in ignored]
        return {name: getattr(self, name) for name in names if getattr(self, name) != getattr(base, name)}


def preset_names() -> tuple[str, ...]:
    """The names that the key `preset` accepts, sorted."""
    return tuple(sorted(p.name[:-5] for p in _preset_folder().iterdir() if p.name.endswith(".toml")))


def preset_text(name: Any) -> str:
    """The TOML text of a preset, with its comments and sources.

    Raises:
        AptError: there is no preset of that name.
    """
    names = preset_names()
    if name not in names:
        listed = ", ".join(f'"{n}"' for n in names)
        raise AptError(f"preset must be one of {listed}; found {name!r}{nearest(str(name), names)}")
    return _preset_folder().joinpath(f"{name}.toml").read_text(encoding="utf-8")


def _preset_folder() -> Any:
    return resources.files("apt_hooks").joinpath("presets")
