"""What is tried on a model that nobody has tuned: chains of plans, each from the most careful to the boldest."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from tokenexit._plain import is_whole
from tokenexit.assessment.results import KINDS, Kind
from tokenexit.carries import Carry, Prediction
from tokenexit.errors import require
from tokenexit.policies import ErrorBelow, NeighboursAgree, Policy
from tokenexit.schedule import Exit, Merge, Schedule, truncated

__all__ = ["By", "Planned", "exit_blocks", "plans_to_try"]

By = Literal["confidence", "error"]
"""What lets a token exit: the confidence of classes, or the error that translators foretell."""

Shares = tuple[float, ...]
_ONCE, _SOME, _HALF, _MOST, _BOLD = (0.15,), (0.15, 0.1), (0.3, 0.2), (0.5, 0.4), (0.7, 0.6)
_SHARES: tuple[Shares, ...] = (_ONCE, _SOME, _HALF, _MOST, _BOLD)
_STEPS: Mapping[By, Sequence[float]] = {
    "confidence": (0.98, 0.95, 0.9, 0.8, 0.7),
    "error": (0.05, 0.1, 0.15, 0.2, 0.3),
}
_EARLY: Mapping[By, Sequence[tuple[Shares, float]]] = {
    "confidence": ((_ONCE, 0.95), ((0.3,), 0.95), ((0.3,), 0.9), ((0.3,), 0.8)),
    "error": ((_ONCE, 0.05), ((0.3,), 0.05), ((0.3,), 0.1), ((0.3,), 0.15)),
}
_LATE: Mapping[By, Sequence[tuple[Shares, float]]] = {
    "confidence": ((_HALF, 0.95), (_MOST, 0.95), (_MOST, 0.9), (_BOLD, 0.9)),
    "error": ((_HALF, 0.08), (_MOST, 0.08), (_MOST, 0.12), (_BOLD, 0.15)),
}
_AGREED = ((0.3, 0.95), (0.5, 0.95), (0.5, 0.9), (0.7, 0.8))
_PER_CLASS = 5


@dataclass(frozen=True)
class Planned:
    """A plan to be tried.

    Attributes:
        name: What it is, for people.
        kind: What it does to the network.
        plan: The plan; its merges may have shares that are still to be measured.
    """

    name: str
    kind: Kind
    plan: Schedule

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            TokenExitError: If the kind is unknown.
        """
        require(self.kind in KINDS, "kind", f"be one of {', '.join(KINDS)}", repr(self.kind))


def exit_blocks(depth: int, /) -> tuple[int, ...]:
    """Blocks of a network that get an exit head for an assessment: 2, 3, 6, 8 and 10 of twelve.

    Args:
        depth: Blocks of the network.

    Returns:
        The blocks, ascending: after a sixth, a quarter, half, two thirds and five sixths; of a shallow network some
        are the same, and of a network of one block there are none.

    Raises:
        TokenExitError: If `depth` is no whole number from 1 up.
    """
    require(is_whole(depth, least=1), "depth", "be a whole number of blocks from 1 up", repr(depth))
    parts = (1 / 6, 1 / 4, 1 / 2, 2 / 3, 5 / 6)
    return tuple(sorted({_after(depth, part) for part in parts})) if depth > 1 else ()


def plans_to_try(
    *, depth: int, heads: Sequence[int] = (), by: By = "confidence", carry: Carry = Prediction(), merges: bool = True
) -> tuple[tuple[Planned, ...], ...]:
    """Chains of plans for a network, each from the most careful to the boldest.

    Merges alone; exits alone; exits behind one early merge, and late ones behind two; by confidence also late exits
    behind merges by agreement; and the network cut short after each head, the last first.

    Args:
        depth: Blocks of the network.
        heads: Blocks with an exit head, ascending; without any, only merges are tried.
        by: What lets a token exit.
        carry: What tokens leave behind.
        merges: Whether tokens can merge: not where positions are such that merged tokens have none.

    Returns:
        The chains; none is empty.

    Raises:
        TokenExitError: If `depth` is no whole number from 1 up.
    """
    require(is_whole(depth, least=1), "depth", "be a whole number of blocks from 1 up", repr(depth))
    if depth == 1:
        return ()
    first, later, half = _after(depth, 1 / 12), _after(depth, 1 / 4), _after(depth, 1 / 2)
    confident = by == "confidence"
    early = [block for block in heads if later <= block <= 3 * depth / 4]
    late = [block for block in early if block >= half]
    radius = {block: (2 if confident else 1) if block < half else 1 if block == half else 0 for block in early}
    narrow = {block: radius[block] for block in late}
    chains: list[list[Planned]] = []
    if merges:
        chains.append([_merging(first, later, shares) for shares in _SHARES])
    if early:
        chains.append([_exiting(radius, step, by, carry) for step in _STEPS[by]])
    if merges and early:
        steps = [(_merging(first, later, shares), step) for shares, step in _EARLY[by]]
        chains.append([_both(merging, _exiting(radius, step, by, carry)) for merging, step in steps])
    if merges and late:
        steps = [(_merging(first, later, shares), step) for shares, step in _LATE[by]]
        chains.append([_both(merging, _exiting(narrow, step, by, carry)) for merging, step in steps])
        agreeing = [block for block in heads if first < block <= later]
        if confident and agreeing:
            steps = [(_agreed(first, agreeing, share), step) for share, step in _AGREED]
            chains.append([_both(merging, _exiting(narrow, step, by, carry)) for merging, step in steps])
    if heads:
        cut = [replace(truncated(after=block), carry=carry) for block in sorted(heads, reverse=True)]
        chains.append([Planned(f"cut short after block {plan.after[0]}", "truncation", plan) for plan in cut])
    # In a shallow network early exits are late ones, and plans of two chains are one.
    once = {one.name: place for place, chain in reversed(list(enumerate(chains))) for one in chain}
    kept = [{one.name: one for one in chain if once[one.name] == place} for place, chain in enumerate(chains)]
    return tuple(tuple(chain.values()) for chain in kept if chain)


def _after(depth: int, part: float) -> int:
    """The block after a part of a network, which is neither before the first nor after the last."""
    return max(1, min(depth - 1, int(depth * part + 0.5)))


def _merging(first: int, later: int, shares: Shares) -> Planned:
    """Merges of shares of the cells: of 2 x 2 patches at first, then of up to 4 x 4; of a shallow network once."""
    merges = (
        Merge(first, 2, share=shares[0]),
        *(Merge(later, 4, share=share) for share in shares[1:] if later > first),
    )
    words = " and ".join(f"{100 * merge.share:.0f} % after block {merge.after}" for merge in merges if merge.share)
    return Planned(f"merge {words}", "merging", Schedule(merges=merges))


def _agreed(first: int, blocks: Sequence[int], share: float) -> Planned:
    """Merges of what is alike, then of what is agreed upon, which says more about where a segment ends."""
    careful = Merge(blocks[0], 2, 0.7, NeighboursAgree(0.5, radius=1))
    larger = [Merge(block, 4, 0.3, NeighboursAgree(0.9, radius=2)) for block in blocks[1:][-1:]]
    after = ", ".join(map(str, (blocks[0], *(merge.after for merge in larger))))
    name = f"merge {100 * share:.0f} % after block {first} and what is agreed upon after {after}"
    return Planned(name, "merging", Schedule(merges=(Merge(first, 2, share=share), careful, *larger)))


def _exiting(radius: dict[int, int], step: float, by: By, carry: Carry) -> Planned:
    def policy(around: int) -> Policy:
        if by == "error":
            return ErrorBelow(step, radius=around)
        return NeighboursAgree(step, radius=around).retaining(per_class=_PER_CLASS)

    words = (
        f"exits after {', '.join(map(str, radius))} {'above' if by == 'confidence' else 'below an error of'} {step:g}"
    )
    return Planned(words, "exits", Schedule(tuple(Exit(block, policy(radius[block])) for block in radius), carry))


def _both(merging: Planned, exiting: Planned) -> Planned:
    plan = replace(exiting.plan, merges=merging.plan.merges)
    return Planned(f"{merging.name}; {exiting.name}", "merging and exits", plan)
