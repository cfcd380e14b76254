import json

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytest.importorskip("matplotlib")

from apt_hooks.tinyworld.demo import run_demo
from apt_hooks.tinyworld.evaluate import METRICS
from apt_hooks.tinyworld.personalize import Training

PICTURES = ("comparison.png", "indicator.png", "delta_noise.png", "attention.png")


def demo(out, *, methods=("base", "dreambooth", "apt"), concept=5, seed=0, steps=2, scenes=4):
    said = []
    metrics = run_demo(
        out,
        concept=concept,
        seed=seed,
        methods=methods,
        training=Training(steps=steps),
        scenes=scenes,
        repeats=1,
        say=said.append,
    )
    return metrics, "\n".join(said)


def test_a_demo_writes_pictures_numbers_and_loras_and_says_so(tmp_path):
    metrics, said = demo(tmp_path / "one")
    assert json.loads((tmp_path / "one" / "metrics.json").read_text()) == metrics
    assert (metrics["concept"], metrics["seed"], metrics["samples"]) == (5, 0, 4)
    assert list(metrics["methods"]) == ["base", "dreambooth", "apt"]
    for name, scores in metrics["methods"].items():
        assert set(scores) == {*METRICS, "delta_noise"} and (scores["delta_noise"] > 0) == (name != "base")
        assert set(metrics["spread"][name]) == {"text", "identity"} and metrics["spread"][name]["identity"] > 0
    for name in PICTURES:
        assert (tmp_path / "one" / name).read_bytes().startswith(b"\x89PNG")
    for name in ("dreambooth", "apt"):
        assert (tmp_path / "one" / f"{name}.safetensors").exists()
        assert len((tmp_path / "one" / f"{name}-apt.jsonl").read_text().splitlines()) == 2
    assert all(name in said for name in ("DreamBooth", "frechet", "comparison.png"))


def test_a_method_repeats_itself_and_does_not_depend_on_which_others_ran(tmp_path):
    alone, _ = demo(tmp_path / "alone", methods=("apt",))
    together, _ = demo(tmp_path / "together", methods=("dco", "apt"))
    assert alone["methods"]["apt"] == together["methods"]["apt"]
    for name in ("apt.safetensors", "apt-apt.jsonl", "indicator.png"):
        assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "together" / name).read_bytes()


def test_the_base_model_alone_needs_no_training(tmp_path):
    (tmp_path / "indicator.png").write_bytes(b"of an earlier run")
    metrics, said = demo(tmp_path, methods=("base",))
    assert "comparison.png" in said and "indicator.png" not in said
    assert list(metrics["methods"]) == ["base"] and not (tmp_path / "indicator.png").exists()
