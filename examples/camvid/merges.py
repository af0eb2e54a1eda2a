"""Plans that merge before tokens leave, for twelve blocks: for thousands of tokens, for hundreds, and one changed."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Literal, get_args

from examples import shell
from examples.camvid.contenders import Setting
from tokenexit.policies import NeighboursAgree
from tokenexit.schedule import Exit, Merge, Schedule

__all__ = ["KINDS", "Kind", "merging"]

Kind = Literal["fine", "coarse", "ablations"]
"""For thousands of tokens an image, for hundreds, and one of the first with one thing changed at a time."""

KINDS: tuple[Kind, ...] = get_args(Kind)
"""Every kind."""


def _exits(radius: Mapping[int, int], threshold: float) -> tuple[Exit, ...]:
    return tuple(
        Exit(block, NeighboursAgree(threshold, radius=around).retaining(per_class=5))
        for block, around in radius.items()
    )


def _agree(threshold: float, radius: int = 1) -> NeighboursAgree:
    return NeighboursAgree(threshold, radius=radius)


_ALIKE = Merge(1, 2, 0.9)
_AGREED = Merge(2, 2, 0.7, _agree(0.5))
_LARGE = Merge(3, 4, 0.3, _agree(0.9, 2))
_CAREFUL = (_ALIKE, _AGREED, _LARGE)
_LAX = (_ALIKE, replace(_AGREED, alike=0.5), replace(_LARGE, agreed=_agree(0.8)))
_LAXER = (_ALIKE, replace(_AGREED, alike=0.6), _LAX[2])
_ALONE = (_ALIKE, _AGREED, Merge(3, 8, agreed=_agree(0.9, 2)), Merge(6, 8, agreed=_agree(0.9)))
_LATE = {6: 1, 8: 0}
_FINE = {
    "merge 2; exits 3, 6, 8 at 0.9": Schedule(_exits({3: 2, **_LATE}, 0.9), merges=(Merge(2, 2, 0.8, _agree(0.5)),)),
    "merge 1, 2, 3; exits 6, 8 at 0.95": Schedule(_exits(_LATE, 0.95), merges=_CAREFUL),
    "merge 1, 2, 3; exits 4, 6, 8 at 0.95": Schedule(_exits({4: 1, **_LATE}, 0.95), merges=_CAREFUL),
    "merge 1, 2, 3; exits 4, 6, 8 at 0.9": Schedule(_exits({4: 1, **_LATE}, 0.9), merges=_CAREFUL),
    "merge 1, 2, 3; exits 6, 8 at 0.9": Schedule(_exits(_LATE, 0.9), merges=_CAREFUL),
    "merge 1, 2, 3; exits 6, 8 at 0.9, keys once": Schedule(_exits(_LATE, 0.9), merges=_CAREFUL, keys="entries"),
    "merge 1, 2, 3 (lax); exits 6, 8 at 0.9": Schedule(_exits(_LATE, 0.9), merges=_LAX),
    "merge 1, 2, 3 (lax); exits 6, 8 at 0.8": Schedule(_exits(_LATE, 0.8), merges=_LAXER),
    "merge 1, 2, 3, 6": Schedule(merges=_ALONE),
    "merge 1, 2, 3, 6, keys once": Schedule(merges=_ALONE, keys="entries"),
}

_EVERY = {3: 2, 4: 1, 6: 1, 8: 1, 10: 0}
_DEEP = {6: 1, 8: 1, 10: 0}
_FEW = (Merge(2, 2, 0.8, _agree(0.5)), Merge(4, 4, 0.3, _agree(0.9)))
_COARSE = {
    "merge 2, 4; exits 6, 8, 10 at 0.9": Schedule(_exits(_DEEP, 0.9), merges=_FEW),
    "merge 2, 4; exits 6, 8, 10 at 0.7": Schedule(_exits(_DEEP, 0.7), merges=_FEW),
    "merge 1; exits 3, 4, 6, 8, 10 at 0.9": Schedule(_exits(_EVERY, 0.9), merges=(_ALIKE,)),
    "merge 1; exits 3, 4, 6, 8, 10 at 0.7": Schedule(_exits(_EVERY, 0.7), merges=(_ALIKE,)),
    "merge 1; exits 3, 4, 6, 8, 10 at 0.6": Schedule(_exits(_EVERY, 0.6), merges=(_ALIKE,)),
    "merge 1; exits 4, 6, 8 at 0.7": Schedule(_exits({4: 1, **_LATE}, 0.7), merges=(_ALIKE,)),
    "merge 2, 4, 6": Schedule(merges=(*_FEW, Merge(6, 4, 0.3, _agree(0.9)))),
}

_BASE = Schedule(_exits(_LATE, 0.95), merges=_CAREFUL)
_ABLATIONS = {
    "as above": _BASE,
    "no exits": replace(_BASE, exits=()),
    "no merges": replace(_BASE, merges=()),
    "no merge after 1": replace(_BASE, merges=_CAREFUL[1:]),
    "no merge after 2": replace(_BASE, merges=(_ALIKE, _LARGE)),
    "no merge after 3": replace(_BASE, merges=_CAREFUL[:2]),
    "after 1 above 0.85": replace(_BASE, merges=(replace(_ALIKE, alike=0.85), _AGREED, _LARGE)),
    "after 1 above 0.93": replace(_BASE, merges=(replace(_ALIKE, alike=0.93), _AGREED, _LARGE)),
    "by similarity alone": replace(_BASE, merges=(_ALIKE, Merge(2, 2, 0.9), Merge(3, 4, 0.8))),
    "by agreement alone": replace(_BASE, merges=(replace(_AGREED, alike=None), replace(_LARGE, alike=None))),
    "up to 2 x 2 after 3": replace(_BASE, merges=(_ALIKE, _AGREED, replace(_LARGE, side=2))),
    "up to 8 x 8 after 3": replace(_BASE, merges=(_ALIKE, _AGREED, replace(_LARGE, side=8))),
    "keys once": replace(_BASE, keys="entries"),
    "exits 3, 6, 8, merges behind them": Schedule(
        _exits({3: 2, **_LATE}, 0.95), merges=(Merge(3, 2, 0.7, _agree(0.5)), Merge(6, 4, 0.3, _agree(0.9)))
    ),
}

_PLANS: Mapping[Kind, Mapping[str, Schedule]] = {"fine": _FINE, "coarse": _COARSE, "ablations": _ABLATIONS}


def merging(heads: Collection[int], kind: Kind, /) -> tuple[Setting, ...]:
    """The settings.

    Args:
        heads: Blocks with an exit head.
        kind: Which of them.

    Raises:
        UsageError: If one that a plan reads is missing.
    """
    plans = _PLANS[kind]
    needed = sorted({block for plan in plans.values() for block in plan.read_after})
    if not set(needed) <= set(heads):
        rule = f"come with heads after the blocks {needed} for {kind}"
        raise shell.UsageError(f"`--merging` must {rule}, got {sorted(heads)}")
    return tuple(Setting(name, "merging", plan) for name, plan in plans.items())
