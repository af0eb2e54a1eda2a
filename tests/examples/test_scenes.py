import json

import numpy as np
import pytest
import torch

import tokenexit_torch as tet
from examples import runs
from examples.scenes import train
from examples.scenes.draw import CLASSES, PALETTE, draw
from examples.scenes.vit import Config, PlainHost, ViT
from tokenexit import schedule


@pytest.mark.parametrize("size", [(64, 96), (96, 64)])
def test_a_scene_follows_from_its_seed_and_no_two_are_alike(size):
    one, same, other = (draw(np.random.default_rng(seed), size=size) for seed in (1, 1, 2))
    assert one.image.shape == (*size, 3)
    assert one.label.shape == size
    assert np.array_equal(one.image, same.image)
    assert np.array_equal(one.label, same.label)
    assert not np.array_equal(one.image, other.image)
    assert one.label.max() < len(CLASSES) == len(PALETTE)


def test_boxes_hold_the_things_they_name():
    things = {CLASSES.index("car"), CLASSES.index("person")}
    found = 0
    for seed in range(8):
        scene = draw(np.random.default_rng(seed), size=(128, 192))
        for kind, x0, y0, x1, y1 in scene.boxes.tolist():
            assert kind in things
            assert 0 <= x0 < x1 <= 192
            assert 0 <= y0 < y1 <= 128
            assert (scene.label[y0:y1, x0:x1] == kind).any()
            found += 1
        for kind in things:
            outside = scene.label == kind
            for _, x0, y0, x1, y1 in scene.boxes[scene.boxes[:, 0] == kind].tolist():
                outside[y0:y1, x0:x1] = False
            assert not outside.any()
    assert found > 8


def tiny(**changes):
    options = {"steps": 4, "size": (64, 96), "batch": 2, "fit_scenes": 2, "fit_steps": 3, "test_scenes": 2}
    return train.Recipe(**options | changes)


def test_an_interrupted_training_goes_on_to_the_same_result(unchecked, tmp_path, monkeypatch):
    recipe = tiny()
    straight = train.new_model(recipe)
    (tmp_path / "a").mkdir()
    train.train(straight, recipe, tmp_path / "a", every=100)

    stopped, calls = train.new_model(recipe), []
    (tmp_path / "b").mkdir()
    whole = train.checkpoints.save

    def save_then_stop(*args):
        whole(*args)
        calls.append(args)
        raise KeyboardInterrupt

    monkeypatch.setattr(train.checkpoints, "save", save_then_stop)
    with pytest.raises(KeyboardInterrupt):
        train.train(stopped, recipe, tmp_path / "b", every=2)
    monkeypatch.undo()
    resumed = train.new_model(recipe)
    train.train(resumed, recipe, tmp_path / "b", every=100)
    assert len(calls) == 1
    for (name, a), b in zip(straight.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    with pytest.raises(train.shell.UsageError, match="`--out` must be new or a run with the same settings"):
        train.train(resumed, tiny(seed=5), tmp_path / "b", every=100)


@torch.no_grad()
def test_a_run_folder_comes_back(tmp_path):
    recipe = tiny()
    model = tet.wrap(PlainHost(ViT(Config(width=32, depth=9))), train.PLAN, num_classes=len(CLASSES)).eval()
    about = runs.About(**vars(train.about(recipe)) | {"config": {"width": 32, "depth": 9}})
    runs.save(tmp_path, model, about)
    loaded, found = runs.load(tmp_path)
    assert found.classes == CLASSES
    assert loaded.schedule == train.PLAN
    images = torch.randn(1, 3, 64, 96)
    assert torch.equal(loaded(images).logits, model(images).logits)


def test_a_broken_run_folder_is_a_clear_error(tmp_path):
    with pytest.raises(ValueError, match="`folder` must hold a valid host.json"):
        runs.load(tmp_path)
    (tmp_path / "host.json").write_text('{"host": "os.system"}')
    with pytest.raises(ValueError, match="`folder` must hold a valid host.json"):
        runs.load(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        {"model_name": "vit_tiny_patch16_224", "checkpoint_path": "weights.pth"},
        {"model_name": "vit_tiny_patch16_224", "pretrained": True},
        {"model_name": "hf-hub:someone/something"},
        {"model_name": "../weights"},
    ],
)
def test_a_run_folder_cannot_make_timm_read_or_fetch_anything(tmp_path, config):
    about = {"host": "timm", "config": config, "classes": ["a"], "palette": [[0, 0, 0]], "mean": [0, 0, 0]}
    (tmp_path / "host.json").write_text(json.dumps(about | {"std": [1, 1, 1], "size": [32, 32]}))
    with pytest.raises(ValueError, match="`config` must have a plain model_name and only"):
        runs.load(tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 8), (24, 40), (64, 96)])
def test_the_plain_vit_takes_any_size_and_tells_positions_apart(size):
    vit = ViT(Config(width=32, depth=2)).eval()
    model = tet.wrap(PlainHost(vit), schedule.dense(after=(1,)), num_classes=3).eval()
    assert model(torch.zeros(1, 3, *size)).logits.shape == (1, 3, size[0] // 8, size[1] // 8)
    tokens = vit.embed(torch.zeros(1, 3, *size))[0]
    assert len(tokens.unique(dim=0)) == len(tokens)
