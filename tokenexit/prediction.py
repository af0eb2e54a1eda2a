"""A predictor that can be sent to other processes: from batches of pictures to batches of labels, all of NumPy.

What travels is a recipe. Every process builds the model for itself, the first time it needs it. An adapter supplies, by
a subclass with five methods, how its framework takes a model up and shows pictures to it; the checks, the building, the
groups and the columns are here.

It needs NumPy, as no other module of the core does, so it is imported by its own name, and not by `import tokenexit`.
"""

import io
import pickle
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from typing import Any, ClassVar, Generic, Literal, NamedTuple, Protocol, TypeVar, get_args, runtime_checkable

import numpy as np
from jaxtyping import Float, Int

from tokenexit._array import Array, array_namespace, in_numpy
from tokenexit._plain import is_whole
from tokenexit.area import Area
from tokenexit.errors import TokenExitError, require
from tokenexit.guarantees.certificate import Certificate, Fingerprints, require_matches
from tokenexit.schedule import Schedule
from tokenexit.windows import Windows

__all__ = ["Column", "Predictor", "Segmented", "Segmenter"]

Column = Literal["label", "exit_depth", "tokens", "scores"]
"""What there is to be had of each picture.

| name | what | shape |
|---|---|---|
| `label` | the class of every pixel, in the smallest unsigned type that holds all classes | `(height, width)` |
| `exit_depth` | after how many blocks every patch left, in each window if there are windows | `([windows,] grid)` |
| `tokens` | how many tokens ran through each block, in all windows together | `(blocks,)` |
| `scores` | class scores of every pixel, float32 | `(classes, height, width)` |
"""

_COLUMNS: tuple[Column, ...] = get_args(Column)
_IMAGES = "image"


@runtime_checkable
class Segmenter(Protocol):
    """What is asked of a model of any framework."""

    @property
    def classes(self) -> int:
        """Class count."""
        ...

    @property
    def schedule(self) -> Schedule:
        """The plan in use."""
        ...


Model = TypeVar("Model", bound=Segmenter)
_T = TypeVar("_T")


class Segmented(NamedTuple):
    """Output of a model for pictures of one size, in arrays of its framework.

    Attributes:
        scores: Class scores, of patches or of pixels.
        exit_depth: After how many blocks every patch left, in each window if there are windows.
        tokens: How many tokens ran through each block, in all windows together.
        area: The area of the pictures that the scores cover; None if it is the whole of them.
    """

    scores: Float[Array, "pictures ..."]
    exit_depth: Int[Array, "pictures ..."]
    tokens: Int[Array, "pictures blocks"]
    area: Area | None


class _Once(Generic[_T]):
    """What a process builds at the first call, also where several threads call at once; it pickles to a new one."""

    def __init__(self) -> None:
        self._built: list[_T] = []
        self._lock = threading.Lock()

    def __call__(self, build: Callable[[], _T]) -> _T:
        with self._lock:
            if not self._built:
                self._built.append(build())
            return self._built[0]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


@dataclass(frozen=True, eq=False)
class Predictor(ABC, Generic[Model]):
    """Segments batches of pictures, in whichever process it is called.

    It is made of plain data and pickles to it: weights never travel. The model is built at the first call, once for
    each process, also where several threads call at once; then it is in evaluation mode, and runs without gradients.

    Attributes:
        weights: Of an adapter: the classes that hold weights, each with what to call one in an error, as "a tensor".
        build: Builds the wrapped model: a function that other processes can import by its name, or `functools.partial`
            of one, on plain data such as the folder of a saved model.
        mean: Mean colour, by channel, on a scale from 0 to 1: that which the network was trained with.
        std: Standard deviation of colours, by channel.
        size: Height and width in which pictures are shown to the model, in pixels: they are resized bilinearly,
            smoothed where they shrink. Their own size if left out.
        windows: Cuts pictures, after any resizing, into windows. Whole pictures if left out.
        outputs: What is returned for each image: some of the names of `tokenexit.prediction.Column`.
        certificate: What `calibrate` has certified. The model that is built must be the one that it is for, and
            follow its schedule; pictures that are shown to it in another size than its resolution are refused.
            Whether they were prepared as its words say is not seen.

    Raises:
        TokenExitError: If `build` cannot be pickled, or only with weights, or another argument is not what it must be.
    """

    weights: ClassVar[Mapping[type, str]]

    build: Callable[[], Model]
    _: KW_ONLY
    mean: Sequence[float]
    std: Sequence[float]
    size: tuple[int, int] | None = None
    windows: Windows | None = None
    outputs: Sequence[Column] = ("label", "exit_depth", "tokens")
    certificate: Certificate | None = None
    _once: _Once[Model] = field(default_factory=_Once, init=False, repr=False)

    def __post_init__(self) -> None:
        _require_recipe(self.build, self.weights)
        mean, std = tuple(map(float, self.mean)), tuple(map(float, self.std))
        alike = len(mean) == len(std) > 0 and min(std) > 0
        require(alike, "std", f"be {len(mean)} positive numbers, as `mean` has", repr(self.std))
        sides = self.size is None or (len(self.size) == 2 and all(is_whole(side, least=1) for side in self.size))
        require(sides, "size", "be a height and a width from 1 up, in pixels", repr(self.size))
        plan = self.windows is None or isinstance(self.windows, Windows)
        require(plan, "windows", "be a Windows", repr(self.windows))
        names = self.outputs
        known = len(names) > 0 and len(set(names)) == len(names) and set(names) <= set(_COLUMNS)
        require(known, "outputs", f"be different names among {', '.join(_COLUMNS)}", repr(names))
        known = self.certificate is None or isinstance(self.certificate, Certificate)
        require(known, "certificate", "be a Certificate", type(self.certificate).__name__)
        whole = self.certificate is None or self.windows is None
        rule = "be left out beside a certificate, which holds for whole images"
        require(whole, "windows", rule, repr(self.windows))
        for name, value in (("mean", mean), ("std", std), ("outputs", tuple(names))):
            object.__setattr__(self, name, value)

    @abstractmethod
    def placed(self, built: Any, /) -> Model:
        """Take a model up.

        Args:
            built: What `build` returned.

        Returns:
            The model where it will run, in evaluation mode.

        Raises:
            TokenExitError: If it is no model that the adapter runs.
        """

    @abstractmethod
    def fingerprints(self, model: Model, /, *, resolution: tuple[int, int], preprocessing: str) -> Fingerprints:
        """Take the fingerprints of the model as it will run.

        Args:
            model: The model.
            resolution: Height and width of the images, in pixels.
            preprocessing: What is done to images before the model sees them, in words.
        """

    @abstractmethod
    def image_shape(self, model: Model, /) -> tuple[int, int, int]:
        """Channels, height and width of an image that the model takes.

        Args:
            model: The model.
        """

    @abstractmethod
    def segment(self, model: Model, pictures: np.ndarray, /) -> Segmented:
        """Run the model on pictures of one size, without gradients.

        Args:
            model: The model.
            pictures: uint8 `(pictures, height, width, channels)`, to be resized to `size` and normalised; or float32
                `(pictures, channels, height, width)`, to be taken as they are.
        """

    @abstractmethod
    def upsample(self, scores: Array, size: tuple[int, int], area: Area | None, /) -> Array:
        """Class scores of the pixels of a picture.

        Args:
            scores: Those that `segment` gave for one picture, in float32, with an axis of length 1 for the picture.
            size: Height and width of the picture, in pixels.
            area: The area of the picture that they cover; None if it is the whole of it.

        Returns:
            Scores `(1, classes, height, width)`.
        """

    def load(self) -> Model:
        """Build the model if this process has not done so yet.

        Returns:
            The model that all calls run.

        Raises:
            TokenExitError: If `build` returns something else than a model from `wrap`, one of a single class, whose
                labels would all be alike, or another one than that of the certificate.
        """
        return self._once(self._built)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Segment a batch of pictures.

        Args:
            batch: Pictures under `image`, as one array or as a list or array of arrays, which may differ in size.
                uint8 `(height, width, channels)` is normalised here, and resized if `size` says so; float32
                `(channels, height, width)` is taken as prepared for the model. What else is in the batch is handed on.

        Returns:
            The outputs for each picture, in their order, at their own resolution, beside what was handed on. One array
            where the pictures have one size; else an array of arrays.

        Raises:
            TokenExitError: If the batch holds no such pictures, or something under a name of `outputs`, or the model
                does not take them.
        """
        require(isinstance(batch, Mapping), "batch", "be a mapping", type(batch).__name__)
        require(_IMAGES in batch, "batch", f"hold pictures under `{_IMAGES}`", f"{sorted(map(str, batch))}")
        taken = [name for name in self.outputs if name in batch]
        require(not taken, "batch", f"leave the names of `outputs` free, {', '.join(self.outputs)}", f"{taken}")
        others = {name: value for name, value in batch.items() if name != _IMAGES}
        images = batch[_IMAGES]
        several = isinstance(images, list | tuple) or (isinstance(images, np.ndarray) and images.ndim > 0)
        require(several, _IMAGES, "be an array or a list of arrays", type(images).__name__)
        if len(images) > 0:
            return others | self._columns(list(images))
        # No picture has no shapes; the outputs for one have them.
        return others | {name: value[:0] for name, value in self._columns([self._blank(images)]).items()}

    def _built(self) -> Model:
        model = self.placed(self.build())
        labelled = model.classes >= 2 or "label" not in self.outputs
        require(labelled, "outputs", "leave out `label` for a model of one class", repr(self.outputs))
        if self.certificate is not None:
            claims = self.certificate.fingerprints
            prints = self.fingerprints(model, resolution=claims.resolution, preprocessing=claims.preprocessing)
            require_matches(self.certificate, prints)
            rule = "return a model with the schedule of the certificate, as `load_certificate` gives it"
            require(model.schedule == self.certificate.schedule, "build", rule, repr(model.schedule))
        return model

    def _blank(self, images: Any) -> np.ndarray:
        """A picture of the size of those in an empty batch, or of one that the model takes."""
        if isinstance(images, np.ndarray) and images.ndim == 4:
            return np.zeros(images.shape[1:], images.dtype)
        channels, *size = self.image_shape(self.load())
        height, width = size if self.windows is None else self.windows.size
        return np.zeros((height, width, channels), np.uint8)

    def _columns(self, images: Sequence[Any]) -> dict[str, np.ndarray]:
        rows: list[dict[str, np.ndarray]] = [{}] * len(images)
        groups = _alike(images, channels=len(self.mean))
        model = self.load()
        for numbers in groups:
            some = np.stack([images[one] for one in numbers])
            for number, row in zip(numbers, self._rows(model, some), strict=True):
                rows[number] = row
        return {name: _column([row[name] for row in rows]) for name in self.outputs}

    def _rows(self, model: Model, images: np.ndarray) -> list[dict[str, np.ndarray]]:
        """The outputs for pictures of one size, one by one: scores of pixels need more memory than all else."""
        raw = images.dtype == np.uint8
        height, width = images.shape[1:3] if raw else images.shape[2:]
        if self.certificate is not None:
            wanted = self.certificate.fingerprints.resolution
            shown = tuple(self.size) if raw and self.size is not None else (height, width)
            require(shown == wanted, "size", f"be that of the certificate, {wanted}", f"pictures shown in {shown}")
        found = self.segment(model, images)
        return [self._row(found, at, (height, width)) for at in range(len(images))]

    def _row(self, found: Segmented, at: int, size: tuple[int, int]) -> dict[str, np.ndarray]:
        tables = {"exit_depth": found.exit_depth, "tokens": found.tokens}
        row = {name: in_numpy(table[at, ...]) for name, table in tables.items() if name in self.outputs}
        if "label" in self.outputs or "scores" in self.outputs:
            xp = array_namespace(found.scores)
            scores = xp.astype(found.scores[at : at + 1, ...], xp.float32, copy=False)
            pixels = self.upsample(scores, size, found.area)[0, ...]
            if "label" in self.outputs:
                label = in_numpy(xp.argmax(pixels, axis=0))
                row["label"] = label.astype(np.min_scalar_type(pixels.shape[0] - 1))
            if "scores" in self.outputs:
                row["scores"] = in_numpy(pixels)
        return row


class _Recipes(pickle.Pickler):
    """Pickles what has no weights in it."""

    def __init__(self, weights: Mapping[type, str]) -> None:
        super().__init__(io.BytesIO())
        self.weights = weights

    def persistent_id(self, obj: Any) -> None:
        kind = next((name for cls, name in self.weights.items() if isinstance(obj, cls)), None)
        require(kind is None, "build", "be made of plain data, for weights do not travel", str(kind))


def _require_recipe(build: object, weights: Mapping[type, str]) -> None:
    rule = "be a function that other processes can import by its name, or functools.partial of one"
    require(callable(build), "build", rule, repr(build))
    try:
        _Recipes(weights).dump(build)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise TokenExitError(f"`build` must {rule}, got {_name(build)}: {error}") from error


def _name(build: object) -> str:
    while isinstance(build, partial):
        build = build.func
    return getattr(build, "__qualname__", repr(build))


def _alike(images: Sequence[Any], *, channels: int) -> list[list[int]]:
    """The numbers of pictures, those of one size and type together."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for number, image in enumerate(images):
        array = isinstance(image, np.ndarray)
        dtype, shape = (image.dtype, image.shape) if array else (None, ())
        axis = {np.dtype(np.uint8): -1, np.dtype(np.float32): 0}.get(dtype)
        fits = len(shape) == 3 and axis is not None and shape[axis] == channels
        rule = f"be an array of uint8 (height, width, {channels}) or float32 ({channels}, height, width)"
        require(fits, f"{_IMAGES}[{number}]", rule, f"{dtype} {shape}" if array else type(image).__name__)
        require(0 not in shape, f"{_IMAGES}[{number}]", "have pixels", f"shape {shape}")
        groups.setdefault((dtype, shape), []).append(number)
    return list(groups.values())


def _column(values: Sequence[np.ndarray]) -> np.ndarray:
    if len({value.shape for value in values}) == 1:
        return np.stack(values)
    column = np.empty(len(values), dtype=object)
    for number, value in enumerate(values):
        column[number] = value
    return column
