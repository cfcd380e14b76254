"""Adaptive Personalized Training for diffusion LoRAs, as hooks around a training loop.

AptConfig                   what to do: the keys of `[apt]`            config.py
OverfittingIndicator        gamma per timestep bin                     indicator.py
ZoomOutRotate               the augmentation                           augmentation.py
FeatureCapture              queries, keys, hidden states of a U-Net    capture.py
attention_alignment_loss    the regularizers                           losses.py
representation_loss
AptObjective                one step of it all                         objective.py
AptStep                     what it adds to a loss                     step.py
AptError                    what a user can put right                  errors.py
"""

from .augmentation import ZoomOutRotate
from .capture import FeatureCapture
from .config import AptConfig
from .errors import AptError
from .indicator import OverfittingIndicator
from .losses import attention_alignment_loss, representation_loss
from .objective import AptObjective
from .step import AptStep

__all__ = [
    "AptConfig",
    "AptError",
    "AptObjective",
    "AptStep",
    "FeatureCapture",
    "OverfittingIndicator",
    "ZoomOutRotate",
    "attention_alignment_loss",
    "representation_loss",
]
