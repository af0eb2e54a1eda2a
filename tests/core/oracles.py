"""Slow and obvious: what the core must agree with."""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from tokenexit.policies import to_dict


def probabilities(row: np.ndarray) -> list[float]:
    """Softmax of one token, or NaN everywhere if it has none."""
    values = [float(np.float32(value)) for value in row]
    top = max(values) if not any(map(math.isnan, values)) else math.nan
    if math.isnan(top) or math.isinf(top):
        return [math.nan] * len(values)
    weights = [math.exp(value - top) for value in values]
    return [weight / sum(weights) for weight in weights]


def confidence(logits: np.ndarray) -> np.ndarray:
    return np.array([max(probabilities(row)) for row in logits])


def entropy(logits: np.ndarray) -> np.ndarray:
    def one(row):
        found = probabilities(row)
        if len(found) == 1:
            return 0.0 * found[0]
        return -sum(p * math.log(p) if p != 0 else 0.0 for p in found) / math.log(len(found))

    return np.array([one(row) for row in logits])


def margin(logits: np.ndarray) -> np.ndarray:
    def one(row):
        found = sorted(probabilities(row), reverse=True)
        return found[0] - (found[1] if len(found) > 1 else 0.0)

    return np.array([one(row) for row in logits])


def mask_scores(mask_logits: np.ndarray, presence: np.ndarray) -> np.ndarray:
    def sigmoid(x):
        if math.isnan(x):
            return math.nan
        return 1 / (1 + math.exp(-x)) if x > -700 else 0.0

    logits, there = np.broadcast_arrays(mask_logits, presence)
    flat = [sigmoid(float(x)) * float(p) for x, p in zip(logits.ravel(), there.ravel(), strict=True)]
    return np.array(flat, dtype=np.float64).reshape(logits.shape)


def rank_in_group(score: np.ndarray, group: np.ndarray) -> np.ndarray:
    def before(i, j):
        """Whether token i ranks before token j."""
        a, b = (-math.inf if math.isnan(score[k]) else score[k] for k in (i, j))
        return a > b or (a == b and i < j)

    n = len(score)
    return np.array([sum(group[i] == group[j] and before(i, j) for i in range(n)) for j in range(n)], dtype=int)


def top_k_per_group(candidate: np.ndarray, score: np.ndarray, group: np.ndarray, k: int) -> np.ndarray:
    """One row, of any length: quick, for NumPy sorts by three keys at once."""
    score = np.where(np.isnan(score), -np.inf, score.astype(np.float64))
    rows = np.flatnonzero(candidate)
    rows = rows[np.lexsort((rows, -score[rows], group[rows]))]
    own = group[rows]
    ahead = np.arange(len(rows)) - np.searchsorted(own, own)
    marked = np.zeros(len(candidate), dtype=bool)
    marked[rows[ahead < k]] = True
    return marked


def neighbours_agree(label_map, confident_map, image, position, grid, radius) -> bool:
    """Whether the token at `position` and all its neighbours are confident and of one class; -1 is an unknown place."""
    height, width = grid
    row, column = divmod(position, width)
    own = label_map[image][position]
    for y in range(max(0, row - radius), min(height, row + radius + 1)):
        for x in range(max(0, column - radius), min(width, column + radius + 1)):
            place = y * width + x
            if label_map[image][place] != own or not confident_map[image][place]:
                return False
    return True


@dataclass
class Facts:
    """What is known of the tokens, in NumPy; scores are those that the library found, to the last bit."""

    images: int
    grid: tuple[int, int]
    image: np.ndarray
    position: np.ndarray
    able: np.ndarray
    label: np.ndarray
    confidence: np.ndarray
    gate: np.ndarray
    previous: np.ndarray
    settled_label: np.ndarray
    settled_score: np.ndarray
    error: np.ndarray
    settled_error: np.ndarray
    entropy: np.ndarray | None = None
    margin: np.ndarray | None = None

    @property
    def known(self) -> np.ndarray:
        return ~np.isnan(self.confidence) & ~np.isnan(self.gate) & ~np.isnan(self.error)

    def hardness(self, by: str) -> np.ndarray:
        value = getattr(self, by).astype(np.float64)
        return np.where(np.isnan(value), np.inf, value if by in ("entropy", "gate", "error") else -value)


def leaves(plan: dict[str, Any], facts: Facts) -> np.ndarray:
    """Which tokens a policy, given as `policies.to_dict` writes it down, lets go: token by token."""
    kind, tokens = plan["kind"], range(len(facts.label))
    if kind in _COMPARED:
        score, above = _COMPARED[kind]
        value = getattr(facts, score).astype(np.float32)
        limit = [_limit(plan, facts.label[i]) for i in tokens]
        left = [bool(value[i] > limit[i] if above else value[i] < limit[i]) for i in tokens]
    elif kind == "NeighboursAgree":
        left = _neighbours_agree(plan, facts)
    elif kind == "ErrorBelow":
        left = _errors_below(plan, facts)
    elif kind in ("never", "always"):
        left = [kind == "always"] * len(tokens)
    elif kind in ("both", "either"):
        pair = zip(leaves(plan["left"], facts), leaves(plan["right"], facts), strict=True)
        left = [a and b if kind == "both" else a or b for a, b in pair]
    elif kind == "not":
        left = ~leaves(plan["policy"], facts) & facts.known
    elif kind == "Patience":
        left = [_patient(plan["exits"], facts, i) for i in tokens]
    elif kind in ("Budget", "BatchBudget"):
        left = np.ones(len(tokens), dtype=bool)
        of = [0] * len(tokens) if kind == "BatchBudget" else facts.image
        patches = facts.grid[0] * facts.grid[1] * (facts.images if kind == "BatchBudget" else 1)
        keep = plan["keep"]
        keep = keep if isinstance(keep, int) else math.floor(float(np.float32(keep * patches)) + 0.5)
        left[_first(facts.hardness(plan["by"]), of, facts.able, keep)] = False
    elif kind == "retaining":
        left = leaves(plan["policy"], facts)
        of = [(image, label) for image, label in zip(facts.image, facts.label, strict=True)]
        left[_first(facts.confidence, of, left.copy(), plan["per_class"])] = False
    elif kind == "minimum":
        left = leaves(plan["policy"], facts)
        for image in range(facts.images):
            mine = facts.able & (facts.image == image)
            short = max(0, plan["per_image"] - int((mine & ~left).sum()))
            left[_first(facts.hardness("confidence"), facts.image, mine & left, short)] = False
    else:
        raise AssertionError(kind)
    return np.array(left, dtype=bool) & facts.able


_COMPARED = {
    "ConfidenceAbove": ("confidence", True),
    "MarginAbove": ("margin", True),
    "EntropyBelow": ("entropy", False),
    "GateBelow": ("gate", False),
}


def _limit(plan, label):
    threshold = plan["threshold"]
    return np.float32(threshold["thresholds"][label] if isinstance(threshold, dict) else threshold)


def _first(score, of, able, count) -> list[int]:
    """The able tokens of each group with the highest scores, so many of each; NaN is the lowest score."""
    found = []
    for group in {tuple(np.atleast_1d(one).tolist()) for one in of}:
        rows = [i for i in range(len(score)) if able[i] and tuple(np.atleast_1d(of[i]).tolist()) == group]
        rows.sort(key=lambda i: (math.inf if math.isnan(score[i]) else -score[i], i))
        found += rows[:count]
    return found


def _patient(exits, facts, i) -> bool:
    seen = facts.previous[:, i].tolist()
    return len(seen) >= exits and all(label == facts.label[i] for label in seen[-exits:]) and bool(facts.known[i])


def _neighbours_agree(plan, facts) -> list[bool]:
    confident = [bool(facts.confidence[i] > _limit(plan, facts.label[i])) for i in range(len(facts.label))]
    if plan["radius"] == 0:
        return confident
    label_map = facts.settled_label.copy()
    confident_map = np.zeros(label_map.shape, dtype=bool)
    for place in np.ndindex(*label_map.shape):
        settled = label_map[place] >= 0
        confident_map[place] = settled and facts.settled_score[place] > _limit(plan, label_map[place])
    for i in np.flatnonzero(facts.able):
        label_map[facts.image[i], facts.position[i]] = facts.label[i]
        confident_map[facts.image[i], facts.position[i]] = confident[i]
    return [
        bool(facts.able[i])
        and neighbours_agree(label_map, confident_map, facts.image[i], facts.position[i], facts.grid, plan["radius"])
        for i in range(len(facts.label))
    ]


def _errors_below(plan, facts) -> list[bool]:
    """Each error is below the token's own limit, and all places around it hold such tokens, or some that have left."""
    low = [bool(facts.error[i] < _limit(plan, facts.label[i])) for i in range(len(facts.label))]
    if plan["radius"] == 0:
        return low
    fine = ~np.isnan(facts.settled_error)
    for i in np.flatnonzero(facts.able):
        fine[facts.image[i], facts.position[i]] = low[i]
    one = np.zeros(fine.shape, dtype=int)
    return [
        bool(facts.able[i])
        and neighbours_agree(one, fine, facts.image[i], facts.position[i], facts.grid, plan["radius"])
        for i in range(len(facts.label))
    ]


def gate_keeps(plan: dict[str, Any], probability: np.ndarray, before: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Which patches a gate keeps by a policy, given as `policies.to_dict` writes it down, of those that may be kept."""
    images, patches = probability.shape
    nothing = np.zeros(images * patches)
    facts = Facts(
        images=images,
        grid=grid,
        image=np.repeat(np.arange(images), patches),
        position=np.tile(np.arange(patches), images),
        able=nothing == 0,
        label=nothing.astype(int),
        confidence=nothing,
        gate=np.where(before, probability, 0).ravel(),
        previous=np.zeros((0, images * patches), int),
        settled_label=np.full(probability.shape, -1),
        settled_score=np.zeros(probability.shape),
        error=nothing,
        settled_error=np.full(probability.shape, np.nan),
    )
    return before & ~leaves(plan, facts).reshape(probability.shape)


def threshold_that_keeps(probability: np.ndarray, count: int) -> float:
    """Half way between the last of the tokens that are kept and the first that is not; NaN counts as 1."""
    order = sorted((1.0 if math.isnan(p) else float(p) for p in probability), reverse=True)
    last, *others = [1.0, *order][count:]
    return (last + others[0]) / 2 if others else 0.0


def betting(losses, at_most, delta):
    """The p-value of the betting test: image by image, with the formulas of the paper."""
    n = len(losses)
    seen, squares, variance, wealth, best = 0.5, 0.25, 0.25, 1.0, 1.0
    for t, x in enumerate(losses, start=1):
        bet = min(1.0, math.sqrt(2 * math.log(1 / delta) / (n * variance)))
        wealth *= 1 - bet * (x - at_most)
        best = max(best, wealth)
        seen += x
        squares += (x - seen / (t + 1)) ** 2
        variance = squares / (t + 1)
    return 1 / best


def hoeffding_bentkus(losses, at_most):
    """The p-value of the other one, the binomial tail in whole numbers."""
    n, total = len(losses), math.fsum(losses)
    a = min(total / n, at_most)
    first = a * math.log(a / at_most) if a > 0 else 0.0
    hoeffding = math.exp(-n * (first + (1 - a) * math.log((1 - a) / (1 - at_most))))
    chance = Fraction(at_most)
    tail = sum(
        math.comb(n, k) * chance**k * (1 - chance) ** (n - k) for k in range(min(n, math.ceil(np.sum(losses))) + 1)
    )
    return min(hoeffding, math.e * float(tail))


@dataclass
class Passed:
    """What a pass comes to, by image and patch."""

    depth: np.ndarray
    logits: np.ndarray
    tokens_per_block: np.ndarray


def exit_pass(logits, plan, scores_of, *, grid, prefix, centres, error=None) -> Passed:
    """A pass through exits on recorded class scores, token by token.

    Args:
        logits: Class scores of all patches by head, `{blocks before it: (images, patches, classes)}`.
        plan: The schedule.
        scores_of: Scores by name of `(tokens, classes)`: those that the library found, to the last bit.
        grid: Height and width of the grid.
        prefix: Prefix tokens.
        centres: Positions of cell centres.
        error: Foretold errors of all patches by head; zero if left out.
    """
    depth = max(logits)
    images, places, _ = logits[depth].shape
    left = np.zeros((images, places), dtype=int)
    out = np.zeros_like(logits[depth])
    label_map, score_map = np.full((images, places), -1), np.zeros((images, places), np.float32)
    error_map = np.full((images, places), np.nan, np.float32)
    earlier, counts = [], np.zeros((images, depth), dtype=int)
    policy_after = {exit.after: exit.policy for exit in plan.active}
    for block in range(1, depth + 1):
        held = (left == 0).sum(axis=1)
        counts[:, block - 1] = np.where(held > 0, held + prefix, 0)
        if block not in policy_after:
            continue
        image, position = np.nonzero(left == 0)
        rows = logits[block][image, position]
        found = scores_of(rows)
        with np.errstate(invalid="ignore"):
            label = rows.argmax(axis=-1)
        errors = np.zeros(len(rows)) if error is None else error[block][image, position]
        facts = Facts(
            images, grid, image, position, np.ones(len(rows), dtype=bool), label, found["confidence"],
            np.zeros(len(rows)), np.array([one[image, position] for one in earlier]).reshape(len(earlier), len(rows)),
            label_map, score_map, errors, error_map, found["entropy"], found["margin"],
        )  # fmt: skip
        leave = leaves(to_dict(policy_after[block]), facts)
        for number in range(images):
            mine = image == number
            finished = bool(leave[mine].all())
            for token in np.flatnonzero(mine & leave):
                if finished or position[token] not in centres:
                    place = number, position[token]
                    left[place], out[place] = block, rows[token]
                    label_map[place], score_map[place] = label[token], found["confidence"][token]
                    error_map[place] = errors[token]
        with np.errstate(invalid="ignore"):
            earlier.append(logits[block].argmax(axis=-1))
    rest = left == 0
    out[rest] = logits[depth][rest]
    return Passed(np.where(rest, depth, left), out, counts)


def standardised(x):
    wide = np.asarray(x, np.float64)
    wide = wide - wide.mean(-1, keepdims=True)
    return wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5)


def walked(x, running, grid, radius, prefix):
    """The mean over the places around each slot that run, one slot at a time."""
    images, slots, width = x.shape
    own, found = standardised(x), np.zeros((images, slots, width))
    for image in range(images):
        for slot in range(prefix, slots):
            row, column = divmod(slot - prefix, grid[1])
            around = [
                own[image, prefix + i * grid[1] + j]
                for i in range(max(0, row - radius), min(grid[0], row + radius + 1))
                for j in range(max(0, column - radius), min(grid[1], column + radius + 1))
                if running[image, prefix + i * grid[1] + j]
            ]
            found[image, slot] = np.mean(around, axis=0) if around else 0
    return np.concatenate([own, found], axis=-1)


def starts(size, side, reach, edges):
    for first in range(0, size, side):
        start = first - math.floor((reach - side) / 2)
        yield max(0, min(start, size - reach)) if edges == "inside" else start


@dataclass
class Cells:
    """Merged cells, one at a time."""

    running: np.ndarray
    owner: np.ndarray
    size: np.ndarray
    grid: tuple[int, int]
    features: np.ndarray

    @staticmethod
    def alone(running: np.ndarray, grid: tuple[int, int]) -> "Cells":
        owner = np.broadcast_to(np.arange(running.shape[1]), running.shape).copy()
        return Cells(running.copy(), owner, np.ones_like(owner), grid, np.zeros(0))

    def merge(self, features, side, alike, agreed, label, *, near) -> bool:
        """Merge, in double precision; False if a similarity is too near to its threshold to tell."""
        sure = True
        self.features = features.astype(np.float64)
        for level in (2, 4, 8, 16):
            if level > side:
                break
            for image in range(len(self.running)):
                for quarters, members in self.whole(image, level):
                    ready = agreed is None or agreed[image, members].all()
                    if label is not None:
                        ready = ready and len(set(label[image, members].tolist())) == 1
                    if ready and alike is not None:
                        mean = self.similarity(image, quarters)
                        sure = sure and not abs(mean - alike) < near
                        ready = mean > alike
                    if ready:
                        self.join(image, quarters, members)
        return sure

    def fit(self, features, side, capacity, *, near) -> bool:
        """Merge the most alike until there is room, one after the other; False if two are too near to tell."""
        sure = True
        self.features = features.astype(np.float64)
        for level in (2, 4, 8, 16):
            if level > side:
                break
            for image in range(len(self.running)):
                cells = [(self.similarity(image, quarters), quarters, members)
                         for quarters, members in self.whole(image, level)]  # fmt: skip
                cells.sort(key=lambda cell: (np.isnan(cell[0]), -cell[0]))
                while cells and self.running[image].sum() > capacity:
                    alike, quarters, members = cells.pop(0)
                    # Rounding at the first level is that of similarities alone.
                    apart = 1e-5 if level == 2 else near
                    sure = sure and not any(abs(alike - other) < apart for other, _, _ in cells)
                    self.join(image, quarters, members)
        return sure

    def whole(self, image, level):
        """First slots of the quarters, and all slots, of the cells of which all quarters run."""
        (height, width), half, found = self.grid, level // 2, []
        prefix = self.running.shape[1] - height * width
        for top in range(0, height - level + 1, level):
            for left in range(0, width - level + 1, level):
                slots = prefix + (top + np.arange(level)[:, None]) * width + left + np.arange(level)
                quarters = slots[::half, ::half].flatten()
                if self.running[image, quarters].all() and (self.size[image, quarters] == half * half).all():
                    found.append((quarters, slots.flatten()))
        return found

    def similarity(self, image, quarters):
        """Mean cosine of the pairs of four tokens."""
        four = self.features[image, quarters]
        with np.errstate(all="ignore"):
            unit = four / np.linalg.norm(four, axis=-1, keepdims=True)
        return float(np.mean([unit[i] @ unit[j] for i in range(4) for j in range(i)]))

    def join(self, image, quarters, members):
        self.features[image, quarters[0]] = self.features[image, quarters].mean(axis=0)
        self.running[image, quarters[1:]] = False
        self.owner[image, members] = quarters[0]
        self.size[image, quarters[0]] = len(members)
