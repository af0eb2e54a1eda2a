"""Plans as plain data: frozen dataclasses to mappings and back, by closed registries of their kinds."""

import dataclasses
import inspect
import reprlib
import warnings
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from typing import Any

from tokenexit.errors import require

__all__ = [
    "LARGEST",
    "MOST",
    "NORMALISED",
    "Progress",
    "from_plain",
    "is_number",
    "is_whole",
    "require_counts",
    "require_keys",
    "require_progress",
    "require_share",
    "require_sizes",
    "require_takes",
    "shortened",
    "to_plain",
    "warn_of_pixels",
]

MOST = 1_000_000
"""Of channels, classes, blocks, places in a window: larger numbers are a damaged or a hostile file."""

NORMALISED = "normalised as in training: pixels / 255, less the mean of each channel, over its standard deviation"
"""What images must be, in words."""

LARGEST = 20.0
"""What no normalised pixel exceeds, and pixels from 0 to 255 do: white is 2.7 deviations above the mean of ImageNet."""

Progress = Callable[[Iterable], Iterable]
"""A function around a loop, as `tqdm`, or `iter` for silence."""

_LARGEST = 2.0**128 * (1 - 2.0**-24)  # of 32 bits


def to_plain(
    value: Any, kinds: Mapping[str, type], /, *, argument: str, write: Callable[[Any], Any] = lambda value: value
) -> dict[str, Any]:
    """`{"kind": ..., field: ..., ...}` for a dataclass of one of these kinds, each field's value as `write` says."""
    names = {kind: name for name, kind in kinds.items()}
    require(type(value) in names, argument, f"be one of {', '.join(kinds)} to be written down", repr(value))
    fields = {field.name: write(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return {"kind": names[type(value)]} | fields


def from_plain(
    data: Any,
    kinds: Mapping[str, type],
    /,
    *,
    argument: str,
    read: Callable[[str, Any], Any] = lambda name, value: value,  # noqa: ARG005
) -> Any:
    """The dataclass that `to_plain` wrote down, each field's value as `read(name, value)` says."""
    require(isinstance(data, Mapping), argument, "be a mapping", shortened(data))
    kind = data.get("kind")
    require(isinstance(kind, str) and kind in kinds, "kind", f"be one of {', '.join(kinds)}", shortened(kind))
    cls = kinds[str(kind)]
    fields = sorted(field.name for field in dataclasses.fields(cls))
    found = sorted(map(str, set(data) - {"kind"}))
    require(found == fields, argument, f"have the fields {fields} for kind {kind}", found)
    return cls(**{name: read(name, data[name]) for name in fields})


def require_keys(data: Any, argument: str, keys: set[str]) -> None:
    """Raise a `TokenExitError` unless `data` is a mapping with exactly these keys."""
    require(isinstance(data, Mapping), argument, f"be a mapping with the keys {sorted(keys)}", shortened(data))
    require(set(data) == keys, argument, f"have exactly the keys {sorted(keys)}", sorted(map(str, data)))


def is_number(value: object, /) -> bool:
    """Whether a value is a finite number that 32 bits hold.

    Args:
        value: Anything. True and False are no numbers, nor are NaN and an int that no float holds.

    Returns:
        Whether it is one.
    """
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    number: Any = value
    return bool(-_LARGEST <= number <= _LARGEST)


def is_whole(value: object, /, *, least: int = 0) -> bool:
    """Whether a value is a whole number from `least` up that 32 bits hold.

    Args:
        value: Anything. True and False are no numbers, nor is 2.0 a whole one.
        least: The least number that will do.

    Returns:
        Whether it is one.
    """
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**31


def require_share(value: Any, argument: str, /) -> None:
    """Raise a `TokenExitError` unless a value is a number between 0 and 1, both excluded.

    Args:
        value: Anything.
        argument: Name of the argument that it is the value of.

    Raises:
        TokenExitError: If it is none.
    """
    inside = isinstance(value, Real) and not isinstance(value, bool) and 0 < float(value) < 1
    require(inside, argument, "lie between 0 and 1", repr(value))


def require_progress(progress: object, /) -> None:
    """Raise a `TokenExitError` unless a value can be called around a loop."""
    require(callable(progress), "progress", "be a function around a loop, as `tqdm` or `iter`", repr(progress))


def shortened(value: object, /) -> str:
    """What a value of any size and depth looks like, in a line: for errors about what came from a file."""
    return reprlib.repr(value)


def require_sizes(**sizes: int) -> None:
    """Raise a `TokenExitError` unless all sizes are at least 1."""
    for name, value in sizes.items():
        require(value >= 1, name, "be at least 1", value)


def require_counts(**counts: int) -> None:
    """Raise a `TokenExitError` unless all counts are at least 0."""
    for name, value in counts.items():
        require(value >= 0, name, "be 0 or more", value)


def require_takes(argument: str, function: Callable, /, *names: str) -> None:
    """Raise a `TokenExitError` unless a function can be called with these values, by position.

    Args:
        argument: Name of the argument that it is.
        function: The function. One that does not say what it takes is let pass.
        names: What it is called with, in words.

    Raises:
        TokenExitError: If it cannot.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # it does not say what it takes
        return
    try:
        signature.bind(*names)
        fits = True
    except TypeError:
        fits = False
    require(fits, argument, f"take ({', '.join(names)})", f"{signature}")


def warn_of_pixels() -> None:
    """Warn that images hold values that no normalised image has, always in the same words, which Python shows once.

    Warns:
        UserWarning: Always.
    """
    message = f"`images` should be {NORMALISED}, got values beyond {LARGEST:g}, as of pixels from 0 to 255"
    warnings.warn(message, UserWarning, stacklevel=3)
