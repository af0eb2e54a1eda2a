"""Plans that merge before tokens leave, for twelve blocks and thousands of tokens, from careful to bold."""

from collections.abc import Collection, Mapping
from dataclasses import replace

from examples import shell
from examples.camvid.contenders import Setting
from tokenexit.policies import NeighboursAgree
from tokenexit.schedule import Exit, Merge, Schedule

__all__ = ["merging"]


def _exits(radius: Mapping[int, int], threshold: float) -> tuple[Exit, ...]:
    return tuple(
        Exit(block, NeighboursAgree(threshold, radius=around).retaining(per_class=5))
        for block, around in radius.items()
    )


_ALIKE = Merge(1, 2, 0.9)
_AGREED = Merge(2, 2, 0.7, NeighboursAgree(0.5, radius=1))
_CAREFUL = (_ALIKE, _AGREED, Merge(3, 4, 0.3, NeighboursAgree(0.9, radius=2)))
_LAX = (_ALIKE, replace(_AGREED, alike=0.5), Merge(3, 4, 0.3, NeighboursAgree(0.8, radius=1)))
_LAXER = (_ALIKE, replace(_AGREED, alike=0.6), _LAX[2])
_ALONE = (_ALIKE, _AGREED, Merge(3, 8, agreed=NeighboursAgree(0.9, radius=2)), Merge(6, 8, agreed=NeighboursAgree(0.9)))
_LATE = {6: 1, 8: 0}
_PLANS = {
    "merge 2; exits 3, 6, 8 at 0.9": Schedule(
        _exits({3: 2, **_LATE}, 0.9), merges=(Merge(2, 2, 0.8, NeighboursAgree(0.5, radius=1)),)
    ),
    "merge 1, 2, 3; exits 6, 8 at 0.95": Schedule(_exits(_LATE, 0.95), merges=_CAREFUL),
    "merge 1, 2, 3; exits 6, 8 at 0.9": Schedule(_exits(_LATE, 0.9), merges=_CAREFUL),
    "merge 1, 2, 3; exits 6, 8 at 0.9, keys once": Schedule(_exits(_LATE, 0.9), merges=_CAREFUL, keys="entries"),
    "merge 1, 2, 3 (lax); exits 6, 8 at 0.9": Schedule(_exits(_LATE, 0.9), merges=_LAX),
    "merge 1, 2, 3 (lax); exits 6, 8 at 0.8": Schedule(_exits(_LATE, 0.8), merges=_LAXER),
    "merge 1, 2, 3, 6": Schedule(merges=_ALONE),
    "merge 1, 2, 3, 6, keys once": Schedule(merges=_ALONE, keys="entries"),
}


def merging(heads: Collection[int]) -> tuple[Setting, ...]:
    """The settings.

    Args:
        heads: Blocks with an exit head.

    Raises:
        UsageError: If one that a plan reads is missing.
    """
    needed = sorted({block for plan in _PLANS.values() for block in plan.read_after})
    if not set(needed) <= set(heads):
        raise shell.UsageError(f"`--merging` must come with heads after the blocks {needed}, got {sorted(heads)}")
    return tuple(Setting(name, "merging", plan) for name, plan in _PLANS.items())
