"""What was found of a model: one row for each contender, a verdict in words, and the plans to choose from."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from tokenexit._plain import is_number, is_whole, require_keys
from tokenexit.errors import TokenExitError, require
from tokenexit.schedule import Schedule
from tokenexit.search import Found, frontier

__all__ = ["KINDS", "OURS", "Assessment", "Kind", "Measured", "Option", "options_from", "retuned"]

Kind = Literal["dense", "merging", "exits", "merging and exits", "truncation", "smaller input", "compiled dense"]
"""What a contender does to the network."""

KINDS: tuple[Kind, ...] = get_args(Kind)
"""Every kind."""

OURS: tuple[Kind, ...] = ("merging", "exits", "merging and exits")
"""What this library does; all else is what it is compared with."""

SCHEMA = 1
WORTH = 1.2
"""Times as fast as the dense network below which nothing is worth the change."""

_FEW = 400  # patches of an image, below which attention and bookkeeping leave little to save
_SHALLOW = 6
_FEW_IMAGES = 8


@dataclass(frozen=True)
class Option:
    """A plan that was run, what it changes and what it saves: what `retune(saving=...)` chooses from.

    Attributes:
        plan: The plan.
        loss: Mean loss beside the dense network, in [0, 1].
        saving: Share of the dense network's multiply-adds that it saves.
    """

    plan: Schedule
    loss: float
    saving: float

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            TokenExitError: If `plan` is no schedule, or a number is out of range.
        """
        require(isinstance(self.plan, Schedule), "plan", "be a tokenexit.schedule.Schedule", repr(self.plan))
        require(is_number(self.loss) and 0 <= self.loss <= 1, "loss", "lie in [0, 1]", repr(self.loss))
        require(is_number(self.saving) and self.saving <= 1, "saving", "be at most 1", repr(self.saving))

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        return {"plan": self.plan.to_dict(), "loss": self.loss, "saving": self.saving}

    @staticmethod
    def from_dict(data: Any, /) -> "Option":
        """The option that `to_dict` wrote down.

        Args:
            data: What `to_dict` returned, or its like read from a file.

        Returns:
            The same.

        Raises:
            TokenExitError: If a key is missing or unknown, or a value is out of range.
        """
        require_keys(data, "option", {"plan", "loss", "saving"})
        return Option(Schedule.from_dict(data["plan"]), data["loss"], data["saving"])


def options_from(data: Any, /) -> tuple[Option, ...]:
    """Options that were written down as a list.

    Args:
        data: A list of what `Option.to_dict` returned.

    Returns:
        The options.

    Raises:
        TokenExitError: If it is no list, or one of them is not what it should be.
    """
    require(isinstance(data, list), "assessed", "be a list", type(data).__name__)
    return tuple(map(Option.from_dict, data))


def retuned(options: Sequence[Option], /, *, saving: float | None = None, changed: float | None = None) -> Schedule:
    """The plan for a target: the least change that saves as much, or the greatest saving that changes as little.

    Args:
        options: What was assessed.
        saving: Share of the dense network's multiply-adds that is to be saved at least, as 0.4.
        changed: Mean loss that is not to be exceeded on the images of the assessment, as 0.01. It is no guarantee for
            others, which `calibrate` gives.

    Returns:
        The plan.

    Raises:
        TokenExitError: If not exactly one target is given, it is out of range, nothing was assessed, or no plan
            reaches it.
    """
    targets = {"saving": saving, "changed": changed}
    given = {name: value for name, value in targets.items() if value is not None}
    require(len(given) == 1, "saving", "be given, or `changed`, and not both", repr(targets))
    ((name, target),) = given.items()
    require(is_number(target) and 0 <= target < 1, name, "be a share from 0 up and below 1, as 0.4", repr(target))
    rule = "come after an assessment, which knows what plans save and change: `assess(model, images)`"
    require(len(options) > 0, name, rule, repr(target))
    if saving is not None:
        reach = [one for one in options if one.saving >= saving]
        best = min(reach, key=lambda one: (one.loss, -one.saving), default=None)
        most = max(options, key=lambda one: one.saving)
        got = f"{saving:g}: the boldest saves {most.saving:.3g}, and changes {most.loss:.3g}"
        rule = "be what one of the plans that were assessed saves"
    else:
        assert changed is not None
        reach = [one for one in options if one.loss <= changed]
        best = max(reach, key=lambda one: (one.saving, -one.loss), default=None)
        least = min(options, key=lambda one: one.loss)
        got = f"{changed:g}: the most careful changes {least.loss:.3g}, and saves {least.saving:.3g}"
        rule = "be what one of the plans that were assessed changes"
    if best is None:
        raise TokenExitError(f"`{name}` must {rule}, got {got}")
    return best.plan


@dataclass(frozen=True)
class Measured:
    """A contender, and what was measured of it.

    Attributes:
        name: What it is.
        kind: What it does to the network.
        loss: Mean loss beside the dense network, in [0, 1].
        cost: Multiply-adds, the dense network's being 1; decoder and heads included. None where they were not counted.
        plan: Its plan; None if it has none.
        quality: Mean IoU by labels, in [0, 1]; None without labels.
        speedup: Lower quartile, median and upper quartile of how many times as fast as the dense network it was, round
            by round; None if it was not timed.
        milliseconds: Median milliseconds of an image; None if it was not timed.
    """

    name: str
    kind: Kind
    loss: float
    cost: float | None = None
    plan: Schedule | None = None
    quality: float | None = None
    speedup: tuple[float, float, float] | None = None
    milliseconds: float | None = None

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            TokenExitError: If the kind is unknown, or a number is out of range.
        """
        require(self.kind in KINDS, "kind", f"be one of {', '.join(KINDS)}", repr(self.kind))
        require(is_number(self.loss) and 0 <= self.loss <= 1, "loss", "lie in [0, 1]", repr(self.loss))
        for name in ("cost", "milliseconds"):
            value = getattr(self, name)
            require(value is None or (is_number(value) and value >= 0), name, "be None or from 0 up", repr(value))
        ok = self.quality is None or (is_number(self.quality) and 0 <= self.quality <= 1)
        require(ok, "quality", "be None or in [0, 1]", repr(self.quality))
        times = self.speedup
        ok = times is None or (len(times) == 3 and all(is_number(one) and one > 0 for one in times))
        rule = "be None or three factors above 0 that ascend"
        require(ok and (times is None or list(times) == sorted(times)), "speedup", rule, repr(times))

    @property
    def times(self) -> float:
        """Median of how many times as fast as the dense network it was; NaN if it was not timed."""
        return math.nan if self.speedup is None else self.speedup[1]

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        plan = None if self.plan is None else self.plan.to_dict()
        speedup = None if self.speedup is None else list(self.speedup)
        return asdict(replace(self, plan=None)) | {"plan": plan, "speedup": speedup}

    @staticmethod
    def from_dict(data: Any, /) -> "Measured":
        """The row that `to_dict` wrote down.

        Args:
            data: What `to_dict` returned, or its like read from a file.

        Returns:
            The same.

        Raises:
            TokenExitError: If a key is missing or unknown, or a value is out of range.
        """
        require_keys(data, "row", {"name", "kind", "loss", "cost", "plan", "quality", "speedup", "milliseconds"})
        plan = None if data["plan"] is None else Schedule.from_dict(data["plan"])
        listed = data["speedup"] is None or isinstance(data["speedup"], list)
        require(listed, "speedup", "be None or a list", repr(data["speedup"]))
        speedup = None if data["speedup"] is None else tuple(data["speedup"])
        return Measured(**{**data, "plan": plan, "speedup": speedup})


@dataclass(frozen=True)
class Assessment:
    """Is it worth it for this model? `str` is the answer in words, and a table.

    Attributes:
        rows: The dense network first, then every contender that was run.
        loss: What the loss is, in words, as "pixels that get another class".
        at_most: Mean loss within which contenders are compared.
        images: How many images were run; none of them fitted anything.
        fitted: How many others exit heads and merges were fitted to.
        batch: Images of a batch that was timed.
        size: Height and width of the images, in pixels.
        grid: Rows and columns of patches.
        blocks: Blocks of the network.
        machine: Device, threads and versions, in words.
        notes: What else has to be known: what was left out, and why.
    """

    rows: tuple[Measured, ...]
    loss: str
    at_most: float
    images: int
    fitted: int
    batch: int
    size: tuple[int, int]
    grid: tuple[int, int]
    blocks: int
    machine: str
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            TokenExitError: If there is no row, the first is not the dense network, or a number is out of range.
        """
        first = len(self.rows) > 0 and self.rows[0].kind == "dense"
        require(first, "rows", "have the dense network first", [row.kind for row in self.rows[:1]])
        require(is_number(self.at_most) and 0 < self.at_most < 1, "at_most", "lie between 0 and 1", repr(self.at_most))
        for name in ("images", "batch", "blocks"):
            value = getattr(self, name)
            require(is_whole(value, least=1), name, "be a whole number from 1 up", repr(value))

    @property
    def dense(self) -> Measured:
        """The dense network."""
        return self.rows[0]

    def best(self, *kinds: Kind, at_most: float | None = None) -> Measured | None:
        """The fastest contender of some kinds within a loss, of those that were timed.

        Args:
            kinds: The kinds.
            at_most: The loss; that of the assessment if left out.

        Returns:
            Its row; None if there is none.
        """
        limit = self.at_most if at_most is None else at_most
        within = [row for row in self.rows if row.kind in kinds and row.loss <= limit and row.speedup]
        return max(within, key=lambda row: row.times, default=None)

    @property
    def chosen(self) -> Measured | None:
        """The fastest plan of this library within `at_most`; None if there is none, or none is faster than dense."""
        best = self.best(*OURS)
        return best if best is not None and best.times > 1 else None

    @property
    def plan(self) -> Schedule | None:
        """The plan of `chosen`, for `retune`; None if nothing was."""
        return None if self.chosen is None else self.chosen.plan

    @property
    def worth(self) -> bool:
        """Whether `chosen` is at least 1.2 times as fast as dense, and nothing that it is compared with is better.

        Truncation and a smaller input within the loss are better if they are faster; or as fast, the median of each
        being within the quartiles of the other, at no greater loss: they are simpler.
        """
        chosen = self.chosen
        return chosen is not None and chosen.times >= WORTH and not self._rivals()

    def _rivals(self) -> list[Measured]:
        """What is compared with `chosen`, worth it and better."""
        rivals = [self.best("truncation"), self.best("smaller input")]
        return [one for one in rivals if one is not None and one.times >= WORTH and _better(one, self.chosen)]

    @property
    def options(self) -> tuple[Option, ...]:
        """Plans that no other one both saves more and changes less than, from the most careful to the boldest."""
        known = [
            Found(row.plan, -row.loss, row.cost)
            for row in self.rows
            if row.plan is not None and row.cost is not None and row.kind in OURS and row.cost < 1
        ]
        return tuple(Option(one.schedule, -one.quality, 1 - one.cost) for one in reversed(frontier(known)))

    def verdict(self) -> str:
        """The answer in sentences: what is worth it, how much faster it is, what it costs, and what else there is."""
        if all(row.speedup is None for row in self.rows):
            return "Nothing was timed: the table says what plans change, and what share of the multiply-adds is left."
        chosen, faster = self.chosen, self._rivals()
        beside = [self._beside(kind) for kind in ("truncation", "smaller input", "compiled dense")]
        others = self._joined(self._bolder(), *beside)
        if self.worth and chosen is not None:
            said = self._joined(f"Worth it: {self._said(chosen)} ({chosen.name}).", self._few())
        elif faster:
            best = max(faster, key=lambda row: row.times)
            beside = "" if chosen is None else f"; the best plan here is {self._said(chosen)} ({chosen.name})"
            said = f"Not with this library: {best.name}, {self._said(best)}{beside}."
            return self._joined(said, self._few(), self._why())
        elif chosen is not None:
            said = (
                f"Not worth it: within {self._percent(self.at_most)} the best is {self._said(chosen)} ({chosen.name}),"
            )
            said = self._joined(f"{said} and below {WORTH:g} times nothing is worth the change.", self._why())
        else:
            ours = [row for row in self.rows if row.kind in OURS]
            least = min(ours, key=lambda row: row.loss, default=None)
            near = "" if least is None else f" The most careful one changes {self._percent(least.loss)} ({least.name})."
            said = f"Not worth it: no plan is faster than dense within {self._amount(self.at_most)}."
            said = self._joined(f"{said}{near}", self._why())
        return self._joined(said, others)

    def _reach(self) -> float:
        return 0.0 if self.chosen is None else self.chosen.times

    def _few(self) -> str:
        """A caution about a verdict from few images."""
        rule = "take some dozens before you rely on it"
        return f"Only {self.images} images were compared: {rule}." if self.images < _FEW_IMAGES else ""

    def _why(self) -> str:
        """What in the network or the images leaves little to save."""
        patches = self.grid[0] * self.grid[1]
        found = []
        if patches < _FEW:
            found.append(f"images have only {patches} patches, and the finer the grid, the more there is to save")
        if self.blocks <= _SHALLOW:
            found.append(f"the network has only {self.blocks} blocks")
        return "" if not found else f"{_capital('; '.join(found))}."

    def _bolder(self) -> str:
        """A sentence about what twice the loss would bring, if that is faster."""
        if self.at_most >= 0.5:
            return ""
        bold = self.best(*OURS, at_most=2 * self.at_most)
        if bold is None or bold.times < WORTH or bold.times <= self._reach():
            return ""
        return f"Within {self._percent(2 * self.at_most)}: {self._said(bold)} ({bold.name})."

    def _beside(self, kind: Kind) -> str:
        """A sentence about the best of a kind that the library is compared with."""
        timed = [row for row in self.rows if row.kind == kind and row.speedup is not None]
        if not timed:
            return ""
        within = [row for row in timed if row.loss <= self.at_most]
        row = max(within, key=lambda row: row.times) if within else min(timed, key=lambda row: row.loss)
        return f"{_capital(row.name)}: {self._said(row)}."

    def _said(self, row: Measured) -> str:
        low, middle, high = row.speedup or (math.nan,) * 3
        said = f"{middle:.2f} times as fast as dense [{low:.2f}, {high:.2f}] at {self._amount(row.loss)}"
        if row.quality is None or self.dense.quality is None:
            return said
        return f"{said}, with {100 * row.quality:.2f} mIoU where dense has {100 * self.dense.quality:.2f}"

    def _amount(self, loss: float) -> str:
        """A loss in words: a share of pixels, or a number that needs its name."""
        if self.loss.startswith("pixels"):
            return f"{self._percent(loss)} of {self.loss}"
        return f"a loss of {self._percent(loss)} ({self.loss})"

    @staticmethod
    def _joined(*parts: str) -> str:
        return " ".join(part for part in parts if part)

    @staticmethod
    def _percent(share: float) -> str:
        return f"{100 * share:.3g} %"

    def table(self) -> str:
        """All rows as a table in Markdown, the careful before the bold."""
        qualities = any(row.quality is not None for row in self.rows)
        names = ["", "kind", f"{self.loss}, %", "multiply-adds, dense = 1", "ms an image", "times as fast as dense"]
        names += ["mIoU"] if qualities else []
        lines = [f"| {' | '.join(names)} |", f"|{'---|' * 2}{'---:|' * (len(names) - 2)}"]
        for row in self.ordered:
            low, middle, high = row.speedup or (math.nan,) * 3
            cells = [
                " ".join(row.name.replace("|", "/").split()),
                row.kind,
                f"{100 * row.loss:.2f}",
                "" if row.cost is None else f"{row.cost:.3f}",
                "" if row.milliseconds is None else f"{row.milliseconds:.1f}",
                "" if row.speedup is None else f"{middle:.2f} [{low:.2f}, {high:.2f}]",
            ]
            cells += ["" if row.quality is None else f"{100 * row.quality:.2f}"] if qualities else []
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines)

    @property
    def ordered(self) -> tuple[Measured, ...]:
        """All rows by kind, and by loss within a kind."""
        return tuple(sorted(self.rows, key=lambda row: (KINDS.index(row.kind), row.loss)))

    @property
    def conditions(self) -> str:
        """A sentence on what it was measured on."""
        (height, width), (rows, columns) = self.size, self.grid
        fitted = f", {self.fitted} others fitted" if self.fitted else ""
        return (
            f"{self.images} images of {height} x {width} pixels ({rows} x {columns} patches){fitted}; "
            f"{self.blocks} blocks; batches of {self.batch} on {self.machine}; of times the medians of rounds in which "
            "all take turns, and quartiles."
        )

    def __str__(self) -> str:
        """The verdict, the table, and what it was measured on."""
        return "\n\n".join([self.verdict(), self.table(), self.conditions, *self.notes])

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        found = {name: getattr(self, name) for name in self.__dataclass_fields__}
        listed = {"rows": [row.to_dict() for row in self.rows], "size": list(self.size), "grid": list(self.grid)}
        return {"schema": SCHEMA} | found | listed | {"notes": list(self.notes)}

    @staticmethod
    def from_dict(data: Mapping[str, Any], /) -> "Assessment":
        """The assessment that `to_dict` wrote down.

        Args:
            data: What `to_dict` returned, or its like read from a file.

        Returns:
            The same.

        Raises:
            TokenExitError: If a key is missing or unknown, or a value is out of range.
        """
        require_keys(data, "assessment", {"schema", *Assessment.__dataclass_fields__})
        require(data["schema"] == SCHEMA, "schema", f"be {SCHEMA}", repr(data["schema"]))
        for name in ("rows", "size", "grid", "notes"):
            require(isinstance(data[name], list), name, "be a list", repr(data[name]))
        given: dict[str, Any] = {name: value for name, value in data.items() if name != "schema"}
        given |= {name: tuple(data[name]) for name in ("size", "grid", "notes")}
        given["rows"] = tuple(map(Measured.from_dict, data["rows"]))
        return Assessment(**given)


def _capital(words: str) -> str:
    return words[:1].upper() + words[1:]


def _better(rival: Measured, chosen: Measured | None) -> bool:
    """Whether a rival is faster, or as fast at no greater loss."""
    if chosen is None or chosen.speedup is None or rival.speedup is None:
        return chosen is None
    (low, middle, high), (rival_low, times, rival_high) = chosen.speedup, rival.speedup
    tie = low <= times <= high and rival_low <= middle <= rival_high
    return rival.loss <= chosen.loss if tie else times > middle
