"""What a run costs: multiply-adds, from the tokens that run through each block; and whether an exit is worth its price.

One multiply-add counts as one. Linear and convolution layers and the two products of attention count; norms,
activations, biases and interpolation do not, unless a price is given for them. Heads and the patch embedding are
included, everything that exits cost as well. The functions that give the parts of known networks read no weights.
"""

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Bool, Int, Real

from tokenexit._array import Array, array_namespace, in_64_bits, number_beside
from tokenexit._plain import require_counts, require_sizes
from tokenexit.errors import require
from tokenexit.heads import HeadCost, HeadPlan, Translator, atm_head
from tokenexit.semantic import SemanticPlan, require_room

__all__ = [
    "Cost",
    "HeadCost",
    "Repacking",
    "SkippingCost",
    "plain_vit",
    "of_head",
    "atm_head",
    "upsampling",
    "token_blocks",
]

_NOTHING = HeadCost(0)


@dataclass(frozen=True)
class Repacking:
    """What an exit saves and what it spends, in multiply-adds per image, beside a run without that exit.

    Attributes:
        linear: Saved in the linear layers of the blocks that leavers skip.
        attention: Saved in the two products of attention of these blocks.
        next_head: Saved in the head after these blocks, which leavers do not reach.
        exit_head: Spent on the exit head, which reads all patches that run.
        moving: Spent on gathering the tokens that stay.
    """

    linear: Real[Array, "images"]
    attention: Real[Array, "images"]
    next_head: Real[Array, "images"]
    exit_head: Real[Array, "images"]
    moving: Real[Array, "images"]

    @property
    def saved(self) -> Real[Array, "images"]:
        """Multiply-adds that no longer run."""
        return self.linear + self.attention + self.next_head

    @property
    def spent(self) -> Real[Array, "images"]:
        """Multiply-adds, or their equivalent in time, that run only because of the exit."""
        return self.exit_head + self.moving

    @property
    def pays(self) -> Bool[Array, "images"]:
        """Whether each image, by itself, saves more than it spends."""
        return self.saved > self.spent

    @property
    def batch_pays(self) -> Bool[Array, ""]:
        """Whether all images together save more than they spend: a row is repacked as a whole, or not."""
        xp = array_namespace(self.linear)
        return xp.sum(self.saved) > xp.sum(self.spent)


@dataclass(frozen=True)
class SkippingCost:
    """Cost of an image in a network with gates, which skip tokens, in multiply-adds.

    Attributes:
        network: Patch embedding, blocks on those that run, and the final head, which reads all patches.
        gates: All gates, which read all tokens.
        moving: Gathering those that run at every gate, and putting them back.
    """

    network: int
    gates: int
    moving: int

    @property
    def total(self) -> int:
        """All of it: of two plans with equal rates, the one that pays more is the lower."""
        return self.network + self.gates + self.moving


@dataclass(frozen=True)
class Cost:
    """Multiply-adds of the parts of a vision transformer.

    Attributes:
        embed: Patch embedding, per patch.
        blocks: Linear layers of each block, per token.
        width: Channels; attention adds `2 * tokens * width` per token, for tokens of the same image.
        prefix: Tokens per image that are not patches; heads are not counted for them.
        exit_heads: Exit heads, by the block they follow.
        head: Final head.
        decoder: What runs once per image on the restored map, whatever left: a dense decoder, an upsampling.
    """

    embed: int
    blocks: tuple[int, ...]
    width: int
    prefix: int
    exit_heads: Mapping[int, HeadCost]
    head: HeadCost
    decoder: int = 0

    def __post_init__(self) -> None:
        """Check the blocks of the exit heads.

        Raises:
            TokenExitError: If an exit head follows no block, or the last.
        """
        last = len(self.blocks) - 1
        outside = sorted(after for after in self.exit_heads if not 1 <= after <= last)
        require(not outside, "exit_heads", f"follow blocks from 1 to {last}, for {last + 1} blocks", outside)

    def multiply_adds(
        self,
        tokens_per_block: Int[Array, "images blocks"],
        /,
        *,
        patches: int,
        exits: Collection[int] = (),
        head_on: Literal["running", "all"] = "running",
    ) -> Real[Array, "images"]:
        """Multiply-adds executed for each image.

        Args:
            tokens_per_block: How many tokens of each image ran through each block, prefix tokens included.
            patches: Patches of an image.
            exits: Blocks after which an exit head ran, on the patches that ran through that block.
            head_on: Which patches the final head read: those that ran through the last block, or all, where frozen
                features rejoin before the head (PAUMER, BMVC 2022; DoViT, 2023). Features that rejoin before the last
                block show in `tokens_per_block`.

        Returns:
            Multiply-adds per image: int64, or float32 where the library has no 64-bit integers (JAX by default).

        Raises:
            TokenExitError: If the blocks are not those of this cost, an exit has no head, or `head_on` is unknown.
        """
        require(
            tokens_per_block.ndim == 2 and tokens_per_block.shape[1] == len(self.blocks),
            "tokens_per_block",
            f"have shape (images, {len(self.blocks)})",
            f"shape {tuple(tokens_per_block.shape)}",
        )
        unknown = sorted(set(exits) - set(self.exit_heads))
        require(not unknown, "exits", f"be among the blocks with an exit head, {sorted(self.exit_heads)}", unknown)
        _require_head_on(head_on)
        xp = array_namespace(tokens_per_block)
        tokens = in_64_bits(tokens_per_block)
        total = xp.full_like(tokens[:, 0], number_beside(patches * self.embed + self.decoder, tokens))
        for block, linear in enumerate(self.blocks):
            ran = tokens[:, block]
            total = total + ran * number_beside(linear, ran) + self._attention(ran)
        for after in set(exits):
            total = total + self.exit_heads[after].multiply_adds(tokens[:, after - 1] - self.prefix)
        last = tokens[:, -1]
        return total + self.head.multiply_adds(xp.full_like(last, patches) if head_on == "all" else last - self.prefix)

    def repacking(
        self,
        running: Int[Array, "images"],
        leaving: Int[Array, "images"] | int,
        /,
        *,
        after: int,
        until: int | None = None,
        per_moved_element: float,
        head_on: Literal["running", "all"] = "running",
    ) -> Repacking:
        """Predict whether an exit pays: what its leavers save until the next one, and what it spends.

        Less `moving`, it is the difference of two `multiply_adds`. A moved element has no multiply-add; on a given
        machine it takes the time of some, and `tests/benchmarks/repacking.py` measures of how many. The policy and the
        notes about leavers are not counted, nor is putting features back where they rejoin.

        Args:
            running: How many tokens of each image ran through block `after`, prefix tokens included.
            leaving: How many of them leave, which is not checked: for each image, or the same for all. An image of
                which all patches leave is done, and its prefix tokens stop as well.
            after: The block that the exit follows.
            until: The block up to which leavers are missing: that of the next exit, the last before they rejoin, or
                the end if left out. If a head follows it, they are missing there too.
            per_moved_element: Multiply-adds of a linear layer in the time in which one number of one token is
                gathered; a property of the machine, and of its number format. Per token it is rounded to a whole.
            head_on: Which patches the final head reads, as in `multiply_adds`.

        Returns:
            The parts of the balance, per image: int64, or float32 where the library has no 64-bit integers.

        Raises:
            TokenExitError: If the exit has no head, `until` is no later block, the shapes do not fit, or an option is
                out of its range.
        """
        end = len(self.blocks)
        until = end if until is None else until
        require(after in self.exit_heads, "after", f"be a block with an exit head, of {sorted(self.exit_heads)}", after)
        require(after < until <= end, "until", f"be a block from {after + 1} to {end}", until)
        require(
            0 <= per_moved_element < math.inf, "per_moved_element", "be a finite number, 0 or more", per_moved_element
        )
        require(running.ndim == 1, "running", "have shape (images,)", f"shape {tuple(running.shape)}")
        _require_head_on(head_on)
        xp = array_namespace(running)
        before = in_64_bits(running)
        gone = xp.full_like(before, leaving) if isinstance(leaving, int) else in_64_bits(leaving)
        gone = before * 0 + gone if gone.ndim == 0 else gone
        fits = tuple(gone.shape) == tuple(before.shape)
        require(fits, "leaving", f"have shape {tuple(before.shape)}", f"shape {tuple(gone.shape)}")
        stay = xp.where(before - gone > self.prefix, before - gone, xp.zeros_like(before))
        blocks = self.blocks[after:until]
        heads = {**self.exit_heads, **({end: self.head} if head_on == "running" else {})}
        head = heads.get(until, HeadCost(0))
        return Repacking(
            linear=(before - stay) * number_beside(sum(blocks), stay),
            attention=(self._attention(before) - self._attention(stay)) * len(blocks),
            next_head=head.multiply_adds(before - self.prefix) - head.multiply_adds(stay - self.prefix),
            exit_head=self.exit_heads[after].multiply_adds(before - self.prefix),
            moving=stay * number_beside(round(per_moved_element * self.width), stay),
        )

    def gated(
        self,
        tokens_per_block: Int[Array, "images blocks"],
        /,
        *,
        patches: int,
        slots: int,
        gates: Iterable[HeadCost],
        keys: Literal["running", "all"] = "running",
        dim: int | None = None,
    ) -> Real[Array, "images"]:
        """Multiply-adds executed for each image in a network with gates (SViT, WACV 2024); the head reads all patches.

        Args:
            tokens_per_block: How many tokens of each image were active in each block, prefix tokens included.
            patches: Patches of an image.
            slots: Tokens of an image, prefix tokens included, all of which every gate reads.
            gates: Cost of each gate that decided.
            keys: Key set of active tokens, as in `carries.Preserved`. If `all`, skipped tokens are counted with three
                matrices of the channels squared, and as keys in attention.
            dim: Channels of a token, if attention has fewer; `width` if left out.

        Returns:
            Multiply-adds per image: int64, or float32 where the library has no 64-bit integers (JAX by default).

        Raises:
            TokenExitError: If the blocks are not those of this cost, or `keys` is unknown.
        """
        _require_keys(keys)
        read = sum(slots * gate.per_token + gate.fixed for gate in gates)
        whole = dataclasses.replace(self, decoder=self.decoder + read)
        total = whole.multiply_adds(tokens_per_block, patches=patches, head_on="all")
        if keys == "running":
            return total
        skipped = self._skipped(in_64_bits(tokens_per_block), slots, self.width if dim is None else dim)
        return total + array_namespace(total).sum(skipped, axis=1)

    def skipping(
        self,
        rates: Mapping[int, float],
        /,
        *,
        patches: int,
        gate: HeadCost,
        keys: Literal["running", "all"] = "running",
        before: Literal["decoder", "last block"] = "decoder",
        per_moved_element: float = 0.0,
    ) -> SkippingCost:
        """Predict what gates cost and leave to run, for an image that keeps these shares (SViT, WACV 2024).

        With few gates one decision holds for several blocks, and less is evaluated and moved. The parts show what
        that is worth, and which rates a budget of multiply-adds allows.

        Args:
            rates: Share of the patches that each gate keeps, by the blocks that run before it.
            patches: Patches of an image.
            gate: Cost of a gate; it reads the prefix tokens as well.
            keys: Key set of active tokens, as in `carries.Preserved`. If `all`, skipped tokens count as in `gated`.
            before: What all tokens run again for, as in `carries.Preserved`.
            per_moved_element: Multiply-adds in the time in which one number of one token is moved, as in `repacking`.

        Returns:
            The parts.

        Raises:
            TokenExitError: If a gate lies outside of the network, a rate is no share, or an option is out of its range.
        """
        depth, slots = len(self.blocks), self.prefix + patches
        last = depth - (2 if before == "last block" else 1)
        inside = all(1 <= after <= last for after in rates)
        require(inside, "rates", f"have gates after blocks 1 to {last}", sorted(rates))
        require(all(0 <= rate <= 1 for rate in rates.values()), "rates", "be shares in [0, 1]", dict(rates))
        _require_keys(keys)
        require(before in ("decoder", "last block"), "before", "be 'decoder' or 'last block'", repr(before))
        require(
            0 <= per_moved_element < math.inf, "per_moved_element", "be a finite number, 0 or more", per_moved_element
        )
        ran, now = [], slots
        for block in range(depth):
            now = self.prefix + round(rates[block] * patches) if block in rates else now
            ran.append(slots if before == "last block" and block == depth - 1 else now)
        network = patches * (self.embed + self.head.per_token) + self.head.fixed + self.decoder
        network += sum(one * linear + 2 * self.width * one * one for one, linear in zip(ran, self.blocks, strict=True))
        if keys == "all":
            network += sum(self._skipped(one, slots, self.width) for one in ran)
        # At a gate those that run are gathered; later they are put back into a copy of all.
        moved = sum(2 * (self.prefix + round(rate * patches)) + slots for rate in rates.values())
        return SkippingCost(
            network=network,
            gates=len(rates) * (slots * gate.per_token + gate.fixed),
            moving=round(moved * self.width * per_moved_element),
        )

    def semantic(
        self, plan: SemanticPlan, grid: tuple[int, int], /, *, after: int, until: int | None, hidden: int
    ) -> int:
        """What an image costs if blocks run on semantic tokens (STViT, CVPR 2023), and layers take the place of some.

        Args:
            plan: How semantic tokens come about.
            grid: Height and width of the grid of patches.
            after: After how many blocks there are semantic tokens; layers make them in the place of the next two.
            until: After how many blocks all tokens are recovered, in the place of the block before; None if never.
            hidden: Channels inside the MLPs of these layers.

        Returns:
            Multiply-adds, the patch embedding included, heads and decoder not. Norms of these layers are not counted,
            even where those of the blocks are.

        Raises:
            TokenExitError: If the blocks do not leave room for the layers, or `hidden` or the grid is less than 1.
        """
        require_room(after, until, depth=len(self.blocks))
        require_sizes(hidden=hidden)
        windows, width = plan.windows(*grid), self.width
        places, patches = windows.window[0] * windows.window[1], grid[0] * grid[1]
        each = plan.tokens[0] * plan.tokens[1]
        few, every = windows.count * each + self.prefix, patches + self.prefix

        def around(size: tuple[int, int], of: tuple[int, int]) -> int:
            inside = size if plan.edges == "beyond" else (min(size[0], of[0]), min(size[1], of[1]))
            return inside[0] * inside[1]

        def crossing(groups: int, queries: int, keys: int) -> int:
            """A layer in which so many groups of queries attend to so many keys each."""
            of_queries, of_keys = 2 * width * (width + hidden), 2 * width * width
            return groups * (of_queries * queries + of_keys * keys + self._attention(1) * queries * keys)

        def making(size: tuple[int, int] | None) -> int:
            if size is None:
                return crossing(1, few, patches + (few if plan.own_keys else self.prefix))
            return crossing(windows.count, each, around(size, grid) + each * plan.own_keys)

        def running(blocks: tuple[int, ...], tokens: int) -> int:
            return sum(blocks) * tokens + len(blocks) * self._attention(tokens)

        total = self.embed * patches + running(self.blocks[:after], every)
        total += making(plan.neighbourhood) + making(plan.second)
        if until is None:
            return total + running(self.blocks[after + 2 :], few)
        total += running(self.blocks[after + 2 : until - 1], few) + running(self.blocks[until:], every)
        if plan.recovery is None:
            return total + crossing(1, patches, few)
        grid = (windows.rows * plan.tokens[0], windows.columns * plan.tokens[1])
        return total + crossing(windows.count, places, around(plan.recovery, grid))

    def _attention(self, tokens: Array) -> Array:
        return 2 * self.width * tokens * tokens

    def _skipped(self, active: Array, slots: int, dim: int) -> Array:
        """Multiply-adds of the tokens of a block that are keys and not active, beside so many that are."""
        return (slots - active) * (3 * dim**2 + 2 * self.width * active)


def plain_vit(
    *,
    width: int,
    depth: int,
    patch: int,
    channels: int = 3,
    mlp_ratio: float = 4.0,
    prefix: int = 0,
    exit_heads: Mapping[int, HeadCost] | None = None,
    head: HeadCost = _NOTHING,
    decoder: int = 0,
    norm: int = 0,
) -> Cost:
    """Parts of a plain ViT (Dosovitskiy et al., ICLR 2021, section 3.1): patch embedding, equal blocks, final norm.

    Args:
        width: Channels.
        depth: How many blocks.
        patch: Side of a patch, in pixels.
        channels: Channels of an image.
        mlp_ratio: Channels inside a block's MLP, as a multiple of `width`.
        prefix: Tokens per image that are not patches: cls, registers.
        exit_heads: Exit heads, by the block they follow; none if left out.
        head: Final head; none if left out.
        decoder: What runs once per image whatever left, in multiply-adds per image.
        norm: Multiply-adds for an element of a LayerNorm; not counted if 0. The published figures of DToP
            (ICCV 2023) take 5. The final norm is counted with the final head, for the tokens that it reads.

    Returns:
        The parts.

    Raises:
        TokenExitError: If a size is less than 1, a count is negative, or an exit head follows no block, or the last.
    """
    require_sizes(width=width, depth=depth, patch=patch, channels=channels)
    require(width * mlp_ratio >= 1, "mlp_ratio", f"give at least one channel for width {width}", mlp_ratio)
    require_counts(prefix=prefix, decoder=decoder, norm=norm)
    inside = int(width * mlp_ratio)
    return Cost(
        embed=channels * patch * patch * width,
        # Queries, keys, values and the projection after attention; then the MLP; and a norm before each of the two.
        blocks=(4 * width * width + 2 * width * inside + 2 * norm * width,) * depth,
        width=width,
        prefix=prefix,
        exit_heads={} if exit_heads is None else exit_heads,
        head=HeadCost(head.per_token + norm * width, head.fixed),
        decoder=decoder,
    )


def of_head(
    plan: HeadPlan,
    /,
    *,
    width: int,
    classes: int = 0,
    norm: int = 0,
    final: HeadCost | None = None,
    targets: int | None = None,
) -> HeadCost:
    """Cost of a head, from its plan.

    Args:
        plan: One of the plans of `tokenexit.heads`.
        width: Channels of the tokens.
        classes: Class count; not needed for a `heads.Translator`.
        norm: Multiply-adds for an element of a LayerNorm; not counted if 0. The batch norm of `FCN` never counts: in
            use it is part of the layer before it.
        final: Cost of the network's final head, the final norm not counted, for a `heads.Translator` under one: it runs
            on what that gives. For other plans None.
        targets: For a `heads.Translator` under a decoder, of how many taps behind it it gives the token.

    Returns:
        The cost of all that runs at the exit.

    Raises:
        TokenExitError: If it is no such plan, a size is less than 1, `norm` is negative, the width is odd for `ATM`, or
            `final` and `targets` are both missing for a `Translator`, both given, or given for another plan.
    """
    require(isinstance(plan, HeadPlan), "plan", "be a plan of tokenexit.heads", repr(plan))
    require_sizes(width=width)
    require_counts(norm=norm)
    if isinstance(plan, Translator):
        rule = "be given for a plan that translates, whose token the final head reads, or else `targets`"
        require((final is None) != (targets is None), "final", rule, f"{final!r} beside {targets!r} for {plan!r}")
        require_sizes(targets=1 if targets is None else targets)
        own = plan.cost(width=width, classes=classes, norm=norm, targets=1 if targets is None else targets)
        return own if final is None else own + final + HeadCost(norm * width)
    require_sizes(classes=classes)
    rule = "be left out for a plan that gives class scores"
    require(final is None and targets is None, "final", rule, f"{final!r} beside {targets!r} for {plan!r}")
    return plan.cost(width=width, classes=classes, norm=norm)


def upsampling(*, channels: int, size: tuple[int, int], per_element: int) -> int:
    """Multiply-adds of a bilinear upsampling, for the `decoder` of a `Cost`; by our convention it is not counted.

    Args:
        channels: Channels of the map, say its classes.
        size: Height and width that it is brought to.
        per_element: Multiply-adds for an element of the result. The published figures of DToP take 4.

    Returns:
        Multiply-adds per image.

    Raises:
        TokenExitError: If a size is less than 1, or `per_element` is negative.
    """
    height, width = size
    require_sizes(channels=channels, height=height, width=width)
    require_counts(per_element=per_element)
    return channels * height * width * per_element


def token_blocks(tokens_per_block: Int[Array, "images blocks"], /, *, slots: int) -> float:
    """Tokens run through blocks, as a fraction of all tokens through all blocks.

    Args:
        tokens_per_block: How many tokens of each image ran through each block, prefix tokens included.
        slots: Tokens of an image, prefix tokens included.

    Returns:
        1 for the dense network, less if tokens left. A Python number: it cannot be traced.

    Raises:
        TokenExitError: If there is no image, block or slot.
    """
    images, blocks = tokens_per_block.shape
    require(
        images * blocks * slots > 0,
        "tokens_per_block",
        "have at least one image, block and slot",
        f"shape {(images, blocks)} with slots={slots}",
    )
    xp = array_namespace(tokens_per_block)
    return int(xp.sum(tokens_per_block)) / (images * blocks * slots)


def _require_head_on(head_on: str) -> None:
    require(head_on in ("running", "all"), "head_on", "be 'running' or 'all'", repr(head_on))


def _require_keys(keys: str) -> None:
    require(keys in ("running", "all"), "keys", "be 'running' or 'all'", repr(keys))
