"""Draws a street scene, and what merging and exits of the shipped model did to it: the guide's picture of merging.

Called as `python -m examples.scenes.merged --out docs/images/merging.png`.
"""

import argparse
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from examples import demo, runs, segment, shell, show
from examples.scenes.draw import draw
from tokenexit import schedule

_SUMMARY = (__doc__ or "").partition("\n")[0]
_UNSEEN = 4  # a stream of scenes that nothing else draws from
_PALETTE = (  # Okabe and Ito's, and a grey: told apart whichever colours one sees
    (86, 180, 233), (150, 150, 150), (230, 159, 0), (0, 158, 115), (0, 114, 178), (213, 94, 0), (240, 228, 66),
)  # fmt: skip


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.scenes.merged", description=_SUMMARY)
    parser.add_argument("--out", type=Path, default=Path("demo/merging.png"), help="the picture (default %(default)s)")
    parser.add_argument("--scene", type=int, default=0, help="which scene is drawn (default %(default)s)")
    return parser.parse_args()


def main() -> None:
    """Run from the command line."""
    given = arguments()
    model, about = runs.load(demo.SHIPPED)
    pixels = draw(np.random.default_rng((0, _UNSEEN, given.scene)), size=about.size).image[None]
    images = runs.normalised(about, torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255)
    dense, planned = (segment.segment(model, images, plan) for plan in (schedule.dense(), model.schedule))
    found = demo.figures(dense, planned, model.schedule)
    work, first, last = found["multiply_adds"], int(planned.ran[0, 0]), int(planned.ran[0, -1])
    counts = f"{first:,} tokens in the first block, {last:,} in the last"
    share, same = work["exits"] / work["dense"], 100 * found["agreement"]
    headline = f"{counts}: {share:.2f} of the multiply-adds, {same:.1f} % of the pixels the same"
    maps = show.Maps(dense.classes, planned.classes, planned.depth, planned.size)
    drawn = show.draw_merging(pixels[0], maps, replace(about, palette=_PALETTE), model.depth, headline)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    drawing = io.BytesIO()
    drawn.savefig(drawing, dpi=100)
    # So many colours are enough, and take a third of the bytes.
    Image.open(drawing).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(given.out, optimize=True)
    print(headline)


if __name__ == "__main__":
    shell.exit_with(main)
