"""What can be asked of any module."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["evaluating", "linear_weights"]


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode for a while, and every part of it back as it was."""
    before = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, was in before:
            part.training = was


def linear_weights(module: nn.Module) -> int:
    """Weights of the linear layers and 1 x 1 convolutions inside: the multiply-adds of one token."""
    layers = (layer for layer in module.modules() if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d))
    return sum(layer.weight.numel() for layer in layers)
