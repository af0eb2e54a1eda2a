"""Figure of the shipped model on a drawn scene: picture, labels of all tokens, labels with exits, and the exit map."""

import numpy as np
import torch
from jaxtyping import Float, UInt8
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from examples import demo, runs, segment
from examples.figures.sheet import Sheet, Theme
from examples.scenes.draw import draw
from tokenexit import schedule

_UNSEEN, _SCENE = 4, 10  # of the stream of `examples.scenes.merged`, one in bright light
_PALETTE = (  # Okabe and Ito's, and a grey
    (86, 180, 233), (150, 150, 150), (230, 159, 0), (0, 158, 115), (0, 114, 178), (213, 94, 0), (240, 228, 66),
)  # fmt: skip


def exit_map(theme: Theme) -> Figure:
    """A drawn scene, its dense labels, its labels with exits, and after how many blocks each token exited."""
    model, about = runs.load(demo.SHIPPED)
    pixels = draw(np.random.default_rng((0, _UNSEEN, _SCENE)), size=about.size).image
    images = runs.normalised(about, torch.from_numpy(pixels[None]).permute(0, 3, 1, 2) / 255)
    plan = schedule.neighbours()
    dense, exiting = (segment.segment(model, images, one) for one in (schedule.dense(), plan))
    kinds = [*plan.after, model.depth]
    colours = [theme.tint(theme.blue, share) for share in (0.18, 0.42, 0.68, 1.0)]
    shown = np.array([to_rgb(colour) for colour in colours])[np.searchsorted(kinds, exiting.depth[0])]
    palette = np.array(_PALETTE, dtype=np.uint8)
    sheet = Sheet(theme, 386)
    panels = (
        ("drawn scene", _fewer_colours(pixels)),
        ("labels, dense", palette[dense.classes[0]]),
        ("labels with exits", palette[exiting.classes[0]]),
        ("exit map", _bytes(np.repeat(np.repeat(shown, 4, axis=0), 4, axis=1))),
    )
    wide, high = 222, 148
    for at, (words, picture) in enumerate(panels):
        x, y = 2 + (wide + 12) * (at % 2), 26 + (high + 34) * (at // 2)
        sheet.text(x + wide / 2, y - 13, words)
        sheet.picture(x, y, wide, high, picture)
    sheet.text(2, 372, "exit after block", across="left")
    for at, (after, colour) in enumerate(zip(kinds, colours, strict=True)):
        x = 140 + 62 * at
        sheet.tokens([(x, 364)], 16, colour)
        sheet.text(x + 22, 372, str(after) if after < model.depth else "never", across="left")
    return sheet.figure


def _fewer_colours(picture: UInt8[np.ndarray, "height width 3"]) -> UInt8[np.ndarray, "height width 3"]:
    """The picture in 64 colours, which take half the bytes."""
    return np.asarray(Image.fromarray(picture).quantize(64, dither=Image.Dither.NONE).convert("RGB"))


def _bytes(picture: Float[np.ndarray, "height width 3"]) -> UInt8[np.ndarray, "height width 3"]:
    return np.rint(255 * picture).astype(np.uint8)
