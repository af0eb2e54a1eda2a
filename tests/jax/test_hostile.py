"""Hostile files in JAX: a few here, more by `make fuzz`."""

import jax
import numpy as np
import pytest

import tokenexit_jax as tej
from tests import hostile
from tests.jax import networks
from tokenexit import heads, schedule, semantic

PLAN = schedule.dtop(after=(1, 2), threshold=0.4)
NETWORK = networks.timm_network(depth=4)

pytestmark = pytest.mark.usefixtures("unchecked")


def content(weights):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(weights)]


def of_exits(folder):
    model, weights = tej.load(NETWORK, folder)
    return content(weights), model.schedule, model.fitted


def of_gates(folder):
    model, weights = tej.load(NETWORK, folder)
    return content(weights), model.schedule


def of_semantic(folder):
    model, weights = tej.load(NETWORK, folder)
    return content(weights), model.plan, model.replaced


def whole(kind, folder):
    key = jax.random.key(0)
    if kind == "exits":
        model = tej.wrap(NETWORK, PLAN, classes=3, exit_heads=heads.FCN(4))
        tej.save(model, model.init(key), folder)
    elif kind == "gates":
        model = tej.wrap_gates(NETWORK, schedule.svit(after=(1, 2)), gates=heads.MLP(4))
        tej.save(model, model.init(key), folder)
    else:
        plan = semantic.SemanticPlan(None, (2, 3), None, learned=(2, 2), layer_scale=0.1)
        model = tej.wrap_semantic(NETWORK, plan, after=1, until=4, heads=3)
        tej.save(model, model.init(key), folder)


TARGETS = {"exits": (of_exits, 25), "gates": (of_gates, 12), "semantic": (of_semantic, 12)}


@pytest.mark.parametrize("kind", TARGETS)
def test_hostile_files_are_refused_or_change_nothing(kind, tmp_path):
    load, few = TARGETS[kind]
    whole(kind, tmp_path / "whole")
    count = round(0.05 * hostile.FILES) if hostile.FILES else few
    found = hostile.Trials(tmp_path / "whole", load, kind).run(count, tmp_path)
    assert sum(found.values()) == count
    assert found["refused"] > 0.4 * count
    print(f"{kind} in JAX: {count} files: {dict(found)}")
