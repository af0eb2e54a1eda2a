"""Checkpoints of a training run: one safetensors file, whose header holds as JSON what is not a tensor.

Nothing read from a checkpoint is executed.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes

from examples import shell


def save(path: Path, content: Mapping[str, Any], /) -> None:
    """Write a checkpoint whole or not at all.

    Args:
        path: The file.
        content: State dictionaries and the like: mappings, lists and tuples of tensors, numbers, strings and None.
    """
    tensors: dict[str, torch.Tensor] = {}
    plain = json.dumps(_plain(content, tensors))
    with shell.replacing(path) as file:
        file.write(to_bytes(tensors, metadata={"content": plain}))


def load(path: Path, /) -> dict[str, Any]:
    """Read a checkpoint.

    Args:
        path: What `save` wrote.

    Raises:
        UsageError: If the file is anything else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            return _restored(json.loads(file.metadata()["content"]), tensors)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise shell.UsageError(f"`--out` must hold a checkpoint of this script, got {str(path)!r}: {error}") from error


def keep(path: Path, recipe: Mapping[str, Any], parts: Mapping[str, Any], /, *, done: int) -> None:
    """Write a checkpoint of a training under way.

    Args:
        path: The file.
        recipe: Everything that decides the result.
        parts: What has a state, by name: the model, optimisers, schedules of rates.
        done: How many steps, or epochs, are done.
    """
    save(path, {"recipe": dict(recipe), "done": done, **{name: part.state_dict() for name, part in parts.items()}})


def resume(path: Path, recipe: Mapping[str, Any], parts: Mapping[str, Any], /) -> int:
    """Take up what `keep` wrote, if there is anything.

    Args:
        path: The file.
        recipe: Everything that decides the result.
        parts: What takes its state from the checkpoint, by name.

    Returns:
        How many steps, or epochs, are done.

    Raises:
        UsageError: If it is of another recipe.
    """
    if not path.is_file():
        return 0
    state = load(path)
    if state["recipe"] != recipe:
        other = {name: value for name, value in state["recipe"].items() if recipe.get(name) != value}
        raise shell.UsageError(f"`--out` must be new or a run with the same settings, got {path.parent} with {other}")
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return state["done"]


def _plain(value: Any, tensors: dict[str, torch.Tensor]) -> list[Any]:
    """A value as JSON can hold it, `[kind, value]`; tensors go to `tensors` and leave their name."""
    match value:
        case torch.Tensor():
            name = str(len(tensors))
            tensors[name] = value.detach().clone().contiguous()
            return ["tensor", name]
        case Mapping():
            return ["dict", [[key, _plain(item, tensors)] for key, item in value.items()]]
        case list() | tuple():
            return [type(value).__name__, [_plain(item, tensors) for item in value]]
        case None | bool() | int() | float() | str():
            return ["value", value]
    raise TypeError(f"`content` must be made of tensors and plain values, got {type(value).__name__}")


def _restored(plain: list[Any], tensors: Mapping[str, torch.Tensor]) -> Any:
    kind, value = plain
    match kind:
        case "tensor":
            return tensors[value]
        case "dict":
            return {key: _restored(item, tensors) for key, item in value}
        case "list":
            return [_restored(item, tensors) for item in value]
        case "tuple":
            return tuple(_restored(item, tensors) for item in value)
    return value
