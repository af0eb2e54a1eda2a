"""Losses: the numbers and the slopes of PyTorch's, compiled or not."""

import jax
import numpy as np
import pytest
import torch
from jax import numpy as jnp

import tokenexit_torch as tet
from tests.jax.parity import same
from tokenexit import TokenExitError
from tokenexit_jax.heads.masks import MaskMaps
from tokenexit_jax.training import stages as training

CLASSES, GRID, SIZE = 4, (3, 5), (12, 20)


def drawn(*shape, seed=0):
    return 2 * np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def labels(size=SIZE, images=2, seed=1):
    found = np.random.default_rng(seed).integers(0, CLASSES, (images, *size))
    found[0, :4] = 255
    found[found == 2] = 1  # a class that is nowhere
    return found


def both(ours, theirs, arrays):
    """Value and gradients, on either side."""
    tensors = [torch.from_numpy(array).requires_grad_() for array in arrays]
    wanted = theirs(*tensors)
    wanted.backward()
    found, slopes = jax.jit(jax.value_and_grad(ours, tuple(range(len(arrays)))))(*map(jnp.asarray, arrays))
    same(found, wanted)
    for slope, tensor in zip(slopes, tensors, strict=True):
        if tensor.grad is None:
            assert not np.any(slope)
        else:
            same(slope, tensor.grad)
    return float(found)


def first(logits):
    """Channels first, as PyTorch has them."""
    return logits.permute(0, 3, 1, 2)


@pytest.mark.parametrize("size", [SIZE, (13, 31), GRID, (2, 3)])
def test_cross_entropy_is_that_of_pytorch(size):
    label = labels(size)
    value = both(
        lambda logits: training.pixel_cross_entropy(logits, jnp.asarray(label), ignore=255),
        lambda logits: tet.pixel_cross_entropy(first(logits), torch.from_numpy(label), ignore=255),
        [drawn(2, *GRID, CLASSES)],
    )
    assert value > 0.5


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_distillation_is_that_of_pytorch_and_leaves_the_teacher_alone(temperature):
    both(
        lambda logits, teacher: training.distillation(logits, teacher, temperature=temperature),
        lambda logits, teacher: tet.distillation(first(logits), first(teacher), temperature=temperature),
        [drawn(2, *GRID, CLASSES), drawn(2, *SIZE, CLASSES, seed=1)],
    )


WEIGHTS = {"published": {}, "others": {"presence": 0.5, "focal": 2.0, "dice": 3.0, "absent": 0.7}}


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS.keys())
@pytest.mark.parametrize("ignore", [255, 0])
def test_mask_loss_is_that_of_pytorch(weights, ignore):
    label = labels()
    if ignore == 0:
        label[label == 255] = 0
    both(
        lambda masks, presence: training.mask_loss(
            MaskMaps(masks, presence), jnp.asarray(label), ignore=ignore, **weights
        ),
        lambda masks, presence: tet.mask_loss(
            tet.heads.MaskMaps(first(masks), presence), torch.from_numpy(label), ignore=ignore, **weights
        ),
        [3 * drawn(2, *GRID, CLASSES), drawn(2, CLASSES, seed=2)],
    )


def losses(label, ignore=255):
    """Each loss of labels, as a function of the scores."""
    presence = jnp.asarray(drawn(2, CLASSES))
    return {
        "cross-entropy": lambda logits: training.pixel_cross_entropy(logits, label, ignore=ignore),
        "masks": lambda logits: training.mask_loss(MaskMaps(logits, presence), label, ignore=ignore),
    }


each_loss = pytest.mark.parametrize("name", ["cross-entropy", "masks"])


@each_loss
def test_without_labels_a_loss_is_zero_and_so_are_its_slopes(name):
    label = jnp.full((2, *SIZE), 255)
    value, slope = jax.jit(jax.value_and_grad(losses(label)[name]))(jnp.asarray(drawn(2, *GRID, CLASSES)))
    assert value == 0
    assert not np.any(slope)


@each_loss
def test_great_logits_have_finite_slopes(name):
    logits = jnp.asarray(1e4 * drawn(2, *GRID, CLASSES))
    value, slope = jax.jit(jax.value_and_grad(losses(jnp.asarray(labels()))[name]))(logits)
    assert np.isfinite(value)
    assert np.isfinite(slope).all()


@each_loss
@pytest.mark.parametrize("wrong", [CLASSES, -1])
def test_a_label_that_is_no_class_is_named_or_makes_nan_where_nothing_can_be_raised(name, wrong):
    label = jnp.asarray(labels()).at[1, 5, 5].set(wrong)
    logits = jnp.asarray(drawn(2, *GRID, CLASSES))
    with pytest.raises(TokenExitError, match=f"`label` must be classes from 0 to 3, or 255 .* got {wrong} to {wrong}"):
        losses(label)[name](logits)
    assert np.isnan(jax.jit(lambda label: losses(label)[name](logits))(label))


@each_loss
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("shape", "kind"), [((2, *SIZE), float), ((3, *SIZE), int), ((2, 5), int)])
def test_labels_are_whole_numbers_for_each_pixel(name, shape, kind):
    label = jnp.zeros(shape, kind)
    with pytest.raises(TokenExitError, match=r"`label` must be whole numbers of shape \(2, height, width\), got"):
        losses(label)[name](jnp.zeros((2, *GRID, CLASSES)))


@pytest.mark.usefixtures("unchecked")
def test_a_teacher_of_other_classes_and_a_temperature_of_zero_are_refused():
    logits = jnp.zeros((2, *GRID, CLASSES))
    with pytest.raises(TokenExitError, match=r"`teacher` must be class scores of shape \(2, height, width, 4\), got"):
        training.distillation(logits, jnp.zeros((2, *SIZE, 3)))
    with pytest.raises(TokenExitError, match="`temperature` must be positive, got 0"):
        training.distillation(logits, jnp.zeros((2, *SIZE, CLASSES)), temperature=0)
