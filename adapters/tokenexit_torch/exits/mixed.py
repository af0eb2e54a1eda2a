"""Images of several sizes in one packed row.

Each size has a state of its own, with its grid, its ledger and its policies; only the blocks run on the tokens of all.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tokenexit.errors import require
from tokenexit.schedule import Schedule, Stage
from tokenexit_torch._blocks import run_blocks
from tokenexit_torch._modules import kept_eager
from tokenexit_torch.attention import PerImage
from tokenexit_torch.exits.base import WithExits
from tokenexit_torch.exits.forward import Row, State, as_row, packed_finish_stage, packed_start

__all__ = ["run_mixed"]


def run_mixed(
    model: WithExits[Any], images: Sequence[Tensor], schedule: Schedule | None, /
) -> tuple[list[State], list[list[int]]]:
    """All blocks on images of any sizes, and what happens between them.

    Returns:
        A state for each size, and the places of its images among all.

    Raises:
        TokenExitError: If an image or the plan does not fit the model.
    """
    require_images(images)
    shapes = [image.shape for image in images]
    places = [[at for at, one in enumerate(shapes) if one == shape] for shape in dict.fromkeys(shapes)]
    states = [packed_start(model, torch.stack([images[at] for at in where]), schedule) for where in places]
    for stage in states[0].fixed.stages if states else ():
        states = _finish_stage(states, stage, _run_stage(_rows(states), stage))
    return states, places


def require_images(images: Sequence[Tensor], /) -> None:
    """Raise a `TokenExitError` unless these are dense images on one device."""
    listed = isinstance(images, Sequence | Tensor) and not isinstance(images, str)
    require(listed, "images", "be a list of tensors of shape (channels, height, width)", type(images).__name__)
    for number, image in enumerate(images):
        name = f"images[{number}]"
        threefold = isinstance(image, Tensor) and image.ndim == 3
        got = f"shape {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
        require(threefold, name, "be a tensor of shape (channels, height, width)", got)
        require(image.layout == torch.strided, name, "be dense", str(image.layout))
        first = images[0].device
        require(image.device == first, name, f"be on the device of the first, {first}", str(image.device))


@kept_eager
def _rows(states: Sequence[State]) -> list[State]:
    return [as_row(state) for state in states]


def _run_stage(states: Sequence[State], stage: Stage) -> list[Tensor]:
    """Run the blocks of a stage on the tokens of all states."""
    running = [state for state in states if state.runs]
    if not running:
        return [state.tokens for state in states]
    row = torch.cat([state.tokens for state in running], dim=1)
    positions = None
    if running[0].positions is not None:
        positions = torch.cat([state.positions for state in running if state.positions is not None])
    host = running[0].fixed.model.host
    row = run_blocks(host, stage.start, stage.stop, row, positions, _attention(running))
    parts = iter(row.split([state.tokens.shape[1] for state in running], dim=1))
    return [next(parts) if state.runs else state.tokens for state in states]


@kept_eager
def _finish_stage(states: Sequence[State], stage: Stage, ran: Sequence[Tensor]) -> list[State]:
    # A state that is a plain batch has run as a row; what follows takes either.
    return [packed_finish_stage(state, stage, row) for state, row in zip(_rows(states), ran, strict=True)]


@kept_eager
def _attention(states: Sequence[State]) -> PerImage:
    rows = [_row(state) for state in states]
    sizes = [
        torch.ones_like(row.receipt.index, dtype=state.tokens.dtype) if row.token_size is None else row.token_size
        for row, state in zip(rows, states, strict=True)
    ]
    counts = torch.cat([row.receipt.lengths for row in rows])
    plain = all(row.token_size is None for row in rows)
    lengths = [length for row in rows for length in row.lengths]
    return PerImage(lengths, functional.pad(counts.cumsum(0), (1, 0)), None if plain else torch.cat(sizes))


def _row(state: State) -> Row:
    assert state.row is not None
    return state.row
