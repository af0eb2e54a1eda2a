import json

import numpy as np
import pytest
import torch

from examples import shell
from examples.scenes import classify

pytestmark = pytest.mark.usefixtures("in_float32")

LIKE_OTHERS = ("swin", "swin-stvit-unscaled")
EACH = [pytest.param(one, marks=[pytest.mark.slow] if one in LIKE_OTHERS else []) for one in classify.NETWORKS]


def tiny(**changes):
    options = {"steps": 3, "size": (64, 96), "batch": 2, "scenes": 6, "test_scenes": 5}
    return classify.Recipe(**options | changes)


@pytest.fixture(scope="module")
def drawn():
    """Scenes of each stream, which take longer to draw than such a network to learn from, are drawn once."""
    whole, known = classify.drawn, {}

    def once(recipe, stream, count):
        key = (recipe.seed, recipe.size, stream, count)
        if key not in known:
            known[key] = whole(recipe, stream, count)
        return known[key]

    return once


@pytest.mark.parametrize("network", EACH)
def test_a_run_that_is_stopped_ends_with_the_same_result(network, drawn, unchecked, tmp_path, monkeypatch):
    recipe = tiny(network=network)
    monkeypatch.setattr(classify, "drawn", drawn)
    straight = classify.run(recipe, tmp_path / "a")
    whole, calls = classify.checkpoints.save, []

    def save_then_stop(*args):
        whole(*args)
        calls.append(args)
        raise KeyboardInterrupt

    monkeypatch.setattr(classify.checkpoints, "save", save_then_stop)
    with pytest.raises(KeyboardInterrupt):
        classify.run(recipe, tmp_path / "b", every=2)
    monkeypatch.setattr(classify.checkpoints, "save", whole)
    resumed = classify.run(recipe, tmp_path / "b")
    assert len(calls) == 1
    assert json.dumps(resumed) == json.dumps(straight)
    assert classify.results([tmp_path / "b"]) == json.loads(json.dumps([straight]))
    states = [classify.checkpoints.load(tmp_path / run / classify.CHECKPOINT)["model"] for run in "ab"]
    assert all(torch.equal(one, states[1][name]) for name, one in states[0].items())
    first = classify.new_model(recipe).state_dict()
    changed = {name for name, one in states[0].items() if not torch.equal(one, first[name])}
    assert {"head.weight", "head.bias"} < changed
    with pytest.raises(shell.UsageError, match="`--out` must be new or a run with the same settings"):
        classify.run(tiny(network=network, seed=5), tmp_path / "b")


@pytest.mark.parametrize(("name", "first"), [
    ("vit", ("head", "body.patches", "body.blocks.0")),
    ("swin", ("swin.stem", "swin.stages.0", "swin.stages.1")),
])  # fmt: skip
def test_a_pair_starts_with_the_same_weights(name, first):
    dense, shrunk = (classify.new_model(tiny(network=one)).state_dict() for one in (name, f"{name}-stvit"))
    for prefix in first:
        keys = [key for key in dense if key.startswith(prefix)]
        assert keys
        inside = {key: key.replace("body.", "body.model.") for key in keys}
        assert all(torch.equal(dense[key], shrunk[inside[key]]) for key in keys)


def test_answers_are_those_of_the_pictures():
    recipe = tiny(test_scenes=8)
    scenes = classify.drawn(recipe, 8, 8)
    assert scenes.images.shape == (8, 3, 64, 96)
    for number in range(8):
        scene = classify.draw(np.random.default_rng((0, 8, number)), size=(64, 96))
        assert np.array_equal(scenes.images[number].permute(1, 2, 0).numpy(), scene.image)
        for at, (kind, much) in enumerate(classify.ASKED.items()):
            assert scenes.shown[number, at] == (np.bincount(scene.label.ravel(), minlength=7)[kind] > much * 64 * 96)


def test_a_step_has_other_scenes_than_the_next_and_mirrors_keep_their_answers():
    scenes, recipe = classify.drawn(tiny(), 7, 6), tiny(batch=6)
    steps = [classify.of_step(scenes, recipe, step) for step in (0, 0, 1)]
    assert torch.equal(steps[0].images, steps[1].images)
    assert not torch.equal(steps[0].images, steps[2].images)
    mirrored = 0
    for image, shown in zip(steps[0].images, steps[0].shown, strict=True):
        same, other = ((scenes.images == one).flatten(1).all(1) for one in (image, image.flip(2)))
        assert (same | other).sum() == 1
        mirrored += other.sum().item()
        assert torch.equal(scenes.shown[same | other][0], shown)
    assert 0 < mirrored < 6


def test_precision_is_that_of_a_hand_count():
    shown = torch.tensor([True, False, True, False])
    assert classify.average_precision(torch.tensor([4.0, 3.0, 2.0, 1.0]), shown) == pytest.approx((1 + 2 / 3) / 2)
    assert classify.average_precision(torch.tensor([2.0, 1.0, 2.0, 1.0]), shown) == 1
    assert classify.average_precision(torch.tensor([1.0, 2.0, 1.0, 2.0]), shown) == pytest.approx((1 / 3 + 2 / 4) / 2)
    found = classify.marks(
        torch.tensor([[1.0] * 5, [-1.0] * 5]), torch.tensor([[True] * 5, [True, False] * 2 + [True]])
    )
    assert found["accuracy"] == pytest.approx(0.7)


def test_what_is_right_without_a_network():
    """Colours that give the answer away, and colours that say nothing of it."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (64, 3, 16, 16), generator=generator, dtype=torch.uint8)
    shown = torch.rand(64, 5, generator=generator) < torch.tensor([0.5, 0.5, 0.5, 0.75, 0.25])
    images[:, 0] = torch.where(shown[:, :1, None], 200, 50).to(torch.uint8)
    scenes = classify.Scenes(images, shown)
    halves = (classify.Scenes(*(part[at] for part in scenes)) for at in (slice(0, 32), slice(32, 64)))
    found = classify.without_a_network(*halves)
    assert found["thumbnail"]["ap"]["building"] == pytest.approx(1)
    assert found["thumbnail"]["ap"]["pole"] < 0.7
    share = shown[32:].double().mean(0)
    assert list(found["chance"]["ap"].values()) == pytest.approx(share.tolist())
    usual = shown[:32].double().mean(0) > 0.5
    assert found["chance"]["accuracy"] == pytest.approx((shown[32:] == usual).double().mean().item())


def test_the_table_has_a_row_for_each_network():
    def one(network, value, count):
        ap = dict.fromkeys((classify.CLASSES[kind] for kind in classify.ASKED), value)
        found = {"map": value, "accuracy": value, "ap": ap}
        recipe = {"network": network}
        return {"recipe": recipe, "network": found | {"multiply_adds": count}, "chance": found, "thumbnail": found}

    lines = classify.table([one("vit", 0.5, 4e6), one("vit-stvit", 0.25, 1e6), one("vit", 0.7, 4e6)]).splitlines()
    rows = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in lines[2:]}
    assert list(rows) == ["chance", "thumbnail", "vit", "vit-stvit"]
    assert rows["vit"][0] == "60.0 (50.0 to 70.0)"
    assert rows["vit"][-2:] == ["4", "1.00"]
    assert rows["vit-stvit"][0] == "25.0"
    assert rows["vit-stvit"][-2:] == ["1", "0.25"]


@pytest.mark.parametrize(("changes", "message"), [
    ({"network": "resnet"}, "`--network` must be one of vit, vit-stvit, swin, swin-stvit, swin-stvit-unscaled, got resnet"),
    ({"steps": 0}, "`--steps` must be at least 1, got 0"),
    ({"test_scenes": 0}, "`--test-scenes` must be at least 1, got 0"),
    ({"scenes": 1}, "`--scenes` must be at least a batch, 2, got 1"),
    ({"size": (64, 100)}, "`--size` must be multiples of 16"),
])  # fmt: skip
def test_a_recipe_that_cannot_be_is_a_clear_error(changes, message):
    with pytest.raises(shell.UsageError, match=message):
        tiny(**changes)


def test_a_folder_without_a_result_is_a_clear_error(tmp_path):
    with pytest.raises(shell.UsageError, match="`--table` must be folders of finished runs"):
        classify.results([tmp_path])
