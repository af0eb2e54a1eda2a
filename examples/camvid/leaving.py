"""Plans whose leavers leave translations, for twelve blocks: for a head that reads each token, and for any decoder."""

from collections.abc import Collection, Mapping
from dataclasses import replace

from examples import shell
from tokenexit.carries import Feature, Translated
from tokenexit.policies import ErrorBelow, NeighboursAgree, Policy, always
from tokenexit.schedule import Exit, Merge, Schedule

__all__ = ["AFTER", "by_classes", "by_error", "require_translators"]

AFTER = (2, 3, 4, 6, 8)
"""Blocks with a translator, for all of these plans."""

_ALIKE = Merge(1, 2, 0.9)
_APART = {3: (0.25, 1), 6: (0.15, 0), 8: (0.1, 1)}
_CAREFUL = {3: (0.25, 1), 6: (0.12, 1), 8: (0.08, 0)}


def _leaving(policies: Mapping[int, Policy], merges: tuple[Merge, ...] = ()) -> Schedule:
    return Schedule(tuple(Exit(block, policy) for block, policy in policies.items()), Translated(), merges=merges)


def _below(given: Mapping[int, tuple[float, int]]) -> dict[int, Policy]:
    return {block: ErrorBelow(threshold, radius=radius) for block, (threshold, radius) in given.items()}


def _foretold(after: int, side: int, threshold: float, alike: float | None = None) -> Merge:
    return Merge(after, side, alike, ErrorBelow(threshold))


def _agreeing(radius: Mapping[int, int], threshold: float, retained: int = 0) -> dict[int, Policy]:
    policies: dict[int, Policy] = {block: NeighboursAgree(threshold, radius=around) for block, around in radius.items()}
    return {block: one.retaining(per_class=retained) for block, one in policies.items()} if retained else policies


def _cut(after: int) -> Schedule:
    return _leaving({after: always()})


_LATE = {6: _APART[6], 8: _APART[8]}
_MERGES = (_ALIKE, Merge(2, 2, 0.7, NeighboursAgree(0.5)), Merge(3, 4, 0.3, NeighboursAgree(0.9, radius=2)))
_LATER = (Merge(2, 2, 0.8), Merge(4, 4, 0.8))
_WIDE = {3: 2, 6: 1, 8: 0}


def by_classes() -> dict[str, Schedule]:
    """Plans for translators under a head that reads each token: exits, and merges, where classes agree."""
    left = _leaving(_agreeing(_WIDE, 0.9))
    return {
        "exits 3, 6, 8 at 0.9, raw features": replace(left, carry=Feature()),
        "exits 3, 6, 8 at 0.9, translated": left,
        "exits 3, 6, 8 at 0.9, k = 5, translated": _leaving(_agreeing(_WIDE, 0.9, 5)),
        "exits 3, 6, 8 at 0.8, translated": _leaving(_agreeing(_WIDE, 0.8)),
        "merge 1, 2, 3; exits 6, 8 at 0.95, translated": _leaving(_agreeing({6: 1, 8: 0}, 0.95), _MERGES),
        "merge 1, 2, 3; exits 4, 6, 8 at 0.95, translated": _leaving(_agreeing({4: 1, 6: 1, 8: 0}, 0.95), _MERGES),
    }


def by_error() -> dict[str, Schedule]:
    """Plans that ask for no class: exits, and merges, by foretold errors; and the network cut short, translated."""
    return {
        "foretold errors, exits 3, 6, 8": _leaving(_below(_APART)),
        "foretold errors, exits 3, 6, 8 (careful)": _leaving(_below(_CAREFUL)),
        "merge 2, 4 alike; foretold errors, exits 6, 8": _leaving(_below(_LATE), _LATER),
        "merge 1, 2, 4 alike; foretold errors, exits 6, 8": _leaving(_below(_LATE), (Merge(1, 2, 0.93), *_LATER)),
        "merge 2 alike, 4 by foretold errors; exits 6, 8": _leaving(
            _below(_LATE), (_LATER[0], _foretold(4, 4, 0.15, 0.5))
        ),
        "foretold errors: merge 2, 3, 4, 6": _leaving(
            {}, (_LATER[0], _foretold(3, 4, 0.25, 0.3), _foretold(4, 8, 0.2), _foretold(6, 8, 0.12))
        ),
        "cut after 6, translated": _cut(6),
        "cut after 8, translated": _cut(8),
    }


def require_translators(after: Collection[int], /) -> None:
    """Raise unless there are translators for all of these plans.

    Args:
        after: Blocks whose exit head translates.

    Raises:
        UsageError: If one is missing.
    """
    if not set(AFTER) <= set(after):
        rule = f"hold translators after the blocks {list(AFTER)}, as examples.camvid.translators fits them"
        raise shell.UsageError(f"`--fitted` must {rule}, got {sorted(after)}")
