"""Attention over entries of which some hold no token, and some count for tokens that have left."""

import jax
from jax import Array
from jax import numpy as jnp
from jaxtyping import Float

from tokenexit.errors import require
from tokenexit_jax._given import require_array

__all__ = ["attend", "key_bias"]


def attend(
    query: Float[Array, "images entries heads width"],
    key: Float[Array, "images entries heads width"],
    value: Float[Array, "images entries heads value_width"],
    counts: Float[Array, "images entries"],
    /,
) -> Float[Array, "images entries heads value_width"]:
    """Attention within each image: what a block calls in place of its own softmax.

    Args:
        query: What each entry asks for.
        key: What each entry is found by.
        value: What each entry gives.
        counts: As how many keys each entry counts; see `key_bias`.

    Returns:
        What each entry has gathered. Of an entry that holds no token it means nothing, and is finite.

    Raises:
        TokenExitError: If the keys or the counts are no such array, or there is not one count for each key.
    """
    require_array(key, "key", "images", "entries", "heads", "width")
    require_array(counts, "counts", "images", "entries")
    entries = tuple(key.shape[:2])
    require(counts.shape == entries, "counts", f"have one entry for each key, {entries}", f"shape {counts.shape}")
    return jax.nn.dot_product_attention(query, key, value, bias=key_bias(counts))


def key_bias(counts: Float[Array, "images entries"], /) -> Float[Array, "images 1 1 entries"]:
    """What is added to query-key products so that every key counts as often as it should.

    A key that counts n times has n times the weight: log n more in the exponent (ToMe, ICLR 2023, section 3).

    Args:
        counts: As how many keys each entry counts: 0 if it holds no token, 1 as a rule, more if it stands for tokens
            that have left. In every image, one at least is greater than 0.

    Returns:
        Logarithms of the counts, minus infinity for 0; the axes are those of
        `jax.nn.dot_product_attention(..., bias=...)`: images, heads, queries, keys.

    Raises:
        TokenExitError: If the counts are no such array.
    """
    require_array(counts, "counts", "images", "entries")
    held = counts > 0
    # The inner `where` keeps log 0 away from gradients, of which 0 times infinity would make NaN.
    return jnp.where(held, jnp.log(jnp.where(held, counts, 1)), -jnp.inf)[:, None, None, :]
