"""Which files are called good, and that sd-scripts' own parser reads those to the same values."""

from __future__ import annotations

import codecs
import datetime
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import toml

from apt_hooks import AptConfig, AptError
from apt_hooks.tomledit import apply_preset, check_section


def trainer_reads(path: Path) -> dict[str, Any]:
    """A training TOML as sd-scripts' read_config_from_file reads it."""
    with path.open(encoding="utf-8") as file:
        return toml.load(file)


def refused(path: Path) -> str:
    """What both commands say of a file, which stays as it is."""
    before = path.read_bytes()
    said = []
    for command in (lambda: apply_preset(path, "sdxl"), lambda: check_section(path)):
        with pytest.raises(AptError) as caught:
            command()
        said.append(str(caught.value))
    assert said[0] == said[1] and said[0].startswith(f"{path}: ") and "\n" not in said[0]
    assert path.read_bytes() == before
    return said[0]


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# -- files that are no training TOML -----------------------------------------------------------------------------------

DATASET = "[general]\nshuffle_caption = true\n[[datasets]]\nresolution = 512\n[[datasets.subsets]]\nimage_dir = 'x'\n"
LORA_EASY = """\
[[subsets]]
image_dir = "x"

[train_mode]
train_mode = "lora"

[general_args.args]
max_train_epochs = 1

[general_args.dataset_args]
batch_size = 1

[network_args.args]
network_dim = 32
"""
APT = '[apt]\npreset = "sd15"\n'


@pytest.mark.parametrize("text", [DATASET, DATASET.split("[[")[0] + APT + DATASET[DATASET.index("[[") :]])
def test_a_dataset_config_is_told_from_the_training_toml_that_is_meant(tmp_path: Path, text: str) -> None:
    path = written(tmp_path / "data.toml", text)
    said = refused(path)
    assert "dataset config" in said and said.endswith("--config_file, which names this one as dataset_config")
    written(tmp_path / "other.toml", "dataset_config = 'olddata.toml'\n")
    written(tmp_path / "broken.toml", "[")
    training = written(tmp_path / "train.toml", "[paths]\ndataset_config = 'C:\\lora\\data.toml'\n")
    assert refused(path).endswith(f"as dataset_config; here that is {training}")


def test_datasets_beside_training_arguments_are_told_to_go_into_a_file_of_their_own(tmp_path: Path) -> None:
    said = refused(written(tmp_path / "all.toml", f"seed = 1\n{DATASET}"))
    assert "has [[datasets]] beside seed" in said and 'write dataset_config = "dataset.toml"' in said


@pytest.mark.parametrize("text", [LORA_EASY, LORA_EASY + APT, "[general_args.dataset_args]\nbatch_size = 1\n"])
def test_what_lora_easy_saved_is_told_with_what_to_do_in_that_gui(tmp_path: Path, text: str) -> None:
    said = refused(written(tmp_path / "saved.toml", text))
    assert "no trainer reads it" in said and "Extra Args" in said and "apt_config" in said


def test_json_is_told_to_hold_no_section(tmp_path: Path) -> None:
    assert "--apt_config apt.toml" in refused(written(tmp_path / "kohya.json", json.dumps({"seed": 1})))


@pytest.mark.parametrize("more", ["", "[apt]\npreset = 'sd15'\n"])
@pytest.mark.parametrize("section", ["", "[extra]\n"])
def test_a_training_toml_that_names_a_file_of_its_own_takes_no_section_beside(
    tmp_path: Path, section: str, more: str
) -> None:
    said = refused(written(tmp_path / "train.toml", f"{section}apt_config = 'apt.toml'\n{more}"))
    assert "has apt_config = 'apt.toml'" in said and "name that file" in said


# -- what a parser makes of it -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["[apt]\npreset = 'sd15'\n", "seed = 42\n[apt]\n", "# mine\nseed = 42\n", ""])
def test_a_byte_order_mark_is_refused_since_the_trainer_fails_at_it_or_loses_a_name(tmp_path: Path, text: str) -> None:
    assert "begins with a byte order mark" in refused(written(tmp_path / "t.toml", codecs.BOM_UTF8 + text.encode()))


@pytest.mark.parametrize("space", ["\u3000", "\u00a0", "\u2003", "\t", "\x0c"], ids=ascii)
def test_a_space_of_any_kind_is_one_as_in_the_trainer(tmp_path: Path, space: str) -> None:
    text = f"network_dim = 32{space}# note\nseed{space}= 1\n[apt]{space}# own\npreset{space}= 'sd15'{space}# now\n"
    path = written(tmp_path / "train.toml", text)
    assert check_section(path) == AptConfig.preset("sd15")
    apply_preset(path, "sdxl")
    assert path.read_text(encoding="utf-8") == text.replace("'sd15'", '"sdxl"')
    assert trainer_reads(path) == {"network_dim": 32, "seed": 1, "apt": {"preset": "sdxl"}}


@pytest.mark.parametrize("name", ["\u200bseed", "learning-rate", "}seed", '"my note"'], ids=ascii)
@pytest.mark.parametrize("section", ["", "[training]\n"])
def test_a_name_that_no_argument_has_is_refused_since_the_trainer_passes_over_it(
    tmp_path: Path, section: str, name: str
) -> None:
    said = refused(written(tmp_path / "train.toml", f"{section}{name} = 1\n[apt]\npreset = 'sd15'\n"))
    assert f"the name {name.strip(chr(34))!r} is none that an argument can have" in said


@pytest.mark.parametrize("name", ["APT", "Apt"])
def test_a_section_in_other_letters_is_refused_also_beside_the_right_one(tmp_path: Path, name: str) -> None:
    for more in ("", "[apt]\n"):
        said = refused(written(tmp_path / "train.toml", f"[{name}]\nnum_bins = 3\n{more}"))
        assert f"has a section [{name}]" in said and "write [apt]" in said


@pytest.mark.parametrize(
    "text", ["[apt]\nblocks = [2, 3", "seed = 1\nx = [1,\n", "x = [[1], [2]\n# end", 'x = """\na\n""" # b\ny = 1\n']
)
def test_a_value_that_goes_on_to_the_end_is_refused_since_the_trainer_loses_a_part_of_it(
    tmp_path: Path, text: str
) -> None:
    path = written(tmp_path / "train.toml", text)
    trainer_reads(path)  # without a word
    assert "takes the end of the file for part of this value" in refused(path)


@pytest.mark.parametrize(
    "text",
    ["x = ['C:\\a\\', 'b']\n", "x = [1, 2.0]\n", '{"seed": 1}\n', "x =\n", "[a\n", "x = 1\nx = 2\n", "a = [{b = 1}"],
)
def test_what_the_trainer_cannot_read_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    assert "is not valid TOML" in refused(written(tmp_path / "train.toml", text))


# -- generated files ---------------------------------------------------------------------------------------------------


VALUES: list[tuple[str, Any]] = [
    ("42", 42),
    ("1e-4", 1e-4),
    ("1_000", 1000),
    ("-inf", -math.inf),
    ("true", True),
    ("1979-05-27", datetime.date(1979, 5, 27)),
    ('"it is \\"sks\\""', 'it is "sks"'),
    ("'C:\\dir'", "C:\\dir"),
    ('"a # b = [c]"', "a # b = [c]"),
    ('"\\u5b57 学習"', "字 学習"),
    ('"""\n[apt]\npreset = 3"""', "[apt]\npreset = 3"),
    ("[]", []),
    ('["betas=0.9,0.99", "decay=0.1"]', ["betas=0.9,0.99", "decay=0.1"]),
    ("[\n  1,  # one\n  2,\n]", [1, 2]),
    ("[[1, 2], [3]]", [[1, 2], [3]]),
    ("{ a = 1, b = 'x,y' }", {"a": 1, "b": "x,y"}),
]
APT_VALUES: dict[str, list[tuple[str, Any]]] = {
    "preset": [('"sd15"', "sd15"), ("'sd21'", "sd21"), ('"sdxl"', "sdxl")],
    "zoom_out": [("[1.0, 2.5]", [1.0, 2.5]), ("[\n  1.0,  # low\n  2.5,\n]", [1.0, 2.5]), ("[1, 2]", [1, 2])],
    "blocks": [("[2, 3]", [2, 3]), ('"auto"', "auto")],
    "num_bins": [("5", 5)],
}


def generated(rng: random.Random) -> tuple[bytes, dict[str, Any] | None]:
    """A training TOML as people write them, and its values; None where a character in it was changed at random."""

    def space() -> str:
        return rng.choice(["", " ", "  ", "\t", " \u3000", "\u00a0"])

    def behind() -> str:
        return rng.choice(["", " ", "\t", " \u3000"])  # no other space right behind the sign

    def end() -> str:
        return space() + rng.choice(["", "", "# note", "# it's [apt] \"", "#"])

    values: dict[str, Any] = {}
    lines: list[str] = []
    for section in ["", *rng.sample(["apt", "training", "runs"], rng.randrange(4))]:
        into = values.setdefault(section, {}) if section else values
        if section == "runs":
            values["runs"] = [{}, into]
            lines += ["[[runs]]", f"[[runs]]{end()}"]
        elif section:
            header = rng.choice(["[{}]", "[ {} ]", '["{}"]', "['{}']", " [{}]"]).format(section)
            lines.append(f"{header}{end()}")
        for name in rng.sample(list(APT_VALUES), rng.randrange(4)):
            text, value = rng.choice(APT_VALUES[name] if section == "apt" else VALUES)
            # Behind a text over several lines sd-scripts' parser bears nothing.
            after = "" if text.startswith('"""') else end()
            lines.append(f"{rng.choice(['', '  ', chr(9)])}{name}{space()}={behind()}{text}{after}")
            into[name] = value
        lines += rng.choice([[], [""], ['# 学習 it\'s "so"']])
    content = "\n".join(lines) + rng.choice(["", "\n"])
    changed = rng.random() < 0.4
    if changed:
        at = rng.randrange(len(content) + 1)
        content = (
            content[:at]
            + rng.choice(["[", "]", "{", '"', "'", "#", "=", ",", "\n", "\ufeff", "\u200b", "1"]) * (rng.randrange(3))
            + content[at + rng.randrange(2) :]
        )
    if rng.random() < 0.05:
        content, changed = "\ufeff" + content, True
    newline = rng.choice(["\n", "\n", "\r\n", "\r"])
    return content.replace("\n", newline).encode(), None if changed else values


def test_every_file_that_is_called_good_is_read_by_the_trainer_to_the_values_in_it(tmp_path: Path) -> None:
    rng, path = random.Random(0), tmp_path / "train.toml"
    good = refusals = checked = 0
    for _ in range(300):
        content, values = generated(rng)
        written(path, content)
        try:
            config = check_section(path)
        except AptError as error:
            assert values is None or "apt" not in values, f"{error}: {content!r}"
        else:
            checked += 1
            assert config == AptConfig.from_mapping(trainer_reads(path)["apt"])
            assert values is None or config == AptConfig.from_mapping(values["apt"])
        try:
            apply_preset(path, "sdxl")
        except AptError as error:
            refusals += 1
            # A header's look-alike in a text over several lines stops the editing line by line.
            assert values is None or b"\n[apt]" in content.replace(b"\r", b"\n"), f"{error}: {content!r}"
            assert path.read_bytes() == content
            continue
        good += 1
        found = trainer_reads(path)
        assert found["apt"]["preset"] == "sdxl"
        assert {**found, "apt": {**found["apt"], "preset": ""}} == _without_preset(content, tmp_path)
        if values is not None:
            assert found == {**values, "apt": {**values.get("apt", {}), "preset": "sdxl"}}
        assert check_section(path) == AptConfig.from_mapping(found["apt"])
    assert good > 150 and checked > 80 and refusals > 20


def _without_preset(content: bytes, folder: Path) -> dict[str, Any]:
    """What the trainer reads before the editing, the preset aside."""
    before = trainer_reads(written(folder / "before.toml", content))
    return {**before, "apt": {**before.get("apt", {}), "preset": ""}}
