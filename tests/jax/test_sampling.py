"""Training with gates: drawn as PyTorch draws, with its slopes; calibrated as there; and a network that learns."""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import numpy as np
import optax
import pytest
import torch
from jax import numpy as jnp

import tokenexit_jax as tej
import tokenexit_torch as tet
from tests.jax import gated as pairs
from tests.jax import networks
from tests.jax.gated import gated
from tests.jax.parity import from_torch, same
from tests.torch import models
from tokenexit import TokenExitError, policies, schedule
from tokenexit.carries import Preserved
from tokenexit.heads import FCN
from tokenexit.schedule import Schedule

SVIT = schedule.svit(after=pairs.AFTER)
RATES = {1: 0.7, 2: 0.5, 3: 0.3}
OPTIONS = {
    "published": (Preserved(), {}),
    "inherited, detached, cool": (Preserved("never"), {"gate_input": "detached", "temperature": 0.5}),
    "all are keys, random": (Preserved(keys="all"), {"random": 0.4}),
}


def shown(count=3):
    images = models.images(count, networks.SIZE)
    return images, networks.images_of(images)


@pytest.fixture
def drawn_there(monkeypatch):
    """Lets JAX draw the numbers that PyTorch's generator would draw, one gate after the other."""

    def use(seed):
        generator, genuine = torch.Generator().manual_seed(seed), jax.random.uniform

        def uniform(key, shape, dtype=None, **bounds):
            if bounds:  # weights
                return genuine(key, shape, **bounds)
            assert dtype == jnp.float32
            return jnp.asarray(torch.rand(shape, generator=generator).numpy())

        monkeypatch.setattr(jax.random, "uniform", uniform)
        return torch.Generator().manual_seed(seed)

    return use


def our_loss(drawn):
    return jnp.square(drawn.output.logits).mean() + 4 * drawn.ratio_loss()


@pytest.mark.parametrize(("carry", "options"), OPTIONS.values(), ids=OPTIONS.keys())
def test_drawn_with_the_same_numbers_decisions_loss_and_slopes_are_those_of_pytorch(carry, options, drawn_there):
    both, plan, (theirs, ours) = gated(), Schedule(SVIT.exits, carry), shown()
    generator = drawn_there(3)
    both.theirs.zero_grad()
    wanted = tet.Sampled(both.theirs, rates=RATES, **options)(theirs, generator=generator, schedule=plan)
    wanted_loss = wanted.output.logits.square().mean() + 4 * wanted.ratio_loss()
    wanted_loss.backward()

    def loss(trained, images):
        params, gates = trained
        drawn = tej.sampled(both.model, params, gates, images, plan, key=jax.random.key(0), rates=RATES, **options)
        return our_loss(drawn), drawn

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, drawn), (for_params, for_gates) = step((both.params, both.gates), ours)
    assert 0.2 < np.mean(drawn.keep) < 0.8
    np.testing.assert_array_equal(drawn.keep, wanted.keep.detach())
    np.testing.assert_array_equal(drawn.output.keep, wanted.output.keep)
    np.testing.assert_array_equal(drawn.output.tokens_per_block, wanted.output.tokens_per_block)
    same(drawn.rates, wanted.rates)
    same(drawn.output.logits, wanted.output.logits.detach().movedim(1, -1))
    for of_each in ("batch", "image"):
        same(drawn.ratio_loss(of_each=of_each), wanted.ratio_loss(of_each=of_each).detach())
    valid = np.random.default_rng(0).random((3, 4, 5)) > 0.3
    same(drawn.ratio_loss(valid=jnp.asarray(valid)), wanted.ratio_loss(valid=torch.from_numpy(valid)).detach())
    same(value, wanted_loss)
    found = {f"model.{name}": leaf for name, leaf in for_params.items()}
    found |= {f"gates.{after}.{name}": leaf for after, gate in for_gates.items() for name, leaf in gate.items()}
    found |= {f"head.{name}": for_params[f"classes.{name}"] for name in ("weight", "bias")}
    least = 1e-3 * max(np.abs(leaf).max() for leaf in found.values())
    for name, parameter in both.theirs.named_parameters():
        scale = max(parameter.grad.abs().max().item(), least)
        same(found[name] / scale, parameter.grad / scale, 1e-3)
    assert all(np.abs(gate["3.weight"]).max() > 0 for gate in for_gates.values())


@functools.cache
def sampler(**options):
    model = gated("plain").model
    return jax.jit(lambda params, gates, images, key: tej.sampled(model, params, gates, images, key=key, **options))


def draw(key, **options):
    both, (_, ours) = gated("plain"), shown(8)
    return sampler(**options)(both.params, both.gates, ours, jax.random.key(key))


def test_the_key_decides_and_nothing_else():
    one, again, other = draw(1, rates=0.5), draw(1, rates=0.5), draw(2, rates=0.5)
    jax.tree.map(np.testing.assert_array_equal, one, again)
    assert (np.asarray(one.keep) != np.asarray(other.keep)).any()
    # Each gate draws for itself, whichever others there are.
    first = np.asarray(one.keep)[:, 0]
    both, (_, ours) = gated("plain"), shown(8)
    alone = schedule.svit(after=(1,))
    few = jax.jit(lambda key: tej.sampled(both.model, both.params, both.gates, ours, alone, key=key, rates=0.5))
    few = few(jax.random.key(1))
    np.testing.assert_array_equal(few.keep[:, 0], first)


def test_tokens_are_kept_as_often_as_the_gate_is_sure():
    found = [draw(key, rates=0.5) for key in range(40)]
    kept = np.mean([one.keep[:, 0] for one in found], axis=0)
    sure = np.asarray(found[0].output.probability[:, 0])
    error = np.sqrt(sure * (1 - sure) / 40) + 1e-6
    assert np.abs(kept - sure).mean() < error.mean()
    assert abs(kept.mean() - sure.mean()) < 0.02


def test_a_coin_takes_all_decisions_at_the_rate():
    kept = np.mean([np.mean(draw(key, rates=0.3, random=1.0).keep) for key in range(20)])
    assert abs(kept - 0.3) < 0.03


def test_gates_read_constants_if_they_are_to():
    """With the decisions' slopes alone, by the ratio loss, blocks learn nothing of a detached gate."""
    both, (_, ours) = gated("plain"), shown()

    def slopes(gate_input):
        def loss(trained):
            params, gates = trained
            options = {"key": jax.random.key(0), "rates": 0.1, "gate_input": gate_input}
            return tej.sampled(both.model, params, gates, ours, **options).ratio_loss()

        return jax.jit(jax.grad(loss))((both.params, both.gates))

    for gate_input, reached in (("live", True), ("detached", False)):
        for_params, for_gates = slopes(gate_input)
        assert np.any(for_gates["1"]["3.weight"])
        assert np.any(for_params["blocks.0.mlp.0.weight"]) == reached


def test_batch_norms_of_gates_learn():
    network, (_, ours) = networks.plain_network(depth=3), shown()
    model = tej.wrap_gates(network, schedule.svit(after=(1, 2)), gates=FCN(6))
    learned, statistics = tej.split(model.init(jax.random.key(0)))
    program = jax.jit(
        lambda statistics: (
            tej.sampled(
                model, gated("plain").params, tej.merge(learned, statistics), ours, key=jax.random.key(0), rates=0.5
            ).statistics
        )
    )
    after = program(statistics)
    assert jax.tree.structure(after) == jax.tree.structure(statistics)
    assert all(int(one["1.num_batches_tracked"]) == 1 for one in after.values())
    assert np.any(after["2"]["1.running_mean"])


@pytest.mark.parametrize("carry", [Preserved(), Preserved("never"), Preserved(keys="all")], ids=str)
def test_thresholds_are_those_of_pytorch_and_keep_the_share(carry):
    both = gated()
    plan = Schedule(SVIT.exits, carry)
    theirs, ours = shown(10)
    model = both.model.retuned(plan)
    both.theirs.retune(plan)
    try:
        wanted = tet.gate_thresholds(both.theirs, theirs, rates=RATES, progress=iter)
    finally:
        both.theirs.retune(SVIT)
    found = tej.gate_thresholds(model, both.params, both.gates, ours, rates=RATES)
    assert (found.carry, found.after) == (carry, pairs.AFTER)
    for one, other in zip(found.exits, wanted.exits, strict=True):
        assert isinstance(one.policy, policies.GateBelow)
        assert abs(one.policy.threshold - other.policy.threshold) < 1e-6
    kept = np.asarray(model.retuned(found)(both.params, both.gates, ours).keep).mean(axis=(0, 2, 3))
    np.testing.assert_allclose(kept, [0.7, 0.5, 0.3], atol=1 / 200)


def test_thresholds_do_not_ask_for_room_and_take_batches():
    both, (_, ours) = gated(), shown(10)
    wanted = tej.gate_thresholds(both.model, both.params, both.gates, ours, rates=0.6)
    tight = dataclasses.replace(both.model, capacities=((0.25,),) * 3)
    passes = []

    def counted(batches):
        passes.append(len(batches))
        return batches

    batches = [np.asarray(ours[:8]), np.asarray(ours[8:])]
    found = tej.gate_thresholds(tight, both.params, both.gates, batches, rates=0.6, progress=counted)
    assert passes == [2, 2, 2]
    for one, other in zip(found.exits, wanted.exits, strict=True):
        assert abs(one.policy.threshold - other.policy.threshold) < 1e-6


def test_training_with_gates_learns():
    """Two bright classes on a dark ground, by patch: the loss falls, and the gates come to their rates."""
    network, params = networks.timm_network(depth=3), from_torch(models.timm_vit(depth=3, size=networks.SIZE))
    params |= {"classes.weight": jnp.zeros((3, 48)), "classes.bias": jnp.zeros(3)}
    model = tej.wrap_gates(network, schedule.svit(after=(1, 2)), head=pairs.head)
    rng = np.random.default_rng(5)
    label = np.kron(rng.integers(0, 3, (8, 4, 5)), np.ones((8, 8), int))
    pictures = (label[..., None] == np.arange(3)) + 0.3 * rng.normal(size=(*label.shape, 3))
    pictures, label = jnp.asarray(pictures, dtype=jnp.float32), jnp.asarray(label)
    optimiser = optax.adamw(2e-3)

    @jax.jit
    def step(trained, state, key):
        def loss(trained):
            drawn = tej.sampled(model, *trained, pictures, key=key, rates={1: 0.6, 2: 0.4})
            value = tej.pixel_cross_entropy(drawn.output.logits, label[:, ::2, ::2])
            return value + 4 * drawn.ratio_loss(), (value, drawn.ratio_loss())

        slopes, found = jax.grad(loss, has_aux=True)(trained)
        updates, state = optimiser.update(slopes, state, trained)
        return optax.apply_updates(trained, updates), state, found

    trained = params, model.init(jax.random.key(0))
    state, losses = optimiser.init(trained), []
    for index in range(40):
        trained, state, found = step(trained, state, jax.random.fold_in(jax.random.key(1), index))
        losses.append([float(one) for one in found])
    first, last = losses[0], np.mean(losses[-5:], axis=0)
    assert last[0] < 0.5 * first[0]
    assert last[1] < 0.2 * first[1]
    plan = tej.gate_thresholds(model, *trained, pictures, rates={1: 0.6, 2: 0.4})
    out = model.retuned(plan)(*trained, pictures)
    np.testing.assert_allclose(np.asarray(out.keep).mean(axis=(0, 2, 3)), [0.6, 0.4], atol=1 / 160)
    assert (out.upsample(label.shape[1:]).argmax(axis=-1) == label).mean() > 0.8


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("options", "message"), [
    ({"rates": {1: 0.5}}, r"`rates` must be one number, or one for each gate, after blocks \(1, 2, 3\)"),
    ({"rates": 1.5}, r"`rates` must be numbers in \[0, 1\]"),
    ({"temperature": 0.0}, "`temperature` must be positive, got 0.0"),
    ({"gate_input": "dead"}, "`gate_input` must be 'live' or 'detached', got 'dead'"),
    ({"random": 2}, r"`random` must be a share in \[0, 1\], got 2"),
])  # fmt: skip
def test_options_out_of_range_are_named(options: Mapping, message):
    both, (_, ours) = gated(), shown()
    with pytest.raises(TokenExitError, match=message):
        tej.sampled(both.model, both.params, both.gates, ours, **{"key": jax.random.key(0), "rates": 0.5, **options})
    if "rates" in options:
        with pytest.raises(TokenExitError, match=message):
            tej.gate_thresholds(both.model, both.params, both.gates, ours, rates=options["rates"])


@pytest.mark.usefixtures("unchecked")
def test_what_has_no_gates_or_images_is_named():
    both, (_, ours) = gated(), shown()
    given = both.params, both.gates
    with pytest.raises(TokenExitError, match="`model` must have gates, as `wrap_gates` gives, got int"):
        tej.sampled(3, *given, ours, key=jax.random.key(0), rates=0.5)
    with pytest.raises(TokenExitError, match="`model` must have gates, as `wrap_gates` gives, got int"):
        tej.gate_thresholds(3, *given, ours, rates=0.5)
    with pytest.raises(TokenExitError, match="`images` must hold at least one image, got none"):
        tej.gate_thresholds(both.model, *given, ours[:0], rates=0.5)
    with pytest.raises(TokenExitError, match="`images` must be batches that can be passed more than once, as a list"):
        tej.gate_thresholds(both.model, *given, iter([ours]), rates=0.5)
