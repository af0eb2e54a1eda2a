"""Layers of semantic tokens (STViT, CVPR 2023) in JAX: a few tokens that stand for a map, and the map recovered.

Pooled tokens look at what lies around them, and at the whole map; then they attend to each other, which is cheap, for
they are few; in the end every place of the map asks them. `tokenexit.semantic` has the geometry and the plans; maps are
`(images, height, width, channels)`, and may be of any size. A map may come with marks of the places that hold a token:
what the others hold is never attended to, whatever it is.

A layer here holds sizes and no weights: `init` makes these, and a call takes them. They lie in one flat dictionary,
under the names and in the layouts of PyTorch's `state_dict` of the same layer, so that what was trained in one
framework is read in the other without any renaming.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Literal

import jax
from einops import rearrange
from jax import Array
from jax import numpy as jnp
from jaxtyping import Bool, Float

from tokenexit import semantic
from tokenexit.adapting import aligned, is_number, is_whole
from tokenexit.errors import require
from tokenexit.semantic import Partition, SemanticPlan, stvit_r
from tokenexit_jax._given import new_keys, require_array, require_count
from tokenexit_jax._layers import (
    Weights,
    cleared,
    drop_path,
    keys_of,
    layer_norm,
    linear,
    mlp,
    named,
    new_norm,
    part,
    start_linear,
)
from tokenexit_jax.pytrees import register

__all__ = ["CrossBlock", "Recovery", "Semantic", "SemanticMixing", "SemanticTokens", "SemanticUnit"]


@dataclass(frozen=True)
class Semantic:
    """Semantic tokens of some maps. A pytree, of which `grid` is static.

    Attributes:
        tokens: The tokens of each window, row by row.
        valid: Which of them stand for any place of the map; None for all.
        grid: The geometry of the map that they make.
        prefix: Tokens that are of no window (cls, registers), if there are any.
    """

    tokens: Float[Array, "images windows pooled width"]
    valid: Bool[Array, "images windows pooled"] | None
    grid: Partition
    prefix: Float[Array, "images prefix width"] | None = None

    @property
    def map(self) -> Float[Array, "images height width channels"]:
        """The semantic tokens as a map."""
        return semantic.join(self.tokens, self.grid)

    @property
    def valid_map(self) -> Bool[Array, "images height width"] | None:
        """Which of its places stand for any of the map; None for all."""
        return None if self.valid is None else semantic.join(self.valid, self.grid)

    def to_row(self) -> tuple[Float[Array, "images tokens width"], Bool[Array, "images tokens"] | None]:
        """All tokens of an image in one row, prefix tokens first, then window by window.

        Returns:
            The tokens, and which of them are valid; None for all.
        """
        tokens = rearrange(self.tokens, "images windows pooled width -> images (windows pooled) width")
        valid = (
            None if self.valid is None else rearrange(self.valid, "images windows pooled -> images (windows pooled)")
        )
        return _together([*_parts(self.prefix), (tokens, valid)])

    def from_row(self, row: Float[Array, "images tokens width"], /) -> "Semantic":
        """Semantic tokens of the same geometry.

        Args:
            row: Tokens in the order of `to_row`.

        Returns:
            Semantic tokens with these values.
        """
        prefix = None if self.prefix is None else row[:, : self.prefix.shape[1]]
        own = row if self.prefix is None else row[:, self.prefix.shape[1] :]
        return replace(self, tokens=own.reshape(self.tokens.shape), prefix=prefix)


register(Semantic, leaves=("tokens", "valid", "prefix"))


@dataclass(frozen=True)
class CrossBlock:
    """A pre-norm block with tokens that attend to others: attention, then an MLP on each token.

    Its weights: the norm before attention, of queries and keys alike, `norm1`; projections `q`, `kv` (keys, then
    values) and `proj`; the norm before the MLP, `norm2`; the MLP, `mlp.0` and `mlp.2`; and layer-scale of attention and
    MLP, `scale1` and `scale2`.

    Attributes:
        width: Channels of a token.
        heads: Attention heads.
        hidden: Channels inside the MLP; four times the width if None.
        layer_scale: What attention and MLP are multiplied with at first; None for no such scale.
        epsilon: What the norms add to the variance.
        drop_path: Stochastic depth, for each group of tokens that attends.

    Raises:
        TokenExitError: If heads do not divide the width, or `drop_path` is no share.
    """

    width: int
    heads: int
    hidden: int | None = field(default=None, kw_only=True)
    layer_scale: float | None = field(default=1e-5, kw_only=True)
    epsilon: float = field(default=1e-5, kw_only=True)
    drop_path: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        require_heads(self.heads, self.width)
        require_share(self.drop_path)
        _require_sizes(self.hidden, self.epsilon)
        scale = self.layer_scale
        number = scale is None or is_number(scale)
        require(number, "layer_scale", "be a number or None", repr(scale))

    @property
    def inside(self) -> int:
        """Channels inside the MLP."""
        return 4 * self.width if self.hidden is None else self.hidden

    def init(self, key: Array, /) -> dict[str, Array]:
        """New weights, as ViTs start them.

        Args:
            key: Random key.

        Returns:
            The weights by name, float32.
        """
        width, hidden = self.width, self.inside
        sizes = {
            "q": (width, width), "kv": (width, 2 * width), "proj": (width, width),
            "mlp.0": (width, hidden), "mlp.2": (hidden, width),
        }  # fmt: skip
        new = new_norm("norm1", width) | new_norm("norm2", width)
        for one, (name, (wide, out)) in zip(new_keys(key, len(sizes)), sizes.items(), strict=True):
            new |= start_linear(one, name, wide, out)
        if self.layer_scale is None:
            return new
        return new | {name: jnp.full(width, float(self.layer_scale)) for name in ("scale1", "scale2")}

    def __call__(
        self,
        weights: Weights,
        queries: Float[Array, "groups queries width"],
        keys: Float[Array, "groups keys width"] | None = None,
        /,
        *,
        valid: Bool[Array, "groups keys"] | None = None,
        onto: Float[Array, "groups queries width"] | None = None,
        key: Array | None = None,
    ) -> Float[Array, "groups queries width"]:
        """One pass.

        Args:
            weights: The weights, as `init` makes them.
            queries: The tokens that attend.
            keys: The tokens that they attend to; themselves if left out.
            valid: Which of these may be attended to; all, if left out. A group in which there is none attends to all.
            onto: What is added to; the queries if left out.
            key: Random key of stochastic depth; without one, nothing is dropped.

        Returns:
            The tokens that have attended.
        """
        normed = layer_norm(weights, "norm1", queries, epsilon=self.epsilon)
        seen = normed if keys is None else layer_norm(weights, "norm1", keys, epsilon=self.epsilon)
        q = rearrange(linear(weights, "q", normed), "groups n (heads d) -> groups n heads d", heads=self.heads)
        k, v = rearrange(
            linear(weights, "kv", seen), "groups n (two heads d) -> two groups n heads d", two=2, heads=self.heads
        )
        mask = None if valid is None else (valid | ~valid.any(axis=-1, keepdims=True))[:, None, None]
        mixed = jax.nn.dot_product_attention(q, k, v, mask=mask)
        mixed = linear(weights, "proj", rearrange(mixed, "groups n heads d -> groups n (heads d)"))
        of_attention, of_mlp = keys_of(key, 2)
        tokens = queries if onto is None else onto
        tokens = tokens + drop_path(self._scaled(weights, "scale1", mixed), self.drop_path, of_attention)
        added = mlp(weights, "mlp", layer_norm(weights, "norm2", tokens, epsilon=self.epsilon))
        return tokens + drop_path(self._scaled(weights, "scale2", added), self.drop_path, of_mlp)

    def _scaled(self, weights: Weights, name: str, added: Array) -> Array:
        return added if self.layer_scale is None else added * aligned(weights[name], added.ndim)


@dataclass(frozen=True)
class SemanticTokens:
    """Makes semantic tokens of a map: pooled, then refined by two layers that look at the map.

    The first layer looks at what lies around each window, the second at all of the map, as the plan says. Its weights:
    those of the two layers, `first` and `second`, and learned queries that are added between them, `learned`, if the
    plan has any.

    Attributes:
        plan: How semantic tokens come about.
        width: Channels of a token.
        heads: Attention heads.
        hidden: Channels inside the MLPs; four times the width if None.
        epsilon: What the norms add to the variance.
        drop_path: Stochastic depth of the two layers.

    Raises:
        TokenExitError: If heads do not divide the width, or `drop_path` are no shares.
    """

    plan: SemanticPlan
    width: int = field(kw_only=True)
    heads: int = field(kw_only=True)
    hidden: int | None = field(default=None, kw_only=True)
    epsilon: float = field(default=1e-5, kw_only=True)
    drop_path: tuple[float, float] = field(default=(0.0, 0.0), kw_only=True)

    def __post_init__(self) -> None:
        _require_plan(self.plan)
        require_heads(self.heads, self.width)
        _require_sizes(self.hidden, self.epsilon)
        two = isinstance(self.drop_path, tuple) and len(self.drop_path) == 2
        require(two, "drop_path", "be two shares, one for each layer", repr(self.drop_path))
        for share in self.drop_path:
            require_share(share)

    @property
    def blocks(self) -> tuple[CrossBlock, CrossBlock]:
        """The two layers."""
        first, second = (
            CrossBlock(
                self.width, self.heads,
                hidden=self.hidden, layer_scale=self.plan.layer_scale, epsilon=self.epsilon, drop_path=rate,
            )
            for rate in self.drop_path
        )  # fmt: skip
        return first, second

    def init(self, key: Array, /) -> dict[str, Array]:
        """New weights, as ViTs start them.

        Args:
            key: Random key.

        Returns:
            The weights by name, float32.
        """
        (first, second), learned = self.blocks, self.plan.learned
        of_first, of_second, of_learned = new_keys(key, 3)
        new = named(first.init(of_first), "first") | named(second.init(of_second), "second")
        if learned is None:
            return new
        return new | {"learned": 0.02 * jax.random.normal(of_learned, (1, *learned, self.width))}

    def __call__(
        self,
        weights: Weights,
        map: Float[Array, "images height width channels"],
        /,
        *,
        valid: Bool[Array, "images height width"] | None = None,
        prefix: Float[Array, "images prefix channels"] | None = None,
        key: Array | None = None,
    ) -> Semantic:
        """One pass.

        Args:
            weights: The weights, as `init` makes them.
            map: The features.
            valid: Which places hold a token; all, if left out.
            prefix: Tokens that are of no window. They take part in every layer that looks at all of the map.
            key: Random key of stochastic depth; without one, nothing is dropped.

        Returns:
            The semantic tokens.
        """
        require_array(map, "map", "images", "height", "width", "channels")
        plan, (first, second), (of_first, of_second) = self.plan, self.blocks, keys_of(key, 2)
        windows = plan.windows(*map.shape[1:3])
        tokens, held = semantic.pool(map, windows, to=plan.tokens, by=plan.pool, valid=valid)
        map = cleared(map, valid)
        found = Semantic(tokens, held, windows.pooled(plan.tokens), prefix)
        onto = found if plan.residual else replace(found, tokens=jnp.zeros_like(tokens))
        given = part(weights, "first"), found, onto, map, valid, windows, plan.neighbourhood
        found = self._look(first, *given, of_first)
        if plan.learned is not None:
            found = replace(found, tokens=found.tokens + _resized(weights["learned"], found.grid))
        given = part(weights, "second"), found, found, map, valid, windows, plan.second
        return self._look(second, *given, of_second)

    def _look(
        self,
        block: CrossBlock,
        weights: Weights,
        found: Semantic,
        onto: Semantic,
        map: Array,
        valid: Array | None,
        windows: Partition,
        around: tuple[int, int] | None,
        key: Array | None,
    ) -> Semantic:
        if around is None:
            queries, marks = found.to_row()
            places = _flat(map), None if valid is None else rearrange(valid, "images h w -> images (h w)")
            own = [(queries, marks)] if self.plan.own_keys else _parts(found.prefix)
            keys, marks = _together([*own, places])
            return found.from_row(block(weights, queries, keys, valid=marks, onto=onto.to_row()[0], key=key))
        near, there = semantic.neighbourhoods(map, windows, size=around, edges=self.plan.edges, valid=valid)
        own = [(found.tokens, found.valid)] if self.plan.own_keys else []
        keys, marks = _together([*own, (near, there)])
        marks, onto_each = None if marks is None else _groups(marks), _groups(onto.tokens)
        tokens = block(weights, _groups(found.tokens), _groups(keys), valid=marks, onto=onto_each, key=key)
        return replace(found, tokens=tokens.reshape(found.tokens.shape))


@dataclass(frozen=True)
class SemanticMixing:
    """Semantic tokens attend to each other. Its weights: those of its layer, `block`.

    Attributes:
        width: Channels of a token.
        heads: Attention heads.
        within: Key set: the tokens of their `window`, or those of the whole `map`, prefix tokens among them.
        hidden: Channels inside the MLP; four times the width if None.
        layer_scale: As for `CrossBlock`.
        drop_path: Stochastic depth.

    Raises:
        TokenExitError: If heads do not divide the width, `within` is neither, or `drop_path` is no share.
    """

    width: int
    heads: int
    within: Literal["window", "map"] = field(kw_only=True)
    hidden: int | None = field(default=None, kw_only=True)
    layer_scale: float | None = field(default=1e-5, kw_only=True)
    drop_path: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        require_heads(self.heads, self.width)
        require_share(self.drop_path)
        _require_within(self.within, "within")

    @property
    def block(self) -> CrossBlock:
        """The layer."""
        sizes = {"hidden": self.hidden, "layer_scale": self.layer_scale, "drop_path": self.drop_path}
        return CrossBlock(self.width, self.heads, **sizes)

    def init(self, key: Array, /) -> dict[str, Array]:
        """New weights, as ViTs start them.

        Args:
            key: Random key.

        Returns:
            The weights by name, float32.
        """
        return named(self.block.init(key), "block")

    def __call__(self, weights: Weights, found: Semantic, /, *, key: Array | None = None) -> Semantic:
        """One pass.

        Args:
            weights: The weights, as `init` makes them.
            found: The semantic tokens.
            key: Random key of stochastic depth; without one, nothing is dropped.

        Returns:
            Semantic tokens that have attended to each other.
        """
        block, own = self.block, part(weights, "block")
        if self.within == "map":
            row, valid = found.to_row()
            return found.from_row(block(own, row, valid=valid, key=key))
        valid = None if found.valid is None else _groups(found.valid)
        tokens = block(own, _groups(found.tokens), valid=valid, key=key)
        return replace(found, tokens=tokens.reshape(found.tokens.shape))


@dataclass(frozen=True)
class Recovery:
    """Recovers a map from semantic tokens: every place attends to them. Its weights: those of its layer, `block`.

    Attributes:
        plan: Which semantic tokens a place attends to: all, prefix tokens among them, or those around its window.
        width: Channels of a token.
        heads: Attention heads.
        hidden: Channels inside the MLP; four times the width if None.
        epsilon: What the norms add to the variance.
        drop_path: Stochastic depth.

    Raises:
        TokenExitError: If heads do not divide the width, or `drop_path` is no share.
    """

    plan: SemanticPlan
    width: int = field(kw_only=True)
    heads: int = field(kw_only=True)
    hidden: int | None = field(default=None, kw_only=True)
    epsilon: float = field(default=1e-5, kw_only=True)
    drop_path: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        _require_plan(self.plan)
        require_heads(self.heads, self.width)
        require_share(self.drop_path)
        _require_sizes(self.hidden, self.epsilon)

    @property
    def block(self) -> CrossBlock:
        """The layer."""
        return CrossBlock(
            self.width, self.heads,
            hidden=self.hidden, layer_scale=self.plan.layer_scale, epsilon=self.epsilon, drop_path=self.drop_path,
        )  # fmt: skip

    def init(self, key: Array, /) -> dict[str, Array]:
        """New weights, as ViTs start them.

        Args:
            key: Random key.

        Returns:
            The weights by name, float32.
        """
        return named(self.block.init(key), "block")

    def __call__(
        self,
        weights: Weights,
        map: Float[Array, "images height width channels"],
        found: Semantic,
        /,
        *,
        key: Array | None = None,
    ) -> Float[Array, "images height width channels"]:
        """One pass.

        Args:
            weights: The weights, as `init` makes them.
            map: The map as it was before there were semantic tokens.
            found: The semantic tokens.
            key: Random key of stochastic depth; without one, nothing is dropped.

        Returns:
            The recovered map.
        """
        block, own = self.block, part(weights, "block")
        if self.plan.recovery is None:
            keys, valid = found.to_row()
            return block(own, _flat(map), keys, valid=valid, key=key).reshape(map.shape)
        windows = self.plan.windows(*map.shape[1:3])
        places, _ = semantic.split(map, windows)
        keys, valid = semantic.neighbourhoods(
            found.map, found.grid, size=self.plan.recovery, edges=self.plan.edges, valid=found.valid_map
        )
        marks = None if valid is None else _groups(valid)
        recovered = block(own, _groups(places), _groups(keys), valid=marks, key=key)
        return semantic.join(recovered.reshape(places.shape), windows)


@dataclass(frozen=True)
class SemanticUnit:
    """A map through semantic tokens and back: five layers of STViT-R's unit of six, without the one before them.

    Its weights: those of the layers that make semantic tokens, `tokens`, of the layers in which they attend to each
    other, `mixing.0` and so on, and of the one that recovers the map, `recovery`.

    Attributes:
        plan: How semantic tokens come about, and go.
        width: Channels of a token.
        heads: Attention heads.
        mixing: Key set of semantic tokens, layer by layer. Published: first those of their window, then all.
        drop_path: Stochastic depth of all layers in turn; None for none.

    Raises:
        TokenExitError: If heads do not divide the width, `mixing` has anything but `window` and `map`, or `drop_path`
            are no shares, one for each layer.
    """

    plan: SemanticPlan = stvit_r()
    width: int = field(kw_only=True)
    heads: int = field(kw_only=True)
    mixing: tuple[Literal["window", "map"], ...] = field(default=("window", "map"), kw_only=True)
    drop_path: tuple[float, ...] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        _require_plan(self.plan)
        require(isinstance(self.mixing, tuple), "mixing", "be a tuple of 'window' or 'map'", repr(self.mixing))
        count = 3 + len(self.mixing)
        fits = self.drop_path is None or (isinstance(self.drop_path, tuple) and len(self.drop_path) == count)
        require(fits, "drop_path", f"have {count} shares, one for each layer", repr(self.drop_path))
        require_heads(self.heads, self.width)
        for share in self._rates:
            require_share(share)
        for within in self.mixing:
            _require_within(within, "mixing")

    @property
    def tokens(self) -> SemanticTokens:
        """What makes semantic tokens: two layers."""
        first, second, *_ = self._rates
        return SemanticTokens(self.plan, width=self.width, heads=self.heads, drop_path=(first, second))

    @property
    def mixers(self) -> tuple[SemanticMixing, ...]:
        """The layers in which they attend to each other."""
        scale = self.plan.layer_scale
        return tuple(
            SemanticMixing(self.width, self.heads, within=within, layer_scale=scale, drop_path=rate)
            for within, rate in zip(self.mixing, self._rates[2:-1], strict=True)
        )

    @property
    def recovery(self) -> Recovery:
        """What recovers the map."""
        return Recovery(self.plan, width=self.width, heads=self.heads, drop_path=self._rates[-1])

    @property
    def _rates(self) -> tuple[float, ...]:
        return (0.0,) * (3 + len(self.mixing)) if self.drop_path is None else self.drop_path

    def init(self, key: Array, /) -> dict[str, Array]:
        """New weights, as ViTs start them.

        Args:
            key: Random key.

        Returns:
            The weights by name, float32.
        """
        of_tokens, of_recovery, *of_mixing = new_keys(key, 2 + len(self.mixing))
        new = named(self.tokens.init(of_tokens), "tokens") | named(self.recovery.init(of_recovery), "recovery")
        for number, (layer, one) in enumerate(zip(self.mixers, of_mixing, strict=True)):
            new |= named(layer.init(one), f"mixing.{number}")
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
            map: The features.
            valid: Which places hold a token; all, if left out. What the others hold has no meaning, before and after.
            key: Random key of stochastic depth; without one, nothing is dropped.

        Returns:
            The features, of the same size.
        """
        of_tokens, of_recovery, *of_mixing = keys_of(key, 2 + len(self.mixing))
        found = self.tokens(part(weights, "tokens"), map, valid=valid, key=of_tokens)
        for number, (layer, one) in enumerate(zip(self.mixers, of_mixing, strict=True)):
            found = layer(part(weights, f"mixing.{number}"), found, key=one)
        return self.recovery(part(weights, "recovery"), cleared(map, valid), found, key=of_recovery)


def require_heads(heads: int, width: int) -> None:
    """Raise a `TokenExitError` unless heads divide the width. It is no part of the public API, nor is the next."""
    require_count(width, "width")
    require(is_whole(heads, least=1) and width % heads == 0, "heads", f"divide the width, {width}", heads)


def require_share(drop_path: float) -> None:
    """Raise a `TokenExitError` unless some of what layers add may be dropped, and not all."""
    require(is_number(drop_path) and 0 <= drop_path < 1, "drop_path", "be a share in [0, 1)", repr(drop_path))


def _require_sizes(hidden: int | None, epsilon: float) -> None:
    if hidden is not None:
        require_count(hidden, "hidden")
    require(is_number(epsilon) and epsilon > 0, "epsilon", "be a positive number", repr(epsilon))


def _require_plan(plan: SemanticPlan) -> None:
    require(isinstance(plan, SemanticPlan), "plan", "be a tokenexit.semantic.SemanticPlan", repr(plan))


def _require_within(within: object, argument: str) -> None:
    require(within in ("window", "map"), argument, "be 'window' or 'map'", repr(within))


def _resized(learned: Array, grid: Partition) -> Array:
    size = (learned.shape[0], grid.height, grid.width, learned.shape[3])
    if learned.shape != size:
        learned = jax.image.resize(learned, size, "bilinear", antialias=False)
    return semantic.split(learned, grid)[0]


def _flat(map: Array) -> Array:
    return rearrange(map, "images h w channels -> images (h w) channels")


def _groups(values: Array) -> Array:
    """Windows of all images in one row."""
    return values.reshape(math.prod(values.shape[:2]), *values.shape[2:])


def _parts(prefix: Array | None) -> list[tuple[Array, Array | None]]:
    return [] if prefix is None else [(prefix, None)]


def _together(parts: list[tuple[Array, Array | None]]) -> tuple[Array, Array | None]:
    """Tokens one after the other, and which of them are valid; None if all are."""
    tokens = jnp.concatenate([tokens for tokens, _ in parts], axis=-2)
    if all(valid is None for _, valid in parts):
        return tokens, None
    marks = [jnp.ones(tokens.shape[:-1], dtype=bool) if valid is None else valid for tokens, valid in parts]
    return tokens, jnp.concatenate(marks, axis=-1)
