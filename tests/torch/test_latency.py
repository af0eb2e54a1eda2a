"""The table of times: what is measured, and that it is the model's own."""

import json

import pytest
import torch

import tokenexit_torch as tet
from tests.torch import models
from tokenexit import TokenExitError, schedule
from tokenexit.latency import Latency

IMAGES = torch.randn(3, 3, 32, 48, generator=torch.Generator().manual_seed(0))


def no_bar(rounds, **_):
    return rounds


def wrapped(plan=schedule.dense()):
    return tet.wrap(models.timm_vit(), plan, num_classes=5)


def test_a_table_has_the_tokens_of_the_batch_and_times_for_each_part():
    model = wrapped(schedule.dtop(after=(2, 4))).train()
    table = tet.measure_latency(model, IMAGES, rounds=2, progress=no_bar)
    assert model.training
    assert table.batch == 3
    assert table.tokens[-1] == 25  # 24 patches and cls
    assert len(table.tokens) == 8
    assert all(seconds > 0 for seconds in table.block)
    assert Latency.from_dict(json.loads(json.dumps(table.to_dict()))) == table
    out = model.eval()(IMAGES)
    seconds = table.seconds(out.tokens_per_block, exits=len(out.exits))
    assert seconds.shape == (3,)
    assert (seconds > 0).all()


def test_what_a_model_lacks_takes_no_time():
    table = tet.measure_latency(wrapped(), IMAGES, rounds=1, progress=no_bar)
    assert table.exit == 0.0  # no exit head
    host = models.placed()  # which does not say where its sines are
    model = tet.wrap(host, schedule.dtop(after=(2,)), num_classes=5)
    assert tet.measure_latency(model, IMAGES, rounds=1, progress=no_bar).merge == 0.0


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (IMAGES[:0], {}, "`images` must be of at least one image, got shape"),
        (IMAGES[0], {}, "`images` must be of at least one image, got shape"),
        (IMAGES, {"rounds": 0}, "`rounds` must be a whole number from 1 up, got 0"),
        (IMAGES[:, :, :8], {}, "`images` must"),
    ],
)
def test_what_cannot_be_timed_is_refused(images, options, message):
    with pytest.raises(TokenExitError, match=message):
        tet.measure_latency(wrapped(), images, **options)
