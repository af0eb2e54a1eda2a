"""Heads in PyTorch: built from plans, and those that give masks."""

from tokenexit_torch.heads.build import NeighbourhoodHead, TokenTranslator, build
from tokenexit_torch.heads.masks import AttentionToMask, MaskHead, MaskMaps, Masks

__all__ = ["AttentionToMask", "MaskHead", "MaskMaps", "Masks", "NeighbourhoodHead", "TokenTranslator", "build"]
