import contextlib
import dataclasses
import json
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.core.strategies import PLAIN, SCHEDULE
from tokenexit import TokenExitError, heads, manifest, schedule
from tokenexit.assessment import Option
from tokenexit.manifest import HeadManifest, SemanticManifest
from tokenexit.semantic import SemanticPlan, stvit
from tokenexit.weights import Spec

SIZE = st.none() | st.integers(1, 9)
PLAN = st.none() | st.just(heads.Linear()) | st.builds(heads.MLP, SIZE) | st.builds(heads.FCN)
PLAN = PLAN | st.builds(heads.Neighbourhood, SIZE, st.integers(1, 16))
PLAN = PLAN | st.builds(heads.Translator, SIZE)
PLAN = PLAN | st.builds(heads.ATM, st.integers(1, 64), SIZE)


@st.composite
def manifests(draw):
    plan, more, size = draw(SCHEDULE), draw(st.sets(st.integers(1, 40))), draw(st.integers(1, 999))
    after = tuple(sorted({*plan.after, *more}))
    fitted = tuple(sorted(draw(st.sets(st.integers(0, 2**128 - 1).map(lambda number: f"{number:032x}"), max_size=3))))
    taps = tuple(sorted(draw(st.sets(st.integers(1, 41), max_size=3))))
    built = draw(st.booleans())
    classes = size if built else draw(st.sampled_from([0, size]))
    options = st.builds(Option, SCHEDULE, st.floats(0, 1), st.floats(-9, 1))
    assessed = tuple(draw(st.lists(options, max_size=2)))
    return HeadManifest(plan, after, draw(PLAN), built, classes, size, 41, fitted, taps, assessed)


@given(whole=manifests())
def test_a_manifest_survives_json(whole):
    assert manifest.from_dict(json.loads(json.dumps(manifest.to_dict(whole))), "exits") == whole


@pytest.mark.usefixtures("unchecked")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(whole=manifests(), data=st.data())
def test_a_damaged_manifest_is_refused_by_the_librarys_own_error_or_read(whole, data):
    damaged = json.loads(json.dumps(manifest.to_dict(whole)))
    places = [damaged, damaged["schedule"], damaged["schedule"]["carry"], *damaged["schedule"]["exits"]]
    where = data.draw(st.sampled_from(places))
    where[data.draw(st.sampled_from([*where, "more"]))] = data.draw(PLAIN)
    with contextlib.suppress(TokenExitError):
        assert isinstance(manifest.from_dict(damaged, "exits"), HeadManifest)


def written(**changes):
    whole = HeadManifest(schedule.dtop(), (2, 6, 8), heads.MLP(), True, 3, 8, 12)
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
        (None, "`manifest` must be a mapping, got None"),
        ({}, "`schema` must be 2, got None"),
        ({"schema": 2}, "`manifest` must have exactly the keys"),
        (written(more=1), "`manifest` must have exactly the keys .*'more'"),
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
        (
            written(plan={"kind": "conv"}),
            "`kind` must be one of linear, mlp, fcn, neighbourhood, atm, translator, got 'conv'",
        ),
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
        manifest.from_dict(data, "exits")


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
    assert manifest.from_dict(json.loads(json.dumps(manifest.to_dict(whole))), "semantic") == whole


@pytest.mark.usefixtures("unchecked")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(whole=semantic_manifests(), data=st.data())
def test_a_damaged_semantic_manifest_is_refused_by_the_librarys_own_error_or_read(whole, data):
    damaged = json.loads(json.dumps(manifest.to_dict(whole)))
    where = data.draw(st.sampled_from([damaged, damaged["plan"]]))
    where[data.draw(st.sampled_from([*where, "more"]))] = data.draw(PLAIN)
    with contextlib.suppress(TokenExitError):
        assert isinstance(manifest.from_dict(damaged, "semantic"), SemanticManifest)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 1}, "`schema` must be 2, got 1"),
        ({"more": 2}, "`manifest` must have exactly the keys"),
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
    data = json.loads(json.dumps(manifest.to_dict(whole))) | changes
    with pytest.raises(TokenExitError, match=message):
        manifest.from_dict(data, "semantic")


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


@given(whole=manifests() | semantic_manifests())
def test_what_is_written_is_the_plain_data_and_is_read_back(tmp_path_factory, whole):
    folder = tmp_path_factory.mktemp("saved")
    kind = "semantic" if isinstance(whole, SemanticManifest) else "exits"
    manifest.write(folder, kind, whole, b"weights")
    data = json.loads((folder / f"{kind}.json").read_text())
    named = {key: data.pop(key) for key in ("weights", "checksum")}
    assert data == json.loads(json.dumps(manifest.to_dict(whole)))
    found, file = manifest.read(folder, kind)
    assert (found, file.read_bytes(), file.name) == (whole, b"weights", named["weights"]["file"])


WHOLE = HeadManifest(schedule.dtop(after=(6, 8)), (2, 6, 8), heads.MLP(), False, 2, 4, 12)
SEMANTIC = SemanticManifest(stvit(), 2, None, heads=3, hidden=24, epsilon=1e-6, width=6, depth=12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"classes": 3}, "`folder` must hold gates, got heads of 3 classes"),
        ({"built_head": True}, "`folder` must hold gates, got heads of 2 classes"),
    ],
)
def test_gates_have_two_logits_and_no_final_head(tmp_path, changes, message):
    whole = dataclasses.replace(WHOLE, **changes)
    for kind in ("exits", "gates"):
        manifest.write(tmp_path, kind, whole, b"weights")
    assert manifest.read(tmp_path, "exits")[0] == whole
    if message is None:
        assert manifest.read(tmp_path, "gates")[0] == whole
        return
    with pytest.raises(TokenExitError, match=message):
        manifest.read(tmp_path, "gates")


def test_a_manifest_is_not_written_under_another_kind(tmp_path):
    for kind, whole in (("semantic", WHOLE), ("exits", SEMANTIC), ("gates", SEMANTIC)):
        with pytest.raises(TokenExitError, match=f"`manifest` must describe what is saved, {kind}, got "):
            manifest.write(tmp_path / "new", kind, whole, b"")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("kind", "what"), [("exits", "exits"), ("gates", "gates"), ("semantic", "layers")])
def test_another_network_is_refused(kind, what):
    whole = SEMANTIC if kind == "semantic" else dataclasses.replace(WHOLE, width=6)
    manifest.require_network(whole, kind, argument="model", width=6, depth=12)
    with pytest.raises(TokenExitError, match=f"`model` must have width 6, as the saved {what}, got 7"):
        manifest.require_network(whole, kind, argument="model", width=7, depth=12)
    with pytest.raises(TokenExitError, match=f"`network` must have depth 12, as the saved {what}, got 11"):
        manifest.require_network(whole, kind, argument="network", width=6, depth=11)


def test_a_final_head_is_given_exactly_if_none_was_saved():
    built = dataclasses.replace(WHOLE, built_head=True)
    manifest.require_final_head(WHOLE, "a head")
    manifest.require_final_head(built, None)
    rule = "`head` must be given exactly if the exits were saved without a final head, .*, got "
    with pytest.raises(TokenExitError, match=rule + "None"):
        manifest.require_final_head(WHOLE, None)
    with pytest.raises(TokenExitError, match=rule + "str"):
        manifest.require_final_head(built, "a head")
    manifest.require_classes(WHOLE, 2)
    with pytest.raises(TokenExitError, match="`head` must give 2 classes, as the saved exits, got 3"):
        manifest.require_classes(WHOLE, 3)


def test_heads_come_from_the_plan_or_are_the_users_own():
    own, modules = dataclasses.replace(WHOLE, head_plan=None), {2: "a", 8: "b", 6: "c"}
    assert manifest.choose_heads(WHOLE, None, argument="exit_heads") == heads.MLP()
    assert manifest.choose_heads(own, modules, argument="exit_heads") is modules
    assert manifest.require_head_plan(WHOLE, "gates") == heads.MLP()
    for chosen, whole, message in (
        (None, own, "`gates` must be given if they were saved as modules of your own, got None"),
        (modules, WHOLE, r"`gates` must be left out if a plan was saved, got MLP"),
        ({2: "a"}, own, r"`gates` must follow the blocks \(2, 6, 8\), got \[2\]"),
    ):
        with pytest.raises(TokenExitError, match=message):
            manifest.choose_heads(whole, chosen, argument="gates")
    for kind, what in (("exits", "heads"), ("gates", "gates")):
        with pytest.raises(
            TokenExitError, match=f"`folder` must hold {what} built from a plan, got modules of another"
        ):
            manifest.require_head_plan(own, kind)


@given(whole=manifests(), kind=st.sampled_from(["exits", "gates"]))
def test_every_head_has_its_weights_in_the_file(whole, kind):
    one = {"0.weight": Spec((2, 3), "float32"), "0.bias": Spec((2,), "float32")}
    part = {"exits": "exit_heads", "gates": "gates"}[kind]
    wanted = {f"{part}.{after}.{name}": spec for after in whole.after for name, spec in one.items()}
    wanted |= {f"head.{name}": spec for name, spec in one.items() if whole.built_head}
    assert manifest.head_specs(whole, kind, lambda _: one) == wanted
    final = {"weight": Spec((4,), "float16")}
    wanted = {name: spec for name, spec in wanted.items() if not name.startswith("head.")}
    wanted |= {"head.weight": final["weight"]} if whole.built_head else {}
    assert manifest.head_specs(whole, kind, lambda _: one, final) == wanted


def test_heads_that_translate_for_several_taps_have_weights_for_those_behind_them():
    plan = HeadManifest(schedule.foretold(), (3, 6, 8), heads.Translator(), False, 0, 8, 12, taps=(3, 6, 9, 12))
    assert [plan.targets(after) for after in (2, 3, 6, 8, 12)] == [4, 3, 2, 2, 1]
    found = manifest.head_specs(plan, "exits", lambda targets: {"bias": Spec((targets,), "float32")})
    assert {name: spec.shape for name, spec in found.items()} == {
        "exit_heads.3.bias": (3,), "exit_heads.6.bias": (2,), "exit_heads.8.bias": (2,)
    }  # fmt: skip
    assert "taps" not in manifest.to_dict(dataclasses.replace(plan, taps=()))


def test_the_rule_for_weights_names_the_file():
    assert manifest.weights_rule("gates") == "hold the weights that gates.json describes"
