"""What the patched reader does with the parsed training TOML."""

from __future__ import annotations

import argparse

import pytest

from apt_hooks.integrations.sd_scripts.adapter import take_section


def parser(*, patched: bool) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="train.py")
    if patched:
        made.add_argument("--apt_config", default=None)
    return made


def test_the_section_leaves_the_config_and_waits_for_the_trainer() -> None:
    config, reader = {"seed": 1, "apt": {"preset": "sdxl"}}, parser(patched=True)
    take_section(config, reader)
    assert config == {"seed": 1}
    assert reader.parse_args([]).apt_section == {"preset": "sdxl"}


@pytest.mark.parametrize(
    ("name", "patched", "said"), [("apt", False, "train.py has an [apt] section"), ("APT", True, "[APT]; write [apt]")]
)
def test_a_section_that_would_be_passed_over_ends_the_program(name: str, patched: bool, said: str) -> None:
    with pytest.raises(SystemExit) as ended:
        take_section({name: {}}, parser(patched=patched))
    assert str(ended.value).startswith("apt-hooks: error: ") and said in str(ended.value)
