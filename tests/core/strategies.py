"""What hypothesis draws: logits with everything that can be in them, batches of slots, groups."""

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

ODD = [np.nan, np.inf, -np.inf, 7e4, -7e4, 0.0]


def logits(tokens=st.integers(0, 40), classes=st.integers(1, 9), odd=True):
    """Class scores, (tokens, classes), with ties, and with NaN and infinities if `odd`."""
    value = st.floats(-20, 20, width=32) | st.integers(-3, 3).map(float)
    value = value | st.sampled_from(ODD) if odd else value
    return st.tuples(tokens, classes).flatmap(lambda shape: hnp.arrays(np.float32, shape, elements=value))


def running(images=st.integers(0, 4), slots=st.integers(0, 12)):
    """Which slots run, (images, slots)."""
    return st.tuples(images, slots).flatmap(lambda shape: hnp.arrays(np.bool_, shape))


@st.composite
def batches(draw, odd=True):
    """Images on one grid, some of their tokens running: (running, grid, logits of the running tokens)."""
    grid = draw(st.sampled_from([(1, 1), (1, 5), (4, 1), (3, 4), (5, 6)]))
    mask = draw(running(st.integers(1, 3), st.just(grid[0] * grid[1])))
    rows = draw(logits(st.just(int(mask.sum())), st.integers(1, 4), odd))
    return mask, grid, rows
