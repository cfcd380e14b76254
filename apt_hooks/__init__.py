"""Adaptive Personalized Training for diffusion LoRAs, as hooks around a training loop.

AptConfig                   what to do: the keys of `[apt]`            config.py
OverfittingIndicator        gamma per timestep bin                     method/indicator.py
ZoomOutRotate               the augmentation                           method/augmentation.py
attention_alignment_loss    the regularizers                           method/losses.py
representation_loss
FeatureCapture              queries, keys, hidden states of a model    hooks/capture.py
AptObjective                one step of it all                         training/objective.py
AptStep                     what it adds to a loss                     training/step.py
AptError                    what a user can put right                  errors.py
"""

from .config import AptConfig
from .errors import AptError
from .hooks.capture import FeatureCapture
from .method.augmentation import ZoomOutRotate
from .method.indicator import OverfittingIndicator
from .method.losses import attention_alignment_loss, representation_loss
from .training.objective import AptObjective
from .training.step import AptStep

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
