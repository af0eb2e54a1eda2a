"""Files, of tensors for the most part, that are written whole or not at all, and say what they belong to."""

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tokenexit import TokenExitError
from tokenexit.errors import require

__all__ = ["fingerprint", "read", "require_marks", "write", "write_text"]


def fingerprint(tensors: Iterable[Tensor], /) -> str:
    """A hash of tensors: their types, shapes and bytes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write(file: Path, tensors: Mapping[str, Tensor], marks: Mapping[str, str], /) -> None:
    """Write tensors and marks as safetensors; who reads the file meanwhile reads what was there before."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    # Copies, for safetensors refuses tensors that share memory.
    copies = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()
    }
    save_file(copies, part, metadata=dict(marks))
    os.replace(part, file)


def write_text(file: Path, text: str, /) -> None:
    """Write a text, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, file)


def read(file: Path, argument: str, /) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors, which are mapped into memory and read when they are looked at, and marks."""
    try:
        with safe_open(file, framework="pt") as opened:
            names = opened.keys()
            return {name: opened.get_tensor(name) for name in names}, opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise TokenExitError(f"`{argument}` must hold a valid {file.name}, got {file}: {error}") from error


def require_marks(argument: str, file: Path, wanted: Mapping[str, str], found: Mapping[str, str], /) -> None:
    """Raise a `TokenExitError` that names the first mark that a file has not, or has another of."""
    for name, mark in wanted.items():
        got = found.get(name, "none")
        rule = f"be for the same {name} as {file.name} in it, or another folder"
        require(got == mark, argument, rule, f"{got[:16]} there, and now {mark[:16]}")
