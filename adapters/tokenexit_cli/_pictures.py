"""Pictures of a folder: found, read, prepared for a network, and their labels."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Integer
from PIL import Image
from torch import Tensor
from torch.nn import functional

from tokenexit.errors import TokenExitError, require
from tokenexit_cli.network import Network

__all__ = ["UNREADABLE", "Pictures", "colours", "files_in", "labels", "prepared", "read", "words"]

UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)
"""What Pillow raises for a file that is missing, damaged, no picture, or far too large."""

_KINDS = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


def files_in(folder: Path, /, *, limit: int | None = None, without: Path | None = None) -> tuple[str, ...]:
    """Pictures of a folder and its subfolders, by their paths in it; hidden ones are left out.

    Args:
        folder: The folder.
        limit: How many to take at most, evenly among all.
        without: A folder that is left out, because results are written there.

    Returns:
        Paths in ascending order, with `/` on every system.

    Raises:
        TokenExitError: If it is no folder, or has no pictures.
    """
    require(folder.is_dir(), "--images", "be a folder of pictures", repr(str(folder)))
    apart = None if without is None else without.resolve()
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = [one for one in folders if not one.startswith(".") and (Path(place) / one).resolve() != apart]
        kept = [one for one in names if not one.startswith(".") and Path(one).suffix.lower() in _KINDS]
        found += [(Path(place) / one).relative_to(folder).as_posix() for one in kept]
    require(len(found) > 0, "--images", f"be a folder of pictures ({', '.join(_KINDS)})", repr(str(folder)))
    found.sort()
    few = len(found) if limit is None else min(limit, len(found))
    return tuple(found[place * len(found) // few] for place in range(few))


def read(file: Path, /) -> Image.Image:
    """A picture in RGB, as it is stored: marks that say to turn it are not followed.

    Args:
        file: The file.

    Raises:
        OSError: Or another of `UNREADABLE`, if it is no whole picture.
    """
    with Image.open(file) as opened:
        return opened.convert("RGB")


def colours(network: Network, picture: Image.Image, /) -> Float[Tensor, "3 height width"]:
    """A picture of the size in which it is shown to a network, colours from 0 to 1; as its `preprocess` gives it.

    Args:
        network: The network.
        picture: The picture.

    Raises:
        TokenExitError: If `preprocess` gives no such tensor.
    """
    if network.preprocess is not None:
        made = network.preprocess(picture)
        fits = isinstance(made, Tensor) and made.ndim == 3 and made.shape[0] == 3 and made.is_floating_point()
        got = f"{made.dtype} of shape {tuple(made.shape)}" if isinstance(made, Tensor) else type(made).__name__
        require(fits, "preprocess", "give a tensor of floats of shape (3, height, width)", got)
        return made.float()
    assert network.size is not None
    whole = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255
    # As `tokenexit_torch.Predictor` does, so that both say the same of a picture.
    return functional.interpolate(whole, tuple(network.size), mode="bilinear", align_corners=False, antialias=True)[0]


def prepared(network: Network, picture: Image.Image, /) -> Float[Tensor, "3 height width"]:
    """A picture as a network takes it.

    Args:
        network: The network.
        picture: The picture.

    Raises:
        TokenExitError: If `preprocess` gives no tensor of such a shape.
    """
    shown = colours(network, picture)
    if network.mean is None or network.std is None:
        return shown
    mean, std = (
        torch.tensor(list(values), dtype=torch.float32)[:, None, None] for values in (network.mean, network.std)
    )
    return (shown - mean) / std


def words(network: Network, /) -> str:
    """What is done to pictures, in words, by which certificates and runs are known again."""
    own: Any = network.preprocess
    if own is not None:
        name = getattr(own, "__qualname__", type(own).__qualname__)
        return f"RGB, then {getattr(own, '__module__', '?')}.{name}"
    height, width = network.size or (0, 0)
    mean, std = (", ".join(f"{value:g}" for value in values or ()) for values in (network.mean, network.std))
    return f"RGB, resized to {height} x {width} bilinearly and smoothed, 0 to 1, mean {mean}, deviation {std}"


@dataclass(frozen=True)
class Pictures:
    """Pictures of a folder in batches, as a network takes them; may be gone through again and again.

    Attributes:
        network: The network.
        folder: The folder.
        names: Paths in it.
        batch: How many come at once.
        device: Where to.
        dtype: As what.
    """

    network: Network
    folder: Path
    names: Sequence[str]
    batch: int
    device: torch.device
    dtype: torch.dtype

    def __len__(self) -> int:
        """Number of batches."""
        return -(-len(self.names) // self.batch)

    def __iter__(self) -> Iterator[Float[Tensor, "images 3 height width"]]:
        """The batches.

        Raises:
            TokenExitError: If a picture cannot be read, or differs in size from those beside it.
        """
        for start in range(0, len(self.names), self.batch):
            some = self.names[start : start + self.batch]
            images = [prepared(self.network, _required(self.folder / name, "--images")) for name in some]
            sizes = {tuple(image.shape[1:]) for image in images}
            require(len(sizes) == 1, "preprocess", "give tensors of one size for this command", sorted(sizes))
            yield torch.stack(images).to(self.device, self.dtype)


def labels(folder: Path, names: Sequence[str], size: tuple[int, int], /) -> Integer[Tensor, "images height width"]:
    """Labels of pictures: PNGs of class indices under the same paths, resized to the nearest pixel.

    Args:
        folder: The folder.
        names: Paths of the pictures in theirs.
        size: Height and width.

    Raises:
        TokenExitError: If a picture has none, or it holds colours instead of classes.
    """
    require(folder.is_dir(), "--labels", "be a folder of PNGs of class indices", repr(str(folder)))
    height, width = size
    found = []
    for name in names:
        file = folder / Path(name).with_suffix(".png")
        require(file.is_file(), "--labels", f"hold a PNG for each picture, as {file.name} for {name}", str(file))
        try:
            with Image.open(file) as opened:
                plain = opened.mode in ("L", "P", "I", "I;16")
                require(plain, "--labels", "hold PNGs of class indices, one channel", f"{file}, of mode {opened.mode}")
                found.append(np.array(opened.resize((width, height), Image.Resampling.NEAREST)).astype(np.int32))
        except UNREADABLE as error:
            raise _unreadable("--labels", file, error) from error
    return torch.from_numpy(np.stack(found))


def _required(file: Path, argument: str) -> Image.Image:
    try:
        return read(file)
    except UNREADABLE as error:
        raise _unreadable(argument, file, error) from error


def _unreadable(argument: str, file: Path, error: BaseException) -> TokenExitError:
    if isinstance(error, TokenExitError):
        return error
    return TokenExitError(f"`{argument}` must hold pictures that can be read, got {file}: {error}")
