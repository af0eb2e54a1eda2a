"""Semantic tokens (STViT): layers, and models that run on them."""

from tokenexit_torch.semantic.layers import CrossBlock, Recovery, Semantic, SemanticMixing, SemanticTokens, SemanticUnit
from tokenexit_torch.semantic.model import SemanticModel, SemanticOutput

__all__ = [
    "CrossBlock",
    "Recovery",
    "Semantic",
    "SemanticMixing",
    "SemanticModel",
    "SemanticOutput",
    "SemanticTokens",
    "SemanticUnit",
]
