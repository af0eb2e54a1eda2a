"""Saved folders, looked at and changed."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from tokenexit import folders
from tokenexit.sealed import BY_HAND


def plan_in(folder: Path, kind: folders.Kind = "exits") -> dict[str, Any]:
    """The plan, without its weights and checksum."""
    data = json.loads((folder / f"{kind}.json").read_text())
    return {key: value for key, value in data.items() if key not in ("weights", "checksum")}


def weights_in(folder: Path, kind: folders.Kind = "exits") -> Path:
    """The file of weights."""
    return folder / json.loads((folder / f"{kind}.json").read_text())["weights"]["file"]


def edit(folder: Path, kind: folders.Kind = "exits", **changes: Any) -> None:
    """Change a plan on purpose, and say so."""
    file = folder / f"{kind}.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"checksum": BY_HAND} | changes))


def put(folder: Path, weights: bytes, kind: folders.Kind = "exits") -> None:
    """Put other weights in the place of those that are there, with the hash that a forger would give them."""
    named = folders.Weights.of(kind, weights)
    (folder / named.file).write_bytes(weights)
    edit(folder, kind, weights=dataclasses.asdict(named))
