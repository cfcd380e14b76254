"""Adding metadata to a LoRA file that is saved already."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from apt_hooks.errors import AptError
from apt_hooks.integrations.diffusers_dreambooth.lora_metadata import add_metadata

safetensors = pytest.importorskip("safetensors")
safetensors_torch = pytest.importorskip("safetensors.torch")

NEW = {"ss_apt_version": "0.1.0", "ss_apt_config": json.dumps({"num_bins": 10, "zoom_out": [1.0, 3.0]})}
OLD = {"format": "pt", "note": "a sks dog"}
JAPANESE = {"標題": "桜の木 🌸", 'quoted "text"': "line\nbreak\\ \x7f \u2028"}


def tensors() -> dict[str, Tensor]:
    """Sizes that are no multiples of 8 among them, and NaN, which equality of numbers would not tell from another."""
    generator = torch.Generator().manual_seed(0)
    return {
        "unet.up.lora_A.weight": torch.randn((4, 3), generator=generator),
        "unet.up.lora_B.weight": torch.randn((5, 3), generator=generator).to(torch.bfloat16),
        "unet.down.lora_A.weight": torch.tensor([float("nan"), float("inf"), -0.0]),
        "nothing": torch.zeros(0, 7),
        "scalar": torch.tensor(3, dtype=torch.int8),
        "重み": torch.ones(1, dtype=torch.bfloat16),
    }


def read(path: Path) -> tuple[dict[str, tuple[torch.dtype, tuple[int, ...], bytes]], dict[str, str]]:
    """As safetensors reads it: ({name: (dtype, shape, bytes)}, metadata)."""
    with safetensors.safe_open(path, framework="pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
        metadata = file.metadata()
    raw = {
        name: (t.dtype, tuple(t.shape), t.reshape(-1).view(torch.uint8).numpy().tobytes()) for name, t in found.items()
    }
    return raw, metadata or {}


def parts(path: Path) -> tuple[int, bytes, bytes]:
    """(length of the header, header, the rest) by the letter of the format."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return length, content[8 : 8 + length], content[8 + length :]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "pytorch_lora_weights.safetensors"


@pytest.mark.parametrize("old", [None, OLD, JAPANESE], ids=["none", "some", "not ASCII"])
@pytest.mark.parametrize("new", [NEW, JAPANESE | NEW, {}], ids=["some", "not ASCII", "none"])
def test_tensors_stay_bit_for_bit_old_metadata_is_kept_and_new_is_there(
    path: Path, old: dict[str, str] | None, new: dict[str, str]
) -> None:
    safetensors_torch.save_file(tensors(), path, old)
    before, _ = read(path)
    behind = parts(path)[2]
    add_metadata(path, new)
    after, metadata = read(path)
    assert set(before) == set(tensors())
    assert after == before
    assert metadata == {**(old or {}), **new}
    assert parts(path)[2] == behind


@pytest.mark.parametrize("extra", range(8))
def test_the_header_is_a_multiple_of_8_long_whatever_is_in_it(path: Path, extra: int) -> None:
    safetensors_torch.save_file(tensors(), path)
    add_metadata(path, {"key": "x" * extra})
    length, header, _ = parts(path)
    assert length % 8 == 0
    assert header[:1] == b"{"
    assert json.loads(header)["__metadata__"] == {"key": "x" * extra}
    assert read(path)[1] == {"key": "x" * extra}


def test_a_file_without_tensors_takes_metadata_too(path: Path) -> None:
    safetensors_torch.save_file({}, path)
    add_metadata(path, NEW)
    assert read(path) == ({}, NEW)


def test_twice_updates_what_is_there_and_adds_nothing_else(path: Path) -> None:
    safetensors_torch.save_file(tensors(), path, OLD)
    before, _ = read(path)
    add_metadata(path, NEW | {"ss_apt_steps": "1"})
    once = path.read_bytes()
    add_metadata(path, NEW | {"ss_apt_steps": "1"})
    assert path.read_bytes() == once
    add_metadata(path, {"ss_apt_steps": "2", "note": "a dog"})
    assert read(path) == (before, {"format": "pt", **NEW, "ss_apt_steps": "2", "note": "a dog"})
    assert parts(path)[1].count(b"ss_apt_steps") == 1


def saved(path: Path) -> bytes:
    safetensors_torch.save_file(tensors(), path, OLD)
    return path.read_bytes()


def framed(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header


BROKEN = {
    "empty": lambda whole, start: b"",
    "cut off in the length": lambda whole, start: whole[:5],
    "cut off behind the length": lambda whole, start: whole[:8],
    "cut off in the header": lambda whole, start: whole[: start // 2],
    "cut off behind the header": lambda whole, start: whole[:start],
    "cut off in the tensors": lambda whole, start: whole[:-1],
    "text": lambda whole, start: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n",
    "a pickle": lambda whole, start: b"PK\x03\x04" + bytes(200),
    "not UTF-8": lambda whole, start: framed(b'{"\xff\xfe": 1}'),
    "a list": lambda whole, start: framed(b"[1, 2]  "),
    "a number": lambda whole, start: framed(b"12345678"),
    "metadata that are text": lambda whole, start: framed(b'{"__metadata__": "old"} '),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_no_whole_safetensors_file_is_refused_and_left_as_it_was(path: Path, kind: str) -> None:
    whole = saved(path)
    broken = BROKEN[kind](whole, 8 + int.from_bytes(whole[:8], "little"))
    path.write_bytes(broken)
    with pytest.raises(AptError) as caught:
        add_metadata(path, NEW)
    assert str(caught.value).startswith(f"{path}: ")
    assert path.read_bytes() == broken
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("name", ["missing.safetensors", "."], ids=["missing", "a folder"])
def test_a_file_that_cannot_be_read_is_named_and_none_is_made(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with pytest.raises(AptError) as caught:
        add_metadata(path, NEW)
    assert str(caught.value).startswith(f"{path}: cannot be read: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="Windows has other permissions")
@pytest.mark.parametrize("mode", [0o600, 0o664])
def test_the_permissions_are_kept_and_no_other_file_is_left(path: Path, mode: int) -> None:
    saved(path)
    path.chmod(mode)
    add_metadata(path, NEW)
    assert path.stat().st_mode & 0o777 == mode
    assert list(path.parent.iterdir()) == [path]
