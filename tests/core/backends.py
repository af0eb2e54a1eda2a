"""The array libraries that the core is tested on."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import array_api_strict
import numpy as np
import pytest


@dataclass(frozen=True)
class Backend:
    """An array library: how an array comes in from NumPy, and goes back."""

    name: str
    array: Callable[[np.ndarray], Any]
    numpy: Callable[[Any], np.ndarray] = np.asarray


def _readonly(x: np.ndarray) -> np.ndarray:
    x = x.copy()
    x.flags.writeable = False
    return x


def _backends() -> list[Backend]:
    found = [
        Backend("numpy", np.asarray),
        Backend("numpy-readonly", _readonly),
        Backend("array-api-strict", array_api_strict.asarray),
    ]
    if importlib.util.find_spec("torch"):
        import torch

        found.append(Backend("torch", lambda x: torch.from_numpy(x.copy())))
    return found


BACKENDS = _backends()
each_backend = pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
