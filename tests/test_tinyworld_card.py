import json

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")

from apt_hooks.tinyworld import card
from apt_hooks.tinyworld.denoisers import DENOISERS
from apt_hooks.tinyworld.model import PIPELINES, new_model, new_tokenizer, save_denoiser

STAGE = {"steps": 3000, "batch": 32, "seconds": 600, "losses": [{"step": 200, "mse": 0.5}, {"step": 3000, "mse": 0.25}]}


@pytest.mark.parametrize("denoiser", DENOISERS.values(), ids=DENOISERS)
def test_a_card_tells_of_the_parts_in_its_folder_and_of_how_they_are_sampled(tmp_path, monkeypatch, denoiser):
    monkeypatch.setattr(card, "CAPTIONS", 3)
    torch.manual_seed(0)
    save_denoiser(new_model(new_tokenizer(), denoiser), tmp_path)
    record = {
        "seed": 5,
        "device": "a device",
        "torch": "2",
        "options": " --options",
        "data": ["data."],
        "notes": ["note."],
    }
    (tmp_path / "training.json").write_text(json.dumps({**record, denoiser.part: STAGE}), encoding="utf-8")
    card.write_card(tmp_path)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    count = sum(p.numel() for p in denoiser.new().parameters()) / 1e6
    lent = "(that of the U-Net's pipeline)"
    assert f"vae 0.68 M {lent}, text_encoder 0.42 M {lent}, {denoiser.part} {count:.2f} M." in text
    assert "`python -m apt_hooks.tinyworld.pretrain --options` with seed 5 on a device" in text
    assert (
        f"\n| {denoiser.part} | 3000 | 32 | 10 | mse 0.25 |\n\n" in text and "- data.\n" in text and " note.\n" in text
    )
    assert f"guidance {denoiser.guidance}, {denoiser.sampling_steps} steps of {denoiser.sampler}:" in text
    assert "Share of 3 captions" in text and "1.3 a " in text and "1.4" not in text
    assert (tmp_path / "samples.png").stat().st_size > 1000


def test_the_cards_that_come_with_the_package_are_of_their_records():
    for name, folder in PIPELINES.items():
        record = json.loads((folder / "training.json").read_text(encoding="utf-8"))
        text = (folder / "README.md").read_text(encoding="utf-8")
        assert f"| {name} | {record[name]['steps']} |" in text
        assert all(f"- {line}\n" in text for line in record["data"])
        assert all(line in text for line in DENOISERS[name].remarks)
