"""Figures of the patch grid: which tokens exit, stay or merge, as the core decides it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from matplotlib.figure import Figure

from examples.figures.sheet import Sheet, Theme, mixed
from tokenexit import cells, merging, semantic, tokens
from tokenexit.policies import ConfidenceAbove, Evidence, NeighboursAgree, Policy

_SCENE = (
    "AAAAAAAAAAAAAAAA",
    "AAAAAAAAAAAAAAAA",
    "AAAAAABBBBBBAAAA",
    "AAAAAABBBBBBAAAA",
    "AAAAAABBBBBBAAAA",
    "CCCCCCBBBBBBCCCC",
    "CCCCCCCCCCCCCCCC",
    "CCCCCCCCCCCCCCCC",
)


def neighbours(theme: Theme) -> Figure:
    """The neighbourhood rule with radius 1 on a small grid."""
    label = np.array([[ord(one) - ord("A") for one in row] for row in _SCENE])
    sure = np.full(label.shape, 0.97)
    unsure = (1, 13)
    sure[unsure] = 0.7
    rule, grid = NeighboursAgree(0.9, radius=1), (label.shape[0], label.shape[1])
    evidence = Evidence(_logits(label.ravel(), sure.ravel()), images=1, grid=grid, position=np.arange(label.size))
    exits = rule(evidence).reshape(label.shape)
    sheet, side, top = Sheet(theme, 216), 22, 36
    sheet.text(2, 14, "exits if the 3 \N{MULTIPLICATION SIGN} 3 around it agrees", across="left")
    _draw_states(sheet, (2, top), side, label, exits)
    sheet.dot(2 + side * (unsure[1] + 0.5), top + side * (unsure[0] + 0.5), 3.5, theme.paper)
    for row, column in ((1, 2), (2, 8)):
        assert exits[row, column] == (column == 2)
        x, y = 2 + side * (column - 1), top + side * (row - 1)
        sheet.frame(x, y, 3 * side, 3 * side, theme.ink)
        sign, colour = ("✓", theme.ink) if exits[row, column] else ("✗", theme.paper)
        sheet.text(x + 1.5 * side, y + 1.5 * side, sign, colour=colour, size=16)
    for at, (words, hollow) in enumerate((("exits", True), ("runs on", False), ("unsure", False))):
        sheet.key(366, top + 12 + 30 * at, words, theme.blue, hollow=hollow)
    sheet.dot(374, top + 72, 2.5, theme.paper)
    return sheet.figure


def own_policy(theme: Theme) -> Figure:
    """Scores, the mask that a policy of one's own makes of them, and the decision after retention."""

    @dataclass(frozen=True)
    class PurityAbove(Policy):
        threshold: float

        def leaves(self, evidence: Evidence, /) -> Bool[np.ndarray, "tokens"]:
            return _purity(evidence.logits) > self.threshold

    label = np.array([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1], [0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    sure = np.array([
        [0.99, 0.98, 0.97, 0.94, 0.92], [0.96, 0.93, 0.71, 0.55, 0.6], [0.84, 0.62, 0.5, 0.75, 0.95],
        [0.52, 0.58, 0.78, 0.93, 0.97], [0.91, 0.94, 0.96, 0.98, 0.99],
    ])  # fmt: skip
    logits = _logits(label.ravel(), sure.ravel())
    policy = PurityAbove(0.8)
    marks = policy(Evidence(logits)).reshape(label.shape)
    exits = policy.retaining(per_class=2)(Evidence(logits)).reshape(label.shape)
    score = _purity(logits).reshape(label.shape)
    sheet, side, top = Sheet(theme, 208), 26, 36
    lefts = (2, 165, 328)
    for left, words in zip(lefts, ("your score", "your mask", "decision"), strict=True):
        sheet.text(left + 65, 14, words)
    shades = np.round((score - score.min()) / (score.max() - score.min()), 1)
    for shade in np.unique(shades):
        _draw(sheet, (lefts[0], top), side, shades == shade, theme.tint(theme.purple, 0.12 + 0.88 * float(shade)))
    _draw(sheet, (lefts[1], top), side, ~marks, theme.faint)
    _draw(sheet, (lefts[1], top), side, marks, theme.purple)
    _draw_states(sheet, (lefts[2], top), side, label, exits)
    for left in lefts[:2]:
        sheet.arrow((left + 134, top + 65), (left + 160, top + 65))
    sheet.text(lefts[1] + 65, 190, "score > 0.8", colour=theme.muted)
    sheet.text(458, 190, "2 per class stay", colour=theme.muted, across="right")
    return sheet.figure


def retention(theme: Theme) -> Figure:
    """Confidences of two classes: what may exit, and the two most confident of each class that stay."""
    sure = np.array([0.97, 0.92, 0.86, 0.8, 0.56, 0.95, 0.9, 0.84, 0.5])
    label = np.array([0, 0, 0, 0, 0, 1, 1, 1, 1])
    threshold, per_class = 0.75, 2
    evidence = Evidence(_logits(label, sure))
    candidates = ConfidenceAbove(threshold)(evidence)
    exits = ConfidenceAbove(threshold).retaining(per_class=per_class)(evidence)
    sheet = Sheet(theme, 226)
    wide, pitch, floor, unit = 26, 35, 190, 140
    for at, value in enumerate(sure.tolist()):
        x = 6 + at * pitch + 22 * int(label[at])
        high, colour = unit * value, theme.hues[label[at]]
        if exits[at]:
            sheet.frame(x + 1, floor - high + 1, wide - 2, high - 2, colour, 2)
        else:
            sheet.frame(x + 2, floor - high + 2, wide - 4, high - 4, colour, 4)
            sheet.box(x + 2, floor - high + 2, wide - 4, high - 4, colour=colour)
    for own, name in ((0, "class A"), (1, "class B")):
        kept = np.flatnonzero((label == own) & candidates & ~exits)
        assert len(kept) == per_class
        left, right = (6 + int(at) * pitch + 22 * own for at in (kept[0], kept[-1]))
        sheet.bracket(left, right + wide, 46, depth=-7)
        sheet.text((left + right + wide) / 2, 25, f"{per_class} kept")
        of_class = np.flatnonzero(label == own)
        middle = 6 + of_class.mean() * pitch + 22 * own + wide / 2
        sheet.text(float(middle), 209, name, colour=theme.hues[own])
    level = floor - unit * threshold
    sheet.line((2, level), (356, level), colour=theme.ink, dashed=True)
    sheet.text(362, level - 9, "threshold of\nconfidence", across="left")
    sheet.key(364, level + 42, "exits", theme.blue, hollow=True)
    sheet.key(364, level + 72, "runs on", theme.blue)
    return sheet.figure


def cell_centres(theme: Theme) -> Figure:
    """Cells of 3 x 3: the centre of each runs on, and counts for the tokens of its cell that exited."""
    height, width, side = 6, 12, 3
    row, column = np.divmod(np.arange(height * width), width)
    centre = cells.is_cell_centre(np.arange(height * width), grid=(height, width), side=side)
    busy = (np.abs(column - 6 + row * 0.5) < 1.2) | (row + column > 15)
    running = busy | centre
    receipt = tokens.pack(running[None])
    size = np.ones(height * width, dtype=int)
    size[receipt.slot] = np.rint(cells.token_size(receipt, grid=(height, width), side=side)).astype(int)
    sheet, unit, more = Sheet(theme, 178), 26, 6
    left = top = 4
    shape, gap = (height, width), (side, more)
    pitch = side * unit + more
    for down, across in np.ndindex(height // side, width // side):
        sheet.box(left + across * pitch - 1, top + down * pitch - 1, side * unit + 2, side * unit + 2)
    _draw(sheet, (left, top), unit, (~running).reshape(shape), theme.blue, hollow=True, gap=gap)
    _draw(sheet, (left, top), unit, (running & ~centre).reshape(shape), theme.blue, gap=gap)
    _draw(sheet, (left, top), unit, centre.reshape(shape), theme.orange, gap=gap)
    for at in np.flatnonzero(centre).tolist():
        down, across = divmod(at, width)
        x = left + unit * (across + 0.5) + more * (across // side)
        y = top + unit * (down + 0.5) + more * (down // side)
        sheet.text(x, y, str(size[at]), colour=theme.paper, bold=True)
    sheet.key(350, 24, "exited", theme.blue, hollow=True)
    sheet.key(350, 56, "runs on", theme.blue)
    sheet.key(350, 88, "centre", theme.orange)
    sheet.text(350, 136, "9: counts\nfor 9 tokens", across="left")
    return sheet.figure


def merge_cells(theme: Theme) -> Figure:
    """Cells of 2 x 2 patches merge, then of 4 x 4, then of 8 x 8."""
    side = 16
    row, column = np.divmod(np.arange(side * side), side)
    label = np.where(row >= 8 + np.maximum(0, (column - 6) // 3), 2, 0)
    label = np.where((row - 5) ** 2 + (column - 11.5) ** 2 < 12, 1, label)
    features = np.eye(3)[label][None]
    merged = merging.alone(np.ones((1, side * side), dtype=bool), grid=(side, side))
    sheet, unit = Sheet(theme, 190), 8.5
    for at, level in enumerate((2, 4, 8)):
        joined = merging.merge(features, merged, side=level, alike=0.9)
        merged, features = joined.merged, joined.features()
        left, top = 2 + 160 * at, 28
        for size in np.unique(merged.size[0][merged.running[0]]).tolist():
            for own in range(3):
                owners = np.flatnonzero(merged.running[0] & (merged.size[0] == size) & (label == own))
                corners = [(left + unit * column[one], top + unit * row[one]) for one in owners.tolist()]
                reach = unit * int(np.sqrt(size))
                sheet.tokens([(x + 0.6, y + 0.6) for x, y in corners], reach - 1.2, theme.hues[own])
        sheet.text(left + 68, 12, f"up to {level} \N{MULTIPLICATION SIGN} {level}")
        sheet.text(left + 68, 177, f"{int(merged.running.sum())} tokens", colour=theme.muted)
    return sheet.figure


def semantic_tokens(theme: Theme) -> Figure:
    """Windows of a map are pooled to semantic tokens, and each place of the map reads them in the end."""
    side, window, to = 8, 4, 2
    row, column = np.divmod(np.arange(side * side), side)
    label = np.where(row - column / 4 > 3.4, 2, np.where((row - 1.5) ** 2 + (column - 5.5) ** 2 < 4, 1, 0))
    map = np.eye(3)[label].reshape(1, side, side, 3)
    windows = semantic.Partition(side, side, (window, window))
    pooled, _ = semantic.pool(map, windows, to=(to, to), by="mean")
    small = semantic.join(pooled, windows.pooled((to, to)))[0]
    sheet, unit, top = Sheet(theme, 184), 14, 32
    sheet.text(60, 12, "windows")
    sheet.text(230, 12, "semantic tokens")
    sheet.text(400, 12, "map")
    for left in (2, 342):
        for own in range(3):
            marks = (label == own).reshape(side, side)
            _draw(sheet, (left, top), unit, marks, theme.hues[own], gap=(window, 4))
    wide, left, high = 20, 188, 48
    for (down, across), weights in zip(np.ndindex(*small.shape[:2]), small.reshape(-1, 3).tolist(), strict=True):
        corner = (left + across * wide + across // to * 4, high + down * wide + down // to * 4)
        sheet.tokens([(corner[0] + 1, corner[1] + 1)], wide - 2, mixed(theme.hues[:3], weights))
    for x, words in ((123, "pool"), (277, "recover")):
        sheet.arrow((x, top + 58), (x + 60, top + 58))
        sheet.text(x + 29, top + 42, words, colour=theme.muted)
    counts = ((60, f"{side * side} tokens"), (230, f"{small.shape[0] * small.shape[1]}"), (400, f"{side * side}"))
    for x, words in counts:
        sheet.text(x, 170, words, colour=theme.muted)
    return sheet.figure


def _purity(logits: Float[np.ndarray, "tokens classes"] | None) -> Float[np.ndarray, "tokens"]:
    assert logits is not None
    weight = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return (weight**2).sum(axis=-1) / weight.sum(axis=-1) ** 2


def _logits(label: Int[np.ndarray, "tokens"], sure: Float[np.ndarray, "tokens"]) -> Float[np.ndarray, "tokens 3"]:
    """Logits whose softmax gives the label this probability, and shares the rest."""
    own = np.eye(3)[label]
    return np.log(own * sure[:, None] + (1 - own) * (1 - sure[:, None]) / 2)


def _draw(
    sheet: Sheet, corner: tuple[float, float], side: float, marks: Bool[np.ndarray, "rows columns"], colour: str, *,
    hollow: bool = False, gap: tuple[int, int] = (1000, 0),
) -> None:  # fmt: skip
    """The marked tokens of a grid, with a gap after so many rows and columns."""
    every, more = gap
    margin = side / 16
    places: Sequence[tuple[int, int]] = [(int(row), int(column)) for row, column in np.argwhere(marks)]
    corners = [
        (corner[0] + side * column + more * (column // every) + margin,
         corner[1] + side * row + more * (row // every) + margin)
        for row, column in places
    ]  # fmt: skip
    sheet.tokens(corners, side - 2 * margin, colour, hollow=hollow)


def _draw_states(
    sheet: Sheet, corner: tuple[float, float], side: float, label: Int[np.ndarray, "rows columns"],
    exits: Bool[np.ndarray, "rows columns"],
) -> None:  # fmt: skip
    """A grid of classes, those that exit as outlines."""
    for own in np.unique(label).tolist():
        for hollow in (False, True):
            _draw(sheet, corner, side, (label == own) & (exits == hollow), sheet.theme.hues[own], hollow=hollow)
