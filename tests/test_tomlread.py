"""What is said of a TOML file that cannot be read: where, what, and the way out, in one line."""

from __future__ import annotations

import codecs
from pathlib import Path

import pytest

from apt_hooks import AptError
from apt_hooks.tomlread import read_toml

VALUE, QUOTES, SECTION = "this is no value: a text stands in quotes", "a text ends with the quotes", "a section stands"


def refused(path: Path) -> str:
    with pytest.raises(AptError) as caught:
        read_toml(path)
    said = str(caught.value)
    assert said.startswith(f"{path}: ") and "\n" not in said
    return said.removeprefix(f"{path}: ")


@pytest.mark.parametrize(
    ("line", "column", "what"),
    [
        ("lambda_attn = 0,5", 15, VALUE),
        ("preset = sdxl", 10, VALUE),
        ("enabled = True", 11, VALUE),
        ("enabled = yes", 11, VALUE),
        ("num_bins = 4 ; mine", 12, VALUE),
        ("zoom_out = [1.0, 3.0", 12, VALUE),
        ("num_bins =", 11, "there is no value behind the ="),
        ("zoom_out = [1, 3.0]", 12, "sd-scripts' parser takes no mixed arrays"),
        ('preset = "sdxl', 10, QUOTES),
        ('text = """a', 8, QUOTES),
        (r'folder = "C:\Users"', 10, r'a backslash in "..." begins a sign'),
        ('preset "sdxl"', 8, "write name = value"),
        ("preset: sdxl", 7, "write name = value"),
        ("seed = 2", 8, "there is a line of that name above"),
        ("[first]", 1, "there is such a section"),
        ("[other", 1, SECTION),
        ("[]", 1, SECTION),
        ("blocks = [2,", 10, ""),  # why, depends on what is behind it
        ("x = {a = 1", 5, "sd-scripts' parser breaks off here ("),
    ],
)
@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"], ids=ascii)
@pytest.mark.parametrize("after", ["", "[end]\ny = 3 # note\n"])
def test_a_mistake_is_told_with_line_column_and_the_way_out(
    tmp_path: Path, line: str, column: int, what: str, ending: str, after: str
) -> None:
    path = tmp_path / "train.toml"
    text = f'# Notes\n[first]\nseed = 1 # "one"\nx1 = [1,\n 2]\nx2 = """\na\n"""\n{line}\n{after}'
    path.write_bytes(text.replace("\n", ending).encode())
    assert refused(path).startswith(f"is not valid TOML: line 9, column {column}, `{line}`: {what}")


def test_a_long_line_is_cut_where_it_is_shown(tmp_path: Path) -> None:
    path = tmp_path / "train.toml"
    path.write_text("x = " + "a" * 500)
    assert f", `x = {'a' * 53}...`: " in refused(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[apt]\n".encode("utf-16"), "it is UTF-16"),
        (codecs.BOM_UTF16_BE + "[apt]\n".encode("utf-16-be"), "it is UTF-16"),
        ("[apt]\n".encode("utf-16-le"), "it is UTF-16"),
        (codecs.BOM_UTF8 + b"[apt]\n", "it begins with a byte order mark"),
        (b"PK\x03\x04" + bytes(20), "it has bytes that are 0, so it is no text"),
        (bytes(20), "it has bytes that are 0, so it is no text"),
        ("[apt]\nä = 'ä'\n".encode() + b"x = '\xe4'\n", "line 3, column 6: it is not UTF-8 (byte 0xE4, invalid "),
    ],
)
def test_a_file_that_is_no_text_is_named_as_what_it_is(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "train.toml"
    path.write_bytes(content)
    assert refused(path).startswith(f"is not valid TOML: {said}")


@pytest.mark.parametrize(("name", "why"), [("missing.toml", "No such file or directory"), ("", "Is a directory")])
def test_what_is_no_file_is_named_with_the_way_out(tmp_path: Path, name: str, why: str) -> None:
    assert refused(tmp_path / name) == f"cannot be read: {why}; give the path of a TOML file"
