"""Networks that ship with the library."""

from tokenexit_torch.models.swin import Swin, SwinBackbone, SwinBlock, SwinClassifier, SwinMap, swin_base, swin_small

__all__ = [
    "Swin",
    "SwinBackbone",
    "SwinBlock",
    "SwinClassifier",
    "SwinMap",
    "swin_base",
    "swin_small",
]
