"""Layers as functions of weights in one flat dictionary, under the names and in the layouts of PyTorch."""

from collections.abc import Mapping

import jax
from jax import Array
from jax import numpy as jnp
from jaxtyping import Float

Weights = Mapping[str, Array]


def linear(weights: Weights, name: str, x: Float[Array, "*shape wide"]) -> Float[Array, "*shape out"]:
    """`x @ weight.T + bias`, the bias if there is one."""
    y = x @ weights[f"{name}.weight"].T
    bias = weights.get(f"{name}.bias")
    return y if bias is None else y + bias


def layer_norm(weights: Weights, name: str, x: Float[Array, "*shape wide"]) -> Float[Array, "*shape wide"]:
    """LayerNorm with PyTorch's usual epsilon, 1e-5; statistics in float32 at least."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centred = wide - wide.mean(axis=-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + 1e-5)
    return (normed * weights[f"{name}.weight"] + weights[f"{name}.bias"]).astype(x.dtype)


def new_linear(key: Array, name: str, wide: int, out: int, *, bias: bool = True) -> dict[str, Array]:
    """Random weights of a linear layer, drawn as PyTorch draws them: uniform within one over the root of `wide`."""
    for_weight, for_bias = jax.random.split(key)
    bound = wide**-0.5
    new = {f"{name}.weight": jax.random.uniform(for_weight, (out, wide), minval=-bound, maxval=bound)}
    if bias:
        new[f"{name}.bias"] = jax.random.uniform(for_bias, (out,), minval=-bound, maxval=bound)
    return new


def new_norm(name: str, wide: int) -> dict[str, Array]:
    """Weights of a norm that changes nothing yet."""
    return {f"{name}.weight": jnp.ones(wide), f"{name}.bias": jnp.zeros(wide)}
