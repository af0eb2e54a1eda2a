"""The array libraries that the core is tested on; with `CORE_BACKENDS=numpy`, NumPy alone, which is quick to start."""

import importlib.util
import os
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

    def held(self, x: np.ndarray) -> np.ndarray:
        """What an array made of these numbers really holds: in half precision, float32 numbers are rounded."""
        held = self.numpy(self.array(x))
        return held.astype(x.dtype) if held.dtype != x.dtype else held


def _readonly(x: np.ndarray) -> np.ndarray:
    x = x.copy()
    x.flags.writeable = False
    return x


def _backends() -> list[Backend]:
    if os.environ.get("CORE_BACKENDS") == "numpy":
        return [Backend("numpy", np.asarray)]
    found = [
        Backend("numpy", np.asarray),
        Backend("numpy-readonly", _readonly),
        Backend("array-api-strict", array_api_strict.asarray),
    ]
    if importlib.util.find_spec("torch"):
        import torch

        def array(x: np.ndarray, float32: torch.dtype = torch.float32) -> torch.Tensor:
            own = torch.from_numpy(np.array(x))
            return own.to(float32) if own.dtype == torch.float32 else own

        def numpy(x: torch.Tensor) -> np.ndarray:
            return (x.to(torch.float32) if x.dtype == torch.bfloat16 else x).numpy()  # NumPy has no bfloat16

        found += [
            Backend("torch", array, numpy),
            Backend("torch-float16", lambda x: array(x, torch.float16), numpy),
            Backend("torch-bfloat16", lambda x: array(x, torch.bfloat16), numpy),
        ]
    return found


BACKENDS = _backends()
each_backend = pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
