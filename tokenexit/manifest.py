"""What is written beside saved weights of exits, gates and semantic tokens, as plain data that every adapter shares.

Names in it are looked up in closed registries, and unknown keys are refused. `tokenexit.folders` puts it into files.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from tokenexit import heads
from tokenexit._plain import MOST, is_number, is_whole, require_keys, shortened
from tokenexit.errors import TokenExitError, require
from tokenexit.heads import HeadPlan
from tokenexit.schedule import Schedule
from tokenexit.semantic import SemanticPlan, require_room

__all__ = ["Manifest", "SemanticManifest", "from_dict", "semantic_from_dict", "semantic_to_dict", "to_dict"]

SCHEMA = 2


@dataclass(frozen=True)
class Manifest:
    """What a wrapped model is, its weights aside.

    Attributes:
        schedule: The plan in use.
        after: The blocks that have an exit head.
        plan: How the exit heads were built; None if they were given as modules.
        built_head: Whether the final head was built along with them, and is saved with them.
        classes: Class count.
        width: Channels of a token.
        depth: How many blocks the network has.
        fitted: Digests of the images that the heads were fitted to, ascending, as `certificate.digest` makes them: a
            calibration on these would certify nothing.
    """

    schedule: Schedule
    after: tuple[int, ...]
    plan: HeadPlan | None
    built_head: bool
    classes: int
    width: int
    depth: int
    fitted: tuple[str, ...] = ()


def to_dict(manifest: Manifest, /) -> dict[str, Any]:
    """The manifest as plain data.

    Raises:
        TokenExitError: If a policy of the schedule is not of this library.
    """
    return {
        "schema": SCHEMA,
        "schedule": manifest.schedule.to_dict(),
        "after": list(manifest.after),
        "plan": None if manifest.plan is None else heads.to_dict(manifest.plan),
        "built_head": manifest.built_head,
        "classes": manifest.classes,
        "width": manifest.width,
        "depth": manifest.depth,
        "fitted": list(manifest.fitted),
    }


def from_dict(data: Mapping[str, Any], /) -> Manifest:
    """The manifest that `to_dict` wrote down.

    Args:
        data: What `to_dict` returned, or its like read from a file.

    Returns:
        The manifest.

    Raises:
        TokenExitError: If a key is missing or unknown, or a value is of the wrong type or range.
    """
    _require(data, {field.name for field in fields(Manifest)})
    for name in ("classes", "width", "depth"):
        require(_is_count(data[name]), name, f"be a whole number from 1 to {MOST}", repr(data[name]))
    after: Any = data["after"]
    ok = isinstance(after, list) and all(_is_count(block) and block < data["depth"] for block in after)
    require(ok, "after", f"be a list of blocks from 1 to {data['depth'] - 1}", repr(after))
    require(after == sorted(set(after)), "after", "ascend", after)
    require(isinstance(data["built_head"], bool), "built_head", "be true or false", repr(data["built_head"]))
    fitted: Any = data["fitted"]
    digests = isinstance(fitted, list) and all(map(_is_digest, fitted)) and fitted == sorted(set(fitted))
    require(digests, "fitted", "be a list of different digests, 32 hex digits each, ascending", shortened(fitted))
    try:
        schedule = Schedule.from_dict(data["schedule"])
    except RecursionError as error:
        raise TokenExitError("`schedule` must not be nested so deeply, got a recursion error") from error
    missing = sorted(set(schedule.after) - set(after))
    require(not missing, "schedule", f"have exits only after blocks with a head, {after}", missing)
    return Manifest(
        schedule=schedule,
        after=tuple(after),
        plan=None if data["plan"] is None else heads.from_dict(data["plan"]),
        built_head=data["built_head"],
        classes=data["classes"],
        width=data["width"],
        depth=data["depth"],
        fitted=tuple(fitted),
    )


@dataclass(frozen=True)
class SemanticManifest:
    """What a model on semantic tokens is, its weights aside.

    Attributes:
        plan: How semantic tokens come about.
        after: After how many blocks there are semantic tokens.
        until: After how many blocks all tokens are recovered; None if they are not.
        heads: Attention heads of the layers that were put in.
        hidden: Channels inside their MLPs.
        epsilon: What their norms add to the variance.
        width: Channels of a token.
        depth: How many blocks the network has.
    """

    plan: SemanticPlan
    after: int
    until: int | None
    heads: int
    hidden: int
    epsilon: float
    width: int
    depth: int


def semantic_to_dict(manifest: SemanticManifest, /) -> dict[str, Any]:
    """The manifest of a model on semantic tokens as plain data."""
    data = {field.name: getattr(manifest, field.name) for field in fields(SemanticManifest)}
    return {"schema": SCHEMA} | data | {"plan": manifest.plan.to_dict()}


def semantic_from_dict(data: Mapping[str, Any], /) -> SemanticManifest:
    """The manifest that `semantic_to_dict` wrote down.

    Args:
        data: What `semantic_to_dict` returned, or its like read from a file.

    Returns:
        The manifest.

    Raises:
        TokenExitError: If a key is missing or unknown, or a value is of the wrong type or range.
    """
    _require(data, {field.name for field in fields(SemanticManifest)})
    for name in ("heads", "hidden", "width", "depth"):
        require(_is_count(data[name]), name, f"be a whole number from 1 to {MOST}", repr(data[name]))
    require_room(data["after"], data["until"], depth=data["depth"])
    require(data["width"] % data["heads"] == 0, "heads", f"divide the width, {data['width']}", data["heads"])
    epsilon = data["epsilon"]
    positive = isinstance(epsilon, float) and is_number(epsilon) and epsilon > 0
    require(positive, "epsilon", "be a positive number", repr(epsilon))
    values = {field.name: data[field.name] for field in fields(SemanticManifest)}
    values["plan"] = SemanticPlan.from_dict(data["plan"])
    return SemanticManifest(**values)


def _require(data: Any, names: set[str]) -> None:
    """Raise a `TokenExitError` unless data have exactly these keys, and are of the schema that is known."""
    require(isinstance(data, Mapping), "plan", "be a mapping", shortened(data))
    # Of another schema other keys are right, so that it is looked at first.
    require(data.get("schema") == SCHEMA, "schema", f"be {SCHEMA}", shortened(data.get("schema")))
    require_keys(data, "plan", {"schema", *names})


def _is_count(value: Any) -> bool:
    return is_whole(value, least=1) and value <= MOST


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{32}", value) is not None
