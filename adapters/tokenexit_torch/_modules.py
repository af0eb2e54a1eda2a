"""What can be asked of any module, and small modules that several files need."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar, cast

import torch
from torch import Tensor, nn

from tokenexit import TokenExitError
from tokenexit._plain import is_whole
from tokenexit.errors import require

__all__ = [
    "DropPath",
    "Undivided",
    "evaluating",
    "kept_eager",
    "mlp",
    "require_heads",
    "start_anew",
]


class Undivided(nn.Module):
    """A module of which `nn.DataParallel` must not make copies: its host would still be that of the original.

    Attributes:
        patch: Height and width of a patch in pixels, as found at wrapping; None where the host says what a grid covers.
        counted: Multiply-adds of parts that have been counted.
    """

    patch: tuple[int, int] | None = None
    counted: dict[tuple[Any, ...], Any]

    def __init__(self) -> None:
        super().__init__()
        self.counted = {}

    def _replicate_for_data_parallel(self) -> NoReturn:
        rule = "not be in nn.DataParallel: its copies would run the weights of one device, so use a process for each"
        raise TokenExitError(f"`model` must {rule}, got a copy of it")


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


Function = TypeVar("Function", bound=Callable[..., Any])


def kept_eager(function: Function) -> Function:
    """A function that `torch.compile` leaves as it is, with all that it calls."""
    return cast(Function, torch.compiler.disable(function))


class DropPath(nn.Module):
    """Drops what a layer adds, for some entries of the first axis; in training alone (stochastic depth).

    Attributes:
        rate: For which share of them.
    """

    rate: float

    def __init__(self) -> None:
        super().__init__()
        self.rate = 0.0

    def forward(self, added: Tensor) -> Tensor:
        """What is left of it, scaled so that the mean stays."""
        if not self.training or self.rate == 0:
            return added
        keep = torch.rand(len(added), *[1] * (added.ndim - 1), device=added.device) >= self.rate
        return added * (keep / (1 - self.rate)).to(added.dtype)


def mlp(width: int, hidden: int) -> nn.Sequential:
    """The MLP of a block."""
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


def require_heads(heads: int, width: int) -> None:
    """Raise a `TokenExitError` unless heads divide the width."""
    require(is_whole(heads, least=1) and width % heads == 0, "heads", f"divide the width, {width}", heads)


def start_anew(module: nn.Module) -> None:
    """Weights of linear layers as ViTs start them: normal, of deviation 0.02, and no bias."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
