"""CamVid (SegNet version: 11 classes and void, 360 x 480 pixels): reading, evaluation crop, training augmentation.

Everything random comes from a generator seeded by (seed, epoch, frame), so a resumed run sees the same data.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from PIL import Image, ImageEnhance
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from examples.shell import UsageError

CLASSES = (
    "Sky", "Building", "Pole", "Road", "Pavement", "Tree", "SignSymbol", "Fence", "Car", "Pedestrian", "Bicyclist",
)  # fmt: skip
PALETTE = (
    (128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222), (128, 128, 0), (192, 128, 128),
    (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192),
)  # fmt: skip
IGNORE = 11
FRAME = (360, 480)
SIZE = (352, 480)
ROWS = slice(4, 356)  # 352 rows, a multiple of every usual patch size, cut from the middle of 360
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
SPLITS = ("train", "val", "test")

_SCALES = (0.6, 1.8)
_JITTER = 0.3
_FILL = tuple(round(255 * value) for value in MEAN)  # zero after normalisation


@dataclass(frozen=True)
class Frame:
    """One labelled video frame on disk."""

    image: Path
    label: Path

    @property
    def sequence(self) -> str:
        """The video that the frame comes from, such as `Seq05VD`."""
        return self.image.stem.split("_")[0]


def frames(folder: Path, split: str, limit: int | None = None) -> tuple[Frame, ...]:
    """The frames of a split, in the order of its list.

    The lists name the original `.png` images; `.jpg` images of the same stem are found as well.

    Args:
        folder: Holds `train.txt`, `train/`, `trainannot/` and the same for `val` and `test`.
        split: One of `SPLITS`.
        limit: Keep this many frames, spread evenly over the split; all by default.

    Raises:
        UsageError: If the split is unknown, or a folder, list or file is missing.
    """
    if split not in SPLITS:
        raise UsageError(f"`split` must be one of {SPLITS}, got {split!r}")
    if limit is not None and limit < 1:
        raise UsageError(f"`--limit` must be at least 1, got {limit}")
    for path in (folder / f"{split}.txt", folder / split, folder / f"{split}annot"):
        if not path.exists():
            raise UsageError(
                f"`--data` must be a CamVid folder with {split}.txt, {split}/ and {split}annot/; "
                f"{str(path)!r} is missing{_found(folder)}"
            )
    stems = [Path(line.split()[0]).stem for line in (folder / f"{split}.txt").read_text().splitlines() if line.strip()]
    if not stems:
        raise UsageError(f"`--data`: {str(folder / f'{split}.txt')!r} must list one frame a line, got an empty file")
    kept = np.linspace(0, len(stems) - 1, len(stems) if limit is None else min(limit, len(stems)), dtype=int)
    return tuple(_frame(folder, split, stems[i]) for i in kept)


def _frame(folder: Path, split: str, stem: str) -> Frame:
    images = [folder / split / f"{stem}{suffix}" for suffix in (".jpg", ".png")]
    label = folder / f"{split}annot" / f"{stem}.png"
    image = next((path for path in images if path.is_file()), None)
    if image is None:
        raise UsageError(f"`--data`: {split}.txt lists {stem!r}, but {split}/ holds neither {stem}.jpg nor {stem}.png")
    if not label.is_file():
        raise UsageError(f"`--data`: {split}.txt lists {stem!r}, but {split}annot/ holds no {stem}.png")
    return Frame(image, label)


def _found(folder: Path) -> str:
    if not folder.is_dir():
        return f" (there is no folder {str(folder)!r})"
    names = sorted(path.name for path in folder.iterdir())
    return f" (the folder holds {', '.join(names[:8]) or 'nothing'}{', ...' if len(names) > 8 else ''})"


def read(frame: Frame) -> tuple[Image.Image, Image.Image]:
    """Read a frame's image (RGB) and label (one byte a pixel, classes 0 to 10 and `IGNORE`), 360 x 480 pixels.

    Raises:
        UsageError: If a file has another size, or the label another mode or other values.
    """
    image, label = Image.open(frame.image).convert("RGB"), Image.open(frame.label)
    for path, picture in ((frame.image, image), (frame.label, label)):
        if picture.size != (FRAME[1], FRAME[0]):
            raise UsageError(f"`--data`: {str(path)!r} must be 480 x 360 pixels, got {picture.size}")
    if label.mode not in ("P", "L"):
        raise UsageError(f"`--data`: {str(frame.label)!r} must be 8-bit grey or palette, got mode {label.mode!r}")
    indices = np.asarray(label)
    if indices.max() > IGNORE:
        raise UsageError(f"`--data`: {str(frame.label)!r} must hold classes 0 to {IGNORE}, got {indices.max()}")
    return image, Image.fromarray(indices)


def normalised(image: UInt8[np.ndarray, "height width 3"]) -> Float[Tensor, "3 height width"]:
    """Turn colours from 0 to 255 into channels with ImageNet's mean and deviation."""
    scaled = (image.astype(np.float32) / 255 - np.asarray(MEAN, np.float32)) / np.asarray(STD, np.float32)
    return torch.from_numpy(np.ascontiguousarray(scaled.transpose(2, 0, 1)))


def evaluation_pair(frame: Frame) -> tuple[Float[Tensor, "3 352 480"], Int64[Tensor, "352 480"]]:
    """The middle 352 rows of a frame and of its label."""
    image, label = read(frame)
    return normalised(np.asarray(image)[ROWS]), torch.from_numpy(np.asarray(label)[ROWS].astype(np.int64))


def training_pair(
    frame: Frame, generator: np.random.Generator
) -> tuple[Float[Tensor, "3 352 480"], Int64[Tensor, "352 480"]]:
    """A frame at a random scale, place, side and colour; what the frame does not cover is ignored.

    Args:
        frame: What to read.
        generator: The only source of randomness.
    """
    image, label = read(frame)
    scale = generator.uniform(*_SCALES)
    height, width = (round(side * scale) for side in FRAME)
    image = _jittered(image, generator).resize((width, height), Image.Resampling.BILINEAR)
    label = label.resize((width, height), Image.Resampling.NEAREST)
    top, left = (_offset(generator, have, want) for have, want in zip((height, width), SIZE, strict=True))
    colours, classes = _window(image, (left, top), _FILL), _window(label, (left, top), IGNORE)
    if generator.random() < 0.5:
        colours, classes = colours[:, ::-1], classes[:, ::-1]
    return normalised(colours), torch.from_numpy(classes.astype(np.int64))


def _jittered(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = enhance(image).enhance(generator.uniform(1 - _JITTER, 1 + _JITTER))
    return image


def _offset(generator: np.random.Generator, have: int, want: int) -> int:
    """Where a window of `want` pixels starts on a side of `have`; negative where the window is the larger."""
    low, high = sorted((0, have - want))
    return int(generator.integers(low, high + 1))


def _window(
    picture: Image.Image, corner: tuple[int, int], fill: int | tuple[int, ...]
) -> UInt8[np.ndarray, "352 480 *channels"]:
    canvas = Image.new(picture.mode, (SIZE[1], SIZE[0]), fill)
    canvas.paste(picture, (-corner[0], -corner[1]))
    return np.asarray(canvas)


@dataclass(frozen=True)
class _Augmented(Dataset):
    frames: Sequence[Frame]
    seed: int
    epoch: int

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return training_pair(self.frames[index], np.random.default_rng((self.seed, self.epoch, index)))


def training_batches(
    chosen: Sequence[Frame], *, batch: int, seed: int, epoch: int, workers: int = 0
) -> DataLoader[tuple[Tensor, Tensor]]:
    """An epoch of augmented (images, labels) batches in an order of its own; the same for the same seed and epoch."""
    order = np.random.default_rng((seed, epoch)).permutation(len(chosen)).tolist()
    return DataLoader(
        _Augmented(chosen, seed, epoch),
        batch_size=batch,
        sampler=order,
        num_workers=workers,
        generator=torch.Generator().manual_seed(seed),  # else the loader draws from, and moves, the global one
    )


@dataclass(frozen=True)
class Batches:
    """Evaluation batches (images, labels), in order; may be iterated any number of times."""

    frames: Sequence[Frame]
    batch: int

    def __len__(self) -> int:
        return -(-len(self.frames) // self.batch)

    def __iter__(self) -> Iterator[tuple[Float[Tensor, "batch 3 352 480"], Int64[Tensor, "batch 352 480"]]]:
        for start in range(0, len(self.frames), self.batch):
            pairs = [evaluation_pair(frame) for frame in self.frames[start : start + self.batch]]
            images, labels = zip(*pairs, strict=True)
            yield torch.stack(images), torch.stack(labels)


@dataclass(frozen=True)
class Images:
    """The images of evaluation batches without their labels; may be iterated any number of times."""

    batches: Batches
    device: torch.device

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Float[Tensor, "batch 3 352 480"]]:
        return (images.to(self.device) for images, _ in self.batches)
