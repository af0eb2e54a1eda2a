"""What the core needs to know of arrays, beside the standard itself."""

import sys
from collections.abc import Sequence
from typing import Any

import array_api_compat

from tokenexit.errors import require

__all__ = [
    "Array",
    "add_at",
    "aligned",
    "array_namespace",
    "comparable",
    "counting",
    "data_dependent_shapes",
    "device",
    "filled",
    "first_k",
    "in_64_bits",
    "in_numpy",
    "is_array",
    "is_jax_array",
    "is_traced",
    "kth_least",
    "like_numbers",
    "number_beside",
    "on_host",
    "plain",
    "require_marks",
    "searchsorted",
    "softmax",
    "take",
    "take_along_axis",
    "take_or",
    "uniform_squares",
    "with_doubles",
    "without_nan",
    "written",
]

Array = Any
"""An array of any library that follows the array API standard: NumPy, PyTorch, JAX, array-api-strict, CuPy."""


def _is_torch(value: Any) -> bool:
    """Whether `value` is a tensor of PyTorch, which is not imported for the question.

    It is checked first, and not last as in array-api-compat: the way there is long, and warns when it is compiled.
    """
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def array_namespace(*arrays: Array) -> Any:
    """The library of some arrays, with the functions of the standard."""
    if all(map(_is_torch, arrays)):
        from array_api_compat import torch as torch_namespace

        return torch_namespace
    return array_api_compat.array_namespace(*arrays)


def device(value: Array, /) -> Any:
    """The device on which an array lies."""
    return value.device if _is_torch(value) else array_api_compat.device(value)


def is_jax_array(value: Any, /) -> bool:
    """Whether `value` is an array of JAX, traced or not."""
    return not _is_torch(value) and array_api_compat.is_jax_array(value)


def add_at(total: Array, place: tuple[Any, ...], values: Array, /) -> Array:
    """`total` with `values` added at a place: in `total` itself, but in JAX, whose arrays do not change.

    Indexing gives a view of all libraries but JAX; `total[place] += values` would write it back into itself once more.
    """
    if is_jax_array(total):
        return total.at[place].add(values)
    view = total[place]
    view += values
    return total


def aligned(values: Array, axes: int, /) -> Array:
    """An array with at least so many axes; leading axes of size 1 are added.

    Broadcasting is written out by it: JAX can be set to refuse operands with different numbers of axes.

    Args:
        values: An array of any library.
        axes: The least number of axes.

    Returns:
        The same values; the array itself if it has that many axes.
    """
    if values.ndim >= axes:
        return values
    return array_namespace(values).reshape(values, (*[1] * (axes - values.ndim), *values.shape))


def counting(count: int, like: Array, /) -> Array:
    """`0, 1, ..., count - 1` in the integer type that indexes use, on the device of `like`."""
    xp = array_namespace(like)
    if is_jax_array(like):  # a traced array has no device of its own
        return xp.arange(count)
    return xp.arange(count, dtype=xp.int64, device=device(like))


def filled(shape: tuple[int, ...], value: float | bool | int, like: Array, /, *, dtype: Any) -> Array:
    """An array of one value, on the device of `like`."""
    xp = array_namespace(like)
    if is_jax_array(like):
        return xp.full(shape, value, dtype=dtype)
    return xp.full(shape, value, dtype=dtype, device=device(like))


def data_dependent_shapes(xp: Any, /) -> bool:
    """Whether a library has functions such as `nonzero`; False for JAX, where functions may be compiled."""
    return xp.__array_namespace_info__().capabilities()["data-dependent shapes"]


def first_k(value: Array, k: int, /) -> tuple[Array, Array]:
    """The `k` greatest on the last axis, and where they are; of equal ones the first.

    The standard has no such function, and sorting everything is far slower; so JAX's own is used where there is one.
    """
    xp = array_namespace(value)
    if is_jax_array(value):
        from jax import lax

        best, at = lax.top_k(value, k)
        return best, at
    place = counting(value.shape[-1], value)
    found, left = [], xp.ones_like(value, dtype=xp.bool)
    for _ in range(k):
        best = xp.max(value, axis=-1, keepdims=True)
        at = xp.min(xp.where((value == best) & left, place, value.shape[-1]), axis=-1, keepdims=True)
        found.append((best, at))
        left = left & (place != at)
        value = xp.where(left, value, -xp.inf)
    return xp.concat([best for best, _ in found], axis=-1), xp.concat([at for _, at in found], axis=-1)


def kth_least(value: Array, k: int, /) -> Array:
    """The `k`-th least value on the last axis, of integers; 1 is the least."""
    if _is_torch(value):  # the standard has sorting alone, of all
        return value.topk(k, largest=False).values[..., -1]
    return array_namespace(value).sort(value, axis=-1)[..., k - 1]


def is_array(value: Any, /) -> bool:
    """Whether `value` is an array of any library."""
    return _is_torch(value) or array_api_compat.is_array_api_obj(value)


def is_traced(value: Any, /) -> bool:
    """Whether `value` is an array of which JAX, compiling a function, knows no values."""
    if not is_jax_array(value):
        return False
    from jax.core import Tracer

    return isinstance(value, Tracer)


def comparable(value: Any, like: Array, /) -> Any:
    """A number or array as operators of the library of `like` take it: PyTorch's do not take arrays of NumPy."""
    if isinstance(value, int | float) or not _is_torch(like) or not array_api_compat.is_numpy_array(value):
        return value
    return value.item() if value.ndim == 0 else array_namespace(like).asarray(value, device=device(like))


def like_numbers(values: tuple[float | Array, ...], like: Array, /) -> Array:
    """Numbers, which may be traced, as a float32 array on the device of `like`."""
    xp = array_namespace(like)
    if is_jax_array(like):
        return xp.asarray(values, dtype=xp.float32)
    return xp.asarray(values, dtype=xp.float32, device=device(like))


def on_host(values: Array, /) -> bool:
    """Whether an array lies in the memory of the CPU, so that its values are there without waiting."""
    return "cpu" in str(device(values)).lower()


def plain(row: Sequence[float] | Array, /) -> list[float]:
    """Numbers, which may be an array with one axis, as a list."""
    count = len(row) if isinstance(row, Sequence) else row.shape[0]
    return [float(row[at]) for at in range(count)]


def require_marks(marks: Array, argument: str, /) -> None:
    """Raise a `TokenExitError` unless an array is boolean.

    Args:
        marks: An array of any library.
        argument: Name of the argument that it is the value of.

    Raises:
        TokenExitError: If it is of another dtype.
    """
    boolean = array_namespace(marks).isdtype(marks.dtype, "bool")
    require(boolean, argument, "be boolean", f"dtype {marks.dtype}")


def searchsorted(ascending: Array, wanted: Array, /) -> Array:
    """How many of some ascending values are less than each of the wanted ones."""
    count = ascending.shape[0]
    if not is_jax_array(ascending) or isinstance(count, int):
        return array_namespace(ascending, wanted).searchsorted(ascending, wanted)
    # A program for batches of any size: JAX's own function asks for the number, which is not known.
    from jax import lax
    from jax import numpy as jnp

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low + high) // 2
        later = (low < high) & (jnp.take(ascending, middle, mode="clip") < wanted)
        return jnp.where(later, middle + 1, low), jnp.where(later, high, middle)

    low = jnp.zeros_like(wanted, dtype=jnp.int32)
    return lax.fori_loop(0, 32, halve, (low, low + jnp.asarray(count, dtype=jnp.int32)))[0]


def softmax(values: Array, /) -> Array:
    """Softmax over the last axis, in float32."""
    xp = array_namespace(values)
    if _is_torch(values):  # one operation instead of five
        return values.softmax(-1, dtype=xp.float32)
    values = xp.astype(values, xp.float32)
    weight = xp.exp(values - xp.max(values, axis=-1, keepdims=True))
    return weight / xp.sum(weight, axis=-1, keepdims=True)


def take(values: Array, indices: Array, /, *, axis: int = 0) -> Array:
    """Entries of an axis by their places, from 0 up."""
    if _is_torch(values):  # array-api-compat first looks for negative places: three more operations
        return values.index_select(axis, indices)
    return array_namespace(values, indices).take(values, indices, axis=axis)


def take_along_axis(values: Array, indices: Array, /, *, axis: int = -1) -> Array:
    """Entries of an axis by places, from 0 up, that are given for each of the other axes."""
    if _is_torch(values):
        return values.gather(axis, indices)
    return array_namespace(values, indices).take_along_axis(values, indices, axis=axis)


def take_or(values: Array, rows: Array, found: Array, other: Array, /) -> Array:
    """Row `rows[i]` of `values` where `found[i]`, else row `i` of `other`: a scatter, written as a gather.

    `rows` may hold anything where `found` is false, and `values` may have no rows at all.
    """
    xp = array_namespace(values, rows)
    if values.shape[0] == 0:
        return other
    taken = take(values, xp.where(found, rows, xp.zeros_like(rows)), axis=0)
    return xp.where(xp.reshape(found, (*found.shape, *[1] * (values.ndim - 1))), taken, other)


def written(values: Array, rows: Array, other: Array, /) -> Array | None:
    """A copy of `other` in which row `rows[i]` is `values[i]`, no row twice; None where only a gather does that."""
    if not _is_torch(values):
        return None
    kind = array_namespace(values).result_type(values, other)
    return other.to(kind).index_copy(0, rows, values.to(kind))


def uniform_squares(map: Array, /, *, radius: tuple[int, int]) -> Array | None:
    """Whether the places around every place of some maps of small integers hold one value.

    Args:
        map: The integers, of shape (images, height, width).
        radius: Places up and down, and to the sides; beyond the edge there are none.

    Returns:
        A mask of the same shape; None if the library of the array has no pooling.
    """
    if not _is_torch(map):
        return None
    from torch.nn import functional

    numbers, size = map.to(array_namespace(map).float32)[:, None], tuple(2 * one + 1 for one in radius)
    options = {"stride": 1, "padding": radius}
    greatest = functional.max_pool2d(numbers, size, **options)
    return (greatest == -functional.max_pool2d(-numbers, size, **options))[:, 0]


def without_nan(score: Array, /) -> Array:
    """The same scores, with minus infinity in place of NaN."""
    if _is_torch(score):
        infinite = float("inf")
        return score.nan_to_num(nan=-infinite, posinf=infinite, neginf=-infinite)
    xp = array_namespace(score)
    return xp.where(xp.isnan(score), -xp.inf, score)


def with_doubles(values: Array, /) -> Array:
    """The same array in a library that has double precision: NumPy in the place of JAX, which needs a switch for it."""
    if not is_jax_array(values):
        return values
    import numpy as np

    return np.asarray(values)


def in_numpy(values: Array, /) -> Any:
    """An array of any library as one of NumPy, in the memory of the CPU."""
    if _is_torch(values):
        return values.cpu().numpy()
    import numpy as np

    return np.asarray(values)


def in_64_bits(tokens: Array) -> Array:
    """Token counts in a dtype that holds multiply-adds, which 32 bits do not: an image may take 10 ** 12."""
    xp = array_namespace(tokens)
    return xp.astype(tokens, xp.__array_namespace_info__().dtypes().get("int64", xp.float32))


def number_beside(value: int, beside: Array) -> int | float:
    """`value` for arithmetic with `beside`: JAX takes no Python integer beyond 32 bits, not even beside floats."""
    return float(value) if array_namespace(beside).isdtype(beside.dtype, "real floating") else value
