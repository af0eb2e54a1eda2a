"""A network's functions, seen to fit one another at every call."""

import dataclasses
from numbers import Integral

import jax
from jax import Array
from jax import numpy as jnp

from tokenexit.area import Area
from tokenexit.errors import TokenExitError, require
from tokenexit_jax._given import require_images
from tokenexit_jax.networks.protocol import Embedded, Network, Params

__all__ = ["DECLARED", "embed", "require_covered", "run_block", "run_blocks", "whole_sides"]


def embed(network: Network, params: Params, images: Array) -> Embedded:
    """Embed images, and require that the tokens fit the network.

    Raises:
        TokenExitError: If they do not.
    """
    require_images(images)
    try:
        embedded = network.embed(params, images)
    except (TokenExitError, jax.errors.JAXTypeError):
        raise
    except (TypeError, ValueError) as error:  # shapes that do not go together, as a rule
        shapes = ", ".join(f"{leaf.dtype}{list(leaf.shape)}" for leaf in jax.tree.leaves(images))
        raise TokenExitError(f"`network.embed` must take these images, {shapes}, got the error: {error}") from error
    rule = "give Embedded: `tokenexit_jax.Embedded(tokens, prefix=..., grid=(rows, columns))`"
    require(isinstance(embedded, Embedded), "network.embed", rule, type(embedded).__name__)
    batch, grid, prefix = embedded.tokens, embedded.grid, embedded.prefix
    several = isinstance(batch, Array) and batch.ndim == 3 and jnp.issubdtype(batch.dtype, jnp.floating)
    got = f"shape {batch.shape}, {batch.dtype}" if isinstance(batch, Array) else type(batch).__name__
    got = f"{got}, for images of shape {', '.join(str(leaf.shape) for leaf in jax.tree.leaves(images))}"
    require(several, "network.embed", "give floating tokens of shape (images, slots, width)", got)
    whole = isinstance(grid, tuple) and len(grid) == 2 and all(isinstance(one, Integral) for one in (prefix, *grid))
    rule = "give a count of prefix tokens, and height and width of the grid"
    require(whole and min(prefix, *grid) >= 0, "network.embed", rule, f"prefix={prefix!r}, grid={grid!r}")
    _, slots, width = batch.shape
    height, across = grid
    require(width == network.width, "network.width", f"be the {width} channels of its tokens", network.width)
    rule = f"give {embedded.prefix} prefix tokens and a grid of {height} x {across}"
    require(slots == embedded.prefix + height * across, "network.embed", rule, f"{slots} tokens")
    positions = embedded.positions
    placed = positions is None or positions.shape[:1] == (slots,)
    rule = f"give positions for {slots} slots"
    require(placed, "network.embed", rule, None if positions is None else f"shape {positions.shape}")
    area = embedded.area
    require(area is None or isinstance(area, Area), "network.embed", "give a tokenexit.area.Area or None", repr(area))
    embedded = dataclasses.replace(embedded, area=None) if area is not None and area.covered == area.image else embedded
    if embedded.area is None and len(getattr(images, "shape", ())) == 4:
        _require_whole(embedded.grid, images.shape)
    return embedded


DECLARED = "`network.embed` say what area the grid covers: Embedded(..., area=tokenexit.area.Area(covered, image))"


def whole_sides(grid: tuple[int, int], shape: tuple[int, ...]) -> list[int]:
    """Which axes may be the heights of images of this shape, cut into whole patches: channels come last or first."""
    return [axis for axis in (1, 2) if shape[axis] % grid[0] == 0 and shape[axis + 1] % grid[1] == 0]


def _require_whole(grid: tuple[int, int], shape: tuple[int, ...]) -> None:
    """Raise unless images are cut into whole patches; name height and width of the grid as exchanged if they are."""
    height, width = grid
    got = f"{height} x {width} for images of shape {shape}"
    whole = len(whole_sides(grid, shape)) > 0
    exchanged = any(
        rows % width == 0 and rows * height == columns * width for rows, columns in (shape[1:3], shape[2:4])
    )
    require(whole or not exchanged, "network.embed", "give height and width of the grid in this order", got)
    require(whole, "images", f"have whole patches, or {DECLARED}", f"a grid of {got}")


def require_covered(area: Area | None) -> None:
    """Raise unless patches cover the images exactly: losses on bare logits know of nothing else.

    Raises:
        TokenExitError: If they do not.
    """
    if area is not None:
        (height, width), (rows, columns) = area.image, area.covered
        rule = "be covered exactly by their patches for losses: cut or pad them and their labels to whole patches"
        require(False, "images", rule, f"{height} x {width} pixels, of which patches cover {rows} x {columns}")


def run_block(
    network: Network, index: int, params: Params, batch: Array, counts: Array, positions: Array | None
) -> Array:
    """Run one block, and require that it gives tokens.

    Raises:
        TokenExitError: If it gives anything else.
    """
    ran = network.blocks[index](params, batch, counts, positions)
    shape = getattr(ran, "shape", type(ran).__name__)
    require(shape == batch.shape, f"network.blocks[{index}]", f"give tokens of shape {batch.shape}", f"{shape}")
    return ran


def run_blocks(
    network: Network, params: Params, batch: Array, positions: Array | None, *, start: int, stop: int
) -> Array:
    """Run some blocks on all tokens, as a plain batch."""
    counts = jnp.ones(batch.shape[:2], dtype=jnp.float32)
    if positions is not None:
        positions = jnp.broadcast_to(positions, (batch.shape[0], *positions.shape))
    for index in range(start, stop):
        batch = run_block(network, index, params, batch, counts, positions)
    return batch
