"""Layers as functions of weights in one flat dictionary, under the names and in the layouts of PyTorch."""

from collections.abc import Mapping
from typing import Any

import jax
from jax import Array
from jax import numpy as jnp
from jaxtyping import Bool, Float

from tokenexit.adapting import aligned
from tokenexit_jax._given import new_keys

Weights = Mapping[str, Array]

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_MOMENTUM = 0.1  # how far a batch moves the running statistics; these as in PyTorch
_EPSILON = 1e-5


def part(weights: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The weights of one layer of several, under its own names."""
    start = f"{name}."
    return {whole.removeprefix(start): value for whole, value in weights.items() if whole.startswith(start)}


def named(weights: Weights, name: str) -> dict[str, Array]:
    """The weights of a layer as one of several: `part` gives them back."""
    return {f"{name}.{own}": value for own, value in weights.items()}


def linear(weights: Weights, name: str, x: Float[Array, "*shape wide"]) -> Float[Array, "*shape out"]:
    """`x @ weight.T + bias`, the bias if there is one."""
    y = x @ weights[f"{name}.weight"].T
    bias = weights.get(f"{name}.bias")
    return y if bias is None else y + aligned(bias, y.ndim)


def mlp(weights: Weights, name: str, x: Float[Array, "*shape wide"]) -> Float[Array, "*shape wide"]:
    """The MLP of a block: two linear layers with GELU between them."""
    return linear(weights, f"{name}.2", jax.nn.gelu(linear(weights, f"{name}.0", x), approximate=False))


def layer_norm(
    weights: Weights, name: str, x: Float[Array, "*shape wide"], *, epsilon: float = _EPSILON
) -> Float[Array, "*shape wide"]:
    """LayerNorm, as a rule with PyTorch's usual epsilon; statistics in float32 at least."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centred = wide - wide.mean(axis=-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + epsilon)
    scale, shift = (aligned(weights[f"{name}.{one}"], x.ndim) for one in ("weight", "bias"))
    return (normed * scale + shift).astype(x.dtype)


def batch_norm(weights: Weights, name: str, x: Float[Array, "*shape wide"]) -> Float[Array, "*shape wide"]:
    """Batch norm by its running statistics."""
    return _after_norm(weights, name, x, weights[f"{name}.running_mean"], weights[f"{name}.running_var"])


def batch_norm_in_training(
    weights: Weights, name: str, x: Float[Array, "*shape wide"], valid: Bool[Array, "*shape"]
) -> tuple[Float[Array, "*shape wide"], dict[str, Array]]:
    """Batch norm by the statistics of the entries at hand, and the running ones after them, which are constants.

    A single entry has no variance: for fewer than two the running statistics are used, and stay.
    """
    known, rows = valid[..., None], x.astype(jnp.promote_types(x.dtype, jnp.float32))
    axes = tuple(range(x.ndim - 1))
    count = valid.sum()
    several = count > 1
    number = jnp.maximum(count, 1)
    mean = jnp.where(known, rows, 0).sum(axis=axes) / number
    variance = jnp.square(jnp.where(known, rows - aligned(mean, x.ndim), 0)).sum(axis=axes) / number
    stored_mean, stored_variance, batches = (weights[f"{name}.{one}"] for one in STATISTICS)
    used = jnp.where(several, mean, stored_mean), jnp.where(several, variance, stored_variance)
    unbiased = variance * number / jnp.maximum(count - 1, 1)
    moved = [
        jnp.where(several, (1 - _MOMENTUM) * stored + _MOMENTUM * new, stored).astype(stored.dtype)
        for stored, new in ((stored_mean, mean), (stored_variance, unbiased))
    ]
    learned = zip(STATISTICS, (*moved, batches + several.astype(batches.dtype)), strict=True)
    statistics = {f"{name}.{one}": jax.lax.stop_gradient(value) for one, value in learned}
    return _after_norm(weights, name, x, *used), statistics


def cleared(
    map: Float[Array, "images height width channels"], valid: Bool[Array, "images height width"] | None
) -> Float[Array, "images height width channels"]:
    """Zeros where there is no token: no weight of 0 hides a NaN from attention, nor from a convolution."""
    return map if valid is None else jnp.where(valid[..., None], map, 0)


def drop_path(added: Float[Array, "groups ..."], rate: float, key: Array | None) -> Float[Array, "groups ..."]:
    """What a layer adds, dropped for some entries of the first axis (stochastic depth), if there is a key to draw by.

    What is left is scaled so that the mean stays.
    """
    if key is None or rate == 0:
        return added
    keep = jax.random.uniform(key, (len(added), *[1] * (added.ndim - 1))) >= rate
    return added * (keep / (1 - rate)).astype(added.dtype)


def keys_of(key: Array | None, count: int) -> list[Array | None]:
    """As many keys of their own; none of one that is none."""
    return [None] * count if key is None else [*new_keys(key, count)]


def new_linear(key: Array, name: str, wide: int, out: int, *, bias: bool = True) -> dict[str, Array]:
    """Random weights of a linear layer, drawn as PyTorch draws them: uniform within one over the root of `wide`."""
    for_weight, for_bias = new_keys(key)
    bound = wide**-0.5
    new = {f"{name}.weight": jax.random.uniform(for_weight, (out, wide), minval=-bound, maxval=bound)}
    if bias:
        new[f"{name}.bias"] = jax.random.uniform(for_bias, (out,), minval=-bound, maxval=bound)
    return new


def zero_linear(name: str, wide: int, out: int) -> dict[str, Array]:
    """Weights of a linear layer that gives zeros."""
    return {f"{name}.weight": jnp.zeros((out, wide)), f"{name}.bias": jnp.zeros(out)}


def new_norm(name: str, wide: int) -> dict[str, Array]:
    """Weights of a norm that changes nothing yet."""
    return {f"{name}.weight": jnp.ones(wide), f"{name}.bias": jnp.zeros(wide)}


def new_batch_norm(name: str, wide: int) -> dict[str, Array]:
    """Weights and statistics of a batch norm that has seen nothing yet."""
    statistics = jnp.zeros(wide), jnp.ones(wide), jnp.zeros((), dtype=jnp.int32)
    return new_norm(name, wide) | {f"{name}.{one}": value for one, value in zip(STATISTICS, statistics, strict=True)}


def start_linear(key: Array, name: str, wide: int, out: int, *, bias: bool = True) -> dict[str, Array]:
    """Weights of a linear layer as ViTs start them: normal, of deviation 0.02, and no bias."""
    new = {f"{name}.weight": 0.02 * jax.random.normal(key, (out, wide))}
    return new | {f"{name}.bias": jnp.zeros(out)} if bias else new


def _after_norm(weights: Weights, name: str, x: Array, mean: Array, variance: Array) -> Array:
    scale = weights[f"{name}.weight"] * jax.lax.rsqrt(variance + _EPSILON)
    mean, scale, shift = (aligned(one, x.ndim) for one in (mean, scale, weights[f"{name}.bias"]))
    return ((x - mean) * scale + shift).astype(x.dtype)
