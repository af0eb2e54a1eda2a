"""Attributes that are computed when they are first asked for."""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from tokenexit._array import is_traced

__all__ = ["lazy"]

T = TypeVar("T")


class lazy(Generic[T]):
    """`functools.cached_property` without the lock that it has before Python 3.12, which no compiler can trace."""

    def __init__(self, compute: Callable[[Any], T]) -> None:
        self.compute = compute
        self.name = compute.__name__
        self.__doc__ = compute.__doc__

    def __get__(self, instance: Any, owner: type | None = None) -> T:
        """The value, which from now on is found before this descriptor is."""
        value = self.compute(instance)
        # What a trace has computed means nothing outside of it, though its object may live on.
        if not any(map(is_traced, value if isinstance(value, tuple) else (value,))):
            instance.__dict__[self.name] = value
        return value
