"""Training with exits."""

from tokenexit_jax.training.stages import Stages, distillation, mask_loss, merge, pixel_cross_entropy, split, staged

__all__ = [
    "Stages",
    "distillation",
    "mask_loss",
    "merge",
    "pixel_cross_entropy",
    "split",
    "staged",
]
