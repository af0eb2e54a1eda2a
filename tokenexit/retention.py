"""Which of the tokens that could leave stay all the same: the most confident of every predicted class.

A class that has lost all its tokens is gone from the attention of those that still compute; DToP (ICCV 2023,
section 3.3) therefore keeps the k most confident tokens of each predicted class, per image. Image and class
together are one group, so that neither is ever looped over.
"""

from jaxtyping import Bool, Float, Int

from tokenexit._array import Array, array_namespace, counting
from tokenexit.errors import require

__all__ = ["rank_in_group", "top_k_per_group"]


def rank_in_group(score: Float[Array, "tokens"], group: Int[Array, "tokens"], /) -> Int[Array, "tokens"]:
    """Rank of every token by score within its group: 0 is the highest.

    Ties go to the lower position; NaN ranks as minus infinity.

    Args:
        score: What to rank by.
        group: Group of every token; any integers.

    Returns:
        Rank in its group, 0 <= rank < size of the group.

    Raises:
        TokenExitError: If the two arrays are not one-dimensional and of one length.
    """
    require(
        score.ndim == 1 and score.shape == group.shape,
        "group",
        f"have one entry for each of the scores, of shape {tuple(score.shape)}",
        f"shape {tuple(group.shape)}",
    )
    xp = array_namespace(score, group)
    falling = xp.where(xp.isnan(score), xp.full_like(score, xp.inf), -score)
    by_score = xp.argsort(falling, stable=True)
    by_group = xp.argsort(xp.take(group, by_score), stable=True)
    order = xp.take(by_score, by_group)
    sorted_group = xp.take(group, order)
    rank = counting(score.shape[0], score) - xp.searchsorted(sorted_group, sorted_group)
    return xp.take(rank, xp.argsort(order))


def top_k_per_group(
    candidate: Bool[Array, "tokens"], score: Float[Array, "tokens"], group: Int[Array, "tokens"], /, *, k: int
) -> Bool[Array, "tokens"]:
    """The at most `k` candidates of each group with the highest scores.

    Args:
        candidate: Which tokens compete; the others take no place.
        score: What to rank by.
        group: Group of every token, not negative: say `image * classes + predicted class`.
        k: How many to mark in each group; may exceed any group.

    Returns:
        True for the marked tokens, all of them candidates.

    Raises:
        TokenExitError: If `k` is negative, or the arrays are not one-dimensional and of one length.
    """
    require(k >= 0, "k", "be at least 0", k)
    if k == 0:
        return candidate & ~candidate
    xp = array_namespace(candidate, score, group)
    competing = xp.where(candidate, group, xp.full_like(group, -1))
    return candidate & (rank_in_group(score, competing) < k)
