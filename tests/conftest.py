"""Hypothesis profiles, and where the runtime type checker looks.

`make test` runs the quick profile, which draws the same examples every time; `make properties` runs the thorough one, and
`make invariance` the one of that name. Where `make test` has run just before, on the same code and in another environment,
the profile "again" is enough.

The type checker is nearly half of the time of the tests. So it looks at the first case of each test: where a test of the
core runs on several array libraries, at all cases on NumPy. Functions inside of functions, which it would have to read
anew at every call, it leaves alone. `CHECK_TYPES=every` has it look at all.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterator
from typing import Any

import jaxtyping
import pytest
from hypothesis import settings

# One thread for each process, those that tests start included: the workers of `make test` have a core each, and threads
# that wait for one another are slow on a machine that is busy. PyTorch reads it when it is imported, which comes later.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# What XLA compiles runs once or twice here, and on few numbers: it is compiled without most optimizations, by the older
# emitters and in one piece, which takes a fraction of the time. `test_sharding` compiles as users do.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1")

settings.register_profile("quick", max_examples=60, derandomize=True, deadline=None)
settings.register_profile("thorough", max_examples=2000, deadline=None)
settings.register_profile("again", max_examples=12, derandomize=True, deadline=None)
settings.register_profile("invariance", max_examples=1500, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Without the runtime type checker, which would speak before the library's own errors do."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


def pytest_configure(config: pytest.Config) -> None:
    """What JAX compiles for one worker, or in a process that a test starts, is read by all the others."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:  # in a worker
        return
    folder = tempfile.mkdtemp(prefix="tokenexit-jax-")
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    everything = {"MIN_COMPILE_TIME_SECS": "0", "MIN_ENTRY_SIZE_BYTES": "-1"}
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    os.environ.update({f"JAX_PERSISTENT_CACHE_{name}": value for name, value in everything.items()})


_TYPES = pytest.StashKey[bool]()
_EVERY_TYPE = os.environ.get("CHECK_TYPES") == "every"


def _but_inside(jaxtyped: Callable[..., Any]) -> Callable[..., Any]:
    """What the import hook puts on functions, left out where they are made by another function's call."""

    def decorator(*given: Any, **options: Any) -> Any:
        found = jaxtyped(*given, **options)
        return found if given else lambda function: function if "<locals>" in function.__qualname__ else found(function)

    return decorator


if not _EVERY_TYPE:
    jaxtyping.jaxtyped = _but_inside(jaxtyping.jaxtyped)


def _look_at_types(items: list[pytest.Item]) -> None:
    seen = set()
    for item in items:
        backend = (
            item.callspec.params.get("backend")
            if isinstance(item, pytest.Function) and hasattr(item, "callspec")
            else None
        )
        test = (item.path, getattr(item, "originalname", item.name))
        item.stash[_TYPES] = _EVERY_TYPE or (test not in seen if backend is None else backend.name == "numpy")
        seen.add(test)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    jaxtyping.config.update("jaxtyping_disable", not item.stash[_TYPES])
    return (yield)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What loads JAX comes last: a process that has its threads must not fork, as the trainings' data loaders do.

    Of that the long files come first, and the short ones of the core fill up both workers in the end.
    """
    late = ("test_docs.py", "jax", "core")
    _look_at_types(items)
    items.sort(key=lambda item: max((1 + late.index(part) for part in item.path.parts if part in late), default=0))
