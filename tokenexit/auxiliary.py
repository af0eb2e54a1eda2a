"""Auxiliary losses: how much the loss of each exit head counts beside that of the final head."""

from collections.abc import Mapping, Sequence

from tokenexit._plain import is_number
from tokenexit.errors import require

__all__ = ["loss_weights"]


def loss_weights(auxiliary: float | Mapping[int, float], /, *, exits: Sequence[int], depth: int) -> dict[int, float]:
    """Weight of the loss of each head, by the blocks before it; the final head's is 1.

    Args:
        auxiliary: Weight of the exits; one for all, or one for each. Weights of exits that do not run are passed over.
        exits: The blocks after which an exit head ran.
        depth: How many blocks there are: what the final head is known by.

    Returns:
        The weights.

    Raises:
        TokenExitError: If a weight is missing or negative, or of a block that can have no exit.
    """
    given = auxiliary if isinstance(auxiliary, Mapping) else dict.fromkeys(exits, auxiliary)
    rule = "be a weight from 0 up, or one for each block with an exit"
    numbers = [is_number(one) and one >= 0 for one in given.values()]
    blocks = all(isinstance(after, int) and 0 < after < depth for after in given)
    require(all(numbers) and blocks, "auxiliary", rule, repr(auxiliary))
    missing = [after for after in exits if after not in given]
    require(not missing, "auxiliary", "have a weight for every exit that runs", f"none for {missing}")
    return {**given, depth: 1.0}
