import json
import re

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytest.importorskip("matplotlib")

from PIL import Image
from tiny_judges import save_clip, save_loras
from transformers import CLIPConfig, CLIPModel, CLIPTextModel
from typer.testing import CliRunner

from apt_hooks import AptError
from apt_hooks.cli import app
from apt_hooks.integrations.sampling.sweep import ClipJudge, find_checkpoints
from apt_hooks.integrations.sampling.word_maps import words_of
from apt_hooks.results import pictures
from apt_hooks.tinyworld.model import new_tokenizer

PROMPT = "a photo of a big sks cup in the snow"
FEW = ("--model", "tinyworld", "--prompt", PROMPT, "--steps", "4", "--guidance-scale", "4")


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    """Two random ones, named as kohya names an earlier and the last epoch's."""
    folder = tmp_path_factory.mktemp("loras")
    save_loras(folder, ("cup-000002", "cup"))
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def references(tmp_path):
    folder = tmp_path / "references"
    folder.mkdir()
    for i, color in enumerate(("red", "blue")):
        Image.new("RGB", (40, 30), color).save(folder / f"{i}.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if code == 0 and result.exception:
        raise result.exception
    assert (result.exit_code != 0) == (code != 0)
    return result


def test_blend_writes_each_picture_all_of_them_together_and_the_maps(loras, tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(pictures, "draw_attention", lambda path, *given: drawn.update({path.name: given}))
    early, late = find_checkpoints(loras).values()
    arguments = ("blend", *FEW, "--early", early, "--late", late, "--guidance-lr", "1", "--seed", "5", "--count", "2")
    said = run(*arguments, "--out", tmp_path / "out").stdout
    assert "attention kept of a run: 0.4 MiB" in said  # 4 steps, 2 bytes, 45056 numbers of queries and 6400 of keys
    names = [f"{seed}-{name}.png" for seed in (5, 6) for name in ("early", "late", "blend")]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {*names, "blend.png"}
    assert len({(tmp_path / "out" / name).read_bytes() for name in names}) == 6
    words, shown, maps = drawn["6-maps.png"]
    assert words == ["photo", "big", "sks", "cup", "snow"] and list(shown) == list(maps) == ["early", "late", "blend"]
    assert {tuple(m.shape) for m in maps.values()} == {(5, 16, 16)} and not torch.equal(maps["late"], maps["blend"])
    again = run(*arguments, "--out", tmp_path / "again").stdout
    assert again.replace("again", "out") == said
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_maps_draws_the_base_and_each_lora_at_the_nearest_timesteps(loras, tmp_path, monkeypatch):
    drawn = []
    draw = pictures.draw_attention
    monkeypatch.setattr(pictures, "draw_attention", lambda *given: drawn.append(given) or draw(*given))
    out = tmp_path / "maps.png"
    run("maps", *FEW, "--lora", loras / "cup.safetensors", "--timesteps", "999,250", "--out", out)
    (_, words, shown, maps), moments = drawn[0], ("t=801", "t=201")
    assert list(maps) == [f"{name}, {moment}" for name in ("base model", "cup") for moment in moments]
    assert torch.equal(shown["base model, t=801"], shown["base model, t=201"])
    assert not torch.equal(shown["base model, t=801"], shown["cup, t=801"])
    assert len(words) == 5 and Image.open(out).size[0] > 500


def test_collapse_prints_a_number_a_lora(loras):
    both = [argument for path in sorted(loras.iterdir()) for argument in ("--lora", path)]
    lines = run("maps", *FEW, "--collapse", *both).stdout.splitlines()
    assert lines[0].endswith("share of the attention that lies elsewhere than the base model's")
    found = dict(line.split() for line in lines[1:])
    assert 0 < float(found["cup-000002"]) < float(found["cup"]) < 1


def test_a_sweep_scores_each_checkpoint_and_each_pair(loras, clip, references, tmp_path):
    out = tmp_path / "out"
    given = ("--sweep", loras, "--references", references, "--clip", clip, "--plain-prompt", PROMPT.replace("sks ", ""))
    said = run("blend", *FEW, *given, "--guidance-lr", "1", "--count", "2", "--out", out).stdout
    rows = json.loads((out / "sweep.json").read_text())
    assert [(row["early"], row["late"]) for row in rows] == [(None, "2"), (None, "last"), ("2", "last")]
    assert all(-1 <= row[score] <= 1 for row in rows for score in ("text", "subject"))
    assert len({row["subject"] for row in rows}) == 3
    assert "2 + last" in said and (out / "sweep.png").stat().st_size > 10_000


def test_a_picture_is_most_like_itself(clip, references):
    judge = ClipJudge(references, str(clip))
    red, blue = (Image.new("RGB", (64, 64), color) for color in ("red", "blue"))
    text, subject = judge.score([red, blue], "a photo of a cup")
    assert judge.score([red], "a photo of a cup")[1] == pytest.approx(judge.score([blue], "a cup")[1], abs=1e-5)
    cosine = 2 * subject - 1  # two pairs of four are of a picture with itself
    assert -1 <= cosine < 0.9999 and -1 <= text <= 1


def test_the_score_is_transformers_own(clip, references):
    judge = ClipJudge(references, str(clip))
    picture = Image.effect_noise((32, 32), 80).convert("RGB")
    text, _ = judge.score([picture], "a photo of a cup")
    pixels = torch.tensor(list(picture.getdata())).reshape(32, 32, 3).permute(2, 0, 1)[None] / 255
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    deviation = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    model = CLIPModel.from_pretrained(clip)
    with torch.no_grad():
        words = new_tokenizer()(["a photo of a cup"], return_tensors="pt")
        found = model(pixel_values=(pixels - mean) / deviation, **words)
    assert text == pytest.approx(float(found.logits_per_image / model.logit_scale.exp()), abs=1e-5)


def test_words_are_put_together_from_tokens_without_fillers():
    tokenizer = new_tokenizer()
    assert words_of(tokenizer, "a photo of a sks cup") == [("photo", [2]), ("sks", [5]), ("cup", [6])]
    word, places = words_of(tokenizer, "a snowcup")[0]  # which is no token of its own
    assert word == "snowcup" and len(places) > 1 and places[0] == 2
    assert words_of(tokenizer, "a of the , .") == []


@pytest.mark.parametrize(
    ("files", "names"),
    [
        (("a-000010", "a-000002", "a"), ["2", "10", "last"]),
        (("checkpoint-500/lora", "checkpoint-100/lora", "lora"), ["100", "500", "last"]),
        (("sd15-000002", "sd15-000010", "sd15"), ["2", "10", "last"]),
        (("a-step00000500", "a-step00001000"), ["500", "1000"]),
        (("0010", "0005"), ["5", "10"]),
        (("a-000001", "b-000001"), ["a-000001", "b-000001"]),
        (("a-000001", "a", "a-000001-state/model"), ["1", "last"]),
    ],
)
def test_checkpoints_are_in_the_order_of_their_steps(tmp_path, files, names):
    for name in files:
        path = tmp_path / f"{name}.safetensors"
        path.parent.mkdir(exist_ok=True)
        path.touch()
    assert list(find_checkpoints(tmp_path)) == names


def test_checkpoints_by_epoch_and_by_step_are_not_mixed(tmp_path):
    for name in ("a-000001", "a-step00000500"):
        (tmp_path / f"{name}.safetensors").touch()
    with pytest.raises(AptError, match="by epoch and by step"):
        find_checkpoints(tmp_path)


def test_a_clip_that_lacks_a_part_and_a_picture_that_is_none_are_refused(clip, references, tmp_path):
    CLIPTextModel(CLIPConfig.from_pretrained(clip).text_config).save_pretrained(tmp_path / "half")
    new_tokenizer().save_pretrained(tmp_path / "half")
    with pytest.raises(AptError, match=r"--clip .*half: cannot be loaded as a CLIP model"):
        ClipJudge(references, str(tmp_path / "half"))
    (references / "2.png").write_text("no picture")
    with pytest.raises(AptError, match=r"2\.png: cannot be read as a picture"):
        ClipJudge(references, str(clip))


def test_bad_input_is_told_before_anything_is_drawn(loras, clip, references, tmp_path):
    late = loras / "cup.safetensors"
    none = tmp_path / "none"
    none.mkdir()
    out = ("--out", tmp_path / "out")
    for arguments, message in (
        (("blend", *FEW, *out), "blend takes --early and --late, or --sweep and --references"),
        (("blend", *FEW, *out, "--early", late, "--late", late, "--sweep", loras), "blend takes --early and --late"),
        (("blend", *FEW, *out, "--sweep", none, "--references", references), "needs two or more .safetensors, found 0"),
        (("blend", *FEW, *out, "--sweep", loras, "--references", none), "no pictures there"),
        (
            ("blend", *FEW, *out, "--sweep", loras, "--references", references, "--clip", none),
            "--clip .* cannot be loaded",
        ),
        (("maps", *FEW, "--lora", none / "a.safetensors"), "a.safetensors: no such file"),
        (("blend", *FEW, *out, "--early", none / "a", "--late", late), "a: no such file"),
        (("blend", *FEW, *out, "--sweep", none / "b", "--references", references), "b: no such folder"),
        (("maps", *FEW, "--collapse"), "name one or more by --lora"),
        (("maps", *FEW, "--timesteps", "often"), "--timesteps takes whole numbers"),
        (("maps", *FEW, "--timesteps", "5000"), "--timesteps are from 0 to 999; found 5000"),
        (("maps", *FEW, "--out", tmp_path / "nowhere" / "a.png"), "must be a file in a folder that exists"),
        (("maps", *FEW, "--collapse", "--lora", late, "--timesteps", "5"), "leave out --out and --timesteps"),
        (
            ("blend", *FEW, "--early", late, "--late", late, *out),
            "--early and --late are the same file, .*name two checkpoints",
        ),
        (
            ("blend", *FEW, "--early", late, "--late", late, "--guide-from", "9", *out),
            "--guide-from 9: there are only 4 steps",
        ),
        (("maps", *FEW, "--lora", late, "--lora", late), "is named twice"),
        (("maps", "--model", "tinyworld", "--prompt", "of the"), "has no words to draw but of, the"),
        (("maps", "--model", none, "--prompt", PROMPT), "cannot be loaded as a pipeline of diffusers"),
    ):
        error = run(*arguments, code=1).exception
        assert isinstance(error, AptError) and "\n" not in str(error)
        assert re.search(message, str(error))
    assert not list((tmp_path / "out").glob("*"))
