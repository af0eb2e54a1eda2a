"""Training with exits: tokens really leave in the forward pass, and every head has a loss. All of it is pure functions.

`staged` runs a wrapped model as it is run at test, and keeps what each head predicts for the whole image: its own class
scores for the tokens that still run, and for the others those they left with. The loop and the optimiser are yours.

    learned, statistics = tej.split(heads)

    def loss(trained, statistics, images, labels):
        params, learned = trained
        stages = tej.staged(model, params, tej.merge(learned, statistics), images, plan)
        return stages.loss(lambda logits: tej.pixel_cross_entropy(logits, labels, ignore=255)), stages.statistics

    gradients, statistics = jax.jit(jax.grad(loss, has_aux=True))((params, learned), statistics, images, labels)

A threshold that changes from step to step is in `tokenexit.training`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import jax
from jax import Array, lax
from jax import numpy as jnp
from jax.core import Tracer
from jaxtyping import Bool, Float, Integer

from tokenexit import TokenExitError
from tokenexit.adapting import aligned, is_number
from tokenexit.errors import require
from tokenexit.schedule import Schedule
from tokenexit.training import loss_weights
from tokenexit_jax._given import require_array
from tokenexit_jax.exits.forward import Given, head_outputs, on_grid, run_pass
from tokenexit_jax.exits.model import ExitingModel, checked, validated_heads
from tokenexit_jax.exits.outputs import Output
from tokenexit_jax.heads.masks import MaskMaps
from tokenexit_jax.heads.statistics import merge, split
from tokenexit_jax.networks.checks import require_covered
from tokenexit_jax.networks.protocol import Heads, Params
from tokenexit_jax.pytrees import register

__all__ = ["Stages", "distillation", "mask_loss", "merge", "pixel_cross_entropy", "split", "staged"]

Criterion = Callable[[Float[Array, "images grid_height grid_width classes"]], Float[Array, ""]]
MaskCriterion = Callable[[MaskMaps], Float[Array, ""]]


@dataclass(frozen=True)
class Stages:
    """What a training pass returns. A pytree.

    Attributes:
        output: What the model returns at test, constant where tokens have left with a prediction.
        logits: For each head, by the blocks before it, the class scores of all patches: this head's own for those that
            ran, and for the others the scores that they left with, as constants (DToP, ICCV 2023: a finalised
            prediction is a constant to later losses). Under `MaskPrediction`, the frozen masks are weighted with this
            head's presence.
        read: For each head, which patches it read: none if all had left before.
        masks: Masks and presence by the same rule, if the heads are mask heads: presence is this head's own in images
            of which it read any patch, and for the others that of the last head that did, as constants.
        statistics: What batch norms have learned, as `split` separates it: for the next step, and never by gradients.
    """

    output: Output
    logits: dict[int, Float[Array, "images grid_height grid_width classes"]]
    read: dict[int, Bool[Array, "images grid_height grid_width"]]
    masks: dict[int, MaskMaps] | None
    statistics: Heads

    def loss(self, criterion: Criterion, /, *, auxiliary: float | Mapping[int, float] = 0.4) -> Float[Array, ""]:
        """The criterion of the final head, plus that of each exit, weighted; heads that read nothing have none.

        Args:
            criterion: The loss of one head, on its class scores.
            auxiliary: Weight of the exits; one for all, or one for each. Published: 0.4 (DoViT, 2023), 1 (DToP, ICCV
                2023).

        Returns:
            The sum.

        Raises:
            TokenExitError: If a weight is missing or negative, or the criterion gives no single number.
        """
        _require_criterion(criterion)
        return self._sum({after: criterion(logits) for after, logits in self.logits.items()}, auxiliary)

    def loss_of_masks(
        self, criterion: MaskCriterion, /, *, auxiliary: float | Mapping[int, float] = 1.0
    ) -> Float[Array, ""]:
        """As `loss`, for a criterion of masks and presence: `mask_loss`.

        Args:
            criterion: The loss of one head, on its masks.
            auxiliary: Weight of the exits; one for all, or one for each. Published: 1 (DToP, ICCV 2023).

        Returns:
            The sum.

        Raises:
            TokenExitError: If the heads are no mask heads, or a weight is missing or negative.
        """
        if self.masks is None:
            raise TokenExitError("`stages` must be of mask heads for a loss of masks, got none")
        _require_criterion(criterion)
        return self._sum({after: criterion(maps) for after, maps in self.masks.items()}, auxiliary)

    def _sum(self, losses: Mapping[int, Array], auxiliary: float | Mapping[int, float]) -> Float[Array, ""]:
        weight, total = self._weights(auxiliary), jnp.zeros(())
        for after, loss in losses.items():
            got = f"shape {jnp.shape(loss)} for block {after}"
            require(jnp.shape(loss) == (), "criterion", "return a single number", got)
            total = total + jnp.where(self.read[after].any(), weight[after] * loss, 0)
        return total

    def _weights(self, auxiliary: float | Mapping[int, float]) -> dict[int, float]:
        depth = self.output.tokens_per_block.shape[1]
        exits = sorted(set(self.logits) - {depth})
        return loss_weights(auxiliary, exits=exits, depth=depth)


def _require_criterion(criterion: Any) -> None:
    require(callable(criterion), "criterion", "be a function that returns a single number", repr(criterion))


register(Stages, leaves=tuple(field.name for field in dataclasses.fields(Stages)))


def staged(
    model: ExitingModel, params: Params, heads: Heads, images: Array, schedule: Schedule | None = None, /
) -> Stages:
    """Run a batch with real exits, differentiably; a function for `jax.jit` and `jax.grad`.

    `lax.switch` chooses the bucket of each stage, and room for what the backward pass needs is taken for every bucket:
    where memory is scarce, wrap the network with `capacities=(1.0,)` to train it.

    Args:
        model: The wrapped network.
        params: Parameters of the network.
        heads: Weights of the heads.
        images: The images, as the network takes them.
        schedule: A plan for this call only; the model's own if left out. Heads are read at all of its exits, also
            where no token may leave: with `schedule.dense(after=...)` all of them see all tokens.

    Returns:
        Class scores of every head, and the output.

    Raises:
        TokenExitError: As for a call of the model; or if patches do not cover the images exactly, which losses on the
            logits of patches take for granted.
    """
    require(isinstance(model, ExitingModel), "model", "be wrapped by `wrap`", type(model).__name__)
    plan = checked(model, model.schedule if schedule is None else schedule)
    given = Given(model, params, validated_heads(model, heads), plan, "all")
    state = run_pass(given, images)
    require_covered(state.area)
    output, kept = head_outputs(given, state)
    assert kept is not None
    grid, settled = state.grid, lax.stop_gradient(output.logits)
    logits = {after: on_grid(one, grid) for after, one in kept.logits.items()}
    read = {after: on_grid(which[..., None], grid)[..., 0] for after, which in kept.read.items()}
    masks = {after: MaskMaps(on_grid(maps, grid), presence) for after, (maps, presence) in kept.masks.items()}
    return Stages(
        output=output,
        logits={after: jnp.where(read[after].any(), one, settled) for after, one in logits.items()},
        read=read,
        masks=masks if model.gives_masks else None,
        statistics=kept.statistics,
    )


def pixel_cross_entropy(
    logits: Float[Array, "images grid_height grid_width classes"],
    label: Integer[Array, "images height width"],
    /,
    *,
    ignore: int = -100,
) -> Float[Array, ""]:
    """Cross-entropy of upsampled logits, the mean over labelled pixels; zero, and not NaN, if there are none.

    Args:
        logits: Class scores of the patches; upsampled to the labels bilinearly, in float32.
        label: Class of each pixel. Every second row and column (`label[:, ::2, ::2]`) does nearly as well at a quarter
            of the work.
        ignore: Label of pixels that do not count; -100, as PyTorch has it, if left out. Many masks use 255.

    Returns:
        The loss. It is NaN if a label is neither a class nor `ignore`, where a compiled function cannot raise.

    Raises:
        TokenExitError: If the labels are no whole numbers of shape (images, height, width), one of them is neither a
            class nor `ignore`, or there are fewer than two classes.
    """
    _require_logits(logits)
    known, unclear = _labels(label, logits.shape, ignore)
    scores = jax.nn.log_softmax(_upsampled(logits, label.shape[1:]), axis=-1)
    own = jnp.take_along_axis(scores, jnp.where(known, label, 0)[..., None], axis=-1)[..., 0]
    return -jnp.where(known, own, 0).sum() / jnp.maximum(known.sum(), 1) + unclear


def distillation(
    logits: Float[Array, "images grid_height grid_width classes"],
    teacher: Float[Array, "images height width classes"],
    /,
    *,
    temperature: float = 1.0,
) -> Float[Array, ""]:
    """Divergence of upsampled predictions from a teacher's: KL(teacher || student), the mean over pixels.

    The dense network is the natural teacher: no labels are needed, and what it is sure of stays as it is.

    Args:
        logits: Class scores of the patches; upsampled to the size of the teacher's bilinearly, in float32.
        teacher: The teacher's class scores, constants here; upsampled, for the boundaries between patches are where
            students differ.
        temperature: Divides both, and its square scales the result.

    Returns:
        The loss.

    Raises:
        TokenExitError: If the temperature is not positive, there are fewer than two classes, or the teacher's images or
            classes are others.
    """
    require(is_number(temperature) and temperature > 0, "temperature", "be positive", repr(temperature))
    _require_logits(logits)
    require_array(teacher, "teacher")
    images, classes = logits.shape[0], logits.shape[-1]
    same = teacher.ndim == 4 and (teacher.shape[0], teacher.shape[-1]) == (images, classes)
    got = f"shape {teacher.shape}"
    require(same, "teacher", f"be class scores of shape ({images}, height, width, {classes})", got)
    student = jax.nn.log_softmax(_upsampled(logits, teacher.shape[1:3]) / temperature, axis=-1)
    constant = jax.lax.stop_gradient(teacher).astype(jnp.float32)
    wish = jax.nn.log_softmax(constant / temperature, axis=-1)
    pixels = teacher.shape[0] * teacher.shape[1] * teacher.shape[2]
    return (jnp.exp(wish) * (wish - student)).sum() * temperature**2 / max(pixels, 1)


def mask_loss(
    maps: MaskMaps,
    label: Integer[Array, "images height width"],
    /,
    *,
    ignore: int = -100,
    presence: float = 1.0,
    focal: float = 20.0,
    dice: float = 1.0,
    absent: float = 0.1,
) -> Float[Array, ""]:
    """What a mask head is trained with (SegViT, NeurIPS 2022, section 3): presence of classes, and their masks.

    Presence has a cross-entropy over all classes of all images with any labelled pixel. Masks have a focal loss
    (alpha 0.25, gamma 2) and a dice loss, each the mean over the classes present in their images; pixels without a
    label do not count. Zero, and not NaN, if no pixel is labelled.

    Args:
        maps: Masks and presence of one head; masks are upsampled to the labels bilinearly, in float32.
        label: Class of each pixel. Those of an image are what is taken to be present in it.
        ignore: Label of pixels that do not count.
        presence: Weight of the cross-entropy. Published: 1.
        focal: Weight of the focal loss. Published: 20.
        dice: Weight of the dice loss. Published: 1.
        absent: Weight of a class that is not in the image, in the cross-entropy. Published: 0.1.

    Returns:
        The loss. It is NaN if a label is neither a class nor `ignore`, where a compiled function cannot raise.

    Raises:
        TokenExitError: If the labels are no whole numbers of shape (images, height, width), or one of them is neither a
            class nor `ignore`.
    """
    require(isinstance(maps, MaskMaps), "maps", "be masks and presence, `MaskMaps`", type(maps).__name__)
    weights = {"presence": presence, "focal": focal, "dice": dice, "absent": absent}
    for argument, weight in weights.items():
        require(is_number(weight) or isinstance(weight, Array), argument, "be a number", repr(weight))
    known, unclear = _labels(label, maps.mask_logits.shape, ignore)
    classes = aligned(jnp.arange(maps.presence_logits.shape[1]), 4)
    target = known[..., None] & (label[..., None] == classes)
    there = target.any(axis=(1, 2))
    weight = jnp.where(there, 1.0, absent) * known.any(axis=(1, 2))[:, None]
    wrong = (weight * _entropy(maps.presence_logits.astype(jnp.float32), there)).sum()
    # Masks of absent classes are computed as well, and count for nothing: how many there are is not known beforehand.
    logits, counts = _upsampled(maps.mask_logits, label.shape[1:]), known[..., None]
    pixels = jnp.maximum(counts.sum(axis=(1, 2)), 1)
    focal_loss = jnp.where(there, (_focal(logits, target) * counts).sum(axis=(1, 2)) / pixels, 0).sum()
    dice_loss = jnp.where(there, _dice(jax.nn.sigmoid(logits) * counts, target), 0).sum()
    masks = jnp.maximum(there.sum(), 1)
    presence_loss = presence * wrong / jnp.maximum(weight.sum(), 1e-6)
    return presence_loss + (focal * focal_loss + dice * dice_loss) / masks + unclear


def _entropy(logits: Array, target: Bool[Array, "..."]) -> Array:
    return -jnp.where(target, jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits))


def _focal(logits: Array, target: Bool[Array, "..."]) -> Array:
    missed = jax.nn.sigmoid(jnp.where(target, -logits, logits))
    return jnp.where(target, 0.25, 0.75) * jnp.square(missed) * _entropy(logits, target)


def _dice(probability: Array, target: Bool[Array, "..."]) -> Float[Array, "images classes"]:
    both = jnp.where(target, probability, 0).sum(axis=(1, 2))
    return 1 - (2 * both + 1) / (probability.sum(axis=(1, 2)) + target.sum(axis=(1, 2)) + 1)


def _labels(label: Array, shape: tuple[int, ...], ignore: int) -> tuple[Bool[Array, "..."], Float[Array, ""]]:
    """Which pixels are labelled, and what to add to a loss: 0, or NaN if a label is no class."""
    require_array(label, "label")
    require(isinstance(ignore, Integral), "ignore", "be a whole number", repr(ignore))
    whole = jnp.issubdtype(label.dtype, jnp.integer)
    got = f"{label.dtype} of shape {label.shape}"
    fits = whole and label.ndim == 3 and label.shape[0] == shape[0]
    require(fits, "label", f"be whole numbers of shape ({shape[0]}, height, width)", got)
    known = label != ignore
    others = known & ((label < 0) | (label >= shape[-1]))
    unclear = others.any()
    if not isinstance(unclear, Tracer) and unclear:
        found = label[others]
        rule = f"be classes from 0 to {shape[-1] - 1}, or {ignore} to be ignored"
        require(False, "label", rule, f"{int(found.min())} to {int(found.max())}")
    return known & ~others, jnp.where(unclear, jnp.nan, 0.0)


def _require_logits(logits: Any) -> None:
    require_array(logits, "logits", "images", "grid_height", "grid_width", "classes")
    # Of one class every softmax is 1 and every loss 0, so that nothing is learned.
    rule = "have two classes at least: use two logits for two classes"
    require(logits.shape[-1] >= 2, "logits", rule, f"shape {logits.shape}")


def _upsampled(logits: Float[Array, "images rows columns classes"], size: tuple[int, ...]) -> Array:
    shape = (logits.shape[0], *size, logits.shape[3])
    return jax.image.resize(logits.astype(jnp.float32), shape, "bilinear", antialias=False)
