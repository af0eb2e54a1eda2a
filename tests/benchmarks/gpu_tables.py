"""Results of `tests.benchmarks.gpu`, and the tables of them, in Markdown."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.benchmarks.contenders import quartiles, ratios

NOTHING = "Not measured yet. On a machine with a GPU, `make gpu-report` measures it, ten minutes a call.\n"
_LEGEND = (
    "Medians of {rounds} rounds in which all of a group run in turn, quartiles in brackets; ratios are taken round by"
    " round. \"Times dense\" is the speed-up over the dense network run eagerly; \"of the limit\" is the share of the"
    " limit's speed, eager or compiled like the contender. Of each pass: waits for the device, kernels that ran, launches"
    " by the host, peak of memory with the weights."
)  # fmt: skip
_HEAD = "| asked | | | token-blocks | ms a batch | times dense | of the limit | waits | kernels | launches | GiB |"


@dataclass(frozen=True)
class Row:
    """What is known of a contender.

    Attributes:
        what: What it is.
        rule: The rule by which tokens leave; empty if none does.
        token_blocks: The share of the token-blocks that runs.
        seconds: Of a pass, round by round.
        reason: Why there are none; None if there are.
        waits: Waits for the device in a pass; None where they cannot be counted, and so for what follows.
        kernels: Kernels that run in a pass.
        launches: Launches by the host, of a kernel or a graph.
        attention: Names of the attention kernels.
        memory: Peak of memory in bytes, weights among it.
    """

    what: str
    rule: str
    token_blocks: float
    seconds: tuple[float, ...] = ()
    reason: str | None = None
    waits: int | None = None
    kernels: int | None = None
    launches: int | None = None
    attention: tuple[str, ...] = ()
    memory: int | None = None

    @property
    def name(self) -> str:
        """What it is called in tables."""
        return f"{self.what}, {self.rule}" if self.rule else self.what


@dataclass(frozen=True)
class Result:
    """What has been measured of a part.

    Attributes:
        machine: Device and versions.
        groups: Rows of each group, the dense network first.
    """

    machine: Mapping[str, Any]
    groups: Mapping[str, tuple[Row, ...]]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], /) -> "Result":
        """What `dataclasses.asdict` and JSON have made of it."""
        groups = {
            name: tuple(
                Row(**{**row, "seconds": tuple(row["seconds"]), "attention": tuple(row["attention"])}) for row in rows
            )
            for name, rows in data["groups"].items()
        }
        return cls(dict(data["machine"]), groups)


def tables(results: Mapping[str, Result], parts: Mapping[str, Sequence[str]], /, *, command: str) -> str:
    """All tables, one for each part that has results.

    Args:
        results: What has been measured, by part, on one machine.
        parts: The groups that there are, by part, in the order of the tables.
        command: The command that measures.

    Returns:
        Markdown; a line that says so if nothing has been measured.
    """
    found = {name: results[name] for name in parts if name in results}
    if not found:
        return NOTHING
    machine = next(iter(found.values())).machine
    rounds = max(len(row.seconds) for result in found.values() for rows in result.groups.values() for row in rows)
    blocks = [
        f"{', '.join(f'{name} {value}' for name, value in machine.items())}.",
        f"    {command}",
        _LEGEND.format(rounds=rounds),
    ]
    for name, result in found.items():
        groups = [group for group in parts[name] if group in result.groups]
        lines = [line for group in groups for line in _lines(group, result.groups[group])]
        blocks += [f"### {name.replace('-', ', ')}", "\n".join([_HEAD, "|---" * 11 + "|", *lines])]
        kernels = _attention([row for group in groups for row in result.groups[group]])
        blocks += ["\n".join(kernels)] if kernels else []
    missing = [
        f"{name.replace('-', ', ')} ({', '.join(lacking)})" if name in found else name.replace("-", ", ")
        for name, groups in parts.items()
        if (lacking := [group for group in groups if name not in found or group not in found[name].groups])
    ]
    blocks += [f"Not measured: {'; '.join(missing)}."] if missing else []
    return "\n\n".join(blocks) + "\n"


def _lines(group: str, rows: Sequence[Row]) -> Iterator[str]:
    mode, _, asked = group.partition(" ")
    dense, limit = (
        next((row for row in rows if row.what == what and not row.reason), None) for what in ("dense", "limit")
    )
    for row in rows:
        start = [asked, "eager" if row.what == "dense" else mode, row.name, f"{row.token_blocks:.3f}"]
        if row.reason is not None:
            yield _line([*start, row.reason.replace("|", " "), *[""] * 6])
            continue
        # The dense network runs eagerly in every group, the limit as its group does.
        beside = (dense, None if row.what == "dense" and mode != "eager" else limit)
        faster = [None if other is None else ratios(other.seconds, row.seconds) for other in beside]
        times = [_cell(quartiles([1000 * one for one in row.seconds]), ".4g"), *(_cell(one, ".3f") for one in faster)]
        counted = ["" if one is None else str(one) for one in (row.waits, row.kernels, row.launches)]
        yield _line([*start, *times, *counted, "" if row.memory is None else f"{row.memory / 2**30:.2f}"])


def _line(cells: Sequence[str]) -> str:
    return "|" + "".join(f" {cell} |" if cell else " |" for cell in cells)


def _cell(values: Sequence[float] | None, digits: str) -> str:
    """A median with its quartiles in brackets."""
    if values is None:
        return ""
    low, middle, high = (format(value, digits) for value in values)
    return f"{middle} [{low}, {high}]"


def _attention(rows: Sequence[Row]) -> list[str]:
    """Attention kernels, each with what ran it."""
    users: dict[str, dict[str, None]] = {}
    for row in rows:
        for kernel in row.attention:
            users.setdefault(_short(kernel), {})[row.name] = None
    return [f"- `{kernel}`: {', '.join(names)}" for kernel, names in sorted(users.items())]


def _short(kernel: str) -> str:
    """The name of a kernel without the types that it is made for."""
    return re.split(r"[<(]", kernel.removeprefix("void "), maxsplit=1)[0].strip()
