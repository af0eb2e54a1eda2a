"""Properties of any module, and small modules that several files need."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any, NoReturn, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from tokenexit import TokenExitError
from tokenexit.adapting import is_whole
from tokenexit.errors import require

__all__ = [
    "AroundHost",
    "DropPath",
    "counts_batches",
    "evaluating",
    "is_training",
    "kept_eager",
    "mlp",
    "require_heads",
    "require_not_exported",
    "require_not_traced",
    "start_anew",
]


class AroundHost(nn.Module):
    """A module around a host, which is of one wrapped model for good.

    Attributes:
        host: The host of the wrapped model.
        model: The wrapped model itself, its weights shared.
        patch: Height and width of a patch in pixels, as found at wrapping; None where the host says what a grid covers.
        counted: Multiply-adds of parts that have been counted.
    """

    host: Any
    model: nn.Module
    patch: tuple[int, int] | None = None
    counted: dict[tuple[Any, ...], Any]

    def __init__(self, host: Any) -> None:
        super().__init__()
        self.host = host
        self.model = host.module
        self.counted = {}
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
            raise TokenExitError(
                f"`model` must have {wrapped} blocks, as when it was wrapped: wrap it again, got {depth}"
            )
        return depth

    # Its copies would still have the host of the original.
    def _replicate_for_data_parallel(self) -> NoReturn:
        rule = "not be in nn.DataParallel: its copies would run the weights of one device, so use a process for each"
        raise TokenExitError(f"`model` must {rule}, got a copy of it")


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode for a while, and every part of it back as it was.

    Several threads may do so at once: the last of them puts parts back as the first has found them.
    """
    own = object()
    with _CHANGING:
        parts = list(module.modules())
        for part in parts:
            _BEFORE.setdefault(part, []).append((own, part.training))
        module.eval()
    try:
        yield
    finally:
        with _CHANGING:
            for part in parts:
                _put_back(part, own)


_CHANGING = Lock()
_BEFORE: WeakKeyDictionary[nn.Module, list[tuple[object, bool]]] = WeakKeyDictionary()
"""How every part was when each of the contexts that it is in now was entered, the latest last."""


def _put_back(part: nn.Module, own: object) -> None:
    contexts = _BEFORE[part]
    at = next(index for index, (context, _) in enumerate(contexts) if context is own)
    _, was = contexts.pop(at)
    if at < len(contexts):  # another thread has entered since, and still evaluates: it puts back what this one found
        contexts[at] = contexts[at][0], was
        return
    part.training = was
    if not contexts:
        del _BEFORE[part]


def is_training(module: nn.Module) -> bool:
    """Whether a module, or any part of it, is in training mode."""
    return any(part.training for part in module.modules())


def counts_batches(module: nn.Module) -> bool:
    """Whether a module normalises by the statistics of what it is given now."""
    return any(isinstance(part, BatchNorm) and part.training for part in module.modules())


NEW = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 11)
"""Whether PyTorch has one attention kernel for images of all lengths, and makes one program of a static pass."""

EXPORT = "use export_program(StaticModel(model, ...), images)"


def require_not_traced(model: str, *, instead: str = EXPORT) -> None:
    """Raise a `TokenExitError` if `torch.jit` traces, which would keep the counts of the traced images for all."""
    jit: Any = torch.jit
    if jit.is_tracing():
        raise TokenExitError(f"`model` must not be traced by torch.jit where tokens leave: {instead}, got {model}")


def require_not_exported(model: str, *, instead: str = EXPORT) -> None:
    """Raise a `TokenExitError` if `torch.export` runs, for which shapes must not depend on the data."""
    if torch.compiler.is_exporting():
        raise TokenExitError(f"`model` must be static to be exported: {instead}, got {model}")


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
