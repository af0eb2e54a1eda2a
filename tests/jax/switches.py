"""All tests of JAX run under `jax_numpy_rank_promotion="raise"`: no operation of the library may rely on it."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True, scope="package")
def ranks_written_out() -> Iterator[None]:
    jax.config.update("jax_numpy_rank_promotion", "raise")
    yield
    jax.config.update("jax_numpy_rank_promotion", "allow")


@pytest.fixture(autouse=True, scope="module")
def compiled_programs_let_go() -> Iterator[None]:
    """The more programs JAX holds, the longer it takes to make another: twice as long after a thousand."""
    yield
    jax.clear_caches()
