"""What a function of the user's own hands to the command line: a network, and how pictures are shown to it."""

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

from tokenexit.adapting import is_number, is_whole
from tokenexit.errors import TokenExitError, require

__all__ = ["Network", "load"]

_ARGUMENT = "MODULE:FUNCTION"


@dataclass(frozen=True, eq=False)
class Network:
    """A network, what reads its tokens, and how pictures are shown to it.

    Attributes:
        model: A vision transformer, or what `wrap`, `wrap_decoder` or `load` of `tokenexit_torch` returned.
        head: The final head of a vision transformer.
        decoder: Instead of a head, what reads its feature maps.
        taps: With a decoder: after how many blocks it is given maps; the last alone if left out.
        features: What a decoder reads of a token: `normalised`, behind the final norm, or `raw`, as its block left it.
        reads: Whether it is given prefix tokens too: `patches`, or `patches and prefix`.
        size: Height and width in which pictures are shown to the network: they are resized as a whole.
        mean: Mean colour, by channel, on a scale from 0 to 1: that which the network was trained with.
        std: Standard deviation of colours, by channel.
        classes: Names of the classes.
        palette: Colour of each class, red, green and blue from 0 to 255.
        preprocess: Instead of `size`, `mean` and `std`, a function from a picture of Pillow in RGB to a tensor of shape
            (3, height, width), which shows the whole of it.

    Raises:
        TokenExitError: If an argument is not what it must be, or does not go with another.
    """

    model: Any
    _: KW_ONLY
    head: Any = None
    decoder: Any = None
    taps: Sequence[int] | None = None
    features: Literal["normalised", "raw"] = "normalised"
    reads: Literal["patches", "patches and prefix"] = "patches"
    size: tuple[int, int] | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    classes: Sequence[str] | None = None
    palette: Sequence[Sequence[int]] | None = None
    preprocess: Callable[[Any], Any] | None = None

    def __post_init__(self) -> None:
        one = self.head is None or self.decoder is None
        require(one, "decoder", "be left out beside a head", type(self.decoder).__name__)
        tapping = self.taps is None or self.decoder is not None
        require(tapping, "taps", "be given with `decoder` alone", repr(self.taps))
        for name, first in (("features", "normalised"), ("reads", "patches")):
            value = getattr(self, name)
            require(value == first or self.decoder is not None, name, "be given with `decoder` alone", repr(value))
        if self.preprocess is None:
            self._require_preparation()
        else:
            require(callable(self.preprocess), "preprocess", "be a function of a picture", repr(self.preprocess))
            for name in ("size", "mean", "std"):
                value = getattr(self, name)
                require(value is None, name, "be left out beside `preprocess`, which does it all", repr(value))
        named = self.classes is None or (_listed(self.classes) and all(isinstance(one, str) for one in self.classes))
        require(named, "classes", "be the names of the classes, in their order", repr(self.classes))
        if self.palette is not None:
            rule = "have a colour for each class, at most 256, of three whole numbers from 0 to 255"
            coloured = _listed(self.palette) and len(self.palette) <= 256 and all(map(_is_colour, self.palette))
            require(coloured, "palette", rule, repr(self.palette))
            alike = self.classes is None or len(self.classes) == len(self.palette)
            require(alike, "palette", f"have as many colours as there are `classes`, {len(self.classes or ())}",
                    len(self.palette))  # fmt: skip

    def _require_preparation(self) -> None:
        for name in ("size", "mean", "std"):
            require(getattr(self, name) is not None, name, "be given, or `preprocess` instead", "None")
        sides = _listed(self.size, 2) and all(is_whole(side, least=1) for side in self.size or ())
        require(sides, "size", "be a height and a width from 1 up, in pixels", repr(self.size))
        for name, least in (("mean", "any"), ("std", "positive")):
            values = getattr(self, name)
            numbers = _listed(values, 3) and all(is_number(one) and (least == "any" or one > 0) for one in values)
            require(numbers, name, f"be three {'' if least == 'any' else 'positive '}numbers", repr(values))


def load(name: str, /) -> Network:
    """The network that a function builds.

    Args:
        name: A module and a function in it, as `mine:build`; the module lies in the current folder, or is installed.

    Returns:
        What the function returns.

    Raises:
        TokenExitError: If there is no such function, it takes arguments, or it returns something else. What the module
            or the function raises is not touched.
    """
    module, colon, function = name.partition(":")
    rule = "be a module and a function in it, as mine:build"
    require(colon == ":" and module != "" and function.isidentifier(), _ARGUMENT, rule, repr(name))
    here = os.getcwd()
    if here not in sys.path:  # as for `python -m`; what is installed by `pip` does not look there
        sys.path.insert(0, here)
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # the module is there, and lacks something itself
        where = f"have a module in the current folder, {here}, or an installed one"
        raise TokenExitError(f"`{_ARGUMENT}` must {where}, got {name!r}: there is no {error.name!r}") from error
    except RuntimeError as error:
        _require_fitting_torchvision(error)
        raise
    build = getattr(found, function, None)
    if not callable(build):
        there = [key for key, value in vars(found).items() if inspect.isfunction(value) and not key.startswith("_")]
        rule = f"name a function of {found.__file__}, which has {', '.join(sorted(there)) or 'none'}"
        raise TokenExitError(f"`{_ARGUMENT}` must {rule}, got {name!r}")
    require(_takes_nothing(build), _ARGUMENT, "name a function without arguments", repr(name))
    try:
        network = build()
    except (RuntimeError, ImportError) as error:
        _require_fitting_torchvision(error)
        raise
    rule = f"name a function that returns a tokenexit_cli.Network, got {name!r}, which returned"
    if not isinstance(network, Network):
        raise TokenExitError(f"`{_ARGUMENT}` must {rule} {type(network).__name__}")
    return network


def _require_fitting_torchvision(error: BaseException) -> None:
    """Raise a `TokenExitError` for what a torchvision of another PyTorch raises in timm and transformers."""
    cause: BaseException | None = error
    while cause is not None:
        if "operator torchvision::" in str(cause):
            rule = "fit the installed PyTorch: install the two together, or leave torchvision out"
            raise TokenExitError(f"`torchvision` must {rule}, got {cause}") from error
        cause = cause.__cause__ or cause.__context__


def _takes_nothing(build: Callable[..., Any]) -> bool:
    try:
        inspect.signature(build).bind()
    except TypeError:
        return False
    except ValueError:  # a function whose signature is not known
        return True
    return True


def _listed(values: Any, length: int | None = None) -> bool:
    """Whether it is a list or tuple, of this length or at least 1."""
    return isinstance(values, list | tuple) and (len(values) > 0 if length is None else len(values) == length)


def _is_colour(colour: Any) -> bool:
    return _listed(colour, 3) and all(is_whole(one, least=0) and one <= 255 for one in colour)
