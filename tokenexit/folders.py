"""Saved folders: a manifest as JSON that names its file of weights and their hash. Saving is one act.

A folder holds `exits.json`, `gates.json` or `semantic.json`, and beside it the weights, as
`exits-0123456789abcdef.safetensors`. The weights are written first, under a name of their own; then the JSON is
replaced in one step, which is the moment from which the new save counts; then the weights of the old one are removed.
A process that ends anywhere in between leaves the old save or the new one. Files of two saves in one folder do not fit
each other, and are refused.

For adapters: `save` and `read` are the whole of it, on which `tokenexit.manifest` puts `write` and `read` of its own;
`load_by_kind` chooses among an adapter's loaders. `replacing` writes any other file whole or not at all, and
`require_metadata` binds it to what it belongs to.
"""

import hashlib
import inspect
import os
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, get_args, runtime_checkable

from tokenexit._array import Array
from tokenexit._plain import require_keys, shortened
from tokenexit.errors import TokenExitError, require
from tokenexit.sealed import BY_HAND, parse, require_whole, seal

__all__ = [
    "KINDS",
    "Kind",
    "Store",
    "Weights",
    "load_by_kind",
    "read",
    "replacing",
    "require_metadata",
    "save",
    "text_of",
    "write",
]

Kind = Literal["exits", "gates", "semantic"]
"""What is saved."""

KINDS: tuple[Kind, ...] = get_args(Kind)
"""Every kind: the file of a kind is `<kind>.json`."""

Manifest = TypeVar("Manifest")

_LARGEST_TEXT = 2**28  # bytes: far more than a manifest, with the digests of a million images, needs
_STRAY = 3600.0  # seconds after which what an interrupted save has left may be removed
_GRACE = 0.02  # seconds in which another process that saves comes from its manifest to weights that were removed
_EDITED = f'be that of the content, which was edited or damaged: "{BY_HAND}" in its place says that it was on purpose'


@dataclass(frozen=True)
class Weights:
    """The file of weights that belongs to a manifest.

    Attributes:
        file: Its name in the folder.
        sha256: SHA-256 of its bytes, in hex.
        size: How many bytes these are.
    """

    file: str
    sha256: str
    size: int

    @staticmethod
    def of(kind: Kind, content: bytes, /) -> "Weights":
        """The file for some weights; its name is of their hash."""
        digest = hashlib.sha256(content).hexdigest()
        return Weights(f"{kind}-{digest[:16]}.safetensors", digest, len(content))

    @staticmethod
    def from_dict(data: Any, kind: Kind, /) -> "Weights":
        """The entry of a manifest for its weights.

        Args:
            data: A mapping with the fields of this class.
            kind: What is saved.

        Returns:
            The same.

        Raises:
            TokenExitError: If a field is missing, or the file is not one that `save` writes.
        """
        require_keys(data, "weights", {"file", "sha256", "size"})
        file, digest, size = data["file"], data["sha256"], data["size"]
        hashed = isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest) is not None
        require(hashed, "sha256", "be a SHA-256 in hex", shortened(digest))
        named = isinstance(file, str) and re.fullmatch(rf"{kind}-[0-9a-f]{{16}}\.safetensors", file) is not None
        require(named, "file", f"be {kind}-<16 hex digits>.safetensors", shortened(file))
        whole = isinstance(size, int) and not isinstance(size, bool) and size >= 0
        require(whole, "size", "be a whole number from 0 up", shortened(size))
        return Weights(file, digest, size)


@runtime_checkable
class Store(Protocol):
    """Arrays of a framework as bytes. A module with these functions is one."""

    def write(self, file: Path, arrays: Mapping[str, Array], metadata: Mapping[str, str], /, *, argument: str) -> None:
        """Write arrays and metadata, and a hash of both, whole or not at all (`replacing`).

        Args:
            file: The file; its folder may not be there yet.
            arrays: The arrays by name.
            metadata: Texts by name.
            argument: The name of the argument that gave the folder, for errors.
        """
        ...

    def read(self, file: Path, argument: str, /) -> tuple[dict[str, Array], dict[str, str]]:
        """Arrays and metadata that `write` wrote; a `TokenExitError` if a bit of them is another.

        Args:
            file: The file.
            argument: The name of the argument that gave the folder, for errors.
        """
        ...

    def fingerprint(self, arrays: Iterable[Array], /) -> str:
        """SHA-256 of types, shapes and bytes, in hex.

        Args:
            arrays: The arrays.
        """
        ...


def load_by_kind(
    loaders: Mapping[str, tuple[Kind, Callable[..., Any]]],
    network: Any,
    folder: str | Path,
    kind: str | None,
    options: Mapping[str, Any],
    /,
) -> Any:
    """Load a folder by the loader for the kind that is asked for, or else for the one kind that the folder holds.

    Args:
        loaders: The loaders by name, each with the kind of the files that it reads; under the name of each kind, its
            own loader. A loader takes the network, the folder, and its options by keyword.
        network: What the loader puts the saved weights into.
        folder: The folder.
        kind: Name of a loader, or None.
        options: Values of options by name; None stands for an option that was not given.

    Returns:
        The result of the loader.

    Raises:
        TokenExitError: If `kind` names no loader, the folder holds nothing of that kind, or several kinds while none is
            asked for, an option is given that belongs to other kinds, or the loader raises it.
    """
    known = kind is None or (isinstance(kind, str) and kind in loaders)
    require(known, "kind", f"be one of {', '.join(loaders)}, or None", repr(kind))
    there = [one for one in KINDS if (_path(folder) / f"{one}.json").is_file()]
    if kind is None:
        require(len(there) > 0, "folder", f"hold the file {' or '.join(f'{one}.json' for one in KINDS)}", str(folder))
        several = f"be given for a folder that holds several kinds, {' and '.join(there)}"
        require(len(there) == 1, "kind", several, "None")
    name = there[0] if kind is None else kind
    file, loader = loaders[name]
    held = f", which holds {' and '.join(there)}: load it with kind={' or '.join(map(repr, there))}" if there else ""
    require(file in there, "folder", f"hold the file {file}.json for kind={name!r}", f"{folder}{held}")
    given = {option: value for option, value in options.items() if value is not None}
    for option, value in given.items():
        takers = [one for one, (_, other) in loaders.items() if option in inspect.signature(other).parameters]
        rule = f"be left out for kind={name!r}: it is for kind={' or '.join(map(repr, takers))}"
        require(name in takers, option, rule, type(value).__name__)
    return loader(network, folder, **given)


def save(folder: str | Path, kind: Kind, manifest: Mapping[str, Any], weights: bytes, /) -> None:
    """Write a manifest and its weights in one act: after an interruption the folder holds the old save or the new one.

    Two processes that save into one folder leave the save of one of them.

    Args:
        folder: Where to; made if it is not there.
        kind: What is saved.
        manifest: The manifest as plain data.
        weights: The weights, as the bytes of a safetensors file.

    Raises:
        TokenExitError: If the manifest is no plain data, or the folder cannot be written to (a full disk, a file
            in the way).
    """
    folder, named = _path(folder), Weights.of(kind, weights)
    text = seal({**manifest, "weights": asdict(named)}).encode()
    before = _present(folder, kind)
    write(folder / named.file, weights)
    write(folder / f"{kind}.json", text)
    if not (folder / named.file).is_file():  # another process has saved meanwhile, and removed it
        write(folder / named.file, weights)
    with suppress(OSError):
        _remove_strays(folder, kind, named.file, before)


def read(
    folder: str | Path, kind: Kind, from_dict: Callable[[Mapping[str, Any]], Manifest], /
) -> tuple[Manifest, Path]:
    """Read a saved manifest, and check that the file of its weights is the one that was saved with it.

    Args:
        folder: Where `save` wrote them.
        kind: What was saved.
        from_dict: Makes the manifest of its plain data, or raises a `TokenExitError`.

    Returns:
        The manifest and the path of the weights.

    Raises:
        TokenExitError: If a file is missing, damaged, edited by mistake, or of another save.
    """
    folder = _path(folder)
    file = folder / f"{kind}.json"
    require(file.is_file(), "folder", f"hold the file {file.name}", str(folder))
    seen = None
    while True:
        before, seen = seen, _manifest_state(file)
        try:
            manifest, weights = _opened(text_of(file, "folder"), kind, from_dict)
        except (TokenExitError, RecursionError) as error:
            raise TokenExitError(f"`folder` must hold a valid {file.name}, got {file}: {error}") from error
        there = folder / weights.file
        wrong = _difference(there, weights)
        if wrong is None:
            return manifest, there
        # Another process may be saving, and the same text anew (A, B, A): so the file counts, and not what it says.
        if seen == before:
            break
        time.sleep(_GRACE)
    rule = f"hold the weights that {file.name} names, which are bound to it by their hash"
    raise TokenExitError(f"`folder` must {rule}, got {there}: {wrong}")


def text_of(file: Path, argument: str, /) -> str:
    """The text of a file.

    Args:
        file: The file, in UTF-8.
        argument: The name of the argument that it was found by.

    Returns:
        The text.

    Raises:
        TokenExitError: If it cannot be read, is no text, or is larger than any that the library writes.
    """
    try:
        size = file.stat().st_size
        small = size <= _LARGEST_TEXT
        require(small, argument, f"hold a {file.name} of at most {_LARGEST_TEXT} bytes", f"{size} bytes")
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TokenExitError(f"`{argument}` must hold a valid {file.name}, got {file}: {error}") from error


def write(file: Path, content: bytes, /, *, argument: str = "folder") -> None:
    """Write a file whole or not at all: what it was before, or what it is now.

    Args:
        file: The file; its folder is made if it is not there.
        content: The bytes.
        argument: The name of the argument that gave the folder, for errors.

    Raises:
        TokenExitError: If it cannot be written.
    """
    with replacing(file, argument=argument) as part:
        part.write_bytes(content)


def require_metadata(argument: str, file: Path, wanted: Mapping[str, str], found: Mapping[str, str], /) -> None:
    """Raise a `TokenExitError` unless the metadata of a file are those of what it should belong to.

    Args:
        argument: The name of the argument that gave the folder.
        file: The file.
        wanted: Texts by name, all of which the file must have.
        found: What the file has.

    Raises:
        TokenExitError: If the file lacks one, or has another; the message names the first.
    """
    for name, text in wanted.items():
        got = found.get(name, "none")
        rule = f"be for the same {name} as {file.name} in it, or another folder"
        require(got == text, argument, rule, f"{got[:16]} there, and now {text[:16]}")


@contextmanager
def replacing(file: Path, /, *, argument: str = "folder") -> Iterator[Path]:
    """Replace a file by another that is written within this context; nothing is left of it if that fails.

    Every call has a name of its own for the other file, so that processes do not meet.

    Args:
        file: The file; its folder is made if it is not there.
        argument: The name of the argument that gave the folder, for errors.

    Yields:
        Where to write.

    Raises:
        TokenExitError: If it cannot be written.
    """
    part = file.with_name(f".{file.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        yield part
        with part.open("rb+") as opened:
            os.fsync(opened.fileno())
        os.replace(part, file)
        with suppress(OSError):  # not every system can
            _sync_folder(file.parent)
    except OSError as error:
        raise TokenExitError(f"`{argument}` must be a folder that can be written to, got {file}: {error}") from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def _path(folder: str | Path) -> Path:
    require(isinstance(folder, str | os.PathLike), "folder", "be a path", type(folder).__name__)
    return Path(folder)


def _opened(text: str, kind: Kind, from_dict: Callable[[Mapping[str, Any]], Manifest]) -> tuple[Manifest, Weights]:
    data = parse(text, what=f"saved {kind}")
    by_hand = data.get("checksum") == BY_HAND
    content = {key: value for key, value in data.items() if key != "checksum"}
    # What is wrong with the content is named first: it says more than a checksum does.
    manifest = from_dict({key: value for key, value in content.items() if key != "weights"})
    weights = Weights.from_dict(content.get("weights"), kind)
    if not by_hand:
        require_whole(data, rule=_EDITED)
    return manifest, weights


def _difference(file: Path, weights: Weights) -> str | None:
    """The difference between a file and the one that a manifest names; None if there is none."""
    try:
        if not file.is_file():
            return "there is no such file"
        size = file.stat().st_size
        if size != weights.size:  # before a large file is read
            return f"{size} bytes instead of {weights.size}"
        with file.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        return str(error)
    return None if digest == weights.sha256 else f"SHA-256 {digest[:16]} instead of {weights.sha256[:16]}"


def _present(folder: Path, kind: Kind) -> tuple[Path, tuple[int, int]] | None:
    """The weights of the save that is there, and what shows whether they have been written anew."""
    with suppress(TokenExitError, OSError):
        data = parse(text_of(folder / f"{kind}.json", "folder"))
        file = folder / Weights.from_dict(data.get("weights"), kind).file
        return file, _state(file)
    return None


def _manifest_state(file: Path) -> tuple[int, int] | None:
    with suppress(OSError):
        return _state(file)
    return None


def _state(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_ino, found.st_mtime_ns


def _remove_strays(folder: Path, kind: Kind, kept: str, before: tuple[Path, tuple[int, int]] | None) -> None:
    """Remove the weights of the save that was replaced, and what interrupted saves left long ago."""
    if before is not None and before[0].name != kept and _state(before[0]) == before[1]:
        before[0].unlink(missing_ok=True)
    ours = re.compile(rf"{kind}-[0-9a-f]{{16}}\.safetensors|\.{kind}[-.].*\.[0-9]+-[0-9a-f]{{8}}\.part")
    for stray in folder.iterdir():
        known = stray.name != kept and ours.fullmatch(stray.name) is not None
        if known and time.time() - stray.stat().st_mtime > _STRAY:
            stray.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
