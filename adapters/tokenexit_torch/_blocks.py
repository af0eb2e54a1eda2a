"""One block of a host, and what must hold of it at every call. It is no part of the public API.

What `wrap` has checked once may change later: attention is patched or switched, a block is exchanged.
"""

from contextlib import nullcontext

from torch import Tensor

from tokenexit import TokenExitError
from tokenexit_torch.attention import CALL, Attending
from tokenexit_torch.hosts.protocol import Host, Inattentive

__all__ = ["run_block", "run_blocks"]


def run_blocks(
    host: Host, start: int, stop: int, row: Tensor, positions: Tensor | None, attention: Attending | None
) -> Tensor:
    """Some blocks in a row, between two exit points: what `torch.compile` makes one program of."""
    with nullcontext() if attention is None else attention:
        for index in range(start, stop):
            row = run_block(host, index, row, positions, attention)
    return row


def run_block(
    host: Host, index: int, row: Tensor, positions: Tensor | None, attention: Attending | None = None
) -> Tensor:
    """One block on a row.

    Args:
        host: Host of the block.
        index: Which one.
        row: The tokens.
        positions: What belongs to them.
        attention: What takes attention over; its context is entered already.

    Returns:
        The tokens after the block.

    Raises:
        TokenExitError: If attention was to be taken over and the block called none, or the row has another shape.
    """
    calls = 0 if attention is None else attention.calls
    ran = host.run(index, row, positions)
    if attention is not None and attention.needed and attention.calls == calls and not isinstance(host, Inattentive):
        raise TokenExitError(f"`model.blocks[{index}]` must {CALL}, got no call")
    if not isinstance(ran, Tensor) or ran.shape != row.shape:
        got = f"shape {tuple(ran.shape)}" if isinstance(ran, Tensor) else type(ran).__name__
        rule = f"give back as many tokens as it is given, in a tensor of shape {tuple(row.shape)}"
        raise TokenExitError(f"`model.blocks[{index}]` must {rule}, got {got}")
    return ran
