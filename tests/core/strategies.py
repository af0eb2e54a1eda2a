"""What hypothesis draws: logits with everything that can be in them, batches of slots, groups, policies."""

from dataclasses import dataclass

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tokenexit.carries import Feature, MaskPrediction, Prediction, Preserved, Translated
from tokenexit.policies import (
    BatchBudget,
    Budget,
    ConfidenceAbove,
    EntropyBelow,
    ErrorBelow,
    GateBelow,
    MarginAbove,
    NeighboursAgree,
    Patience,
    PerClass,
    Policy,
    always,
    never,
)
from tokenexit.schedule import Exit, Schedule
from tokenexit.windows import Windows

ODD = [np.nan, np.inf, -np.inf, 7e4, -7e4, 0.0]


def fewer(share: int):
    """Fewer examples in the quick profile, for a test of which each is dear."""
    examples = settings().max_examples
    return settings(max_examples=examples if examples >= 2000 else max(6, examples // share))


def logits(tokens=st.integers(0, 40), classes=st.integers(2, 9), odd=True):
    """Class scores, (tokens, classes), with ties, and with NaN and infinities if `odd`."""
    value = st.floats(-20, 20, width=32) | st.integers(-3, 3).map(float)
    value = value | st.sampled_from(ODD) if odd else value
    return st.tuples(tokens, classes).flatmap(lambda shape: hnp.arrays(np.float32, shape, elements=value))


@st.composite
def windows(draw, largest=40):
    """Windows of sides up to `largest`."""
    size = draw(st.tuples(*[st.integers(1, largest)] * 2))
    stride = tuple(draw(st.integers(1, side)) for side in size)
    return Windows(size, stride, draw(st.integers(1, 9)), draw(st.sampled_from(["uniform", "linear"])))


def running(images=st.integers(0, 4), slots=st.integers(0, 12)):
    """Which slots run, (images, slots)."""
    return st.tuples(images, slots).flatmap(lambda shape: hnp.arrays(np.bool_, shape))


@st.composite
def batches(draw, odd=True):
    """Images on one grid, some of their tokens running: (running, grid, logits of the running tokens)."""
    grid = draw(st.sampled_from([(1, 1), (1, 5), (4, 1), (3, 4), (5, 6)]))
    mask = draw(running(st.integers(1, 3), st.just(grid[0] * grid[1])))
    rows = draw(logits(st.just(int(mask.sum())), st.integers(2, 4), odd))
    return mask, grid, rows


@dataclass(frozen=True)
class Scene:
    """All that a policy can look at, in NumPy, image after image."""

    images: int
    grid: tuple[int, int]
    image: np.ndarray
    position: np.ndarray
    logits: np.ndarray
    gate: np.ndarray
    protected: np.ndarray
    previous: np.ndarray
    settled_label: np.ndarray
    settled_score: np.ndarray
    error: np.ndarray
    settled_error: np.ndarray

    @property
    def classes(self) -> int:
        return self.logits.shape[1]

    def alone(self, image: int) -> "Scene":
        """One of the images by itself."""
        own = self.image == image
        return Scene(
            images=1,
            grid=self.grid,
            image=np.zeros_like(self.image[own]),
            position=self.position[own],
            logits=self.logits[own],
            gate=self.gate[own],
            protected=self.protected[own],
            previous=self.previous[:, own],
            settled_label=self.settled_label[image : image + 1],
            settled_score=self.settled_score[image : image + 1],
            error=self.error[own],
            settled_error=self.settled_error[image : image + 1],
        )


def numbers(rng, shape, odd, scale):
    """Many ties among them, and NaN and infinities if `odd`."""
    whole = rng.integers(-3, 4, shape).astype(np.float32)
    some = np.where(rng.random(shape) < 0.5, whole, rng.normal(scale=scale, size=shape).astype(np.float32))
    return np.where(rng.random(shape) < 0.04, rng.choice(np.array(ODD, np.float32), shape), some) if odd else some


def errors(rng, shape, odd):
    """Foretold errors: many small ones with ties, some above 1, and NaN if `odd`."""
    found = np.where(rng.random(shape) < 0.5, rng.integers(0, 5, shape) / 4, rng.exponential(0.5, shape))
    return np.where(rng.random(shape) < 0.1 * odd, np.nan, found).astype(np.float32)


@st.composite
def scenes(draw, odd=st.booleans()):
    """Which tokens run is drawn; what they hold is drawn as a seed, which is much faster."""
    grid = draw(st.sampled_from([(1, 1), (1, 5), (4, 1), (3, 4), (4, 3)]))
    images, places = draw(st.integers(1, 3)), grid[0] * grid[1]
    density = draw(st.sampled_from([0.0, 0.3, 0.7, 1.0]))
    classes, odd = draw(st.integers(2, 4)), draw(odd)
    rng = np.random.default_rng(draw(st.integers(0, 2**20)))
    mask = rng.random((images, places)) < density
    image, position = np.nonzero(mask)
    tokens = len(image)
    # One class that prevails, so that neighbours do agree.
    rows = numbers(rng, (tokens, classes), odd, 3) + np.where(np.arange(classes) == rng.integers(classes), 3, 0)
    gate = rng.integers(0, 5, tokens).astype(np.float32) / 4
    gate = np.where(rng.random(tokens) < 0.5, gate, rng.random(tokens))
    gate = np.where(rng.random(tokens) < 0.1 * odd, np.nan, gate).astype(np.float32)
    # Of the places without a running token, some have settled, and about the others nothing is known.
    settled = (rng.random(mask.shape) < draw(st.sampled_from([0.0, 0.9]))) & ~mask
    with np.errstate(invalid="ignore"):
        label = rows.argmax(axis=-1)
    exits = draw(st.integers(0, 3))
    same = rng.random((exits, tokens)) < 0.7
    return Scene(
        images=images,
        grid=grid,
        image=image,
        position=position,
        logits=rows.astype(np.float32),
        gate=gate,
        protected=rng.random(tokens) < draw(st.sampled_from([0.0, 0.2])),
        previous=np.where(same, label, rng.integers(0, classes, (exits, tokens))),
        settled_label=np.where(settled, rng.integers(0, classes, mask.shape), -1),
        settled_score=np.where(settled, rng.random(mask.shape), 0).astype(np.float32),
        error=errors(rng, tokens, odd),
        settled_error=np.where(settled, errors(rng, mask.shape, False), np.nan).astype(np.float32),
    )


UNIT = st.floats(0, 1) | st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0])
SCORE = st.sampled_from(["confidence", "entropy", "margin", "gate", "error"])


def one_by_one(threshold=UNIT) -> st.SearchStrategy[Policy]:
    """The policies that decide on one token after the other."""
    return st.one_of(
        st.builds(ConfidenceAbove, threshold),
        st.builds(EntropyBelow, threshold),
        st.builds(MarginAbove, threshold),
        st.builds(GateBelow, threshold),
        st.builds(NeighboursAgree, threshold, radius=st.integers(0, 5)),
        st.builds(ErrorBelow, threshold, radius=st.integers(0, 5)),
        st.builds(Patience, st.integers(1, 3)),
        st.sampled_from([never(), always()]),
    )


def counting() -> st.SearchStrategy[Policy]:
    """The policies that keep to a number of tokens."""
    return st.builds(
        lambda kind, keep, by: kind(keep, by=by),
        st.sampled_from([Budget, BatchBudget]),
        UNIT | st.integers(0, 40),
        SCORE,
    )


def policies(classes=None) -> st.SearchStrategy[Policy]:
    """Policies of policies, of every kind; thresholds per class are for so many classes."""
    many = st.integers(1, 5) if classes is None else st.just(classes)
    per_class = many.flatmap(lambda size: st.builds(PerClass, st.tuples(*[UNIT] * size)))
    plain = one_by_one(UNIT | per_class)
    simple = st.recursive(
        plain,
        lambda inner: st.one_of(
            st.builds(lambda a, b: a & b, inner, inner),
            st.builds(lambda a, b: a | b, inner, inner),
            st.builds(lambda a: ~a, inner),
        ),
        max_leaves=3,
    )
    return st.recursive(
        simple | counting(),
        lambda inner: st.one_of(
            st.builds(lambda a, b: a & b, inner, inner),
            st.builds(lambda a, b: a | b, inner, inner),
            st.builds(lambda a, k: a.retaining(per_class=k), inner, st.integers(0, 9)),
            st.builds(lambda a, k: a.with_minimum(per_image=k), inner, st.integers(0, 9)),
        ),
        max_leaves=3,
    )


def gate_policies() -> st.SearchStrategy[Policy]:
    """Policies of policies that look at gates alone."""
    simple = st.recursive(
        st.builds(GateBelow, UNIT) | st.sampled_from([never(), always()]),
        lambda inner: st.one_of(
            st.builds(lambda a, b: a & b, inner, inner),
            st.builds(lambda a, b: a | b, inner, inner),
            st.builds(lambda a: ~a, inner),
        ),
        max_leaves=3,
    )
    counting = st.builds(
        lambda kind, keep: kind(keep, by="gate"), st.sampled_from([Budget, BatchBudget]), UNIT | st.integers(0, 40)
    )
    return st.recursive(
        simple | counting,
        lambda inner: st.builds(lambda a, b: a & b, inner, inner) | st.builds(lambda a, b: a | b, inner, inner),
        max_leaves=3,
    )


# What JSON can hold, with names and values that plans have.
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["never", "PerClass", "gate", "x"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["kind", "threshold", "thresholds", "policy", "left", "keep"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)

CARRY = (
    st.just(Prediction())
    | st.builds(
        Preserved,
        returning=st.sampled_from(["every gate", "never"]),
        keys=st.sampled_from(["running", "all"]),
        before=st.sampled_from(["decoder", "last block"]),
    )
    | st.just(MaskPrediction())
    | st.builds(Feature, st.sampled_from(["decoder", "last block"]), st.none() | st.floats(0, 1))
    | st.builds(Translated, st.none() | st.floats(0, 1))
)
EXITS = st.dictionaries(st.integers(1, 40), policies(), max_size=5).map(
    lambda exits: tuple(Exit(after, exits[after]) for after in sorted(exits))
)
SCHEDULE = st.builds(Schedule, EXITS, CARRY)
