"""JSON with a checksum."""

import contextlib
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenexit import TokenExitError, sealed

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
CONTENT = st.dictionaries(st.text().filter(lambda name: name != "checksum"), PLAIN, max_size=4)
SOME = {"schema": 2, "threshold": 0.9, "after": [2, 4], "words": "nine"}


@given(content=CONTENT)
def test_what_is_sealed_is_opened(content):
    assert sealed.unseal(sealed.seal(content)) == content


@given(data=st.data())
def test_every_flipped_bit_is_refused_or_changes_nothing(data):
    raw = bytearray(sealed.seal(SOME).encode())
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= 1 << data.draw(st.integers(0, 7))
    with contextlib.suppress(TokenExitError, UnicodeDecodeError):
        assert sealed.unseal(raw.decode()) == SOME


@given(length=st.integers(0, len(sealed.seal(SOME)) - 2))
def test_what_is_cut_off_is_refused(length):
    with pytest.raises(TokenExitError, match="must be the whole JSON of a plan, got the error"):
        sealed.unseal(sealed.seal(SOME)[:length], what="a plan")


@given(text=st.text() | st.binary().map(lambda raw: raw.decode("latin1")))
def test_any_other_text_is_refused_by_the_librarys_own_error(text):
    with pytest.raises(TokenExitError):
        sealed.unseal(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "`text` must be the whole JSON of an object, got the error: Expecting value"),
        ("[" * 100_000, "`text` must be the whole JSON of an object, got the error: maximum recursion"),
        ("9" * 5000, "`text` must be the whole JSON of an object, got the error: Exceeds the limit"),
        ("[1]", "`text` must be the JSON of an object, a mapping, got [1]"),
        ('{"a": 1, "a": 2}', "`a` must stand once in an object, got it 2 times"),
        ('{"b": [{"a": 1, "a": 1}]}', "`a` must stand once in an object, got it 2 times"),
        ('{"a": NaN}', "`text` must hold finite numbers, got NaN"),
        ('{"a": 1e999}', "`text` must hold finite numbers, got 1e999"),
        ('{"a": 1}', "`checksum` must be that of the content, which was edited or damaged, got None"),
        (sealed.seal(SOME).replace("0.9", "0.8"), "`checksum` must be that of the content"),
        (json.dumps(SOME | {"checksum": sealed.BY_HAND}), "`checksum` must be that of the content"),
    ],
)
def test_the_reason_is_given(text, message):
    with pytest.raises(TokenExitError) as found:
        sealed.unseal(text)
    assert str(found.value).startswith(message)


def nested(levels):
    data = {}
    for _ in range(levels):
        data = {"a": data}
    return data


@pytest.mark.parametrize("content", [{"a": math.nan}, {"a": math.inf}, {"a": object()}, {"a": {1, 2}}, nested(20_000)])
def test_what_is_no_plain_data_is_not_sealed(content):
    with pytest.raises(TokenExitError, match="`content` must"):
        sealed.seal(content)
