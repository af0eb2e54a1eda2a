"""What the core needs to know of arrays, beside the standard itself."""

from typing import Any

from array_api_compat import array_namespace, device, is_array_api_obj, is_jax_array

__all__ = ["Array", "array_namespace", "counting", "device", "is_array_api_obj", "take_or"]

Array = Any
"""An array of any library that follows the array API standard: NumPy, PyTorch, JAX, array-api-strict, CuPy."""


def counting(count: int, like: Array, /) -> Array:
    """`0, 1, ..., count - 1` in the integer type that indexes use, on the device of `like`."""
    xp = array_namespace(like)
    if is_jax_array(like):  # a traced array has no device of its own
        return xp.arange(count)
    return xp.arange(count, dtype=xp.int64, device=device(like))


def take_or(values: Array, rows: Array, found: Array, other: Array, /) -> Array:
    """Row `rows[i]` of `values` where `found[i]`, else row `i` of `other`: a scatter, written as a gather.

    `rows` may hold anything where `found` is false, and `values` may have no rows at all.
    """
    xp = array_namespace(values, rows)
    if values.shape[0] == 0:
        return other
    taken = xp.take(values, xp.where(found, rows, xp.zeros_like(rows)), axis=0)
    return xp.where(xp.reshape(found, (*found.shape, *[1] * (values.ndim - 1))), taken, other)
