"""What a file of weights must hold: names, shapes and kinds of numbers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenexit import TokenExitError, weights
from tokenexit.weights import FLOATING, WHOLE, Spec

SHAPE = st.lists(st.integers(0, 9), max_size=3).map(tuple)
SPECS = st.dictionaries(
    st.text("ab.", min_size=1, max_size=3), st.builds(Spec, SHAPE, st.sampled_from(FLOATING + WHOLE))
)


def refused(wanted, found):
    try:
        weights.require_specs("folder", "hold it", wanted, found)
    except TokenExitError as error:
        return str(error)
    return None


@given(wanted=SPECS, found=SPECS)
def test_weights_stand_in_for_others_of_the_same_names_shapes_and_kinds(wanted, found):
    def kind(specs):
        return {name: (one.shape, one.dtype in FLOATING) for name, one in specs.items()}

    assert (refused(wanted, found) is None) == (kind(wanted) == kind(found))


@given(specs=SPECS, data=st.data())
def test_one_difference_is_named(specs, data):
    name = data.draw(st.sampled_from([*specs, "new"]))
    changed = dict(specs)
    if name in specs:
        shape = specs[name].shape
        changed[name] = Spec((*shape, 5), specs[name].dtype)
        expected = f"{name}: {(*shape, 5)} instead of {shape}"
    else:
        changed[name] = Spec((2,), "float32")
        expected = f"{name}: (2,) instead of None"
    assert refused(specs, changed) == f"`folder` must hold it, got {expected}"


@given(specs=SPECS)
def test_any_float_stands_in_for_any_other_and_nothing_else_does(specs):
    for dtype in (*FLOATING, *WHOLE, "bool", "BOOL", "F8_E4M3", "complex64", "int8"):
        found = {name: Spec(one.shape, dtype) for name, one in specs.items()}
        fits = [dtype in (FLOATING if one.dtype in FLOATING else WHOLE) for one in specs.values()]
        message = refused(specs, found)
        assert (message is None) == all(fits)
        assert message is None or message.endswith(f" in {dtype}")


def test_differences_of_names_come_before_those_of_kinds_and_four_are_enough():
    wanted = {name: Spec((1,), "float32") for name in "abcdef"}
    found = {name: Spec((2,), "int64") for name in "uvwxyz"}
    message = "u: (2,) instead of None, v: (2,) instead of None, w: (2,) instead of None, x: (2,) instead of None"
    assert refused(wanted, found) == f"`folder` must hold it, got {message}"
    assert refused({"n": Spec((), "int64")}, {"n": Spec((), "float32")}) == (
        "`folder` must hold it, in int32, int64, got n in float32"
    )


def test_the_first_that_is_not_finite_is_named_and_no_other_is_looked_at():
    def names():
        yield "b"
        raise AssertionError("looked further")

    weights.require_finite("model", "be whole", iter(()))
    with pytest.raises(TokenExitError, match="`model` must be whole, all of them finite, got NaN or infinity in b"):
        weights.require_finite("model", "be whole", names())


def test_a_file_is_described_without_its_numbers():
    class Slice:
        def __init__(self, shape, dtype):
            self.get_shape, self.get_dtype = lambda: shape, lambda: dtype

    held = {"a": Slice([2, 3], "BF16"), "b": Slice([], "I64"), "c": Slice([1], "F8_E5M2")}

    class Opened:
        def keys(self):
            return [*held]

        def get_slice(self, name):
            return held[name]

    wanted = {"a": Spec((2, 3), "bfloat16"), "b": Spec((), "int64"), "c": Spec((1,), "F8_E5M2")}
    assert weights.specs_of(Opened()) == wanted


def test_a_file_of_safetensors_is_described(tmp_path):
    safetensors, numpy = pytest.importorskip("safetensors"), pytest.importorskip("numpy")
    from safetensors.numpy import save_file

    arrays = {dtype: numpy.zeros((2, 1), dtype) for dtype in ("float16", "float32", "float64", "int32", "int64")}
    save_file(arrays, tmp_path / "weights")
    with safetensors.safe_open(tmp_path / "weights", framework="numpy") as opened:
        assert weights.specs_of(opened) == {dtype: Spec((2, 1), dtype) for dtype in arrays}
