"""The saliency example on random weights and drawn pictures: it says nothing but that all of it runs."""

import argparse

import numpy as np
import pytest
import torch
from PIL import Image

from examples import saliency, shell
from examples.timm_import import import_timm
from tokenexit.guarantees import ladders
from tokenexit_torch.calibration import adapted

SIZE = 56


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file as the model has it: positions of another grid, and no counters of batch norm."""
    torch.manual_seed(0)
    vit = import_timm().create_model("vit_small_patch14_dinov2", img_size=70, num_classes=0)
    own = vit.state_dict() | {f"decoder.{name}": value for name, value in saliency.Decoder().state_dict().items()}
    file = tmp_path_factory.mktemp("saliency") / "weights.npz"
    np.savez(file, **{name: value.numpy() for name, value in own.items() if not name.endswith("num_batches_tracked")})
    return file


def draw(folder, count):
    """Pictures of rectangles, in a folder."""
    rng = np.random.default_rng(0)
    for number in range(count):
        pixels = np.repeat(np.repeat(rng.integers(0, 255, (3, 4, 3)), 10, axis=0), 10, axis=1)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")


def test_every_candidate_has_its_row(weights, tmp_path):
    draw(tmp_path, 2)
    given = argparse.Namespace(weights=weights, images=tmp_path, size=SIZE, limit=None, batch=2, rounds=1)
    rows = saliency.evaluate(given)
    assert rows["dense"]["change"] < 1e-6
    assert rows["dense"]["brightest_iou"] == pytest.approx(1)
    merged = {name: row for name, row in rows.items() if name in saliency.PLANS}
    assert len(merged) == len(saliency.PLANS)
    assert all(0 < row["multiply_adds"] <= 1 and 0 <= row["brightest_iou"] <= 1 for row in merged.values())
    assert all(row["timing"]["speedup"][1] > 0 for row in rows.values())


def test_merges_are_certified_by_the_change_of_the_map(weights, tmp_path, monkeypatch):
    draw(tmp_path, 8)
    monkeypatch.setattr(
        adapted, "default_settings", lambda model: (ladders.by_distance(model.schedule, factors=(9.0,)), ((0,),))
    )
    given = argparse.Namespace(weights=weights, images=tmp_path, size=SIZE, limit=None, batch=4, calibrate=0.5)
    found = saliency.certified(given)
    assert found.report.risk == "loss of the user's own (mean absolute change of the map)"
    assert found.certificate is not None
    assert found.report.saving > 0


def test_a_map_is_compared_with_the_dense_one():
    dense = torch.arange(100.0).reshape(1, 10, 10) / 100
    assert saliency.compared(dense, dense) == {"change": 0.0, "brightest_iou": 1.0}
    found = saliency.compared(dense.flip(1), dense)
    assert found["brightest_iou"] == 0
    assert found["change"] == pytest.approx(0.5, abs=0.01)


def test_a_folder_without_pictures_is_refused(tmp_path):
    with pytest.raises(shell.UsageError, match="`--images` must be a folder of pictures"):
        saliency.read_pictures(tmp_path, SIZE, None)
