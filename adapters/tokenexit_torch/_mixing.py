"""Images of several sizes in one packed row. It is no part of the public API.

Each size has a pass of its own, with its grid, its ledger and its policies; only the blocks run on the tokens of all.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokenexit.errors import require
from tokenexit.schedule import Schedule
from tokenexit.tokens import Packing
from tokenexit_torch._blocks import run_blocks
from tokenexit_torch._modules import kept_eager
from tokenexit_torch._passing import PackedRun, packed
from tokenexit_torch.attention import PerImage
from tokenexit_torch.outputs import Output

if TYPE_CHECKING:
    from tokenexit_torch.running import ExitingModel

__all__ = ["MixedRun"]


class MixedRun:
    """One forward pass over images of any sizes: a pass for each size, whose blocks run together."""

    def __init__(self, model: "ExitingModel", images: Sequence[Tensor], schedule: Schedule | None) -> None:
        listed = isinstance(images, Sequence | Tensor) and not isinstance(images, str)
        require(listed, "images", "be a list of tensors of shape (channels, height, width)", type(images).__name__)
        for number, image in enumerate(images):
            threefold = isinstance(image, Tensor) and image.ndim == 3
            got = f"shape {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
            require(threefold, f"images[{number}]", "be a tensor of shape (channels, height, width)", got)
            require(image.layout == torch.strided, f"images[{number}]", "be dense", str(image.layout))
            first = images[0].device
            require(
                image.device == first, f"images[{number}]", f"be on the device of the first, {first}", str(image.device)
            )
        shapes = [image.shape for image in images]
        self.model = model
        self.which = [[at for at, one in enumerate(shapes) if one == shape] for shape in dict.fromkeys(shapes)]
        self.parts = [packed(model, torch.stack([images[at] for at in where]), schedule) for where in self.which]

    def through(self) -> tuple[Output, ...]:
        """The whole pass."""
        if not self.parts:
            return ()
        start = 0
        for part in self.parts:
            part.pack()
        for stop in self.parts[0].stops:
            for part in self.parts:
                part.counted(start, stop)
            self._advance(start, stop)
            for part in self.parts:
                part.pause(stop)
                part.pack()
            start = stop
        return self._outputs()

    def _advance(self, start: int, stop: int) -> None:
        running = [part for part in self.parts if any(part.lengths)]
        if not running:
            return
        row = torch.cat([part.row for part in running], dim=1)
        positions = None
        if running[0].positions is not None:
            positions = torch.cat([part.positions for part in running if part.positions is not None])
        row = run_blocks(self.model.host, start, stop, row, positions, _attention(running))
        for part, rows in zip(running, row.split([part.row.shape[1] for part in running], dim=1), strict=True):
            part.row = rows

    def _outputs(self) -> tuple[Output, ...]:
        found: dict[int, Output] = {}
        for part, where in zip(self.parts, self.which, strict=True):
            part.unpack()
            logits, depth, ran, exits, head_on, area = part.output()
            for number, at in enumerate(where):
                one = slice(number, number + 1)
                found[at] = Output(logits[one], depth[one], ran[one], exits, head_on, area)
        return tuple(found[at] for at in sorted(found))


@kept_eager
def _attention(parts: Sequence[PackedRun]) -> PerImage:
    lengths, counts, weights = [], [], []
    for part in parts:
        assert isinstance(part.receipt, Packing)
        lengths += part.lengths
        counts.append(part.receipt.lengths)
        weights.append(part.row.new_ones(part.row.shape[1]) if part.token_size is None else part.token_size)
    offsets = torch.nn.functional.pad(torch.cat(counts).cumsum(0), (1, 0))
    plain = all(part.token_size is None for part in parts)
    return PerImage(lengths, offsets, None if plain else torch.cat(weights))
