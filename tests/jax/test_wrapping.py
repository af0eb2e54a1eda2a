"""`wrap` refuses what it cannot serve, and `check` finds parts that do not keep their word."""

import dataclasses
import re
from dataclasses import dataclass

import jax
import numpy as np
import pytest
from jax import numpy as jnp

import tokenexit_jax as tej
from tests.jax import networks
from tests.jax.networks import images_of, pair
from tests.torch import models
from tokenexit import TokenExitError, schedule
from tokenexit.heads import ATM
from tokenexit.policies import Policy
from tokenexit.schedule import Exit, Schedule
from tokenexit_jax.networks import checks


def two_images():
    return images_of(models.images(2, networks.SIZE))


def broken(**changes):
    """A network of which the second block, or another part, is not what it should be."""
    network = networks.plain_network(depth=2, placed=True)
    block = changes.pop("block", None)
    if block is not None:
        changes["blocks"] = (network.blocks[0], lambda *given: block(network.blocks[1], *given))
    return tej.wrap(dataclasses.replace(network, **changes), schedule.dense(after=(1,)), classes=5)


def shortened(model):
    network = dataclasses.replace(model.network, blocks=model.network.blocks[:2])
    return tej.wrap(network, schedule.dense(after=(1,)), classes=5)


def params():
    return pair("plain").params


@pytest.mark.parametrize("kind", ["timm, registers", "plain", "placed"])
def test_networks_that_keep_their_word_pass(kind):
    both = pair(kind)
    tej.check(shortened(both.model), both.params, two_images())


def test_the_blocks_are_compared_with_the_network_as_a_whole():
    both = pair("timm")
    model = shortened(both.model)

    def dense(params, images):
        every = model.network
        embedded = every.embed(params, images)
        tokens = embedded.tokens
        for block in every.blocks:
            tokens = block(params, tokens, jnp.ones(tokens.shape[:2]), None)
        return every.finish(params, tokens)

    tej.check(model, both.params, two_images(), dense=dense)
    with pytest.raises(TokenExitError, match="`network` must give the same tokens as `dense`"):
        tej.check(model, both.params, two_images(), dense=lambda *given: 1.1 * dense(*given))


BLOCK = "`network.blocks[1]` must "


@pytest.mark.parametrize(("changes", "message"), [
    ({"block": lambda run, p, x, c, at: run(p, x, jnp.ones_like(c), at)}, BLOCK + "attend to no entry whose `counts` is 0"),
    ({"block": lambda run, p, x, c, at: run(p, x, jnp.minimum(c, 1), at)}, BLOCK + "attend to an entry as often as `counts`"),
    ({"block": lambda run, p, x, c, at: run(p, x + jnp.arange(x.shape[1])[None, :, None], c, at)}, BLOCK + "treat tokens as a set"),
    ({"block": lambda run, p, x, c, at: run(p, x + x.mean(axis=0, keepdims=True), c, at)}, BLOCK + "treat each image by itself"),
    ({"block": lambda run, p, x, c, at: run(p, x, c, at)[..., :8]}, BLOCK + "give tokens of shape (2, 10, 32), got (2, 10, 8)"),
    ({"block": lambda run, p, x, c, at: (run(p, x, c, at), c)}, BLOCK + "give tokens of shape (2, 10, 32), got tuple"),
    ({"block": lambda run, p, x, c, at: run(p, x, c, at) * jnp.nan}, BLOCK),
    ({"finish": lambda p, x: x - x.mean(axis=1, keepdims=True)}, "`network.finish` must treat each token by itself"),
    ({"width": 31}, "`network.width` must be the 32 channels of its tokens, got 31"),
    ({"embed": lambda p, x: tej.Embedded(jnp.ones((2, 20, 32)), 1, (4, 5))}, "`network.embed` must give 1 prefix tokens and a grid of 4 x 5, got 20 tokens"),
    ({"embed": lambda p, x: tej.Embedded(jnp.ones((2, 20, 32)), 0, (4, 5), jnp.ones(3))}, "`network.embed` must give positions for 20 slots, got shape (3,)"),
])  # fmt: skip
@pytest.mark.usefixtures("unchecked")
def test_a_part_that_does_not_keep_its_word_is_named(changes, message):
    with pytest.raises(TokenExitError, match=re.escape(message)):
        tej.check(broken(**changes), params(), two_images())


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("block", [
    lambda run, p, x, c, at: x,
    lambda run, p, x, c, at: x + 1e-3 * (run(p, x, jnp.ones_like(c), at) - x),  # it would attend to what is no token
])  # fmt: skip
def test_parameters_that_let_a_block_do_nothing_show_nothing_of_it(block):
    message = (
        "`params` must let network.blocks[1] change its tokens, some channel by more than 0.005 of its size, or not"
    )
    with pytest.raises(TokenExitError, match=re.escape(message)):
        tej.check(broken(block=block), params(), two_images())


@pytest.mark.parametrize("wrong", [jnp.nan, jnp.inf])
def test_what_is_not_finite_is_not_the_fault_of_the_network(wrong):
    model = broken()
    damaged = params() | {
        "blocks.1.mlp.0.bias": params()["blocks.1.mlp.0.bias"].at[3].set(wrong),
        "step": jnp.zeros((), int),
    }
    message = "`params` must be finite, got NaN or infinity in ['blocks.1.mlp.0.bias']"
    with pytest.raises(TokenExitError, match=re.escape(message)):
        tej.check(model, damaged, two_images())
    with pytest.raises(TokenExitError, match="`images` must be finite, got NaN or infinity in it"):
        tej.check(model, params(), two_images().at[1, 2, 3].set(wrong))


def test_a_grid_whose_height_and_width_are_exchanged_is_seen_where_images_tell():
    model = broken()
    embed = model.network.embed

    def exchanged(params, images):
        known = embed(params, images)
        return dataclasses.replace(known, grid=known.grid[::-1])

    turned = tej.wrap(dataclasses.replace(model.network, embed=exchanged), schedule.dense(after=(1,)), classes=5)
    message = (
        "`network.embed` must give height and width of the grid in this order, got 5 x 4 for images of shape (2, 32,"
    )
    with pytest.raises(TokenExitError, match=re.escape(message)):
        tej.check(turned, params(), two_images())

    # Patches of 8 x 16 pixels, of which no square ones can be made.
    def coarse(params, images):
        known = embed(params, images)
        return dataclasses.replace(known, tokens=known.tokens[:, ::2], positions=known.positions[::2], grid=(4, 3))

    wide = dataclasses.replace(model.network, embed=coarse)
    tej.check(tej.wrap(wide, schedule.dense(after=(1,)), classes=5), params(), images_of(models.images(2, (32, 48))))


@pytest.mark.usefixtures("unchecked")
def test_a_block_that_gives_more_than_tokens_is_named_at_the_call():
    model = broken(block=lambda run, p, x, c, at: (run(p, x, c, at), c))
    heads = model.init(jax.random.key(0))
    message = r"`network.blocks\[1\]` must give tokens of shape \(2, (5|20), 32\), got tuple"
    with pytest.raises(TokenExitError, match=message):
        model(params(), heads, two_images())
    with pytest.raises(TokenExitError, match=message):
        model.compiled(params(), heads, two_images(), schedule.truncated(after=1))


@pytest.mark.usefixtures("unchecked")
def test_a_head_of_ones_own_with_other_classes_is_named_at_the_call():
    network = networks.plain_network(depth=2)
    head = lambda params, tokens: tokens[..., :4]  # noqa: E731
    for plan in (schedule.dense(after=(1,)), schedule.dtop(after=(1,))):
        model = tej.wrap(network, plan, classes=5, head=head)
        with pytest.raises(
            TokenExitError, match=r"`head` must give 5 classes, logits of shape \(2, (5|20), 5\), got \(2, (5|20), 4\)"
        ):
            model.compiled(params(), model.init(jax.random.key(0)), two_images())


def test_a_head_of_ones_own_reads_each_token_by_itself_and_belongs_to_the_network():
    both = pair("timm")

    def head(params, tokens):
        return tokens @ params["blocks.0.attn.proj.weight"][:, :5]

    network = shortened(both.model).network
    own = tej.wrap(network, schedule.truncated(after=1), classes=5, head=head)
    tej.check(own, both.params, two_images())
    heads = own.init(jax.random.key(1))
    assert [*heads] == ["exit_heads"]
    assert own.every_exit(both.params, heads, two_images())[2].shape == (2, 4, 5, 5)
    assert own.cost(both.params, two_images()).head.per_token == 48 * 5
    mixing = dataclasses.replace(own, head=lambda params, x: head(params, x - x.mean(axis=1, keepdims=True)))
    with pytest.raises(TokenExitError, match="`head` must treat each token by itself"):
        tej.check(mixing, both.params, two_images())
    with pytest.raises(TokenExitError, match="`head` must give 4 classes, got 5"):
        tej.check(dataclasses.replace(own, classes=4), both.params, two_images())


def test_heads_are_random_and_differ():
    model = tej.wrap(networks.timm_network(), schedule.dtop(after=(1, 2)), classes=5)
    heads = model.init(jax.random.key(0))
    assert sorted(heads) == ["exit_heads", "head"]
    first, second = (heads["exit_heads"][after]["1.weight"] for after in ("1", "2"))
    assert not jnp.array_equal(first, second)
    assert not jnp.array_equal(first, heads["head"]["1.weight"])


@dataclass(frozen=True)
class Foreign(Policy):
    def leaves(self, evidence):
        return evidence.label == 0


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("plan", "options", "message"), [
    ("dtop", {}, "`schedule` must be a tokenexit.schedule.Schedule, got 'dtop'"),
    (schedule.dtop(after=(2, 5)), {}, "`schedule` must have exits after blocks 1 to 4 only, for 5 blocks, got [5]"),
    (schedule.neighbours(), {}, "for 5 blocks, got [6, 8]: `schedule.neighbours(depth=5)` has such, or name others by `radius`"),
    (schedule.dense(), {"classes": 0}, "`classes` must be a whole number from 1 to 1,000,000, got 0"),
    (schedule.dense(), {"exit_heads": {}}, "`exit_heads` must be a plan of tokenexit.heads, got {}"),
    (schedule.dense(), {"head": 3}, "`head` must be None or a function, got 3"),
    (schedule.dense(), {"head": len, "exit_heads": ATM()}, "`head` must be None beside mask heads"),
    (schedule.dense(), {"classes": True}, "`classes` must be a whole number from 1 to 1,000,000, got True"),
    (schedule.dtop(after=(2,)), {"capacities": 0.5}, "at most 1, in a tuple such as (0.5, 1.0), got 0.5"),
    (schedule.dtop(after=(2,)), {"capacities": (True,)}, "in a tuple such as (0.5, 1.0), got (True,)"),
    (schedule.dtop(after=(2,)), {"capacities": "1"}, "in a tuple such as (0.5, 1.0), got '1'"),
    (schedule.dtop(after=(2,)), {"capacities": {"2": (1.0,), 2: (1.0,)}}, "or for each of the blocks (2,)"),
    (schedule.dtop(after=(2,)), {"capacities": ()}, "`capacities` must be one or more fractions"),
    (schedule.dtop(after=(2,)), {"capacities": (0.0, 1.0)}, "`capacities` must be one or more fractions, greater than 0"),
    (schedule.dtop(after=(2,)), {"capacities": {3: (1.0,)}}, "`capacities` must be fractions for all exits, or for each of the blocks (2,)"),
    (Schedule((Exit(2, Foreign()),)), {}, "`schedule` must have policies that are pytrees (`register`), got [Foreign()]"),
])  # fmt: skip
def test_what_cannot_be_wrapped_is_named(plan, options, message):
    with pytest.raises(TokenExitError, match=re.escape(message)):
        tej.wrap(networks.timm_network(), plan, **{"classes": 5, **options})


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("capacities", [
    [0.5, 1.0], (np.float32(0.5), np.float64(1.0)), (0.5, np.int64(1)), {np.int64(2): [0.5, 1]},
])  # fmt: skip
def test_numbers_of_numpy_and_lists_are_as_good_as_a_tuple(capacities):
    network, plan = networks.timm_network(), schedule.dtop(after=(2,))
    model = tej.wrap(network, plan, classes=np.int64(5), capacities=capacities)
    assert model == tej.wrap(network, plan, classes=5, capacities=(0.5, 1.0))
    assert hash(model) == hash(tej.wrap(network, plan, classes=5, capacities=(0.5, 1.0)))
    assert type(model.classes) is int
    assert {type(one) for one in model.capacities[0]} == {float}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("changes", "message"), [
    ({"blocks": (lambda p, x, c, at: x, lambda p, x: x)}, "`blocks[1]` must take (params, tokens, counts, positions), got (p, x)"),
    ({"embed": lambda images: images}, "`embed` must take (params, images), got (images)"),
    ({"finish": lambda p, x, *, epsilon: x}, "`finish` must take (params, tokens), got (p, x, *, epsilon)"),
    ({"embed": None}, "`embed` must be a function, got None"),
    ({"blocks": ()}, "`blocks` must be a tuple of functions, one for each block, got ()"),
    ({"blocks": [len]}, "`blocks` must be a tuple of functions"),
    ({"width": 2.0}, "`width` must be a whole number from 1 up, got 2.0"),
])  # fmt: skip
def test_what_is_no_network_is_named(changes, message):
    with pytest.raises(TokenExitError, match=re.escape(message)):
        dataclasses.replace(networks.timm_network(), **changes)
    with pytest.raises(TokenExitError, match=r"`network` must be a tokenexit_jax.Network \(.*\), got str"):
        tej.wrap("vit", classes=5)


@pytest.mark.usefixtures("unchecked")
def test_what_has_no_price_is_named():
    with pytest.raises(TokenExitError, match=re.escape("`network.blocks[1]` must attend over 32 channels")):
        broken(block=lambda run, p, x, c, at: x).cost(params(), two_images())


def test_gates_are_where_they_were_published_at_any_depth():
    for depth, first in ((5, 1), (6, 2)):
        model = tej.wrap_gates(networks.plain_network(depth=depth))
        assert model.schedule == schedule.svit(after=range(first, depth))


@pytest.mark.usefixtures("unchecked")
def test_what_is_no_network_is_told_where_one_is_made():
    for wrap in (
        lambda given: tej.wrap(given, classes=5),
        tej.wrap_gates,
        lambda given: tej.wrap_semantic(given, after=1, until=None, heads=2),
    ):
        with pytest.raises(
            TokenExitError, match=r"`network` must be a tokenexit_jax.Network \(docs/howto/jax.md; .*got int"
        ):
            wrap(3)


@pytest.mark.usefixtures("unchecked")
def test_parts_that_fail_at_what_they_are_given_are_named():
    model = broken()

    def fixed(params, images):
        return tej.Embedded(images.reshape(2, -1, 32)[:, :20] + jnp.ones((1, 7, 32)), 0, (4, 5))

    with pytest.raises(
        TokenExitError, match=r"`network.embed` must take these images, float32\[2, .*, got the error: "
    ) as caught:
        tej.check(broken(embed=fixed), params(), two_images())
    assert isinstance(caught.value.__cause__, TypeError | ValueError)
    branching = lambda params, images: images if images.sum() > 0 else None  # noqa: E731
    with pytest.raises(jax.errors.TracerBoolConversionError):  # JAX's own words say what to do
        jax.jit(lambda images: checks.embed(broken(embed=branching).network, params(), images))(two_images())
    head = lambda params, tokens: tokens @ jnp.ones((7, 5))  # noqa: E731
    own = tej.wrap(model.network, schedule.dense(after=(1,)), classes=5, head=head)
    with pytest.raises(
        TokenExitError, match=r"`head` must take tokens of shape \(images, tokens, 32\), .*got the error"
    ):
        tej.check(own, params(), two_images())


def test_pixels_that_were_not_normalised_are_warned_of():
    with pytest.warns(UserWarning, match="`images` should be normalised as in training: .*, got values beyond 20"):
        tej.check(broken(), params(), 255 * jnp.abs(two_images()))
