"""The JAX examples, as a person runs them, and what was trained in PyTorch on either side."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tokenexit_torch as tet
from examples import demo, shell
from examples import runs as torch_runs
from examples.camvid import common, data, gated
from examples.jax import camvid_evaluate, camvid_gates, equinox_vit, runs
from examples.scenes.draw import draw
from tests.examples.strips import CAMVID, READY, TOKENS, needs_data
from tests.jax.parity import same
from tokenexit import TokenExitError, policies, schedule
from tokenexit.schedule import Exit, Schedule

ROOT = Path(__file__).parents[3]


def run(module, *options):
    command = [sys.executable, "-m", module, *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)


def test_the_shipped_model_segments_unseen_scenes_with_fewer_tokens(tmp_path):
    done = run("examples.jax.segment", "--out", str(tmp_path), "--scenes", "1", "--rounds", "1")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "demo.json").read_text())
    assert found["agreement"] >= 0.99
    assert found["token_blocks"] < 0.75
    assert sum(found["patches_by_depth"].values()) == found["patches"] == 32 * 48
    assert found["multiply_adds"]["exits"] < found["multiply_adds"]["dense"]
    with Image.open(tmp_path / "demo.png") as picture:
        assert picture.width > 800
    for word in ("ms a picture", "token-blocks", "pixels as in dense", "into tokens of 4", "after block 6", "demo.png"):
        assert word in done.stdout


def test_the_demo_refuses_what_it_cannot_read(tmp_path):
    done = run("examples.jax.segment", "--model", str(tmp_path))
    assert done.returncode == 1
    assert "error: `folder` must hold a valid host.json" in done.stderr


@torch.no_grad()
def test_the_shipped_model_does_the_same_in_jax_as_in_pytorch():
    theirs, about = torch_runs.load(demo.SHIPPED)
    loaded, found = runs.load(demo.SHIPPED)
    assert found == about
    assert loaded.model.schedule == theirs.schedule
    scene = draw(np.random.default_rng(3), size=(64, 96)).image
    images = torch_runs.normalised(about, torch.from_numpy(scene).movedim(-1, 0)[None] / 255)
    wanted, out = theirs(images), loaded(camvid_evaluate.channels_last(images))
    assert len(wanted.exit_depth.unique()) > 1
    assert len(wanted.merged_size.unique()) > 1
    np.testing.assert_array_equal(out.exit_depth, wanted.exit_depth)
    np.testing.assert_array_equal(out.merged_size, wanted.merged_size)
    same(out.logits, wanted.logits.movedim(1, -1), 1e-4)
    cost = loaded.model.cost(loaded.params, camvid_evaluate.channels_last(images))
    np.testing.assert_array_equal(out.multiply_adds(cost), theirs.multiply_adds(wanted))


def timm_run(folder, **changes):
    """A run folder as the CamVid training writes it, with random weights; patches of 32 pixels, to be quick."""
    import tokenexit_torch as tet

    torch.manual_seed(0)
    config = common.vit_config(32, data.SIZE) | {"model_name": common.VIT}
    vit = common.build_vit(32, data.SIZE)
    plan = Schedule((Exit(4, policies.Budget(0.5)), Exit(8, policies.Budget(0.3))))
    model = tet.wrap(vit, plan, num_classes=len(data.CLASSES)).eval()
    about = torch_runs.About(
        "timm", config | changes, data.CLASSES, data.PALETTE, data.MEAN, data.STD, data.SIZE
    )  # fmt: skip
    torch_runs.save(folder, model, about)
    return model


@torch.no_grad()
def test_a_run_of_a_timm_network_is_read_as_it_lies(tmp_path):
    theirs = timm_run(tmp_path)
    loaded, _ = runs.load(tmp_path)
    images = torch.randn(1, 3, *data.SIZE, generator=torch.Generator().manual_seed(0))
    wanted, out = theirs(images), loaded(camvid_evaluate.channels_last(images))
    np.testing.assert_array_equal(out.exit_depth, wanted.exit_depth)
    same(out.logits, wanted.logits.movedim(1, -1), 1e-4)


@pytest.mark.parametrize(("change", "message"), [
    ({"model_name": "vit_base_patch16_224"}, "`config` must be one of"),
    ({"checkpoint_path": "weights.pth"}, "`config` must be one of"),
    ({"patch_size": 16}, "pos_embed: "),
])  # fmt: skip
def test_a_run_of_another_network_is_refused(tmp_path, change, message):
    timm_run(tmp_path, **change)
    with pytest.raises(TokenExitError, match=f"`folder` must hold a network as host.json says, .*{message}"):
        runs.load(tmp_path)


def test_the_thresholds_of_one_exit_are_moved():
    plan = schedule.neighbours(radius={4: 1, 6: 0}, threshold=0.5, per_class=2)
    assert camvid_evaluate.shifted(plan, 6, 0.125) == plan.with_threshold({6: 0.625})


@needs_data
def test_camvid_in_jax_is_camvid_in_pytorch(tmp_path, monkeypatch, capsys):
    file = tmp_path / "found.json"
    options = ["--data", str(CAMVID), "--init", str(READY), "--limit", "1", "--compare", "--json", str(file)]
    only = ["--only", "neighbours 0.9, k", "DoViT 0.95", "--rounds", "1", "--batches", "1", "--timing-images", "1"]
    monkeypatch.setattr(sys, "argv", ["camvid_evaluate", *options, *only])
    camvid_evaluate.main()
    results = json.loads(file.read_text())
    assert len(results["settings"]) == len(results["compared"]) == len(results["time"]["1"]) == 3
    for name, found in results["compared"].items():
        assert found["unexplained"] == 0
        assert found["logits"] < 1e-4
        assert found["miou"] == pytest.approx(results["settings"][name]["miou"], abs=5e-4)
    exits = [found for name, found in results["settings"].items() if name != "dense"]
    assert all(0.3 < found["token_blocks"] < 0.9 and found["agreement"] > 0.5 for found in exits)
    assert "beside PyTorch" in capsys.readouterr().out


@needs_data
def test_gates_on_camvid_in_jax_are_those_in_pytorch(ready_for_strips, strips, tmp_path, monkeypatch, capsys):
    vit, final, _ = common.ready_model(ready_for_strips, data.SIZE)
    torch.manual_seed(0)
    variant = gated.VARIANTS["svit-few"]
    model = gated.new_model(vit, final, variant).eval()
    for gate in model.gates.values():
        with torch.no_grad():
            gate.get_parameter("3.weight").mul_(20)
    plan = tet.gate_thresholds(model, torch.randn(2, 3, *data.SIZE), rates=variant.rate, progress=iter)
    gated.write_plans(tmp_path / "run", {0.65: plan})
    model.retune(plan)
    config = {"model_name": common.VIT, **common.vit_config(16, data.SIZE)}
    about = torch_runs.About(
        host="timm", config=config, classes=data.CLASSES, palette=data.PALETTE, mean=data.MEAN, std=data.STD,
        size=data.SIZE,
    )  # fmt: skip
    torch_runs.save_gated(tmp_path / "run", model, about)
    (tmp_path / "run" / "history.json").write_text(json.dumps({"recipe": {"method": "svit-few"}}))
    file = tmp_path / "found.json"
    options = ["--data", str(CAMVID), "--run", str(tmp_path / "run"), "--limit", "2", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["camvid_gates", *options, "--budgets", "0.65"])
    camvid_gates.main()
    results = json.loads(file.read_text())
    assert list(results) == ["dense", "gates 0.65"]
    assert results["gates 0.65"]["decisions"] == 2 * 3 * TOKENS
    assert results["gates 0.65"]["token_blocks"] < 0.97
    for found in results.values():
        assert found["unexplained"] == 0
        assert found["logits"] < 2e-4
        assert found["miou"] == pytest.approx(found["miou_pytorch"], abs=5e-4)
    assert "other decisions" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["camvid_gates", *options, "--budgets", "0.65"])
    (tmp_path / "run" / "history.json").write_text(json.dumps({"recipe": {"method": "svit-discarded"}}))
    with pytest.raises(shell.UsageError, match=r"`--run` must preserve features, got svit-discarded"):
        camvid_gates.main()
    (tmp_path / "run" / "history.json").write_text(json.dumps({"recipe": {"method": "svit"}}))
    monkeypatch.setattr(sys, "argv", ["camvid_gates", *options, "--budgets", "0.3"])
    with pytest.raises(shell.UsageError, match=r"`--budgets` must be among those of the run, \[0.65\], got \[0.3\]"):
        camvid_gates.main()


def test_an_equinox_network_takes_exits(capsys):
    equinox_vit.main()
    assert "dense" in capsys.readouterr().out
