"""Compiling is most of what these tests do: it is done less thoroughly, also by the flags of
`tests/conftest.py`. `test_sharding` compiles as users do.

All of them run under `jax_numpy_rank_promotion="raise"`: no operation of the library may rely on that promotion.
"""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True, scope="package")
def compiled_quickly() -> Iterator[None]:
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


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
