import subprocess
import sys

import apt_hooks

HEAVY = ["diffusers", "transformers", "peft", "accelerate", "typer", "triton", "matplotlib"]


def test_importing_stays_light(tmp_path):
    # Against `import torch` alone, which brings what it brings (triton on CUDA builds).
    code = f"""
import sys
import torch
before = set(sys.modules)
import apt_hooks
print(*(name for name in {HEAVY} if name in sys.modules and name not in before))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert result.stdout.split() == []


def test_the_tiny_world_is_loaded_by_nothing_but_its_own_command(tmp_path):
    code = """
import sys
import apt_hooks, apt_hooks.cli
print(*(name for name in sys.modules if name.startswith("apt_hooks.tinyworld")))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert result.stdout.split() == []


def test_the_root_exports_at_most_twelve_names_and_all_of_them_exist():
    assert len(apt_hooks.__all__) <= 12
    assert [name for name in apt_hooks.__all__ if not hasattr(apt_hooks, name)] == []
