"""A small anchor-free detector on maps of a vision transformer: boxes as points, over a feature pyramid.

At the centre of every object a heatmap of its class has a peak; the cell of the peak says how far off the centre is,
and how large the box (CenterNet, Zhou et al., "Objects as Points", 2019). The cells around a centre learn the box as
well (TTFNet, AAAI 2020), which takes far fewer steps. Nothing here knows of gates: a map is a map.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

STRIDE = 4  # pixels to a cell of the finest level, half a patch
_SPREAD = 0.54  # of a peak, as a share of the box (TTFNet)
_PEAKS = 64


class Raw(NamedTuple):
    """What the detector says of every cell.

    Attributes:
        heat: How much each class has a centre here, as a logit.
        place: The box of each class: from the cell's middle to the box's, across and down, in cells; then the logarithm
            of its width and height, in cells.
    """

    heat: Float[Tensor, "images classes height width"]
    place: Float[Tensor, "images classes 4 height width"]


class Targets(NamedTuple):
    """What the detector should say.

    Attributes:
        heat: 1 at centres, falling off around them.
        place: As in `Raw`, where `weight` is positive.
        weight: How much a cell counts for its box; sums to 1 over each box that no other covers.
        counted: Cells whose heat counts; not those of objects too small to be looked for.
    """

    heat: Float[Tensor, "images classes height width"]
    place: Float[Tensor, "images classes 4 height width"]
    weight: Float[Tensor, "images classes height width"]
    counted: Bool[Tensor, "images classes height width"]


class Boxes(NamedTuple):
    """Objects of one image.

    Attributes:
        corners: x0, y0, x1, y1 in pixels; x1 and y1 are one past the last column and row.
        kind: Their classes.
        score: How sure they are; 1 for what is true.
    """

    corners: Float[Tensor, "objects 4"]
    kind: Int[Tensor, "objects"]
    score: Float[Tensor, "objects"]


class Detector(nn.Module):
    """A neck and a head: a feature pyramid over maps of one size, and what its finest level says.

    Args:
        width: Channels of the maps.
        taps: After how many blocks the maps were taken, ascending. The earliest is made the finest level, at twice the
            resolution of the patches, the next keeps theirs, and each later one has half of the one before.
        classes: What to look for.
        channels: Of the pyramid.
    """

    def __init__(self, width: int, taps: Sequence[int], classes: int, *, channels: int = 64) -> None:
        super().__init__()
        self.taps, self.classes = tuple(taps), classes
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in taps)
        finer = nn.ConvTranspose2d(width, channels, 2, stride=2)
        self.laterals = nn.ModuleList([finer, *(nn.Conv2d(width, channels, 1) for _ in self.taps[1:])])
        self.smooth = nn.Conv2d(channels, channels, 3, padding=1)
        self.heat, self.place = _tower(channels, classes), _tower(channels, 4 * classes)
        nn.init.constant_(cast(Tensor, self.heat[-1].bias), -4.0)  # at first next to nothing is a centre

    def forward(self, maps: Mapping[int, Float[Tensor, "images width grid_height grid_width"]]) -> Raw:
        """Read the maps of a network, by the blocks that had run."""
        levels = []
        for index, (tap, norm, lateral) in enumerate(zip(self.taps, self.norms, self.laterals, strict=True)):
            level = norm(maps[tap].movedim(1, -1)).movedim(-1, 1)
            if index > 1:
                level = functional.avg_pool2d(level, 2 ** (index - 1), ceil_mode=True)
            levels.append(lateral(level))
        features = levels.pop()
        for level in reversed(levels):
            features = level + functional.interpolate(features, size=level.shape[-2:], mode="nearest")
        features = functional.relu(self.smooth(features))
        place = rearrange(self.place(features), "images (classes four) h w -> images classes four h w", four=4)
        return Raw(self.heat(features).float(), place.float())


def _tower(channels: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, out, 1))


def targets(truth: Sequence[Boxes], size: tuple[int, int], *, classes: int, smallest: float) -> Targets:
    """What the detector should say of images with these objects.

    Args:
        truth: The objects of each image.
        size: Height and width of the images, in pixels.
        classes: How many there are.
        smallest: Boxes of a smaller area, in pixels, are not looked for, and finding them is no mistake.
    """
    rows, columns = (-(-side // STRIDE) for side in size)
    heat = torch.zeros(len(truth), classes, rows, columns)
    place, weight = heat.new_zeros(len(truth), classes, 4, rows, columns), torch.zeros_like(heat)
    counted = torch.ones_like(heat, dtype=torch.bool)
    down, across = (torch.arange(count) + 0.5 for count in (rows, columns))
    for image, boxes in enumerate(truth):
        x0, y0, x1, y1 = (boxes.corners / STRIDE).unbind(1)
        # Large boxes first: where two compete for a cell, it is the small one's.
        for one in ((x1 - x0) * (y1 - y0)).argsort(descending=True, stable=True).tolist():
            kind = int(boxes.kind[one])
            (left, top, right, bottom) = (float(edge[one]) for edge in (x0, y0, x1, y1))
            width, height, x, y = right - left, bottom - top, (left + right) / 2, (top + bottom) / 2
            if width * height * STRIDE**2 < smallest:
                inside = ((across + 0.5 > left) & (across - 0.5 < right)) & (
                    (down + 0.5 > top) & (down - 0.5 < bottom)
                )[:, None]
                counted[image, kind] &= ~inside
                continue
            row, column = min(int(y), rows - 1), min(int(x), columns - 1)
            bump = _bump(down - row - 0.5, height)[:, None] * _bump(across - column - 0.5, width)
            near = bump > 0
            heat[image, kind] = torch.maximum(heat[image, kind], bump)
            offset = torch.stack(((x - across).expand(rows, -1), (y - down)[:, None].expand(-1, columns)))
            extent = torch.tensor([width, height]).log()[:, None, None].expand(-1, rows, columns)
            place[image, kind] = torch.where(near, torch.cat((offset, extent)), place[image, kind])
            weight[image, kind] = torch.where(near, bump / bump.sum(), weight[image, kind])
            counted[image, kind, row, column] = True
    return Targets(heat, place, weight, counted)


def _bump(away: Float[Tensor, "cells"], side: float) -> Float[Tensor, "cells"]:
    """1 at the centre's cell, falling off with the side of the box, and 0 beyond three standard deviations."""
    spread = max(_SPREAD * side / 6, 1e-3)
    fall = torch.exp(-(away**2) / (2 * spread**2))
    return torch.where(away.abs() <= max(3 * spread, 0.5), fall, 0.0)


def detection_loss(raw: Raw, wanted: Targets) -> Float[Tensor, ""]:
    """Focal loss of the heat (CenterNet's, with its powers 2 and 4) and 5 times the boxes' loss, per object."""
    centre = wanted.heat == 1
    objects = centre.sum().clamp(min=1)
    sure = functional.logsigmoid(raw.heat)
    unsure = functional.logsigmoid(-raw.heat)
    hit = sure.detach().exp()
    each = torch.where(centre, (1 - hit) ** 2 * sure, (1 - wanted.heat) ** 4 * hit**2 * unsure)
    heat = -(each * wanted.counted).sum() / objects
    there = wanted.weight > 0
    gap = 1 - _generalized_iou(_edges(raw.place).movedim(2, -1)[there], _edges(wanted.place).movedim(2, -1)[there])
    return heat + 5 * (gap * wanted.weight[there]).sum() / objects


def _edges(place: Float[Tensor, "images classes 4 *cells"]) -> Float[Tensor, "images classes 4 *cells"]:
    """x0, y0, x1, y1 from the cell's middle, in cells."""
    # Nothing is more than e^6 cells wide, and a new network may say anything.
    middle, half = place[:, :, :2], place[:, :, 2:].clamp(-6, 6).exp() / 2
    return torch.cat((middle - half, middle + half), dim=2)


def _generalized_iou(one: Float[Tensor, "boxes 4"], other: Float[Tensor, "boxes 4"]) -> Float[Tensor, "boxes"]:
    """Intersection over union, less the share of their hull that neither covers (Rezatofighi et al., CVPR 2019)."""
    area, other_area = (_area(boxes[:, :2], boxes[:, 2:]) for boxes in (one, other))
    shared = _area(torch.maximum(one[:, :2], other[:, :2]), torch.minimum(one[:, 2:], other[:, 2:]))
    hull = _area(torch.minimum(one[:, :2], other[:, :2]), torch.maximum(one[:, 2:], other[:, 2:]))
    union = area + other_area - shared
    return shared / union - (hull - union) / hull


def _area(low: Float[Tensor, "boxes 2"], high: Float[Tensor, "boxes 2"]) -> Float[Tensor, "boxes"]:
    return (high - low).clamp(min=0).prod(dim=1)


def decoded(raw: Raw) -> list[Boxes]:
    """The objects of each image, most certain first: a cell that no neighbour outdoes is a centre."""
    score = raw.heat.sigmoid()
    score = torch.where(score == functional.max_pool2d(score, 3, stride=1, padding=1), score, 0.0)
    *_, rows, columns = score.shape
    top, index = score.flatten(1).topk(min(_PEAKS, score[0].numel()), dim=1)
    edges = rearrange(_edges(raw.place), "images classes four h w -> images (classes h w) four")
    cell = index % (rows * columns)
    middle = torch.stack((cell % columns, cell // columns), dim=-1) + 0.5
    corners = STRIDE * (edges.gather(1, index[..., None].expand(-1, -1, 4)) + middle.repeat(1, 1, 2))
    kind = index // (rows * columns)
    return [
        Boxes(found[certain > 0], of[certain > 0], certain[certain > 0])
        for found, of, certain in zip(corners, kind, top, strict=True)
    ]
