"""Training with exits, and fitting of exit heads on frozen networks."""

from tokenexit_torch.training.fitting import FitReport, HeldOut, fit_exits
from tokenexit_torch.training.merges import fit_merges
from tokenexit_torch.training.stages import Staged, Stages, distillation, mask_loss, pixel_cross_entropy

__all__ = [
    "FitReport",
    "HeldOut",
    "Staged",
    "Stages",
    "distillation",
    "fit_exits",
    "fit_merges",
    "mask_loss",
    "pixel_cross_entropy",
]
