"""The method: indicator, augmentation, losses. Functions of tensors; no model is known here."""
