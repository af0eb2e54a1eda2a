"""Features and soft targets for fitting exit heads: patches before every exit, and the outputs to be foretold.

A frozen network gives them batch by batch. They are kept, in memory or on disk, or computed anew at every step.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from tokenexit import TokenExitError
from tokenexit.area import Area
from tokenexit.errors import require
from tokenexit.folders import require_metadata
from tokenexit_torch._files import digest, fingerprint, read, write
from tokenexit_torch._modules import evaluating
from tokenexit_torch.exits.base import WithExits
from tokenexit_torch.heads.reading import radius_of

__all__ = [
    "FINAL",
    "TARGET",
    "Batch",
    "Cached",
    "Material",
    "Rows",
    "Seen",
    "Source",
    "Teacher",
    "gathered",
    "in_batches",
    "require_plain",
]

Batch = Tensor | Sequence[Tensor]
Progress = Callable[[Iterable], Iterable]
Seen = Callable[[Tensor], tuple[dict[int, Tensor], Tensor, Area | None, tuple[int, int]]]
"""From images: patches by exit, class scores `(images, patches, classes)`, the area that they cover, and the grid."""

Rows = dict[str, Tensor]
"""One row for each patch: what an exit head reads, by the block before it as text; `TARGET` and `FINAL`."""

TARGET = "target"  # the probabilities that the heads are to give
FINAL = "final"  # the class that the final head, or the decoder, predicts
_PATCHES = "patches"  # on disk: how many rows are of each image


class Teacher:
    """What a frozen network says of batches.

    Args:
        model: The network; of its exit heads it matters only whether, and how far, they look around tokens.
        seen: What it says of images.
        label_weight: What labels weigh in the target of a patch all of whose pixels have one.
        ignore: Label of pixels that do not count.
    """

    def __init__(self, model: WithExits, seen: Seen, *, label_weight: float, ignore: int) -> None:
        self._model, self._seen = model, seen
        self._label_weight, self._ignore = label_weight, ignore

    @cached_property
    def marks(self) -> dict[str, str]:
        """What its rows depend on beside the images, by name."""
        weights = self._model.state_dict().items()
        frozen = [value for name, value in weights if not name.startswith("exit_heads.")]
        labels = {"label_weight": str(self._label_weight), "ignore": str(self._ignore)}
        read = [f"{after}: {radius_of(head)}" for after, head in self._model.exit_heads.items()]
        return {"model": fingerprint(frozen), "exits": ", ".join(read)} | labels

    @torch.no_grad()
    def rows(self, batch: Batch) -> tuple[Rows, list[int]]:
        """Rows of a batch, and how many there are of each image: patches with a NaN or an infinity are left out."""
        images, label = _parted(batch)
        with evaluating(self._model):
            exits, scores, area, grid = self._seen(images)
        scores = scores.float()
        target = scores.softmax(dim=-1)
        if label is not None:
            known = {"classes": target.shape[-1], "ignore": self._ignore}
            share = label_share(label.to(target.device), grid, area, **known)
            target = target + self._label_weight * (share - share.sum(dim=-1, keepdim=True) * target)
        finite = torch.stack([part.isfinite().all(dim=-1) for part in (scores, *exits.values())]).all(dim=0)
        every = {str(after): patches for after, patches in exits.items()}
        every |= {TARGET: target, FINAL: scores.argmax(dim=-1).int()}
        return {name: value[finite] for name, value in every.items()}, finite.sum(dim=1).tolist()


def label_share(
    label: Integer[Tensor, "images height width"],
    grid: tuple[int, int],
    area: Area | None = None,
    /,
    *,
    classes: int,
    ignore: int,
) -> Float[Tensor, "images patches classes"]:
    """Which share of its pixels each patch has of each class; they sum to the share of the pixels with a label.

    A pixel belongs to the one patch that its upper left corner is in, whatever the size of the label map. Pixels that
    no patch covers do not count, nor do those by which an image was padded.
    """
    images, height, width = label.shape
    known = label != ignore
    fits = bool(((label >= 0) & (label < classes) | ~known).all())
    rule = f"have labels from 0 to {classes - 1}, or {ignore} to be ignored"
    require(fits, "images", rule, f"{int(label.min())} to {int(label.max())}")
    (down, across), (below, beside) = ((1, 1), (1, 1)) if area is None else (area.image, area.covered)
    rows = torch.arange(height, device=label.device) * (grid[0] * down) // (height * below)
    columns = torch.arange(width, device=label.device) * (grid[1] * across) // (width * beside)
    if area is not None:
        rows, columns = rows[rows < grid[0]], columns[columns < grid[1]]
        label, known = (one[:, : len(rows), : len(columns)] for one in (label, known))
    patch = rows[:, None] * grid[1] + columns
    patches, pixels = grid[0] * grid[1], patch.flatten().bincount(minlength=grid[0] * grid[1])
    # One bin more than there are classes, for pixels without a label.
    image = torch.arange(images, device=label.device)[:, None, None]
    bins = (image * patches + patch) * (classes + 1) + torch.where(known, label, classes)
    counts = bins.flatten().bincount(minlength=images * patches * (classes + 1))
    return counts.view(images, patches, classes + 1)[..., :classes] / pixels.clamp(min=1)[:, None]


class Source(Protocol):
    """Rows of the images that heads are fitted to."""

    def draws(self, size: int, generator: torch.Generator, since: int, /) -> Iterator[Rows]:
        """Rows for one step after the other, without end; the first are for step `since`."""
        ...

    def chunks(self) -> Iterator[Rows]:
        """All rows, in pieces."""
        ...


class Cached:
    """Rows that are kept, in one part or several.

    Args:
        parts: The rows.
    """

    def __init__(self, parts: Sequence[Rows]) -> None:
        self._parts = [part for part in parts if len(part[TARGET])]
        require(len(self._parts) > 0, "images", "give finite tokens", "NaN or infinity for every patch")
        self._ends = torch.tensor([len(part[TARGET]) for part in self._parts]).cumsum(dim=0)

    def draws(self, size: int, generator: torch.Generator, _since: int, /) -> Iterator[Rows]:
        """Rows drawn from all of them."""
        while True:
            yield self._at(_drawn(int(self._ends[-1]), size, generator))

    def chunks(self) -> Iterator[Rows]:
        """All rows, in pieces."""
        for part in self._parts:
            for piece in zip(*(value.split(65536) for value in part.values()), strict=True):
                yield dict(zip(part, piece, strict=True))

    def _at(self, index: Tensor) -> Rows:
        """The rows of these numbers, in their order; each part is asked once."""
        if len(self._parts) == 1:
            return _rows_at(self._parts[0], index)
        index, order = index.cpu().sort()
        zero = self._ends.new_zeros(1)
        sizes = torch.searchsorted(index, self._ends).diff(prepend=zero).tolist()
        starts = torch.cat([zero, self._ends])[:-1].tolist()
        asked = zip(self._parts, starts, index.split(sizes), strict=True)
        found = _joined([_rows_at(part, some - start) for part, start, some in asked if len(some)])
        return _rows_at(found, order.argsort())


class Streamed:
    """Rows that are computed anew, batch after batch, whenever they are read.

    Args:
        images: Batches, the same ones every time.
        teacher: Says the rows.
        prints: The fingerprint of every batch.
        sizes: How many images each of them holds.
        fitted: How many images, from the first on, the heads are fitted to.
    """

    def __init__(
        self, images: Iterable[Batch], teacher: Teacher, prints: list[str], sizes: list[int], fitted: int
    ) -> None:
        self._images, self._teacher, self._prints, self._sizes = images, teacher, prints, sizes
        self._fitted = range(fitted)

    def draws(self, size: int, generator: torch.Generator, since: int, /) -> Iterator[Rows]:
        """Rows drawn from one batch after the other; none from a batch without a finite patch."""
        batches = islice(self._batches(self._fitted), since % len(self._cuts(self._fitted)), None)
        while True:
            for batch in batches:
                rows, _ = self._teacher.rows(batch)
                patches = len(rows[TARGET])
                yield _rows_at(rows, _drawn(patches, size, generator)) if patches > 0 else rows
            batches = self._batches(self._fitted)

    def chunks(self) -> Iterator[Rows]:
        """All rows, in pieces."""
        return self._said(self._fitted)

    def others(self) -> list[Rows]:
        """Rows of the images that the heads are not fitted to."""
        return list(self._said(range(self._fitted.stop, sum(self._sizes))))

    def _said(self, wanted: range) -> Iterator[Rows]:
        return (self._teacher.rows(batch)[0] for batch in self._batches(wanted))

    def _cuts(self, wanted: range) -> dict[int, slice]:
        """Which part of which batch holds any of these images."""
        cuts, first = {}, 0
        for number, size in enumerate(self._sizes):
            start, stop = max(wanted.start - first, 0), min(wanted.stop - first, size)
            if start < stop:
                cuts[number] = slice(start, stop)
            first += size
        return cuts

    def _batches(self, wanted: range) -> Iterator[Batch]:
        cuts, batches = self._cuts(wanted), iter(self._images)
        for number in range(max(cuts, default=-1) + 1):
            batch = next(batches, None)
            if batch is None or _fingerprint(batch) != self._prints[number]:
                rule = "give the same batches in the same order every time, if nothing is cached"
                raise TokenExitError(f"`images` must {rule}, got another batch {number}")
            if number in cuts:
                images, label = _parted(batch)
                part = cuts[number]
                yield images[part] if label is None else (images[part], label[part])


class Material(NamedTuple):
    """What there is to fit heads to.

    Attributes:
        fitted: Rows of the images that the heads are fitted to.
        held_out: Rows of the others; None if there are none.
        images: How many images the heads are fitted to, and how many are held out.
        fingerprint: That of all images, and labels, in their batches.
        digests: Those of the images, held out or not: no certificate is to rest on these.
    """

    fitted: Source
    held_out: Cached | None
    images: tuple[int, int]
    fingerprint: str
    digests: frozenset[str]


def gathered(
    images: Tensor | Iterable[Batch],
    teacher: Teacher,
    /,
    *,
    cache: Literal["memory"] | Path | None,
    held_out: float,
    progress: Progress,
) -> Material:
    """Run a network over images, and keep what it says.

    Args:
        images: A tensor, or batches.
        teacher: The network.
        cache: Where to keep it; None for nowhere.
        held_out: Share of the images that are held out: the last ones.
        progress: Wraps the loop over batches.

    Returns:
        The rows.

    Raises:
        TokenExitError: If there are too few images, or none is finite; the folder holds what is of others; or nothing
            is kept, and images cannot be iterated twice.
    """
    batches: Iterable[Batch] = in_batches(images)
    again = cache is not None or not isinstance(batches, Iterator)
    require(again, "images", "be a tensor or what can be iterated again, if nothing is cached", type(images).__name__)
    prints, sizes, kept, digests = [], [], [], set[str]()
    for number, batch in enumerate(progress(batches)):
        prints.append(_fingerprint(batch))
        shown, _ = _parted(batch)
        sizes.append(len(shown))
        digests.update(map(digest, shown))
        if isinstance(cache, Path):
            kept.append(_on_disk(cache / f"{number:06}.safetensors", batch, prints[-1], teacher))
        elif cache is not None:
            kept.append(teacher.rows(batch))
    held = _held_out(sum(sizes), held_out)
    fitted = sum(sizes) - held
    if cache is None:
        source = Streamed(batches, teacher, prints, sizes, fitted)
        others = source.others() if held > 0 else []
    else:
        parts, others = _divided(kept, fitted)
        kept.clear()  # so that joining needs little more memory than the rows
        in_memory = not isinstance(cache, Path)
        source = Cached(_as_one(parts) if in_memory else parts)
    every = hashlib.sha256(" ".join(prints).encode()).hexdigest()
    return Material(source, Cached(others) if held > 0 else None, (fitted, held), every, frozenset(digests))


def _held_out(images: int, share: float) -> int:
    """How many images are held out."""
    require(images > 0, "images", "hold at least one image", "none")
    held = max(round(share * images), 1) if share > 0 else 0
    require(held < images, "held_out", f"leave some of {images} images to be fitted to", share)
    return held


def _divided(given: Iterable[tuple[Rows, list[int]]], images: int) -> tuple[list[Rows], list[Rows]]:
    """Rows of the first images, and of the others."""
    first, others, seen = [], [], 0
    for rows, patches in given:
        cut = sum(patches[: max(images - seen, 0)])
        if cut > 0:
            first.append({name: value[:cut] for name, value in rows.items()})
        if cut < sum(patches):
            others.append({name: value[cut:] for name, value in rows.items()})
        seen += len(patches)
    return first, others


def _on_disk(file: Path, batch: Batch, images: str, teacher: Teacher) -> tuple[Rows, list[int]]:
    """Rows of a batch, and how many there are of each image, from a file that is written if it is not there."""
    marks = teacher.marks | {"images": images}
    if not file.exists():
        rows, patches = teacher.rows(batch)
        write(file, rows | {_PATCHES: torch.tensor(patches)}, marks, argument="cache")
    rows, found = read(file, "cache")
    require_metadata("cache", file, marks, found)
    patches = rows.pop(_PATCHES, torch.empty(0)).tolist()
    known = TARGET in rows and FINAL in rows and {len(value) for value in rows.values()} == {sum(patches)}
    require(known, "cache", f"hold rows in {file.name} for every patch", ", ".join(sorted(rows)))
    return rows, patches


def _parted(batch: Batch) -> tuple[Tensor, Tensor | None]:
    """Images and labels of a batch."""
    if isinstance(batch, Tensor):
        return require_plain(batch), None
    pair = isinstance(batch, tuple | list) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch)
    require(pair, "images", "come in batches that are a tensor, or a pair of images and labels", type(batch).__name__)
    images, label = batch
    whole = not (label.is_floating_point() or label.dtype == torch.bool)
    fits = whole and label.ndim == 3 and len(label) == len(images)
    rule = f"come with labels that are whole numbers of shape ({len(images)}, height, width)"
    require(fits, "images", rule, f"{label.dtype} of shape {tuple(label.shape)}")
    return require_plain(images), label.long()


def in_batches(images: Any) -> Iterable[Any]:
    """Images as batches: those that there are, or the parts of one tensor."""
    if isinstance(images, Tensor):
        return require_plain(images).split(8)
    iterable = isinstance(images, Iterable)
    require(iterable, "images", "be a tensor of images, or batches of them", type(images).__name__)
    return images


def require_plain(images: Tensor) -> Tensor:
    """Images, after a check that they hold numbers, one for each pixel and channel."""
    plain = images.layout == torch.strided and not images.is_meta
    require(plain, "images", "be dense tensors with numbers in them", f"{images.layout} on {images.device}")
    require(images.ndim == 4, "images", "be of shape (images, channels, height, width)", images)
    return images


def _fingerprint(batch: Batch) -> str:
    return fingerprint(part for part in _parted(batch) if part is not None)


def _drawn(rows: int, size: int, generator: torch.Generator) -> Tensor:
    return torch.randint(rows, (size,), generator=generator, device=generator.device)


def _rows_at(rows: Rows, index: Tensor) -> Rows:
    index = index.to(rows[TARGET].device)
    return {name: value[index] for name, value in rows.items()}


def _joined(parts: list[Rows]) -> Rows:
    """Rows of several parts, which are empty afterwards."""
    return {name: torch.cat([part.pop(name) for part in parts]) for name in list(parts[0])}


def _as_one(parts: list[Rows]) -> list[Rows]:
    return [_joined(parts)] if parts else []
