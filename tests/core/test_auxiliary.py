import pytest

from tokenexit import TokenExitError, auxiliary


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (0.4, {2: 0.4, 4: 0.4, 6: 1.0}),
        (0.0, {2: 0.0, 4: 0.0, 6: 1.0}),
        ({2: 0.5, 4: 1.0}, {2: 0.5, 4: 1.0, 6: 1.0}),
        ({2: 0.5, 3: 9.0, 4: 1.0}, {2: 0.5, 3: 9.0, 4: 1.0, 6: 1.0}),
    ],
)
def test_one_weight_is_for_all_exits_and_the_final_head_counts_whole(given, wanted):
    assert auxiliary.loss_weights(given, exits=(2, 4), depth=6) == wanted


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "wrong", [-1.0, float("nan"), None, True, {2: -1.0, 4: 1.0}, {2: 1.0, 4: 1.0, 6: 7.0}, {"2": 1.0}]
)
def test_what_is_no_weight_is_named(wrong):
    with pytest.raises(TokenExitError) as found:
        auxiliary.loss_weights(wrong, exits=(2, 4), depth=6)
    rule = "`auxiliary` must be a weight from 0 up, or one for each block with an exit"
    assert str(found.value) == f"{rule}, got {wrong!r}"


def test_an_exit_without_a_weight_is_named():
    message = r"`auxiliary` must have a weight for every exit that runs, got none for \[4\]"
    with pytest.raises(TokenExitError, match=message):
        auxiliary.loss_weights({2: 1.0}, exits=(2, 4), depth=6)
