"""Semantic tokens (STViT): layers, and models that run on them."""
