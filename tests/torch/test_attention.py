"""Attention within each image of a row, and the kernel for images of all lengths, which CUDA alone has.

Here a slow stand-in with the kernel's interface takes its place: what is asked of it is what is tested.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

import tokenexit_torch as tet
from tests.core import strategies
from tests.torch import models
from tests.torch.plans import CELLS, FEATURES, PLANS
from tokenexit_torch import attention
from tokenexit_torch.attention import Padded, PerImage, has_varlen, per_image

HEADS, WIDTH = 2, 8


def stand_in(query, key, value, cu_q, cu_k, max_q, max_k, *, scale):
    """As `torch.nn.attention.varlen.varlen_attn`, between offsets one by one; what lies beyond is not written."""
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert query.ndim == 3
    result = torch.full_like(query, torch.nan)
    for start, stop, first, last in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True):
        assert stop - start <= max_q
        assert last - first <= max_k
        q, k, v = (x.transpose(0, 1)[None] for x in (query[start:stop], key[first:last], value[first:last]))
        result[start:stop] = functional.scaled_dot_product_attention(q, k, v, scale=scale)[0].transpose(0, 1)
    return result


@pytest.fixture
def kernel(monkeypatch):
    """The kernel is there, and takes every call."""
    calls = []

    def counted(*given, **options):
        calls.append(given)
        return stand_in(*given, **options)

    monkeypatch.setattr(attention, "varlen_attn", counted)
    monkeypatch.setattr(attention, "has_varlen", lambda *_: True)
    return calls


def drawn(tokens, seed=0):
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(1, HEADS, tokens, WIDTH, generator=random, dtype=torch.float64) for _ in range(3)]


def sizes(tokens, seed=0):
    return torch.randint(1, 17, (tokens,), generator=torch.Generator().manual_seed(seed)).double()


@given(lengths=st.lists(st.integers(0, 5), min_size=1, max_size=6).filter(any), sized=st.booleans())
@strategies.fewer(2)
def test_by_kernel_or_one_by_one_is_the_same(lengths, sized):
    query, key, value = drawn(sum(lengths))
    size = sizes(sum(lengths)) if sized else None
    wanted = PerImage(lengths, token_size=size)._each(query, key, value, {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "varlen_attn", stand_in)
        found = PerImage(lengths, token_size=size)._varlen(query, key, value)
    torch.testing.assert_close(found, wanted)
    begins = torch.tensor([0, *lengths]).cumsum(0)
    op = per_image(query, key, value, torch.tensor(lengths), begins, size, None)
    assert op.is_contiguous()
    torch.testing.assert_close(op.transpose(1, 2), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sizes_are_exact_in_half_precision(dtype):
    tokens = 300
    query, key, value = (x.to(dtype) for x in drawn(tokens))
    size = torch.tensor([1.0, 4.0, 16.0, 64.0, 256.0]).repeat(tokens // 5)
    wide = [x.double() for x in (query, key, value)]
    wanted = PerImage([tokens], token_size=size.double())._each(*wide, {})
    more = [x.double() for x in attention.biased(query, key, value, size.log() * WIDTH**0.5)]
    found = functional.scaled_dot_product_attention(*more, scale=WIDTH**-0.5)[..., :WIDTH]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)  # a rounded logarithm would be off by 1e-3


@given(counts=st.lists(st.integers(0, 5), min_size=1, max_size=5), sized=st.booleans())
@strategies.fewer(2)
def test_entries_without_a_token_are_an_image_of_their_own(counts, sized):
    capacity = 5
    valid = torch.arange(capacity) < torch.tensor(counts)[:, None]
    query, key, value = drawn(valid.numel())
    padded = Padded(valid, sizes(valid.numel()) if sized else None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "varlen_attn", stand_in)
        found = padded._varlen(query, key, value)
    assert found.isfinite().all()
    wanted = padded._each(query, key, value, {})
    held = valid.flatten()
    torch.testing.assert_close(found[:, :, held], wanted[:, :, held])


@torch.no_grad()
@pytest.mark.parametrize("plan", [PLANS["neighbours"], FEATURES["dovit"], CELLS["dtop"]])
@pytest.mark.parametrize("capacity", [None, 1.0, 0.5])
def test_a_model_runs_by_the_kernel(kernel, plan, capacity):
    model, images = models.wrapped(models.timm_vit, plan).double(), models.images(3).double()
    run = model if capacity is None else tet.StaticModel(model, capacities=capacity)
    kernel.clear()  # the self-check has called it
    found = run(images)
    assert len(kernel) > 0
    # Where tokens stand for others there is a bias, which the kernel is given as more channels.
    assert {call[0].shape[2] for call in kernel} == {16 if plan.cell is None else 24}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "has_varlen", lambda *_: False)
        wanted = run(images)
    torch.testing.assert_close(found.logits, wanted.logits)
    assert torch.equal(found.exit_depth, wanted.exit_depth)


@pytest.mark.usefixtures("unchecked")
def test_which_calls_the_kernel_takes():
    def call(*, dtype=torch.bfloat16, width=64, value_width=None, key_heads=2, device="meta", **options):
        shape = (1, 2, 7, width)
        q = torch.empty(shape, dtype=dtype, device=device)
        k = torch.empty((1, key_heads, 7, width), dtype=dtype, device=device)
        v = torch.empty((1, key_heads, 7, value_width or width), dtype=dtype, device=device)
        return Cuda(q), Cuda(k), Cuda(v), options

    class Cuda:
        is_cuda = True

        def __init__(self, tensor):
            self.shape, self.dtype = tensor.shape, tensor.dtype

    assert has_varlen(*call())
    assert has_varlen(*call(dtype=torch.float16, width=256, scale=1 / 16))
    assert not has_varlen(*call(dtype=torch.float32))
    assert not has_varlen(*call(width=60))
    assert not has_varlen(*call(width=264))
    assert not has_varlen(*call(value_width=32))
    assert not has_varlen(*call(key_heads=1))
    assert not has_varlen(*call(dropout_p=0.1))
    assert not has_varlen(*call(scale=0.5))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_exporting", lambda: True)
        assert not has_varlen(*call())
    with pytest.MonkeyPatch.context() as patch:  # as before PyTorch 2.11
        patch.setattr(attention, "varlen_attn", None)
        assert not has_varlen(*call())
    assert not has_varlen(*(torch.empty(1, 2, 7, 64, dtype=torch.bfloat16) for _ in range(3)), {})


def test_gradients_of_the_operator_are_those_of_attention():
    lengths = [3, 0, 2, 2]
    token_size = torch.tensor([1.0, 3.0, 1.0, 2.0, 1.0, 1.0, 4.0])
    own = [x.requires_grad_() for x in drawn(7)]

    def operator(*given):
        return per_image(*given, torch.tensor(lengths), None, token_size, 0.3)

    torch.autograd.gradcheck(operator, own, fast_mode=True)
    torch.library.opcheck(per_image, (*own, torch.tensor(lengths), None, token_size, 0.3))
