"""Swin on semantic tokens in JAX: the numbers of PyTorch, on its weights; any image, and padding that nobody sees."""

import functools
from dataclasses import replace

import jax
import numpy as np
import pytest
import torch
from jax import numpy as jnp

import tokenexit_jax as tej
import tokenexit_torch as tet
from tests.jax.networks import images_of
from tests.jax.parity import from_torch, numbers, same
from tests.torch import models
from tests.torch.semantic import PUBLISHED, SWINS
from tokenexit import TokenExitError, semantic
from tokenexit_jax._counting import multiply_adds
from tokenexit_jax._layers import STATISTICS

SMALL = {"width": 4, "depths": (1, 2, 6, 1), "heads": (1, 1, 2, 2)}


@functools.cache
def theirs(plan, window=(7, 7)):
    """A narrow network with weights of which everything is seen, and statistics that are not those at first."""
    torch.manual_seed(3)
    swin = tet.models.Swin(**SMALL, window=window, plan=plan)
    with torch.no_grad():
        for name, value in swin.state_dict().items():
            if "scale" in name:
                value.fill_(0.5)
            elif value.ndim == 2:
                value.mul_(6)
            elif "running" in name:
                value.copy_(0.5 + torch.rand_like(value))
    return swin.eval()


def ours(plan, window=(7, 7)):
    return tej.models.Swin(**SMALL, window=window, plan=plan)


def array(values):
    return jnp.asarray(values.numpy())


def check(found, wanted, within=1e-4):
    """The four maps, where they are of the image."""
    for one, other in zip(found, wanted, strict=True):
        assert (one.valid is None) == (other.valid is None)
        if other.valid is not None:
            same(one.valid, other.valid)
        seen = slice(None) if other.valid is None else numbers(other.valid)
        same(numbers(one.features)[seen], numbers(other.features)[seen], within)
        assert jnp.isfinite(one.features).all()


def marks(size):
    valid = torch.ones(1, *size, dtype=torch.bool)
    valid[:, :, 150:] = False
    return valid


SIZES = [
    ((192, 192), 7, "dense"), ((224, 224), 7, "classification"), ((224, 224), 8, "dense"),
    ((256, 256), 8, "classification"), ((288, 288), 7, "classification"), ((384, 384), 8, "dense"),
    ((448, 448), 7, "classification"), ((512, 512), 8, "classification"), ((480, 352), 7, "dense"),
    ((480, 352), 8, "Swin"),
]  # fmt: skip


@pytest.mark.parametrize(("size", "side", "kind"), SIZES, ids=str)
@torch.no_grad()
def test_usual_sizes_are_those_of_pytorch(size, side, kind):
    """One image is marked, and holds what is no number beyond the mark; half of the cases are not marked."""
    window = (side, side)
    plan = {"classification": semantic.stvit_r, "dense": semantic.stvit_r_dense}.get(kind, lambda _: None)(window)
    images, valid = models.images(1, size), marks(size) if side == 7 else None
    network, weights = theirs(plan, window), from_torch(theirs(plan, window))
    wanted = network(images, valid=valid)
    if valid is None:
        check(jax.jit(ours(plan, window))(weights, images_of(images)), wanted)
    else:
        images = torch.where(valid[:, None], images, torch.nan)
        check(jax.jit(ours(plan, window))(weights, images_of(images), valid=array(valid)), wanted)


@pytest.mark.parametrize("plan", SWINS.values(), ids=SWINS)
@torch.no_grad()
def test_what_goes_on_from_the_maps_is_that_of_pytorch(plan):
    """Odd sides, windows of 3 x 5, and a batch of images of two sizes; what padding holds changes nothing."""
    window, size = (3, 5), (45, 67)
    plan = None if plan is None else replace(plan, window=window)
    swin, images = theirs(plan, window), models.images(2, size)
    valid = torch.ones(2, *size, dtype=torch.bool)
    valid[0, 30:] = False
    valid[0, :, 33:] = False
    torch.manual_seed(5)
    classifier, backbone = tet.models.SwinClassifier(swin, classes=4).eval(), tet.models.SwinBackbone(swin).eval()
    norms = {name: value for name, value in from_torch(backbone).items() if name.startswith("norms.")}
    weights = from_torch(classifier) | norms

    @jax.jit
    def both(images):
        network, marked = ours(plan, window), {"valid": array(valid)}
        return tej.models.SwinClassifier(network, classes=4)(weights, images, **marked), tej.models.SwinBackbone(
            network
        )(weights, images, **marked)

    scores, maps = both(images_of(images))
    same(scores, classifier(images, valid=valid), 1e-4)
    for found, wanted in zip(maps, backbone(images, valid=valid), strict=True):
        same(found, np.moveaxis(wanted.numpy(), 1, -1), 1e-4)
    for content in (1e9, np.nan, -np.inf):
        again = both(images_of(torch.where(valid[:, None], images, content)))
        jax.tree.map(np.testing.assert_array_equal, again, (scores, maps))


def test_training_is_that_of_pytorch():
    """Scores, gradients, and what the batch norms have learned."""
    plan = semantic.stvit_r((3, 3))
    swin, images, labels = theirs(plan, (3, 3)), models.images(3, (24, 40)), torch.tensor([0, 2, 1])
    torch.manual_seed(5)
    classifier = tet.models.SwinClassifier(swin, classes=3)
    weights, layer = from_torch(classifier), tej.models.SwinClassifier(ours(plan, (3, 3)), classes=3)
    learned, fixed = tej.split(weights)
    assert {name.rpartition(".")[2] for name in fixed} == set(STATISTICS)

    def loss(learned):
        scores, statistics = layer.in_training(learned | fixed, images_of(images))
        return -jax.nn.log_softmax(scores)[jnp.arange(3), array(labels)].mean(), statistics

    (value, statistics), slopes = jax.jit(jax.value_and_grad(loss, has_aux=True))(learned)
    wanted = torch.nn.functional.cross_entropy(classifier.train()(images), labels)
    classifier.zero_grad()
    wanted.backward()
    same(value, wanted)
    for name, parameter in classifier.named_parameters():
        same(slopes[name], parameter.grad, 2e-4)
    after = classifier.eval().state_dict()
    theirs.cache_clear()  # this one has learned
    assert statistics.keys() == fixed.keys()
    for name, found in statistics.items():
        same(found, after[name])
        assert jnp.abs(found - weights[name]).max() > 0


def test_padding_counts_in_statistics_as_zeros_do():
    swin, images = theirs(None), models.images(2, (16, 16))
    valid = torch.ones(2, 16, 16, dtype=torch.bool)
    valid[:, 9:] = False
    weights = from_torch(swin)
    _, found = jax.jit(ours(None).in_training)(weights, images_of(images), valid=array(valid))
    with torch.no_grad():
        swin.train()(images, valid=valid)
    after = swin.eval().state_dict()
    theirs.cache_clear()
    for name, value in found.items():
        same(value, after[name])


@pytest.mark.parametrize("plan", SWINS.values(), ids=SWINS)
def test_weights_have_the_names_and_shapes_of_pytorch(plan):
    for kind, options in (("SwinClassifier", {"classes": 5}), ("SwinBackbone", {})):
        made = jax.eval_shape(getattr(tej.models, kind)(ours(plan, (3, 5)), **options).init, jax.random.key(0))
        wanted = getattr(tet.models, kind)(theirs(plan, (3, 5)), **options).state_dict()
        assert {name: value.shape for name, value in made.items()} == {
            name: tuple(value.shape) for name, value in wanted.items()
        }


def test_new_weights_are_drawn_as_those_of_pytorch():
    sizes = {"width": 16, "depths": (1, 1, 1, 1), "heads": (1, 1, 1, 1), "plan": None}
    found = tej.models.Swin(**sizes).init(jax.random.key(0))
    torch.manual_seed(0)
    for name, value in tet.models.Swin(**sizes).state_dict().items():
        drawn, wanted = np.asarray(found[name], dtype=np.float32), value.float().numpy()
        assert drawn.mean() == pytest.approx(wanted.mean(), abs=3e-2 if "stem" in name else 8e-3), name
        assert drawn.std() == pytest.approx(wanted.std(), rel=0.25), name


@pytest.mark.parametrize("build", ["swin_small", "swin_base"])
def test_parameters_and_multiply_adds_are_the_published_ones(build):
    parameters, wanted = next(numbers for known, numbers in PUBLISHED.items() if known.__name__ == build)
    layer = tej.models.SwinClassifier(getattr(tej.models, build)(), classes=1000)
    weights = jax.eval_shape(layer.init, jax.random.key(0))
    learned = [value for name, value in weights.items() if name.rpartition(".")[2] not in STATISTICS]
    assert sum(value.size for value in learned) == pytest.approx(parameters * 1e6, rel=1e-4)
    found = multiply_adds(layer.__call__, weights, jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32))
    assert found == pytest.approx(wanted * 1e9, rel=5e-3)


def test_layers_are_dropped_by_the_rates_of_pytorch_and_only_with_a_key():
    for plan in SWINS.values():
        network = tej.models.Swin(plan=plan, drop_path=0.5)
        found = [rate for stage in network.stages for layer in stage for rate in np.ravel(layer.drop_path)]
        assert found == pytest.approx([0.5 * number / 23 for number in range(24)])
    network = tej.models.Swin(width=4, depths=(1, 1, 1, 1), heads=(1, 1, 1, 1), plan=None, drop_path=0.9)
    run, weights = jax.jit(network), network.init(jax.random.key(0))
    images = images_of(models.images(4, (16, 16)))
    one, other = (run(weights, images, key=jax.random.key(seed)) for seed in (0, 1))
    assert not jnp.array_equal(one[-1].features, other[-1].features)


def test_images_are_dropped_whole_and_only_with_a_key():
    block, map = (
        tej.models.SwinBlock(4, 1, window=(2, 2), drop_path=0.5),
        jax.random.normal(jax.random.key(1), (32, 3, 3, 4)),
    )
    weights = block.init(jax.random.key(0))
    run = jax.jit(block)
    still = (run(weights, map, key=jax.random.key(2)) == map).all(axis=3)
    np.testing.assert_array_equal(still.all(axis=(1, 2)), still.any(axis=(1, 2)))
    assert 0.05 < still[:, 0, 0].mean() < 0.5  # a quarter: both halves are dropped
    assert not (run(weights, map) == map).all(axis=3).any()


@pytest.mark.usefixtures("unchecked")
def test_an_empty_batch_is_one():
    block = tej.models.SwinBlock(8, 2, window=(3, 3), shift=(1, 1))
    weights = block.init(jax.random.key(0))
    for size in ((3, 3), (4, 5)):
        assert block(weights, jnp.zeros((0, *size, 8))).shape == (0, *size, 8)


@pytest.mark.usefixtures("unchecked")
def test_what_does_not_fit_is_named():
    weights = from_torch(theirs(None))
    for call, message in (
        (lambda: tej.models.Swin(depths=(2, 2, 8, 2)), "`depths` must have a multiple of 6 blocks in the third stage"),
        (lambda: tej.models.Swin(drop_path=1.0), r"`drop_path` must be a share in \[0, 1\), got 1.0"),
        (lambda: tej.models.Swin(heads=(3, 6, 12, 25)), "`heads` must divide the width, 768, got 25"),
        (lambda: tej.models.SwinBlock(8, 3), "`heads` must divide the width, 8, got 3"),
        (
            lambda: tej.models.SwinBlock(8, 2, window=7),
            "`window` must be two whole numbers from 1 up, rows and columns, got 7",
        ),
        (lambda: tej.models.Swin(window=(0, 7)), r"`window` must be two whole numbers .*, got \(0, 7\)"),
        (
            lambda: ours(None)(weights, jnp.zeros((1, 32, 48, 3)), valid=jnp.ones((1, 48, 32), bool)),
            r"`valid` must have shape \(1, 32, 48\), got shape \(1, 48, 32\)",
        ),
        (
            lambda: ours(None)(weights, jnp.zeros((1, 3, 32, 32))),
            r"`images` must have shape \(images, height, width, 3\), got shape \(1, 3, 32, 32\)",
        ),
    ):
        with pytest.raises(TokenExitError, match=message):
            call()
