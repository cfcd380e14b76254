"""Distances between sets of samples: Fréchet, precision and recall, and how well a score separates two sets."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import AptError


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """The Fréchet distance of two Gaussians, those with the means m and covariances S of the sets.

    |m_a - m_b|² + tr(S_a + S_b - 2 (S_a^½ S_b S_a^½)^½)

    Computed in float64. As any FID it is biased upward for few samples: compare sets of equal sizes, well above d.

    Args:
        a, b: feature sets [n, d] and [m, d].

    Raises:
        AptError: a set of fewer than two samples, or another shape.

    Source: Heusel et al. 2017, arXiv 1706.08500, eq. 6.
    """
    _check_features("frechet_distance", 2, a, b)
    a, b = a.double(), b.double()
    root, of_b = _square_root(_covariance(a)), _covariance(b)
    cross = torch.linalg.eigvalsh(root @ of_b @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + root.square().sum() + of_b.trace() - 2 * cross
    return max(0.0, distance.item())


def _covariance(features: Tensor) -> Tensor:
    # Of one feature alone, cov() makes a scalar.
    return torch.atleast_2d(features.T.cov())


def _square_root(matrix: Tensor) -> Tensor:
    """Of a symmetric, positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def precision_recall(real: Tensor, generated: Tensor, k: int = 3) -> tuple[float, float]:
    """The share of generated samples that look real, and the share of real ones that the generated samples reach.

    A sample is covered by a set if it lies within the distance of any of the set's samples to that one's k-th neighbor.

    Args:
        real, generated: feature sets [n, d] and [m, d].
        k: which neighbor within its own set gives a sample's radius.

    Returns:
        Precision and recall, each from 0 to 1.

    Raises:
        AptError: `k` below 1, a set of `k` samples or fewer, or another shape.

    Source: Kynkäänniemi et al. 2019, arXiv 1904.06991, section 3.
    """
    if k < 1:
        raise AptError(f"precision_recall: k must be at least 1, got {k}")
    _check_features("precision_recall", k + 1, real, generated)
    real, generated = real.double(), generated.double()
    return _covered(generated, real, k), _covered(real, generated, k)


def _covered(samples: Tensor, by: Tensor, k: int) -> float:
    # The nearest of the set to each of its own samples is that sample: hence k + 1.
    radii = _distances(by, by).kthvalue(k + 1, dim=1).values
    return (_distances(samples, by) <= radii).any(1).double().mean().item()


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """[n, m]; exact, where the usual way by a matrix product gives a sample a distance to itself."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _check_features(name: str, least: int, a: Tensor, b: Tensor) -> None:
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1]:
        raise AptError(f"{name}: feature sets must be [n, d] and [m, d], got {list(a.shape)} and {list(b.shape)}")
    if min(len(a), len(b)) < least:
        raise AptError(f"{name}: needs at least {least} samples in each set, got {len(a)} and {len(b)}")


def auc(positive: Tensor, negative: Tensor) -> float:
    """The chance that a positive's score is above a negative's, ties counting half (the Mann-Whitney statistic).

    Args:
        positive, negative: scores [n] and [m].

    Raises:
        AptError: no scores on one side.
    """
    if not (positive.numel() and negative.numel()):
        raise AptError(f"auc: needs scores on both sides, got {positive.numel()} and {negative.numel()}")
    # The sign of a difference is 1, 0 (a tie) or -1.
    return (0.5 + 0.5 * (positive[:, None] - negative[None]).sign().double()).mean().item()


def black_frames(pictures: Tensor) -> Tensor:
    """Which pictures stand in a black frame, as a zoomed-out one does: [pictures], 1.0 or 0.0.

    That is, at least half of the outermost two pixels on all sides is black. None of the tiny world's own pictures is
    (its night is blue), nor of what its autoencoder makes of them.

    Args:
        pictures: [pictures, 3, height, width], from 0 to 1.
    """
    border = torch.ones(pictures.shape[-2:], dtype=torch.bool, device=pictures.device)
    border[2:-2, 2:-2] = False
    black = pictures.amax(dim=1)[:, border] < 0.15
    return (black.float().mean(dim=1) >= 0.5).float()
