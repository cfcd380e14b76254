"""torch-fidelity's numbers of our pictures, against the same computed here from its networks' features."""

import importlib.util

import pytest
import torch

from apt_hooks import AptError
from apt_hooks.integrations.judging import fidelity_judge
from apt_hooks.integrations.judging.fidelity_judge import FidelityJudge, find_weights
from apt_hooks.integrations.judging.judge import Drawn

Image = pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module")
def torch_fidelity():
    if importlib.util.find_spec("torch_fidelity") is None:
        pytest.skip('torch-fidelity is not installed: pip install ".[fidelity]"')
    if not torch.cuda.is_available():
        # PyPI's torchvision finds no CUDA beside a CPU build of torch, and is not imported without these two operators.
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            if not hasattr(torch.ops.torchvision, name):
                library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torch_fidelity

    yield torch_fidelity


@pytest.fixture(scope="module")
def weights(torch_fidelity, tmp_path_factory):
    """Of random numbers, of the true sizes: what a network sees in a picture does not matter here."""
    import torchvision
    from torch_fidelity import feature_extractor_inceptionv3 as inception

    folder, found = tmp_path_factory.mktemp("weights"), {}
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(inception.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        networks = {
            "inception": inception.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]),
            "vgg": torchvision.models.vgg16(),
        }
    for name, network in networks.items():
        found[name] = folder / f"{name}.pth"
        torch.save(network.state_dict(), found[name])
    return found


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Six pictures of noise a model."""
    generator, files = torch.Generator().manual_seed(0), {}
    for name, light in (("base", 100), ("lora", 140)):
        folder = tmp_path_factory.mktemp(name)
        files[name] = [folder / f"{i}.png" for i in range(6)]
        for i, path in enumerate(files[name]):
            pixels = torch.randint(light - 20 * i % 50, light + 60, (24, 32, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(path)
    return Drawn(files["lora"], ["a cup"] * 6, 1, files["base"])


@pytest.fixture(scope="module")
def scores(weights, drawn):
    return FidelityJudge(6, weights["inception"], weights["vgg"]).score(drawn)


def features(torch_fidelity, name, layer, weights, files):
    from torch_fidelity.utils import create_feature_extractor

    network = create_feature_extractor(
        name, [layer], cuda=False, verbose=False, feature_extractor_weights_path=str(weights)
    )
    pictures = fidelity_judge._Pictures(files)
    with torch.no_grad():
        return network(torch.stack([pictures[i] for i in range(len(pictures))]))[0].double()


def test_fid_and_kid_are_those_of_inceptions_features(torch_fidelity, weights, drawn, scores):
    x, y = (
        features(torch_fidelity, "inception-v3-compat", "2048", weights["inception"], files)
        for files in (drawn.files, drawn.base)
    )
    # Of n samples the covariances have rank n - 1, so the trace of their product's root is that of a small matrix.
    a, b = ((z - z.mean(0)) / (len(z) - 1) ** 0.5 for z in (x, y))
    trace = torch.linalg.svdvals(a @ b.T).sum()
    fid = (x.mean(0) - y.mean(0)).square().sum() + a.square().sum() + b.square().sum() - 2 * trace
    assert scores["fid"].value == pytest.approx(fid.item(), rel=1e-3)

    def kernel(one, two):
        return (one @ two.T / one.shape[1] + 1) ** 3

    off = ~torch.eye(6, dtype=torch.bool)
    kid = kernel(x, x)[off].mean() + kernel(y, y)[off].mean() - 2 * kernel(x, y).mean()
    assert scores["kid"].value == pytest.approx(kid.item(), rel=1e-3, abs=1e-9)
    assert {score.n for score in scores.values()} == {6}


def test_precision_is_the_share_of_the_loras_pictures_within_the_bases(torch_fidelity, weights, drawn, scores):
    lora, base = (
        features(torch_fidelity, "vgg16", "fc2_relu", weights["vgg"], files) for files in (drawn.files, drawn.base)
    )

    def within(inner, outer):
        radius = (
            torch.cdist(outer, outer).kthvalue(fidelity_judge.NEIGHBORS + 1).values
        )  # the first is the sample itself
        return (torch.cdist(inner, outer) <= radius).any(dim=1).double().mean().item()

    assert scores["precision"].value == pytest.approx(within(lora, base))
    assert scores["recall"].value == pytest.approx(within(base, lora))


def test_weights_of_another_network_are_told_before_anything_is_drawn(torch_fidelity, weights, tmp_path):
    junk = tmp_path / "junk.pth"
    junk.write_bytes(b"no weights")
    with pytest.raises(AptError, match=r"--inception .*junk\.pth: holds no weights of inception-v3-compat"):
        FidelityJudge(6, junk, weights["vgg"])
    with pytest.raises(AptError, match=r"--vgg .*inception\.pth: holds no weights of vgg16"):
        FidelityJudge(6, weights["inception"], weights["inception"])


def test_too_few_pictures_are_refused(torch_fidelity, weights):
    with pytest.raises(AptError, match="need more than 3 pictures; found 3"):
        FidelityJudge(3, weights["inception"], weights["vgg"])


def test_weights_that_cannot_be_had_are_told_with_where_to_place_them(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    place = tmp_path / "checkpoints" / fidelity_judge.VGG[0]
    with pytest.raises(AptError, match=rf"\(no network\): place https://.*pth at {place}, or name it by --vgg"):
        find_weights(None, "--vgg", *fidelity_judge.VGG)
    place.write_bytes(b"")
    assert find_weights(None, "--vgg", *fidelity_judge.VGG) == place
    with pytest.raises(AptError, match=r"--vgg .*mine\.pth: no such file; it is https://"):
        find_weights(tmp_path / "mine.pth", "--vgg", *fidelity_judge.VGG)
