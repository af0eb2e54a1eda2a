import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.core.test_schedule import SCHEDULE
from tokenexit import TokenExitError, heads, manifest
from tokenexit.manifest import Manifest

PLAN = st.none() | st.just(heads.Linear()) | st.builds(heads.MLP, st.none() | st.integers(1, 9)) | st.builds(heads.FCN)


@given(plan=SCHEDULE, more=st.sets(st.integers(1, 40)), head=PLAN, own=st.booleans(), size=st.integers(1, 999))
def test_a_manifest_survives_json(plan, more, head, own, size):
    after = tuple(sorted({*plan.after, *more}))
    whole = Manifest(schedule=plan, after=after, plan=head, built_head=own, classes=size, width=size, depth=41)
    assert manifest.from_json(manifest.to_json(whole)) == whole


@given(text=st.text() | st.binary().map(lambda raw: raw.decode("latin1")))
def test_any_other_text_is_refused_by_the_librarys_own_error(text):
    with pytest.raises(TokenExitError):
        manifest.from_json(text)
