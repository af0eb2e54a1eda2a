"""Exits with shapes that are known beforehand: for CUDA graphs, one compiled program, and export.

After each exit there are so many entries for every image, whoever leaves. Nothing waits for the device, and nothing
depends on the data but the data. What an exit would keep beyond that leaves as well, and is counted.
"""

from collections.abc import Mapping
from numbers import Real

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from tokenexit import tokens
from tokenexit.errors import require
from tokenexit.schedule import Schedule
from tokenexit.tokens import Receipt, Selection
from tokenexit_torch._modules import counts_batches, require_not_traced
from tokenexit_torch._passing import Move, Run
from tokenexit_torch.attention import Padded
from tokenexit_torch.outputs import Output, StaticOutput
from tokenexit_torch.running import ExitingModel

__all__ = ["StaticModel", "needed_capacity"]


class StaticModel(nn.Module):
    """A wrapped model with a fixed number of entries after each exit.

    Its weights, and its plan, are the model's: `retune` that, and what was compiled compiles anew. It gives what the
    model gives wherever there is room for all that stay. Where there is not, the most confident surplus leaves with its
    present prediction; `StaticOutput.overflow` counts it. What there is room for is computed, whether anyone is there
    or not: so capacities near what is needed make it fast (`needed_capacity`).

    It compiles as one program, `torch.compile(static, fullgraph=True)`; is safe in a CUDA graph; and can be exported,
    by `torch.export` or as ONNX (`export_onnx`). Number and size of images are then fixed.

    Args:
        model: The wrapped model.
        capacities: What runs on after an exit, as a fraction of the slots of an image, prefix tokens among them: one
            fraction for all exits, or one for each block with an exit head. They never grow from one exit to the next.

    Attributes:
        model: The wrapped model.
        capacities: The fraction for each block with an exit head.

    Raises:
        TokenExitError: If the model is not wrapped by `wrap` or has mask heads, whose patches are looked at together,
            or a capacity is missing or not in (0, 1].
    """

    model: ExitingModel
    capacities: dict[int, float]

    def __init__(self, model: ExitingModel, /, *, capacities: float | Mapping[int, float]) -> None:
        super().__init__()
        require(isinstance(model, ExitingModel), "model", "be wrapped by `wrap`", type(model).__name__)
        require(not model.gives_masks, "model", "have heads that give no masks", "mask heads")
        after = [int(block) for block in model.exit_heads]
        given = capacities if isinstance(capacities, Mapping) else dict.fromkeys(after, capacities)
        rule = f"be a fraction for all exits, or for each of the blocks {after}"
        require(set(given) == set(after), "capacities", rule, repr(capacities))
        for block, fraction in given.items():
            number = isinstance(fraction, Real) and not isinstance(fraction, bool) and 0 < fraction <= 1
            require(number, f"capacities[{block}]", "be greater than 0 and at most 1", repr(fraction))
        self.model = model
        self.capacities = {block: float(given[block]) for block in after}

    def forward(
        self, images: Float[Tensor, "images channels height width"], *, schedule: Schedule | None = None
    ) -> StaticOutput:
        """Segment images.

        Args:
            images: The images, as the wrapped model takes them.
            schedule: A plan for this call only; the model's own if left out.

        Returns:
            Class scores, exit depth, executed tokens, and how many had no room.

        Raises:
            TokenExitError: If the images do not fit the model, or an exit of the plan has no head.
        """
        return StaticRun(self, images, schedule).static()

    def multiply_adds(self, output: StaticOutput) -> Int[Tensor, "images"]:
        """Multiply-adds that a call has executed, entries without a token, heads and patch embedding included.

        Exit heads are counted for the patches that there is room for.

        Args:
            output: What the call returned.

        Returns:
            Multiply-adds per image.

        Raises:
            TokenExitError: If the output is of another network.
        """
        logits, depth, _, capacity, _, exits, head_on, _ = output
        return self.model.multiply_adds(Output(logits, depth, capacity, exits, head_on))


def needed_capacity(output: Output | StaticOutput, /) -> dict[int, float]:
    """After each exit, the fraction of its slots that the fullest image of a call needed: for `StaticModel`.

    Take the largest over images like those to come, and some more: what has no room leaves.

    Args:
        output: What a call returned.

    Returns:
        Fractions in (0, 1], by the block before the exit.

    Raises:
        TokenExitError: If it was a call without images.
    """
    counts = output.tokens_per_block
    require(len(counts) > 0, "output", "be of at least one image", "none")
    slots = int(counts[0, 0])
    return {after: max(int(counts[:, after].max()), 1) / slots for after in output.exits}


class StaticRun(Run):
    """One forward pass in the static layout. It is no part of the public API.

    The row has as many entries for each image. Those without a token repeat one of their image's, so that they are
    finite, and nobody attends to them.
    """

    def __init__(self, static: StaticModel, images: Tensor, schedule: Schedule | None) -> None:
        require_not_traced("StaticModel")
        super().__init__(static.model, images, schedule)
        lacking = [after for after in self.policy if after not in static.capacities]
        require(not lacking, "capacities", "have one for each exit of the model that is static now", lacking)
        least = min(self.embedded.prefix + 1, self.slots)
        self.room = {after: max(least, round(share * self.slots)) for after, share in static.capacities.items()}
        self.overflow = torch.zeros(self.images, dtype=torch.int64, device=self.row.device)
        # Tokens of each image, and entries for each, in every block.
        self.held: list[Tensor] = []
        self.worked: list[int] = []

    def static(self) -> StaticOutput:
        """The whole pass."""
        logits, depth, ran, exits, head_on, area = self.through()
        worked = torch.stack([torch.full_like(self.overflow, entries) for entries in self.worked], dim=1)
        return StaticOutput(logits, depth, ran, worked, self.overflow, exits, head_on, area)

    def counted(self, start: int, stop: int) -> None:
        everyone = torch.full_like(self.overflow, self.slots)
        self.held += [everyone if self.receipt is None else self.receipt.lengths] * (stop - start)
        self.worked += [self.slots if self.receipt is None else self.receipt.layout[1]] * (stop - start)

    def ran(self) -> Tensor:
        return torch.stack(self.held, dim=1)

    def attention(self) -> Padded | None:
        if self.receipt is None:
            return None
        assert isinstance(self.receipt, Selection)
        return Padded(self.receipt.valid, self.token_size)

    def _scored(self, head: nn.Module, flat: Tensor) -> Tensor:
        # Which entries hold a patch is known on the device alone.
        rule = "have no batch norm in training, which would count entries without a patch: train by `Staged`"
        require(not counts_batches(head), "model", rule, type(head).__name__)
        return head(flat)

    def first(self) -> Receipt:
        slots = torch.arange(self.slots, device=self.row.device).expand(self.images, -1)
        return Selection(slots, torch.ones_like(slots, dtype=torch.bool), self.slots, torch.zeros_like(self.overflow))

    def repack(self, stay: Tensor, kept: Tensor, confidence: Tensor) -> Move:
        assert isinstance(self.receipt, Selection)
        before = self.receipt.layout[1]
        capacity = min(self.room[self.after], before)
        certain = torch.where(kept, -torch.inf, confidence)
        stay = self.laid(stay) & self.receipt.valid
        receipt, entry, surplus = tokens.reselect(self.receipt, stay, self.laid(certain), capacity=capacity)
        self.overflow = self.overflow + receipt.overflow
        self.lengths = [capacity] * self.images
        starts = torch.arange(self.images, device=entry.device)[:, None] * before
        rows = rearrange(entry + starts, "images capacity -> (images capacity)")
        return Move(receipt, rows, (stay & ~surplus).flatten())
