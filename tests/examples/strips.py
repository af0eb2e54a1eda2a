"""Strips of CamVid: a few rows in the middle of every frame, at full width and resolution.

For tests of what a script does with frames, not of how well a network sees: their pixels and labels are real, and they
are a fraction of the work of whole frames. The ready model sees them at the places that they have in a frame.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from examples.camvid import data

SHARED = Path(os.environ.get("TOKENEXIT_DATA", Path(__file__).parents[2] / ".." / "shared" / "data"))
CAMVID, DEIT, READY = SHARED / "camvid", SHARED / "deit_tiny_patch16_224.npz", SHARED / "camvid_vit_tiny_p16.npz"
needs_data = pytest.mark.skipif(
    not (CAMVID.is_dir() and DEIT.is_file() and READY.is_file()),
    reason=f"no CamVid and weights in {SHARED}; TOKENEXIT_DATA names the folder",
)
PATCH = 16
FIRST, LAST = 9, 13  # rows of patches: four of 22
SIZE = (PATCH * (LAST - FIRST), data.SIZE[1])
GRID = (LAST - FIRST, data.SIZE[1] // PATCH)
TOKENS = GRID[0] * GRID[1]


@contextlib.contextmanager
def of_frames() -> Iterator[None]:
    """Scripts read strips in place of frames."""
    top = data.ROWS.start
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "ROWS", slice(top + PATCH * FIRST, top + PATCH * LAST))
        patch.setattr(data, "SIZE", SIZE)
        yield


def ready(out: Path) -> Path:
    """The ready model for strips: all but the positions of other patches."""
    with np.load(READY) as archive:
        weights = {name: archive[name] for name in archive.files}
    rows, columns = (side // PATCH for side in data.SIZE)
    prefix, places = np.split(weights["pos_embed"], [1], axis=1)
    places = places.reshape(1, rows, columns, -1)[:, FIRST:LAST].reshape(1, TOKENS, -1)
    np.savez(out, **weights | {"pos_embed": np.concatenate([prefix, places], axis=1)})
    return out
