"""Manifests of saved exits, gates and semantic tokens: plain data that every adapter writes, reads and refuses alike.

    write("folder", "exits", manifest, weights)          # the weights as bytes of a safetensors file
    manifest, file = read("folder", "exits")
    require_network(manifest, "exits", argument="model", width=192, depth=12)

Names in a manifest are looked up in closed registries, and unknown keys are refused. `tokenexit.folders` puts it into
files; `tokenexit.weights` has the names, shapes and dtypes of the weights beside it.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

from tokenexit import folders, heads
from tokenexit._plain import MOST, is_number, is_whole, require_keys, shortened
from tokenexit.assessment.results import Option, options_from
from tokenexit.errors import TokenExitError, require
from tokenexit.folders import Kind
from tokenexit.heads import HeadPlan
from tokenexit.schedule import Schedule
from tokenexit.semantic import SemanticPlan, require_room
from tokenexit.weights import Spec

__all__ = [
    "HeadManifest",
    "SemanticManifest",
    "choose_heads",
    "from_dict",
    "head_specs",
    "read",
    "require_classes",
    "require_final_head",
    "require_head_plan",
    "require_network",
    "to_dict",
    "weights_rule",
    "write",
]

SCHEMA = 2

_HEAD_KEYS = {"schedule", "after", "plan", "built_head", "classes", "width", "depth", "fitted"}
_SEMANTIC_KEYS = {"plan", "after", "until", "heads", "hidden", "epsilon", "width", "depth"}

# Under which name the heads of a kind lie in the file of weights, and what errors call what is saved.
_PART: Mapping[Kind, str] = {"exits": "exit_heads", "gates": "gates"}
_SAVED: Mapping[Kind, str] = {"exits": "exits", "gates": "gates", "semantic": "layers"}

Module = TypeVar("Module")


@dataclass(frozen=True)
class HeadManifest:
    """Description of a model with exit heads, or with gates, without its weights.

    Attributes:
        schedule: The schedule in use.
        after: The blocks that have an exit head, or a gate.
        head_plan: How the heads were built; None if they were given as modules.
        built_head: Whether the final head was built along with them, and is saved with them.
        classes: Class count; 2 for gates; 0 for exit heads that translate under a decoder, or if there is none.
        width: Channels of a token.
        depth: How many blocks the network has.
        fitted: Digests of the images that the heads were fitted to, ascending, as `certificate.digest` makes them: a
            calibration on these would certify nothing.
        taps: After how many blocks a decoder reads the tokens, if exit heads translate for it.
        assessed: Plans that were assessed, which `retune` finds a target among.
    """

    schedule: Schedule
    after: tuple[int, ...]
    head_plan: HeadPlan | None
    built_head: bool
    classes: int
    width: int
    depth: int
    fitted: tuple[str, ...] = ()
    taps: tuple[int, ...] = ()
    assessed: tuple[Option, ...] = ()

    def targets(self, after: int, /) -> int:
        """Of how many later blocks a head that translates gives the token.

        Args:
            after: The block that the head follows.
        """
        return max(sum(tap > after for tap in self.taps), 1)


@dataclass(frozen=True)
class SemanticManifest:
    """Description of a model on semantic tokens, without its weights.

    Attributes:
        semantic_plan: Configuration of the semantic tokens.
        after: After how many blocks there are semantic tokens.
        until: After how many blocks all tokens are recovered; None if they are not.
        heads: Attention heads of the layers that were put in.
        hidden: Channels inside their MLPs.
        epsilon: What their norms add to the variance.
        width: Channels of a token.
        depth: How many blocks the network has.
    """

    semantic_plan: SemanticPlan
    after: int
    until: int | None
    heads: int
    hidden: int
    epsilon: float
    width: int
    depth: int


def to_dict(manifest: HeadManifest | SemanticManifest, /) -> dict[str, Any]:
    """A manifest as plain data.

    Args:
        manifest: The manifest, of any kind.

    Returns:
        Plain data, for JSON.

    Raises:
        TokenExitError: If a policy of the schedule is not of this library.
    """
    if isinstance(manifest, SemanticManifest):
        return {
            "schema": SCHEMA,
            "plan": manifest.semantic_plan.to_dict(),
            "after": manifest.after,
            "until": manifest.until,
            "heads": manifest.heads,
            "hidden": manifest.hidden,
            "epsilon": manifest.epsilon,
            "width": manifest.width,
            "depth": manifest.depth,
        }
    found = {
        "schema": SCHEMA,
        "schedule": manifest.schedule.to_dict(),
        "after": list(manifest.after),
        "plan": None if manifest.head_plan is None else heads.to_dict(manifest.head_plan),
        "built_head": manifest.built_head,
        "classes": manifest.classes,
        "width": manifest.width,
        "depth": manifest.depth,
        "fitted": list(manifest.fitted),
    }
    # What knows of neither reads all others.
    found |= {"taps": list(manifest.taps)} if manifest.taps else {}
    return found | ({"assessed": [one.to_dict() for one in manifest.assessed]} if manifest.assessed else {})


@overload
def from_dict(data: Mapping[str, Any], kind: Literal["exits", "gates"], /) -> HeadManifest: ...
@overload
def from_dict(data: Mapping[str, Any], kind: Literal["semantic"], /) -> SemanticManifest: ...
@overload
def from_dict(data: Mapping[str, Any], kind: Kind, /) -> HeadManifest | SemanticManifest: ...
def from_dict(data: Mapping[str, Any], kind: Kind, /) -> HeadManifest | SemanticManifest:
    """The manifest that `to_dict` wrote down.

    Args:
        data: What `to_dict` returned, or its like read from a file.
        kind: What is described.

    Returns:
        The manifest.

    Raises:
        TokenExitError: If a key is missing or unknown, or a value is of the wrong type or range.
    """
    return _semantic_manifest(data) if kind == "semantic" else _head_manifest(data)


def write(folder: str | Path, kind: Kind, manifest: HeadManifest | SemanticManifest, weights: bytes, /) -> None:
    """Write a manifest and its weights in one act, as `folders.save`.

    Args:
        folder: Where to; made if it is not there.
        kind: What is saved.
        manifest: Its description.
        weights: The weights, as the bytes of a safetensors file.

    Raises:
        TokenExitError: If the manifest is of another kind, a policy of the schedule is not of this library, or the
            folder cannot be written to.
    """
    described = isinstance(manifest, SemanticManifest) == (kind == "semantic")
    require(described, "manifest", f"describe what is saved, {kind}", type(manifest).__name__)
    folders.save(folder, kind, to_dict(manifest), weights)


@overload
def read(folder: str | Path, kind: Literal["exits", "gates"], /) -> tuple[HeadManifest, Path]: ...
@overload
def read(folder: str | Path, kind: Literal["semantic"], /) -> tuple[SemanticManifest, Path]: ...
def read(folder: str | Path, kind: Kind, /) -> tuple[HeadManifest | SemanticManifest, Path]:
    """Read a manifest, and check that the file of its weights is the one that was saved with it.

    Args:
        folder: Where `write` wrote them.
        kind: What was saved.

    Returns:
        The manifest and the path of the weights, of which nothing but the hash has been looked at.

    Raises:
        TokenExitError: If a file is missing, damaged, edited by mistake, of another save or of another kind.
    """
    manifest, file = folders.read(folder, kind, lambda data: from_dict(data, kind))
    if kind == "gates" and isinstance(manifest, HeadManifest):
        gates = manifest.classes == 2 and not manifest.built_head
        require(gates, "folder", "hold gates", f"heads of {manifest.classes} classes")
    return manifest, file


def require_network(
    manifest: HeadManifest | SemanticManifest, kind: Kind, /, *, argument: str, width: int, depth: int
) -> None:
    """Raise a `TokenExitError` unless a network is like the one that was saved, as far as a manifest shows.

    Args:
        manifest: What was saved.
        kind: Its kind.
        argument: The argument that gave the network.
        width: Channels of the network's tokens.
        depth: How many blocks it has.

    Raises:
        TokenExitError: If the width or the depth is another one.
    """
    for name, found in (("width", width), ("depth", depth)):
        wanted = getattr(manifest, name)
        require(found == wanted, argument, f"have {name} {wanted}, as the saved {_SAVED[kind]}", found)


def require_final_head(manifest: HeadManifest, head: object, /) -> None:
    """Raise a `TokenExitError` unless a final head is given exactly if none was saved.

    Args:
        manifest: What was saved.
        head: The user's final head, or None.

    Raises:
        TokenExitError: If it is missing, or there are two.
    """
    rule = "be given exactly if the exits were saved without a final head, and `decoder` if they were saved under one"
    got = "None" if head is None else type(head).__name__
    require((head is None) == manifest.built_head, "head", rule, got)


def require_classes(manifest: HeadManifest, classes: int, /) -> None:
    """Raise a `TokenExitError` unless the user's final head has the classes of the saved exits.

    Args:
        manifest: What was saved.
        classes: Class count of the final head.

    Raises:
        TokenExitError: If it is another one.
    """
    require(classes == manifest.classes, "head", f"give {manifest.classes} classes, as the saved exits", classes)


def require_head_plan(manifest: HeadManifest, kind: Kind, /) -> HeadPlan:
    """The plan of the saved heads, for an adapter that cannot run modules of another framework.

    Args:
        manifest: What was saved.
        kind: Its kind.

    Returns:
        The plan.

    Raises:
        TokenExitError: If the heads were the user's own modules.
    """
    if manifest.head_plan is None:
        what = "gates" if kind == "gates" else "heads"
        raise TokenExitError(f"`folder` must hold {what} built from a plan, got modules of another framework's own")
    return manifest.head_plan


def choose_heads(
    manifest: HeadManifest, given: Mapping[int, Module] | None, /, *, argument: str
) -> HeadPlan | Mapping[int, Module]:
    """The plan of the saved heads, or the modules that the user gives where there was no plan.

    Args:
        manifest: What was saved.
        given: Modules by the blocks that they follow, or None.
        argument: The argument that gave them.

    Returns:
        The plan, or the modules.

    Raises:
        TokenExitError: If modules are missing, given although there is a plan, or given for other blocks.
    """
    if given is None:
        if manifest.head_plan is None:
            raise TokenExitError(f"`{argument}` must be given if they were saved as modules of your own, got None")
        return manifest.head_plan
    require(manifest.head_plan is None, argument, "be left out if a plan was saved", manifest.head_plan)
    require(sorted(given) == list(manifest.after), argument, f"follow the blocks {manifest.after}", [*given])
    return given


def head_specs(
    manifest: HeadManifest,
    kind: Kind,
    one: Callable[[int], Mapping[str, Spec]],
    final: Mapping[str, Spec] | None = None,
    /,
) -> dict[str, Spec]:
    """Specs of all weights in the file, under the names that they have there.

    Args:
        manifest: What is saved; its heads are built from a plan.
        kind: Its kind.
        one: From `HeadManifest.targets` to specs of the weights of one head of that plan, for the width and the classes
            of the manifest.
        final: Those of the final head, of the plan `head_plan.final`; as of one head if left out.

    Returns:
        The specs, as `exit_heads.6.0.weight`; of the final head as `head.0.weight`, if it is saved.
    """
    parts = {f"{_PART[kind]}.{after}": one(manifest.targets(after)) for after in manifest.after}
    parts |= {"head": one(1) if final is None else final} if manifest.built_head else {}
    return {f"{name}.{key}": spec for name, part in parts.items() for key, spec in part.items()}


def weights_rule(kind: Kind, /) -> str:
    """The rule, for errors, that a folder breaks if its weights are not as its manifest describes.

    Args:
        kind: What was saved.

    Returns:
        The rule, as in "`folder` must hold the weights that exits.json describes".
    """
    return f"hold the weights that {kind}.json describes"


def _head_manifest(data: Mapping[str, Any]) -> HeadManifest:
    known = {"taps", "assessed"} & set(data) if isinstance(data, Mapping) else set[str]()
    _require_keys(data, _HEAD_KEYS | known)
    _require_counts(data, "width", "depth")
    classless = data["classes"] == 0 and not isinstance(data["classes"], bool) and data["built_head"] is False
    if not classless:
        _require_counts(data, "classes")
    after: Any = data["after"]
    ok = isinstance(after, list) and all(_is_count(block) and block < data["depth"] for block in after)
    require(ok, "after", f"be a list of blocks from 1 to {data['depth'] - 1}", repr(after))
    require(after == sorted(set(after)), "after", "ascend", after)
    taps: Any = data.get("taps", [])
    ok = isinstance(taps, list) and all(_is_count(tap) and tap <= data["depth"] for tap in taps)
    require(ok and taps == sorted(set(taps)), "taps", f"be blocks from 1 to {data['depth']} that ascend", repr(taps))
    require(isinstance(data["built_head"], bool), "built_head", "be true or false", repr(data["built_head"]))
    fitted: Any = data["fitted"]
    digests = isinstance(fitted, list) and all(map(_is_digest, fitted)) and fitted == sorted(set(fitted))
    require(digests, "fitted", "be a list of different digests, 32 hex digits each, ascending", shortened(fitted))
    try:
        schedule, assessed = Schedule.from_dict(data["schedule"]), options_from(data.get("assessed", []))
    except RecursionError as error:
        raise TokenExitError("`schedule` must not be nested so deeply, got a recursion error") from error
    missing = sorted(set(schedule.after) - set(after))
    require(not missing, "schedule", f"have exits only after blocks with a head, {after}", missing)
    return HeadManifest(
        schedule=schedule,
        after=tuple(after),
        head_plan=None if data["plan"] is None else heads.from_dict(data["plan"]),
        built_head=data["built_head"],
        classes=data["classes"],
        width=data["width"],
        depth=data["depth"],
        fitted=tuple(fitted),
        taps=tuple(taps),
        assessed=assessed,
    )


def _semantic_manifest(data: Mapping[str, Any]) -> SemanticManifest:
    _require_keys(data, _SEMANTIC_KEYS)
    _require_counts(data, "heads", "hidden", "width", "depth")
    require_room(data["after"], data["until"], depth=data["depth"])
    require(data["width"] % data["heads"] == 0, "heads", f"divide the width, {data['width']}", data["heads"])
    epsilon = data["epsilon"]
    positive = isinstance(epsilon, float) and is_number(epsilon) and epsilon > 0
    require(positive, "epsilon", "be a positive number", repr(epsilon))
    values = {name: data[name] for name in _SEMANTIC_KEYS - {"plan"}}
    return SemanticManifest(SemanticPlan.from_dict(data["plan"]), **values)


def _require_keys(data: Any, names: set[str]) -> None:
    """Raise a `TokenExitError` unless data have exactly these keys, and are of the schema that is known."""
    require(isinstance(data, Mapping), "manifest", "be a mapping", shortened(data))
    # Of another schema other keys are right, so that it is looked at first.
    require(data.get("schema") == SCHEMA, "schema", f"be {SCHEMA}", shortened(data.get("schema")))
    require_keys(data, "manifest", {"schema", *names})


def _require_counts(data: Mapping[str, Any], *names: str) -> None:
    for name in names:
        require(_is_count(data[name]), name, f"be a whole number from 1 to {MOST}", repr(data[name]))


def _is_count(value: Any) -> bool:
    return is_whole(value, least=1) and value <= MOST


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{32}", value) is not None
