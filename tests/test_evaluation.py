import csv
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytest.importorskip("matplotlib")

from PIL import Image
from tiny_judges import save_clip, save_dino, save_loras
from typer.testing import CliRunner

from apt_hooks import AptError
from apt_hooks.cli import app
from apt_hooks.integrations.embedders import Clip, Dino
from apt_hooks.integrations.judging import evaluation, generate
from apt_hooks.integrations.judging.embedding_judges import Embedder, SubjectJudge, TextJudge, VarietyJudge
from apt_hooks.integrations.judging.judge import Drawn, Score
from apt_hooks.integrations.judging.prompts import SETS, read_prompts
from apt_hooks.integrations.sampling.loras import named
from apt_hooks.integrations.sampling.pipelines import Sampling
from apt_hooks.results.comparison.folders import BASE, Prompt
from apt_hooks.tinyworld.model import load_pipeline, new_tokenizer

PROMPTS = ("a photo of a big {} on the left in the city", "a drawing of a small {} in the middle at night")
SUBJECT = ("--subject", "sks cup", "--class-word", "cup")
FEW = ("--steps", "2", "--guidance-scale", "4", "--count", "2")
FAST = Sampling(steps=2, guidance_scale=4.0)


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    return save_loras(tmp_path_factory.mktemp("loras"), ("one", "two"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    return save_dino(tmp_path_factory.mktemp("dino"))


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    folder = tmp_path_factory.mktemp("references")
    for i, color in enumerate(("red", "blue")):
        Image.new("RGB", (40, 30), color).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("# of the tiny world\n" + "\n".join(PROMPTS) + "\n")
    return path


@pytest.fixture(scope="module")
def first(loras, references, texts, tmp_path_factory):
    """An evaluation of one LoRA, and what was said."""
    out = tmp_path_factory.mktemp("eval") / "out"
    return out, run(*arguments(loras[:1], references, texts, out), *FEW).stdout


def arguments(loras, references, texts, out):
    files = [argument for path in loras for argument in ("--lora", path)]
    return (
        "eval",
        "--model",
        "tinyworld",
        *files,
        "--references",
        references,
        "--prompts",
        texts,
        *SUBJECT,
        "--out",
        out,
    )


def run(*given, code=0):
    result = CliRunner().invoke(app, [str(a) for a in given])
    if code == 0 and result.exception:
        raise result.exception
    assert (result.exit_code != 0) == (code != 0)
    return result


def squares(folder, *colors):
    """Pictures of one color each."""
    files = []
    for i, color in enumerate(colors):
        files.append(folder / f"{i}.png")
        Image.new("RGB", (64, 64), color).save(files[-1])
    return files


# Prompts.


@pytest.mark.parametrize("which", SETS)
def test_dreambooths_lists_have_25_prompts_with_and_without_the_identifier(which):
    found = read_prompts(which, "sks dog", "dog")
    assert len(set(found)) == 25
    assert found[1] == Prompt("a sks dog in the snow", "a dog in the snow")
    assert all(prompt.text.replace("sks ", "") == prompt.plain for prompt in found)


def test_a_file_has_a_prompt_a_line_with_braces_or_the_subject_itself(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeffa {}  in Paris\n\n# no prompt\na sks dog at sea, sks dog!\n", encoding="utf-8")
    paris, sea = read_prompts(str(path), "sks dog", "dog")
    assert (paris.text, paris.plain) == ("a sks dog in Paris", "a dog in Paris")
    assert (sea.text, sea.plain) == ("a sks dog at sea, sks dog!", "a dog at sea, dog!")


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("a sks dogs house\n", "must have"),
        ("a {} here\na cat\n", r"line 2, 'a cat', must have \{\} where the subject is to be, or 'sks dog'"),
        ("# nothing\n", "has no prompt"),
        ("a {}\na  sks dog\n", "'a sks dog' is there twice"),
    ],
)
def test_a_file_of_prompts_that_cannot_be_is_refused(tmp_path, text, error):
    path = tmp_path / "prompts.txt"
    path.write_text(text)
    with pytest.raises(AptError, match=error):
        read_prompts(str(path), "sks dog", "dog")


def test_a_list_that_is_not_there_and_a_subject_of_no_words_are_refused(tmp_path):
    with pytest.raises(AptError, match=r"--prompts lives: is neither one of object, live nor a text file"):
        read_prompts("lives", "sks dog", "dog")
    with pytest.raises(AptError, match="--subject and --class-word must be words"):
        read_prompts("live", " ", "dog")


# Judges, against what transformers computes, and by hand.


@pytest.fixture(scope="module")
def photo():
    """Neither square nor of one color, nor alike in its channels."""
    x, y = torch.meshgrid(torch.linspace(0, 1, 60), torch.linspace(0, 1, 90), indexing="ij")
    pixels = torch.stack([x, y.square(), (7 * x + 5 * y).sin() / 2 + 0.5], dim=-1)
    return Image.fromarray((255 * pixels).round().to(torch.uint8).numpy())


def same_direction(a, b):
    """Resizing before cutting out, as transformers does it, or after, differs by a part of a pixel."""
    assert torch.nn.functional.cosine_similarity(a, b).min() > 0.9998


def test_clip_sees_and_reads_as_transformers_own(clip, photo):
    from transformers import CLIPImageProcessor, CLIPModel

    model = CLIPModel.from_pretrained(clip).eval()
    process = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    words = new_tokenizer()(["a photo of a cup", "a fish"], padding=True, return_tensors="pt")
    mirrored = photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    with torch.no_grad():
        found = model(pixel_values=process([photo, mirrored], return_tensors="pt").pixel_values, **words)
    own = Clip(str(clip))
    same_direction(own.images([photo, mirrored]), found.image_embeds)
    assert torch.allclose(own.texts(["a photo of a cup", "a fish"]), found.text_embeds, atol=1e-5)
    # So that other pixels would not pass.
    assert torch.nn.functional.cosine_similarity(*found.image_embeds, dim=0) < 0.998


def test_dino_sees_as_transformers_own(dino, photo):
    from transformers import BitImageProcessor, Dinov2Model

    model, mirrored = Dinov2Model.from_pretrained(dino).eval(), photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    process = BitImageProcessor(
        size={"shortest_edge": 256},
        crop_size={"height": 224, "width": 224},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    with torch.no_grad():
        pixels = process([photo, mirrored], return_tensors="pt").pixel_values
        tokens = model(pixel_values=pixels).last_hidden_state[:, 0]
    same_direction(Dino(str(dino)).images([photo, mirrored]), tokens)
    assert torch.nn.functional.cosine_similarity(*tokens, dim=0) < 0.998


def test_the_text_score_is_the_mean_cosine_of_each_picture_with_its_own_prompt(clip, tmp_path):
    model, files = Clip(str(clip)), squares(tmp_path, "red", "green", "blue", "white")
    plain = ["a photo of a cup", "a photo of a cup", "a drawing of a fish", "a drawing of a fish"]
    score = TextJudge("clip_t", model).score(Drawn(files, plain, 2, []))["clip_t"]
    images, texts = model.images([Image.open(path) for path in files]), model.texts(plain)
    cosines = (images * texts).sum(dim=1)
    assert score.value == pytest.approx(cosines.mean().item(), abs=1e-6) and score.n == 4
    # Two prompts: the pictures of each are no two samples.
    assert score.error == pytest.approx(cosines.view(2, 2).mean(dim=1).std().item() / math.sqrt(2), abs=1e-6)


def test_the_subject_score_is_the_mean_cosine_with_all_photos(dino, tmp_path):
    model, files = Dino(str(dino)), squares(tmp_path, "red", "green", "blue")
    score = SubjectJudge(Embedder("dino", model.images), files[:2]).score(Drawn(files[2:], ["a cup"], 1, []))["dino"]
    red, green, blue = model.images([Image.open(path) for path in files])
    assert score.value == pytest.approx(((blue @ red + blue @ green) / 2).item(), abs=1e-6)
    assert (score.n, score.error) == (1, None)


def test_a_picture_is_embedded_once(tmp_path):
    seen, files = [], squares(tmp_path, "red", "green")
    embedder = Embedder("colors", lambda pictures: seen.append(len(pictures)) or torch.eye(3)[: len(pictures)])
    assert torch.equal(embedder.of(files), torch.eye(3)[:2])
    assert torch.equal(embedder.of([files[1], files[0], files[1]]), torch.eye(3)[[1, 0, 1]])
    assert seen == [2]


def test_the_vendi_score_counts_the_different_pictures_of_a_prompt(tmp_path):
    pytest.importorskip("vendi_score")
    files = squares(tmp_path, "red", "red", "red", "blue")

    def colors(pictures):
        return torch.tensor([picture.getpixel((0, 0)) for picture in pictures]) / 255.0

    score = VarietyJudge(Embedder("colors", colors), 2).score(Drawn(files, ["a", "a", "b", "b"], 2, []))["vendi"]
    assert score.value == pytest.approx((1 + 2) / 2) and score.n == 2  # two alike, and two with nothing in common


def test_a_model_that_is_not_there_is_told_with_what_to_do(tmp_path):
    for judge, option in ((Clip, "--clip"), (Dino, "--dino")):
        with pytest.raises(AptError, match=rf"{option} .*none: cannot be loaded.*hf download NAME.*by {option}"):
            judge(str(tmp_path / "none"))


# Generating.


def plan(seeds, further=()):
    prompts = tuple(Prompt(text.format("sks cup"), text.format("cup")) for text in PROMPTS)
    return generate.Plan(prompts, tuple(seeds), tuple(further))


def test_a_picture_depends_on_its_prompt_and_seed_and_not_on_its_batch(loras, tmp_path):
    pipeline, asked = load_pipeline(), plan([0, 7], [9])
    pipeline.set_progress_bar_config(disable=True)
    for out, batch in (("alone", 1), ("together", 3)):
        files, own = {"one": loras[0]}, generate.Share()
        generate.generate(
            pipeline, files, asked, FAST, tmp_path / out, batch=batch, own=own, advance=lambda _count: None
        )
    alone, together = tmp_path / "alone", tmp_path / "together"
    paths = [path for name in (BASE, "one") for path in asked.pictures(alone, name)] + asked.more_of_the_base(alone)
    assert len(set(paths)) == 10 and not (alone / "one/000-9.png").exists()
    for path in paths:
        a, b = (torch.tensor(list(Image.open(p).getdata())) for p in (path, together / path.relative_to(alone)))
        assert (a - b).abs().max() <= 1  # of 255: sums in another order


def test_what_a_pipeline_refuses_is_told_in_one_line(tmp_path, monkeypatch):
    """Of some the guidance depends on the number of steps, and they say how."""
    pipeline = load_pipeline()

    def refuse(self, **_given):
        raise ValueError("`guidance_schedule` must have\nlength 2")

    monkeypatch.setattr(type(pipeline), "__call__", refuse)
    with pytest.raises(
        AptError, match=r"^StableDiffusionPipeline draws nothing with .*steps.*: `guidance_.* have length 2$"
    ):
        generate.generate(
            pipeline, {}, plan([0]), FAST, tmp_path, batch=1, own=generate.Share(), advance=lambda _count: None
        )


def test_several_processes_draw_each_picture_once(tmp_path, monkeypatch):
    pipeline, drawn = load_pipeline(), []
    monkeypatch.setattr(generate, "write_atomically", lambda path, _content: drawn.append(path.name))
    monkeypatch.setattr(generate.Share, "wait", lambda _self: None)
    for rank in (0, 1):
        own = generate.Share(rank, 2)
        generate.generate(
            pipeline, {}, plan([0, 1], [2]), FAST, tmp_path, batch=2, own=own, advance=lambda _count: None
        )
    assert sorted(drawn) == [f"{i:03d}-{seed}.png" for i in (0, 1) for seed in (0, 1, 2)]


def prepare_two_processes(folder):
    """As `accelerate launch` starts them, on the CPU."""
    (lora,) = save_loras(folder, ("one",))
    Image.new("RGB", (64, 64), "red").save(folder / "photo.png")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    launch = (sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "apt_hooks")
    command = [*launch, *arguments([lora], folder, folder / "prompts.txt", folder / "out"), *FEW]
    return [str(part) for part in command], {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.mark.ahead.with_args(prepare_two_processes)
def test_two_processes_draw_and_judge_what_one_does(ahead, first):
    assert ahead.returncode == 0, ahead.stderr
    out = Path(ahead.args[-len(FEW) - 1])
    one, two = (json.loads((folder / "metrics.json").read_text()) for folder in (first[0], out))
    for name, scores in one["scores"].items():
        if name == BASE:  # the photos of the subject are others here
            assert two["scores"][name]["text"] == scores["text"]
            assert two["scores"][name]["frechet"]["value"] == pytest.approx(scores["frechet"]["value"], rel=1e-3)
    assert ahead.stdout.count("metrics.json") == 1
    for path in (first[0] / BASE).iterdir():
        assert (out / BASE / path.name).read_bytes() == path.read_bytes()


# The command.


def test_eval_draws_judges_and_writes_pictures_and_numbers(first):
    out, said = first
    names = {f"{i:03d}-{seed}.png" for i in (0, 1) for seed in (0, 1)}
    assert {path.name for path in (out / "one").iterdir()} == names
    further = {f"{i:03d}-{seed}.png" for i in (0, 1) for seed in (2, 3)}
    assert {path.name for path in (out / "base").iterdir()} == names | further
    assert (out / "base/000-0.png").read_bytes() != (out / "one/000-0.png").read_bytes()
    metrics = json.loads((out / "metrics.json").read_text())
    assert list(metrics["metrics"]) == ["text", "identity", "frechet", "precision", "recall"]
    assert metrics["metrics"]["frechet"]["best"] == "lowest" and metrics["seeds"] == [0, 1]
    # The base model's own distance to itself, under other noise, is what a LoRA that changes nothing would have.
    assert set(metrics["scores"]["base"]) == set(metrics["scores"]["one"]) == set(metrics["metrics"])
    assert metrics["scores"]["one"]["text"]["n"] == 4
    rows = list(csv.DictReader((out / "metrics.csv").read_text().splitlines()))
    assert len(rows) == 10 and rows[-1]["name"] == "one" and rows[-1]["metric"] == "recall"
    for row in rows:
        assert float(row["value"]) == metrics["scores"][row["name"]][row["metric"]]["value"]
    assert Image.open(out / "grid.png").size[0] > 300
    assert all(word in said for word in ("frechet", "lowest is best; n 4", "grid.png", "±"))


def test_eval_goes_on_where_it_stopped_and_takes_another_lora(first, loras, references, texts, tmp_path, monkeypatch):
    out = shutil.copytree(first[0], tmp_path / "out")
    (out / "one/001-0.png").unlink()
    before = {path: path.read_bytes() for name in ("base", "one") for path in (out / name).iterdir()}
    drawn = []
    write = generate.write_atomically
    monkeypatch.setattr(
        generate, "write_atomically", lambda path, content: drawn.append(path.relative_to(out)) or write(path, content)
    )
    run(*arguments(loras, references, texts, out), *FEW)
    assert sorted(map(str, drawn)) == ["one/001-0.png", *(f"two/00{i}-{seed}.png" for i in (0, 1) for seed in (0, 1))]
    assert all(path.read_bytes() == content for path, content in before.items())
    assert (out / "one/001-0.png").read_bytes() == (first[0] / "one/001-0.png").read_bytes()
    assert list(json.loads((out / "manifest.json").read_text())["loras"]) == ["one", "two"]
    # All is there: no model has to be loaded to judge again.
    monkeypatch.setattr(evaluation, "load_pipeline", lambda _model: pytest.fail("loaded"))
    run(*arguments(loras, references, texts, out), *FEW)


def test_ctrl_c_ends_with_one_line_that_says_how_to_go_on(first, loras, references, texts, tmp_path, monkeypatch):
    out = shutil.copytree(first[0], tmp_path / "out")
    (out / "one/001-0.png").unlink()

    def stopped(*_given, **_more):
        raise KeyboardInterrupt

    given = [*arguments(loras[:1], references, texts, out), *FEW]
    monkeypatch.setenv("FORCE_COLOR", "1")  # the bar is drawn as in a terminal, and must have ended its line
    with monkeypatch.context() as patched:
        patched.setattr(evaluation, "generate", stopped)
        result = run(*given, code=130)
    assert result.exit_code == 130
    line = "apt-hooks: stopped; the same command goes on with the 1 pictures that are missing"
    shown = re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", result.output)
    assert [said for said in shown.splitlines() if "stopped" in said] == [line]
    monkeypatch.setattr(evaluation, "score_all", stopped)
    assert "all pictures are there, and the same command judges them" in run(*given, code=130).output


def test_pictures_of_other_settings_are_not_mixed_in(first, loras, references, texts, tmp_path):
    out = shutil.copytree(first[0], tmp_path / "out")
    given = arguments(loras[:1], references, texts, out)
    for other, error in (
        (("--steps", "3", "--guidance-scale", "4", "--count", "2"), r"steps 2, here 3; choose another folder"),
        (("--steps", "2", "--guidance-scale", "4", "--count", "3"), r"seeds \[0, 1\], here \[0, 1, 2\]"),
    ):
        with pytest.raises(AptError, match=error):
            run(*given, *other)
    replaced = tmp_path / "one.safetensors"
    shutil.copy(loras[1], replaced)
    with pytest.raises(AptError, match=r"pictures of another one than .*one\.safetensors is now; remove"):
        run(*arguments([replaced], references, texts, out), *FEW)
    shutil.rmtree(out / "one")
    run(*arguments([replaced], references, texts, out), *FEW)  # the way out that the error names
    assert (out / "one/000-0.png").read_bytes() != (first[0] / "one/000-0.png").read_bytes()
    (out / "manifest.json").write_text("{}")
    with pytest.raises(AptError, match=r"manifest\.json: is no manifest of an evaluation"):
        run(*given, *FEW)
    (out / "manifest.json").unlink()
    with pytest.raises(AptError, match=r"base/ has pictures already, and no manifest\.json says how they were drawn"):
        run(*given, *FEW)


def test_a_lora_keeps_its_name_whatever_it_is_named_with(first, loras, references, texts, tmp_path):
    out, other = shutil.copytree(first[0], tmp_path / "out"), tmp_path / "other" / "one.safetensors"
    other.parent.mkdir()
    shutil.copy(loras[1], other)
    said = run(*arguments([loras[0], other], references, texts, out), *FEW).stdout
    assert list(json.loads((out / "metrics.json").read_text())["scores"]) == ["base", "one", "other_one"]
    assert "one, other_one beside the base" in said
    shutil.copy(loras[0], tmp_path / "copy.safetensors")
    with pytest.raises(AptError, match=r"copy\.safetensors: is the same as .*one\.safetensors; leave one of them out"):
        run(*arguments([loras[0], tmp_path / "copy.safetensors"], references, texts, out), *FEW)


def test_a_lora_that_was_stopped_does_not_hinder_another(first, loras, references, texts, tmp_path):
    out = shutil.copytree(first[0], tmp_path / "out")
    (out / "one/001-1.png").unlink()
    run(*arguments(loras[1:], references, texts, out), *FEW)
    assert list(json.loads((out / "metrics.json").read_text())["scores"]) == ["base", "two"]
    assert (out / "grid.png").stat().st_mtime > (first[0] / "grid.png").stat().st_mtime


def test_bad_input_is_told_before_anything_is_drawn(loras, references, texts, tmp_path):
    out, none = tmp_path / "out", tmp_path / "none"
    for given, error in (
        (arguments([none], references, texts, out), "none: no such file"),
        (arguments(loras, none, texts, out), "--references .*none: no such folder"),
        (arguments(loras, references, none, out), "--prompts .*none: is neither one of object, live"),
        (arguments([loras[0], loras[0]], references, texts, out), "one.safetensors: is named twice"),
        ((*arguments(loras, references, "live", out),), "is no caption of the tiny world"),
        (
            (*arguments(loras, references, texts, out), "--metrics", "clip,fid"),
            "--metrics takes clip, dino, .* found 'fid'",
        ),
        ((*arguments(loras, references, texts, out), "--metrics", "clip"), "the tiny world has judges of its own"),
    ):
        with pytest.raises(AptError, match=error):
            run(*given, *FEW)
    assert not out.exists()


def test_loras_of_one_file_name_are_told_apart_by_their_folders(tmp_path):
    paths = []
    for folder in ("dreambooth", "apt"):
        (tmp_path / folder).mkdir()
        paths.append(tmp_path / folder / "lora.v2.safetensors")
        paths[-1].write_bytes(b"")
    assert list(named(paths)) == ["dreambooth_lora_v2", "apt_lora_v2"]
    assert list(named(paths[:1])) == ["lora_v2"]
    with pytest.raises(AptError, match="'lora_v2' is the name of another model; rename the file"):
        named(paths[:1], taken=("lora_v2",))


def test_models_of_other_kinds_are_judged_by_clip_dino_and_hps(first, clip, dino, loras, references, texts, tmp_path):
    """The tiny world's pipeline as a folder, as a user's would be."""
    folder, out = tmp_path / "model", tmp_path / "out"
    load_pipeline().save_pretrained(folder)
    given = [str(a) if a != "tinyworld" else str(folder) for a in arguments(loras[:1], references, texts, out)]
    models = ("--clip", clip, "--dino", dino, "--hps", clip)
    said = run(*given, *FEW, *models, "--metrics", "clip,dino,hps").stdout
    metrics = json.loads((out / "metrics.json").read_text())
    assert {name: of["model"] for name, of in metrics["metrics"].items()} == {
        "clip_t": str(clip),
        "dino": str(dino),
        "hps_v2": str(clip),
    }
    assert all(metrics["scores"][name]["clip_t"] == metrics["scores"][name]["hps_v2"] for name in ("base", "one"))
    assert metrics["scores"]["one"]["dino"]["n"] == 4 and "hps_v2" in said
    assert len(list((out / "base").iterdir())) == 4  # nothing here is measured to more of them
    one = ("--steps", "2", "--guidance-scale", "4", "--count", "1")
    given[-1] = str(tmp_path / "alone")
    said = run(*given, *one, *models, "--metrics", "clip,vendi").stdout
    assert "the Vendi score compares a prompt's pictures, so it needs a --count of 2 or more; left out" in said
    with pytest.raises(AptError, match=r"--metrics must name one or more of clip, .*; nothing is left"):
        run(*given, *one, "--metrics", "vendi")


def test_the_tiny_worlds_transformer_is_judged_as_its_unet_is(references, texts, tmp_path):
    (lora,) = save_loras(tmp_path, ("one",), "transformer")
    out = tmp_path / "out"
    given = [a if a != "tinyworld" else "tinyworld-transformer" for a in arguments([lora], references, texts, out)]
    said = run(*given, "--count", "2").stdout
    assert "drawn in 10 steps, guided by 4.0" in said  # its own, as nothing else is asked for
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["scores"]["base"]["text"]["value"] > 0.9  # a model that draws what is asked
    assert metrics["scores"]["one"]["frechet"]["value"] > metrics["scores"]["base"]["frechet"]["value"]
    assert metrics["sampling"] == {
        "steps": 10,
        "guidance_scale": 4.0,
        "height": 64,
        "width": 64,
        "scheduler": "FlowMatchEulerDiscreteScheduler",
    }
    assert "drawn in" not in run(*given, "--count", "2").stdout  # all pictures are there
    with pytest.raises(AptError, match="holds pictures of steps 10, here 3"):
        run(*given, "--count", "2", "--steps", "3")
    with pytest.raises(AptError, match="does not fit the model, a StableDiffusionPipeline"):
        run(*arguments([lora], references, texts, tmp_path / "other"), *FEW)


def test_a_black_picture_is_told_of(first, loras, references, texts, tmp_path):
    out = shutil.copytree(first[0], tmp_path / "out")
    Image.new("RGB", (64, 64)).save(out / "one/000-1.png")
    said = run(*arguments(loras[:1], references, texts, out), *FEW).stdout
    assert "note: 1 pictures are black, first" in said and "one/000-1.png" in said


def test_a_mean_of_one_value_has_no_error():
    assert Score.mean([0.5]) == Score(0.5, 1, None)
    assert Score.mean([1.0, 3.0]) == Score(2.0, 2, 1.0)
