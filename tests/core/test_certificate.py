"""Certificates: written, read, and refused."""

import contextlib
import dataclasses
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.core.strategies import PLAIN, SCHEDULE
from tokenexit import TokenExitError, schedule, sealed
from tokenexit.guarantees import certificate
from tokenexit.guarantees.certificate import ASSUMPTIONS, Certificate, Fingerprints, require_matches

SHARE = st.floats(0, 1)
BETWEEN = st.floats(0, 1, exclude_min=True, exclude_max=True)
HASH = st.text("0123456789abcdef", min_size=64, max_size=64)
PRINTS = st.builds(
    Fingerprints,
    weights=st.dictionaries(st.text(max_size=5), HASH, min_size=1, max_size=3),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    resolution=st.tuples(st.integers(1, 4096), st.integers(1, 4096)),
    preprocessing=st.text(min_size=1),
    adapter=st.sampled_from(["torch", "jax"]),
)
CERTIFICATE = st.builds(
    Certificate,
    schedule=SCHEDULE,
    risk=st.text(min_size=1),
    at_most=BETWEEN,
    confidence=BETWEEN,
    images=st.integers(1, 99),
    test=st.sampled_from(["betting", "hoeffding-bentkus"]),
    seed=st.integers(0, 9),
    loss=SHARE,
    saving=SHARE,
    fingerprints=PRINTS,
    notes=st.lists(st.text(min_size=1), max_size=2).map(tuple),
)
MINE = Fingerprints({"a": "0" * 64, "b": "1" * 64}, "float32", (352, 480), "mean 0.5", "torch")
SOME = Certificate(schedule.dtop(), "disagreement", 0.02, 0.95, 500, "betting", 0, 0.01, 0.4, MINE)


@given(one=CERTIFICATE)
def test_a_certificate_survives_json(one):
    assert certificate.from_json(certificate.to_json(one)) == one


@pytest.mark.usefixtures("unchecked")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(one=CERTIFICATE, data=st.data())
def test_whatever_is_edited_is_refused(one, data):
    damaged = json.loads(certificate.to_json(one))
    where = data.draw(st.sampled_from([damaged, damaged["fingerprints"], damaged["fingerprints"]["weights"]]))
    key, value = data.draw(st.sampled_from([*where, "more"])), data.draw(PLAIN | BETWEEN | HASH)
    if json.dumps(where.get(key, "missing"), sort_keys=True) == json.dumps(value, sort_keys=True):
        return
    where[key] = value
    with pytest.raises(TokenExitError):
        certificate.from_json(json.dumps(damaged))


@pytest.mark.usefixtures("unchecked")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_an_edit_with_a_new_checksum_is_a_certificate_or_refused_all_the_same(data):
    damaged = json.loads(certificate.to_json(SOME))
    where = data.draw(st.sampled_from([damaged, damaged["fingerprints"], damaged["schedule"]]))
    where[data.draw(st.sampled_from(list(where)))] = data.draw(PLAIN)
    with contextlib.suppress(TokenExitError):
        assert isinstance(certificate.from_json(sealed.seal(damaged)), Certificate)


@given(length=st.integers(0, len(certificate.to_json(SOME)) - 2))
def test_what_is_cut_off_is_refused_with_the_reason(length):
    with pytest.raises(TokenExitError, match="`text` must be the whole JSON of a certificate, got the error"):
        certificate.from_json(certificate.to_json(SOME)[:length])


def edited(**changes):
    return json.dumps(json.loads(certificate.to_json(SOME)) | changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "`text` must be the whole JSON of a certificate"),
        ("null", "`text` must be the JSON of a certificate, a mapping, got None"),
        ("{}", "`schema` must be 2, got None"),
        ('{"schema": 2}', "`certificate` must have exactly the keys"),
        (edited(schema=1), "`schema` must be 2, got 1"),
        (certificate.to_json(SOME).replace('"seed": 0', '"seed": 0, "seed": 1'), "`seed` must stand once in an object"),
        (edited(loss=float("nan")), "`text` must hold finite numbers, got NaN"),
        (edited(at_most=0.5), "`checksum` must be that of the content, which was edited or damaged and certifies nothing, got"),
        (edited(assumptions=[]), "`checksum` must be that of the content"),
    ],
)  # fmt: skip
def test_the_reason_is_given(text, message):
    with pytest.raises(TokenExitError) as found:
        certificate.from_json(text)
    assert str(found.value).startswith(message)


def test_it_fits_the_model_that_it_was_made_for():
    again = Fingerprints(dict(reversed(MINE.weights.items())), "float32", (352, 480), "mean 0.5", "torch")
    require_matches(certificate.from_json(certificate.to_json(SOME)), again)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"adapter": "jax"}, "got adapter 'jax' instead of 'torch'"),
        ({"dtype": "bfloat16"}, "got dtype 'bfloat16' instead of 'float32'"),
        ({"resolution": (480, 352)}, "got resolution (480, 352) instead of (352, 480)"),
        ({"preprocessing": "mean 0.4"}, "got preprocessing 'mean 0.4' instead of 'mean 0.5'"),
        ({"weights": {"a": "0" * 64, "b": "2" * 64}}, "got other weights in 1 of 2 tensors, 'b' first"),
        ({"weights": {"a": "0" * 64}}, "got other weights in 1 of 2 tensors, 'b' first"),
        ({"weights": {"a": "0" * 64, "b": "1" * 64, "c": "1" * 64}}, "got other weights in 1 of 3 tensors, 'c' first"),
        ({"dtype": "bfloat16", "weights": {"x": "0" * 64}}, "'float32'; other weights in 3 of 3 tensors, 'a' first"),
    ],
)
def test_another_model_is_refused_by_what_is_different(other, message):
    fields = {"weights": MINE.weights, "dtype": "float32", "resolution": (352, 480), "preprocessing": "mean 0.5"}
    fields |= {"adapter": "torch"}
    with pytest.raises(TokenExitError) as found:
        require_matches(SOME, Fingerprints(**(fields | other)))
    assert str(found.value).startswith("`fingerprints` must be those of the model that was certified, got ")
    assert str(found.value).endswith(message)


def test_it_says_what_holds():
    claim = "Certified: mean disagreement over images at most 2 %, with 95 % confidence (betting test, 500 images)."
    assert str(SOME).splitlines()[0] == claim
    assert all(one in str(SOME) for one in ASSUMPTIONS)
    noted = dataclasses.replace(SOME, notes=("These images were admitted.",))
    assert "Note: These images were admitted." in str(noted).splitlines()


PARTS = {
    "schedule": schedule.dtop(), "risk": "r", "at_most": 0.1, "confidence": 0.9, "images": 9, "test": "betting",
    "seed": 0, "loss": 0.0, "saving": 0.0, "fingerprints": MINE,
}  # fmt: skip
FIELDS = {
    "weights": {"a": "0" * 64},
    "dtype": "float32",
    "resolution": (1, 2),
    "preprocessing": "none",
    "adapter": "torch",
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schedule": None}, "`schedule` must be a tokenexit.schedule.Schedule, got None"),
        ({"risk": ""}, "`risk` must be a text, got ''"),
        ({"at_most": 0}, "`at_most` must be a number between 0 and 1, got 0"),
        ({"at_most": True}, "`at_most` must be a number between 0 and 1, got True"),
        ({"confidence": 1.0}, "`confidence` must be a number between 0 and 1, got 1.0"),
        ({"images": 0}, "`images` must be a whole number from 1 up, got 0"),
        ({"test": "luck"}, "`test` must be one of betting, hoeffding-bentkus, got 'luck'"),
        ({"seed": -1}, "`seed` must be a whole number from 0 up, got -1"),
        ({"loss": 1.1}, "`loss` must be a number in [0, 1], got 1.1"),
        ({"saving": float("nan")}, "`saving` must be a number in [0, 1], got nan"),
        ({"fingerprints": None}, "`fingerprints` must be Fingerprints, got None"),
        ({"weights": {}}, "`weights` must be a SHA-256 in hex for each of at least one name, got {}"),
        ({"weights": {"a": "0" * 63}}, "`weights` must be a SHA-256 in hex"),
        ({"weights": {"a": "G" * 64}}, "`weights` must be a SHA-256 in hex"),
        ({"weights": {1: "0" * 64}}, "`weights` must be a SHA-256 in hex"),
        ({"dtype": 32}, "`dtype` must be a text, got 32"),
        ({"resolution": (1, 0)}, "`resolution` must be a height and a width from 1 up, got (1, 0)"),
        ({"resolution": (1,)}, "`resolution` must be a height and a width from 1 up, got (1,)"),
        ({"notes": ["a"]}, "`notes` must be a tuple of texts, got ['a']"),
        ({"notes": ("",)}, "`notes` must be a tuple of texts, got ('',)"),
        ({"adapter": ""}, "`adapter` must be a text, got ''"),
        ({"preprocessing": None}, "`preprocessing` must be a text, got None"),
    ],
)
def test_bad_fields_are_named(change, message):
    cls, fields = (Fingerprints, FIELDS) if change.keys() <= FIELDS.keys() else (Certificate, PARTS)
    with pytest.raises(TokenExitError) as found:
        cls(**(fields | change))
    assert str(found.value).startswith(message)


def test_a_digest_tells_images_apart_and_copies_not():
    image = b"0123"
    same = [
        certificate.digest(image, dtype="uint8", shape=(4,)),
        certificate.digest(memoryview(image), dtype="uint8", shape=[4]),
    ]
    others = [
        certificate.digest(b"0124", dtype="uint8", shape=(4,)),
        certificate.digest(image, dtype="int8", shape=(4,)),
        certificate.digest(image, dtype="uint8", shape=(2, 2)),
    ]
    assert same[0] == same[1]
    assert len({*same, *others}) == 4
    assert len(same[0]) == 32
