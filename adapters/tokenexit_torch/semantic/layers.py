"""Layers of semantic tokens (STViT, CVPR 2023): a few tokens that stand for a map, and the map recovered from them.

Pooled tokens look at what lies around them, and at the whole map; then they attend to each other, which is cheap, for
they are few; in the end every place of the map asks them. `tokenexit.semantic` has the geometry and the plans; maps are
`(images, height, width, channels)` here, and may be of any size. A map may come with marks of the places that hold a
token: what the others hold is never attended to, whatever it is.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from tokenexit import semantic
from tokenexit.errors import require
from tokenexit.semantic import Partition, SemanticPlan, stvit_r
from tokenexit_torch._modules import DropPath, mlp, require_heads, start_anew
from tokenexit_torch.attention import attend

__all__ = ["CrossBlock", "Recovery", "Semantic", "SemanticMixing", "SemanticTokens", "SemanticUnit"]


@dataclass(frozen=True)
class Semantic:
    """Semantic tokens of some maps.

    Attributes:
        tokens: The tokens of each window, row by row.
        valid: Which of them stand for any place of the map; None for all.
        grid: The geometry of the map that they make.
        prefix: Tokens that are of no window (cls, registers), if there are any.
    """

    tokens: Float[Tensor, "images windows pooled width"]
    valid: Bool[Tensor, "images windows pooled"] | None
    grid: Partition
    prefix: Float[Tensor, "images prefix width"] | None = None

    @property
    def map(self) -> Float[Tensor, "images height width channels"]:
        """The semantic tokens as a map."""
        return semantic.join(self.tokens, self.grid)

    @property
    def valid_map(self) -> Bool[Tensor, "images height width"] | None:
        """Which of its places stand for any of the map; None for all."""
        return None if self.valid is None else semantic.join(self.valid, self.grid)

    def to_row(self) -> tuple[Float[Tensor, "images tokens width"], Bool[Tensor, "images tokens"] | None]:
        """All tokens of an image in one row, prefix tokens first, then window by window.

        Returns:
            The tokens, and which of them are valid; None for all.
        """
        tokens = rearrange(self.tokens, "images windows pooled width -> images (windows pooled) width")
        valid = None if self.valid is None else self.valid.flatten(1)
        return _together([*_parts(self.prefix), (tokens, valid)])

    def from_row(self, row: Float[Tensor, "images tokens width"], /) -> "Semantic":
        """Semantic tokens of the same geometry.

        Args:
            row: Tokens in the order of `to_row`.

        Returns:
            Semantic tokens with these values.
        """
        prefix = None if self.prefix is None else row[:, : self.prefix.shape[1]]
        own = row if self.prefix is None else row[:, self.prefix.shape[1] :]
        return replace(self, tokens=own.reshape(self.tokens.shape), prefix=prefix)


class CrossBlock(nn.Module):
    """A pre-norm block with tokens that attend to others: attention, then an MLP on each token.

    Attributes:
        heads: Attention heads.
        hidden: Channels inside the MLP.
        norm1: The norm before attention, of queries and keys alike.
        q: Projection of the queries.
        kv: Projection of the keys: keys, then values.
        proj: Projection of what attention gives.
        norm2: The norm before the MLP.
        mlp: The MLP.
        scale1: Layer-scale of attention; None if there is none.
        scale2: Layer-scale of the MLP.
        drop: Stochastic depth, for each group of tokens that attends; its rate is 0 at first.

    Args:
        width: Channels of a token.
        heads: Attention heads.
        hidden: Channels inside the MLP; four times the width if left out.
        layer_scale: What attention and MLP are multiplied with at first; None for no such scale.

    Raises:
        TokenExitError: If heads do not divide the width.
    """

    scale1: nn.Parameter | None
    scale2: nn.Parameter | None

    def __init__(self, width: int, heads: int, *, hidden: int | None = None, layer_scale: float | None = 1e-5) -> None:
        super().__init__()
        require_heads(heads, width)
        self.heads, self.hidden = heads, 4 * width if hidden is None else hidden
        self.norm1 = nn.LayerNorm(width)
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = mlp(width, self.hidden)
        for name in ("scale1", "scale2"):
            scale = None if layer_scale is None else nn.Parameter(torch.full((width,), float(layer_scale)))
            self.register_parameter(name, scale)
        self.drop = DropPath()
        start_anew(self)

    def forward(
        self,
        queries: Float[Tensor, "groups queries width"],
        keys: Float[Tensor, "groups keys width"] | None = None,
        *,
        valid: Bool[Tensor, "groups keys"] | None = None,
        onto: Float[Tensor, "groups queries width"] | None = None,
    ) -> Float[Tensor, "groups queries width"]:
        """One pass.

        Args:
            queries: The tokens that attend.
            keys: The tokens that they attend to; themselves if left out.
            valid: Which of these may be attended to; all, if left out. A group in which there is none attends to all.
            onto: What is added to; the queries if left out.

        Returns:
            The tokens that have attended.
        """
        normed = self.norm1(queries)
        seen = normed if keys is None else self.norm1(keys)
        q = rearrange(self.q(normed), "groups n (heads d) -> groups heads n d", heads=self.heads)
        k, v = rearrange(self.kv(seen), "groups n (two heads d) -> two groups heads n d", two=2, heads=self.heads)
        mask = None if valid is None else (valid | ~valid.any(dim=-1, keepdim=True))[:, None, None]
        mixed = attend(q, k, v, attn_mask=mask)
        mixed = self.proj(rearrange(mixed, "groups heads n d -> groups n (heads d)"))
        tokens = (queries if onto is None else onto) + self.drop(_scaled(mixed, self.scale1))
        return tokens + self.drop(_scaled(self.mlp(self.norm2(tokens)), self.scale2))


class SemanticTokens(nn.Module):
    """Makes semantic tokens of a map: pooled, then refined by two layers that look at the map.

    The first layer looks at what lies around each window, the second at all of the map, as the plan says.

    Attributes:
        plan: The plan.
        first: The first layer.
        second: The second.
        learned: Learned queries, added between the two; None if the plan has none.

    Args:
        plan: How semantic tokens come about.
        width: Channels of a token.
        heads: Attention heads.
        hidden: Channels inside the MLPs; four times the width if left out.

    Raises:
        TokenExitError: If heads do not divide the width.
    """

    learned: nn.Parameter | None

    def __init__(self, plan: SemanticPlan, *, width: int, heads: int, hidden: int | None = None) -> None:
        super().__init__()
        self.plan = plan
        self.first = CrossBlock(width, heads, hidden=hidden, layer_scale=plan.layer_scale)
        self.second = CrossBlock(width, heads, hidden=hidden, layer_scale=plan.layer_scale)
        learned = None if plan.learned is None else nn.Parameter(torch.empty(1, *plan.learned, width))
        self.register_parameter("learned", learned)
        if learned is not None:
            nn.init.trunc_normal_(learned, std=0.02)

    def forward(
        self,
        map: Float[Tensor, "images height width channels"],
        *,
        valid: Bool[Tensor, "images height width"] | None = None,
        prefix: Float[Tensor, "images prefix channels"] | None = None,
    ) -> Semantic:
        """One pass.

        Args:
            map: The features.
            valid: Which places hold a token; all, if left out.
            prefix: Tokens that are of no window. They take part in every layer that looks at all of the map.

        Returns:
            The semantic tokens.
        """
        plan = self.plan
        windows = plan.windows(*map.shape[1:3])
        tokens, held = semantic.pool(map, windows, to=plan.tokens, by=plan.pool, valid=valid)
        map = _cleared(map, valid)
        found = Semantic(tokens, held, windows.pooled(plan.tokens), prefix)
        onto = found if plan.residual else replace(found, tokens=torch.zeros_like(tokens))
        found = self._look(self.first, found, onto, map, valid, windows, plan.neighbourhood)
        if self.learned is not None:
            found = replace(found, tokens=found.tokens + _resized(self.learned, found.grid))
        return self._look(self.second, found, found, map, valid, windows, plan.second)

    def _look(
        self,
        block: CrossBlock,
        found: Semantic,
        onto: Semantic,
        map: Tensor,
        valid: Tensor | None,
        windows: Partition,
        around: tuple[int, int] | None,
    ) -> Semantic:
        if around is None:
            queries, marks = found.to_row()
            places = map.flatten(1, 2), None if valid is None else valid.flatten(1)
            own = [(queries, marks)] if self.plan.own_keys else _parts(found.prefix)
            keys, marks = _together([*own, places])
            return found.from_row(block(queries, keys, valid=marks, onto=onto.to_row()[0]))
        near, there = semantic.neighbourhoods(map, windows, size=around, edges=self.plan.edges, valid=valid)
        own = [(found.tokens, found.valid)] if self.plan.own_keys else []
        keys, marks = _together([*own, (near, there)])
        tokens = block(
            found.tokens.flatten(0, 1),
            keys.flatten(0, 1),
            valid=None if marks is None else marks.flatten(0, 1),
            onto=onto.tokens.flatten(0, 1),
        )
        return replace(found, tokens=tokens.reshape(found.tokens.shape))


class SemanticMixing(nn.Module):
    """Semantic tokens attend to each other.

    Attributes:
        within: Key set.
        block: The layer.

    Args:
        width: Channels of a token.
        heads: Attention heads.
        within: Those of their `window`, or those of the whole `map`, prefix tokens among them.
        hidden: Channels inside the MLP; four times the width if left out.
        layer_scale: As for `CrossBlock`.

    Raises:
        TokenExitError: If heads do not divide the width, or `within` is neither.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        within: Literal["window", "map"],
        hidden: int | None = None,
        layer_scale: float | None = 1e-5,
    ) -> None:
        super().__init__()
        _require_within(within, "within")
        self.within = within
        self.block = CrossBlock(width, heads, hidden=hidden, layer_scale=layer_scale)

    def forward(self, found: Semantic, /) -> Semantic:
        """One pass.

        Args:
            found: The semantic tokens.

        Returns:
            Semantic tokens that have attended to each other.
        """
        if self.within == "map":
            row, valid = found.to_row()
            return found.from_row(self.block(row, valid=valid))
        valid = None if found.valid is None else found.valid.flatten(0, 1)
        tokens = self.block(found.tokens.flatten(0, 1), valid=valid)
        return replace(found, tokens=tokens.reshape(found.tokens.shape))


class Recovery(nn.Module):
    """Recovers a map from semantic tokens: every place attends to them.

    Attributes:
        plan: The plan.
        block: The layer.

    Args:
        plan: Which semantic tokens a place attends to: all, prefix tokens among them, or those around its window.
        width: Channels of a token.
        heads: Attention heads.
        hidden: Channels inside the MLP; four times the width if left out.

    Raises:
        TokenExitError: If heads do not divide the width.
    """

    def __init__(self, plan: SemanticPlan, *, width: int, heads: int, hidden: int | None = None) -> None:
        super().__init__()
        self.plan = plan
        self.block = CrossBlock(width, heads, hidden=hidden, layer_scale=plan.layer_scale)

    def forward(
        self, map: Float[Tensor, "images height width channels"], found: Semantic, /
    ) -> Float[Tensor, "images height width channels"]:
        """One pass.

        Args:
            map: The map as it was before there were semantic tokens.
            found: The semantic tokens.

        Returns:
            The recovered map.
        """
        if self.plan.recovery is None:
            keys, valid = found.to_row()
            return self.block(map.flatten(1, 2), keys, valid=valid).reshape(map.shape)
        windows = self.plan.windows(*map.shape[1:3])
        places, _ = semantic.split(map, windows)
        keys, valid = semantic.neighbourhoods(
            found.map, found.grid, size=self.plan.recovery, edges=self.plan.edges, valid=found.valid_map
        )
        marks = None if valid is None else valid.flatten(0, 1)
        recovered = self.block(places.flatten(0, 1), keys.flatten(0, 1), valid=marks)
        return semantic.join(recovered.reshape(places.shape), windows)


class SemanticUnit(nn.Module):
    """A map through semantic tokens and back: five layers of STViT-R's unit of six, without the one before them.

    Attributes:
        tokens: Makes semantic tokens: two layers.
        mixing: Layers in which they attend to each other.
        recovery: Recovers the map.

    Args:
        plan: How semantic tokens come about, and go.
        width: Channels of a token.
        heads: Attention heads.
        mixing: Key set of semantic tokens, layer by layer. Published: first those of their window, then all.

    Raises:
        TokenExitError: If heads do not divide the width, or `mixing` has anything but `window` and `map`.
    """

    def __init__(
        self,
        plan: SemanticPlan = stvit_r(),
        /,
        *,
        width: int,
        heads: int,
        mixing: Iterable[Literal["window", "map"]] = ("window", "map"),
    ) -> None:
        super().__init__()
        chosen, scale = tuple(mixing), plan.layer_scale
        for within in chosen:
            _require_within(within, "mixing")
        self.tokens = SemanticTokens(plan, width=width, heads=heads)
        self.mixing = nn.ModuleList(SemanticMixing(width, heads, within=one, layer_scale=scale) for one in chosen)
        self.recovery = Recovery(plan, width=width, heads=heads)

    def forward(
        self,
        map: Float[Tensor, "images height width channels"],
        *,
        valid: Bool[Tensor, "images height width"] | None = None,
    ) -> Float[Tensor, "images height width channels"]:
        """One pass.

        Args:
            map: The features.
            valid: Which places hold a token; all, if left out. What the others hold has no meaning, before and after.

        Returns:
            The features, of the same size.
        """
        found = self.tokens(map, valid=valid)
        for layer in self.mixing:
            found = layer(found)
        return self.recovery(_cleared(map, valid), found)


def _require_within(within: object, argument: str) -> None:
    require(within in ("window", "map"), argument, "be 'window' or 'map'", repr(within))


def _scaled(added: Tensor, scale: Tensor | None) -> Tensor:
    return added if scale is None else added * scale


def _cleared(map: Tensor, valid: Tensor | None) -> Tensor:
    """Zeros where there is no token: no weight of 0 hides a NaN from attention."""
    return map if valid is None else torch.where(valid[..., None], map, 0.0)


def _resized(learned: Tensor, grid: Partition) -> Tensor:
    size = (grid.height, grid.width)
    if tuple(learned.shape[1:3]) != size:
        across = rearrange(learned, "1 height width channels -> 1 channels height width")
        across = functional.interpolate(across, size, mode="bilinear", align_corners=False)
        learned = rearrange(across, "1 channels height width -> 1 height width channels")
    return semantic.split(learned, grid)[0]


def _parts(prefix: Tensor | None) -> list[tuple[Tensor, Tensor | None]]:
    return [] if prefix is None else [(prefix, None)]


def _together(parts: list[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    """Tokens one after the other, and which of them are valid; None if all are."""
    tokens = torch.cat([tokens for tokens, _ in parts], dim=-2)
    if all(valid is None for _, valid in parts):
        return tokens, None
    marks = [
        tokens.new_ones(tokens.shape[:-1], dtype=torch.bool) if valid is None else valid for tokens, valid in parts
    ]
    return tokens, torch.cat(marks, dim=-1)
