"""Semantic tokens (STViT): layers, and models that run on them."""

from tokenexit_jax.semantic.layers import CrossBlock, Recovery, Semantic, SemanticMixing, SemanticTokens, SemanticUnit
from tokenexit_jax.semantic.model import Adopted, SemanticModel, SemanticOutput

__all__ = [
    "Adopted",
    "CrossBlock",
    "Recovery",
    "Semantic",
    "SemanticMixing",
    "SemanticModel",
    "SemanticOutput",
    "SemanticTokens",
    "SemanticUnit",
]
