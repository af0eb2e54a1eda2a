"""Which of the tokens that could leave stay all the same: the most confident of every predicted class.

A class that has lost all its tokens is gone from the attention of those that still compute; DToP (ICCV 2023,
section 3.3) therefore keeps the k most confident tokens of each predicted class, per image. Image and class
together are one group, so that neither is ever looped over.

Sorting everything by group is slower than the loop it replaces when classes are few, so little is sorted: in a long
ragged row, tokens that k others of their group are seen to beat are dropped first; in libraries without shapes that
depend on the data, as JAX, a tournament of chunks leaves k chunks per group to look at; and rows with few groups are
sorted by score alone, and each group asked for its k-th. Only where none of these serves is all sorted.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from jaxtyping import Bool, Float, Int, Shaped

from tokenexit._array import (
    Array,
    aligned,
    array_namespace,
    counting,
    data_dependent_shapes,
    filled,
    first_k,
    kth_least,
    on_host,
    searchsorted,
    take,
    take_along_axis,
    without_nan,
)
from tokenexit.errors import require

__all__ = ["rank_in_group", "top_k_per_group"]

# Speed alone depends on these; `tests/benchmarks/retention.py` measures it.
FEW_TO_SORT = 2048
MANY_TO_SORT = 16384
FEW_GROUPS = 256
FEW_ROUNDS = 8
FEW_TO_COMPARE = 1 << 17


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
    by_score = xp.argsort(-without_nan(score), stable=True)
    by_group = xp.argsort(take(group, by_score), stable=True)
    order = take(by_score, by_group)
    sorted_group = take(group, order)
    rank = counting(score.shape[0], score) - searchsorted(sorted_group, sorted_group)
    return take(rank, xp.argsort(order))


def top_k_per_group(
    candidate: Bool[Array, "*images tokens"],
    score: Float[Array, "*images tokens"],
    group: Int[Array, "*images tokens"],
    /,
    *,
    k: int,
    groups: int,
) -> Bool[Array, "*images tokens"]:
    """The at most `k` candidates of each group with the highest scores.

    Ties go to the lower position; NaN ranks as minus infinity, as does, in JAX with few groups, the lowest number of
    the dtype. One row of tokens is taken as ragged, and may be
    worked on with shapes that depend on the data, where the library has them. Rows of fixed length, as
    `(images, tokens)`, are looked at one by one, never compared with each other, with static shapes only.

    Args:
        candidate: Which tokens compete; the others take no place.
        score: What to rank by.
        group: Group of every token, 0 <= group < groups, which is not checked: in a ragged row say
            `image * classes + predicted class`.
        k: How many to mark in each group; may exceed any group.
        groups: How many groups there can be.

    Returns:
        True for the marked tokens, all of them candidates.

    Raises:
        TokenExitError: If `k` is negative, `groups` is not positive, or the arrays differ in shape.
    """
    require(k >= 0, "k", "be at least 0", k)
    require(groups >= 1, "groups", "be at least 1", groups)
    for name, array in (("score", score), ("group", group)):
        if array.ndim == 0 or array.shape != candidate.shape:
            rule = f"have one entry for each of the candidates, of shape {tuple(candidate.shape)}"
            require(False, name, rule, f"shape {tuple(array.shape)}")
    if k == 0 or 0 in candidate.shape:
        return candidate & ~candidate
    xp = array_namespace(score)
    k = min(k, candidate.shape[-1])
    if groups > xp.iinfo(group.dtype).max:  # class maps of 8 bits
        group = xp.astype(group, counting(0, group).dtype)
    eager = data_dependent_shapes(xp)
    # An accelerator sorts sooner than the host learns how many tokens remain.
    if eager and candidate.ndim == 1 and candidate.shape[0] > FEW_TO_SORT and on_host(candidate):
        find = _in_ragged_row
    elif not eager and groups <= FEW_GROUPS and k <= FEW_ROUNDS:
        find = _by_tournament
    elif eager and groups * math.prod(candidate.shape) <= FEW_TO_COMPARE:
        find = _by_rank
    else:
        find = _by_sorting
    return candidate & find(xp, candidate, score, group, k, groups)


def _in_order(xp: Any, score: Array, group: Array, numbers: Array, groups: int) -> tuple[Array, Array]:
    """The tokens of each row, numbered, sorted by group, and by falling score within it, and their groups."""
    tokens = score.shape[-1]
    pick = take if score.ndim == 1 else partial(take_along_axis, axis=-1)
    by_score = xp.argsort(-score, axis=-1, stable=True)
    then = pick(group, by_score)
    bits = tokens.bit_length()
    if (groups + 1) << bits > xp.iinfo(by_score.dtype).max:
        by_group = xp.argsort(then, axis=-1, stable=True)
        return pick(by_score, by_group), pick(then, by_group)
    # One key of both, because sorting values is several times faster than sorting indices.
    key = xp.sort(xp.astype(then, by_score.dtype) * (1 << bits) + numbers, axis=-1)
    return pick(by_score, key % (1 << bits)), key // (1 << bits)


def _by_rank(xp: Any, candidate: Array, score: Array, group: Array, k: int, groups: int) -> Array:
    tokens = score.shape[-1]
    order = xp.argsort(without_nan(score), axis=-1, descending=True, stable=True)
    rank = xp.where(candidate, xp.argsort(order, axis=-1), tokens)  # no two alike: the k-th is one token
    wanted = counting(groups, group)
    group = group if group.dtype == wanted.dtype else xp.astype(group, wanted.dtype)
    is_of = group[..., None, :] == aligned(wanted[:, None], score.ndim + 1)
    limit = kth_least(xp.where(is_of, rank[..., None, :], tokens), k)
    return rank <= take_along_axis(limit, group, axis=-1)


def _by_sorting(xp: Any, candidate: Array, score: Array, group: Array, k: int, groups: int) -> Array:
    group = xp.where(candidate, group, groups)
    numbers = aligned(counting(score.shape[-1], score), score.ndim)
    order, sorted_group = _in_order(xp, without_nan(score), group, numbers, groups)
    # Of a token's group, if the k-th before it is not, no k are ahead of it.
    later = sorted_group[..., k:] != sorted_group[..., : score.shape[-1] - k]
    first = xp.concat([xp.ones_like(candidate[..., :k]), later], axis=-1)
    back = xp.sort(order * 2 + xp.astype(first, order.dtype), axis=-1)
    return back % 2 == 1


def _in_ragged_row(xp: Any, candidate: Array, score: Array, group: Array, k: int, groups: int) -> Array:
    numbers = counting(max(score.shape[0], groups + 2, k), score)
    limit, last, marked = _kth(xp, candidate, score, group, numbers, k, groups)
    least = take(limit, group)
    # NaN is among them, so that in no group there are fewer than are first.
    reach = candidate & ~(score < least)
    if int(xp.count_nonzero(reach)) == int(marked):
        return reach
    # Somewhere the k-th has equals behind it, or there is NaN.
    score = without_nan(score)
    return (score > least) | ((score == least) & (numbers[: score.shape[0]] <= take(last(), group)))


def _kth(
    xp: Any, candidate: Array, score: Array, group: Array, numbers: Array, k: int, groups: int
) -> tuple[Array, Callable[[], Array], Array]:
    """Score and place of the k-th candidate of every group, or what none fails if it has fewer; how many are first.

    The places are computed when they are asked for, which is where scores are equal.
    """
    tokens = score.shape[0]

    def worth(place: Array, value: Array, own: Array, limit: Array, last: Array) -> tuple[Array, Array, Array]:
        """Of some candidates, those that k others of their group are not known to be ahead of."""
        least = take(limit, own)
        (rows,) = xp.nonzero((value > least) | ((value == least) & (place <= take(last, own))))
        return take(place, rows), take(value, rows), take(own, rows)

    # As many tokens in the sample as then remain.
    stride = math.isqrt(tokens // (k * groups))
    if tokens > FEW_TO_SORT and stride > 1:
        place = numbers[:tokens:stride]
        own = xp.where(candidate[::stride], group[::stride], groups)
        limit, last = _bound(xp, place, without_nan(score[::stride]), own, numbers, k, groups + 1)
        (place,) = xp.nonzero(candidate & ~(score < take(limit, group)))
    else:
        (place,) = xp.nonzero(candidate)
        limit = last = None
    value, own = without_nan(take(score, place)), take(group, place)
    if place.shape[0] > MANY_TO_SORT and last is not None:  # many share a score: the earlier ones come first
        place, value, own = worth(place, value, own, limit, last())
    if place.shape[0] > MANY_TO_SORT and k * groups < place.shape[0]:
        limit, last = _bound(xp, place, value, own, numbers, k, groups)
        place, value, own = worth(place, value, own, limit, last())
    order, sorted_group = _in_order(xp, value, own, numbers[: place.shape[0]], groups)
    start = searchsorted(sorted_group, numbers[: groups + 1])
    kth, marked = start[:-1] + (k - 1), xp.sum(xp.minimum(start[1:] - start[:-1], k))
    if place.shape[0] == 0:
        return filled((groups,), -xp.inf, score, dtype=score.dtype), lambda: kth, marked
    found = kth < start[1:]
    row = take(order, xp.where(found, kth, 0))
    limit = xp.where(found, take(value, row), -xp.inf)
    return limit, lambda: xp.where(found, take(place, row), xp.iinfo(place.dtype).max), marked


def _bound(
    xp: Any, place: Array, score: Array, group: Array, numbers: Array, k: int, groups: int
) -> tuple[Array, Callable[[], Array]]:
    """The worst score, and the last place, of some k good tokens of every group: the first k by rounded score.

    A token that k others of its group are ahead of is not among the first k: any k of them will do, but the better
    they are, the fewer tokens remain.
    """
    tokens = score.shape[0]
    bits = tokens.bit_length()
    levels = 1 << max(0, min(20, 62 - bits - groups.bit_length()))
    falling = (1 - xp.astype(score, xp.float32)) * levels
    level = xp.astype(xp.minimum(xp.maximum(falling, 0), levels - 1), place.dtype)
    key = xp.sort((xp.astype(group, place.dtype) * levels + level) * (1 << bits) + numbers[:tokens])
    start = searchsorted(key, numbers[: groups + 1] * (levels << bits))
    found = start[:-1] + k <= start[1:]
    row = xp.where(found, start[:-1], 0)[:, None] + numbers[:k]
    row = xp.reshape(xp.where(row < tokens, row, 0), (groups * k,))
    row = take(key, row) & ((1 << bits) - 1)
    limit = xp.min(xp.reshape(take(score, row), (groups, k)), axis=1)

    def last() -> Array:
        places = xp.max(xp.reshape(take(place, row), (groups, k)), axis=1)
        return xp.where(found, places, xp.iinfo(place.dtype).max)

    return xp.where(found, limit, -xp.inf), last


def _by_tournament(xp: Any, candidate: Array, score: Array, group: Array, k: int, groups: int) -> Array:
    tokens = score.shape[-1]
    rows = math.prod(score.shape[:-1])
    chunk = 4 if tokens < 1024 else 8
    chunks = -(-tokens // chunk)
    score = _above_none(xp, score)
    contending = xp.where(candidate, score, xp.full_like(score, -xp.inf))
    contending = xp.reshape(_padded(xp.reshape(contending, (rows, tokens)), chunks * chunk), (rows, 1, chunks, chunk))
    label = xp.reshape(_padded(xp.reshape(group, (rows, tokens)), chunks * chunk), (rows, 1, chunks, chunk))
    wanted = xp.astype(xp.reshape(counting(groups, group), (1, groups, 1)), group.dtype)
    # The best of each group in every chunk, in steps over whole maps, which compile to vector code: a reduction
    # does not.
    champion = filled((rows, groups, chunks), -xp.inf, score, dtype=score.dtype)
    for step in range(chunk):
        champion = xp.maximum(champion, xp.where(label[..., step] == wanted, contending[..., step], -xp.inf))
    # The first k of a group are in the k chunks with its best champions. Chunks are contiguous, so that of equal
    # champions the one in the earlier chunk is the earlier token; and in order, so that places are as well.
    _, picked = first_k(champion, min(k, chunks))
    picked = xp.sort(picked, axis=-1)
    finals = picked.shape[-1] * chunk
    place = xp.reshape(picked[..., None] * chunk + aligned(counting(chunk, group), 4), (rows, groups, finals))
    flat = (rows, groups * finals)

    def at_place(values: Array) -> Array:
        values = xp.reshape(values, (rows, chunks * chunk))
        return xp.reshape(take_along_axis(values, xp.reshape(place, flat), axis=-1), (rows, groups, finals))

    finalist = xp.where(at_place(label) == wanted, at_place(contending), -xp.inf)
    value, at = first_k(finalist, min(k, finals))
    least, last = _cut(xp, value, take_along_axis(place, at, axis=-1))
    own = xp.reshape(group, (rows, tokens))
    least = xp.reshape(take_along_axis(least, own, axis=-1), score.shape)
    last = xp.reshape(take_along_axis(last, own, axis=-1), score.shape)
    return (score > least) | ((score == least) & (aligned(counting(tokens, group), score.ndim) <= last))


def _above_none(xp: Any, score: Array) -> Array:
    """Scores of which none, nor NaN, is as low as minus infinity, which stands for no candidate.

    There is one zero only: JAX's `top_k` puts 0 before -0, which are equal.
    """
    score = xp.where(score == 0, xp.zeros_like(score), without_nan(score))
    return xp.maximum(score, xp.full_like(score, xp.finfo(score.dtype).min))


def _cut(xp: Any, best: Array, at: Array) -> tuple[Array, Array]:
    """The last of the first k on the last axis: its score, and the place of the last with that score."""
    # Not `best[..., -1]`: XLA would then sort everything.
    least = xp.min(best, axis=-1)
    return least, xp.max(xp.where(best == least[..., None], at, xp.zeros_like(at)), axis=-1)


def _padded(rows: Shaped[Array, "rows tokens"], length: int) -> Shaped[Array, "rows length"]:
    """Rows of a length, with minus infinity, or the least integer, at their end."""
    xp = array_namespace(rows)
    more = length - rows.shape[1]
    if more == 0:
        return rows
    nothing = -xp.inf if xp.isdtype(rows.dtype, "real floating") else xp.iinfo(rows.dtype).min
    return xp.concat([rows, filled((rows.shape[0], more), nothing, rows, dtype=rows.dtype)], axis=1)
