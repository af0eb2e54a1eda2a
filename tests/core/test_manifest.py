import contextlib
import json
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.core.strategies import PLAIN, SCHEDULE
from tokenexit import TokenExitError, heads, manifest, schedule
from tokenexit.manifest import Manifest, SemanticManifest
from tokenexit.semantic import SemanticPlan, stvit

SIZE = st.none() | st.integers(1, 9)
PLAN = st.none() | st.just(heads.Linear()) | st.builds(heads.MLP, SIZE) | st.builds(heads.FCN)
PLAN = PLAN | st.builds(heads.Neighbourhood, SIZE, st.integers(1, 16))
PLAN = PLAN | st.builds(heads.ATM, st.integers(1, 64), SIZE)


@st.composite
def manifests(draw):
    plan, more, size = draw(SCHEDULE), draw(st.sets(st.integers(1, 40))), draw(st.integers(1, 999))
    after = tuple(sorted({*plan.after, *more}))
    fitted = tuple(sorted(draw(st.sets(st.integers(0, 2**128 - 1).map(lambda number: f"{number:032x}"), max_size=3))))
    return Manifest(plan, after, draw(PLAN), draw(st.booleans()), size, size, 41, fitted)


@given(whole=manifests())
def test_a_manifest_survives_json(whole):
    assert manifest.from_dict(json.loads(json.dumps(manifest.to_dict(whole)))) == whole


@pytest.mark.usefixtures("unchecked")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(whole=manifests(), data=st.data())
def test_a_damaged_manifest_is_refused_by_the_librarys_own_error_or_read(whole, data):
    damaged = json.loads(json.dumps(manifest.to_dict(whole)))
    places = [damaged, damaged["schedule"], damaged["schedule"]["carry"], *damaged["schedule"]["exits"]]
    where = data.draw(st.sampled_from(places))
    where[data.draw(st.sampled_from([*where, "more"]))] = data.draw(PLAIN)
    with contextlib.suppress(TokenExitError):
        assert isinstance(manifest.from_dict(damaged), Manifest)


def written(**changes):
    whole = Manifest(schedule.dtop(), (2, 6, 8), heads.MLP(), True, 3, 8, 12)
    return json.loads(json.dumps(manifest.to_dict(whole))) | changes


def deep(levels):
    """A policy of policies of policies, which a careless reader follows until it breaks."""
    policy = {"kind": "never"}
    for _ in range(levels):
        policy = {"kind": "not", "policy": policy}
    return policy


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "`plan` must be a mapping, got None"),
        ({}, "`schema` must be 2, got None"),
        ({"schema": 2}, "`plan` must have exactly the keys"),
        (written(more=1), "`plan` must have exactly the keys .*'more'"),
        (written(schema=0), "`schema` must be .*, got 0"),
        (written(classes=True), "`classes` must be a whole number from 1 to .*, got True"),
        (written(width=0), "`width` must be a whole number from 1 to .*, got 0"),
        (written(depth=1.5), "`depth` must be a whole number from 1 to .*, got 1.5"),
        (written(depth=10**12), "`depth` must be a whole number from 1 to .*, got 1000000000000"),
        (written(after=[8, 6, 2]), r"`after` must ascend, got \[8, 6, 2\]"),
        (written(after=[2, 6, 12]), "`after` must be a list of blocks from 1 to 11"),
        (written(after=[6]), r"`schedule` must have exits only after blocks with a head, \[6\], got \[8\]"),
        (written(built_head=1), "`built_head` must be true or false, got 1"),
        (written(fitted=["0" * 31]), "`fitted` must be a list of different digests"),
        (written(fitted=["1" * 32, "0" * 32]), "`fitted` must be a list of different digests"),
        (written(fitted=["0" * 32] * 2), "`fitted` must be a list of different digests"),
        (written(plan={"kind": "conv"}), "`kind` must be one of linear, mlp, fcn, neighbourhood, atm, got 'conv'"),
        (written(schedule={"schema": 1, "exits": []}), "`schema` must be 3, got 1"),
        (written(schedule=None), "`schedule` must be a mapping, got None"),
        (
            written(
                schedule={
                    "schema": 3,
                    "exits": [{"after": 2, "policy": deep(20_000)}],
                    "carry": {"kind": "prediction"},
                    "cell": None,
                }
            ),
            "`schedule` must not be nested so deeply",
        ),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_hostile_data_are_refused(data, message):
    with pytest.raises(TokenExitError, match=message):
        manifest.from_dict(data)


SIDES = st.tuples(st.integers(1, 30), st.integers(1, 30))
SEMANTIC_PLAN = st.builds(
    SemanticPlan, st.none() | SIDES, SIDES, st.none() | SIDES, st.none() | SIDES, st.none() | SIDES,
    st.sampled_from(["inside", "beyond"]), st.sampled_from(["max", "mean"]), st.booleans(), st.booleans(),
    st.none() | SIDES, st.none() | st.floats(1e-6, 1),
)  # fmt: skip


@st.composite
def semantic_manifests(draw):
    after, heads = draw(st.integers(0, 9)), draw(st.integers(1, 8))
    until = draw(st.none() | st.integers(after + 3, 12))
    sizes = {"heads": heads, "hidden": draw(st.integers(1, 99)), "width": heads * draw(st.integers(1, 9)), "depth": 12}
    return SemanticManifest(draw(SEMANTIC_PLAN), after, until, epsilon=draw(st.floats(1e-8, 1e-3)), **sizes)


@given(whole=semantic_manifests())
def test_a_semantic_manifest_survives_json(whole):
    assert manifest.semantic_from_dict(json.loads(json.dumps(manifest.semantic_to_dict(whole)))) == whole


@pytest.mark.usefixtures("unchecked")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(whole=semantic_manifests(), data=st.data())
def test_a_damaged_semantic_manifest_is_refused_by_the_librarys_own_error_or_read(whole, data):
    damaged = json.loads(json.dumps(manifest.semantic_to_dict(whole)))
    where = data.draw(st.sampled_from([damaged, damaged["plan"]]))
    where[data.draw(st.sampled_from([*where, "more"]))] = data.draw(PLAIN)
    with contextlib.suppress(TokenExitError):
        assert isinstance(manifest.semantic_from_dict(damaged), SemanticManifest)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 1}, "`schema` must be 2, got 1"),
        ({"more": 2}, "`plan` must have exactly the keys"),
        ({"plan": []}, "`plan` must be a mapping with the keys"),
        ({"plan": {"window": None}}, "`plan` must have exactly the keys"),
        ({"after": 11}, "`after` must be a block from 0 to 10, .*, got 11"),
        ({"until": 4}, "`until` must be a block from 5 to 12, .*, or None, got 4"),
        ({"heads": 5}, "`heads` must divide the width, 6, got 5"),
        ({"hidden": 0}, "`hidden` must be a whole number from 1 to 1000000, got 0"),
        ({"epsilon": 0}, "`epsilon` must be a positive number, got 0"),
        ({"epsilon": math.inf}, "`epsilon` must be a positive number, got inf"),
    ],
)
def test_what_is_wrong_in_a_semantic_manifest_is_named(changes, message):
    whole = SemanticManifest(stvit(), 2, None, heads=3, hidden=24, epsilon=1e-6, width=6, depth=12)
    data = json.loads(json.dumps(manifest.semantic_to_dict(whole))) | changes
    with pytest.raises(TokenExitError, match=message):
        manifest.semantic_from_dict(data)


HOSTILE = [10**400, -(10**400), 1e308, math.nan, math.inf, -math.inf, True]


def numbers(data, *path):
    """Where in plain data there are numbers."""
    if isinstance(data, dict | list):
        for name, value in data.items() if isinstance(data, dict) else enumerate(data):
            yield from numbers(value, *path, name)
    elif isinstance(data, int | float) and not isinstance(data, bool):
        yield path


def replaced(data, path, value):
    copy = json.loads(json.dumps(data))
    inside = copy
    for name in path[:-1]:
        inside = inside[name]
    inside[path[-1]] = value
    return copy


@pytest.mark.usefixtures("unchecked")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(whole=SCHEDULE, head=PLAN.filter(bool), plan=SEMANTIC_PLAN)
def test_no_number_of_any_plan_may_be_more_than_numbers_hold(whole, head, plan):
    for read, data in (
        (schedule.Schedule.from_dict, whole.to_dict()),
        (heads.from_dict, heads.to_dict(head)),
        (SemanticPlan.from_dict, plan.to_dict()),
    ):
        for path in numbers(data):
            for value in HOSTILE:
                with pytest.raises(TokenExitError):
                    read(replaced(data, path, value))
