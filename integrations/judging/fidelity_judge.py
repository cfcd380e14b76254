"""How far a model's pictures lie from the base model's of the same prompts, by torch-fidelity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from apt_hooks.errors import AptError, why_not_imported
from apt_hooks.images import open_picture, to_tensor

from .judge import Drawn, Metric, Score

# Where torch-fidelity and torchvision look for their weights: file name below torch.hub's folder, and its origin.
INCEPTION = (
    "weights-inception-2015-12-05-6726825d.pth",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
)
VGG = ("vgg16-397923af.pth", "https://download.pytorch.org/models/vgg16-397923af.pth")
NEIGHBORS = 3
KID_SUBSET = 1000
AGAINST = "to as many pictures of the base model, of the same prompts with the class word, from other noise"


class FidelityJudge:
    """FID, KID, precision and recall of a model's pictures against the base model's of the same prompts.

    All four are made for independent samples, so the base model's are from other noise (`Plan.further`). FID (Heusel et
    al. 2017, arXiv 1706.08500) and KID (Binkowski et al. 2018, arXiv 1801.01401) by Inception, precision and recall
    (Kynkäänniemi et al. 2019, arXiv 1904.06991) by VGG16: torch-fidelity's defaults. FID falls with the number of
    pictures: compare equal numbers only.

    Args:
        pictures: of each model, as many as there will be.
        inception, vgg: files of the weights; None: in torch.hub's folder, where they are downloaded to if need be.

    Raises:
        AptError: a missing package; too few pictures; weights that are not there and cannot be downloaded.
    """

    def __init__(self, pictures: int, inception: Path | None = None, vgg: Path | None = None) -> None:
        try:
            import torch_fidelity
        # torchvision that does not fit torch is a RuntimeError.
        except (ImportError, RuntimeError) as error:
            raise AptError(
                f"FID, KID, precision and recall need torch-fidelity ({why_not_imported(error)}): "
                'pip install "apt-hooks[fidelity]", or leave fidelity out of --metrics'
            ) from error
        check_number(pictures)
        self._calculate: Callable[..., dict[str, float]] = torch_fidelity.calculate_metrics
        self._inception = find_weights(inception, "--inception", *INCEPTION)
        self._vgg = find_weights(vgg, "--vgg", *VGG)
        for extractor, option, path in (
            ("inception-v3-compat", "--inception", self._inception),
            ("vgg16", "--vgg", self._vgg),
        ):
            _try_extractor(extractor, option, path)
        self.metrics = (
            Metric("fid", "lowest", self._inception.name, f"{AGAINST}; torch-fidelity {torch_fidelity.__version__}"),
            Metric("kid", "lowest", self._inception.name, f"{AGAINST}; subsets of {KID_SUBSET}, of fewer all at once"),
            Metric("precision", "highest", self._vgg.name, f"{AGAINST}; {NEIGHBORS} nearest neighbors"),
            Metric("recall", "highest", self._vgg.name, f"{AGAINST}; {NEIGHBORS} nearest neighbors"),
        )

    def score(self, drawn: Drawn) -> dict[str, Score]:
        n = len(drawn.files)
        shared = {
            "input1": _Pictures(drawn.files),
            "input2": _Pictures(drawn.base),
            "cuda": torch.cuda.is_available(),
            "cache": False,
            "save_cpu_ram": True,  # its other way starts processes
            "verbose": False,
        }
        subset = {"kid_subset_size": min(n, KID_SUBSET), "kid_subsets": 100 if n > KID_SUBSET else 1}
        found = self._calculate(
            fid=True, kid=True, feature_extractor_weights_path=str(self._inception), **subset, **shared
        )
        found |= self._calculate(
            prc=True, prc_neighborhood=NEIGHBORS, feature_extractor_weights_path=str(self._vgg), **shared
        )
        return {
            "fid": Score(found["frechet_inception_distance"], n),
            "kid": Score(found["kernel_inception_distance_mean"], n),
            "precision": Score(found["precision"], n),
            "recall": Score(found["recall"], n),
        }


def check_number(pictures: int) -> None:
    """Raises AptError where pictures are too few for neighbors."""
    if pictures <= NEIGHBORS:
        raise AptError(
            f"precision and recall need more than {NEIGHBORS} pictures; found {pictures}: more prompts or --count"
        )


def _try_extractor(name: str, option: str, path: Path) -> None:
    """Whether the weights are this network's: to be known before anything is drawn."""
    from torch_fidelity.utils import create_feature_extractor

    layer = {"inception-v3-compat": "2048", "vgg16": "fc2_relu"}[name]
    try:
        create_feature_extractor(name, [layer], cuda=False, verbose=False, feature_extractor_weights_path=str(path))
    except Exception as error:  # by the kind of damage
        why = " ".join(str(error).split())[:150]
        raise AptError(f"{option} {path}: holds no weights of {name} ({type(error).__name__}: {why})") from error


class _Pictures(torch.utils.data.Dataset[torch.Tensor]):
    """As torch-fidelity wants them: [3, height, width], uint8."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> torch.Tensor:
        return to_tensor(open_picture(self.files[index]))


def find_weights(given: Path | None, option: str, name: str, url: str) -> Path:
    """The file with a network's weights, downloaded if need be.

    Raises:
        AptError: a file that is not there; one that cannot be downloaded, with where to place it.
    """
    if given is not None:
        if not given.is_file():
            raise AptError(f"{option} {given}: no such file; it is {url}")
        return given
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=path.stem.rsplit("-", 1)[1])
        except (OSError, RuntimeError) as error:  # urllib's are OSErrors; another hash is a RuntimeError
            raise AptError(
                f"{name} is not there and cannot be downloaded ({error}): place {url} at {path}, or name it by {option}"
            ) from error
    return path
