"""The plain ViT of `examples.scenes.vit` as pure functions: its parameters are the weights of the file, by name.

To bring a ViT of your own, write what `network` writes: where the tokens come from, how a block runs on any of them,
and what follows the last block.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np
from einops import rearrange
from jax import Array
from jax import numpy as jnp
from jaxtyping import Float

import tokenexit_jax as tej

Params = Mapping[str, Array]


@dataclass(frozen=True)
class Config:
    """Size of the network.

    Attributes:
        width: Channels of a token; a multiple of 4 and of `heads`.
        depth: Blocks.
        heads: Attention heads.
        patch: Side of a patch, in pixels.
    """

    width: int
    depth: int
    heads: int
    patch: int


def network(config: Config) -> tej.Network:
    """The network as the parts between which tokens can leave."""
    blocks = tuple(partial(_block, index=index, heads=config.heads) for index in range(config.depth))
    return tej.Network(partial(_embed, patch=config.patch), blocks, partial(_norm, name="norm"), config.width)


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """The shape of every weight, by name."""
    width, patch = config.width, config.patch
    found: dict[str, tuple[int, ...]] = {
        "patches.weight": (width, 3, patch, patch), "patches.bias": (width,), "norm.weight": (width,),
        "norm.bias": (width,),
    }  # fmt: skip
    layers = {
        "attention.qkv": (3 * width, width), "attention.out": (width, width), "mlp.0": (4 * width, width),
        "mlp.2": (width, 4 * width), "norm1": (width,), "norm2": (width,),
    }  # fmt: skip
    for index in range(config.depth):
        for name, shape in layers.items():
            found |= {f"blocks.{index}.{name}.weight": shape, f"blocks.{index}.{name}.bias": shape[:1]}
    return found


def _embed(params: Params, images: Float[Array, "images height width 3"], *, patch: int) -> tej.Embedded:
    grid = images.shape[1] // patch, images.shape[2] // patch
    pattern = "images (rows p) (columns q) colours -> images (rows columns) (colours p q)"
    pixels = rearrange(images, pattern, p=patch, q=patch)
    kernel = params["patches.weight"]
    tokens = pixels @ kernel.reshape(kernel.shape[0], -1).T + _along(params["patches.bias"], pixels)
    return tej.Embedded(tokens + _positions(grid, kernel.shape[0])[None], prefix=0, grid=grid)


def _block(
    params: Params,
    tokens: Float[Array, "images entries width"],
    counts: Float[Array, "images entries"],
    _positions: None,
    *,
    index: int,
    heads: int,
) -> Float[Array, "images entries width"]:
    """Attention, then an MLP on each token; both add to what was there."""
    name = f"blocks.{index}"
    pattern = "images entries (three heads wide) -> three images entries heads wide"
    normed = _norm(params, tokens, name=f"{name}.norm1")
    query, key, value = rearrange(_linear(params, f"{name}.attention.qkv", normed), pattern, three=3, heads=heads)
    mixed = tej.attend(query, key, value, counts)  # which leaves out entries without a token
    mixed = rearrange(mixed, "images entries heads wide -> images entries (heads wide)")
    tokens = tokens + _linear(params, f"{name}.attention.out", mixed)
    hidden = _linear(params, f"{name}.mlp.0", _norm(params, tokens, name=f"{name}.norm2"))
    return tokens + _linear(params, f"{name}.mlp.2", jax.nn.gelu(hidden, approximate=False))


def _linear(params: Params, name: str, x: Float[Array, "*shape wide"]) -> Float[Array, "*shape out"]:
    return x @ params[f"{name}.weight"].T + _along(params[f"{name}.bias"], x)


def _norm(params: Params, tokens: Float[Array, "*tokens width"], *, name: str) -> Float[Array, "*tokens width"]:
    centred = tokens - tokens.mean(axis=-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + 1e-5)
    return normed * _along(params[f"{name}.weight"], tokens) + _along(params[f"{name}.bias"], tokens)


def _along(channels: Array, x: Array) -> Array:
    """Channels with the axes of tokens: so this runs under `jax_numpy_rank_promotion="raise"` as well."""
    return channels.reshape(*[1] * (x.ndim - 1), -1)


def _positions(grid: tuple[int, int], width: int) -> Float[np.ndarray, "slots width"]:
    """Sines and cosines of how far down (half of the channels) and how far across (the other half) each patch is."""
    rates = 40.0 * np.exp(np.arange(width // 4) * (-4 * math.log(1000.0) / width))
    halves = [np.outer((np.arange(count) + 0.5) / count, rates) for count in grid]
    rows, columns = (np.concatenate((np.sin(angles), np.cos(angles)), axis=1) for angles in halves)
    both = (np.broadcast_to(rows[:, None], (*grid, width // 2)), np.broadcast_to(columns, (*grid, width // 2)))
    return rearrange(np.concatenate(both, axis=2), "rows columns width -> (rows columns) width").astype(np.float32)
