"""Swin transformers whose third stage runs on semantic tokens: STViT-R (CVPR 2023), for images of any size.

Swin (ICCV 2021) has four stages of blocks that attend within windows, every other one within shifted windows. In
STViT-R, the third stage is made of units of six layers: one block of Swin, two that make semantic tokens, two among
them, and one that recovers the map. A convolutional stem comes first. Windows may hang over the edge of a map: what is
padding there is not attended to.
"""

from typing import NamedTuple

import torch
from einops import rearrange, reduce
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from tokenexit import semantic
from tokenexit.adapting import require_marks
from tokenexit.errors import require
from tokenexit.semantic import Partition, SemanticPlan, stvit_r
from tokenexit_torch._modules import DropPath, mlp, require_heads, start_anew
from tokenexit_torch.attention import attend
from tokenexit_torch.semantic.layers import CrossBlock, SemanticUnit

__all__ = ["Swin", "SwinBackbone", "SwinBlock", "SwinClassifier", "SwinMap", "swin_base", "swin_small"]

_UNIT = 6


class SwinMap(NamedTuple):
    """What a stage gives.

    Attributes:
        features: The map.
        valid: Which of its places are of the image; None for all.
    """

    features: Float[Tensor, "images height width channels"]
    valid: Bool[Tensor, "images height width"] | None


class SwinBlock(nn.Module):
    """Attention within windows, with a bias that depends on how far apart two places are; then an MLP.

    Attributes:
        norm1: The norm before attention.
        qkv: Projection of queries, keys and values.
        proj: Projection of what attention gives.
        bias: The bias of each distance and head, `((2 rows - 1) (2 columns - 1), heads)`.
        norm2: The norm before the MLP.
        mlp: The MLP.
        drop: Stochastic depth; its rate is 0 at first.

    Args:
        width: Channels of a token.
        heads: Attention heads.
        window: Rows and columns of a window.
        shift: By how many rows and columns windows are shifted; along an axis that has one window alone, by none.

    Raises:
        TokenExitError: If heads do not divide the width, or `window` are not whole numbers from 1 up.
    """

    _apart: Tensor

    def __init__(
        self, width: int, heads: int, *, window: tuple[int, int] = (7, 7), shift: tuple[int, int] = (0, 0)
    ) -> None:
        super().__init__()
        require_heads(heads, width)
        Partition(1, 1, window)  # raises if `window` is none
        self.heads, self.window, self.shift = heads, window, shift
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.bias = nn.Parameter(torch.empty((2 * window[0] - 1) * (2 * window[1] - 1), heads))
        self.norm2 = nn.LayerNorm(width)
        self.mlp = mlp(width, 4 * width)
        self.drop = DropPath()
        start_anew(self)
        nn.init.trunc_normal_(self.bias, std=0.02)
        self.register_buffer("_apart", _distances(window), persistent=False)

    def forward(
        self,
        map: Float[Tensor, "images height width channels"],
        *,
        valid: Bool[Tensor, "images height width"] | None = None,
    ) -> Float[Tensor, "images height width channels"]:
        """One pass.

        Args:
            map: The features; finite everywhere.
            valid: Which places may be attended to; all, if left out.

        Returns:
            The features, of the same size.
        """
        windows = Partition(map.shape[1], map.shape[2], self.window)
        shift = (self.shift[0] if windows.rows > 1 else 0, self.shift[1] if windows.columns > 1 else 0)
        attend = self._windowed if shift == (0, 0) else self._shifted
        tokens = map + self.drop(attend(self.norm1(map), windows, valid, shift))
        return tokens + self.drop(self.mlp(self.norm2(tokens)))

    def _windowed(self, map: Tensor, windows: Partition, valid: Tensor | None, _shift: tuple[int, int]) -> Tensor:
        places, marks = semantic.split(map, windows, valid=valid)
        allowed = None if marks is None else marks[:, :, None]
        return semantic.join(self._attend(places, allowed), windows)

    def _shifted(self, map: Tensor, windows: Partition, valid: Tensor | None, shift: tuple[int, int]) -> Tensor:
        """Windows of the map that is rolled over its edges, each side of a seam by itself."""
        high, wide = windows.padding
        padded = functional.pad(map, (0, 0, 0, wide, 0, high)) if high or wide else map
        whole = Partition(padded.shape[1], padded.shape[2], self.window)
        back = (-shift[0], -shift[1])
        side = _seams(whole, shift, map.device)
        sides = semantic.split(side[None], whole)[0]
        allowed = sides[..., :, None] == sides[..., None, :]
        if valid is not None or windows.padding != (0, 0):
            marks = map.new_ones(map.shape[:3], dtype=torch.bool) if valid is None else valid
            marks = functional.pad(marks, (0, wide, 0, high))
            allowed = allowed & semantic.split(marks.roll(back, dims=(1, 2)), whole)[0][:, :, None]
        places, _ = semantic.split(padded.roll(back, dims=(1, 2)), whole)
        mixed = semantic.join(self._attend(places, allowed), whole).roll(shift, dims=(1, 2))
        return mixed[:, : windows.height, : windows.width]

    def _attend(self, places: Tensor, allowed: Tensor | None) -> Tensor:
        """Attention within each window; `allowed` marks the keys of every query."""
        windows = places.shape[1]
        q, k, v = rearrange(
            self.qkv(places), "i w n (three heads d) -> three i (w heads) n d", three=3, heads=self.heads
        )
        bias = rearrange(self.bias[self._apart], "n m heads -> 1 1 heads n m").to(q.dtype)
        if allowed is not None:
            allowed = (allowed | ~allowed.any(dim=-1, keepdim=True))[:, :, None]
            bias = torch.where(allowed, bias, -torch.inf)
        # Windows lie beside heads, so that all images share one mask where they may.
        bias = bias.expand(-1, windows, -1, -1, -1).flatten(1, 2)
        mixed = attend(q, k, v, attn_mask=bias)
        return self.proj(rearrange(mixed, "i (w heads) n d -> i w n (heads d)", heads=self.heads))


class _Merging(nn.Module):
    """Two by two places become one, of twice the channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)
        start_anew(self)

    def forward(self, stage: SwinMap) -> SwinMap:
        map = stage.features if stage.valid is None else torch.where(stage.valid[..., None], stage.features, 0.0)
        odd = map.shape[1] % 2, map.shape[2] % 2
        if any(odd):
            map = functional.pad(map, (0, 0, 0, odd[1], 0, odd[0]))
        merged = rearrange(map, "i (h down) (w across) c -> i h w (across down c)", down=2, across=2)
        return SwinMap(self.reduction(self.norm(merged)), _halved(stage.valid))


class _Stem(nn.Module):
    """Two convolutions, each of which halves the image."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.steps = nn.ModuleList(_halving(*sides) for sides in ((channels, width // 2), (width // 2, width)))

    def forward(self, images: Tensor, valid: Tensor | None) -> SwinMap:
        for step in self.steps:
            # What is no part of the image is 0 to every convolution, as what is beyond the edge.
            images = step(images if valid is None else torch.where(valid[:, None], images, 0.0))
            valid = _halved(valid)
        map = rearrange(images, "i c h w -> i h w c")
        return SwinMap(map if valid is None else torch.where(valid[..., None], map, 0.0), valid)


class _Stage(nn.Module):
    """Layers of one width."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, stage: SwinMap) -> SwinMap:
        map = stage.features
        for layer in self.layers:
            map = layer(map, valid=stage.valid)
        return SwinMap(map, stage.valid)


class Swin(nn.Module):
    """A Swin transformer with a convolutional stem, whose third stage may run on semantic tokens (STViT-R).

    Images of any size will do. A call gives the maps of the four stages; `SwinClassifier` and `SwinBackbone` go on from
    there.

    Attributes:
        width: Channels of the first stage; each stage has twice those of the one before.
        plan: The plan of semantic tokens; None without any.
        stem: The stem.
        stages: Layers of each stage.
        merging: What is between stages.

    Args:
        width: Channels of the first stage.
        depths: Blocks of each stage; a multiple of six in the third, if there are semantic tokens.
        heads: Attention heads of each stage.
        window: Rows and columns of the windows of attention.
        plan: How semantic tokens come about; None for a third stage of Swin.
        drop_path: Stochastic depth of the last layer; it grows evenly from 0.
        channels: Of an image.

    Raises:
        TokenExitError: If units do not divide the third stage, heads do not divide a width, `window` are not whole
            numbers from 1 up, or `drop_path` is no share.
    """

    def __init__(
        self,
        *,
        width: int = 96,
        depths: tuple[int, int, int, int] = (2, 2, 18, 2),
        heads: tuple[int, int, int, int] = (3, 6, 12, 24),
        window: tuple[int, int] = (7, 7),
        plan: SemanticPlan | None = stvit_r(),
        drop_path: float = 0.0,
        channels: int = 3,
    ) -> None:
        super().__init__()
        require(0 <= drop_path < 1, "drop_path", "be a share in [0, 1)", drop_path)
        Partition(1, 1, window)  # raises if `window` is none
        units = plan is None or depths[2] % _UNIT == 0
        require(units, "depths", f"have a multiple of {_UNIT} blocks in the third stage", depths)
        self.width, self.window, self.plan = width, window, plan
        self.stem = _Stem(channels, width)
        self.stages = nn.ModuleList(
            _Stage(_layers(depth, wide, count, window, plan if number == 2 else None))
            for number, (depth, wide, count) in enumerate(zip(depths, self.widths, heads, strict=True))
        )
        self.merging = nn.ModuleList(_Merging(width * 2**stage) for stage in range(3))
        blocks = [layer for layer in self.modules() if isinstance(layer, SwinBlock | CrossBlock)]
        for number, block in enumerate(blocks):
            block.drop.rate = drop_path * number / max(1, len(blocks) - 1)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of the maps of the four stages."""
        return tuple(self.width * 2**stage for stage in range(4))

    def forward(
        self,
        images: Float[Tensor, "images channels height width"],
        *,
        valid: Bool[Tensor, "images height width"] | None = None,
    ) -> tuple[SwinMap, ...]:
        """One pass.

        Args:
            images: The images.
            valid: Which pixels are of the image and not padding, where a batch holds images of several sizes; all, if
                left out. What padding holds changes nothing; but in training, it counts in the statistics of the stem's
                batch norms, as zeros do.

        Returns:
            The maps of the four stages, at a quarter, an eighth, a sixteenth and a thirty-second of the size, rounded
            up. They are not normed.

        Raises:
            TokenExitError: If `valid` is not of the size of the images, or not boolean.
        """
        if valid is not None:
            require_marks(valid, "valid")
            wanted = (len(images), *images.shape[2:])
            require(tuple(valid.shape) == wanted, "valid", f"have shape {wanted}", f"shape {tuple(valid.shape)}")
        stage = self.stem(images, valid)
        maps = []
        for number, layers in enumerate(self.stages):
            stage = layers(stage if number == 0 else self.merging[number - 1](stage))
            maps.append(stage)
        return tuple(maps)


class SwinClassifier(nn.Module):
    """Classifies images by the mean of the last map.

    Attributes:
        swin: The network.
        norm: The final norm.
        head: The linear layer that gives the classes.

    Args:
        swin: The network.
        classes: How many classes there are.
    """

    def __init__(self, swin: Swin, /, *, classes: int) -> None:
        super().__init__()
        self.swin = swin
        self.norm = nn.LayerNorm(swin.widths[-1])
        self.head = nn.Linear(swin.widths[-1], classes)
        start_anew(self.head)

    def forward(
        self,
        images: Float[Tensor, "images channels height width"],
        *,
        valid: Bool[Tensor, "images height width"] | None = None,
    ) -> Float[Tensor, "images classes"]:
        """One pass.

        Args:
            images: The images.
            valid: Which pixels are of the image, as for `Swin`.

        Returns:
            Class scores.
        """
        last = self.swin(images, valid=valid)[-1]
        map = self.norm(last.features)
        if last.valid is None:
            return self.head(reduce(map, "i h w c -> i c", "mean"))
        share = last.valid.to(map.dtype)[..., None]
        summed = reduce(map * share, "i h w c -> i c", "sum")
        return self.head(summed / reduce(share, "i h w 1 -> i 1", "sum").clamp(min=1))


class SwinBackbone(nn.Module):
    """The maps of four stages, each with a norm of its own: for decoders and detectors.

    Attributes:
        swin: The network.
        norms: A norm for each stage.

    Args:
        swin: The network.
    """

    def __init__(self, swin: Swin, /) -> None:
        super().__init__()
        self.swin = swin
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in swin.widths)

    def forward(
        self,
        images: Float[Tensor, "images channels height width"],
        *,
        valid: Bool[Tensor, "images height width"] | None = None,
    ) -> tuple[Float[Tensor, "images channels_of_stage height_of_stage width_of_stage"], ...]:
        """One pass.

        Args:
            images: The images.
            valid: Which pixels are of the image, as for `Swin`.

        Returns:
            Four maps, channels first; 0 where they are not of the image.
        """
        maps = []
        for norm, stage in zip(self.norms, self.swin(images, valid=valid), strict=True):
            map = norm(stage.features)
            map = map if stage.valid is None else torch.where(stage.valid[..., None], map, 0.0)
            maps.append(rearrange(map, "i h w c -> i c h w"))
        return tuple(maps)


def swin_small(
    *, window: tuple[int, int] = (7, 7), plan: SemanticPlan | None = stvit_r(), drop_path: float = 0.0
) -> Swin:
    """Swin-S, with semantic tokens: 49.6 million parameters, 5.83 G multiply-adds at 224 with a head of 1000 classes.

    Args:
        window: Rows and columns of the windows of attention.
        plan: How semantic tokens come about; None for none.
        drop_path: As for `Swin`.

    Returns:
        The network, with new weights.

    Raises:
        TokenExitError: If `drop_path` is no share.
    """
    return Swin(window=window, plan=plan, drop_path=drop_path)


def swin_base(
    *, window: tuple[int, int] = (7, 7), plan: SemanticPlan | None = stvit_r(), drop_path: float = 0.0
) -> Swin:
    """Swin-B, with semantic tokens: 87.8 million parameters, 10.26 G multiply-adds at 224 with a head of 1000 classes.

    Args:
        window: Rows and columns of the windows of attention.
        plan: How semantic tokens come about; None for none.
        drop_path: As for `Swin`.

    Returns:
        The network, with new weights.

    Raises:
        TokenExitError: If `drop_path` is no share.
    """
    return Swin(width=128, heads=(4, 8, 16, 32), window=window, plan=plan, drop_path=drop_path)


def _halving(take: int, give: int) -> nn.Sequential:
    conv = nn.Conv2d(take, give, 3, stride=2, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(give), nn.Hardswish())


def _layers(depth: int, width: int, heads: int, window: tuple[int, int], plan: SemanticPlan | None) -> list[nn.Module]:
    if plan is None:
        half = (window[0] // 2, window[1] // 2)
        return [SwinBlock(width, heads, window=window, shift=half if one % 2 else (0, 0)) for one in range(depth)]
    layers: list[nn.Module] = []
    for _ in range(depth // _UNIT):
        layers += [SwinBlock(width, heads, window=window), SemanticUnit(plan, width=width, heads=heads)]
    return layers


def _distances(window: tuple[int, int]) -> Tensor:
    """Which row of the bias belongs to each pair of places of a window."""
    rows, columns = (torch.arange(side) for side in window)
    row, column = (grid.flatten() for grid in torch.meshgrid(rows, columns, indexing="ij"))
    down = row[:, None] - row + window[0] - 1
    across = column[:, None] - column + window[1] - 1
    return down * (2 * window[1] - 1) + across


def _seams(windows: Partition, shift: tuple[int, int], device: torch.device) -> Tensor:
    """On which side of the seams every place of the rolled map is: what was apart must not meet."""
    rows, columns = (torch.arange(side, device=device) for side in (windows.height, windows.width))
    return (rows >= windows.height - shift[0])[:, None] * 2 + (columns >= windows.width - shift[1])


def _halved(valid: Tensor | None) -> Tensor | None:
    """Which of two by two places has any that is valid."""
    if valid is None:
        return None
    return functional.max_pool2d(valid[:, None].float(), 2, ceil_mode=True)[:, 0] > 0
