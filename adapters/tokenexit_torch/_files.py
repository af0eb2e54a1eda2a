"""Files of tensors that are written whole or not at all, name what they belong to, and are refused if damaged."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tokenexit import TokenExitError, folders
from tokenexit.errors import require
from tokenexit.guarantees import certificate

__all__ = ["digest", "fingerprint", "read", "require_shapes", "require_weights", "write"]

_CONTENT = "content"
_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_WHOLE = (torch.int32, torch.int64)  # counts of batches; the JAX adapter writes the shorter ones


def fingerprint(tensors: Iterable[Tensor], /) -> str:
    """A hash of tensors: their types, shapes and bytes."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
        found.update(_bytes(tensor))
    return found.hexdigest()


def digest(image: Tensor, /) -> str:
    """The digest by which a copy of an image is known."""
    return certificate.digest(_bytes(image), dtype=str(image.dtype).removeprefix("torch."), shape=image.shape)


def write(file: Path, tensors: Mapping[str, Tensor], marks: Mapping[str, str], /, *, argument: str) -> None:
    """Write tensors and marks as safetensors, with a hash of both; a reader meanwhile finds what was there before.

    Raises:
        TokenExitError: If the file cannot be written.
    """
    # Copies, for safetensors refuses tensors that share memory.
    copies = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()
    }
    metadata = {**marks, _CONTENT: _content(copies, marks)}
    with folders.replacing(file, argument=argument) as part:
        try:
            save_file(copies, part, metadata=metadata)
        except SafetensorError as error:  # what a full disk gives
            raise OSError(str(error)) from error


def read(file: Path, argument: str, /) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors, which are mapped into memory, and marks, after a check that they are what was written.

    Raises:
        TokenExitError: If the file is missing, damaged, or was not written by `write`.
    """
    regular = file.is_file()  # a pipe would be waited for
    require(regular, argument, f"hold a valid {file.name}", f"{file}, which is no file")
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
            marks = opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise TokenExitError(f"`{argument}` must hold a valid {file.name}, got {file}: {error}") from error
    found = marks.pop(_CONTENT, None)
    rule = f"hold {file.name} as it was written"
    require(found == _content(tensors, marks), argument, rule, f"{file}, which is damaged or of another version")
    return tensors, marks


def require_weights(argument: str, source: str, wanted: Mapping[str, Tensor], found: Mapping[str, Tensor], /) -> None:
    """Raise a `TokenExitError` unless tensors can stand in for others: by names, shapes and kinds of numbers.

    Args:
        argument: The argument that the tensors came by.
        source: What they must be, as in "hold the weights that exits.json describes".
        wanted: Those that they are to stand in for; their numbers are not looked at.
        found: The tensors; all of their numbers must be finite.
    """
    require_shapes(argument, source, wanted, found)
    for name, value in found.items():
        kinds = _FLOATING if wanted[name].is_floating_point() else _WHOLE
        known = ", ".join(str(kind).removeprefix("torch.") for kind in kinds)
        require(value.dtype in kinds, argument, f"{source}, in {known}", f"{name} in {value.dtype}")
        finite = kinds is _WHOLE or bool(value.isfinite().all())
        require(finite, argument, f"{source}, all of them finite", f"NaN or infinity in {name}")


def require_shapes(argument: str, source: str, wanted: Mapping[str, Tensor], found: Mapping[str, Tensor], /) -> None:
    """Raise a `TokenExitError` unless tensors have the names and shapes of others; arguments as `require_weights`."""
    shapes, there = ({name: tuple(value.shape) for name, value in one.items()} for one in (wanted, found))
    every = [*sorted(there), *sorted({*shapes} - {*there})]  # what is there tells more than what is missing
    names = [name for name in every if shapes.get(name) != there.get(name)]
    got = ", ".join(f"{name}: {there.get(name)} instead of {shapes.get(name)}" for name in names[:4])
    require(not names, argument, source, got)


def _content(tensors: Mapping[str, Tensor], marks: Mapping[str, str]) -> str:
    """A hash of all that a file holds."""
    names = sorted(tensors)
    every = json.dumps([names, sorted(marks.items()), fingerprint(tensors[name] for name in names)])
    return hashlib.sha256(every.encode()).hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
