import json
import subprocess
import sys

import pytest

import apt_hooks

HEAVY = ["diffusers", "transformers", "peft", "accelerate", "typer", "triton", "matplotlib"]


@pytest.fixture(scope="module")
def modules(tmp_path_factory):
    """Which a process of its own has after importing torch, then apt_hooks, then apt_hooks.cli."""
    code = """
import json, sys
import torch
after = [list(sys.modules)]
import apt_hooks
after.append(list(sys.modules))
import apt_hooks.cli
after.append(list(sys.modules))
print(json.dumps(after))
"""
    folder = tmp_path_factory.mktemp("modules")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=folder)
    return json.loads(result.stdout)


def test_importing_stays_light(modules):
    # Against `import torch` alone, which brings what it brings (triton on CUDA builds).
    before, with_apt_hooks, _ = modules
    assert "apt_hooks" in with_apt_hooks
    assert [name for name in HEAVY if name in with_apt_hooks and name not in before] == []


def test_the_tiny_world_is_loaded_by_nothing_but_its_own_command(modules):
    *_, with_command = modules
    assert "apt_hooks.cli" in with_command
    assert [name for name in with_command if name.startswith("apt_hooks.tinyworld")] == []


def test_the_root_exports_at_most_twelve_names_and_all_of_them_exist():
    assert len(apt_hooks.__all__) <= 12
    assert [name for name in apt_hooks.__all__ if not hasattr(apt_hooks, name)] == []
