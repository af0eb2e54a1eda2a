"""The oracle: one image at a time, in plain batches of the tokens that are left, from which they go as they are told."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import tokenexit_torch as tet
from tests.core import oracles
from tokenexit import cells, tokens
from tokenexit.carries import Carry, Feature, MaskPrediction, Prediction


@dataclass(frozen=True)
class Alone:
    """One image in a network.

    Attributes:
        tokens: What its first block is given, (1, slots, width).
        prefix: How many of them are no patches.
        grid: Rows and columns of patches.
        run: Runs a block on some of the tokens, (1, tokens, width), which are in these slots.
        finish: What follows the last block.
    """

    tokens: Tensor
    prefix: int
    grid: tuple[int, int]
    run: Callable[[int, Tensor, Tensor], Tensor]
    finish: Callable[[Tensor], Tensor]


def of_host(host: Any, image: Tensor) -> Alone:
    """One image, (1, 3, height, width), in a host of the library."""
    embedded = host.embed(image)

    def run(block: int, row: Tensor, slots: Tensor) -> Tensor:
        return host.run(block, row, None if embedded.positions is None else embedded.positions[slots])

    return Alone(embedded.tokens, embedded.prefix, embedded.grid, run, host.finish)


def walk(
    image: Alone, exit_depth: Tensor, *, blocks: int, carry: Carry = Prediction(), cell: int | None = None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Block after block, tokens leaving as `exit_depth` (rows, columns) says.

    Yields:
        After each block: every slot's feature as it was when it last ran, (slots, width); the slots that have run, and
        which of these leave now.
    """
    depth = torch.cat([torch.full((image.prefix,), blocks + 1), exit_depth.flatten()])
    features, slots = image.tokens[0], torch.arange(len(depth))
    feature = carry if isinstance(carry, Feature) else Feature()
    for block in range(1, blocks + 1):
        if feature.before == "last block" and block == blocks:
            slots = torch.arange(len(depth))
        leaving = depth[slots] == block
        if len(slots):
            features = features.clone()
            features[slots] = _block(image, block - 1, features[slots], slots, cell)
            share = feature.fold_above
            if share is not None and block < blocks and leaving.sum() > share * (len(slots) - 1):
                features[0] = (features[0] + features[slots[leaving]].mean(dim=0)) / 2
        yield features, slots, leaving
        slots = slots[~leaving]
        if (slots < image.prefix).all():
            slots = slots[:0]


@torch.no_grad()
def run_one_by_one(
    model: tet.ExitingModel,
    images: Tensor,
    exit_depth: Tensor,
    *,
    carry: Carry = Prediction(),
    cell: int | None = None,
    alone: Callable[[Tensor], Alone] | None = None,
) -> Tensor:
    """Logits of a model with exits, (images, classes, rows, columns), whose tokens leave as `exit_depth` says.

    Args:
        model: The model; of it the heads are used, of any kind, and the host unless `alone` is given.
        images: Images.
        exit_depth: After how many blocks each token leaves, (images, rows, columns).
        carry: What leavers leave behind.
        cell: Side of cells; the token in the middle of one is then there as often as it stands for tokens.
        alone: How one image runs: by the code of another library.
    """
    found = []
    for index in range(len(images)):
        image = images[index : index + 1]
        one = of_host(model.host, image) if alone is None else alone(image)
        found.append(_outcome(model, one, exit_depth[index], carry, cell))
    return torch.stack(found)


def _outcome(model: tet.ExitingModel, image: Alone, exit_depth: Tensor, carry: Carry, cell: int | None) -> Tensor:
    outcome, presence = {}, None
    steps = walk(image, exit_depth, blocks=model.depth, carry=carry, cell=cell)
    for block, (features, slots, leaving) in enumerate(steps, start=1):
        rejoining = isinstance(carry, Feature)
        if block == model.depth:
            slots = torch.arange(len(features)) if rejoining else slots
            leaving = torch.ones(len(slots), dtype=torch.bool)
        if not leaving.any() or (rejoining and block < model.depth):
            continue
        if block < model.depth:
            said, presence = _read(model.exit_heads[str(block)], features[slots], slots, image)
        else:
            said, presence = _read(model.head, image.finish(features[slots][None])[0], slots, image)
        if presence is not None and carry != MaskPrediction():
            said = log_scores(said, presence)
        outcome |= zip(slots[leaving].tolist(), said[leaving], strict=True)
    found = torch.stack([outcome[slot] for slot in range(image.prefix, len(features))])
    if carry == MaskPrediction():  # weighed anew, as the last head that has read anything sees the classes
        found = log_scores(found, presence)
    return found.T.unflatten(1, image.grid)


def log_scores(mask_logits: Tensor, presence_logits: Tensor) -> Tensor:
    return (presence_logits.sigmoid() * mask_logits.sigmoid()).log()


def _read(head: nn.Module, row: Tensor, slots: Tensor, image: Alone) -> tuple[Tensor, Tensor | None]:
    """What a head says of all tokens that run; of a mask head, its masks, and the presence of classes."""
    if isinstance(head, tet.MaskHead):
        patches = slots >= image.prefix
        masks, presence = head(row[patches], [int(patches.sum())])
        said = masks.new_zeros(len(row), masks.shape[1])
        said[patches] = masks
        return said, presence[0]
    if hasattr(head, "radius"):
        shape = image.tokens.shape
        running, rows = np.zeros(shape[:2], bool), np.zeros(shape)
        running[0, slots], rows[0, slots] = True, row
        beside = oracles.walked(rows, running, image.grid, head.radius, image.prefix)[0, slots]
        return head(torch.from_numpy(beside).to(row)), None
    return head(row), None


def _block(image: Alone, block: int, row: Tensor, slots: Tensor, cell: int | None) -> Tensor:
    if cell is None:
        return image.run(block, row[None], slots)[0]
    running = torch.zeros(image.tokens.shape[:2], dtype=torch.bool)
    running[0, slots] = True
    often = cells.token_size(tokens.pack(running), grid=image.grid, side=cell).int()
    assert (often[~cells.is_cell_centre(slots - image.prefix, grid=image.grid, side=cell)] == 1).all()
    copies = torch.repeat_interleave(torch.arange(len(slots)), often)
    first = torch.cumsum(often, 0) - often
    return image.run(block, row[copies][None], slots[copies])[0, first]
