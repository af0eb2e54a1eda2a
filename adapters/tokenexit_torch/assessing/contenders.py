"""Contenders of an assessment: plans of a wrapped model, the dense network, its compiled form, and smaller images."""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from tokenexit.assessment import Kind, Ran
from tokenexit.errors import TokenExitError, require
from tokenexit.schedule import Schedule, dense
from tokenexit_torch._modules import evaluating
from tokenexit_torch.calibration.adapted import label_maps
from tokenexit_torch.exits.decoder import DecodingModel
from tokenexit_torch.exits.model import ExitingModel
from tokenexit_torch.exits.outputs import DecodedOutput
from tokenexit_torch.heads.reading import apply_head_dense
from tokenexit_torch.hosts.protocol import embedded_by, full_name
from tokenexit_torch.hosts.timm import TIMM_VITS

__all__ = ["Compiled", "Dense", "Network", "Planned", "Scores", "Smaller", "decoded_scores", "smaller"]

Scores = Callable[[Any], Float[Tensor, "images classes _ _"]]
"""From what a model returns to class scores, at any resolution."""


@dataclass(frozen=True, eq=False)
class Network:
    """The model that is assessed, on images of one size.

    Attributes:
        model: The wrapped model.
        scores: Class scores of what it returns; None for a model whose output has no classes.
        size: Height and width at which classes are compared.
        grid: Rows and columns of patches.
        prefix: Prefix tokens.
    """

    model: ExitingModel | DecodingModel
    scores: Scores | None
    size: tuple[int, int]
    grid: tuple[int, int]
    prefix: int

    @torch.no_grad()
    def ran(self, images: Tensor, plan: Schedule, /) -> Ran:
        """Results of a batch under a plan; a decoder counts in the multiply-adds."""
        model: Any = self.model
        with evaluating(model):
            out = model(images, schedule=plan)
            work = model.multiply_adds(out) + self._decoder((images.shape[2], images.shape[3]))
        maps = None
        if self.scores is not None:
            maps = label_maps(self.scores(out), self.size, out.area, grid=self.grid)
        return Ran(out, work.cpu(), maps)

    def own(self, images: Tensor, /) -> Any:
        """What the network makes of images by its own forward pass and its head or decoder, without this library."""
        model = self.model
        if isinstance(model, DecodingModel):
            return model.host.own(images)
        return apply_head_dense(model.head, model.host.dense(images)[:, self.prefix :], grid=self.grid).logits

    def seconds(self, call: Callable[[], object], device: torch.device, /) -> float:
        """Seconds of a call in evaluation mode."""
        with torch.inference_mode(), evaluating(self.model):
            _wait(device)
            started = time.perf_counter()
            call()
            _wait(device)
            return time.perf_counter() - started

    @cached_property
    def _decoder(self) -> Callable[[tuple[int, int]], int]:
        model = self.model
        return cache(model.decoder_multiply_adds) if isinstance(model, DecodingModel) else lambda _: 0


@dataclass(frozen=True, eq=False)
class Planned:
    """A plan of the model. See `tokenexit.assessment.Contender`.

    Attributes:
        network: The model.
        name: What it is.
        kind: What it does to the network.
        plan: The plan.
    """

    network: Network
    name: str
    kind: Kind
    plan: Schedule

    def run(self, batch: Tensor, /) -> Ran:
        """Run the plan."""
        return self.network.ran(batch, self.plan)

    def seconds(self, batch: Tensor, /) -> float:
        """Time the plan."""
        model: Any = self.network.model
        return self.network.seconds(lambda: model(batch, schedule=self.plan), batch.device)


@dataclass(frozen=True, eq=False)
class Dense:
    """The network as it is without the library: its own forward pass, and its head or decoder."""

    network: Network
    name: str = "dense"
    kind: Kind = "dense"
    plan: Schedule | None = None

    def run(self, batch: Tensor, /) -> Ran:
        """Run it with all tokens in all blocks."""
        return self.network.ran(batch, dense())

    def seconds(self, batch: Tensor, /) -> float:
        """Time the network's own forward pass."""
        return self.network.seconds(lambda: self.network.own(batch), batch.device)


@dataclass(frozen=True, eq=False)
class Compiled:
    """The network's own forward pass under `torch.compile`, which the first call waits for."""

    network: Network
    name: str = "dense, compiled"
    kind: Kind = "compiled dense"
    plan: Schedule | None = None

    def run(self, batch: Tensor, /) -> Ran:
        """Run it eagerly: compiled, it gives the same but for rounding."""
        return replace(self.network.ran(batch, dense()), multiply_adds=None)

    def seconds(self, batch: Tensor, /) -> float:
        """Time the compiled program."""
        return self.network.seconds(lambda: self._program(batch), batch.device)

    @cached_property
    def _program(self) -> Callable[[Tensor], Any]:
        return torch.compile(self.network.own, dynamic=False)


@dataclass(frozen=True, eq=False)
class Smaller:
    """The dense network on smaller images, its result brought to the size of that on whole ones.

    Attributes:
        small: The network for smaller images.
        images: Their height and width.
        scale: Length of a side as a fraction of what it was.
        decoded: Height and width of what a decoder makes of whole images; None without one.
    """

    small: Network
    images: tuple[int, int]
    scale: float
    decoded: tuple[int, int] | None
    kind: Kind = "smaller input"
    plan: Schedule | None = None

    @property
    def name(self) -> str:
        """See `tokenexit.assessment.Contender`."""
        return f"smaller input, {self.scale:g} of each side"

    def run(self, batch: Tensor, /) -> Ran:
        """Run it on the images made smaller."""
        ran = self.small.ran(_resized(batch, self.images), dense())
        if self.decoded is None:
            return ran
        return replace(ran, output=ran.output._replace(decoded=_as_large(ran.output.decoded, self.decoded)))

    def seconds(self, batch: Tensor, /) -> float:
        """Time it, the scaling of the images included."""
        return self.small.seconds(lambda: self.small.own(_resized(batch, self.images)), batch.device)


@torch.no_grad()
def smaller(network: Network, images: Tensor, scale: float, /) -> Smaller:
    """The network for smaller images.

    Args:
        network: The network for whole ones.
        images: Some of these.
        scale: Length of a side as a fraction of what it was; sides are of whole patches.

    Returns:
        The contender.

    Raises:
        TokenExitError: If the network takes no images of that size, or its decoder makes no map of them.
    """
    sides = zip(images.shape[2:], network.grid, strict=True)
    height, width = (max(1, round(scale * places)) * (side // places) for side, places in sides)
    size = (height, width)
    require(size != tuple(images.shape[2:]), "images", "have enough patches to be made smaller", network.grid)
    decoded = None
    if isinstance(network.model, DecodingModel):
        map = network.ran(images[:1], dense()).output.decoded
        fits = isinstance(map, Tensor) and map.ndim in (3, 4)
        require(fits, "decoder", "give a map, to be compared at another size", type(map).__name__)
        decoded = (map.shape[-2], map.shape[-1])
    try:
        small = _for_size(network, network.model, images, size)
    except (AssertionError, RuntimeError, ValueError):  # a `TokenExitError` is a `ValueError`
        small = _for_size(network, _remade(network.model, size), images, size)
    return Smaller(small, size, scale, decoded)


def _for_size(network: Network, model: Any, images: Tensor, size: tuple[int, int]) -> Network:
    """A network for images of a size, after a try."""
    shrunk = _resized(images[:1], size)
    with evaluating(model):
        embedded = embedded_by(model.host, shrunk, patch=model.patch)
    small = replace(network, model=model, grid=embedded.grid, prefix=embedded.prefix)
    small.ran(shrunk, dense())
    return small


def _remade(model: ExitingModel | DecodingModel, size: tuple[int, int]) -> ExitingModel | DecodingModel:
    """A copy of a model whose vision transformer is told the size of its images."""
    made = copy.deepcopy(model)
    for part in made.model.modules():
        if full_name(part) in TIMM_VITS:
            timm: Any = part
            timm.set_input_size(size)
            return made
    rule = f"take images of {size[0]} x {size[1]} pixels, or be a timm VisionTransformer, which can be told"
    raise TokenExitError(f"`model` must {rule}, got {type(model.model).__name__}")


def _resized(images: Float[Tensor, "images channels _ _"], size: tuple[int, int]) -> Tensor:
    return functional.interpolate(images, size, mode="bilinear", antialias=True, align_corners=False)


def _as_large(map: Tensor, size: tuple[int, int]) -> Tensor:
    """A map `(images, height, width)`, or with channels, at another size."""
    laid = map[:, None] if map.ndim == 3 else map
    found = functional.interpolate(laid, size, mode="bilinear", align_corners=False)
    return found[:, 0] if map.ndim == 3 else found


def decoded_scores(model: DecodingModel, output: DecodedOutput, /) -> Scores | None:
    """How class scores are read from what a model with a decoder returns; None if it has no classes.

    A tensor with two channels or more is taken for class scores where the model does not know better.

    Args:
        model: The model.
        output: What it returned for some images.
    """
    host: Any = model.host
    if host.classes is not None:
        return lambda out: host.class_scores(out.decoded)
    found = output.decoded
    return (lambda out: out.decoded) if isinstance(found, Tensor) and found.ndim == 4 and found.shape[1] > 1 else None


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
