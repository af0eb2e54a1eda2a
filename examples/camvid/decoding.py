"""Dense decoders for a frozen vision transformer: one that reads the last map, and one that reads maps of four depths.

Both norm what they read, and give class scores at a quarter of the sides of the images.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

import tokenexit_torch as tet
from examples.camvid import data

Map = Float[Tensor, "images width rows columns"]

_STRIDE = 4  # pixels of an image for each place of the scores
_STRIDES = (4, 8, 16, 32)  # of the maps that DPT makes of its taps; here never coarser than patches


@dataclass(frozen=True)
class Kind:
    """A kind of decoder.

    Attributes:
        taps: After how many blocks it reads maps.
        build: Makes one with random weights, from the width of the network, its patch size and the number of classes.
    """

    taps: tuple[int, ...]
    build: Callable[[int, int, int], nn.Module]


class ConvDecoder(nn.Module):
    """Convolutions of 3 x 3 on the last map, with upsampling by two between them.

    Args:
        width: Channels of the map.
        patch: Pixels of a side of its places: 4, 8, 16 or 32.
        classes: Class count.
        hidden: Channels of the first convolution; of the others two thirds.
    """

    def __init__(self, width: int, patch: int, classes: int, *, hidden: int = 96) -> None:
        super().__init__()
        steps = (patch // _STRIDE).bit_length() - 1
        channels = (width, hidden, *(2 * hidden // 3,) * steps)
        self.norm = Norm(width)
        self.steps = nn.ModuleList(_convolved(before, after) for before, after in pairwise(channels))
        self.classify = nn.Conv2d(channels[-1], classes, 1)

    def forward(self, map: Map) -> Float[Tensor, "images classes height width"]:
        """Class scores of a map."""
        found = self.norm(map)
        for number, step in enumerate(self.steps):
            found = step(found if number == 0 else _resized(found, scale=2))
        return self.classify(found)


class DPTDecoder(nn.Module):
    """Maps of four depths, the shallower the finer, fused from the deepest on, as in DPT.

    None is made coarser than it was: the network does not learn, and what it knows best is in its last map.

    Args:
        width: Channels of the maps.
        patch: Pixels of a side of their places: 4, 8, 16 or 32.
        classes: Class count.
        hidden: Channels of what is fused.
    """

    def __init__(self, width: int, patch: int, classes: int, *, hidden: int = 48) -> None:
        super().__init__()
        self.norms = nn.ModuleList(Norm(width) for _ in _STRIDES)
        self.projections = nn.ModuleList(nn.Conv2d(width, hidden, 1) for _ in _STRIDES)
        finer = [patch // min(stride, patch) for stride in _STRIDES]
        self.resamplings = nn.ModuleList(nn.ConvTranspose2d(hidden, hidden, times, times) for times in finer)
        self.residuals = nn.ModuleList(Residual(hidden) for _ in _STRIDES)
        self.fusions = nn.ModuleList(Residual(hidden) for _ in _STRIDES)
        self.classify = nn.Sequential(_convolved(hidden, hidden), nn.Conv2d(hidden, classes, 1))

    def forward(self, maps: Sequence[Map]) -> Float[Tensor, "images classes height width"]:
        """Class scores of maps, the shallowest first."""
        parts = zip(maps, self.norms, self.projections, self.resamplings, strict=True)
        laid = [resample(project(norm(map))) for map, norm, project, resample in parts]
        found = laid[-1]
        for number in reversed(range(len(laid))):
            if number < len(laid) - 1:
                found = _resized(found, size=laid[number].shape[2:]) + self.residuals[number](laid[number])
            found = self.fusions[number](found)
        return self.classify(found)


DECODERS: Mapping[str, Kind] = {
    "conv": Kind((12,), ConvDecoder),
    "dpt": Kind((3, 6, 9, 12), DPTDecoder),
}
"""By name."""


def all_taps() -> tuple[int, ...]:
    """After how many blocks any of them reads a map."""
    return tuple(sorted(set[int]().union(*(kind.taps for kind in DECODERS.values()))))


class Norm(nn.LayerNorm):
    """Layer norm of each place of a map."""

    def forward(self, input: Map) -> Map:
        """See `nn.LayerNorm`."""
        normed = super().forward(rearrange(input, "i c h w -> i h w c"))
        return rearrange(normed, "i h w c -> i c h w")


class Residual(nn.Module):
    """Two convolutions beside what they are given.

    Args:
        width: Channels.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        first, second = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        norms = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.inside = nn.Sequential(nn.ReLU(), first, norms[0], nn.ReLU(), second, norms[1])

    def forward(self, map: Map) -> Map:
        """The map with what the convolutions make of it."""
        return map + self.inside(map)


def _convolved(before: int, after: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU())


def _resized(map: Map, *, size: Sequence[int] | None = None, scale: int | None = None) -> Map:
    chosen = None if size is None else list(size)
    return functional.interpolate(map, chosen, scale, mode="bilinear", align_corners=False)


def parts_of(model: tet.DecodingModel) -> tuple[Any, nn.Module, tuple[int, ...]]:
    """The vision transformer, the decoder and the taps of a model that `wrap` has made of them."""
    return model.model.get_submodule("vit"), model.model.get_submodule("decoder"), tuple(model.host.taps)


def bare(vit: Any, decoder: nn.Module, taps: Sequence[int]) -> Callable[[Tensor], Tensor]:
    """A network and its decoder as they are without the library: timm's own forward pass.

    Args:
        vit: A vision transformer of timm.
        decoder: Reads its maps.
        taps: After how many blocks.

    Returns:
        A function from images to class scores.
    """
    return lambda images: decoder(given(maps_of(vit, images, taps)))


def maps_of(vit: Any, images: Float[Tensor, "images 3 height width"], taps: Sequence[int]) -> list[Map]:
    """Maps of patches after some blocks of timm's own forward pass, without its final norm."""
    indices = [tap - 1 for tap in taps]
    return vit.forward_intermediates(images, indices=indices, norm=False, intermediates_only=True)


def given(maps: Sequence[Map]) -> Any:
    """What a decoder is given: a map, or a list of several."""
    return list(maps) if len(maps) > 1 else maps[0]


def of_pixels(scores: Float[Tensor, "images classes rows columns"]) -> Float[Tensor, "images classes height width"]:
    """Class scores of a decoder for every pixel of a CamVid image."""
    return functional.interpolate(scores, data.SIZE, mode="bilinear", align_corners=False)


def new_decoders(vit: nn.Module) -> nn.ModuleDict:
    """Decoders of all kinds with random weights, for a network."""
    width, _, _, patch = vit.get_parameter("patch_embed.proj.weight").shape
    return nn.ModuleDict({name: kind.build(width, patch, len(data.CLASSES)) for name, kind in DECODERS.items()})
