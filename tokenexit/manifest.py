"""What is written beside saved weights of exits, gates and semantic tokens: JSON that every adapter reads and writes.

It holds plain data only. Names in it are looked up in closed registries, and unknown keys are refused.
"""

import json
from dataclasses import dataclass, fields
from typing import Any

from tokenexit import heads
from tokenexit._plain import MOST, is_number, is_whole
from tokenexit.errors import TokenExitError, require
from tokenexit.heads import HeadPlan
from tokenexit.schedule import Schedule
from tokenexit.semantic import SemanticPlan, require_room

__all__ = ["Manifest", "SemanticManifest", "from_json", "semantic_from_json", "semantic_to_json", "to_json"]

SCHEMA = 1


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
    """

    schedule: Schedule
    after: tuple[int, ...]
    plan: HeadPlan | None
    built_head: bool
    classes: int
    width: int
    depth: int


def to_json(manifest: Manifest, /) -> str:
    """The manifest as JSON.

    Raises:
        TokenExitError: If a policy of the schedule is not of this library.
    """
    data = {
        "schema": SCHEMA,
        "schedule": manifest.schedule.to_dict(),
        "after": list(manifest.after),
        "plan": None if manifest.plan is None else heads.to_dict(manifest.plan),
        "built_head": manifest.built_head,
        "classes": manifest.classes,
        "width": manifest.width,
        "depth": manifest.depth,
    }
    return json.dumps(data, indent=2) + "\n"


def from_json(text: str, /) -> Manifest:
    """The manifest that `to_json` wrote.

    Args:
        text: The JSON.

    Returns:
        The manifest.

    Raises:
        TokenExitError: If it is not JSON, a key is missing or unknown, or a value is of the wrong type or range.
    """
    data = _read(text, {"schema", "schedule", "after", "plan", "built_head", "classes", "width", "depth"})
    for name in ("classes", "width", "depth"):
        require(_is_count(data[name]), name, f"be a whole number from 1 to {MOST}", repr(data[name]))
    after: Any = data["after"]
    ok = isinstance(after, list) and all(_is_count(block) and block < data["depth"] for block in after)
    require(ok, "after", f"be a list of blocks from 1 to {data['depth'] - 1}", repr(after))
    require(after == sorted(set(after)), "after", "ascend", after)
    require(isinstance(data["built_head"], bool), "built_head", "be true or false", repr(data["built_head"]))
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


def semantic_to_json(manifest: SemanticManifest, /) -> str:
    """The manifest of a model on semantic tokens as JSON."""
    data = {field.name: getattr(manifest, field.name) for field in fields(SemanticManifest)}
    return json.dumps({"schema": SCHEMA} | data | {"plan": manifest.plan.to_dict()}, indent=2) + "\n"


def semantic_from_json(text: str, /) -> SemanticManifest:
    """The manifest that `semantic_to_json` wrote.

    Args:
        text: The JSON.

    Returns:
        The manifest.

    Raises:
        TokenExitError: If it is not JSON, a key is missing or unknown, or a value is of the wrong type or range.
    """
    data = _read(text, {"schema", *(field.name for field in fields(SemanticManifest))})
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


def _read(text: str, keys: set[str]) -> dict[str, Any]:
    """A JSON object with exactly these keys, of the schema that is known."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TokenExitError(f"`text` must be JSON, got the error: {error}") from error
    found = sorted(data) if isinstance(data, dict) else repr(data)
    require(isinstance(data, dict) and set(data) == keys, "text", f"be an object with the keys {sorted(keys)}", found)
    require(data["schema"] == SCHEMA, "schema", f"be {SCHEMA}", repr(data["schema"]))
    return data


def _is_count(value: Any) -> bool:
    return is_whole(value, least=1) and value <= MOST
