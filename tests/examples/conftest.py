import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.examples import strips as of_camvid


@pytest.fixture
def in_float32() -> Iterator[None]:
    """Trainings that cast to bfloat16 do not: a processor that does not have it takes many times as long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
        yield


@pytest.fixture(scope="session")
def ready_for_strips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return of_camvid.ready(tmp_path_factory.mktemp("ready") / of_camvid.READY.name)


@pytest.fixture
def strips(unchecked: None) -> Iterator[None]:
    """Strips of CamVid's frames, and no look at types: those of the library are looked at by its own tests."""
    with of_camvid.of_frames():
        yield
