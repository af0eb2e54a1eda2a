"""Gradients flow through the bookkeeping: where its functions are linear, and through the scores, against differences."""

import importlib.util

import numpy as np
import pytest

from tokenexit import ledger, scores, semantic, tokens

IMAGES, SLOTS, WIDTH = 2, 5, 3
RUNNING = np.array([[True, False, True, True, True], [True, True, False, False, True]])
LEAVE = np.array([[False, False, True, False, True], [False, True, False, False, False]])
needs_jax = pytest.mark.skipif(not importlib.util.find_spec("jax"), reason="JAX is not installed")
needs_torch = pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="PyTorch is not installed")
each_receipt = pytest.mark.parametrize("receipt", ["packing", "selection", "of a selection", "overflowing"])


def receipt_of(kind, array):
    """A receipt; in the last two, some of the tokens have no entry."""
    if kind == "packing":  # JAX cannot make one
        return tokens.Packing(array(RUNNING), array(tokens.pack(RUNNING).index))
    nothing = array(np.zeros((IMAGES, SLOTS), np.float32))
    selection, _ = tokens.select(array(RUNNING), nothing, capacity=3 if kind == "overflowing" else SLOTS)
    if kind == "of a selection":
        stay = array(np.array([[True, False, True, True, True]] * IMAGES))
        selection, _, _ = tokens.reselect(selection, stay, nothing, capacity=4)
    return selection


def cases(kind, array):
    """Functions of the inputs that are to be differentiated, and these inputs, as NumPy arrays."""
    receipt = receipt_of(kind, array)
    random = np.random.default_rng(3)
    batch, layout = (IMAGES, SLOTS, WIDTH), (*receipt.layout, WIDTH)
    x, held, more = (random.normal(size=shape) for shape in (batch, layout, layout))
    leave = tokens.gather(array(LEAVE), receipt)
    depth = array(np.zeros((IMAGES, SLOTS), int))

    def rejoin(frozen, features):
        return ledger.rejoin(ledger.Ledger(frozen, depth, features=frozen), receipt, features)

    def settle(logits, features, frozen):
        book = ledger.Ledger(frozen, depth, features=frozen)
        book = ledger.record(book, receipt, leave, logits, depth=2, features=features)
        return book.logits, book.features

    return {
        "gather": (lambda x: tokens.gather(x, receipt), [x]),
        "scatter": (lambda held, x: tokens.scatter(held, receipt, into=x), [held, x]),
        "rejoin": (rejoin, [x, held]),
        "record": (settle, [held, more, x]),
        "fold_leavers": (lambda held: ledger.fold_leavers(held, receipt, leave), [held]),
    }


FUNCTIONS = pytest.mark.parametrize("name", ["gather", "scatter", "rejoin", "record", "fold_leavers"])
SCORES = pytest.mark.parametrize("score", [scores.confidence, scores.entropy, scores.margin])


def logits():
    return np.random.default_rng(1).normal(size=(3, 4))


def of_semantic_tokens(array):
    """Functions of a map of which some places are padding; windows hang over the edge on both sides."""
    windows = semantic.Partition(5, 4, (3, 3))
    valid = np.random.default_rng(2).random((2, 5, 4)) < 0.6
    valid[0] = False  # cells without any valid place
    valid = array(valid)
    return {
        "split and join": lambda x: semantic.join(semantic.split(x, windows)[0] * 2, windows),
        "neighbourhoods": lambda x: semantic.neighbourhoods(x, windows, size=(4, 5), edges="beyond", valid=valid)[0],
        "mean": lambda x: semantic.pool(x, windows, to=(2, 2), by="mean", valid=valid)[0],
        "max": lambda x: semantic.pool(x, windows, to=(2, 2), valid=valid)[0],
    }


GEOMETRY = pytest.mark.parametrize("name", ["split and join", "neighbourhoods", "mean", "max"])


def distinct_map():
    """No two values are near each other, so that a step moves no maximum elsewhere."""
    return np.random.default_rng(4).permutation(5 * 4 * 2 * 2).reshape(2, 5, 4, 2).astype(np.float32)


# Inside, these compute in float32: a wide step, which costs nothing where a function is linear.


@needs_torch
@each_receipt
@FUNCTIONS
def test_torch_differentiates(name, receipt):
    import torch

    function, given = cases(receipt, lambda x: torch.from_numpy(x.copy()))[name]
    given = [torch.from_numpy(one).requires_grad_() for one in given]
    if name == "fold_leavers":
        assert torch.autograd.gradcheck(function, given, eps=0.5, atol=1e-5)
    else:
        assert torch.autograd.gradcheck(function, given)


@needs_torch
@SCORES
def test_torch_differentiates_scores(score):
    import torch

    given = torch.from_numpy(logits()).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: score(x).to(torch.float64), [given], eps=1e-2, atol=1e-3)


@needs_jax
@pytest.mark.parametrize("receipt", ["packing", "of a selection"])
@FUNCTIONS
def test_jax_differentiates(name, receipt):
    import jax
    import jax.numpy as jnp
    from jax.test_util import check_grads

    function, given = cases(receipt, jnp.asarray)[name]
    given = [jnp.asarray(one, dtype=jnp.float32) for one in given]
    check_grads(jax.jit(function), given, order=1, modes=("fwd", "rev"), eps=0.5, atol=1e-3, rtol=1e-3)


@needs_jax
@SCORES
def test_jax_differentiates_scores(score):
    import jax.numpy as jnp
    from jax.test_util import check_grads

    given = [jnp.asarray(logits(), dtype=jnp.float32)]
    check_grads(score, given, order=1, modes=("fwd", "rev"), eps=1e-2, atol=1e-3, rtol=1e-2)


@needs_torch
@GEOMETRY
def test_torch_differentiates_the_geometry_of_semantic_tokens(name):
    import torch

    function = of_semantic_tokens(torch.from_numpy)[name]
    assert torch.autograd.gradcheck(function, [torch.from_numpy(distinct_map()).double().requires_grad_()])


@needs_jax
@GEOMETRY
def test_jax_differentiates_the_geometry_of_semantic_tokens(name):
    import jax
    import jax.numpy as jnp
    from jax.test_util import check_grads

    function = of_semantic_tokens(jnp.asarray)[name]
    given = [jnp.asarray(distinct_map())]
    check_grads(jax.jit(function), given, order=1, modes=("fwd", "rev"), eps=0.1, atol=1e-2, rtol=1e-2)


@needs_torch
@each_receipt
def test_every_gradient_has_one_way_to_flow(receipt):
    """A slot's gradient goes to the entry that holds it, or else to what it held before: never to both, or to none."""
    import torch

    made = receipt_of(receipt, lambda x: torch.from_numpy(x.copy()))
    running = made.running.numpy()
    held = torch.zeros((*made.layout, WIDTH), requires_grad=True)
    into = torch.zeros((IMAGES, SLOTS, WIDTH), requires_grad=True)
    weight = np.arange(1.0, IMAGES * SLOTS * WIDTH + 1).reshape(IMAGES, SLOTS, WIDTH).astype(np.float32)
    (tokens.scatter(held, made, into=into) * torch.from_numpy(weight)).sum().backward()
    np.testing.assert_array_equal(into.grad.numpy(), np.where(running[..., None], 0, weight))
    back = tokens.scatter(held.grad, made, into=torch.zeros_like(into)).numpy()
    np.testing.assert_array_equal(back, np.where(running[..., None], weight, 0))
    assert float(held.grad.sum()) == weight[running].sum()
