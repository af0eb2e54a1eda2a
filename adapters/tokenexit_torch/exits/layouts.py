"""Layouts of the tokens that run: one packed row, or as many entries for every image.

A layout is a value; the forward pass is the same for both.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokenexit import merging, tokens
from tokenexit.errors import require
from tokenexit.exits import Decision
from tokenexit.merging import Joined, Merged
from tokenexit.schedule import Stage
from tokenexit.tokens import Packing, Receipt, Selection
from tokenexit_torch._modules import require_not_exported
from tokenexit_torch.attention import Padded, PerImage

__all__ = ["PACKED", "Certain", "Compaction", "Counts", "Layout", "Packed", "Static", "has_to_wait"]

Certain = Callable[[Merged], Float[Tensor, "images slots"]]
"""From what has merged to the score by which entries leave for lack of room (`Decision.certain`)."""


class Compaction(NamedTuple):
    """What becomes of a row at an exit or merge point.

    Attributes:
        receipt: The receipt of the row that runs on.
        rows: Which entries of the present row it takes.
        lengths: Entries of each image, from now on.
        overflow: Entries of each image that leave, or become part of others, for lack of room; None where there is
            always room.
    """

    receipt: Receipt
    rows: Int[Tensor, "entries"]
    lengths: tuple[int, ...]
    overflow: Int[Tensor, "images"] | None = None


class Counts(NamedTuple):
    """Tokens in some blocks that run together.

    Attributes:
        blocks: How many blocks.
        lengths: Entries of each image.
        held: Tokens of each image, where that is known on the device alone; the entries if None.
    """

    blocks: int
    lengths: tuple[int, ...]
    held: Int[Tensor, "images"] | None = None


class Layout(ABC):
    """How the tokens that run lie beside one another."""

    @abstractmethod
    def require_room(self, after: Sequence[int]) -> None:
        """Raise a `TokenExitError` unless there can be exits or merges after these blocks."""

    @abstractmethod
    def full(self, images: int, slots: int, device: torch.device) -> Receipt:
        """Receipt of all tokens."""

    @abstractmethod
    def blank(self, receipt: Receipt, row: Float[Tensor, "*layout dim"]) -> Float[Tensor, "images slots dim"]:
        """What lies at slots without an entry where a row is laid out by slot."""

    @abstractmethod
    def compact(self, receipt: Receipt, decision: Decision, stage: Stage, prefix: int) -> Compaction:
        """Drop the tokens that leave after the blocks of a stage, and those without room."""

    @abstractmethod
    def join(
        self, receipt: Receipt, joined: Joined, stage: Stage, prefix: int, certain: Certain | None
    ) -> tuple[Joined, Compaction]:
        """Drop the entries that have become part of others; without room more do, and what is left over leaves.

        `certain` is None where nothing can have left before: then nothing can leave here.
        """

    @abstractmethod
    def attention(
        self, receipt: Receipt, lengths: Sequence[int], token_size: Tensor | None
    ) -> PerImage | Padded | None:
        """Attention within each image, or None if the row needs no help."""

    @abstractmethod
    def tokens_per_block(self, counts: Sequence[Counts], device: torch.device) -> Int[Tensor, "images blocks"]:
        """Tokens of each image in each block."""


@dataclass(frozen=True)
class Packed(Layout):
    """One row of the tokens that run, and no others. Its shapes depend on the data: an exit waits for the device."""

    def require_room(self, after: Sequence[int]) -> None:
        """See `Layout.require_room`: there always can."""

    def full(self, images: int, slots: int, device: torch.device) -> Packing:
        """See `Layout.full`."""
        everything = torch.ones(images, slots, dtype=torch.bool, device=device)
        return Packing(everything, torch.arange(images * slots, device=device))

    def blank(self, receipt: Receipt, row: Float[Tensor, "*layout dim"]) -> Float[Tensor, "images slots dim"]:
        """See `Layout.blank`."""
        return row.new_zeros(receipt.images, receipt.slots, row.shape[-1])

    def compact(self, receipt: Receipt, decision: Decision, stage: Stage, prefix: int) -> Compaction:  # noqa: ARG002
        """See `Layout.compact`."""
        return self._restricted(receipt, decision.stay)

    def join(
        self,
        receipt: Receipt,
        joined: Joined,
        stage: Stage,  # noqa: ARG002
        prefix: int,  # noqa: ARG002
        certain: Certain | None,  # noqa: ARG002
    ) -> tuple[Joined, Compaction]:
        """See `Layout.join`."""
        return joined, self._restricted(receipt, joined.merged.running)

    def _restricted(self, receipt: Receipt, running: Bool[Tensor, "images slots"]) -> Compaction:
        """Drop the tokens of slots that do not run on."""
        require_not_exported("a packed pass")
        assert isinstance(receipt, Packing)
        # Here, and nowhere else, an accelerator is waited for; and once, for both counts and rows would wait.
        if receipt.images == 1:
            packing, rows = tokens.restrict(receipt, running)
            return Compaction(packing, rows, tuple(rows.shape))
        lengths = tuple(running.sum(dim=1).tolist())
        count = sum(lengths) if has_to_wait(running) else None
        packing, rows = tokens.restrict(receipt, running, count=count)
        return Compaction(packing, rows, lengths)

    def attention(self, receipt: Receipt, lengths: Sequence[int], token_size: Tensor | None) -> PerImage | None:
        """See `Layout.attention`: a row with the tokens of one image needs no help."""
        running = sum(length > 0 for length in lengths)
        assert isinstance(receipt, Packing)
        helpless = running == 0 or (running == 1 and token_size is None)
        return None if helpless else PerImage(lengths, receipt.offsets, token_size)

    def tokens_per_block(self, counts: Sequence[Counts], device: torch.device) -> Int[Tensor, "images blocks"]:
        """See `Layout.tokens_per_block`."""
        table = [one.lengths for one in counts for _ in range(one.blocks)]
        on_host = torch.tensor(table, dtype=torch.int64, device="cpu").reshape(len(table), len(counts[0].lengths))
        return on_host.to(device, non_blocking=True).T


PACKED = Packed()


@dataclass(frozen=True)
class Static(Layout):
    """As many entries for each image, with a token or without: shapes are known beforehand, and nothing waits.

    Entries without a token repeat one of their image's, so that they are finite, and none attends to them.

    Attributes:
        capacities: Entries for each image after an exit or a merge, by block, as a fraction of its slots. After both,
            it is what there is room for after both.
    """

    capacities: Mapping[int, float]

    def require_room(self, after: Sequence[int]) -> None:
        """See `Layout.require_room`."""
        lacking = [block for block in after if block not in self.capacities]
        rule = "have one for each exit and each merge of the plan, by block: StaticModel(model, capacities=...)"
        require(not lacking, "capacities", rule, f"none for the blocks {lacking}")

    def full(self, images: int, slots: int, device: torch.device) -> Selection:
        """See `Layout.full`."""
        every = torch.arange(slots, device=device).expand(images, -1)
        nothing = torch.zeros(images, dtype=torch.int64, device=device)
        return Selection(every, torch.ones_like(every, dtype=torch.bool), slots, nothing)

    def blank(self, receipt: Receipt, row: Float[Tensor, "*layout dim"]) -> Float[Tensor, "images slots dim"]:
        """See `Layout.blank`: a token of its image, for entries without one may repeat it."""
        return row[:, :1].expand(-1, receipt.slots, -1)

    def compact(self, receipt: Receipt, decision: Decision, stage: Stage, prefix: int) -> Compaction:
        """See `Layout.compact`: what a merge follows makes room itself."""
        before = receipt.layout[1]
        capacity = before if stage.merge is not None else self._capacity(receipt, stage, prefix)
        return self._selected(receipt, decision.stay, decision.certain, capacity)

    def join(
        self, receipt: Receipt, joined: Joined, stage: Stage, prefix: int, certain: Certain | None
    ) -> tuple[Joined, Compaction]:
        """See `Layout.join`."""
        assert stage.merge is not None
        before, side, grid = receipt.layout[1], stage.merge.side, joined.merged.grid
        capacity = self._capacity(receipt, stage, prefix)
        if certain is None:
            least = prefix + merging.fewest(grid, side=side)
            share = math.ceil(1e4 * least / receipt.slots) / 1e4
            rule = f"have room for a grid of which all cells of {side} x {side} have merged, at least {share}"
            name = f"capacities[{stage.stop}]"
            require(capacity >= min(before, least), name, rule, self.capacities[stage.stop])
        forced = None
        if capacity < before:
            joined, forced = merging.merge_to_fit(joined, side=side, capacity=capacity)
        running = joined.merged.running
        score = running.new_zeros(running.shape, dtype=torch.float32) if certain is None else certain(joined.merged)
        moved = self._selected(receipt, running, score, capacity)
        if forced is not None and moved.overflow is not None:
            moved = moved._replace(overflow=moved.overflow + forced)
        return joined, moved

    def _capacity(self, receipt: Receipt, stage: Stage, prefix: int) -> int:
        """Entries for each image after a stage."""
        assert isinstance(receipt, Selection)
        room = tokens.room(self.capacities[stage.stop], slots=receipt.slots, prefix=prefix)
        return min(room, receipt.layout[1])

    def _selected(self, receipt: Receipt, running: Tensor, certain: Tensor, capacity: int) -> Compaction:
        """Drop the tokens of slots that do not run on, and the most certain of those without room."""
        assert isinstance(receipt, Selection)
        images, before = receipt.layout
        stay, score = (tokens.gather(one, receipt) for one in (running, certain))
        smaller, entry, _ = tokens.reselect(receipt, stay, score, capacity=capacity)
        starts = torch.arange(images, device=entry.device)[:, None] * before
        rows = rearrange(entry + starts, "images capacity -> (images capacity)")
        return Compaction(smaller, rows, (capacity,) * images, smaller.overflow)

    def attention(self, receipt: Receipt, lengths: Sequence[int], token_size: Tensor | None) -> Padded:  # noqa: ARG002
        """See `Layout.attention`."""
        assert isinstance(receipt, Selection)
        return Padded(receipt.valid, token_size)

    def tokens_per_block(self, counts: Sequence[Counts], device: torch.device) -> Int[Tensor, "images blocks"]:
        """See `Layout.tokens_per_block`."""
        held = [
            torch.full((len(one.lengths),), max(one.lengths, default=0), device=device)
            if one.held is None
            else one.held
            for one in counts
            for _ in range(one.blocks)
        ]
        return torch.stack(held, dim=1)


def has_to_wait(tensor: Tensor, /) -> bool:
    """Whether the values of a tensor are known only when an accelerator has computed them."""
    return tensor.device.type != "cpu"
