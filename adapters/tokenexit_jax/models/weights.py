"""Named weights from files, as arrays. Nothing read is ever executed: pickled objects in a `.npz` file are refused."""

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped
from safetensors import SafetensorError
from safetensors.flax import load_file

from tokenexit import TokenExitError
from tokenexit.errors import require

__all__ = ["read", "require_exactly"]


def read(file: str | Path, /) -> dict[str, Shaped[np.ndarray, "..."]]:
    """Read the arrays of a file by name.

    Args:
        file: A `.npz` or a `.safetensors` file.

    Returns:
        The arrays, in the types that they have in the file.

    Raises:
        TokenExitError: If the file is missing, of another kind, or holds anything but plain arrays.
    """
    require(isinstance(file, str | Path), "file", "be a path", type(file).__name__)
    file = Path(file)
    kinds = ".npz or .safetensors"
    require(file.is_file() and file.suffix in kinds.split(" or "), "file", f"be an existing {kinds} file", str(file))
    try:
        if file.suffix == ".safetensors":
            return {name: np.asarray(value) for name, value in load_file(str(file)).items()}
        with np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (SafetensorError, zipfile.BadZipFile, ValueError, OSError, EOFError, AttributeError, TypeError) as error:
        raise TokenExitError(f"`file` must hold plain arrays, got {str(file)!r}: {error}") from error


def require_exactly(
    weights: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], /, *, argument: str = "weights"
) -> None:
    """Raise a `TokenExitError` unless weights are those that are needed: every one, in its shape, and no other.

    Args:
        weights: Arrays by name.
        shapes: The shapes that are needed.
        argument: What the weights are called in the message.

    Raises:
        TokenExitError: Naming those that are missing, unknown or of another shape.
    """
    missing, unknown = sorted(shapes.keys() - weights.keys()), sorted(weights.keys() - shapes.keys())
    got = f"missing {_some(missing)}, unknown {_some(unknown)}"
    require(not (missing or unknown), argument, "hold every tensor of the network, and no other", got)
    differing = [
        f"{name}: {tuple(weights[name].shape)} instead of {tuple(shape)}"
        for name, shape in shapes.items()
        if tuple(weights[name].shape) != tuple(shape)
    ]
    require(not differing, argument, "have the shapes of the network", ", ".join(differing[:4]))


def _some(names: Sequence[str]) -> str:
    return f"{list(names[:4])} ({len(names)} in all)"
