"""What a caller has handed in, seen to be what it should be: JAX's own errors name no argument. No public API."""

from numbers import Integral
from typing import Any

import jax
import numpy as np
from jax import Array
from jax import numpy as jnp

from tokenexit.adapting import MOST
from tokenexit.errors import require

__all__ = ["new_keys", "require_array", "require_count", "require_images", "require_key", "require_size"]


def require_array(value: Any, argument: str, /, *axes: str) -> None:
    """Raise a `TokenExitError` unless a value is an array of JAX or NumPy with these axes; any, if none are named."""
    shape = f" of shape ({', '.join(axes)})" if axes else ""
    ok = _is_array(value) and (not axes or value.ndim == len(axes))
    require(ok, argument, f"be an array of JAX or NumPy{shape}", _kind(value))


def require_count(value: Any, argument: str, /) -> None:
    """Raise a `TokenExitError` unless a value is a whole number from 1 to `MOST`: of channels, classes, heads."""
    require(_is_count(value) and value <= MOST, argument, f"be a whole number from 1 to {MOST:,}", repr(value))


def require_images(images: Any, /) -> None:
    """Raise a `TokenExitError` unless images are an array, or a pytree of arrays, with the images along the first axis.

    What else they should be only the network knows, which is handed them as they are.
    """
    leaves = [] if isinstance(images, list) else jax.tree.leaves(images)
    ok = len(leaves) > 0 and all(_is_array(leaf) and leaf.ndim > 0 for leaf in leaves)
    rule = "be an array of JAX or NumPy whose first axis is the images (`numpy.stack` makes one of a list)"
    require(ok, "images", rule, _kind(images))


def require_key(key: Any, argument: str = "key", /) -> None:
    """Raise a `TokenExitError` unless a value is a random key, typed or of the old kind."""
    typed = _is_array(key) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.ndim == 0
    old = _is_array(key) and key.dtype == np.uint32 and key.ndim == 1
    require(typed or old, argument, "be a random key, as `jax.random.key(0)`", _kind(key))


def new_keys(key: Array, count: int = 2, /) -> list[Array]:
    """As many keys of their own.

    Raises:
        TokenExitError: If `key` is no random key.
    """
    require_key(key)
    return list(jax.random.split(key, count))


def require_size(size: Any, /) -> None:
    """Raise a `TokenExitError` unless a value is a height and a width in pixels."""
    pair = isinstance(size, tuple | list) and len(size) == 2 and all(map(_is_count, size))
    require(pair, "size", "be a height and a width, whole numbers of pixels from 1 up", repr(size))


def _is_count(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


def _is_array(value: Any) -> bool:
    return isinstance(value, jax.Array | np.ndarray)


def _kind(value: Any) -> str:
    if value is None:
        return "None"
    return f"shape {tuple(value.shape)}, {value.dtype}" if _is_array(value) else type(value).__name__
