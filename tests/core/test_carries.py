import dataclasses
import json

import pytest
from hypothesis import given

from tests.core import strategies
from tokenexit import TokenExitError, carries
from tokenexit.carries import Feature, MaskPrediction, Prediction, Preserved, Translated


@given(carry=strategies.CARRY)
def test_a_carry_survives_json(carry):
    again = carries.from_dict(json.loads(json.dumps(carries.to_dict(carry))))
    assert again == carry
    assert type(again) is type(carry)


def test_what_is_written():
    assert carries.to_dict(Prediction()) == {"kind": "prediction"}
    preserved = {"kind": "preserved", "returning": "every gate", "keys": "running", "before": "decoder"}
    assert carries.to_dict(Preserved()) == preserved
    assert carries.to_dict(Feature()) == {"kind": "feature", "before": "decoder", "fold_above": None}
    assert carries.to_dict(MaskPrediction()) == {"kind": "mask_prediction"}
    assert carries.to_dict(Translated()) == {"kind": "translated", "fold_above": None}
    assert Prediction() != Preserved()
    assert Prediction() != MaskPrediction()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Feature("head"), "`before` must be 'decoder' or 'last block', got 'head'"),
        (lambda: Preserved("always"), "`returning` must be 'every gate' or 'never', got 'always'"),
        (lambda: Preserved(keys="some"), "`keys` must be 'running' or 'all', got 'some'"),
        (lambda: Preserved(before="head"), "`before` must be 'decoder' or 'last block', got 'head'"),
        (lambda: Feature(None), "`before` must be 'decoder' or 'last block', got None"),
        (lambda: Feature(["decoder"]), r"`before` must be 'decoder' or 'last block', got \['decoder'\]"),
        (lambda: Feature(fold_above=-0.1), r"`fold_above` must be None or in \[0, 1\], got -0.1"),
        (lambda: Feature(fold_above=1.1), r"`fold_above` must be None or in \[0, 1\], got 1.1"),
        (lambda: Feature(fold_above=float("nan")), r"`fold_above` must be None or in \[0, 1\], got nan"),
        (lambda: Feature(fold_above=True), r"`fold_above` must be None or in \[0, 1\], got True"),
        (lambda: Feature(fold_above="0.1"), r"`fold_above` must be None or in \[0, 1\], got '0.1'"),
        (lambda: Translated(fold_above=1.1), r"`fold_above` must be None or in \[0, 1\], got 1.1"),
        (
            lambda: carries.to_dict(None),
            "`carry` must be one of prediction, feature, preserved, mask_prediction, translated to be",
        ),
        (lambda: carries.to_dict(Feature), "`carry` must be one of prediction, .*got <class"),
        (lambda: carries.from_dict(None), "`carry` must be a mapping, got None"),
        (
            lambda: carries.from_dict({}),
            "`kind` must be one of prediction, feature, preserved, mask_prediction, translated, got None",
        ),
        (lambda: carries.from_dict({"kind": "Feature"}), "`kind` must be one of .*got 'Feature'"),
        (lambda: carries.from_dict({"kind": {}}), "`kind` must be one of .*got {}"),
        (lambda: carries.from_dict({"kind": "prediction", "x": 1}), r"`carry` must have the fields \[\] .*\['x'\]"),
        (
            lambda: carries.from_dict({"kind": "feature"}),
            r"`carry` must have the fields \['before', 'fold_above'\] for kind feature, got \[\]",
        ),
        (
            lambda: carries.from_dict({"kind": "feature", "before": "decoder", "fold_above": True}),
            r"`fold_above` must be None or in \[0, 1\], got True",
        ),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(TokenExitError, match=message):
        make()


def test_carries_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Feature().fold_above = 0.5  # pyright: ignore[reportAttributeAccessIssue]
