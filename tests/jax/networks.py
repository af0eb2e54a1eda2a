"""The networks of the PyTorch tests as pure functions in JAX, on the same weights."""

import functools

import jax
import numpy as np
from einops import rearrange
from jax import numpy as jnp

import tokenexit_jax as tej
from tests.jax.parity import from_torch
from tests.torch import models

CLASSES = models.CLASSES
SIZE = (32, 40)
PATCH = 8


def norm(params, name, x, epsilon=1e-6):
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(axis=-1, keepdims=True)
    scaled = centred * jax.lax.rsqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + epsilon)
    return (scaled * params[f"{name}.weight"] + params[f"{name}.bias"]).astype(x.dtype)


def linear(params, name, x):
    return x @ params[f"{name}.weight"].T + params[f"{name}.bias"]


def patches_of(params, name, images):
    """A patch embedding as a product; images have their channels last."""
    kernel = params[f"{name}.weight"]
    cut = rearrange(images, "n (gh p) (gw q) c -> n (gh gw) (c p q)", p=PATCH, q=PATCH)
    return cut @ kernel.reshape(kernel.shape[0], -1).T + params[f"{name}.bias"]


def grid_of(images):
    return images.shape[1] // PATCH, images.shape[2] // PATCH


@functools.cache
def timm_network(heads=3, prefix=1, depth=5, registers=0):
    """A timm `VisionTransformer`, whose parameters are its `state_dict`."""

    def embed(params, images):
        tokens = patches_of(params, "patch_embed.proj", images)
        first = [params[name] for name in ("cls_token", "reg_token") if name in params]
        first = [jnp.broadcast_to(one, (len(tokens), *one.shape[1:])) for one in first]
        tokens = jnp.concatenate([*first, tokens], axis=1) + params["pos_embed"]
        return tej.Embedded(tokens, prefix, grid_of(images))

    def block(params, tokens, counts, positions, index):
        name = f"blocks.{index}"
        qkv = linear(params, f"{name}.attn.qkv", norm(params, f"{name}.norm1", tokens))
        q, k, v = rearrange(qkv, "n t (three h d) -> three n t h d", three=3, h=heads)
        mixed = rearrange(tej.attend(q, k, v, counts), "n t h d -> n t (h d)")
        tokens = tokens + linear(params, f"{name}.attn.proj", mixed)
        hidden = linear(params, f"{name}.mlp.fc1", norm(params, f"{name}.norm2", tokens))
        return tokens + linear(params, f"{name}.mlp.fc2", jax.nn.gelu(hidden, approximate=False))

    blocks = tuple(functools.partial(block, index=index) for index in range(depth))
    return tej.Network(embed, blocks, lambda params, tokens: norm(params, "norm", tokens), 48)


@functools.cache
def plain_network(heads=2, depth=5, placed=False):
    """The demo's own ViT, without prefix tokens; `placed` adds something that belongs to each place in every block."""

    def embed(params, images):
        from examples.scenes.vit import positions

        grid = grid_of(images)
        table = jnp.asarray(positions(grid, 32).numpy())
        slots = jnp.arange(grid[0] * grid[1])
        travelling = jnp.sin(slots[:, None] * jnp.arange(1, 33)) if placed else None
        return tej.Embedded(patches_of(params, "patches", images) + table, 0, grid, travelling)

    def block(params, tokens, counts, positions, index):
        name = f"blocks.{index}"
        tokens = tokens if positions is None else tokens + positions
        qkv = linear(params, f"{name}.attention.qkv", norm(params, f"{name}.norm1", tokens, 1e-5))
        q, k, v = rearrange(qkv, "n t (three h d) -> three n t h d", three=3, h=heads)
        mixed = rearrange(tej.attend(q, k, v, counts), "n t h d -> n t (h d)")
        tokens = tokens + linear(params, f"{name}.attention.out", mixed)
        hidden = linear(params, f"{name}.mlp.0", norm(params, f"{name}.norm2", tokens, 1e-5))
        return tokens + linear(params, f"{name}.mlp.2", jax.nn.gelu(hidden, approximate=False))

    blocks = tuple(functools.partial(block, index=index) for index in range(depth))
    return tej.Network(embed, blocks, lambda params, tokens: norm(params, "norm", tokens, 1e-5), 32)


def heads_of(model):
    """The heads of a PyTorch model that is wrapped."""
    exit_heads = {after: from_torch(head) for after, head in model.exit_heads.items()}
    return {"exit_heads": exit_heads, "head": from_torch(model.head)}


def images_of(images):
    """Images with their channels last."""
    return jnp.asarray(np.moveaxis(images.numpy(), 1, -1))
