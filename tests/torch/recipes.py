"""What other processes import in the tests of `Predictor`."""

import os
import threading
from pathlib import Path

import numpy as np

import tokenexit_torch as tet
from tests.torch import models

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
built: list[int] = []


def from_folder(folder: Path) -> tet.ExitingModel:
    """The tests' own ViT with the exits of a folder; it notes that it was built."""
    built.append(threading.get_ident())
    return tet.load(models.plain_host(), folder)


def from_nothing() -> str:
    return "a model"


def predict_share(predictor: tet.Predictor, files: list[Path], rank: int, world: int) -> tuple[int, int, dict]:
    """One process of several: which it is, how many models it built, and its part of the pictures, two at a time."""
    mine, before = files[rank::world], len(built)
    found = {}
    for start in range(0, len(mine), 2):
        some = mine[start : start + 2]
        told = predictor({"image": np.stack([np.load(file) for file in some])})
        found |= {file: {name: value[row] for name, value in told.items()} for row, file in enumerate(some)}
    return os.getpid(), len(built) - before, found
