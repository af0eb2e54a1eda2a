"""A plain vision transformer whose middle blocks, or last ones, run on semantic tokens (STViT, CVPR 2023).

The early blocks run on all tokens. Two layers make semantic tokens of them, in the place of two blocks, and the next
blocks, as they are, run on these alone. Then a layer recovers all tokens, in the place of a third block, and the last
blocks run on all of them again; or nothing is recovered, and the network ends on semantic tokens. The layers that are
put in start from the weights of the blocks that they replace, as far as those have the shapes.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tokenexit.errors import require
from tokenexit.semantic import SemanticPlan
from tokenexit_torch._blocks import run_block
from tokenexit_torch._counting import layer_work, network_cost
from tokenexit_torch._modules import AroundHost
from tokenexit_torch.attention import attending_to
from tokenexit_torch.hosts.protocol import Host, embedded_by
from tokenexit_torch.semantic.layers import CrossBlock, Recovery, SemanticTokens

__all__ = ["SemanticModel", "SemanticOutput"]

TIMM_NAMES = {
    "norm1": "norm1", "qkv": "attn.qkv", "proj": "attn.proj", "scale1": "ls1.gamma",
    "norm2": "norm2", "mlp.0": "mlp.fc1", "mlp.2": "mlp.fc2", "scale2": "ls2.gamma",
}  # fmt: skip
"""Where a timm block keeps the weights of a `CrossBlock`. It is no part of the public API."""


def timm_names(block: Any, /) -> dict[str, str]:
    """Those of them that a block has; an MLP only if it does what that of a `CrossBlock` does. Not public."""
    there = {name for name, _ in (*block.named_modules(), *block.named_parameters())}
    act = dict(block.mlp.named_modules()).get("act")
    alike = type(block.mlp).__name__ == "Mlp" and isinstance(act, nn.GELU) and act.approximate == "none"
    return {own: name for own, name in TIMM_NAMES.items() if name in there and (alike or not own.startswith("mlp"))}


class SemanticOutput(NamedTuple):
    """What a model on semantic tokens returns.

    Attributes:
        tokens: The finished tokens, in the order of the wrapped model: prefix tokens, then those of the grid, row by
            row. So what follows in that model can read them: `vit.forward_head(out.tokens)` for one of timm.
        prefix: How many of them are no part of the grid.
        grid: Height and width of the grid: of the patches if they were recovered, else of the semantic tokens.
        valid: Which tokens of the grid stand for anything; None for all. Where windows hang far over the edge of the
            patches, some semantic tokens do not, and hold no meaning.
    """

    tokens: Float[Tensor, "images tokens width"]
    prefix: int
    grid: tuple[int, int]
    valid: Bool[Tensor, "images grid_height grid_width"] | None

    @property
    def map(self) -> Float[Tensor, "images width grid_height grid_width"]:
        """The tokens of the grid as a map, channels first: for decoders."""
        return rearrange(self.tokens[:, self.prefix :], "i (h w) c -> i c h w", h=self.grid[0])


class SemanticModel(AroundHost):
    """A vision transformer on semantic tokens; made by `wrap_semantic`.

    Attributes:
        host: The host of the wrapped model.
        model: The wrapped model itself, its weights shared. The blocks that were replaced are still there; nothing runs
            them.
        plan: How semantic tokens come about.
        after: After how many blocks there are semantic tokens.
        until: After how many blocks all tokens are recovered; None if they are not.
        tokens: The layers that make semantic tokens, in the place of two blocks.
        recovery: The layer that recovers all tokens, in the place of a third; None if they are not.
        kept: Where each weight of these layers that is not new comes from, by names of parameters. This and the next
            two are empty in a model that was loaded.
        new: The names of those that are new, and must be trained.
        left: Weights of the replaced blocks for which there was no place, by names in the wrapped model's blocks.
    """

    host: Host
    model: nn.Module
    recovery: Recovery | None

    def __init__(
        self, host: Host, tokens: SemanticTokens, recovery: Recovery | None, /, *, after: int, until: int | None
    ) -> None:
        super().__init__(host)
        self.plan, self.after, self.until = tokens.plan, after, until
        self.tokens, self.recovery = tokens, recovery
        self.kept: dict[str, str] = {}
        self.new: tuple[str, ...] = ()
        self.left: tuple[str, ...] = ()

    @property
    def replaced(self) -> tuple[int, ...]:
        """Blocks of the wrapped model, counted from 0, whose place other layers take."""
        two = (self.after, self.after + 1)
        return two if self.until is None else (*two, self.until - 1)

    @property
    def layers(self) -> nn.ModuleDict:
        """The layers that were put in, `tokens` and `recovery`: all that there is to train anew, and to save."""
        return together(self.tokens, self.recovery)

    def forward(self, images: Float[Tensor, "images channels height width"]) -> SemanticOutput:
        """Run a batch. Differentiable.

        Args:
            images: The images, as the wrapped model takes them.

        Returns:
            The finished tokens.

        Raises:
            TokenExitError: If the images do not fit the model, or its blocks ask for positions, which semantic tokens
                do not have.
        """
        embedded = embedded_by(self.host, images, patch=self.patch)
        require(embedded.positions is None, "model.embed", "give no positions: semantic tokens have none", "some")
        prefix, grid, row = embedded.prefix, embedded.grid, embedded.tokens
        for index in range(self.after):
            row = run_block(self.host, index, row, None)
        map = rearrange(row[:, prefix:], "i (h w) c -> i h w c", h=grid[0])
        found = self.tokens(map, prefix=row[:, :prefix] if prefix else None)
        row, valid = found.to_row()
        with nullcontext() if valid is None else attending_to(valid) as attention:
            for index in self._on_semantic_tokens:
                row = run_block(self.host, index, row, None, attention)
        found, marks = found.from_row(row), found.valid_map
        if self.until is None or self.recovery is None:
            map, grid = found.map, (found.grid.height, found.grid.width)
        else:
            map, marks = self.recovery(map, found), None
        row = torch.cat([row[:, :prefix], map.flatten(1, 2)], dim=1)
        for index in range(self.depth if self.until is None else self.until, self.depth):
            row = run_block(self.host, index, row, None)
        return SemanticOutput(self.host.finish(row), prefix, grid, marks)

    def multiply_adds(self, grid: tuple[int, int], /, *, prefix: int) -> int:
        """Multiply-adds of an image, the patch embedding included, heads that come later not.

        Args:
            grid: Height and width of its grid of patches.
            prefix: How many prefix tokens there are.

        Returns:
            Multiply-adds: linear and convolution layers, and the two products of attention.

        Raises:
            TokenExitError: If there is no telling what a part costs, or the layers that were put in have other work
                than they had, as adapters add.
        """
        cost, width = network_cost(self.host, self.counted), self.host.width
        rule = f"attend over {width} channels, as semantic tokens do, for its multiply-adds to be counted"
        require(cost.width == width, "model", rule, cost.width)
        for name, block in self.layers.named_modules():
            if isinstance(block, CrossBlock):
                work, known = layer_work(block), 4 * width**2 + 2 * width * block.hidden
                rule = f"have the {known} multiply-adds for a token that it was made with, for them to be counted"
                require(work == known, f"layers.{name}", rule, work)
        sizes = {"after": self.after, "until": self.until, "hidden": self.tokens.first.hidden}
        return cost.decoder + replace(cost, prefix=prefix).semantic(self.plan, grid, **sizes)

    @property
    def _on_semantic_tokens(self) -> range:
        return range(self.after + 2, self.depth if self.until is None else self.until - 1)


def new_layers(
    plan: SemanticPlan, until: int | None, /, *, width: int, heads: int, hidden: int, epsilon: float
) -> tuple[SemanticTokens, Recovery | None]:
    """The layers that are put in, with new weights. It is no part of the public API, nor are the next two."""
    tokens = SemanticTokens(plan, width=width, heads=heads, hidden=hidden)
    recovery = None if until is None else Recovery(plan, width=width, heads=heads, hidden=hidden)
    for layer in together(tokens, recovery).modules():
        if isinstance(layer, nn.LayerNorm):
            layer.eps = epsilon
    return tokens, recovery


def together(tokens: SemanticTokens, recovery: Recovery | None, /) -> nn.ModuleDict:
    """The layers that are put in, under the names that they have in files."""
    parts: dict[str, nn.Module] = {"tokens": tokens}
    return nn.ModuleDict(parts if recovery is None else parts | {"recovery": recovery})


def in_place_of_blocks(
    host: Host, plan: SemanticPlan, /, *, after: int, until: int | None, heads: int, names: Mapping[str, str]
) -> SemanticModel:
    """A model whose new layers are sized as the blocks that they replace, and start from their weights."""
    first = host.blocks[after]
    weights = dict(first.named_parameters())
    inside = weights.get(f"{names.get('mlp.0')}.weight")
    hidden = 4 * host.width if inside is None else inside.shape[0]
    if plan.layer_scale is None and names.get("scale1") in weights:
        plan = replace(plan, layer_scale=1.0)  # theirs comes in its place
    norm = dict(first.named_modules()).get(names.get("norm1", ""))
    epsilon = norm.eps if isinstance(norm, nn.LayerNorm) else 1e-5
    layers = new_layers(plan, until, width=host.width, heads=heads, hidden=hidden, epsilon=epsilon)
    model = SemanticModel(host, *layers, after=after, until=until)
    put_in = [("tokens.first", model.tokens.first), ("tokens.second", model.tokens.second)]
    put_in += [] if model.recovery is None else [("recovery.block", model.recovery.block)]
    for (name, block), index in zip(put_in, model.replaced, strict=True):
        kept = _adopt(block, host.blocks[index], names)
        model.kept |= {f"{name}.{own}": f"blocks.{index}.{theirs}" for own, theirs in kept.items()}
        source = (theirs for theirs, _ in host.blocks[index].named_parameters())
        model.left += tuple(f"blocks.{index}.{theirs}" for theirs in source if theirs not in kept.values())
    model.new = tuple(name for name, _ in model.layers.named_parameters() if name not in model.kept)
    return model


@torch.no_grad()
def _adopt(block: CrossBlock, source: nn.Module, names: Mapping[str, str]) -> dict[str, str]:
    """Copy a block's weights where they fit; which of the parameters come from which."""
    width, parameters = block.q.in_features, dict(source.named_parameters())
    rows = {"q": slice(width), "kv": slice(width, None)}
    kept = {}
    for own, parameter in block.named_parameters():
        layer, _, kind = own.rpartition(".")
        name = ".".join(filter(None, (names.get("qkv" if layer in rows else layer or own), kind if layer else "")))
        theirs = parameters.get(name)
        if theirs is not None and layer in rows:
            theirs = theirs[rows[layer]] if len(theirs) == 3 * width else None
        if theirs is not None and theirs.shape == parameter.shape:
            parameter.copy_(theirs)
            kept[own] = name
    return kept
