"""The plan: after which blocks tokens may leave, by which policy, and what they leave behind.

A schedule is plain frozen data. It holds no weight, prints as it reads, and is written to JSON and back.
"Nothing leaves" (`dense`) and "everything leaves here" (`truncated`) are schedules like any other.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxtyping import Float

from tokenexit import carries, policies, scores
from tokenexit._array import Array
from tokenexit._plain import is_number, is_whole, require_keys
from tokenexit.carries import Carry, Feature, MaskPrediction, Prediction, Preserved, Translated
from tokenexit.errors import TokenExitError, require
from tokenexit.merging import SIDES, alike_for
from tokenexit.policies import (
    Budget,
    ConfidenceAbove,
    EntropyBelow,
    ErrorBelow,
    GateBelow,
    NeighboursAgree,
    Policy,
    Threshold,
    always,
    never,
)

__all__ = [
    "Exit",
    "Merge",
    "Schedule",
    "Stage",
    "dense",
    "dovit",
    "dtop",
    "foretold",
    "measured",
    "merged",
    "neighbours",
    "paumer",
    "require_fits",
    "require_gates_fit",
    "require_measured",
    "svit",
    "truncated",
]

SCHEMA = 3


@dataclass(frozen=True)
class Exit:
    """One exit point.

    Attributes:
        after: How many blocks have run when tokens may leave.
        policy: Which of them do.
    """

    after: int
    policy: Policy

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            TokenExitError: If `after` is not a whole number from 1 up, or `policy` no policy.
        """
        _require_block(self.after)
        if not isinstance(self.policy, Policy):
            raise TokenExitError(f"`policy` must be a tokenexit.policies.Policy, got {self.policy!r}")


@dataclass(frozen=True)
class Merge:
    """One merge point: tokens of a cell of the grid run on as one from here (`tokenexit.merging`).

    Attributes:
        after: How many blocks have run when tokens merge.
        side: Side of the largest cells that merge, in patches: 2, 4, 8 or 16.
        alike: What the mean cosine similarity of a cell's four tokens must exceed; None: it is not asked for.
        agreed: A policy that would let all tokens of the cell leave here, read by the exit head after this block; None:
            it is not asked for, and there need be no head. They do not leave.
        share: Instead of `alike`, which differs from network to network: of the cells of 2 x 2 that could merge here,
            the share that is to. It is measured on images and becomes an `alike`, for larger cells too, before a
            forward pass can follow the plan (`fit_merges` in PyTorch). None: `alike` is as it is.
    """

    after: int
    side: int = 2
    alike: float | None = None
    agreed: Policy | None = None
    share: float | None = None

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            TokenExitError: If `after` is not a whole number from 1 up, `side` none of these, `alike` not in [-1, 1],
                `share` not above 0 and at most 1, or `agreed` no policy that looks at each image by itself; or if no
                criterion is given, or a share beside a similarity.
        """
        _require_block(self.after)
        known = is_whole(self.side) and self.side in SIDES
        require(known, "side", f"be one of {list(SIDES)}", repr(self.side))
        ok = self.alike is None or (is_number(self.alike) and -1 <= self.alike <= 1)
        require(ok, "alike", "be None or a number in [-1, 1]", repr(self.alike))
        ok = self.agreed is None or (isinstance(self.agreed, Policy) and not self.agreed.mixes_images)
        require(ok, "agreed", "be None or a policy that looks at each image by itself", repr(self.agreed))
        ok = self.share is None or (is_number(self.share) and 0 < self.share <= 1)
        require(ok, "share", "be None or a number above 0 and at most 1", repr(self.share))
        require(self.alike is None or self.share is None, "share", "be left out beside `alike`", self.share)
        given = self.alike is not None or self.agreed is not None or self.share is not None
        require(given, "alike", "be given if neither `agreed` nor `share` is", self.alike)


@dataclass(frozen=True)
class Stage:
    """Blocks that run together, and what follows them: one step of a forward pass (`Schedule.stages`).

    Attributes:
        start: Blocks that have run before.
        stop: Blocks that have run after.
        exit: The exit point that follows, if any.
        index: Which of the exit points of the pass it is, from 0; None without one.
        merge: The merge point that follows, after the exit point, if any.
        rejoin: Whether all tokens of all images run on from here, exited or skipped ones with the features they have.
        tap: Whether something reads the tokens of all images here.
    """

    start: int
    stop: int
    exit: Exit | None = None
    index: int | None = None
    merge: Merge | None = None
    rejoin: bool = False
    tap: bool = False

    @property
    def reads(self) -> bool:
        """Whether an exit head is read here: by the exit point, or by a merge that asks for agreement."""
        return self.exit is not None or (self.merge is not None and self.merge.agreed is not None)


@dataclass(frozen=True)
class Schedule:
    """The exit points of a network, in the order of its blocks.

    Attributes:
        exits: The exit points; their `after` ascends.
        carry: What a token leaves behind, at all of them.
        cell: Side, in patches, of the cells of the grid of which the token in the middle runs on and stands, in
            attention, for those of the cell that have left; see `tokenexit.cells`. None: attention forgets leavers.
        merges: The merge points; their `after` ascends.
        keys: As what a merged token is a key of attention: as often as it holds `tokens` (ToMe, ICLR 2023, section 3),
            or as the one of the `entries` that it is: any kernel of attention runs, and more is lost.
        depth: Number of blocks for which a preset chose the blocks; a model of another depth refuses the plan. None if
            its blocks were named. It is no part of what plans are compared by, or of what is saved.
    """

    exits: tuple[Exit, ...] = ()
    carry: Carry = Prediction()
    cell: int | None = None
    merges: tuple[Merge, ...] = ()
    keys: Literal["tokens", "entries"] = "tokens"
    depth: int | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Check the order.

        Raises:
            TokenExitError: If two exits or two merges share a block, they are out of order, `carry` is no carry, `cell`
                is neither None nor a whole number from 1 up, `keys` neither of the two, or there are merges beside
                cells or gates.
        """
        tuple_of_exits = isinstance(self.exits, tuple) and all(isinstance(exit, Exit) for exit in self.exits)
        require(tuple_of_exits, "exits", "be a tuple of Exit", self.exits)
        require(
            list(self.after) == sorted(set(self.after)),
            "exits",
            "come in strictly ascending order of `after`",
            self.after,
        )
        require(isinstance(self.carry, Carry), "carry", "be a carry of tokenexit.carries", repr(self.carry))
        cell = self.cell is None or is_whole(self.cell, least=1)
        require(cell, "cell", "be None or a whole number of patches from 1 up", repr(self.cell))
        listed = isinstance(self.merges, tuple) and all(isinstance(merge, Merge) for merge in self.merges)
        require(listed, "merges", "be a tuple of Merge", self.merges)
        blocks = list(self.merged_after)
        require(blocks == sorted(set(blocks)), "merges", "come in strictly ascending order of `after`", blocks)
        require(not self.merges or self.cell is None, "cell", "be None in a plan that merges", repr(self.cell))
        require(self.keys in ("tokens", "entries"), "keys", "be `tokens` or `entries`", repr(self.keys))
        gated = isinstance(self.carry, Preserved)
        require(not self.merges or not gated, "merges", "be left out where gates decide", list(self.merges))

    @property
    def after(self) -> tuple[int, ...]:
        """The blocks after which there is an exit point."""
        return tuple(exit.after for exit in self.exits)

    @property
    def merged_after(self) -> tuple[int, ...]:
        """The blocks after which there is a merge point."""
        return tuple(merge.after for merge in self.merges)

    @property
    def read_after(self) -> tuple[int, ...]:
        """The blocks that have an exit head: those of exit points, and of merges that ask for agreement."""
        return tuple(sorted({*self.after, *(merge.after for merge in self.merges if merge.agreed is not None)}))

    @property
    def active(self) -> tuple[Exit, ...]:
        """The exit points at which a token can leave: those whose policy is not `never()`."""
        return tuple(exit for exit in self.exits if exit.policy != never())

    def stages(
        self, depth: int, /, *, taps: Iterable[int] = (), heads: Literal["active", "all"] = "active"
    ) -> tuple[Stage, ...]:
        """Itinerary of a forward pass: which blocks run together, and what follows them.

        Args:
            depth: Blocks of the network.
            taps: After how many blocks something reads the tokens of all images: a decoder.
            heads: Which exit heads run: those of `active` exit points, or `all`, as in training.

        Returns:
            The stages, in order; together they run every block once.

        Raises:
            TokenExitError: If an exit point or a tap is beyond the blocks, or shares are still to be measured.
        """
        require_measured(self)
        exits = {exit.after: exit for exit in (self.active if heads == "active" else self.exits)}
        rejoin = None
        if isinstance(self.carry, Feature):
            rejoin = depth - 1 if self.carry.before == "last block" else depth
        elif isinstance(self.carry, Translated):
            rejoin = depth
        elif isinstance(self.carry, Preserved) and self.carry.before == "last block" and len(exits) > 0:
            rejoin = depth - 1
        taps, merges = frozenset(taps), {merge.after: merge for merge in self.merges}
        stops = sorted({*exits, *merges, *taps, depth, *([] if rejoin is None else [rejoin])} - {0})
        require(stops[-1] == depth, "schedule", f"have exits, merges and taps within {depth} blocks", stops[-1])
        index = {after: at for at, after in enumerate(sorted(exits))}
        return tuple(
            Stage(start, stop, exits.get(stop), index.get(stop), merges.get(stop), stop == rejoin, stop in taps)
            for start, stop in zip([0, *stops], stops, strict=False)
        )

    def retuned(
        self,
        schedule: "Schedule | None" = None,
        /,
        *,
        threshold: Threshold | Mapping[int, Threshold] | None = None,
        alike: float | Mapping[int, float] | None = None,
    ) -> "Schedule":
        """Another plan, or this one, with other thresholds and similarities.

        Args:
            schedule: The plan; this one if left out.
            threshold: New thresholds for it, as for `with_threshold`; those that it has if left out.
            alike: New similarities for its merges, as for `with_alike`; those that it has if left out.

        Returns:
            The plan.

        Raises:
            TokenExitError: If none is given, or a threshold or similarity does not fit.
        """
        given = any(one is not None for one in (schedule, threshold, alike))
        require(given, "schedule", "be given if neither `threshold` nor `alike` is", schedule)
        plan = self if schedule is None else schedule
        plan = plan if threshold is None else plan.with_threshold(threshold)
        return plan if alike is None else plan.with_alike(alike)

    def with_threshold(self, threshold: Threshold | Mapping[int, Threshold], /) -> "Schedule":
        """The same plan with other thresholds.

        Args:
            threshold: One threshold for every exit that has any, or one for each of some blocks.

        Returns:
            A new schedule.

        Raises:
            TokenExitError: If a block has no exit, a threshold is out of range, or the exits compare several kinds of
                score, for which one number cannot serve, or none at all.
        """
        comparing = [exit.after for exit in self.exits if exit.policy.compared_scores]
        several = f"a mapping from blocks to thresholds, as {dict.fromkeys(comparing or self.after, 0.9)}"
        row = isinstance(threshold, Sequence)
        require(not row, "threshold", f"be one threshold for all exits, or {several}", repr(threshold))
        if not isinstance(threshold, Mapping):
            threshold = dict.fromkeys(comparing, threshold)
        unknown = sorted(set(threshold) - set(self.after), key=str)
        require(not unknown, "threshold", f"name blocks with an exit, {self.after}", unknown)
        kinds = sorted(
            set[str]().union(*(exit.policy.compared_scores for exit in self.exits if exit.after in threshold))
        )
        hint = f"name some of the exits by {several}" if kinds else "none of them has a threshold"
        require(len(kinds) == 1, "threshold", "be for exits that compare one kind of score", f"{kinds}: {hint}")
        exits = tuple(
            dataclasses.replace(exit, policy=exit.policy.with_threshold(threshold[exit.after]))
            if exit.after in threshold
            else exit
            for exit in self.exits
        )
        return dataclasses.replace(self, exits=exits)

    def with_alike(self, alike: float | Mapping[int, float], /) -> "Schedule":
        """The same plan with other similarities at its merges.

        Args:
            alike: One for every merge that asks for a similarity, or one for each of some blocks; there instead of a
                share.

        Returns:
            A new schedule.

        Raises:
            TokenExitError: If a block has no merge, a similarity is not in [-1, 1], or no merge asks for one.
        """
        asking = [merge.after for merge in self.merges if merge.alike is not None]
        if not isinstance(alike, Mapping):
            require(len(asking) > 0, "alike", "be for a plan with merges that ask for a similarity", repr(alike))
            alike = dict.fromkeys(asking, alike)
        blocks = [merge.after for merge in self.merges]
        unknown = sorted(set(alike) - set(blocks), key=str)
        require(not unknown, "alike", f"name blocks with a merge, {blocks}", unknown)
        changed = tuple(
            dataclasses.replace(one, alike=alike[one.after], share=None) if one.after in alike else one
            for one in self.merges
        )
        return dataclasses.replace(self, merges=changed)

    def to_dict(self) -> dict[str, Any]:
        """The schedule as plain data, for JSON.

        Raises:
            TokenExitError: If a policy is not of this library.
        """
        exits = [{"after": exit.after, "policy": policies.to_dict(exit.policy)} for exit in self.exits]
        found = {"schema": SCHEMA, "exits": exits, "carry": carries.to_dict(self.carry), "cell": self.cell}
        if self.merges:  # what knows of none reads all other plans
            found |= {"merges": [_merge_to_dict(merge) for merge in self.merges], "keys": self.keys}
        return found

    @staticmethod
    def from_dict(data: Mapping[str, Any], /) -> "Schedule":
        """The schedule that `to_dict` wrote down.

        Args:
            data: What `to_dict` returned, or its like read from a file.

        Returns:
            The schedule.

        Raises:
            TokenExitError: If the schema is another one, a key is missing or unknown, or a value is out of range.
        """
        require(isinstance(data, Mapping), "schedule", "be a mapping", repr(data))
        require("schema" in data, "schedule", "have a schema", sorted(map(str, data)))
        require(data["schema"] == SCHEMA, "schema", f"be {SCHEMA}", repr(data["schema"]))
        merging = {"merges", "keys"} if "merges" in data else set[str]()
        require_keys(data, "schedule", {"schema", "exits", "carry", "cell"} | merging)
        require(isinstance(data["exits"], list), "exits", "be a list", repr(data["exits"]))
        for exit in data["exits"]:
            require_keys(exit, "exits", {"after", "policy"})
        exits = tuple(Exit(exit["after"], policies.from_dict(exit["policy"])) for exit in data["exits"])
        merges = data.get("merges", [])
        require(isinstance(merges, list), "merges", "be a list", repr(merges))
        merges = tuple(_merge_from_dict(merge) for merge in merges)
        return Schedule(exits, carries.from_dict(data["carry"]), data["cell"], merges, data.get("keys", "tokens"))


def _merge_to_dict(merge: Merge) -> dict[str, Any]:
    agreed = None if merge.agreed is None else policies.to_dict(merge.agreed)
    found = {"after": merge.after, "side": merge.side, "alike": merge.alike, "agreed": agreed}
    return found if merge.share is None else found | {"share": merge.share}  # what knows of none reads all others


def _merge_from_dict(data: Any) -> Merge:
    shared = isinstance(data, Mapping) and "share" in data
    require_keys(data, "merges", {"after", "side", "alike", "agreed"} | ({"share"} if shared else set()))
    agreed = None if data["agreed"] is None else policies.from_dict(data["agreed"])
    return Merge(data["after"], data["side"], data["alike"], agreed, data.get("share"))


def _default_blocks(depth: int) -> tuple[int, int, int]:
    """Blocks after a quarter, half and two thirds of a network; of a shallow one some are the same."""
    require(is_whole(depth, least=2), "depth", "be a whole number of blocks from 2 up", repr(depth))
    early, half, late = (max(1, min(depth - 1, int(depth * part + 0.5))) for part in (1 / 4, 1 / 2, 2 / 3))
    return early, half, late


def neighbours(
    *,
    radius: Mapping[int, int] | None = None,
    threshold: Threshold | Mapping[int, Threshold] = 0.9,
    per_class: int = 5,
    cell: int | None = None,
    depth: int = 12,
) -> Schedule:
    """A token leaves when its neighbourhood agrees: wide early, narrow late. The library's own default.

    Args:
        radius: Radius of the neighbourhood for each block with an exit; if left out 2, 1 and 0 after a quarter, half
            and two thirds of the blocks, `{3: 2, 6: 1, 8: 0}` of twelve, which suits thousands of tokens.
        threshold: Confidence that the token and its neighbours must exceed; one for all exits or one for each.
        per_class: Most confident leavers of each predicted class that stay, per image and exit.
        cell: Side of the cells in which the centre represents those that have left, if any does; with 3, train with it.
        depth: Blocks of the network, for a `radius` that is left out. `wrap` knows them.

    Returns:
        The schedule.

    Raises:
        TokenExitError: If a radius, a threshold, `per_class` or `cell` is out of range.
    """
    chosen = depth if radius is None else None
    radius = dict(zip(_default_blocks(depth), (2, 1, 0), strict=True)) if radius is None else radius
    named = isinstance(radius, Mapping) and len(radius) > 0
    require(named, "radius", "name at least one block", repr(radius))
    for block in radius:
        _require_block(block)
    policy = {after: NeighboursAgree(1.0, radius=radius[after]) for after in radius}
    exits = tuple(Exit(after, policy[after].retaining(per_class=per_class)) for after in sorted(policy))
    plan = Schedule(exits, cell=cell, depth=chosen)
    return plan.with_threshold(threshold)


def merged(
    *,
    alike: Mapping[int, float] | None = None,
    share: Mapping[int, float] | None = None,
    side: Mapping[int, int] | None = None,
    depth: int = 12,
) -> Schedule:
    """Tokens that are alike merge, and none leaves: for any decoder, with nothing fitted.

    Args:
        alike: For each block with a merge, what the mean cosine similarity of a cell's tokens must exceed; if left out
            0.9 after a twelfth of the blocks and 0.8 after a quarter, `{1: 0.9, 3: 0.8}` of twelve. Networks differ:
            look at what it costs on your images.
        share: Instead, for each block with a merge, the share of the cells of 2 x 2 that is to merge of those that
            could, from which similarities are measured on images first (`Merge`).
        side: Side of the largest cells that merge there, in patches; 2, and 4 at later ones, if left out.
        depth: Blocks of the network, for similarities that are left out. `wrap` knows them.

    Returns:
        The schedule.

    Raises:
        TokenExitError: If a block, a similarity, a share or a side is out of range, no block is named, or both
            similarities and shares are given.
    """
    require(alike is None or share is None, "share", "be left out beside `alike`", repr(share))
    name, given = ("alike", alike) if share is None else ("share", share)
    chosen = depth if given is None else None
    if given is None:
        later = _default_blocks(depth)[0]
        given = {max(1, min(later, int(depth / 12 + 0.5))): 0.9, later: 0.8}
    named = isinstance(given, Mapping) and len(given) > 0
    require(named, name, "name at least one block", repr(given))
    first = min(given)
    sides = {after: 2 if after == first else 4 for after in given} if side is None else side
    require(set(sides) == set(given), "side", f"name the blocks {sorted(given)}", repr(side))
    merges = (
        Merge(after, sides[after], given[after]) if share is None else Merge(after, sides[after], share=given[after])
        for after in sorted(given)
    )
    return Schedule(merges=tuple(merges), depth=chosen)


def foretold(
    *,
    radius: Mapping[int, int] | None = None,
    threshold: Threshold | Mapping[int, Threshold] = 0.1,
    depth: int = 12,
) -> Schedule:
    """A token leaves when its translator foretells a small error, for its neighbourhood too: a rule without classes.

    For any task, and under any decoder; exit heads are to translate (`heads.Translator`), and are fitted without
    labels. What leaves leaves a translation (`carries.Translated`).

    Args:
        radius: Radius of the neighbourhood for each block with an exit; if left out 1, 1 and 0 after a quarter, half
            and two thirds of the blocks, `{3: 1, 6: 1, 8: 0}` of twelve.
        threshold: Squared error relative to each channel's variance, in [0, 1], that the token and its neighbours must
            be below; one for all exits or one for each.
        depth: Blocks of the network, for a `radius` that is left out.

    Returns:
        The schedule.

    Raises:
        TokenExitError: If a radius or a threshold is out of range, or no block is named.
    """
    chosen = depth if radius is None else None
    radius = dict(zip(_default_blocks(depth), (1, 1, 0), strict=True)) if radius is None else radius
    named = isinstance(radius, Mapping) and len(radius) > 0
    require(named, "radius", "name at least one block", repr(radius))
    for block in radius:
        _require_block(block)
    exits = tuple(Exit(after, ErrorBelow(0.0, radius=radius[after])) for after in sorted(radius))
    return Schedule(exits, Translated(), depth=chosen).with_threshold(threshold)


def dtop(
    *,
    after: Iterable[int] | None = None,
    threshold: Threshold | Mapping[int, Threshold] = 0.9,
    per_class: int = 5,
) -> Schedule:
    """Dynamic Token Pruning (DToP, ICCV 2023): confident tokens leave, k of each predicted class stay.

    Args:
        after: Blocks with an exit. Published, and taken if left out: 6 and 8 of ViT-B's 12. Of ViT-L's 24: 8 and 16.
        threshold: Confidence to exceed; one for all exits or one for each. Published: 0.90 (ADE20K, ViT-B), 0.95
            (ViT-L; Pascal Context and COCO-Stuff-10K).
        per_class: Most confident leavers of each predicted class that stay, per image and exit. Published: 5.

    Returns:
        The schedule.

    Raises:
        TokenExitError: If a block, a threshold or `per_class` is out of range, or no block is named.
    """
    policy = ConfidenceAbove(1.0).retaining(per_class=per_class)
    blocks, depth = _published(after, (6, 8))
    return Schedule(tuple(Exit(block, policy) for block in blocks), depth=depth).with_threshold(threshold)


def dovit(
    *,
    after: Iterable[int] | None = None,
    threshold: Threshold | Mapping[int, Threshold] = 0.985,
    fold_above: float | None = 0.1,
) -> Schedule:
    """Dynamic Token-Pass (DoViT, 2023): confident tokens pass by the other blocks and rejoin for the decoder.

    Args:
        after: Blocks with an exit. Published, and taken if left out: 2, 5 and 8 of ViT-S's and ViT-B's 12. Of ViT-L's
            24: 6, 12 and 18.
        threshold: Confidence to exceed; one for all exits or one for each. Published: 0.985 (Cityscapes), 0.95 to 0.98
            (ADE20K).
        fold_above: Share of an image's tokens above which the mean of those that leave is averaged into the cls token.
            Published: 0.1. None for a network without prefix tokens.

    Returns:
        The schedule.

    Raises:
        TokenExitError: If a block, a threshold or `fold_above` is out of range, or no block is named.
    """
    blocks, depth = _published(after, (2, 5, 8))
    exits = tuple(Exit(block, ConfidenceAbove(1.0)) for block in blocks)
    return Schedule(exits, Feature("decoder", fold_above), depth=depth).with_threshold(threshold)


def paumer(
    *,
    after: Iterable[int] | None = None,
    threshold: Threshold | Mapping[int, Threshold] | None = None,
    keep: Mapping[int, float] | None = None,
) -> Schedule:
    """Patch Pausing (PAUMER, BMVC 2022): tokens of low entropy pause, and rejoin for the decoder.

    The paper gives neither blocks nor thresholds, for it draws them anew in every training step. The defaults are ours,
    from the measurements in the benchmarks of the documentation.

    Args:
        after: Blocks with an exit, where a threshold decides; 8 and 10, of 12, if left out.
        threshold: Normalised entropy below which a token pauses; one for all exits or one for each. 0.05 if neither
            this nor `keep` is given.
        keep: The other rule of the paper: for each block with an exit, the fraction of an image's patches that stays,
            those of the highest entropy.

    Returns:
        The schedule.

    Raises:
        TokenExitError: If a block, a threshold or a fraction is out of range, none is named, or both rules are.
    """
    if keep is None:
        blocks, depth = _published(after, (8, 10))
        exits = tuple(Exit(block, EntropyBelow(0.0)) for block in blocks)
        return Schedule(exits, Feature(), depth=depth).with_threshold(0.05 if threshold is None else threshold)
    require(threshold is None, "keep", "be given instead of `threshold`", "both")
    require(isinstance(keep, Mapping) and len(keep) > 0, "keep", "name at least one block", repr(keep))
    for block in keep:
        _require_block(block)
    return Schedule(tuple(Exit(block, Budget(keep[block], by="entropy")) for block in sorted(keep)), Feature())


def svit(
    *,
    after: Iterable[int] | None = None,
    threshold: Threshold | Mapping[int, Threshold] = 0.5,
    carry: Preserved = Preserved(),
) -> Schedule:
    """Token pruning with learned gates (SViT, WACV 2024): a token may skip any block, and come back at any later one.

    Args:
        after: After how many blocks there is a gate, which decides which tokens run until the next one. Published:
            before each of the blocks 4 to 12 of 12, trained to keep 0.7, 0.49 and 0.343 of the tokens in three blocks
            each; there if left out.
        threshold: Probability of being kept below which a token skips the block; one for all gates or one for each.
            Calibrate it (`gates.threshold_for`): training draws, and 0.5 keeps another share than was trained.
        carry: Whether tokens come back, and what attends to them meanwhile.

    Returns:
        The schedule. It needs a network with gates.

    Raises:
        TokenExitError: If a block or a threshold is out of range, or no block is named.
    """
    blocks, depth = _published(after, range(3, 12))
    exits = tuple(Exit(block, GateBelow(0.0)) for block in blocks)
    return Schedule(exits, carry, depth=depth).with_threshold(threshold)


def dense(*, after: Iterable[int] = ()) -> Schedule:
    """Nothing ever leaves.

    Args:
        after: Blocks that have an exit head all the same, to be trained or used by another schedule.

    Returns:
        The schedule.

    Raises:
        TokenExitError: If a block is not a whole number from 1 up, or they do not ascend.
    """
    return Schedule(tuple(Exit(block, never()) for block in _blocks(after)))


def truncated(*, after: int) -> Schedule:
    """Everything leaves after one block: the network cut short, the baseline beside which every exit must stand.

    Args:
        after: The last block that runs.

    Returns:
        The schedule.

    Raises:
        TokenExitError: If `after` is not a whole number from 1 up.
    """
    return Schedule((Exit(after, always()),))


def require_fits(
    plan: Schedule,
    /,
    *,
    depth: int,
    after: Sequence[int],
    gives_masks: bool,
    translates: Collection[int] = (),
    classes: int | None = None,
) -> None:
    """Raise a `TokenExitError` unless a model can follow a plan: what every adapter asks of the plans it is given.

    Args:
        plan: The plan.
        depth: How many blocks the model has.
        after: Its blocks with an exit head.
        gives_masks: Whether its heads are mask heads.
        translates: Those of the blocks whose exit head translates.
        classes: How many classes the heads tell apart; 0 for translators under a decoder, which read none. None: some.

    Raises:
        TokenExitError: If it is no schedule, needs gates, or masks, translations, foretold errors or classes of heads
            that give none, compares scores that mask heads do not have, or has exits beyond the blocks, or without a
            head.
    """
    _require_schedule(plan)
    needs = _needs(plan)
    gated = isinstance(plan.carry, Preserved) or "gate" in needs
    rule = "carry predictions or features and look at no gate, for a model without gates (`wrap_gates` makes one)"
    require(not gated, "schedule", rule, plan)
    masks = isinstance(plan.carry, MaskPrediction)
    rule = "carry no MaskPrediction, for heads that give no masks to freeze"
    require(not masks or gives_masks, "schedule", rule, plan)
    spread = sorted((scores.SCORES.keys() - {"confidence"}) & needs)
    rule = "compare confidences, for mask heads, whose scores are not normalised over the classes"
    require(not gives_masks or not spread, "schedule", rule, spread)
    late = [block for block in plan.after if block >= depth]
    rule = f"have exits after blocks 1 to {depth - 1} only, for {depth} blocks"
    others = (
        f"`schedule.neighbours(depth={depth})` has such, or name others by `radius`, or by `after` of other presets"
    )
    require(not late, "schedule", rule, f"{late}: {others}")
    _require_depth(plan, depth)
    headless = [block for block in plan.after if block not in after]
    require(not headless, "schedule", f"have exits only after blocks with an exit head, {list(after)}", headless)
    late = [merge.after for merge in plan.merges if merge.after >= depth]
    rule = f"have merges after blocks 1 to {depth - 1} only, for {depth} blocks"
    require(not late, "schedule", rule, late)
    headless = [merge.after for merge in plan.merges if merge.agreed is not None and merge.after not in after]
    rule = f"ask for agreement only after blocks with an exit head, {list(after)}"
    require(not headless, "schedule", rule, headless)
    read = {exit.after: exit.policy for exit in plan.exits}
    merged = {merge.after: merge.agreed for merge in plan.merges if merge.agreed is not None}
    asked = [(block, policy) for one in (read, merged) for block, policy in one.items()]
    untold = sorted(block for block, policy in asked if "error" in policy.needs and block not in translates)
    rule = "compare foretold errors only at exit heads that translate: wrap(..., exit_heads=heads.Translator())"
    require(not untold, "schedule", rule, f"others after the blocks {untold}")
    classed = sorted({block for block, policy in asked if classes == 0 and policy.asks_classes})
    rule = "ask for no classes, where translators give none: compare foretold errors (policies.ErrorBelow), or give"
    rule += " `exit_heads` with classes"
    require(not classed, "schedule", rule, f"policies that do after the blocks {classed}")
    scored = [block for block in plan.read_after if block not in translates]
    rule = "carry Translated only with exit heads that translate: wrap(..., exit_heads=heads.Translator())"
    require(not isinstance(plan.carry, Translated) or not scored, "schedule", rule, f"others after the blocks {scored}")


def require_measured(plan: Schedule, /) -> None:
    """Raise a `TokenExitError` if a plan has shares of which no similarities have been measured yet.

    Args:
        plan: The plan.

    Raises:
        TokenExitError: If a merge has a share.
    """
    shares = [merge.after for merge in plan.merges if merge.share is not None]
    if shares:  # every pass asks this of its plan
        rule = "have similarities in the place of shares, which `tokenexit_torch.fit_merges(model, images)` measures"
        require(False, "schedule", rule, f"shares after blocks {shares}")


def measured(
    plan: Schedule, similarities: Callable[[Schedule], Float[Array, "cells"]], /, *, until: int | None = None
) -> Schedule:
    """A plan with similarities in the place of shares, measured in order of depth: what merges early changes the rest.

    Args:
        plan: The plan.
        similarities: How alike the cells are that could merge at the last merge of a plan, over all images
            (`tokenexit.merging.similarities`). It is given the exits of the plan, and its merges up to that one, at
            which nothing merges.
        until: Only merges before this block are looked at; all if left out.

    Returns:
        The plan; the same if it has no shares.

    Raises:
        TokenExitError: If no cell could merge.
    """
    done: tuple[Merge, ...] = ()
    for merge in plan.merges:
        if merge.share is not None and (until is None or merge.after < until):
            bare = dataclasses.replace(merge, share=None, alike=1.0)
            found = similarities(dataclasses.replace(plan, merges=(*done, bare)))
            merge = dataclasses.replace(bare, alike=alike_for(found, share=merge.share))
        done = (*done, merge)
    return dataclasses.replace(plan, merges=done)


def require_gates_fit(
    plan: Schedule, /, *, depth: int, after: Sequence[int], carry: Preserved = Preserved()
) -> Schedule:
    """Raise a `TokenExitError` unless a model with gates can follow a plan: what every adapter asks of its plans.

    Args:
        plan: The plan.
        depth: How many blocks the model has.
        after: After how many blocks it has a gate.
        carry: Carry assumed for a schedule without active gates.

    Returns:
        The plan, which carries `Preserved`.

    Raises:
        TokenExitError: If it is no schedule, carries anything but `Preserved`, compares other scores than a gate's, has
            cells, or gates beyond the blocks, or where there is none.
    """
    _require_schedule(plan)
    if isinstance(plan.carry, Preserved):
        carry = plan.carry
    elif plan.active:
        raise TokenExitError(f"`schedule` must carry Preserved, for a model with gates, got {plan.carry!r}")
    own = set[str]().union(*(exit.policy.compared_scores for exit in plan.exits))
    compared = sorted((own | (scores.SCORES.keys() & _needs(plan))) - {"gate"})
    require(not compared, "schedule", "compare the probabilities of gates alone, which give no class scores", compared)
    require(plan.cell is None, "schedule", "have no cells where tokens are preserved", plan.cell)
    last = depth - (2 if carry.before == "last block" else 1)
    late = [block for block in plan.after if block > last]
    rule = f"have gates after blocks 1 to {last} only, for {depth} blocks and before={carry.before!r}"
    require(not late, "schedule", rule, late)
    _require_depth(plan, depth)
    missing = [block for block in plan.after if block not in after]
    require(not missing, "schedule", f"decide only after blocks with a gate, {list(after)}", missing)
    return dataclasses.replace(plan, carry=carry)


def _require_schedule(plan: Any) -> None:
    # Every pass asks this of its plan. One that is right is not written out: an accelerator would be waited for.
    if not isinstance(plan, Schedule):
        raise TokenExitError(f"`schedule` must be a tokenexit.schedule.Schedule, got {plan!r}")


def _require_depth(plan: Schedule, depth: int) -> None:
    """Raise for blocks that a preset chose for a network of another depth."""
    if plan.depth in (None, depth):  # every pass asks: nothing is written out for a plan that is right
        return
    rule = f"have blocks for a model of {depth}: name them, or give the preset `depth={depth}` where it takes one"
    got = f"those that a preset chooses for {plan.depth}, {sorted({*plan.after, *plan.merged_after})}"
    raise TokenExitError(f"`schedule` must {rule}, got {got}")


def _needs(plan: Schedule) -> frozenset[str]:
    return frozenset[str]().union(*(exit.policy.needs for exit in plan.exits))


def _published(after: Iterable[int] | None, published: Iterable[int]) -> tuple[tuple[int, ...], int | None]:
    """Blocks that were named, or the published ones and the depth that they are of."""
    return (tuple(published), 12) if after is None else (_blocks(after), None)


def _blocks(after: Iterable[int]) -> tuple[int, ...]:
    require(isinstance(after, Iterable), "after", "be several blocks, as (6, 8)", repr(after))
    return tuple(after)


def _require_block(after: Any) -> None:
    require(is_whole(after, least=1), "after", "be a whole number of blocks from 1 up", repr(after))
