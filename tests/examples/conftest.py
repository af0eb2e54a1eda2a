import contextlib
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def in_float32() -> Iterator[None]:
    """Trainings that cast to bfloat16 do not: a processor that does not have it takes many times as long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
        yield
