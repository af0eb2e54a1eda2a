"""Hypothesis profiles: `make test` runs the quick one, which draws the same examples every time.

`make properties` runs the thorough one, and `make invariance` the one of that name.
"""

import os
from collections.abc import Iterator

import jaxtyping
import pytest
from hypothesis import settings

# One thread for each process, those that tests start included: the workers of `make test` have a core each, and threads
# that wait for one another are slow on a machine that is busy. PyTorch reads it when it is imported, which comes later.
os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("quick", max_examples=60, derandomize=True, deadline=None)
settings.register_profile("thorough", max_examples=2000, deadline=None)
settings.register_profile("invariance", max_examples=1500, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Without the runtime type checker, which would speak before the library's own errors do."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What loads JAX comes last: a process that has its threads must not fork, as the trainings' data loaders do.

    Of that the documentation comes first: it is one file, which one worker would otherwise be left alone with.
    """
    late = {"core", "jax", "test_docs.py"}
    items.sort(key=lambda item: (not late.isdisjoint(item.path.parts), "test_docs.py" not in item.path.parts))
