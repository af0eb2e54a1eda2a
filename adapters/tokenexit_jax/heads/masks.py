"""Heads that look at all patches of an image, and give a mask for every class: attention to mask (ATM)."""

from typing import NamedTuple

import jax
from einops import rearrange
from jax import Array
from jax import numpy as jnp
from jaxtyping import Bool, Float

from tokenexit.errors import require
from tokenexit.heads import ATM
from tokenexit_jax._given import new_keys
from tokenexit_jax._layers import Weights, layer_norm, linear, new_linear, new_norm

__all__ = ["MaskMaps", "Masks", "log_scores", "read_masks"]


class Masks(NamedTuple):
    """What a mask head predicts for patches, image by image.

    Attributes:
        mask_logits: For every patch and class, the logit of the patch being of the class, if the class is there at
            all. Where there is no patch it means nothing, and is finite.
        presence_logits: For every image and class, the logit of the class being in the image. For an image without
            any patch it means nothing, and is finite.
    """

    mask_logits: Float[Array, "images entries classes"]
    presence_logits: Float[Array, "images classes"]


class MaskMaps(NamedTuple):
    """What a mask head predicts for whole images: what `mask_loss` is computed from.

    Attributes:
        mask_logits: The mask of every class, at the size of the patch grid.
        presence_logits: For every image and class, the logit of the class being in the image.
    """

    mask_logits: Float[Array, "images grid_height grid_width classes"]
    presence_logits: Float[Array, "images classes"]


def read_masks(
    plan: ATM, params: Weights, patches: Float[Array, "images entries width"], valid: Bool[Array, "images entries"], /
) -> Masks:
    """Read masks and presence off all patches of each image (SegViT, NeurIPS 2022, section 3; as in DToP, ICCV 2023).

    In each layer the queries attend to each other, then to the patches, and pass an MLP; a norm follows each of the
    three. The mask of a class is the scaled query-key product of the last layer, before the softmax, averaged over the
    attention's heads.

    Args:
        plan: The plan of the head.
        params: Its weights, as `init` made them or PyTorch's `state_dict` holds them.
        patches: The patches; prefix tokens are left out.
        valid: Which entries hold a patch.

    Returns:
        Mask logits of these patches, and presence in each image. An image's do not depend on other images.
    """
    heads = _attention_heads(plan, patches.shape[-1])
    # An image without any patch attends to zeros, for a softmax over nothing would be NaN.
    seen = valid | ~valid.any(axis=1, keepdims=True)
    # What is not valid is zeroed: a weight of 0 would not hide its NaN.
    memory = layer_norm(params, "memory.1", linear(params, "memory.0", jnp.where(valid[..., None], patches, 0)))
    queries = jnp.broadcast_to(params["queries"], (patches.shape[0], *params["queries"].shape))
    product = jnp.zeros(())
    for layer in range(plan.layers):
        queries, product = _layer(f"layers.{layer}", params, queries, memory, seen, heads)
    absent, present = rearrange(linear(params, "presence", queries), "images classes two -> two images classes")
    # Of a softmax of two, the difference of the logits is all there is.
    odds = jnp.where(valid.any(axis=1)[:, None], present - absent, 0)
    return Masks(rearrange(product.mean(axis=1), "images classes entries -> images entries classes"), odds)


def log_scores(
    mask_logits: Float[Array, "*patches classes"], presence_logits: Float[Array, "*#patches classes"], /
) -> Float[Array, "*patches classes"]:
    """Logarithm of `tokenexit.scores.mask_scores`: class scores that can be interpolated, and compared near 1.

    Args:
        mask_logits: For every patch and class, the logit of the patch being of the class.
        presence_logits: The logit of the class being in the image, with as many axes.

    Returns:
        The scores.
    """
    return jax.nn.log_sigmoid(presence_logits) + jax.nn.log_sigmoid(mask_logits)


def new_masks(plan: ATM, key: Array, width: int, classes: int) -> dict[str, Array]:
    """Random weights of the head."""
    require(width % 2 == 0, "width", "be even", width)
    _attention_heads(plan, width)
    half = width // 2
    for_queries, for_memory, for_presence, key = new_keys(key, 4)
    params = {
        "queries": jax.random.normal(for_queries, (classes, half)),
        **new_linear(for_memory, "memory.0", width, half),
        **new_norm("memory.1", half),
        **new_linear(for_presence, "presence", half, 2),
    }
    sizes = {
        "among": (half, 3 * half), "among_out": (half, half), "query": (half, half), "key_value": (half, 2 * half),
        "out": (half, half), "mlp.0": (half, 4 * half), "mlp.2": (4 * half, half),
    }  # fmt: skip
    for layer in range(plan.layers):
        key, *keys = new_keys(key, 1 + len(sizes))
        for one, (name, (wide, out)) in zip(keys, sizes.items(), strict=True):
            params |= new_linear(one, f"layers.{layer}.{name}", wide, out)
        for norm in range(3):
            params |= new_norm(f"layers.{layer}.norms.{norm}", half)
    return params


def _layer(
    name: str, params: Weights, queries: Array, memory: Array, seen: Array, heads: int
) -> tuple[Float[Array, "images classes wide"], Float[Array, "images heads classes entries"]]:
    """The queries after this layer, and its query-key products."""
    q, k, v = jnp.split(_split(linear(params, f"{name}.among", queries), 3 * heads), 3, axis=1)
    attended = jax.nn.softmax(_products(q, k), axis=-1) @ v
    queries = queries + linear(params, f"{name}.among_out", _join(attended))
    queries = layer_norm(params, f"{name}.norms.0", queries)
    q = _split(linear(params, f"{name}.query", queries), heads)
    k, v = jnp.split(_split(linear(params, f"{name}.key_value", memory), 2 * heads), 2, axis=1)
    product = _products(q, k)
    weight = jax.nn.softmax(jnp.where(seen[:, None, None], product, -jnp.inf), axis=-1)
    queries = layer_norm(params, f"{name}.norms.1", queries + linear(params, f"{name}.out", _join(weight @ v)))
    hidden = jax.nn.relu(linear(params, f"{name}.mlp.0", queries))
    return layer_norm(params, f"{name}.norms.2", queries + linear(params, f"{name}.mlp.2", hidden)), product


def _products(q: Array, k: Array) -> Array:
    return q @ jnp.swapaxes(k, -1, -2) * q.shape[-1] ** -0.5


def _split(x: Array, heads: int) -> Array:
    return rearrange(x, "images tokens (heads wide) -> images heads tokens wide", heads=heads)


def _join(x: Array) -> Array:
    return rearrange(x, "images heads tokens wide -> images tokens (heads wide)")


def _attention_heads(plan: ATM, width: int) -> int:
    half = width // 2
    heads = max(half // 32, 1) if plan.attention_heads is None else plan.attention_heads
    require(half % heads == 0, "attention_heads", f"divide half the width, {half}", heads)
    return heads
