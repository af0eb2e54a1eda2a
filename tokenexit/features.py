"""Features and soft targets for fitting exit heads: one row for each patch, kept, on disk, or computed at every step.

A frozen network gives the rows batch by batch. Images of a batch come in order, so that the last ones can be held out
wherever a batch is cut.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from jaxtyping import Int, Integer

from tokenexit._array import Array, array_namespace, counting, device, plain, searchsorted, take
from tokenexit._plain import Progress
from tokenexit.area import Area
from tokenexit.errors import TokenExitError, require
from tokenexit.folders import Store, require_metadata

__all__ = [
    "FINAL",
    "LAST",
    "TARGET",
    "Batches",
    "Cached",
    "Draw",
    "FitData",
    "Rows",
    "Source",
    "Streamed",
    "Teacher",
    "gathered",
    "pixel_patches",
]

Rows = dict[str, Array]
"""One row for each patch: what an exit head reads, by the block before it as text; `TARGET` and `FINAL`; and `LAST`, if
translators are fitted."""

Draw = Callable[[int, int], Int[Array, "drawn"]]
"""From a number of rows and how many to draw: places of rows, with replacement."""

TARGET = "target"
"""Key of the probabilities that the heads are fitted to, `(rows, classes)`."""

FINAL = "final"
"""Key of the class that the final head, or the decoder, predicts, `(rows,)`."""

LAST = "last"
"""Key of the tokens as the last block leaves them, that translators are fitted to, `(rows, dim)`."""

_PATCHES = "patches"  # on disk: how many rows are of each image
_PIECE = 65536  # rows that heads read at once where all rows are gone through


@runtime_checkable
class Teacher(Protocol):
    """A frozen network that gives rows of batches; an adapter supplies it."""

    @property
    def marks(self) -> Mapping[str, str]:
        """What the rows depend on beside the images, by name."""
        ...

    def digests(self, batch: Any, /) -> tuple[str, ...]:
        """The digest of each image (`tokenexit.guarantees.certificate.digest`).

        Args:
            batch: Images, with labels or without.

        Raises:
            TokenExitError: If it is no batch.
        """
        ...

    def fingerprint(self, batch: Any, /) -> str:
        """The fingerprint of a batch, labels included.

        Args:
            batch: Images, with labels or without.
        """
        ...

    def rows(self, batch: Any, /) -> tuple[Rows, list[int]]:
        """Rows of a batch, and how many there are of each image: patches with a NaN or an infinity are left out.

        Args:
            batch: Images, with labels or without.
        """
        ...

    def part(self, batch: Any, images: slice, /) -> Any:
        """Some images of a batch, with their labels.

        Args:
            batch: Images, with labels or without.
            images: Which.
        """
        ...


@runtime_checkable
class Source(Protocol):
    """Rows of the images that heads are fitted to."""

    def draws(self, size: int, draw: Draw, since: int, /) -> Iterator[Rows]:
        """Rows for one step after the other, without end.

        Args:
            size: How many rows a step takes at most: never more than there are to draw from.
            draw: Draws them.
            since: The step that the first rows are for.
        """
        ...

    def chunks(self) -> Iterator[Rows]:
        """All rows, in pieces."""
        ...


class Cached:
    """Rows that are kept, in one part or several.

    Args:
        parts: The rows.

    Raises:
        TokenExitError: If there is none.
    """

    def __init__(self, parts: Sequence[Rows]) -> None:
        self._parts = [part for part in parts if _length(part)]
        require(len(self._parts) > 0, "images", "give finite tokens", "NaN or infinity for every patch")
        self._starts = [0, *accumulate(map(_length, self._parts))]

    def draws(self, size: int, draw: Draw, _since: int, /) -> Iterator[Rows]:
        """Rows drawn from all of them.

        Args:
            size: How many rows a step takes at most: never more than there are.
            draw: Draws them.
        """
        rows = self._starts[-1]
        while True:
            yield self._at(draw(rows, _at_most(size, rows)))

    def chunks(self) -> Iterator[Rows]:
        """All rows, in pieces."""
        for part in self._parts:
            rows = _length(part)
            for start in range(0, rows, _PIECE):
                stop = min(start + _PIECE, rows)
                yield {name: value[start:stop, ...] for name, value in part.items()}

    def _at(self, index: Int[Array, "drawn"]) -> Rows:
        """The rows at these places, in their order; each part is read once."""
        if len(self._parts) == 1:
            return _rows_at(self._parts[0], index)
        xp = array_namespace(index)
        order = xp.argsort(index)
        ordered = take(index, order)
        starts = xp.asarray(self._starts, dtype=index.dtype, device=device(index))
        cuts = [int(count) for count in plain(searchsorted(ordered, starts))]
        parts = zip(self._parts, self._starts, cuts, cuts[1:], strict=False)
        found = [_rows_at(part, ordered[low:high] - start) for part, start, low, high in parts if low < high]
        return _rows_at(_joined(found), xp.argsort(order))


class Streamed:
    """Rows that are computed anew, batch after batch, whenever they are read.

    Args:
        images: Batches, the same ones every time.
        teacher: The network.
        prints: The fingerprint of every batch.
        sizes: How many images each of them holds.
        fitted: How many images, from the first on, the heads are fitted to.
    """

    def __init__(
        self, images: Iterable[Any], teacher: Teacher, prints: Sequence[str], sizes: Sequence[int], fitted: int
    ) -> None:
        self._images, self._teacher, self._prints, self._sizes = images, teacher, prints, sizes
        self._fitted = range(fitted)

    def draws(self, size: int, draw: Draw, since: int, /) -> Iterator[Rows]:
        """Rows drawn from one batch after the other; none from a batch without a finite patch.

        Args:
            size: How many rows a step takes at most: never more than the batch has.
            draw: Draws them.
            since: The step that the first rows are for.
        """
        batches = islice(self._batches(self._fitted), since % len(self._cuts(self._fitted)), None)
        while True:
            for batch in batches:
                rows, _ = self._teacher.rows(batch)
                patches = _length(rows)
                yield _rows_at(rows, draw(patches, _at_most(size, patches))) if patches > 0 else rows
            batches = self._batches(self._fitted)

    def chunks(self) -> Iterator[Rows]:
        """All rows, in pieces."""
        return self._of(self._fitted)

    def others(self) -> list[Rows]:
        """Rows of the images that the heads are not fitted to."""
        return list(self._of(range(self._fitted.stop, sum(self._sizes))))

    def _of(self, wanted: range) -> Iterator[Rows]:
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

    def _batches(self, wanted: range) -> Iterator[Any]:
        cuts, batches = self._cuts(wanted), iter(self._images)
        for number in range(max(cuts, default=-1) + 1):
            batch = next(batches, None)
            if batch is None or self._teacher.fingerprint(batch) != self._prints[number]:
                rule = "give the same batches in the same order every time, if nothing is cached"
                raise TokenExitError(f"`images` must {rule}, got another batch {number}")
            if number in cuts:
                yield self._teacher.part(batch, cuts[number])


@dataclass(frozen=True, eq=False)
class Batches:
    """Images in small batches, in the order in which they come.

    Attributes:
        images: The batches that were given, the same ones every time.
        teacher: The network.
        sizes: How many images each of them holds.
        fitted: How many images, from the first on, heads are fitted to.
    """

    images: Iterable[Any]
    teacher: Teacher
    sizes: Sequence[int]
    fitted: int

    def steps(self, size: int, since: int, /) -> Iterator[Any]:
        """Batches of at most `size` images that heads are fitted to, one for each step, without end.

        Args:
            size: Images of a batch.
            since: The step that the first batch is for.
        """
        turn = sum(1 for _ in self._cuts(size, 0, self.fitted))
        found = islice(self._parts(size, 0, self.fitted), since % turn, None)
        while True:
            yield from found
            found = self._parts(size, 0, self.fitted)

    def fitted_to(self, size: int, /) -> Iterator[Any]:
        """Batches of at most `size` images that heads are fitted to, once.

        Args:
            size: Images of a batch.
        """
        return self._parts(size, 0, self.fitted)

    def held_out(self, size: int, /) -> Iterator[Any]:
        """Batches of at most `size` images that are held out.

        Args:
            size: Images of a batch.
        """
        return self._parts(size, self.fitted, sum(self.sizes))

    def _cuts(self, size: int, start: int, stop: int) -> Iterator[tuple[int, slice]]:
        """Which part of which batch comes next."""
        first = 0
        for number, count in enumerate(self.sizes):
            low, high = max(start - first, 0), min(stop - first, count)
            yield from ((number, slice(at, min(at + size, high))) for at in range(low, high, size))
            first += count

    def _parts(self, size: int, start: int, stop: int) -> Iterator[Any]:
        batches, at, batch = iter(self.images), -1, None
        for number, part in self._cuts(size, start, stop):
            while at < number:
                batch, at = next(batches, None), at + 1
            require(batch is not None, "images", "give the same batches every time", f"{at} of {len(self.sizes)}")
            yield self.teacher.part(batch, part)


@dataclass(frozen=True, eq=False)
class FitData:
    """Rows to fit heads to.

    Attributes:
        fitted: Rows of the images that the heads are fitted to.
        held_out: Rows of the others; None if there are none.
        images: How many images the heads are fitted to, and how many are held out.
        fingerprint: That of all images, and labels, in their batches.
        digests: Those of the images, held out or not: no certificate is to rest on these.
        batches: The images themselves, for steps through a decoder.
    """

    fitted: Source
    held_out: Cached | None
    images: tuple[int, int]
    fingerprint: str
    digests: frozenset[str]
    batches: Batches


def gathered(
    batches: Iterable[Any],
    teacher: Teacher,
    /,
    *,
    store: Store,
    cache: Literal["memory"] | Path | None,
    held_out: float,
    progress: Progress,
) -> FitData:
    """Run a network over images, and keep its rows.

    Args:
        batches: The images.
        teacher: The network.
        store: How arrays become files.
        cache: Where to keep the rows; None for nowhere.
        held_out: Share of the images that are held out: the last ones.
        progress: Wraps the loop over batches.

    Returns:
        The rows.

    Raises:
        TokenExitError: If there are too few images, or none is finite; the folder holds what is of others; or nothing
            is kept, and images cannot be iterated twice.
    """
    known = cache in ("memory", None) or isinstance(cache, Path)
    require(known, "cache", 'be "memory", a pathlib.Path or None', repr(cache))
    again = cache is not None or not isinstance(batches, Iterator)
    require(again, "images", "be a tensor or what can be iterated again, if nothing is cached", type(batches).__name__)
    marks = teacher.marks if isinstance(cache, Path) else {}
    prints, sizes, kept, digests = [], [], [], set[str]()
    for number, batch in enumerate(progress(batches)):
        images = teacher.digests(batch)
        sizes.append(len(images))
        digests.update(images)
        prints.append(teacher.fingerprint(batch))
        if isinstance(cache, Path):
            file = cache / f"{number:06}.safetensors"
            kept.append(_on_disk(file, batch, {**marks, "images": prints[-1]}, teacher, store))
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
        source = Cached(parts if isinstance(cache, Path) or not parts else [_joined(parts)])
    every = hashlib.sha256(" ".join(prints).encode()).hexdigest()
    kept_out = Cached(others) if held > 0 else None
    again = Batches(batches, teacher, sizes, fitted)
    return FitData(source, kept_out, (fitted, held), every, frozenset(digests), again)


def pixel_patches(
    labels: Integer[Array, "images height width"], grid: tuple[int, int], area: Area | None = None, /
) -> Int[Array, "rows columns"]:
    """Patch of each pixel of label maps, in row-major order of the grid.

    A pixel belongs to the one patch that its upper left corner is in, whatever the size of the maps.

    Args:
        labels: The label maps.
        grid: Height and width of the grid of patches.
        area: The area of the image that the grid covers; all of it if left out.

    Returns:
        Numbers from 0 up, for the pixels that patches cover: the first rows and columns of the maps.
    """
    covered, image = ((1, 1), (1, 1)) if area is None else (area.covered, area.image)
    rows, columns = (
        counting(min(side, -(-side * reach // whole)), labels) * (patches * whole) // (side * reach)
        for side, patches, reach, whole in zip(labels.shape[1:], grid, covered, image, strict=True)
    )
    return rows[:, None] * grid[1] + columns[None, :]


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
            first.append({name: value[:cut, ...] for name, value in rows.items()})
        if cut < sum(patches):
            others.append({name: value[cut:, ...] for name, value in rows.items()})
        seen += len(patches)
    return first, others


def _on_disk(
    file: Path, batch: Any, marks: Mapping[str, str], teacher: Teacher, store: Store
) -> tuple[Rows, list[int]]:
    """Rows of a batch, and how many there are of each image, from a file that is written if it is not there."""
    if not file.exists():
        rows, patches = teacher.rows(batch)
        xp = array_namespace(rows[TARGET])
        store.write(file, rows | {_PATCHES: xp.asarray(patches, dtype=xp.int64)}, marks, argument="cache")
    rows, found = store.read(file, "cache")
    require_metadata("cache", file, marks, found)
    counts = rows.pop(_PATCHES, None)
    patches = [] if counts is None else [int(counts[image]) for image in range(counts.shape[0])]
    known = TARGET in rows and FINAL in rows and {value.shape[0] for value in rows.values()} == {sum(patches)}
    require(known, "cache", f"hold rows in {file.name} for every patch", ", ".join(sorted(rows)))
    return rows, patches


def _at_most(size: int, rows: int) -> int:
    """How many of these rows a step draws: of one alone two, without which a batch norm has no variance."""
    return min(size, max(rows, 2))


def _length(rows: Rows) -> int:
    return rows[TARGET].shape[0]


def _rows_at(rows: Rows, index: Int[Array, "drawn"]) -> Rows:
    like = rows[TARGET]
    index = array_namespace(like).asarray(index, device=device(like))
    return {name: take(value, index) for name, value in rows.items()}


def _joined(parts: list[Rows]) -> Rows:
    """Rows of several parts, which are empty afterwards."""
    xp = array_namespace(parts[0][TARGET])
    return {name: xp.concat([part.pop(name) for part in parts]) for name in list(parts[0])}
