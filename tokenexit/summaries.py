"""What a call has done, in a sentence."""

from jaxtyping import Int

from tokenexit._array import Array, array_namespace
from tokenexit.errors import require

__all__ = ["summary"]


def summary(
    exit_depth: Int[Array, "images grid_height grid_width"],
    tokens_per_block: Int[Array, "images blocks"],
    /,
    *,
    merged_size: Int[Array, "images grid_height grid_width"] | None = None,
    overflow: Int[Array, "images"] | None = None,
) -> str:
    """Sentences about an output: after which blocks patches left, how many merged, and what share of the work was left.

    It waits for an accelerator, and cannot be traced.

    Args:
        exit_depth: After how many blocks every patch left; all of them if it never did.
        tokens_per_block: Tokens of each image in each block, prefix tokens included.
        merged_size: How many patches ran on as one with every patch; None if nothing could merge.
        overflow: How many entries of each image left or merged for lack of room alone; None if there was always room.

    Returns:
        The sentences, as "2 images of 4 x 6 patches: after block 3 left 41.7 % of the patches, ...".

    Raises:
        TokenExitError: If the arrays are not of the same images.
    """
    images, height, width = exit_depth.shape
    blocks = tokens_per_block.shape[1]
    rule = f"be of {images} images, as `exit_depth`"
    require(tokens_per_block.shape[0] == images, "tokens_per_block", rule, tokens_per_block.shape[0])
    patches = images * height * width
    many = f"{images} image{'' if images == 1 else 's'} of {height} x {width} patches"
    if patches == 0:
        return f"{many}."
    xp = array_namespace(exit_depth)
    counts = {block: int(xp.sum(xp.astype(exit_depth == block, xp.int32))) for block in range(1, blocks + 1)}
    left = [
        f"{_percent(count, patches)} after block {block}" for block, count in counts.items() if count and block < blocks
    ]
    found = f"none of the patches left before the last of {blocks} blocks"
    if left:
        stayed = _percent(counts[blocks], patches)
        found = f"of the patches left {', '.join(left)}; {stayed} ran through all {blocks} blocks"
    parts = [f"{many}: {found}."]
    if merged_size is not None:
        merged = merged_size > 1
        share = int(xp.sum(xp.astype(merged, xp.int32)))
        parts.append(f"{_percent(share, patches)} of them ran merged, up to {int(xp.max(merged_size))} as one.")
    slots = int(xp.max(tokens_per_block))
    ran, whole = int(xp.sum(tokens_per_block)), images * blocks * slots
    parts.append(f"Blocks ran on {_percent(ran, max(whole, 1))} of the tokens that the dense network has in them.")
    lacked = 0 if overflow is None else int(xp.sum(overflow))
    if lacked:
        parts.append(f"{lacked} left or merged only because there was no room for them.")
    return " ".join(parts)


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %"
