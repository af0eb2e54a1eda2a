"""Heads in PyTorch: built from plans, and applied to the tokens that run or to whole batches."""

from tokenexit_torch.heads.build import NeighbourhoodHead, build
from tokenexit_torch.heads.masks import AttentionToMask, MaskHead, MaskMaps, Masks
from tokenexit_torch.heads.reading import apply_head, apply_head_dense, dim_in, head_input, radius_of, reads_of

__all__ = [
    "AttentionToMask",
    "MaskHead",
    "MaskMaps",
    "Masks",
    "NeighbourhoodHead",
    "apply_head",
    "apply_head_dense",
    "build",
    "dim_in",
    "head_input",
    "radius_of",
    "reads_of",
]
