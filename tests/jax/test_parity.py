"""Same weights, same images: JAX and PyTorch decide the same exits, and their logits agree."""

import dataclasses

import jax
import numpy as np
import pytest
import torch

import tokenexit_jax as tej
from tests.jax import networks
from tests.jax.parity import from_torch, same
from tests.torch import models
from tokenexit import schedule

PLANS = {
    "neighbours": schedule.neighbours(radius={2: 1, 3: 1, 4: 0}, threshold=0.4, per_class=1),
    "dovit": schedule.dovit(after=(2, 4), threshold=0.5),
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_jax_and_pytorch_decide_the_same_and_their_logits_agree(plan):
    vit = models.timm_vit(depth=5, size=networks.SIZE)
    theirs, images = models.wrapped(vit, plan), models.images(3, networks.SIZE)
    with torch.no_grad():
        wanted = theirs(images)
    dense = tej.wrap(networks.timm_network(), schedule.dense(after=(2, 3, 4)), classes=networks.CLASSES)
    model = dataclasses.replace(dense, schedule=plan)
    params, heads, images = from_torch(vit), networks.heads_of(theirs), networks.images_of(images)
    found = model(params, heads, images)
    assert len(np.unique(found.exit_depth)) > 1
    np.testing.assert_array_equal(found.exit_depth, wanted.exit_depth)
    np.testing.assert_array_equal(found.tokens_per_block, wanted.tokens_per_block)
    same(found.logits, wanted.logits.movedim(1, -1), 1e-4)
    compiled = jax.jit(model.compiled)(params, heads, images)
    np.testing.assert_array_equal(found.exit_depth, compiled.exit_depth)
    same(found.logits, compiled.logits, 1e-6)
