"""Bad input is named: an argument, a rule and a value, and no error of JAX that names none of them."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
from jax import numpy as jnp

import tokenexit_jax as tej
from tests.jax import networks
from tests.jax.gated import gated
from tests.jax.networks import images_of, pair
from tests.torch import models
from tokenexit import TokenExitError, schedule
from tokenexit.heads import ATM, MLP
from tokenexit.semantic import SemanticPlan
from tokenexit_jax import heads
from tokenexit_jax.models import swin, vit, weights
from tokenexit_jax.semantic import layers as semantic

NETWORK, PLAN = networks.timm_network(), schedule.dtop(after=(2,))
# Of NumPy, for JAX must not begin where a file is only collected: its threads are in the way of forks.
LOGITS, LABEL = np.zeros((1, 2, 2, 3), np.float32), np.zeros((1, 4, 4), np.int32)
ONE = np.zeros((1, 2, 2, 1), np.float32)


@functools.cache
def key():
    return jax.random.key(0)


@functools.cache
def two_images():
    return images_of(models.images(2, networks.SIZE))


def small_swin(**options):
    return swin.Swin(width=8, depths=(1, 1, 1, 1), heads=(1, 1, 1, 1), plan=None, **options)


def run(images):
    both = pair("timm")
    return both.model(both.params, both.heads, images)


def run_compiled(images):
    both = pair("timm")
    return both.model.compiled(both.params, both.heads, images)


def run_gated(images, way="__call__"):
    both = gated()
    return getattr(both.model, way)(both.params, both.gates, images)


def output():
    one = jnp.zeros((1, 2), dtype=int)
    return tej.Output(LOGITS, LABEL[:, :2, :2], one, one, one[:, 0], (2,), "running")


def sampled(**options):
    both = gated()
    return tej.sampled(both.model, both.params, both.gates, two_images(), **({"key": key(), "rates": 0.5} | options))


def thresholds(images, **options):
    both = gated()
    return tej.gate_thresholds(both.model, both.params, both.gates, images, **({"rates": 0.5} | options))


def with_embed(embed):
    network = dataclasses.replace(NETWORK, embed=embed)
    model = tej.wrap(network, schedule.dense(), classes=5)
    return model.compiled(pair("timm").params, pair("timm").heads | {"exit_heads": {}}, two_images())


def cross(image):
    return jnp.zeros((1, 3, 1, 2)), jnp.zeros((1, 3, 1, 2)), image


BAD = {
    # one logit has no confidence
    "one class": (lambda: tej.wrap(NETWORK, PLAN, classes=1), "`classes` must be at least 2: use two logits"),
    "too many classes": (lambda: tej.wrap(NETWORK, PLAN, classes=10**9), "`classes` must be a whole number from 1 to 1,000,000"),
    "no class for masks": (lambda: tej.wrap(NETWORK, PLAN, classes=0, exit_heads=ATM()), "`classes` must be a whole number"),
    "a head of no class": (lambda: heads.init(MLP(), key(), width=4, classes=0), "`classes` must be a whole number from 1"),
    "a head of no width": (lambda: heads.init(MLP(), key(), width=0, classes=2), "`width` must be a whole number from 1"),
    "a classifier of no class": (lambda: swin.SwinClassifier(small_swin(), classes=0), "`classes` must be a whole number"),
    "cross-entropy of one class": (lambda: tej.pixel_cross_entropy(ONE, LABEL), "`logits` must have two classes at least: use two logits"),
    "a teacher of one class": (lambda: tej.distillation(ONE, ONE), "`logits` must have two classes at least"),
    # images
    "images None": (lambda: run(None), "`images` must be an array of JAX or NumPy whose first axis is the images"),
    "images in a list": (lambda: run([two_images()[0]] * 2), "(`numpy.stack` makes one of a list), got list"),
    "images a text": (lambda: run_compiled("street.png"), "`images` must be an array of JAX or NumPy"),
    "images a number": (lambda: run_compiled(jnp.zeros(())), "`images` must be an array of JAX or NumPy"),
    "gated images None": (lambda: run_gated(None), "`images` must be an array"),
    "masked images None": (lambda: run_gated(None, "masked"), "`images` must be an array"),
    "check without images": (lambda: tej.check(pair("timm").model, pair("timm").params, None), "`images` must be an array of JAX or NumPy, got None"),
    "dense no function": (lambda: tej.check(pair("timm").model, pair("timm").params, two_images(), dense=3), "`dense` must be None or a function"),
    "one image of a ViT": (lambda: nnx_vit()(jnp.zeros((16, 16, 3))), "`images` must have shape (images, 16, 16, 3), got (16, 16, 3)"),
    "no image of a ViT": (lambda: nnx_vit()(None), "`images` must be an array of JAX or NumPy, got None"),
    "one image of a Swin": (lambda: small_swin()({}, jnp.zeros((8, 8, 3))), "`images` must be an array of JAX or NumPy of shape (images, height, width, channels)"),
    "tokens of two axes": (lambda: with_embed(lambda p, x: tej.Embedded(jnp.zeros((20, 48)), 0, (4, 5))), "`network.embed` must give floating tokens of shape (images, slots, width), got shape (20, 48), float32, for images of shape (2, 32, 40, 3)"),
    "whole tokens": (lambda: with_embed(lambda p, x: tej.Embedded(jnp.zeros((2, 20, 48), int), 0, (4, 5))), "`network.embed` must give floating tokens"),
    "no grid": (lambda: with_embed(lambda p, x: tej.Embedded(jnp.zeros((2, 20, 48)), 0, None)), "height and width of the grid, got prefix=0, grid=None"),
    # plans
    "threshold a text": (lambda: pair("timm").model.retuned(threshold="0.9"), "`threshold` must be one threshold for all exits"),
    "threshold in a list": (lambda: pair("timm").model.retuned(threshold=[0.9]), "`threshold` must be one threshold for all exits"),
    "threshold a text in an array": (lambda: schedule.dtop(threshold=np.array("0.9")), "`threshold` must be a number in [0, 1]"),
    "threshold too large": (lambda: schedule.dtop(threshold=10**400), "`threshold` must be in [0, 1]"),
    "plan a text": (lambda: pair("timm").model.retuned("dtop", threshold=0.9), "`schedule` must be a tokenexit.schedule.Schedule, got 'dtop'"),
    "gated plan a text": (lambda: gated().model.retuned("svit", threshold=0.9), "`schedule` must be a tokenexit.schedule.Schedule"),
    "taps a number": (lambda: tej.wrap_gates(NETWORK, schedule.svit(after=(2,)), taps=3), "`taps` must be several blocks"),
    "epsilon too large": (lambda: tej.wrap_semantic(NETWORK, after=1, until=None, heads=3, epsilon=10**400), "`epsilon` must be a positive number"),
    # weights and keys
    "heads None": (lambda: pair("timm").model(pair("timm").params, None, two_images()), "`heads` must be of the model"),
    "layers None": (lambda: semantic_model()({}, None, two_images()), "`layers` must be weights by name, as `init` makes them, got NoneType"),
    "no key": (lambda: pair("timm").model.init(None), "`key` must be a random key, as `jax.random.key(0)`, got None"),
    "a seed for a key": (lambda: gated().model.init(0), "`key` must be a random key, as `jax.random.key(0)`, got int"),
    "a Swin without a key": (lambda: small_swin().init(None), "`key` must be a random key"),
    "weights of no file": (lambda: weights.read(None), "`file` must be a path, got NoneType"),
    "a ViT of no weights": (lambda: vit.load(vit.Config((16, 16)), None), "`weights` must be arrays by name"),
    "a ViT of no plan": (lambda: vit.load(None, {}), "`config` must be a tokenexit_jax.models.vit.Config"),
    "parts of no ViT": (lambda: vit.split(None), "`model` must be a tokenexit_jax.models.vit.ViT"),
    "split None": (lambda: tej.split(None), "`heads` must be weights by name"),
    "merge None": (lambda: tej.merge({}, None), "`statistics` must be weights by name"),
    # losses
    "labels None": (lambda: tej.pixel_cross_entropy(LOGITS, None), "`label` must be an array of JAX or NumPy, got None"),
    "logits of three axes": (lambda: tej.pixel_cross_entropy(LOGITS[0], LABEL), "`logits` must be an array of JAX or NumPy of shape (images, grid_height, grid_width, classes)"),
    "ignore None": (lambda: tej.pixel_cross_entropy(LOGITS, LABEL, ignore=None), "`ignore` must be a whole number, got None"),
    "teacher None": (lambda: tej.distillation(LOGITS, None), "`teacher` must be an array"),
    "temperature None": (lambda: tej.distillation(LOGITS, LOGITS, temperature=None), "`temperature` must be positive, got None"),
    "temperature without end": (lambda: tej.distillation(LOGITS, LOGITS, temperature=10**400), "`temperature` must be positive"),
    "masks None": (lambda: tej.mask_loss(None, LABEL), "`maps` must be masks and presence"),
    "focal a text": (lambda: tej.mask_loss(tej.heads.MaskMaps(LOGITS, jnp.zeros((1, 3))), LABEL, focal="20"), "`focal` must be a number"),
    # what comes of it
    "size None": (lambda: output().upsample(None), "`size` must be a height and a width"),
    "size of nothing": (lambda: output().upsample((0, 4)), "`size` must be a height and a width"),
    "cost None": (lambda: output().multiply_adds(None), "`cost` must be what `model.cost` gives, got NoneType"),
    # gates
    "a share too large": (lambda: sampled(rates=10**400), "`rates` must be numbers in [0, 1]"),
    "rates of mixed names": (lambda: sampled(rates={1: 0.5, "2": 0.5}), "`rates` must be one number, or one for each gate"),
    "random None": (lambda: sampled(random=None), "`random` must be a share in [0, 1], got None"),
    "temperature a text": (lambda: sampled(temperature="1"), "`temperature` must be positive, got '1'"),
    "drawn by no key": (lambda: sampled(key=None), "`key` must be a random key"),
    "images of thresholds None": (lambda: thresholds(None), "`images` must be an array, or batches, got NoneType"),
    "pairs of a loader": (lambda: thresholds([(two_images(), LABEL)]), "`images` must be an array of JAX or NumPy, got tuple"),
    "progress None": (lambda: thresholds(two_images(), progress=None), "`progress` must be a function"),
    # layers
    "counts None": (lambda: tej.attend(*cross(jnp.zeros((1, 3, 1, 2))), None), "`counts` must be an array of JAX or NumPy of shape (images, entries)"),
    "too few counts": (lambda: tej.attend(*cross(jnp.zeros((1, 3, 1, 2))), jnp.ones((1, 2))), "`counts` must have one entry for each key, (1, 3)"),
    "no plan": (lambda: semantic.SemanticTokens(None, width=8, heads=1), "`plan` must be a tokenexit.semantic.SemanticPlan"),
    "width None": (lambda: semantic.CrossBlock(None, 1), "`width` must be a whole number from 1"),
    "drop path None": (lambda: semantic.CrossBlock(8, 1, drop_path=None), "`drop_path` must be a share in [0, 1), got None"),
    "depths of three stages": (lambda: swin.Swin(depths=(2, 2, 6)), "`depths` must be four whole numbers from 0 up, one for each stage"),
    "depths None": (lambda: swin.Swin(depths=None), "`depths` must be four"),
}  # fmt: skip


def nnx_vit():
    return vit.ViT(vit.Config((16, 16), width=8, depth=1, heads=1), rngs=vit.nnx.Rngs(0))


def semantic_model(plan=SemanticPlan(window=None, tokens=(2, 2), neighbourhood=None, residual=True, layer_scale=None)):
    return tej.wrap_semantic(NETWORK, plan, after=1, until=None, heads=3)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_named(call, message):
    with pytest.raises(TokenExitError, match=re.escape(message)):
        call()


@pytest.mark.usefixtures("unchecked")
def test_masks_may_be_of_one_class():
    assert tej.wrap(NETWORK, PLAN, classes=1, exit_heads=ATM()).classes == 1


def test_a_batch_without_images_gives_none():
    out = run(two_images()[:0])
    assert out.logits.shape == (0, 4, 5, 5)
    assert run_gated(two_images()[:0]).logits.shape == (0, 4, 5, 5)


@pytest.mark.parametrize(("changes", "message"), [
    ({"tokens": (5, 5)}, "`plan` must make no more semantic tokens than the 20 places of its windows on a grid of 4 x 5 (`tokens`, `window`), got 25"),
    ({"neighbourhood": (1000, 1000), "window": (2, 2), "tokens": (1, 1), "edges": "beyond"}, "`neighbourhood` must hold at most 1,000,000 places in the 6 windows of a grid of 4 x 5"),
])  # fmt: skip
def test_a_plan_that_a_grid_has_no_room_for_is_refused_before_anything_runs(changes, message):
    model = semantic_model(dataclasses.replace(semantic_model().plan, **changes))
    layers = jax.eval_shape(model.init, key())  # no weights: nothing could run
    with pytest.raises(TokenExitError, match=re.escape(message)):
        jax.eval_shape(model, pair("timm").params, layers, two_images())
    with pytest.raises(TokenExitError, match=re.escape(message)):
        model.multiply_adds(pair("timm").params, two_images())
