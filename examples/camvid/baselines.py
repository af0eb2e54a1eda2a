"""What exits are compared with on CamVid besides truncation: merged tokens, smaller images, a compiled dense network.

All need no training, and run on the same network, images and clock. The rules of merging are in `examples.merging`.
"""

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

import tokenexit_torch as tet
from examples import merging, runs, shell
from examples.camvid import data
from examples.camvid.contenders import Contender, Runner, Scored
from tokenexit import schedule
from tokenexit_torch.heads import NeighbourhoodHead

_PATCHES = 2640
_TOME = (80, 120, 160, 200, 240)  # tokens that merge in a block, of so many patches
_LOCAL = (0.97, 0.95, 0.9, 0.85, 0.8)
_GLOBAL = (0.9, 0.85, 0.8, 0.7)
GLOBAL_BLOCKS = {"block": 2, "then": 5}
"""Where local, then global merging merges."""  # the paper's are 1 and 5, which lost more at the same cost
_SCALES = (0.87, 0.75, 0.66, 0.5)
_COMPILE_MODES = ("default", "max-autotune")


def baselines(patches: int, /) -> tuple[Contender, ...]:
    """Everything that is measured beside the settings of a network.

    Args:
        patches: Of an image: how many tokens merge in a block is a share of them.
    """
    counts = dict.fromkeys(per_block(count, patches) for count in _TOME)
    return (
        *(Merging(f"ToMe, {count} a block", "ToMe", merging.ToMe(count)) for count in counts),
        *(Merging(f"local merging above {above}", "local merging", merging.Local(above)) for above in _LOCAL),
        *(
            Merging(
                f"local, then global merging above {above}", "local, then global merging",
                merging.Local(above, **GLOBAL_BLOCKS),
            )
            for above in _GLOBAL
        ),
        *(Smaller(scale) for scale in _SCALES),
        *(Compiled(mode) for mode in _COMPILE_MODES),
    )  # fmt: skip


def per_block(count: int, patches: int) -> int:
    """How many tokens merge in a block, where of 2,640 patches `count` would."""
    return max(1, round(count * patches / _PATCHES))


def smaller(vit: Any, grid: tuple[int, int], scale: float) -> tuple[Any, tuple[int, int]]:
    """A network for smaller images, its position embeddings resampled as timm does it.

    Args:
        vit: A vision transformer of timm, which stays as it is.
        grid: Its grid of patches for images of CamVid.
        scale: Length of a side as a fraction of what it was, before it is rounded to whole patches.

    Returns:
        The network, and height and width of its images.
    """
    height, width = (
        max(1, round(scale * places)) * (side // places) for side, places in zip(data.SIZE, grid, strict=True)
    )
    made = copy.deepcopy(vit)
    made.set_input_size((height, width))
    return made, (height, width)


@dataclass(frozen=True)
class Merging:
    """A network whose tokens merge.

    Attributes:
        name: Its row in the table.
        kind: Its line in the plot.
        rule: Which tokens merge where.
    """

    name: str
    kind: str
    rule: merging.ToMe | merging.Local

    @property
    def how(self) -> dict[str, Any]:
        """See `Contender.how`."""
        return {"baseline": type(self.rule).__name__, **asdict(self.rule)}

    def on(self, model: tet.ExitingModel | tet.GatedModel, /) -> Runner:
        """See `Contender.on`.

        Raises:
            UsageError: If the final head does not read each token by itself.
            TokenExitError: If it is no plain `VisionTransformer` of timm.
        """
        if model.head is None or isinstance(model.head, NeighbourhoodHead):
            raise shell.UsageError("`--baselines` must be of a network whose final head reads each token by itself")
        network = merging.Network(model.host, model.head)

        def read(made: merging.Pass) -> Scored:
            return Scored(_of_pixels(made.logits), made.tokens_per_block, network.multiply_adds(made))

        return Runner(lambda images: self.rule(network, images), read)


@dataclass(frozen=True)
class Scaled:
    """What is the same of all that run on smaller images.

    Attributes:
        scale: Length of a side as a fraction of what it was, before it is rounded to whole patches.
    """

    scale: float

    @property
    def name(self) -> str:
        """See `Contender.name`."""
        return f"smaller input, {self.scale} of each side"

    @property
    def kind(self) -> str:
        """See `Contender.kind`."""
        return "smaller input"

    @property
    def how(self) -> dict[str, Any]:
        """See `Contender.how`."""
        return {"baseline": "Smaller", "scale": self.scale}


class Smaller(Scaled):
    """The dense network on smaller images, its position embeddings resampled as timm does it."""

    @torch.inference_mode()
    def on(self, model: tet.ExitingModel | tet.GatedModel, /) -> Runner:
        """See `Contender.on`.

        Raises:
            UsageError: If it is no `VisionTransformer` of timm.
        """
        if not isinstance(model.host, tet.hosts.TimmViT):
            raise shell.UsageError(f"`--baselines` must be of a timm VisionTransformer, got {model.host.module}")
        grid = model.host.embed(_blank(model, data.SIZE)).grid
        vit, size = smaller(model.host.module, grid, self.scale)
        dense = _Dense.of(tet.wrap(vit, schedule.dense(), head=model.head).eval(), size)

        def run(images: Tensor) -> Tensor:
            resized = functional.interpolate(images, size, mode="bilinear", antialias=True)
            return dense.run(resized)

        return Runner(run, dense.read)


@dataclass(frozen=True)
class Compiled:
    """The dense network under `torch.compile`, a program for each shape of a batch.

    Attributes:
        mode: Of `torch.compile`.
    """

    mode: str

    @property
    def name(self) -> str:
        """See `Contender.name`."""
        return self.kind if self.mode == "default" else f"{self.kind}, {self.mode}"

    @property
    def kind(self) -> str:
        """See `Contender.kind`."""
        return "dense, compiled"

    @property
    def how(self) -> dict[str, Any]:
        """See `Contender.how`."""
        return {"baseline": "Compiled", "mode": self.mode}

    @torch.inference_mode()
    def on(self, model: tet.ExitingModel | tet.GatedModel, /) -> Runner:
        """See `Contender.on`."""
        dense = _Dense.of(model, data.SIZE)
        return Runner(torch.compile(dense.run, mode=self.mode, dynamic=False), dense.read)


@dataclass(frozen=True)
class _Dense:
    """A network as it is without the library.

    Attributes:
        run: From images to the class scores of their patches, patch by patch.
        grid: Rows and columns of patches.
        tokens: Of an image in each block.
        work: Multiply-adds of an image.
    """

    run: Callable[[Tensor], Tensor]
    grid: tuple[int, ...]
    tokens: Tensor
    work: Tensor

    @staticmethod
    def of(model: tet.ExitingModel | tet.GatedModel, size: tuple[int, int]) -> "_Dense":
        blank = _blank(model, size)
        out = model(blank, schedule=schedule.dense())
        work = model.multiply_adds(out)
        return _Dense(runs.bare_dense(model, blank), tuple(out.logits.shape[2:]), out.tokens_per_block, work)

    def read(self, scores: Tensor) -> Scored:
        logits = rearrange(scores, "i (rows columns) classes -> i classes rows columns", rows=self.grid[0])
        images = len(scores)
        return Scored(_of_pixels(logits), self.tokens.expand(images, -1), self.work.expand(images))


def _blank(model: tet.ExitingModel | tet.GatedModel, size: tuple[int, int]) -> Tensor:
    return next(model.parameters()).new_zeros(1, 3, *size)


def _of_pixels(logits: Tensor) -> Tensor:
    return functional.interpolate(logits, data.SIZE, mode="bilinear", align_corners=False)
