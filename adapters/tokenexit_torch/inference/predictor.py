"""A predictor that can be sent to other processes: from batches of pictures to batches of labels, all of NumPy.

What travels is a recipe. Every process builds the model for itself, the first time it needs it.
"""

import io
import pickle
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from einops import rearrange, reduce
from torch import Tensor, nn
from torch.nn import functional

from tokenexit import TokenExitError
from tokenexit.adapting import is_whole
from tokenexit.area import Area
from tokenexit.errors import require
from tokenexit.guarantees.certificate import Certificate, require_matches
from tokenexit_torch.calibration.certificate import fingerprints
from tokenexit_torch.exits.model import ExitingModel
from tokenexit_torch.exits.outputs import upsampled
from tokenexit_torch.inference.windows import Windows, sliding

__all__ = ["Predictor"]

_Column = Literal["label", "exit_depth", "tokens", "scores"]
_COLUMNS: tuple[_Column, ...] = ("label", "exit_depth", "tokens", "scores")
_IMAGES = "image"


class Predictor:
    """Segments batches of pictures, in whichever process it is called.

    It is made of plain data and pickles to it: weights never travel. The model is built at the first call, once for
    each process, also where several threads call at once; then it is in evaluation mode, and runs without gradients.

    Its results for each image:

    | name | what | shape |
    |---|---|---|
    | `label` | the class of every pixel, in the smallest unsigned type that holds all classes | `(height, width)` |
    | `exit_depth` | after how many blocks every patch left, in each window if there are windows | `([windows,] grid)` |
    | `tokens` | how many tokens ran through each block, in all windows together | `(blocks,)` |
    | `scores` | class scores of every pixel, float32 | `(classes, height, width)` |

    Attributes:
        build: Builds the wrapped model.
        mean: Mean colour, by channel, on a scale from 0 to 1.
        std: Standard deviation of colours, by channel.
        size: Height and width in which pictures are shown to the model, in pixels; their own if None.
        windows: How pictures are cut into windows; None if they are not.
        device: Where the model runs.
        autocast: The type of `torch.autocast`; None for the model's own.
        outputs: What is returned for each image.
        certificate: What the model must be certified for; None if it need not be.
    """

    build: Callable[[], ExitingModel]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int] | None
    windows: Windows | None
    device: torch.device
    autocast: torch.dtype | None
    outputs: tuple[_Column, ...]
    certificate: Certificate | None

    def __init__(
        self,
        build: Callable[[], ExitingModel],
        /,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        size: tuple[int, int] | None = None,
        windows: Windows | None = None,
        device: str | torch.device = "cpu",
        autocast: torch.dtype | None = None,
        outputs: Sequence[_Column] = ("label", "exit_depth", "tokens"),
        certificate: Certificate | None = None,
    ) -> None:
        """What is needed to build and feed the model; nothing is built yet.

        Args:
            build: A function that other processes can import by its name, or `functools.partial` of one, on plain data
                such as the folder of a saved model.
            mean: Mean colour, by channel, on a scale from 0 to 1: that which the network was trained with.
            std: Standard deviation of colours, by channel.
            size: Height and width in which pictures are shown to the model, in pixels: they are resized bilinearly,
                smoothed where they shrink. Their own size if left out.
            windows: Cuts pictures, after any resizing, into windows. Whole pictures if left out.
            device: Where the model runs.
            autocast: Runs the model under `torch.autocast` to this type.
            outputs: What is returned for each image: some of the names above.
            certificate: What `calibrate` has certified. The model that is built must be the one that it is for, and
                follow its schedule; pictures that are shown to it in another size than its resolution are refused.
                Whether they were prepared as its words say is not seen.

        Raises:
            TokenExitError: If `build` cannot be pickled, or only with weights, or another argument is not what it must
                be.
        """
        _require_recipe(build)
        self.build = build
        self.mean, self.std = tuple(map(float, mean)), tuple(map(float, std))
        alike = len(self.mean) == len(self.std) > 0 and min(self.std) > 0
        require(alike, "std", f"be {len(self.mean)} positive numbers, as `mean` has", repr(std))
        sides = size is None or (len(size) == 2 and all(is_whole(side, least=1) for side in size))
        require(sides, "size", "be a height and a width from 1 up, in pixels", repr(size))
        self.size = size
        plan = windows is None or isinstance(windows, Windows)
        require(plan, "windows", "be a Windows", repr(windows))
        self.windows = windows
        self.device, self.autocast = torch.device(device), autocast
        known = len(outputs) > 0 and len(set(outputs)) == len(outputs) and set(outputs) <= set(_COLUMNS)
        require(known, "outputs", f"be different names among {', '.join(_COLUMNS)}", repr(outputs))
        self.outputs = tuple(outputs)
        known = certificate is None or isinstance(certificate, Certificate)
        require(known, "certificate", "be a Certificate", type(certificate).__name__)
        whole = certificate is None or windows is None
        require(whole, "windows", "be left out beside a certificate, which holds for whole images", repr(windows))
        self.certificate = certificate
        self._forget()

    def load(self) -> ExitingModel:
        """Build the model if this process has not done so yet.

        Returns:
            The model that all calls run.

        Raises:
            TokenExitError: If `build` returns something else than a model from `wrap`, one of a single class, whose
                labels would all be alike, or another one than that of the certificate.
        """
        with self._lock:
            if self._model is None:
                model = self.build()
                wrapped = isinstance(model, ExitingModel)
                require(wrapped, "build", "return a model from `wrap`", type(model).__name__)
                labelled = model.classes >= 2 or "label" not in self.outputs
                require(labelled, "outputs", "leave out `label` for a model of one class", repr(self.outputs))
                model = model.to(self.device).eval()
                if self.certificate is not None:
                    self._require_certified(model, self.certificate)
                self._model = model
            return self._model

    def _require_certified(self, model: ExitingModel, certified: Certificate) -> None:
        claims = certified.fingerprints
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            prints = fingerprints(model, resolution=claims.resolution, preprocessing=claims.preprocessing)
        require_matches(certified, prints)
        rule = "return a model with the schedule of the certificate, as `load_certificate` gives it"
        require(model.schedule == certified.schedule, "build", rule, repr(model.schedule))

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

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_model", "_lock")}

    def __setstate__(self, recipe: dict[str, Any]) -> None:
        vars(self).update(recipe)
        self._forget()

    def _forget(self) -> None:
        self._model: ExitingModel | None = None
        self._lock = threading.Lock()

    def _blank(self, images: Any) -> np.ndarray:
        """A picture of the size of those in an empty batch, or of one that the model takes."""
        if isinstance(images, np.ndarray) and images.ndim == 4:
            return np.zeros(images.shape[1:], images.dtype)
        channels, *size = self.load().host.image_shape
        height, width = size if self.windows is None else self.windows.size
        return np.zeros((height, width, channels), np.uint8)

    def _columns(self, images: Sequence[Any]) -> dict[str, np.ndarray]:
        columns: list[dict[str, np.ndarray]] = [{}] * len(images)
        groups = _alike(images, channels=len(self.mean))
        model = self.load()  # not in inference mode, which its weights would never leave
        for numbers in groups:
            some = np.stack([images[one] for one in numbers])
            for number, row in zip(numbers, self._predict_group(model, some), strict=True):
                columns[number] = row
        return {name: _column([row[name] for row in columns]) for name in self.outputs}

    @torch.inference_mode()
    def _predict_group(self, model: ExitingModel, images: np.ndarray) -> list[dict[str, np.ndarray]]:
        """The outputs for pictures of one size, one by one: scores of pixels need more memory than all else."""
        size = images.shape[1:3] if images.dtype == np.uint8 else images.shape[2:]
        prepared = self._prepared(torch.from_numpy(images).to(self.device)).to(next(model.parameters()).dtype)
        if self.certificate is not None:
            wanted, shown = self.certificate.fingerprints.resolution, tuple(prepared.shape[2:])
            require(shown == wanted, "size", f"be that of the certificate, {wanted}", f"pictures shown in {shown}")
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            output = self._forward(model, prepared)
        return [
            self._select(scores, depth, tokens, output.area, (int(size[0]), int(size[1])))
            for scores, depth, tokens in zip(output.scores, output.depth, output.tokens, strict=True)
        ]

    def _prepared(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8:
            return images
        mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in (self.mean, self.std))
        colours = rearrange(images, "images height width channels -> images channels height width") / 255
        if self.size is not None:
            colours = functional.interpolate(colours, self.size, mode="bilinear", align_corners=False, antialias=True)
        return (colours - mean) / std

    def _forward(self, model: ExitingModel, images: Tensor) -> "_Tables":
        if self.windows is None:
            out = model(images)
            return _Tables(out.logits, out.exit_depth, out.tokens_per_block, out.area)
        wide = sliding(model, images, self.windows)
        count = {"images": len(images)}
        depth = rearrange(wide.windows.exit_depth, "(images windows) h w -> images windows h w", **count)
        tokens = reduce(wide.windows.tokens_per_block, "(images windows) blocks -> images blocks", "sum", **count)
        return _Tables(wide.logits, depth, tokens, None)

    def _select(
        self, scores: Tensor, depth: Tensor, tokens: Tensor, area: Area | None, size: tuple[int, int]
    ) -> dict[str, np.ndarray]:
        tables = {"exit_depth": depth, "tokens": tokens}
        found = {name: value.cpu().numpy() for name, value in tables.items() if name in self.outputs}
        if "label" in self.outputs or "scores" in self.outputs:
            pixels = upsampled(scores[None].float(), size, area)[0]
            if "label" in self.outputs:
                found["label"] = pixels.argmax(0).cpu().numpy().astype(np.min_scalar_type(len(pixels) - 1))
            if "scores" in self.outputs:
                found["scores"] = pixels.cpu().numpy()
        return found


class _Tables(NamedTuple):
    """Predictions of a model for images: scores of patches, or of pixels where it saw windows; and of which area."""

    scores: Tensor
    depth: Tensor
    tokens: Tensor
    area: Area | None


class _Recipes(pickle.Pickler):
    """Pickles what has no weights in it."""

    def persistent_id(self, obj: Any) -> None:
        kind = "a module" if isinstance(obj, nn.Module) else "a tensor" if isinstance(obj, Tensor) else None
        require(kind is None, "build", "be made of plain data, for weights do not travel", str(kind))


def _require_recipe(build: object) -> None:
    rule = "be a function that other processes can import by its name, or functools.partial of one"
    require(callable(build), "build", rule, repr(build))
    try:
        _Recipes(io.BytesIO()).dump(build)
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
