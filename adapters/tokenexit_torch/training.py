"""Training with exits: tokens really leave in the forward pass, and every head has a loss.

`Staged` runs a wrapped model as it is run at test, packed, and keeps what each head says of the whole image: its own
class scores for the tokens that still run, and for the others those they left with. The loop, the optimiser and the
data are yours.

    staged = tet.Staged(model)                       # or DistributedDataParallel(tet.Staged(model), ...)
    stages = staged(images, schedule=plan)
    loss = stages.loss(lambda logits: tet.pixel_cross_entropy(logits, labels, ignore=255))
    loss.backward()

A threshold that changes from step to step is in `tokenexit.annealing`; averaged weights are
`torch.optim.swa_utils.AveragedModel`.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from tokenexit import tokens
from tokenexit.errors import require
from tokenexit.ledger import Ledger
from tokenexit.schedule import Schedule
from tokenexit.tokens import Packing
from tokenexit_torch.running import ExitingModel, Output, Run

__all__ = ["Staged", "Stages", "distillation", "pixel_cross_entropy"]

Criterion = Callable[[Float[Tensor, "images classes grid_height grid_width"]], Float[Tensor, ""]]


class Stages(NamedTuple):
    """What a training pass returns.

    Attributes:
        output: What the model returns at test, detached where tokens have left with a prediction.
        logits: For each head that ran, by the blocks before it, the class scores of all patches: this head's own for
            those that ran, and for the others the scores that they left with, detached (DToP, ICCV 2023: a finalised
            prediction is a constant to later losses). The final head is missing if no token reached it.
    """

    output: Output
    logits: dict[int, Float[Tensor, "images classes grid_height grid_width"]]

    def loss(self, criterion: Criterion, /, *, auxiliary: float | Mapping[int, float] = 0.4) -> Float[Tensor, ""]:
        """The criterion of the final head, plus that of each exit, weighted.

        Args:
            criterion: The loss of one head, on its class scores.
            auxiliary: Weight of the exits; one for all, or one for each of those that ran. Published: 0.4 (DoViT,
                2023), 1 (DToP, ICCV 2023).

        Returns:
            The sum.

        Raises:
            TokenExitError: If a weight is missing or negative.
        """
        depth = self.output.tokens_per_block.shape[1]
        weight = dict(auxiliary) if isinstance(auxiliary, Mapping) else dict.fromkeys(self.logits, auxiliary)
        weight[depth] = 1.0
        missing = sorted(set(self.logits) - set(weight))
        require(not missing, "auxiliary", "have a weight for every exit that runs", f"none for {missing}")
        require(all(one >= 0 for one in weight.values()), "auxiliary", "be at least 0", auxiliary)
        return torch.stack([weight[after] * criterion(logits) for after, logits in self.logits.items()]).sum()


class Staged(nn.Module):
    """A wrapped model as it is trained: a call gives `Stages`. Its weights are those of the model.

    A module of its own, so that `DistributedDataParallel` and its like can wrap it. There say
    `find_unused_parameters=True`: a batch all of whose tokens leave early does not reach the later blocks.

    Args:
        model: The wrapped model.

    Raises:
        TokenExitError: If it is not wrapped.
    """

    def __init__(self, model: ExitingModel) -> None:
        super().__init__()
        require(isinstance(model, ExitingModel), "model", "be wrapped by `wrap`", type(model).__name__)
        self.model = model

    def forward(
        self, images: Float[Tensor, "images channels height width"], *, schedule: Schedule | None = None
    ) -> Stages:
        """Run a batch with real exits, differentiably.

        Args:
            images: The images, as the wrapped model takes them.
            schedule: A plan for this call only; the model's own if left out.

        Returns:
            Class scores of every head that ran, and the output.

        Raises:
            TokenExitError: As for a call of the model.
        """
        return _StagedRun(self.model, images, schedule).staged()


class _StagedRun(Run):
    def __init__(self, model: ExitingModel, images: Tensor, schedule: Schedule | None) -> None:
        super().__init__(model, images, schedule)
        self._stages: dict[int, Tensor] = {}

    def staged(self) -> Stages:
        output = self.through()
        height, width = self.embedded.grid
        stages = {
            after: rearrange(
                patches, "images (height width) classes -> images classes height width", height=height, width=width
            )
            for after, patches in self._stages.items()
        }
        if self.packing is None:  # all tokens reached the final head, or rejoined before it
            stages[self.model.depth] = output.logits
        return Stages(output, stages)

    def _settled(self, before: Ledger, packing: Packing, leave: Tensor, logits: Tensor, *, depth: int) -> Ledger:
        everyone = tokens.scatter(logits, packing, into=before.logits)
        self._stages[depth] = everyone[:, self.embedded.prefix :]
        return super()._settled(before, packing, leave, logits.detach(), depth=depth)


def pixel_cross_entropy(
    logits: Float[Tensor, "images classes grid_height grid_width"],
    label: Int64[Tensor, "images height width"],
    /,
    *,
    ignore: int = -100,
) -> Float[Tensor, ""]:
    """Cross-entropy of upsampled logits, the mean over labelled pixels; zero, and not NaN, if there are none.

    Args:
        logits: Class scores of the patches; upsampled to the labels bilinearly, in float32.
        label: Class of each pixel. Every second row and column (`label[:, ::2, ::2]`) does nearly as well at a quarter
            of the work.
        ignore: Label of pixels that do not count.

    Returns:
        The loss.
    """
    total = functional.cross_entropy(_upsampled(logits, label.shape[1:]), label, ignore_index=ignore, reduction="sum")
    return total / (label != ignore).sum().clamp(min=1)


def distillation(
    logits: Float[Tensor, "images classes grid_height grid_width"],
    teacher: Float[Tensor, "images classes height width"],
    /,
    *,
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """Divergence of upsampled predictions from a teacher's: KL(teacher || student), the mean over pixels.

    The dense network is the natural teacher: no labels are needed, and what it is sure of stays as it is.

    Args:
        logits: Class scores of the patches; upsampled to the size of the teacher's bilinearly, in float32.
        teacher: The teacher's class scores, detached here; upsampled, for the boundaries between patches are where
            students differ.
        temperature: Divides both, and its square scales the result.

    Returns:
        The loss.

    Raises:
        TokenExitError: If the temperature is not positive.
    """
    require(temperature > 0, "temperature", "be positive", temperature)
    student = functional.log_softmax(_upsampled(logits, teacher.shape[2:]) / temperature, dim=1)
    wish = functional.log_softmax(teacher.detach().float() / temperature, dim=1)
    pixels = teacher.shape[0] * teacher.shape[2] * teacher.shape[3]
    return functional.kl_div(student, wish, reduction="sum", log_target=True) * temperature**2 / max(pixels, 1)


def _upsampled(logits: Tensor, size: torch.Size) -> Tensor:
    return functional.interpolate(logits.float(), tuple(size), mode="bilinear", align_corners=False)
