"""Layouts of the tokens that run: one packed row, or as many entries for every image.

A layout is a value; the forward pass is the same for both.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Int
from torch import Tensor

from tokenexit import tokens
from tokenexit.errors import require
from tokenexit.exits import Decision
from tokenexit.tokens import Packing, Receipt, Selection
from tokenexit_torch._modules import require_not_exported
from tokenexit_torch.attention import Padded, PerImage

__all__ = ["PACKED", "Compaction", "Counts", "Layout", "Packed", "Static", "has_to_wait"]


class Compaction(NamedTuple):
    """What becomes of a row at an exit point.

    Attributes:
        receipt: The receipt of the row that runs on.
        rows: Which entries of the present row it takes.
        lengths: Entries of each image, from now on.
        overflow: Tokens of each image that leave for lack of room; None where there is always room.
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
    def require_exits(self, after: Sequence[int]) -> None:
        """Raise a `TokenExitError` unless there can be exits after these blocks."""

    @abstractmethod
    def full(self, images: int, slots: int, device: torch.device) -> Receipt:
        """Receipt of all tokens."""

    @abstractmethod
    def compact(self, receipt: Receipt, decision: Decision, after: int, prefix: int) -> Compaction:
        """Drop the tokens that leave after a block, and those without room."""

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

    def require_exits(self, after: Sequence[int]) -> None:
        """See `Layout.require_exits`: there always can."""

    def full(self, images: int, slots: int, device: torch.device) -> Packing:
        """See `Layout.full`."""
        everything = torch.ones(images, slots, dtype=torch.bool, device=device)
        return Packing(everything, torch.arange(images * slots, device=device))

    def compact(self, receipt: Receipt, decision: Decision, after: int, prefix: int) -> Compaction:  # noqa: ARG002
        """See `Layout.compact`."""
        return self.restricted(receipt, decision.stay)

    def restricted(self, receipt: Receipt, running: Bool[Tensor, "images slots"]) -> Compaction:
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
        capacities: Entries for each image after an exit, by block, as a fraction of its slots.
    """

    capacities: Mapping[int, float]

    def require_exits(self, after: Sequence[int]) -> None:
        """See `Layout.require_exits`."""
        lacking = [block for block in after if block not in self.capacities]
        require(not lacking, "capacities", "have one for each exit of the model that is static now", lacking)

    def full(self, images: int, slots: int, device: torch.device) -> Selection:
        """See `Layout.full`."""
        every = torch.arange(slots, device=device).expand(images, -1)
        nothing = torch.zeros(images, dtype=torch.int64, device=device)
        return Selection(every, torch.ones_like(every, dtype=torch.bool), slots, nothing)

    def compact(self, receipt: Receipt, decision: Decision, after: int, prefix: int) -> Compaction:
        """See `Layout.compact`."""
        assert isinstance(receipt, Selection)
        images, before = receipt.layout
        capacity = min(tokens.room(self.capacities[after], slots=receipt.slots, prefix=prefix), before)
        stay, certain = (tokens.gather(one, receipt) for one in (decision.stay, decision.certain))
        smaller, entry, _ = tokens.reselect(receipt, stay, certain, capacity=capacity)
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
