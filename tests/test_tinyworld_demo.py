import functools
import json
import multiprocessing

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytest.importorskip("matplotlib")

from apt_hooks.errors import AptError
from apt_hooks.tinyworld import evaluate
from apt_hooks.tinyworld.concepts import CONCEPTS
from apt_hooks.tinyworld.demo import run_demo, shown_rows
from apt_hooks.tinyworld.evaluate import METRICS
from apt_hooks.tinyworld.experiment import Setting, run_methods
from apt_hooks.tinyworld.model import sample
from apt_hooks.tinyworld.personalize import Training
from apt_hooks.tinyworld.world import BACKGROUNDS

PICTURES = ("comparison.png", "indicator.png", "delta_noise.png", "attention.png")


@pytest.fixture(scope="module", autouse=True)
def rough():
    """Pictures of two steps of sampling: no test here looks at how good they are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "sample", functools.partial(sample, steps=2))
        yield


def demo(out, *, methods, concept=5, seed=0, steps=2, scenes=4, model="unet"):
    said = []
    metrics = run_demo(
        out,
        concept=concept,
        seed=seed,
        methods=methods,
        model=model,
        training=Training(steps=steps),
        scenes=scenes,
        repeats=1,
        workers=1,  # in this process, where the sampling is a rough one
        say=said.append,
    )
    return metrics, "\n".join(said)


@pytest.fixture(scope="module")
def together(rough, tmp_path_factory):
    """The folder of a demo of several methods, and what it returned and said."""
    folder = tmp_path_factory.mktemp("demo") / "together"
    return folder, *demo(folder, methods=("base", "dreambooth", "dco", "apt"))


def test_a_demo_writes_pictures_numbers_and_loras_and_says_so(together):
    folder, metrics, said = together
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert (metrics["concept"], metrics["seed"], metrics["samples"]) == (5, 0, 4)
    assert list(metrics["methods"]) == ["base", "dreambooth", "dco", "apt"]
    for name, scores in metrics["methods"].items():
        assert set(scores) == {*METRICS, "delta_noise"} and (scores["delta_noise"] > 0) == (name != "base")
        assert set(metrics["spread"][name]) == {"text", "identity"} and metrics["spread"][name]["identity"] > 0
    for name in PICTURES:
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    for name in ("dreambooth", "dco", "apt"):
        assert (folder / f"{name}.safetensors").exists()
        assert len((folder / f"{name}-apt.jsonl").read_text().splitlines()) == 1 + 2  # what run it is, and two steps
    assert all(name in said for name in ("DreamBooth", "frechet", "comparison.png"))
    assert [path.name for path in sorted((folder / "references").iterdir())] == ["0.png", "1.png", "2.png", "3.png"]
    prompts = (folder / "prompts.txt").read_text().splitlines()
    assert len(prompts) == len(set(prompts)) == 4 and all(prompt.count("{}") == 1 for prompt in prompts)


def test_a_method_repeats_itself_and_does_not_depend_on_which_others_ran(together, tmp_path):
    folder, metrics, _ = together
    alone, _ = demo(tmp_path, methods=("apt",))
    assert alone["methods"]["apt"] == metrics["methods"]["apt"]
    for name in ("apt.safetensors", "indicator.png"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    # But for the time at which each was started.
    one, two = ((run / "apt-apt.jsonl").read_text().splitlines()[1:] for run in (tmp_path, folder))
    assert one == two


def test_the_base_model_alone_needs_no_training(tmp_path):
    (tmp_path / "indicator.png").write_bytes(b"of an earlier run")
    metrics, said = demo(tmp_path, methods=("base",))
    assert "comparison.png" in said and "indicator.png" not in said
    assert list(metrics["methods"]) == ["base"] and not (tmp_path / "indicator.png").exists()


def test_processes_side_by_side_make_what_one_makes(tmp_path):
    setting, steps = Setting(5, training=Training(steps=2), scenes=4, repeats=1), []
    examination = setting.examination(base=torch.randn(4, 48))
    names, folders = ("ideal", "dreambooth"), [tmp_path / "two", tmp_path / "one"]
    made = []
    for workers, folder in zip((2, 1), folders, strict=True):
        folder.mkdir()
        ran = run_methods(names, examination, setting, out=folder, workers=workers, advance=lambda: steps.append(1))
        made.append(dict(ran))
    two, one = made
    assert steps == [1] * 4 and two.keys() == one.keys() == set(names)
    assert torch.equal(two["ideal"].judgement.pictures, one["ideal"].judgement.pictures)
    assert two["dreambooth"].trained.delta_noise == one["dreambooth"].trained.delta_noise
    assert len({(folder / "dreambooth.safetensors").read_bytes() for folder in folders}) == 1


def test_what_fails_in_a_process_is_told_and_ends_the_others(tmp_path):
    setting = Setting(5, training=Training(steps=100_000), scenes=4, repeats=1)
    examination = setting.examination(base=torch.zeros(4, 48))
    with pytest.raises(KeyError, match="no-such-method"):
        list(run_methods(("apt", "no-such-method"), examination, setting, out=tmp_path, workers=2))
    assert not multiprocessing.active_children()


def test_what_stops_the_demo_ends_its_processes_at_once(tmp_path):
    def stop():
        raise KeyboardInterrupt

    setting = Setting(5, training=Training(steps=100_000), scenes=4, repeats=1)
    examination = setting.examination(base=torch.zeros(4, 48))
    with pytest.raises(KeyboardInterrupt):
        list(run_methods(("dreambooth", "apt"), examination, setting, out=tmp_path, workers=2, advance=stop))
    assert not multiprocessing.active_children()


def test_the_transformer_has_a_demo_too(tmp_path):
    metrics, said = demo(tmp_path, methods=("ideal", "apt"), model="transformer")
    assert metrics["model"] == "transformer" and metrics["methods"]["apt"]["delta_noise"] > 0
    assert all((tmp_path / name).exists() for name in PICTURES) and "better:" in said


def test_what_is_shown_is_the_first_photo_of_each_background(rough):
    examination = Setting(5, scenes=24, repeats=2).examination(base=torch.zeros(48, 48))
    rows = shown_rows(examination)
    shown = [examination.scenes[row] for row in rows]
    assert {scene.background for scene in shown} == set(BACKGROUNDS) - {CONCEPTS[5].background}
    assert len(shown) == 5
    for row, scene in zip(rows, shown, strict=True):
        same = [s for s in examination.scenes if s.background == scene.background]
        photos = [s for s in same if s.style == "photo"]
        assert scene == (photos or same)[0] and row == examination.scenes.index(scene)


def test_an_unknown_model_is_told(tmp_path):
    with pytest.raises(AptError, match="--model takes unet, transformer; found 'sdxl'"):
        demo(tmp_path, methods=("apt",), model="sdxl")
