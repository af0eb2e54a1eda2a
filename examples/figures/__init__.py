"""Figures of the documentation, drawn with the library's own core: `python -m examples.figures --out docs/images`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from examples.figures import charts, flows, grids, sheet
from examples.figures.sheet import Theme

__all__ = ["FIGURES", "Entry", "draw"]


@dataclass(frozen=True)
class Entry:
    """A figure.

    Attributes:
        drawn: Draws it in a colour scheme.
        shows: What it shows, as alternative text.
        needs_model: Whether the shipped model runs for it.
    """

    drawn: Callable[[Theme], Figure]
    shows: str
    needs_model: bool = False


def _exit_map(theme: Theme) -> Figure:
    from examples.figures.scene import exit_map  # PyTorch is needed for this one alone

    return exit_map(theme)


FIGURES: Mapping[str, Entry] = {
    "exit-map": Entry(
        _exit_map,
        "A drawn street scene, its labels by the dense network, nearly the same labels with exits, and the exit map: "
        "most tokens inside of road and sky exit after block 3, most at boundaries run through all blocks.",
        needs_model=True,
    ),
    "token-way": Entry(
        flows.token_way,
        "Six tokens run through blocks 1 to 3, four through blocks 4 to 6 and two through blocks 7 to 12: at each of "
        "two exits two tokens leave the row, and their frozen outputs go back to their places at the end.",
    ),
    "neighbours": Entry(
        grids.neighbours,
        "A grid of tokens of three classes: tokens exit if the 3 x 3 around them is confident and of one class; those "
        "beside a boundary, and those beside an unsure token, run on.",
    ),
    "retention": Entry(
        grids.retention,
        "Confidences of the tokens of two classes as bars: of those above the threshold the two most confident of each "
        "class are kept and the others exit; those below it run on anyway.",
    ),
    "merging": Entry(
        grids.merge_cells,
        "A grid of 256 patches of three classes: cells of 2 x 2 patches of one class merge into a token, then cells of "
        "4 x 4, then of 8 x 8, so that fewer tokens run, and patches at boundaries stay single.",
    ),
    "carries": Entry(
        flows.carries,
        "What stays in the place of a token that exited: under Prediction its class scores, under Feature the feature "
        "that it had at its exit, under Translated an estimate of its last feature.",
    ),
    "translators": Entry(
        flows.translators,
        "A feature at an exit goes through a translator instead of blocks 7 to 12: it gives an estimate of the feature "
        "after the last block, and a foretold error.",
    ),
    "cells": Entry(
        grids.cell_centres,
        "A grid in cells of 3 x 3 tokens: the centre of each cell runs on, and counts in attention for itself and the "
        "tokens of its cell that exited.",
    ),
    "execution": Entry(
        flows.execution,
        "The tokens of three images that run on: a padded batch has 18 entries for 13 tokens, the packed row has 13, "
        "and attention runs for each image by itself.",
    ),
    "static": Entry(
        flows.static,
        "Two images after an exit with a capacity of four entries each: the first keeps three tokens and has an empty "
        "entry, the second has five for four entries, and the surplus token exits and is counted.",
    ),
    "cost": Entry(
        charts.token_blocks,
        "Bars of the tokens that run through each of twelve blocks, lower after each of three exits: the area of the "
        "bars as a share of all tokens through all blocks is the token-blocks.",
    ),
    "schedule": Entry(
        flows.plan,
        "Twelve blocks in a row with a plan: tokens merge in cells of 2 x 2 after block 1 and of 4 x 4 after block 3, "
        "and exit after blocks 6 and 9, so that later blocks have fewer tokens.",
    ),
    "calibration": Entry(
        charts.calibrated,
        "Losses of seven settings from the dearest to the cheapest, with their upper bounds, and the loss allowed: the "
        "cheapest of the certified settings is chosen.",
    ),
    "gates": Entry(
        flows.gates,
        "Six tokens and three gates between blocks: at each gate some tokens are skipped until the next one, and some "
        "that were skipped run again.",
    ),
    "semantic": Entry(
        grids.semantic_tokens,
        "A map of 64 tokens in four windows is pooled to 16 semantic tokens, four for each window, and recovered to a "
        "map of 64 tokens.",
    ),
    "own-policy": Entry(
        grids.own_policy,
        "A grid of scores, the mask of the scores above a threshold, and the decision: marked tokens exit, but for two "
        "of each class.",
    ),
    "frontier": Entry(
        charts.frontier,
        "Change of mIoU against measured speed-up on CamVid: plans that merge and then exit are the fastest for their "
        "loss; exits alone, merging alone and ToMe are slower; smaller input and truncated networks lose more.",
    ),
}
"""Every figure by its name."""


def draw(name: str, theme: Theme, folder: Path) -> Path:
    """Draw a figure and write it as NAME.light.svg or NAME.dark.svg.

    Args:
        name: Its name.
        theme: The colour scheme.
        folder: Where to.

    Returns:
        The file.
    """
    file = folder / f"{name}.{theme.name}.svg"
    with sheet.plain_style():
        sheet.write(FIGURES[name].drawn(theme), file, FIGURES[name].shows)
    return file
