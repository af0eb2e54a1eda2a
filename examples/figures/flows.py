"""Figures of the way through the blocks: rows of tokens that get shorter, and what stays of those that exit."""

import numpy as np
from matplotlib.figure import Figure

from examples.figures.sheet import Sheet, Theme
from tokenexit import schedule, tokens
from tokenexit.policies import Evidence, GateBelow, NeighboursAgree
from tokenexit.schedule import Exit, Merge, Schedule


def token_way(theme: Theme) -> Figure:
    """Six tokens run through the blocks; some exit, with frozen outputs, and the row gets shorter."""
    sheet, side, pitch, top = Sheet(theme, 244), 20, 24, 40
    packing = tokens.pack(np.ones((1, 6), dtype=bool))
    hue = [theme.blue, theme.blue, theme.orange, theme.orange, theme.green, theme.green]

    def stack(x: float, slots: list[int], hollow: tuple[int, ...] = ()) -> None:
        for at, slot in enumerate(slots):
            token(x, top + pitch * at, slot, slot in hollow)

    def token(x: float, y: float, slot: int, hollow: bool) -> None:
        sheet.tokens([(x, y)], side, hue[slot], hollow=hollow)
        sheet.text(x + side / 2, y + side / 2, str(slot + 1), colour=hue[slot] if hollow else theme.paper)

    gone: list[int] = []
    lane = 208
    parts = ((4, "blocks 1\N{EN DASH}3", (1, 4)), (146, "4\N{EN DASH}6", (2, 5)), (288, "7\N{EN DASH}12", ()))
    for x, words, leaving in parts:
        slots = packing.slot.tolist()
        high = pitch * len(slots) - 4
        stack(x, slots)
        sheet.box(x + 34, top - 4, 56, high + 8)
        sheet.text(x + (62 if gone else 44), 18, words)
        for at in range(len(slots)):
            y = top + pitch * at + side / 2
            sheet.line((x + 23, y), (x + 33, y), width=1.2)
            if leaving:
                sheet.line((x + 91, y), (x + 110, y), width=1.2)
                if at < len(slots) - len(leaving):
                    sheet.arrow((x + 114, y), (x + 138, y), width=1.2, head=5)
            else:
                sheet.arrow((x + 91, y), (426, y), width=1.2, head=5)
        if leaving:
            at = x + 112
            sheet.line((at, top - 6), (at, top + high), colour=theme.orange, dashed=True)
            sheet.arrow((at, top + high), (at, lane - 4), colour=theme.orange)
            sheet.text(at + 8, top + high + (12 if gone else -1), "exit", colour=theme.orange, across="left")
            for offset, slot in zip((-23, 3), leaving, strict=True):
                token(at + offset, lane, slot, hollow=True)
            sheet.line((at + 27, lane + 10), (at + 114 if not gone else 434, lane + 10))
            packing, _ = tokens.repack(packing, np.array([slot not in leaving for slot in slots]))
            gone += leaving
    sheet.text(346, lane - 5, "frozen outputs", colour=theme.muted)
    stack(432, list(range(6)), tuple(gone))
    sheet.arrow((434, lane + 10), (442, lane + 10), (442, top + 6 * pitch), width=1.6)
    sheet.text(458, 18, "output", across="right")
    return sheet.figure


def carries(theme: Theme) -> Figure:
    """What stays in the place of tokens that exited: class scores, their feature, or a translation."""
    sheet, side, pitch = Sheet(theme, 212), 32, 36
    rows = (
        ("Prediction", "class scores\nof its exit head"),
        ("Feature", "the feature that\nit had at its exit"),
        ("Translated", "an estimate of its\nlast feature"),
    )
    for down, (name, words) in enumerate(rows):
        y = 20 + 68 * down
        sheet.text(2, y + side / 2, name, across="left", bold=True)
        for at in range(5):
            x = 108 + pitch * at
            if at % 2 == 0:
                sheet.tokens([(x, y)], side, theme.blue)
                continue
            colour = theme.purple if name == "Translated" else theme.orange
            sheet.tokens([(x, y)], side, colour, hollow=True)
            if name == "Prediction":
                for bar, high in enumerate((8, 18, 5)):
                    sheet.line((x + 9 + 7 * bar, y + 25), (x + 9 + 7 * bar, y + 25 - high), colour=colour, width=4)
            elif name == "Feature":
                for line in range(3):
                    sheet.line((x + 9, y + 10 + 6 * line), (x + side - 9, y + 10 + 6 * line), colour=colour, width=2.5)
            else:
                sheet.arrow((x + 7, y + side / 2), (x + side - 6, y + side / 2), colour=colour, width=2.5, head=9)
        sheet.text(304, y + side / 2, words, across="left")
    return sheet.figure


def translators(theme: Theme) -> Figure:
    """A translator maps the feature at an exit to an estimate of what the last block would give."""
    early, last, estimate = _features()
    sheet = Sheet(theme, 232)
    top = {"early": 78, "last": 30, "estimate": 132}

    def vector(x: float, y: float, values: np.ndarray, colour: str) -> None:
        for at, value in enumerate(values.tolist()):
            sheet.tokens([(x, y + 14 * at)], 13, theme.tint(colour, 0.12 + 0.88 * value))
            sheet.tokens([(x + 13, y + 14 * at)], 13, theme.tint(colour, 0.12 + 0.88 * (1 - value)))

    vector(36, top["early"], early, theme.blue)
    sheet.text(49, 58, "at the exit")
    sheet.line((70, 106), (104, 106))
    sheet.arrow((104, 106), (104, 58), (142, 58))
    sheet.arrow((104, 106), (104, 160), (158, 160), colour=theme.purple)
    sheet.box(144, 34, 152, 48, colour="none", line=theme.muted, dashed=True)
    sheet.text(220, 58, "blocks 7\N{EN DASH}12", colour=theme.muted)
    sheet.box(160, 138, 120, 44, colour=theme.purple)
    sheet.text(220, 160, "translator", colour=theme.paper)
    sheet.arrow((297, 58), (344, 58))
    sheet.arrow((281, 160), (344, 160), colour=theme.purple)
    vector(350, top["last"], last, theme.blue)
    vector(350, top["estimate"], estimate, theme.purple)
    sheet.text(363, 109, "≈", size=20)
    sheet.text(384, 58, "last block", across="left")
    sheet.text(384, 160, "estimate", across="left")
    sheet.arrow((220, 183), (220, 204), colour=theme.purple)
    sheet.text(220, 217, "foretold error")
    return sheet.figure


def execution(theme: Theme) -> Figure:
    """Tokens of three images that run on: in a padded batch, and in one packed row."""
    kept = np.array([[1, 1, 1, 0, 1, 1, 1], [0, 1, 0, 1, 0, 0, 1], [1, 0, 1, 1, 1, 0, 0]], dtype=bool)
    packing = tokens.pack(kept)
    lengths = packing.lengths.tolist()
    longest = max(lengths)
    sheet, pitch, side = Sheet(theme, 240), 28, 25
    for image, length in enumerate(lengths):
        y, places = 6 + pitch * image, [4 + pitch * at for at in range(longest)]
        sheet.tokens([(x, y) for x in places[:length]], side, theme.hues[image])
        sheet.tokens([(x, y) for x in places[length:]], side, theme.muted, dashed=True)
    sheet.text(196, 30, "padded batch", across="left", bold=True)
    sheet.text(196, 54, f"{len(lengths) * longest} entries, {sum(lengths)} tokens", across="left")
    y = 146
    sheet.text(4, 124, "packed row", across="left", bold=True)
    sheet.text(124, 124, f"{packing.index.shape[0]} tokens, no padding", across="left")
    for at, image in enumerate(packing.image.tolist()):
        sheet.tokens([(4 + pitch * at, y)], side, theme.hues[image])
    for image, (first, stop) in enumerate(
        zip(packing.offsets[:-1].tolist(), packing.offsets[1:].tolist(), strict=True)
    ):
        left, right = 4 + pitch * first, 4 + pitch * stop - (pitch - side)
        sheet.bracket(left, right, y + side + 7, depth=7, colour=theme.hues[image])
    sheet.text(4, 212, "attention: each image by itself", across="left")
    return sheet.figure


def static(theme: Theme) -> Figure:
    """Two images after an exit with a fixed capacity: one has an empty entry, of one a surplus token must exit."""
    stay = np.array([[0, 1, 0, 1, 0, 0, 1], [1, 1, 0, 1, 1, 1, 0]], dtype=bool)
    sure = np.array([[0.9, 0.3, 0.9, 0.2, 0.9, 0.9, 0.4], [0.4, 0.8, 0.9, 0.3, 0.5, 0.2, 0.9]])
    capacity = 4
    selection, surplus = tokens.select(stay, sure, capacity=capacity)
    sheet, pitch, side = Sheet(theme, 214), 32, 28
    sheet.text(2, 14, "the policy keeps", across="left")
    sheet.text(302, 14, f"capacity {capacity}", across="left")
    for image, (y, hue) in enumerate(((36, theme.blue), (88, theme.green))):
        places = np.array([2 + pitch * at for at in range(stay.shape[1])])
        sheet.tokens([(x, y) for x in places[stay[image] & ~surplus[image]].tolist()], side, hue)
        sheet.tokens([(x, y) for x in places[~stay[image]].tolist()], side, hue, hollow=True)
        sheet.tokens([(x, y) for x in places[surplus[image]].tolist()], side, theme.orange)
        sheet.arrow((232, y + side / 2), (290, y + side / 2))
        full = selection.valid[image]
        entries = np.array([302 + pitch * at for at in range(capacity)])
        sheet.tokens([(x, y) for x in entries[full].tolist()], side, hue)
        sheet.tokens([(x, y) for x in entries[~full].tolist()], side, theme.muted, dashed=True)
        sheet.box(297, y - 5, pitch * capacity + 6, side + 10, colour="none", line=theme.ink)
    sheet.key(2, 154, "runs on", theme.blue)
    sheet.key(130, 154, "exits", theme.blue, hollow=True)
    sheet.key(240, 154, "empty entry", theme.muted, dashed=True)
    sheet.key(2, 188, "no room: exits too, and is counted", theme.orange)
    return sheet.figure


def plan(theme: Theme) -> Figure:
    """A plan along twelve blocks: where tokens merge, and where they exit."""
    sure = NeighboursAgree(0.9, radius=1)
    wanted = Schedule(
        exits=(Exit(6, sure), Exit(9, NeighboursAgree(0.9, radius=0))),
        merges=(Merge(1, 2, alike=0.9), Merge(3, 4, alike=0.3, agreed=sure)),
    )
    schedule.require_fits(wanted, depth=12, after=(3, 6, 9), gives_masks=False)
    sheet, pitch, wide, middle = Sheet(theme, 214), 38.2, 30, 112
    points = sorted([*(one.after for one in wanted.merges), *(one.after for one in wanted.exits)])

    def edge(after: int) -> float:
        return 2 + pitch * after - (pitch - wide) / 2

    for block in range(12):
        high = 72 - 10 * sum(after <= block for after in points)
        sheet.box(2 + pitch * block, middle - high / 2, wide, high)
        sheet.text(2 + pitch * block + wide / 2, middle, str(block + 1), colour=theme.ink)
    for merge in wanted.merges:
        x = edge(merge.after)
        sheet.line((x, 46), (x, middle + 40), colour=theme.purple, width=2.5)
        sheet.text(x, 24, f"merge\n{merge.side} \N{MULTIPLICATION SIGN} {merge.side}", colour=theme.purple)
    for one in wanted.exits:
        x = edge(one.after)
        sheet.arrow((x, middle - 34), (x, 166), colour=theme.orange, width=2.5, head=10)
        assert isinstance(one.policy, NeighboursAgree)
        sheet.text(x, 188, f"exit\nradius {one.policy.radius}", colour=theme.orange)
    sheet.text(458, 56, "blocks (lower: fewer tokens)", colour=theme.muted, across="right")
    return sheet.figure


def gates(theme: Theme) -> Figure:
    """Tokens that gates skip and reactivate, from left to right."""
    kept = np.array([
        [0.9, 0.8, 0.9], [0.2, 0.3, 0.1], [0.8, 0.2, 0.7], [0.9, 0.9, 0.2], [0.1, 0.8, 0.9], [0.7, 0.1, 0.2],
    ])  # fmt: skip
    skipped = np.stack([GateBelow(0.5)(Evidence(gate=column)) for column in kept.T], axis=1)
    sheet, left, wide, gap, pitch, top = Sheet(theme, 214), 2, 62, 24, 29, 38
    for row in range(len(kept)):
        y = top + pitch * row
        sheet.line((left + 4, y + 10), (left + 4 * wide + 3 * gap - 4, y + 10))
        for part in range(4):
            skips = part > 0 and bool(skipped[row, part - 1])
            back = part > 1 and not skips and bool(skipped[row, part - 2])
            if not skips:
                x = left + part * (wide + gap)
                sheet.box(x, y, wide, 20, colour=theme.orange if back else theme.blue)
    for part in range(3):
        x = left + (part + 1) * (wide + gap) - gap / 2
        sheet.line((x, 28), (x, 208), colour=theme.ink, width=2)
        sheet.text(x, 14, "gate")
    x = 342
    sheet.box(x, 66, 22, 16, colour=theme.blue)
    sheet.line((x, 112), (x + 22, 112))
    sheet.box(x, 142, 22, 16, colour=theme.orange)
    for y, words in ((74, "runs"), (112, "skipped"), (150, "runs again")):
        sheet.text(x + 28, y, words, across="left")
    return sheet.figure


def _features() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Toy features at an exit and after the last block, and an estimate by least squares on others; each in [0, 1]."""
    at = np.arange(1, 41)[:, None] * np.array([0.61803, 0.41421, 0.73205, 0.23607])
    early = at % 1
    turn = np.array([[0.1, 0.9, 0, 0.2], [0.8, 0, 0.3, -0.4], [0, -0.5, 0.9, 0.2], [0.3, 0.2, -0.4, 0.9]])
    last = 1 / (1 + np.exp(-6 * (early @ turn - 0.45)))
    seen = np.c_[early[1:], np.ones(len(early) - 1)]
    weights = np.linalg.lstsq(seen, last[1:], rcond=None)[0]
    estimate = np.clip(np.r_[early[0], 1] @ weights, 0, 1)
    return early[0].round(2), last[0].round(2), estimate.round(2)
