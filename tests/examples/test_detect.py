import functools
import json
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import tokenexit_torch as tet
from examples import runs, shell
from examples.precision import average_precision
from examples.scenes import detect
from examples.scenes.detection import Boxes, Detector, Raw, decoded, detection_loss, targets
from examples.scenes.vit import Config, PlainHost, ViT
from tests.saved import weights_in
from tokenexit import schedule

pytestmark = pytest.mark.usefixtures("in_float32")
SIZE = (128, 192)
SMALLEST = 48.0


def scenes(count=12):
    return [detect.things(detect.draw(np.random.default_rng(seed), size=SIZE)) for seed in range(count)]


def boxes(*rows):
    """Boxes from rows of x0, y0, x1, y1, class, score."""
    table = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
    return Boxes(table[:, :4], table[:, 4].long(), table[:, 5])


def wanted_of(truth, smallest=SMALLEST):
    return targets(truth, SIZE, classes=2, smallest=smallest)


def saying(wanted):
    """What a detector would say that says what is wanted."""
    return Raw(torch.logit(wanted.heat), wanted.place)


def looked_for(found):
    """The boxes that are large enough; of several of a class with one centre cell, the smallest."""
    area = (found.corners[:, 2:] - found.corners[:, :2]).prod(dim=1)
    cell = ((found.corners[:, :2] + found.corners[:, 2:]) / 8).long()
    kept = {}
    for one in area.argsort(descending=True, stable=True).tolist():
        if area[one] >= SMALLEST:
            kept[int(found.kind[one]), *cell[one].tolist()] = (*found.corners[one].tolist(), int(found.kind[one]))
    return sorted(kept.values())


def test_decoding_inverts_targets():
    truth = scenes()
    count = 0
    for found, there in zip(decoded(saying(wanted_of(truth))), truth, strict=True):
        peaks = found.score == 1
        rows = torch.cat((found.corners[peaks], found.kind[peaks, None]), dim=1)
        expected = torch.tensor(looked_for(there)).reshape(-1, 5)
        assert torch.allclose(torch.tensor(sorted(rows.tolist())).reshape(-1, 5), expected, atol=1e-3)
        count += len(expected)
    assert count > 40


def test_what_is_wanted_has_next_to_no_loss_and_anything_else_has_more():
    wanted = wanted_of(scenes(4))
    sure = Raw(torch.logit(wanted.heat.clamp(1e-4, 1 - 1e-4)), wanted.place)
    best = detection_loss(sure, wanted)
    assert best < 0.1
    assert detection_loss(sure._replace(place=wanted.place + 0.2), wanted) > best + 0.5
    assert detection_loss(sure._replace(heat=-sure.heat), wanted) > best + 5
    nothing = wanted_of([boxes()])
    assert detection_loss(Raw(torch.full_like(nothing.heat, -9.0), nothing.place), nothing) < 1e-3


@pytest.mark.parametrize(("cells", "overlap"), [(0, 1.0), (5, 1 / 3), (20, -1 / 3)])
def test_the_loss_of_a_box_is_that_of_a_hand_count(cells, overlap):
    wanted = wanted_of([boxes((40, 40, 80, 80, 0, 1))])
    heat = torch.where(wanted.heat == 1, 30.0, -30.0)
    aside = torch.tensor([cells, 0.0, 0.0, 0.0])[:, None, None]
    loss = detection_loss(Raw(heat, wanted.place + aside), wanted)
    assert loss.item() == pytest.approx(5 * (1 - overlap), abs=1e-5)


def test_small_objects_are_neither_learned_nor_a_mistake():
    wanted = wanted_of([boxes((20, 20, 24, 28, 1, 1))])
    assert not wanted.heat.any()
    assert not wanted.weight.any()
    assert 2 <= (~wanted.counted[0, 1]).sum() <= 12
    assert wanted.counted[0, 0].all()
    raw = Raw(torch.where(wanted.counted, -20.0, 20.0), wanted.place)
    assert detection_loss(raw, wanted) < 1e-6


def test_gradients_are_finite_whatever_the_detector_says():
    wanted = wanted_of(scenes(2))
    for scale in (1e-3, 1.0, 1e3):
        raw = Raw(*(torch.randn_like(value).mul_(scale).requires_grad_() for value in wanted[:2]))
        detection_loss(raw, wanted).backward()
        assert all(value.grad.isfinite().all() for value in raw)


@pytest.mark.parametrize("grid", [(16, 24), (9, 13), (1, 1)])
def test_the_pyramid_takes_any_grid(grid):
    detector = Detector(16, (1, 2, 3, 4), classes=2, channels=8)
    raw = detector({tap: torch.randn(2, 16, *grid) for tap in (1, 2, 3, 4)})
    assert raw.heat.shape == (2, 2, 2 * grid[0], 2 * grid[1])
    assert raw.place.shape == (2, 2, 4, 2 * grid[0], 2 * grid[1])
    assert len(decoded(raw)) == 2


def test_every_map_is_read():
    detector = Detector(16, (1, 2, 3, 4), classes=2, channels=8)
    maps = {tap: torch.randn(1, 16, 8, 8, requires_grad=True) for tap in (1, 2, 3, 4)}
    detector(maps).heat.sum().backward()
    assert all(one.grad.abs().max() > 0 for one in maps.values())


def test_perfect_detections_have_precision_1():
    truth = scenes()
    perfect = average_precision(truth, truth, classes=2, smallest=SMALLEST)
    assert (perfect.ap, perfect.ap50, *perfect.ap50_of_class) == pytest.approx((1, 1, 1, 1))
    # Of several objects of a class with one centre cell the detector can find one.
    assert average_precision(decoded(saying(wanted_of(truth))), truth, classes=2, smallest=SMALLEST).ap50 > 0.97


def test_precision_is_that_of_a_hand_count():
    truth = [boxes((0, 0, 20, 20, 0, 1), (40, 40, 60, 60, 0, 1))]
    half = average_precision([boxes((0, 0, 20, 20, 0, 0.9))], truth, classes=2)
    assert half.ap50 == pytest.approx(51 / 101)  # COCO reads precision at recalls of 0, 0.01, ..., 1
    assert np.isnan(half.ap50_of_class[1])
    rows = (0, 0, 20, 20, 0, 0.5), (80, 80, 90, 90, 0, 0.9)
    assert average_precision([boxes(*rows)], truth, classes=2).ap50 == pytest.approx(51 / 101 / 2)
    # An overlap of 0.6: right at 0.50, 0.55 and 0.60.
    loose = average_precision([boxes((0, 0, 20, 12, 0, 0.9))], [boxes((0, 0, 20, 20, 0, 1))], classes=1)
    assert (loose.ap50, loose.ap) == pytest.approx((1, 0.3))
    # Small ones count neither way.
    small = [boxes((0, 0, 20, 20, 0, 1), (50, 50, 54, 54, 0, 1))]
    found = [boxes((0, 0, 20, 20, 0, 0.5), (70, 70, 74, 74, 0, 0.9))]
    assert average_precision(found, small, classes=1, smallest=SMALLEST).ap == pytest.approx(1)
    assert average_precision([boxes()], truth, classes=1).ap == 0
    assert np.isnan(average_precision([boxes()], [boxes()], classes=1).ap)
    with pytest.raises(ValueError, match="`found` must be of as many images as `truth`, 1, got 0"):
        average_precision([], truth, classes=1)


def test_without_pycocotools_there_is_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(shell.UsageError, match="average precision needs pycocotools"):
        detect.run(tiny(), tmp_path)


def tiny(**changes):
    options = {"epochs": 2, "tuning": 2, "images": 2, "size": (64, 96), "batch": 2, "calibration": 2, "test": 8}
    options |= {"gates": (4, 8), "rates": (0.5,)}
    return detect.Recipe(**options | changes)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A narrow network in the place of the shipped one, and scenes that are drawn once for all runs."""
    config = {"width": 32, "depth": 12, "heads": 2, "patch": 8}
    torch.manual_seed(0)
    model = tet.wrap(PlainHost(ViT(Config(**config))), schedule.dense(), num_classes=2)
    about = runs.About("plain", config, ("a", "b"), ((0, 0, 0), (1, 1, 1)), (0.5,) * 3, (0.2,) * 3, (64, 96))
    runs.save(tmp_path / "network", model, about)
    monkeypatch.setattr(detect, "WEIGHTS", tmp_path / "network")
    drawn = functools.cache(
        lambda seed, stream, one, size: detect.draw(np.random.default_rng((seed, stream, one)), size=size)
    )
    monkeypatch.setattr(
        detect, "drawn_scenes",
        lambda recipe, stream, first, count: [
            drawn(recipe.seed, detect._STREAMS[stream], one, recipe.size) for one in range(first, first + count)
        ],
    )  # fmt: skip


def test_scenes_follow_from_seed_stream_and_number():
    recipe = tiny(seed=3)
    assert [scene.image.shape for scene in detect.drawn_scenes(recipe, "gated", 1, 2)] == [(64, 96, 3)] * 2
    (found,) = detect.drawn_scenes(recipe, "gated", 2, 1)
    expected = detect.draw(np.random.default_rng((3, detect._STREAMS["gated"], 2)), size=(64, 96))
    assert np.array_equal(found.image, expected.image)
    assert np.array_equal(found.boxes, expected.boxes)


def test_a_run_that_is_stopped_again_and_again_ends_with_the_same_result(unchecked, small, tmp_path, monkeypatch):
    straight = detect.run(tiny(), tmp_path / "a")
    whole, calls = detect.checkpoints.save, []

    def save_then_stop(*args):
        whole(*args)
        calls.append(args)
        if len(calls) % 2:  # in the middle of each of the three trainings
            raise KeyboardInterrupt

    monkeypatch.setattr(detect.checkpoints, "save", save_then_stop)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            detect.run(tiny(), tmp_path / "b")
    resumed = detect.run(tiny(), tmp_path / "b")
    assert json.dumps(resumed) == json.dumps(straight)
    assert json.loads((tmp_path / "b" / "result.json").read_text())["rows"].keys() == straight["rows"].keys()

    rows = straight["rows"]
    assert rows["dense"]["multiply_adds"] == rows["dense, trained as long"]["multiply_adds"]
    assert rows["gated"]["multiply_adds"] < 0.8 * rows["dense"]["multiply_adds"]
    assert len(rows["gated"]["kept"]) == 2
    assert weights_in(tmp_path / "b" / "gates", "gates").is_file()
    lines = detect.table(straight).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:6]] == list(rows)
    assert "AP50 with gates, less that of the dense network trained as long" in lines[7]
    with pytest.raises(shell.UsageError, match="`--out` must be new or a run with the same settings"):
        detect.run(tiny(seed=5), tmp_path / "b")


def test_the_last_block_is_dense_and_coins_decide_where_that_is_asked_for(unchecked, tmp_path):
    options = {"epochs": 1, "tuning": 1}
    usual, other = (
        detect.run(tiny(**options | more), tmp_path / name)
        for name, more in (("usual", {}), ("other", {"last": "dense", "random": 0.5}))
    )
    work = [one["rows"]["gated"]["multiply_adds"] for one in (usual, other)]
    assert work[0] < work[1] < usual["rows"]["dense"]["multiply_adds"]
    plan = json.loads((tmp_path / "other" / "gates" / "gates.json").read_text())["schedule"]
    assert plan["carry"]["before"] == "last block"
    weights = [
        load_file(weights_in(tmp_path / name / "gates", "gates"))["gates.4.1.weight"] for name in ("usual", "other")
    ]
    assert not torch.equal(*weights)


@pytest.mark.parametrize(("changes", "message"), [
    ({"epochs": 0}, "`--epochs` must be at least 1, got 0"),
    ({"test": 7}, "`--test` must be at least 8, got 7"),
    ({"images": 1}, "`--images` must be at least a batch, 2, got 1"),
    ({"size": (64, 100)}, "`--size` must be multiples of 16"),
])  # fmt: skip
def test_a_recipe_that_cannot_be_is_a_clear_error(changes, message):
    with pytest.raises(shell.UsageError, match=message):
        tiny(**changes)
