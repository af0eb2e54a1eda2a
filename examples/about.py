"""What a run folder says of its network, in host.json; whatever framework the network then runs in."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenexit import TokenExitError

FILE = "host.json"


@dataclass(frozen=True)
class About:
    """What a run folder says of its network.

    Attributes:
        host: Kind of network: `plain` or `timm`.
        config: Its arguments: fields of `examples.scenes.vit.Config`, or the name and arguments for
            `timm.create_model`.
        classes: Class names, in the order of the logits.
        palette: Colour of each class, (red, green, blue), 0 to 255.
        mean: Mean of the red, green and blue channels of images in [0, 1].
        std: Their standard deviation.
        size: Height and width in pixels that the network was trained for.
    """

    host: str
    config: Mapping[str, Any]
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    size: tuple[int, int]


def read(folder: Path, /) -> About:
    """Read host.json.

    Args:
        folder: The run folder.

    Returns:
        What it says; the kind of network may be any.

    Raises:
        TokenExitError: If it is missing or not what it should be.
    """
    path = folder / FILE
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return About(**{name: _tuples(value) for name, value in data.items()})
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise TokenExitError(f"`folder` must hold a valid {FILE}, got {path}: {error}") from error


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
