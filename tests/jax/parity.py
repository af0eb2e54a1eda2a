"""The same numbers on both sides."""

import jax
import numpy as np
import torch


def from_torch(module):
    """The weights of a module as JAX arrays, under their own names; `jnp.asarray` would compile a copy of each shape."""
    return {name: jax.device_put(value.detach().numpy().copy()) for name, value in module.state_dict().items()}


def numbers(values):
    return values.detach().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)


def same(found, wanted, within=1e-5):
    """Equal within a tolerance, which is relative where numbers are large."""
    found, wanted = numbers(found), numbers(wanted)
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=within, atol=within)


def exact(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
