"""The template, by the contract that it is to pass; and that the contract notices what breaks it."""

import json

import pytest
import torch
from models import LATENTS, TEXT_WIDTH, TOKENS, make_tuned
from torch.nn import functional as F

from apt_hooks import AptConfig, AptError
from apt_hooks.integrations.adapter_template import Adapter
from apt_hooks.training.adapter_contract import CONTRACT, Trained
from apt_hooks.training.resume import load_state, save_state
from apt_hooks.training.step import AptStep


class Trainer:
    """A loop of one's own: a tiny U-Net with LoRA, images that are encoded, and a state that can be saved."""

    def __init__(self, folder, config):
        self.unet, self.network = make_tuned("up_blocks")
        self.unet.requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-2)
        self.stream = torch.Generator().manual_seed(3)
        self.folder, self.adapter = folder, None
        self.images = torch.rand(2, LATENTS, 4 * self.unet.size, 4 * self.unet.size, generator=self.stream)
        self.context = torch.randn(2, TOKENS, TEXT_WIDTH, generator=self.stream)
        if config is not None:
            named = [(f"lora.{name}", p) for name, p in self.network.named_parameters()]
            config = AptConfig.from_mapping(config)
            self.adapter = Adapter(config, self.unet, self.network.off, named, folder=folder, name="lora", seed=0)

    def step(self):
        adapter = self.adapter
        timesteps = torch.randint(1000, (2,), generator=self.stream)
        images = self.images if adapter is None else adapter.augment(self.images, timesteps)
        latents = F.avg_pool2d(images, 4)
        noise = torch.randn(latents.shape, generator=self.stream)
        noisy = latents + noise * timesteps[:, None, None, None] / 1000
        call = lambda: self.unet(noisy, timesteps, self.context)  # noqa: E731
        prediction = call() if adapter is None else adapter.predict(call)
        per_sample = lambda prediction: (prediction - noise).square().mean(dim=(1, 2, 3))  # noqa: E731
        loss = per_sample(prediction).mean() if adapter is None else adapter.loss(noise, timesteps, per_sample)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if adapter is not None:
            adapter.ended()

    def save(self):
        state = {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save({**state, "stream": self.stream.get_state()}, self.folder / "state.pt")
        if self.adapter is not None:
            save_state(self.adapter.run, self.folder)

    def load(self):
        state = torch.load(self.folder / "state.pt")
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.stream.set_state(state["stream"])
        if self.adapter is not None:
            load_state(self.adapter.run, self.folder)

    def close(self):
        if self.adapter is not None:
            self.adapter.close()


@pytest.fixture
def train(tmp_path):
    runs = []

    def train(config, *, stopped=False):
        folder = tmp_path / str(len(runs))
        folder.mkdir()
        runs.append(folder)
        trainer = Trainer(folder, config)
        for step in range(4):
            if stopped and step == 2:
                trainer.save()
                trainer.close()
                trainer = Trainer(folder, config)
                trainer.load()
            trainer.step()
        trainer.close()
        log = folder / "lora-apt.jsonl"
        lines = map(json.loads, log.read_text().splitlines()) if log.exists() else ()
        weights = {name: w.detach().clone() for name, w in trainer.network.named_parameters()}
        return Trained(weights, [line for line in lines if "run" not in line], [trainer.unet, trainer.network])

    return train


@pytest.mark.parametrize("check", CONTRACT, ids=lambda check: check.__name__)
def test_the_template_keeps_the_contract(train, check):
    check(train)


def broken_weight(monkeypatch):
    monkeypatch.setattr(AptStep, "loss", lambda self, losses: losses.mean() * 1.001 + self.regularizer)


def broken_regularizer(monkeypatch):
    monkeypatch.setattr(AptStep, "loss", lambda self, losses: (losses * self.weight).mean())


def broken_state(monkeypatch):
    save = Trainer.save
    monkeypatch.setattr(Trainer, "save", lambda self: (save(self), (self.folder / "apt-hooks.json").unlink())[0])


def broken_traces(monkeypatch):
    step = Trainer.step
    monkeypatch.setattr(
        Trainer, "step", lambda self: (step(self), self.adapter and self.unet.register_forward_hook(lambda *_: None))[0]
    )


@pytest.mark.parametrize(
    ("breaks", "rule"),
    [
        (broken_weight, "with_all_terms_off_the_lora_is_the_plain_one"),
        (broken_weight, "monitor_only_tells_everything_and_changes_nothing"),
        (broken_regularizer, "each_term_reaches_the_lora"),
        (broken_state, "a_resumed_run_is_the_uninterrupted_one"),
        (broken_traces, "nothing_is_left_on_the_models"),
    ],
)
def test_the_contract_notices_what_breaks_it(train, monkeypatch, breaks, rule):
    breaks(monkeypatch)
    check = next(check for check in CONTRACT if check.__name__ == rule)
    with pytest.raises(AssertionError):
        check(train)


def test_class_images_are_left_alone_and_gamma_is_of_epsilon(tmp_path):
    unet, network = make_tuned("up_blocks")
    named = list(network.named_parameters())
    given = {"folder": tmp_path, "name": None, "seed": 0, "predicts": "v_prediction"}
    with pytest.raises(AptError, match="a model that predicts v_prediction needs alphas_cumprod"):
        Adapter(AptConfig(), unet, network.off, named, **given)
    alphas = torch.linspace(0.99, 0.01, 1000)
    adapter = Adapter(AptConfig(augment_max_probability=1.0), unet, network.off, named, alphas_cumprod=alphas, **given)
    timesteps = torch.tensor([100, 900])
    adapter.run.objective.indicator.update(timesteps, torch.zeros(2), torch.ones(2))
    images = torch.zeros(2, LATENTS, unet.size, unet.size)
    moved = adapter.augment(images, timesteps, torch.tensor([True, False]))
    assert not moved[1].any() and moved[0].any()
    target = torch.randn(images.shape)
    adapter.predict(lambda: unet(images, timesteps, torch.zeros(2, TOKENS, TEXT_WIDTH)))
    adapter.loss(target, timesteps, lambda x: (x - target).square().mean(dim=(1, 2, 3)))
    taken = adapter.run.objective.indicator.state_dict()["loss_tuned"][1]
    wanted = 0.1 * float(adapter._step.values["loss_tuned"]) * float(alphas[100])
    assert taken == pytest.approx(wanted, rel=1e-4)
    adapter.close()
