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
    "AroundHost",
    "DropPath",
        "evaluating",
    "kept_eager",
    "linear_weights",
    "mlp",
    "require_heads",
    "start_anew",
]


class AroundHost(nn.Module):
    """A module around a host, which is of one wrapped model for good.

    Attributes:
        host: The host of the wrapped model.
        model: The wrapped model itself, its weights shared.
    """

    host: Any
    model: nn.Module

    def __init__(self, host: Any) -> None:
        super().__init__()
        self.host = host
        self.model = host.module
        self._blocks_when_wrapped = len(host.blocks)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("host", "model"):
            present = vars(self).get(name, self._modules.get(name))
            if present is not None and present is not value:
                rule = "stay as it was wrapped, for its parts are called by the host: wrap the other model, or change"
                raise TokenExitError(f"`{name}` must {rule} parts inside of this one, got {type(value).__name__}")
        super().__setattr__(name, value)

    @property
    def depth(self) -> int:
        """How many blocks there are in which tokens run.

        Raises:
            TokenExitError: If they are not as many as when the model was wrapped, or it is another model.
        """
        rule = "be that of its host, whose parts are called: wrap the other model"
        if self.model is not self.host.module:
            raise TokenExitError(f"`model` must {rule}, got another {type(self.model).__name__}")
        depth, wrapped = len(self.host.blocks), self._blocks_when_wrapped
        if depth != wrapped:
            raise TokenExitError(f"`model` must have {wrapped} blocks, as when it was wrapped: wrap it again, got {depth}")
        return depth

    # Its copies would still have the host of the original.
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


def linear_weights(module: nn.Module) -> int:
    """Weights of the linear layers and 1 x 1 convolutions inside: the multiply-adds of one token."""
    inside = list(module.modules())
    weights = [layer.weight for layer in inside if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d)]
    # Its projections in are a bare parameter; that out is a linear layer, and counted above.
    for layer in inside:
        if isinstance(layer, nn.MultiheadAttention):
            weights += [layer.in_proj_weight, layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight]
    return sum(weight.numel() for weight in weights if weight is not None)


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
