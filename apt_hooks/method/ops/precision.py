"""In which precision the losses are computed."""

from __future__ import annotations

import torch
from torch import Tensor


def full_precision(x: Tensor) -> Tensor:
    """float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()
