"""Training with exits: tokens really leave in the forward pass, and every head has a loss.

`Staged` runs a wrapped model as it is run at test, packed, and keeps what each head predicts for the whole image: its
own class scores for the tokens that still run, and for the others those they left with. The loop, the optimiser and
the data are yours.

    staged = tet.Staged(model)                       # or DistributedDataParallel(tet.Staged(model), ...)
    stages = staged(images, schedule=plan)
    loss = stages.loss(lambda logits: tet.pixel_cross_entropy(logits, labels, ignore=255))
    loss.backward()

A threshold that changes from step to step is in `tokenexit.training`; averaged weights are
`torch.optim.swa_utils.AveragedModel`.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn
from torch.nn import functional

from tokenexit import TokenExitError
from tokenexit.errors import require
from tokenexit.schedule import Schedule
from tokenexit.training import loss_weights
from tokenexit_torch.exits.forward import on_grid, run_pass
from tokenexit_torch.exits.model import ExitingModel, final_output, packed_output
from tokenexit_torch.exits.outputs import Output
from tokenexit_torch.exits.static import StaticModel
from tokenexit_torch.heads.masks import MaskMaps, as_maps
from tokenexit_torch.hosts.protocol import require_covered

__all__ = ["Staged", "Stages", "distillation", "mask_loss", "pixel_cross_entropy"]

Criterion = Callable[[Float[Tensor, "images classes grid_height grid_width"]], Float[Tensor, ""]]
MaskCriterion = Callable[[MaskMaps], Float[Tensor, ""]]


class Stages(NamedTuple):
    """What a training pass returns.

    Attributes:
        output: What the model returns at test, detached where tokens have left with a prediction.
        logits: For each head that ran, by the blocks before it, the class scores of all patches: this head's own for
            those that ran, and for the others the scores that they left with, detached (DToP, ICCV 2023: a finalised
            prediction is a constant to later losses). The final head is missing if no token reached it. Under
            `MaskPrediction`, the frozen masks are weighted with this head's presence.
        masks: Masks and presence by the same rule, if the heads are mask heads: presence is this head's own in images
            of which it read any patch, and for the others that of the last head that did, detached.
    """

    output: Output
    logits: dict[int, Float[Tensor, "images classes grid_height grid_width"]]
    masks: dict[int, MaskMaps] | None = None

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
        weight = self._weights(auxiliary)
        return _sum({after: criterion(logits) for after, logits in self.logits.items()}, weight)

    def loss_of_masks(
        self, criterion: MaskCriterion, /, *, auxiliary: float | Mapping[int, float] = 1.0
    ) -> Float[Tensor, ""]:
        """As `loss`, for a criterion of masks and presence: `mask_loss`.

        Args:
            criterion: The loss of one head, on its masks.
            auxiliary: Weight of the exits; one for all, or one for each of those that ran. Published: 1 (DToP, ICCV
                2023).

        Returns:
            The sum.

        Raises:
            TokenExitError: If the heads are no mask heads, or a weight is missing or negative.
        """
        if self.masks is None:
            raise TokenExitError("`stages` must be of mask heads for a loss of masks, got none")
        weight = self._weights(auxiliary)
        return _sum({after: criterion(maps) for after, maps in self.masks.items()}, weight)

    def _weights(self, auxiliary: float | Mapping[int, float]) -> dict[int, float]:
        depth = self.output.tokens_per_block.shape[1]
        exits = sorted(set(self.logits) - {depth})
        return loss_weights(auxiliary, exits=exits, depth=depth)


def _sum(losses: Mapping[int, Tensor], weight: Mapping[int, float]) -> Tensor:
    for after, loss in losses.items():
        scalar = isinstance(loss, Tensor) and loss.ndim == 0
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
        require(scalar, "criterion", "return a single number as a tensor", f"{got} for block {after}")
    return torch.stack([weight[after] * loss for after, loss in losses.items()]).sum()


class Staged(nn.Module):
    """A wrapped model as it is trained: a call gives `Stages`. Its weights are those of the model.

    A module of its own, so that `DistributedDataParallel` and its like can wrap it. There set
    `find_unused_parameters=True`: if all tokens of a batch leave early, it does not reach the later blocks.

    Args:
        model: The wrapped model; or it in the static layout, with a fixed number of entries after each exit.

    Raises:
        TokenExitError: If it is not wrapped by `wrap`.
    """

    def __init__(self, model: ExitingModel | StaticModel) -> None:
        super().__init__()
        wrapped = model.model if isinstance(model, StaticModel) else model
        require(
            isinstance(wrapped, ExitingModel),
            "model",
            "be wrapped by `wrap` with a head, not with a decoder",
            type(wrapped).__name__,
        )
        self.model = model

    def forward(
        self, images: Float[Tensor, "images channels height width"], *, schedule: Schedule | None = None
    ) -> Stages:
        """Run a batch with real exits, differentiably.

        Args:
            images: The images, as the wrapped model takes them.
            schedule: A plan for this call only; the model's own if left out. Heads are read at all of its exits, also
                where no token may leave: with `schedule.dense(after=...)` all of them see all tokens.

        Returns:
            Class scores of every head that ran, and the output.

        Raises:
            TokenExitError: As for a call of the model; or if patches do not cover the images exactly, which losses on
                the logits of patches take for granted.
        """
        model = self.model
        if isinstance(model, StaticModel):
            made, state = final_output(model.run_pass(images, schedule, heads="all"))
        else:
            made, state = packed_output(run_pass(model, images, schedule, heads="all"))
        require_covered(made.area)
        grid = state.fixed.embedded.grid
        logits = {after: on_grid(one.logits, grid) for after, one in state.outputs.items()}
        masks = {
            after: as_maps(one.mask_logits, one.presence_logits, grid)
            for after, one in state.outputs.items()
            if one.mask_logits is not None and one.presence_logits is not None
        }
        return Stages(made, logits, masks if state.fixed.model.gives_masks else None)


def pixel_cross_entropy(
    logits: Float[Tensor, "images classes grid_height grid_width"],
    label: Integer[Tensor, "images height width"],
    /,
    *,
    ignore: int = -100,
) -> Float[Tensor, ""]:
    """Cross-entropy of upsampled logits, the mean over labelled pixels; zero, and not NaN, if there are none.

    Args:
        logits: Class scores of the patches; upsampled to the labels bilinearly, in float32.
        label: Class of each pixel. Every second row and column (`label[:, ::2, ::2]`) does nearly as well at a quarter
            of the work.
        ignore: Label of pixels that do not count; -100, as PyTorch has it, if left out. Many masks use 255.

    Returns:
        The loss.

    Raises:
        TokenExitError: If the labels are no whole numbers of shape (images, height, width), or, which is checked
            on a CPU only, one of them is neither a class nor `ignore`.
    """
    _require_labels(label, len(logits))
    full, label = _upsampled(logits, label.shape[1:]), label.long()
    try:
        total = functional.cross_entropy(full, label, ignore_index=ignore, reduction="sum")
    except IndexError as error:
        rule = f"be classes from 0 to {logits.shape[1] - 1}, or {ignore} to be ignored"
        others = label[label != ignore]
        raise TokenExitError(f"`label` must {rule}, got {int(others.min())} to {int(others.max())}") from error
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
        TokenExitError: If the temperature is not positive, or the teacher's images or classes are others.
    """
    require(temperature > 0, "temperature", "be positive", temperature)
    same = isinstance(teacher, Tensor) and teacher.ndim == 4 and teacher.shape[:2] == logits.shape[:2]
    got = f"shape {tuple(teacher.shape)}" if isinstance(teacher, Tensor) else type(teacher).__name__
    images, classes = logits.shape[:2]
    require(same, "teacher", f"be class scores of shape ({images}, {classes}, height, width)", got)
    student = functional.log_softmax(_upsampled(logits, teacher.shape[2:]) / temperature, dim=1)
    wish = functional.log_softmax(teacher.detach().float() / temperature, dim=1)
    pixels = teacher.shape[0] * teacher.shape[2] * teacher.shape[3]
    return functional.kl_div(student, wish, reduction="sum", log_target=True) * temperature**2 / max(pixels, 1)


def mask_loss(
    maps: MaskMaps,
    label: Integer[Tensor, "images height width"],
    /,
    *,
    ignore: int = -100,
    presence: float = 1.0,
    focal: float = 20.0,
    dice: float = 1.0,
    absent: float = 0.1,
) -> Float[Tensor, ""]:
    """What a mask head is trained with (SegViT, NeurIPS 2022, section 3): presence of classes, and their masks.

    Presence has a cross-entropy over all classes of all images with any labelled pixel. Masks have a focal loss
    (alpha 0.25, gamma 2) and a dice loss, each the mean over the classes present in their images; pixels without a
    label do not count. Zero, and not NaN, if no pixel is labelled. It waits for the device once, to learn how many
    masks there are.

    Args:
        maps: Masks and presence of one head; masks are upsampled to the labels bilinearly, in float32.
        label: Class of each pixel. Those of an image are what is taken to be present in it.
        ignore: Label of pixels that do not count.
        presence: Weight of the cross-entropy. Published: 1.
        focal: Weight of the focal loss. Published: 20.
        dice: Weight of the dice loss. Published: 1.
        absent: Weight of a class that is not in the image, in the cross-entropy. Published: 0.1.

    Returns:
        The loss.
    """
    _require_labels(label, len(maps.presence_logits))
    known, label = label != ignore, label.long()
    there = _present(label, known, maps.presence_logits.shape[1])
    weight = torch.where(there, 1.0, absent) * known.flatten(1).any(dim=1)[:, None]
    wrong = functional.binary_cross_entropy_with_logits(
        maps.presence_logits.float(), there.float(), weight, reduction="sum"
    )
    image, which = there.nonzero(as_tuple=True)
    logits = _upsampled(maps.mask_logits[image, which][:, None], label.shape[1:])[:, 0]
    counts = known[image].float()
    target = (label[image] == which[:, None, None]).float()
    focal_loss = ((_focal(logits, target) * counts).sum(dim=(1, 2)) / counts.sum(dim=(1, 2))).sum()
    dice_loss = _dice(logits.sigmoid() * counts, target).sum()
    masks = max(len(image), 1)
    return presence * wrong / weight.sum().clamp(min=1e-6) + (focal * focal_loss + dice * dice_loss) / masks


def _present(label: Tensor, known: Tensor, classes: int) -> Tensor:
    """Which classes are in which image, `(images, classes)`."""
    found = torch.zeros(len(label), classes + 1, dtype=torch.bool, device=label.device)
    return found.scatter(1, torch.where(known, label, classes).flatten(1), True)[:, :classes]


def _focal(logits: Tensor, target: Tensor) -> Tensor:
    entropy = functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    missed = (target - logits.sigmoid()).abs()
    return torch.where(target > 0, 0.25, 0.75) * missed.square() * entropy


def _dice(probability: Tensor, target: Tensor) -> Tensor:
    both = (probability * target).sum(dim=(1, 2))
    return 1 - (2 * both + 1) / (probability.sum(dim=(1, 2)) + target.sum(dim=(1, 2)) + 1)


def _require_labels(label: Tensor, images: int) -> None:
    whole = isinstance(label, Tensor) and not (label.is_floating_point() or label.dtype == torch.bool)
    got = f"{label.dtype} of shape {tuple(label.shape)}" if isinstance(label, Tensor) else type(label).__name__
    fits = whole and label.ndim == 3 and len(label) == images
    require(fits, "label", f"be whole numbers of shape ({images}, height, width)", got)


def _upsampled(logits: Tensor, size: torch.Size) -> Tensor:
    return functional.interpolate(logits.float(), tuple(size), mode="bilinear", align_corners=False)
