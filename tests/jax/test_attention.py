"""Attention with counts: no weight for what holds no token, n times the weight for what counts n times."""

import functools

import jax
import numpy as np
import pytest
import torch
from jax import numpy as jnp
from torch.nn import functional

from tests.jax.parity import same
from tokenexit_jax import attention
from tokenexit_torch.attention import attending_per_image

IMAGES, ENTRIES, HEADS, WIDTH = 3, 6, 2, 4
COUNTS = np.array([[1, 1, 1, 1, 1, 1], [1, 3, 1, 0, 0, 0], [0, 0, 5, 0, 0, 0]], np.float32)


def drawn():
    return np.random.default_rng(0).normal(size=(3, IMAGES, ENTRIES, HEADS, WIDTH)).astype(np.float32)


def attended(parts, counts=COUNTS):
    return attention.attend(*jnp.asarray(parts), jnp.asarray(counts))


def test_entries_that_hold_a_token_attend_as_a_packed_row_does_in_pytorch():
    parts, held = drawn(), COUNTS > 0
    row = [torch.from_numpy(part[held]).transpose(0, 1)[None] for part in parts]
    with attending_per_image(held.sum(axis=1).tolist(), token_size=torch.from_numpy(COUNTS[held])):
        wanted = functional.scaled_dot_product_attention(*row)
    same(attended(parts)[held], wanted[0].transpose(0, 1))


def test_a_key_that_counts_thrice_is_three_keys():
    parts = drawn()[:, :1]
    thrice = np.concatenate([parts, parts[:, :, 1:2], parts[:, :, 1:2]], axis=2)
    counts = np.array([[1, 3, 1, 1, 1, 1]], np.float32)
    same(attended(parts, counts), attended(thrice, np.ones((1, 8), np.float32))[:, :ENTRIES], 1e-6)


def test_counts_of_one_change_nothing():
    parts = drawn()
    found = attended(parts, np.ones((IMAGES, ENTRIES), np.float32))
    np.testing.assert_array_equal(found, jax.nn.dot_product_attention(*jnp.asarray(parts)))


@pytest.mark.parametrize("junk", [7.0, 1e4])
def test_what_holds_no_token_has_no_part_in_values_or_gradients(junk):
    parts, held = drawn(), (COUNTS > 0)[None, :, :, None, None]
    spoiled = np.where(held, parts, junk).astype(np.float32)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(parts):
        found = attended(parts)
        return jnp.where(held[0], found, 0).sum(), found

    (_, found), slopes = loss(jnp.asarray(spoiled))
    (_, wanted), wanted_slopes = loss(jnp.asarray(parts))
    same(jnp.where(held[0], found, 0), jnp.where(held[0], wanted, 0), 1e-6)
    same(jnp.where(held, slopes, 0), jnp.where(held, wanted_slopes, 0), 1e-6)
    assert np.isfinite(slopes).all()


def test_gradients_of_counts_are_finite():
    slopes = jax.grad(lambda counts: jnp.exp(attention.key_bias(counts)).sum())(jnp.asarray(COUNTS))
    np.testing.assert_allclose(slopes, COUNTS > 0, atol=1e-6)


def test_the_bias_is_logarithms_and_minus_infinity():
    with np.errstate(divide="ignore"):
        wanted = np.log(COUNTS)
    same(attention.key_bias(jnp.asarray(COUNTS))[:, 0, 0], wanted, 1e-6)
