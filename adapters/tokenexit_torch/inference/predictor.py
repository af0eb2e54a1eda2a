"""The predictor of `tokenexit.prediction` on PyTorch: pictures are prepared, run and labelled on the device."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from einops import rearrange, reduce
from torch import Tensor, nn
from torch.nn import functional

from tokenexit import prediction
from tokenexit.area import Area
from tokenexit.errors import require
from tokenexit.guarantees.certificate import Fingerprints
from tokenexit.prediction import Segmented
from tokenexit_torch.calibration.certificate import fingerprints
from tokenexit_torch.exits.model import ExitingModel
from tokenexit_torch.exits.outputs import upsampled
from tokenexit_torch.inference.windows import sliding

__all__ = ["Predictor"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Predictor(prediction.Predictor[ExitingModel]):
    """Segments batches of pictures with a PyTorch model, in whichever process it is called.

    `tokenexit.prediction.Predictor` has the recipe: `build`, `mean`, `std`, `size`, `windows`, `outputs` and
    `certificate`; and what comes back.

    Attributes:
        device: Where the model runs.
        autocast: Runs the model under `torch.autocast` to this type; the model's own if left out.

    Raises:
        TokenExitError: If `build` cannot be pickled, or only with weights, or another argument is not what it must be.
    """

    weights: ClassVar[Mapping[type, str]] = {nn.Module: "a module", Tensor: "a tensor"}

    device: str | torch.device = "cpu"
    autocast: torch.dtype | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "device", torch.device(self.device))

    def placed(self, built: Any, /) -> ExitingModel:
        """The model on its device, in evaluation mode."""
        rule = "return a model from `wrap` with a head (`tokenexit segment` runs networks with a decoder)"
        require(isinstance(built, ExitingModel), "build", rule, type(built).__name__)
        return built.to(self.device).eval()

    def fingerprints(self, model: ExitingModel, /, *, resolution: tuple[int, int], preprocessing: str) -> Fingerprints:
        """The fingerprints of the model under `autocast`."""
        with self._casting():
            return fingerprints(model, resolution=resolution, preprocessing=preprocessing)

    def image_shape(self, model: ExitingModel, /) -> tuple[int, int, int]:
        """Channels, height and width of an image that the host takes."""
        return model.host.image_shape

    @torch.inference_mode()
    def segment(self, model: ExitingModel, pictures: np.ndarray, /) -> Segmented:
        """The output of the model, on its device."""
        images = self._prepared(torch.from_numpy(pictures).to(self.device)).to(next(model.parameters()).dtype)
        with self._casting():
            return self._forward(model, images)

    @torch.inference_mode()
    def upsample(self, scores: Tensor, size: tuple[int, int], area: Area | None, /) -> Tensor:
        """Class scores of pixels, bilinearly, on the device of those of the patches."""
        return upsampled(scores, size, area)

    def _casting(self) -> AbstractContextManager[object]:
        return torch.autocast(torch.device(self.device).type, self.autocast, enabled=self.autocast is not None)

    def _prepared(self, pictures: Tensor) -> Tensor:
        if pictures.dtype != torch.uint8:
            return pictures
        mean, std = (torch.tensor(values, device=pictures.device)[:, None, None] for values in (self.mean, self.std))
        colours = rearrange(pictures, "pictures height width channels -> pictures channels height width") / 255
        if self.size is not None:
            colours = functional.interpolate(colours, self.size, mode="bilinear", align_corners=False, antialias=True)
        return (colours - mean) / std

    def _forward(self, model: ExitingModel, images: Tensor) -> Segmented:
        if self.windows is None:
            out = model(images)
            return Segmented(out.logits, out.exit_depth, out.tokens_per_block, out.area)
        wide = sliding(model, images, self.windows)
        count = {"images": len(images)}
        depth = rearrange(wide.windows.exit_depth, "(images windows) h w -> images windows h w", **count)
        tokens = reduce(wide.windows.tokens_per_block, "(images windows) blocks -> images blocks", "sum", **count)
        return Segmented(wide.logits, depth, tokens, None)
