"""Folders of small pictures."""

from pathlib import Path

import numpy as np
from PIL import Image

NAMES = ("a/one.png", "a/two.jpg", "b/c/three.png", "four.webp")
SIZES = ((40, 56), (32, 48), (37, 61), (40, 56))


def write(folder: Path, names=NAMES, sizes=SIZES, seed: int = 0) -> Path:
    """Pictures with smooth and busy parts, under these names."""
    draw = np.random.default_rng(seed)
    for name, (height, width) in zip(names, sizes, strict=True):
        coarse = draw.integers(0, 256, (3, 4, 3), dtype=np.uint8)
        picture = np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.NEAREST)).astype(int)
        picture[:, : width // 2] += draw.integers(-60, 60, (height, width // 2, 3))
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(file)
    return folder
