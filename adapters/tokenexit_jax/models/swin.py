"""Swin transformers in JAX whose third stage runs on semantic tokens: STViT-R (CVPR 2023), for images of any size.

Swin (ICCV 2021) has four stages of blocks that attend within windows, every other one within shifted windows. In
STViT-R, the third stage is made of units of six layers: one block of Swin, two that make semantic tokens, two among
them, and one that recovers the map. A convolutional stem comes first. Windows may hang over the edge of a map: what is
padding there is not attended to.

What is here holds sizes and no weights: these lie in one flat dictionary, under the names and in the layouts of
PyTorch's `state_dict`, the statistics of the stem's batch norms among them. Images have their channels last.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import numpy as np
from einops import rearrange, reduce
from jax import Array, lax
from jax import numpy as jnp
from jaxtyping import Bool, Float, Int

from tokenexit import semantic
from tokenexit.adapting import is_whole, require_marks
from tokenexit.errors import require
from tokenexit.semantic import Partition, SemanticPlan, stvit_r
from tokenexit_jax._given import new_keys, require_array, require_count
from tokenexit_jax._layers import (
    Weights,
    batch_norm,
    batch_norm_in_training,
    cleared,
    drop_path,
    keys_of,
    layer_norm,
    linear,
    mlp,
    named,
    new_batch_norm,
    new_norm,
    part,
    start_linear,
)
from tokenexit_jax.semantic.layers import SemanticUnit, require_heads, require_share

__all__ = ["Swin", "SwinBackbone", "SwinBlock", "SwinClassifier", "SwinMap", "swin_base", "swin_small"]

_UNIT = 6


class SwinMap(NamedTuple):
    """What a stage gives.

    Attributes:
        features: The map.
        valid: Which of its places are of the image; None for all.
    """

    features: Float[Array, "images height width channels"]
    valid: Bool[Array, "images height width"] | None


@dataclass(frozen=True)
class SwinBlock:
    """Attention within windows, with a bias that depends on how far apart two places are; then an MLP.

    Its weights: the norm before attention, `norm1`; projections `qkv` and `proj`; the bias of each distance and head,
    `bias`, `((2 rows - 1) (2 columns - 1), heads)`; the norm before the MLP, `norm2`; the MLP, `mlp.0` and `mlp.2`.

    Attributes:
        width: Channels of a token.
        heads: Attention heads.
        window: Rows and columns of a window.
        shift: By how many rows and columns windows are shifted; along an axis that has one window alone, by none.
        drop_path: Stochastic depth, for each image.

    Raises:
        TokenExitError: If heads do not divide the width, `window` are not whole numbers from 1 up, or `drop_path` is no
            share.
    """

    width: int
    heads: int
    window: tuple[int, int] = field(default=(7, 7), kw_only=True)
    shift: tuple[int, int] = field(default=(0, 0), kw_only=True)
    drop_path: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        require_heads(self.heads, self.width)
        require_share(self.drop_path)
        Partition(1, 1, self.window)  # raises if `window` is none

    def init(self, key: Array, /) -> dict[str, Array]:
        """New weights, as ViTs start them.

        Args:
            key: Random key.

        Returns:
            The weights by name, float32.
        """
        width, (high, wide) = self.width, self.window
        sizes = {
            "qkv": (width, 3 * width), "proj": (width, width), "mlp.0": (width, 4 * width), "mlp.2": (4 * width, width),
        }  # fmt: skip
        of_bias, *keys = new_keys(key, 1 + len(sizes))
        distances = (2 * high - 1) * (2 * wide - 1)
        new = {"bias": 0.02 * jax.random.normal(of_bias, (distances, self.heads))}
        new |= new_norm("norm1", width) | new_norm("norm2", width)
        for one, (name, (take, give)) in zip(keys, sizes.items(), strict=True):
            new |= start_linear(one, name, take, give)
        return new

    def __call__(
        self,
        weights: Weights,
        map: Float[Array, "images height width channels"],
        /,
        *,
        valid: Bool[Array, "images height width"] | None = None,
        key: Array | None = None,
    ) -> Float[Array, "images height width channels"]:
        """One pass.

        Args:
            weights: The weights, as `init` makes them.
            map: The features; finite everywhere.
            valid: Which places may be attended to; all, if left out.
            key: Random key of stochastic depth; without one, nothing is dropped.

        Returns:
            The features, of the same size.
        """
        windows = Partition(map.shape[1], map.shape[2], self.window)
        shift = (self.shift[0] if windows.rows > 1 else 0, self.shift[1] if windows.columns > 1 else 0)
        normed = layer_norm(weights, "norm1", map)
        if shift == (0, 0):
            mixed = self._windowed(weights, normed, windows, valid)
        else:
            mixed = self._shifted(weights, normed, windows, valid, shift)
        of_attention, of_mlp = keys_of(key, 2)
        tokens = map + drop_path(mixed, self.drop_path, of_attention)
        return tokens + drop_path(mlp(weights, "mlp", layer_norm(weights, "norm2", tokens)), self.drop_path, of_mlp)

    def _windowed(self, weights: Weights, map: Array, windows: Partition, valid: Array | None) -> Array:
        places, marks = semantic.split(map, windows, valid=valid)
        allowed = None if marks is None else marks[:, :, None]
        return semantic.join(self._attend(weights, places, allowed), windows)

    def _shifted(
        self, weights: Weights, map: Array, windows: Partition, valid: Array | None, shift: tuple[int, int]
    ) -> Array:
        """Windows of the map that is rolled over its edges, each side of a seam by itself."""
        high, wide = windows.padding
        padded = jnp.pad(map, ((0, 0), (0, high), (0, wide), (0, 0)))
        whole = Partition(padded.shape[1], padded.shape[2], self.window)
        back = (-shift[0], -shift[1])
        sides, _ = semantic.split(_seams(whole, shift)[None], whole)
        allowed = sides[..., :, None] == sides[..., None, :]
        if valid is not None or windows.padding != (0, 0):
            marks = jnp.ones(map.shape[:3], dtype=bool) if valid is None else valid
            marks = jnp.pad(marks, ((0, 0), (0, high), (0, wide)))
            marks, _ = semantic.split(jnp.roll(marks, back, axis=(1, 2)), whole)
            allowed = allowed & marks[:, :, None]
        places, _ = semantic.split(jnp.roll(padded, back, axis=(1, 2)), whole)
        mixed = jnp.roll(semantic.join(self._attend(weights, places, allowed), whole), shift, axis=(1, 2))
        return mixed[:, : windows.height, : windows.width]

    def _attend(self, weights: Weights, places: Array, allowed: Array | None) -> Array:
        """Attention within each window; `allowed` marks the keys of every query."""
        images, windows, _, _ = places.shape
        q, k, v = rearrange(
            linear(weights, "qkv", places), "i w n (three heads d) -> three (i w) n heads d", three=3, heads=self.heads
        )
        bias = rearrange(weights["bias"][_distances(self.window)], "n m heads -> 1 heads n m")
        if allowed is not None:
            allowed = allowed | ~allowed.any(axis=-1, keepdims=True)
            allowed = jnp.broadcast_to(allowed, (images, windows, *allowed.shape[2:]))
            allowed = rearrange(allowed, "i w n m -> (i w) 1 n m")
        mixed = jax.nn.dot_product_attention(q, k, v, bias=bias, mask=allowed)
        return linear(weights, "proj", mixed.reshape(places.shape))


@dataclass(frozen=True)
class Swin:
    """A Swin transformer with a convolutional stem, whose third stage may run on semantic tokens (STViT-R).

    Images of any size will do. A call gives the maps of the four stages; `SwinClassifier` and `SwinBackbone` go on from
    there. Its weights: the convolutions and batch norms of the stem, `stem.steps.0.0`, `stem.steps.0.1` and so on, with
    the statistics of the latter; the layers of each stage, `stages.0.layers.0` and so on; and what is between stages,
    `merging.0` to `merging.2`.

    Attributes:
        width: Channels of the first stage; each stage has twice those of the one before.
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

    width: int = field(default=96, kw_only=True)
    depths: tuple[int, int, int, int] = field(default=(2, 2, 18, 2), kw_only=True)
    heads: tuple[int, int, int, int] = field(default=(3, 6, 12, 24), kw_only=True)
    window: tuple[int, int] = field(default=(7, 7), kw_only=True)
    plan: SemanticPlan | None = field(default=stvit_r(), kw_only=True)
    drop_path: float = field(default=0.0, kw_only=True)
    channels: int = field(default=3, kw_only=True)

    def __post_init__(self) -> None:
        require_share(self.drop_path)
        Partition(1, 1, self.window)  # raises if `window` is none
        require(self.plan is None or isinstance(self.plan, SemanticPlan), "plan", "be a plan or None", repr(self.plan))
        for argument in ("width", "channels"):
            require_count(getattr(self, argument), argument)
        for argument, least in (("depths", 0), ("heads", 1)):
            four = getattr(self, argument)
            whole = isinstance(four, tuple) and len(four) == 4 and all(is_whole(one, least=least) for one in four)
            require(whole, argument, f"be four whole numbers from {least} up, one for each stage", repr(four))
        units = self.plan is None or self.depths[2] % _UNIT == 0
        require(units, "depths", f"have a multiple of {_UNIT} blocks in the third stage", self.depths)
        for heads, width in zip(self.heads, self.widths, strict=True):
            require_heads(heads, width)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of the maps of the four stages."""
        return tuple(self.width * 2**stage for stage in range(4))

    @property
    def stages(self) -> tuple[tuple[SwinBlock | SemanticUnit, ...], ...]:
        """Layers of each stage."""
        last = max(1, sum(self.depths) - 1)
        rates = iter([self.drop_path * number / last for number in range(sum(self.depths))])
        stages = []
        for number, (depth, width, heads) in enumerate(zip(self.depths, self.widths, self.heads, strict=True)):
            layers: list[SwinBlock | SemanticUnit] = []
            if number == 2 and self.plan is not None:
                for _ in range(depth // _UNIT):
                    layers.append(SwinBlock(width, heads, window=self.window, drop_path=next(rates)))
                    five = tuple(next(rates) for _ in range(_UNIT - 1))
                    layers.append(SemanticUnit(self.plan, width=width, heads=heads, drop_path=five))
            else:
                half = (self.window[0] // 2, self.window[1] // 2)
                for one in range(depth):
                    shift = half if one % 2 else (0, 0)
                    block = SwinBlock(width, heads, window=self.window, shift=shift, drop_path=next(rates))
                    layers.append(block)
            stages.append(tuple(layers))
        return tuple(stages)

    def init(self, key: Array, /) -> dict[str, Array]:
        """New weights, as ViTs start them; the stem's are drawn as PyTorch draws those of convolutions.

        Args:
            key: Random key.

        Returns:
            The weights by name, float32; the statistics of batch norms among them.
        """
        of_stem, of_merging, of_stages = new_keys(key, 3)
        new: dict[str, Array] = {}
        sides = ((self.channels, self.width // 2), (self.width // 2, self.width))
        for number, ((take, give), one) in enumerate(zip(sides, new_keys(of_stem), strict=True)):
            bound = (9 * take) ** -0.5
            kernel = jax.random.uniform(one, (give, take, 3, 3), minval=-bound, maxval=bound)
            new |= {f"stem.steps.{number}.0.weight": kernel} | new_batch_norm(f"stem.steps.{number}.1", give)
        for number, one in enumerate(new_keys(of_merging, 3)):
            wide, name = self.widths[number], f"merging.{number}"
            new |= new_norm(f"{name}.norm", 4 * wide)
            new |= start_linear(one, f"{name}.reduction", 4 * wide, 2 * wide, bias=False)
        layers = {
            f"stages.{stage}.layers.{index}": layer
            for stage, several in enumerate(self.stages)
            for index, layer in enumerate(several)
        }
        for one, (name, layer) in zip(new_keys(of_stages, len(layers)), layers.items(), strict=True):
            new |= named(layer.init(one), name)
        return new

    def __call__(
        self,
        weights: Weights,
        images: Float[Array, "images height width channels"],
        /,
        *,
        valid: Bool[Array, "images height width"] | None = None,
        key: Array | None = None,
    ) -> tuple[SwinMap, ...]:
        """One pass, in which the stem's batch norms use their running statistics.

        Args:
            weights: The weights, as `init` makes them or PyTorch's `state_dict` holds them.
            images: The images, channels last.
            valid: Which pixels are of the image and not padding, where a batch holds images of several sizes; all, if
                left out. What padding holds changes nothing.
            key: Random key of stochastic depth; without one, nothing is dropped.

        Returns:
            The maps of the four stages, at a quarter, an eighth, a sixteenth and a thirty-second of the size, rounded
            up. They are not normed.

        Raises:
            TokenExitError: If the images have not so many channels, or not last, or `valid` is not of their size, or
                not boolean.
        """
        return self._run(weights, images, valid, key, _as_learned)[0]

    def in_training(
        self,
        weights: Weights,
        images: Float[Array, "images height width channels"],
        /,
        *,
        valid: Bool[Array, "images height width"] | None = None,
        key: Array | None = None,
    ) -> tuple[tuple[SwinMap, ...], dict[str, Array]]:
        """As a call, but the stem's batch norms take their statistics from the images at hand, and learn them.

        Args:
            weights: The weights.
            images: The images, channels last.
            valid: Which pixels are of the image. Padding counts in the statistics, as zeros do.
            key: Random key of stochastic depth; without one, nothing is dropped.

        Returns:
            The maps, and the running statistics by name after this batch, which are constants to gradients:
            `weights | statistics` is what comes next.

        Raises:
            TokenExitError: If the images have not so many channels, or not last, or `valid` is not of their size, or
                not boolean.
        """
        return self._run(weights, images, valid, key, _learning)

    def _run(
        self, weights: Weights, images: Array, valid: Array | None, key: Array | None, norm: "_Norm"
    ) -> tuple[tuple[SwinMap, ...], dict[str, Array]]:
        shape = f"have shape (images, height, width, {self.channels})"
        require_array(images, "images", "images", "height", "width", "channels")
        require(images.shape[-1] == self.channels, "images", shape, f"shape {images.shape}")
        if valid is not None:
            require_array(valid, "valid")
            require_marks(valid, "valid")
            require(valid.shape == images.shape[:3], "valid", f"have shape {images.shape[:3]}", f"shape {valid.shape}")
        stage, statistics = _stem(part(weights, "stem"), images, valid, norm)
        stages, maps = self.stages, []
        keys = iter(keys_of(key, sum(len(layers) for layers in stages)))
        for number, layers in enumerate(stages):
            stage = stage if number == 0 else _merged(part(weights, f"merging.{number - 1}"), stage)
            own, map = part(weights, f"stages.{number}"), stage.features
            for index, layer in enumerate(layers):
                map = layer(part(own, f"layers.{index}"), map, valid=stage.valid, key=next(keys))
            stage = SwinMap(map, stage.valid)
            maps.append(stage)
        return tuple(maps), named(statistics, "stem")


@dataclass(frozen=True)
class SwinClassifier:
    """Classifies images by the mean of the last map.

    Its weights: those of the network, `swin`, the final norm, `norm`, and the linear layer that gives the classes,
    `head`.

    Attributes:
        swin: The network.
        classes: How many classes there are.
    """

    swin: Swin
    classes: int = field(kw_only=True)

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            TokenExitError: If `swin` is no `Swin`, or `classes` no whole number from 1 up.
        """
        require(isinstance(self.swin, Swin), "swin", "be a Swin", type(self.swin).__name__)
        require_count(self.classes, "classes")

    def init(self, key: Array, /) -> dict[str, Array]:
        """New weights, as for `Swin`.

        Args:
            key: Random key.

        Returns:
            The weights by name, float32.
        """
        of_swin, of_head = new_keys(key)
        last = self.swin.widths[-1]
        new = named(self.swin.init(of_swin), "swin") | new_norm("norm", last)
        return new | start_linear(of_head, "head", last, self.classes)

    def __call__(
        self,
        weights: Weights,
        images: Float[Array, "images height width channels"],
        /,
        *,
        valid: Bool[Array, "images height width"] | None = None,
        key: Array | None = None,
    ) -> Float[Array, "images classes"]:
        """One pass.

        Args:
            weights: The weights.
            images: The images, channels last.
            valid: Which pixels are of the image, as for `Swin`.
            key: Random key of stochastic depth; without one, nothing is dropped.

        Returns:
            Class scores.
        """
        return self._read(weights, self.swin(part(weights, "swin"), images, valid=valid, key=key))

    def in_training(
        self,
        weights: Weights,
        images: Float[Array, "images height width channels"],
        /,
        *,
        valid: Bool[Array, "images height width"] | None = None,
        key: Array | None = None,
    ) -> tuple[Float[Array, "images classes"], dict[str, Array]]:
        """As a call, but batch norms learn, as for `Swin.in_training`.

        Args:
            weights: The weights.
            images: The images, channels last.
            valid: Which pixels are of the image.
            key: Random key of stochastic depth; without one, nothing is dropped.

        Returns:
            Class scores, and the running statistics by name after this batch.
        """
        maps, statistics = self.swin.in_training(part(weights, "swin"), images, valid=valid, key=key)
        return self._read(weights, maps), named(statistics, "swin")

    def _read(self, weights: Weights, maps: tuple[SwinMap, ...]) -> Array:
        last = maps[-1]
        map = layer_norm(weights, "norm", last.features)
        if last.valid is None:
            return linear(weights, "head", reduce(map, "i h w c -> i c", "mean"))
        share = last.valid.astype(map.dtype)[..., None]
        summed = reduce(map * share, "i h w c -> i c", "sum")
        return linear(weights, "head", summed / jnp.maximum(reduce(share, "i h w 1 -> i 1", "sum"), 1))


@dataclass(frozen=True)
class SwinBackbone:
    """The maps of four stages, each with a norm of its own: for decoders and detectors.

    Its weights: those of the network, `swin`, and the norms, `norms.0` to `norms.3`.

    Attributes:
        swin: The network.
    """

    swin: Swin

    def __post_init__(self) -> None:
        """Check the field.

        Raises:
            TokenExitError: If `swin` is no `Swin`.
        """
        require(isinstance(self.swin, Swin), "swin", "be a Swin", type(self.swin).__name__)

    def init(self, key: Array, /) -> dict[str, Array]:
        """New weights, as for `Swin`.

        Args:
            key: Random key.

        Returns:
            The weights by name, float32.
        """
        new = named(self.swin.init(key), "swin")
        for number, width in enumerate(self.swin.widths):
            new |= new_norm(f"norms.{number}", width)
        return new

    def __call__(
        self,
        weights: Weights,
        images: Float[Array, "images height width channels"],
        /,
        *,
        valid: Bool[Array, "images height width"] | None = None,
        key: Array | None = None,
    ) -> tuple[Float[Array, "images height_of_stage width_of_stage channels_of_stage"], ...]:
        """One pass.

        Args:
            weights: The weights.
            images: The images, channels last.
            valid: Which pixels are of the image, as for `Swin`.
            key: Random key of stochastic depth; without one, nothing is dropped.

        Returns:
            Four maps, channels last; 0 where they are not of the image.
        """
        return _normed(weights, self.swin(part(weights, "swin"), images, valid=valid, key=key))

    def in_training(
        self,
        weights: Weights,
        images: Float[Array, "images height width channels"],
        /,
        *,
        valid: Bool[Array, "images height width"] | None = None,
        key: Array | None = None,
    ) -> tuple[tuple[Float[Array, "images height_of_stage width_of_stage channels_of_stage"], ...], dict[str, Array]]:
        """As a call, but batch norms learn, as for `Swin.in_training`.

        Args:
            weights: The weights.
            images: The images, channels last.
            valid: Which pixels are of the image.
            key: Random key of stochastic depth; without one, nothing is dropped.

        Returns:
            Four maps, and the running statistics by name after this batch.
        """
        maps, statistics = self.swin.in_training(part(weights, "swin"), images, valid=valid, key=key)
        return _normed(weights, maps), named(statistics, "swin")


def swin_small(
    *, window: tuple[int, int] = (7, 7), plan: SemanticPlan | None = stvit_r(), drop_path: float = 0.0
) -> Swin:
    """Swin-S, with semantic tokens: 49.6 million parameters, 5.83 G multiply-adds at 224 with a head of 1000 classes.

    Args:
        window: Rows and columns of the windows of attention.
        plan: How semantic tokens come about; None for none.
        drop_path: As for `Swin`.

    Returns:
        The network.

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
        The network.

    Raises:
        TokenExitError: If `drop_path` is no share.
    """
    return Swin(width=128, heads=(4, 8, 16, 32), window=window, plan=plan, drop_path=drop_path)


_Norm = Callable[[Weights, str, Array], tuple[Array, dict[str, Array]]]


def _as_learned(weights: Weights, name: str, x: Array) -> tuple[Array, dict[str, Array]]:
    return batch_norm(weights, name, x), {}


def _learning(weights: Weights, name: str, x: Array) -> tuple[Array, dict[str, Array]]:
    return batch_norm_in_training(weights, name, x, jnp.ones(x.shape[:-1], dtype=bool))


def _stem(weights: Weights, images: Array, valid: Array | None, norm: _Norm) -> tuple[SwinMap, dict[str, Array]]:
    """Two convolutions, each of which halves the image; and what their norms have learned."""
    statistics: dict[str, Array] = {}
    for step in ("steps.0", "steps.1"):
        # What is no part of the image is 0 to every convolution, as what is beyond the edge.
        images = lax.conv_general_dilated(
            cleared(images, valid), weights[f"{step}.0.weight"], window_strides=(2, 2), padding=((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "OIHW", "NHWC"),
        )  # fmt: skip
        images, learned = norm(weights, f"{step}.1", images)
        images, valid = jax.nn.hard_swish(images), _halved(valid)
        statistics |= learned
    return SwinMap(cleared(images, valid), valid), statistics


def _merged(weights: Weights, stage: SwinMap) -> SwinMap:
    """Two by two places become one, of twice the channels."""
    map = _even(cleared(stage.features, stage.valid))
    merged = rearrange(map, "i (h down) (w across) c -> i h w (across down c)", down=2, across=2)
    return SwinMap(linear(weights, "reduction", layer_norm(weights, "norm", merged)), _halved(stage.valid))


def _normed(weights: Weights, maps: tuple[SwinMap, ...]) -> tuple[Array, ...]:
    normed = (layer_norm(weights, f"norms.{number}", stage.features) for number, stage in enumerate(maps))
    return tuple(cleared(map, stage.valid) for map, stage in zip(normed, maps, strict=True))


def _even(map: Array) -> Array:
    """An even number of rows and columns, with zeros, or False, behind."""
    odd = [(0, side % 2) for side in map.shape[1:3]]
    return jnp.pad(map, ((0, 0), *odd, *[(0, 0)] * (map.ndim - 3)))


def _halved(valid: Array | None) -> Array | None:
    """Which of two by two places has any that is valid."""
    if valid is None:
        return None
    return reduce(_even(valid), "i (h down) (w across) -> i h w", "any", down=2, across=2)


def _distances(window: tuple[int, int]) -> Int[np.ndarray, "places places"]:
    """Which row of the bias belongs to each pair of places of a window."""
    row, column = (grid.flatten() for grid in np.indices(window))
    down = row[:, None] - row + window[0] - 1
    across = column[:, None] - column + window[1] - 1
    return down * (2 * window[1] - 1) + across


def _seams(windows: Partition, shift: tuple[int, int]) -> Int[Array, "height width"]:
    """On which side of the seams every place of the rolled map is: what was apart must not meet."""
    rows, columns = jnp.arange(windows.height), jnp.arange(windows.width)
    return (rows >= windows.height - shift[0])[:, None] * 2 + (columns >= windows.width - shift[1])[None, :]
