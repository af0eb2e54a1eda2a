"""Slow and obvious: what the core must agree with."""

import math

import numpy as np


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


def rank_in_group(score: np.ndarray, group: np.ndarray) -> np.ndarray:
    def before(i, j):
        """Whether token i ranks before token j."""
        a, b = (-math.inf if math.isnan(score[k]) else score[k] for k in (i, j))
        return a > b or (a == b and i < j)

    n = len(score)
    return np.array([sum(group[i] == group[j] and before(i, j) for i in range(n)) for j in range(n)], dtype=int)


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
