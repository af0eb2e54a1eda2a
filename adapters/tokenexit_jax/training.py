"""Losses."""

import jax
from jax import Array
from jax import numpy as jnp
from jaxtyping import Bool, Float, Integer

from tokenexit.errors import require
from tokenexit_jax.masks import MaskMaps

__all__ = ["distillation", "mask_loss", "pixel_cross_entropy"]


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
        ignore: Label of pixels that do not count; -100, as PyTorch has it, unless said otherwise. Many masks use 255.

    Returns:
        The loss. It is NaN if a label is neither a class nor `ignore`, where a compiled function cannot raise.

    Raises:
        TokenExitError: If the labels are no whole numbers of shape (images, height, width), or one of them is neither a
            class nor `ignore`.
    """
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
        TokenExitError: If the temperature is not positive, or the teacher's images or classes are others.
    """
    require(temperature > 0, "temperature", "be positive", temperature)
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
    known, unclear = _labels(label, maps.mask_logits.shape, ignore)
    classes = jnp.arange(maps.presence_logits.shape[1])
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
    whole = jnp.issubdtype(label.dtype, jnp.integer)
    got = f"{label.dtype} of shape {label.shape}"
    fits = whole and label.ndim == 3 and label.shape[0] == shape[0]
    require(fits, "label", f"be whole numbers of shape ({shape[0]}, height, width)", got)
    known = label != ignore
    others = known & ((label < 0) | (label >= shape[-1]))
    unclear = others.any()
    if not isinstance(unclear, jax.core.Tracer) and unclear:
        found = label[others]
        rule = f"be classes from 0 to {shape[-1] - 1}, or {ignore} to be ignored"
        require(False, "label", rule, f"{int(found.min())} to {int(found.max())}")
    return known & ~others, jnp.where(unclear, jnp.nan, 0.0)


def _upsampled(logits: Float[Array, "images rows columns classes"], size: tuple[int, ...]) -> Array:
    shape = (logits.shape[0], *size, logits.shape[3])
    return jax.image.resize(logits.astype(jnp.float32), shape, "bilinear", antialias=False)
