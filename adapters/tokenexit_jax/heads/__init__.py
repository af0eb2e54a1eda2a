"""Heads in JAX: weights from plans, and their application to the tokens that run or to whole batches."""

from tokenexit_jax.heads.build import cost, init, read, read_in_training, translate
from tokenexit_jax.heads.masks import MaskMaps, Masks, log_scores, read_masks
from tokenexit_jax.heads.statistics import merge, split

__all__ = [
    "MaskMaps",
    "Masks",
    "cost",
    "init",
    "log_scores",
    "merge",
    "read",
    "read_in_training",
    "read_masks",
    "split",
    "translate",
]
