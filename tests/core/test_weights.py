"""What a file of weights must hold: names, shapes and kinds of numbers."""

import json

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


def safetensors(header, data=b""):
    """The bytes of a safetensors file, written out."""
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def test_a_file_is_described_by_its_header(tmp_path):
    pytest.importorskip("safetensors")
    sizes = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8, "I32": 4, "I64": 8, "BOOL": 1, "F8_E5M2": 1}
    header, end = {}, 0
    for dtype, size in sizes.items():
        header[f"a.{dtype}"] = {"dtype": dtype, "shape": [3, 1], "data_offsets": [end, end + 3 * size]}
        end += 3 * size
    file = tmp_path / "weights"
    file.write_bytes(safetensors(header, bytes(end)))
    names = ("float16", "bfloat16", "float32", "float64", "int32", "int64", "BOOL", "F8_E5M2")
    assert weights.read_specs(file) == {
        f"a.{dtype}": Spec((3, 1), name) for dtype, name in zip(sizes, names, strict=True)
    }


@pytest.mark.parametrize("content", [b"", b"no weights", safetensors({"a": {"dtype": "F32"}}), safetensors([])])
def test_what_is_no_file_of_weights_is_named(tmp_path, content):
    pytest.importorskip("safetensors")
    (tmp_path / "weights").write_bytes(content)
    for file in (tmp_path / "weights", tmp_path / "none", tmp_path):
        with pytest.raises(TokenExitError, match=f"`folder` must hold valid weights, got {file}: "):
            weights.read_specs(file)
